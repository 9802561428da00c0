"""This module reads what finished and stopped runs have logged, as tables, and draws runs side by side."""

import csv
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from os import PathLike
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from aimc_pl.arguments import check_instance, check_list, check_path, listed, shown
from aimc_pl.errors import UsageError
from aimc_pl.figures import SCHEDULES, THINGS, styled
from aimc_pl.stage_names import name_of

History = Sequence[Mapping[str, float]]
"""A row for each step at which something was logged. A row has the values that were logged at its step."""

_EVENTS = "events.out.tfevents.*"
"""TensorBoard's files."""

PROGRESS = {
    "epoch": "epochs",
    "clock/cycles": "clock cycles",
    "clock/seconds": "seconds of the hardware",
    "clock/joules": "joules of the hardware",
}
"""What a run spends, by the names under which runs log it."""


def history(run: str | Path) -> list[dict[str, float]]:
    """Return what a run has logged: a table with a row for each step, in the order of the steps.

    Rows have ``step``, ``time`` (seconds since the start) and, among the names that were logged, ``epoch`` (counted
    from 0), ``clock/cycles`` (in the last row of each epoch), the metrics, and the staleness of each stage. A row lacks
    what was not logged at its step. ``pandas.DataFrame(history(run))`` makes a data frame of it.

    Args:
        run: the folder of a run, such as ``logs/digits_async/version_0``; a folder with such folders, of which the last
            that trained is read; or a file. The CSV files of ``RunTable`` and of Lightning's ``CSVLogger`` are read
            (without ``time``), and else TensorBoard's event files.

    Raises:
        UsageError: if there is nothing to read.
    """
    check_path("run", run)
    path = Path(run)
    if not path.exists():
        raise UsageError(f"run {path} does not exist: give the folder of a run, such as logs/NAME/version_0")
    versions = {int(folder.name.removeprefix("version_")): folder for folder in path.glob("version_*[0-9]")}
    if not versions or (path / "metrics.csv").exists():
        return _rows(path)
    for _, folder in sorted(versions.items(), reverse=True):
        if _has_logged(folder) and _has_trained(rows := _rows(folder), folder):
            return rows
    raise UsageError(f"no run in {path} has trained: give the folder of a run, such as {versions[max(versions)]}")


