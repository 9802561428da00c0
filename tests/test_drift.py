"""These tests compare the evaluation of drifted weights with the formulas of aihwkit's model, in float64."""

import numpy as np
import pytest
import torch
from aihwkit.inference import PCMLikeNoiseModel
from aihwkit.simulator.configs import InferenceRPUConfig, IOParameters, TorchInferenceRPUConfig
from torch import nn

from aimc_pl.analog import analog_layers
from aimc_pl.devices import convert_to_analog, residual_learning, soft_bounds
from aimc_pl.drift import DAY, YEAR, draw_drift, evaluate_drift, phase_change_memory
from aimc_pl.errors import UsageError
from aimc_pl.figures import BLUE, ORANGE


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def perfect(compensation=None, **noise):
    """Return devices with perfect converters, with noise and drift of the given scales, 0 by default."""
    scales = {"prog_noise_scale": 0.0, "read_noise_scale": 0.0, "drift_scale": 0.0} | noise
    config = phase_change_memory()
    config.forward = IOParameters(is_perfect=True)
    config.noise_model = PCMLikeNoiseModel(**scales)
    config.drift_compensation = compensation
    return config


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def output(module):
    return module(X).sum()


@pytest.mark.parametrize("device", [None, soft_bounds(), residual_learning(soft_bounds(), gamma=0.3)])
def test_without_noise_and_drift_it_is_the_digital_module(device):
    net = network()
    if device is not None:
        convert_to_analog(net, {"0": device})
    weights = [net[0].weight.detach().clone(), net[2].weight.detach().clone()]
    with torch.no_grad():
        expected = output(network()).item()
    rows = evaluate_drift(net, output, [0, YEAR], perfect(), repeats=2)
    assert [row["time"] for row in rows] == [0.0, YEAR]
    np.testing.assert_allclose([row["mean"] for row in rows], expected, rtol=1e-4)
    assert all(row["std"] < 1e-6 and row["compensated"] is False and row["repeats"] == 2 for row in rows)
    assert len(analog_layers(net)) == (0 if device is None else 1)
    assert torch.equal(net[0].weight, weights[0])
    assert torch.equal(net[2].weight, weights[1])


def test_the_layers_that_are_analog_are_programmed_and_the_others_are_not():
    net, seen = network(), []
    convert_to_analog(net, {"2": "soft_bounds"})
    evaluate_drift(net, lambda module: seen.append([*map(type, module)]) or 0, [1.0], repeats=1)
    assert seen[0][0] is nn.Linear
    assert seen[0][2] is not nn.Linear
    assert type(net[0]) is nn.Linear


def test_drift_alone_is_the_power_law():
    """Check ((t + t₀)/t₀)^−ν with ν = 0.049, which the model gives to the largest conductances, up to their spread."""
    net = nn.Sequential(nn.Linear(400, 1, bias=False))
    nn.init.ones_(net[0].weight)

    def mean(module):
        return module(torch.full((1, 400), 1 / 400)).item()

    rows = evaluate_drift(net, mean, [DAY], perfect(drift_scale=1.0), repeats=8)
    nu = 0.049 + 0.008 * np.random.default_rng(0).standard_normal(1_000_000)
    expected = ((DAY + 20) / 20) ** -nu
    assert abs(rows[0]["mean"] - expected.mean()) < 5 * expected.std() / np.sqrt(8 * 400)
    np.testing.assert_allclose(rows[0]["std"], expected.std() / np.sqrt(400), rtol=0.9)


def test_compensation_takes_away_the_mean_drift():
    config = perfect(phase_change_memory().drift_compensation, drift_scale=1.0)
    net = nn.Sequential(nn.Linear(400, 1, bias=False))
    nn.init.ones_(net[0].weight)
    rows = evaluate_drift(net, lambda module: module(torch.full((1, 400), 1 / 400)).item(), [DAY, YEAR], config, 3)
    assert [(row["compensated"], row["time"]) for row in rows] == [
        *((False, DAY), (False, YEAR), (True, DAY), (True, YEAR)),
    ]
    assert rows[1]["mean"] < rows[0]["mean"] < 0.8
    np.testing.assert_allclose([row["mean"] for row in rows[2:]], 1.0, rtol=1e-4)
    assert rows[0]["std"] > 100 * rows[2]["std"]


def test_devices_keep_their_exponents_and_are_programmed_anew():
    outputs, config = [], perfect(drift_scale=1.0)

    def note(module):
        outputs.append(analog_layers(module)[0].get_weights()[0])
        return 0.0

    evaluate_drift(nn.Sequential(nn.Linear(6, 5)), note, [DAY, YEAR], config, repeats=2)
    nus = [(outputs[0] / outputs[1]).log() / np.log((YEAR + 20) / (DAY + 20)) for outputs in (outputs[:2], outputs[2:])]
    assert (nus[0] > 0).all()
    assert not torch.allclose(nus[0], nus[1], rtol=0.01)
    # The exponent between the two times is the one since the programming.
    programmed = [out[0] * ((DAY + 20) / 20) ** nu for out, nu in zip((outputs[:2], outputs[2:]), nus, strict=True)]
    torch.testing.assert_close(programmed[0], programmed[1], rtol=1e-3, atol=1e-5)


def test_results_repeat_by_seed_and_leave_the_random_state():
    first, again, other = (evaluate_drift(network(), output, [DAY], repeats=2, seed=seed) for seed in (0, 0, 7))
    assert first == again
    assert first[0]["mean"] != other[0]["mean"]
    net = network()
    state = torch.get_rng_state()
    evaluate_drift(net, output, [DAY], repeats=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_aihwkits_own_tiles_are_evaluated_too():
    (row,) = evaluate_drift(network(), output, [DAY], InferenceRPUConfig(drift_compensation=None), repeats=1)
    assert np.isfinite(row["mean"])
    assert np.isnan(row["std"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"times": [-1]}, "each of times must be a finite number of at least 0, got -1"),
        ({"times": 3600}, "times is a list of seconds, got 3600"),
        ({"repeats": 0}, "repeats must be a whole number"),
        ({"metric": 0.9}, "metric must be a function"),
        ({"rpu_config": soft_bounds().rpu_config}, "rpu_config must be an InferenceRPUConfig of aihwkit, got Mean"),
        ({"module": nn.Tanh()}, "nothing to convert"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message) as error:
        evaluate_drift(**{"module": network(), "metric": output} | arguments)
    assert len(str(error.value)) <= 200


def test_one_analog_layer_is_refused_and_not_wrapped():
    net = network()
    convert_to_analog(net, "ideal")
    with pytest.raises(UsageError, match=r"put it into a torch\.nn\.Sequential"):
        evaluate_drift(net[0], output)


def test_the_figure_has_the_rows():
    rows = [
        {"compensated": compensated, "time": time, "mean": time / YEAR, "std": 0.1, "repeats": 2}
        for compensated in (False, True)
        for time in (0.0, DAY, YEAR)
    ]
    axes = draw_drift(rows, "accuracy", digital=0.9).axes[0]
    assert axes.get_legend_handles_labels()[1] == ["digital", "compensated", "not compensated"]
    np.testing.assert_allclose(axes.containers[0][0].get_xydata(), [[0, 0], [DAY, DAY / YEAR], [YEAR, 1]])
    assert axes.get_ylabel() == "accuracy"
    assert [bars[0].get_color() for bars in axes.containers] == [BLUE, ORANGE]
    assert isinstance(phase_change_memory(), TorchInferenceRPUConfig)
