"""However one of three processes ends, the others end too, and the last checkpoint goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from long_run import train

SCRIPT = Path(__file__).parent.parent / "long_run.py"


def start(folder, timeout):
    """Three processes, once they have trained for some steps."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_network_port()),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(timeout)],
            env=environment | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(3)
    ]
    step = folder / "step"
    while not step.exists() or int(step.read_text() or 0) < 12:
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.05)
    return processes


def outputs(processes, within):
    """What they say until they end."""
    deadline = time.monotonic() + within
    try:
        return [process.communicate(timeout=max(deadline - time.monotonic(), 0.1))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def assert_goes_on(folder):
    """In one process, from the last checkpoint."""
    step = torch.load(folder / "last.ckpt", weights_only=False)["global_step"]
    assert step >= 10
    trainer = train(folder, devices=1, max_epochs=step // 3 + 2, ckpt_path="last")
    assert trainer.global_step == 3 * (step // 3 + 2)


@pytest.mark.parametrize(
    ("rank", "ends", "timeout"),
    [(1, signal.SIGKILL, 60), (0, signal.SIGKILL, 60), (2, signal.SIGSTOP, 5)],
    ids=["a middle stage is killed", "the last stage is killed", "the first stage hangs"],
)
def test_the_others_end_and_name_it(rank, ends, timeout, tmp_path):
    processes = start(tmp_path, timeout)
    processes[rank].send_signal(ends)
    others = [process for process in processes if process is not processes[rank]]
    said = outputs(others, within=30)
    processes[rank].kill()
    processes[rank].wait()
    assert all(process.returncode not in (0, None) for process in others)
    assert any(f"rank {rank} (stage {2 - rank}) has ended or has kept" in text for text in said)
    assert_goes_on(tmp_path)


@pytest.mark.parametrize("ends", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_to_all_ends_all(ends, tmp_path):
    processes = start(tmp_path, 20)
    for process in processes:
        process.send_signal(ends)
    outputs(processes, within=60)
    assert all(process.returncode is not None for process in processes)
    assert_goes_on(tmp_path)
