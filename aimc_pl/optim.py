"""This module holds optimizers that know the staleness of their gradients, for parameters that are digital."""

from collections.abc import Callable
from typing import Any, override

import torch
from torch import Tensor
from torch.optim import Optimizer

from aimc_pl.arguments import check_number


class SpikeCompensatedSGD(Optimizer):
    """SGD with momentum whose steps make up at once for the delay of the gradient (spike compensation).

    With a momentum m, a gradient g acts on the weights over many steps, as 1, m, m², … times itself. If g comes d steps
    too late, spike compensation makes the steps that it has missed in one::

        v ← m·v + g
        w ← w − η·(mᵈ·v + (1−mᵈ)/(1−m)·g)

    (Kosson et al., arXiv 2003.11666, "SC_D"). With d = 0 this is ``torch.optim.SGD``. Under ``schedule="async"`` the
    strategy sets d to the staleness of each update, in the entry ``"staleness"`` of the parameter groups.

    Args:
        params: the parameters, or dicts that define parameter groups.
        lr: η, the learning rate.
        momentum: m, at least 0 and below 1.
        weight_decay: the factor of the weights that is added to the gradient.

    Raises:
        UsageError: if an argument is out of range.
    """

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        check_number("lr", lr, at_least=0)
        check_number("momentum", momentum, at_least=0, below=1)
        check_number("weight_decay", weight_decay, at_least=0)
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "staleness": 0})

    # torch's overloads of this method cannot be repeated by one signature.
    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make a step.

        Args:
            closure: computes the loss and the gradients again, and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        momentum, delayed = group["momentum"], group["momentum"] ** group["staleness"]
        assert parameter.grad is not None
        gradient = parameter.grad.add(parameter, alpha=group["weight_decay"])
        state = self.state[parameter]
        velocity = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
        velocity.mul_(momentum).add_(gradient)
        parameter.add_(velocity, alpha=-group["lr"] * delayed)
        if delayed != 1:
            parameter.add_(gradient, alpha=-group["lr"] * (1 - delayed) / (1 - momentum))
