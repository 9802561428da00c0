"""This module holds the loops of the mean-field tile on a CPU, compiled by numba.

Small layers need them: torch would call fifty operations for an update, each of which takes longer to start than to
run. The formulas are those of :mod:`~aimc_pl.devices.mean_field.pulses`, :mod:`~aimc_pl.devices.mean_field.response`
and :mod:`~aimc_pl.devices.mean_field.converters`, which other devices use. All arrays are of 32-bit floats. NaN goes
through to the results.
"""

from collections.abc import Callable
from math import isfinite
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload
from torch import Tensor, float32

LENGTH = 2**22
"""The longest slice of a table of random numbers. A table has twice as many."""

_IN_CACHE = 2**15
"""How many numbers of images are worked on at a time, so that they stay in the cache."""

NOTHING = np.empty((0, 0), np.float32)
"""An empty array, which stands for an argument that a loop does not need."""

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
    fired, counts, x_gain = np.zeros((batch, outputs), _f32), np.empty((4, inputs), _f32), np.empty(batch, _f32)
    lines, events, segments = np.empty((batch, inputs), _f32), _events(batch), (np.zeros(1, np.int64), inputs)
    starts, drawn = np.empty(trains[1], np.int64), 0
    most = most_needed = _f32(0)
    for b in range(batch):
        needed, slots, x_gain[b], gain, limit = _train(_largest(x[b])[0], _largest(error[b])[0], trains)
        most_needed = max(most_needed, needed)
        while drawn < slots:
            starts[drawn] = start(offsets)
            drawn += 1
        for slot in range(slots):
            first = starts[slot] + b * outputs
            _fire(fired[b], error[b], gain, uniforms[first : first + outputs])
        for o in range(outputs):
            fired[b, o] *= x_gain[b]
        for i in range(inputs):
            lines[b, i] = max(min(x[b, i], limit), -limit)
        most += _largest(fired[b])[0] * _largest(lines[b])[0]
    memory, cut = lines.reshape(-1), _cut(x, error, most_needed, trains)
    if furthest < most < np.inf:
        most = _f32(0)
        for o in range(outputs):
            _count_rows(counts, memory, segments, fired[:, o], x_gain, events, spread)
            most = max(most, _largest(counts[1])[0])
        if furthest < most < np.inf:
            return most, cut
    noises = _noises(write_noise, False, random)
    for o in range(outputs):
        if _count_rows(counts, memory, segments, fired[:, o], x_gain, events, spread) == 0:
            continue
        if len(signs) > 0:
            for i in range(inputs):
                sign = signs[min(o, len(signs) - 1), i]
                counts[0, i] *= sign
                counts[2, i] *= sign
        _move_and_show(weight, counts, response, o, write_noise, noises)
    return most if isfinite(most) else _f32(0), cut


