"""These tests compare what DeviceMonitor logs with weights of crossbars whose bounds are known."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_modules import make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from aimc_pl.callbacks import DeviceMonitor
from aimc_pl.devices import constant_step, ideal, soft_bounds
from aimc_pl.devices.saturation import positions
from aimc_pl.strategies import AnalogPipelineStrategy


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2))

    def training_step(self, batch):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(device, **kwargs):
    """Train in three stages. The weights of the last logged step are the weights at the end."""
    L.seed_everything(0)
    module, data = Net(), DataLoader(torch.randn(8, 6), 4)
    strategy = AnalogPipelineStrategy(3, "sync", 2, device, split_at=["net.2", "net.4"])
    trainer = make_trainer(
        strategy, precision="32-true", callbacks=[DeviceMonitor()], log_every_n_steps=1, max_epochs=1, **kwargs
    )
    trainer.fit(module, data)
    return module, trainer


def crossbar_of(layer):
    (tile,) = layer.analog_tiles()
    return tile.tile.crossbars[0]


@pytest.mark.parametrize(("make", "bound"), [(soft_bounds, {"tau": 0.6}), (constant_step, {"w_max": 0.5})])
def test_range_and_positions_are_those_of_the_weights(make, bound, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    module, trainer = fit(make(**bound, device_to_device=0.0), logger=logger)
    (limit,) = bound.values()
    relative = [crossbar_of(module.net[k]).weight.flatten() / limit for k in (0, 2, 4)]
    assert trainer.logged_metrics == {
        f"devices/range_stage_{m}": pytest.approx(relative[m].abs().mean().item()) for m in range(3)
    }
    events = EventAccumulator(logger.log_dir).Reload()
    for m in range(3):
        (event,) = events.Histograms(f"devices/positions_stage_{m}")
        value, centres = event.histogram_value, torch.linspace(-1, 1, 41)[:-1] + 0.025
        assert (value.min, value.max, value.num) == (-1, 1, relative[m].numel())
        # A bar is 0.05 wide, and its values count at its middle.
        assert value.sum / value.num == pytest.approx(relative[m].mean().item(), abs=0.025)
        assert value.bucket == [((relative[m] - centre).abs() < 0.025).sum() for centre in centres]


def test_a_position_is_relative_to_the_bounds_of_its_own_cross_point():
    module, _ = fit(constant_step(w_max=1.0, device_to_device=0.2))
    crossbar = crossbar_of(module.net[0])
    for bound, expected in zip(crossbar.bounds, (-1.0, 1.0), strict=True):
        assert bound.std() > 0.05
        crossbar.weight.copy_(bound)
        (position,) = positions(module.net[0])
        torch.testing.assert_close(position, torch.full((48,), expected))
    lower, upper = crossbar.bounds
    crossbar.weight.copy_(0.25 * lower + 0.75 * upper)
    torch.testing.assert_close(positions(module.net[0])[0], torch.full((48,), 0.5))


@pytest.mark.parametrize("device", [None, ideal()])
def test_layers_without_bounds_log_nothing(device, tmp_path):
    """Check a digital network, and aihwkit's own tiles, which need a CUDA build on a GPU."""
    logger = TensorBoardLogger(tmp_path)
    _, trainer = fit(device, logger=logger, accelerator="cpu")
    assert trainer.logged_metrics == {}
    assert EventAccumulator(logger.log_dir).Reload().Tags()["histograms"] == []
