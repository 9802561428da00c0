"""Runs of a training step that leave no trace. They inspect it, measure it, and verify that stages change nothing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from aimc_pl.analog import is_analog
from aimc_pl.attributes import is_alike
from aimc_pl.errors import UsageError
from aimc_pl.flight import Flight, StagedStep, check_loss
from aimc_pl.private_torch import set_versions, versions_of
from aimc_pl.random_states import RandomStates, seeding_noticed
from aimc_pl.reachable import Named
from aimc_pl.saved import casts_parameters
from aimc_pl.traces import Traces
from aimc_pl.weights import gradients_of, read_gradients

Function = Callable[[], Tensor | None]
"""A function that runs the step on a micro-batch and returns the loss, or ``None`` to learn nothing."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE = 0.02
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Outcome:
    """The results of a step on some micro-batches.

    Attributes:
        losses: the loss of each micro-batch; ``None`` where the step skips learning.
        gradients: the gradients of all parameters that require grad, summed over the micro-batches.
    """

    losses: list[Tensor | None]
    gradients: list[Tensor]


class Trials:
    """Runs of a step on micro-batches, each from the same weights, attributes and random states.

    Args:
        network: the module that contains all modules that the step calls.
        functions: the step on each of the first micro-batches.
        inputs: the inputs of these functions.
        beside: other objects that the functions can reach, by name: optimizers and their schedulers, for example.
        outside: objects that the functions can reach, and that are neither searched for changes nor put back.
    """

    def __init__(
        self,
        network: nn.Module,
        functions: Sequence[Function],
        inputs: Any = None,
        beside: Sequence[Named] = (),
        outside: Sequence[Any] = (),
    ) -> None:
        self.network = network
        self.functions = functions
        learning = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        self.names = [*learning]
        """The names of the parameters that require grad."""
        self._parameters = [*learning.values()]
        self._traces = Traces(network, inputs, beside, outside)
        self._random = RandomStates(self._traces.generators)
        self._states = self._random.read()
        self.draws = False
        """Whether a step has been seen to draw random numbers."""
        self.casts = False
        """Whether a step has been seen to convert parameters to another type, as autocast does."""
        self._differentiates = True
        """Whether a forward may need gradients to be enabled, for example because its loss contains gradients."""
        self._remembers = True
        """Whether a run may depend on what the run before it has left."""

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Context manager for one run, which starts from the same state as all other runs and leaves no trace."""
        self._traces.clear_gradients()
        try:
            yield
        finally:
            self.draws = self.draws or self._random.have_moved(self._states)
            self._traces.undo()
            self._random.write(self._states)

    def undivided(self, watched: AbstractContextManager[Any] | None = None) -> Outcome | None:
        """Run the first two micro-batches without stages, forward and backward, each from the initial state.

        Args:
            watched: a context manager that is entered for the forward of the first micro-batch.

        Returns:
            The losses and gradients, or ``None`` if the first micro-batch skips learning.

        Raises:
            UsageError: if a loss requires no grad, or if the step runs a backward or creates parameters itself.
        """
        losses: list[Tensor | None] = []
        gradients: list[Tensor] = []
        for function in self.functions[:2]:
            with self.fresh():
                with watched or nullcontext():
                    loss = function()
                watched = None
                if loss is None and not losses:
                    return None
                self._check_backward()
                if loss is not None:
                    check_loss(loss)
                    self.casts = self.casts or casts_parameters(loss)
                    gradients = self._accumulate(loss, gradients)
                    self._check_parameters()
                losses.append(None if loss is None else loss.detach().clone())
        return Outcome(losses, gradients)

    def gradients(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the gradients of some parameters for the first micro-batch, without stages, in one vector."""
        with self.fresh(), torch.enable_grad():
            loss = self.functions[0]()
            if loss is not None:
                loss.backward()
            return read_gradients(self.network, parameters)

    def record(self, step: StagedStep, reference: Outcome | None = None) -> None:
        """Run the second micro-batch forward in stages, then the first, to see what each stage uses, calls and sets.

        One run would not show all of it. A step that begins by clearing a list, for example, changes the list only if
        an earlier run has filled it.

        Args:
            step: the step to record.
            reference: the result of :meth:`undivided`. If it is given, the method also finds out whether the first
                micro-batch depends on the second.
        """
        with self.fresh():
            self._forward(step, self.functions[:2][-1])
            self._start_again(reference)
            loss = self._forward(step, self.functions[0])
            self._remembers = reference is None or not is_close(loss, reference.losses[0])
        step.settle()

    def staged(self, step: StagedStep) -> Outcome:
        """Run the first micro-batch in stages, overlapping with the second one as in a pipeline.

        Each micro-batch draws the random numbers that it draws in :meth:`undivided`.
        """
        num_stages = len(step.stages)
        with self.fresh(), step.running():
            flights = [Flight(step, function) for function in self.functions[:2]]
            states = [self._states for _ in flights]

            def drawing(k: int, operation: Callable[[int], None], stage: int) -> None:
                self._random.write(states[k])
                operation(stage)
                states[k] = self._random.read()
                if step.delayed:
                    # An update would raise the versions too. Code that compares versions must fail now, not later.
                    set_versions(step.parameters, [version + 1 for version in versions_of(step.parameters)])

            # In every clock the second micro-batch is one stage behind the first.
            for clock in range(num_stages + len(flights) - 1):
                for k, flight in reversed([*enumerate(flights)]):
                    if 0 <= clock - k < num_stages:
                        drawing(k, flight.forward, clock - k)
            for k, flight in enumerate(flights):
                for stage in reversed(range(num_stages)):
                    drawing(k, flight.backward, stage)
            return Outcome([flight.loss for flight in flights], self._gradients())

    def check_repeats(self, reference: Outcome) -> None:
        """Check that the step gives the same loss when it runs again from the same state.

        Raises:
            UsageError: if it gives another loss.
        """
        expected = reference.losses[0]
        # A run without gradients takes less memory. If it fails or gives another loss, a run with gradients decides.
        with suppress(Exception), self.fresh(), torch.no_grad():
            self._differentiates = not is_close(self._loss_again(), expected)
        if not self._differentiates:
            return
        with self.fresh():
            again = self._loss_again()
        if not is_close(again, expected):
            raise does_not_repeat(f"a loss of {_shown(again)} in the place of {_shown(expected)}")

    def check_memory(self, step: StagedStep, reference: Outcome) -> None:
        """Check that the step's result does not depend on what the step before it has left.

        Raises:
            UsageError: if the result depends on it; the message names what the step reads.
        """
        if not self._remembers and not step.private:
            return
        expected = reference.losses[0]
        with self.fresh():
            self._start_again(reference)
            if not is_close(self._loss_again(), expected):
                raise UsageError(
                    "training_step reads gradients of parameters, but the pipeline does not keep those of earlier "
                    "steps: read them in a hook instead (on_before_optimizer_step)"
                )
        if step.attributes is None:
            return
        before = self.functions[:2][-1]
        with self.fresh():
            self._forward(step, before)
            left = self._traces.changed()
            if not left:
                return
            values = step.attributes.current(step.private)
            if is_close(self._loss_again(), expected):
                self._check_growth(step, values)
                return
        names = []
        for change in left:
            with self.fresh():
                self._forward(step, before)
                for other in self._traces.changed():
                    if other != change:
                        self._traces.undo_one(other)
                if not is_close(self._loss_again(), expected):
                    names.append(self._traces.describe(change))
        raise UsageError(
            f"training_step reads what the step before it has left in {', '.join(names) or 'its module'}, "
            "and micro-batches overlap in a pipeline: reset it in every step, or use num_microbatches=1 with "
            "schedule='sync'"
        )

    def losses(self, functions: Sequence[Function], reference: Outcome | None = None) -> list[Tensor] | None:
        """Return the losses of several batches, each from the same state.

        If the step draws random numbers, dropout layers are switched off, since perhaps nothing else draws any.

        Args:
            functions: the step on each batch.
            reference: the result of :meth:`undivided`. If it is given, the first two micro-batches need not run again.

        Returns:
            The losses, or ``None`` if a batch has no loss or still draws random numbers.
        """
        found: list[Tensor] = []
        known = dict(zip(self.functions, reference.losses, strict=False)) if reference and not self.draws else {}
        for function in functions:
            if (loss := known.get(function)) is not None:
                found.append(loss)
                continue
            with self.fresh():
                for module in self.network.modules():
                    if self.draws and isinstance(module, _DROPOUT):
                        module.eval()
                with torch.set_grad_enabled(self._differentiates):
                    loss = function()
                if loss is None or self._random.have_moved(self._states):
                    return None
            found.append(loss.detach())
        return found

    def _forward(self, step: StagedStep, function: Function) -> Tensor | None:
        seeded = seeding_noticed(lambda: step.keep_random_states(self._random))
        with step.running(), step.recording(), seeded:
            flight = Flight(step, function)
            for stage in range(len(step.stages)):
                flight.forward(stage)
            step.under_way.clear()  # It does not go back.
            return flight.loss

    def _start_again(self, before: Outcome | None = None) -> None:
        """Put back the random states and the batch, and give digital parameters the gradients of ``before``."""
        self._random.write(self._states)
        self._traces.undo_inputs()
        for parameter, gradient in zip(self._parameters, before.gradients if before else (), strict=before is not None):
            if not is_analog(parameter) and not is_lazy(parameter):
                parameter.grad = gradient.clone()

    def _loss_again(self) -> Tensor | None:
        self._start_again()
        with torch.set_grad_enabled(self._differentiates and torch.is_grad_enabled()):
            loss = self.functions[0]()
        return None if loss is None else loss.detach()

    def _check_growth(self, step: StagedStep, values: dict[Any, Any]) -> None:
        """Check that no attribute that several stages set grows with every step.

        Micro-batches that overlap would add to each other's values.

        Raises:
            UsageError: if an attribute grows.
        """
        assert step.attributes is not None
        for place, value in step.attributes.current(values).items():
            if not is_alike(values[place], value):
                raise UsageError(
                    f"training_step adds to {step.attributes.name(place)!r} in several stages without "
                    "resetting it: reset it in every step, or use num_microbatches=1 with schedule='sync'"
                )

    def _check_backward(self) -> None:
        """Check that the step has left no gradients on parameters: Lightning would clear them before its backward."""
        for name, parameter in zip(self.names, self._parameters, strict=True):
            if parameter.grad is not None:
                raise UsageError(
                    f"training_step calls backward itself, which leaves a gradient on {name!r}, where the pipeline "
                    "adds those of its stages: use torch.autograd.grad inside of training_step"
                )

    def _check_parameters(self) -> None:
        """Check that the step creates no parameters to train: the stages could not know them."""
        known = set(map(id, self._parameters))
        for name, parameter in self.network.named_parameters():
            if parameter.grad is not None and id(parameter) not in known:
                raise UsageError(
                    f"training_step creates the parameter {name!r}, which neither the optimizer nor the stages can "
                    "know beforehand: create it in __init__ or configure_model"
                )

    def _accumulate(self, loss: Tensor, gradients: list[Tensor]) -> list[Tensor]:
        """Run the backward of a loss, and return its gradients added to ``gradients``."""
        digital = [not is_analog(parameter) for parameter in self._parameters]
        for parameter, is_digital, gradient in zip(self._parameters, digital, gradients or digital, strict=True):
            if is_digital and isinstance(gradient, Tensor):
                parameter.grad = gradient
        loss.backward()
        own = self._gradients()
        if not gradients:
            return own
        return [a if is_digital else a + b for a, b, is_digital in zip(own, gradients, digital, strict=True)]

    def _gradients(self) -> list[Tensor]:
        # These need not be copied: the next run starts without gradients.
        return [gradient.detach() for gradient in gradients_of(self.network, self._parameters)]


