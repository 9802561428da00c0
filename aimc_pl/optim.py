"""This module holds optimizers that know the staleness of their gradients, for parameters that are digital."""

from collections.abc import Callable
from typing import Any, override

import torch
from torch import Tensor
from torch.optim import NAdam, Optimizer

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
        gradient = parameter.grad
        if group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        state = self.state[parameter]
        velocity = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
        velocity.mul_(momentum).add_(gradient)
        parameter.add_(velocity, alpha=-group["lr"] * delayed)
        if delayed != 1:
            parameter.add_(gradient, alpha=-group["lr"] * (1 - delayed) / (1 - momentum))


class AsyncNAdam(NAdam):
    """``torch.optim.NAdam`` whose momentum grows with the staleness of the gradient (AsyncPP, arXiv 2505.01099).

    Nesterov's momentum looks ahead along the last steps, and counts a new gradient by 1−γ only. A stale gradient thus
    corrects a direction that goes on meanwhile. An update of staleness d in a pipeline of M stages has the momentum::

        γ = γ₀ + (γ₁ − γ₀)·min(d/M, 1)

    This is the rule of the authors' program, whose d is below M. In full duplex d may be larger. They also keep a copy
    of the weights of each micro-batch in flight, which a crossbar cannot do, and which is left out here. Under
    ``schedule="async"`` the strategy sets d in the entry ``"staleness"`` of the parameter groups. Without staleness
    this is NAdam with γ₀, which is in the entry ``"betas"``: schedulers and groups may set it there.

    Args:
        params: the parameters, or dicts that define parameter groups.
        num_stages: M.
        lr: the learning rate.
        momentum: γ₀, at least 0 and below 1.
        stale_momentum: γ₁, at least γ₀ and below 1.
        beta2: the decay of the running mean of squared gradients.
        weight_decay: the decoupled weight decay, in units of the learning rate.

    Raises:
        UsageError: if an argument is out of range.
    """

    def __init__(
        self,
        params: Any,
        num_stages: int,
        lr: float = 1e-3,
        momentum: float = 0.9,
        stale_momentum: float = 0.99,
        beta2: float = 0.999,
        weight_decay: float = 0.0,
    ) -> None:
        check_number("num_stages", num_stages, at_least=1, whole=True)
        check_number("lr", lr, at_least=0)
        check_number("momentum", momentum, at_least=0, below=1)
        check_number("stale_momentum", stale_momentum, at_least=momentum, below=1)
        check_number("beta2", beta2, at_least=0, below=1)
        check_number("weight_decay", weight_decay, at_least=0)
        super().__init__(params, lr, (momentum, beta2), weight_decay=weight_decay, decoupled_weight_decay=True)
        self._num_stages = num_stages
        self._stale_momentum = stale_momentum
        self.defaults["staleness"] = 0  # for groups that are added later
        for group in self.param_groups:
            group["staleness"] = 0

    @override
    def __getstate__(self) -> dict[str, Any]:
        # torch leaves out the attributes of subclasses, and copies would lack them.
        own = {"_num_stages": self._num_stages, "_stale_momentum": self._stale_momentum}
        return {**super().__getstate__(), **own}

    # torch's overloads of this method cannot be repeated by one signature.
    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make a step.

        Args:
            closure: computes the loss and the gradients again, and returns the loss.
        """
        before = [group["betas"] for group in self.param_groups]
        for group in self.param_groups:
            least, beta2 = group["betas"]
            staleness = min(group["staleness"], self._num_stages)
            growth = max(self._stale_momentum - least, 0.0) * staleness / self._num_stages
            group["betas"] = least + growth, beta2
        try:
            return super().step(closure)
        finally:
            for group, betas in zip(self.param_groups, before, strict=True):
                group["betas"] = betas
