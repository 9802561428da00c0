"""These tests read back what runs have logged, and look at the lines of the figure."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_modules import make_trainer

import aimc_pl
from aimc_pl.callbacks import ClockMonitor, RunBoard, RunTable, StalenessMonitor
from aimc_pl.data import Digits
from aimc_pl.errors import UsageError
from aimc_pl.figures import BLUE, ORANGE, SCHEDULES
from aimc_pl.models import MLP
from aimc_pl.runs import compare, draw_runs, history, names_of
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.tasks import Classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train for two epochs of 12 mini-batches of 4 micro-batches in 2 stages, with four loggers."""
    folder = tmp_path_factory.mktemp("logs")
    torch.manual_seed(0)
    trainer = make_trainer(
        AnalogPipelineStrategy(2, "async", 4, split_at=["network.3"]),
        max_epochs=2,
        limit_train_batches=12,
        log_every_n_steps=5,
        logger=[
            TensorBoardLogger(folder, "tensorboard"),
            CSVLogger(folder, "csv"),
            RunTable(folder, "tensorboard"),
            RunBoard(folder, "board"),
        ],
        callbacks=[ClockMonitor(), StalenessMonitor()],
    )
    trainer.fit(Classifier(MLP([64, 8, 10])), Digits())
    return folder


def test_the_table_has_steps_metrics_cycles_and_staleness(folder):
    rows = history(folder / "csv")
    assert [row["step"] for row in rows] == [4, 9, 11, 14, 19, 23]
    epochs = [row for row in rows if "val/accuracy" in row]
    assert [row["epoch"] for row in epochs] == [0, 1]
    # 48 micro-batches of an epoch take 2 cycles each, and a fill and drain 2 more.
    assert [row["clock/cycles"] for row in epochs] == [2 * 48 + 2, 2 * (2 * 48 + 2)]
    assert [row["staleness/max_stage_0"] for row in rows if "staleness/max_stage_0" in row] == [1.0] * 4
    assert all("time" not in row for row in rows)


@pytest.mark.parametrize(
    ("name", "only"), [("tensorboard", "metrics.csv"), ("tensorboard", "events.*"), ("board", "*")]
)
def test_every_logger_gives_the_same_table(name, only, folder, tmp_path):
    for path in Path(folder, name, "version_0").glob(only):
        (tmp_path / path.name).symlink_to(path)
    rows, expected = history(tmp_path), history(folder / "csv")
    assert [row["step"] for row in rows if "step" in row] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        times = row.pop("time")
        assert 0 <= times < 1000
        row.pop("hp_metric", None)
        assert row == pytest.approx(other, rel=1e-6)


def test_time_never_falls(folder):
    times = [row["time"] for row in history(folder / "tensorboard")]
    assert all(before <= after for before, after in pairwise(times))
    assert times[-1] > times[0]


def test_the_newest_version_and_single_files_are_read(tmp_path):
    for version in (2, 10):
        path = tmp_path / f"version_{version}" / "metrics.csv"
        path.parent.mkdir()
        path.write_text(f"epoch,step,loss\n0,0,{version}\n,1,\n")
    assert history(tmp_path) == [{"step": 0, "epoch": 0.0, "loss": 10.0}, {"step": 1}]
    assert history(tmp_path / "version_2" / "metrics.csv")[0]["loss"] == 2.0


def test_the_newest_version_that_trained_is_read(folder, tmp_path):
    """Check after a validation and a test, with and without steps of training, and an empty folder."""
    for name in ("csv", "tensorboard"):
        logs = tmp_path / name
        (logs / "version_0").mkdir(parents=True)
        with pytest.raises(UsageError, match=f"no run in {logs} has trained: give the folder of a run, such as"):
            history(logs)
        for path in (folder / name / "version_0").glob("*.*"):
            (logs / "version_0" / path.name).symlink_to(path)
        expected = history(logs / "version_0")
        for evaluation in ("validate", "test"):
            logger = (CSVLogger if name == "csv" else TensorBoardLogger)(tmp_path, name)
            trainer = make_trainer(AnalogPipelineStrategy(2), logger=logger)
            getattr(trainer, evaluation)(Classifier(MLP([64, 8, 10])), Digits(), verbose=False)
            assert "test/loss" in history(logger.log_dir)[0] or "val/loss" in history(logger.log_dir)[0]
        (logs / "version_3").mkdir()
        assert history(logs) == expected
    # A fit of one step is known by its checkpoints.
    (tmp_path / "short" / "version_0" / "checkpoints").mkdir(parents=True)
    (tmp_path / "short" / "version_0" / "metrics.csv").write_text("step,loss\n0,1\n")
    assert history(tmp_path / "short") == [{"step": 0, "loss": 1.0}]


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "words.csv").write_text("step,a\n1,2\nlast,3\n")
    (tmp_path / "long.csv").write_text("step,a\n1,2,3\n")
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\xff")
    (tmp_path / "notes.txt").write_text("nothing of a run")
    refusals = {
        "none": "does not exist",
        "empty": "no event files",
        "other.csv": "no column step",
        "words.csv": r"words\.csv is no table of a run: invalid literal for int\(\) with base 10: 'last'",
        "long.csv": r"long\.csv is no table of a run: ",
        "picture.csv": r"picture\.csv is no table of a run: .* can't decode",
        "notes.txt": r"notes\.txt has no values of a run: give the folder of a run",
    }
    for name, message in refusals.items():
        with pytest.raises(UsageError, match=message):
            history(tmp_path / name)


