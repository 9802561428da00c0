"""Runs the cases of a study side by side and keeps what each leaves in a CSV file, so that a stopped study goes on."""

import argparse
import csv
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from benchmarking import STEADY_MEMORY
from rich.progress import track

Case = Mapping[str, Any]
Row = dict[str, str]


def study_parser(description: str | None, seeds: int) -> argparse.ArgumentParser:
    """The arguments of every study: its file, seeds and processes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=writable, required=True, help="of the runs; a study goes on where it was")
    parser.add_argument("--seeds", type=_at_least_one, default=seeds, help="runs of each setting")
    parser.add_argument("--jobs", type=_at_least_one, help="runs at a time; one on each core by default")
    return parser


def writable(text: str) -> Path:
    """An argument's file, in a folder that is made if it is not there."""
    path = Path(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def sweep(
    run: Callable[..., Sequence[Mapping[str, Any]]], cases: Iterable[Case], path: Path, jobs: int | None = None
) -> list[Row]:
    """Run the cases that a CSV file lacks, each in a process with one thread, and append their rows as they end.

    Args:
        run: called with a case's items as keyword arguments; returns rows of equal keys.
        cases: the study. All have the same keys, which become the first columns.
        path: the CSV file. It goes on if it is there.
        jobs: processes at a time; one for every core by default.

    Returns:
        The rows of all these cases, as text.

    Raises:
        ValueError: if the file holds another study.
    """
    cases = list(cases)
    keys = list(cases[0])
    rows = read(path)
    if rows and not set(keys) <= set(rows[0]):
        raise ValueError(f"{path} is of another study: it has no column {', '.join(sorted(set(keys) - set(rows[0])))}")
    done = {_texts(row[key] for key in keys) for row in rows}
    missing = [case for case in cases if _texts(case.values()) not in done]
    os.environ |= {"OMP_NUM_THREADS": "1"} | STEADY_MEMORY
    jobs = jobs or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(jobs, get_context("spawn"), _quiet) as pool:
        runs = {pool.submit(run, **case): case for case in missing}
        try:
            for finished in track(as_completed(runs), "runs", len(runs), disable=not runs):
                _append(path, [{**runs[finished], **row} for row in finished.result()])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    wanted = {_texts(case.values()) for case in cases}
    return [row for row in read(path) if _texts(row[key] for key in keys) in wanted]


def read(path: Path) -> list[Row]:
    """The rows of a CSV file, none if there is no file."""
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def select(rows: Iterable[Row], **values: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row[key] == str(value) for key, value in values.items())]


def curves(rows: Iterable[Row], field: str) -> np.ndarray:
    """One column of runs of the same length, ``(seeds, points)``."""
    by_seed: dict[str, list[float]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).append(float(row[field]))
    return np.array([by_seed[seed] for seed in sorted(by_seed)])


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent runs ``(seeds,)``; no number for a single run or infinite values."""
    if len(values) < 2 or not np.isfinite(values).all():
        return float("nan")
    return float(values.std(ddof=1) / len(values) ** 0.5)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _quiet() -> None:
    # What Lightning tells of every trainer would break the progress bar; warnings still come.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def _texts(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(map(str, values))


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)
