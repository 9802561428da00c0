"""These tests check that training in one process per stage gives the numbers of training in one process."""

from functools import partial

import pytest
import torch
from forked import fork_ranks
from multiprocess_cases import CASES, STAGES, assert_same, train_all, train_plainly

pytestmark = [
    pytest.mark.slow,
    # One case leaves analog layers out of its optimizer on purpose, and the run warns of that.
    pytest.mark.filterwarnings("ignore:analog layers that are not in the optimizer"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder to which the processes write."""
    return tmp_path_factory.mktemp("multiprocess")


@pytest.fixture(scope="module")
def of_processes(folder):
    """Train all cases in processes and return the results by case."""
    train_plainly(folder, max_epochs=1)
    results = {}
    for num_stages in STAGES:
        fork_ranks(num_stages, partial(train_all, folder, num_stages), folder)
        results |= torch.load(folder / f"results of {num_stages}.pt", weights_only=False)
    return results


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CASES)
def test_processes_train_as_one_does(name, of_processes, tmp_path):
    theirs = of_processes[name]
    if name.startswith("resumed"):
        train_plainly(tmp_path, max_epochs=1)
    ours = CASES[name][1](tmp_path / "one", devices=1)
    assert {key: theirs[key] for key in ("step", "cycles")} == {key: ours[key] for key in ("step", "cycles")}
    assert theirs["staleness"] == ours["staleness"]
    assert theirs["mismatches"] == 0
    assert theirs["held"] < ours["held"] or ours["held"] == 0
    assert_same(theirs["weights"], ours["weights"], exactly="mean field" in name, is_analog="floating" in name)
    if "evaluated" in name:
        assert theirs["tested"] == pytest.approx(ours["tested"])
        for a, b in zip(theirs["predictions"], ours["predictions"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert theirs["metrics"].keys() == ours["metrics"].keys()
    for metric, value in ours["metrics"].items():
        assert theirs["metrics"][metric] == pytest.approx(value, rel=1e-5 if "floating" in name else 1e-9), metric


def test_they_go_on_from_plain_lightning(of_processes, tmp_path):
    module = train_plainly(tmp_path, max_epochs=2)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(of_processes["resumed, sync"]["weights"][name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:this checkpoint has analog layers")  # the test reads it with torch.load
@pytest.mark.usefixtures("of_processes", "one_thread")
@pytest.mark.parametrize(
    "name", ["sync, 3 stages", "async, 4 stages", "adamw", "mean field", "mean field, mixed precision"]
)
def test_their_checkpoints_are_those_of_one_process(name, folder, tmp_path):
    CASES[name][1](tmp_path, devices=1)
    theirs, ours = (torch.load(path / "last.ckpt", weights_only=False) for path in (folder / name, tmp_path))
    assert theirs.keys() == ours.keys()
    assert_same(theirs["state_dict"], ours["state_dict"], exactly="mean field" in name, is_analog=False)
    for a, b in zip(theirs["optimizer_states"], ours["optimizer_states"], strict=True):
        assert a["param_groups"] == b["param_groups"]
        assert a["state"].keys() == b["state"].keys()
        for index, state in b["state"].items():
            for entry, value in state.items():
                torch.testing.assert_close(a["state"][index][entry], value, rtol=1e-12, atol=1e-12)
