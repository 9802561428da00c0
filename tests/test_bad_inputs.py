"""What cannot work ends in one clear line, before any weight is updated."""

import sys

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import Strategy
from lightning_modules import MLP, loader, make_trainer
from torch.utils.data import DataLoader

from aimc_pl.callbacks import DeviceNoise, WriteNoise
from aimc_pl.cli import main
from aimc_pl.devices import constant_step, get_device, soft_bounds, tiki_taka
from aimc_pl.errors import UsageError
from aimc_pl.models import ResNet
from aimc_pl.schedule import Schedule
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.strategies.training import Training

STRATEGY = "--trainer.strategy.init_args."

COMMANDS = {
    "unknown schedule": (
        [STRATEGY + "schedule=fast"],
        "schedule: expected one of ['none', 'sync', '1f1b', 'async'] or",
    ),
    "no stages": ([STRATEGY + "num_stages=0"], "num_stages must be a whole number of at least 1, got 0"),
    "no micro-batches": ([STRATEGY + "num_microbatches=0"], "num_microbatches must be a whole number"),
    "unknown duplex": ([STRATEGY + "duplex=both"], "both"),
    "full duplex of sync": ([STRATEGY + "schedule=sync", STRATEGY + "duplex=full"], "duplex='full' is for"),
    "unknown gradient scale": ([STRATEGY + "gradient_scale=none"], "gradient_scale"),
    "unknown loss reduction": ([STRATEGY + "loss_reduction=max"], "loss_reduction"),
    "split and stages disagree": ([STRATEGY + "num_stages=3"], "num_stages=3 needs 2 names in split_at, got 3"),
    "split at an unknown layer": (
        [STRATEGY + 'split_at=["network.3","network.5","x"]'],
        "split_at names 'x', which is no submodule of Classifier; it has network,",
    ),
    "split by names of the network": ([STRATEGY + 'split_at=["3","5","7"]'], "so that this one is 'network.3'"),
    "split at a layer that is not called": (
        [STRATEGY + 'split_at=["network.3","network.5","test_accuracy"]'],
        "split_at names 'test_accuracy', which training_step does not call",
    ),
    "split out of order": ([STRATEGY + 'split_at=["network.5","network.3","network.7"]'], "out of order"),
    "split at the first layer": (
        [STRATEGY + 'split_at=["network.0","network.3","network.5"]'],
        "leaves stage 0 empty",
    ),
    "more stages than layers": (
        [STRATEGY + "num_stages=5", STRATEGY + "split_at=null"],
        "5 stages need at least 5 layers that can be split apart, and training_step calls 4. Lower num_stages",
    ),
    "an argument of the past": ([STRATEGY + "backbone=body"], "backbone"),
    "weights of a sum": (
        [STRATEGY + "loss_reduction=sum", STRATEGY + "microbatch_weight=builtins.len"],
        "microbatch_weight is for losses that are means",
    ),
    "unknown device": ([STRATEGY + "device=memristor"], "unknown device 'memristor': choose one of ideal"),
    "device without range": ([STRATEGY + "device.init_args.tau=-1"], "a positive range"),
    "stashing on tiles": ([STRATEGY + "weight_stashing=true"], "a crossbar cannot keep a second set of weights"),
    "several devices": (["--trainer.devices=2"], "2 processes do not fit num_stages=4: set Trainer(devices=4)"),
    "accumulation under async": (["--trainer.accumulate_grad_batches=2"], "contradicts schedule='async'"),
    "float64 on tiles": (["--trainer.precision=64-true"], "tiles compute in float32"),
    "no samples in a batch": (["--data.init_args.batch_size=0"], "batch_size must be at least 1, got 0"),
    "all for validation": (["--data.init_args.val_fraction=1.0"], "val_fraction must lie between 0 and 1"),
    "batch smaller than its micro-batches": (
        ["--data.init_args.batch_size=2"],
        "2 samples cannot be split into num_microbatches=4",
    ),
    "one layer size": (["--model.init_args.network.init_args.sizes=[64]"], "at least an input and an output size"),
    "unknown option": (["--trainer.stages=4"], "stages"),
    "not a number": (["--trainer.max_epochs=many"], "error: trainer.max_epochs: expected int or null, got many"),
    "unknown class": (
        ["--model=aimc_pl.tasks.Regressor"],
        "module 'aimc_pl.tasks' has no attribute 'Regressor'",
    ),
    "unknown callback": (["--trainer.callbacks+=Foo"], "trainer.callbacks: expected the name of a class or null, got"),
    "a number as callback": (["--trainer.callbacks=[1]"], "callbacks: Not a valid subclass of Callback. Got value: 1"),
    "unknown optimizer": (["--model.init_args.optimizer=Adamm"], "model.optimizer: expected the name of a class"),
    "a word as timeout": ([STRATEGY + "timeout=soon"], "trainer.strategy.timeout: expected float, got soon"),
    "half a stage": ([STRATEGY + "num_stages=4.5"], "trainer.strategy.num_stages: expected int, got 4.5"),
    "no data there": (["--data=aimc_pl.data.MNIST", "--data.init_args.root=nowhere"], "MNIST is not in 'nowhere'"),
    "no images there": (
        ["--data=aimc_pl.data.ImageFolder", "--data.init_args.root=nowhere"],
        "nowhere/train/CLASS/IMAGE",
    ),
    "noise on no layer": (
        [
            "--trainer.callbacks+=aimc_pl.callbacks.DeviceNoise",
            '--trainer.callbacks.noise=[{"class_path": "aimc_pl.callbacks.WriteNoise", "init_args": {"std": 0.1}}]',
            '--trainer.callbacks.layers=["conv*"]',
        ],
        "matches no layer",
    ),
    "unknown backend": (
        ["--trainer.strategy.init_args.device.init_args.backend=exact"],
        "'backend' matches no layer: the layers are network.1, network.3, network.5, network.7 (if it was meant as an "
        "argument of a device",
    ),
    "a pipeline's callback without pipeline": (
        ["--trainer.strategy=auto"],
        "ClockMonitor is about a pipeline, and the strategy is SingleDeviceStrategy",
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_command_line(case, monkeypatch):
    """Exit code 1, one line on standard error, and no update before it."""
    arguments, message = COMMANDS[case]
    updates = []
    monkeypatch.setattr(Training, "_update", lambda *args: updates.append(1))
    monkeypatch.setattr(Strategy, "optimizer_step", lambda *args, **kwargs: updates.append(1))
    monkeypatch.setattr(sys, "argv", ["aimc-pl"])
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=digits_async.yaml", "--trainer.enable_progress_bar=false", *arguments])
    assert isinstance(stop.value.code, str)
    assert stop.value.code.startswith("aimc-pl: error: ")
    assert "\n" not in stop.value.code
    assert message in stop.value.code
    assert "Union" not in stop.value.code
    assert "Namespace" not in stop.value.code
    assert not updates


class Manual(MLP):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(MLP):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]


class LineSearch(MLP):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class OwnBackward(MLP):
    def backward(self, loss):
        loss.backward()


class TakesAnIterator(MLP):
    def training_step(self, dataloader_iter):
        return next(dataloader_iter)


class Twice(MLP):
    def training_step(self, batch):
        return (self.net(batch[0]) + self.net(-batch[0])).sum()


class Penalty(MLP):
    def training_step(self, batch):
        return self.net(batch[0]).sum() + sum(p.square().sum() for p in self.parameters())


class ReturnsLogits(MLP):
    def training_step(self, batch):
        return self.net(batch[0])


class Frozen(MLP):
    def training_step(self, batch):
        return self.net(batch[0]).detach().sum()


class Tied(MLP):
    def __init__(self):
        super().__init__()
        self.net[4].weight = self.net[2].weight


ASYNC = {"num_stages": 3, "schedule": "async", "num_microbatches": 3}
AT_4_AND_8 = ASYNC | {"split_at": ["net.4", "net.8"]}


class Hasty(Schedule):
    """Backwards everywhere at once."""

    def __init__(self, num_stages, num_microbatches):
        super().__init__("async", num_stages, num_microbatches)

    def backward_clock(self, stage, microbatch, num_microbatches=None):
        return super().backward_clock(self.num_stages - 1, microbatch, num_microbatches)


MODULES = {
    "manual optimization": (Manual, ASYNC, {}, "manual optimization"),
    "several optimizers": (TwoOptimizers, ASYNC, {}, "configure_optimizers returns several"),
    "line search under async": (LineSearch, ASYNC, {}, "LBFGS evaluates the loss itself"),
    "own backward": (OwnBackward, ASYNC, {}, "OwnBackward.backward is overridden"),
    "dataloader_iter": (TakesAnIterator, ASYNC, {}, "cannot be split into micro-batches"),
    "network called twice under async": (Twice, AT_4_AND_8, {}, "is used by stages 0 and 2, which update"),
    "network called twice, measured": (
        Twice,
        ASYNC,
        {},
        "layers that share a parameter count as one, here net.0.weight",
    ),
    "penalty under async": (Penalty, AT_4_AND_8, {}, "is used by stages 0 and 2, which update"),
    "no scalar loss": (ReturnsLogits, ASYNC, {}, "must return the loss"),
    "loss without gradient": (Frozen, ASYNC, {}, "depends on no parameter that requires grad"),
    "tied layers on two stages": (
        Tied,
        ASYNC | {"split_at": ["net.2", "net.4"]},
        {},
        "'net.2.weight' is used by stages 1 and 2",
    ),
    "tied layers on two crossbars": (Tied, ASYNC | {"device": "ideal"}, {"precision": "32-true"}, "share their weight"),
    "scheduled accumulation": (
        MLP,
        ASYNC,
        {"callbacks": [GradientAccumulationScheduler({0: 1, 2: 2})]},
        "contradicts schedule='async'",
    ),
    "microbatch scale of sync": (
        MLP,
        {"schedule": "sync", "gradient_scale": "microbatch"},
        {},
        "gradient_scale='microbatch' needs schedule='async'",
    ),
    "a schedule that is none": (MLP, {"schedule": lambda stages, parts: None}, {}, "schedule= must be a name"),
    "a schedule for others": (MLP, {"schedule": lambda stages, parts: Schedule("sync", 2, 1)}, {}, "num_stages=4"),
    "a schedule out of order": (MLP, {"schedule": Hasty}, {}, "schedule= cannot run: Hasty has B(stage 2, micro-"),
    "duplex of a schedule of one's own": (MLP, {"schedule": Hasty, "duplex": "full"}, {}, "duplex='full' goes with"),
    "stashing under sync": (MLP, {"schedule": "sync", "weight_stashing": True}, {}, "weight_stashing needs"),
    "split_at as a string": (MLP, {"num_stages": 2, "split_at": "4"}, {}, "split_at is a list"),
    "device key without layer": (MLP, ASYNC | {"device": {"fc": "ideal"}}, {}, "device key 'fc' matches no layer"),
    "a number as device": (MLP, ASYNC | {"device": {"*": 3.0}}, {}, "unknown device 3.0: choose one of"),
    "device per stage without split": (MLP, ASYNC | {"device": {0: "ideal"}}, {}, "needs split_at"),
    "noise on an unknown layer": (
        MLP,
        ASYNC,
        {"callbacks": [DeviceNoise([WriteNoise(0.1)], layers=["conv*"])]},
        "matches no layer",
    ),
    "noise on an unknown stage": (
        MLP,
        ASYNC,
        {"callbacks": [DeviceNoise([WriteNoise(0.1)], stages=[7])]},
        "matches no layer",
    ),
}


@pytest.mark.parametrize("case", MODULES)
def test_modules(case, monkeypatch):
    make, strategy, options, message = MODULES[case]
    updates = []

    def step(optimizer, *args, **kwargs):
        # Copies, on which layers are measured, may be updated.
        own = {id(parameter) for parameter in module.parameters()}
        updates.extend(p for group in optimizer.param_groups for p in group["params"] if id(p) in own)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    precision = options.get("precision", "64-true")
    module = make().to(torch.float64 if precision == "64-true" else torch.float32)
    data = loader(module, shuffle=False)
    with pytest.raises(UsageError) as error:
        make_trainer(AnalogPipelineStrategy(**strategy), **options).fit(module, data)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not updates


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.randn(8, 6), torch.zeros(7)), "along the first dimension"),
        ({"n": 3}, "along the first dimension"),
    ],
)
def test_batches(batch, message):
    data = DataLoader([batch], batch_size=None)
    with pytest.raises(UsageError, match=message):
        make_trainer(AnalogPipelineStrategy(3)).fit(MLP().double(), data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: soft_bounds(num_states=1), "at least 2 states"),
        (lambda: constant_step(cycle_to_cycle=-1), "noise cannot be negative"),
        (lambda: tiki_taka("Gold"), "no TikiTaka of material 'Gold'"),
        (lambda: get_device("pcm"), "unknown device 'pcm'"),
        (lambda: ResNet(9), "6n\\+2 layers"),
        (lambda: DeviceNoise([]), "at least one kind"),
    ],
)
def test_constructors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["schedule", "--num_stages=0"], "num_stages must be"),
        (["schedule", "--schedule=zigzag"], "zigzag"),
        (["schedule", "--schedule=sync", "--duplex=full"], "duplex='full' is for"),
        (["devices", "--name=gold"], "unknown device 'gold'"),
        (["devices", "--png=x.png"], "which device"),
        (["devices", "--name=ideal", "--png=x.png"], "not updated by pulses"),
        (["fit", "--config=nowhere.yaml"], "nowhere.yaml"),
        (["train"], "train"),
    ],
)
def test_other_commands(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["aimc-pl"])
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert message in str(stop.value.code)
    assert "\n" not in str(stop.value.code)
