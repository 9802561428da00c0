"""These tests compare random networks, pipelines and fits with a recomputation in plain torch.

The recomputation uses neither clocks nor the code of stages. Under the schedules with one update per mini-batch it is
autograd on whole mini-batches. Under ``"async"`` it is written by hand from the closed forms of the versions.
Micro-batch k, counted from the last fill, has its forward at stage m of M with the weights after max(0, k − delay)
updates of this stage, where the delay is M−1−m (twice that in full duplex). Its backward uses the weights after k
updates.

``AIMC_PL_EXAMPLES=20000`` draws that many examples instead of 300.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning_modules import make_trainer
from staged import make_step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from aimc_pl.flight import Flight
from aimc_pl.pipeline import Pipeline
from aimc_pl.schedule import Schedule
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.strategies.stage_optimizer import StageOptimizer

NUM_EXAMPLES = int(os.environ.get("AIMC_PL_EXAMPLES", "300"))
SECOND_WIDTH = 2
"""Width of the second input."""


def examples(part: float) -> settings:
    """Return settings that draw this part of all examples, always the same ones."""
    return settings(
        max_examples=round(part * NUM_EXAMPLES),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.function_scoped_fixture,  # conftest.py's folder, which all examples may share
        ],
    )


# ------------------------------------------------------------------------------------------------ what is drawn


@dataclass(frozen=True)
class Skip:
    """A connection from an earlier value: 0 for the input and i + 1 for the output of block i.

    ``how`` is ``"project"`` to add a linear map of the value before tanh, or ``"add"`` or ``"times"`` to combine the
    value with the block's output.
    """

    source: int
    how: str


@dataclass(frozen=True)
class Block:
    width: int
    skips: tuple[Skip, ...]
    takes_second: bool
    has_bias: bool
    has_gain: bool
    in_place: bool
    is_frozen: bool


@dataclass(frozen=True)
class Shape:
    """The shape of a network. ``starts`` are the blocks with which stages 1 … M−1 begin."""

    width: int
    blocks: tuple[Block, ...]
    starts: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        return len(self.starts) + 1

    @property
    def widths(self) -> list[int]:
        """The widths of the input and of all blocks' outputs."""
        return [self.width, *(block.width for block in self.blocks)]

    def stage_of(self, block: int) -> int:
        return sum(start <= block for start in self.starts)


@dataclass(frozen=True)
class Learning:
    """How a network is trained."""

    schedule: str
    duplex: str
    num_microbatches: int
    optimizer: str
    clip: tuple[str, float] | None
    loss: str
    full_steps: bool
    stashing: bool
    decay: float
    seed: int

    @property
    def is_async(self) -> bool:
        return self.schedule == "async"


@dataclass(frozen=True)
class Run:
    """A run through the pipeline: sizes of its mini-batches, and those that a drain or an optimizer step follows."""

    shape: Shape
    learning: Learning
    sizes: tuple[int, ...]
    drains: frozenset[int]
    steps: frozenset[int]


@dataclass(frozen=True)
class Fit:
    """A fit with a Trainer."""

    shape: Shape
    learning: Learning
    num_samples: int
    batch_size: int
    epochs: int
    limit: int | None
    validation_interval: int | None
    accumulated: int
    max_steps: int
    decays: str
    verify: bool


@st.composite
def blocks(draw: Any, index: int, widths: list[int]) -> Block:
    skips = []
    for source in draw(st.lists(st.integers(0, index), max_size=2, unique=True)):
        how = draw(st.sampled_from(["add", "times", "project"]))
        skips.append(Skip(source, how if widths[source] == widths[index + 1] else "project"))
    rarely = st.sampled_from([False, False, False, True])
    return Block(
        width=widths[index + 1],
        skips=tuple(skips),
        takes_second=draw(rarely),
        has_bias=draw(st.booleans()),
        has_gain=draw(rarely),
        in_place=draw(rarely),
        is_frozen=draw(rarely),
    )


