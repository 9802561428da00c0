"""This module computes short hashes of data, by which processes check that they have read the same."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SAMPLE = 1024
_GOLDEN = (5**0.5 - 1) / 2


def fingerprint(batch: Any) -> str:
    """Return a hash of a batch from a data loader, which processes can compare.

    Of a large tensor, the hash covers the shape, the type, and 1,024 elements from all over it. This takes some tens
    of microseconds for a batch of any size. Numbers and strings count too. A value that is none of these, and holds
    none of them, does not count.
    """
    digest = blake2b(digest_size=8)
    _add(batch, digest)
    return digest.hexdigest()


def _add(value: Any, digest: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
        if value.layout is torch.strided and not value.is_nested and not value.is_quantized and not value.is_meta:
            elements = value.detach()
            elements = elements.take(_places(value.numel()).to(value.device)) if value.numel() > _SAMPLE else elements
            digest.update(elements.resolve_conj().resolve_neg().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        digest.update(f"{value.shape} {value.dtype}".encode())
        elements = value.ravel()[_places(value.size).numpy()] if value.size > _SAMPLE else value
        if value.dtype.char in "gG":  # long doubles end in bytes that mean nothing
            elements = elements.astype(np.complex128 if value.dtype.kind == "c" else np.float64)
        digest.update(np.ascontiguousarray(elements))
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        digest.update(repr(value).encode())
    elif isinstance(value, tuple | list):
        for item in value:
            _add(item, digest)
    elif isinstance(value, Mapping):
        for item in value.items():
            _add(item, digest)
    elif is_dataclass(value) and not isinstance(value, type):
        _add([getattr(value, field.name, None) for field in fields(value)], digest)
    elif (as_dict := getattr(value, "to_dict", None)) is not None:  # graphs of PyTorch Geometric have it
        _add(as_dict(), digest)


@lru_cache(maxsize=64)
def _places(count: int) -> Tensor:
    # Multiples of the golden ratio are spread evenly, and do not repeat with the rows of an image.
    return ((torch.arange(_SAMPLE, dtype=torch.float64) * _GOLDEN % 1) * count).long()
