"""The command ``aimc-pl cost``: what a run of a config would cost on hardware, without the training."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, get_args, override

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from aimc_pl import command_arguments
from aimc_pl.arguments import check_number
from aimc_pl.cli import ELSEWHERE, check_file, check_picture, described, save
from aimc_pl.cost.constants import PRESETS
from aimc_pl.cost.estimate import Estimate, estimate
from aimc_pl.cost.hardware_files import find_hardware
from aimc_pl.cost.report import (
    comparison_table,
    constants_table,
    draw_estimate,
    energy_line,
    schedule_name,
    stages_table,
)
from aimc_pl.cost.states import states_of
from aimc_pl.cost.trace import trace_events, write_trace
from aimc_pl.cost.work import Work
from aimc_pl.errors import UsageError
from aimc_pl.schedule import Schedule, ScheduleName
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.training_cli import AnalogCLI, explained, silence

_WITHOUT_A_RUN = ["--trainer.devices=1", "--trainer.logger=false", "--trainer.num_sanity_val_steps=0"]

MAX_OPERATIONS = 200_000
"""The largest number of forwards of all stages that the command simulates. More take minutes."""


class CostCLI(AnalogCLI):
    """Lightning's command line without subcommands, which counts the work of a config's first micro-batch."""

    def __init__(self) -> None:
        super().__init__(run=False, **described("cost", ELSEWHERE["cost"][1]))

    @override
    def add_arguments_to_parser(self, parser: Any) -> None:
        super().add_arguments_to_parser(parser)
        command_arguments.cost(parser)


class CountWork(Callback):
    """A callback that counts what the stages do for the first micro-batch, and then ends the fit."""

    works: Sequence[Work] = ()
    samples: float = 1.0
    optimizer_states = 0.0

    def __init__(self, strategy: AnalogPipelineStrategy, hardware_name: str) -> None:
        self._strategy = strategy
        self._hardware = find_hardware(hardware_name)

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        self.works = self._strategy.count_work(batch, batch_idx, self._hardware)
        self.samples = self._strategy.batch_size(self._strategy.split_batch(batch)[0])
        self.optimizer_states = states_of(trainer.optimizers[0])
        raise _Counted


class _Counted(Exception):  # noqa: N818, this is no error
    """Ends the fit."""


def cost(args: Sequence[str]) -> None:
    """Print what a run of a config would cost: the stages, all schedules, all hardware; draw it if asked.

    Without arguments, or with ``--hardware`` alone, print the constants of the hardware.

    Args:
        args: the arguments of the command, without its name.

    Raises:
        UsageError: if an argument is wrong, or if the run would be refused.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--hardware", default="rasch_2024")
    options, others = parser.parse_known_args(args)
    hardware = find_hardware(options.hardware)
    if not others:
        print(constants_table(hardware))
        return
    silence()
    sys.argv[1:] = [*args, *_WITHOUT_A_RUN]
    with explained():
        cli = CostCLI()
    config = cli.config
    hardware, minibatches = find_hardware(config.hardware), config.num_minibatches
    check_number("num_minibatches", minibatches, at_least=1, whole=True)
    if config.png is not None:
        check_picture(config.png)
    if config.trace is not None:
        check_file("trace", config.trace)
    strategy = cli.trainer.strategy
    if not isinstance(strategy, AnalogPipelineStrategy):
        raise UsageError(f"cost needs a pipeline, but the strategy is {type(strategy).__name__}: set trainer.strategy")
    own = strategy.schedule
    if own.num_stages * own.num_microbatches * minibatches > MAX_OPERATIONS:
        raise UsageError(
            f"num_minibatches={minibatches} takes more than {MAX_OPERATIONS} forwards of all stages: lower it"
        )
    counted = CountWork(strategy, config.hardware)
    # Lightning adds the attribute outside of the class.
    cli.trainer.callbacks = [counted]  # pyright: ignore[reportAttributeAccessIssue]
    with suppress(_Counted):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    if not counted.works:
        raise UsageError("the training data loader is empty, so there is no batch to count the work of")

    def estimated(schedule: Schedule, hardware: Any) -> Estimate:
        return estimate(
            counted.works, schedule, hardware, counted.samples, counted.optimizer_states, num_minibatches=minibatches
        )

    chosen = estimated(own, hardware)
    print(
        f"{schedule_name(own)} on {hardware.name}: {own.num_stages} stages, {minibatches} mini-batches of "
        f"{own.num_microbatches} micro-batches of {counted.samples:g} samples\n"
    )
    if any(remedy.runs_in_sync(0) for remedy in strategy.settings.remedies):
        cost = "they cost what 1f1b costs" if own.duplex == "half" else "each fills and drains the pipeline"
        print(f"Left out are the first mini-batches, which a remedy runs in sync: {cost}.\n")
    print(stages_table(chosen))
    print(f"\n{energy_line(chosen)}\n")
    print(comparison_table([estimated(schedule, hardware) for schedule in _schedules(own)], "schedule"))
    print()
    presets = {**PRESETS, hardware.name: hardware}
    print(comparison_table([estimated(own, each) for each in presets.values()], "hardware"))
    if config.png is not None:
        save(draw_estimate(chosen), config.png)
    if config.trace is not None:
        write_trace(config.trace, trace_events({f"simulated, {schedule_name(own)}": chosen.timeline}))


def _schedules(own: Schedule) -> list[Schedule]:
    """Return the built-in schedules, and the user's own if it is another one."""
    size = own.num_stages, own.num_microbatches
    built_in = [Schedule(name, *size) for name in get_args(ScheduleName)]
    built_in.append(Schedule("async", *size, duplex="full"))
    return built_in if own in built_in else [*built_in, own]
