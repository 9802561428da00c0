"""This module holds the loops of the mean-field tile on a CPU, compiled by numba.

Small layers need them: torch would call fifty operations for an update, each of which takes longer to start than to
run. The formulas are those of :mod:`~aimc_pl.devices.mean_field.pulses`, :mod:`~aimc_pl.devices.mean_field.response`
and :mod:`~aimc_pl.devices.mean_field.converters`, which other devices use. All arrays are of 32-bit floats. NaN goes
through to the results.
"""

from collections.abc import Callable
from math import ceil, isfinite, sqrt
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload
from torch import Tensor, float32

LENGTH = 2**22
"""The longest slice of a table of random numbers. A table has twice as many."""

_f32: Any = np.float32

_compiled: Any = njit(
    cache=True,
    error_model="numpy",
    # Sums may be reordered, so that they use vector instructions. Nothing may assume that there is no NaN.
    fastmath={"reassoc", "contract", "nsz", "arcp"},
)


def array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as an array of 32-bit floats. It shares the memory of a contiguous tensor of this type."""
    tensor = tensor.detach()
    if tensor.dtype != float32 or not tensor.is_contiguous():
        tensor = tensor.float().contiguous()
    return tensor.numpy()


@_compiled
def start(offsets: np.ndarray) -> int:
    """Return where a slice of a table of random numbers begins, by splitmix64 (Steele, Lea and Flood, OOPSLA 2014).

    Args:
        offsets: the state of the generator of these numbers, one integer of 64 bits, which changes.
    """
    offsets[0] += np.uint64(0x9E3779B97F4A7C15)
    bits = offsets[0]
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((bits ^ (bits >> np.uint64(31))) % np.uint64(LENGTH))


@_compiled
def pulse(
    weight: np.ndarray,
    x: np.ndarray,
    error: np.ndarray,
    signs: np.ndarray,
    furthest: float,
    trains: tuple[float, int, bool, bool],
    response: tuple[Any, ...],
    spread: float,
    write_noise: tuple[np.ndarray, float],
    random: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> tuple[float, float]:
    """Send pulses to all cross-points, unless a cross-point would receive too many.

    Args:
        weight: the weights without write noise ``(out, in)``, which change.
        x: inputs ``(batch, in)``.
        error: errors ``(batch, out)``.
        signs: direction of the pulses ``(1, in)`` or ``(out, in)``, or an empty array if all are positive.
        furthest: the most pulses a cross-point may receive.
        trains: see :func:`~aimc_pl.devices.mean_field.pulses.train_settings`.
        response: the parameters of :func:`_move`.
        spread: standard deviation of a step from cycle to cycle, in units of the step.
        write_noise: the weights with write noise ``(out, in)``, which change, and the noise's standard deviation.
            Without write noise, the array is empty.
        random: a table of random numbers between 0 and 1, a table of Gaussian random numbers, and the ``offsets`` of
            :func:`start`.

    Returns:
        How many pulses the cross-point that receives most receives at most, or 0 if this is not finite; and the share
        of the pulses that do not fit into the trains.
    """
    (batch, inputs), outputs = x.shape, len(weight)
    uniforms, _, offsets = random
    lengths, x_gain, limits, probabilities, cut = _trains(x, error, trains)
    fired, gains = np.zeros((batch + 1, outputs), _f32), np.zeros(batch + 1, _f32)
    padded, counts = np.zeros((batch + 1, inputs), _f32), np.empty((4, inputs), _f32)
    which = np.empty(batch + 4, np.int64)
    spread = _f32(spread)
    starts = np.array([start(offsets) for _ in range(lengths.max())])
    most = _f32(0)
    for b in range(batch):
        for slot in range(lengths[b]):
            first = starts[slot] + b * outputs
            _fire(fired[b], probabilities[b], uniforms[first : first + outputs])
        gains[b] = x_gain[b]
        for o in range(outputs):
            fired[b, o] *= x_gain[b]
        for i in range(inputs):
            padded[b, i] = max(min(x[b, i], limits[b]), -limits[b])
        most += _largest(fired[b])[0] * _largest(padded[b])[0]
    if furthest < most < np.inf:
        most = _f32(0)
        for o in range(outputs):
            _count(counts, padded, fired[:, o], gains, spread, which)
            most = max(most, _largest(counts[1])[0])
        if furthest < most < np.inf:
            return most, cut
    noises = _noises(write_noise, False, random)
    for o in range(outputs):
        _count(counts, padded, fired[:, o], gains, spread, which)
        if len(signs) > 0:
            for i in range(inputs):
                sign = signs[min(o, len(signs) - 1), i]
                counts[0, i] *= sign
                counts[2, i] *= sign
        _move_and_show(weight, counts, response, o, write_noise, noises)
    return most if isfinite(most) else _f32(0), cut


@_compiled
def pulse_column(
    weight: np.ndarray,
    column: int,
    error: np.ndarray,
    trains: tuple[float, int, bool, bool],
    response: tuple[Any, ...],
    spread: float,
    write_noise: tuple[np.ndarray, float],
    random: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> float:
    """Send pulses to the cross-points of one column, whose input is 1, for one error ``(out,)``.

    For the arguments see :func:`pulse`.

    Returns:
        The share of the pulses that do not fit into the trains.
    """
    lengths, x_gain, limits, probabilities, cut = _trains(np.ones((1, 1), _f32), error.reshape(1, -1), trains)
    uniforms, _, offsets = random
    fired = np.zeros(len(error), _f32)
    for _ in range(lengths[0]):
        _fire(fired, probabilities[0], uniforms[start(offsets) :])
    gain, spread = x_gain[0] * min(_f32(1), limits[0]), _f32(spread)
    variance = _f32(1) + spread * spread - gain
    visible, std = write_noise
    noise, drawn, written = _noises(write_noise, False, random)
    for o in range(len(error)):
        net, before = fired[o] * gain, weight[o, column]
        each = net, abs(net), net * variance, abs(net) * variance
        after = _moved(before, each, response, o, column, noise[o])
        weight[o, column] = after
        if len(visible) > 0:
            visible[o, column] = _shown(visible[o, column], before, after, abs(net), drawn[o], _f32(std) * written[o])
    return cut


@_compiled
def read_column(
    source: np.ndarray,
    column: int,
    to_line: tuple[Any, ...],
    from_line: tuple[Any, ...],
    random: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> np.ndarray:
    """Return a column ``(out,)`` of a crossbar, as its converters show it for an input of 1.

    Args:
        source: the weights ``(out, in)``.
        column: the number of the column.
        to_line: how the input becomes a code, see :func:`to_codes`.
        from_line: what the converters of the outputs do, see :func:`from_sums`.
        random: see :func:`pulse`.
    """
    codes, scales = to_codes(np.ones((1, 1), _f32), *to_line)
    values = np.empty((1, len(source)), _f32)
    for o in range(len(source)):
        values[0, o] = codes[0, 0] * source[o, column]
    _, gaussians, offsets = random
    from_sums(values, scales, *from_line, gaussians, offsets)
    return values[0]


@_compiled
def transfer(
    source: np.ndarray,
    to_line: tuple[Any, ...],
    from_line: tuple[Any, ...],
    weight: np.ndarray,
    column: int,
    trains: tuple[float, int, bool, bool],
    response: tuple[Any, ...],
    spread: float,
    write_noise: tuple[np.ndarray, float],
    random: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> float:
    """Read a column of one crossbar, and add it to the same column of another by pulses.

    For the arguments see :func:`read_column` and :func:`pulse`.

    Returns:
        The share of the pulses that do not fit into the trains.
    """
    values = -read_column(source, column, to_line, from_line, random)
    return pulse_column(weight, column, values, trains, response, spread, write_noise, random)


@_compiled
def program(
    weight: np.ndarray,
    residual: np.ndarray,
    shown: np.ndarray,
    scales: np.ndarray,
    step: float,
    response: tuple[Any, ...],
    spread: float,
    write_noise: tuple[np.ndarray, float],
    random: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """Do what :meth:`~aimc_pl.devices.mean_field.crossbar.Crossbar.program` does.

    Args:
        weight: the weights without write noise ``(out, in)``, which change. The arguments that are not listed are those
            of :func:`pulse`.
        residual: ``(out, in)``, which changes.
        shown: ``(out, in)``, which changes.
        scales: of the outputs ``(out,)``, or one for all ``(1,)``.
        step: the mean step of the devices.
    """
    outputs, inputs = weight.shape
    counts = np.empty((4, inputs), _f32)
    step, variance = _f32(step), _f32(spread * spread)
    visible, _ = write_noise
    seen = visible if len(visible) > 0 else weight
    noises = _noises(write_noise, True, random)
    for o in range(outputs):
        scale = scales[min(o, len(scales) - 1)]
        for i in range(inputs):
            held = residual[o, i] + (shown[o, i] - seen[o, i] * scale) / scale
            pulses = np.trunc(held / step)
            residual[o, i] = held - pulses * step
            counts[0, i] = pulses
        for i in range(inputs):
            counts[1, i] = abs(counts[0, i])
            counts[2, i] = counts[0, i] * variance
            counts[3, i] = abs(counts[0, i]) * variance
        _move_and_show(weight, counts, response, o, write_noise, noises)
        for i in range(inputs):
            shown[o, i] = seen[o, i] * scale


@_compiled
def move(
    weight: np.ndarray,
    net: np.ndarray,
    total: np.ndarray,
    net_noise: np.ndarray,
    total_noise: np.ndarray,
    response: tuple[Any, ...],
    noise: np.ndarray,
) -> None:
    """Move the weights ``(out, in)`` of all cross-points by pulses that have been counted.

    Args:
        weight: ``(out, in)``, which changes.
        net: see :class:`~aimc_pl.devices.mean_field.pulses.Counts`; all counts have the shape of ``weight``.
        total: see ``net``.
        net_noise: see ``net``.
        total_noise: see ``net``.
        response: the parameters of :func:`_move`.
        noise: Gaussian numbers ``(out, in)``.
    """
    for o in range(len(weight)):
        _move(weight[o], (net[o], total[o], net_noise[o], total_noise[o]), response, o, noise[o])


@_compiled
def fire(
    error: np.ndarray,
    x_gain: np.ndarray,
    error_gain: np.ndarray,
    lengths: np.ndarray,
    longest: int,
    fired: np.ndarray,
    uniforms: np.ndarray,
    offsets: np.ndarray,
) -> None:
    """Draw in how many slots the errors of images fire, and multiply these numbers by the gains of the inputs.

    Args:
        error: ``(batch, out, positions)``.
        x_gain: ``(batch, positions)``.
        error_gain: ``(batch, positions)``.
        lengths: number of slots ``(batch, positions)``.
        longest: the largest of ``lengths``.
        fired: receives the products and, as further outputs, their magnitudes: ``(batch, 2·out, positions)``.
        uniforms: see :func:`pulse`.
        offsets: see :func:`start`.
    """
    batch, outputs, positions = error.shape
    probabilities = np.empty(positions, _f32)
    starts = np.array([start(offsets) for _ in range(longest)])
    for b in range(batch):
        for o in range(outputs):
            number = fired[b, o]
            number[:] = 0
            for i in range(positions):
                probabilities[i] = max(min(error[b, o, i] * error_gain[b, i], _f32(1)), _f32(-1))
            for slot in range(longest):
                first = starts[slot] + (b * outputs + o) * positions
                u = uniforms[first : first + positions]
                for i in range(positions):
                    more = np.floor(u[i] + probabilities[i])
                    number[i] += more if lengths[b, i] > slot else _f32(0)
            magnitude = fired[b, outputs + o]
            for i in range(positions):
                number[i] *= x_gain[b, i]
                magnitude[i] = abs(number[i])


@_compiled
def to_codes(
    x: np.ndarray, step: float, least_scale: float, largest_scale: float, limit: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return vectors ``(batch, features)`` as they leave the converters of the inputs, in units of their step.

    Args:
        x: the vectors.
        step: of the converters.
        least_scale: vectors are divided by their largest magnitude, or by this if it is larger.
        largest_scale: vectors are divided by this if it is smaller.
        limit: codes are clipped to this.

    Returns:
        The codes, and by what the vectors have been divided, ``(batch,)``.
    """
    codes, scales = np.empty_like(x), np.empty(len(x), _f32)
    step, limit = _f32(step), _f32(limit)
    for b in range(len(x)):
        largest, is_finite = _largest(x[b])
        scales[b] = max(min(largest, _f32(largest_scale)), _f32(least_scale)) if is_finite else _f32(np.nan)
        gain = _f32(1) / scales[b] if scales[b] != 0 else _f32(0)
        for i in range(x.shape[1]):
            code = np.rint(x[b, i] * gain / step) if step > 0 else x[b, i] * gain
            codes[b, i] = max(min(code, limit), -limit)
    return codes, scales


