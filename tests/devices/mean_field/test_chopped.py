"""These tests recompute, step by step, what tiles with choppers do when nothing is random."""

import pytest
import torch
from aihwkit.simulator.configs import (
    ConstantStepDevice,
    IOParameters,
    SoftBoundsDevice,
    UnitCellRPUConfig,
    UpdateParameters,
)
from aihwkit.simulator.configs.compounds import ChoppedTransferCompound, DynamicTransferCompound
from jsonargparse import ArgumentParser

from aimc_pl.devices import (
    AnalogDevice,
    MeanFieldRPUConfig,
    agad,
    chopped_tiki_taka,
    chopped_transfer,
    dynamic_transfer,
    residual_learning,
    soft_bounds,
    tiki_taka_v2,
    to_mean_field,
)
from aimc_pl.devices.mean_field.crossbar import ROWS
from aimc_pl.errors import UsageError

OUT, IN, STEP = 4, 3, 0.01
ALIKE = {"w_max_dtod": 0.0, "w_min_dtod": 0.0, "dw_min_dtod": 0.0, "up_down_dtod": 0.0, "dw_min_std": 0.0}
UNIT = 0.03
"""A transfer of a weight of this size, times the learning rate, fills the buffer by one step."""


def exact(kind, **options):
    """Return a configuration without noise. Updates of the first crossbar are exact to about 1e-5."""
    perfect = IOParameters(is_perfect=True)
    fine, coarse = (ConstantStepDevice(w_max=100, w_min=-100, dw_min=step, **ALIKE) for step in (1e-11, STEP))
    settings = {
        "transfer_forward": perfect,
        "units_in_mbatch": True,
        "buffer_granularity": UNIT / 1e-11,
        "fast_lr": 0.2,
        "transfer_lr": 2.0,
    }
    return UnitCellRPUConfig(
        device=kind(unit_cell_devices=[fine, coarse], **settings | options),
        forward=perfect,
        backward=perfect,
        update=UpdateParameters(desired_bl=10**13),
    )


def tile_of(config):
    torch.manual_seed(0)
    tile = to_mean_field(config).tile_class(OUT, IN, to_mean_field(config), False)
    tile.set_learning_rate(0.1)
    return tile


def batches(number):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(2, IN, generator=generator), torch.randn(2, OUT, generator=generator)) for _ in range(number)]


def rates(options, x, error, means):
    """Yield the learning rate of every vector of a batch."""
    for one_x, one_error in zip(x, error, strict=True):
        largest = float(one_x.abs().max()), float(one_error.abs().max())
        kept = 1 - (1 - options.get("auto_momentum", 0.99)) / len(x)
        means[:] = [kept * m + (1 - kept) * new if m else new for m, new in zip(means, largest, strict=True)]
        yield options["fast_lr"] * 100 / (means[0] * means[1])  # a train of 10¹³ slots moves a weight by up to 100


CHOPPED = {
    "regular": {"in_chop_prob": 0.5, "in_chop_random": False},
    "always": {"in_chop_prob": 1.0, "in_chop_random": True, "gamma": 0.25},
    "outputs": {"in_chop_prob": 0.3, "in_chop_random": False, "out_chop_prob": 1.0, "gamma": 0.25, "momentum": 0.3},
    "keeps the rest": {"in_chop_prob": 0.5, "in_chop_random": False, "forget_buffer": False, "momentum": 0.1},
    "without a buffer": {"in_chop_prob": 0.5, "in_chop_random": False, "no_buffer": True},
    "never": {"in_chop_prob": 0.0, "auto_granularity": 4.5},
    "scaled": {"in_chop_prob": 0.5, "in_chop_random": False, "auto_scale": True, "fast_lr": 5e-4, "auto_momentum": 0.5},
    "of true magnitude": {"in_chop_prob": 1.0, "correct_gradient_magnitudes": True},
}


