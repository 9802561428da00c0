"""These tests read back what RunBoard writes."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aimc_pl.callbacks import RunBoard
from aimc_pl.callbacks.run_board import add_histogram
from aimc_pl.stage_names import name_of


@pytest.mark.parametrize("name", ["staleness/stage_12", "devices/noise_stage_3", "loss_stage_1", "noise/stage_2"])
def test_run_board_moves_the_names_of_its_callbacks_only(name, tmp_path):
    logger = RunBoard(tmp_path)
    logger.log_metrics({name: torch.tensor(2.0)}, 7)
    logger.save()
    moved = {"staleness/stage_12": ("stage_12", "staleness"), "devices/noise_stage_3": ("stage_03", "devices/noise")}
    folder, tag = moved.get(name, ("", name))
    (event,) = EventAccumulator(f"{logger.log_dir}/{folder}").Reload().Scalars(tag)
    assert (event.step, event.value) == (7, 2.0)


@pytest.mark.parametrize("name", ["staleness/stage_12", "staleness/max_stage_3", "devices/range_stage_0"])
def test_tag_and_folder_give_the_name(name, tmp_path):
    writer, tag = RunBoard(tmp_path).writer_and_tag(name)
    assert name_of(tag, writer.log_dir.rpartition("/")[2]) == name


def test_it_goes_on_after_it_was_closed_and_copied(tmp_path):
    """Check what a second fit with the same logger writes, and the copy in another process."""
    logger = RunBoard(tmp_path, version=0)
    for step in range(2):
        logger.log_metrics({"staleness/stage_0": 1.0}, step)
        logger.finalize("success")
    copied = pickle.loads(pickle.dumps(logger))
    copied.log_metrics({"staleness/stage_0": 1.0}, 2)
    copied.save()
    events = EventAccumulator(f"{logger.log_dir}/stage_00").Reload()
    assert sorted(event.step for event in events.Scalars("staleness")) == [0, 1, 2]


@pytest.mark.parametrize("kind", [TensorBoardLogger, RunBoard])
def test_only_the_first_process_writes(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = kind(tmp_path)
    add_histogram(SimpleNamespace(loggers=[logger], global_step=0), "devices/positions_stage_1", [-1.0, 1.0], [2])
    logger.log_metrics({"staleness/stage_0": 1.0}, 0)
    logger.finalize("success")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("kind", [TensorBoardLogger, RunBoard])
def test_a_histogram_has_the_bars_between_the_edges(kind, tmp_path):
    logger = kind(tmp_path)
    trainer = SimpleNamespace(loggers=[logger], global_step=40)
    add_histogram(trainer, "devices/positions_stage_1", [-1.0, 0.0, 3.0], [2, 1])
    logger.save()
    folder, tag = ("", "devices/positions_stage_1") if kind is TensorBoardLogger else ("stage_01", "devices/positions")
    if kind is RunBoard:
        logger.finalize("success")
    (event,) = EventAccumulator(f"{logger.log_dir}/{folder}").Reload().Histograms(tag)
    value = event.histogram_value
    assert event.step == 40
    assert (value.bucket_limit, value.bucket) == ([0.0, 3.0], [2, 1])
    # The values are taken to be in the middle of their bars: -0.5 twice, and 1.5.
    assert (value.min, value.max, value.num, value.sum, value.sum_squares) == (-1, 3, 3, 0.5, 2.75)
