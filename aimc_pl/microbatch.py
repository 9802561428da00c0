"""Functions that split a mini-batch of any structure into micro-batches."""

import gc
import sys
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from copy import copy
from dataclasses import fields, is_dataclass
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from aimc_pl.errors import UsageError

Reading = Mapping[tuple[Any, ...], Any]
"""How a batch is split: at every place, the keys or indices that lead there.

At the place of the batch itself, this is one of the kinds of :class:`_Layout`. At the place of a list or array in the
batch, it is whether there is one element per sample.
"""


def batch_size(batch: Any, known: Reading = MappingProxyType({})) -> int:
    """Return the number of samples in a batch, which is the size of the first dimension of its tensors.

    The samples of a packed sequence are its sequences, and those of a PyTorch Geometric ``Batch`` are its graphs.
    Tensors in lists within the batch count only if there are no other tensors, since such a list may hold a tensor of
    any size per sample.

    Args:
        batch: a batch.
        known: see :func:`split_batch`.

    Raises:
        UsageError: if no tensor has a first dimension, or if the tensors disagree.
    """
    return _layout(batch, known).size


def split_batch(batch: Any, num_microbatches: int, known: Reading = MappingProxyType({})) -> list[Any]:
    """Split a mini-batch along dim 0 into micro-batches as ``torch.tensor_split`` does, none of them empty.

    At any depth of the batch,

    - tensors and NumPy arrays are split by rows, packed sequences by sequences, a PyTorch Geometric ``Batch`` by its
      graphs;
    - the contents of tuples, lists, mappings and dataclasses are split, and these containers keep their types.
      Dataclasses are copied and not initialised again, which keeps a number that was computed from the whole batch;
    - a list or tuple within the batch with one element per sample is split by elements, unless it holds tensors that
      have a row per sample themselves;
    - tensors without a dimension and values without tensors go to every micro-batch.

    If all tensors of a batch are in lists of the same length, such as a list of images and a list of targets, this
    length is the number of samples. A list of samples that have not been collated is split by its elements.

    Args:
        batch: a mini-batch, as the data loader yields it.
        num_microbatches: the largest number of micro-batches; there are fewer if there are fewer samples.
        known: how earlier batches of this structure were read, see :func:`reading`. This batch is then read alike: a
            list of two numbers that all samples share stays a constant in a batch of two samples.

    Returns:
        The micro-batches, each of which has the structure of the batch.

    Raises:
        UsageError: if no tensor has a first dimension, if the tensors disagree about the number of samples, or if a
            value holds tensors in a way that is not understood.
    """
    size, kind = _layout(batch, known)
    bounds = [len(part) for part in torch.arange(size).tensor_split(min(num_microbatches, size))]
    found, parts, start = reading(batch, known), [], 0
    for length in bounds:
        rows = slice(start, start + length)
        parts.append(batch[rows] if kind == "samples" else _rows(batch, rows, size, found))
        start += length
    return parts


def reading(batch: Any, known: Reading = MappingProxyType({})) -> Reading:
    """Return how :func:`split_batch` reads a batch.

    Args:
        batch: a mini-batch.
        known: how earlier batches of this structure were read.

    Raises:
        UsageError: if a list that had one element per sample in earlier batches has another length.
    """
    layout = _layout(batch, known)
    of_lists = {} if layout.kind == "samples" else dict(_lists_within(batch, layout, known))
    return {(): layout.kind} | of_lists


def _lists_within(
    value: Any, layout: "_Layout", known: Reading, place: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], bool]]:
    """Yield the places of lists and arrays in a batch, and whether they have one element per sample."""
    if _samples(value) is not None:
        return
    if place and (_is_list(value) or isinstance(value, np.ndarray)):
        of_elements = layout.kind == "elements" and _is_list(value)
        per_sample = known.get(place, of_elements or _has_element_per_sample(value, layout.size))
        if per_sample and len(value) != layout.size:
            raise _disagreement({len(value), layout.size})
        yield place, per_sample
        if per_sample:
            return
    for key, child in _children(value).items():
        yield from _lists_within(child, layout, known, (*place, key))


class _Layout(NamedTuple):
    """How the samples of a batch lie in it.

    Args:
        size: the number of samples.
        kind: ``"samples"`` if the batch is a list of samples, ``"elements"`` if all lists within the batch have one
            element per sample, and ``"rows"`` otherwise.
    """

    size: int
    kind: str


