"""These tests check what a Trainer's checkpoints hold, who can load them, and what is refused."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from aihwkit.simulator.configs import InferenceRPUConfig
from lightning import LightningDataModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from lightning_modules import MLP, Attributes, Samples, loader, make_trainer
from torch.utils.data import DataLoader, IterableDataset

from aimc_pl.cli import main
from aimc_pl.data import Digits
from aimc_pl.devices import analog_layers, convert_to_analog, soft_bounds
from aimc_pl.errors import AnalogCheckpointWarning, UsageError
from aimc_pl.strategies import AnalogPipelineStrategy
from aimc_pl.strategies.resuming import Resuming, _checksum


class Analog(Attributes):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def module(seed=4):
    torch.manual_seed(seed)
    return Analog()


def data(length=19):
    samples = Samples(length=length)
    samples.x = samples.x.float()
    return DataLoader(samples, 8)


def strategy(device=None, num_stages=2, schedule="sync", **options):
    return AnalogPipelineStrategy(num_stages, schedule, 2, device, ["l2", "l3", "l4"][: num_stages - 1], **options)


def trainer(strategy="auto", **options):
    return make_trainer(strategy, precision="32-true", **{"max_epochs": 1} | options)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Save checkpoints of a digital, an analog and an inference network, named by their kind."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, device in {"digital": None, "analog": "soft_bounds", "inference": InferenceRPUConfig()}.items():
        ours = trainer(strategy(device))
        ours.fit(module(), data())
        ours.save_checkpoint(folder / f"{name}.ckpt")
    return folder


# ------------------------------------------------------------------- content


@pytest.mark.filterwarnings("ignore:this checkpoint has analog layers")  # the test reads it with torch.load
def test_no_unused_memory(checkpoints):
    state = torch.load(checkpoints / "analog.ckpt")["state_dict"]
    assert [key for key in state if key.endswith("analog_ctx")] == []


@pytest.mark.slow
@pytest.mark.parametrize(("num_stages", "schedule"), [(3, "async"), (1, "none"), (4, "1f1b")])
def test_other_stages_and_schedules_go_on(num_stages, schedule, checkpoints):
    resumed = trainer(strategy("soft_bounds", num_stages, schedule), max_epochs=2)
    resumed.fit(module(), data(), ckpt_path=checkpoints / "analog.ckpt")
    assert resumed.global_step == 6


@pytest.mark.slow
def test_configurations_beyond_the_catalogue_go_on(checkpoints):
    resumed = trainer(strategy(InferenceRPUConfig()), max_epochs=2)
    resumed.fit(module(), data(), ckpt_path=checkpoints / "inference.ckpt")
    assert resumed.global_step == 6


# ------------------------------------------------------------------- refused


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["fit", "validate"])
@pytest.mark.parametrize(
    ("saved", "device", "message"),
    [
        (
            "analog",
            soft_bounds(tau=9.0),
            r"layer 'l1' has another device .* checkpoint: device\.w_max is 1\.0 there, 9\.0 h",
        ),
        ("analog", "ecram", "SoftBoundsDevice in a MeanFieldRPUConfig there, EcRamPresetDevice in a"),
        ("analog", soft_bounds(backend="aihwkit"), "MeanFieldRPUConfig there, SoftBoundsDevice in a SingleRPUConfig"),
        ("analog", None, "layer 'l1' is analog in the checkpoint .* set device="),
        ("digital", "soft_bounds", "layer 'l1' is digital in the checkpoint, and analog here .* leave out device="),
        ("inference", None, "names aihwkit.simulator.configs.configs.InferenceRPUConfig, which is not loaded"),
    ],
)
def test_other_devices_are_refused(saved, device, message, entry, checkpoints):
    with pytest.raises(UsageError, match=message) as error:
        getattr(trainer(strategy(device), max_epochs=2), entry)(
            module(), data(), ckpt_path=checkpoints / f"{saved}.ckpt"
        )
    assert saved == "inference" or len(str(error.value)) <= 200


@pytest.mark.slow
def test_the_command_says_it_in_a_line(checkpoints, tmp_path, capsys):
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes((checkpoints / "digital.ckpt").read_bytes()[:-300])
    for path in (damaged, tmp_path / "none.ckpt"):
        with pytest.raises(SystemExit) as end:
            main(["fit", "--config=digits_sync.yaml", "--trainer.logger=false", f"--ckpt_path={path}"])
        assert str(end.value).startswith("aimc-pl: error: ")
        assert str(path) in str(end.value)
        assert "\n" not in str(end.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the loss is not finite")  # it diverges on purpose
@pytest.mark.filterwarnings("ignore:this checkpoint has analog layers")  # the test reads it with torch.load
@pytest.mark.parametrize("device", [None, "ideal"])
@pytest.mark.parametrize("monitor", [None, "loss"])
@pytest.mark.parametrize("on_nonfinite", ["stop", "warn"])
def test_a_diverged_module_is_not_saved(on_nonfinite, monitor, device, tmp_path):
    class Diverge(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2 and device is None:
                pl_module.l3.weight.data[0, 0] = torch.nan
            elif trainer.current_epoch == 2:
                weight, bias = pl_module.l3.get_weights()
                weight[0, 0] = torch.nan
                pl_module.l3.set_weights(weight, bias)

    saver = ModelCheckpoint(tmp_path, monitor=monitor, save_last=True)
    diverging = strategy(device, on_nonfinite=on_nonfinite)
    ours = trainer(diverging, max_epochs=5, enable_checkpointing=True, callbacks=[Diverge(), saver])
    if on_nonfinite == "stop":
        ends = pytest.raises(UsageError, match="the loss is not finite, as are the weights of 'l3")
    elif monitor:  # a monitored loss that is NaN is never the best, so nothing is saved
        ends = pytest.warns(UserWarning, match="the loss is not finite")
    else:
        ends = pytest.raises(UsageError, match="after step 9 the weights of 'l")
    with ends:
        ours.fit(module(), data())
    files = {path.name: torch.load(path)["global_step"] for path in tmp_path.iterdir()}
    assert files["last.ckpt"] == 6
    assert set(files.values()) <= {3, 6}
    assert len(files) == 2


# ------------------------------------------------------------------- readers


def test_digital_ones_are_plain_lightnings(checkpoints, recwarn):
    path = checkpoints / "digital.ckpt"
    loaded = Analog.load_from_checkpoint(path)
    (found,) = trainer().validate(module(), data(), ckpt_path=path, verbose=False)
    (expected,) = trainer().validate(loaded, data(), verbose=False)
    assert found == expected
    assert not [w for w in recwarn if w.category is AnalogCheckpointWarning]


def test_analog_ones_are_loaded_by_analog_modules(checkpoints):
    """Check that plain Lightning loads analog layers and warns, and that the strategy does not warn."""
    path, ready = checkpoints / "analog.ckpt", module(seed=5)
    convert_to_analog(ready, "soft_bounds")
    with pytest.warns(AnalogCheckpointWarning, match="AnalogPipelineStrategy.*load_from_checkpoint.*convert_to"):
        trainer().validate(ready, data(), ckpt_path=path, verbose=False)
    with pytest.warns(AnalogCheckpointWarning), pytest.raises(RuntimeError, match="analog_module"):
        Analog.load_from_checkpoint(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AnalogCheckpointWarning)
        ours = trainer(strategy("soft_bounds"))
        ours.validate(module(), data(), ckpt_path=path, verbose=False)
    for layer in ("l1", "l4"):
        assert torch.equal(
            getattr(ready, layer).get_weights()[0], getattr(ours.lightning_module, layer).get_weights()[0]
        )


# -------------------------------------------------------- places in the data


class Stream(IterableDataset):
    """A shuffled data set without a length."""

    def __iter__(self):
        samples = Samples(length=35)
        return iter([samples[index] for index in torch.randperm(35)])


class Once:
    """A loader that continues where it stopped, whatever the random states are."""

    def __init__(self):
        self.batches = list(loader(None, shuffle=False, length=200))
        self.next = 0

    def __len__(self):
        return 5

    def __iter__(self):
        for _ in range(5):
            self.next += 1
            yield self.batches[self.next - 1]


class Keeping(Once):
    """A loader that saves and restores its own place."""

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]

    def __iter__(self):
        while self.next < 10:
            self.next += 1
            yield self.batches[self.next - 1]
            if self.next == 5:
                return


class Noisy(Samples):
    """Samples with noise that is drawn in the process that loads them."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.rand(()), y


