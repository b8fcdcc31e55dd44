"""What models that write captions share."""

import numpy as np

from jaxrel.models import captions, word_tokenizer
from tests.errors import error
from tests.zoo.captioners import WORDS


def test_shared_parts_of_captions():
    text = np.array([[2, 5, 3, 3], [2, 5, 6, 7]])
    assert captions.end_of_caption(text, 3).tolist() == [2, 4]
    assert captions.special_ids(word_tokenizer(WORDS, 9)) == (2, 3, 0)
    tokenizer = word_tokenizer(WORDS, 9)
    tokenizer.pad_token = None
    assert captions.special_ids(tokenizer) == (2, 3, 3)
    tokenizer.bos_token = None
    with error(r"tokenizer has no start or no end token"):
        captions.special_ids(tokenizer)
    with error(r"the tokenizer knows no word of the caption of image 1"):
        captions.word_rows([["", "a", ""], ["", "", ""]], [1, 1])
