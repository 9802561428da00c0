"""These tests read what runs have written for TensorBoard, and check that every chart of the page shows something."""

import re

import lightning as L
import pytest
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_modules import Attributes, loader, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from aimc_pl.callbacks import (
    ClockMonitor,
    Dashboard,
    DeviceMonitor,
    DeviceNoise,
    PipelineDiagram,
    RunBoard,
    RunTable,
    StalenessMonitor,
    WriteNoise,
)
from aimc_pl.data import Digits
from aimc_pl.devices import soft_bounds
from aimc_pl.models import MLP
from aimc_pl.runs import history
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.tasks import Classifier

CHARTS = {
    "Progress": [
        "validation metrics against clock cycles",
        "validation metrics against epochs",
        "validation loss against clock cycles",
        "training loss against clock cycles",
        "learning rate against steps",
    ],
    "Staleness": ["staleness of updates, per stage", "relative drift of weights, per stage"],
    "Devices": ["use of the devices' range, per stage", "relative noise of weights, per stage"],
}


def fit(logger, schedule, callbacks, **kwargs):
    L.seed_everything(0)
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=AnalogPipelineStrategy(2, schedule, 2, soft_bounds(), split_at=["network.3"]),
        callbacks=callbacks,
        logger=logger,
        max_epochs=2,
        limit_train_batches=3,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    trainer.fit(Classifier(MLP([64, 8, 10])), Digits(batch_size=8))
    return trainer


def all_callbacks():
    noise = DeviceNoise([WriteNoise(0.01)])
    return [ClockMonitor(), StalenessMonitor(), DeviceMonitor(), noise, PipelineDiagram(), Dashboard()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train in two stages with all callbacks, and return the folder of the run."""
    folder = tmp_path_factory.mktemp("logs")
    loggers = [RunBoard(folder, "run"), RunTable(folder, "run")]
    return fit(loggers, "async", [*all_callbacks(), LearningRateMonitor()]).log_dir


def events_of(run):
    """Return what TensorBoard finds in a run and in the runs of its stages, by their folders."""
    folders = {".": run, "stage_00": f"{run}/stage_00", "stage_01": f"{run}/stage_01"}
    return {name: EventAccumulator(str(folder)).Reload() for name, folder in folders.items()}


def charts_of(events):
    """Return the patterns of the charts by category and title. TensorBoard shows the last layout that was written."""
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    return {part.title: {chart.title: [*chart.multiline.tag] for chart in part.chart} for part in layout.category}


def test_every_chart_has_data(run):
    events = events_of(run)
    charts = charts_of(events["."])
    assert {part: [*titles] for part, titles in charts.items()} == CHARTS
    for part, titles in charts.items():
        for title, (pattern,) in titles.items():
            with_data = [name for name, found in events.items() if any(map(re.compile(pattern).match, scalars(found)))]
            assert with_data == (["."] if part == "Progress" else ["stage_00", "stage_01"]), title


def scalars(events):
    return events.Tags()["scalars"]


def test_an_evaluation_alone_writes_no_charts(tmp_path):
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=AnalogPipelineStrategy(2, "async", 2, soft_bounds(), split_at=["network.3"]),
        callbacks=all_callbacks(),
        logger=RunBoard(tmp_path, "run"),
        limit_val_batches=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(Classifier(MLP([64, 8, 10])), Digits(batch_size=8), verbose=False)
    events = EventAccumulator(str(trainer.log_dir)).Reload()
    assert "val/accuracy" in scalars(events)
    assert not [tag for tag in scalars(events) if tag.startswith("by_")]
    assert "custom_scalars__config__" not in events.Tags()["tensors"]


def test_no_tag_is_of_two_kinds(run):
    kinds = {}
    for events in events_of(run).values():
        for kind, tags in events.Tags().items():
            # A histogram is also shown as a distribution. The graph and the metadata have no tags.
            if kind != "distributions" and isinstance(tags, list):
                for tag in tags:
                    kinds.setdefault(tag, set()).add(kind)
    assert {tag: found for tag, found in kinds.items() if len(found) > 1} == {}
    assert kinds["staleness/counts"] == kinds["devices/positions"] == {"histograms"}
    assert kinds["pipeline"] == {"images"}


def test_stages_are_runs_with_the_values_of_the_table(run):
    rows, events = history(run), events_of(run)
    stages = {name: found for name, found in events.items() if name != "."}
    assert {tag for found in stages.values() for tag in scalars(found)} == {
        "staleness",
        "staleness/max",
        "staleness/drift",
        "devices/range",
        "devices/noise",
    }
    assert not [tag for tag in scalars(events["."]) if "stage" in tag]
    for m, found in enumerate(stages.values()):
        for tag in scalars(found):
            name = f"{tag}{'_' if '/' in tag else '/'}stage_{m}"
            expected = [(row["step"], pytest.approx(row[name])) for row in rows if name in row]
            assert [(event.step, event.value) for event in found.Scalars(tag)] == expected
            assert len(expected) == 6


def test_other_loggers_and_schedules_without_staleness(tmp_path):
    """Check Lightning's own logger, and a synchronous run, whose staleness is zero and not worth a chart."""
    trainer = fit(TensorBoardLogger(tmp_path), "sync", all_callbacks())
    events = EventAccumulator(trainer.log_dir).Reload()
    charts = charts_of(events)
    progress = [title for title in CHARTS["Progress"] if "learning rate" not in title]
    assert {part: [*titles] for part, titles in charts.items()} == {"Progress": progress, "Devices": CHARTS["Devices"]}
    for titles in charts.values():
        for title, (pattern,) in titles.items():
            assert any(map(re.compile(pattern).match, scalars(events))), title
    assert {tag for tag in events.Tags()["histograms"] if tag.startswith("devices")} == {
        "devices/positions_stage_0",
        "devices/positions_stage_1",
    }


def test_a_module_with_one_loss_has_two_charts(tmp_path):
    """Check a digital module without further metrics, and a layout that grows when the validation has run."""
    logger, module = TensorBoardLogger(tmp_path), Attributes().double()
    trainer = make_trainer(
        AnalogPipelineStrategy(2, "async", 2, split_at=["l3"]),
        callbacks=[ClockMonitor(), Dashboard()],
        logger=logger,
        log_every_n_steps=1,
        max_epochs=1,
    )
    trainer.fit(module, loader(module), loader(module))
    events = EventAccumulator(logger.log_dir).Reload()
    assert charts_of(events) == {
        "Progress": {
            "validation loss against clock cycles": ["by_clock/(?!train_loss$).*loss"],
            "training loss against clock cycles": ["by_clock/train_loss$"],
        }
    }
    assert len(events.Tensors("custom_scalars__config__")) == 2
