"""These tests compare what StalenessMonitor measures with closed forms and with gradients computed by hand."""

from collections import Counter
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_modules import MLP, loader, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from aimc_pl.callbacks import StalenessMonitor
from aimc_pl.callbacks.recent import means, note
from aimc_pl.devices import constant_step, convert_to_analog
from aimc_pl.errors import UsageError
from aimc_pl.pipeline import Event
from aimc_pl.stage import StageInfo
from aimc_pl.strategies import AnalogPipelineStrategy, StageLearningRate
from aimc_pl.weights import read_gradients, read_weights


def fit(monitor, strategy, module=None, data=None, **kwargs):
    L.seed_everything(1)
    module = MLP().double() if module is None else module
    trainer = make_trainer(strategy, callbacks=[monitor], log_every_n_steps=1, **kwargs)
    trainer.fit(module, loader(module, shuffle=False) if data is None else data)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("duplex", ["half", "full"])
@pytest.mark.parametrize("num_stages", [1, 3, 5])
def test_measured_staleness_is_the_closed_form_at_every_update(num_stages, duplex):
    monitor = StalenessMonitor()
    fit(monitor, AnalogPipelineStrategy(num_stages, "async", 4, duplex=duplex))
    assert monitor.mismatches == 0
    for stage in range(num_stages):
        delay = (num_stages - 1 - stage) * (2 if duplex == "full" else 1)
        # two epochs of 4, 4 and 3 micro-batches; the pipeline drains at the end of each
        expected = 2 * [min(k, delay) for k in range(11)]
        assert sorted(monitor.counts[stage].elements()) == sorted(expected)


def test_the_factors_of_the_learning_rate_are_logged():
    remedies = [StageLearningRate(0.5)]
    trainer = fit(StalenessMonitor(), AnalogPipelineStrategy(3, "async", 4, remedies=remedies))
    factors = [trainer.logged_metrics[f"staleness/rate_factor_stage_{stage}"] for stage in range(3)]
    assert factors == pytest.approx([3**-0.5, 2**-0.5, 1])


@pytest.mark.parametrize(
    "schedule", ["none", pytest.param("sync", marks=pytest.mark.slow), pytest.param("1f1b", marks=pytest.mark.slow)]
)
def test_no_staleness_with_one_update_per_minibatch(schedule):
    monitor = StalenessMonitor()
    trainer = fit(monitor, AnalogPipelineStrategy(3, schedule, 4))
    assert {stage: dict(counts) for stage, counts in monitor.counts.items()} == {m: {0: 6} for m in range(3)}
    assert trainer.logged_metrics["staleness/drift_stage_0"] == 0
    # The cosine costs time, and is measured on request only.
    kinds = ("stage", "max_stage", "drift_stage")
    assert {*trainer.logged_metrics} == {f"staleness/{kind}_{m}" for kind in kinds for m in range(3)}


def test_cosine_is_a_flag():
    with pytest.raises(UsageError) as error:
        StalenessMonitor(cosine="no")
    assert str(error.value) == "cosine must be True or False, got 'no'"


def test_recent_values_have_a_mean_per_name():
    recent = {}
    for name, value in [("a", 5.0), ("b", -2.0), ("a", 1.0), ("a", 3.0)]:
        note(recent, name, value)
    assert means(recent) == {"a": 3.0, "b": -2.0}
    # Each name also keeps its largest value.
    assert {name: largest for name, (_, _, largest) in recent.items()} == {"a": 5.0, "b": -2.0}


def test_state_holds_the_counts_of_own_stages():
    """Check the counts before the start, where a process knows of all stages, and after the start with stage 1."""
    monitor = StalenessMonitor()
    monitor.counts[0][2] = monitor.counts[1][1] = 4
    assert monitor.state_dict()["counts"] == {0: {2: 4}, 1: {1: 4}}
    monitor.on_start([StageInfo(1)])
    assert monitor.state_dict()["counts"] == {1: {1: 4}}


def test_the_state_is_that_of_all_processes():
    """Check a process with stage 1, whose other process has stage 0, and what both load."""
    monitor, others = StalenessMonitor(), {Counter: {0: Counter({2: 4})}, int: 3, tuple: {"stage_0": (5.0, 2, 3.0)}}

    def gather(value):
        kind = type(next(iter(value.values()))) if isinstance(value, dict) else int
        return [value, others[kind]]

    monitor._strategy = SimpleNamespace(gather=gather, is_global_zero=True)
    monitor.on_start([StageInfo(1)])
    monitor.counts[1][1], monitor.mismatches, monitor._recent["stage_1"] = 4, 2, (1.0, 1, 1.0)
    state = monitor.state_dict()
    assert state == {
        "counts": {1: {1: 4}, 0: {2: 4}},
        "mismatches": 5,
        "recent": {"stage_1": (1.0, 1, 1.0), "stage_0": (5.0, 2, 3.0)},
    }
    for rank_0, stage in ((True, 1), (False, 0)):
        loaded = StalenessMonitor()
        loaded.load_state_dict(state)
        # An evaluation has no strategy with a pipeline, and loads nothing.
        assert (loaded.counts, loaded.mismatches, loaded._recent) == ({}, 0, {})
        loaded._strategy = SimpleNamespace(is_global_zero=rank_0, gather=lambda value: [value])
        loaded.load_state_dict(state)
        assert loaded.counts == {0: Counter({2: 4}), 1: Counter({1: 4})}
        loaded.counts[7][3] += 1
        # Rank 0 alone goes on with the number of all, which is a sum.
        assert loaded.mismatches == (5 if rank_0 else 0)
        assert loaded._recent == state["recent"]
        loaded.on_start([StageInfo(stage)])
        assert loaded._recent == {f"stage_{stage}": state["recent"][f"stage_{stage}"]}


