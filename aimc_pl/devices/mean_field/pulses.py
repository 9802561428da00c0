"""How many pulses a batch of inputs and errors sends to every cross-point.

As in aihwkit, an input element x fires in every slot of a train of BL slots with probability B·|x|, an error element δ
with A·|δ|, and a cross-point gets a pulse where both do; its direction is the sign of −xδ.
"""

from math import ceil, isfinite
from typing import NamedTuple

import torch
from aihwkit.simulator.parameters.training import UpdateParameters
from torch import Generator, Tensor

from aimc_pl.devices.mean_field.random_table import uniform
from aimc_pl.devices.mean_field.vectors import Patches, Vectors

_RARELY = 0.2
"""Below this mean probability of a firing input a convolution takes it for the same at all its inputs."""

_DRAWN = 64
"""Trains of more slots are not drawn one by one, but their number of pulses."""

_SLOTS = 2**24
"""Slots of pulse trains that are drawn at a time."""


class Counts(NamedTuple):
    """Pulses of a batch per cross-point, ``(out, in)``.

    Args:
        net: pulses up minus pulses down.
        total: pulses up plus pulses down.
        noise: the variance of what the pulses add, in units of a step squared: that of those up minus that of those
            down, and both together.
    """

    net: Tensor
    total: Tensor
    noise: tuple[Tensor, Tensor]


def expected_counts(
    x: Tensor,
    error: Tensor,
    vectors: Vectors | Patches,
    learning_rate: float,
    granularity: float,
    update: UpdateParameters,
    spread: float,
    generator: Generator,
) -> Counts:
    """The mean counts, given how often the error's lines fire.

    All cross-points on such a line share its pulses, a noise that adds up over inputs of one sign: it is drawn. What
    the inputs' lines add is left to the variance of the counts, as if cross-points were independent.

    Args:
        x: inputs, arranged as ``vectors`` says.
        error: errors of the same vectors.
        vectors: the arrangement.
        learning_rate: a batch moves weights by −learning_rate·δᵀx on average.
        granularity: the device's mean step.
        update: the pulse trains' parameters.
        spread: standard deviation of a step from cycle to cycle, in units of the step.
        generator: of the errors' pulses.
    """
    magnitude = _magnitude(x)
    error_largest = torch.maximum(error.amax(vectors.dim, keepdim=True), -error.amin(vectors.dim, keepdim=True))
    trains = _trains(vectors.largest(magnitude), error_largest, learning_rate / granularity, update)
    if not isinstance(trains.x_gain, Tensor):
        x = x.clamp(-1 / trains.x_gain, 1 / trains.x_gain)
        magnitude = _magnitude(x)
    fired = _fired(error, trains, generator).mul_(trains.x_gain)
    net, total = _outer(fired, x, magnitude, vectors)
    # An input that fires with probability p in n slots meets np pulses, with variance np − np².
    if isinstance(vectors, Patches):
        probability = _weighted_mean(trains.x_gain, fired) * _weighted_mean(magnitude, magnitude)
        if probability < _RARELY:
            factor = 1 + spread**2 - probability
            return Counts(net, total, (net * factor, total * factor))
    squares = -magnitude.square()
    signed_squares = squares if magnitude is x else x * -magnitude
    net_noise, total_noise = _outer(fired.mul_(trains.x_gain), signed_squares, squares, vectors)
    factor = 1 + spread**2
    return Counts(net, total, (net_noise.add_(net, alpha=factor), total_noise.add_(total, alpha=factor)))


