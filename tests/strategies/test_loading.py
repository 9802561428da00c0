"""These tests load checkpoints with analog layers without a Trainer, in the same process and in a new one."""

import subprocess
import sys
from inspect import getsource

import lightning as L
import pytest
import torch
from aihwkit.simulator.configs import InferenceRPUConfig
from lightning_modules import make_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aimc_pl.analog import analog_layers
from aimc_pl.devices import convert_to_analog, residual_learning, soft_bounds
from aimc_pl.errors import UsageError
from aimc_pl.strategies import AnalogPipelineStrategy, load_checkpoint, load_from_checkpoint

DEVICES = {
    "digital": None,
    "mean field": soft_bounds(tau=3.0, perfect_io=True),
    "aihwkit": soft_bounds(tau=3.0, perfect_io=True, backend="aihwkit"),
    "residual": {"net.2": residual_learning(soft_bounds(perfect_io=True), gamma=0.2), "net.0": "ideal"},
}


class Saved(L.LightningModule):
    """A module that saves its hyperparameters."""

    def __init__(self, width: int):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3), nn.Tanh(), nn.Linear(3, 1))

    def training_step(self, batch):
        return (self.net(batch[0]) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Return for every device the path of a checkpoint, inputs, and the outputs of the network that was saved."""
    folder, found = tmp_path_factory.mktemp("checkpoints"), {}
    for name, device in DEVICES.items():
        torch.manual_seed(0)
        module, x = Saved(9), torch.randn(8, 6)
        trainer = make_trainer(
            AnalogPipelineStrategy(2, "async", 2, device, ["net.2"]), precision="32-true", max_epochs=1
        )
        trainer.fit(module, DataLoader(TensorDataset(x), 4))
        trainer.save_checkpoint(path := folder / f"{name}.ckpt")
        found[name] = path, x, module.net(x).detach()
    return found


def load_into_a_new_module(path):
    return load_checkpoint(Saved(9), path)


@pytest.mark.parametrize("load", [load_into_a_new_module, lambda path: load_from_checkpoint(Saved, path)])
@pytest.mark.parametrize("device", DEVICES)
def test_the_module_comes_back(device, load, checkpoints):
    path, x, y = checkpoints[device]
    module = load(path)
    assert (type(module), module.hparams) == (Saved, {"width": 9})
    assert len(analog_layers(module)) == {"digital": 0, "residual": 2}.get(device, 3)
    torch.testing.assert_close(module.net(x).detach(), y)


@pytest.mark.parametrize("device", DEVICES)
def test_another_network_is_refused_in_a_line(device, checkpoints):
    path, x, _ = checkpoints[device]
    trainer = make_trainer(AnalogPipelineStrategy(2, "async", 2, DEVICES[device], ["net.2"]), precision="32-true")
    loads = [
        lambda: load_checkpoint(Saved(7), path),
        lambda: load_from_checkpoint(Saved, path, width=7),
        lambda: trainer.fit(Saved(7), DataLoader(TensorDataset(x), 4), ckpt_path=path),
    ]
    for load in loads:
        with pytest.raises(UsageError) as error:
            load()
        assert str(error.value).startswith("the checkpoint is of another network: ")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) <= 200


@pytest.mark.slow
def test_a_new_interpreter_loads_it(checkpoints, tmp_path):
    path, x, y = checkpoints["mean field"]
    torch.save((x, y), tmp_path / "outputs.pt")
    program = f"""
import lightning as L
import torch
from torch import nn
from aimc_pl.strategies import load_checkpoint, load_from_checkpoint

{getsource(Saved)}
x, y = torch.load("outputs.pt")
for module in (load_from_checkpoint(Saved, {str(path)!r}), load_checkpoint(Saved(9), {str(path)!r})):
    torch.testing.assert_close(module.net(x).detach(), y)
    print("loaded")
"""
    command = [sys.executable, "-W", "error::UserWarning:aimc_pl", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["loaded", "loaded"], done.stderr


def test_arguments_of_the_class_and_of_lightning_arrive(checkpoints):
    path, *_ = checkpoints["mean field"]
    with pytest.raises(UsageError, match=r"size of tensor a \(5\) must match .* b \(9\)"):
        load_from_checkpoint(Saved, path, width=5, map_location="cpu")
    before = Saved.load_state_dict
    load_from_checkpoint(Saved, path, strict=False)
    assert Saved.load_state_dict is before


def test_bare_state_dicts_and_modules_that_are_analog_are_loaded(tmp_path):
    networks = [nn.Sequential(nn.Linear(4, 3)) for _ in range(3)]
    for network in networks[:2]:
        convert_to_analog(network, "soft_bounds")
    torch.save(networks[0].state_dict(), tmp_path / "net.pt")
    for network in networks[1:]:
        load_checkpoint(network, tmp_path / "net.pt")
        assert torch.equal(network[0].weight, networks[0][0].weight)


def test_what_cannot_be_loaded_is_refused(tmp_path, checkpoints):
    path, *_ = checkpoints["mean field"]
    with pytest.raises(UsageError, match=r"analog layers that Sequential does not have: net\.0, net\.2, net\.4"):
        load_checkpoint(nn.Sequential(nn.Linear(4, 3)), path)
    network = nn.Sequential(nn.Linear(4, 3))
    convert_to_analog(network, "ecram")
    torch.save(network.state_dict(), tmp_path / "net.pt")
    other = nn.Sequential(nn.Linear(4, 3))
    convert_to_analog(other, "soft_bounds")
    with pytest.raises(UsageError, match="another device than in the checkpoint: EcRam"):
        load_checkpoint(other, tmp_path / "net.pt")
    (tmp_path / "damaged.ckpt").write_bytes(path.read_bytes()[:-300])
    for load in (load_into_a_new_module, lambda path: load_from_checkpoint(Saved, path)):
        with pytest.raises(UsageError, match="cannot read checkpoint"):
            load(tmp_path / "none.ckpt")
        with pytest.raises(UsageError, match="cut off"):
            load(tmp_path / "damaged.ckpt")


def test_classes_that_are_not_admitted_are_refused(tmp_path):
    network = nn.Sequential(nn.Linear(4, 3))
    convert_to_analog(network, InferenceRPUConfig())
    torch.save(network.state_dict(), tmp_path / "net.pt")
    with pytest.raises(UsageError, match="InferenceRPUConfig, which is not loaded because"):
        load_checkpoint(nn.Sequential(nn.Linear(4, 3)), tmp_path / "net.pt")
    # A module with tiles of this class admits it.
    load_checkpoint(network, tmp_path / "net.pt")


def test_an_argument_that_the_class_does_not_have_is_refused(checkpoints):
    path, _, _ = checkpoints["digital"]
    with pytest.raises(UsageError, match="Saved has no argument 'widht': it has width"):
        load_from_checkpoint(Saved, path, widht=9)
    assert load_from_checkpoint(Saved, path, width=9, map_location="cpu", strict=True).hparams["width"] == 9


def test_a_class_with_any_arguments_gets_them(checkpoints):
    class Open(Saved):
        def __init__(self, width: int, **options: str):
            super().__init__(width)
            self.options = options

    path, _, _ = checkpoints["digital"]
    assert load_from_checkpoint(Open, path, colour="red").options == {"colour": "red"}
