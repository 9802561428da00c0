"""A mini-batch of nested tensors to micro-batches."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from aimc_pl.errors import UsageError


def batch_size(batch: Any) -> int:
    """The number of samples: the first dimension of the batch's tensors.

    Raises:
        UsageError: if there is no tensor with a first dimension, or if they disagree.
    """
    sizes = {len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()}
    if len(sizes) != 1:
        raise UsageError(
            f"A mini-batch is split along the first dimension of its tensors; here these are of size {sorted(sizes)}. "
            "Let every tensor of the batch have one row per sample (or no dimension at all)."
        )
    return sizes.pop()


def split_batch(batch: Any, num_microbatches: int) -> list[Any]:
    """Split along dim 0 into micro-batches as ``torch.tensor_split`` does, none of them empty.

    Tensors and lists with one element per sample are split; other values go to every micro-batch.

    Args:
        batch: nested tuples, lists, named tuples and mappings of tensors, each of shape ``(samples, …)``.
        num_microbatches: at most this many micro-batches, fewer if there are fewer samples.

    Returns:
        Micro-batches of the batch's structure.

    Raises:
        UsageError: as :func:`batch_size`.
    """
    size = batch_size(batch)
    bounds = [len(part) for part in torch.arange(size).tensor_split(min(num_microbatches, size))]
    parts, start = [], 0
    for length in bounds:
        parts.append(_rows(batch, slice(start, start + length), size))
        start += length
    return parts


def _rows(value: Any, rows: slice, size: int) -> Any:
    if isinstance(value, Tensor):
        return value[rows] if value.dim() else value
    if isinstance(value, Mapping):
        return type(value)({key: _rows(item, rows, size) for key, item in value.items()})  # pyright: ignore[reportCallIssue]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_rows(item, rows, size) for item in value))
    if isinstance(value, list | tuple):
        if len(value) == size and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            return value[rows]
        return type(value)(_rows(item, rows, size) for item in value)
    return value
