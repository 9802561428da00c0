"""The studies of the paper run in their quick modes, and a stopped sweep goes on where it was."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sweeps
from sweep_case import square

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize(
    ("script", "options", "printed"),
    [
        ("paper_accuracy.py", ["--seeds", "2"], "analog   async, M = 16"),
        ("paper_rate.py", ["--seeds", "2"], "linear tau inf  noise 0.1  M = 8  exponent"),
        ("paper_stages.py", ["--seeds", "2"], "loss     0.5  tau inf"),
        ("paper_stages.py", ["--seeds", "2", "--devices"], "step           0.5      accuracy 0.8"),
    ],
)
def test_quick_mode(script, options, printed, tmp_path):
    command = [sys.executable, str(SCRIPTS / script), "--quick", "--csv", "out.csv", "--png", "out.png", *options]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert printed in run.stdout
    assert (tmp_path / "out.png").stat().st_size > 10_000
    again = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert again.stdout.splitlines()[-5:] == run.stdout.splitlines()[-5:]


CASES = [{"x": x, "seed": seed} for x in (1, 2, 3) for seed in (0, 1)]


def test_a_stopped_sweep_keeps_what_ended_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "out.csv"
    with pytest.raises(RuntimeError, match="no power"):
        sweeps.sweep(square, CASES, path, jobs=1)
    kept = sweeps.read(path)
    assert len(kept) == 8
    rows = sweeps.sweep(square, CASES, path, jobs=1)
    assert len(rows) == 12
    assert rows[:8] == kept
    assert sweeps.sweep(square, CASES, path) == rows
    np.testing.assert_array_equal(sweeps.curves(sweeps.select(rows, x=3), "y"), [[9, 10], [10, 11]])
    # another study in the same file does not mix in
    assert len(sweeps.sweep(square, CASES[:2], path)) == 4
