"""These tests check that losses and gradients that are not finite end the run before they reach the weights."""

import re
import warnings
from contextlib import nullcontext

import lightning as L
import pytest
import torch
from lightning_modules import make_trainer
from torch import nn
from torch.utils.data import DataLoader

from aimc_pl.devices import constant_step, residual_learning, soft_bounds
from aimc_pl.devices.conversion import convert_to_analog
from aimc_pl.devices.saturation import cut_fractions, saturated_fraction
from aimc_pl.errors import UsageError
from aimc_pl.stage import Stage
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.strategies.analog_parts import saved
from aimc_pl.strategies.number_check import NumberCheck, check_finite
from aimc_pl.strategies.training_step import TrainingStep

NAN, INF = float("nan"), float("inf")


class SpoilsGradient(torch.autograd.Function):
    """The identity, whose gradient is a number that is not finite."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output):
        return torch.full_like(grad_output, ctx.value), None


class Spoils(nn.Module):
    """A layer that can put a number that is not finite into its output or into the gradient of its input."""

    what, value = None, NAN

    def forward(self, x):
        if self.what == "output":
            return x + self.value
        return SpoilsGradient.apply(x, self.value) if self.what == "gradient" else x.tanh()


class Diverges(L.LightningModule):
    """A module in which one micro-batch leads to a number that is not finite.

    Args:
        what: ``"batch"``, the ``"output"`` of the layer ``net.3``, the ``"loss"``, the ``"gradient"`` of ``net.3``.
        at: number of the micro-batch.
        value: the number that is not finite.
    """

    def __init__(self, what, at, value=NAN):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), Spoils(), nn.Linear(4, 4), nn.Linear(4, 1)
        )
        self.what, self.at, self.value = what, at, value

    def training_step(self, batch):
        x, numbers = batch
        is_now = bool((numbers == self.at).any())
        if self.what == "batch" and is_now:
            x[0, 0] = self.value
        self.net[3].what, self.net[3].value = self.what if is_now else None, self.value
        loss = self.net(x).square().mean()
        self.log("loss", loss)
        return loss * self.value if self.what == "loss" and is_now else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Mends(Diverges):
    """A module whose hook makes all gradients finite."""

    def on_before_optimizer_step(self, optimizer):
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)


def batches(num=4):
    """Return mini-batches of four micro-batches of two samples, each with the number of its micro-batch."""
    torch.manual_seed(1)
    numbers = torch.arange(4 * num).repeat_interleave(2).split(8)
    return DataLoader([(torch.randn(8, 3), number) for number in numbers], batch_size=None)


def fit(module, schedule, num=4, num_microbatches=4, **options):
    strategy = AnalogPipelineStrategy(2, schedule, num_microbatches, split_at=["net.2"], **options)
    trainer = make_trainer(strategy, precision="32-true", max_epochs=1)
    trainer.fit(module, batches(num))
    return module


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["none", "sync", "1f1b", "async"])
@pytest.mark.parametrize(
    ("what", "value", "cause"),
    [
        ("batch", NAN, ", as the batch holds such numbers"),
        ("output", NAN, ", first in the output of 'net.3'"),
        ("output", -INF, ", first in the output of 'net.3'"),
        ("loss", NAN, ""),
        ("loss", INF, ""),
    ],
)
def test_a_loss_ends_the_run(what, value, cause, schedule):
    module = Diverges(what, at=6, value=value)
    with pytest.raises(UsageError) as error:
        fit(module, schedule)
    text = str(error.value)
    assert text.startswith(f"the loss is not finite{cause} (micro-batch 6, clock ")
    assert text.endswith("Lower the learning rate or clip gradients; with on_nonfinite='warn' the run goes on")
    assert len(text) <= 200
    assert weights(module).isfinite().all()
    if schedule != "async":
        assert torch.equal(weights(module), weights(fit(Diverges(None, at=6), schedule, num=1)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:splitting the mini-batch changes its loss")  # the whole batch skips tanh
@pytest.mark.parametrize("schedule", ["none", "sync", "1f1b", "async"])
@pytest.mark.parametrize("at", [0, 6, 15])
def test_a_gradient_ends_the_run_before_the_update(schedule, at):
    module = Diverges("gradient", at)
    first = 4 * (at // 4)
    which = f"micro-batch {at}" if schedule == "async" else f"micro-batches {first} to {first + 3}"
    with pytest.raises(
        UsageError, match=rf"the gradient of 'net\.2\.bias' is not finite \(stage 1, {which}, clock \d+"
    ):
        fit(module, schedule)
    assert weights(module).isfinite().all()


def test_a_process_reads_the_weights_of_its_own_stages_only():
    """Check that weights of other stages are not read, because the process does not have them."""
    module, step = Diverges(None, at=0), TrainingStep(lambda: None, torch.ones(2), 2, 1.0, 1.0, nullcontext)
    step.output, step.number = torch.tensor(NAN), 3
    with torch.no_grad():
        module.net[0].weight[0, 0] = NAN
    check = NumberCheck(module, "stop", None)
    for name, cause in (("net.2.weight", ""), ("net.0.weight", ", as are the weights of 'net.0.weight'")):
        stage = Stage(0)
        stage.parameters = [module.get_parameter(name)]
        check.stages = [stage]
        with pytest.raises(UsageError, match=rf"the loss is not finite{cause} \(micro-batch 3, clock 9\)"):
            check.check_losses([step], clock=9)


class TrainsAPlainTensor(Diverges):
    """A module whose optimizer has a tensor that no module has."""

    def __init__(self, rate, what=None):
        super().__init__(what, at=6)
        self.rate = rate
        self.outside = [torch.ones(4, 4, requires_grad=True)]

    def training_step(self, batch):
        loss = super().training_step(batch) + self.outside[0].square().mean()
        return loss * (NAN if self.rate is None and bool((batch[1] == 6).any()) else 1.0)

    def configure_optimizers(self):
        own = {"params": self.outside, "lr": self.rate or 0.1}
        return torch.optim.SGD([{"params": [*self.parameters()]}, own], lr=0.1)


def test_tensors_outside_of_the_module_are_told_so():
    with pytest.raises(UsageError, match="the loss is not finite"):
        fit(TrainsAPlainTensor(None), "async")
    with pytest.warns(UserWarning, match=r"one update has made a tensor outside of the module of stage \d 7.0 times"):
        fit(TrainsAPlainTensor(rate=256.0), "async", num=1)


class SpoilsLater(Diverges):
    """A module in which a hook spoils all gradients of a mini-batch."""

    def __init__(self, at):
        super().__init__(None, at=0)
        self.at_batch = at

    def training_step(self, batch, batch_idx):
        self.batch_idx = batch_idx
        return super().training_step(batch)

    def on_before_optimizer_step(self, optimizer):
        if self.batch_idx == self.at_batch:
            for parameter in self.parameters():
                parameter.grad.fill_(NAN)


@pytest.mark.parametrize(
    ("at", "num", "options", "which"),
    [
        (0, 2, {}, "micro-batches 0 to 1, clock 6"),
        (2, 2, {}, "micro-batches 4 to 5, clock 18"),
        (1, 1, {}, "micro-batch 1, clock 8"),
        (3, 2, {"accumulate_grad_batches": 2}, "micro-batches 4 to 7, clock 24"),
    ],
)
def test_the_micro_batches_of_an_update_are_named(at, num, options, which):
    strategy = AnalogPipelineStrategy(2, "sync", num, split_at=["net.2"])
    trainer = make_trainer(strategy, precision="32-true", max_epochs=1, **options)
    with pytest.raises(UsageError, match=rf"the gradient of \S+ is not finite \(stage 1, {which}\)"):
        trainer.fit(SpoilsLater(at), batches(4))


def test_the_clock_is_that_of_the_backward():
    """Check the clock in the message: under ``async`` the last of two stages has the backward of k in clock 2k + 2."""
    with pytest.raises(UsageError, match=r"stage 1, micro-batch 6, clock 14\)"):
        fit(Diverges("gradient", at=6), "async")


@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_gradients_that_a_hook_mends_are_finite(schedule):
    assert weights(fit(Mends("gradient", at=6), schedule)).isfinite().all()


@pytest.mark.parametrize("schedule", ["sync", "async"])
@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_warning_goes_on_and_comes_once(what, schedule):
    module = Diverges(what, at=6)
    with pytest.warns(UserWarning, match="is not finite") as record:
        fit(module, schedule, on_nonfinite="warn")
    assert len([warning for warning in record if "is not finite" in str(warning.message)]) == 1
    assert not weights(module).isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1e30])
def test_large_gradients_are_finite(value):
    """Check gradients of 1e30, whose squares, and so their norm, are infinite in single precision."""
    module = Diverges("gradient", at=6, value=value)
    fit(module, "sync", num=2)
    assert weights(module).isfinite().all()


def test_errors_that_wait_for_tiles_are_looked_at():
    """Check that an error is found before it becomes pulses, which are bounded and would hide it in finite weights."""
    module = Diverges("gradient", at=6)
    with pytest.raises(UsageError, match=r"the gradient of 'net\.2\S*' is not finite \(stage 1, micro-batch 6"):
        fit(module, "async", device="soft_bounds")


class Normalized(L.LightningModule):
    """A network of many layers with BatchNorm."""

    def __init__(self, lr, last=False):
        super().__init__()
        torch.manual_seed(0)
        blocks = (nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh()) for _ in range(12))
        self.net = nn.Sequential(*blocks, nn.Linear(8, 3))
        self.lr = lr
        if last is not None:
            nn.init.normal_(self.net[-1].weight, std=last)

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


GROWS = r"one update has made 'net\.\d+\.0\.weight' of stage \d \d+\.\d times as large: .*Lower the learning rate"


def fit_normalized(lr, schedule, last=None):
    torch.manual_seed(1)
    data = [(torch.randn(32, 8), torch.randint(3, (32,))) for _ in range(10)]
    module = Normalized(lr, last)
    strategy = AnalogPipelineStrategy(4, schedule, 4, split_at=["net.3", "net.6", "net.9"])
    trainer = make_trainer(strategy, precision="32-true", max_epochs=1)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, DataLoader(data, batch_size=None))
        except UsageError as error:
            return str(error), [str(warning.message) for warning in record]
    return None, [str(warning.message) for warning in record]


def test_weights_that_grow_at_the_start_are_warned_of_before_gradients_explode():
    """Check a large learning rate, with which the asynchronous pipeline diverges and the synchronous one does not."""
    error, warned = fit_normalized(10.0, "async")
    assert error is not None
    assert len([text for text in warned if re.match(GROWS, text)]) == 1
    error, warned = fit_normalized(10.0, "sync")
    assert error is None
    assert not any("times as large" in text for text in warned)


@pytest.mark.slow
@pytest.mark.parametrize("last", [None, 0.0, 1e-6])
def test_usual_learning_rates_are_not_warned_of(last):
    """Check that a usual learning rate gives no warning, also for layers that start at or near zero."""
    error, warned = fit_normalized(0.1, "async", last)
    assert error is None
    assert not any("times as large" in text for text in warned)


class Drifts(L.LightningModule):
    """A module whose loss drives all weights of its first layer in one direction."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Identity(), nn.Linear(8, 2))

    def training_step(self, batch):
        return self.net[0](torch.ones_like(batch[0])).mean() + 0 * self.net(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("device", [soft_bounds(tau=0.6), constant_step(w_max=0.6)], ids=["soft", "hard"])
@pytest.mark.parametrize("num", [1, 400])
def test_weights_at_their_bounds_are_warned_of_once(device, num):
    """Check the warning when the first layer's weights are at the lower bound and the last layer's are not."""
    data = DataLoader([(torch.randn(8, 8), None) for _ in range(num)], batch_size=None)
    module = Drifts()
    strategy = AnalogPipelineStrategy(2, "sync", 1, device, split_at=["net.2"])
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        make_trainer(strategy, precision="32-true", max_epochs=2).fit(module, data)
    texts = [str(warning.message) for warning in record if "at the bounds" in str(warning.message)]
    saturated = saturated_fraction(module.net[0])
    assert saturated == (1.0 if num > 1 else pytest.approx(0.0, abs=0.1))
    assert saturated_fraction(module.net[2]) < 0.1
    assert [text[:52] for text in texts] == (
        ["100 % of the weights of 'net.0' are at the bounds of"] if num > 1 else []
    )


def finished(loss, inputs=None, number=3, function=None):
    """Return a run of training_step that is over."""
    step = TrainingStep(function or (lambda: None), inputs, 2, 1.0, 1.0, nullcontext)
    step.output, step.number = loss if loss is None else torch.tensor(loss), number
    return step


def stage_of(*parameters, index=1):
    return Stage(index, parameters)


def with_gradient(shape, gradient):
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = gradient
    return parameter


def row(shape, number, value=NAN):
    """Return a gradient with one row that is not finite."""
    gradient = torch.zeros(shape)
    gradient[number] = value
    return gradient


def sparse(value):
    values = [[1.0, 1.0], [1.0, 1.0], [value, value]]
    return torch.sparse_coo_tensor([[4, 1, 4]], values, (5, 2), check_invariants=True)


@pytest.mark.parametrize(
    ("shape", "gradient", "finite"),
    [
        ((3,), row(3, 2), False),
        ((), torch.tensor(INF), False),
        ((3, 2), row((3, 2), 2), False),
        ((3, 1), row((3, 1), 1), False),
        ((3, 2, 2, 2), row((3, 2, 2, 2), 1, -INF), False),
        ((5, 2), sparse(NAN), False),
        ((5, 2), sparse(1.0), True),
        ((3, 2), torch.zeros(3, 2), True),
        ((3, 2), None, True),
        ((3, 0), torch.zeros(3, 0), True),
        ((3, 2, 0), torch.zeros(3, 2, 0), True),
        ((0, 2), torch.zeros(0, 2), True),
    ],
)
def test_gradients_of_all_shapes_are_looked_at(shape, gradient, finite):
    """Check gradients with a row that is not finite, as an error that is not finite gives, and empty gradients."""
    net = nn.Module()
    net.good, net.seen = with_gradient((2, 2), torch.ones(2, 2)), with_gradient(shape, gradient)
    message = r"the gradient of 'seen' is not finite \(stage 1, micro-batch 7, clock 9\)"
    with nullcontext() if finite else pytest.raises(UsageError, match=message):
        NumberCheck(net, "stop", None).check_gradients(stage_of(net.good, net.seen), 9, "micro-batch 7", [])


@pytest.mark.parametrize("value", [1.0, NAN])
def test_errors_that_wait_for_a_tile_are_its_gradient(value):
    net = nn.Sequential(nn.Linear(3, 2, bias=False))
    convert_to_analog(net, soft_bounds())
    for factor in (1.0, value):
        (factor * net(torch.ones(4, 3))).sum().backward()
    message = r"the gradient of '0' is not finite \(stage 1, micro-batch 7"
    with nullcontext() if value == 1.0 else pytest.raises(UsageError, match=message):
        NumberCheck(net, "stop", None).check_gradients(stage_of(*net.parameters()), 9, "micro-batch 7", [])


def test_the_gradient_that_comes_first_in_the_backward_is_named():
    net = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(4)))
    for number, layer in enumerate(net):
        layer.weight.grad = torch.full((2, 2), NAN if number in (1, 2) else 1.0)
    with pytest.raises(UsageError, match=r"the gradient of '2\.weight' is not finite"):
        NumberCheck(net, "stop", None).check_gradients(stage_of(*net.parameters()), 9, "micro-batch 7", [])


