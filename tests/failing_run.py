"""The functions in this module run training in three processes and let one of them fail, in all cases."""

import os
import signal
import socket
import time
from functools import partial
from itertools import product

import lightning as L
import torch
from forked import fork
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_modules import Attributes, loader
from ports import free_port

from aimc_pl.strategies import AnalogPipelineStrategy

POINTS = (
    "before joining",
    "setup",
    "first batch",
    "first step",
    "batch",
    "step",
    "after backward",
    "callback",
    "validation step",
    "epoch end",
    "checkpoint",
    "train end",
)
FEW = ("before joining", "first step", "step", "validation step", "checkpoint", "train end")
RANKS = range(3)
FAILURES = [
    *product(("kill",), FEW, RANKS),
    *(("kill", point, 1) for point in POINTS if point not in FEW),
    *product(("stop",), ("before joining", "step", "checkpoint"), RANKS),
    *product(("raise",), ("before joining", "validation step", "train end"), RANKS),
]
CASES = [
    *FAILURES,
    *product(("terminate",), ("step",), RANKS),
    *product(("other labels",), ("batch", "validation batch"), RANKS),
    *product(("fewer batches",), ("length",), RANKS),
    ("other secret", "before joining", 2),
    ("taken port", "before joining", 0),
]
TIMEOUT, START_TIMEOUT, LIMIT = 12.0, 25.0, 150.0
"""LIMIT bounds the time of a run on a busy machine. Runs should end by themselves, within the other limits."""
AT_ONCE = 12


class Trouble:
    """The failure that happens to one rank at one point of the run."""

    def __init__(self, kind, point, rank, own):
        self.kind = kind
        self.point = point if rank == own else None
        self.trainer = None

    def at(self, point, since=0):
        """Fail if this is the point. ``since`` is the first optimizer step at which it counts."""
        if point != self.point or (self.trainer is not None and self.trainer.global_step < since):
            return False
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.kind == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.kind == "raise":
            raise OSError(f"the disk has gone at {point}")
        return True


class Data(torch.utils.data.Dataset):
    def __init__(self, trouble, inner, point):
        self.trouble = trouble
        self.inner = inner
        self.point = point

    def __len__(self):
        return len(self.inner) - 11 * self.trouble.at("length")

    def __getitem__(self, index):
        x, y = self.inner[index]
        self.trouble.at(f"first {self.point}")
        if self.trouble.at(self.point, since=4):
            y = (y + 1) % 3
        return x, y


class Fragile(Attributes):
    def __init__(self, trouble):
        super().__init__()
        self.trouble = trouble

    def setup(self, stage):
        self.trouble.at("setup")

    def training_step(self, batch, batch_idx):
        self.trouble.at("first step")
        self.trouble.at("step", since=4)
        return super().training_step(batch, batch_idx)

    def on_after_backward(self):
        self.trouble.at("after backward", since=4)

    def validation_step(self, batch, batch_idx):
        self.trouble.at("validation step", since=3)
        return super().validation_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint):
        self.trouble.at("checkpoint")


class Callbacks(Callback):
    def __init__(self, trouble):
        self.trouble = trouble

    def on_train_batch_end(self, *args):
        self.trouble.at("callback", since=4)

    def on_train_epoch_end(self, *args):
        self.trouble.at("epoch end")

    def on_train_end(self, *args):
        self.trouble.at("train end")


def train(folder, trouble, devices=3, max_epochs=2):
    L.seed_everything(7, verbose=False)
    module = Fragile(trouble).double()
    data = loader(module)
    training, validation = (
        torch.utils.data.DataLoader(Data(trouble, data.dataset, point), batch_size=data.batch_size)
        for point in ("batch", "validation batch")
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        max_epochs=max_epochs,
        strategy=AnalogPipelineStrategy(
            3, "async", 3, split_at=["l2", "norm"], timeout=TIMEOUT, start_timeout=START_TIMEOUT
        ),
        callbacks=[Callbacks(trouble), ModelCheckpoint(folder, every_n_epochs=1)],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trouble.at("before joining")
    trouble.trainer = trainer
    trainer.fit(module, training, validation)


class Run:
    """The three processes of one case."""

    def __init__(self, folder, case):
        self.case = case
        self.folder = folder / " ".join(map(str, case))
        self.folder.mkdir()
        self.listener = socket.create_server(("127.0.0.1", 0)) if case[0] == "taken port" else None
        port = self.listener.getsockname()[1] if self.listener else free_port()
        self.processes = {self.start(rank, port): rank for rank in RANKS}
        self.exits = {}
        self.since = time.monotonic()

    def start(self, rank, port):
        kind, point, troubled = self.case
        return fork(
            partial(train, self.folder, Trouble(kind, point, troubled, rank)),
            output=self.folder / str(rank),
            LOCAL_RANK=rank,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            AIMC_PL_SECRET="other" if kind == "other secret" and rank == troubled else "ours",
        )

    @property
    def has_ended(self):
        """Whether all processes have ended that can end. A stopped process never ends."""
        return len(self.exits) + (self.case[0] == "stop") >= len(RANKS)


def run_all(folder):
    """Run all cases, a few at a time. Return the exit codes and the outputs of the ranks, by case."""
    waiting, running, results = [*CASES], [], {}
    while waiting or running:
        if waiting and len(running) < AT_ONCE:
            running.append(Run(folder, waiting.pop(0)))
        time.sleep(0.1)
        for run in [*running]:
            if reap(run):
                running.remove(run)
                results[run.case] = run.exits, {rank: (run.folder / str(rank)).read_text() for rank in RANKS}
    return results


def reap(run):
    """Record the processes that have ended. Kill the rest when all have ended that can, or when the time is over."""
    left = {process: rank for process, rank in run.processes.items() if rank not in run.exits}
    for process, rank in left.items():
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            run.exits[rank] = os.waitstatus_to_exitcode(status)
    if not run.has_ended and time.monotonic() - run.since < LIMIT:
        return False
    for process, rank in left.items():
        if rank not in run.exits:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    if run.listener:
        run.listener.close()
    return True
