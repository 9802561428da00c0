"""The checks in this module find numbers that go wrong in training.

These are losses, gradients and weights that are not finite, weights that grow too fast, weights at the bounds of their
devices, and updates that pulse trains are too short for.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from aimc_pl.analog import is_analog
from aimc_pl.errors import UsageError
from aimc_pl.private_torch import tree_leaves
from aimc_pl.stage import Stage
from aimc_pl.strategies.settings import OnNonfinite
from aimc_pl.strategies.training_step import TrainingStep
from aimc_pl.weights import read_weights

_FIRST_UPDATES = 20
"""The number of updates of a stage after which the growth of its weights is no longer watched."""

_GROWTH = 1.5
"""The factor by which one update may enlarge the norm of a weight without a warning."""

_NEGLIGIBLE = 0.01
"""The root-mean-square norm of a weight's rows below which the weight hardly acts on its inputs."""

_SATURATED = 0.1
"""The fraction of a layer's weights that may be at their bounds without a warning."""

_CUT = 0.1
"""The fraction of a layer's updates that pulse trains may be too short for without a warning."""

_CUT_TRANSFERS = 0.5
"""The same for transfers. What is cut off stays in the crossbar that is read, so that later transfers carry it."""

_REMEDY = "Lower the learning rate or clip gradients; with on_nonfinite='warn' the run goes on"


class NumberCheck:
    """The checks of a fit: of losses and gradients before every update, and of weights from time to time.

    Args:
        module: the module that is trained.
        on_nonfinite: ``"stop"`` to end the run at a number that is not finite, ``"warn"`` to warn about the first one.
        running_again: returns a context manager in which a micro-batch may run once more; ``None`` if this process does
            not have all stages.

    Attributes:
        stages: the stages of this process, once they are known. The weights of other stages may not be read here.
    """

    def __init__(
        self,
        module: nn.Module,
        on_nonfinite: OnNonfinite,
        running_again: Callable[[], AbstractContextManager[None]] | None,
    ) -> None:
        self._module = module
        self.stages: Sequence[Stage] = ()
        self._running_again = running_again
        self._on_nonfinite: OnNonfinite = on_nonfinite
        self._has_warned = False
        """Whether there has been a warning about a loss or a gradient."""
        self._norms: dict[int, float] = {}
        """The norm of each weight, by ``id``, before its stage's last update; 0 for weights that are not watched."""
        self._has_grown = False
        self._has_saturated = False
        self._has_cut = False
        self._has_cut_transfers = False

    def check_gradients(self, stage: Stage, clock: int, microbatches: str, steps: Sequence[TrainingStep]) -> None:
        """Check, before a stage is updated, that its gradients are finite. If not, end the run or warn.

        Args:
            stage: the stage, with the gradients of its parameters and the errors that its tiles have still to apply.
            clock: the clock of the run.
            microbatches: the micro-batches of these gradients, as messages name them.
            steps: micro-batches whose losses have not been checked yet.

        Raises:
            UsageError: if a gradient is not finite. The message names the stage, clock, micro-batch and layer.
        """
        if self._has_warned:
            return
        learnt = [value for parameter in stage.parameters for value in _learnt_by(parameter)]
        if not learnt or torch.cat(learnt).isfinite().all():
            return
        wrong = [p for p in stage.parameters if not all(value.isfinite().all() for value in _learnt_by(p))]
        self.check_losses(steps, clock)  # a message about the loss says more
        # The backward reaches the last parameter first, which is thus the nearest to the cause.
        name = self._name(*wrong)
        self._report(f"the gradient of {name} is not finite (stage {stage.index}, {microbatches}, clock {clock})")

    def watch_growth(self, stage: Stage) -> None:
        """Warn, once, if one of the first updates of a stage has made a weight much larger.

        The method is called before the next update of the stage. Where stages update one by one, micro-batches in
        flight go backward through the current weights, and through what their forward has kept. A normalization, for
        example, has divided by the size of the earlier activations. Weights that have grown by a factor enlarge the
        errors of these micro-batches by that factor, and the next update is computed from these errors.
        """
        if self._has_grown or stage.version > _FIRST_UPDATES:
            return
        for weight in stage.parameters:
            # Errors do not pass through what is added to activations: biases, and tensors shared by all samples.
            is_added = weight.dim() < 2 or (weight.dim() > 2 and len(weight) == 1)
            if is_added or is_analog(weight):
                continue
            before, now = self._norms.get(id(weight)), weight.detach().norm().item()
            # A weight that begins near zero may grow by any factor at first, which does no harm.
            is_watched = now > _NEGLIGIBLE * len(weight) ** 0.5 if before is None else before > 0
            self._norms[id(weight)] = now if is_watched else 0.0
            if before and now > _GROWTH * before:
                self._has_grown = True
                warnings.warn(
                    f"one update has made {self._name(weight)} of stage {stage.index} {now / before:.1f} times as "
                    "large: micro-batches in flight go backward through it under schedule='async', and gradients may "
                    "explode. Lower the learning rate, warm it up, or clip gradients",
                    stacklevel=2,
                )
                return

    def watch_tiles(self) -> None:
        """Warn, once each, about analog layers at the bounds of their devices, and about too short pulse trains."""
        here = {id(module) for stage in self.stages for module in stage.modules if is_analog(module)}
        layers = {name: module for name, module in self._module.named_modules() if id(module) in here}
        if not layers:
            return
        # This imports aihwkit, which analog layers need.
        from aimc_pl.devices.saturation import cut_fractions, saturated_fraction

        fraction, name = max((saturated_fraction(layer), name) for name, layer in layers.items())
        if fraction > _SATURATED and not self._has_saturated:
            self._has_saturated = True
            warnings.warn(
                f"{100 * fraction:.0f} % of the weights of {name!r} are at the bounds of their devices, where pulses "
                "in one direction hardly move them: use devices of a wider range, or a lower learning rate",
                stacklevel=2,
            )
        cuts = {name: cut_fractions(layer) for name, layer in layers.items()}
        fraction, name = max((cut, name) for name, (cut, _) in cuts.items())
        if fraction > _CUT and not self._has_cut:
            self._has_cut = True
            warnings.warn(
                f"about {100 * fraction:.0f} % of the gradient of {name!r} is lost, as pulse trains are cut at "
                "desired_bl: use fewer num_states (larger steps), a lower learning rate, or a larger update.desired_bl",
                stacklevel=2,
            )
        fraction, name = max((cut, name) for name, (_, cut) in cuts.items())
        if fraction > _CUT_TRANSFERS and not self._has_cut_transfers:
            self._has_cut_transfers = True
            warnings.warn(
                f"pulse trains, cut at desired_bl, carry about {100 * (1 - fraction):.0f} % of what the crossbars of "
                f"{name!r} transfer: use a lower transfer_lr or learning rate, or fewer num_states (larger steps)",
                stacklevel=2,
            )

    def check_losses(self, steps: Sequence[TrainingStep], clock: int) -> None:
        """Check that the losses of finished micro-batches are finite. If not, end the run or warn.

        Raises:
            UsageError: if a loss is not finite. The message names the first such micro-batch, the clock and the cause.
        """
        wrong = next((step for step in steps if step.loss is not None and not step.loss.isfinite().all()), None)
        if wrong is not None and not self._has_warned:
            cause = self._cause(wrong)
            self._report(f"the loss is not finite{cause} (micro-batch {wrong.number}, clock {clock})")

    def _cause(self, step: TrainingStep) -> str:
        """Return the part of a message that says where a loss stops being finite; empty if that is not known."""
        if not _is_finite(step.inputs):
            return ", as the batch holds such numbers"
        for parameter in (parameter for stage in self.stages for parameter in stage.parameters):
            if not read_weights([parameter]).isfinite().all():
                return f", as are the weights of {self._name(parameter)}"
        name = self._first_output(step)
        return "" if name is None else f", first in the output of {name!r}"

    def _first_output(self, step: TrainingStep) -> str | None:
        """Run a micro-batch once more, and return the name of the first module whose output is not finite."""
        if self._running_again is None:
            return None
        names = {id(part): name for name, part in self._module.named_modules() if name}
        found: list[str] = []

        def note(part: nn.Module, args: Any, output: Any) -> None:
            if not found and id(part) in names and not _is_finite(output):
                found.append(names[id(part)])

        handle = register_module_forward_hook(note)
        try:
            # The run may fail, as a step does that needs gradients. The loss is reported all the same.
            with suppress(Exception), self._running_again():
                step()
        finally:
            handle.remove()
        return found[0] if found else None

    def _name(self, *parameters: Any) -> str:
        """Return the name of the last of some parameters, in quotes.

        The optimizer may train tensors that are no parameters of the module, and have no name.
        """
        some = set(map(id, parameters))
        names = [name for name, parameter in self._module.named_parameters() if id(parameter) in some]
        return repr(_layer(names[-1])) if names else "a tensor outside of the module"

    def _report(self, what: str) -> None:
        message = f"{what}. {_REMEDY}"
        if self._on_nonfinite == "stop":
            raise UsageError(message)
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(message, stacklevel=2)


