"""These tests check traces against the Trace Event Format, and against the timelines that they show."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from aimc_pl.cost import StageTimes, simulate
from aimc_pl.cost.trace import planned, planned_and_simulated, trace_events, write_trace
from aimc_pl.errors import UsageError
from aimc_pl.schedule import Schedule

KINDS = [
    ("none", "half"),
    ("sync", "half"),
    ("1f1b", "half"),
    ("zero_bubble", "half"),
    ("async", "half"),
    ("async", "full"),
]
REQUIRED = {"M": {"args"}, "X": {"ts", "dur", "cat"}, "s": {"ts", "id", "cat"}, "f": {"ts", "id", "cat", "bp"}}
"""The fields that each phase needs, besides name, process and thread."""


def check_format(events):
    """Check what a viewer relies on: fields and types, one slice at a time on a thread, and arrows between slices."""
    named, slices, flows = set(), {}, {}
    for event in events:
        assert {"ph", "name", "pid", "tid"} | REQUIRED[event["ph"]] <= event.keys()
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        place = event["pid"], event["tid"]
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            named.add((event["name"], *place))
        elif event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] > 0
            slices.setdefault(place, []).append((event["ts"], event["ts"] + event["dur"], event["name"]))
        else:
            flows.setdefault((event["cat"], event["name"], event["id"]), {})[event["ph"]] = event
    for place, own in slices.items():
        assert ("thread_name", *place) in named
        assert ("process_name", place[0], 0) in named
        own.sort()
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(own))
    for (_, name, _), ends in flows.items():
        assert ends.keys() == {"s", "f"}
        assert ends["f"]["bp"] == "e"
        assert ends["s"]["ts"] <= ends["f"]["ts"]
        bound = []
        for event in ends.values():
            around = [s for s in slices[event["pid"], event["tid"]] if s[0] <= event["ts"] <= s[1]]
            assert len(around) == 1
            bound.append(around[0][2])
        assert bound[0] == bound[1]  # the same operation of the same micro-batch, at two stages
        assert bound[0][0] == {"activations": "F", "errors": "B"}[name]
        assert ends["f"]["tid"] - ends["s"]["tid"] == {"activations": 1, "errors": -1}[name]
    return len(flows)


@pytest.mark.parametrize(("name", "duplex"), KINDS)
def test_a_trace_of_the_table_and_of_a_run(name, duplex):
    schedule = Schedule(name, 4, 3, duplex)
    operations = 3 if name == "zero_bubble" else 2
    events = planned_and_simulated(schedule)
    assert check_format(events) == 2 * 2 * 3 * 3  # two processes, forward and backward, three links, micro-batches
    for process in range(2):
        slices = [event for event in events if (event["ph"], event["pid"]) == ("X", process)]
        assert len(slices) == operations * 4 * 3
        assert {event["name"][0] for event in slices} == set("FBW"[:operations])
        assert max(event["ts"] + event["dur"] for event in slices) == pytest.approx(schedule.num_cycles())


def test_a_planned_timeline_is_the_table():
    schedule = Schedule("async", 3, 2)
    spans = {(span.kind, span.stage, span.microbatch): span.start for span in planned(schedule, 2).spans}
    clocks = [*schedule.clocks(2)]
    assert spans == {tuple(operation): clock for clock, operations in enumerate(clocks) for operation in operations}


def test_a_trace_shows_seconds_and_updates():
    timeline = simulate(Schedule("sync", 2, 2), [StageTimes(3e-9, 4e-9, 1e-9), StageTimes(2e-9, 2e-9)])
    events = trace_events({"run": timeline})
    check_format(events)
    first = next(event for event in events if event["ph"] == "X")
    assert (first["name"], first["cat"], first["ts"], first["dur"]) == ("F0", "forward", 0, pytest.approx(3e-3))
    updates = [event for event in events if event.get("cat") == "update"]
    assert [(event["name"], event["tid"], event["dur"]) for event in updates] == [("U1", 0, pytest.approx(2e-3))]


def test_a_written_trace_is_json():
    write_trace(Path("run.json"), planned_and_simulated(Schedule("async", 2, 2)))
    written = json.loads(Path("run.json").read_text())
    assert written.keys() == {"traceEvents", "displayTimeUnit"}
    check_format(written["traceEvents"])
    with pytest.raises(UsageError, match=r"trace=nowhere/run.json cannot be written: No such file or directory"):
        write_trace(Path("nowhere/run.json"), [])
