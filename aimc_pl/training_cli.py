"""Lightning's command line, with this package's strategy, callbacks and report."""

import logging
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout, suppress
from difflib import get_close_matches
from inspect import signature
from io import StringIO
from pathlib import Path
from shutil import rmtree
from textwrap import shorten
from traceback import walk_tb
from typing import IO, Any, get_args, override
from warnings import catch_warnings

import yaml
from aihwkit.simulator.parameters.base import RPUConfigBase
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from torch import nn
from torch.distributed import DistNetworkError

from aimc_pl.arguments import check_number, shown
from aimc_pl.callbacks import ClockMonitor, Dashboard, PipelineBar
from aimc_pl.cli import STRICT, TRAINING, Help, described, without_markup
from aimc_pl.config_files import with_kept_strategies, with_shipped_configs
from aimc_pl.data import InMemoryImages, PydocText
from aimc_pl.errors import PeerError, UsageError
from aimc_pl.quiet import quiet_evaluation
from aimc_pl.schedule import ScheduleName

# This import registers the strategy's names, such as "aimc_async".
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.strategies.analog_parts import admitted_classes
from aimc_pl.strategies.checkpoint_io import reading
from aimc_pl.strategies.checks import OTHER_PACKAGE, too_few_samples
from aimc_pl.strategies.earlier_checkpoints import are_local, best_checkpoint, last_checkpoint
from aimc_pl.strategies.private_lightning import CheckpointReadingCLI
from aimc_pl.tasks import Classifier, LanguageModel

_AT_LEAST = {"check_val_every_n_epoch": 1, "gradient_clip_val": 0}
"""Numbers that the Trainer does not check: it divides by the first, and takes a negative second one for none."""

_TOP_LEVEL = (
    *("trainer", "model", "data", "optimizer", "lr_scheduler"),
    *("seed_everything", "test_after_fit", "ckpt_path"),
)
"""What a config, or an argument of the command, may begin with."""

_NAMED_CHECKPOINTS = ("best", "last", "hpc", "registry")
"""What ``ckpt_path`` may say to Lightning instead of a path."""

_EARLIER = {"last": last_checkpoint, "best": best_checkpoint}
"""Functions that find the checkpoints of earlier runs that two of these words mean."""