def test_a_loss_that_is_not_finite_is_told_before_its_gradient():
    net = nn.Linear(2, 2)
    net.weight.grad = torch.full((2, 2), NAN)
    steps = [finished(None), finished(1.0), finished(INF, number=5), finished(NAN, number=6)]
    with pytest.raises(UsageError, match=r"the loss is not finite \(micro-batch 5, clock 9\)"):
        NumberCheck(net, "stop", None).check_gradients(stage_of(net.weight), 9, "micro-batch 7", steps)


@pytest.mark.parametrize("first", ["loss", "gradient"])
def test_only_the_first_number_is_warned_of(first):
    net = nn.Linear(2, 2)
    net.weight.grad = torch.full((2, 2), NAN)
    check = NumberCheck(net, "warn", None)
    calls = {
        "loss": lambda: check.check_losses([finished(NAN)], 9),
        "gradient": lambda: check.check_gradients(stage_of(net.weight), 9, "micro-batch 7", []),
    }
    with pytest.warns(UserWarning, match=f"the {first}.* is not finite"):
        calls[first]()
    for call in calls.values():
        call()


GOOD, BAD = torch.ones(2, 2), torch.full((2, 2), NAN)


@pytest.mark.parametrize(
    ("inputs", "weight", "told"),
    [
        (GOOD, 1.0, ""),
        (BAD, NAN, ", as the batch holds such numbers"),
        ({"x": GOOD, "more": ["text", torch.arange(2), (7, BAD)]}, NAN, ", as the batch holds such numbers"),
        ({"x": GOOD, "more": ["text", torch.arange(2), NAN]}, INF, ", as are the weights of '0.weight'"),
    ],
)
def test_the_cause_of_a_loss_is_searched_in_the_batch_and_the_weights(inputs, weight, told):
    net = nn.Sequential(nn.Linear(2, 2, bias=False))
    nn.init.constant_(net[0].weight, weight)
    check = NumberCheck(net, "stop", None)
    check.stages = [stage_of(*net.parameters())]
    with pytest.raises(UsageError, match=rf"the loss is not finite{re.escape(told)} \(micro-batch 3, clock 9\)"):
        check.check_losses([finished(NAN, inputs)], 9)


