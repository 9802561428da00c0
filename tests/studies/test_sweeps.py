"""These tests check that a stopped sweep continues where it stopped, in one process or in several."""

import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import sweep_case
import torch
from sweep_case import square

from aimc_pl.errors import UsageError
from aimc_pl.studies import sweeps
from aimc_pl.studies.rows import append_rows, curves, read_rows, select
from aimc_pl.studies.sweeps import sweep

CASES = [{"x": x, "seed": seed} for x in (1, 2, 3) for seed in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_stopped_sweep_keeps_what_ended_and_goes_on(jobs, tmp_path):
    path, run = tmp_path / "out.csv", partial(square, folder=tmp_path)
    with pytest.raises(RuntimeError, match="no power") as caught:
        sweep(run, CASES, path, jobs)
    assert "in the case {'x': 3, 'seed': 0}" in caught.value.__notes__[0]
    assert "in square" in caught.value.__notes__[0]
    kept = read_rows(path)
    # When one of two processes fails, the other one may still be at an earlier case or already at a later one.
    assert len(kept) in ([8] if jobs == 1 else [6, 8, 10])
    rows = sweep(run, CASES, path, jobs)
    assert len(rows) == 12
    assert rows[: len(kept)] == kept
    assert sweep(run, CASES, path, jobs) == rows
    np.testing.assert_array_equal(curves(select(rows, x=3), "y"), [[9, 10], [10, 11]])
    # Rows of cases that this call does not have are left out.
    assert len(sweep(run, CASES[:2], path, jobs)) == 4


@pytest.mark.slow
def test_a_case_that_has_ended_is_kept_whatever_happens_to_the_sweep(tmp_path, monkeypatch):
    """Check that rows are in the file although the sweep stops before it looks at any result."""
    path = tmp_path / "out.csv"

    def stopped(ended, *args, **options):
        for _ in range(600):
            if len(read_rows(path)) == 4:
                raise KeyboardInterrupt
            time.sleep(0.05)  # the workers write meanwhile, for 30 seconds at most

    monkeypatch.setattr(sweeps, "track", stopped)
    with pytest.raises(KeyboardInterrupt):
        sweep(square, CASES[:2], path, jobs=2)
    assert {(row["x"], row["seed"], row["point"]) for row in read_rows(path)} == {
        ("1", seed, point) for seed in "01" for point in "01"
    }


@pytest.mark.slow
def test_no_process_goes_on_when_the_sweep_is_killed(tmp_path):
    """Kill the sweep after its first result: its two processes end without the ten cases that are queued."""
    path, cases = tmp_path / "out.csv", [{"x": x} for x in range(12)]
    program = "from sweep_case import wait; from aimc_pl.studies.sweeps import Path, sweep; "
    program += f"sweep(wait, {cases}, Path({str(path)!r}), 2)"
    sweeper = psutil.Popen([sys.executable, "-c", program], cwd=Path(sweep_case.__file__).parent)
    while not read_rows(path):
        assert sweeper.poll() is None
        time.sleep(0.01)  # until a row is in the file, or the sweep has failed
    workers = sweeper.children(recursive=True)
    sweeper.kill()
    sweeper.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    assert len(read_rows(path)) < 8
    rows = sweep(sweep_case.wait, cases, path, 1)
    assert sorted(int(row["y"]) for row in rows) == [*range(12)]


def test_rows_of_a_case_are_not_appended_twice(tmp_path):
    """Check that a case which another sweep has written meanwhile stays as it is."""
    path = tmp_path / "out.csv"

    def run(x):
        append_rows(path, [{"x": x, "y": "of the other"}])
        return [{"y": "ours"}]

    rows = sweep(run, [{"x": 1}, {"x": 2}], path, 1)
    assert [row["y"] for row in rows] == ["of the other"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_every_case_has_one_thread(jobs, tmp_path):
    threads = torch.get_num_threads()
    rows = sweep(lambda seed: [{"threads": torch.get_num_threads()}], [{"seed": 0}, {"seed": 1}], tmp_path / "a", jobs)
    assert [row["threads"] for row in rows] == ["1", "1"]
    assert torch.get_num_threads() == threads


def test_another_studys_file_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,seed\n1,2\n")
    with pytest.raises(UsageError, match=r"other\.csv belongs to another study: it has no column x"):
        sweep(print, [{"x": 1, "seed": 0}], path)
    assert path.read_text() == "a,seed\n1,2\n"


def test_no_cases_have_no_rows_and_a_case_must_have_some(tmp_path):
    path = tmp_path / "out.csv"
    assert sweep(square, [], path) == []
    with pytest.raises(ValueError, match="returned no rows"):
        sweep(lambda seed: [], [{"seed": 0}], path, jobs=1)
    assert not path.exists()
