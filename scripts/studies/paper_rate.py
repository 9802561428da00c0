"""This study measures the convergence rate: the squared gradient norm against updates, with and without delay.

There are two problems: a linear network of eight layers, whose expected loss has a closed form, and an MLP on real
digits, whose full gradient is summed over all images. Every update takes one sample, is therefore of rank one, and
moves the weights by the paper's expected motion. The noise is that of the samples and their labels. Copies with
different learning rates, dynamic ranges τ, label noises and seeds run side by side. Usage:

    .venv/bin/python scripts/studies/paper_rate.py --folder docs/results
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from math import inf
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, Locator, LogLocator, NullLocator
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn

from aimc_pl.figures import BLACK, ORANGE, RED, shade, styled
from aimc_pl.studies.arguments import sweep_parser
from aimc_pl.studies.ensemble import Crossbars, EnsemblePipeline
from aimc_pl.studies.rows import Row, curves, select
from aimc_pl.studies.statistics import Estimate, estimate, half_width
from aimc_pl.studies.sweeps import sweep
from aimc_pl.studies.theory import asymptotic_error, fit_complexity, fit_exponent, stationary_error

STAGES = {"linear": (1, 2, 4, 8), "mlp": (1, 4)}
UPDATES = {"linear": 40_000, "mlp": 30_000}
LEARNING_RATES = {"linear": [0.02 / 1.5**k for k in range(12)], "mlp": [0.1 / 1.5**k for k in range(12)]}
RANGES = {"linear": (4.0, 8.0, 16.0, inf), "mlp": (4.0, 8.0, 16.0, inf)}
NOISES = {"linear": (0.1, 0.5), "mlp": (0.3, 1.0)}
SHOWN = {"linear": 0.5, "mlp": 0.3}
"""The label noise of the runs in the figure."""

EPSILONS = {"linear": np.geomspace(4, 0.04, 15), "mlp": np.geomspace(1, 0.02, 14)}
EVERY = {"linear": 20, "mlp": 100}
"""The number of updates from one full gradient to the next."""

ABOVE_FLOOR = 2
"""Only errors above this multiple of the floor are fitted."""

SMALLEST = 6
"""The exponent is fitted to this many of the smallest errors."""


def cases(num_seeds: int, quick: bool) -> list[dict[str, Any]]:
    """Return all combinations of problems and stages. A quick run has digits only and a twentieth of the updates."""
    updates = {"mlp": UPDATES["mlp"] // 20} if quick else UPDATES
    return [
        {"problem": problem, "num_stages": m, "num_updates": num_updates, "num_seeds": num_seeds}
        for problem, num_updates in updates.items()
        for m in STAGES[problem]
    ]


class Problem(ABC):
    """A regression problem.

    Attributes:
        sizes: numbers of features before, between and after the layers.
        activation: between the layers.
        gain: standard deviation of the first weights, and the value that is added to their diagonal.
    """

    sizes: Sequence[int]
    activation: type[nn.Module]
    gain: tuple[float, float]

    @abstractmethod
    def sample(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return inputs ``(count, 1, in)`` and their labels without noise."""

    @abstractmethod
    def loss(self, weights: Sequence[Tensor]) -> Tensor:
        """Return the expected loss ``(copies,)``, without the part that label noise adds."""

    def gradient(self, layers: Sequence[Crossbars]) -> list[Tensor]:
        """Return the full gradient of every layer."""
        weights = [layer.weight.detach().requires_grad_() for layer in layers]
        return list(torch.autograd.grad(self.loss(weights).sum(), weights))


