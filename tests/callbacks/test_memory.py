"""This test checks that a long run with all callbacks uses no more memory at its end than after its first epochs.

Every stage makes 1,000 updates, or as many as ``AIMC_PL_EXAMPLES=20000`` says.
"""

import gc
import os
import sys

import lightning as L
import pytest
import torch
from lightning_modules import make_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aimc_pl.callbacks import (
    ClockMonitor,
    Dashboard,
    DeviceMonitor,
    DeviceNoise,
    PipelineDiagram,
    ReadNoise,
    RunBoard,
    StalenessMonitor,
    WriteNoise,
)
from aimc_pl.strategies import AnalogPipelineStrategy

NUM_UPDATES = max(1000, int(os.environ.get("AIMC_PL_EXAMPLES", "0")))
UPDATES_PER_EPOCH = 200
WARM_UP = 2
"""The epoch after which nothing new should be allocated."""


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
    """A callback that counts live tensors, live objects and allocated blocks of memory at the end of every epoch."""

    def __init__(self) -> None:
        self.measured: list[tuple[int, int, int]] = []

    def on_train_epoch_end(self, trainer, pl_module):
        gc.collect()
        objects = gc.get_objects()
        tensors = sum(type(thing) in (torch.Tensor, nn.Parameter) for thing in objects)
        num_objects = len(objects)
        del objects
        self.measured.append((tensors, num_objects, sys.getallocatedblocks()))


# Lightning suggests more worker processes for the loader, but the data are in memory already.
@pytest.mark.slow
def test_nothing_grows_with_the_updates(tmp_path):
    """Check that memory does not grow with updates and what is logged of them."""
    monitor, memory = StalenessMonitor(cosine=True), Memory()
    callbacks = [
        monitor,
        DeviceNoise([WriteNoise(0.01), ReadNoise(0.01)]),
        ClockMonitor(),
        DeviceMonitor(),
        PipelineDiagram(),
        Dashboard(),
        memory,
    ]
    trainer = make_trainer(
        AnalogPipelineStrategy(3, "async", 2, split_at=["net.2", "net.4"]),
        max_epochs=-(-NUM_UPDATES // UPDATES_PER_EPOCH),
        precision="32-true",
        logger=RunBoard(tmp_path),
        log_every_n_steps=50,
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