@st.composite
def shapes(draw: Any) -> Shape:
    num_stages = draw(st.integers(1, 5))
    num_blocks = draw(st.integers(num_stages, num_stages + 2))
    starts = draw(st.permutations(range(1, num_blocks)))[: num_stages - 1]
    widths = draw(st.lists(st.sampled_from([2, 3, 3, 5]), min_size=num_blocks + 1, max_size=num_blocks + 1))
    drawn = [draw(blocks(index, widths)) for index in range(num_blocks)]
    if all(block.is_frozen for block in drawn):
        drawn[0] = replace(drawn[0], is_frozen=False)
    return Shape(widths[0], tuple(drawn), tuple(sorted(starts)))


@st.composite
def learnings(draw: Any, schedules: Sequence[str]) -> Learning:
    schedule = draw(st.sampled_from(schedules))
    is_async = schedule == "async"
    loss = draw(st.sampled_from(["mean", "mean", "sum"]))
    return Learning(
        schedule=schedule,
        duplex=draw(st.sampled_from(["half", "full"])) if is_async else "half",
        num_microbatches=draw(st.integers(1, 5)),
        optimizer=draw(st.sampled_from(["sgd", "momentum", "adam"])),
        clip=draw(st.sampled_from([None, None, ("norm", 0.1), ("norm", 0.5), ("value", 0.05)])),
        loss=loss,
        full_steps=is_async and draw(st.sampled_from([False, False, True])),
        stashing=is_async and draw(st.sampled_from([False, False, False, True])),
        decay=draw(st.sampled_from([1.0, 0.5])),
        seed=draw(st.integers(0, 999)),
    )


@st.composite
def runs(draw: Any, schedules: Sequence[str]) -> Run:
    sizes = tuple(draw(st.lists(st.integers(1, 8), min_size=1, max_size=4)))
    some = st.frozensets(st.integers(0, len(sizes) - 1))
    learning = draw(learnings(schedules))
    drains = draw(some) if learning.is_async else frozenset()
    steps = frozenset(range(len(sizes))) if learning.is_async else draw(some) | {len(sizes) - 1}
    return Run(draw(shapes()), learning, sizes, drains, steps)


@st.composite
def fits(draw: Any) -> Fit:
    learning = draw(learnings(["none", "sync", "1f1b", "zero_bubble", "async", "async", "async"]))
    batch_size = draw(st.integers(max(2, learning.num_microbatches), 8))
    num_samples = batch_size + draw(st.integers(0, 3 * batch_size))  # The first mini-batch must be a whole one.
    num_batches = -(-num_samples // batch_size)
    limit = draw(st.none() | st.integers(1, num_batches))
    interval = draw(st.none() | st.integers(1, limit or num_batches))
    return Fit(
        shape=draw(shapes()),
        learning=learning,
        num_samples=num_samples,
        batch_size=batch_size,
        epochs=draw(st.integers(1, 2)),
        limit=limit,
        validation_interval=interval,
        accumulated=1 if learning.is_async else draw(st.integers(1, 3)),
        max_steps=draw(st.sampled_from([-1, -1, 1, 2, 3])),
        decays=draw(st.sampled_from(["step", "epoch"])),
        verify=draw(st.sampled_from([False, False, True])),
    )


# ---------------------------------------------------------------------------------------- the network, as a user's


class BlockModule(nn.Module):
    def __init__(self, block: Block, widths: Sequence[int], width_before: int) -> None:
        super().__init__()
        self.block = block
        self.linear = nn.Linear(width_before, block.width, bias=block.has_bias)
        self.projections = nn.ModuleList(
            nn.Linear(widths[skip.source], block.width, bias=False) for skip in block.skips if skip.how == "project"
        )
        self.second = nn.Linear(SECOND_WIDTH, block.width, bias=False) if block.takes_second else None
        self.gain = nn.Parameter(torch.ones(block.width)) if block.has_gain else None

    def forward(self, h: Tensor, projected: Sequence[Tensor], second: Tensor) -> Tensor:
        z = self.linear(h)
        for projection, value in zip(self.projections, projected, strict=True):
            z = z + projection(value)
        if self.second is not None:
            z = z + self.second(second)
        activation = torch.tanh_(z) if self.block.in_place else torch.tanh(z)
        return activation if self.gain is None else activation * self.gain


class Network(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            BlockModule(block, shape.widths, shape.widths[index]) for index, block in enumerate(shape.blocks)
        )
        for module in self.blocks:
            module.requires_grad_(not module.block.is_frozen)

    def forward(self, x: Tensor, second: Tensor) -> Tensor:
        values = [x]
        modules: list[Any] = [*self.blocks]
        for module in modules:
            skips = module.block.skips
            h = module(values[-1], [values[skip.source] for skip in skips if skip.how == "project"], second)
            for skip in skips:
                if skip.how == "add":
                    h = h + values[skip.source]
                elif skip.how == "times":
                    h = h * values[skip.source]
            values.append(h)
        return values[-1]


class Module(L.LightningModule):
    def __init__(self, shape: Shape, learning: Learning, decays: str = "step") -> None:
        super().__init__()
        self.net = Network(shape)
        self.learning, self.decays = learning, decays

    def training_step(self, batch: Sequence[Tensor]) -> Tensor:
        return loss_of(self.net, batch, self.learning.loss)

    def validation_step(self, batch: Sequence[Tensor]) -> None:
        if self.learning.is_async and not self.trainer.sanity_checking:
            stages = self.trainer.strategy.pipeline.stages
            assert len({stage.version for stage in stages}) == 1, "validation saw a pipeline that is not drained"

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.parameters(), self.learning)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.learning.decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.decays}}


