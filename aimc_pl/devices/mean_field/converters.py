"""This module computes a crossbar's products with its converters.

Every vector is scaled, rounded, multiplied by the weights, disturbed by noise, and rounded again. The model and its
parameters are those of aihwkit's ``IOParameters``, applied vector by vector as in aihwkit's C++ tiles.
"""

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from aihwkit.simulator.parameters.enums import AnalogMVType, BoundManagementType, NoiseManagementType, WeightNoiseType
from aihwkit.simulator.parameters.io import IOParameters
from torch import Tensor

from aimc_pl.devices.mean_field import kernels
from aimc_pl.devices.mean_field.random_table import LENGTH, TableGenerator, gaussian, tables, uniform
from aimc_pl.devices.mean_field.vectors import Convolution, Patches, Vectors


def is_perfect(io: IOParameters) -> bool:
    """Return whether products are exact."""
    return io.is_perfect or io.mv_type == AnalogMVType.IDEAL


def input_scale(x: Tensor, vectors: Vectors | Patches, io: IOParameters) -> Tensor | float:
    """Return the divisor of every vector before the converter (noise management), with the vectors' dimension kept."""
    least, largest = _scale_limits(io)
    if least == largest:
        return least
    scale = vectors.largest(x.abs())
    return scale if largest == inf else scale.clamp_(max=largest)


def _scale_limits(io: IOParameters) -> tuple[float, float]:
    """Return between which limits the largest element of a vector becomes its scale."""
    threshold = io.nm_thres if io.nm_thres > 0 else None
    match io.noise_management:
        case NoiseManagementType.NONE:
            return 1.0, 1.0
        case NoiseManagementType.CONSTANT:
            return threshold or 1.0, threshold or 1.0
        case _:
            return 0.0, threshold or inf


def product(
    weight: Tensor,
    scaled: Callable[[Tensor | float], Tensor],
    vectors: Vectors,
    scale: Tensor | float,
    io: IOParameters,
    generator: TableGenerator,
    bound_management: bool,
    reduction: float = 1.0,
) -> Tensor:
    """Return the product of a crossbar with every vector.

    Args:
        weight: ``(out, in)``.
        scaled: a function that takes gains and returns a new tensor of the vectors, each times its gain. The ``in``
            features lie along the dimension of ``vectors``.
        vectors: how the vectors are arranged in the tensor.
        scale: the divisor of every vector, see :func:`input_scale`.
        io: the parameters of the converters.
        generator: draws the noise.
        bound_management: whether a product that exceeds the output's bound is repeated with half the input, as often as
            ``io`` allows.
        reduction: by how much the input has been divided so far.
    """
    step, unit = _step(io.inp_res, io.inp_bound), _step(io.out_res, io.out_bound)
    codes = _to_codes(scaled, scale * reduction, step, io, generator)
    y = vectors.multiply(weight, codes).mul_((step or 1.0) / (unit or 1.0))
    noise = _noise_std(weight, codes, step or 1.0, vectors, io)
    if isinstance(noise, Tensor):
        y.addcmul_(gaussian(y.shape, generator, y.device), noise, value=1 / (unit or 1.0))
    elif noise > 0:
        y.add_(gaussian(y.shape, generator, y.device), alpha=noise / (unit or 1.0))
    if unit:
        y = _round(y, io.out_sto_round, generator)
    bound = _bound(io.out_bound) / (unit or 1.0)
    overflow = None
    if bound_management and _may_repeat(reduction, step, io):
        low = -bound if io.bm_test_negative_bound else -inf
        overflow = _outside(y, low, bound, vectors.dim)
    if bound < inf:
        y.clamp_(-bound, bound)
    y *= scale * ((unit or 1.0) * io.out_scale * reduction)
    if overflow is not None:
        rows = scaled(1.0).movedim(vectors.dim, -1)[overflow]
        scales = scale.movedim(vectors.dim, -1)[overflow] if isinstance(scale, Tensor) else scale
        y.movedim(vectors.dim, -1)[overflow] = product(
            weight, rows.mul, Vectors(-1), scales, io, generator, bound_management, 2 * reduction
        )
    return y


def has_row_product(weight: Tensor, x: Tensor, io: IOParameters) -> bool:
    """Return whether :func:`row_product` can compute the product: on a CPU, with :func:`is_simple` converters."""
    return x.is_cpu and is_simple(io) and x.numel() * weight.shape[0] <= LENGTH * weight.shape[1]


def is_simple(io: IOParameters) -> bool:
    """Return whether converters round to the nearest number, and the outputs alone are noisy."""
    return is_perfect(io) or (
        io.w_noise_type == WeightNoiseType.NONE and io.inp_noise == 0 and not (io.inp_sto_round or io.out_sto_round)
    )


