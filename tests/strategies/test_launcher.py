"""These tests check how a process watches and ends the processes that it has started."""

import os
import subprocess
import time

import pytest

from aimc_pl.errors import PeerError
from aimc_pl.strategies import launcher
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
