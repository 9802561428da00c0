"""What a stage has received, where it is used."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aimc_pl.ghosts import refusals
from aimc_pl.ghosts.values import Ghost, Key
from aimc_pl.private_torch import version


class _Receive(torch.autograd.Function):
    """A received value as part of the graph: no leaf, so that it can be changed in place; leaves its gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, key: Key, gradients: dict[Key, Tensor]) -> Tensor:
        ctx.key, ctx.gradients = key, gradients
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[None, ...]:
        ctx.gradients[ctx.key] = gradient[0]
        return None, None, None, None


# Bound here: the attribute is replaced while a step runs.
_receive: Callable[..., Tensor] = _Receive.apply


class Arrivals:
    """The values received for one forward.

    Args:
        stage: of this process.
        sent: by the stage before; all of it is this stage's own.
        differentiates: whether a backward follows.

    Attributes:
        sent: until it is known what of it later stages need.
        token: what own and received tensors of this forward are named with. They refer to this and not to the
            arrivals, which have them: a cycle would keep them longer.
        gradients: with respect to what has been received, after the backward.
    """

    def __init__(self, stage: int, sent: dict[Key, Tensor], differentiates: bool) -> None:
        self.sent = sent
        self.token = object()
        self.gradients: dict[Key, Tensor] = {}
        self._stage = stage
        self._differentiates = differentiates
        self._values: dict[Key, Tensor] = {}
        self._versions: dict[Key, int] = {}

    def recall(self, ghost: Ghost) -> Tensor:
        """The value of a ghost if this stage has used it; the ghost if not."""
        return self._values.get(ghost.key, ghost) if ghost.key else ghost

    def take(self, ghost: Ghost) -> Tensor:
        """The value of a ghost, to compute with.

        Raises:
            UsageError: if it cannot be had, or is not what the step would see in one process.
        """
        key, memory = ghost.key, ghost.memory
        if ghost.home is not self:
            raise refusals.left_behind(tuple(ghost.spec.shape))
        if key is None:
            raise refusals.hidden(self._stage, ghost.stage)
        if memory.torn is not None or memory.written > key[0]:
            raise refusals.written_through_a_view(key[0], memory.written if memory.torn is None else memory.torn)
        return self._values[key] if key in self._values else self._arrive(key, ghost)

    def _arrive(self, key: Key, ghost: Ghost) -> Tensor:
        sent = self.sent.get(key)
        if sent is None or sent.shape != ghost.spec.shape:
            raise refusals.not_sent(self._stage, key[0])
        value = sent.detach()
        if sent.requires_grad and self._differentiates:
            with torch.enable_grad():
                value = _receive(torch.empty(0, requires_grad=True), value, key, self.gradients)
        name(value, self.token, key)
        self._keep(key, value)
        return value

    def rename(self, old: Key, new: Key) -> Tensor | None:
        """A value has been changed in place; its name changes. Returns the value if this stage has used it."""
        value = self._values.pop(old, None)
        if value is not None:
            self._keep(new, value)
            name(value, self.token, new)
        return value

    def writes(self, ghost: Ghost) -> int:
        """How often the value of a ghost has been changed in place here since it got its name."""
        value = self._values.get(ghost.key) if ghost.key else None
        return 0 if value is None else version(value) - self._versions[ghost.key]  # pyright: ignore[reportArgumentType], ghosts seen have one

    def _keep(self, key: Key, value: Tensor) -> None:
        self._values[key] = value
        self._versions[key] = version(value)


def name(tensor: Tensor, token: object, key: Key) -> None:
    """Name a value of this process."""
    vars(tensor)["_made"] = token, key  # faster than setattr


def name_of_value(tensor: Tensor) -> tuple[object, Key] | None:
    """The token of the forward and the key that a value of this process has been named with."""
    return tensor.__dict__.get("_made")
