"""These tests check how a process watches and ends the processes that it has started."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import lightning as L
import pytest

from aimc_pl.errors import PeerError, UsageError
from aimc_pl.rendezvous import SECRET
from aimc_pl.strategies import AnalogPipelineStrategy, launcher
from aimc_pl.strategies.launcher import Launcher


@pytest.fixture
def children(monkeypatch):
    """Return the list of child processes, and end them after the test."""
    children = []
    monkeypatch.setattr(Launcher, "children", children)
    yield children
    for child in children:
        child.kill()
        child.wait()


def start(command):
    return subprocess.Popen(["sh", "-c", f"exec {command}"])


def test_a_child_that_has_ended_is_noticed(children, monkeypatch):
    monkeypatch.delenv("AIMC_PL_PARENT", raising=False)
    children[:] = start("sleep 9"), start("sleep 9")
    Launcher.check()
    children[1].kill()
    children[1].wait()
    with pytest.raises(PeerError, match=r"^rank 2 has ended with exit code -9 before .* see its own output$"):
        Launcher.check()


def test_a_parent_that_has_ended_is_noticed(monkeypatch):
    for parent in (os.getpid(), os.getppid()):
        monkeypatch.setenv("AIMC_PL_PARENT", str(parent))
        Launcher.check()
    monkeypatch.setenv("AIMC_PL_PARENT", "1234567890")
    with pytest.raises(PeerError, match=r"^rank 0, which has started this process, has ended$"):
        Launcher.check()


def test_children_may_end_by_themselves_before_they_are_killed(children, monkeypatch):
    monkeypatch.setattr(launcher, "_PATIENCE", 0.1)
    children[:] = start("sleep 0.03"), start("sleep 9"), start("sleep 9")
    begin = time.monotonic()
    Launcher.end_children()
    assert [child.returncode for child in children] == [0, -9, -9]
    # All children together have this time.
    assert time.monotonic() - begin < 0.9


@pytest.mark.parametrize("num_nodes", [1, 2])
@pytest.mark.parametrize("externally", [False, True])
def test_children_are_started_unless_the_cluster_does_it(externally, num_nodes, children, monkeypatch):
    for name in ("AIMC_PL_PARENT", SECRET):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    checked, seen = [], []
    environment = SimpleNamespace(
        validate_settings=lambda **settings: checked.append(settings), creates_processes_externally=externally
    )
    child = start("sleep 9")

    def start_children(self):
        seen.append((os.environ["AIMC_PL_PARENT"], len(os.environ.get(SECRET, ""))))
        self.procs = [child]

    monkeypatch.setattr(Launcher, "start_children", start_children)
    monkeypatch.setattr(launcher, "share_threads", seen.append)
    started = Launcher(environment, 3, num_nodes)
    try:
        result = started.launch(lambda *args, **kwargs: (args, kwargs), 1, trainer="not passed on", of=2)
        assert Launcher.children == ([] if externally else [child])
    finally:
        child.kill()
        child.wait()
    assert result == ((1,), {"of": 2})
    assert checked == [{"num_devices": 3, "num_nodes": num_nodes}]
    # Processes of one machine share a secret, which no other machine could know.
    before = [] if externally else [(str(os.getpid()), 64 if num_nodes == 1 else 0)]
    assert seen == [*before, 3]


@pytest.mark.parametrize(
    ("name", "value"),
    [("ps1", "In : "), ("argv", ["-"]), ("argv", [""])],  # IPython; python - < script.py; python < script.py
)
def test_what_cannot_be_run_again_gets_advice_that_works_there(name, value, monkeypatch):
    monkeypatch.setattr(sys, name, value, raising=False)
    advice = r"^a notebook, .* cannot start 4 processes: set Trainer\(devices=1\) here, or save the code as a script"
    with pytest.raises(UsageError, match=advice):
        L.Trainer(accelerator="cpu", devices=4, strategy=AnalogPipelineStrategy(4), logger=False)
    L.Trainer(accelerator="cpu", devices=1, strategy=AnalogPipelineStrategy(4), logger=False)