def _layout(batch: Any, known: Reading) -> _Layout:
    kind = known.get(())
    if kind == "samples" or (kind is None and _is_list_of_samples(batch)):
        return _Layout(len(batch), "samples")
    sizes = _sizes(batch, into_lists=False)
    lists = [] if sizes else _lists(batch)
    sizes = sizes or _sizes(batch)
    if kind != "rows" and sizes and _has_list_per_value(lists):
        size = len(lists[0])
        if kind == "elements":
            return _Layout(size, kind)
        if len(sizes) == 1 and all(map(_sizes, lists)) and len(lists) > 1:
            raise _ambiguity(sizes.pop(), size)
        if len(sizes) > 1 or not all(map(_sizes, lists)):
            return _Layout(size, "elements")
    if not sizes:
        _rows(batch, slice(0), -1, {})  # If a type is not understood, this raises an error that names it.
    if len(sizes) != 1:
        raise _disagreement(sizes)
    return _Layout(sizes.pop(), "rows")


def _is_list_of_samples(batch: Any) -> bool:
    """Return whether a batch is a list of samples that have not been collated.

    Its elements then have the same structure, and hold numbers or tensors of different sizes, or are graphs.
    """
    if not _is_list(batch) or not batch or isinstance(batch[0], Tensor):
        return False
    keys, sizes = {(type(element), *_children(element)) for element in batch}, _sizes(batch)
    if len(keys) != 1 or not sizes or (_is_list(batch[0]) and _has_list_per_value(batch)):
        return False
    children = _children(batch[0]).values()
    if not children:
        return len(batch) > 1 and sizes == {1}  # The elements are graphs, each of which is a sample.
    has_number = any(isinstance(child, int | float | np.number) or _is_scalar(child) for child in children)
    return has_number or len(sizes) > 1


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.dim()


def _lists(value: Any, is_batch: bool = True) -> list[Any]:
    """Return the outermost lists within a batch."""
    if _is_list(value) and not is_batch:
        return [value]
    children = [] if _samples(value) is not None else _children(value).values()
    return [found for child in children for found in _lists(child, is_batch=False)]


def _has_list_per_value(lists: list[Any]) -> bool:
    """Return whether each list seems to have one element per sample: all are equally long, and each holds one kind."""

    def kind(element: Any) -> Any:
        return (element.dtype, element.dim()) if isinstance(element, Tensor) else type(element)

    return len({len(found) for found in lists}) == 1 and all(len(set(map(kind, found))) == 1 for found in lists)


def _sizes(value: Any, into_lists: bool = True) -> set[int]:
    """Return the numbers of samples that the tensors in a value have."""
    if (samples := _samples(value)) is not None:
        return {samples[0]}
    children = _children(value).values()
    return set().union(*(_sizes(child, into_lists) for child in children if into_lists or not _is_list(child)))


def _rows(value: Any, rows: slice, size: int, found: Reading, place: tuple[Any, ...] = ()) -> Any:
    """Return some rows of a value that belongs to a batch.

    Args:
        value: the value.
        rows: the samples to take.
        size: the number of samples of the batch.
        found: how the batch is read.
        place: where the value is in the batch.
    """
    if (samples := _samples(value)) is not None:
        count, take = samples
        if count != size:
            raise _disagreement({count, size})
        return take(rows)
    if place and found.get(place):
        return value[rows]
    children = _children(value)
    _refuse_tensors(value, besides=children)
    parts = {key: _rows(child, rows, size, found, (*place, key)) for key, child in children.items()}
    if all(parts[key] is child for key, child in children.items()):
        return value  # It is a constant.
    return _with_children(value, parts)


def _samples(value: Any) -> tuple[int, Callable[[slice], Any]] | None:
    """Return the number of samples of a value, and a function that returns the samples in a slice.

    Returns:
        ``None`` if the value is a container or a constant.
    """
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0]), lambda rows: _packed_rows(value, rows)
    if isinstance(value, Tensor):
        return (value.size(0), lambda rows: _tensor_rows(value, rows)) if value.dim() else None
    # The package is not imported here. A program whose batches are graphs has imported it.
    geometric = sys.modules.get("torch_geometric.data")
    if geometric is not None and isinstance(value, geometric.Batch):
        return value.num_graphs, lambda rows: _graph_rows(value, rows)
    if geometric is not None and isinstance(value, geometric.Data | geometric.HeteroData):
        return 1, lambda rows: value
    return None


def _tensor_rows(tensor: Tensor, rows: slice) -> Tensor:
    per_channel = tensor.is_quantized and tensor.qscheme() != torch.per_tensor_affine
    if tensor.layout is not torch.strided or tensor.is_nested or per_channel:
        kind = "nested" if tensor.is_nested else "quantized" if per_channel else str(tensor.layout)
        raise _refusal(f"{_name(tensor)} ({kind})")
    # Every part needs its own version counter, or autograd would take a change in one micro-batch for one in another.
    part = tensor[rows] if tensor.requires_grad else tensor.data[rows].data
    if type(part) is not type(tensor) and not isinstance(tensor, Parameter):
        part = part.as_subclass(type(tensor))
    for name, value in vars(tensor).items():
        found = dict(_lists_within(value, _Layout(tensor.size(0), "rows"), {}, (name,)))
        setattr(part, name, _rows(value, rows, tensor.size(0), found, (name,)))
    return part


