"""A word-level tokenizer for models with a small vocabulary."""

from collections.abc import Sequence
from typing import Any

from jaxrel.models.processor import quiet_transformers

PAD, UNKNOWN, START, END = SPECIALS = ("<pad>", "<unk>", "<start>", "<end>")


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
