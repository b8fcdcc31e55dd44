"""Tokenizers: that of a model's folder, and a word-level one for a small vocabulary."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxrel.models.checkpoint import read_json

TOKENIZER_FILES = "tokenizer.json (or vocab.json and merges.txt)"
# All that say something of a tokenizer.
_FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
PAD, UNKNOWN, START, END = SPECIALS = ("<pad>", "<unk>", "<start>", "<end>")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Import or call transformers without its advice to install PyTorch, which is not needed."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def read_tokenizer(folder: Path) -> Any:
    """Read the tokenizer of a model folder; None where there is none.

    Args:
      folder: a folder in the Hugging Face layout.

    Returns:
      A `transformers` tokenizer. What its files do not say of start, end and padding, the
      tokenizer itself tells.

    Raises:
      ValueError: a file is there and cannot be read.
    """
    with quiet_transformers():
        if (folder / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast as Tokenizer
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            from transformers import CLIPTokenizer as Tokenizer
        else:
            return None
        try:
            tokenizer = Tokenizer.from_pretrained(str(folder), local_files_only=True)
            _name_specials(tokenizer, alone=not (folder / "tokenizer_config.json").is_file())
            tokenizer("a", return_offsets_mapping=True, verbose=False)  # as `Processor` does
        except Exception as error:  # the tokenizers library raises bare Exception
            there = [folder / name for name in _FILES if (folder / name).is_file()]
            for path in there:
                if path.suffix == ".json":
                    read_json(path)  # says which file it is, if it is no JSON
            names = " and ".join(path.name for path in there)
            raise ValueError(
                f"the tokenizer in {folder} cannot be read ({error}); fetch its files again: "
                f"{names}"
            ) from error
    return tokenizer


def _name_specials(tokenizer: Any, *, alone: bool) -> None:
    """Name the special tokens that tokenizer_config.json does not name, or is not there to name."""
    backend = tokenizer.backend_tokenizer
    around = backend.encode("").tokens
    names: dict[str, str | None] = {}
    if len(around) >= 2:
        names |= {"bos_token": around[0], "eos_token": around[-1]}
    if alone:
        padding = backend.padding or {}
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        usual = next((token for token in (PAD, "[PAD]") if token in added), None)
        names["pad_token"] = padding.get("pad_token") or usual
    names["unk_token"] = getattr(backend.model, "unk_token", None)
    for name, token in names.items():
        if token is not None and getattr(tokenizer, name) is None:
            setattr(tokenizer, name, token)


def word_tokenizer(vocabulary: Sequence[str], context: int) -> Any:
    """Build a tokenizer that knows whole words.

    Text is lower-cased and split at white space and around punctuation. The ids are
    0 `<pad>`, 1 `<unk>`, 2 `<start>`, 3 `<end>`, then the vocabulary in its order; every text
    gets a `<start>` and an `<end>`.

    Args:
      vocabulary: the words, each one token of lower-case text.
      context: the longest sequence the model reads, with `<start>` and `<end>`.

    Returns:
      A `transformers.PreTrainedTokenizerFast` of `len(vocabulary) + 4` tokens.

    Raises:
      ValueError: a word is repeated or is not one lower-case token, the vocabulary is empty,
        or `context` leaves no room for a word.
    """
    if context < 3:
        raise ValueError(f"context is {context}: <start>, one word and <end> need at least 3")
    if not vocabulary:
        raise ValueError("the vocabulary is empty; give the words that the texts are made of")
    with quiet_transformers():
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate((*SPECIALS, *vocabulary))}
    if len(ids) != len(SPECIALS) + len(vocabulary):
        repeated = sorted({word for word in vocabulary if list(vocabulary).count(word) > 1})
        raise ValueError(f"repeated in the vocabulary, or a special token: {repeated or SPECIALS}")
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    split = {word: tokenizer.encode(word).tokens for word in vocabulary}
    broken = [word for word, tokens in split.items() if tokens != [word]]
    if broken:
        raise ValueError(f"not one lower-case token, so no text can contain it: {broken[:5]}")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, ids[START]), (END, ids[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        model_max_length=context,
    )
