"""These tests check how a step is divided into stages before it first runs."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning_modules import Attributes, Samples, loader, make_trainer
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from aimc_pl import boundaries
from aimc_pl.devices import convert_to_analog
from aimc_pl.errors import UsageError
from aimc_pl.stage import Stage
from aimc_pl.strategies import AnalogPipelineStrategy, planning


def with_trainer(module):
    """Return a module with a trainer that has an optimizer and a scheduler, and both of these."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    scheduler = StepLR(optimizer, 3)
    module._trainer = SimpleNamespace(
        optimizers=[optimizer], lr_scheduler_configs=[scheduler], seen=0, progress_bar_callback=None
    )
    return module, optimizer, scheduler


def test_trials_leave_no_trace_beside_the_trainer():
    module, optimizer, scheduler = with_trainer(Attributes())
    inputs = torch.zeros(3)
    trials = planning.trials_of(module, [lambda: None], [inputs])
    weight = module.l1.weight.detach().clone()
    with trials.fresh(), torch.no_grad():
        module.l1.weight.add_(1)
        optimizer.param_groups[0]["lr"] = 9.0
        scheduler.last_epoch = 9
        inputs.add_(1)
        module.trainer.seen = 9
    assert torch.equal(module.l1.weight, weight)
    assert (optimizer.param_groups[0]["lr"], scheduler.last_epoch, inputs.tolist()) == (0.5, 0, [0, 0, 0])
    # Nothing is searched for in the trainer, which is large.
    assert module.trainer.seen == 9


def test_tensors_of_data_sets_are_found():
    x, y, samples = torch.ones(3), torch.zeros(3), Samples()
    loaders = {"pairs": DataLoader(TensorDataset(x, y)), "others": [DataLoader(samples), DataLoader(range(3)), 7]}
    found = planning.data_tensors(SimpleNamespace(train_dataloader=loaders))
    assert len(found) == 4
    assert all(a is b for a, b in zip(found, (x, y, samples.x, samples.y), strict=True))


@pytest.mark.parametrize(("num_functions", "repeats"), [(1, 1), (2, 2), (5, 2)])
@pytest.mark.parametrize(("shares", "warns"), [((0.5, 0.5), False), ((0.6, 0.4), False), ((0.611, 0.389), True)])
def test_the_stages_of_rank_0_are_those_of_all(num_functions, repeats, shares, warns, monkeypatch, recwarn):
    module, trials = with_trainer(Attributes())[0], SimpleNamespace(functions=[None] * num_functions)
    calls, found = object(), []
    monkeypatch.setattr(boundaries, "find", lambda *args, **kwargs: found.append((args, kwargs)) or "of this rank")

    def agree(value):
        assert value == "of this rank"
        return ["of rank 0"], shares

    names, remark = planning._divide(module, trials, calls, 2, None, "shared", agree, None)
    assert found == [((trials, calls, 2), {"may_share": "shared", "repeats": repeats, "hardware": None})]
    percent = "61, 39" if warns else f"{shares[0] * 100:.0f}, {shares[1] * 100:.0f}"
    assert (names, remark) == (["of rank 0"], f" of {percent} % of the measured time")
    messages = [str(warning.message) for warning in recwarn]
    assert [message.partition(":")[0] for message in messages] == [
        "one stage takes 61 % of the time (stages of 61, 39 %)"
    ] * warns


@pytest.mark.parametrize(("num_stages", "split_at", "names"), [(1, None, []), (1, [], []), (2, ("l3",), ["l3"])])
def test_known_stages_are_not_measured(num_stages, split_at, names, monkeypatch):
    checked, calls = [], object()
    monkeypatch.setattr(boundaries, "check", lambda *args: checked.append(args))
    assert planning._divide(None, None, calls, num_stages, split_at, False, None, None) == (names, "")
    assert checked == [(calls, split_at or ())]


def test_stages_without_times_are_described_by_their_weights():
    """Check analog weights too, a stage that trains nothing, and a pipeline of one stage."""
    net = nn.Sequential(nn.Linear(6, 9, bias=False), nn.Linear(9, 3))
    convert_to_analog(net, {"0": "ideal"})
    stages = [Stage(0, net[0].parameters()), Stage(1), Stage(2, net[1].parameters())]
    assert planning._weights(stages) == " of 64, 0, 36 % of the trained weights"  # 54 and 30 of 84
    assert planning._weights(stages[:1]) == planning._weights(stages[1:2] * 2) == ""


class Evaluated(Attributes):
    """A module whose evaluation also counts its runs, and writes into its batch."""

    runs = 0

    def predict_step(self, x):
        self.runs += 1
        return self(x.add_(1))


@pytest.mark.parametrize("split_at", [["l3"], None])
def test_a_step_of_evaluation_is_divided(split_at, monkeypatch):
    module, _, _ = with_trainer(Evaluated())
    monkeypatch.setattr(boundaries, "balance", lambda costs, num_stages: [2])
    agreed, said, batch = [], [], torch.ones(4, 6)
    monkeypatch.setattr(planning, "say", lambda trainer, line: said.append(line))
    with torch.no_grad():
        step = planning.settle_evaluation(
            module, lambda: module.predict_step(batch), batch, 2, split_at, lambda value: agreed.append(value) or value
        )
    assert [*step.boundaries] == ["l3"]
    assert [stage.index for stage in step.stages] == [0, 1]
    modules = [[layer for layer in stage.modules if layer is not module] for stage in step.stages]
    assert modules == [[module.l1, module.l2], [module.l3, module.norm, module.l4]]
    assert [len(stage.parameters) for stage in step.stages] == [4, 6]
    # The runs for this have left no trace.
    assert module.runs == 0
    assert torch.equal(batch, torch.ones(4, 6))
    assert len(agreed) == (split_at is None)
    # What the user has named is not repeated.
    measured = ["Measuring the layers", "Evaluated (Linear, Linear, Linear, BatchNorm1d, …) in 2 stages of "]
    assert [line[:20] for line in said] == ([line[:20] for line in measured] if split_at is None else [])


def test_a_parameter_of_two_stages_is_refused_in_evaluation():
    module, _, _ = with_trainer(Evaluated())
    module.l4 = nn.Linear(9, 9)
    module.l4.weight = module.l2.weight
    with torch.no_grad(), pytest.raises(UsageError, match=r"'?l2\.weight'?"):
        planning.settle_evaluation(
            module, lambda: module.predict_step(torch.ones(4, 6)), None, 2, ["l3"], lambda value: value
        )


class Remembers(Attributes):
    """A module that computes with what the step before has left."""

    def __init__(self):
        super().__init__()
        self.left = torch.zeros((), dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx) * (1 + self.left)
        self.left = batch[0].mean()
        return loss


def test_single_micro_batches_that_would_overlap_may_not_remember():
    def fit(schedule):
        L.seed_everything(3)
        module = Remembers().double()
        strategy = AnalogPipelineStrategy(2, schedule, 1, split_at=["l3"])
        make_trainer(strategy, max_epochs=1, limit_train_batches=1).fit(module, loader(module))

    fit("sync")
    with pytest.raises(UsageError, match="training_step reads what the step before it has left in 'left', and"):
        fit("async")
