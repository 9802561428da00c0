"""This module computes how many pulses a batch of inputs and errors sends to every cross-point.

As in aihwkit, a pulse train has BL slots. In every slot, an input element x fires with probability B·|x|, and an error
element δ with probability A·|δ|. A cross-point gets a pulse if both fire in the same slot (a coincidence). The pulse's
direction is the sign of −xδ.
"""

from math import ceil, isfinite
from typing import NamedTuple

import torch
from aihwkit.simulator.parameters.training import UpdateParameters
from torch import Tensor

from aimc_pl.devices.mean_field import kernels
from aimc_pl.devices.mean_field.random_table import LENGTH, TableGenerator, tables, uniform
from aimc_pl.devices.mean_field.vectors import Convolution, Patches, Vectors

_RARELY = 0.2
"""Below this mean firing probability of a convolution's inputs, the mean is used for every input.

The variances of single cross-points are then wrong by a few percent, because some of them meet stronger inputs."""

DRAWN = 64
"""The longest train whose slots are drawn one by one. For a longer train, only the number of pulses is drawn."""

_SLOTS, _IN_CACHE = 2**24, 2**15
"""How many slots of pulse trains are drawn at a time; and how many on a CPU, where they should stay in the cache."""


class Counts(NamedTuple):
    """The pulses that a batch sends to every cross-point, as tensors ``(out, in)``.

    Args:
        net: number of pulses up minus number of pulses down.
        total: number of pulses up plus number of pulses down.
        noise: two variances of the weight change, in units of a squared step: the variance due to pulses up minus that
            due to pulses down, and the sum of both.
        cut: the share of the pulses that do not fit into the trains.
    """

    net: Tensor
    total: Tensor
    noise: tuple[Tensor, Tensor]
    cut: Tensor | float = 0.0


def train_settings(rate: float, update: UpdateParameters) -> tuple[float, int, bool, bool]:
    """Return how pulse trains are chosen.

    Args:
        rate: the learning rate in units of the mean step.
        update: the parameters of the pulse trains.

    Returns:
        The rate that the trains carry out; their number of slots, at most or exactly; whether update management adapts
        the firing probabilities to the largest input and the largest error of every vector; and whether trains may be
        shorter.
    """
    length = update.desired_bl
    if update.update_management or update.update_bl_management:
        return rate, length, True, update.update_bl_management
    if not update.fixed_bl and length < rate:
        length = ceil(rate)
        return float(length), length, False, False
    return rate, length, False, False


def expected_counts(
    x: Tensor,
    error: Tensor,
    vectors: Vectors | Patches,
    learning_rate: float,
    granularity: float,
    update: UpdateParameters,
    spread: float,
    generator: TableGenerator,
) -> Counts:
    """Return the expected counts, given how often the lines of the errors fire.

    The firing of the error lines is drawn: all cross-points on such a line share its pulses, and this noise adds up
    over inputs of one sign. The firing of the input lines is not drawn. It enters the variance of the counts, as if
    cross-points were independent.

    Args:
        x: inputs, arranged as ``vectors`` says.
        error: errors of the same vectors.
        vectors: how the vectors are arranged in the tensors.
        learning_rate: a batch moves weights by −learning_rate·δᵀx on average.
        granularity: the device's mean step.
        update: the parameters of the pulse trains.
        spread: standard deviation of a step from cycle to cycle, in units of the step.
        generator: draws the pulses of the error lines.
    """
    magnitude, rate = _magnitude(x), learning_rate / granularity
    largest = vectors.largest(magnitude)
    fits = error.is_cpu and error[0].numel() <= LENGTH and update.desired_bl <= DRAWN
    if fits and isinstance(vectors, Convolution):
        return _counts_of_events(x, largest, error, vectors, rate, update, spread, generator)
    trains = _trains(largest, error, vectors.dim, rate, update)
    if not isinstance(trains.x_gain, Tensor):
        x = x.clamp(-1 / trains.x_gain, 1 / trains.x_gain)
        magnitude = _magnitude(x)
    fired = _fired(error, trains, vectors.dim, generator)
    net, total = _outer(fired, x, magnitude, vectors)
    # If an error line fires n times, an input that fires with probability p meets np of its pulses on average, with
    # variance np − np².
    if isinstance(vectors, Patches):
        # The mean of p over all pulses, Σnp²/Σnp, makes the sum of the variances over all cross-points exact.
        _, unsigned = fired.chunk(2, 1)
        squares = vectors.weighted_squares(unsigned.sum(1, keepdim=True).mul_(trains.x_gain), x)
        probability = float(squares / total.sum().clamp_min(1e-30))
        if probability < _RARELY:
            factor = 1 + spread**2 - probability
            return Counts(net, total, (net * factor, total * factor), trains.cut)
    squares = -magnitude.square()
    signed_squares = squares if magnitude is x else x * -magnitude
    net_noise, total_noise = _outer(fired.mul_(trains.x_gain), signed_squares, squares, vectors)
    factor = 1 + spread**2
    noise = net_noise.add_(net, alpha=factor), total_noise.add_(total, alpha=factor)
    return Counts(net, total, noise, trains.cut)


