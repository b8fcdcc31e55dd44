"""Batches of one size."""

import pytest

from jaxrel.train.evaluate.batching import equal_batches


@pytest.mark.parametrize(
    ("count", "batch", "rows"),
    [(5, 4, [0, 1, 2, 3, 4, 0, 1, 2]), (4, 4, [0, 1, 2, 3]), (1, 3, [0, 0, 0]), (0, 3, [])],
)
def test_the_last_batch_begins_again(count, batch, rows):
    batches = list(equal_batches(count, batch, "counting"))
    assert all(len(numbers) == batch for numbers in batches)
    assert [i for numbers in batches for i in numbers] == rows