class Adds(nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.value = value

    def forward(self, x):
        return x + self.value


@pytest.mark.parametrize(
    ("values", "outside", "told"),
    [
        ((0.0, 0.0, 0.0), 0.0, ""),
        ((0.0, NAN, NAN), 0.0, ", first in the output of '1.0'"),
        ((0.0, 0.0, INF), 0.0, ", first in the output of '2'"),
        ((0.0, 0.0, 0.0), NAN, ", first in the output of '0'"),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_the_first_output_that_is_not_finite_is_found_in_another_run(values, outside, told, fails):
    """Check this also for a run that fails, and for a module outside of the network, which has no name there."""
    net = nn.Sequential(Adds(values[0]), nn.Sequential(Adds(values[1])), Adds(values[2]))
    other, entered = Adds(outside), []

    def training_step():
        net(other(GOOD))
        if fails:
            raise ValueError("the step cannot run again")
        return torch.tensor(0.0)

    def running_again():
        entered.append(True)
        return nullcontext()

    hooks = len(torch.nn.modules.module._global_forward_hooks)
    check = NumberCheck(net, "stop", running_again)
    with pytest.raises(UsageError, match=rf"the loss is not finite{re.escape(told)} \(micro-batch 3, clock 9\)"):
        check.check_losses([finished(NAN, GOOD, function=training_step)], 9)
    assert entered == [True]
    assert len(torch.nn.modules.module._global_forward_hooks) == hooks


def grown(shape, norms, version=0, times=1):
    """Return the warnings about weights of these norms, one after the other.

    Args:
        shape: the shape of the weights.
        norms: the norms of the weights before each update.
        version: the number of updates of the stage at the last of these.
        times: the number of weights that are like this.
    """
    net = nn.Module()
    for number in range(times):
        net.register_parameter(f"w{number}", nn.Parameter(torch.ones(shape)))
    stage, check = stage_of(*net.parameters()), NumberCheck(net, "stop", None)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for number, norm in enumerate(norms, 1):
            for weight in stage.parameters:
                weight.data = torch.full(shape, norm / weight.numel() ** 0.5)
            stage.version = version if number == len(norms) else 0
            check.watch_growth(stage)
    return [str(warning.message) for warning in record]


@pytest.mark.parametrize(
    ("shape", "norms", "warned"),
    [
        ((4, 3), [1, 1.6], "1.6"),
        ((4, 3), [1, 1.2, 1.7, 6.8], "4.0"),
        ((4, 3), [1, 1.4, 2.0], None),
        ((4, 3), [2, 1], None),
        ((4, 3), [1, 2, 4], "2.0"),
        ((4,), [1, 2], None),
        ((), [1, 2], None),
        ((1, 4), [1, 2], "2.0"),
        ((1, 4, 3), [1, 2], None),
        ((1, 2, 3, 3), [1, 2], None),
        ((2, 4, 3), [1, 2], "2.0"),
        ((3, 2, 2, 2), [1, 2], "2.0"),
        # A row of a weight that acts has a root-mean-square norm above 0.01.
        ((16, 4), [0.05, 0.1], "2.0"),
        ((16, 4), [0.03, 1.0, 2.0], None),
        ((16, 4), [0, 1.0, 2.0], None),
    ],
)
def test_weights_that_one_update_makes_much_larger_are_warned_of(shape, norms, warned):
    texts = grown(shape, norms)
    assert len(texts) == (warned is not None)
    for text in texts:
        assert text.startswith(f"one update has made 'w0' of stage 1 {warned} times as large: ")


def test_growth_is_watched_beside_biases_and_analog_layers():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    convert_to_analog(net, {"0": soft_bounds()})
    check, stage = NumberCheck(net, "stop", None), stage_of(*net.parameters())
    check.watch_growth(stage)
    net[1].weight.data *= 2
    with pytest.warns(UserWarning, match=r"one update has made '1\.weight' of stage 1 2\.0 times as large"):
        check.watch_growth(stage)


def test_the_growth_of_weights_is_watched_for_twenty_updates_and_warned_of_once():
    assert len(grown((4, 3), [1, 2], version=20)) == 1
    assert not grown((4, 3), [1, 2], version=21)
    assert len(grown((4, 3), [1, 2, 4], times=2)) == 1


@pytest.mark.parametrize(("at_bounds", "warned"), [(0, False), (1, False), (2, True), (12, True)])
def test_an_analog_layer_with_weights_at_their_bounds_is_warned_of_once(at_bounds, warned):
    """Check the layer with most weights at the bounds, when a tenth of its 12 weights may be there."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 3))
    convert_to_analog(net, {"1": constant_step(w_max=0.6), "2": constant_step(w_max=0.6)})
    for layer, count in ((net[1], at_bounds), (net[2], 0)):
        tile = next(layer.analog_tiles())
        weight, upper = tile.tile.get_weights(as_ref=True), torch.as_tensor(tile.tile.crossbars[0].response.bounds[1])
        weight.fill_(0.0)
        weight.view(-1)[:count] = upper.expand_as(weight).reshape(-1)[:count]
    check = NumberCheck(net, "stop", None)
    check.watch_tiles()
    check.stages = [Stage(0, modules=[net[0], net[1]]), Stage(1, modules=[net[2]])]
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        check.watch_tiles()
        check.watch_tiles()
    expected = f"{100 * at_bounds / 12:.0f} % of the weights of '1' are at the bounds of their devices"
    assert [str(warning.message)[: len(expected)] for warning in record] == warned * [expected]


def watched_twice(net):
    """Look at the tiles of both layers twice, and return what is warned of besides weights at their bounds."""
    check = NumberCheck(net, "stop", None)
    check.stages = [Stage(0, modules=[net[0], net[1]])]
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        check.watch_tiles()
        check.watch_tiles()
    return [str(warning.message) for warning in record if "are at the bounds" not in str(warning.message)]


@pytest.mark.parametrize(
    ("pulses", "warned"), [([20] * 20, False), ([20, 40] * 10, True), ([400] * 20, True), ([400] * 19, False)]
)
def test_an_analog_layer_whose_pulse_trains_are_too_short_is_warned_of_once(pulses, warned):
    """Check updates of so many pulses at every cross-point, of which a train of aihwkit's default length holds 31."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    convert_to_analog(net, constant_step(num_states=2000))
    tile = net[1].analog_module.tile
    for count in pulses:
        tile.set_learning_rate(count * 0.001)
        tile.update(torch.ones(2, 3), torch.ones(2, 4))
    lost = sum(max(0, 1 - 31 / count) for count in pulses) / len(pulses)
    expected = f"about {100 * lost:.0f} % of the gradient of '1' is lost, as pulse trains are cut"
    texts = watched_twice(net)
    assert [text[: len(expected)] for text in texts] == warned * [expected]
    assert all(len(text) <= 200 for text in texts)
    assert cut_fractions(net[1]) == (0, 0)


@pytest.mark.parametrize(
    ("options", "carried"),
    [({}, None), ({"transfer_lr": 2.0}, 31), ({"num_crossbars": 3, "transfer_every": [1.0, 1.0]}, 47)],
)
@pytest.mark.parametrize("backend", ["mean_field", "bits"])
def test_transfers_of_which_pulse_trains_carry_less_than_half_are_warned_of_once(backend, options, carried):
    """Check transfers of a column of 0.1, which at β = 1 and a learning rate of 0.5 takes 50 steps of 0.001.

    A train of aihwkit's default length holds 31 of them. So the middle one of three crossbars moves to 0.131 before it
    is transferred itself, which takes 65 steps.
    """
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    device = residual_learning(constant_step(num_states=2000, backend=backend, perfect_io=True), **options)
    convert_to_analog(net, device)
    tile = net[1].analog_module.tile
    tile.set_learning_rate(0.5)
    for _ in range(30):
        for crossbar in tile.crossbars[:-1]:
            crossbar.write(torch.full((4, 3), 0.1))
        tile.update(torch.zeros(2, 3), torch.zeros(2, 4))
    texts = watched_twice(net)
    expected = f"pulse trains, cut at desired_bl, carry about {carried} % of what the crossbars of '1' transfer"
    assert [text[: len(expected)] for text in texts] == (carried is not None) * [expected]
    assert all(len(text) <= 200 for text in texts)
    assert cut_fractions(net[1]) == (0, 0)


@pytest.mark.parametrize(
    ("spoilt", "told"),
    [
        (None, None),
        ("0.weight", "0.weight"),
        ("1.bias", "1.bias"),
        ("2", "2"),
        ("frozen", None),
        ("buffer", None),
    ],
)
def test_weights_that_are_not_finite_are_not_saved(spoilt, told):
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 3))
    convert_to_analog(net, {"2": soft_bounds()})
    net.frozen, net.unsaved = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(BAD)
    net.register_buffer("buffer", torch.ones(2))
    state = saved(net.state_dict())
    del state["unsaved"]
    tiles = state["2.analog_module.analog_tile_state"]
    if spoilt is not None:
        bad = tiles["analog_tile_weights"] if spoilt == "2" else state[spoilt]
        bad.view(-1)[-1] = -INF
    message = f"after step 12 the weights of {told!r} are not finite: nothing is saved, and earlier checkpoints stay"
    with nullcontext() if told is None else pytest.raises(UsageError, match=re.escape(message)):
        check_finite(net, state, 12)


def test_an_unknown_choice_is_refused():
    with pytest.raises(UsageError, match="unknown on_nonfinite 'ignore': choose one of stop, warn"):
        AnalogPipelineStrategy(2, on_nonfinite="ignore")
