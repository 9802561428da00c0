"""This study compares the bounds of docs/THEORY.md with runs of analog SGD on a problem whose constants are known.

The loss is ½Σλ(w − b)² with Gaussian gradient noise. Gradients are those of d updates ago. The study counts the updates
to an error ε (the squared gradient norm, averaged over the updates so far) with the best learning rate of a grid, and
measures the error at the end of long runs. It asks whether the cost of delay grows with asymmetry. Usage:

    .venv/bin/python scripts/studies/theory_delay.py --folder docs/results
"""

from collections.abc import Sequence
from itertools import product
from math import inf
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimc_pl.figures import GREY, THINGS, shade, styled
from aimc_pl.studies.arguments import sweep_parser
from aimc_pl.studies.rows import Row, curves, select
from aimc_pl.studies.statistics import estimate, half_width
from aimc_pl.studies.sweeps import sweep
from aimc_pl.studies.theory import Layer, Problem, asymptotic_error, updates_bound

CURVATURE, TARGET, NOISE = np.linspace(0.2, 1.0, 8), np.linspace(-0.8, 0.8, 8), 0.5
"""λ and b of the eight weights, and the standard deviation of each weight's gradient."""

RANGES = (2.0, 4.0, inf)
STALENESS = (0, 1, 3, 7, 15)
EPSILONS = tuple(0.5 / 1.4**k for k in range(10))
LEARNING_RATES = np.geomspace(0.8, 0.004, 32)
LATE_RATES = (0.08, 0.02)
"""The learning rates of the long runs. With the longest delay, training diverges above 0.1."""

COPIES = 64
"""The runs whose mean is the expected error of a seed."""


def cases(num_seeds: int, quick: bool) -> list[dict[str, Any]]:
    """Return all combinations of ranges, staleness and seeds. A quick run has 40 updates."""
    return [
        {"tau": tau, "staleness": d, "seed": seed, "num_updates": 40 if quick else 6000}
        for seed, tau, d in product(range(num_seeds), RANGES, STALENESS)
    ]


