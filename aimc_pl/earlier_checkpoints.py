"""This module finds the checkpoints of earlier runs that ``--ckpt_path last`` and ``--ckpt_path best`` name.

Lightning looks only in the folder of the run itself, which is new.
"""

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger


def last_checkpoint(trainer: "pl.Trainer", loggers: Sequence[Logger]) -> Path | None:
    """Return the newest ``last.ckpt`` of the runs with these loggers, or ``None`` if there is none."""
    return _newest("last*.ckpt", trainer, loggers)


def _newest(pattern: str, trainer: "pl.Trainer", loggers: Sequence[Logger]) -> Path | None:
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    folders = [
        *(folder for logger in loggers for folder in _root(logger).glob("*/checkpoints")),
        *(Path(saver.dirpath) for saver in savers if saver.dirpath),
        *([] if loggers else [Path(trainer.default_root_dir, "checkpoints")]),
    ]
    found = [path for folder in folders for path in folder.glob(pattern)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _root(logger: Logger) -> Path:
    return Path(logger.save_dir or "", str(logger.name))
