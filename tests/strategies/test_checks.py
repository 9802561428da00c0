"""These tests check what is refused, or warned of, before training starts."""

import copy
import re
import sys
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.plugins import DoublePrecision, MixedPrecision
from lightning.pytorch.plugins.precision import Precision
from timm.optim.lamb import Lamb
from timm.optim.lars import Lars
from timm.optim.lookahead import Lookahead
from torch import nn
from torch.optim import LBFGS, SGD, Adafactor, Adagrad, Adam, AdamW, Muon, NAdam, Optimizer, RMSprop, Rprop
from torch.optim.lr_scheduler import StepLR

from aimc_pl.devices import soft_bounds
from aimc_pl.devices.conversion import convert_to_analog, make_analog_aware
from aimc_pl.errors import UsageError
from aimc_pl.schedule import Schedule
from aimc_pl.stage import Stage
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.strategies.checks import (
    check_analog_support,
    check_callbacks_of_processes,
    check_closure,
    check_initialized,
    check_microbatches,
    check_module,
    check_optimizer,
    check_parameters,
    check_split,
    check_updates,
    one_optimizer,
    warn_about_other_package,
)
from aimc_pl.strategies.training_step import TrainingStep


class Normalized(Optimizer):
    """An optimizer that divides by the norm of all gradients."""

    def step(self, closure=None):
        loss = closure() if closure else None
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        nn.utils.clip_grads_with_norm_(self.param_groups[0]["params"], 1.0, nn.utils.get_total_norm(gradients))
        super().step()
        return loss


class NormalizedSGD(Normalized, SGD):
    pass


class Clipped(SGD):
    """An optimizer that clips the norm of all gradients, which is below the limit in the test."""

    def step(self, closure=None):
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1000.0)
        return super().step(closure)


class Follows(SGD):
    """An optimizer that adds the first gradient to the last parameter."""

    def step(self, closure=None):
        parameters = self.param_groups[0]["params"]
        loss = super().step(closure)
        parameters[-1].data.add_(parameters[0].grad.sum())
        return loss


class NormalizedAdam(Normalized, Adam):
    """Adam with normalized gradients. Apart from rounding and eps, its first steps hide a common factor of them."""


class Noisy(SGD):
    """Langevin dynamics with a step counter in an attribute."""

    steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure else None
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / self.steps + 0.01 * torch.randn_like(p))
        return loss


class SharpnessAware(SGD):
    def step(self, closure=None):
        assert closure is not None
        closure()
        super().step()
        return closure()


APART = {
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "noisy": lambda p: Noisy(p, lr=0.1),
    "muon": lambda p: Muon([x for x in p if x.dim() == 2], lr=0.1),
    "lars": lambda p: Lars(p, lr=0.1),
    "lamb without clipping": lambda p: Lamb(p, lr=0.1, max_grad_norm=None),
    "lookahead": lambda p: Lookahead(SGD(p, lr=0.1), k=2),
    "fused": lambda p: AdamW(p, lr=0.1, fused=True),
    **{k.__name__: lambda p, k=k: k(p, lr=0.1) for k in (Adam, NAdam, Adagrad, RMSprop, Rprop, Adafactor)},
}
COUPLED = {
    "normalized": lambda p: NormalizedSGD(p, lr=0.1),
    "normalized adam": lambda p: NormalizedAdam(p, lr=0.1),
    "lamb": lambda p: Lamb(p, lr=0.1),
    "clipped": lambda p: Clipped(p, lr=0.1),
}


def network():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def check(net, optimizer, stage):
    net(torch.linspace(-1, 1, 8).view(2, 4)).square().sum().backward()
    gradients = {parameter: parameter.grad for parameter in net.parameters()}
    check_optimizer(optimizer, gradients, Stage(1, net[stage].parameters()))


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("name", APART)
def test_optimizers_that_update_each_parameter_by_itself_pass(name, stage):
    net = network()
    check(net, APART[name]([*net.parameters()]), stage)


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("name", COUPLED)
def test_optimizers_that_compute_with_all_gradients_are_refused(name, stage):
    net = network()
    optimizer = COUPLED[name]([*net.parameters()])
    with pytest.raises(UsageError, match=rf"{type(optimizer).__name__} updates a stage by the gradients of other"):
        check(net, optimizer, stage)


def test_only_the_stage_that_takes_a_gradient_of_another_is_refused():
    net = network()
    check(net, Follows(net.parameters(), lr=0.1), 0)
    with pytest.raises(UsageError, match="Follows updates a stage by the gradients of other"):
        check(net, Follows(net.parameters(), lr=0.1), 2)


