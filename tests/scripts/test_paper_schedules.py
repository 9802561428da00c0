"""Figures 2 and 3 and the tables of the schedules come out of their command."""

import csv
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "paper_schedules.py"


def test_every_count_equals_its_closed_form(tmp_path):
    command = [sys.executable, str(SCRIPT), "--csv", "table.csv", "--folder", "pictures"]
    run = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "100 combinations: every count equals its closed form" in run.stdout
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    of_8_and_8 = {(r["schedule"], r["duplex"]): r for r in rows if r["num_stages"] == r["num_microbatches"] == "8"}
    cycles = {case: int(row["cycles_counted"]) for case, row in of_8_and_8.items()}
    assert cycles == {
        ("none", "half"): 128,
        ("sync", "half"): 30,
        ("1f1b", "half"): 30,
        ("async", "half"): 30,
        ("async", "full"): 44,
    }
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"figure_2.png", "figure_3.png"}
