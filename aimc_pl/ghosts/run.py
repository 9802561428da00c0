"""One forward of one stage: it runs the whole step, but computes only the part of the step that the stage owns."""

import random
from collections.abc import Callable
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchmetrics import Metric

from aimc_pl.errors import UsageError
from aimc_pl.ghosts import refusals
from aimc_pl.ghosts.arrivals import Arrivals
from aimc_pl.ghosts.elsewhere import Elsewhere
from aimc_pl.ghosts.functions import Kind, kind_of, name_of
from aimc_pl.ghosts.here import Here
from aimc_pl.ghosts.learning import Watch
from aimc_pl.ghosts.parts import Part
from aimc_pl.ghosts.state import Setting, State
from aimc_pl.ghosts.trail import Trail
from aimc_pl.ghosts.values import Ghost, Key, Unknown, is_ghost, plainly
from aimc_pl.private_torch import (
    current_function_mode,
    has_backward_hooks,
    has_global_backward_hooks,
    is_in_functorch,
    is_in_torch_dispatch_mode,
    without_functions,
)

Message = tuple[tuple[str, ...], tuple[Key, ...], tuple[Tensor, ...]]
"""What a stage sends: the marks of the events in every stretch so far, the keys of values, and the values."""


class Done(BaseException):
    """Raised to leave the step after this stage's stretch, when it is known what later stages need.

    It is a ``BaseException``, which no ``except Exception`` in user code catches.
    """


