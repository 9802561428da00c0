"""The values that a stage has received, and their use in the step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aimc_pl.ghosts import refusals
from aimc_pl.ghosts.values import Ghost, Key
from aimc_pl.private_torch import version


class _Receive(torch.autograd.Function):
    """A function that makes a received value part of the autograd graph, and stores its gradient in the backward.

    The value is no leaf. A leaf could not be changed in place.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, key: Key, gradients: dict[Key, Tensor]) -> Tensor:
        ctx.key, ctx.gradients = key, gradients
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[None, ...]:
        ctx.gradients[ctx.key] = gradient[0]
        return None, None, None, None


# Bound here, since the attribute ``apply`` is replaced while a step runs.
_receive: Callable[..., Tensor] = _Receive.apply


class Arrivals:
    """The values that this stage has received for one forward.

    Args:
        stage: the stage of this process.
        sent: the tensors that the stage before has sent, by key. No one else uses these tensors.
        differentiates: whether a backward follows.

    Attributes:
        sent: the tensors that the stage before has sent, until it is known which of them later stages need.
        token: identifies this forward. The tensors that this stage makes or receives in the forward are marked with the
            token and a key. They refer to the token and not to this object, which holds them: a reference cycle would
            keep them alive longer.
        gradients: the gradients with respect to the received values, by key, after the backward.
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
        """Return the value of a ghost if this stage has used that value, and the ghost itself otherwise."""
        return self._values.get(ghost.key, ghost) if ghost.key else ghost

    def take(self, ghost: Ghost) -> Tensor:
        """Return the value of a ghost, to compute with it.

        Raises:
            UsageError: if this stage cannot have the value, or if the step would see another value in one process.
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
        """Change the key of a value that was changed in place. Return the value, or ``None`` if it is not used here."""
        value = self._values.pop(old, None)
        if value is not None:
            self._keep(new, value)
            name(value, self.token, new)
        return value

    def writes(self, ghost: Ghost) -> int:
        """Return how often the value of a ghost has been changed in place in this process since it got its key."""
        value = self._values.get(ghost.key) if ghost.key else None
        return 0 if value is None else version(value) - self._versions[ghost.key]  # pyright: ignore[reportArgumentType], ghosts seen have one

    def _keep(self, key: Key, value: Tensor) -> None:
        self._values[key] = value
        self._versions[key] = version(value)


def name(tensor: Tensor, token: object, key: Key) -> None:
    """Mark a tensor of this process with the token of its forward and with its key."""
    vars(tensor)["_made"] = token, key  # faster than setattr


def name_of_value(tensor: Tensor) -> tuple[object, Key] | None:
    """Return the token and the key with which :func:`name` has marked a tensor, or ``None`` if it has no mark."""
    return tensor.__dict__.get("_made")