def _counts_of_events(
    images: Tensor,
    largest: Tensor,
    error: Tensor,
    convolution: Convolution,
    rate: float,
    update: UpdateParameters,
    spread: float,
    generator: TableGenerator,
) -> Counts:
    """Do what :func:`expected_counts` does, for the errors of a convolution on the CPU, one by one."""
    trains = rate, length, is_managed, _ = train_settings(rate, update)
    if not is_managed:
        limit = (length / rate) ** 0.5
        images = images.clamp(-limit, limit)
    random, found, longest = (*tables(), generator.offsets), [], 0.0
    # The random numbers of a portion come from one slice of the table.
    tensors = images, largest.flatten(1), error.flatten(2)
    for some_images, *others in zip(*(t.split(LENGTH // error[0].numel()) for t in tensors), strict=True):
        memory, layout = convolution.in_memory(some_images)
        counts, needed = kernels.count_patches(memory, layout, *map(kernels.array, others), trains, spread, random)
        found, longest = [*found, torch.from_numpy(counts)], max(longest, needed)
    net, total, net_noise, total_noise = found[0] if len(found) == 1 else torch.stack(found).sum(0)
    cut = _cut(largest, error, rate, length) if is_managed and longest > length else 0.0
    return Counts(net, total, (net_noise, total_noise), cut)


def sampled_counts(
    x: Tensor,
    error: Tensor,
    learning_rate: float,
    granularity: float,
    update: UpdateParameters,
    spread: float,
    generator: TableGenerator,
) -> Counts:
    """Return the counts of pulse trains that are drawn slot by slot.

    Args:
        x: inputs ``(batch, in)``.
        error: errors ``(batch, out)``.
        learning_rate: see :func:`expected_counts`.
        granularity: the device's mean step.
        update: the parameters of the pulse trains.
        spread: see :func:`expected_counts`.
        generator: draws the slots.
    """
    trains = _trains(x.abs().amax(1, keepdim=True), error, 1, learning_rate / granularity, update)
    lengths = torch.as_tensor(trains.lengths, device=x.device).expand(len(x), 1)
    # The batch is split, because the trains of all patches of a convolution would fill the memory.
    portion = max(1, _SLOTS // (trains.longest * max(x.shape[1], error.shape[1])))
    net, total = x.new_zeros(error.shape[1], x.shape[1]), x.new_zeros(error.shape[1], x.shape[1])
    values = x * trains.x_gain, error * trains.error_gain, lengths.flatten().long()
    portions = (value.split(portion) for value in values)
    for x_probability, error_probability, repeats in zip(*portions, strict=True):
        fires = _sample(x_probability, repeats, generator)
        error_fires = _sample(error_probability, repeats, generator)
        net += error_fires.T @ fires
        total += error_fires.abs_().T @ fires.abs_()
    return Counts(net, total, (net * spread**2, total * spread**2), trains.cut)


def whole_counts(counts: Counts, generator: TableGenerator) -> tuple[Tensor, Tensor]:
    """Draw whole numbers of pulses up and down with the mean and variance of expected counts, from binomials.

    Given how often an error line fires, these are the exact distributions for a single vector.

    Args:
        counts: the result of :func:`expected_counts` without ``spread``.
        generator: draws the numbers.
    """
    net, total, (net_variance, total_variance), _ = counts
    ups, downs = (
        _of_mean_and_variance((total + sign * net) / 2, (total_variance + sign * net_variance) / 2, generator)
        for sign in (1, -1)
    )
    return ups, downs


def _of_mean_and_variance(mean: Tensor, variance: Tensor, generator: TableGenerator) -> Tensor:
    # Where the variance is that of a Poisson distribution, a binomial with many trials stands for it.
    probability = (1 - variance / mean).clamp_(1e-3, 1)
    trials = (mean / probability).round_().maximum(mean.ceil())
    probability = torch.where(mean > 0, mean / trials, 0.0)
    drawn = torch.binomial(torch.where(mean > 0, trials, 0.0).cpu(), probability.cpu(), generator)
    return drawn.to(mean.device)


class _Trains(NamedTuple):
    """The pulse trains of every vector.

    Args:
        lengths: the number of slots of every vector.
        longest: the largest of ``lengths``.
        x_gain: the factor that turns inputs into firing probabilities.
        error_gain: the factor that turns errors into firing probabilities. It is negative, because weights go down
            where input and error have the same sign.
        cut: see :class:`Counts`. It is 0 without update management.
    """

    lengths: Tensor | float
    longest: int
    x_gain: Tensor | float
    error_gain: Tensor | float
    cut: Tensor | float = 0.0


def _trains(x_largest: Tensor, error: Tensor, dim: int, rate: float, update: UpdateParameters) -> _Trains:
    """Return the pulse trains that aihwkit's update management chooses.

    The largest input and the largest error of a vector fire with equal probability, in a train that is as long as the
    strongest cross-point needs. If the train would be too long, the error is cut.
    """
    rate, length, is_managed, is_adaptive = train_settings(rate, update)
    if not is_managed:
        gain = (rate / length) ** 0.5
        return _Trains(length, length, gain, -gain)
    error_largest = torch.maximum(error.amax(dim, keepdim=True), -error.amin(dim, keepdim=True))
    strongest = (x_largest * error_largest).mul_(rate).clamp_min_(1e-30)
    most = float(strongest.max())
    lengths = float(length)
    # A NaN or an infinity must not stop the run here, because it does not stop a digital layer either.
    if is_adaptive and isfinite(most):
        length = min(ceil(most), length)
        lengths = strongest.ceil().clamp_(max=length) if length > 1 else 1.0
    x_gain = (strongest / lengths).sqrt_()
    cut = 0.0
    if most > length:
        x_gain.clamp_(max=1)
        cut = _cut(x_largest, error, rate, length)
    x_gain.div_(x_largest.clamp_min(1e-30))
    return _Trains(lengths, length, x_gain, (x_gain * lengths).reciprocal_().mul_(-rate), cut)


def _cut(x_largest: Tensor, error: Tensor, rate: float, length: int) -> Tensor:
    """Return the share of the pulses that do not fit into trains of so many slots."""
    # The pulses of every error where they meet the strongest input of its vector. Other inputs scale with it.
    pulses = (x_largest * rate) * error.abs()
    return (pulses - length).clamp_(min=0).sum() / pulses.sum()


def _fired(error: Tensor, trains: _Trains, dim: int, generator: TableGenerator) -> Tensor:
    """Return how often every error element fires, times the gain of its vector's inputs.

    The numbers have the sign of the pulses. Along the dimension of the vectors, their magnitudes follow them.
    """
    shape = list(error.shape)
    shape[dim] *= 2
    fired = error.new_empty(shape)
    signed, unsigned = fired.chunk(2, dim)
    torch.mul(_drawn(error, trains, generator), trains.x_gain, out=signed)
    torch.abs(signed, out=unsigned)
    return fired


def _drawn(error: Tensor, trains: _Trains, generator: TableGenerator) -> Tensor:
    """Return in how many slots of its vector's train every error element fires, with the sign of its pulses."""
    probabilities = error.mul(trains.error_gain).clamp_(-1, 1)
    shape, device = error.shape, error.device
    if trains.longest > DRAWN:
        return _binomial(probabilities, trains.lengths, generator)
    # With u uniform in [0, 1), floor(p + u) is the sign of p with probability |p|, and 0 otherwise.
    fired, slots = torch.zeros_like(error), torch.arange(trains.longest, device=device)
    # A GPU takes long to start an operation. A CPU takes long to read what is not in its cache.
    for some in slots.split(max(1, (_IN_CACHE if error.is_cpu else _SLOTS) // error.numel())):
        drawn = [uniform(shape, generator, device) for _ in range(len(some))]
        fires = (torch.stack(drawn) if len(drawn) > 1 else drawn[0]).add(probabilities).floor_()
        if isinstance(trains.lengths, Tensor):
            fires *= some.view(-1, *[1] * len(shape)) < trains.lengths if len(drawn) > 1 else trains.lengths > some
        fired += fires.sum(0) if len(drawn) > 1 else fires
    return fired


def _binomial(probabilities: Tensor, lengths: Tensor | float, generator: TableGenerator) -> Tensor:
    """Return in how many of so many slots an element fires, with its sign."""
    lengths = torch.as_tensor(lengths, dtype=probabilities.dtype, device="cpu").expand(probabilities.shape)
    count = torch.binomial(lengths, probabilities.abs().cpu(), generator).to(probabilities.device)
    return count.copysign_(probabilities)


def _magnitude(x: Tensor) -> Tensor:
    return x.abs() if float(x.min()) < 0 else x


def _outer(fired: Tensor, x: Tensor, magnitude: Tensor, vectors: Vectors | Patches) -> tuple[Tensor, Tensor]:
    """Return the sums of outer products with and without signs, by a single product if no input is negative."""
    if x is magnitude:
        net, total = vectors.outer(fired, x).chunk(2)
        return net, total
    signed, unsigned = fired.chunk(2, vectors.dim)
    return vectors.outer(signed, x), vectors.outer(unsigned, magnitude)


def _sample(probabilities: Tensor, repeats: Tensor, generator: TableGenerator) -> Tensor:
    """Return signed slots ``(sum(repeats), features)``: the sign where an element fires, 0 elsewhere."""
    slots = probabilities.repeat_interleave(repeats, 0)
    return slots.sign() * (uniform(slots.shape, generator, slots.device) < slots.abs())
