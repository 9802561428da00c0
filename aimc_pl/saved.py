"""This module determines what a backward sees of weights that have changed since its forward."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from aimc_pl.private_torch import base_of, set_versions, versions_of
from aimc_pl.private_torch import version as version_of


@contextmanager
def current_weights(parameters: Sequence[nn.Parameter], versions: Sequence[int]) -> Iterator[None]:
    """Context manager that lets a backward use the weights as they are now.

    autograd keeps references to the weights, and refuses a backward when the weights have changed in place. Their
    version counters are therefore set back for the time of the backward.

    Args:
        parameters: the parameters that may have changed.
        versions: what :func:`aimc_pl.private_torch.versions_of` returned right after the forward.
    """
    now = versions_of(parameters)
    set_versions(parameters, versions)
    try:
        yield
    finally:
        set_versions(parameters, now)


@dataclass
class _Reference:
    """A saved view of a parameter (or of its autocast copy), which the backward takes again from ``source``.

    ``offset`` is counted from the first element of the parameter.
    """

    source: Tensor
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class SavedParameters:
    """Hooks that decide what autograd saves of parameters.

    By default a reference is saved even where autocast has made a copy, and the backward uses the current weights.
    With ``stash``, a copy of the forward's weights is saved.

    Args:
        parameters: the parameters, which may be updated in place between a forward and its backward.
        stash: whether to keep the forward's weights for the backward (PipeDream's digital baseline).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, stash: bool) -> None:
        self._stash = stash
        self.follow(parameters)

    def follow(self, parameters: Iterable[nn.Parameter]) -> None:
        """Use these parameters in place of the previous ones."""
        self._parameters = {id(parameter): parameter for parameter in parameters}
        self._copies: dict[int, tuple[int, Tensor]] = {}

    def hooks(self, version: int) -> AbstractContextManager[Any]:
        """Return a context manager for a forward whose weights have this version."""
        return saved_tensors_hooks(partial(self._pack, version), self._unpack)

    def _pack(self, version: int, tensor: Tensor) -> _Reference | tuple[Tensor, int]:
        base = base_of(tensor)
        parameter = self._parameter_behind(base)
        if parameter is None:
            # Detached, because a saved output that keeps its own graph alive is never freed.
            return tensor.detach(), version_of(tensor)
        source = self._copy(parameter, version) if self._stash else parameter.detach()
        offset = tensor.storage_offset() - base.storage_offset()
        return _Reference(source, tensor.dtype, tensor.size(), tensor.stride(), offset)

    def _unpack(self, saved: _Reference | tuple[Tensor, int]) -> Tensor:
        if isinstance(saved, _Reference):
            source = saved.source.to(saved.dtype)
            return source.as_strided(saved.size, saved.stride, source.storage_offset() + saved.offset)
        tensor, version = saved
        if version_of(tensor) != version:
            # autograd makes this check itself, but not for tensors that are saved through hooks.
            raise RuntimeError(
                f"A tensor of shape {tuple(tensor.shape)} that the backward needs was modified by an inplace operation "
                "of the forward. Use the out-of-place operation."
            )
        return tensor

    def _parameter_behind(self, base: Tensor) -> nn.Parameter | None:
        if id(base) in self._parameters:
            return self._parameters[id(base)]
        cast = base.grad_fn
        if cast is not None and _is_cast(cast):
            leaf = getattr(cast.next_functions[0][0], "variable", None)
            return self._parameters.get(id(leaf))
        return None

    def _copy(self, parameter: nn.Parameter, version: int) -> Tensor:
        copied, copy = self._copies.get(id(parameter), (None, parameter))
        if copied != version:
            # The copy has the same strides, because what autograd saves may be a view.
            copy = torch.empty_strided(
                parameter.size(), parameter.stride(), dtype=parameter.dtype, device=parameter.device
            )
            copy.copy_(parameter.detach())
            self._copies[id(parameter)] = version, copy
        return copy


def casts_parameters(loss: Tensor) -> bool:
    """Return whether a loss depends on parameters through copies of another type, as autocast makes them."""
    todo = [loss.grad_fn]
    seen = set(todo)
    while todo:
        node = todo.pop()
        following = {function for function, _ in node.next_functions if function is not None} if node else set()
        if node is not None and _is_cast(node) and any(hasattr(function, "variable") for function in following):
            return True
        todo.extend(following - seen)
        seen |= following
    return False


def _is_cast(node: Any) -> bool:
    # The name is that of the type, because a custom autograd function may define `name` as something else.
    return type(node).__name__ == "ToCopyBackward0"