@pytest.mark.parametrize("name", CHOPPED)
def test_choppers_equal_the_recomputation(name):
    options = CHOPPED[name]
    if options.get("correct_gradient_magnitudes"):  # then, the buffer is in units of the second crossbar's steps
        options = options | {"buffer_granularity": 3.0}
    tile = tile_of(exact(ChoppedTransferCompound, **options))
    gamma, period = (
        options.get("gamma", 0.0),
        max(2, -(-1 // options["in_chop_prob"])) if options["in_chop_prob"] else 0,
    )
    w, p, held = (torch.zeros(OUT, IN, dtype=torch.float64) for _ in range(3))
    s, t, means, moved = torch.ones(IN), torch.ones(OUT), [0.0, 0.0], 0
    unit = UNIT * options.get("auto_granularity", 3.0) / 3
    per_unit = 0.1 * 2.0 * (gamma or 1.0) / unit
    if options.get("correct_gradient_magnitudes"):
        per_unit = 0.1 * 2.0 / (3.0 * STEP) / 0.2
    for step, (x, error) in enumerate(batches(45)):
        torch.testing.assert_close(
            tile.tile(x).double(), x.double() @ (w + gamma * t[:, None] * s * p).T, rtol=1e-3, atol=1e-3
        )
        tile.update(x, error)
        lrs = torch.tensor([*rates(options, x, error, means)] if options.get("auto_scale") else [0.2, 0.2])
        p -= t[:, None] * s * ((error * lrs[:, None]).T @ x)
        k, cycle = step % IN, step // IN
        for j in range(OUT):
            value = float((0.0 if options.get("no_buffer") else held[j, k]) + per_unit * t[j] * s[k] * p[j, k])
            steps = max(-1, min(1, int(value)))
            momentum = options.get("momentum", 0.0)
            left = value * momentum if options.get("forget_buffer", True) else value - (1 - momentum) * steps
            held[j, k] = left if steps else value
            w[j, k] += STEP * steps
            moved += abs(steps)
        if options["in_chop_prob"] == 1.0 or (period and (cycle + 1) % period == 0):
            s[k] *= -1
        if k == IN - 1 and options.get("out_chop_prob"):
            t *= -1
        for crossbar, expected in zip(tile.tile.crossbars, (p, w), strict=True):
            torch.testing.assert_close(crossbar.weight.double(), expected, rtol=1e-3, atol=1e-3)
    assert moved > 20


DYNAMIC = {
    "plain": {"in_chop_prob": 0.4},
    "random": {"in_chop_prob": 1.0, "in_chop_random": True},
    "capped": {
        "in_chop_prob": 0.5,
        "forget_buffer": False,
        "buffer_cap": 1.5,
        "momentum": 0.2,
        "tail_weightening": 1.5,
    },
    "corrected": {"in_chop_prob": 0.25, "experimental_correct_accumulation": True, "tail_weightening": 2.0},
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_references_equal_the_recomputation(name):
    options = DYNAMIC[name]
    tile = tile_of(exact(DynamicTransferCompound, **options))
    period = max(2, -(-1 // options["in_chop_prob"]))
    w, p, held, mean, past = (torch.zeros(OUT, IN, dtype=torch.float64) for _ in range(5))
    s, flipped, moved = torch.ones(IN), [False] * IN, 0
    for step, (x, error) in enumerate(batches(60)):
        tile.update(x, error)
        p -= s * (0.2 * error.T @ x)
        k, cycle = step % IN, step // IN
        if flipped[k]:
            past[:, k] = mean[:, k]
        share = min(options.get("tail_weightening", 5.0) / period, 1.0)
        per_unit = 0.1 * 2.0 / UNIT
        if options.get("experimental_correct_accumulation"):
            per_unit /= cycle % period + 1
        for j in range(OUT):
            value = float(held[j, k] + per_unit * s[k] * (p[j, k] - past[j, k]))
            steps = max(-1, min(1, int(value)))
            left = 0.0
            if not options.get("forget_buffer", True):
                left = max(-1.5, min(1.5, value - (1 - options["momentum"]) * steps))
            held[j, k] = left if steps else value
            w[j, k] += STEP * steps * (cycle > period)
            moved += abs(steps) * (cycle > period)
        mean[:, k] += share * (p[:, k] - mean[:, k])
        flipped[k] = options.get("in_chop_random", False) or (cycle + 1) % period == 0
        s[k] *= -1 if flipped[k] else 1
        for crossbar, expected in zip(tile.tile.crossbars, (p, w), strict=True):
            torch.testing.assert_close(crossbar.weight.double(), expected, rtol=1e-3, atol=1e-3)
    assert moved > 20


LOOPS = {f"chopped, {name}": (ChoppedTransferCompound, options) for name, options in CHOPPED.items()}
LOOPS |= {f"dynamic, {name}": (DynamicTransferCompound, options) for name, options in DYNAMIC.items()}
LOOPS |= {
    "chopped, at random": (ChoppedTransferCompound, {"in_chop_prob": 0.3, "in_chop_random": True}),
    "chopped, outputs alone": (ChoppedTransferCompound, {"in_chop_prob": 0.0, "out_chop_prob": 0.4, "gamma": 0.3}),
    "dynamic, low cap": (DynamicTransferCompound, DYNAMIC["capped"] | {"buffer_cap": 0.5}),
    "dynamic, at random": (DynamicTransferCompound, {"in_chop_prob": 0.3, "in_chop_random": True, "auto_scale": True}),
}


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("every", [1.0, -1 / 5, -1 / 15])
@pytest.mark.parametrize("name", LOOPS)
def test_the_compiled_loop_does_what_single_vectors_do(name, every, noisy, monkeypatch):
    """Compare tiles that draw the same random numbers. A transfer comes after every vector, or several come.

    A negative ``every`` is in mini-batches of 5 vectors.
    """
    kind, options = LOOPS[name]
    options = options | {"units_in_mbatch": every < 0, "transfer_every": abs(every)}
    options |= {"fast_lr": 0.01, "buffer_granularity": 0.1, "transfer_forward": IOParameters(is_perfect=not noisy)}
    cell = kind(unit_cell_devices=[SoftBoundsDevice(), SoftBoundsDevice(write_noise_std=10.0 * noisy)], **options)
    config = UnitCellRPUConfig(device=cell, update=UpdateParameters(desired_bl=10))
    one, other = tile_of(config), tile_of(config)
    for tile in (one, other):
        tile.set_weights(torch.full((OUT, IN), 0.2))
    monkeypatch.setattr(other.tile, "_update_in_one_loop", lambda x, error, vectors: False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        x, error = (torch.randn(5, size, generator=generator) for size in (IN, OUT))
        assert one.tile._update_in_one_loop(x, error, ROWS)
        other.update(x, error)
    assert one.tile.crossbars[1].tally.num_updates > 10
    for a, b in zip(one.tile.crossbars, other.tile.crossbars, strict=True):
        torch.testing.assert_close(a.weight, b.weight)
        assert a.tally.num_updates == b.tally.num_updates
        assert float(a.tally.cut) == pytest.approx(float(b.tally.cut))
    states, others = one.tile.dump_extra(), other.tile.dump_extra()
    for ignored in ("crossbars", "generator"):
        del states[ignored], others[ignored]
    torch.testing.assert_close(states, others)
    torch.testing.assert_close(one.get_weights(), other.get_weights())


def test_long_trains_are_left_to_single_vectors():
    """Check that scales do not advance twice where a train turns out to be longer than the compiled loop can send."""
    options = {"in_chop_prob": 0.0, "auto_scale": True, "fast_lr": 0.01, "transfer_every": 1.0}
    cell = ChoppedTransferCompound(unit_cell_devices=[SoftBoundsDevice(), SoftBoundsDevice()], **options)
    update = UpdateParameters(desired_bl=10, fixed_bl=False, update_management=False, update_bl_management=False)
    tile = tile_of(UnitCellRPUConfig(device=cell, update=update))
    x, error = torch.ones(4, IN), torch.ones(4, OUT)
    before = tile.tile.dump_extra()
    assert not tile.tile._update_in_one_loop(x, 1e-9 * error, ROWS)
    torch.testing.assert_close(tile.tile.dump_extra(), before)
    assert tile.tile._update_in_one_loop(x, error, ROWS)


def test_infinite_vectors_leave_scales_alone():
    """Check, with a step of 0 too, that weights that moved by finite vectors alone stay finite."""
    for step in (1.0, 0.0):
        options = {"in_chop_prob": 0.0, "auto_scale": True, "fast_lr": 0.01, "transfer_every": 1.0, "step": step}
        cell = ChoppedTransferCompound(unit_cell_devices=[SoftBoundsDevice(), SoftBoundsDevice()], **options)
        tile = tile_of(UnitCellRPUConfig(device=cell, update=UpdateParameters(desired_bl=10)))
        for _ in range(5):
            tile.update(torch.ones(4, IN), torch.ones(4, OUT))
        assert all(crossbar.weight.isfinite().all() for crossbar in tile.tile.crossbars)
        largest = tile.tile._counters["x_largest"]
        tile.update(torch.full((1, IN), float("inf")), torch.ones(1, OUT))
        assert tile.tile._counters["x_largest"] == largest


def test_a_tile_without_transfers_learns():
    cell = ChoppedTransferCompound(
        unit_cell_devices=[SoftBoundsDevice(), SoftBoundsDevice()],
        transfer_every=0.0,
        auto_granularity=1000.0,
        units_in_mbatch=False,
    )
    tile = tile_of(UnitCellRPUConfig(device=cell))
    assert tile.tile._update_in_one_loop(torch.ones(1, IN), torch.ones(1, OUT), ROWS)
    assert tile.tile.crossbars[0].weight.all()
    assert not tile.tile.crossbars[1].weight.any()


def test_a_vector_of_zeros_has_a_rate():
    """Check that rates are scaled from the first vector on that has both inputs and errors."""
    options = {"in_chop_prob": 0.0, "auto_scale": True, "fast_lr": 0.1, "transfer_every": 1.0}
    tile = tile_of(exact(ChoppedTransferCompound, **options))
    x, error = torch.ones(4, IN), torch.ones(4, OUT)
    x[0] = 0
    tile.update(x, error)
    assert tile.tile.crossbars[0].weight.isfinite().all()
    assert tile.tile.crossbars[0].weight.all()


@pytest.mark.parametrize("kind", [ChoppedTransferCompound, DynamicTransferCompound])
def test_a_tile_resumes_bit_for_bit(kind):
    options = {"in_chop_prob": 0.3, "in_chop_random": True, "auto_scale": True, "fast_lr": 5e-4, "gamma": 0.2}
    config = exact(kind, **options)
    one, other = tile_of(config), tile_of(config)
    data = batches(40)
    for x, error in data[:20]:
        one.update(x, error)
    other.tile.load_extra(one.tile.dump_extra())
    for x, error in data[20:]:
        one.update(x, error)
        other.update(x, error)
    assert torch.equal(one.get_weights()[0], other.get_weights()[0])
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(one.tile.crossbars, other.tile.crossbars, strict=True))
    one.tile.set_weights(torch.zeros(OUT, IN))
    fresh = tile_of(config).tile.dump_extra()
    ended = one.tile.dump_extra()
    assert ended["counters"] == fresh["counters"]
    assert all(torch.equal(ended[name], fresh[name]) for name in ("buffer", "in_signs", "out_signs"))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ChoppedTransferCompound, {"transfer_every": -1.0}, r"does not simulate transfer_every=-1\.0"),
        (ChoppedTransferCompound, {"n_reads_per_transfer": 2}, "does not simulate .*n_reads_per_transfer=2"),
        (ChoppedTransferCompound, {"random_selection": True}, "does not simulate .*random_selection=True"),
        (ChoppedTransferCompound, {"auto_scale": True, "auto_momentum": 1.0}, "auto_momentum must be between 0 and 1"),
        (DynamicTransferCompound, {"out_chop_prob": 0.1}, "does not simulate .*out_chop_prob=0.1"),
        (DynamicTransferCompound, {"no_buffer": True}, "does not simulate .*no_buffer=True"),
        (DynamicTransferCompound, {"in_chop_prob": 0.0}, "in_chop_prob must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(kind, options, message):
    with pytest.raises(UsageError, match=message):
        to_mean_field(exact(kind, **options))


@pytest.mark.parametrize(
    ("algorithm", "kind"), [(chopped_transfer, ChoppedTransferCompound), (dynamic_transfer, DynamicTransferCompound)]
)
def test_algorithms_take_any_pulsed_device(algorithm, kind):
    parser = ArgumentParser()
    parser.add_argument("--device", type=AnalogDevice)
    inner = {"class_path": "aimc_pl.devices.linear_step", "init_args": {"gamma": 0.3, "w_max": 0.7, "backend": "bits"}}
    outer = {"class_path": f"aimc_pl.devices.{algorithm.__name__}", "init_args": {"device": inner, "chop_prob": 0.2}}
    config = parser.instantiate(parser.parse_object({"device": outer})).device.rpu_config
    assert type(config.device) is kind
    assert config.sample_pulses
    assert config.device.in_chop_prob == 0.2
    assert [device.w_max for device in config.device.unit_cell_devices] == [0.7, 0.7]
    tile = config.tile_class(OUT, IN, config, False)
    for x, error in batches(60):
        tile.update(x, error)
    assert all(crossbar.weight.any() for crossbar in tile.tile.crossbars)
    assert not isinstance(algorithm(soft_bounds(backend="aihwkit")).rpu_config, MeanFieldRPUConfig)


def test_algorithms_refuse_what_cannot_be():
    for options, message in (
        ({"chop_prob": 1.5}, "chop_prob must be .* at most 1"),
        ({"fast_lr": 0.0}, "fast_lr must be .* above 0"),
        ({"transfer_lr": 0.0}, "transfer_lr must be .* above 0"),
        ({"transfer_every": 0.0}, "transfer_every must be .* above 0"),
        ({"device": residual_learning()}, "needs a pulsed device of one crossbar, got TransferCompound"),
    ):
        for algorithm in (chopped_transfer, dynamic_transfer):
            with pytest.raises(UsageError, match=message):
                algorithm(**options)
    with pytest.raises(UsageError, match=r"chop_prob must be .* above 0"):
        dynamic_transfer(chop_prob=0)


@pytest.mark.parametrize("preset", [tiki_taka_v2, chopped_tiki_taka, agad])
def test_presets_run_here(preset):
    config = preset("EcRam").rpu_config
    assert isinstance(config, MeanFieldRPUConfig)
    assert type(preset("EcRam", backend="aihwkit").rpu_config).__name__.endswith("EcRamPreset")
    tile = config.tile_class(OUT, IN, config, False)
    for x, error in batches(3):
        tile.update(x, error)
    assert tile.tile.crossbars[0].weight.any()
    assert isinstance(preset("Capacitor").rpu_config, MeanFieldRPUConfig)
