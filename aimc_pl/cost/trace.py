"""This module writes timelines in the Trace Event Format, which https://ui.perfetto.dev and chrome://tracing open.

Every timeline is a process, and every stage is a thread of it. Arrows ("flow events") lead from a forward to that of
the next stage, and from a backward to that of the stage before.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aimc_pl.cost.simulation import Span, StageTimes, Timeline, simulate
from aimc_pl.errors import UsageError
from aimc_pl.schedule import Schedule

Event = dict[str, Any]

_NAMES = {"F": "forward", "B": "backward", "W": "gradient", "U": "update"}


def planned(schedule: Schedule, num_microbatches: int) -> Timeline:
    """Return the table of a schedule as a timeline, whose unit is a clock cycle.

    Args:
        schedule: the schedule.
        num_microbatches: K, the number of micro-batches between fill and drain.
    """
    spans = []
    for clock, operations in enumerate(schedule.clocks(num_microbatches)):
        for kind, stage, k in operations:
            start = clock * schedule.cycles_per_clock
            start += kind == "B" and schedule.duplex == "full"  # the second cycle of the clock
            spans.append(Span(kind, stage, k, start, start + 1))
    peaks = [schedule.in_flight(stage, num_microbatches) for stage in range(schedule.num_stages)]
    return Timeline(schedule.num_stages, spans, peaks)


def planned_and_simulated(schedule: Schedule) -> list[Event]:
    """Return events for one mini-batch: the table, and a run in which every stage goes on as soon as it can.

    A clock cycle is a microsecond.
    """
    equal = StageTimes(backward=2.0, gradient=1.0) if schedule.splits_backward else StageTimes()
    run = simulate(schedule, [equal] * schedule.num_stages)
    return trace_events({"planned": planned(schedule, schedule.num_microbatches), "simulated": run}, seconds=1e-6)


def trace_events(timelines: Mapping[str, Timeline], seconds: float = 1.0) -> list[Event]:
    """Return timelines as events of the Trace Event Format.

    Args:
        timelines: the timelines, by the names of their processes.
        seconds: the length of their unit of time in seconds.
    """
    events = []
    for process, (name, timeline) in enumerate(timelines.items()):
        events.append(_named("process_name", name, process))
        for stage in range(timeline.num_stages):
            events.append(_named("thread_name", f"stage {stage}", process, stage))
        events += [_slice(span, process, seconds) for span in timeline.spans]
        events += _arrows(timeline, process, seconds)
    return events


def write_trace(path: Path, events: list[Event]) -> None:
    """Write events to a file.

    Raises:
        UsageError: if the file cannot be written.
    """
    try:
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}), "utf-8")
    except OSError as error:
        raise UsageError(f"trace={path} cannot be written: {error.strerror or error}") from error


def _named(kind: str, name: str, process: int, thread: int = 0) -> Event:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _slice(span: Span, process: int, seconds: float) -> Event:
    return {
        "ph": "X",
        "name": f"{span.kind}{span.microbatch}",
        "cat": _NAMES[span.kind],
        "pid": process,
        "tid": span.stage,
        "ts": 1e6 * seconds * span.start,
        "dur": 1e6 * seconds * (span.end - span.start),
        "args": {"stage": span.stage, "microbatch": span.microbatch},
    }


def _arrows(timeline: Timeline, process: int, seconds: float) -> Iterator[Event]:
    """Yield the begin and the end of each arrow. Both lie inside of an operation, to which the viewer binds them.

    In a trace of processes, an operation may include waiting for the other one, so that the two overlap. An arrow
    never leads back in time.
    """
    spans = {(span.kind, span.stage, span.microbatch): span for span in timeline.spans}
    for number, ((kind, stage, k), span) in enumerate(spans.items()):
        after = spans.get((kind, stage + (1 if kind == "F" else -1), k))
        if kind in "WU" or after is None:
            continue
        common = {"name": "activations" if kind == "F" else "errors", "cat": "link", "pid": process}
        leaves = (span.start + min(span.end, after.end)) / 2
        arrives = (max(leaves, after.start) + after.end) / 2
        for phase, stage, time in (("s", span.stage, leaves), ("f", after.stage, arrives)):
            event = {"ph": phase, **common, "id": f"{process}.{number}", "tid": stage, "ts": 1e6 * seconds * time}
            yield event | ({"bp": "e"} if phase == "f" else {})
