"""These tests compare `none` and `sync` with plain Lightning, and `async` with a recomputation."""

import copy

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.demos.transformer import LightningTransformer
from lightning_modules import MLP, Attributes, ConvNet, DictBatch, Samples, TorchvisionResNet, loader, make_trainer
from reference import delayed_updates
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aimc_pl.analog import is_analog
from aimc_pl.devices import soft_bounds
from aimc_pl.microbatch import split_batch
from aimc_pl.models import ResNet
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.tasks import Classifier
from aimc_pl.weights import read_weights


def fit(make_module, strategy, optimizer="momentum", data=None, **kwargs):
    L.seed_everything(7)
    module = make_module().double()
    module.optimizer = optimizer
    trainer = make_trainer(strategy, **kwargs)
    trainer.fit(module, loader(module) if data is None else data())
    return module, trainer


def assert_same_weights(ours, plain):
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("make_module", [MLP, ConvNet, Attributes, DictBatch])
def test_sync_equals_plain_lightning(make_module, optimizer):
    plain, _ = fit(make_module, "auto", optimizer)
    for schedule, num_stages, num_microbatches in [
        ("none", 2, 4),
        ("none", 4, 3),
        ("sync", 1, 1),
        ("sync", 3, 4),
        ("sync", 4, 8),
        ("1f1b", 4, 3),
        ("zero_bubble", 4, 5),
    ]:
        module, trainer = fit(make_module, AnalogPipelineStrategy(num_stages, schedule, num_microbatches), optimizer)
        assert trainer.global_step == 6
        assert_same_weights(module, plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference", "device", "num_microbatches"),
    [
        ("sync", None, 1),
        ("sync", None, 5),
        ("sync", soft_bounds(perfect_io=True), 3),
        # Converters draw noise in the order of the forwards and backwards, which is that of 1f1b.
        ("1f1b", "soft_bounds", 3),
        ("1f1b", "mixed_precision", 5),
    ],
)
def test_zero_bubble_equals_other_schedules_bit_for_bit(reference, device, num_microbatches):
    """Check digital layers in float64, and layers on crossbars, over two epochs of three mini-batches."""

    def train(schedule):
        L.seed_everything(7)
        dtype, precision = (torch.float64, "64-true") if device is None else (torch.float32, "32-true")
        module, samples = Attributes().to(dtype), Samples()
        data = DataLoader(TensorDataset(samples.x.to(dtype), samples.y), 8, shuffle=True)
        strategy = AnalogPipelineStrategy(3, schedule, num_microbatches, device, ["l2", "l4"])
        make_trainer(strategy, precision=precision).fit(module, data)
        assert [stage.version for stage in strategy.pipeline.stages] == [6, 6, 6]
        return module

    theirs, ours = train(reference), train("zero_bubble")
    assert torch.equal(read_weights(ours.parameters()), read_weights(theirs.parameters()))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert is_analog(a) or torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_torchvision_resnet_equals_plain_lightning(optimizer):
    plain, _ = fit(TorchvisionResNet, "auto", optimizer, max_epochs=1)
    for schedule, num_stages in [("sync", 4), ("none", 3)]:
        module, _ = fit(TorchvisionResNet, AnalogPipelineStrategy(num_stages, schedule, 3), optimizer, max_epochs=1)
        assert_same_weights(module, plain)


@pytest.mark.parametrize(("schedule", "num_microbatches"), [("none", 3), ("sync", 4), ("1f1b", 2), ("zero_bubble", 3)])
def test_lightning_demo_module_equals_plain_lightning(schedule, num_microbatches):
    """Check BoringModel, which has one layer, a loss that makes its own targets, and a step scheduler."""

    def data():
        generator = torch.Generator().manual_seed(0)
        return DataLoader(torch.randn(22, 32, generator=generator, dtype=torch.float64), batch_size=5)

    plain, _ = fit(BoringModel, "auto", data=data, limit_val_batches=0)
    module, _ = fit(BoringModel, AnalogPipelineStrategy(1, schedule, num_microbatches), data=data, limit_val_batches=0)
    assert_same_weights(module, plain)


@pytest.mark.slow
def test_lightning_demo_transformer_equals_plain_lightning():
    """Check the demo transformer in one stage, because it stores its mask in the forward."""

    def make():
        module = LightningTransformer(vocab_size=20)
        module.prepare_data = lambda: None
        for dropout in (m for m in module.modules() if isinstance(m, nn.Dropout | nn.MultiheadAttention)):
            setattr(dropout, "p" if isinstance(dropout, nn.Dropout) else "dropout", 0.0)
        return module

    def data():
        tokens = torch.randint(0, 20, (10, 2, 7), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(tokens[:, 0], tokens[:, 1]), batch_size=4)

    plain, _ = fit(make, "auto", data=data, max_epochs=1)
    module, _ = fit(make, AnalogPipelineStrategy(1, "sync", 3), data=data, max_epochs=1)
    assert_same_weights(module, plain)


