"""This module prints what users should know when a run starts: each line once, and not into the progress bar."""

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_info


def say(trainer: "pl.Trainer", line: str) -> None:
    """Print a line in the first process, above the progress bar if there is one."""
    if trainer.progress_bar_callback is None:
        rank_zero_info(line)
    elif trainer.is_global_zero:
        trainer.progress_bar_callback.print(line)