def test_optimizers_that_evaluate_the_loss_are_refused():
    net = network()
    with pytest.raises(UsageError, match="SharpnessAware evaluates the loss itself"):
        check(net, SharpnessAware(net.parameters(), lr=0.1), 0)


def test_parameters_of_a_module_in_a_plain_list_are_refused():
    net, hidden = network(), nn.Linear(2, 7)
    check_parameters(net, [SGD(net.parameters(), lr=0.1)])
    with pytest.raises(UsageError, match=r"a parameter of shape \(7, 2\) that is none of Sequential.parameters"):
        check_parameters(net, [SGD([*net.parameters(), *hidden.parameters()], lr=0.1)])


def test_the_check_leaves_no_trace():
    net = network()
    optimizer = Noisy(net.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: pytest.fail("a hook was called"))
    scheduler = StepLR(optimizer, 1)
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict())), torch.get_rng_state()
    check(net, optimizer, 0)
    assert torch.equal(torch.get_rng_state(), before[1])
    assert optimizer.steps == 0
    assert scheduler.get_last_lr() == [0.1]
    assert str((net.state_dict(), optimizer.state_dict())) == str(before[0])


class HasBackward(pl.LightningModule):
    def backward(self, loss):
        loss.backward()


class TakesAnIterator(pl.LightningModule):
    def training_step(self, dataloader_iter):
        return next(dataloader_iter)


class LooksAtTheLoss(pl.LightningModule):
    def on_before_backward(self, loss):
        pass


class LossPrinter(pl.Callback):
    def on_before_backward(self, trainer, pl_module, loss):
        print(loss)


def manual():
    module = pl.LightningModule()
    module.automatic_optimization = False
    return module


def check_fit(module, schedule, callbacks=(), accumulate=1, precision=None):
    trainer = SimpleNamespace(
        lightning_module=module,
        callbacks=[*callbacks],
        accumulate_grad_batches=accumulate,
        precision_plugin=precision or Precision(),
    )
    check_module(trainer, Schedule(schedule, 2, 2))


SYNC, ALL = {"none", "sync"}, {"none", "sync", "1f1b", "zero_bubble", "async"}
ACCUMULATES = "accumulate_grad_batches contradicts schedule='async', which updates after every micro-batch"