@_compiled
def from_sums(
    y: np.ndarray,
    scales: np.ndarray,
    gain: float,
    std: float,
    is_rounded: bool,
    low: float,
    bound: float,
    scale: float,
    gaussians: np.ndarray,
    offsets: np.ndarray,
) -> np.ndarray:
    """Turn sums over the inputs into what the converters of the outputs return, in place.

    Args:
        y: the sums ``(batch, out)``.
        scales: of the vectors ``(batch,)``, see :func:`to_codes`.
        gain: turns the sums into units of the converters' step, or of the output without rounding.
        std: standard deviation of the noise, in units of the step.
        is_rounded: whether converters round.
        low: the lowest output, in units of the step, that does not exceed the bound.
        bound: of the outputs, in units of the step.
        scale: of all outputs.
        gaussians: see :func:`pulse`.
        offsets: see :func:`start`.

    Returns:
        Whether an output of a vector exceeds the bound, ``(batch,)``.
    """
    gain, std, low, bound = _f32(gain), _f32(std), _f32(low), _f32(bound)
    exceeds = np.empty(len(y), np.bool_)
    first = start(offsets) if std > 0 else 0
    for b in range(len(y)):
        outside = 0
        factor = _f32(scales[b] * scale)
        noise = gaussians[first + b * y.shape[1] :]
        for o in range(y.shape[1]):
            value = y[b, o] * gain + std * noise[o]
            value = np.rint(value) if is_rounded else value
            outside += (value < low) | (value > bound)
            y[b, o] = max(min(value, bound), -bound) * factor
        exceeds[b] = outside > 0
    return exceeds


