"""A run that takes its time, to be disturbed: one process per stage, a checkpoint every fifth step.

LOCAL_RANK=0 python tests/long_run.py FOLDER TIMEOUT
"""

import sys
import time
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_modules import Attributes, loader

from aimc_pl.strategies import AnalogPipelineStrategy


class Slowly(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *args):
        time.sleep(0.03)
        if trainer.is_global_zero:
            (self.folder / "step").write_text(str(trainer.global_step))


def train(folder, devices, timeout=60.0, max_epochs=2000, ckpt_path=None, num_nodes=1):
    module = Attributes().double()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        num_nodes=num_nodes,
        max_epochs=max_epochs,
        strategy=AnalogPipelineStrategy(3, "async", 3, split_at=["l2", "norm"], timeout=timeout),
        callbacks=[Slowly(folder), ModelCheckpoint(folder, save_last=True, every_n_train_steps=5)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(module), ckpt_path=ckpt_path)
    return trainer


if __name__ == "__main__":
    train(Path(sys.argv[1]), 3, float(sys.argv[2]))
