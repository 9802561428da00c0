"""These tests check that rows come back from their file as text."""

import numpy as np

from aimc_pl.studies.rows import append_rows, curves, read_rows, select, write_rows

ROWS = [{"device": "soft, bounds", "seed": seed, "loss": loss} for seed, loss in ((1, 0.5), (0, 0.25), (1, 0.125))]


def test_rows_come_back(tmp_path):
    path = tmp_path / "a.csv"
    assert read_rows(path) == []
    write_rows(path, ROWS[:2])
    write_rows(path, ROWS[:1])
    append_rows(path, ROWS[1:])
    assert read_rows(path) == [{key: str(value) for key, value in row.items()} for row in ROWS]


def test_rows_are_found_by_value_as_numbers_and_as_text(tmp_path):
    write_rows(tmp_path / "a.csv", ROWS)
    for rows in (ROWS, read_rows(tmp_path / "a.csv")):
        assert [float(row["loss"]) for row in select(rows, seed=1, device="soft, bounds")] == [0.5, 0.125]
        assert select(rows, seed=2) == []
        np.testing.assert_array_equal(curves(rows[:2], "loss"), [[0.25], [0.5]])
