"""This module finds the checkpoints of earlier runs that ``--ckpt_path last`` and ``--ckpt_path best`` name.

Lightning looks only in the folder of the run itself, which is new.
"""

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import nn

from aimc_pl.strategies.analog_parts import admitted_classes
from aimc_pl.strategies.checkpoint_io import SealedCheckpointIO


def are_local(trainer: "pl.Trainer", loggers: Sequence[Logger]) -> bool:
    """Return whether all checkpoints are in folders of this machine. Lightning itself looks for those elsewhere."""
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    places = [trainer.default_root_dir, *(logger.save_dir for logger in loggers), *(saver.dirpath for saver in savers)]
    return not any("://" in str(place) for place in places)


def last_checkpoint(trainer: "pl.Trainer", loggers: Sequence[Logger]) -> Path | None:
    """Return the newest ``last.ckpt`` of the runs with these loggers, or ``None`` if there is none."""
    return _newest("last*.ckpt", trainer, loggers)


def best_checkpoint(trainer: "pl.Trainer", loggers: Sequence[Logger]) -> Path | None:
    """Return the best checkpoint of the newest run with these loggers, or ``None`` if there is none.

    It is the one that the first ``ModelCheckpoint`` of that run took for the best. Every checkpoint of the run tells.

    Raises:
        UsageError: if the newest checkpoint cannot be read.
    """
    newest = _newest("*.ckpt", trainer, loggers)
    if newest is None:
        return None
    with admitted_classes(nn.Module()):
        callbacks = SealedCheckpointIO().load_checkpoint(newest).get("callbacks", {})
    names = (state["best_model_path"] for name, state in callbacks.items() if name.startswith("ModelCheckpoint"))
    name = next(names, "")
    moved = newest.with_name(Path(name).name)  # the folder of the run may have another name by now
    return next((path for path in (moved, Path(name)) if path.is_file()), None)


def _newest(pattern: str, trainer: "pl.Trainer", loggers: Sequence[Logger]) -> Path | None:
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    roots = [Path(logger.save_dir or "", str(logger.name)) for logger in loggers] or [Path(trainer.default_root_dir)]
    folders = [
        *(root / "checkpoints" for root in roots),  # of a run whose version is an empty word
        *(folder for root in roots for folder in root.glob("*/checkpoints") if loggers),
        *(Path(saver.dirpath) for saver in savers if saver.dirpath),
    ]
    found = [path for folder in folders for path in folder.glob(pattern)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)