class Run(TorchFunctionMode):
    """One forward of one stage, in a function mode that intercepts the torch functions of the step.

    A *stretch* is the part of the step that one stage computes. An *event* is a call of a module that is run as a
    whole, or of a torch function in the code around such modules that uses parameters or values derived from
    parameters. Events are numbered in every stretch. Their numbers become part of the keys of their results. What
    derives from the batch alone is computed in every process and is no event.

    Args:
        setting: what all forwards of the stage have in common.
        message: the message from the stage before; ``None`` in the first stage.
        seed: the seed of this forward's random numbers.
        inputs: decides, together with the events so far, which events follow.
        differentiates: whether a backward follows.

    Attributes:
        arrivals: the values that this stage has received.
        outgoing: the message to the stage after; ``None`` in the last stage.
    """

    def __init__(self, setting: Setting, message: Message | None, seed: int, inputs: Any, differentiates: bool) -> None:
        super().__init__()
        texts, keys, tensors = message or ((), (), ())
        self.arrivals = Arrivals(setting.own, dict(zip(keys, tensors, strict=True)), differentiates)
        self.outgoing: Message | None = None
        self._setting = setting
        self._seed = seed
        self._differentiates = differentiates
        self._inputs = inputs
        self._trail = Trail(texts, setting.own)
        self._state = State(setting, self.arrivals, self._trail)
        self._here = Here(self._state)
        self._elsewhere = Elsewhere(self._state)
        self._way: Any = None
        self._is_done = False
        self._is_dispatched = is_in_torch_dispatch_mode()

    @property
    def kept(self) -> dict[Key, Tensor]:
        """The values of this stage that later stages need, by key."""
        return self._state.kept

    def start(self) -> None:
        """Begin the first stretch.

        Raises:
            UsageError: if a module whose code runs in every process has a backward hook, or if there is a global one.
        """
        if has_global_backward_hooks():
            raise refusals.spans_stages("a backward hook on all modules")
        for module in self._setting.glue:
            if has_backward_hooks(module):
                raise refusals.spans_stages(f"a backward hook on {type(module).__name__}")
        self._begin(0)

    def finish(self, result: Any) -> None:
        """End the forward after the step has returned.

        Args:
            result: what the step has returned. With ``None`` it skips the micro-batch, in whatever stage.

        Raises:
            UsageError: if the step has returned something before all stages have begun.
        """
        stretch, watch = self._state.stretch, self._elsewhere.watch
        if self._is_done:
            return
        if stretch < len(self._setting.boundaries):
            if result is not None:
                raise refusals.never_reached(stretch, self._setting.boundaries[stretch])
            if self._state.own < len(self._setting.boundaries):
                self._send(tuple(self._state.needs))
            return
        if watch is not None:
            needs = tuple(self._state.needs)
            if watch.finish():
                self._setting.learned.remember(self._way, needs)
            self._send(needs)

    def fail(self, error: Exception) -> None:
        """Handle an error of the step.

        Raises:
            UsageError: if the cause may be a result of another stage that could only be guessed.
        """
        guessed = self._elsewhere.guessed
        if guessed is not None and not isinstance(error, UsageError):
            raise guessed from error

    def deliver(self, value: Tensor | Metric) -> Tensor | Metric:
        """Make a value available in the last stage. Return it there, and return ``value`` as it is in other stages.

        Raises:
            UsageError: if the last stage cannot have the value, or if the value is a metric of another stage.
        """
        if isinstance(value, Metric):
            if self._setting.own == len(self._setting.boundaries) and id(value) in self._state.metrics:
                raise refusals.metric(type(value).__name__, self._state.metrics[id(value)])
            return value
        with without_functions():
            if self._setting.own == len(self._setting.boundaries):
                return self._here.resolve(value)
            self._elsewhere.need(value)
            return value

    def close(self) -> None:
        """Release what the backward does not need."""
        self.arrivals.sent = {}
        self._state.written = {}

    def _advance(self) -> None:
        """End the current stretch at a boundary, and begin the next one."""
        state, watch = self._state, self._elsewhere.watch
        if self._is_done:
            return
        if watch is not None:
            watch.end()
        elif state.stretch == state.own:
            self._leave_own_stretch()
        self._trail.end_stretch()
        self._begin(state.stretch + 1)

    def _begin(self, stretch: int) -> None:
        self._state.stretch = stretch
        number = crc32(f"{self._seed} {stretch}".encode())
        random.seed(number)
        np.random.seed(number)
        if stretch == self._state.own:
            for generator in self._setting.generators:
                generator.manual_seed(number)
        if self._elsewhere.watch is not None:
            self._elsewhere.watch.begin()

    def _leave_own_stretch(self) -> None:
        setting, kept, sent = self._setting, self._state.kept, self.arrivals.sent
        training = tuple(module.training for module in setting.glue)
        self._way = self._inputs, self._trail.way, training, torch.is_grad_enabled()
        needs = setting.learned.needs(self._way)
        if needs is not None and all(key in kept or key in sent for key in needs):
            self._is_done = True
            self._send(needs)
            raise Done
        self._elsewhere.watch = Watch(setting.watched)

    def _send(self, needs: tuple[Key, ...]) -> None:
        own, tensors = self._setting.own, []
        with without_functions():
            for key in needs:
                tensor = self._state.kept[key] if key[0] == own else self.arrivals.sent.get(key)
                if tensor is None:
                    raise refusals.not_sent(own, key[0])
                tensors.append(tensor.detach().requires_grad_(tensor.requires_grad))
        self.outgoing = self._trail.texts, needs, tuple(tensors)

    def called(self, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a call of a module, or of a method of a metric."""
        state = self._state
        is_here = state.stretch == state.own
        if state.inside:
            return part.call(*args, **kwargs) if is_here else self._elsewhere.inside(part, args, kwargs)
        if part.opens == state.stretch + 1 and (torch.is_grad_enabled() or not self._differentiates):
            self._advance()
            is_here = state.stretch == state.own
        if not part.is_whole or self._is_done or (part.is_stateless and self._are_common(args, kwargs)):
            return part.call(*args, **kwargs)
        if part.is_shared or (part.owner is not None and part.owner != state.stretch):
            state.check_parameters(part.module.parameters())
        if is_here:
            if id(part.module) in state.metrics:
                raise refusals.metric_of_stages(type(part.module).__name__, state.metrics[id(part.module)], state.own)
            return self._compute(part, args, kwargs)
        if is_in_torch_dispatch_mode() and not self._is_dispatched:
            raise refusals.spans_stages("a torch dispatch mode that the step enters")
        return self._elsewhere.module(part, args, kwargs)

    def _compute(self, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Leave this mode while the module runs, as it would only cost time. A mode entered since then prevents this.
        if current_function_mode() is not self:
            return self._here.module(part.name, part.call, args, kwargs)
        self.__exit__(None, None, None)
        try:
            return self._here.module(part.name, part.call, args, kwargs)
        finally:
            self.__enter__()

    def applied(self, apply: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a custom autograd function, which function modes do not see."""
        state = self._state
        if state.inside and state.stretch == state.own and not any(map(is_ghost, args)):
            return apply(*args, **kwargs)
        if self._are_common(args, kwargs):
            return apply(*args, **kwargs)
        if state.stretch != state.own:
            return self._elsewhere.function(apply, args, kwargs)
        return self._operation(apply, args, kwargs)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.intercept(func, args, kwargs or {})

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a torch function."""
        kind = kind_of(func)
        if kind is Kind.METADATA:
            return plainly(func, args, kwargs)
        if kind is Kind.DEVICE:
            return plainly(func, (self._setting.example, *args[1:]) if is_ghost(args[0]) else args, kwargs)
        is_drawn = kind is Kind.RANDOM and not self._state.inside
        if self._is_done:
            return plainly(func, args, kwargs)  # ``Done`` is leaving the step
        if not is_drawn and self._are_common(args, kwargs):
            return func(*args, **kwargs)
        if is_in_functorch() and not self._state.inside:
            raise refusals.spans_stages("a transform of torch.func")
        if kind is Kind.ITERATION:
            return iter(self.intercept(Tensor.unbind, args, kwargs))
        if kind is Kind.OPERATION or kind is Kind.RANDOM:
            return self._operation(func, args, kwargs)
        if kind is Kind.GRADIENT and not self._state.inside:
            raise refusals.spans_stages(name_of(func))
        if self._state.stretch == self._state.own:
            return self._here.inside(func, args, kwargs)
        return self._look_at_ghost(kind, func, args, kwargs)

    def _operation(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._state.stretch != self._state.own:
            return self._elsewhere.operation(func, args, kwargs)
        if self._state.inside:
            return self._here.inside(func, args, kwargs)
        return self._here.operation(name_of(func), func, args, kwargs)

    def _look_at_ghost(self, kind: Kind, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        error = refusals.reads(self._state.stretch, name_of(func))
        if kind is Kind.NUMBER:
            return Unknown(error)
        if kind is not Kind.HOOK:
            raise error
        if is_ghost(args[0]):
            self._require_grad(args[0], name_of(func), (*args[1:], *kwargs.values(), True)[0])
        return args[0]

    def _require_grad(self, ghost: Ghost, what: str, requires_grad: Any) -> None:
        if what in ("requires_grad_", "requires_grad"):
            ghost.require_grad(requires_grad)

    def _are_common(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return self._state.are_common(args) and (not kwargs or self._state.are_common(kwargs.values()))
