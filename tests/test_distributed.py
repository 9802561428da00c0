"""These tests send messages between two processes, through shared memory and through the network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aimc_pl.processes import rank_of


@pytest.mark.slow
def test_messages_arrive_as_they_were_sent(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*torchrun, str(Path(__file__).parent / "link_exchange.py")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("num_stages", [1, 2, 5])
def test_rank_0_holds_the_last_stage(num_stages):
    assert [rank_of(stage, num_stages) for stage in range(num_stages)] == [*reversed(range(num_stages))]
