"""The functions in this module settle where stages begin, and what each holds, when the first mini-batch comes."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy

from aimc_pl import boundaries
from aimc_pl.analog import are_seeded
from aimc_pl.arguments import listed
from aimc_pl.boundaries import Calls
from aimc_pl.cost import Hardware
from aimc_pl.errors import UsageError
from aimc_pl.flight import StagedStep
from aimc_pl.private_torch import tree_leaves, version
from aimc_pl.reachable import variables_of
from aimc_pl.stage import Stage
from aimc_pl.strategies import analog_parts
from aimc_pl.strategies.checks import check_initialized, check_microbatches, check_optimizer
from aimc_pl.strategies.private_lightning import SET_AROUND_STEPS
from aimc_pl.strategies.said import say
from aimc_pl.strategies.settings import Settings
from aimc_pl.strategies.training_step import TrainingStep
from aimc_pl.trial import Function, Trials, verify
from aimc_pl.weights import read_weights


def settle(
    module: "pl.LightningModule",
    steps: Sequence[TrainingStep],
    whole: TrainingStep,
    other: TrainingStep,
    settings: Settings,
    split_at: Sequence[str] | None,
    *,
    splits_by_sample: bool,
    trained: Sequence[Tensor],
    apart: bool,
    agree: Callable[[Any], Any],
) -> StagedStep | None:
    """Divide training_step into stages, at the first mini-batch.

    The step runs a few times for this. These runs leave no trace in the module, its metrics and the random states.

    Args:
        module: the LightningModule, which holds all modules that training_step calls.
        steps: the runs of training_step on the micro-batches of the first mini-batch.
        whole: the run of training_step on that mini-batch as a whole.
        other: the run of training_step on a part of that mini-batch.
        settings: the arguments of the strategy.
        split_at: the names of the modules with which stages 1 … M−1 begin; ``None`` to choose them by measured time.
        splits_by_sample: whether batches are split along the samples, because there is no function of the user.
        trained: tensors that the optimizer trains and that are no parameters of the module.
        apart: whether every stage runs in a process of its own.
        agree: returns, in every process, the value that rank 0 passes to it.

    Returns:
        The divided step; ``None`` if all micro-batches skip learning, so that nothing can be observed yet.

    Raises:
        UsageError: if the step cannot be divided in this way, or computes something else when it runs in stages.
    """
    schedule = settings.schedule
    data = data_tensors(module.trainer)
    versions = [*map(version, data)]
    for first in range(len(steps)):
        functions = [*steps[first:], *steps[:first]]
        # One micro-batch alone would not show what overlapping micro-batches share.
        functions += [other] if len(steps) == 1 and schedule.is_async else []
        trials = trials_of(module, functions, [step.inputs for step in (*functions, whole)])
        calls = Calls()
        reference = trials.undivided(calls.recorded(module))
        if [*map(version, data)] != versions:
            raise UsageError(
                "training_step writes into the data set, which the runs before the first update cannot put back: let "
                "it write into a copy"
            )
        if reference is not None:
            break
    else:
        return None
    may_share = not (schedule.is_async or apart)
    split_at, found = _divide(module, trials, calls, schedule.num_stages, split_at, may_share, agree, settings.hardware)
    overlaps = schedule.num_stages > 1 and (schedule.is_async or schedule.num_microbatches > 1)
    if overlaps:
        check_initialized(module, split_at)
    step = StagedStep(
        module,
        split_at,
        [Stage(index) for index in range(schedule.num_stages)],
        delayed=schedule.is_async,
        weight_stashing=settings.weight_stashing,
        may_share=may_share,
        overlaps=overlaps,
        trained=trained,
        set_outside=SET_AROUND_STEPS,
    )
    if trials.casts:
        step.follow_casts()
    trials.record(step, reference)
    boundaries.check_stages(step.stages, split_at)
    if settings.verify and are_seeded(module):
        trials.check_repeats(reference)
        if schedule.num_stages > 1:
            trials.check_memory(step, reference)
            verify(trials, step, reference)
        if apart and not schedule.is_async:
            learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
            gradients = dict(zip(learning, reference.gradients, strict=True))
            check_optimizer(module.trainer.optimizers[0], gradients, step.stages[-1])
    if schedule.num_microbatches > 1:
        comparable = settings.verify and are_seeded(module)
        losses = trials.losses([*steps, whole], reference) if comparable else None
        check_microbatches(module, losses, steps, settings, splits_by_sample)
    remedies = "".join(f", {remedy}" for remedy in settings.remedies)
    say(
        module.trainer,
        f"{_name(module)} in {schedule.num_stages} stages{found or _weights(step.stages)}, "
        f"schedule {schedule.name!r}{remedies}, split_at={split_at}: {analog_parts.describe(module)}",
    )
    return step


def trials_of(module: "pl.LightningModule", functions: Sequence[Function], inputs: Any = None) -> Trials:
    """Return trials of a step. These runs leave no trace in the module, nor in the optimizers and their schedulers."""
    trainer = module.trainer
    beside = [("optimizers", trainer.optimizers), ("lr_schedulers", trainer.lr_scheduler_configs)]
    return Trials(module, functions, inputs, beside, outside=[trainer])


def data_tensors(trainer: "pl.Trainer") -> list[Tensor]:
    """Return the tensors that are attributes of the training data sets, alone or in a tuple."""
    sets = [getattr(loader, "dataset", None) for loader in tree_leaves(trainer.train_dataloader)]
    held = [value for dataset in sets for value in variables_of(dataset).values()]
    values = [inner for value in held for inner in (value if isinstance(value, tuple) else (value,))]
    return [value for value in values if isinstance(value, Tensor)]


def settle_evaluation(
    module: "pl.LightningModule",
    function: Callable[[], Any],
    inputs: Any,
    num_stages: int,
    split_at: Sequence[str] | None,
    agree: Callable[[Any], Any],
    hardware: Hardware | None = None,
) -> StagedStep:
    """Divide a step of validation, test or predict into stages. The runs of the step for this leave no trace.

    Args:
        module: the LightningModule, which holds all modules that the step calls.
        function: runs the step on the first batch.
        inputs: the first batch.
        num_stages: M, the number of stages.
        split_at: the names of the modules with which stages 1 … M−1 begin; ``None`` to choose them by measured time.
        agree: returns, in every process, the value that rank 0 passes to it.
        hardware: the hardware on which times are modelled; ``None`` to measure them.

    Raises:
        UsageError: if the step cannot be divided in this way.
    """

    def without_loss() -> None:
        function()

    trials = trials_of(module, [without_loss], inputs)
    calls = Calls(with_gradients=False)
    with calls.recorded(module), trials.fresh():
        function()
    split_at, found = _divide(module, trials, calls, num_stages, split_at, False, agree, hardware)
    stages = [Stage(index) for index in range(num_stages)]
    step = StagedStep(module, split_at, stages, may_share=False, overlaps=False, with_gradients=False)
    trials.record(step)
    if found:
        say(module.trainer, f"{_name(module)} in {num_stages} stages{found}, split_at={split_at}")
    return step


def _weights(stages: Sequence[Stage]) -> str:
    """Return a remark on the stages' shares of the weights, for stages whose times nobody has measured.

    Lazy layers have no weights yet.
    """
    if any(is_lazy(weight) for stage in stages for weight in stage.parameters):
        return ""
    counts = [sum(read_weights([weight]).numel() for weight in stage.parameters) for stage in stages]
    if len(stages) == 1 or not sum(counts):
        return ""
    return f" of {', '.join(f'{100 * count / sum(counts):.0f}' for count in counts)} % of the trained weights"


def _name(module: "pl.LightningModule") -> str:
    """Return the name of a module's class, and those of the networks in it."""
    networks = [type(child).__name__ for child in module.children() if any(True for _ in child.parameters())]
    return f"{type(module).__name__} ({listed(networks, 40)})" if networks else type(module).__name__