class _RunConfig(SaveConfigCallback):
    """A callback that saves the configuration of a run, overrides included, and logs it as hyperparameters.

    A run without a logger has no folder of its own. It saves nothing: the current folder may have a config.yaml.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # Without metrics TensorBoard would get a chart of a constant, hp_metric.
                logger.log_hyperparams(config, {})
                logger.experiment.add_text("config", f"```yaml\n{yaml.safe_dump(config, sort_keys=False)}```")
            else:
                logger.log_hyperparams(config)


class AnalogCLI(CheckpointReadingCLI):
    """Lightning's command line, with a report after the fit.

    OmegaConf resolves interpolations in configs after command-line overrides have been applied.

    Args:
        run: whether the first argument names what to run.
        parser_kwargs: arguments of the parser.
    """

    def __init__(self, run: bool = True, **parser_kwargs: Any) -> None:
        self._new_folders: list[Path] = []
        # aihwkit's configurations are dataclasses, of which jsonargparse accepts no subclasses unless told to.
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True, subclasses_enabled=[RPUConfigBase])
        try:
            super().__init__(
                run=run,
                save_config_callback=_RunConfig,
                save_config_kwargs={"overwrite": True},
                # The line at the start of a run says what a table of modules would. Its FLOPs are 0 for any module
                # without example_input_array.
                trainer_defaults={"enable_model_summary": False},
                parser_kwargs={
                    "parser_mode": "omegaconf+",
                    **STRICT,
                    "prog": "aimc-pl",
                    "formatter_class": Help,
                    **parser_kwargs,
                    **{name: described(name, line) for name, line in TRAINING.items()},
                },
            )
        except (UsageError, MisconfigurationException, ValueError) as error:
            self._remove_new_folders()
            if self._another_process_says(error):
                sys.exit(1)
            raise

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Instantiate the trainer, with a progress bar that shows what the pipeline does, unless the user has one."""
        config = self._get(self.config_init, "trainer", default={})
        for name, least in _AT_LEAST.items():
            if config.get(name) is not None:
                check_number(name, config[name], at_least=least)
        callbacks = config.get("callbacks") or []
        if isinstance(callbacks, Callback):
            callbacks = [callbacks]
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if config.get("enable_progress_bar") is not False and not has_bar:
            kwargs["callbacks"] = [*callbacks, PipelineBar()]
        return super().instantiate_trainer(**kwargs)

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add the arguments that Lightning's command line does not have."""
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="Test the last weights when the fit has ended."
        )

    def reading_checkpoint(self, path: str) -> AbstractContextManager[Any]:
        """Return a context manager for reading hyperparameters from a checkpoint.

        It checks the checkpoint, and keeps it from running code.

        Raises:
            UsageError: if the checkpoint is a file that cannot be read.
        """
        with ExitStack() as stack:
            if path and path not in _NAMED_CHECKPOINTS and ":" not in str(path):  # no address
                stack.enter_context(admitted_classes(nn.Module()))
                stack.enter_context(reading(stack.enter_context(_opened(path)), path))
            return stack.pop_all()

    def instantiate_classes(self) -> None:
        """Instantiate the classes that the configuration names.

        Raises:
            UsageError: if a class refuses its arguments, or if the folder of logs cannot be created.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            name = self._get(self.config, "trainer.strategy")
            if "invalid strategy name" in str(error):
                known = ", ".join(f"aimc_{schedule}" for schedule in get_args(ScheduleName))
                raise UsageError(
                    f"unknown strategy {shown(name)}: choose {known}, or the path of a class, such as "
                    "aimc_pl.strategies.AnalogPipelineStrategy"
                ) from error
            raise UsageError(str(error)) from error
        for logs in [logger.log_dir for logger in self.trainer.loggers] or [self.trainer.default_root_dir]:
            if logs is not None:
                path = Path(logs)
                new = [folder for folder in (path, *path.parents) if not folder.exists()]
                if self.trainer.is_global_zero:
                    _check_folder(path, new)
                self._new_folders += new
        self._find_checkpoint()

    def _find_checkpoint(self) -> None:
        """Let ``ckpt_path=last`` and ``best`` mean checkpoints of earlier runs with the same loggers.

        Raises:
            UsageError: if there is none. (A fit from the last one begins anew.)
        """
        word = str(self._get(self.config_init, "ckpt_path"))
        if word not in _EARLIER:
            return
        loggers = self._get(self.config_init, "trainer.logger")
        if not isinstance(loggers, list):
            loggers = [] if self._get(self.config_init, "trainer.fast_dev_run") else self.trainer.loggers
        if not are_local(self.trainer, loggers):
            return
        path = _EARLIER[word](self.trainer, loggers)
        if path is not None:
            rank_zero_info(f"--ckpt_path {word} is {path}")
        elif (word, self.subcommand) == ("last", "fit"):
            # As in Lightning, one command can start the first run and, after it was stopped, all others.
            rank_zero_info(
                "--ckpt_path last: no earlier run of this name has left a last.ckpt, so training begins anew"
            )
        else:
            file = "last.ckpt" if word == "last" else "best checkpoint"
            raise UsageError(
                f"--ckpt_path {word}: no earlier run of this name has left a {file}: give the path of a checkpoint, or "
                "the --trainer.logger of the run"
            )
        self.config_init[str(self.subcommand)]["ckpt_path"] = path

    def _another_process_says(self, error: Exception) -> bool:
        """Return whether another process of this machine ends with the same error, and has been the first to do so."""
        strategy = self.trainer.strategy if hasattr(self, "trainer") else None
        processes = strategy.processes if isinstance(strategy, AnalogPipelineStrategy) else None
        return processes is not None and self.trainer.num_nodes == 1 and not processes.is_first(str(error))

    def before_fit(self) -> None:
        """Refuse, before further processes start, mini-batches that would be too small for their micro-batches."""
        strategy, data = self.trainer.strategy, self.datamodule
        if isinstance(strategy, AnalogPipelineStrategy) and isinstance(data, InMemoryImages | PydocText):
            is_custom = strategy.settings.split_batch is not None or hasattr(self.model, "split_batch")
            if not is_custom and data.batch_size < strategy.schedule.num_microbatches:
                raise too_few_samples(data.batch_size, strategy.schedule.num_microbatches)

    def before_validate(self) -> None:
        """Say so if no checkpoint is given. (Lightning calls this method and the next two by their names.)"""
        if not self._get(self.config, "ckpt_path"):
            rank_zero_info("--ckpt_path is not set: the weights are those that the module begins with")
        quiet_evaluation()

    before_test = before_predict = before_validate

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
        # Lightning adds the attribute outside of the class.
        callbacks: list[Callback] = self.trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        for callback in callbacks:
            if isinstance(callback, ClockMonitor):
                console.print(callback.report(), soft_wrap=True)
        has_dashboard = any(isinstance(callback, Dashboard) for callback in callbacks)
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                tensorboard = Path(sys.executable).with_name("tensorboard")
                console.print(f"To watch it: {tensorboard} --logdir {logger.root_dir}", soft_wrap=True)
                # Without the callback this page of TensorBoard is empty.
                console.print(f"and open http://localhost:6006/{'#custom_scalars' if has_dashboard else ''}")


class _CheckingCLI(AnalogCLI):
    """Lightning's command line, which ends before the fit."""

    @override
    def before_fit(self) -> None:
        super().before_fit()
        if isinstance(self.model, Classifier | LanguageModel):  # another module might need the Trainer for it
            self.model.configure_optimizers()
        raise _Checked


