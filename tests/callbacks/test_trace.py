"""These tests compare the trace of a real run with the operations of its schedule."""

import json
import time
from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
from forked import make_in_two
from lightning_modules import Attributes, loader, make_trainer
from trace_format import check_format

from aimc_pl.callbacks import TraceWriter
from aimc_pl.errors import UsageError
from aimc_pl.strategies import AnalogPipelineStrategy


def trace(schedule, duplex="half", **kwargs):
    L.seed_everything(0)
    module = Attributes().double()
    strategy = AnalogPipelineStrategy(3, schedule, 4, duplex=duplex, split_at=["l2", "l4"])
    trainer = make_trainer(strategy, callbacks=[TraceWriter("run.json", **kwargs)], max_epochs=1)
    trainer.fit(module, loader(module, shuffle=False))
    return json.loads(Path("run.json").read_text())["traceEvents"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "duplex"),
    [("sync", "half"), ("1f1b", "half"), ("zero_bubble", "half"), ("async", "half"), ("async", "full")],
)
def test_every_operation_of_a_run_is_shown_in_order(schedule, duplex):
    events = trace(schedule, duplex)
    slices = [event for event in events if event["ph"] == "X"]
    # There are mini-batches of 4, 4 and 3 micro-batches.
    passes = sorted(
        (event["cat"], event["tid"], event["args"]["microbatch"]) for event in slices if event["cat"] != "update"
    )
    assert passes == sorted((cat, m, k) for cat in ("forward", "backward") for m in range(3) for k in range(11))
    updates = [event for event in slices if event["cat"] == "update"]
    assert len(updates) == 3 * 11 if schedule == "async" else 3 <= len(updates) <= 9
    # One process does one thing at a time.
    ordered = sorted((event["ts"], event["dur"]) for event in slices)
    assert all(start + duration <= after + 1e-3 for (start, duration), (after, _) in pairwise(ordered))
    starts = {(event["cat"], event["tid"], event["args"]["microbatch"]): event["ts"] for event in slices}
    for k in range(11):
        path = [starts["forward", m, k] for m in range(3)] + [starts["backward", m, k] for m in (2, 1, 0)]
        assert path == sorted(path)
    assert sum(event["ph"] == "s" for event in events) == sum(event["ph"] == "f" for event in events) == 2 * 2 * 11


class LateStart(L.Callback):
    """A callback that lets the process of stage 0 begin its first mini-batch later than the other process."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0 and trainer.global_rank == 1:
            time.sleep(0.3)  # so that the processes wait for each other


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("schedule", "duplex"), [("zero_bubble", "half"), ("async", "half"), ("async", "full")])
def test_processes_share_one_time_axis(schedule, duplex, tmp_path, monkeypatch):
    """Check two processes, of which one begins late: no operation ends before the one that it needs has begun.

    If every process counted time from its own start, errors would arrive in stage 0 before stage 1 has sent them.
    """
    monkeypatch.chdir(tmp_path)

    def train():
        L.seed_everything(0)
        module = Attributes().double()
        strategy = AnalogPipelineStrategy(2, schedule, 4, duplex=duplex, split_at=["l3"])
        callbacks = [LateStart(), TraceWriter("run.json")]
        make_trainer(strategy, callbacks=callbacks, max_epochs=1, devices=2).fit(module, loader(module, shuffle=False))

    make_in_two(train, tmp_path, monkeypatch)
    events = json.loads(Path("run.json").read_text())["traceEvents"]
    # There are mini-batches of 4, 4 and 3 micro-batches, with an arrow there and one back for each.
    assert check_format(events) == 2 * 11
    times = {
        (event["cat"], event["tid"], event["args"]["microbatch"]): (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["ph"] == "X"
    }
    updates = sum(cat == "update" for cat, *_ in times)
    assert len(times) - updates == 2 * 2 * 11
    assert updates == 2 * 11 if schedule == "async" else 2 <= updates <= 2 * 3
    for k in range(11):
        path = [times["forward", m, k] for m in (0, 1)] + [times["backward", m, k] for m in (1, 0)]
        assert all(start <= end for (start, _), (_, end) in pairwise(path)), k
    assert min(start for start, _ in times.values()) == 0


@pytest.mark.slow
def test_a_trace_ends_after_so_many_clocks():
    slices = [event for event in trace("async", num_clocks=5) if event["ph"] == "X"]
    # Stage 0 works in clocks 0, 2 and 4, stage 1 in 1, 3 and 4 (backward of micro-batch 0), stage 2 in 2, 3 and 4.
    assert [event["name"] for event in slices if event["tid"] == 0] == ["F0", "F1", "F2"]
    assert [event["name"] for event in slices if event["tid"] == 1] == ["F0", "F1", "B0", "U0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere/run.json",), "path=nowhere/run.json cannot be written: there is no folder nowhere"),
        (("run.json", 0), "num_clocks must be a whole number of at least 1 and at most 10000, got 0"),
        ((3,), "path must be a path, got 3"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        TraceWriter(*arguments)