class Repeating(Once):
    """An iterable that gives the same batches every time."""

    def __iter__(self):
        return iter(self.batches[:5])


LOADERS = {
    "any iterable": Repeating,
    "a generator of its own": lambda: DataLoader(
        Samples(length=35), 8, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "worker processes": lambda: DataLoader(Noisy(length=35), 8, shuffle=True, num_workers=2),
    "stream": lambda: DataLoader(Stream(), 8),
    "two loaders": lambda: CombinedLoader(
        {name: DataLoader(Noisy(length=length), 8, shuffle=True) for name, length in (("long", 40), ("short", 16))},
        "max_size_cycle",
    ),
    "keeping": Keeping,
}


class Plain(Attributes):
    def training_step(self, batch, batch_idx):
        if isinstance(batch, dict):
            return super().training_step(batch["long"], batch_idx) + self(batch["short"][0]).square().mean()
        return super().training_step(batch, batch_idx)


def second_epoch(make_loader, folder, ckpt_path=None, callbacks=(), val=None):
    torch.manual_seed(4 if ckpt_path is None else 5)
    plain = Plain().double()
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    ours = AnalogPipelineStrategy(2, "sync", 1, split_at=["l3"])
    fitted = make_trainer(ours, callbacks=[saver, *callbacks], enable_checkpointing=True, max_epochs=2)
    fitted.fit(plain, make_loader(), val, ckpt_path=ckpt_path)
    assert fitted.global_step == 10
    return plain.state_dict()


@pytest.mark.parametrize(
    ("kind", "step"),
    [pytest.param(kind, 7, marks=[] if kind == "keeping" else [pytest.mark.slow]) for kind in LOADERS]
    + [("stream", 2)],
)
def test_loaders_come_to_their_place(kind, step, tmp_path, recwarn):
    whole = second_epoch(LOADERS[kind], tmp_path)
    resumed = second_epoch(LOADERS[kind], tmp_path / "rest", tmp_path / f"step={step}.ckpt")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert not [w for w in recwarn if "resum" in str(w.message) or "repeat" in str(w.message)]


def noisy_loader():
    return DataLoader(Noisy(length=35), 8, shuffle=True)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Train, save checkpoints everywhere in an epoch, and return their folder and the weights at the end."""
    folder = tmp_path_factory.mktemp("places")

    class Saves(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(folder / "start.ckpt")

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(folder / "end.ckpt")

        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking and trainer.current_epoch == 0:
                trainer.save_checkpoint(folder / "validated.ckpt")

    return folder, second_epoch(noisy_loader, folder, callbacks=[Saves()], val=Repeating())


@pytest.mark.parametrize("place", ["start", "step=1", "step=5", "validated", "end"])
def test_a_fit_goes_on_from_any_place_in_an_epoch(place, places, tmp_path):
    folder, whole = places
    resumed = second_epoch(noisy_loader, tmp_path, folder / f"{place}.ckpt", val=Repeating())
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_fit_is_resumed_twice(places, tmp_path):
    """Check a fit from the last mini-batch of an epoch, and another from the checkpoint that it makes in the next."""
    folder, whole = places
    epochs = {}

    class Counts(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            epochs[trainer.global_step] = trainer.current_epoch

    second_epoch(noisy_loader, tmp_path, folder / "step=5.ckpt", callbacks=[Counts()], val=Repeating())
    resumed = second_epoch(noisy_loader, tmp_path / "again", tmp_path / "step=7.ckpt", val=Repeating())
    assert epochs == {5: 1}
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_a_fit_is_resumed_before_a_smaller_mini_batch(schedule, tmp_path):
    """Check a checkpoint after which one sample is left in the epoch, fewer than there are micro-batches."""

    def fit(folder, ckpt_path=None):
        resumed, kept = module(), ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        fitting = trainer(strategy(schedule=schedule), max_epochs=2, callbacks=[kept], enable_checkpointing=True)
        fitting.fit(resumed, data(length=17), ckpt_path=ckpt_path)
        return resumed.state_dict()

    expected = fit(tmp_path)
    resumed = fit(tmp_path / "again", tmp_path / "step=2.ckpt")
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


@pytest.mark.parametrize("schedule", ["none", "sync", "async"])
def test_a_sanity_check_does_not_change_a_resumed_fit(schedule, tmp_path):
    """Check that a resumed fit equals one that was never stopped, also with converters' noise in validation steps."""

    def fit(ckpt_path=None):
        resumed, kept = module(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        options = {"num_sanity_val_steps": 2, "callbacks": [kept], "enable_checkpointing": True}
        fitting = trainer(strategy(soft_bounds(), schedule=schedule), max_epochs=2, **options)
        fitting.fit(resumed, data(), data(), ckpt_path=ckpt_path)
        return [layer.get_weights()[0] for layer in analog_layers(resumed)]

    expected = fit()
    assert len(expected) == 4
    assert all(map(torch.equal, fit(tmp_path / "epoch=0.ckpt"), expected))


@pytest.mark.parametrize("schedule", ["none", "sync", "async"])
def test_a_validation_leaves_the_random_numbers_of_tiles_alone(schedule, tmp_path):
    """Check a run without validation steps, and one resumed from a checkpoint that a validation followed."""

    def fit(folder, num_batches=2, ckpt_path=None):
        resumed, kept = module(), ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        options = {"max_epochs": 2, "callbacks": [kept], "enable_checkpointing": True, "val_check_interval": 2}
        options |= {"limit_val_batches": num_batches, "num_sanity_val_steps": num_batches}
        trainer(strategy(soft_bounds(), schedule=schedule), **options).fit(resumed, data(), data(), ckpt_path=ckpt_path)
        return [layer.get_weights()[0] for layer in analog_layers(resumed)]

    expected = fit(tmp_path)
    assert all(map(torch.equal, fit(tmp_path / "again", ckpt_path=tmp_path / "step=2.ckpt"), expected))
    if schedule != "async":  # a validation drains the pipeline
        assert all(map(torch.equal, fit(tmp_path / "without", num_batches=0), expected))


@pytest.mark.parametrize(("rank", "seed"), [(0, 5), (1, 6), (2, 5)])
def test_the_generators_of_a_rank_are_restored(rank, seed):
    """Check that a rank which the checkpoint does not have takes those of rank 0, and that tiles keep their own."""
    generators = [torch.Generator() for _ in range(4)]
    ended = []

    class Resumes(Callback):
        def on_train_start(self, trainer, pl_module):
            resuming, saved = Resuming(), []
            resuming.note_loader(shuffled, pl_module)
            for saved_seed in (5, 6):
                for generator in (torch.default_generator, *generators, of_a_tile):
                    generator.manual_seed(saved_seed)
                saved += resuming.state(trainer, lambda state: [state])["now"]
            of_a_tile.manual_seed(7)
            before = of_a_tile.get_state()
            resuming.go_on(trainer, {"now": saved}, rank)
            assert torch.equal(of_a_tile.get_state(), before)
            expected = torch.rand(3, generator=torch.Generator().manual_seed(seed))
            for generator in (torch.default_generator, *generators):
                assert torch.equal(torch.rand(3, generator=generator), expected)
            del pl_module.own
            resuming.note_loader(shuffled, pl_module)
            with pytest.warns(UserWarning, match="do not hold as many random generators as .* are not restored"):
                resuming.go_on(trainer, {"now": saved}, rank)
            ended.append(True)

    class Batches(LightningDataModule):
        def train_dataloader(self):
            return shuffled

    plain, batches = module(), Batches()
    plain.tiles = torch.nn.Sequential(torch.nn.Linear(3, 2))
    convert_to_analog(plain.tiles, "soft_bounds")
    values = [value for part in plain.tiles.modules() for value in vars(part).values()]
    of_a_tile = next(value for value in values if isinstance(value, torch.Generator))
    plain.own, plain.inner, batches.own = generators[0], SimpleNamespace(own=generators[1]), generators[2]
    shuffled = DataLoader(data().dataset, 8, shuffle=True, generator=generators[3])
    trainer(callbacks=[Resumes()]).fit(plain, batches)
    assert ended == [True]


def test_the_checksum_of_a_batch_is_that_of_all_its_tensors():
    batch = {"x": torch.ones(3), "name": "one", "y": torch.zeros(2), "sparse": torch.eye(2).to_sparse()}
    assert _checksum(batch) == _checksum(copy.deepcopy(batch))
    assert _checksum(batch) != _checksum(batch | {"x": torch.zeros(3)})
    assert _checksum(batch) != _checksum(batch | {"y": torch.ones(2)})


def test_a_loader_that_cannot_is_warned_about(tmp_path):
    second_epoch(Once, tmp_path)

    class Warns(Callback):
        def on_train_end(self, trainer, pl_module):
            warnings.warn("other warnings are still given", stacklevel=1)

    message = "gives other batches than when this epoch began, so that some will repeat"
    with pytest.warns(UserWarning, match="still given"), pytest.warns(UserWarning, match=message):
        second_epoch(Once, tmp_path / "rest", tmp_path / "step=7.ckpt", [Warns()])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")  # the resumed run saves nothing
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("step", [3, 10])
def test_our_images_with_augmentation_come_to_their_place(step, num_workers, tmp_path):
    runs = []
    for ckpt_path in (None, tmp_path / f"step={step}.ckpt"):
        torch.manual_seed(3 if ckpt_path is None else 8)
        net = MLP()
        net.net[0] = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8))
        net.net[-1] = torch.nn.Linear(8, 10)
        digits = Digits(batch_size=256, augment=True, num_workers=num_workers)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        options = {"callbacks": [saver]} if ckpt_path is None else {}
        ours = AnalogPipelineStrategy(2, "async", 2, split_at=["net.4"])
        # Both runs drain after every step.
        drains = type("Drains", (Callback,), {"on_train_batch_end": lambda self, t, *args: t.strategy.drain()})()
        options["callbacks"] = [drains, *options.get("callbacks", [])]
        fitted = trainer(ours, max_epochs=3, limit_val_batches=0, enable_checkpointing=ckpt_path is None, **options)
        fitted.fit(net, datamodule=digits, ckpt_path=ckpt_path)
        runs.append(copy.deepcopy(net.state_dict()))
    assert all(torch.equal(runs[1][name], value) for name, value in runs[0].items())
