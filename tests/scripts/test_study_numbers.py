"""These tests check how the studies of the paper evaluate rows, on rows with known answers."""

from pathlib import Path

import digits_accuracy
import numpy as np
import paper_accuracy
import paper_rate
import paper_stages
import pytest
import yaml

from aimc_pl.studies.rows import read_rows

ROOT = Path(__file__).parents[2]


def as_text(rows):
    return [{key: str(value) for key, value in row.items()} for row in rows]


def test_speedup_is_the_ratio_of_cycles_to_the_target():
    """Check rows whose accuracies rise evenly, a quarter of an epoch later with the second seed.

    The crossings of the target are then known in closed form.
    """
    curves = {("sync", 4): (0.2, 0.4, 0.6, 0.8), ("async", 4): (0.1, 0.3, 0.5, 0.7), ("async", 8): (0.1, 0.2, 0.3, 0.4)}
    rows = as_text(
        {
            "seed": seed,
            "kind": "analog",
            "schedule": schedule,
            "num_stages": num_stages,
            "accuracy": accuracy - 0.05 * seed,
        }
        | {"mini_batches": 10 * (epoch + 1), "cycles": 85 * (epoch + 1)}
        for (schedule, num_stages), values in curves.items()
        for seed in (0, 1)
        for epoch, accuracy in enumerate(values)
    )
    target = 0.55
    alone = [10 * epochs * 2 * 4 * 4 for epochs in (2.75, 3.0)]  # A mini-batch has 2MB cycles.
    ours = [85 * epochs for epochs in (3.25, 3.5)]
    assert paper_accuracy.speedups(rows, target, "analog", "none", 4) == pytest.approx([1, 1])
    assert paper_accuracy.speedups(rows, target, "analog", "sync", 4) == pytest.approx([4 * 4 / 7] * 2)
    assert paper_accuracy.speedups(rows, target, "analog", "async", 4) == pytest.approx(np.divide(alone, ours))
    assert np.isnan(paper_accuracy.speedups(rows, target, "analog", "async", 8)).all()


def test_updates_and_cycles_relative_to_one_stage():
    updates = {(1, "half"): (100, 200), (8, "half"): (150, 200), (8, "full"): (200, np.inf)}
    rows = as_text(
        {"num_stages": m, "duplex": duplex, "tau": 4.0, "seed": s, "metric": "loss", "target": 0.5, "updates": u}
        for (m, duplex), values in updates.items()
        for s, u in enumerate(values)
    )
    relative, saved = (
        {duplex: function(rows, "loss", 0.5, 8, duplex=duplex, tau=4.0) for duplex in ("half", "full")}
        for function in (paper_stages.relative, paper_stages.saved)
    )
    np.testing.assert_allclose(relative["half"], [1.5, 1.0])
    np.testing.assert_allclose(relative["full"], [2.0, np.inf])
    # Without a pipeline K updates take 2·8·K cycles, and with one 2(K + 7) or, in full duplex, 2(K + 14).
    np.testing.assert_allclose(saved["half"], [1600 / 314, 3200 / 414])
    np.testing.assert_allclose(saved["full"], [1600 / 428, np.nan])


def test_errors_count_above_the_floor_where_every_seed_gets_there():
    epsilons, floor = (1.0, 0.5, 0.25, 0.1), 0.1
    updates = {0: (10, 20, 40, 90), 1: (11, 21, np.inf, np.inf)}
    rows = as_text(
        {"problem": "mlp", "num_stages": 4, "tau": 8.0, "noise": 0.3, "seed": seed, "epsilon": epsilon, "updates": u}
        | {"floor_stationary": floor}
        for seed, values in updates.items()
        for epsilon, u in zip(epsilons, values, strict=True)
    )
    epsilon, reached = paper_rate.reach(rows, "mlp", 4, 8.0, 0.3)
    np.testing.assert_allclose(epsilon, [0.9, 0.4])
    np.testing.assert_array_equal(reached, [[10, 20], [11, 21]])


@pytest.mark.parametrize("schedule", ["none", "sync", "async"])
def test_the_digits_configs_are_what_the_study_has_measured(schedule):
    config = yaml.safe_load((ROOT / "configs" / f"digits_{schedule}.yaml").read_text())
    model, strategy = config["model"]["init_args"], config["trainer"]["strategy"]["init_args"]
    assert model["optimizer"]["init_args"]["lr"] == digits_accuracy.LEARNING_RATE
    assert model["lr_scheduler"]["class_path"].endswith(".CosineAnnealingLR")
    assert model["lr_scheduler"]["init_args"]["T_max"] == "${trainer.max_epochs}"
    assert config["trainer"]["max_epochs"] == digits_accuracy.EPOCHS
    assert strategy["device"]["init_args"] == {"tau": 4.0, "num_states": 1200}


def test_the_demo_reaches_its_goal_with_19_of_20_seeds():
    rows = read_rows(ROOT / "docs" / "results" / "digits_accuracy.csv")
    accuracies = [float(row["accuracy"]) for row in rows if row["run"] == "async"]
    assert len(accuracies) == 20
    assert sum(accuracy >= digits_accuracy.GOAL for accuracy in accuracies) >= 19