@_compiled
def pulse_column(
    column: int,
    error: np.ndarray,
    weight: np.ndarray,
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
    needed, slots, gain, error_gain, limit = _train(_f32(1), _largest(error)[0], trains)
    uniforms, _, offsets = random
    fired = np.zeros(len(error), _f32)
    for _ in range(slots):
        _fire(fired, error, error_gain, uniforms[start(offsets) :])
    gain *= min(_f32(1), limit)
    variance = _f32(1) + _f32(spread) * _f32(spread) - gain
    visible, std = write_noise
    noise, drawn, written = _noises(write_noise, False, random)
    for o in range(len(error)):
        net, before = fired[o] * gain, weight[o, column]
        each = net, abs(net), net * variance, abs(net) * variance
        after = _moved(before, each, response, o, column, noise[o])
        weight[o, column] = after
        if len(visible) > 0:
            visible[o, column] = _shown(visible[o, column], before, after, abs(net), drawn[o], _f32(std) * written[o])
    return _cut(np.ones((1, 1), _f32), error.reshape(1, -1), needed, trains)


@_compiled
def read_column(
    source: np.ndarray,
    column: int,
    reads: tuple[tuple[Any, ...], tuple[Any, ...]],
    random: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> np.ndarray:
    """Return a column ``(out,)`` of a crossbar, as its converters show it for an input of 1.

    Args:
        source: the weights ``(out, in)``.
        column: the number of the column.
        reads: how the input becomes a code, see :func:`to_codes`; and what the converters of the outputs do, see
            :func:`from_sums`.
        random: see :func:`pulse`.
    """
    to_line, from_line = reads
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
    reads: tuple[tuple[Any, ...], tuple[Any, ...]],
    column: int,
    weight: np.ndarray,
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
    values = -read_column(source, column, reads, random)
    return pulse_column(column, values, weight, trains, response, spread, write_noise, random)


@_compiled
def pulse_and_transfer(
    of_pulses: tuple[Any, ...],
    reads: tuple[tuple[Any, ...], tuple[Any, ...]],
    of_transfers: tuple[Any, ...],
    columns: tuple[int, int],
    total: np.ndarray,
    gammas: tuple[float, float],
) -> tuple[float, float, float]:
    """Send pulses to a crossbar, add columns of it to another crossbar, and add up both.

    In a small layer, calls take longer than their work. One call for all this saves some of them.

    Args:
        of_pulses: the arguments of :func:`pulse`.
        reads: see :func:`read_column`.
        of_transfers: the arguments of :func:`pulse_column` for the other crossbar, without ``column`` and ``error``.
        columns: the first column, and their number.
        total: receives the sum ``(out, in)``. An empty array receives nothing.
        gammas: the factors of both crossbars in the sum.

    Returns:
        The results of :func:`pulse`, and the sum of those of :func:`pulse_column`. If no pulses were sent, nothing has
        moved.
    """
    most, cut = pulse(*of_pulses)
    (first, number), lost = columns, 0.0
    if most > of_pulses[4]:
        return most, cut, lost
    source, target = _seen(of_pulses[0], of_pulses[8]), _seen(of_transfers[0], of_transfers[4])
    for n in range(number):
        lost += transfer(source, reads, (first + n) % source.shape[1], *of_transfers)
    gamma, of_target = _f32(gammas[0]), _f32(gammas[1])
    for o in range(len(total)):
        for i in range(total.shape[1]):
            total[o, i] = of_target * target[o, i] + gamma * source[o, i]
    return most, cut, lost


@_compiled
def pulse_and_chop(
    of_pulses: tuple[Any, ...],
    each: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    start_at: tuple[int, int],
    reads: tuple[tuple[Any, ...], tuple[Any, ...]],
    buffer: tuple[np.ndarray, bool, float, bool, float],
    tracking: tuple[np.ndarray, np.ndarray, np.ndarray, tuple[float, float, float]],
    signs: tuple[np.ndarray, np.ndarray],
    flips: tuple[int, bool, float, np.ndarray, float, np.ndarray],
    of_transfers: tuple[Any, ...],
) -> tuple[int, int, float, int, float]:
    """Send the pulses of one vector after another to a crossbar with choppers, and do the transfers between them.

    This does what the tiles of :mod:`~aimc_pl.devices.mean_field.chopped` do.

    Args:
        of_pulses: the arguments of :func:`pulse` for all vectors.
        each: for every vector: the rate and the number of slots of its trains, the number of columns that are read
            after its pulses, and by how many steps a read of 1 fills the buffer.
        start_at: the first column, and how often the last column has been read.
        reads: see :func:`read_column`.
        buffer: the digital buffer ``(in, out)``, which changes; whether every transfer clears it; the most steps that
            a transfer sends; whether a share of the buffer remains where steps are sent, or a share of these steps; and
            the share.
        tracking: the running mean ``(in, out)`` and the reference ``(in, out)`` of every column, and whether the column
            has flipped ``(in,)``, which change. Without references, the arrays are empty. Then the share of a read in
            the running mean; the limit of what remains in the buffer, or 0; and the largest number of reads in a period
            by which steps are divided, or 0 if they are not.
        signs: the signs of the inputs ``(in,)`` and outputs ``(out,)``, which change.
        flips: the period of a column in reads; whether columns flip at the end of a period; and with which probability
            they flip, and uniform numbers for all transfers. The last two are the same for outputs, for all times that
            the last column is read: a probability and numbers ``(times, out)``.
        of_transfers: see :func:`pulse_and_transfer`.

    Returns:
        The next column, how often the last column has been read, the sum of what the pulses have lost (see
        :func:`pulse`), the number of columns that pulses moved, and the sum of what those have lost.
    """
    weight, x, error, turned, _, (_, _, is_managed, is_adaptive), response, spread, write_noise, random = of_pulses
    (rates, lengths, numbers, factors), (column, cycles), (in_signs, out_signs) = each, start_at, signs
    held, clears, most, is_share, kept = buffer
    mean, reference, has_flipped, (share, cap, most_reads) = tracking
    period, flips_regularly, in_probability, in_draws, out_probability, out_draws = flips
    most, kept, share, cap = _f32(most), _f32(kept), _f32(share), _f32(cap)
    source, steps, cut, moved, lost = _seen(weight, write_noise), np.empty(len(out_signs), _f32), 0.0, 0, 0.0
    reads_done = passes = 0
    for b in range(len(x)):
        trains = rates[b], lengths[b], is_managed, is_adaptive
        some = x[b : b + 1], error[b : b + 1]
        cut += pulse(weight, *some, turned, np.inf, trains, response, spread, write_noise, random)[1]
        for _ in range(numbers[b]):
            values = read_column(source, column, reads, random)
            factor = factors[b] / (min(cycles % period + 1, most_reads) if most_reads > 0 else 1)
            to_buffer = in_signs[column] * _f32(factor)
            sends = False
            for o in range(len(values)):
                value, before = values[o], _f32(0)
                if len(mean) > 0:
                    before = mean[column, o] if has_flipped[column] > 0 else reference[column, o]
                    reference[column, o] = before
                    mean[column, o] += share * (value - mean[column, o])
                full = (_f32(0) if clears else held[column, o]) + to_buffer * out_signs[o] * (value - before)
                steps[o] = max(min(np.trunc(full), most), -most)
                sends |= steps[o] != 0
                if is_share:
                    full *= kept if steps[o] != 0 else _f32(1)
                else:
                    full -= (_f32(1) - kept) * steps[o]
                    full = max(min(full, cap), -cap) if cap > 0 and steps[o] != 0 else full
                held[column, o] = full
            if sends and (len(mean) == 0 or cycles > period):
                lost += pulse_column(column, -steps, *of_transfers)
                moved += 1
            is_flipped = flips_regularly and cycles % period + 1 == period
            if in_probability > 0:
                is_flipped |= in_draws[reads_done] < in_probability
                reads_done += 1
            if len(mean) > 0:
                has_flipped[column] = is_flipped
            if is_flipped:
                in_signs[column] *= -1
                turned[:, column] *= -1
            column = (column + 1) % len(in_signs)
            if column > 0:
                continue
            cycles += 1
            if out_probability <= 0:
                continue
            for o in range(len(out_signs)):
                if out_draws[passes, o] < out_probability:
                    out_signs[o] *= -1
                    turned[o] *= -1
            passes += 1
    return column, cycles, cut, moved, lost


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
    seen = _seen(weight, write_noise)
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
def count_patches(
    images: np.ndarray,
    layout: tuple[np.ndarray, tuple[np.ndarray, int], np.ndarray],
    largest: np.ndarray,
    error: np.ndarray,
    trains: tuple[float, int, bool, bool],
    spread: float,
    random: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> tuple[np.ndarray, float]:
    """Count the pulses that the patches of images send to every cross-point, event by event.

    An event is an error that fires. Usually these are few, and the time grows with their number.

    Args:
        images: see :meth:`~aimc_pl.devices.mean_field.vectors.Convolution.in_memory`.
        layout: see ``images``.
        largest: the largest input of every patch ``(batch, positions)``.
        error: errors ``(batch, out, positions)``.
        trains: see :func:`~aimc_pl.devices.mean_field.pulses.train_settings`.
        spread: see :func:`pulse`.
        random: see :func:`pulse`.

    Returns:
        The counts (see :func:`_count`) of all cross-points ``(4, out, in)``, and the longest train that a patch needs,
        in slots.
    """
    patches, segments, columns = layout
    (batch, outputs, positions), size = error.shape, len(images) // len(error)
    uniforms, _, offsets = random
    lengths, gains, error_gains, needed = _trains_of_patches(error, largest, trains)
    longest = int(_largest(lengths.reshape(-1))[0])
    starts = np.array([start(offsets) for _ in range(longest)])
    by_output = np.zeros((outputs, 4, len(segments[0]) * segments[1]), _f32)
    fired, which, events = np.empty(positions, _f32), np.empty(positions, np.int64), _events(batch * positions)
    together = max(1, _IN_CACHE // size)
    for first_image in range(0, batch, together):
        for o in range(outputs):
            number = 0
            for b in range(first_image, min(first_image + together, batch)):
                fired[:] = 0
                for slot in range(longest):
                    first = starts[slot] + (b * outputs + o) * positions
                    u = uniforms[first : first + positions]
                    for i in range(positions):
                        probability = max(min(error[b, o, i] * error_gains[b, i], _f32(1)), _f32(-1))
                        more = np.floor(u[i] + probability)  # see _fire
                        fired[i] += more if lengths[b, i] > _f32(slot) else _f32(0)
                found = 0
                for i in range(positions):
                    which[found] = i
                    found += fired[i] != 0
                for i in which[:found]:
                    events[0][number], events[2][number] = b * size + patches[i], gains[b, i]
                    events[1][number] = fired[i] * gains[b, i]
                    number += 1
            _count(by_output[o], images, segments, events, number, spread)
    counts = np.empty((4, outputs, len(columns)), _f32)
    for o in range(outputs):
        for k in range(4):
            for i in range(len(columns)):
                counts[k, o, i] = by_output[o, k, columns[i]]
    return counts, needed


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
    """Return the running mean after each of some values, as 64-bit floats. Zeros, infinities and NaN do not count.

    Args:
        values: the values ``(number,)``, not negative.
        mean: the running mean before, or 0 if there is none; the first value then takes its place.
        kept: the weight of the running mean before, for each value.
    """
    means = np.empty(len(values))
    for i in range(len(values)):
        value = np.float64(values[i])
        if 0 < value < np.inf:
            mean = kept * mean + (1 - kept) * value if mean > 0 else value
        means[i] = mean
    return means


@_compiled
def _cut(x: np.ndarray, error: np.ndarray, needed: float, trains: tuple[float, int, bool, bool]) -> float:
    """Return the share of the pulses that do not fit into the trains.

    Args:
        x: see :func:`pulse`.
        error: see :func:`pulse`.
        needed: the number of slots that the strongest cross-point of all vectors needs.
        trains: see :func:`pulse`.
    """
    rate, length, is_managed, _ = trains
    lost = wanted = _f32(0)
    for b in range(len(x) if is_managed and needed > length else 0):
        largest, _ = _largest(x[b])
        for o in range(error.shape[1]):
            pulses = largest * _f32(rate) * abs(error[b, o])
            wanted += pulses
            lost += max(pulses - length, _f32(0))
    return lost / wanted if wanted > 0 else _f32(0)


@_compiled
def _trains_of_patches(
    error: np.ndarray, largest: np.ndarray, trains: tuple[float, int, bool, bool]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Choose the pulse trains of all patches. For the arguments see :func:`count_patches`.

    Returns:
        Three arrays ``(batch, positions)``: the numbers of slots, the factors that turn inputs into probabilities, and
        those that turn errors into probabilities; and the number of slots that the strongest cross-point needs.
    """
    batch, outputs, positions = error.shape
    needed, lengths = np.empty((batch, positions), _f32), np.empty((batch, positions), _f32)
    gains, error_gains = np.empty((batch, positions), _f32), np.empty((batch, positions), _f32)
    bits = np.empty(positions, np.int32)
    strongest = bits.view(_f32)
    for b in range(batch):
        bits[:] = 0
        for o in range(outputs):
            errors = error[b, o].view(np.int32)
            for i in range(positions):
                bits[i] = max(bits[i], errors[i] & 0x7FFFFFFF)  # see _largest
        for i in range(positions):
            needed[b, i], lengths[b, i], gains[b, i], error_gains[b, i], _ = _train(largest[b, i], strongest[i], trains)
    return lengths, gains, error_gains, _largest(needed.reshape(-1))[0]


@_compiled
def _train(
    largest: float, error_largest: float, trains: tuple[float, int, bool, bool]
) -> tuple[float, float, float, float, float]:
    """Choose the pulse train of a vector.

    Args:
        largest: the largest magnitude of the inputs.
        error_largest: the largest magnitude of the errors.
        trains: see :func:`pulse`.

    Returns:
        The number of slots that the strongest cross-point needs; the number of slots; the factor that turns inputs into
        probabilities; the negative one that turns errors into probabilities; and the largest input that becomes a
        probability.
    """
    rate, length, is_managed, is_adaptive = trains
    rate, slots = _f32(rate), _f32(length)
    needed = max(largest * error_largest * rate, _f32(1e-30))
    if not (largest < np.inf and error_largest < np.inf):
        needed = _f32(np.nan)
    if is_adaptive and needed < slots:
        slots = np.ceil(needed)
    if is_managed:
        gain = np.sqrt(needed / slots)
        gain = (_f32(1) if gain > 1 else gain) / max(largest, _f32(1e-30))
        return needed, slots, gain, -rate / (gain * slots), _f32(np.inf)
    gain = np.sqrt(rate / slots)
    return needed, slots, gain, -rate / (gain * slots), _f32(1) / gain


@_compiled
def _largest(values: np.ndarray) -> tuple[float, bool]:
    """Return the largest magnitude of numbers, and whether all are finite."""
    # The bits of numbers without their sign are in the order of the magnitudes. Infinity and NaN come last. Unlike
    # a maximum of floats, a maximum of integers uses vector instructions.
    largest: Any = np.int32(0)
    for bits in values.view(np.int32):
        largest = max(largest, np.int32(bits & 0x7FFFFFFF))
    magnitude: Any = np.int32(largest)
    return magnitude.view(_f32), largest < 0x7F800000


@_compiled
def _fire(fired: np.ndarray, error: np.ndarray, gain: float, u: np.ndarray) -> None:
    # With u uniform in [0, 1), floor(p + u) is the sign of p with probability |p|, and 0 otherwise.
    for o in range(len(fired)):
        fired[o] += np.floor(u[o] + max(min(error[o] * gain, _f32(1)), _f32(-1)))


@_compiled
def _events(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return memory for so many events, see :func:`_count`."""
    return np.empty(number + 3, np.int64), np.empty(number + 3, _f32), np.empty(number + 3, _f32)


@_compiled
def _count_rows(
    counts: np.ndarray,
    memory: np.ndarray,
    segments: tuple[np.ndarray, int],
    fired: np.ndarray,
    x_gain: np.ndarray,
    events: tuple[np.ndarray, np.ndarray, np.ndarray],
    spread: float,
) -> int:
    """Do what :func:`_count` does from zero, for all vectors of a batch that lie one after another in memory.

    Args:
        counts: see :func:`_count`.
        memory: see :func:`_count`.
        segments: see :func:`_count`. There is one.
        fired: how often the output's line fires ``(batch,)``, times the gain of the inputs.
        x_gain: gains of the inputs ``(batch,)``.
        events: memory for the events.
        spread: see :func:`pulse`.

    Returns:
        The number of events.
    """
    counts[:] = 0
    where, numbers, gains = events
    (_, inputs), number = segments, 0
    for b in range(len(fired)):
        where[number], numbers[number], gains[number] = b * inputs, fired[b], x_gain[b]
        number += fired[b] != 0
    _count(counts, memory, segments, events, number, spread)
    return number


@_compiled
def _count(
    counts: np.ndarray,
    memory: np.ndarray,
    segments: tuple[np.ndarray, int],
    events: tuple[np.ndarray, np.ndarray, np.ndarray],
    number: int,
    spread: float,
) -> None:
    """Add the net and total counts of events, and their two variances, to the rows of ``counts``.

    Args:
        counts: of the cross-points of an output ``(4, in)``.
        memory: the memory of the inputs, as one row.
        segments: where the segments of every vector of inputs begin, seen from its first element, and their length.
        events: for every vector with which the output's line fires: where its first input is; how often the line fires,
            times the gain of the inputs; and this gain. There is room for three more.
        number: the number of these vectors.
        spread: see :func:`pulse`.
    """
    (offsets, length), (where, fired, gains) = segments, events
    for event in range(number, number + 3):
        where[event], fired[event], gains[event] = where[max(number - 1, 0)], 0, 0
    factor = _f32(1) + _f32(spread) * _f32(spread)
    # Four vectors at a time save most of the reading and writing of the sums.
    for e in range(0, number, 4):
        f0, f1, f2, f3 = fired[e], fired[e + 1], fired[e + 2], fired[e + 3]
        g0, g1, g2, g3 = gains[e], gains[e + 1], gains[e + 2], gains[e + 3]
        for s in range(len(offsets)):
            x0, x1 = memory[where[e] + offsets[s] :][:length], memory[where[e + 1] + offsets[s] :][:length]
            x2, x3 = memory[where[e + 2] + offsets[s] :][:length], memory[where[e + 3] + offsets[s] :][:length]
            first = s * length
            net, total = counts[0][first : first + length], counts[1][first : first + length]
            net_noise, total_noise = counts[2][first : first + length], counts[3][first : first + length]
            for i in range(length):
                n0, n1, n2, n3 = f0 * x0[i], f1 * x1[i], f2 * x2[i], f3 * x3[i]
                net[i] += (n0 + n1) + (n2 + n3)
                total[i] += (abs(n0) + abs(n1)) + (abs(n2) + abs(n3))
                # If an error line fires n times, an input that fires with probability p meets np of its pulses on
                # average, with variance np − np². Each of the pulses has the variance of a step.
                v0, v1 = factor - g0 * abs(x0[i]), factor - g1 * abs(x1[i])
                v2, v3 = factor - g2 * abs(x2[i]), factor - g3 * abs(x3[i])
                net_noise[i] += (n0 * v0 + n1 * v1) + (n2 * v2 + n3 * v3)
                total_noise[i] += (abs(n0) * v0 + abs(n1) * v1) + (abs(n2) * v2 + abs(n3) * v3)


@_compiled
def _seen(weight: np.ndarray, write_noise: tuple[np.ndarray, float]) -> np.ndarray:
    """Return the weights that products see. For the arguments see :func:`pulse`."""
    visible, _ = write_noise
    return visible if len(visible) > 0 else weight


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
