"""The command ``aimc-pl``: Lightning's command line, and pictures of schedules and devices."""

import os
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from shutil import rmtree
from typing import Any

from aihwkit.simulator.parameters.base import RPUConfigBase
from jsonargparse import auto_cli, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from aimc_pl.arguments import check_number, shown
from aimc_pl.callbacks import ClockMonitor
from aimc_pl.cli_errors import one_line
from aimc_pl.config_files import with_shipped_configs
from aimc_pl.devices import DEVICES, get_device, plot_response
from aimc_pl.diagram import MAX_DRAWN_CLOCKS, MAX_DRAWN_STAGES, draw_figure, draw_text
from aimc_pl.errors import PeerError, UsageError
from aimc_pl.schedule import Duplex, ScheduleName

# This import registers the names "aimc_none", "aimc_sync" and "aimc_async".
from aimc_pl.strategies import AnalogPipelineStrategy as AnalogPipelineStrategy
from aimc_pl.strategies.checkpoint_io import reading
from aimc_pl.strategies.private_lightning import CheckpointReadingCLI
from aimc_pl.strategies.settings import make_schedule


class AnalogCLI(CheckpointReadingCLI):
    """Lightning's command line, with a report after the fit.

    OmegaConf resolves interpolations in configs after command-line overrides have been applied.
    """

    def __init__(self) -> None:
        self._new_folders: list[Path] = []
        # aihwkit's configurations are dataclasses, of which jsonargparse accepts no subclasses unless told to.
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True, subclasses_enabled=[RPUConfigBase])
        try:
            super().__init__(
                save_config_kwargs={"overwrite": True},
                parser_kwargs={
                    "parser_mode": "omegaconf+",
                    "exit_on_error": False,
                    "description": "Train LightningModules on pipelines of analog in-memory computing accelerators. "
                    "Further commands: 'aimc-pl schedule' draws a pipeline schedule, 'aimc-pl devices' lists devices.",
                },
            )
        except (UsageError, MisconfigurationException):
            self._remove_new_folders()
            raise

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add the arguments that Lightning's command line does not have."""
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="Test the last weights when the fit has ended."
        )

    def reading_checkpoint(self, path: str) -> AbstractContextManager[Any]:
        """Return a context manager for reading hyperparameters from a checkpoint.

        It checks the checkpoint, and keeps it from running code.
        """
        with ExitStack() as stack:
            if path and Path(path).is_file():
                stack.enter_context(reading(stack.enter_context(open(path, "rb")), path))
            return stack.pop_all()

    def instantiate_classes(self) -> None:
        """Instantiate the classes that the configuration names.

        Raises:
            UsageError: if a class refuses its arguments, or if the folder of a logger cannot be created.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise UsageError(str(error)) from error
        for logger in self.trainer.loggers:
            if logger.log_dir is not None:
                path = Path(logger.log_dir)
                new = [folder for folder in (path, *path.parents) if not folder.exists()]
                if self.trainer.is_global_zero:
                    _check_folder(path, new)
                self._new_folders += new

    def _remove_new_folders(self) -> None:
        """Remove the folders that a run refused before its first step has created, unless other runs use them."""
        if self._new_folders and self.trainer.is_global_zero and not self.trainer.global_step:
            for logger in self.trainer.loggers:
                path = Path(logger.log_dir or "")
                of_others = [events for events in path.glob("events.*") if f".{os.getpid()}." not in events.name]
                if path in self._new_folders and not of_others:
                    rmtree(path, ignore_errors=True)
            _remove(self._new_folders)

    def after_fit(self) -> None:
        """Test the model if ``test_after_fit`` is set, and print the results and where to find more."""
        tested: list[Any] = []
        if self._get(self.config, "test_after_fit"):
            tested = self.trainer.test(self.model, self.datamodule, verbose=False)
        console = Console(quiet=not self.trainer.is_global_zero)
        for name, value in (item for results in tested for item in results.items()):
            console.print(f"{name:<24} {value:.4f}")
        for callback in self.trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, ClockMonitor):
                console.print(callback.report(), soft_wrap=True)
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                tensorboard = Path(sys.executable).with_name("tensorboard")
                console.print(f"To watch it: {tensorboard} --logdir {logger.root_dir}", soft_wrap=True)
                console.print("and open http://localhost:6006/#custom_scalars")


def schedule(
    num_stages: int = 4,
    num_microbatches: int = 4,
    schedule: ScheduleName = "async",
    duplex: Duplex = "half",
    png: Path | None = None,
) -> None:
    """Print (or draw) what every stage does in every clock, from the fill to the drain of a mini-batch.

    Args:
        num_stages: M, the number of stages of the pipeline, at most 32.
        num_microbatches: B, the number of micro-batches of a mini-batch, as many as fit into 256 clocks.
        schedule: none, sync, 1f1b or async.
        duplex: for async, one operation of a stage in a clock (half), or a forward and a backward (full).
        png: the file to draw into instead of printing, in the format that the file's name ends with.
    """
    check_number("num_stages", num_stages, at_least=1, at_most=MAX_DRAWN_STAGES, whole=True)
    table = make_schedule(schedule, num_stages, num_microbatches, duplex)
    if table.num_clocks() > MAX_DRAWN_CLOCKS:
        raise UsageError(
            f"num_stages={num_stages} and num_microbatches={shown(num_microbatches)} take more than {MAX_DRAWN_CLOCKS} "
            "clocks, which is too much for a table: lower one"
        )
    if png is None:
        print(draw_text(table, num_microbatches))
    else:
        _check_picture(png)
        _save(draw_figure(table, num_microbatches), png)
    print(
        f"{table.num_cycles()} clock cycles, computation density {table.density():.3f}, "
        f"speedup over one accelerator {table.speedup():.2f}"
    )


def devices(name: str | None = None, png: Path | None = None, num_pulses: int = 1000) -> None:
    """List the analog devices, describe one of them, or draw its response to update pulses.

    Args:
        name: the device to describe.
        png: the file to draw the device's response into.
        num_pulses: the number of pulses in each direction, at most 10,000.
    """
    if name is None:
        if png is not None:
            raise UsageError("which device? Add --name")
        for known, function in DEVICES.items():
            print(f"{known:<24} {(function.__doc__ or '').splitlines()[0]}")
        return
    device = get_device(name)
    if png is None:
        print(DEVICES[name].__doc__, device, sep="\n")
    else:
        _check_picture(png)
        _save(plot_response(device, name, num_pulses), png)


def main(args: list[str] | None = None) -> None:
    """Run the command ``aimc-pl``. A request that cannot work, or a lost process, ends in one line and exit code 1.

    Args:
        args: the arguments of the command; by default those of the process.
    """
    try:
        sys.argv[1:] = args = with_shipped_configs(sys.argv[1:] if args is None else args)
        if args[:1] in (["schedule"], ["devices"]):
            auto_cli({"schedule": schedule, "devices": devices}, prog="aimc-pl", exit_on_error=False)
        else:
            AnalogCLI()
    except (UsageError, PeerError, MisconfigurationException, ArgumentError, OmegaConfBaseException) as error:
        sys.exit(f"aimc-pl: error: {one_line(str(error))}")


def _check_folder(path: Path, new: Sequence[Path]) -> None:
    """Check that a folder of logs can be created: create it, and remove new folders again.

    Args:
        path: the folder.
        new: those of the folder and its parents that do not exist yet, the innermost first.

    Raises:
        UsageError: if it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the logger cannot write: {error.strerror}: {error.filename}") from error
    finally:
        _remove(new)


def _remove(folders: Sequence[Path]) -> None:
    """Remove those of the folders that are empty. The innermost must come first."""
    for folder in folders:
        with suppress(OSError):  # The folder does not exist, or others use it.
            folder.rmdir()


def _check_picture(path: Path) -> None:
    """Check that a picture can be written to a path, before it is drawn.

    Raises:
        UsageError: if the path is a folder, lies in no folder, or names no known format.
    """
    if path.is_dir():
        raise UsageError(f"png={path} is a folder: add the name of a file")
    if not path.parent.is_dir():
        raise UsageError(f"png={path} cannot be written: there is no folder {path.parent}")
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known:
        raise UsageError(f"png={path} must end in .png, or another of {', '.join(known)}")


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UsageError(f"png={path} cannot be written: {error.strerror or error}") from error
