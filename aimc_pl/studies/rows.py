"""The rows of a study: in a CSV file, selected by their values, and as arrays."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = Mapping[str, Any]
"""The names and values of one line. Read from a file, all values are text."""


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows with the same keys into a new CSV file."""
    path.unlink(missing_ok=True)
    append_rows(path, rows)


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Add rows with the same keys to a CSV file, which is made if it is not there."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def select[R: Row](rows: Iterable[R], **values: Any) -> list[R]:
    """The rows with these values."""
    return [row for row in rows if all(str(row[key]) == str(value) for key, value in values.items())]


def curves(rows: Iterable[Row], field: str) -> np.ndarray:
    """One column of runs of the same length, ``(seeds, points)``, by the text of their ``seed``."""
    by_seed: dict[str, list[float]] = {}
    for row in rows:
        by_seed.setdefault(str(row["seed"]), []).append(float(row[field]))
    return np.array([by_seed[seed] for seed in sorted(by_seed)])
