"""The functions in this module interrupt and resume runs, each in a forked process or in one process per stage."""

import os
import signal
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from forked import fork
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_modules import Attributes, Samples
from torch.utils.data import DataLoader

from aimc_pl.callbacks import ClockMonitor, DeviceNoise, Drift, StalenessMonitor, WriteNoise
from aimc_pl.devices import mixed_precision, soft_bounds
from aimc_pl.strategies import Accumulation, AnalogPipelineStrategy, StageLearningRate, SyncStart

SCHEDULES = {
    "none": {"schedule": "none"},
    "sync": {"schedule": "sync"},
    "1f1b": {"schedule": "1f1b"},
    "async": {"schedule": "async"},
    "async, full duplex": {"schedule": "async", "duplex": "full"},
}
NETWORKS = ("AsyncNAdam", "adamw", "mean field")
NOISY = "dropout and noise"
"""The network whose stages draw random numbers, which differ with another number of processes."""

LAST_STEP = 10
PLACES = {"in the epoch": 2, "at the epoch's end": 5}
"""The global steps of the checkpoints that are resumed. An epoch has five steps."""

# The state of optimizers and devices does not depend on the schedule.
CASES = [
    (schedule, network)
    for schedule in SCHEDULES
    for network in (*NETWORKS, NOISY)
    if schedule in ("sync", "async") or network == NOISY
]
SCHEDULES["async, remedies"] = {
    "schedule": "async",
    "remedies": [Accumulation(2), StageLearningRate(0.5, anneal_steps=8), SyncStart(4)],
}
CASES.append(("async, remedies", "adamw"))
CASES += [("sync", "mixed precision"), ("async", "mixed precision")]
CROSSING = [case for case in CASES if case[1] == "mean field" or (case[0] == "async" and case[1] != NOISY)]
"""The cases that are also resumed with another number of processes."""

TRAINED = {1: CASES, 2: [case for case in CASES if case in CROSSING or case[1] == NOISY]}
"""The cases that are trained, by the number of processes."""

INTERRUPTIONS = {"SIGTERM": 3, "Ctrl-C": 6, "kill -9": 8}
"""The global steps of the last checkpoints. Only the one at SIGTERM is made because of the signal."""

INTERRUPTED = {
    1: [("sync", NOISY), ("async", NOISY)],
    2: [("async", NOISY)],
}
"""The cases that are interrupted, by the number of processes."""


class Augmented(Samples):
    """Samples with noise from all global random states."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.rand(()) + 0.1 * np.random.rand(), y


class Noisy(Attributes):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(()))

    def on_train_epoch_start(self):
        self.shift.fill_(torch.rand(()))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(F.dropout(x, 0.3) + self.shift), y)


class Interrupt(Callback):
    """A callback that sends a signal to its own process.

    It also drains the pipeline at the step where SIGTERM ends the run, so that an uninterrupted run drains there too.
    """

    def __init__(self, kind):
        self.kind = kind

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.kind == "SIGTERM" and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.kind == "Ctrl-C" and trainer.global_step == 6:
            pl_module.l3.register_forward_hook(lambda *args: os.kill(os.getpid(), signal.SIGINT))
        if self.kind == "kill -9" and trainer.global_step == 8 and trainer.is_global_zero:
            pl_module.l3.register_forward_hook(lambda *args: os.kill(os.getpid(), signal.SIGKILL))

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == INTERRUPTIONS["SIGTERM"]:
            trainer.strategy.drain()


def train(folder, schedule, network, interruption=None, ckpt_path=None, **processes):
    """Train two epochs and save the result. A checkpoint is made at every second step and after every epoch."""
    # A resumed run starts from another random state, which the checkpoint must replace.
    L.seed_everything(7 if ckpt_path is None else 8)
    module = (Noisy if network == NOISY else Attributes)().double()
    module.optimizer = {"mixed precision": "adamw", "mean field": "momentum", NOISY: "momentum"}.get(network, network)
    dataset, settings, noise = Augmented(length=35), SCHEDULES[schedule], []
    # torch's NAdam keeps the product of its momenta in float32, and loads it with the precision of the weights.
    if network in ("mean field", "mixed precision", "AsyncNAdam"):
        module, dataset.x = module.float(), dataset.x.float()
    if network in ("mean field", "mixed precision"):
        device = soft_bounds(device_to_device=0.1, write_noise=0.5)
        settings = settings | {"device": mixed_precision(device) if network == "mixed precision" else device}
    if network == "mean field":
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    if network == NOISY:
        noise = [DeviceNoise([WriteNoise(0.01), Drift(0.001)])]
    savers = {"every_n_train_steps": 2, "save_on_exception": True}, {"every_n_epochs": 1}
    clock, staleness = ClockMonitor(), StalenessMonitor()
    trainer = L.Trainer(
        accelerator=os.environ.get("TEST_ACCELERATOR", "cpu"),
        max_epochs=2,
        log_every_n_steps=3,
        **processes,
        strategy=AnalogPipelineStrategy(2, num_microbatches=3, split_at=["l3"], **settings),
        callbacks=[Interrupt(interruption), clock, staleness, *noise]
        + [ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **saver) for saver in savers],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(dataset, 8, shuffle=True), ckpt_path=ckpt_path)
    weights = {}
    for name, value in module.state_dict().items():
        if name.endswith("analog_tile_state"):
            value = value["analog_tile_weights"]
        if not name.endswith("analog_ctx"):
            weights[name] = value
    if trainer.is_global_zero:
        result = {
            "weights": weights,
            "step": trainer.global_step,
            "clock": clock.state_dict(),
            "staleness": {stage: dict(counts) for stage, counts in staleness.counts.items()},
            "logged": {name: float(value) for name, value in trainer.logged_metrics.items()},
            "random": torch.get_rng_state(),
        }
        torch.save(result, folder / "result.pt")


def checkpoint(folder, step):
    return folder / f"step={step}.ckpt"


def runs(folder, world):
    """Yield names of parts and arguments of :func:`train`, in an order in which checkpoints come first."""
    here, there = ("one", "two")[:: 1 if world == 1 else -1]
    for schedule, network in TRAINED[world]:
        case = Path(schedule) / network
        run = {"schedule": schedule, "network": network}
        yield "own", run | {"folder": folder / here / case / "whole"}
        for place, step in PLACES.items():
            if (schedule, network) in CROSSING:
                resumed = run | {"ckpt_path": checkpoint(folder / there / case / "whole", step)}
                yield "from the other", resumed | {"folder": folder / here / case / f"{place}, from {there}"}
            if world == 1 or network == NOISY:
                resumed = run | {"ckpt_path": checkpoint(folder / here / case / "whole", step)}
                yield "own", resumed | {"folder": folder / here / case / place}
        if (schedule, network) in INTERRUPTED[world]:
            for interruption, step in INTERRUPTIONS.items():
                ended = folder / here / case / f"{interruption}, ended"
                yield "own", run | {"folder": ended, "interruption": interruption}
                resumed = run | {"ckpt_path": checkpoint(ended, step)}
                yield "own", resumed | {"folder": folder / here / case / interruption}


def train_all(folder, world, parts, ports):
    """Train the parts, in this one of ``world`` processes, each run in a copy of this process.

    Args:
        folder: where results are written.
        world: the number of processes, which train other cases if there are two.
        parts: names of parts, as :func:`runs` yields them.
        ports: a free port for each run, the same in all processes.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest ignore it
    chosen = (run for part, run in runs(folder, world) if part in parts)
    for run, port in zip(chosen, ports, strict=False):
        os.waitpid(fork(partial(train, devices=world, **run), MASTER_PORT=port), 0)