class LinearNetwork(Problem):
    """Eight linear layers that learn a rotation R by less than 90°.

    For inputs x with E[xxᵀ] = 1 the loss is ½‖W₈…W₁ − R‖².
    """

    def __init__(self) -> None:
        self.sizes = [8] * 9
        self.activation = nn.Identity
        self.gain = (0.05, 1.0)
        skew = torch.randn(8, 8, generator=Generator().manual_seed(0)) / 4
        self.target = torch.matrix_exp(skew - skew.T)

    def sample(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See :class:`Problem`."""
        x = torch.randn(count, 1, 8, generator=generator)
        return x, x @ self.target.T

    def loss(self, weights: Sequence[Tensor]) -> Tensor:
        """See :class:`Problem`."""
        chain = weights[0]
        for weight in weights[1:]:
            chain = weight @ chain
        return (chain - self.target).square().sum((1, 2)) / 2


class DigitsNetwork(Problem):
    """Four layers with tanh that learn the classes of 256 digits of 4x4 pixels by squared error."""

    def __init__(self) -> None:
        self.sizes = [16, 16, 16, 16, 10]
        self.activation = nn.Tanh
        self.gain = (0.25, 0.0)
        data: Any = load_digits()
        images = F.avg_pool2d(torch.from_numpy(data.images[:256]).float(), 2).flatten(1)
        self.x = (images - images.mean(0)) / images.std()
        self.y = F.one_hot(torch.from_numpy(data.target[:256])).float()

    def sample(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See :class:`Problem`."""
        chosen = torch.randint(len(self.x), (count, 1), generator=generator)
        return self.x[chosen], self.y[chosen]

    def loss(self, weights: Sequence[Tensor]) -> Tensor:
        """See :class:`Problem`."""
        h = self.x
        for weight in weights[:-1]:
            h = torch.tanh(h @ weight.mT)
        return (h @ weights[-1].mT - self.y).square().sum(2).mean(1) / 2


PROBLEMS = {"linear": LinearNetwork, "mlp": DigitsNetwork}


class Copies:
    """The copies of a problem's network, each with its own learning rate, range, noise and seed."""

    def __init__(self, name: str, num_seeds: int) -> None:
        self.problem = problem = PROBLEMS[name]()
        self.num_seeds = num_seeds
        self.settings = list(product(LEARNING_RATES[name], RANGES[name], NOISES[name], range(num_seeds)))
        self.rate, tau, self.noise = (
            torch.tensor(column).view(-1, 1, 1) for column in list(zip(*self.settings, strict=True))[:3]
        )
        self.tau = tau
        self.seed = torch.arange(num_seeds).repeat(len(self.settings) // num_seeds)
        self.generator = Generator().manual_seed(0)
        std, diagonal = problem.gain
        self.layers = []
        for size, out_size in pairwise(problem.sizes):
            weight = std * torch.randn(num_seeds, out_size, size, generator=self.generator)
            weight += diagonal * torch.eye(out_size, size)
            self.layers.append(Crossbars(weight[self.seed], self.generator, tau))

    def pipeline(self, num_stages: int) -> EnsemblePipeline:
        """Return a pipeline of the layers. With one stage it has no delay."""
        modules = [nn.Sequential(layer, self.problem.activation()) for layer in self.layers[:-1]] + [self.layers[-1]]
        return EnsemblePipeline(modules, num_stages, self.rate)

    def batch(self, count: int = 1) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return noisy samples and their loss function. Copies with the same seed get the same samples."""
        x, y = self.problem.sample(self.num_seeds * count, self.generator)
        noise = torch.randn(y.shape, generator=self.generator)
        x, y, noise = (value.view(self.num_seeds, count, -1)[self.seed] for value in (x, y, noise))
        labels = y + self.noise * noise
        return x, lambda output: (output - labels).square().sum((1, 2)) / 2

    def magnitude_and_variance(self, count: int = 1000) -> tuple[list[Tensor], Tensor]:
        """Return E|g| of every layer, and the variance of the gradient g summed over all weights ``(copies,)``."""
        output, loss = self.batch(count)
        for layer in self.layers[:-1]:
            output = self.problem.activation()(layer(output))
        loss(self.layers[-1](output)).sum().backward()
        magnitudes, second = [], torch.zeros(len(self.seed))
        for layer in self.layers:
            ((x, error),) = layer.pending
            layer.pending.clear()
            magnitudes.append(error.abs().mT @ x.abs() / count)
            second += (error.square().sum(2) * x.square().sum(2)).mean(1)
        gradients = self.problem.gradient(self.layers)
        return magnitudes, second - squared_norm(gradients)


def squared_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the squared norm of the gradients, summed over the layers ``(copies,)``."""
    return torch.stack([gradient.square().sum((1, 2)) for gradient in gradients]).sum(0)


def run(problem: str, num_stages: int, num_updates: int, num_seeds: int) -> list[dict[str, Any]]:
    """Train all copies and return how many updates they take to each error ε.

    The error is the squared gradient norm, averaged over the updates so far. There is a row for every ε, range, noise
    and seed, and its updates are those with the best learning rate. With one stage there is no delay.
    """
    torch.set_flush_denormal(True)
    rates, epsilons, every = LEARNING_RATES[problem], EPSILONS[problem], EVERY[problem]
    copies = Copies(problem, num_seeds)
    pipeline = copies.pipeline(num_stages)
    total = torch.zeros(len(copies.seed), dtype=torch.float64)
    late = torch.zeros(len(copies.seed), dtype=torch.float64)
    reached = torch.full((len(copies.seed), len(epsilons)), inf, dtype=torch.float64)
    for update in range(0, num_updates, every):
        error = squared_norm(copies.problem.gradient(copies.layers))
        total += error
        late += error * (update >= num_updates * 3 // 4)
        mean = total / (update // every + 1)
        reached = torch.where((mean[:, None] <= torch.tensor(epsilons)) & reached.isinf(), update + every, reached)
        pipeline.run([copies.batch() for _ in range(every)])
    pipeline.drain()
    late /= len(range(0, num_updates, every)) / 4
    magnitudes, variance = copies.magnitude_and_variance()
    weights = [layer.weight.detach() for layer in copies.layers]
    each = [stationary_error(w, g, copies.tau) for w, g in zip(weights, magnitudes, strict=True)]
    stationary = torch.stack(each).sum(0)
    saturation = torch.stack([w.abs().amax((1, 2)) for w in weights]).amax(0) / copies.tau.flatten()

    def by_rate(values: Tensor) -> Tensor:
        return values.unflatten(0, (len(rates), -1))

    fastest, which = by_rate(reached).min(0)
    late_by_rate = by_rate(late)
    smallest = torch.where(late_by_rate.isfinite(), late_by_rate, inf).argmin(0)
    rows = []
    for i, (_, tau, noise, seed) in enumerate(copies.settings[: len(smallest)]):
        best = int(smallest[i])
        copy = best * len(smallest) + i
        floor = {
            "floor": float(late[copy]),
            "floor_stationary": float(stationary[copy]),
            "floor_learning_rate": rates[best],
            "variance": float(variance[copy]),
            "saturation": float(saturation[copy]),
        }
        for j, epsilon in enumerate(epsilons):
            at_epsilon = {"epsilon": epsilon, "updates": float(fastest[i, j]), "learning_rate": rates[int(which[i, j])]}
            rows.append({"tau": tau, "noise": noise, "seed": seed, **at_epsilon, **floor})
    return rows


def reach(
    rows: Sequence[Row], problem: str, num_stages: int, tau: float, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the errors ε, less the floor, that every seed reaches, and the updates to them ``(seeds, points)``.

    The floor is the squared gradient norm where the expected motion of the weights vanishes. Errors below
    :data:`ABOVE_FLOOR` times the floor are left out.
    """
    mine = select(rows, problem=problem, num_stages=num_stages, tau=tau, noise=noise)
    updates = curves(mine, "updates")
    epsilon = np.array([float(row["epsilon"]) for row in mine])[: updates.shape[1]]
    floor = float(np.mean([float(row["floor_stationary"]) for row in mine]))
    good = np.isfinite(updates).all(0) & (epsilon > ABOVE_FLOOR * floor)
    return epsilon[good] - floor, updates[:, good]


def problems(rows: Sequence[Row]) -> list[str]:
    """Return the problems of which there are rows."""
    return [problem for problem in STAGES if select(rows, problem=problem)]


def report(rows: Sequence[Row]) -> None:
    """Print the exponents and the coefficients of both terms, with 95 % intervals.

    The coefficients are compared, seed by seed, with those of the run without delay.
    """
    for problem, num_stages in ((name, m) for name in problems(rows) for m in STAGES[name]):
        for tau, noise in product(RANGES[problem], NOISES[problem]):
            epsilon, updates = reach(rows, problem, num_stages, tau, noise)
            if len(epsilon) < 3:
                continue
            exponent = estimate([fit_exponent(epsilon[-SMALLEST:], each[-SMALLEST:]) for each in updates])
            prompt_epsilon, prompt = reach(rows, problem, 1, tau, noise)
            fits, prompt_fits = (
                np.array([fit_complexity(e, each) for each in u])
                for e, u in ((epsilon, updates), (prompt_epsilon, prompt))
            )
            dominant, extra = estimate(fits[:, 0] / prompt_fits[:, 0]), estimate(fits[:, 1] - prompt_fits[:, 1])
            print(
                f"{problem:<6} tau {tau:<4} noise {noise}  M = {num_stages}  exponent {shown(exponent)}  "
                f"{fits[:, 0].mean():.0f}/e^2 + {fits[:, 1].mean():.0f}/e: "
                f"{shown(dominant)} times and {shown(extra, 0)} more than without delay"
            )
    for problem, tau, noise in (
        (name, *each) for name in problems(rows) for each in product(RANGES[name], NOISES[name])
    ):
        for num_stages in STAGES[problem]:
            where: Any = {"problem": problem, "num_stages": num_stages, "tau": tau, "noise": noise}
            mine = select(rows, **where)
            measured, stationary, bound = (shown(estimate(values), 3) for values in floors(mine))
            at_edge = np.mean([float(row["floor_learning_rate"]) <= min(LEARNING_RATES[problem]) for row in mine])
            print(
                f"{problem:<6} tau {tau:<4} noise {noise}  M = {num_stages}  last quarter {measured}, stationary "
                f"{stationary}, bound {bound}; best with the smallest rate: {at_edge:.0%} of the seeds"
            )


def shown(value: Estimate, digits: int = 2) -> str:
    """Return a number and half the width of its 95 % interval as text."""
    return f"{value.value:.{digits}f} ± {value.high - value.value:.{digits}f}"


@styled
def draw(rows: Sequence[Row]) -> Figure:
    """Draw the error against updates, the updates that delay adds, and the floor against τ."""
    shown = problems(rows)
    figure = Figure(figsize=(10, 3.9 * len(shown)), layout="constrained")
    for axes, problem in zip(figure.subplots(len(shown), 3, squeeze=False), shown, strict=True):
        draw_reach(axes[0], rows, problem)
        draw_extra(axes[1], rows, problem)
        draw_floor(axes[2], rows, problem)
    return figure


def draw_reach(axes: Axes, rows: Sequence[Row], problem: str) -> None:
    """Draw the mean squared gradient norm above the floor against updates, for the largest and the smallest range."""
    worst, *_, best = RANGES[problem]
    for (tau, style), (color, num_stages) in product(((best, "-"), (worst, "--")), enumerate(STAGES[problem])):
        epsilon, updates = reach(rows, problem, num_stages, tau, SHOWN[problem])
        label = f"M = {num_stages}" if tau == best else None
        axes.plot(updates.mean(0), epsilon, style, color=shade(color, len(STAGES[problem])), label=label, marker=".")
    updates = np.geomspace(UPDATES[problem] / 50, UPDATES[problem], 2)
    axes.plot(updates, max(EPSILONS[problem]) * (updates / updates[0]) ** -0.5, "k:", label="1/√updates")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="updates, best learning rate",
        ylabel="mean squared gradient\nabove its floor",
    )
    _label(axes.yaxis, LogLocator(subs=(1, 2, 4)))
    axes.set_title(f"{problem}: τ = {best:g} (—), {worst:g} (- -)".replace("inf", "∞"))
    axes.legend()


def draw_extra(axes: Axes, rows: Sequence[Row], problem: str) -> None:
    """Draw the updates with delay divided by those without."""
    for color, num_stages in enumerate(STAGES[problem]):
        (epsilon, ours), (_, prompt) = (reach(rows, problem, m, inf, SHOWN[problem]) for m in (num_stages, 1))
        points = min(ours.shape[1], prompt.shape[1])
        ratios = (ours[:, :points] / prompt[:, :points]).T
        means, errors = [ratio.mean() for ratio in ratios], [half_width(ratio) for ratio in ratios]
        axes.errorbar(
            epsilon[:points],
            means,
            errors,
            color=shade(color, len(STAGES[problem])),
            label=f"M = {num_stages}",
            marker=".",
        )
    axes.set(xscale="log", xlabel="ε", ylabel="updates to ε\nover those without delay")
    axes.invert_xaxis()
    _label(axes.xaxis, LogLocator(subs=(1, 2, 4)))
    axes.set_title("what delay adds, τ = ∞")
    axes.legend()


def floors(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return every seed's error in the last quarter, that where the expected motion vanishes, and the bound on it."""
    measured, stationary, variance, saturation = (
        curves(rows, field)[:, 0] for field in ("floor", "floor_stationary", "variance", "saturation")
    )
    bound = [asymptotic_error(q**2 * v, q) for v, q in zip(variance, saturation, strict=True)]
    return measured, stationary, np.array(bound)


def draw_floor(axes: Axes, rows: Sequence[Row], problem: str) -> None:
    """Draw the squared gradient norm that remains, measured and by theory, without delay and with the longest delay."""
    finite = [tau for tau in RANGES[problem] if np.isfinite(tau)]
    kinds = {"measured, smallest rate": RED, "expected motion vanishes": BLACK, "bound": ORANGE}
    for num_stages, style in ((1, "o-"), (max(STAGES[problem]), "s--")):
        where = {"problem": problem, "num_stages": num_stages, "noise": SHOWN[problem]}
        by_range = [floors(select(rows, tau=tau, **where)) for tau in finite]
        for (label, color), values in zip(kinds.items(), zip(*by_range, strict=True), strict=True):
            means, errors = [v.mean() for v in values], [half_width(v) for v in values]
            axes.errorbar(finite, means, errors, fmt=style, color=color, label=label if num_stages == 1 else None)
    axes.set(xscale="log", yscale="log", xlabel="τ", ylabel="squared gradient norm\nin the last quarter")
    _label(axes.xaxis, FixedLocator(finite))
    axes.set_title(f"the end (M = 1 and {max(STAGES[problem])})")
    axes.set_ylim(bottom=axes.get_ylim()[0] / 8)  # room for the legend
    axes.legend(loc="lower left", fontsize=8)


def _label(axis: Axis, locator: Locator) -> None:
    """Label these values of a logarithmic axis, and no others."""
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def main() -> None:
    """Run the missing cases, print the report and draw the figure."""
    args = sweep_parser(__doc__, seeds=4).parse_args()
    rows = sweep(run, cases(args.seeds, args.quick), args.folder / "paper_rate.csv", args.jobs)
    report(rows)
    draw(rows).savefig(args.folder / "paper_rate.png", dpi=110)


if __name__ == "__main__":
    main()
