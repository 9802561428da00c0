"""These tests compare the trace of a real run with the operations of its schedule."""

import json
from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
from lightning_modules import Attributes, loader, make_trainer

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