def run(tau: float, staleness: int, seed: int, num_updates: int) -> list[dict[str, float]]:
    """Return the updates to every error with the best rate, and the errors at the end of runs with fixed rates."""
    errors, largest, decays = train(LEARNING_RATES, tau, staleness, seed, num_updates)
    so_far = np.cumsum(errors, 0) / np.arange(1, num_updates + 1)[:, None]
    reached = [np.where((so_far <= e).any(0), (so_far <= e).argmax(0) + 1.0, inf) for e in EPSILONS]
    errors, *_ = train(np.array(LATE_RATES), tau, staleness, seed, num_updates)
    ends = zip(LATE_RATES, errors[num_updates // 2 :].mean(0), strict=True)
    late = {f"late_{rate}": float(end) for rate, end in ends}
    rows = []
    for epsilon, updates in zip(EPSILONS, reached, strict=True):
        best = int(updates.argmin())
        own = {"epsilon": epsilon, "updates": float(updates[best]), "learning_rate": float(LEARNING_RATES[best])}
        last = int(min(updates[best], num_updates)) - 1
        device = {"saturation": float(largest[last, best]), "decay": float(decays[: last + 1, best].mean())}
        rows.append(own | device | late)
    return rows


def train(
    rates: np.ndarray, tau: float, staleness: int, seed: int, num_updates: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Train with every rate, and return ``(updates, rates)`` of the squared gradient norm and of what the device adds.

    These are the largest weight so far relative to τ, and Σ(wς/τ)². Runs with the same seed draw the same noise.
    """
    rng = np.random.default_rng(seed)
    weights = np.zeros((staleness + 1, len(rates), COPIES, len(TARGET)))  # a ring of the latest weights
    rate = rates[:, None, None]
    errors, largest, decays = np.zeros((3, num_updates, len(rates)))
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(num_updates):
            w, old = weights[k % (staleness + 1)], weights[(k - min(k, staleness)) % (staleness + 1)]
            errors[k] = np.square(CURVATURE * (w - TARGET)).sum(-1).mean(-1)
            largest[k] = np.abs(w).max((1, 2)) / tau
            decays[k] = np.square(w * NOISE / tau).sum(-1).mean(-1)
            g = CURVATURE * (old - TARGET) + NOISE * rng.standard_normal((COPIES, len(TARGET)))
            weights[(k + 1) % (staleness + 1)] = w - rate * (g + np.abs(g) * w / tau)
    return errors, np.maximum.accumulate(largest), decays


def bound(rows: Sequence[Row], epsilon: float, staleness: int) -> float:
    """Return the bound on the updates to an error, or infinity if there is none.

    The gradient is linear in the old weights. The constants of the device are the largest of the given rows.
    """
    saturation, decay = (max(float(row[field]) for row in rows) for field in ("saturation", "decay"))
    if saturation >= 1 or epsilon <= asymptotic_error(decay, saturation):
        return inf
    gap = float(0.5 * (CURVATURE * TARGET**2).sum())
    problem = Problem(gap, float(CURVATURE.max()), len(TARGET) * NOISE**2, saturation, decay)
    layers = [Layer(staleness, problem.smoothness, problem.noise)] if staleness else []
    return updates_bound(epsilon, problem, layers, bend=0.0).updates


def reach(rows: Sequence[Row], tau: float, staleness: int) -> np.ndarray:
    """Return the updates of every seed to every error ``(seeds, errors)``."""
    return curves(select(rows, tau=tau, staleness=staleness), "updates")


def toll(rows: Sequence[Row], tau: float) -> np.ndarray:
    """Return how many updates each update of staleness adds, for every seed and error; NaN where not all get there."""
    updates = np.array([reach(rows, tau, d) for d in STALENESS])
    slopes = np.polyfit(STALENESS, np.where(np.isfinite(updates), updates, 0).reshape(len(STALENESS), -1), 1)[0]
    return np.where(np.isfinite(updates).all((0, 1)), slopes.reshape(updates.shape[1:]), np.nan)


def report(rows: Sequence[Row]) -> None:
    """Print updates beside their bounds, the cost of staleness by range, and the errors of long runs."""
    for tau, d, index in product(RANGES, STALENESS, range(0, len(EPSILONS), 3)):
        epsilon, updates = EPSILONS[index], reach(rows, tau, d)[:, index]
        if np.isfinite(updates).all():
            limit = bound(select(rows, tau=tau, staleness=d, epsilon=epsilon), epsilon, d)
            print(
                f"tau {tau:<4} d {d:<3} e {epsilon:.3f}  {updates.mean():.0f} ± {half_width(updates):.0f} updates, "
                f"bound {limit:.0f}, {limit / updates.mean():.1f} times"
            )
    tolls = {tau: toll(rows, tau) for tau in RANGES}
    for tau, (index, epsilon) in product(RANGES, enumerate(EPSILONS)):
        more = estimate(tolls[tau][:, index])
        joint = estimate(tolls[tau][:, index] - tolls[inf][:, index])
        print(
            f"tau {tau:<4} e {epsilon:.3f}  {more.value:+.2f} [{more.low:+.2f}, {more.high:+.2f}] updates for each "
            f"update of staleness; less those with tau = inf: {joint.value:+.2f} [{joint.low:+.2f}, {joint.high:+.2f}]"
        )
    for rate, tau, d in product(LATE_RATES, RANGES, STALENESS[1:]):
        prompt, late, digital_prompt, digital = (
            curves(select(rows, tau=t, staleness=s), f"late_{rate}")[:, 0]
            for t, s in ((tau, 0), (tau, d), (inf, 0), (inf, d))
        )
        own, joint = estimate((late - prompt) / prompt), estimate((late - prompt) - (digital - digital_prompt))
        print(
            f"rate {rate:<6} tau {tau:<4} d {d:<3}  end {late.mean():.4f}, delay adds {own.value:+.2%} "
            f"[{own.low:+.2%}, {own.high:+.2%}]; beyond what it adds with tau = inf: {joint.value:+.5f} "
            f"[{joint.low:+.5f}, {joint.high:+.5f}]"
        )


@styled
def draw(rows: Sequence[Row]) -> Figure:
    """Draw the updates and their bounds, the cost of staleness by range, and the errors of long runs."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_epsilon, by_range, at_end = figure.subplots(1, 3)
    draw_updates(by_epsilon, rows)
    for color, tau in zip(THINGS, RANGES, strict=False):
        name = f"τ = {tau:g}".replace("inf", "∞")
        values = toll(rows, tau)
        by_range.errorbar(
            EPSILONS, values.mean(0), [half_width(v) for v in values.T], color=color, marker=".", label=name
        )
        late = [curves(select(rows, tau=tau, staleness=d), f"late_{LATE_RATES[0]}")[:, 0] for d in STALENESS]
        ends = [v / late[0] for v in late]
        at_end.errorbar(
            STALENESS, [v.mean() for v in ends], [half_width(v) for v in ends], color=color, marker=".", label=name
        )
    by_range.set(xscale="log", xlabel="ε", ylabel="updates for each\nupdate of staleness")
    by_range.set_title("what delay adds")
    at_end.set(xlabel="staleness", ylabel="error at the end, relative\nto the one without delay")
    at_end.set_title(f"the end, learning rate {LATE_RATES[0]}")
    for axes in (by_range, at_end):
        axes.legend()
    for axes in (by_epsilon, by_range):
        axes.set_xticks(EPSILONS[::3], [f"{epsilon:.2g}" for epsilon in EPSILONS[::3]])
        axes.xaxis.minorticks_off()
        axes.invert_xaxis()
    return figure


def draw_updates(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw the updates with τ = ∞ and their bounds."""
    drawn = STALENESS[::2]
    for index, d in enumerate(drawn):
        color = shade(index, len(drawn))
        width = 1.8 + 2 * (len(drawn) - 1 - index)  # a line that lies on another one is narrower
        axes.plot(EPSILONS, reach(rows, inf, d).mean(0), color=color, linewidth=width, label=f"d = {d}")
        axes.plot(EPSILONS, [bound(select(rows, tau=inf), e, d) for e in EPSILONS], ":", color=color)
    axes.plot([], [], ":", color=GREY, label="bounds")
    axes.set(xscale="log", yscale="log", xlabel="ε", ylabel="updates, best learning rate", title="τ = ∞")
    axes.legend()


def main() -> None:
    """Run the missing cases, print the report and draw the figure."""
    args = sweep_parser(__doc__, seeds=8).parse_args()
    rows = sweep(run, cases(args.seeds, args.quick), args.folder / "theory_delay.csv", args.jobs)
    report(rows)
    draw(rows).savefig(args.folder / "theory_delay.png", dpi=110)


if __name__ == "__main__":
    main()
