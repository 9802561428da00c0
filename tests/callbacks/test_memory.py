"""A long run with all callbacks holds no more at its end than after its first epochs.

It is 1,000 updates of every stage; ``AIMC_PL_EXAMPLES=20000`` makes it so many.
"""

import gc
import os
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_modules import make_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aimc_pl.callbacks import (
    ClockMonitor,
    Dashboard,
    DeviceNoise,
    PipelineDiagram,
    ReadNoise,
    StalenessMonitor,
    WriteNoise,
)
from aimc_pl.strategies import AnalogPipelineStrategy

NUM_UPDATES = max(1000, int(os.environ.get("AIMC_PL_EXAMPLES", "0")))
UPDATES_PER_EPOCH = 200
WARM_UP = 2
"""The epoch at whose end everything has been made that is made once."""


class Small(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))

    def training_step(self, batch):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[0])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch):
        self.log("accuracy", nn.functional.mse_loss(self.net(batch[0]), batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Memory(L.Callback):
    """Measures at the end of every epoch: live tensors, live objects, and blocks of memory that Python has given."""

    def __init__(self) -> None:
        self.measured: list[tuple[int, int, int]] = []

    def on_train_epoch_end(self, trainer, pl_module):
        gc.collect()
        objects = gc.get_objects()
        tensors = sum(type(thing) in (torch.Tensor, nn.Parameter) for thing in objects)
        num_objects = len(objects)
        del objects
        self.measured.append((tensors, num_objects, sys.getallocatedblocks()))


# Lightning suggests more loader processes; the data are in memory.
@pytest.mark.slow
@pytest.mark.parametrize("log_every_n_steps", [0, 50])
def test_nothing_grows_with_the_updates(log_every_n_steps, tmp_path):
    """Also where nothing is ever logged."""
    monitor, memory = StalenessMonitor(cosine=True), Memory()
    callbacks = [
        monitor,
        DeviceNoise([WriteNoise(0.01), ReadNoise(0.01)]),
        ClockMonitor(),
        PipelineDiagram(),
        Dashboard(),
        memory,
    ]
    trainer = make_trainer(
        AnalogPipelineStrategy(3, "async", 2, split_at=["net.2", "net.4"]),
        max_epochs=-(-NUM_UPDATES // UPDATES_PER_EPOCH),
        precision="32-true",
        logger=TensorBoardLogger(tmp_path) if log_every_n_steps else False,
        log_every_n_steps=log_every_n_steps,
        limit_val_batches=1,
        callbacks=callbacks,
    )
    data = DataLoader(TensorDataset(torch.randn(UPDATES_PER_EPOCH, 3)), 2)
    trainer.fit(Small(), data, data)
    num_updates = sum(monitor.counts[0].values())
    assert num_updates >= NUM_UPDATES
    tensors, objects, blocks = (b - a for a, b in zip(memory.measured[WARM_UP], memory.measured[-1], strict=True))
    assert tensors <= 5
    assert objects <= 50
    assert blocks <= 200