class _Checked(Exception):  # noqa: N818, this is no error
    """Ends the command before the fit."""


def check_fit(args: list[str]) -> None:
    """Check the arguments of ``aimc-pl``, of which the first is ``fit``, without a run.

    The config is read, and the model, the data, the strategy and the callbacks that it names are made. So is the
    optimizer of this package's tasks.

    Raises:
        UsageError: if what the arguments ask for cannot work.
        ArgumentError: if the parser refuses an argument.
    """
    sys.argv[1:] = with_kept_strategies(with_shipped_configs(args))
    silence()
    with suppress(_Checked), explained():
        _CheckingCLI()


def train() -> None:
    """Run Lightning's command line on the arguments of the process.

    Raises:
        UsageError: if what the arguments ask for cannot work.
    """
    # Python finds modules beside a script. The user's are in the current folder, and the script is this command.
    sys.path.append(os.getcwd())
    silence()
    with explained(), _help_without_markup(), catch_warnings():
        AnalogCLI()


@contextmanager
def _help_without_markup() -> Iterator[None]:
    """Context manager that prints the help of a class, such as --trainer.strategy.help, as plain text."""
    if not any(arg.partition("=")[0].endswith(".help") for arg in sys.argv):
        yield
        return
    text = StringIO()
    try:
        with redirect_stdout(text):
            yield
    finally:
        print(without_markup(text.getvalue()), end="")


