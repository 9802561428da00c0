"""This module chooses learning rates on a grid that grows until the best rate is inside."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aimc_pl.studies.rows import Row, select
from aimc_pl.studies.sweeps import sweep


def tune(
    run: Callable[..., Sequence[Row]],
    settings: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    rates: Sequence[float],
    score: Callable[[Sequence[Row]], float],
    path: Path,
    jobs: int | None = None,
) -> list[float]:
    """Return the learning rate with the highest score for each setting.

    A setting whose best rate is the smallest or the largest of its grid gets a further one, half or twice as large,
    until the best rate is inside. The runs go through :func:`aimc_pl.studies.sweeps.sweep`, so a stopped tuning goes
    on where it was. With a single rate there is nothing to choose, and nothing runs.

    Args:
        run: the function of the study. It is called with the items of a setting, ``learning_rate`` and ``seed``.
        settings: what the rates are chosen for. All have the same keys.
        seeds: the seeds of the tuning. The study should report other ones.
        rates: the grid from which each setting starts.
        score: a function of the rows of a setting with one rate.
        path: the CSV file of the study.
        jobs: number of runs at a time; by default one per core.
    """
    if len(rates) == 1:
        return list(rates) * len(settings)
    grids = [sorted(rates) for _ in settings]
    while True:
        cases = [
            {**setting, "learning_rate": rate, "seed": seed}
            for setting, grid in zip(settings, grids, strict=True)
            for rate in grid
            for seed in seeds
        ]
        rows = sweep(run, cases, path, jobs)
        scores = [
            {rate: score(select(rows, **setting, learning_rate=rate)) for rate in grid}
            for setting, grid in zip(settings, grids, strict=True)
        ]
        missing = [missing_rate(each) for each in scores]
        if not any(missing):
            return [max(each, key=each.__getitem__) for each in scores]
        for grid, rate in zip(grids, missing, strict=True):
            grid += [rate] if rate else []


def missing_rate(scores: Mapping[float, float]) -> float | None:
    """Return the rate that a grid lacks because its best one is at an edge, or ``None`` if the best one is inside.

    Args:
        scores: the score of each rate.
    """
    best = max(scores, key=scores.__getitem__)
    if best == min(scores):
        return best / 2
    return best * 2 if best == max(scores) else None
