"""This module says how many FLOP an operation of torch takes in the forward and in the backward."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

FLOPS_PER_ELEMENT = {
    **dict.fromkeys(("native_batch_norm", "cudnn_batch_norm", "native_layer_norm", "native_group_norm"), 8),
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax"), 5),
    "gelu": 5,
    "silu": 4,
    "tanh": 1,
}
"""The FLOP for each element of an operation that takes several steps. Operations that are not named take one.

A norm takes 1 for the mean, 3 for the variance, 2 to normalize and 2 for the affine part. A softmax takes the maximum,
a difference, an exponential, a sum and a quotient.
"""

_MAKES_ROOM = ("empty", "new_", "zeros", "ones", "full", "arange", "scalar_tensor")
_COPIES = {"clone", "_to_copy"}
_MOVES = {
    *("zero", "fill", "lift_fresh", "copy", "set", "_unsafe_view", "_reshape_alias", "unsafe_split", "squeeze"),
    *("unsqueeze", "cat", "stack", "constant_pad_nd", "repeat", "roll", "flip", "pixel_shuffle", "pixel_unshuffle"),
}
"""Operations that write numbers, unchanged, to other places."""

_UNKNOWN = ("_fft", "linalg_", "_linalg", "cholesky", "lu_", "triangular_solve", "mkldnn_rnn", "_cudnn_rnn")
"""The first letters of operations that take more than a FLOP for each element, and for which there is no formula."""

_KNOWN_SMALL = ("linalg_vector_norm", "_linalg_check_errors")

_FACTORS = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "_scaled_mm"), (0, 1)),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv", "addr"), (1, 2)),
    **dict.fromkeys(("convolution", "_convolution", "cudnn_convolution", "convolution_overrideable"), (0, 1)),
}
"""The positions of the two factors among the arguments of a product."""

_PRODUCTS: Mapping[str, Callable[[Tensor, Tensor], int]] = {
    "mv": lambda matrix, vector: 2 * matrix.numel(),
    "addmv": lambda matrix, vector: 2 * matrix.numel(),
    "dot": lambda a, b: 2 * a.numel(),
    "vdot": lambda a, b: 2 * a.numel(),
    "addr": lambda a, b: 2 * a.numel() * b.numel(),
    "addbmm": lambda a, b: 2 * a.numel() * b.shape[-1],
}
"""The FLOP of products that torch's own counter does not know, from their factors."""


class Flops(NamedTuple):
    """The FLOP of an operation.

    Attributes:
        forward: those of the forward.
        backward: those of the backward, without the gradients of factors.
        factors: the factors of a product, each with the FLOP of its gradient.
    """

    forward: float
    backward: float = 0.0
    factors: Sequence[tuple[Tensor, float]] = ()


def name_of(operation: Any) -> str:
    """Return the name of an operation of torch, without the underscore of those that change a tensor in place."""
    return operation.overloadpacket.__name__.removesuffix("_")


def computes_nothing(name: str) -> bool:
    """Return whether an operation only makes room, or copies numbers into another layout or type."""
    return name in _MOVES or name in _COPIES or name.startswith(_MAKES_ROOM)


def is_copy(name: str) -> bool:
    """Return whether an operation copies one tensor as it is, maybe into another layout or type."""
    return name in _COPIES


def is_unknown(operation: Any) -> bool:
    """Return whether an operation may take more than a FLOP for each element, and it is not known how many.

    Such are the operations of other packages.
    """
    name = name_of(operation)
    return operation.namespace != "aten" or (name.startswith(_UNKNOWN) and name not in _KNOWN_SMALL)


def flops_of(
    name: str, args: Any, kwargs: Mapping[str, Any], out: Any, elements: int, learns: Callable[[Tensor], bool]
) -> Flops:
    """Return the FLOP of an operation.

    Args:
        name: its name (see :func:`name_of`).
        args: its positional arguments.
        kwargs: its other arguments.
        out: what it has returned.
        elements: the number of elements of its largest input or output.
        learns: whether the backward computes the gradient of a tensor.
    """
    if name.startswith("_scaled_dot_product_") and not name.endswith("_backward"):
        query, key, value = args[:3]
        return _attention(query, key, value, learns)
    if name == "_trilinear":
        return _trilinear(args, learns)
    operation = getattr(torch.ops.aten, name, None)
    if name in _FACTORS:
        a, b = (args[position] for position in _FACTORS[name])
        known = _PRODUCTS.get(name)
        flops = known(a, b) if known else flop_registry[operation](*args, **kwargs, out_val=out)
        return Flops(flops, 0.0, [(a, flops), (b, flops)])
    if operation in flop_registry:  # the backward of a product, which a step may compute itself
        flops = flop_registry[operation](*args, **kwargs, out_val=out)
        return Flops(flops, 2 * flops)
    if name.startswith("_embedding_bag"):  # the sums over bags
        flops = args[1].numel() * args[0].shape[1]
    elif name == "_cdist_forward":  # a difference, its power and a sum
        flops = 3 * out.numel() * args[0].shape[-1]
    else:
        flops = elements * FLOPS_PER_ELEMENT.get(name, 1)
    return Flops(flops, flops)


def _attention(query: Tensor, key: Tensor, value: Tensor, learns: Callable[[Tensor], bool]) -> Flops:
    """Return the FLOP of softmax(query·keyᵀ)·value, whose backward computes the scores again from query and key."""
    scores = prod(query.shape[:-1]) * key.shape[-2]
    to_scores, to_values = 2 * scores * query.shape[-1], 2 * scores * value.shape[-1]
    softmax = FLOPS_PER_ELEMENT["_softmax"] * scores
    errors_of_scores = to_values + softmax if learns(query) or learns(key) else 0
    return Flops(
        to_scores + softmax + to_values,
        to_scores + softmax + errors_of_scores,
        [(query, to_scores), (key, to_scores), (value, to_values)],
    )


def _trilinear(args: Any, learns: Callable[[Tensor], bool]) -> Flops:
    """Return the FLOP of a product of three tensors, the second of which has the weights of an ``nn.Bilinear``.

    The outer product of the other two comes first. Its errors, from which those of the two follow, take as many FLOP
    as the product with the weights.
    """
    shapes = [_unsqueezed(tensor, dims) for tensor, dims in zip(args[:3], args[3:6], strict=True)]
    outer = prod(torch.broadcast_shapes(shapes[0], shapes[2]))
    product = 2 * prod(torch.broadcast_shapes(*shapes))
    errors = product if learns(args[0]) or learns(args[2]) else 0
    return Flops(outer + product, errors, [(args[0], 2 * outer), (args[1], product), (args[2], 2 * outer)])


def _unsqueezed(tensor: Tensor, dims: Sequence[int]) -> list[int]:
    shape = [*tensor.shape]
    for dim in sorted(dims):
        shape.insert(dim, 1)
    return shape
