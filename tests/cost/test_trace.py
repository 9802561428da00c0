"""These tests check traces against the Trace Event Format, and against the timelines that they show."""

import json
from pathlib import Path

import pytest
from trace_format import check_format

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