def kernel_arguments(io: IOParameters) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the arguments of :func:`kernels.to_codes` and :func:`kernels.from_sums` for :func:`is_simple` converters.

    Perfect products are those of converters that change nothing.
    """
    if is_perfect(io):
        return (0.0, 1.0, 1.0, inf), (1.0, 0.0, False, -inf, inf, io.out_scale)
    step, unit = _step(io.inp_res, io.inp_bound), _step(io.out_res, io.out_bound)
    limit = inf if _fits(io) else _bound(io.inp_bound) / (step or 1.0)
    bound = _bound(io.out_bound) / (unit or 1.0)
    gain, scale = 1 / (unit or 1.0), unit or 1.0
    low = -bound if io.bm_test_negative_bound else -inf
    return (
        (step, *_scale_limits(io), limit),
        ((step or 1.0) * gain, io.out_noise * gain, unit > 0, low, bound, scale * io.out_scale),
    )


def row_product(
    weight: Tensor, x: Tensor, io: IOParameters, generator: TableGenerator, bound_management: bool
) -> Tensor:
    """Return the same as :func:`product` for inputs ``(..., in)`` with :func:`has_row_product`.

    Args:
        weight: ``(out, in)``.
        x: the inputs.
        io: the parameters of the converters.
        generator: draws the noise.
        bound_management: see :func:`product`.
    """
    to_line, from_line = kernel_arguments(io)
    rows = x.reshape(-1, x.shape[-1])
    codes, scales = kernels.to_codes(kernels.array(rows), *to_line)
    y = torch.from_numpy(codes) @ weight.T
    exceeds = kernels.from_sums(y.numpy(), scales, *from_line, tables()[1], generator.offsets)
    if bound_management and exceeds.any() and _may_repeat(1.0, to_line[0], io):
        which = torch.from_numpy(exceeds)
        scale = torch.from_numpy(scales)[which, None]
        y[which] = product(weight, rows[which].mul, Vectors(-1), scale, io, generator, bound_management, 2.0)
    return y.view(*x.shape[:-1], weight.shape[0])


def read_column(
    weight: Tensor, column: int, reads: tuple[tuple[Any, ...], tuple[Any, ...]], generator: TableGenerator
) -> Tensor:
    """Return a column ``(out,)`` of a crossbar on the CPU, as its converters show it for an input of 1.

    Args:
        weight: ``(out, in)``.
        column: the number of the column.
        reads: the converters, see :func:`kernel_arguments`.
        generator: draws the noise.
    """
    return torch.from_numpy(kernels.read_column(weight.numpy(), column, reads, (*tables(), generator.offsets)))


def has_bound_management(io: IOParameters) -> bool:
    """Return whether products that exceed the output's bound are repeated. aihwkit repeats forward products only."""
    return io.bound_management == BoundManagementType.ITERATIVE


def acts_as_noise(weight: Tensor, io: IOParameters) -> bool:
    """Return whether the converters of a crossbar act, in effect, as independent noise on the product.

    Rounding after Gaussian noise adds an independent uniform error once σ is at least half a step: the remaining
    dependence falls as exp(−2π²σ²/step²) (Widrow, Kollár and Liu, IEEE Trans. Instrum. Meas. 45, 1996). Rounding of the
    inputs counts as noise if it makes up a few percent of the noise's variance at most.

    Args:
        weight: ``(out, in)``.
        io: the parameters of the converters.
    """
    step, unit = _step(io.inp_res, io.inp_bound), _step(io.out_res, io.out_bound)
    return (
        io.w_noise_type == WeightNoiseType.NONE
        and not (io.inp_sto_round or io.out_sto_round)
        and io.inp_noise == 0
        and _fits(io)
        and 0.5 * unit <= io.out_noise
        and float(weight.square().sum(1).max()) * step**2 / 12 <= 0.05 * io.out_noise**2
    )


def noisy_convolution(
    weight: Tensor, images: Tensor, convolution: Convolution, io: IOParameters, generator: TableGenerator
) -> Tensor | None:
    """Return the convolution on a crossbar with :func:`acts_as_noise`, or ``None`` if an output exceeds its bound.

    Args:
        weight: ``(out, features)``.
        images: ``(batch, channels, *size)``.
        convolution: the convolution of the layer.
        io: the parameters of the converters.
        generator: draws the noise.
    """
    step = _step(io.inp_res, io.inp_bound)
    scale = convolution.largest(images.abs())
    y = convolution.multiply(weight, images)
    rounding = float(weight.square().sum()) / len(weight) * step**2 / 12
    y.addcmul_(gaussian(y.shape, generator, y.device), scale * (_output_variance(io) + rounding) ** 0.5)
    if bool((y.abs().amax(1, keepdim=True) > scale * _bound(io.out_bound)).any()):
        return None
    return y if io.out_scale == 1 else y.mul_(io.out_scale)


