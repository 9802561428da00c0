"""These tests train pipelines on a GPU, and compare them with the same pipelines on the CPU."""

import pytest
import torch
from lightning_modules import make_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aimc_pl.callbacks import DeviceMonitor, DeviceNoise, StalenessMonitor
from aimc_pl.devices import mixed_precision, residual_learning, soft_bounds
from aimc_pl.imperfections import WriteNoise
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.tasks import Classifier
from aimc_pl.weights import layer_weight, weight_layers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

DEVICES = {
    "digital": None,
    "soft bounds": soft_bounds(),
    "residual learning": residual_learning(soft_bounds()),
    "mixed precision": mixed_precision(soft_bounds()),
}


def weights(module):
    return torch.cat([layer_weight(layer).flatten().cpu() for layer in weight_layers(module).values()])


def trained(schedule, device, accelerator):
    """Return the weights before and after two epochs."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)]
    module = Classifier(nn.Sequential(*layers), num_classes=3)
    before = weights(module)
    data = DataLoader(TensorDataset(torch.randn(48, 1, 6, 6), torch.randint(3, (48,))), batch_size=16)
    callbacks = [StalenessMonitor(), DeviceMonitor(), *([DeviceNoise([WriteNoise(0.01)])] if device is None else [])]
    options = {"precision": "32-true", "callbacks": callbacks, "log_every_n_steps": 1}
    strategy = AnalogPipelineStrategy(3, schedule, 4, device, split_at=["network.2", "network.4"])
    make_trainer(strategy, accelerator=accelerator, **options).fit(module, data)
    return before, weights(module)


@pytest.mark.parametrize("schedule", ["none", "sync", "1f1b", "zero_bubble", "async"])
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_a_pipeline_on_a_gpu_is_that_on_the_cpu(schedule, device, monkeypatch):
    """Check that digital weights are equal, and that analog ones have had the same updates but for their noise.

    The last digits of sums decide on a few pulses. From then on, the tiles may draw other random numbers. A missing or
    a wrong update makes a difference of 1 or more.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before, on_cpu = trained(schedule, device, "cpu")
    _, on_gpu = trained(schedule, device, "gpu")
    change = (on_cpu - before).abs().mean()
    assert change > 1e-4
    assert (on_gpu - on_cpu).abs().mean() < (1e-3 if device is None else 0.7) * change
