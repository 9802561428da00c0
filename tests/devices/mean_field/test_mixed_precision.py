"""These tests compare mixed precision with a recomputation, with digital training, and with aihwkit's compound."""

from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from aihwkit.optim import AnalogSGD
from aihwkit.simulator.configs import (
    ConstantStepDevice,
    DigitalRankUpdateRPUConfig,
    ExpStepDevice,
    LinearStepDevice,
    SingleRPUConfig,
    SoftBoundsDevice,
)
from aihwkit.simulator.configs.compounds import MixedPrecisionCompound
from lightning_modules import MLP, loader, make_trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from aimc_pl.analog import is_analog
from aimc_pl.callbacks import DeviceNoise, WriteNoise
from aimc_pl.devices import (
    MeanFieldRPUConfig,
    analog_layers,
    constant_step,
    convert_to_analog,
    describe_updates,
    ideal,
    linear_step,
    make_analog_aware,
    mixed_precision,
    pcm,
    pulse_response,
    reram_sb,
    residual_learning,
    soft_bounds,
    soft_bounds_reference,
    to_mean_field,
)
from aimc_pl.errors import UsageError
from aimc_pl.strategies import AnalogPipelineStrategy

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}
STEP = 0.005


def exact(num_states=400, **options):
    """Return mixed precision on a device whose steps are all equal; 400 states make steps of 0.005."""
    return mixed_precision(constant_step(num_states=num_states, cycle_to_cycle=0.0, perfect_io=True, **options))


