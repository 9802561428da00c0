"""This module keeps the rows of a study in a CSV file, selects rows by their values, and converts them to arrays."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from fcntl import LOCK_EX, flock
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

Row = Mapping[str, Any]
"""The column names and values of one line. Values that are read from a file are text."""


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, or no rows if the file does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows with the same keys to a CSV file, which is replaced if it exists."""
    path.unlink(missing_ok=True)
    append_rows(path, rows)


def append_rows(path: Path, rows: Sequence[Row], unless: Row | None = None) -> None:
    """Append rows to a CSV file, which is created if it does not exist. Several processes may do so at a time.

    The first rows give the file its columns. Later rows may lack some of them.

    Args:
        path: the file.
        rows: the rows.
        unless: values of some columns. If a row of the file has them, nothing is appended.

    Raises:
        ValueError: if a row has a key that is no column of the file. The file is then unchanged.
    """
    with path.open("a+", newline="") as file:
        flock(file, LOCK_EX)
        file.seek(0)
        reader = csv.DictReader(file)
        columns = reader.fieldnames
        if columns and unless and select(reader, **unless):
            return
        text = StringIO(newline="")
        writer = csv.DictWriter(text, columns or list(rows[0]))
        if columns is None:
            writer.writeheader()
        writer.writerows(rows)
        file.write(text.getvalue())


def select[R: Row](rows: Iterable[R], **values: Any) -> list[R]:
    """Return the rows that have all these values. Values are compared as text."""
    return [row for row in rows if all(str(row[key]) == str(value) for key, value in values.items())]


def curves(rows: Iterable[Row], field: str) -> np.ndarray:
    """Return one column of runs of equal length, ``(seeds, points)``, sorted by the text of their ``seed``."""
    by_seed: dict[str, list[float]] = {}
    for row in rows:
        by_seed.setdefault(str(row["seed"]), []).append(float(row[field]))
    return np.array([by_seed[seed] for seed in sorted(by_seed)])