def check_finite(module: nn.Module, state: Mapping[str, Any], step: int) -> None:
    """Check that the trained weights of a module are finite, before they are saved.

    Args:
        module: the module whose trained parameters and tiles are checked.
        state: the state dict of the module.
        step: the global step, for the message.

    Raises:
        UsageError: with the name of the first weights that are not finite.
    """
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad and name in state]
    weights = {name: state[name] for name in trained}
    weights |= {
        name.rpartition(".analog_module.")[0]: tile["analog_tile_weights"]
        for name, tile in state.items()
        if name.endswith(".analog_tile_state")
    }
    for name, values in weights.items():
        if not torch.isfinite(values).all():
            raise UsageError(
                f"after step {step} the weights of {name!r} are not finite: nothing is saved, and earlier "
                "checkpoints stay as they are. Resume from one of them, with a lower learning rate for example"
            )


def _learnt_by(parameter: Any) -> Sequence[Tensor]:
    """Return the part of a parameter's gradient that is checked: one column or, for a tile, the errors still to apply.

    An error that is not finite makes a whole row of a weight's gradient not finite, so that one column shows it. An
    input that is not finite shows in the loss. Reading the whole gradients would take a third of the time of an update.
    """
    if is_analog(parameter):
        return [error.flatten() for error in parameter.analog_grad_output]
    gradient = parameter.grad
    if gradient is None:
        return ()
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    has_columns = gradient.dim() > 1 and gradient.numel() > 0
    return (gradient[:, *[0] * (gradient.dim() - 1)] if has_columns else gradient.flatten(),)


def _is_finite(value: Any) -> bool:
    """Return whether all floating-point tensors in a nested value are finite."""
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return all(bool(leaf.isfinite().all()) for leaf in leaves)


def _layer(name: str) -> str:
    """Return the name of a parameter, without the part that aihwkit puts between a layer and its tile."""
    return name.partition(".analog_module.")[0]
