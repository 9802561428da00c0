"""One stage per process gives the numbers of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from multiprocess_cases import CASES, STAGES, assert_same

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def of_processes(tmp_path_factory):
    """Results by case, of one launch per number of processes."""
    folder = tmp_path_factory.mktemp("multiprocess")
    results = {}
    for num_stages in STAGES:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_stages}"]
        command = [*launch, str(TESTS / "multiprocess_cases.py"), str(folder)]
        run = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=folder, capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, run.stderr
        results |= torch.load(folder / "results.pt", weights_only=False)
    return results


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CASES)
def test_processes_train_as_one_does(name, of_processes, tmp_path):
    theirs = of_processes[name]
    ours = CASES[name][1](tmp_path, devices=1)
    assert {key: theirs[key] for key in ("step", "cycles")} == {key: ours[key] for key in ("step", "cycles")}
    assert theirs["staleness"] == ours["staleness"]
    assert theirs["mismatches"] == 0
    assert_same(theirs["weights"], ours["weights"], exactly="mean field" in name, is_analog="floating" in name)
    assert theirs["metrics"].keys() == ours["metrics"].keys()
    for metric, value in ours["metrics"].items():
        assert theirs["metrics"][metric] == pytest.approx(value, rel=1e-5 if "floating" in name else 1e-9), metric
