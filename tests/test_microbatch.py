"""Splitting nested batches."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aimc_pl.errors import UsageError
from aimc_pl.microbatch import batch_size, split_batch

Pair = namedtuple("Pair", ["x", "y"])


@given(st.integers(1, 40), st.integers(1, 50))
def test_splits_as_tensor_split_and_never_empty(samples, num_microbatches):
    x = torch.arange(samples)
    parts = split_batch(x, num_microbatches)
    expected = [part for part in x.tensor_split(num_microbatches) if len(part)]
    assert [part.tolist() for part in parts] == [part.tolist() for part in expected]


def test_nested_batches_keep_their_structure():
    batch = OrderedDict(
        pair=Pair(torch.arange(5), torch.arange(10).view(5, 2)),
        names=["a", "b", "c", "d", "e"],
        several=[torch.arange(5), torch.arange(5) * 2],
        scale=torch.tensor(3.0),
        flag=True,
        shapes=(8, 8),
    )
    first, second = split_batch(batch, 2)
    assert type(first) is OrderedDict
    assert type(first["pair"]) is Pair
    assert second["pair"].y.tolist() == [[6, 7], [8, 9]]
    assert (first["names"], second["names"]) == (["a", "b", "c"], ["d", "e"])
    assert [part.tolist() for part in second["several"]] == [[3, 4], [6, 8]]
    assert first["scale"] == 3
    assert second["flag"] is True
    assert first["shapes"] == (8, 8)
    assert batch_size(second) == 2


@pytest.mark.parametrize("batch", [(torch.ones(4), torch.ones(5)), {"n": 3}, [], torch.tensor(1.0)])
def test_batches_that_cannot_be_split(batch):
    with pytest.raises(UsageError, match="split along the first dimension"):
        split_batch(batch, 2)