@pytest.mark.parametrize("schedule", sorted(ALL))
@pytest.mark.parametrize(
    ("module", "options", "allowed", "message"),
    [
        (pl.LightningModule, {"callbacks": [pl.Callback()]}, ALL, ""),
        (manual, {}, set(), "manual optimization (automatic_optimization=False) cannot be pipelined"),
        (HasBackward, {}, set(), "HasBackward.backward is overridden"),
        (TakesAnIterator, {}, set(), "training_step(dataloader_iter) cannot be split into micro-batches"),
        (LooksAtTheLoss, {}, SYNC, "LooksAtTheLoss.on_before_backward comes too late under schedule="),
        (pl.LightningModule, {"callbacks": [LossPrinter()]}, SYNC, "LossPrinter.on_before_backward comes too late"),
        (LooksAtTheLoss, {"callbacks": [pl.Callback(), LossPrinter()]}, SYNC, "LossPrinter.on_before_backward"),
        (pl.LightningModule, {"accumulate": 2}, ALL - {"async"}, ACCUMULATES),
        (
            pl.LightningModule,
            {"callbacks": [pl.Callback(), GradientAccumulationScheduler({0: 2})]},
            ALL - {"async"},
            ACCUMULATES,
        ),
        (pl.LightningModule, {"precision": MixedPrecision("bf16-mixed", "cpu")}, ALL, ""),
        (
            pl.LightningModule,
            {"precision": MixedPrecision("16-mixed", "cpu")},
            set(),
            "precision='16-mixed' needs one loss scale for all stages: use precision='bf16-mixed'",
        ),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused(module, options, allowed, message, schedule):
    if schedule in allowed:
        check_fit(module(), schedule, **options)
        return
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        check_fit(module(), schedule, **options)
    assert "on_before_backward" not in message or f"schedule={schedule!r}" in str(error.value)


@pytest.mark.parametrize(
    ("backend", "device", "precision", "message"),
    [
        ("mean_field", "cpu", Precision(), None),
        ("mean_field", "cuda", MixedPrecision("bf16-mixed", "cpu"), None),
        ("aihwkit", "cpu", Precision(), None),
        ("aihwkit", "cuda", Precision(), "this build of aihwkit has no AnalogTile for cuda: choose a device with"),
        ("mean_field", "cpu", DoublePrecision(), "tiles compute in float32: precision='64-true' is for digital"),
        (None, "cuda", DoublePrecision(), None),
    ],
)
def test_where_tiles_can_run(backend, device, precision, message, monkeypatch):
    """Check against a build of aihwkit without CUDA."""
    monkeypatch.setattr("aihwkit.simulator.rpu_base.cuda.is_compiled", lambda: False)
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    if backend is not None:
        convert_to_analog(net, {"1": soft_bounds(backend=backend)})
    with nullcontext() if message is None else pytest.raises(UsageError, match=message):
        check_analog_support(net, torch.device(device), precision)


def test_tiles_run_on_a_gpu_for_which_aihwkit_is_built(monkeypatch):
    monkeypatch.setattr("aihwkit.simulator.rpu_base.cuda.is_compiled", lambda: True)
    net = nn.Sequential(nn.Linear(2, 3))
    convert_to_analog(net, soft_bounds(backend="aihwkit"))
    check_analog_support(net, torch.device("cuda"), Precision())


def test_several_optimizers_are_told_in_the_words_of_the_pipeline():
    message = "trains with one optimizer, and configure_optimizers returns several"
    with pytest.raises(UsageError, match=message), one_optimizer():
        raise RuntimeError("Training with multiple optimizers is only supported with manual optimization")
    with pytest.raises(RuntimeError, match="something else"), one_optimizer():
        raise RuntimeError("something else")


class StepsWithoutClosure(SGD):
    def step(self):
        super().step()


class SearchesTwice(LBFGS):
    def step(self, closure=None):
        super().step(closure)
        return super().step(closure)


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("make", [SGD, StepsWithoutClosure, LBFGS, SearchesTwice])
def test_a_step_that_needs_a_closure_is_refused_where_stages_update_apart(make, apart):
    net = network()
    refuses = issubclass(make, LBFGS) and apart
    with pytest.raises(UsageError, match=f"{make.__name__} evaluates the loss itself") if refuses else nullcontext():
        check_closure(net, make(net.parameters(), lr=0.1), stages_update_apart=apart)


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("is_aware", [True, False])
@pytest.mark.parametrize("make", [SGD, LBFGS])
def test_a_step_that_needs_a_closure_is_refused_with_analog_layers(make, is_aware, apart):
    """Check optimizers that the user has converted already, too."""
    net = network()
    convert_to_analog(net, {"2": "soft_bounds"})
    optimizer = make(net.parameters(), lr=0.1)
    if is_aware:
        make_analog_aware(optimizer)
    refuses = pytest.raises(UsageError, match=r"LBFGS evaluates the loss between changes .* set device=None")
    with refuses if make is LBFGS else nullcontext():
        check_closure(net, optimizer, stages_update_apart=apart)


def test_a_step_that_needs_a_closure_may_update_the_digital_layers_beside_analog_ones():
    net = network()
    convert_to_analog(net, {"2": "soft_bounds"})
    check_closure(net, LBFGS(net[0].parameters()), stages_update_apart=False)


def test_an_optimizer_must_update_the_module():
    net, other = network(), nn.Linear(2, 2)
    check_updates(net, SGD([{"params": [*other.parameters()]}, {"params": [net[2].bias]}], lr=0.1))
    with pytest.raises(UsageError, match="the optimizer updates no parameter of the module: make it within"):
        check_updates(net, SGD(other.parameters(), lr=0.1))


def test_no_stage_begins_with_a_lazy_module():
    net = nn.Sequential(nn.LazyLinear(2), nn.Sequential(nn.LazyLinear(3)), nn.Linear(3, 3))
    check_initialized(net, ["2", "1"])
    with pytest.raises(UsageError, match=r"'1\.0' is lazy, and no stage can begin there"):
        check_initialized(net, ["2", "1.0", "0"])


def microbatch_warnings(net, losses, *, by_sample=True, dtype=torch.float32, **options):
    """Return the warnings about micro-batches of three samples and one, whose losses are followed by the whole's."""
    settings = AnalogPipelineStrategy(num_microbatches=2, **options).settings
    steps = [TrainingStep(None, None, size, size / 4, size / 4, nullcontext) for size in (3, 1)]
    losses = None if losses is None else [torch.tensor(loss, dtype=dtype) for loss in losses]
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        check_microbatches(net, losses, steps, settings, by_sample)
    return [str(warning.message) for warning in record]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_split_that_changes_the_loss_is_warned_of(reduction, dtype):
    """Check losses of 2 and 6, with mean 3 and sum 8, and how exactly that of the whole batch must agree."""
    whole, exact = {"mean": 3.0, "sum": 8.0}[reduction], 1e-7 if dtype == torch.float64 else 1e-3
    for factor in (1, 1 + 0.9 * exact, 1 - 0.9 * exact):
        assert not microbatch_warnings(network(), [2, 6, factor * whole], dtype=dtype, loss_reduction=reduction)
    (text,) = microbatch_warnings(network(), [2, 6, 1.25 * whole], dtype=dtype, loss_reduction=reduction)
    assert text.startswith(f"splitting the mini-batch changes its loss from {1.25 * whole:g} to {whole:g}, because")
    assert microbatch_warnings(network(), [2, 6, (1 + 2 * exact) * whole], dtype=dtype, loss_reduction=reduction)


def test_a_network_that_takes_time_first_is_refused_only_if_the_split_may_be_along_time():
    nets = {
        batch_first: nn.Sequential(nn.Tanh(), nn.LSTM(2, 2, batch_first=batch_first)) for batch_first in (False, True)
    }
    message = "changes its loss from 5 to 3, and '1' takes time first"
    with pytest.raises(UsageError, match=message):
        microbatch_warnings(nets[False], [2, 6, 5])
    assert not microbatch_warnings(nets[False], [2, 6, 3])
    assert len(microbatch_warnings(nets[False], [2, 6, 5], by_sample=False)) == 1
    assert len(microbatch_warnings(nets[True], [2, 6, 5])) == 1


BATCH_NORM = "BatchNorm computes its statistics per micro-batch (the mini-batch is split into 2)"
REDUCES = "1 reduces by {!r} and the strategy's loss_reduction is {!r}: if it is the training loss"


@pytest.mark.parametrize(
    ("layer", "reduction", "expected"),
    [
        (nn.Tanh(), "mean", []),
        (nn.BatchNorm2d(3), "mean", [BATCH_NORM]),
        (nn.BatchNorm2d(3).eval(), "mean", []),
        (nn.BatchNorm2d(3, track_running_stats=False), "mean", []),
        (nn.CrossEntropyLoss(), "mean", []),
        (nn.CrossEntropyLoss(), "sum", [REDUCES.format("mean", "sum")]),
        (nn.MSELoss(reduction="sum"), "mean", [REDUCES.format("sum", "mean")]),
        (nn.MSELoss(reduction="sum"), "sum", []),
    ],
)
def test_without_losses_known_causes_are_warned_of(layer, reduction, expected):
    warned = microbatch_warnings(nn.Sequential(nn.Tanh(), layer), None, loss_reduction=reduction)
    assert len(warned) == len(expected)
    assert all(text.startswith(start) for text, start in zip(warned, expected, strict=True))


def test_the_package_of_another_name_is_warned_of(monkeypatch):
    monkeypatch.delitem(sys.modules, "pytorch_lightning", raising=False)
    warn_about_other_package()
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.warns(UserWarning, match="pytorch_lightning is imported, and this strategy is for the package"):
        warn_about_other_package()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, None),
        (["body.0", "body", "head.0"], None),
        (
            ["body", "1"],
            "split_at names '1', which is no submodule of ModuleDict: names are relative to the "
            "LightningModule, so write 'body.1'",
        ),
        (["0"], "split_at names '0', which is no submodule of ModuleDict; it has body, body.0, body.1, head, head.0"),
        (
            ["ody"],
            "split_at names 'ody', which is no submodule of ModuleDict; it has body, body.0, body.1, head, head.0",
        ),
        ([""], "split_at names '', which is no submodule of ModuleDict; it has body, body.0, body.1, head, head.0"),
    ],
)
def test_split_at_has_names_of_submodules(names, message):
    net = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.Tanh()), "head": nn.Sequential(nn.Linear(2, 2))})
    with nullcontext() if message is None else pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        check_split(net, names, num_stages=6)


@pytest.mark.parametrize("callback", [LearningRateFinder(), BatchSizeFinder()])
def test_a_search_by_the_loss_needs_one_process(callback):
    check_callbacks_of_processes(SimpleNamespace(callbacks=[GradientAccumulationScheduler({0: 2})]))
    with pytest.raises(UsageError) as error:
        check_callbacks_of_processes(SimpleNamespace(callbacks=[callback]))
    assert str(error.value) == (
        f"{type(callback).__name__} needs the loss, which only one of several processes knows: use it with devices=1"
    )
