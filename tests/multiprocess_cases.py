"""This module trains cases that tests compare between one process and one process per stage.

As a script under torchrun it trains the cases that have as many stages as there are processes:

torchrun ... tests/multiprocess_cases.py RESULTS
"""

import os
import sys
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from aihwkit.optim.context import AnalogContext
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import grad_norm
from lightning_modules import Attributes, ConvNet, DictBatch, Samples, loader
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, TensorDataset

from aimc_pl.callbacks import ClockMonitor, DeviceMonitor, DeviceNoise, DeviceVariation, StalenessMonitor, StuckAt
from aimc_pl.devices import ideal, mixed_precision, soft_bounds
from aimc_pl.strategies import Accumulation, AnalogPipelineStrategy, StageLearningRate, SyncStart

SCHEDULES = {
    "none": {"schedule": "none"},
    "sync": {"schedule": "sync"},
    "1f1b": {"schedule": "1f1b"},
    "zero_bubble": {"schedule": "zero_bubble"},
    "async": {"schedule": "async"},
    "async, full duplex": {"schedule": "async", "duplex": "full"},
    "async, stashing": {"schedule": "async", "weight_stashing": True},
    "async, remedies": {
        "schedule": "async",
        "remedies": [Accumulation(2), StageLearningRate(0.5, anneal_steps=4), SyncStart(2)],
    },
}
STAGES = {2: ("sync", "async"), 3: (*SCHEDULES,), 4: ("1f1b", "zero_bubble", "async", "async, full duplex")}
"""The schedules by the number of stages."""


class ComputesWithGradients(Attributes):
    """A module that clips gradients, logs their norms, skips steps by the norm over all stages, and decays weights."""

    def on_after_backward(self):
        clip_grad_norm_(self.parameters(), 0.3)

    def on_before_optimizer_step(self, optimizer):
        if not self.trainer.strategy.schedule.is_async:  # under async a hook sees the gradients of one stage
            self.log_dict(grad_norm(self, 2))
        if torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).norm() < 0.25:
            for parameter in self.parameters():
                parameter.grad = None

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.99)


class LogsInEveryStage(Attributes):
    def forward(self, x):
        hidden = torch.tanh(self.l1(x))
        self.log("first", hidden.abs().mean(), on_step=False, on_epoch=True)
        hidden = hidden + F.gelu(self.l2(hidden))
        hidden = torch.tanh(self.l3(hidden))
        self.log("third", hidden.detach().std(), on_step=False, on_epoch=True, reduce_fx="max")
        return self.l4(self.norm(hidden))


class SomeLayers(ConvNet):
    """A module whose optimizer has the first layer and the head. The other layers must keep no pairs for an update."""

    def configure_optimizers(self):
        return torch.optim.SGD([*self.features[0].parameters(), *self.head.parameters()], lr=0.05)

    def on_train_batch_end(self, *args):
        assert not any(p.has_gradient() for p in self.features[1:].parameters() if isinstance(p, AnalogContext))


SPLITS = {
    Attributes: {2: ["l3"], 3: ["l2", "norm"], 4: ["l2", "l3", "l4"]},
    ComputesWithGradients: {3: ["l2", "norm"]},
    LogsInEveryStage: {4: ["l2", "l3", "l4"]},
    ConvNet: {2: ["features.4"], 3: ["features.2", "features.4"], 4: ["features.2", "features.4", "head"]},
    SomeLayers: {3: ["features.2", "features.4"]},
    DictBatch: {3: ["backbone.1", "backbone.3"]},
}


def digital(num_stages, schedule, make_module=Attributes, optimizer="momentum", **trainer):
    """Return a case with connections that skip stages, batches of 8, 8 and 3 in 3 micro-batches, and validation."""

    def train(folder, **processes):
        L.seed_everything(7)
        module = make_module().double()
        module.optimizer = optimizer
        data = loader(module, shuffle=True)
        validation = loader(module) if hasattr(module, "validation_step") else None
        return fit(folder, processes, module, data, validation, num_stages, SCHEDULES[schedule], **trainer)

    return train


def analog(num_stages, schedule, device, optimizer="momentum", make_module=ConvNet, **trainer):
    def train(folder, **processes):
        L.seed_everything(7)
        module = make_module()
        module.optimizer = optimizer
        samples = Samples()
        data = DataLoader(TensorDataset(samples.x.float(), samples.y), 8, shuffle=True)
        return fit(
            folder, processes, module, data, None, num_stages, SCHEDULES[schedule] | {"device": device()}, **trainer
        )

    return train


def resumed(num_stages, schedule):
    """Return a case that trains the second of two epochs, after a first one in plain Lightning."""

    def train(folder, **processes):
        module = Attributes().double()
        data = loader(module, shuffle=False)
        after = {"ckpt_path": folder.parent / "plain.ckpt"}
        return fit(folder, processes, module, data, None, num_stages, SCHEDULES[schedule], fit=after)

    return train


def train_plainly(folder, max_epochs):
    """Train like :func:`resumed`, from the start and without a pipeline, and leave plain.ckpt in the folder."""
    L.seed_everything(7)
    module = Attributes().double()
    saver = ModelCheckpoint(folder, filename="plain")
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=max_epochs, callbacks=[saver], logger=False, enable_progress_bar=False
    )
    trainer.fit(module, loader(module, shuffle=False))
    return module


