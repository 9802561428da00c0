"""How many pulses a batch of inputs and errors sends to every cross-point.

As in aihwkit, an input element x fires in every slot of a train of BL slots with probability B·|x|, an error element δ
with A·|δ|, and a cross-point gets a pulse where both do; its direction is the sign of −xδ.
"""

from math import ceil
from typing import NamedTuple

import torch
from aihwkit.simulator.parameters.training import UpdateParameters
from torch import Generator, Tensor

from aimc_pl.devices.mean_field.noise import gaussian, uniform
from aimc_pl.devices.mean_field.vectors import Patches, Vectors

EVEN = 0.2
"""Below this mean probability of a firing input a convolution takes it for the same at all its inputs."""

_DRAWN = 64
"""Trains of more slots are not drawn one by one; the number of pulses is Gaussian."""

_SLOTS = 2**24
"""Slots of pulse trains that are drawn at a time."""


class Counts(NamedTuple):
    """Pulses of a batch per cross-point, ``(out, in)``.

    Args:
        net: pulses up minus pulses down.
        total: pulses up plus pulses down.
        certain: the part of the counts that does not vary, net and total: a count's variance is its mean minus this.
    """

    net: Tensor
    total: Tensor
    certain: tuple[Tensor, Tensor]


def expected_counts(
    x: Tensor,
    error: Tensor,
    vectors: Vectors | Patches,
    learning_rate: float,
    granularity: float,
    update: UpdateParameters,
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
        generator: of the errors' pulses.
    """
    magnitude = error.abs()
    error_largest = magnitude.amax(vectors.dim, keepdim=True)
    trains = _trains(vectors.largest(x), error_largest, learning_rate / granularity, update)
    if not isinstance(trains.x_gain, Tensor):
        x = x.clamp(-1 / trains.x_gain, 1 / trains.x_gain)
    fired = _fired(magnitude.mul_(trains.error_gain), trains.lengths, generator)
    mean = fired * trains.x_gain
    has_signs = float(x.min()) < 0
    net, total = _signed_outer(mean, error, x, x.abs() if has_signs else x, vectors)
    # An input that fires with probability p in n slots meets np pulses, with variance np − np².
    if isinstance(vectors, Patches):
        of_vectors = fired.sum(vectors.dim, keepdim=True)
        gain = float((of_vectors * trains.x_gain).sum() / of_vectors.sum().clamp_min(1))
        probability = gain * _mean_firing(x)
        if probability < EVEN:
            return Counts(net, total, (net * probability, total * probability))
    squares = x.square()
    certain = _signed_outer(
        mean * trains.x_gain, error, squares.copysign(x) if has_signs else squares, squares, vectors
    )
    return Counts(net, total, certain)


def sampled_counts(
    x: Tensor, error: Tensor, learning_rate: float, granularity: float, update: UpdateParameters, generator: Generator
) -> Counts:
    """Counts of pulse trains drawn slot by slot.

    Args:
        x: inputs ``(batch, in)``.
        error: errors ``(batch, out)``.
        learning_rate: see :func:`expected_counts`.
        granularity: the device's mean step.
        update: the pulse trains' parameters.
        generator: of the slots.
    """
    trains = _trains(
        x.abs().amax(1, keepdim=True), error.abs().amax(1, keepdim=True), learning_rate / granularity, update
    )
    lengths = trains.lengths.expand(len(x), 1)
    # In portions, since trains of a convolution's patches would fill the memory.
    portion = max(1, _SLOTS // (int(lengths.max()) * max(x.shape[1], error.shape[1])))
    net, total = x.new_zeros(error.shape[1], x.shape[1]), x.new_zeros(error.shape[1], x.shape[1])
    values = x * trains.x_gain, error * trains.error_gain, lengths.flatten().long()
    portions = (value.split(portion) for value in values)
    for x_probability, error_probability, repeats in zip(*portions, strict=True):
        fires = _sample(x_probability, repeats, generator)
        error_fires = _sample(error_probability, repeats, generator)
        net -= error_fires.T @ fires
        total += error_fires.abs_().T @ fires.abs_()
    return Counts(net, total, (net, total))


class _Trains(NamedTuple):
    """Of every vector: the number of slots, and what its elements are multiplied by to give probabilities of firing."""

    lengths: Tensor
    x_gain: Tensor | float
    error_gain: Tensor | float


def _trains(x_largest: Tensor, error_largest: Tensor, rate: float, update: UpdateParameters) -> _Trains:
    """aihwkit's management: both sides fire alike, in trains as long as the strongest cross-point needs.

    Where they would be too long, the error is cut.
    """
    length = update.desired_bl
    if update.update_management or update.update_bl_management:
        strongest = (rate * x_largest * error_largest).clamp_min_(1e-30)
        lengths = torch.full_like(strongest, length)
        if update.update_bl_management:
            # What is no number must not stop the run here, as it does not in a digital layer.
            lengths = strongest.ceil().clamp_(1, length).nan_to_num_(1.0)
        x_gain = (strongest / lengths).sqrt_().clamp_(max=1).div_(x_largest.clamp_min(1e-30))
        return _Trains(lengths, x_gain, rate / (lengths * x_gain))
    if not update.fixed_bl and length < rate:
        length, rate = ceil(rate), ceil(rate)
    gain = (rate / length) ** 0.5
    return _Trains(x_largest.new_tensor(length), gain, gain)


def _fired(probabilities: Tensor, lengths: Tensor, generator: Generator) -> Tensor:
    """In how many of its vector's slots every element fires."""
    longest, device = int(lengths.max()), probabilities.device
    if longest > _DRAWN:
        probabilities = probabilities.clamp(max=1)
        mean = lengths * probabilities
        std = (mean * (1 - probabilities)).sqrt_()
        return torch.addcmul(mean, std, gaussian(mean.shape, generator, device)).clamp_(min=0).minimum(lengths)
    fired = (uniform(probabilities.shape, generator, device) < probabilities).float()
    for slot in range(1, longest):
        fired += (uniform(probabilities.shape, generator, device) < probabilities) & (slot < lengths)
    return fired


def _signed_outer(
    fired: Tensor, error: Tensor, x: Tensor, magnitude: Tensor, vectors: Vectors | Patches
) -> tuple[Tensor, Tensor]:
    """The sums of outer products against the errors' signs and without signs; in one product where inputs have none."""
    signed = fired.copysign(error)
    if magnitude is x:
        net, total = vectors.outer(torch.cat([signed, fired], vectors.dim), x).chunk(2)
    else:
        net, total = vectors.outer(signed, x), vectors.outer(fired, magnitude)
    return net.neg_(), total


def _sample(probabilities: Tensor, repeats: Tensor, generator: Generator) -> Tensor:
    """Signed slots ``(sum(repeats), features)``: the sign where one fires, 0 elsewhere."""
    slots = probabilities.repeat_interleave(repeats, 0)
    return slots.sign() * (uniform(slots.shape, generator, slots.device) < slots.abs())


def _mean_firing(values: Tensor) -> float:
    """The mean magnitude with which lines fire, Σv²/Σ|v|, as every eighth image has it."""
    some = values[::8].flatten()
    return float(some @ some) / max(float(some.abs().sum()), 1e-30)
