"""How many pulses a batch of inputs and errors sends to every cross-point.

As in aihwkit, an input element x fires in every slot of a train of BL slots with probability B·|x|, an error element δ
with A·|δ|, and a cross-point gets a pulse where both do; its direction is the sign of −xδ.
"""

from math import ceil
from typing import NamedTuple

import torch
from aihwkit.simulator.parameters.training import UpdateParameters
from torch import Generator, Tensor

from aimc_pl.devices.mean_field.noise import uniform
from aimc_pl.devices.mean_field.vectors import Patches, Vectors

RARE = 0.02
"""Below this mean probability of a coincidence per slot counts are taken for Poisson, their variance off by as much."""


_SLOTS = 2**24
"""Slots of pulse trains that are drawn at a time."""


class Counts(NamedTuple):
    """Pulses of a batch per cross-point, ``(out, in)``.

    Args:
        net: pulses up minus pulses down.
        total: pulses up plus pulses down.
        certain: the part of the counts that does not vary, net and total: a count's variance is its mean minus this.
            ``None`` for Poisson counts.
    """

    net: Tensor
    total: Tensor
    certain: tuple[Tensor, Tensor] | None


def expected_counts(
    x: Tensor,
    error: Tensor,
    vectors: Vectors | Patches,
    learning_rate: float,
    granularity: float,
    update: UpdateParameters,
) -> Counts:
    """The mean counts.

    Args:
        x: inputs, arranged as ``vectors`` says.
        error: errors of the same vectors.
        vectors: the arrangement.
        learning_rate: a batch moves weights by −learning_rate·δᵀx.
        granularity: the device's mean step.
        update: the pulse trains' parameters.
    """
    rate = learning_rate / granularity
    managed = update.update_management or update.update_bl_management
    length = update.desired_bl
    if not managed and not update.fixed_bl and length < rate:
        length = ceil(rate)
        rate = length
    low, x_max = (float(extreme) for extreme in torch.aminmax(x))
    magnitude, x_max = (x, x_max) if low >= 0 else (x.abs(), max(-low, x_max))
    # Errors and their magnitudes side by side, so that one product gives both counts where inputs have no sign.
    both = torch.cat([error, error], vectors.dim)
    error, error_magnitude = both.chunk(2, vectors.dim)
    strongest = rate * x_max * float(error_magnitude.abs_().max())
    if managed and strongest > length:
        # A vector whose strongest element would need more slots than there are is cut, on the error's side.
        limit = length / rate / vectors.largest(x)
        both.copy_(both.clamp(-limit, limit))
    elif not managed:
        limit = (length / rate) ** 0.5
        x, magnitude = x.clamp(-limit, limit), magnitude.clamp(max=limit)
        both.clamp_(-limit, limit)
    if low >= 0:
        net, total = vectors.outer(both, magnitude).mul_(rate).chunk(2)
    else:
        net, total = vectors.outer(error, x).mul_(rate), vectors.outer(error_magnitude, magnitude).mul_(rate)
    net.neg_()
    shortest = 1 if update.update_bl_management else length
    probability = strongest / shortest
    if isinstance(vectors, Patches) and probability > RARE:
        probability = rate / shortest * _mean_firing(magnitude) * _mean_firing(error_magnitude)
    if probability <= RARE:
        return Counts(net, total, None)
    lengths: Tensor | float = length
    if update.update_bl_management:
        lengths = vectors.largest(x) * error_magnitude.amax(vectors.dim, keepdim=True).mul_(rate)
        lengths = lengths.ceil_().clamp_(1, length)
    # Binomial counts of mean μ in BL slots have variance μ − μ²/BL.
    squares = error_magnitude.square().div_(lengths).mul_(rate)
    signed = squares.copysign(error)
    if low >= 0:
        certain = vectors.outer(torch.cat([signed, squares], vectors.dim), magnitude.square()).mul_(rate).chunk(2)
    else:
        certain = vectors.outer(signed, x * magnitude).mul_(rate), vectors.outer(squares, magnitude.square()).mul_(rate)
    certain[0].neg_()
    return Counts(net, total, (certain[0], certain[1]))


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
    rate = learning_rate / granularity
    length = update.desired_bl
    x_largest, error_largest = x.abs().amax(1, keepdim=True), error.abs().amax(1, keepdim=True)
    if update.update_management or update.update_bl_management:
        strongest = (rate * x_largest * error_largest).clamp_min_(1e-30)
        lengths = (
            strongest.ceil().clamp_(1, length) if update.update_bl_management else torch.full_like(strongest, length)
        )
        x_gain = (strongest / lengths).sqrt_().clamp_(max=1) / x_largest.clamp_min(1e-30)
        error_gain = rate / lengths / x_gain
    else:
        if not update.fixed_bl and length < rate:
            length, rate = ceil(rate), ceil(rate)
        lengths = torch.full_like(x_largest, length)
        x_gain = error_gain = (rate / lengths).sqrt_()
    # In portions, since trains of a convolution's patches would fill the memory.
    portion = max(1, _SLOTS // (int(lengths.max()) * max(x.shape[1], error.shape[1])))
    net, total = x.new_zeros(error.shape[1], x.shape[1]), x.new_zeros(error.shape[1], x.shape[1])
    portions = (values.split(portion) for values in (x * x_gain, error * error_gain, lengths.flatten().long()))
    for x_probability, error_probability, repeats in zip(*portions, strict=True):
        fires = _sample(x_probability, repeats, generator)
        error_fires = _sample(error_probability, repeats, generator)
        net -= error_fires.T @ fires
        total += error_fires.abs_().T @ fires.abs_()
    return Counts(net, total, (net, total))


def _sample(probabilities: Tensor, repeats: Tensor, generator: Generator) -> Tensor:
    """Signed slots ``(sum(repeats), features)``: the sign where one fires, 0 elsewhere."""
    slots = probabilities.repeat_interleave(repeats, 0)
    return slots.sign() * (uniform(slots.shape, generator, slots.device) < slots.abs())


def _mean_firing(magnitude: Tensor) -> float:
    """The mean magnitude with which lines fire, Σv²/Σ|v|, as every eighth image has it."""
    some = magnitude[::8].flatten()
    return float(some @ some) / max(float(some.sum()), 1e-30)