class Held(Callback):
    """A callback that counts the numbers that this process's digital weights keep in memory during the fit."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        digital = [p for p in pl_module.parameters() if not isinstance(p, AnalogContext)]
        self.numbers = sum(p.untyped_storage().nbytes() // p.element_size() for p in digital)


def fit(
    folder, processes, module, data, validation, num_stages, settings, callbacks=(), fit=None, evaluate=False, **trainer
):
    """Train and return the values to compare."""
    clock, staleness, held = ClockMonitor(), StalenessMonitor(), Held()
    trainer = L.Trainer(
        accelerator="cpu",
        **processes,
        strategy=AnalogPipelineStrategy(
            num_stages, num_microbatches=3, split_at=SPLITS[type(module)][num_stages], **settings
        ),
        callbacks=[
            clock,
            staleness,
            DeviceMonitor(),
            held,
            ModelCheckpoint(folder, filename="last"),
            *(make() for make in callbacks),
        ],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        log_every_n_steps=1,
        **{"max_epochs": 2} | trainer,
    )
    trainer.fit(module, data, validation, **(fit or {}))
    evaluated = {}
    if evaluate:
        (tested,) = trainer.test(module, validation, verbose=False)
        evaluated = {"predictions": trainer.predict(module, loader(module, shuffle=False)), "tested": tested}
    return evaluated | {
        "weights": module.state_dict(),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "step": trainer.global_step,
        "cycles": (clock.cycles, clock.operations),
        "staleness": {stage: dict(counts) for stage, counts in staleness.counts.items()},
        "mismatches": staleness.mismatches,
        "held": getattr(held, "numbers", 0),
    }


def stop_early():
    return EarlyStopping("val_loss", patience=1, min_delta=10)


def imperfect_devices():
    """Return noise that is fixed per device. Other kinds of noise are drawn by every process for itself."""
    return DeviceNoise([DeviceVariation(0.3), StuckAt(0.2, value=0.05)])


def save_the_best():
    return ModelCheckpoint("best", monitor="loss_step", every_n_train_steps=2, save_top_k=1)


CASES = {
    f"{schedule}, {num_stages} stages": (num_stages, digital(num_stages, schedule))
    for num_stages, schedules in STAGES.items()
    for schedule in schedules
}
CASES |= {
    "adamw": (3, digital(3, "sync", optimizer="adamw")),
    "AsyncNAdam": (3, digital(3, "async", optimizer="AsyncNAdam")),
    "SpikeCompensatedSGD": (3, digital(3, "async", optimizer="SpikeCompensatedSGD")),
    "clipped by norm": (3, digital(3, "sync", gradient_clip_val=0.05)),
    "clipped by norm, async": (3, digital(3, "async", gradient_clip_val=0.01)),
    "clipped by value": (2, digital(2, "sync", gradient_clip_val=0.01, gradient_clip_algorithm="value")),
    "computes with gradients": (3, digital(3, "sync", ComputesWithGradients)),
    "computes with gradients, async": (3, digital(3, "async", ComputesWithGradients)),
    "accumulated": (3, digital(3, "sync", accumulate_grad_batches=2)),
    "validation within the epoch": (4, digital(4, "async", val_check_interval=1)),
    "stopped early": (3, digital(3, "async", max_epochs=6, callbacks=[stop_early])),
    "resumed, sync": (3, resumed(3, "sync")),
    "evaluated": (3, digital(3, "async", evaluate=True)),
    "evaluated only": (2, digital(2, "async", evaluate=True, max_epochs=0)),
    "with a noise callback": (3, digital(3, "sync", callbacks=[imperfect_devices])),
    "best step saved": (3, digital(3, "async", callbacks=[save_the_best])),
    "logs in every stage": (4, digital(4, "async", LogsInEveryStage)),
    "few steps": (4, digital(4, "async", max_steps=4)),
    "dict batch, layers around": (3, digital(3, "async", DictBatch)),
    "convolutions": (4, digital(4, "sync", ConvNet)),
    "mean field": (3, analog(3, "async", soft_bounds)),
    "mean field, remedies": (2, analog(2, "async, remedies", soft_bounds)),
    "mean field, sync": (2, analog(2, "sync", soft_bounds)),
    "mean field, mixed precision": (3, analog(3, "async", mixed_precision, "adamw", gradient_clip_val=0.1)),
    "mean field, mixed precision, AsyncNAdam": (3, analog(3, "async", mixed_precision, "AsyncNAdam")),
    "mean field, zero_bubble": (2, analog(2, "zero_bubble", soft_bounds)),
    "mean field, mixed precision, sync": (2, analog(2, "sync", mixed_precision, gradient_clip_val=0.1)),
    "mean field, some layers": (3, analog(3, "async", soft_bounds, make_module=SomeLayers)),
    "mean field, some layers, sync": (3, analog(3, "sync", soft_bounds, make_module=SomeLayers)),
    "floating point": (4, analog(4, "async", ideal)),
}


def assert_same(theirs, ours, exactly, is_analog):
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        if name.endswith("analog_ctx"):
            continue
        tolerance = 0.0 if exactly else 1e-6 if is_analog else 1e-12
        pairs = [(theirs[name], value)]
        if name.endswith("analog_tile_state"):
            entries = ("analog_tile_weights", "analog_tile_hidden_parameters")
            pairs = [(theirs[name][entry], value[entry]) for entry in entries]
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)


def train_all(folder, world, num_nodes=1):
    """Train all cases with ``world`` stages, in this one of ``world`` processes."""
    os.chdir(folder)  # a callback writes to the current folder
    results = {
        name: train(folder / name, devices=world // num_nodes, num_nodes=num_nodes)
        for name, (num_stages, train) in CASES.items()
        if num_stages == world
    }
    if os.environ.get("RANK", os.environ["LOCAL_RANK"]) == "0":
        torch.save(results, folder / f"results of {world}.pt")


if __name__ == "__main__":
    world, here = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    train_all(Path(sys.argv[1]), world, num_nodes=world // here)
