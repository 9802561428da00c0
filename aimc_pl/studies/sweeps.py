"""Runs the cases of a study side by side and keeps what each leaves in a CSV file, so that a stopped study goes on."""

import logging
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed
from rich.progress import track

from aimc_pl.errors import UsageError
from aimc_pl.studies.rows import Row, append_rows, read_rows

Case = Mapping[str, Any]

STEADY_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}
"""For the environment of a new process: a heap that glibc never gives back.

Otherwise it returns and takes back pages by chance, which costs up to a third of a step.
"""


def sweep(
    run: Callable[..., Sequence[Row]], cases: Iterable[Case], path: Path, jobs: int | None = None
) -> list[dict[str, str]]:
    """Run the cases that a CSV file lacks, each on one thread, and append their rows as they end.

    Args:
        run: called with a case's items as keyword arguments; returns rows of equal keys.
        cases: the study. All have the same keys, which become the first columns.
        path: the CSV file. It goes on if it is there.
        jobs: cases at a time, each in a process of its own; one for every core by default. With 1 they run in this
            process, where a debugger reaches them.

    Returns:
        The rows of all these cases, as text.

    Raises:
        UsageError: if the file holds another study.
    """
    cases = list(cases)
    keys = list(cases[0])
    rows = read_rows(path)
    if rows and not set(keys) <= set(rows[0]):
        raise UsageError(f"{path} is of another study: it has no column {', '.join(sorted(set(keys) - set(rows[0])))}")
    done = {_texts(row[key] for key in keys) for row in rows}
    missing = [case for case in cases if _texts(case.values()) not in done]
    os.environ |= STEADY_MEMORY
    # One by one, because a batch of short cases would be lost as a whole when one of them fails.
    parallel = Parallel(jobs or -1, return_as="generator_unordered", batch_size=1)  # pyright: ignore[reportArgumentType] (joblib is not annotated)
    finished: Any = parallel(delayed(_rows)(run, case) for case in missing)
    for new in track(finished, "runs", len(missing), disable=not missing):
        if isinstance(new, Exception):
            raise new
        append_rows(path, new)
    wanted = {_texts(case.values()) for case in cases}
    return [row for row in read_rows(path) if _texts(row[key] for key in keys) in wanted]


def _rows(run: Callable[..., Sequence[Row]], case: Case) -> list[dict[str, Any]] | Exception:
    """The rows of a case, or why there are none: raised here, joblib would drop the cases that have just ended."""
    try:
        with _one_quiet_thread():
            return [{**case, **row} for row in run(**case)]
    except Exception as error:
        error.add_note(f"in the case {case}:\n{traceback.format_exc()}")  # a traceback does not leave its process
        return error


@contextmanager
def _one_quiet_thread() -> Iterator[None]:
    """Sums are the same with any number of jobs, and what Lightning tells of every trainer spares the progress bar."""
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