class SquaredError(L.LightningModule):
    """The network that the recomputation trains."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 6)
        )
        self.updates_at_validation = []

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[0].flip(1))

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_start(self):
        if not self.trainer.sanity_checking:
            self.updates_at_validation.append([stage.version for stage in self.trainer.strategy.pipeline.stages])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class StopAfter(L.Callback):
    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = batch_idx == self.batch


@pytest.mark.slow
@pytest.mark.parametrize("duplex", ["half", "full"])
@pytest.mark.parametrize(
    ("trainer_options", "batches", "drains"),
    [
        # The batches have 8, 8, 8, 8 and 3 samples, in 4, 4, 4, 4 and 3 micro-batches.
        ({"max_epochs": 2}, [0, 1, 2, 3, 4] * 2, [5]),
        ({"max_epochs": 2, "limit_train_batches": 3}, [0, 1, 2] * 2, [3]),
        ({"max_epochs": 1, "val_check_interval": 2}, [0, 1, 2, 3, 4], [2, 4]),
        ({"max_epochs": -1, "max_steps": 3}, [0, 1, 2], []),
        ({"max_epochs": 2, "callbacks": [StopAfter(1)]}, [0, 1], []),
        ({"max_epochs": 2, "callbacks": [StopAfter(1)], "limit_val_batches": 0}, [0, 1], []),
    ],
    ids=["epochs", "limit_train_batches", "validation in mid-epoch", "max_steps", "stop", "stop without validation"],
)
def test_async_through_lightning_equals_recomputation(trainer_options, batches, drains, duplex):
    """Check that no update is lost, whatever ends the epoch, and that validation sees an empty pipeline."""
    L.seed_everything(3)
    module = SquaredError().double()
    linears = [layer for layer in module.net if isinstance(layer, nn.Linear)]
    start = [[p.detach().numpy().copy() for p in layer.parameters()] for layer in linears]
    strategy = AnalogPipelineStrategy(4, "async", 4, duplex=duplex)
    train = loader(module, shuffle=False, length=35)
    make_trainer(strategy, **trainer_options).fit(module, train, loader(module))

    data = [batch[0] for batch in train]
    microbatches, firsts = [], [0]
    for index in batches:
        for part in split_batch(data[index], 4):
            x = part.numpy()
            microbatches.append((x, x[:, ::-1], len(x) / len(data[index])))
        firsts.append(len(microbatches))
    delays = [(3 - stage) * (2 if duplex == "full" else 1) for stage in range(4)]
    expected = delayed_updates(
        *zip(*start, strict=True), [0, 1, 2, 3], microbatches, delays, 1.0, [firsts[index] for index in drains]
    )
    for layer, weight, bias in zip(linears, *expected, strict=True):
        np.testing.assert_allclose(layer.weight.detach().numpy(), weight, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(layer.bias.detach().numpy(), bias, rtol=1e-9, atol=1e-12)
    assert strategy.pipeline.num_entered == len(microbatches)
    for versions in module.updates_at_validation:
        assert len(set(versions)) == 1


@pytest.mark.parametrize("schedule", ["async", "sync"])
def test_one_stage_is_stochastic_gradient_descent_whatever_the_scale(schedule):
    """Check that one stage with gradient_scale="microbatch" is plain training on the micro-batches."""

    def data(batch_size):
        return lambda: loader(None, batch_size, shuffle=False, length=16)

    if schedule == "async":
        strategy = AnalogPipelineStrategy(1, "async", 4, gradient_scale="microbatch")
        plain, _ = fit(Attributes, "auto", "adamw", data(2), max_epochs=1, limit_val_batches=0)
        module, _ = fit(Attributes, strategy, "adamw", data(8), max_epochs=1, limit_val_batches=0)
    else:
        plain, _ = fit(Attributes, "auto", "adamw", data(8), max_epochs=1, limit_val_batches=0)
        module, _ = fit(
            Attributes, AnalogPipelineStrategy(1, "sync", 4), "adamw", data(8), max_epochs=1, limit_val_batches=0
        )
    assert_same_weights(module, plain)


@pytest.mark.slow
@pytest.mark.parametrize("num_stages", [2, 4])
def test_full_steps_are_steps_of_a_share_at_a_larger_learning_rate(num_stages):
    """Check with two micro-batches that gradient_scale="microbatch" equals a doubled learning rate."""

    class Plain(Attributes):
        rate = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.rate)

    class Doubled(Plain):
        rate = 0.2

    names = ["l2", "l3", "l4"][4 - num_stages :]

    def run(kind, scale):
        strategy = AnalogPipelineStrategy(num_stages, "async", 2, split_at=names, gradient_scale=scale)
        data = lambda: loader(None, 8, shuffle=False, length=16)  # noqa: E731
        return fit(kind, strategy, "momentum", data, max_epochs=1, limit_val_batches=0)[0]

    assert_same_weights(run(Plain, "microbatch"), run(Doubled, "minibatch"))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["none", "sync"])
def test_sum_losses(schedule):
    class Summed(MLP):
        def training_step(self, batch):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction="sum")

    plain, _ = fit(Summed, "auto")
    module, _ = fit(Summed, AnalogPipelineStrategy(3, schedule, 4, loss_reduction="sum"))
    assert_same_weights(module, plain)


class Surrounded(Attributes):
    """A module with parameters before the backbone and in the loss. Its own forward is the backbone."""

    def __init__(self):
        super().__init__()
        self.before = nn.Parameter(torch.ones(6))
        self.temperature = nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(torch.tanh(batch[0] * self.before)) * self.temperature, batch[1])


def test_parameters_around_the_backbone_are_updated_with_its_ends():
    """Check that `before` is updated with the staleness of stage 0, and the last stage's parameters without delay."""
    L.seed_everything(7)
    module = Surrounded().double()
    reference = copy.deepcopy(module)
    for m in (module, reference):
        m.configure_optimizers = lambda m=m: torch.optim.SGD(m.parameters(), 0.1)
    data = loader(None, 4, shuffle=False, length=8)
    strategy = AnalogPipelineStrategy(2, "async", 2, split_at=["l3"])
    make_trainer(strategy, max_epochs=1, limit_val_batches=0).fit(module, data)

    first = [reference.before, *reference.l1.parameters(), *reference.l2.parameters()]
    second = [p for p in reference.parameters() if not any(p is q for q in first)]

    def tail(hidden):
        return reference.l4(reference.norm(torch.tanh(reference.l3(hidden)))) * reference.temperature

    history = [[p.detach().clone() for p in first]]
    for k, (x, y) in enumerate([part for batch in data for part in split_batch(list(batch), 2)]):
        # The forward of stage 0 used the weights of one version before; its backward uses the current ones.
        hidden, gradients = first_stage(history[max(0, k - 1)], history[k], x)
        hidden.requires_grad_()
        (nn.functional.cross_entropy(tail(hidden), y) / 2).backward()
        history.append([p - 0.1 * g for p, g in zip(history[k], gradients(hidden.grad), strict=True)])
        with torch.no_grad():
            for p in second:
                p -= 0.1 * p.grad
                p.grad = None
    for p, value in zip(first, history[-1], strict=True):
        p.data = value
    assert_same_weights(module, reference)


