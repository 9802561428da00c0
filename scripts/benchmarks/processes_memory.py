"""This benchmark records the memory of two processes in a long asynchronous training, minute by minute.

A ResNet-8 on mean-field tiles trains on random images, with validation and a checkpoint every 200 mini-batches. Usage:

    .venv/bin/python scripts/benchmarks/processes_memory.py --folder docs/results
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import lightning as L
import psutil
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from machine import conditions, write_measured
from torch.utils.data import DataLoader, TensorDataset

from aimc_pl.callbacks import ClockMonitor, StalenessMonitor
from aimc_pl.models import ResNet
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.studies.arguments import study_parser
from aimc_pl.studies.rows import Row
from aimc_pl.tasks import Classifier


def train(minutes: float) -> None:
    """Train for this many minutes. Both processes run this function."""
    L.seed_everything(0)
    images = DataLoader(
        TensorDataset(torch.randn(3200, 3, 32, 32), torch.randint(10, (3200,))), batch_size=16, shuffle=True
    )
    strategy = AnalogPipelineStrategy(2, "async", 4, device="soft_bounds_reference", split_at=["network.group2"])
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        callbacks=[ClockMonitor(), StalenessMonitor(), ModelCheckpoint(save_last=True)],
        max_time=timedelta(minutes=minutes),
        max_epochs=-1,
        limit_val_batches=10,
        enable_progress_bar=False,
        logger=False,
    )
    trainer.fit(Classifier(ResNet(8)), images, images)
    print(f"rank {trainer.global_rank}: {trainer.global_step} mini-batches", flush=True)


def run(minutes: float, every: float) -> Iterator[Row]:
    """Train in two processes and yield their memory every ``every`` seconds."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(Path(__file__).resolve()), "--minutes", str(minutes)]
    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}) as training,
    ):
        while training.poll() is None:
            time.sleep(every)
            # The training may end at any moment.
            with suppress(psutil.NoSuchProcess):
                sizes = [resident_mib(process) for process in psutil.Process(training.pid).children()]
                if len(sizes) == 2:
                    minute = round((time.monotonic() - start) / 60, 1)
                    yield {"minutes": minute, "rank_0_mib": sizes[0], "rank_1_mib": sizes[1]}
    if training.returncode:
        raise subprocess.CalledProcessError(training.returncode, command)


def resident_mib(process: psutil.Process) -> float:
    """Return the resident memory that the process does not share with other processes."""
    memory = process.memory_info()
    return round((memory.rss - memory.shared) / 2**20, 1)


def report(row: Row) -> None:
    """Print the row of one minute."""
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def main() -> None:
    """Measure the memory once a minute, and print and write every row."""
    parser = study_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    args = parser.parse_args()
    if "RANK" in os.environ:
        train(args.minutes)
        return
    print(conditions(threads=1))
    minutes, every = (0.02, 1) if args.quick else (args.minutes, 60)
    rows: list[Row] = []
    for row in run(minutes, every):
        report(row)
        rows.append(row)
        write_measured(args.folder / "processes_memory.csv", rows)


if __name__ == "__main__":
    main()
