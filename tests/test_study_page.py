"""These tests check what the programs of two pages compute. The tests in test_pages.py run all blocks of all pages."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning as L
import pytest
from lightning_modules import make_trainer
from pages import blocks

from aimc_pl.callbacks import StalenessMonitor
from aimc_pl.data import Digits
from aimc_pl.models import MLP
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.tasks import Classifier

DOCS = Path(__file__).parents[1] / "docs"


def programs(page="STUDY.md"):
    return [block.text for block in blocks(DOCS / page, "python")]


@pytest.mark.slow
def test_the_study_runs(tmp_path):
    program = "".join(programs()[:2]).replace("EPOCHS = 20", "EPOCHS = 1").replace("1.0, 2.0, 4.0, ", "")
    (tmp_path / "range_study.py").write_text(program.replace("range(3)", "range(2)"))
    script = [sys.executable, "range_study.py"]
    subprocess.run(script, cwd=tmp_path, check=True, capture_output=True, env={})
    assert len((tmp_path / "range_study.csv").read_text().splitlines()) == 1 + 2 * 2 * 2
    assert (tmp_path / "range_study.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("num_stages", [2, 4])
def test_the_schedule_of_ones_own_runs(num_stages):
    names = {}
    exec(programs()[2], names)
    assert names["strategy"].schedule.num_cycles() == 2 * (8 + 3) + 2 * 2 * 3  # two more clocks a link, both ways
    monitor = StalenessMonitor()
    split_at = ["network.3", "network.5", "network.7"][: num_stages - 1]
    strategy = AnalogPipelineStrategy(num_stages, names["SlowLinks"], 4, split_at=split_at)
    trainer = make_trainer(
        strategy, max_epochs=1, limit_train_batches=6, limit_val_batches=0, precision="32-true", callbacks=[monitor]
    )
    trainer.fit(Classifier(MLP([64, 16, 16, 16, 10])), Digits())
    assert monitor.mismatches == 0
    for stage in range(num_stages):
        delay = 3 * (num_stages - 1 - stage)
        assert sorted(monitor.counts[stage].elements()) == sorted(min(k, delay) for k in range(24))


def test_the_observer_counts():
    names = {}
    exec(programs()[3], names)
    strategy = AnalogPipelineStrategy(2, "async", 4, split_at=["network.3"])
    strategy.observers.append(lateness := names["Lateness"]())
    make_trainer(strategy, max_epochs=1, limit_train_batches=3, limit_val_batches=0).fit(
        Classifier(MLP([64, 8, 10])), Digits()
    )
    # One stage is late by one update, except for the first update after the fill.
    assert lateness.total == 3 * 4 - 1


@pytest.mark.slow
def test_the_modules_of_the_training_step_page_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(L, "Trainer", partial(L.Trainer, logger=False, enable_progress_bar=False))
    names = {}
    for block in programs("TRAINING_STEP.md"):
        exec(block, names)
        assert names["strategy"].pipeline.num_entered == 4 * 4