def first_stage(seen, current, x):
    """Compute stage 0 by hand: its output with the weights ``seen`` and its gradients with the ``current`` ones."""
    before, w1, b1, w2, b2 = seen
    scaled = torch.tanh(x * before)
    h1 = torch.tanh(scaled @ w1.T + b1)
    z2 = h1 @ w2.T + b2
    cumulative, density = 0.5 * (1 + torch.erf(z2 / 2**0.5)), torch.exp(-0.5 * z2**2) / (2 * torch.pi) ** 0.5

    def gradients(error):
        d2 = error * (cumulative + z2 * density)
        d1 = (error + d2 @ current[3]) * (1 - h1**2)
        d0 = (d1 @ current[1]) * (1 - scaled**2)
        return (d0 * x).sum(0), d1.T @ scaled, d1.sum(0), d2.T @ h1, d2.sum(0)

    return h1 + z2 * cumulative, gradients


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:BatchNorm computes its statistics per micro-batch")  # the network has BatchNorm
@pytest.mark.filterwarnings("ignore:splitting the mini-batch changes its loss")  # BatchNorm does that
@pytest.mark.parametrize(("schedule", "num_stages"), [("none", 4), ("sync", 4), ("sync", 8)])
def test_none_and_sync_draw_the_same_noise_in_any_number_of_stages(schedule, num_stages):
    """Check on pulsed devices that the weights equal those of one stage bit for bit."""
    splits = [
        "network.group1.0.conv1",
        "network.group1.0.conv2",
        "network.group2.0.conv1",
        "network.group2.0.conv2",
        "network.group3.0.conv1",
        "network.group3.0.conv2",
    ]
    splits = {1: [], 4: splits[::2], 8: [*splits, "network.pool"]}

    def trained(schedule, num_stages):
        L.seed_everything(3)
        strategy = AnalogPipelineStrategy(num_stages, schedule, 4, device="soft_bounds", split_at=splits[num_stages])
        module = Classifier(ResNet(8, width=4))
        data = TensorDataset(torch.randn(24, 3, 8, 8), torch.arange(24) % 10)
        make_trainer(strategy, precision="32-true", max_epochs=1).fit(module, DataLoader(data, 8))
        layers = [layer for layer in module.modules() if hasattr(layer, "analog_module")]
        digital = [value for name, value in module.named_parameters() if "analog_ctx" not in name]
        assert (len(layers), len(digital)) == (8, 15)
        return [*(layer.get_weights()[0] for layer in layers), *digital, *module.buffers()]

    plain, ours = trained("none", 1), trained(schedule, num_stages)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
