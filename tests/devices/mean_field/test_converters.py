"""These tests compare products through converters with aihwkit's C++ tiles: values or, with noise, distributions."""

from copy import deepcopy

import pytest
import torch
from aihwkit.simulator.configs import ConstantStepDevice, IOParameters, SingleRPUConfig
from aihwkit.simulator.parameters.enums import BoundManagementType, NoiseManagementType, WeightNoiseType
from aihwkit.simulator.tiles.analog import AnalogTile

from aimc_pl.devices.mean_field.converters import (
    acts_as_noise,
    input_scale,
    never_exceeds,
    noisy_convolution,
    noisy_transposed_convolution,
    product,
)
from aimc_pl.devices.mean_field.random_table import TableGenerator
from aimc_pl.devices.mean_field.vectors import Convolution, Vectors

ROWS = Vectors(-1)
NO_DEVIATION = {"w_max_dtod": 0.0, "w_min_dtod": 0.0, "dw_min_dtod": 0.0, "up_down_dtod": 0.0}
QUIET = {
    "default": IOParameters(out_noise=0.0),
    "no converters": IOParameters(out_noise=0.0, inp_res=-1, out_res=-1),
    "coarse": IOParameters(out_noise=0.0, inp_res=14, out_res=1 / 30),
    "no noise management": IOParameters(
        out_noise=0.0, noise_management=NoiseManagementType.NONE, bound_management=BoundManagementType.NONE
    ),
    "constant noise management": IOParameters(
        out_noise=0.0, noise_management=NoiseManagementType.CONSTANT, nm_thres=2.5
    ),
    "threshold": IOParameters(out_noise=0.0, nm_thres=0.9),
    "bound exceeded": IOParameters(out_noise=0.0, out_bound=1.0),
    "bound exceeded, negative untested": IOParameters(out_noise=0.0, out_bound=1.0, bm_test_negative_bound=False),
    "bound exceeded beyond help": IOParameters(out_noise=0.0, out_bound=0.1, max_bm_factor=4),
    "bound clips": IOParameters(out_noise=0.0, out_bound=1.0, bound_management=BoundManagementType.NONE),
    "scaled": IOParameters(out_noise=0.0, out_scale=1.7),
    "outputs without a bound": IOParameters(out_noise=0.0, out_bound=-1.0),
    "inputs without a bound": IOParameters(
        out_noise=0.0,
        inp_bound=-1.0,
        out_bound=0.0,
        noise_management=NoiseManagementType.NONE,
        bound_management=BoundManagementType.NONE,
    ),
}


def aihwkits(io, weight):
    device = ConstantStepDevice(w_max=10, w_min=-10, **NO_DEVIATION)
    config = SingleRPUConfig(device=device, forward=deepcopy(io), backward=deepcopy(io))
    tile = AnalogTile(*weight.shape, config, False)
    tile.set_weights(weight)
    return tile


def ours(io, weight, x, bound_management, generator=None):
    generator = generator or TableGenerator().manual_seed(0)
    return product(weight, x.mul, ROWS, input_scale(x, ROWS, io), io, generator, bound_management)


@pytest.mark.parametrize("name", QUIET)
@pytest.mark.parametrize("magnitude", [0.01, 1.0, 30.0])
def test_without_noise_products_are_aihwkits(name, magnitude):
    torch.manual_seed(0)
    io, weight = QUIET[name], torch.randn(6, 9) * 0.4
    x, error = torch.randn(40, 9) * magnitude, torch.randn(40, 6) * magnitude
    x[3] = error[5] = 0
    tile = aihwkits(io, weight)
    managed = io.bound_management == BoundManagementType.ITERATIVE
    torch.testing.assert_close(ours(io, weight, x, managed), tile.tile.forward(x), rtol=1e-4, atol=1e-4 * magnitude)
    torch.testing.assert_close(
        ours(io, weight.T, error, False), tile.tile.backward(error), rtol=1e-4, atol=1e-4 * magnitude
    )


NOISY = {
    "output": IOParameters(),
    "input": IOParameters(out_noise=0.0, inp_noise=0.1),
    "weight": IOParameters(out_noise=0.02, w_noise=0.05, w_noise_type=WeightNoiseType.ADDITIVE_CONSTANT),
    "PCM": IOParameters(out_noise=0.02, w_noise=0.1, w_noise_type=WeightNoiseType.PCM_READ),
    "stochastic rounding": IOParameters(out_noise=0.0, inp_res=10, inp_sto_round=True, out_res=60, out_sto_round=True),
    "bound exceeded": IOParameters(out_noise=0.1, out_bound=1.2),
    "without a bound": IOParameters(out_noise=0.1, out_bound=-1.0),
}


