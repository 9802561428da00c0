"""Messages between processes as bytes: a description in JSON, and a body with the bytes of the tensors.

Nothing that is received is executed, and no message can name a class. A description can express the kinds of values
that :class:`Message` lists, and no others.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64
"""The size of a cache line in bytes. Every tensor in a body begins at a multiple of it."""
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


class Message:
    """A message of tensors, numpy arrays, numbers, strings and ``None``, in nested tuples, lists and dictionaries.

    Attributes:
        description: the structure of the values, to be passed to :func:`encode`.
        size: the size of the body in bytes.

    Raises:
        TypeError: if there is a value of another kind.
    """

    def __init__(self, values: Any) -> None:
        self.size = 0
        self._tensors: list[tuple[int, Tensor]] = []
        self.description = self._describe(values)

    def write(self, body: Tensor) -> None:
        """Write the tensors into ``body``, which is a tensor of bytes."""
        for start, tensor in self._tensors:
            _at(body, start, tensor.dtype, tensor.shape).copy_(tensor)

    def _describe(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            return self._place(value)
        if isinstance(value, tuple):
            return ["tuple", *map(self._describe, value)]
        if isinstance(value, list):
            return ["list", *map(self._describe, value)]
        if isinstance(value, Mapping):
            return ["dict", *([self._describe(key), self._describe(item)] for key, item in value.items())]
        if isinstance(value, np.ndarray):
            return ["array", self._place(torch.from_numpy(value))]
        if isinstance(value, np.generic):
            return self._describe(value.item())
        raise TypeError(
            f"a {type(value).__module__}.{type(value).__qualname__} cannot be sent to another process: only tensors, "
            "numpy arrays, numbers, strings and None can, in tuples, lists and dictionaries"
        )

    def _place(self, tensor: Tensor) -> Any:
        if tensor.layout is not torch.strided:
            raise TypeError(f"a tensor of layout {tensor.layout} cannot be sent to another process")
        start = self.size
        self._tensors.append((start, tensor.detach()))
        self.size = aligned(start + tensor.numel() * tensor.element_size())
        return ["tensor", start, str(tensor.dtype), tensor.requires_grad, *tensor.shape]


def read(description: Any, body: Tensor) -> Any:
    """Return the values of a message, copied from its body.

    Raises:
        ValueError: if the description and the body are not those of a message.
    """
    try:
        # What arrives during validation may be used in a training step. So it must not be an inference tensor.
        with torch.inference_mode(False):
            return _read(description, body)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError("the received bytes are not a valid message") from error


def _read(description: Any, body: Tensor) -> Any:
    if not isinstance(description, list):
        return description
    kind, *items = description
    if kind == "tensor":
        start, dtype, requires_grad, *shape = items
        if min([start, *shape]) < 0:
            raise ValueError("a negative size")
        return _at(body, start, _DTYPES[dtype], shape).clone().requires_grad_(requires_grad)
    if kind == "tuple":
        return tuple([_read(item, body) for item in items])
    if kind == "list":
        return [_read(item, body) for item in items]
    if kind == "dict":
        return {_read(key, body): _read(item, body) for key, item in items}
    if kind == "array":
        return _read(items[0], body).numpy()
    raise ValueError(f"unknown kind {kind!r}")


def _at(body: Tensor, start: int, dtype: torch.dtype, shape: Any) -> Tensor:
    """Return the part of a body that holds a tensor, with the type and shape of that tensor."""
    size = torch.Size(shape)
    return body[start : start + size.numel() * dtype.itemsize].view(dtype).view(size)


def encode(content: Any) -> bytes:
    """Return the bytes of ``content`` as JSON."""
    return json.dumps(content, separators=(",", ":")).encode()


def decode(content: bytes) -> Any:
    """Return what :func:`encode` has encoded.

    Raises:
        ValueError: if ``content`` is not JSON.
    """
    return json.loads(content)


def aligned(size: int) -> int:
    """Return ``size``, rounded up to a multiple of :data:`ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT
