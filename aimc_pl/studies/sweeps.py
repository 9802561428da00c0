"""This module runs the cases of a study in parallel and appends their results to a CSV file.

A study that was stopped continues with the cases that the file lacks.
"""

import logging
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from signal import SIGKILL
from threading import Thread
from typing import Any

import torch
from joblib import Parallel, delayed
from rich.progress import track

from aimc_pl.errors import UsageError
from aimc_pl.studies.rows import Row, append_rows, read_rows

Case = Mapping[str, Any]

STEADY_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}
"""Environment variables for a new process, with which glibc never returns heap memory to the system.

By default glibc returns pages and requests them again at unpredictable times, which costs up to a third of a step.
"""


def sweep(
    run: Callable[..., Sequence[Row]], cases: Iterable[Case], path: Path, jobs: int | None = None
) -> list[dict[str, str]]:
    """Run the cases that a CSV file lacks, each on one thread, and append the rows of each case when it ends.

    Whatever stops a sweep, the cases that have ended are in the file. Only those that were running are lost.

    Args:
        run: a function that is called with a case's items as keyword arguments and returns rows with equal keys.
        cases: the cases of the study. All have the same keys, which become the first columns.
        path: the CSV file. If it exists, new rows are appended to it.
        jobs: number of cases at a time, each in its own process; by default one per core. With 1, cases run in this
            process, where a debugger reaches them.

    Returns:
        The rows of all given cases, as text.

    Raises:
        UsageError: if the file belongs to another study.
    """
    cases, path = list(cases), path.absolute()  # another process may be in another folder
    missing = missing_cases(cases, path)
    os.environ |= STEADY_MEMORY
    parallel = Parallel(jobs or -1, return_as="generator_unordered", batch_size=1)  # pyright: ignore[reportArgumentType] (joblib is not annotated)
    ended: Any = parallel(delayed(_run)(run, case, path, os.getpid()) for case in missing)
    for _ in track(ended, "runs", len(missing), disable=not missing):
        pass
    wanted = {_texts(case.values()) for case in cases}
    return [row for row in read_rows(path) if _texts(row[key] for key in cases[0]) in wanted]


def missing_cases(cases: Sequence[Case], path: Path) -> list[Case]:
    """Return the cases of a study that its CSV file lacks.

    Raises:
        UsageError: if the file belongs to another study.
    """
    keys = list(cases[0]) if cases else []
    rows = read_rows(path)
    if rows and not set(keys) <= set(rows[0]):
        raise UsageError(
            f"{path} belongs to another study: it has no column {', '.join(sorted(set(keys) - set(rows[0])))}"
        )
    done = {_texts(row[key] for key in keys) for row in rows}
    return [case for case in cases if _texts(case.values()) not in done]


def _run(run: Callable[..., Sequence[Row]], case: Case, path: Path, sweeper: int) -> None:
    """Run a case and append its rows to the file. This process does so itself, because the sweep may stop meanwhile."""
    _end_with(sweeper)
    try:
        with _one_quiet_thread():
            rows = [{**case, **row} for row in run(**case)]
        if not rows:
            raise ValueError("the study's function has returned no rows")
        append_rows(path, rows, unless=case)
    except Exception as error:
        error.add_note(f"in the case {case}:\n{traceback.format_exc()}")  # a traceback is not sent to another process
        raise


@cache
def _end_with(sweeper: int) -> None:
    """Let this process end when the process of the sweep has been killed. It would go on with all queued cases."""

    def watch() -> None:
        while os.getppid() == sweeper:
            time.sleep(0.5)  # nothing tells a process that its parent has ended
        os.kill(os.getpid(), SIGKILL)

    if os.getpid() != sweeper:
        Thread(target=watch, daemon=True).start()


@contextmanager
def _one_quiet_thread() -> Iterator[None]:
    """Context manager that runs torch on one thread and silences Lightning's messages below warnings.

    With one thread, sums do not depend on the number of jobs. Lightning's messages about every trainer would break up
    the progress bar.
    """
    threads, logger = torch.get_num_threads(), logging.getLogger("lightning.pytorch")
    level = logger.level
    torch.set_num_threads(1)
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
        torch.set_num_threads(threads)


def _texts(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(map(str, values))
