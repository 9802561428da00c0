"""These tests check that a resumed run equals an uninterrupted one that drains where checkpoints are made."""

import os
from functools import partial

import pytest
import torch
from forked import fork
from ports import free_port
from resuming_cases import CASES, CROSSING, INTERRUPTED, INTERRUPTIONS, LAST_STEP, NOISY, PLACES, train_all

pytestmark = pytest.mark.slow


def launch(folder, world, *parts):
    """Train parts in ``world`` processes, which are copies of this one."""
    ports = [free_port() for _ in range(100)]
    processes = []
    for rank in range(world):
        environment = {"LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"} if world > 1 else {}
        output = folder / f"{world} {parts} {rank}.txt"
        processes.append(fork(partial(train_all, folder, world, parts, ports), output, **environment))
    assert [os.waitpid(process, 0)[1] for process in processes] == [0] * world


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Launch all runs and return the folder with their results."""
    folder = tmp_path_factory.mktemp("resuming")
    launch(folder, 2, "own")
    launch(folder, 1, "own", "from the other")
    launch(folder, 2, "from the other")
    return folder


def results(path):
    if not (path / "result.pt").exists():
        pytest.fail("\n".join(log.read_text()[-2000:] for log in path.parents[3].glob("*.txt")))
    return torch.load(path / "result.pt", weights_only=False)


def assert_same(found, expected, tolerance=0.0):
    assert found["step"] == expected["step"] == LAST_STEP
    assert (found["clock"], found["staleness"]) == (expected["clock"], expected["staleness"])
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=tolerance, atol=tolerance, msg=name)
    assert torch.equal(found["random"], expected["random"])
    # Lightning takes the mean of an interrupted epoch over the batches after the checkpoint only.
    for name in expected["logged"].keys() - {"loss_epoch"}:
        assert found["logged"][name] == pytest.approx(expected["logged"][name], rel=tolerance), name


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("processes", "schedule", "network"),
    [("one", *case) for case in CASES] + [("two", *case) for case in CASES if case[1] == NOISY],
)
def test_goes_on_bit_for_bit(processes, schedule, network, place, folder):
    case = folder / processes / schedule / network
    assert_same(results(case / place), results(case / "whole"))


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
@pytest.mark.parametrize(
    ("processes", "schedule", "network"),
    [(name, *case) for world, name in ((1, "one"), (2, "two")) for case in INTERRUPTED[world]],
)
def test_goes_on_after_an_interruption(processes, schedule, network, interruption, folder):
    case = folder / processes / schedule / network
    assert not (case / f"{interruption}, ended" / "result.pt").exists()
    assert_same(results(case / interruption), results(case / "whole"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("schedule", "network"), CROSSING)
@pytest.mark.parametrize(("here", "there"), [("one", "two"), ("two", "one")])
def test_goes_on_with_another_number_of_processes(here, there, schedule, network, place, folder):
    case = folder / here / schedule / network
    found, expected = results(case / f"{place}, from {there}"), results(case / "whole")
    assert_same(found, expected, tolerance=1e-12 if network == "adamw" else 0.0)