@_compiled
def running_means(values: np.ndarray, mean: float, kept: float) -> np.ndarray:
    """Return the running mean after each of some values, as 64-bit floats. Values of zero do not count.

    Args:
        values: the values ``(number,)``, not negative.
        mean: the running mean before, or 0 if there is none; the first value then takes its place.
        kept: the weight of the running mean before, for each value.
    """
    means = np.empty(len(values))
    for i in range(len(values)):
        value = np.float64(values[i])
        if value > 0:
            mean = kept * mean + (1 - kept) * value if mean > 0 else value
        means[i] = mean
    return means


@_compiled
def _trains(
    x: np.ndarray, error: np.ndarray, trains: tuple[float, int, bool, bool]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    """Choose the pulse trains of all vectors. For the arguments see :func:`pulse`.

    Returns:
        The numbers of slots ``(batch,)``, as integers; the factors ``(batch,)`` that turn inputs into probabilities;
        the largest input ``(batch,)`` that they turn into a probability; the signed probabilities ``(batch, out)`` with
        which errors fire; and the share of the pulses that do not fit into the trains.
    """
    batch = len(x)
    rate, length, is_managed, is_adaptive = trains
    rate = _f32(rate)
    lengths, x_gain, limits = np.empty(batch, np.int64), np.empty(batch, _f32), np.empty(batch, _f32)
    probabilities, largest, strongest = np.empty_like(error), np.empty(batch, _f32), np.empty(batch, _f32)
    most, is_finite = _f32(0), True
    for b in range(batch):
        largest[b], x_is_finite = _largest(x[b])
        error_largest, error_is_finite = _largest(error[b])
        strongest[b] = max(largest[b] * error_largest * rate, _f32(1e-30))
        if not (x_is_finite and error_is_finite):
            strongest[b], is_finite = _f32(np.nan), False
        most = max(most, strongest[b])
    if is_adaptive and is_finite:
        length = min(ceil(most), length)
    lost = wanted = _f32(0)
    for b in range(batch):
        lengths[b] = min(ceil(strongest[b]), length) if is_adaptive and isfinite(strongest[b]) else length
        slots = _f32(lengths[b])
        if is_managed:
            gain = _f32(sqrt(strongest[b] / slots))
            gain = (_f32(1) if gain > 1 else gain) / max(largest[b], _f32(1e-30))
            limits[b] = np.inf
        else:
            gain = _f32(sqrt(rate / slots))
            limits[b] = _f32(1) / gain
        error_gain = -rate / (gain * slots)
        x_gain[b] = gain
        for o in range(error.shape[1]):
            probability = error[b, o] * error_gain
            probabilities[b, o] = max(min(probability, _f32(1)), _f32(-1))
        if is_managed and most > length:
            for o in range(error.shape[1]):
                pulses = largest[b] * rate * abs(error[b, o])
                wanted += pulses
                lost += max(pulses - length, _f32(0))
    return lengths, x_gain, limits, probabilities, lost / wanted if wanted > 0 else _f32(0)


@_compiled
def _largest(values: np.ndarray) -> tuple[float, bool]:
    """Return the largest magnitude of numbers, and whether all are finite."""
    # The bits of numbers without their sign are in the order of the magnitudes. Infinity and NaN come last. Unlike
    # a maximum of floats, a maximum of integers uses vector instructions.
    largest = np.zeros(1, np.int32)
    for bits in values.view(np.int32):
        largest[0] = max(largest[0], bits & 0x7FFFFFFF)
    return largest.view(_f32)[0], largest[0] < 0x7F800000


@_compiled
def _fire(fired: np.ndarray, probabilities: np.ndarray, u: np.ndarray) -> None:
    # With u uniform in [0, 1), floor(p + u) is the sign of p with probability |p|, and 0 otherwise.
    for o in range(len(fired)):
        fired[o] += np.floor(u[o] + probabilities[o])


@_compiled
def _count(
    counts: np.ndarray, x: np.ndarray, fired: np.ndarray, x_gain: np.ndarray, spread: float, which: np.ndarray
) -> None:
    """Write the net and total counts of an output's cross-points, and their two variances, to the rows of ``counts``.

    Args:
        counts: ``(4, in)``.
        x: inputs ``(batch + 1, in)``, of which the last is zero.
        fired: how often the output's line fires ``(batch + 1,)``, times the gain of the inputs.
        x_gain: gains of the inputs ``(batch + 1,)``.
        spread: see :func:`pulse`.
        which: memory for ``(batch + 4,)`` indices.
    """
    net, total, net_noise, total_noise = counts[0], counts[1], counts[2], counts[3]
    counts[:] = 0
    number = 0
    for b in range(len(x) - 1):
        which[number] = b
        number += fired[b] != 0
    which[number : number + 3] = len(x) - 1
    # Four vectors at a time save most of the reading and writing of the sums.
    for start in range(0, number, 4):
        b0, b1, b2, b3 = which[start], which[start + 1], which[start + 2], which[start + 3]
        f0, f1, f2, f3 = fired[b0], fired[b1], fired[b2], fired[b3]
        g0, g1, g2, g3 = x_gain[b0], x_gain[b1], x_gain[b2], x_gain[b3]
        x0, x1, x2, x3 = x[b0], x[b1], x[b2], x[b3]
        for i in range(x.shape[1]):
            n0, n1, n2, n3 = f0 * x0[i], f1 * x1[i], f2 * x2[i], f3 * x3[i]
            net[i] += (n0 + n1) + (n2 + n3)
            total[i] += (abs(n0) + abs(n1)) + (abs(n2) + abs(n3))
            # If an error line fires n times, an input that fires with probability p meets np of its pulses on average,
            # with variance np − np².
            p0, p1, p2, p3 = g0 * abs(x0[i]), g1 * abs(x1[i]), g2 * abs(x2[i]), g3 * abs(x3[i])
            net_noise[i] -= (n0 * p0 + n1 * p1) + (n2 * p2 + n3 * p3)
            total_noise[i] -= (abs(n0) * p0 + abs(n1) * p1) + (abs(n2) * p2 + abs(n3) * p3)
    factor = _f32(1) + spread * spread
    for i in range(x.shape[1]):
        net_noise[i] += factor * net[i]
        total_noise[i] += factor * total[i]


@_compiled
def _noises(
    write_noise: tuple[np.ndarray, float], is_whole: bool, random: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return slices of the tables of random numbers, for the noise of the steps and for the write noise.

    Args:
        write_noise: see :func:`pulse`.
        is_whole: whether the numbers of pulses will be whole, so that they say where pulses come.
        random: see :func:`pulse`.

    Returns:
        Gaussian numbers for the steps; uniform numbers that decide where pulses come, and Gaussian numbers for the
        write noise, which mean nothing without such noise.
    """
    uniforms, gaussians, offsets = random
    noise = gaussians[start(offsets) :]
    visible, _ = write_noise
    if len(visible) == 0:
        return noise, uniforms, gaussians
    drawn = np.ones(visible.size, _f32) if is_whole else uniforms[start(offsets) :]
    return noise, drawn, gaussians[start(offsets) :]


@_compiled
def _move_and_show(
    weight: np.ndarray,
    counts: np.ndarray,
    response: tuple[Any, ...],
    o: int,
    write_noise: tuple[np.ndarray, float],
    noises: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """Move the weights of an output, and those with write noise.

    Args:
        weight: ``(out, in)``, of which one row changes.
        counts: see :func:`_move`.
        response: see :func:`_move`.
        o: number of the output.
        write_noise: see :func:`pulse`.
        noises: see :func:`_noises`; for all cross-points, row by row.
    """
    (visible, std), (noise, drawn, written) = write_noise, noises
    inputs = weight.shape[1]
    first = o * inputs
    before = weight[o].copy() if len(visible) > 0 else weight[o]
    _move(weight[o], counts, response, o, noise[first:])
    for i in range(inputs if len(visible) > 0 else 0):
        new_noise = _f32(std) * written[first + i]
        visible[o, i] = _shown(visible[o, i], before[i], weight[o, i], counts[1, i], drawn[first + i], new_noise)


@_compiled
def _shown(visible: float, before: float, after: float, total: float, drawn: float, noise: float) -> float:
    """Return the weight of a cross-point with write noise, which is new where at least one pulse came.

    Args:
        visible: the weight with write noise before the pulses.
        before: the weight without it before the pulses.
        after: the weight without it after the pulses.
        total: number of pulses.
        drawn: a uniform number that decides whether a pulse came.
        noise: the new write noise.
    """
    probability = total * _growth(-total)  # 1 - exp(-total)
    return after + noise if drawn > _f32(1) - probability else visible + (after - before)


@_compiled
def _move(weight: np.ndarray, counts: Any, response: tuple[Any, ...], o: int, noise: np.ndarray) -> None:
    """Move the weights of an output ``(in,)``.

    Args:
        weight: ``(in,)``, which changes.
        counts: net and total counts and their two variances, ``(in,)`` each.
        response: :attr:`~aimc_pl.devices.mean_field.response.LinearResponse.parameters`.
        o: number of the output.
        noise: Gaussian numbers ``(in,)``.
    """
    net, total, net_noise, total_noise = counts[0], counts[1], counts[2], counts[3]
    for i in range(len(weight)):
        each = net[i], total[i], net_noise[i], total_noise[i]
        weight[i] = _moved(weight[i], each, response, o, i, noise[i])


@_compiled
def _moved(
    w: float, counts: tuple[float, float, float, float], response: tuple[Any, ...], o: int, i: int, noise: float
) -> float:
    """Return the new weight of a cross-point. For the formulas see the class LinearResponse."""
    net, total, net_noise, total_noise = counts
    lower, upper, (s_up, k_up), (s_down, k_down), (fixed_up, fixed_down) = response
    ups, downs = _f32(0.5) * (total + net), _f32(0.5) * (total - net)
    a = ups * _at(k_up, o, i) - downs * _at(k_down, o, i)
    growth = _growth(a)
    motion = (ups * _at(s_up, o, i) - downs * _at(s_down, o, i) + a * w) * growth
    # The steps change on the way: take those in the middle. Early deviations relax: a factor of expm1(2a)/(2a).
    middle = w + _f32(0.5) * motion
    up, down = _at(s_up, o, i) + _at(k_up, o, i) * middle, _at(s_down, o, i) + _at(k_down, o, i) * middle
    variance = _f32(0.5) * ((total_noise + net_noise) * up * up + (total_noise - net_noise) * down * down)
    variance += ups * _at(fixed_up, o, i) + downs * _at(fixed_down, o, i)
    variance *= growth * (_f32(1) + _f32(0.5) * a * growth)
    w += motion + np.sqrt(max(variance, _f32(0))) * noise
    return max(min(w, _at(upper, o, i)), _at(lower, o, i))


@_compiled
def _growth(a: float) -> float:
    """Return g(a) = expm1(a)/a, with a relative error of about 1e-7. Unlike expm1, this uses vector instructions."""
    bounded = max(min(a, _f32(16)), _f32(-16))  # exp(-16) vanishes beside 1, and exp(16) moves every weight to a bound
    x = bounded / _f32(32)
    growth = _f32(1)
    for n in (8, 7, 6, 5, 4, 3, 2):  # the Taylor series of g
        growth = _f32(1) + growth * x * _f32(1 / n)
    for _ in range(5):
        growth *= _f32(1) + _f32(0.5) * x * growth  # g(2x) = g(x)·(1 + x·g(x)/2)
        x *= _f32(2)
    return growth if a == bounded else growth * bounded / a


def _at(value: Any, o: int, i: int) -> Any:
    """Return one cross-point's value of a parameter, see :func:`_move`."""


@overload(_at, strict=False)  # the signatures differ in their annotations
def _compiled_at(value: Any, o: int, i: int) -> Callable[..., Any]:
    if isinstance(value, types.Array):
        return lambda value, o, i: value[min(o, len(value) - 1), i]
    return lambda value, o, i: value