def test_histogram_has_a_bar_for_every_staleness(tmp_path):
    """Check three updates of staleness 2 and two of staleness 4, and a stage without updates."""
    logger, monitor = TensorBoardLogger(tmp_path), StalenessMonitor()
    monitor._strategy = SimpleNamespace(gather=lambda own: [own])
    monitor.counts |= {0: Counter({2: 3, 4: 1}), 1: Counter({4: 1}), 2: Counter()}
    monitor.on_train_epoch_end(SimpleNamespace(loggers=[logger], global_step=40), None)
    logger.experiment.flush()
    (event,) = EventAccumulator(logger.log_dir).Reload().Histograms("staleness/counts")
    value = event.histogram_value
    assert event.step == 40
    # TensorBoard draws the bars from the left edge of the first to the right edge of the last.
    assert (value.min, value.max, value.num, value.sum, value.sum_squares) == (-0.5, 4.5, 5, 14, 44)
    assert (value.bucket_limit, value.bucket) == ([0.5, 1.5, 2.5, 3.5, 4.5], [0, 0, 3, 0, 2])


def test_no_histogram_without_updates(tmp_path):
    logger, monitor = TensorBoardLogger(tmp_path), StalenessMonitor()
    monitor._strategy = SimpleNamespace(gather=lambda own: [own])
    monitor.counts[0] = Counter()
    monitor.on_train_epoch_end(SimpleNamespace(loggers=[logger], global_step=40), None)
    assert not list(tmp_path.rglob("events.*"))


def test_warns_of_a_mismatch():
    monitor = StalenessMonitor()
    strategy = AnalogPipelineStrategy(3, "async", 4)
    fit(monitor, strategy)
    with pytest.warns(UserWarning, match="staleness of 7 in clock 50, and the schedule predicts 2"):
        monitor.on_update(Event(50, StageInfo(0), 30, 30, 30, 7, 2, 1))
    assert monitor.mismatches == 1


