"""The memory of two processes that train asynchronously for long, minute by minute.

A ResNet-8 on mean-field tiles learns made-up images, with validation and a checkpoint every 200 mini-batches. Usage:

    .venv/bin/python scripts/processes_memory.py --csv docs/results/processes_memory.csv --minutes 30
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tables import write_csv
from torch.utils.data import DataLoader, TensorDataset

from aimc_pl.callbacks import ClockMonitor, StalenessMonitor
from aimc_pl.models import ResNet
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.tasks import Classifier


def train(minutes: float) -> None:
    """In both processes."""
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


def resident_mib(process: int) -> float:
    """Resident memory, without what is shared with other processes."""
    pages = Path(f"/proc/{process}/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Train, and look at the memory once a minute."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.minutes)
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(Path(__file__).resolve()), "--train", "--minutes", str(args.minutes)]
    rows, start = [], time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}) as run,
    ):
        while run.poll() is None:
            time.sleep(60)
            children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
            workers = children.read_text().split() if children.exists() else []
            if run.poll() is None and len(workers) == 2:
                sizes = {f"rank_{rank}_mib": round(resident_mib(int(w)), 1) for rank, w in enumerate(workers)}
                rows.append({"minutes": round((time.monotonic() - start) / 60, 1)} | sizes)
                print(rows[-1], flush=True)
                write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