@pytest.mark.parametrize("name", NOISY)
def test_with_noise_products_have_aihwkits_mean_and_spread(name):
    """Check mean and spread of 4,000 products of 18 outputs each.

    The bounds are 5 standard errors. One in 25,000 random seeds would exceed them (72 comparisons).
    """
    torch.manual_seed(1)
    io, weight, draws = NOISY[name], torch.randn(6, 9) * 0.5, 4000
    x, tile = torch.randn(3, 9), aihwkits(NOISY[name], weight)
    many = x.repeat(draws, 1)
    samples = [ours(io, weight, many, True), tile.tile.forward(many)]
    of_ours, of_aihwkit = (sample.view(draws, 3, 6).double() for sample in samples)
    spread = of_aihwkit.std(0)
    assert ((of_ours.mean(0) - of_aihwkit.mean(0)).abs() <= 5 * spread * (2 / draws) ** 0.5 + 1e-3).all()
    # The relative standard error of a standard deviation is 1/√(2n) if the kurtosis is that of a Gaussian.
    assert ((of_ours.std(0) / spread - 1).abs() <= 5 * draws**-0.5).all()


def test_bounds_are_managed_vector_by_vector():
    """Check that only a vector that exceeds its bound is repeated at half the input, with twice the noise."""
    io = IOParameters(out_bound=1.0, out_noise=0.01, inp_res=-1, out_res=-1)
    x = torch.tensor([[1.0, 1.0], [1.0, 0.0]]).repeat(3000, 1)
    y = ours(io, torch.tensor([[0.9, 0.9]]), x, True).view(3000, 2)
    assert y.std(0).tolist() == pytest.approx([0.02, 0.01], rel=0.1)
    assert y.mean(0).tolist() == pytest.approx([1.8, 0.9], abs=0.002)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolutions_converters_act_as_noise(stride):
    """Compare noisy convolutions with the product of weights and patches, in 1,500 draws.

    The bounds are 5 standard errors. One in 2,000 random seeds would exceed them. The means of the forward product
    differ by the rounding of inputs, which is fixed in the product with patches and is noise in the convolution.
    """
    torch.manual_seed(0)
    io, draws = IOParameters(), 1500
    convolution = Convolution((3, 3), (stride, stride), (1, 1), (1, 1))
    weight, images = torch.randn(4, 27) * 0.2, torch.randn(1, 3, 5, 6)
    assert acts_as_noise(weight, io)
    assert never_exceeds(weight.T, io)
    generator, many = TableGenerator().manual_seed(1), images.expand(draws, -1, -1, -1)
    exact = convolution.multiply(weight, images)
    error = torch.randn_like(exact) * 1e-3
    errors = error.expand(draws, -1, -1, -1)
    scale = input_scale(images, convolution, io).flatten(2).expand(draws, -1, -1)

    def scaled(gain):
        return convolution.columns(many) * gain

    reference = product(weight, scaled, Vectors(1), scale, io, generator, True).view(draws, *exact.shape[1:])
    of_ours = noisy_convolution(weight, many, convolution, io, generator)
    assert of_ours is not None
    assert ((of_ours.std(0) / reference.std(0) - 1).abs() <= 5 * draws**-0.5).all()
    rounding = scale[0].view(exact.shape[2:]) * (1 / 126) * weight.square().sum(1).sqrt().view(-1, 1, 1)
    assert ((of_ours.mean(0) - exact[0]).abs() <= 5 * reference.std(0) * draws**-0.5).all()
    assert ((reference.mean(0) - exact[0]).abs() <= 3 * rounding + 5 * reference.std(0) * draws**-0.5).all()

    with torch.no_grad():
        columns = product(
            weight.T,
            errors.flatten(2).mul,
            Vectors(1),
            input_scale(errors.flatten(2), Vectors(1), io),
            io,
            generator,
            False,
        )
        reference = convolution.fold(columns, many)
        of_ours = noisy_transposed_convolution(weight, errors, many, convolution, io, generator)
    spread = reference.std(0)
    assert ((of_ours.std(0) / spread - 1).abs() <= 5 * draws**-0.5).all()
    assert ((of_ours.mean(0) - reference.mean(0)).abs() <= 5 * spread * (2 / draws) ** 0.5).all()


def test_a_convolution_that_exceeds_its_bound_is_left_to_the_patches():
    io, convolution = IOParameters(out_bound=2.0), Convolution((3, 3), (1, 1), (1, 1), (1, 1))
    weight, images = torch.full((2, 9), 0.5), torch.ones(1, 1, 4, 4)
    assert noisy_convolution(weight, images, convolution, io, TableGenerator()) is None
    assert not never_exceeds(weight, io)


@pytest.mark.parametrize(
    "io",
    [
        IOParameters(out_noise=0.02),
        IOParameters(inp_noise=0.01),
        IOParameters(w_noise=0.1, w_noise_type=WeightNoiseType.ADDITIVE_CONSTANT),
        IOParameters(inp_res=1 / 6),
        IOParameters(out_sto_round=True),
        IOParameters(nm_thres=1.0),
    ],
)
def test_what_does_not_act_as_noise(io):
    assert not acts_as_noise(torch.randn(4, 27), io)
