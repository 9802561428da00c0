"""These tests compare tiles on a GPU with the same tiles on the CPU: their random numbers are the same."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from aimc_pl.devices import (
    analog_layers,
    chopped_transfer,
    convert_to_analog,
    dynamic_transfer,
    exp_step,
    make_analog_aware,
    mixed_precision,
    noisy_quantized,
    reram_es,
    residual_learning,
    soft_bounds,
    soft_bounds_reference,
    symmetric_point_tracking,
    weight_scaling,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

DEVICES = {
    "soft bounds": soft_bounds(),
    "perfect products": soft_bounds(perfect_io=True),
    "reference": soft_bounds_reference(tau=0.8, device_to_device=0.1),
    "curved steps": exp_step(),
    "measured material": reram_es(),
    "drawn pulses": soft_bounds(backend="bits"),
    "scaled": weight_scaling(soft_bounds()),
    "residual learning": residual_learning(soft_bounds(), gamma=0.4),
    "with a buffer": residual_learning(soft_bounds(), digital_buffer=True),
    "choppers": chopped_transfer(soft_bounds()),
    # With converters, buffers often hold a whole step exactly. Whether they send it then depends on the last digit.
    "AGAD": dynamic_transfer(soft_bounds(perfect_io=True), chop_prob=0.5, transfer_every=0.005),
    "tracking": symmetric_point_tracking(soft_bounds(), gamma=0.4, chop_prob=0.5, transfer_every=0.1),
    "mixed precision": mixed_precision(soft_bounds()),
    "quantized": noisy_quantized(std=0.01, bits=6),
}


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    """Let convolutions keep all bits of float32, of which a GPU drops 13 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def trained(network, device, batches):
    network.to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    make_analog_aware(optimizer)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(network(x.to(device)), y.to(device)).backward()
        optimizer.step()
    return torch.cat([layer.get_weights()[0].flatten().cpu() for layer in analog_layers(network)])


@pytest.mark.parametrize("name", DEVICES)
def test_training_on_a_gpu_is_that_on_the_cpu(name):
    """Check three updates of a convolution and a linear layer.

    Sums in another order differ in the last digits. A pulse or a code in thousands may then be another one.
    """
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(32, 10))
    convert_to_analog(network, DEVICES[name])
    batches = [(torch.randn(16, 3, 8, 8), torch.randint(10, (16,))) for _ in range(3)]
    before = torch.cat([layer.get_weights()[0].flatten() for layer in analog_layers(network)])
    on_cpu, on_gpu = (trained(deepcopy(network), device, batches) for device in ("cpu", "cuda"))
    change = (on_cpu - before).abs().mean()
    assert change > 1e-5
    assert (on_gpu - on_cpu).abs().mean() < 0.02 * change


def test_checkpoints_move_between_devices():
    torch.manual_seed(0)
    batches = [(torch.randn(16, 6), torch.randint(10, (16,))) for _ in range(3)]
    network = nn.Sequential(nn.Linear(6, 10))
    convert_to_analog(network, soft_bounds())
    other = deepcopy(network)
    trained(network, "cuda", batches)
    other.load_state_dict(network.state_dict())
    on_gpu, on_cpu = trained(network, "cuda", batches), trained(other, "cpu", batches)
    torch.testing.assert_close(on_cpu, on_gpu, rtol=1e-3, atol=1e-4)