@styled
def draw_runs(runs: Mapping[str, History], metric: str = "val/accuracy") -> Figure:
    """Return a figure of a metric of several runs, against each kind of progress that they have logged.

    These are epochs and clock cycles (of ``ClockMonitor``), and seconds and joules of the hardware where a run has
    them. The charts share their vertical axis.

    Args:
        runs: the histories of the runs, by the names for the legend.
        metric: the name of the metric.

    Raises:
        UsageError: if no run has logged the metric together with the progress.
    """
    check_instance("runs", runs, Mapping, "a mapping from names to histories")
    if not runs:
        raise UsageError("give at least one run to compare, such as compare({'a': history(\"logs/a\")})")
    lines = {
        progress: {name: line for name, rows in runs.items() if (line := _line(rows, progress, metric))}
        for progress in PROGRESS
    }
    if not any(lines.values()):
        known = sorted({name for rows in runs.values() for row in rows for name in row} - {"step", "time"}, key=_rank)
        hint = f"choose one of {listed(known, 100)}" if known else f"{len(runs)} runs have logged nothing"
        raise UsageError(f"no run has metric {shown(metric)}: {hint}")
    shown_lines = {progress: line for progress, line in lines.items() if line}
    width = 4 * len(shown_lines)
    columns = max(1, 12 * width // (max(map(len, runs)) + 10))  # an inch has 12 letters, and a line of a legend 10
    figure = Figure(figsize=(width, 3.2 + 0.25 * -(-len(runs) // columns)), layout="constrained")
    all_axes = figure.subplots(1, len(shown_lines), sharey=True, squeeze=False)[0]
    colours = _colours([*runs])
    for axes, (progress, of_runs) in zip(all_axes, shown_lines.items(), strict=True):
        for name, line in of_runs.items():
            axes.plot(*zip(*line, strict=True), marker=".", label=name, color=colours[name])
        axes.set_xlabel(PROGRESS[progress])
        if progress == "epoch":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    all_axes[0].set_ylabel(metric)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=columns)
    return figure


def compare(runs: Sequence[str | Path] | Mapping[str, str | Path], metric: str = "val/accuracy") -> Figure:
    """Return the figure of :func:`draw_runs` for runs that are given by their files or folders.

    Args:
        runs: the runs, as :func:`history` takes them; or a mapping to them from the names for the legend. Without
            names, the legend has the parts of the paths that differ.
        metric: the name of the metric.

    Raises:
        UsageError: if a run cannot be read, or if no run has the metric.
    """
    if not isinstance(runs, Mapping):
        check_list("runs", runs, (str, PathLike), "paths of runs")
    named = runs if isinstance(runs, Mapping) else names_of([*map(Path, runs)])
    return draw_runs({name: history(run) for name, run in named.items()}, metric)


def names_of(paths: Sequence[Path]) -> dict[str, Path]:
    """Return paths by names for them: without the folders at both ends that all paths share."""
    parts = [path.parts for path in paths]
    first = last = 0
    shortest = min(map(len, parts), default=0)
    while first < shortest - 1 and len({part[first] for part in parts}) == 1:
        first += 1
    while first + last < shortest - 1 and len({part[len(part) - 1 - last] for part in parts}) == 1:
        last += 1
    return {"/".join(part[first : len(part) - last]): path for part, path in zip(parts, paths, strict=True)}


def _rank(name: str) -> tuple[int, str]:
    """Return the place of a metric in a list, in which those of a module come first."""
    return next((n for n, part in enumerate(("val", "test", "train")) if name.startswith(f"{part}/")), 3), name


def _colours(names: Sequence[str]) -> dict[str, str]:
    """Return the colours of runs: those of the schedules, if the names have them and each has another one."""
    found = [[name for name in SCHEDULES if re.search(f"(^|[^a-z]){name}([^a-z]|$)", run)] for run in names]
    told_apart = {name for schedules in found for name in schedules if len(schedules) == 1}
    if len(told_apart) == len(names):
        return {run: SCHEDULES[name] for run, (name,) in zip(names, found, strict=True)}
    return dict(zip(names, cycle(THINGS), strict=False))


def _line(rows: History, progress: str, metric: str) -> list[tuple[float, float]]:
    one = 1 if progress == "epoch" else 0  # the first epoch is 0, and has ended where its metrics are logged
    return [(row[progress] + one, row[metric]) for row in rows if progress in row and metric in row]


def _rows(path: Path) -> list[dict[str, float]]:
    """Return the table of a run from its folder or file."""
    table = path if path.suffix == ".csv" else path / "metrics.csv"
    logged = _from_csv(table) if table.is_file() else _from_events(path)
    rows: dict[int, dict[str, float]] = {}
    for step, values in logged:
        rows.setdefault(step, {"step": step}).update(values)
    return [rows[step] for step in sorted(rows)]


def _has_trained(rows: History, folder: Path) -> bool:
    """Return whether a run is a fit. A validation, a test or a prediction logs at step 0 only, and saves nothing."""
    return any(row["step"] > 0 for row in rows) or (folder / "checkpoints").exists()


def _has_logged(folder: Path) -> bool:
    return (folder / "metrics.csv").exists() or any(folder.glob(_EVENTS))


def _from_csv(path: Path) -> list[tuple[int, dict[str, float]]]:
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [
            (int(row["step"]), {name: float(value) for name, value in row.items() if value and name != "step"})
            for row in rows
        ]
    except KeyError as error:
        raise UsageError(f"{path} is no table of a run: it has no column step") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path} is no table of a run: {' '.join(str(error).split())}") from error


def _from_events(path: Path) -> list[tuple[int, dict[str, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if path.is_dir() and not _has_logged(path):
        raise UsageError(f"run {path} has no metrics.csv and no event files: was it trained with a logger?")
    scalars: list[tuple[str, Any]] = []
    for stage in (None, *path.glob("stage_*[0-9]")):  # RunBoard writes the values of stages into folders of their own.
        events = EventAccumulator(str(stage or path), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            # The tags by_clock/… and others repeat metrics, with another meaning of the step.
            if not re.match("by_(clock|epoch|time|energy)/", tag):
                name = name_of(tag, stage.name) if stage else tag
                scalars += [(name, event) for event in events.Scalars(tag)]
    if path.is_file() and not scalars:
        raise UsageError(f"{path} has no values of a run: give the folder of a run, its metrics.csv or its event file")
    start = min((event.wall_time for _, event in scalars), default=0.0)
    scalars.sort(key=lambda scalar: scalar[1].wall_time)
    return [(event.step, {name: event.value, "time": event.wall_time - start}) for name, event in scalars]