def test_the_lines_are_the_metric_against_epochs_and_cycles(folder):
    figure = compare([folder / "csv" / "version_0", folder / "tensorboard" / "version_0"])
    epochs, cycles = figure.axes
    assert (epochs.get_xlabel(), cycles.get_xlabel()) == ("epochs", "clock cycles")
    assert all(tick == int(tick) for tick in epochs.get_xticks())
    accuracy = [row["val/accuracy"] for row in history(folder / "csv") if "val/accuracy" in row]
    for axes, x in ((epochs, [1, 2]), (cycles, [98, 196])):
        assert [line.get_label() for line in axes.lines] == ["csv", "tensorboard"]
        for line in axes.lines:
            np.testing.assert_allclose(line.get_xydata(), np.transpose([x, accuracy]), rtol=1e-6)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["csv", "tensorboard"]


def test_seconds_and_joules_are_drawn_where_they_are_and_keep_their_colours():
    plain = [{"step": 1, "epoch": 0, "loss": 3.0}]
    costly = [{"step": 1, "epoch": 0, "clock/seconds": 0.5, "clock/joules": 2.0, "loss": 4.0}, {"step": 2, "loss": 1.0}]
    figure = draw_runs({"plain": plain, "costly": costly}, "loss")
    assert [axes.get_xlabel().split()[0] for axes in figure.axes] == ["epochs", "seconds", "joules"]
    assert [[line.get_color() for line in axes.lines] for axes in figure.axes] == [[BLUE, ORANGE], [ORANGE], [ORANGE]]
    assert figure.axes[2].lines[0].get_xydata().tolist() == [[2.0, 4.0]]


def test_schedules_have_their_colours_where_the_names_tell_them_apart():
    row = {"step": 1, "epoch": 0, "loss": 3.0}
    colours = {
        ("digits_sync", "digits_async"): [SCHEDULES["sync"], SCHEDULES["async"]],
        ("none/version_0", "1f1b"): [SCHEDULES["none"], SCHEDULES["1f1b"]],
        ("async 1", "async 2"): [BLUE, ORANGE],
        ("async", "mine"): [BLUE, ORANGE],
        ("nonesuch", "syncope"): [BLUE, ORANGE],
        ("async_sync", "mine"): [BLUE, ORANGE],
    }
    for names, expected in colours.items():
        (axes,) = draw_runs({name: [row] for name in names}, "loss").axes
        assert [line.get_color() for line in axes.lines] == expected, names


def test_an_unknown_metric_is_refused(folder):
    with pytest.raises(UsageError, match=r"no run has metric 'accuracy': choose one of .*clock/cycles") as error:
        compare([folder / "csv"], "accuracy")
    assert len(str(error.value)) <= 200
    assert "choose one of val/accuracy, val/loss, train/accuracy, train/loss" in str(error.value)
    with pytest.raises(UsageError, match=r"runs must be a mapping from names to histories, got \[{") as error:
        draw_runs(history(folder / "csv"), "accuracy")
    assert len(str(error.value)) <= 200
    with pytest.raises(UsageError, match=r"give at least one run to compare, such as compare"):
        compare([])
    with pytest.raises(UsageError, match=r"no run has metric 'a': 1 runs have logged nothing"):
        draw_runs({"empty": []}, "a")


def test_names_leave_out_what_all_paths_share():
    paths = [Path("logs/a/version_0"), Path("logs/b/version_0")]
    assert names_of(paths) == {"a": paths[0], "b": paths[1]}
    paths = [Path("logs/a/version_0"), Path("logs/a/version_1"), Path("logs/a/version_1/x")]
    assert [*names_of(paths)] == ["version_0", "version_1", "version_1/x"]
    assert [*names_of([Path("logs/a")])] == ["a"]


def test_a_run_that_replaces_a_table_is_still_warned_about(tmp_path):
    for expected in (False, True):
        logger = RunTable(tmp_path, "a", version="")
        if expected:
            with pytest.warns(UserWarning, match="exists and is not empty"):
                logger.log_metrics({"x": 1.0}, 0)
        else:
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "config.yaml").touch()
            logger.log_metrics({"x": 1.0}, 0)
        logger.save()
    assert history(tmp_path / "a")[0]["x"] == 1.0


def test_the_package_has_the_functions_for_runs():
    assert aimc_pl.history is history
    assert aimc_pl.compare is compare
    with pytest.raises(AttributeError, match="module 'aimc_pl' has no attribute 'draw'"):
        aimc_pl.draw  # noqa: B018, the attribute is not there
