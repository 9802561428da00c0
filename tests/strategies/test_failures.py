"""These tests let one of three processes fail. The other processes must end and name it, and a run can be resumed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from failing_run import CASES, FAILURES, RANKS, START_TIMEOUT, run_all
from forked import fork
from long_run import train
from ports import free_port

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
LIMIT = 150


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run all cases and return exit codes and outputs by case."""
    return run_all(tmp_path_factory.mktemp("failing"))


def name(rank):
    return f"rank {rank} (stage {2 - rank})"


@pytest.mark.parametrize(("kind", "point", "rank"), FAILURES)
def test_the_others_end_and_name_it(kind, point, rank, runs):
    exits, outputs = runs[kind, point, rank]
    survivors = [other for other in RANKS if other != rank]
    # The user looks at rank 0.
    telling = survivors if rank == 0 else [0]
    assert all(exits.get(other) == 1 for other in survivors), outputs
    if point == "before joining" and rank == 0:
        said = "has found no rank 0 at 127.0.0.1"
    elif point == "before joining":
        said = f"rank {rank} of 3 has not started within {START_TIMEOUT:g} s"
    elif kind == "raise":
        # The store ends with rank 0. After that the other ranks know that rank 0 has ended, but not why.
        said = f"{name(rank)} has "
    else:
        said = f"{name(rank)} {'has ended' if kind == 'kill' else 'does not answer'}"
    for other in telling:
        assert said in outputs[other].splitlines()[-1], outputs[other]
    if kind == "raise":
        assert exits[rank] == 1
        assert f"OSError: the disk has gone at {point}" in outputs[rank]
        if rank and point != "before joining":
            assert f"{name(rank)} has failed with OSError: the disk has gone at {point}" in outputs[0]


@pytest.mark.parametrize(("kind", "point", "rank"), [case for case in CASES if case[0] == "terminate"])
def test_a_process_that_gets_sigterm_says_so_by_its_exit_code(kind, point, rank, runs):
    exits, outputs = runs[kind, point, rank]
    assert exits[rank] == 128 + signal.SIGTERM
    assert all(exits[other] == 1 for other in RANKS if other != rank), outputs
    assert rank == 0 or f"{name(rank)} has failed with SIGTERMException" in outputs[0]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(
    ("point", "batch"), [("batch", "batch 1 of epoch 1"), ("validation batch", "batch 0 of validate")]
)
def test_data_that_differ_are_refused(point, batch, rank, runs):
    # An epoch has three batches. In one process the fifth batch differs, or the first one of the second validation.
    exits, outputs = runs["other labels", point, rank]
    assert all(exits.values())
    lines = [line for text in outputs.values() for line in text.splitlines()]
    (text,) = {line for line in lines if line.startswith("aimc_pl.errors.UsageError: ")}
    assert f"have read different data in {batch}. " in text
    assert name(rank) in text


@pytest.mark.parametrize("rank", RANKS)
def test_loaders_of_other_lengths_are_refused(rank, runs):
    exits, outputs = runs["fewer batches", "length", rank]
    assert all(exits.values())
    # Validation in one process meets training in another, or each process waits for the other one.
    if rank == 2:
        assert "rank 1 (stage 1) and rank 2 (stage 0) wait for each other: all must read as many batches" in outputs[0]
    else:
        assert "have read different data in batch 0 of validate" in outputs[0]


def test_a_stranger_cannot_join(runs):
    exits, outputs = runs["other secret", "before joining", 2]
    assert all(exits.values())
    for other in (0, 1):
        assert "what has joined as rank 2 does not know the secret of this run" in outputs[other]


def test_a_port_that_is_taken_and_a_listener_that_says_nothing_end_all(runs):
    exits, outputs = runs["taken port", "before joining", 0]
    assert set(exits) == set(RANKS)
    assert all(exits.values())
    assert "rank 0 cannot listen at 127.0.0.1:" in outputs[0]
    for other in (1, 2):
        assert "something else listens there" in outputs[other]


def wait_for_steps(folder, is_running, output):
    """Wait until a run of ``long_run.py`` has made some steps."""
    step = folder / "step"
    deadline = time.monotonic() + LIMIT
    while not step.exists() or int(step.read_text() or 0) < 12:
        assert is_running(), output.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def session(process):
    """Return the ids of the process and of all processes in its session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, leader = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(leader) == process.pid and state != "Z":
            found.append(int(path.parent.name))
    return sorted(found)


def assert_goes_on(folder):
    """Check that training goes on from the last checkpoint, in one process."""
    step = torch.load(folder / "last.ckpt", weights_only=False)["global_step"]
    assert step >= 10
    trainer = train(folder, devices=1, max_epochs=step // 3 + 2, ckpt_path="last")
    assert trainer.global_step == 3 * (step // 3 + 2)


@pytest.mark.filterwarnings("ignore:given by every process")  # long_run warns on purpose
def test_no_child_is_left_and_the_last_checkpoint_goes_on(tmp_path):
    command = [sys.executable, str(TESTS / "long_run.py"), str(tmp_path), "8"]
    environment, output = ENVIRONMENT | {"MASTER_PORT": str(free_port())}, tmp_path / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    wait_for_steps(tmp_path, lambda: process.poll() is None, output)
    ours = session(process)
    ranks = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in ours if pid != process.pid}
    (last,) = (pid for pid, environment in ranks.items() if b"LOCAL_RANK=2" in environment)
    os.kill(last, signal.SIGSTOP)
    assert process.wait(LIMIT) == 1
    said = output.read_text()
    assert "rank 2 (stage 0) does not answer" in said
    assert session(process) == []
    assert said.count("UserWarning: given by every process") == 1
    assert_goes_on(tmp_path)


@pytest.mark.filterwarnings("ignore:given by every process")  # long_run warns on purpose
@pytest.mark.parametrize("ends", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_to_all_ends_all(ends, tmp_path):
    def run():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest ignore it
        train(tmp_path, timeout=20, devices=len(RANKS))

    address, output = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}, tmp_path / "output"
    processes = [fork(run, output, LOCAL_RANK=rank, **address) for rank in RANKS]
    wait_for_steps(tmp_path, lambda: not any(os.waitpid(process, os.WNOHANG)[0] for process in processes), output)
    for process in processes:
        os.kill(process, ends)
    # A process may learn that another one has ended before it gets its own signal.
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    assert set(codes) <= {1, 128 + ends}, output.read_text()
    assert_goes_on(tmp_path)