def _packed_rows(packed: PackedSequence, rows: slice) -> PackedSequence:
    # Padding restores the order that the sequences had before packing, which is that of the batch's other tensors.
    padded, lengths = pad_packed_sequence(packed, batch_first=True)
    in_order = packed.sorted_indices is None
    return pack_padded_sequence(padded[rows], lengths[rows], batch_first=True, enforce_sorted=in_order)


def _graph_rows(graphs: Any, rows: slice) -> Any:
    names = set(graphs.keys())
    follow = [name for name in names if {f"{name}_batch", f"{name}_ptr"} <= names]
    try:
        part = sys.modules["torch_geometric.data"].Batch.from_data_list(graphs[rows], follow_batch=follow)
    except RuntimeError as error:
        raise _refusal(f"{_name(graphs)} ({error})") from error
    if lost := names - set(part.keys()):
        raise _refusal(f"{_name(graphs)} with {sorted(lost)}, which no single graph has")
    return part


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and not hasattr(value, "_fields")


def _has_element_per_sample(value: Any, size: int) -> bool:
    if isinstance(value, np.ndarray):
        return value.shape[:1] == (size,)
    if not _is_list(value) or len(value) != size:
        return False
    sizes = _sizes(value)
    if sizes == {size} and len({element.shape[1:] for element in value if isinstance(element, Tensor)}) > 1:
        raise _ambiguity(size, size)
    return not sizes or (sizes != {size} and len({type(element) for element in value}) == 1)


def _children(value: Any) -> dict[Any, Any]:
    """Return the contents of a container by index, key or attribute; an empty dictionary for any other value."""
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if _has_attributes(value):
        names = [field.name for field in fields(value)] if is_dataclass(value) else []
        return {name: getattr(value, name) for name in names if hasattr(value, name)} | getattr(value, "__dict__", {})
    return dict(value) if isinstance(value, Mapping) else {}


def _with_children(value: Any, children: dict[Any, Any]) -> Any:
    """Return a container like ``value`` with other contents."""
    if isinstance(value, list | tuple):
        return getattr(type(value), "_make", type(value))(children.values())
    if _has_attributes(value):
        other = object.__new__(type(value))
        for name, child in children.items():
            object.__setattr__(other, name, child)  # This works for a frozen dataclass too.
        return other
    if not isinstance(value, MutableMapping):
        return type(value)(children)
    other = copy(value)  # This keeps a defaultdict's factory, for example.
    for key, child in children.items():
        other[key] = child
    return other


def _has_attributes(value: Any) -> bool:
    """Return whether a container keeps its contents in attributes: a dataclass, or a UserDict such as BatchEncoding."""
    if isinstance(value, Mapping):
        return isinstance(value, UserDict)
    return is_dataclass(value) and not isinstance(value, type)


def _refuse_tensors(value: Any, besides: dict[Any, Any]) -> None:
    """Check that a value refers to no tensor, at any depth, other than those in its known children.

    Raises:
        UsageError: if it does.
    """
    seen = {id(child) for child in besides.values()}
    to_see = [value]
    while to_see:
        item = to_see.pop()
        if id(item) in seen or isinstance(item, type | ModuleType | FunctionType):
            continue
        if isinstance(item, Tensor) and item.dim():
            raise _refusal(f"{_name(value)} with tensors")
        seen.add(id(item))
        to_see += gc.get_referents(item)


def _refusal(what: str) -> UsageError:
    return UsageError(
        f"The batch holds a {what}, and how to split it is not known: pass split_batch=, a function "
        "(batch, num_microbatches) -> micro-batches, to the strategy, or define split_batch on the LightningModule."
    )


def _disagreement(sizes: set[int]) -> UsageError:
    return UsageError(
        f"A mini-batch is split along the first dimension of its tensors; here these are of size {sorted(sizes)}. "
        "Let every tensor of the batch have one row per sample (or no dimension at all), or pass split_batch= to the "
        "strategy."
    )


def _ambiguity(rows: int, elements: int) -> UsageError:
    return UsageError(
        f"The batch holds lists of {elements} tensors with {rows} rows each, and either number can be that of the "
        "samples: pass split_batch=, a function (batch, num_microbatches) -> micro-batches, to the strategy."
    )


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