def perceptron(sizes):
    torch.manual_seed(0)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def train(network, make, steps, x, y, between=lambda: None):
    optimizer = make(network.parameters())
    make_analog_aware(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        between()
    return optimizer


def data(inputs, classes, samples=40):
    torch.manual_seed(1)
    return torch.randn(samples, inputs), torch.randint(classes, (samples,))


def crossbars(network):
    """Return the weights and the residuals of all crossbars of a network."""
    tiles = [tile.tile for layer in analog_layers(network) for tile in layer.analog_tiles()]
    return [(tile.crossbar.weight, tile.dump_extra()["residual"]) for tile in tiles]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("sizes", [(4, 3), (6, 9, 5), (3, 17, 8, 4)])
def test_weights_are_sums_of_whole_pulses_as_recomputed(sizes, optimizer):
    """Compare every step with a recomputation in float64.

    A residual within a rounding error of a whole step may give its pulse one update earlier or later. The sum of weight
    and residual is the same then, and at most 1 % of the weights may differ.
    """
    x, y = data(sizes[0], sizes[-1])
    network, reference = perceptron(sizes), perceptron(sizes).double()
    convert_to_analog(network, exact())
    start = [weight.clone() for weight, _ in crossbars(network)]
    weights = [layer.weight for layer in reference if isinstance(layer, nn.Linear)]
    held = [torch.zeros_like(weight) for weight in weights]
    digital = OPTIMIZERS[optimizer](reference.parameters())
    pulses = 0

    @torch.no_grad()
    def check():
        nonlocal pulses
        before = [weight.clone() for weight in weights]
        digital.zero_grad()
        with torch.enable_grad():
            F.cross_entropy(reference(x.double()), y).backward()
        digital.step()
        for weight, old, residual, first, (ours, our_residual) in zip(
            weights, before, held, start, crossbars(network), strict=True
        ):
            residual += weight - old
            whole = (residual / STEP).trunc()
            residual -= whole * STEP
            weight.copy_(old + whole * STEP)
            pulses += int(whole.abs().sum())
            torch.testing.assert_close((ours + our_residual).double(), weight + residual, rtol=0, atol=2e-5)
            assert ((ours - weight).abs() > 1e-5).float().mean() <= 0.01
            number = (ours - first) / STEP
            torch.testing.assert_close(number, number.round(), rtol=0, atol=1e-3)
            assert our_residual.abs().max() < STEP * (1 + 1e-5)

    train(network, OPTIMIZERS[optimizer], 25, x, y, between=check)
    assert pulses > 100


def test_the_parameter_shows_the_weights_that_the_crossbar_has():
    x, y = data(5, 3)
    network = perceptron((5, 8, 3))
    numbers = sum(parameter.numel() for parameter in network.parameters())
    convert_to_analog(network, mixed_precision(soft_bounds(write_noise=1.0)))
    assert sum(parameter.numel() for parameter in network.parameters()) == numbers
    seen = []

    def show():
        for layer in analog_layers(network):
            shown = layer.analog_module.shared_weights
            assert torch.equal(shown, layer.get_weights()[0])
            seen.append(shown.detach().clone())

    train(network, OPTIMIZERS["adamw"], 3, x, y, between=show)
    assert not torch.equal(seen[0], seen[-2])


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "sequences": (lambda: nn.Linear(6, 4), (5, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2), (4, 2, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (3, 2), padding=1), (4, 2, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, bias=False), (3, 1, 4, 4, 3)),
}
SETTINGS = {
    "plain": {},
    "bias on the crossbar": {"digital_bias": False},
    "weights scaled": {"weight_scaling_omega": 0.5},
    "outputs scaled": {"weight_scaling_omega": 0.4, "weight_scaling_columnwise": True},
    "scales learnt": {"learn_out_scaling": True},
    "inputs scaled": {"enable": True, "learn_input_range": False, "init_value": 10.0, "init_from_data": 0},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("layer", LAYERS)
def test_with_tiny_steps_training_is_digital(layer, settings):
    """Compare a layer whose device has steps of 2e-9 with a digital layer after 5 steps of SGD with momentum."""
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    digital = nn.Sequential(make())
    ours = deepcopy(digital)
    config = exact(10**9).rpu_config
    section = config.pre_post.input_range if settings == "inputs scaled" else config.mapping
    for name, value in SETTINGS[settings].items():
        setattr(section, name, value)
    convert_to_analog(ours, config)
    if settings == "scales learnt":
        (scales,) = [p for name, p in ours.named_parameters() if name.endswith("out_scaling_alpha")]
        scales.requires_grad_(False)
    x = torch.randn(shape)
    target = torch.randn_like(digital(x))
    for network in (digital, ours):
        optimizer = OPTIMIZERS["momentum"](network.parameters())
        make_analog_aware(optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            F.mse_loss(network(x), target).backward()
            optimizer.step()
    weight, bias = ours[0].get_weights()
    torch.testing.assert_close(weight.view_as(digital[0].weight), digital[0].weight.detach(), rtol=1e-4, atol=1e-6)
    if bias is not None:
        torch.testing.assert_close(bias, digital[0].bias.detach(), rtol=1e-4, atol=1e-6)
    copied = deepcopy(ours)
    ours[0].set_weights(3 * weight, bias)  # on other scales
    ours.load_state_dict(copied.state_dict())
    for network in (ours, copied):
        tile = network[0].analog_module
        shown = tile.shared_weights[:, : weight.shape[1]]
        torch.testing.assert_close(shown.detach(), weight, rtol=1e-6, atol=1e-7)
        network(x)


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_layers_on_several_tiles_train_as_on_one(layer):
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    networks = [nn.Sequential(make())]
    networks.append(deepcopy(networks[0]))
    for network, size in zip(networks, (512, 3), strict=True):
        config = exact(10**9).rpu_config
        config.mapping.max_input_size = config.mapping.max_output_size = size
        convert_to_analog(network, config)
    x = torch.randn(shape)
    target = torch.randn_like(networks[0](x))
    for network in networks:
        optimizer = OPTIMIZERS["momentum"](network.parameters())
        make_analog_aware(optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            F.mse_loss(network(x), target).backward()
            optimizer.step()
    assert len([*networks[1][0].analog_tiles()]) > 1
    for a, b in zip(*(network[0].get_weights() for network in networks), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


ALIKE = {"w_max_dtod": 0.0, "w_min_dtod": 0.0, "dw_min_dtod": 0.0, "up_down_dtod": 0.0}
DEVICES = {
    "constant": ConstantStepDevice(dw_min=0.005, dw_min_std=0.3, w_max=1, w_min=-1, **ALIKE),
    "soft bounds": SoftBoundsDevice(dw_min=0.005, dw_min_std=0.3, w_max=1, w_min=-1, **ALIKE),
    "asymmetric": SoftBoundsDevice(dw_min=0.005, dw_min_std=0.3, w_max=0.7, w_min=-1, up_down=0.2, **ALIKE),
    "added noise": LinearStepDevice(
        **{"dw_min": 0.005, "dw_min_std": 0.3, "w_max": 1, "w_min": -1, "gamma_up": 0.5, "gamma_down": 0.5},
        **{"gamma_up_dtod": 0.0, "gamma_down_dtod": 0.0, "mult_noise": False, "write_noise_std": 1.0},
        **ALIKE,
    ),
    "exponential": ExpStepDevice(dw_min=0.005, dw_min_std=0.3, w_max=1, w_min=-1, **ALIKE),
}
SIZE, TRIALS = 10, 60


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", DEVICES)
def test_pulses_are_aihwkits_in_mean_and_spread(name, several):
    """Compare the mean change of every column within 2 %, and the variance within 10 %: a spread within 5 %.

    aihwkit draws the pulses of a row from trains that are as long as the largest number in the row. All cross-points of
    a row get at most one pulse in an update, or equal numbers (``several``), so that nothing is drawn. The comparisons
    allow 5 standard errors more, which one in 1,500,000 random seeds would exceed in a comparison. A case has 11.
    """
    config = DigitalRankUpdateRPUConfig(device=MixedPrecisionCompound(device=DEVICES[name]))
    generator = torch.Generator().manual_seed(3)
    if several:
        pairs = [(torch.ones(1, SIZE), torch.linspace(-0.3, -0.1, SIZE)[None]) for _ in range(4)]
    else:
        numbers = torch.rand(2, 40, 1, SIZE, generator=generator)
        pairs = [*zip(0.5 + 0.5 * numbers[0], 0.06 * numbers[1] - 0.045, strict=True)]
    torch.manual_seed(0)
    changes = []
    for one in (config, to_mean_field(config)):
        found = []
        for _ in range(TRIALS):
            tile = one.tile_class(SIZE, SIZE, one, False)
            tile.set_weights(torch.full((SIZE, SIZE), 0.2))
            tile.set_learning_rate(0.1)
            for x, error in pairs:
                tile.update(x, error)
            found.append(tile.get_weights()[0] - 0.2)
        changes.append(torch.stack(found).double())
    theirs, ours = changes
    for tolerance, statistic in (
        (0.02, lambda w: w.mean(1)),
        (0.10, lambda w: (w - w.mean(0)).square().mean((1, 2))),
    ):
        a, b = statistic(theirs), statistic(ours)
        slack = 5 * ((a.var(0) + b.var(0)) / TRIALS).sqrt()
        assert ((b.mean(0) - a.mean(0)).abs() <= tolerance * a.mean(0).abs() + slack).all()


def lightning_module(make, device=None):
    class Module(MLP):
        def configure_optimizers(self):
            optimizer = make(self.parameters())
            make_analog_aware(optimizer)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    torch.manual_seed(0)
    module = Module().float()
    if device is not None:
        convert_to_analog(module, device)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sync_equals_plain_lightning(optimizer):
    """Check clipping, accumulation over mini-batches, momentum, weight decay and a scheduler, over 3 stages."""
    samples = DataLoader([(x.float(), y) for x, y in loader(MLP()).dataset], batch_size=4)
    options = {"precision": "32-true", "max_epochs": 3, "gradient_clip_val": 0.3, "accumulate_grad_batches": 2}
    plain, ours = lightning_module(OPTIMIZERS[optimizer], exact()), lightning_module(OPTIMIZERS[optimizer])
    make_trainer(**options).fit(plain, samples)
    strategy = AnalogPipelineStrategy(3, "sync", 2, split_at=["net.4", "net.6"], device=exact())
    make_trainer(strategy, **options).fit(ours, samples)
    torch.manual_seed(0)
    start = MLP().float()
    for index, (a, b) in zip((0, 2, 4, 6, 8), zip(crossbars(plain), crossbars(ours), strict=True), strict=True):
        torch.testing.assert_close(sum(a), sum(b), rtol=0, atol=2e-5)
        assert ((a[0] - b[0]).abs() > 1e-5).float().mean() <= 0.02
        assert ((a[0] - start.net[index].weight).abs() > STEP / 2).any()


@pytest.mark.slow
@pytest.mark.parametrize("device", [soft_bounds(), soft_bounds_reference(tau=0.8, device_to_device=0.1)])
def test_adamw_trains_to_digital_accuracy(device):
    """Check a task that AdamW learns completely, and that pulses from the same gradients do not learn."""
    x, _ = data(12, 3, samples=150)
    y = (x[:, :3] * x[:, 3:6]).argmax(1)
    losses = {}
    for name, chosen in (("digital", None), ("mixed", mixed_precision(device)), ("pulses", device)):
        network = perceptron((12, 40, 3))
        if chosen is not None:
            convert_to_analog(network, chosen)
        train(network, lambda p: torch.optim.AdamW(p, lr=0.02), 100, x, y)
        losses[name] = F.cross_entropy(network(x), y).item()
        if name != "pulses":
            assert (network(x).argmax(1) == y).float().mean() > 0.97
    assert losses["digital"] < 0.1
    assert losses["mixed"] < 0.2
    assert losses["pulses"] > 0.5


def test_a_skipped_step_changes_nothing():
    x, y = data(5, 3)
    network = perceptron((5, 3))
    convert_to_analog(network, exact())
    optimizer = OPTIMIZERS["adamw"](network.parameters())
    make_analog_aware(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    before = deepcopy(crossbars(network))
    for scale, has_moved in ((float("inf"), False), (1.0, True)):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(network(x), y) * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        assert has_moved != torch.equal(crossbars(network)[0][0], before[0][0])
        assert has_moved != torch.equal(crossbars(network)[0][1], before[0][1])


def test_frozen_layers_stay():
    x, y = data(5, 3)
    network = perceptron((5, 6, 3))
    convert_to_analog(network, exact())
    network[0].requires_grad_(False)
    before = deepcopy(crossbars(network))
    train(network, OPTIMIZERS["adamw"], 2, x, y)
    moved = [not torch.equal(a, b) for (a, _), (b, _) in zip(before, crossbars(network), strict=True)]
    assert moved == [False, True]


def test_new_weights_are_shown_and_the_residual_stays():
    x, y = data(5, 3)
    network = perceptron((5, 3))
    convert_to_analog(network, exact())
    train(network, OPTIMIZERS["adamw"], 3, x, y)
    residual = crossbars(network)[0][1]
    assert residual.any()
    network[0].set_weights(torch.full((3, 5), 0.25), torch.zeros(3))
    assert (network[0].analog_module.shared_weights == 0.25).all()
    assert torch.equal(crossbars(network)[0][1], residual)
    network(x)


@pytest.mark.parametrize("change", ["plain optimizer", "in place"])
def test_steps_that_do_not_reach_the_crossbar_are_refused(change):
    x, y = data(5, 3)
    network = perceptron((5, 3))
    convert_to_analog(network, exact())
    F.cross_entropy(network(x), y).backward()
    if change == "plain optimizer":
        torch.optim.SGD(network.parameters(), lr=0.1).step()
    else:
        with torch.no_grad():
            network[0].analog_module.shared_weights.mul_(0.99)
    with pytest.raises(UsageError, match=r"weights of an analog layer 5x3 .*make_analog_aware\(optimizer\)"):
        network(x)


FILTERED = {
    "momentum": OPTIMIZERS["momentum"],
    "adamw": OPTIMIZERS["adamw"],
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "muon": lambda p: torch.optim.Muon(p, lr=0.01),
    "aihwkit's": lambda p: AnalogSGD(p, lr=0.05, momentum=0.9),
}


def several_tiles(leaks=False):
    """Return a network whose first layer has four tiles, and noisy devices; all weights may leak."""
    network = perceptron((6, 5, 3))
    config = mixed_precision(soft_bounds(write_noise=0.5)).rpu_config
    config.mapping.max_input_size, config.mapping.max_output_size = 3, 4
    if leaks:
        config.device.device.lifetime = 50.0
    convert_to_analog(network, config)
    return network


def weights_and_residuals(network):
    return [value.clone() for pair in crossbars(network) for value in pair]


@pytest.mark.parametrize("leaks", [False, True])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("optimizer", FILTERED)
def test_optimizers_need_no_contexts(optimizer, named, leaks):
    """Compare with crossbars that are programmed by hand after the steps of a torch optimizer, bit for bit."""
    x, y = data(6, 3)
    results = []
    for by_hand in (True, False):
        network = several_tiles(leaks)
        found = [(name, p) for name, p in network.named_parameters() if p.ndim == 2]
        assert len(found) == len(crossbars(network)) == 6
        tiles = [tile for layer in analog_layers(network) for tile in layer.analog_tiles()]
        assert {tile.tile.crossbar.leaks for tile in tiles} == {leaks}
        ours = FILTERED[optimizer](found if named else [p for _, p in found])
        if not by_hand:
            make_analog_aware(ours)
            make_analog_aware(ours)
        for _ in range(4):
            ours.zero_grad()
            F.cross_entropy(network(x), y).backward()
            ours.step()
            for tile in tiles if by_hand else ():
                tile.post_update_step()
        results.append(weights_and_residuals(network))
    assert all(map(torch.equal, *results))
    if named:
        names = {name: id(p) for name, p in network.named_parameters()}
        (group,) = ours.param_groups
        assert [names[name] for name in group["param_names"]] == [*map(id, group["params"])]


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "fused adamw"])
def test_contexts_in_the_optimizer_change_nothing(optimizer):
    """Check two groups too, of which the second has a scheduler's learning rate, and a copied network."""
    x, y = data(6, 3)
    results = []
    for has_contexts in (True, False):
        network = deepcopy(several_tiles())
        groups = []
        for layer in (network[0], network[2]):
            parameters = [p for p in layer.parameters() if has_contexts or not is_analog(p)]
            groups.append({"params": parameters, "lr": 0.02 * len(groups) + 0.01})
        ours = FILTERED[optimizer](groups)
        scheduler = torch.optim.lr_scheduler.StepLR(ours, 1, 0.5)
        make_analog_aware(ours)
        for _ in range(3):
            ours.zero_grad()
            F.cross_entropy(network(x), y).backward()
            ours.step()
            scheduler.step()
        results.append(weights_and_residuals(network))
        assert [len(group["params"]) for group in ours.param_groups] == [len([*n.parameters()]) for n in network[::2]]
    assert all(map(torch.equal, *results))


def test_a_value_that_is_written_back_is_no_change():
    network = perceptron((5, 3))
    convert_to_analog(network, exact())
    parameter = network[0].analog_module.shared_weights
    with torch.no_grad():
        parameter.copy_(parameter.clone())
    network(torch.rand(2, 5))
    parameter.data = parameter.data.clone()
    network(torch.rand(2, 5))


def test_aihwkits_optimizer_and_update_do_without_an_optimizer_too():
    x, y = data(5, 3)
    networks = [perceptron((5, 3)) for _ in range(2)]
    for network in networks:
        convert_to_analog(network, exact())
    for _ in range(4):
        optimizer = AnalogSGD(networks[0].parameters(), lr=0.1)
        optimizer.zero_grad()
        F.cross_entropy(networks[0](x), y).backward()
        optimizer.step()
        error = torch.softmax(networks[1](x), 1).sub(F.one_hot(y, 3)) / len(x)
        tile = networks[1][0].analog_module
        tile.set_learning_rate(0.1)
        tile.update(x, error)
        with torch.no_grad():
            tile.bias -= 0.1 * error.sum(0)
    for a, b in zip(*(crossbars(network)[0] for network in networks), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_nothing_of_the_optimizer_is_lost():
    network = perceptron((5, 6, 3))
    convert_to_analog(network, {"0": mixed_precision(), "2": "soft_bounds"})
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    make_analog_aware(optimizer)
    assert describe_updates(network, optimizer).startswith("1 analog layer learns by pulses, at the learning rate 0.1")
    network = perceptron((5, 6, 3))
    convert_to_analog(network, mixed_precision())
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    make_analog_aware(optimizer)
    assert describe_updates(network, optimizer) is None


def test_noise_callbacks_write_weights():
    module = lightning_module(OPTIMIZERS["adamw"])
    samples = DataLoader([(x.float(), y) for x, y in loader(module).dataset], batch_size=8)
    trainer = make_trainer(
        AnalogPipelineStrategy(1, "sync", 1, device=exact()),
        callbacks=[DeviceNoise([WriteNoise(0.1)])],
        precision="32-true",
        max_epochs=1,
    )
    trainer.fit(module, samples)
    for weight, residual in crossbars(module):
        assert residual.any()
        assert ((weight / STEP) % 1).std() > 0.1  # the noise moves weights by parts of a step


def test_any_pulsed_device_and_aihwkits_presets():
    for device in (soft_bounds(), soft_bounds(backend="bits"), linear_step(), reram_sb(), "EcRam", "ReRamES"):
        config = mixed_precision(device).rpu_config
        assert isinstance(config, MeanFieldRPUConfig)
        assert isinstance(config.device, MixedPrecisionCompound)
    preset, composed = mixed_precision("ReRamSB").rpu_config, mixed_precision(reram_sb()).rpu_config
    assert str(preset) == str(composed)
    own = mixed_precision(soft_bounds(backend="aihwkit")).rpu_config
    assert type(own) is DigitalRankUpdateRPUConfig
    responses = []
    for one in (preset, reram_sb().rpu_config):
        torch.manual_seed(0)
        responses.append(pulse_response(one, 20, 3))
    assert (responses[0] == responses[1]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mixed_precision(ideal()), "needs a pulsed device of one crossbar, got FloatingPointDevice"),
        (lambda: mixed_precision(residual_learning()), "needs a pulsed device of one crossbar, got TransferCompound"),
        (lambda: mixed_precision(mixed_precision()), "one crossbar, got MixedPrecisionCompound"),
        (lambda: mixed_precision(pcm()), "needs a pulsed device of one crossbar, got PCMPresetUnitCell"),
        (lambda: mixed_precision("Gold"), "unknown material 'Gold': choose one of ReRamES"),
        (lambda: mixed_precision(soft_bounds), r"device must be a device such as soft_bounds\(\)"),
        (lambda: mixed_precision(SingleRPUConfig()), r"ConfiguredDevice\(...\) around .{0,160}$"),
        *(
            (
                lambda option=option, value=value: to_mean_field(
                    DigitalRankUpdateRPUConfig(
                        device=MixedPrecisionCompound(device=ConstantStepDevice(), **{option: value})
                    )
                ),
                rf"does not simulate MixedPrecisionCompound\.{option}={value}",
            )
            for option, value in (("transfer_every", 2), ("n_x_bins", 15), ("transfer_lr", 0.5), ("granularity", 0.1))
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
