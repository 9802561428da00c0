"""This test runs every study and benchmark in its quick mode, and checks that it writes files that the docs show."""

import csv
import logging
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tensorboard_page import CHROMIUM

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    *(path for path in (ROOT / "scripts").glob("*/*.py") if path.stem != "machine"),
    *(ROOT / "docs" / "images").glob("*.py"),
]
SHOWN = {path.name: path for path in (ROOT / "docs").rglob("*") if path.suffix in (".csv", ".png")}


@pytest.fixture
def settings_restored(one_thread):
    """Restore the settings of the process that a script changes, because it runs in the process of the tests."""
    yield
    torch.set_flush_denormal(False)
    logging.getLogger("lightning.pytorch").setLevel(logging.NOTSET)


# Some studies are about cases of which the strategy warns.
@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:one update has made", "ignore:splitting the mini-batch", "ignore:BatchNorm computes"
)
@pytest.mark.usefixtures("settings_restored")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_quick_mode(script, monkeypatch, tmp_path):
    if script.stem in ("tensorboard_page", "whats_new") and CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    monkeypatch.setattr(sys, "argv", [str(script), "--quick"])
    runpy.run_path(str(script), run_name="__main__")
    written = {path.name: path for path in tmp_path.iterdir() if path.is_file()}
    assert written
    assert set(written) <= set(SHOWN)
    for name, path in written.items():
        if path.suffix == ".csv":
            columns, shown = (next(csv.reader(each.read_text().splitlines())) for each in (path, SHOWN[name]))
            # Older results of benchmarks lack the processor.
            assert [column for column in columns if column in shown or column != "processor"] == shown
        else:
            assert path.stat().st_size > 10_000
