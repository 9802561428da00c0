"""These tests run a small config over grids, in one process and in two, and look at results and figure."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.pyplot import imread

from aimc_pl.cli import main
from aimc_pl.errors import UsageError
from aimc_pl.runs import history
from aimc_pl.studies import grids
from aimc_pl.studies.grids import draw_grid, run_grid
from aimc_pl.studies.rows import read_rows, select

SMALL = {"trainer.max_epochs": [1], "trainer.limit_train_batches": [2], "trainer.log_every_n_steps": [1]}
STRATEGY = "trainer.strategy.init_args"
DEVICE = f"{STRATEGY}.device.init_args.tau"


@pytest.mark.slow
def test_a_stopped_grid_goes_on_and_every_run_has_its_folder(tmp_path):
    grid = {DEVICE: [1.0, 2.0], "seed_everything": [0, 1], **SMALL}
    first = run_grid("digits_async.yaml", {**grid, "seed_everything": [0]}, tmp_path, jobs=1)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/metrics.csv")}
    assert len(times) == 2
    rows = run_grid("digits_async.yaml", grid, tmp_path, jobs=1)
    assert len(rows) == 4
    assert all(row in rows for row in first)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    folders = [*tmp_path.glob("runs/*")]
    assert len(folders) == 4
    for folder in folders:
        assert "clock cycles on 4 accelerators" in (folder / "output.txt").read_text()
        assert (folder / "checkpoints" / "last.ckpt").exists()
    logged = sorted(next(row for row in history(path) if "test/loss" in row)["test/loss"] for path in folders)
    np.testing.assert_allclose(sorted(float(row["test/loss"]) for row in rows), logged)
    assert len(set(logged)) == 4
    # 2 mini-batches of 4 micro-batches take 2 cycles each, and fill and drain 6 more.
    assert {float(row["clock/cycles"]) for row in rows} == {22.0}


@pytest.mark.slow
def test_a_refused_run_ends_the_sweep_in_a_line_and_finished_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["aimc-pl"])
    arguments = [f"--grid={key}={values}" for key, values in SMALL.items()]
    grid = f'--grid={STRATEGY}.split_at=["cost", ["network.3", "network.5", "nowhere"]]'
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "digits_async.yaml", grid, *arguments, "--jobs=1", f"--folder={tmp_path}"])
    assert str(stop.value).startswith("aimc-pl: error: ")
    assert "split_at names 'nowhere'" in str(stop.value)
    assert "\n" not in str(stop.value)
    assert len(read_rows(tmp_path / "results.csv")) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"trainer.max_epoch": "[1]"}, "--trainer.max_epoch is no argument: did you mean --trainer.max_epochs?"),
        ({"trainer.max_epochs": "[1, 2, many]"}, "trainer.max_epochs: expected int or null, got many"),
        (
            {f"{STRATEGY}.num_microbatches": "[1, 2]", DEVICE: "[1, 2, -1]"},
            "tau must be a finite number above 0 and at most",
        ),
        (
            {f"{STRATEGY}.num_microbatches": "[1, 5000]"},
            "a mini-batch of 32 samples cannot be split into num_microbatches=5000",
        ),
        ({f"{STRATEGY}.num_stages": "[4, 3]"}, "num_stages=3 needs 2 names in split_at, got 3"),
        ({"ckpt_path": "[null, nowhere.ckpt]"}, "ckpt_path=nowhere.ckpt: cannot read checkpoint nowhere.ckpt: No such"),
        ({"seed_everything": "[0, -3]"}, "seed_everything=-3: -3 is not in bounds"),
        (
            {"model.init_args.optimizer.init_args.lr": "[0.1, -1]"},
            "model.init_args.optimizer.init_args.lr=-1: optimizer cannot be made: Invalid learning rate: -1.0",
        ),
    ],
)
def test_a_value_that_cannot_work_is_refused_before_the_first_run(grid, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["aimc-pl"])
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "digits_async.yaml", *(f"--grid={key}={values}" for key, values in grid.items())])
    assert stop.value.code.startswith(f"aimc-pl: error: {message}")
    assert "\n" not in stop.value.code
    assert len(stop.value.code) <= 200
    assert capsys.readouterr() == ("", "")
    assert not [*Path().iterdir()]


@pytest.fixture
def fake_runs(monkeypatch):
    """Runs that are not run, but remembered, of a config ``mine.yaml``."""
    runs = []
    monkeypatch.setattr(grids._Fit, "check", lambda self, new, **case: None)
    monkeypatch.setattr(grids, "history", lambda folder: [{"val/loss": 1}])
    monkeypatch.setattr("aimc_pl.cli.main", runs.append)
    Path("mine.yaml").write_text("trainer: {max_epochs: 1, callbacks: [A]}\nmodel: Net\n")
    return runs


@pytest.mark.parametrize(
    ("content", "changed"),
    [
        ("trainer: {max_epochs: 2, callbacks: [A]}\nmodel: Net\n", "trainer.max_epochs"),
        ("trainer: {max_epochs: 1, callbacks: [B]}\nmodel: {a: 1}\n", "model, model.a, trainer.callbacks"),
        ("trainer: {max_epochs: 1, callbacks: [A]}\nmodel: Net\ndata: null\n", "data"),
        ("model: Net\n# A comment.\ntrainer:\n  max_epochs: 1\n  callbacks:\n  - A\n", None),
    ],
)
def test_a_config_that_has_changed_since_its_runs_is_refused(content, changed, fake_runs):
    Path("other.yaml").write_text("seed_everything: 1")
    run_grid("other.yaml", {"a": [1]}, Path("results"), jobs=1)
    run_grid("mine.yaml", {"a": [1]}, Path("results"), jobs=1)
    Path("mine.yaml").write_text(content)
    if changed:
        with pytest.raises(UsageError) as error:
            run_grid("mine.yaml", {"a": [1, 2]}, Path("results"), jobs=1)
        assert str(error.value).startswith(f"mine.yaml has changed since its runs in results, in {changed}: undo that")
        assert len(str(error.value)) <= 200
        assert len(fake_runs) == 2
        run_grid("mine.yaml", {"a": [1, 2]}, Path("elsewhere"), jobs=1)
        assert len(fake_runs) == 4
    else:
        assert len(run_grid("mine.yaml", {"a": [1, 2]}, Path("results"), jobs=1)) == 2
        assert len(fake_runs) == 3
    assert len(run_grid("other.yaml", {"a": [1]}, Path("results"), jobs=1)) == 1


def test_a_config_that_changes_while_its_sweep_runs_is_refused(fake_runs, monkeypatch):
    monkeypatch.setattr("aimc_pl.cli.main", lambda args: Path("mine.yaml").write_text("model: Other"))
    with pytest.raises(UsageError, match=r"mine\.yaml has changed since its runs in .*, in model, trainer.callbacks"):
        run_grid("mine.yaml", {"a": [1, 2]}, Path("results"), jobs=1)
    assert [row["a"] for row in read_rows(Path("results/results.csv"))] == ["1"]


def test_results_of_an_unknown_config_are_refused(fake_runs):
    run_grid("mine.yaml", {"a": [1]}, Path("results"), jobs=1)
    Path("results/results.yaml").unlink()
    with pytest.raises(UsageError, match=r"results does not say with which mine\.yaml its results were made"):
        run_grid("mine.yaml", {"a": [1]}, Path("results"), jobs=1)


def test_every_new_value_is_checked_once_and_only_in_runs_that_are_missing(tmp_path, monkeypatch):
    Path("x.yaml").write_text("model: Net")
    checked = []
    monkeypatch.setattr(grids._Fit, "check", lambda self, new, **case: checked.append(new))
    monkeypatch.setattr(grids._Fit, "__call__", lambda self, **case: [{"val/loss": 1}])
    grid = {"a": [1, 2], "b": [3, 4, 5]}
    run_grid("x.yaml", grid, tmp_path, jobs=1)
    assert checked == [{"config": "x.yaml", "a": "1", "b": "3"}, {"b": "4"}, {"b": "5"}, {"a": "2"}]
    checked.clear()
    run_grid("x.yaml", grid, tmp_path, jobs=1)
    assert not checked
    run_grid("x.yaml", grid | {"a": [1, 6]}, tmp_path, jobs=1)
    assert checked == [{"config": "x.yaml", "a": "6", "b": "3"}, {"b": "4"}, {"b": "5"}]


def test_a_second_sweep_in_a_folder_is_refused(tmp_path, monkeypatch):
    def run_another(*arguments):
        with pytest.raises(UsageError, match=r"another sweep runs in .*: wait until it has ended"):
            run_grid("digits_async.yaml", {"trainer.max_epochs": [1]}, tmp_path)
        return ["ran"]

    monkeypatch.setattr(grids._Fit, "check", lambda *args, **values: None)
    monkeypatch.setattr(grids, "sweep", run_another)
    assert run_grid("digits_async.yaml", {"trainer.max_epochs": [1]}, tmp_path) == ["ran"]


@pytest.mark.slow
def test_the_commands_write_a_table_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["aimc-pl"])
    arguments = [f"--grid={key}={values}" for key, values in SMALL.items()]
    main(["sweep", "digits_async.yaml", f"--grid={DEVICE}=[1.0, 2.0]", *arguments, "--jobs=1", "--metric=val/loss"])
    folder = tmp_path / "sweeps" / "digits_async"
    assert "2 runs in sweeps/digits_async/results.csv" in capsys.readouterr().out
    assert imread(folder / "results.png").std() > 0.01
    runs = sorted(map(str, folder.glob("runs/*")))
    main(["compare", *runs, "--metric=val/loss", "--png=compare.png"])
    metric, *lines = capsys.readouterr().out.splitlines()
    assert metric == "val/loss"
    assert [line.split()[0].partition(",")[0] for line in lines] == ["run", "tau=1.0", "tau=2.0"]
    assert [line.split()[-1] for line in lines] == ["cycles", "22", "22"]
    assert imread("compare.png").std() > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid=lr"], r"must be KEY=\[VALUE, ...\], got 'lr'"),
        (["--grid=lr=0.1"], r"must be KEY=\[VALUE, ...\], got 'lr=0.1'"),
        (["--grid=lr=[]"], r"must be KEY=\[VALUE, ...\]"),
        (["--grid=lr=[1"], r"must be KEY=\[VALUE, ...\]"),
        (["--grid=lr=[1]", "--jobs=0"], "must be a whole number of at least 1, got '0'"),
        ([], "required: --grid"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["aimc-pl"])
    with pytest.raises(SystemExit, match=message):
        main(["sweep", "digits_async.yaml", *arguments])


ROWS = [
    {"tau": tau, "schedule": schedule, "seed_everything": seed, "epochs": "5", "acc": str(float(tau) + seed)}
    for tau in ("1", "2")
    for schedule in ("sync", "async")
    for seed in (0, 1)
]


def test_the_figure_has_means_over_seeds_and_lines_for_the_other_keys():
    axes = draw_grid(ROWS, ["epochs", "tau", "seed_everything", "schedule"], "acc").axes[0]
    assert axes.get_legend_handles_labels()[1] == ["schedule sync", "schedule async"]
    assert axes.get_xlabel() == "tau"
    for container in axes.containers:
        line, _, (bars,) = container
        np.testing.assert_allclose(line.get_xydata(), [[1, 1.5], [2, 2.5]])
        # Student's t for 95 % and one degree of freedom, times the standard error of two seeds that are 1 apart.
        np.testing.assert_allclose([np.ptp(bar[:, 1]) for bar in bars.get_segments()], 2 * 12.7062 * 0.5, rtol=1e-5)
    words = draw_grid(select(ROWS, tau="1"), ["schedule", "tau"], "acc").axes[0]
    assert [label.get_text() for label in words.get_xticklabels()] == ["sync", "async"]


def test_an_unknown_metric_is_refused():
    rows = [row | {"val/loss": "1"} for row in ROWS]
    with pytest.raises(UsageError, match="no metric 'loss': choose one of val/loss"):
        draw_grid(rows, ["tau"], "loss")
