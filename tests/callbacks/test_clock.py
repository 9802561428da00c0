"""These tests compare clock cycles, density and speedup of real runs with closed forms, and read TensorBoard's logs."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_modules import Attributes, loader, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aimc_pl.callbacks import ClockMonitor, Dashboard, PipelineDiagram, StalenessMonitor
from aimc_pl.cost import MARINELLA_2018, count_work, estimate
from aimc_pl.errors import UsageError
from aimc_pl.strategies import Accumulation, AnalogPipelineStrategy, SyncStart

SPLIT = {1: [], 3: ["l2", "l4"], 4: ["l2", "l3", "l4"]}


def fit(clock, schedule, num_stages, duplex="half", ckpt_path=None, val=False, remedies=(), **kwargs):
    L.seed_everything(0)
    module = Attributes().double()
    split_at = SPLIT[num_stages]
    strategy = AnalogPipelineStrategy(num_stages, schedule, 4, duplex=duplex, split_at=split_at, remedies=remedies)
    trainer = make_trainer(strategy, **{"callbacks": [clock], **kwargs})
    data = loader(module, shuffle=False)
    trainer.fit(module, data, data if val else None, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(
    ("schedule", "duplex"),
    [
        ("none", "half"),
        ("sync", "half"),
        ("1f1b", "half"),
        ("zero_bubble", "half"),
        ("async", "half"),
        ("async", "full"),
    ],
)
@pytest.mark.parametrize(
    "num_stages", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_counts_are_the_closed_forms(schedule, duplex, num_stages):
    clock = ClockMonitor()
    trainer = fit(clock, schedule, num_stages, duplex)
    # two epochs of 4, 4 and 3 micro-batches
    m = num_stages
    cycles = {
        ("none", "half"): 2 * 2 * m * 11,
        ("sync", "half"): 2 * 2 * sum(m + b - 1 for b in (4, 4, 3)),
        ("1f1b", "half"): 2 * 2 * sum(m + b - 1 for b in (4, 4, 3)),
        ("zero_bubble", "half"): 2 * sum(max(3 * b + m, 2 * (m + b)) - 1 for b in (4, 4, 3)),
        ("async", "half"): 2 * 2 * (11 + m - 1),
        ("async", "full"): 2 * 2 * (11 + 2 * m - 2),
    }[schedule, duplex]
    assert clock.cycles == cycles
    kinds = 3 if schedule == "zero_bubble" else 2
    assert clock.operations == 2 * kinds * m * 11
    assert clock.samples == 38
    assert clock.speedup == pytest.approx(2 * kinds * m * 11 / cycles)
    assert clock.density == pytest.approx(2 * kinds * 11 / cycles)
    assert trainer.callback_metrics["clock/cycles"] == cycles
    assert trainer.callback_metrics["clock/samples_per_cycle"] == pytest.approx(38 / cycles)


def test_counts_go_on_after_a_resume(tmp_path):
    whole, first, second = ClockMonitor(), ClockMonitor(), ClockMonitor()
    fit(whole, "async", 3)
    fit(first, "async", 3, max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    fit(second, "async", 3, ckpt_path=tmp_path / "one.ckpt")
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("pipeline", "arguments", "expected"),
    [
        (("async", 3), {}, 12),
        (("async", 5), {}, 15),
        pytest.param(("async", 40), {}, 96, marks=pytest.mark.slow),
        (("sync", 4), {}, 14),
        (("none", 3), {}, 2 * 3 * 4),
        pytest.param(("none", 40), {}, 96, marks=pytest.mark.slow),
        (("async", 3), {"num_clocks": 1}, 1),
        (("sync", 3), {"num_clocks": 50}, 2 * (4 + 3 - 1)),
        (("sync", 3), {"num_clocks": 5}, 5),
    ],
)
def test_the_diagram_shows_the_first_clocks(pipeline, arguments, expected):
    """Check the number of clocks in the picture. A drained pipeline of M stages needs 2·(4 + M - 1) of them."""
    (schedule, num_stages), pictures = pipeline, []

    class Logger(TensorBoardLogger):
        @property
        def experiment(self):
            return SimpleNamespace(add_figure=lambda name, figure: pictures.append((name, figure)))

    trainer = SimpleNamespace(strategy=AnalogPipelineStrategy(num_stages, schedule, 4), loggers=[Logger(".")])
    PipelineDiagram(**arguments).on_fit_start(trainer, None)
    ((name, figure),) = pictures
    assert name == "pipeline"
    assert figure.axes[0].get_xlim() == (0, expected)


@pytest.mark.parametrize("num_clocks", [0, 257])
def test_the_diagram_has_1_to_256_clocks(num_clocks):
    with pytest.raises(UsageError) as error:
        PipelineDiagram(num_clocks)
    assert str(error.value) == f"num_clocks must be a whole number of at least 1 and at most 256, got {num_clocks}"


def test_the_training_loss_is_written_against_clock_cycles(tmp_path):
    """Check the loss that training returns, at every second step, in a run without validation."""
    losses = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert isinstance(outputs, dict)
            losses.append((clock.cycles, outputs["loss"].item()))

    clock, logger = ClockMonitor(), TensorBoardLogger(tmp_path)
    fit(clock, "async", 3, callbacks=[clock, Losses()], logger=logger, log_every_n_steps=2)
    events = EventAccumulator(logger.log_dir).Reload()
    written = [(event.step, pytest.approx(event.value)) for event in events.Scalars("by_clock/train_loss")]
    assert written == losses[1::2]
    assert len(written) == 3
    assert clock.tags == {"by_clock/train_loss"}


def test_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    callbacks = [clock := ClockMonitor(), StalenessMonitor(), PipelineDiagram(), Dashboard()]
    fit(clock, "async", 3, val=True, callbacks=callbacks, logger=logger, log_every_n_steps=1)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    by_clock = events.Scalars("by_clock/val_loss")
    assert [event.step for event in by_clock] == [2 * 13, 4 * 13]
    assert [event.step for event in events.Scalars("by_epoch/val_loss")] == [1, 2]
    assert [event.value for event in by_clock] == [event.value for event in events.Scalars("val_loss")]
    assert events.Tags()["images"] == ["pipeline"]
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    # The bars are for staleness 0, 1 and 2. Stage m makes 22 updates. Two of each epoch are less stale in stage 0, and
    # one in stage 1.
    last = events.Histograms("staleness/counts")[-1].histogram_value
    assert (last.bucket_limit, last.bucket) == ([0.5, 1.5, 2.5], [2 + 2 + 22, 2 + 20, 18])
    assert (last.min, last.max, last.num, last.sum, last.sum_squares) == (-0.5, 2.5, 66, 58, 94)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "duplex", "remedies"),
    [
        ("none", "half", ()),
        ("sync", "half", ()),
        ("1f1b", "half", ()),
        ("zero_bubble", "half", ()),
        ("async", "half", ()),
        ("async", "full", ()),
        ("async", "half", [Accumulation(3)]),
    ],
)
def test_seconds_and_joules_are_those_of_an_estimate(schedule, duplex, remedies):
    """Check runs without validation, whose micro-batches are all of one size."""
    clock = ClockMonitor("marinella_2018")
    trainer = fit(clock, schedule, 3, duplex, max_epochs=1, limit_train_batches=2, remedies=remedies)
    L.seed_everything(0)
    module = Attributes().double()
    x, y = next(iter(loader(module, shuffle=False)))
    size = -(-len(x) // 4)

    def step():
        return F.cross_entropy(module(x[:size]), y[:size])

    works = count_work(module, step, SPLIT[3])
    expected = estimate(works, trainer.strategy.schedule, MARINELLA_2018, 1, 1, num_minibatches=2)
    assert clock.seconds == pytest.approx(expected.timeline.makespan)
    assert clock.joules == pytest.approx(8 * expected.joules_per_sample)
    assert trainer.callback_metrics["clock/seconds"] == pytest.approx(clock.seconds)
    assert trainer.callback_metrics["clock/joules"] == pytest.approx(clock.joules)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
def test_mini_batches_in_sync_cost_what_1f1b_costs(steps):
    """Check that SyncStart costs what 1f1b does, and what async does from then on."""

    def cost(schedule, limit, remedies=()):
        clock = ClockMonitor("marinella_2018")
        fit(clock, schedule, 3, max_epochs=1, limit_train_batches=limit, remedies=remedies)
        return clock.seconds, clock.joules

    parts = [cost("1f1b", steps), cost("async", 1)] if steps == 1 else [cost("1f1b", steps)]
    assert cost("async", 2, [SyncStart(steps)]) == pytest.approx([sum(part) for part in zip(*parts, strict=True)])


@pytest.mark.slow
def test_seconds_and_joules_go_on_after_a_resume(tmp_path):
    whole, first, second = (ClockMonitor("rasch_2024") for _ in range(3))
    fit(whole, "sync", 3)
    fit(first, "sync", 3, max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    fit(second, "sync", 3, ckpt_path=tmp_path / "one.ckpt")
    assert 0 < first.seconds < second.seconds == pytest.approx(whole.seconds)
    assert 0 < first.joules < second.joules == pytest.approx(whole.joules)


@pytest.mark.slow
def test_metrics_against_simulated_time_and_energy(tmp_path):
    clock = ClockMonitor("rasch_2024")
    fit(clock, "async", 3, val=True, logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(str(next(tmp_path.glob("**/events*")).parent)).Reload()
    by_time, by_energy = events.Scalars("by_time/val_loss"), events.Scalars("by_energy/val_loss")
    assert [a.value for a in by_time] == [b.value for b in by_energy]
    assert by_time[-1].step == round(1e9 * clock.seconds) > by_time[0].step > 0
    assert by_energy[-1].step == round(1e9 * clock.joules) > by_energy[0].step > 0


def test_unknown_hardware_is_refused():
    with pytest.raises(UsageError, match="unknown hardware 'fast'"):
        ClockMonitor("fast")
