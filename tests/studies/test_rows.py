"""These tests check that rows come back from their file as text."""

from multiprocessing import get_context

import numpy as np
import pytest

from aimc_pl.studies.rows import append_rows, curves, read_rows, select, write_rows

ROWS = [{"device": "soft, bounds", "seed": seed, "loss": loss} for seed, loss in ((1, 0.5), (0, 0.25), (1, 0.125))]


def test_rows_come_back(tmp_path):
    path = tmp_path / "a.csv"
    assert read_rows(path) == []
    write_rows(path, ROWS[:2])
    write_rows(path, ROWS[:1])
    append_rows(path, ROWS[1:])
    assert read_rows(path) == [{key: str(value) for key, value in row.items()} for row in ROWS]


def test_columns_are_those_of_the_file(tmp_path):
    path = tmp_path / "a.csv"
    append_rows(path, [{"a": 1, "b": 2}])
    append_rows(path, [{"b": 4, "a": 3}, {"a": 5}])
    before = path.read_text()
    with pytest.raises(ValueError, match="'c'"):
        append_rows(path, [{"a": 6, "b": 7}, {"a": 6, "c": 7}])
    assert path.read_text() == before
    assert read_rows(path) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}, {"a": "5", "b": ""}]


def _append(path, worker):
    for value in range(20):
        append_rows(path, [{"worker": worker, "value": value, "filling": "x" * 5000}])


@pytest.mark.slow
def test_processes_append_at_the_same_time(tmp_path):
    path, spawn = tmp_path / "a.csv", get_context("fork")
    workers = [spawn.Process(target=_append, args=(path, worker)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    rows = read_rows(path)
    for worker in range(4):
        assert [int(row["value"]) for row in select(rows, worker=worker)] == [*range(20)]
    assert len(rows) == 80


def test_rows_are_found_by_value_as_numbers_and_as_text(tmp_path):
    write_rows(tmp_path / "a.csv", ROWS)
    for rows in (ROWS, read_rows(tmp_path / "a.csv")):
        assert [float(row["loss"]) for row in select(rows, seed=1, device="soft, bounds")] == [0.5, 0.125]
        assert select(rows, seed=2) == []
        np.testing.assert_array_equal(curves(rows[:2], "loss"), [[0.25], [0.5]])