def loss_of(network: nn.Module, batch: Sequence[Tensor], reduction: str) -> Tensor:
    x, second, target = batch
    return F.mse_loss(network(x, second), target, reduction=reduction)


def learning_rate(learning: Learning) -> float:
    return 0.02 if learning.loss == "sum" or learning.optimizer == "adam" else 0.2


def make_optimizer(parameters: Any, learning: Learning) -> Optimizer:
    rate = learning_rate(learning)
    if learning.optimizer == "adam":
        # With the usual eps, Adam would magnify rounding errors where a gradient is zero.
        return torch.optim.Adam(parameters, lr=rate, eps=1e-3)
    extra = {"momentum": 0.9, "weight_decay": 0.01} if learning.optimizer == "momentum" else {}
    return torch.optim.SGD(parameters, lr=rate, **extra)


def clip(parameters: Sequence[nn.Parameter], learning: Learning) -> None:
    learnt = [parameter for parameter in parameters if parameter.grad is not None]
    if learning.clip is not None and learnt:  # torch does not take an empty list
        algorithm, value = learning.clip
        function = nn.utils.clip_grad_norm_ if algorithm == "norm" else nn.utils.clip_grad_value_
        function(learnt, value)


def draw_weights(network: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def draw_samples(shape: Shape, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, second inputs and targets."""
    widths = shape.width, SECOND_WIDTH, shape.widths[-1]
    x, second, target = (torch.randn(number, width, generator=generator, dtype=torch.float64) for width in widths)
    return x, second, target


# ------------------------------------------------------------------------------------------------- the reference


@dataclass(frozen=True)
class Plan:
    """What a run does with its mini-batches in order: learning rates, drains after and optimizer steps after."""

    batches: Sequence[Sequence[Tensor]]
    rates: Sequence[float]
    drains: Sequence[bool]
    steps: Sequence[bool]
    accumulated: int = 1


Weights = dict[str, Tensor]
"""The weights of one block, by name."""


def train_whole(network: Network, learning: Learning, plan: Plan) -> None:
    """Train on whole mini-batches with autograd."""
    optimizer = make_optimizer(network.parameters(), learning)
    for batch, rate, has_step in zip(plan.batches, plan.rates, plan.steps, strict=True):
        (loss_of(network, batch, learning.loss) / plan.accumulated).backward()
        if has_step:
            optimizer.param_groups[0]["lr"] = rate
            clip([*network.parameters()], learning)
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def train_delayed(network: Network, shape: Shape, learning: Learning, plan: Plan) -> None:
    """Train asynchronously from the closed forms of the versions, without autograd and without a clock."""
    last = shape.num_stages - 1
    stages = [
        [module for index, module in enumerate(network.blocks) if shape.stage_of(index) == stage]
        for stage in range(last + 1)
    ]
    parameters = [[parameter for module in stage for parameter in module.parameters()] for stage in stages]
    optimizers = [make_optimizer(of_stage, learning) for of_stage in parameters]
    for fill in fills(plan, learning):
        num_entered = [sum(at <= batch for at, *_ in fill) for batch in range(len(plan.batches))]
        # This holds the weights of all blocks by version, counted from the fill.
        history: list[list[Weights]] = [weights_of(network)]
        for k, (_, microbatch, loss_weight) in enumerate(fill):
            delays = [(last - stage) * (2 if learning.duplex == "full" else 1) for stage in range(last + 1)]
            seen = [history[max(0, k - delays[shape.stage_of(index)])][index] for index in range(len(shape.blocks))]
            gradients = gradients_by_hand(shape, learning, microbatch, seen, seen if learning.stashing else history[k])
            for index, module in enumerate(network.blocks):
                for name, parameter in module.named_parameters():
                    if parameter.requires_grad:
                        parameter.grad = loss_weight * gradients[index][name]
            for stage in range(last + 1):
                clip(parameters[stage], learning)
                batch = batch_of_update(learning.duplex, last, stage, k, num_entered)
                optimizers[stage].param_groups[0]["lr"] = plan.rates[min(batch, fill[-1][0])]
                optimizers[stage].step()
            history.append(weights_of(network))


def fills(plan: Plan, learning: Learning) -> Iterator[list[tuple[int, list[Tensor], float]]]:
    """Yield the micro-batches of each fill, with the number of their mini-batch and the weight of their loss."""
    fill = []
    for index, (batch, drains) in enumerate(zip(plan.batches, plan.drains, strict=True)):
        size = len(batch[0])
        number = min(learning.num_microbatches, size)
        for part in zip(*(tensor.tensor_split(number) for tensor in batch), strict=True):
            share = len(part[0]) / size
            scale = 1 / share if learning.full_steps else 1.0
            fill.append((index, [*part], (1.0 if learning.loss == "sum" else share) * scale))
        if drains or index == len(plan.batches) - 1:
            yield fill
            fill = []


def batch_of_update(duplex: str, last: int, stage: int, k: int, num_entered: Sequence[int]) -> int:
    """Return the mini-batch during which micro-batch k is updated, and whose learning rate the update has.

    The backward of k is in clock 2·last − stage + 2k + 1 (half duplex) or 2·last − stage + k (full). A mini-batch ends
    when the next micro-batch could enter, two clocks (one in full duplex) after its own last micro-batch has entered.
    """
    stride = 1 if duplex == "full" else 2
    clock = 2 * last - stage + stride * k + (duplex == "half")
    return next((batch for batch, number in enumerate(num_entered) if clock < stride * number), len(num_entered))


def weights_of(network: Network) -> list[Weights]:
    return [{name: p.detach().clone() for name, p in module.named_parameters()} for module in network.blocks]


def gradients_by_hand(
    shape: Shape,
    learning: Learning,
    microbatch: Sequence[Tensor],
    seen: Sequence[Weights],
    current: Sequence[Weights],
) -> list[Weights]:
    """Return the gradients of the loss by block.

    Activations are computed with the weights ``seen``, and errors are passed on by the ``current`` weights.
    """
    x, second, target = microbatch
    values, activations, factors = [x], [], []
    for index, (block, weights) in enumerate(zip(shape.blocks, seen, strict=True)):
        z = values[index] @ weights["linear.weight"].T
        if block.has_bias:
            z = z + weights["linear.bias"]
        for number, source in enumerate(projected(block)):
            z = z + values[source] @ weights[f"projections.{number}.weight"].T
        if block.takes_second:
            z = z + second @ weights["second.weight"].T
        activations.append(torch.tanh(z))
        out = activations[-1] * weights["gain"] if block.has_gain else activations[-1]
        factors.append([])
        for skip in block.skips:
            factors[-1].append(out)
            if skip.how == "add":
                out = out + values[skip.source]
            elif skip.how == "times":
                out = out * values[skip.source]
        values.append(out)

    errors = [torch.zeros_like(value) for value in values]
    errors[-1] = 2 * (values[-1] - target) / (values[-1].numel() if learning.loss == "mean" else 1)
    gradients: list[Weights] = []
    for index, (block, weights) in reversed([*enumerate(zip(shape.blocks, current, strict=True))]):
        error, found = errors[index + 1], {}
        for skip, factor in reversed([*zip(block.skips, factors[index], strict=True)]):
            if skip.how == "add":
                errors[skip.source] += error
            elif skip.how == "times":
                errors[skip.source] += error * factor
                error = error * values[skip.source]
        if block.has_gain:
            found["gain"] = (error * activations[index]).sum(0)
            error = error * weights["gain"]
        error = error * (1 - activations[index] ** 2)
        if block.takes_second:
            found["second.weight"] = error.T @ second
        for number, source in enumerate(projected(block)):
            found[f"projections.{number}.weight"] = error.T @ values[source]
            errors[source] += error @ weights[f"projections.{number}.weight"]
        if block.has_bias:
            found["linear.bias"] = error.sum(0)
        found["linear.weight"] = error.T @ values[index]
        errors[index] += error @ weights["linear.weight"]
        gradients.append(found)
    return gradients[::-1]


def projected(block: Block) -> list[int]:
    return [skip.source for skip in block.skips if skip.how == "project"]


def train_reference(network: Network, shape: Shape, learning: Learning, plan: Plan) -> None:
    if learning.is_async:
        train_delayed(network, shape, learning, plan)
    else:
        train_whole(network, learning, plan)


def assert_same_weights(ours: nn.Module, reference: nn.Module) -> None:
    for (name, a), b in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert b.isfinite().all(), name
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


# ------------------------------------------------------------------------------------------------------ the core


def train_core(network: Network, run: Run, plan: Plan) -> None:
    """Train with the pipeline of one process, without Lightning."""
    shape, learning = run.shape, run.learning
    schedule = Schedule(learning.schedule, shape.num_stages, learning.num_microbatches, learning.duplex)
    step = make_step(
        network,
        [f"blocks.{start}" for start in shape.starts],
        lambda: loss_of(network, plan.batches[0], learning.loss),
        delayed=learning.is_async,
        weight_stashing=learning.stashing,
        may_share=not learning.is_async,
    )
    optimizer = make_optimizer(network.parameters(), learning)
    by_stage = StageOptimizer(optimizer, step.stages)

    def update(stage: Any) -> None:
        with by_stage.restricted_to(stage):
            clip(stage.parameters, learning)
            by_stage.step()
            optimizer.zero_grad()

    pipeline = Pipeline(step.stages, schedule, update)
    microbatches = [(batch, part, weight) for fill in fills(plan, learning) for batch, part, weight in fill]
    for index, rate in enumerate(plan.rates):
        optimizer.param_groups[0]["lr"] = rate
        flights = [
            Flight(step, lambda part=part: loss_of(network, part, learning.loss), weight)
            for batch, part, weight in microbatches
            if batch == index
        ]
        with step.running():
            (pipeline.run_forwards if schedule.forwards_first else pipeline.run)(flights)
            if plan.drains[index] or not learning.is_async or index == len(plan.rates) - 1:
                pipeline.drain()
        if plan.steps[index] and not learning.is_async:
            clip([*network.parameters()], learning)
            optimizer.step()
            optimizer.zero_grad()
            pipeline.updated()


def check_core(run: Run) -> None:
    generator = torch.Generator().manual_seed(run.learning.seed)
    network = Network(run.shape).double()
    draw_weights(network, generator)
    reference = copy.deepcopy(network)
    numbers = range(len(run.sizes))
    plan = Plan(
        batches=[draw_samples(run.shape, size, generator) for size in run.sizes],
        rates=[learning_rate(run.learning) * run.learning.decay**index for index in numbers],
        drains=[index in run.drains for index in numbers],
        steps=[index in run.steps for index in numbers],
    )
    train_core(network, run, plan)
    train_reference(reference, run.shape, run.learning, plan)
    assert_same_weights(network, reference)


@pytest.mark.slow
@examples(0.55)
@given(runs(["async"]))
def test_random_asynchronous_pipelines_equal_the_recomputation(run):
    check_core(run)


@pytest.mark.slow
@examples(0.3)
@given(runs(["none", "sync", "1f1b", "zero_bubble"]))
def test_random_pipelines_with_one_update_per_mini_batch_equal_plain_training(run):
    check_core(run)


# ------------------------------------------------------------------------------------------------------ whole fits


def plan_of(fit: Fit, samples: Sequence[Tensor]) -> Plan:
    """Return what Lightning should do in this fit."""
    batches, rates, drains, steps, num_steps = [], [], [], [], 0
    per_epoch = fit.limit or -(-fit.num_samples // fit.batch_size)
    for epoch in range(fit.epochs):
        for index in range(per_epoch):
            if num_steps == fit.max_steps:
                break
            first, is_last = index * fit.batch_size, index == per_epoch - 1
            batches.append([tensor[first : first + fit.batch_size] for tensor in samples])
            exponent = num_steps if fit.decays == "step" else epoch
            rates.append(learning_rate(fit.learning) * fit.learning.decay**exponent)
            interval = fit.validation_interval or per_epoch
            drains.append(is_last or (index + 1) % interval == 0)
            steps.append(is_last or (index + 1) % fit.accumulated == 0)
            num_steps += steps[-1]
    return Plan(batches, rates, drains, steps, fit.accumulated)


def train_with_lightning(module: Module, fit: Fit, samples: Sequence[Tensor]) -> L.Trainer:
    learning = fit.learning
    strategy = AnalogPipelineStrategy(
        fit.shape.num_stages,
        learning.schedule,
        learning.num_microbatches,
        split_at=[f"net.blocks.{start}" for start in fit.shape.starts],
        duplex=learning.duplex,
        gradient_scale="microbatch" if learning.full_steps else "minibatch",
        weight_stashing=learning.stashing,
        loss_reduction=learning.loss,
        verify=fit.verify,
    )
    trainer = make_trainer(
        strategy,
        max_epochs=fit.epochs,
        max_steps=fit.max_steps,
        limit_train_batches=fit.limit,
        val_check_interval=fit.validation_interval,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        accumulate_grad_batches=fit.accumulated,
        gradient_clip_val=learning.clip and learning.clip[1],
        gradient_clip_algorithm=learning.clip and learning.clip[0],
    )
    data = DataLoader(TensorDataset(*samples), fit.batch_size)
    trainer.fit(module, data, data)
    return trainer


@pytest.mark.slow
@examples(0.15)
@given(fits())
def test_random_fits_equal_the_recomputation(fit):
    generator = torch.Generator().manual_seed(fit.learning.seed)
    module = Module(fit.shape, fit.learning, fit.decays).double()
    draw_weights(module, generator)
    reference = copy.deepcopy(module.net)
    samples = draw_samples(fit.shape, fit.num_samples, generator)
    plan = plan_of(fit, samples)
    trainer = train_with_lightning(module, fit, samples)
    train_reference(reference, fit.shape, fit.learning, plan)
    assert_same_weights(module.net, reference)
    assert trainer.global_step == sum(plan.steps)