def _divide(
    module: "pl.LightningModule",
    trials: Trials,
    calls: Calls,
    num_stages: int,
    split_at: Sequence[str] | None,
    may_share: bool,
    agree: Callable[[Any], Any],
    hardware: Hardware | None,
) -> tuple[list[str], str]:
    """Return the names of the modules with which stages begin, and a remark on the stages' times for the log."""
    if split_at is not None or num_stages == 1:
        boundaries.check(calls, split_at or ())
        return list(split_at or ()), ""
    if hardware is None:
        measuring = "Measuring the layers that the step calls, on the first micro-batch, to divide the step evenly"
        say(module.trainer, measuring)
    repeats = 1 if hardware else min(len(trials.functions), 2)
    found, shares = agree(
        boundaries.find(trials, calls, num_stages, may_share=may_share, repeats=repeats, hardware=hardware)
    )
    percent = ", ".join(f"{100 * share:.0f}" for share in shares)
    if max(shares) > 0.6:
        rank_zero_warn(
            f"one stage takes {100 * max(shares):.0f} % of the time (stages of {percent} %): the network has too few "
            f"layers of equal cost for {num_stages} stages. Use fewer stages, or name modules with split_at"
        )
    return found, f" of {percent} % of the {'modelled' if hardware else 'measured'} time"