def noisy_transposed_convolution(
    weight: Tensor, error: Tensor, images: Tensor, convolution: Convolution, io: IOParameters, generator: TableGenerator
) -> Tensor:
    """Return the transposed convolution on a crossbar with :func:`acts_as_noise` and :func:`never_exceeds`.

    A pixel's error is a sum over the patches that contain the pixel. The variances of the patches' noise add up too.

    Args:
        weight: ``(out, features)``.
        error: ``(batch, out, *out_size)``.
        images: the layer's input ``(batch, channels, *size)``.
        convolution: the convolution of the layer.
        io: the parameters of the converters.
        generator: draws the noise.
    """
    step = _step(io.inp_res, io.inp_bound)
    scale = Vectors(1).largest(error.abs())
    codes = _to_codes(error.mul, scale, step, io, generator)
    gain = scale * io.out_scale
    y = convolution.multiply_transposed(weight, codes.mul_(gain * (step or 1.0)), images)
    std = convolution.spread(gain**2 * _output_variance(io), images).sqrt_()
    return y.addcmul_(std, gaussian(y.shape, generator, y.device))


def never_exceeds(weight: Tensor, io: IOParameters) -> bool:
    """Return whether no input within its bound can make an output exceed the output's bound, with 6σ of noise.

    Args:
        weight: ``(out, in)``.
        io: the parameters of the converters.
    """
    bound = _bound(io.out_bound)
    return bound == inf or float(weight.abs().sum(1).max()) * _bound(io.inp_bound) + 6 * io.out_noise < bound


def _output_variance(io: IOParameters) -> float:
    return io.out_noise**2 + _step(io.out_res, io.out_bound) ** 2 / 12


def _step(resolution: float, bound: float) -> float:
    """Return the step of a converter, or 0 without rounding. A resolution above 1 is a number of steps.

    A step is a share of the range. So, as in aihwkit, converters without a bound (at most 0) do not round.
    """
    if resolution <= 0 or not 0 < bound < inf:
        return 0.0
    return (1 / resolution if resolution > 1 else resolution) * 2 * bound


def _may_repeat(reduction: float, step: float, io: IOParameters) -> bool:
    """Return whether bound management may divide the inputs further."""
    return reduction <= min(io.max_bm_factor, io.max_bm_res / step if step else inf)


def _bound(bound: float) -> float:
    return bound if bound > 0 else inf


def _to_codes(
    scaled: Callable[[Tensor | float], Tensor],
    scale: Tensor | float,
    step: float,
    io: IOParameters,
    generator: TableGenerator,
) -> Tensor:
    """Return the inputs that the crossbar receives, in units of the converter's step. Zero vectors stay zero."""
    gain = scale.reciprocal().nan_to_num_(posinf=0.0) if isinstance(scale, Tensor) else 1 / scale
    codes = scaled(gain)
    if step:
        codes = _round(codes.div_(step), io.inp_sto_round, generator)
    limit = _bound(io.inp_bound) / (step or 1.0)
    if limit < inf and not _fits(io):
        codes.clamp_(-limit, limit)
    if io.inp_noise > 0:
        codes.add_(gaussian(codes.shape, generator, codes.device), alpha=io.inp_noise / (step or 1.0))
    return codes


def _fits(io: IOParameters) -> bool:
    """Return whether scaling alone brings the inputs into their bound."""
    return io.noise_management == NoiseManagementType.ABS_MAX and io.nm_thres <= 0 and io.inp_bound >= 1


def _round(values: Tensor, stochastic: bool, generator: TableGenerator) -> Tensor:
    if stochastic:
        values += uniform(values.shape, generator, values.device) - 0.5
    return values.round_()


def _noise_std(weight: Tensor, codes: Tensor, step: float, vectors: Vectors, io: IOParameters) -> Tensor | float:
    match io.w_noise_type:
        case WeightNoiseType.ADDITIVE_CONSTANT:
            power = torch.linalg.vector_norm(codes, dim=vectors.dim, keepdim=True).square_()
        case WeightNoiseType.PCM_READ:
            power = vectors.multiply(weight.abs(), codes**2)
        case _:
            return io.out_noise
    return power.mul_((io.w_noise * step) ** 2).add_(io.out_noise**2).sqrt_()


def _outside(y: Tensor, low: float, high: float, dim: int) -> Tensor | None:
    """Return which vectors have an element outside the bounds, or ``None`` if no vector has one."""
    smallest, largest = torch.aminmax(y)
    if not (float(smallest) < low or float(largest) > high):
        return None
    return ((y < low) | (y > high)).any(dim)