@contextmanager
def explained() -> Iterator[None]:
    """Context manager that turns errors of Lightning and of parsers into the line that helps.

    Raises:
        UsageError: for an error that comes from the arguments.
        PeerError: if the processes of the run cannot connect.
    """
    try:
        yield
    except ArgumentError as error:
        if remedy := _remedy(str(error)):
            raise UsageError(remedy) from error
        raise
    except DistNetworkError as error:
        reason = str(error).partition("\n")[0]
        raise PeerError(
            f"the processes cannot connect, which a busy machine or a taken port causes: {reason:.90}"
        ) from error
    except (MisconfigurationException, OmegaConfBaseException) as error:
        raise UsageError(_cut(str(error))) from error
    except RuntimeError as error:
        # EarlyStopping's monitor, which is unknown until the end of an epoch.
        if not str(error).startswith("Early stopping conditioned on metric") or not _is_of_lightning(error):
            raise
        raise UsageError(
            _cut(str(error).replace("Pass in or modify your `EarlyStopping` callback to use", "Use"))
        ) from error
    except ValueError as error:
        if not _is_of_lightning(error):
            raise
        # Lightning itself refuses an argument. Its first sentence says why, and the place in its code helps nobody.
        raise UsageError(str(error).strip().partition(". ")[0]) from error


def _is_of_lightning(error: Exception) -> bool:
    """Return whether Lightning itself has raised an error."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].startswith("lightning.")


def _cut(message: str) -> str:
    """Return a message in one line that leaves space for the name of the command."""
    return shorten(message, 180, placeholder=" ...")


def _remedy(message: str) -> str | None:
    """Return what to write instead of arguments that the parser does not understand, for the usual mistakes."""
    _, _, unknown = message.partition("unrecognized arguments: ")
    word = unknown.partition(" ")[0]
    name = word.removeprefix("--").partition("=")[0]
    if word.endswith((".yaml", ".yml")) and not word.startswith("-"):
        return f"write --config {word}: a config has no place of its own among the arguments"
    known = signature(Trainer).parameters
    if in_config := re.search(r"does not accept option 'trainer\.(\w+)", message):
        alike = get_close_matches(in_config[1], known, n=1)
        hint = f": did you mean {alike[0]}?" if alike else ""
        return f"trainer.{in_config[1]} in a config is no argument of the Trainer{hint}"
    if at_top := re.search(r"does not accept option '(\w+)", message):
        alike = get_close_matches(at_top[1], _TOP_LEVEL, n=1)
        return f"{at_top[1]} in a config is no argument{f': did you mean {alike[0]}?' if alike else ''}"
    if word.startswith("--") and name in known:
        return f"write --trainer.{name}: --{name} is an argument of the Trainer"
    if word.startswith("--") and name in signature(AnalogPipelineStrategy).parameters:
        return f"write --trainer.strategy.{name}: --{name} is an argument of the strategy"
    alike = get_close_matches(name.removeprefix("trainer."), known, n=1) if word.startswith("--trainer.") else []
    if alike:
        return f"--{name} is no argument: did you mean --trainer.{alike[0]}?"
    first, dot, rest = name.partition(".")
    if word.startswith("--") and first not in _TOP_LEVEL and (alike := get_close_matches(first, _TOP_LEVEL, n=1)):
        return f"--{name} is no argument: did you mean --{alike[0]}{dot}{rest}?"
    if missing := re.search(r"arguments are required: (\w+)\.model", message):
        verb = "train" if missing[1] == "fit" else missing[1]
        return f"what to {verb}? Add --config with a file, such as --config digits_async.yaml, or --model with a class"
    if "does not correspond to a subclass of Lightning" in message and "pytorch_lightning" in sys.modules:
        return OTHER_PACKAGE
    return None


def silence() -> None:
    """Keep all processes but the first from printing what that one prints."""
    # Lightning adds the attribute to a function.
    if rank_zero_only.rank:  # pyright: ignore[reportFunctionMemberAccess]
        for name in ("lightning.fabric", "lightning.pytorch"):
            logging.getLogger(name).setLevel(logging.WARNING)


def _opened(path: str) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UsageError(f"cannot read checkpoint {path}: {error.strerror or error}") from error


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
        raise UsageError(f"the run cannot write: {error.strerror}: {error.filename}") from error
    finally:
        _remove(new)


def _remove(folders: Sequence[Path]) -> None:
    """Remove those of the folders that are empty. The innermost must come first."""
    for folder in folders:
        with suppress(OSError):  # The folder does not exist, or others use it.
            folder.rmdir()