def verify(trials: Trials, step: StagedStep, reference: Outcome) -> None:
    """Check that two overlapping micro-batches in stages give the losses and gradients of runs without stages.

    Raises:
        UsageError: if losses or gradients differ.
    """
    difference = _difference(trials.names, trials.staged(step), reference)
    if difference is None:
        return
    again = trials.undivided()
    change = "no loss" if again is None else _difference(trials.names, again, reference)
    if change is not None:
        raise does_not_repeat(change)
    raise UsageError(
        f"training_step gives {difference} when it runs in stages beside another micro-batch: something that it reads "
        "or changes is shared between micro-batches. Keep it within one module, choose other stages with split_at, or "
        "skip this check with verify=False"
    )


def does_not_repeat(difference: str) -> UsageError:
    """Return the error to raise when a step gives another result because of something that cannot be put back."""
    return UsageError(
        f"training_step gives {difference} when it runs again from the same state: it keeps something where it cannot "
        "be put back, or draws random numbers from a generator that no module holds, so that the runs before the first "
        "update would change the training. Keep it in an attribute of a module"
    )


def _difference(names: Sequence[str], ours: Outcome, theirs: Outcome) -> str | None:
    for a, b in zip(ours.losses, theirs.losses, strict=True):
        if not is_close(a, b):
            return f"a loss of {_shown(a)} in the place of {_shown(b)}"
    scale = max((float(gradient.norm()) for gradient in theirs.gradients), default=0.0)
    if not isfinite(scale):  # Such gradients cannot be compared, and no update follows from them.
        return None
    for name, a, b in zip(names, ours.gradients, theirs.gradients, strict=True):
        tolerance = _TOLERANCE.get(a.dtype, _COARSE) if not torch.is_autocast_enabled(a.device.type) else _COARSE
        if not float((a - b).norm()) <= tolerance * (float(b.norm()) + 1e-3 * scale):
            return f"another gradient of {name!r}"
    return None


def is_close(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether two losses agree up to rounding errors."""
    if a is None or b is None:
        return a is b
    tolerance = _TOLERANCE.get(a.dtype, _COARSE)
    return bool(
        torch.isclose(a.detach().double(), b.detach().double(), rtol=tolerance, atol=1e-12, equal_nan=True).all()
    )


def _shown(loss: Tensor | None) -> str:
    return "None" if loss is None else f"{loss.item():.6g}"
