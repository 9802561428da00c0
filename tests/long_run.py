"""This script runs slowly in one process per stage, with a checkpoint every fifth step, for tests that disturb it.

python tests/long_run.py FOLDER TIMEOUT
"""

import signal
import sys
import time
import warnings
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_modules import Attributes, loader

from aimc_pl.strategies import AnalogPipelineStrategy


class Slowly(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_fit_start(self, *args):
        warnings.warn("given by every process", stacklevel=1)

    def on_train_batch_end(self, trainer, *args):
        time.sleep(0.03)
        if trainer.is_global_zero:
            (self.folder / "step").write_text(str(trainer.global_step))


def train(folder, num_stages=3, timeout=60.0, max_epochs=2000, ckpt_path=None, **processes):
    module = Attributes().double()
    trainer = L.Trainer(
        accelerator="cpu",
        **processes,
        max_epochs=max_epochs,
        strategy=AnalogPipelineStrategy(
            num_stages, "async", 3, split_at=["l2", "norm"][: num_stages - 1], timeout=timeout
        ),
        callbacks=[Slowly(folder), ModelCheckpoint(folder, save_last=True, every_n_train_steps=5)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(module), ckpt_path=ckpt_path)
    return trainer


if __name__ == "__main__":
    # A shell starts background jobs with Ctrl-C ignored. The tests may run in such a job.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    train(Path(sys.argv[1]), timeout=float(sys.argv[2]), devices=3)
