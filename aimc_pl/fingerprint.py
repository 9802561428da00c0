"""Whether two processes have read the same data, told by a few bytes."""

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
    """A hash of what a data loader has yielded, for comparison between processes.

    Of a large tensor, shape and type and 1,024 elements from all over it are hashed, so that it takes some tens of
    microseconds however large the batch is. Numbers and strings count too; what is neither, nor holds any, does not.
    """
    digest = blake2b(digest_size=8)
    _add(batch, digest)
    return digest.hexdigest()


def _add(value: Any, digest: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
        if value.layout is torch.strided and not value.is_nested and not value.is_quantized and value.numel():
            digest.update(_sample(value.detach()))
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        _add(torch.from_numpy(value), digest)
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
    elif (as_dict := getattr(value, "to_dict", None)) is not None:  # as of graphs of PyTorch Geometric
        _add(as_dict(), digest)


def _sample(tensor: Tensor) -> bytes:
    count = tensor.numel()
    if count > _SAMPLE:
        tensor = tensor.take(_places(count).to(tensor.device))
    return tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes()


@lru_cache(maxsize=64)
def _places(count: int) -> Tensor:
    # Multiples of the golden ratio are spread evenly, and never fall into step with the rows of images.
    return ((torch.arange(_SAMPLE, dtype=torch.float64) * _GOLDEN % 1) * count).long()
