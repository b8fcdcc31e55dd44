"""Words as they are written, whatever pieces a tokenizer makes of them."""

import json

import numpy as np
import pytest
from jax import numpy as jnp
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxrel.explanations.result import Explanation
from jaxrel.models import Processor, display, word_tokenizer

# The visible letters that stand for the bytes 0 to 255 in a byte-level vocabulary.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [*map(chr, VISIBLE), *(chr(256 + i) for i in range(256 - len(VISIBLE)))]
CONTEXT = 60


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory):
    """A tokenizer of CLIP's kind that knows single bytes alone."""
    folder = tmp_path_factory.mktemp("bytes")
    words = [*BYTES, *(x + "</w>" for x in BYTES), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="module")
def processor(bytes_folder):
    return Processor.from_folder(bytes_folder)


def shown(processor, text, **options):
    inputs = {"text": processor.text(text, CONTEXT)}
    return processor.shown(inputs | processor.spelling(text, CONTEXT, **options), **options)


def words(processor, text, **options):
    """The words of an explanation, each token of which has the relevance 1."""
    tokens = shown(processor, text, **options)
    fields = {"target": [text], "score": [0], "method": "m", "signed": False, "tokens": tokens}
    found = Explanation(**fields, text=[[float(token != "") for token in tokens[0]]]).words(0)
    # Every token counts, and every word is in the sentence.
    assert sum(relevance for _, relevance in found) == sum(map(bool, tokens[0]))
    assert display.sentence(tokens[0]) == " ".join(word for word, _ in found)
    return [word for word, _ in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a Cat", ["a", "cat"]),
        ("a 😀", ["a", "😀"]),
        ("👨‍👩‍👧 and 👍🏽", ["👨‍👩‍👧", "and", "👍🏽"]),
        ("i ❤️ you", ["i", "❤️", "you"]),
        ("红色 cat", ["红色", "cat"]),
        ("قطة حمراء", ["قطة", "حمراء"]),
        ("قِطَّة", ["قِطَّة"]),
        ("שָׁלוֹם עולם", ["שָׁלוֹם", "עולם"]),
        ("กินข้าว ที่นี่", ["กินข้าว", "ที่นี่"]),
        ("हिन्दी", ["हिन्दी"]),
        ("می‌خواهم", ["می‌خواهم"]),
        ("naïve", ["naïve"]),
        ("İstanbul", ["i\u0307stanbul"]),  # a character that is two in lower case
        ("nai\u0308ve x\u0302y", ["naïve", "x\u0302y"]),
        ("a “red” dog", ["a", "“", "red", "”", "dog"]),
        ("room 2024b", ["room", "2024b"]),
        ("a ## b", ["a", "##", "b"]),
        ("##a", ["##", "a"]),
        ("\\## b", ["\\##", "b"]),
    ],
)
def test_words_are_as_they_are_written(processor, text, expected):
    assert words(processor, text) == expected


def byte_level():
    """As GPT-2's, of single bytes: no piece says where a word ends."""
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate([*BYTES, "<end>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def byte_fallback():
    """As SigLIP 2's: letters, and bytes for all others."""
    tokens = ["<end>", "▁", *"abcdefghijklmnopqrstuvwxyz", *(f"<0x{i:02X}>" for i in range(256))]
    model = models.BPE({word: i for i, word in enumerate(tokens)}, [], byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
@pytest.mark.parametrize(
    "text",
    [
        *("a 😀 b", "naïve café", "红色 cat", "قطة حمراء", "👨‍👩‍👧 👍🏽", "हिन्दी"),
        *("½ of … x", "a \ufffd b", "\ufffd\ufffd a"),
    ],
)
def test_words_of_pieces_without_an_end(kind, text):
    assert words(Processor(kind()), text) == text.split()


def test_a_character_that_is_several_in_lower_case():
    processor = Processor(byte_fallback())
    assert words(processor, "a İstanbul") == ["a", "i\u0307stanbul"]


def test_added_tokens_stand_alone(bytes_folder):
    added = Processor.from_folder(bytes_folder)
    added.tokenizer.add_tokens(["<my-cat>", "mydog"])
    assert words(added, "a <my-cat> on a sofa") == ["a", "<my-cat>", "on", "a", "sofa"]
    assert words(added, "a<my-cat>b") == ["a", "<my-cat>", "b"]
    assert words(added, "mydogs") == ["mydog", "s"]


def test_unknown_words_keep_their_spelling():
    processor = Processor(word_tokenizer(["a", "red"], CONTEXT))
    with pytest.warns(UserWarning, match="does not know 'Astronaut', '😀'"):
        tokens = shown(processor, "a red Astronaut, 😀 ##x")
    assert tokens[0][:9] == [
        *("", "a", "red", "Astronaut (unknown)", ",", "😀 (unknown)", "#", "#", "x (unknown)")
    ]
    with pytest.warns(UserWarning, match="does not know 'cat'"):
        # What no word is has no relevance of its own in a model that explains words.
        assert shown(processor, "a cat, red", known=True)[0][:5] == [
            *("", "a", "cat (unknown)", "", "red")
        ]
    # Nothing is kept where the ids tell all, and ids alone still are displayed.
    assert processor.spelling("a red", CONTEXT) == {}
    assert processor.tokens(np.array([[2, 4, 1, 3]])) == [["", "a", "<unk>", ""]]


def test_spelling_comes_back():
    rows = [["", "a", "##b"], ["", "ä😀", ""]]
    coded = display.encode(rows, 4)
    assert (coded.shape, coded.dtype) == ((2, 4, 3), np.int32)
    assert display.decode(coded) == [[*row, ""] for row in rows]
    assert set(display.without_spelling({"text": 1, "spelling": jnp.zeros(1)})) == {"text"}


def test_pieces_that_say_so_continue():
    # As a word-piece tokenizer writes them.
    vocabulary = {"[UNK]": 0, "cir": 1, "##cle": 2, "a": 3, "<s>": 4}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<s>")
    assert Processor(tokenizer).tokens([[3, 1, 2]]) == [["a", "cir", "##cle"]]
