"""These tests compare the remedies for staleness with a float64 recomputation and with other schedules."""

from itertools import pairwise

import lightning as L
import numpy as np
import pytest
import torch
from lightning_modules import Attributes, loader, make_trainer
from reference import delayed_updates
from torch import nn

from aimc_pl.callbacks import ClockMonitor, StalenessMonitor
from aimc_pl.errors import UsageError
from aimc_pl.microbatch import split_batch
from aimc_pl.optim import AsyncNAdam, SpikeCompensatedSGD
from aimc_pl.schedule import Schedule
from aimc_pl.strategies import Accumulation, AnalogPipelineStrategy, Remedy, StageLearningRate, SyncStart

SPLIT = ["net.2", "net.4", "net.6"]
NUM_BATCHES = 5
"""Mini-batches of an epoch, with 8, 8, 8, 8 and 3 samples, in 4, 4, 4, 4 and 3 micro-batches."""


class Regression(L.LightningModule):
    def __init__(self):
        super().__init__()
        widths = [6, 5, 7, 4, 6]
        layers = [x for a, b in pairwise(widths) for x in (nn.Linear(a, b), nn.Tanh())]
        self.net = nn.Sequential(*layers[:-1])

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[0].flip(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(module, strategy, **trainer):
    monitor, clock = StalenessMonitor(), ClockMonitor()
    train = loader(module, shuffle=False, length=35)
    make_trainer(strategy, callbacks=[monitor, clock], **{"max_epochs": 2, "log_every_n_steps": 1} | trainer).fit(
        module, train
    )
    assert monitor.mismatches == 0
    return monitor, clock, train


@pytest.mark.parametrize("duplex", ["half", "full"])
@pytest.mark.parametrize(
    "remedies",
    [
        [Accumulation(3)],
        [StageLearningRate(0.5)],
        [StageLearningRate(1.0, anneal_steps=4)],
        [SyncStart(3)],
        [Accumulation(2), StageLearningRate(0.5, anneal_steps=7), SyncStart(2)],
    ],
    ids=["accumulated", "rate", "annealed rate", "sync start", "all"],
)
def test_training_equals_recomputation(remedies, duplex):
    """Check two epochs with four stages. Each epoch ends with a drain."""
    L.seed_everything(3)
    module = Regression().double()
    linears = [layer for layer in module.net if isinstance(layer, nn.Linear)]
    start = [[p.detach().numpy().copy() for p in layer.parameters()] for layer in linears]
    strategy = AnalogPipelineStrategy(4, "async", 4, split_at=SPLIT, duplex=duplex, remedies=remedies)
    *_, train = fit(module, strategy)

    options = {type(remedy): remedy for remedy in remedies}
    in_sync = options[SyncStart].steps if SyncStart in options else 0
    each = options[Accumulation].num_microbatches if Accumulation in options else 1
    microbatches, steps, firsts = [], [], []
    for step, (x, _) in enumerate([*train] * 2):
        firsts.append(len(microbatches))
        for part in split_batch(x, 4):
            microbatches.append((part.numpy(), part.numpy()[:, ::-1], len(part) / len(x)))
            steps.append(step)
    drains = [firsts[step] for step in range(1, 2 * NUM_BATCHES) if step <= in_sync or step == NUM_BATCHES]
    delays = [(3 - stage) * (2 if duplex == "full" else 1) for stage in range(4)]

    def factor(stage, k):
        # An update runs in the step that its last micro-batch makes go on, and its backward comes in a later step.
        rate = options.get(StageLearningRate)
        if rate is None:
            return 1.0
        first = max(drain for drain in [0, *drains] if drain <= k)
        a = 4 if steps[first] < in_sync else each
        staleness = min((k - first) // a, -(-delays[stage] // a))
        exponent = rate.power
        if rate.anneal_steps:
            exponent *= max(0.0, 1 - step_of_update(stage, k) / rate.anneal_steps)
        return (1 + staleness) ** -exponent

    def step_of_update(stage, k):
        """Return the mini-batch during which the pipeline comes to the backward of micro-batch k."""
        first = max(drain for drain in [0, *drains] if drain <= k)
        schedule = Schedule("async", 4, 4, duplex)
        clock = schedule.backward_clock(stage, k - first)
        end = next((drain for drain in drains if drain > first), len(microbatches))
        entered = next((n for n in range(k - first + 1, end - first) if schedule.forward_clock(0, n) > clock), None)
        # The clocks before the entry of the next micro-batch are run in the mini-batch of the one before it.
        return steps[first + entered - 1] if entered is not None else steps[end - 1]

    expected = delayed_updates(
        *zip(*start, strict=True),
        range(4),
        microbatches,
        delays,
        1.0,
        drains,
        accumulate=lambda first: 4 if steps[first] < in_sync else each,
        factor=factor,
    )
    for layer, weight, bias in zip(linears, *expected, strict=True):
        np.testing.assert_allclose(layer.weight.detach().numpy(), weight, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(layer.bias.detach().numpy(), bias, rtol=1e-9, atol=1e-12)


def compensated(state, weight, gradient, rate, staleness):
    """Make a step of spike compensation with momentum 0.8 and weight decay 0.1."""
    gradient = gradient + 0.1 * weight
    state["v"] = 0.8 * state.get("v", 0) + gradient
    return weight - rate * (0.8**staleness * state["v"] + (1 - 0.8**staleness) / (1 - 0.8) * gradient)


def nadam(state, weight, gradient, rate, staleness):
    """Make a step of NAdam whose momentum grows with staleness, from 0.8 to 0.96 in four stages."""
    momentum = 0.8 + 0.16 * min(staleness / 4, 1)
    state["t"] = t = state.get("t", 0) + 1
    now, following = (momentum * (1 - 0.5 * 0.96 ** (0.004 * n)) for n in (t, t + 1))
    state["product"] = state.get("product", 1.0) * now
    state["first"] = momentum * state.get("first", 0) + (1 - momentum) * gradient
    state["second"] = 0.999 * state.get("second", 0) + 0.001 * gradient**2
    step = following * state["first"] / (1 - state["product"] * following)
    step = step + (1 - now) * gradient / (1 - state["product"])
    return weight * (1 - rate * 0.1) - rate * step / (np.sqrt(state["second"] / (1 - 0.999**t)) + 1e-8)


@pytest.mark.parametrize("duplex", ["half", "full"])
@pytest.mark.parametrize(
    ("make", "rule", "tolerance"),
    [
        (lambda parameters: SpikeCompensatedSGD(parameters, 0.1, 0.8, 0.1), compensated, 1e-9),
        # torch keeps the product of the momenta in float32.
        (lambda parameters: AsyncNAdam(parameters, 4, 0.01, 0.8, 0.96, weight_decay=0.1), nadam, 1e-5),
    ],
    ids=["SpikeCompensatedSGD", "AsyncNAdam"],
)
def test_training_with_an_optimizer_that_knows_the_staleness_equals_recomputation(make, rule, tolerance, duplex):
    L.seed_everything(3)
    module = Regression().double()
    module.configure_optimizers = lambda: make(module.parameters())
    linears = [layer for layer in module.net if isinstance(layer, nn.Linear)]
    start = [[p.detach().numpy().copy() for p in layer.parameters()] for layer in linears]
    *_, train = fit(module, AnalogPipelineStrategy(4, "async", 4, split_at=SPLIT, duplex=duplex))
    microbatches = [
        (part.numpy(), part.numpy()[:, ::-1], len(part) / len(x)) for x, _ in [*train] * 2 for part in split_batch(x, 4)
    ]
    delays = [(3 - stage) * (2 if duplex == "full" else 1) for stage in range(4)]
    rate, drains = module.optimizers().param_groups[0]["lr"], [len(microbatches) // 2]
    expected = delayed_updates(*zip(*start, strict=True), range(4), microbatches, delays, rate, drains, rule=rule)
    for layer, weight, bias in zip(linears, *expected, strict=True):
        np.testing.assert_allclose(layer.weight.detach().numpy(), weight, rtol=tolerance, atol=1e-3 * tolerance)
        np.testing.assert_allclose(layer.bias.detach().numpy(), bias, rtol=tolerance, atol=1e-3 * tolerance)


def test_the_line_at_the_start_names_the_remedies(caplog):
    strategy = AnalogPipelineStrategy(4, "async", 4, split_at=SPLIT, remedies=[StageLearningRate(0.5), SyncStart(2)])
    fit(Regression().double(), strategy, max_epochs=1)
    said = "schedule 'async', StageLearningRate(power=0.5, anneal_steps=None), SyncStart(steps=2), split_at="
    assert said in caplog.text


@pytest.mark.parametrize("gradient_scale", ["minibatch", "microbatch"])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_a_start_in_sync_is_the_schedule_1f1b(optimizer, gradient_scale):
    def train(strategy):
        L.seed_everything(1)
        module = Attributes().double()
        module.optimizer = optimizer
        _, clock, _ = fit(module, strategy, limit_val_batches=0)
        return module.state_dict(), clock.cycles

    options = {"split_at": ["l2", "l4"], "gradient_scale": gradient_scale, "remedies": [SyncStart(100)]}
    ours, cycles = train(AnalogPipelineStrategy(3, "async", 4, **options))
    theirs, expected = train(AnalogPipelineStrategy(3, "1f1b", 4, split_at=["l2", "l4"]))
    assert cycles == expected == 2 * sum(2 * (3 + size - 1) for size in (4, 4, 4, 4, 3))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("a", [1, 2, 3, 5])
@pytest.mark.parametrize("duplex", ["half", "full"])
def test_accumulation_divides_the_staleness(a, duplex):
    """Check the staleness that is counted against ⌈d/a⌉. The last update of a stage may have fewer micro-batches."""
    strategy = AnalogPipelineStrategy(4, "async", 4, split_at=SPLIT, duplex=duplex, remedies=[Accumulation(a)])
    monitor, clock, _ = fit(Regression().double(), strategy, max_epochs=1)
    for stage in range(4):
        delay = (3 - stage) * (2 if duplex == "full" else 1)
        assert max(monitor.counts[stage]) == -(-delay // a)
        assert monitor.counts[stage].total() == -(-19 // a)
    assert clock.cycles == Schedule("async", 4, 4, duplex).num_cycles(19)


def test_a_learning_rate_is_lowered_for_the_step_alone():
    rates = []

    class Noting(torch.optim.SGD):
        def step(self, closure=None):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    class Noted(Regression):
        def configure_optimizers(self):
            return Noting(self.parameters(), lr=0.5)

    module = Noted().double()
    strategy = AnalogPipelineStrategy(4, "async", 4, split_at=SPLIT, remedies=[StageLearningRate(2.0)])
    fit(module, strategy, max_epochs=1)
    assert {rate for (rate,) in rates} == {0.5 / d**2 for d in (1, 2, 3, 4)}
    assert module.optimizers().param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("schedule", "remedies", "message"),
    [
        ("sync", [Accumulation(2)], "remedies need schedule='async': 'sync' has no stale weights"),
        ("async", [SyncStart(1), SyncStart(2)], "remedies has SyncStart 2 times: give it once"),
        ("async", ["sync"], "remedies is a list of remedies for staleness"),
    ],
)
def test_wrong_remedies_are_refused(schedule, remedies, message):
    with pytest.raises(UsageError, match=message):
        AnalogPipelineStrategy(4, schedule, 4, remedies=remedies)


class Own(Remedy):
    """A remedy of a user, which returns what it is given."""

    def __init__(self, changed=None, factor=1.0):
        self.changed, self.factor = changed, factor

    def change(self, schedule):
        return self.changed(schedule) if self.changed else schedule

    def rate_factor(self, staleness, step):
        return self.factor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda schedule: None, "Own.change must return an asynchronous .* num_microbatches=4, got None"),
        (lambda schedule: Schedule("sync", 4, 4), "Own.change must return an asynchronous"),
        (lambda schedule: Schedule("async", 4, 2), "Own.change must return an asynchronous"),
        (lambda schedule: schedule.accumulating(0), "accumulate of Own.change must be a whole number of at least 1"),
        (lambda schedule: schedule.accumulating(2.5), "accumulate of Own.change must be a whole number of at least 1"),
    ],
)
def test_wrong_schedules_of_own_remedies_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        AnalogPipelineStrategy(4, "async", 4, remedies=[Own(change)])


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf"), None, "half"])
def test_wrong_factors_of_own_remedies_are_refused(factor):
    strategy = AnalogPipelineStrategy(4, "async", 4, split_at=SPLIT, remedies=[Own(factor=factor)])
    module = Regression().double()
    with pytest.raises(UsageError, match=r"the result of Own\.rate_factor must be a finite number of at least 0"):
        make_trainer(strategy).fit(module, loader(module))


def test_an_optimizer_without_a_learning_rate_is_refused_where_a_remedy_lowers_it():
    class WithoutRate(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self, closure=None):
            pass

    class Still(Regression):
        def configure_optimizers(self):
            return WithoutRate(self.parameters())

    def run(*remedies):
        module = Still().double()
        fit(module, AnalogPipelineStrategy(4, "async", 4, split_at=SPLIT, remedies=remedies), max_epochs=1)

    run(SyncStart(1))
    with pytest.raises(UsageError, match="WithoutRate has no 'lr' in its parameter groups: use another optimizer"):
        run(StageLearningRate())


@pytest.mark.parametrize(("duplex", "cycles"), [("half", 2 * (4 + 4 - 1)), ("full", 2 * (4 + 2 * 4 - 2))])
def test_clock_cycles_of_a_start_in_sync(duplex, cycles):
    """Check 4 stages and 4 micro-batches against the numbers in the documentation."""
    strategy = AnalogPipelineStrategy(4, "async", 4, split_at=SPLIT, duplex=duplex, remedies=[SyncStart(100)])
    _, clock, _ = fit(Regression().double(), strategy, max_epochs=1, limit_train_batches=4)
    assert clock.cycles == 4 * cycles


@pytest.mark.parametrize(
    "make",
    [
        lambda: Accumulation(0),
        lambda: SyncStart(0),
        lambda: StageLearningRate(-1.0),
        lambda: StageLearningRate(1.0, anneal_steps=0),
    ],
)
def test_arguments_out_of_range_are_refused(make):
    with pytest.raises(UsageError, match="must be"):
        make()