def sampled_counts(
    x: Tensor,
    error: Tensor,
    learning_rate: float,
    granularity: float,
    update: UpdateParameters,
    spread: float,
    generator: Generator,
) -> Counts:
    """Counts of pulse trains drawn slot by slot.

    Args:
        x: inputs ``(batch, in)``.
        error: errors ``(batch, out)``.
        learning_rate: see :func:`expected_counts`.
        granularity: the device's mean step.
        update: the pulse trains' parameters.
        spread: see :func:`expected_counts`.
        generator: of the slots.
    """
    trains = _trains(
        x.abs().amax(1, keepdim=True), error.abs().amax(1, keepdim=True), learning_rate / granularity, update
    )
    lengths = torch.as_tensor(trains.lengths, device=x.device).expand(len(x), 1)
    # In portions, since trains of a convolution's patches would fill the memory.
    portion = max(1, _SLOTS // (trains.longest * max(x.shape[1], error.shape[1])))
    net, total = x.new_zeros(error.shape[1], x.shape[1]), x.new_zeros(error.shape[1], x.shape[1])
    values = x * trains.x_gain, error * trains.error_gain, lengths.flatten().long()
    portions = (value.split(portion) for value in values)
    for x_probability, error_probability, repeats in zip(*portions, strict=True):
        fires = _sample(x_probability, repeats, generator)
        error_fires = _sample(error_probability, repeats, generator)
        net += error_fires.T @ fires
        total += error_fires.abs_().T @ fires.abs_()
    return Counts(net, total, (net * spread**2, total * spread**2))


class _Trains(NamedTuple):
    """How every vector fires.

    Args:
        lengths: the number of slots.
        longest: the largest one.
        x_gain: what its inputs are multiplied by to give probabilities of firing.
        error_gain: the same of its errors, negative: weights go down where input and error have the same sign.
    """

    lengths: Tensor | float
    longest: int
    x_gain: Tensor | float
    error_gain: Tensor | float


def _trains(x_largest: Tensor, error_largest: Tensor, rate: float, update: UpdateParameters) -> _Trains:
    """aihwkit's management: both sides fire alike, in trains as long as the strongest cross-point needs.

    Where they would be too long, the error is cut.
    """
    length = update.desired_bl
    if not (update.update_management or update.update_bl_management):
        if not update.fixed_bl and length < rate:
            length, rate = ceil(rate), ceil(rate)
        gain = (rate / length) ** 0.5
        return _Trains(length, length, gain, -gain)
    strongest = (x_largest * error_largest).mul_(rate).clamp_min_(1e-30)
    most = float(strongest.max())
    lengths = float(length)
    # What is no number must not stop the run here, as it does not in a digital layer.
    if update.update_bl_management and isfinite(most):
        length = min(ceil(most), length)
        lengths = strongest.ceil().clamp_(max=length) if length > 1 else 1.0
    x_gain = (strongest / lengths).sqrt_()
    if most > length:
        x_gain.clamp_(max=1)
    x_gain.div_(x_largest.clamp_min(1e-30))
    return _Trains(lengths, length, x_gain, (x_gain * lengths).reciprocal_().mul_(-rate))


def _fired(error: Tensor, trains: _Trains, generator: Generator) -> Tensor:
    """In how many of its vector's slots every element fires, with the sign of the pulses."""
    probabilities = error.mul(trains.error_gain).clamp_(-1, 1)
    shape, device = error.shape, error.device
    if trains.longest > _DRAWN:
        lengths = torch.as_tensor(trains.lengths, dtype=error.dtype, device="cpu").expand(shape)
        count = torch.binomial(lengths, probabilities.abs().cpu(), generator).to(device)
        return count.copysign_(probabilities)
    # floor(p + u) with u even in [0, 1) is the sign of p with probability |p|, else 0.
    fired = (uniform(shape, generator, device) + probabilities).floor_()
    for slot in range(1, trains.longest):
        more = (uniform(shape, generator, device) + probabilities).floor_()
        fired += more if isinstance(trains.lengths, float) else more.mul_(trains.lengths > slot)
    return fired


def _magnitude(x: Tensor) -> Tensor:
    return x.abs() if float(x.min()) < 0 else x


def _outer(fired: Tensor, x: Tensor, magnitude: Tensor, vectors: Vectors | Patches) -> tuple[Tensor, Tensor]:
    """The sums of outer products with and without signs, in one product where inputs have none."""
    if x is magnitude:
        shape = list(fired.shape)
        shape[vectors.dim] *= 2
        both = fired.new_empty(shape)
        signed, unsigned = both.chunk(2, vectors.dim)
        torch.abs(signed.copy_(fired), out=unsigned)
        net, total = vectors.outer(both, x).chunk(2)
        return net, total
    return vectors.outer(fired, x), vectors.outer(fired.abs(), magnitude)


def _sample(probabilities: Tensor, repeats: Tensor, generator: Generator) -> Tensor:
    """Signed slots ``(sum(repeats), features)``: the sign where one fires, 0 elsewhere."""
    slots = probabilities.repeat_interleave(repeats, 0)
    return slots.sign() * (uniform(slots.shape, generator, slots.device) < slots.abs())


def _weighted_mean(values: Tensor | float, weights: Tensor) -> float:
    """The mean Σ|w|v/Σ|w|, as every eighth image has it."""
    if not isinstance(values, Tensor):
        return values
    some = weights[::8].abs()
    return float((some * values[::8]).sum() / some.sum().clamp_min(1e-30))