class Linear(L.LightningModule):
    """Two scalar layers in two stages, y = b·a·x, whose staleness can be computed by hand."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        nn.init.constant_(self.net[0].weight, 0.5)
        nn.init.constant_(self.net[1].weight, -2.0)

    def training_step(self, batch, batch_idx):
        # The target of the first mini-batch is 1.
        return 0.5 * (self.net(batch) - 1 - batch_idx).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_drift_and_cosine_by_hand():
    """Check micro-batch 1 in stage 0: its forward in clock 2 uses a₀, and its backward in clock 5 uses a₁."""
    events = {}

    class Keeps(StalenessMonitor):
        def on_backward(self, event):
            self._recent.clear()
            super().on_backward(event)
            events[event.stage.index, event.microbatch] = means(self._recent)

    module = Linear().double()
    data = DataLoader(torch.tensor([[1.0], [2.0]]).double(), batch_size=2)
    fit(Keeps(cosine=True), AnalogPipelineStrategy(2, "async", 2), module, data, max_epochs=1)
    a0, b0, x0 = 0.5, -2.0, 1.0
    # Stage 1 sends its error before it updates.
    a1 = a0 - 0.1 * 0.5 * (b0 * a0 * x0 - 1) * b0 * x0
    seen = events[0, 1]
    assert seen["drift_stage_0"] == pytest.approx(abs(a1 - a0) / a0, rel=1e-6)
    # With one weight per stage the cosine is the sign of the product of the gradients.
    assert abs(seen["cosine_stage_0"]) == pytest.approx(1.0)
    assert events[0, 0]["drift_stage_0"] == 0


@pytest.mark.parametrize("takes_index", [True, False])
def test_cosine_of_a_stale_gradient_by_hand(takes_index):
    """Check y = b·a·x with two hidden values: micro-batch 1 goes back with version 1 of b when version 2 is current."""

    class Wide(Linear):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
            with torch.no_grad():
                self.net[0].weight.copy_(torch.tensor([[0.5], [0.8]]))
                self.net[1].weight.copy_(torch.tensor([[0.3, -0.6]]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), rate)

    class NoIndex(Wide):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    class Keeps(StalenessMonitor):
        def __init__(self):
            super().__init__(cosine=True)
            self.cosines = []

        def on_backward(self, event):
            self._recent.clear()
            super().on_backward(event)
            if event.stage.index == 0:
                self.cosines.append(means(self._recent)["cosine_stage_0"])

    def cosine(x, y):
        return x @ y / np.linalg.norm(x) / np.linalg.norm(y)

    rate = 0.5
    data = DataLoader(torch.tensor([[1.0], [2.0]]).double(), batch_size=2)
    monitor = Keeps()
    module = (Wide() if takes_index else NoIndex()).double()
    fit(monitor, AnalogPipelineStrategy(2, "async", 2), module, data, max_epochs=1)
    a, b = np.array([0.5, 0.8]), np.array([0.3, -0.6])
    # Micro-batch 0 has x = 1 and half of the loss. Stage 1 sends its error before it updates.
    error = 0.5 * (b @ a - 1)
    a1, b1 = a - rate * error * b, b - rate * error * a
    first = cosine(error * b, (b1 @ a - 1) * b1)
    # Micro-batch 1 has x = 2. Its forward used the first a, and its backward goes through stage 1 with b1.
    error = 0.5 * (b1 @ (2 * a) - 1)
    stale, b2 = error * b1, b1 - rate * error * 2 * a
    second = cosine(stale, (b2 @ (2 * a1) - 1) * b2)
    assert max(first, second) < 0.9
    assert monitor.cosines == pytest.approx([first, second], abs=1e-6)


@pytest.mark.slow
def test_cosine_is_one_where_nothing_is_stale():
    monitor = StalenessMonitor(cosine=True)
    trainer = fit(monitor, AnalogPipelineStrategy(3, "sync", 4))
    for stage in range(3):
        # This is the gradient summed over the micro-batches so far against that of one. They are equal for the first.
        assert trainer.logged_metrics[f"staleness/cosine_stage_{stage}"] > 0.3
    one = fit(StalenessMonitor(cosine=True), AnalogPipelineStrategy(3, "sync", 1))
    for stage in range(3):
        assert one.logged_metrics[f"staleness/cosine_stage_{stage}"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(6, 4), (5, 6)),
        (lambda: nn.Linear(6, 4), (5, 2, 6)),
        (lambda: nn.Conv2d(3, 4, 3, padding=1, stride=2), (2, 3, 8, 8)),
        (lambda: nn.Conv1d(3, 4, 3, padding=1, stride=2), (2, 3, 8)),
        (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 3, 5)),
        # aihwkit's default mapping splits this layer into two tiles.
        (lambda: nn.Conv2d(60, 4, 3, bias=False), (2, 60, 5, 5)),
    ],
)
@pytest.mark.parametrize("device", ["ideal", constant_step(w_max=10.0, perfect_io=True)])
def test_gradients_and_weights_of_tiles_are_those_of_digital_layers(make, shape, device):
    torch.manual_seed(0)
    digital = nn.Sequential(make())
    x = torch.randn(shape)
    error = torch.randn_like(digital(x))
    digital(x).backward(error)
    expected = read_gradients(digital, digital.parameters())
    weights = read_weights(digital.parameters())
    convert_to_analog(digital, device)
    digital(x).backward(error)
    # Several tiles return the columns of the weight one tile after the other.
    for of_tiles, of_layer in (
        (read_gradients(digital, digital.parameters()), expected),
        (read_weights(digital.parameters()), weights),
    ):
        if shape[1] == 60:
            of_tiles, of_layer = of_tiles.sort().values, of_layer.sort().values
        torch.testing.assert_close(of_tiles, of_layer, rtol=1e-5, atol=1e-5)


def test_needs_a_pipeline():
    message = (
        r"StalenessMonitor .* the strategy is SingleDeviceStrategy: set Trainer\(strategy=AnalogPipelineStrategy\("
    )
    with pytest.raises(UsageError, match=message):
        fit(StalenessMonitor(), "auto")


@pytest.mark.slow
def test_analog_network_with_cosine():
    class Analog(MLP):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    module = Analog()
    data = DataLoader([(x.float(), y) for x, y in loader(module).dataset], batch_size=8)
    monitor = StalenessMonitor(cosine=True)
    strategy = AnalogPipelineStrategy(5, "async", 4, device="ideal")
    trainer = fit(monitor, strategy, module, data, precision="32-true", max_epochs=1, accelerator="cpu")
    # In the last stage only the input is stale.
    assert trainer.logged_metrics["staleness/cosine_stage_4"] > 0.5


def test_counts_of_other_processes_become_histograms(tmp_path):
    """Check the plain dictionaries that processes send each other."""
    monitor = StalenessMonitor()
    monitor._here = None
    monitor._strategy = SimpleNamespace(gather=lambda own: [own, {0: {0: 2, 3: 5}}, {1: {1: 7}}])
    logger = TensorBoardLogger(tmp_path)
    monitor.on_train_epoch_end(SimpleNamespace(loggers=[logger], global_step=1), None)
    assert monitor.counts == {0: Counter({0: 2, 3: 5}), 1: Counter({1: 7})}
    assert list(tmp_path.rglob("events.*"))
