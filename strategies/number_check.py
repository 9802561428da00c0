"""Numbers that go wrong in training: not finite, growing without bound, stuck at the bounds of devices."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from operator import itemgetter
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
"""Of a stage, after which its weights may grow as they like."""

_GROWTH = 1.5
"""The factor by which one update may make a weight larger."""

_NEGLIGIBLE = 0.01
"""The norm of a row of a weight that hardly acts on its inputs."""

_SATURATED = 0.1
"""The fraction of a layer's weights that may be at their bounds."""

_REMEDY = "Lower the learning rate or clip gradients; on_nonfinite='warn' goes on"


class NumberCheck:
    """Looks at losses and gradients before every update, and at weights for a while.

    Args:
        module: that is trained.
        on_nonfinite: whether a number that is not finite ends the run; otherwise the first one is warned about.
        running_again: entered to run a micro-batch once more; ``None`` where a process does not have all stages.

    Attributes:
        stages: of this process, once they are known; it may not read the weights of others.
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
        """Of a loss or a gradient."""
        self._norms: dict[int, float] = {}
        """Of each weight, by ``id``, at its stage's last update."""
        self._has_grown = False
        self._has_saturated = False

    def check_gradients(self, stage: Stage, clock: int, microbatches: str, steps: Sequence[TrainingStep]) -> None:
        """Refuse, or warn of, gradients that are not finite, before a stage is updated.

        Args:
            stage: with the gradients of its parameters, and the errors that wait for its tiles.
            clock: of the run.
            microbatches: whose gradients they are.
            steps: micro-batches whose losses have not been looked at.

        Raises:
            UsageError: naming stage, clock, micro-batch and layer, if one is not finite.
        """
        if self._has_warned:
            return
        learnt = [value for parameter in stage.parameters for value in _learnt_by(parameter)]
        if not learnt or torch.cat(learnt).isfinite().all():
            return
        wrong = [p for p in stage.parameters if not all(value.isfinite().all() for value in _learnt_by(p))]
        self.check_losses(steps, clock)  # says more
        # The backward comes to the last one first.
        name = self._name(*wrong)
        self._report(f"the gradient of {name} is not finite (stage {stage.index}, {microbatches}, clock {clock})")

    def watch_growth(self, stage: Stage) -> None:
        """Warn, once, if one of the first updates of a stage has made a weight much larger, before its next update.

        Where stages update one by one, micro-batches in flight go backward through the weights of now, and through what
        their forward has kept: a normalization that has divided by the size of the activations of then, say. Weights
        that have become larger by a factor make the errors larger by that factor, of which the next update is made.
        """
        if self._has_grown or stage.version > _FIRST_UPDATES:
            return
        for weight in stage.parameters:
            # Errors do not go through what is added to activations: biases, and what is alike for all samples.
            is_added = weight.dim() < 2 or (weight.dim() > 2 and len(weight) == 1)
            if is_added or is_analog(weight):
                continue
            before, now = self._norms.get(id(weight)), weight.detach().norm().item()
            # What begins near zero grows at first by any factor, and harms nobody.
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

    def watch_saturation(self) -> None:
        """Warn, once, of a layer of which many weights are at the bounds of their devices."""
        layers = [module for stage in self.stages for module in stage.modules if is_analog(module)]
        if self._has_saturated or not layers:
            return
        from aimc_pl.devices.saturation import saturated_fraction  # with aihwkit, which is there when a layer is analog

        fraction, layer = max(((saturated_fraction(layer), layer) for layer in layers), key=itemgetter(0))
        if fraction > _SATURATED:
            self._has_saturated = True
            name = next(name for name, module in self._module.named_modules() if module is layer)
            warnings.warn(
                f"{100 * fraction:.0f} % of the weights of {name!r} are at the bounds of their devices, where pulses "
                "in one direction hardly move them: use devices of a wider range, or a lower learning rate",
                stacklevel=2,
            )

    def check_losses(self, steps: Sequence[TrainingStep], clock: int) -> None:
        """Refuse, or warn of, losses that are not finite, of micro-batches that have gone through all stages.

        Raises:
            UsageError: naming micro-batch and clock of the first that is not finite, and where that comes from.
        """
        wrong = next((step for step in steps if step.loss is not None and not step.loss.isfinite().all()), None)
        if wrong is not None and not self._has_warned:
            cause = self._cause(wrong)
            self._report(f"the loss is not finite{cause} (micro-batch {wrong.number}, clock {clock})")

    def _cause(self, step: TrainingStep) -> str:
        """Where the first number comes from that is not finite, as far as can be told."""
        if not _is_finite(step.inputs):
            return ", as the batch holds such numbers"
        for parameter in (parameter for stage in self.stages for parameter in stage.parameters):
            if not read_weights([parameter]).isfinite().all():
                return f", as are the weights of {self._name(parameter)}"
        name = self._first_output(step)
        return "" if name is None else f", first in the output of {name!r}"

    def _first_output(self, step: TrainingStep) -> str | None:
        """The first module whose output is not finite, when the micro-batch runs once more."""
        if self._running_again is None:
            return None
        names = {id(part): name for name, part in self._module.named_modules() if name}
        found: list[str] = []

        def note(part: nn.Module, args: Any, output: Any) -> None:
            if not found and id(part) in names and not _is_finite(output):
                found.append(names[id(part)])

        handle = register_module_forward_hook(note)
        try:
            # It fails where the step needs gradients, say. That does not matter: the loss is what is reported.
            with suppress(Exception), self._running_again():
                step()
        finally:
            handle.remove()
        return found[0] if found else None

    def _name(self, *parameters: Any) -> str:
        """The name of the last of some parameters, in quotes; the optimizer may train others than the module's."""
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
    """Refuse to save a module that has diverged.

    Args:
        module: whose trained parameters and tiles are looked at.
        state: its state dict.
        step: for the message.

    Raises:
        UsageError: naming the first weights that are not finite.
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
                f"after step {step} the weights of {name!r} are not finite: nothing is saved, and the checkpoints of "
                "before stay as they are. Resume from one of them, with a lower learning rate for example"
            )


def _learnt_by(parameter: Any) -> Sequence[Tensor]:
    """One column of the gradient of a parameter; of a tile's, the errors that wait for its update.

    An error that is not finite makes a whole row of the gradient of a weight so, and an input shows in the loss. To
    read all of the gradients takes a third of the time of an update.
    """
    if is_analog(parameter):
        return [error.flatten() for error in parameter.analog_grad_output]
    gradient = parameter.grad
    if gradient is None:
        return ()
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return (gradient[:, *[0] * (gradient.dim() - 1)] if gradient.dim() > 1 else gradient.flatten(),)


def _is_finite(value: Any) -> bool:
    """Of all tensors in a nested value that have fractions."""
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return all(bool(leaf.isfinite().all()) for leaf in leaves)


def _layer(name: str) -> str:
    """The name of a parameter, without what aihwkit puts between a layer and its tile."""
    return name.partition(".analog_module.")[0]
