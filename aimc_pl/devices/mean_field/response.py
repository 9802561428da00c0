"""This module computes how pulses move the weight of a cross-point: the mean motion, and the variance around it.

Let U and D be the numbers of pulses up and down, and up(w) and down(w) the steps of the device. The weight moves by
dw/dt = U·up(w) − D·down(w) over one unit of time, and every pulse adds a variance.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import cached_property, partial
from itertools import batched, chain
from math import ceil, exp
from typing import Any

import numpy as np
import torch
from aihwkit.simulator.configs.devices import (
    ConstantStepDevice,
    ExpStepDevice,
    LinearStepDevice,
    PiecewiseStepDevice,
    PowStepDevice,
    PulsedDevice,
    SoftBoundsDevice,
    SoftBoundsReferenceDevice,
)
from torch import Tensor

from aimc_pl.devices.mean_field import kernels
from aimc_pl.devices.mean_field.pulses import Counts

Number = Tensor | float
"""One value for all cross-points, or one per cross-point ``(out, in)``."""

_Curve = Callable[[Tensor], Tensor]
_Deviation = Callable[[Tensor, Tensor], Number]
"""The standard deviation of a step from cycle to cycle, as a function of the step and of the weight."""

_Pair = tuple[Tensor, Tensor]

SUPPORTED_DEVICES = (
    ConstantStepDevice,
    LinearStepDevice,
    SoftBoundsDevice,
    SoftBoundsReferenceDevice,
    ExpStepDevice,
    PowStepDevice,
    PiecewiseStepDevice,
)
"""The device classes of aihwkit for which :func:`response_of` has a response."""

_CURVED = (ExpStepDevice, PowStepDevice, PiecewiseStepDevice)
"""Those whose steps are no linear functions of the weight."""

_SECOND_ORDER_REACH = 0.02
"""Below this reach, motions are computed to second order (error 1e-4), and variances at the start (error 2 %)."""

_SUBSTEP = 0.05
"""The fraction of the range that a curved response may cross in one step of the integration."""


class Response(ABC):
    """The response of a tile's cross-points to pulses.

    Args:
        lower: the lowest weight.
        upper: the highest weight.
        steepness: how much a pulse changes the steps of a typical cross-point. If steepness·pulses ≪ 1 for a batch, the
            order of its samples hardly matters.
        spread: standard deviation of a step from cycle to cycle, in units of the step.
    """

    def __init__(self, lower: Number, upper: Number, steepness: float, spread: float) -> None:
        self.bounds: Any = lower, upper
        for bound in self.bounds:
            if isinstance(bound, Tensor):
                self.bounds = tuple(torch.as_tensor(other, device=bound.device) for other in self.bounds)
        self.steepness = steepness
        self.spread = spread

    def clip(self, weight: Tensor) -> Tensor:
        """Clip weights, in place, to the bounds."""
        return weight.clamp_(*self.bounds)

    def step(self, weight: Tensor, counts: Counts, reach: float, noise: Tensor) -> None:
        """Move the weights, in place, by the mean motion and the noise around it, and clip them to the bounds.

        Args:
            weight: see :meth:`move`.
            counts: see :meth:`move`.
            reach: see :meth:`move`.
            noise: Gaussian numbers ``(out, in)``.
        """
        variance = self.move(weight, counts, reach).clamp_(min=0)
        # On some processors, the square root of zero takes ten times as long as that of other numbers.
        std = variance.clamp(min=1e-37).rsqrt_().mul_(variance)
        self.clip(weight.addcmul_(std, noise))

    @abstractmethod
    def move(self, weight: Tensor, counts: Counts, reach: float) -> Tensor:
        """Move the weights, in place, by the mean motion.

        Args:
            weight: ``(out, in)``.
            counts: the pulses.
            reach: the largest total count times the steepness. It determines how finely the motion is computed.

        Returns:
            The variance of the weights around the mean motion.
        """


class LinearResponse(Response):
    """A response whose steps are linear in the weight: up(w) = s₊ + k₊·w, down(w) = s₋ + k₋·w.

    The mean motion is exact: with a = U·k₊ − D·k₋ and b = U·s₊ − D·s₋, the new weight is w' = w + (b + a·w)·expm1(a)/a.

    Args:
        up: s₊ and k₊.
        down: s₋ and k₋.
        lower: see :class:`Response`.
        upper: see :class:`Response`.
        spread: see :class:`Response`.
        fixed_spread: standard deviation of a step up and of a step down that does not depend on the weight, in weight
            units.
    """

    def __init__(
        self,
        up: tuple[Number, Number],
        down: tuple[Number, Number],
        lower: Number,
        upper: Number,
        spread: float,
        fixed_spread: tuple[Number, Number],
    ) -> None:
        (s_up, k_up), (s_down, k_down) = up, down
        super().__init__(lower, upper, max(_typical(k_up), _typical(k_down)), spread)
        self.alike = not any(isinstance(slope, Tensor) for slope in (k_up, k_down))
        self.rate = _OfCounts(s_up, -s_down)
        self.relaxation = _OfCounts(k_up, -k_down)
        # The variance of a pulse has two terms: its squared size, which is a polynomial in w (here with the highest
        # coefficient first), times the noise of the counts, and its squared fixed spread.
        self.squares = [_OfCounts(s_up * s_up, s_down * s_down)]
        if not (_vanishes(k_up) and _vanishes(k_down)):
            linear, quadratic = (2 * s_up * k_up, 2 * s_down * k_down), (k_up * k_up, k_down * k_down)
            self.squares = [_OfCounts(*quadratic), _OfCounts(*linear), *self.squares]
        fixed = tuple(spread * spread for spread in fixed_spread)
        self.fixed = _OfCounts(*fixed)
        self._pairs = up, down, fixed

    def column(self, index: int) -> "LinearResponse":
        """Return the response of a single column of cross-points."""
        part = copy(self)
        vars(part).pop("parameters", None)
        part.bounds = tuple(_column(bound, index) for bound in self.bounds)
        part.rate, part.relaxation = self.rate.column(index), self.relaxation.column(index)
        part.squares = [square.column(index) for square in self.squares]
        part.fixed = self.fixed.column(index)
        part._pairs = tuple((_column(one, index), _column(other, index)) for one, other in self._pairs)
        return part

    def step(self, weight: Tensor, counts: Counts, reach: float, noise: Tensor) -> None:
        """See :meth:`Response.step`."""
        if not weight.is_cpu:
            super().step(weight, counts, reach, noise)
            return
        net, total, (net_noise, total_noise), _ = counts
        arrays = (tensor.numpy() for tensor in (weight, net, total, net_noise, total_noise))
        kernels.move(*arrays, self.parameters, noise.numpy())

    @cached_property
    def parameters(self) -> tuple[Any, ...]:
        """The parameters for :mod:`~aimc_pl.devices.mean_field.kernels`.

        These are the bounds, s₊ and k₊, s₋ and k₋, and the fixed variances of a step up and of a step down. All are
        numbers if cross-points are alike. Otherwise all are arrays ``(out, in)``, or ``(1, in)`` for a parameter that
        is the same for all.
        """
        values = [*self.bounds, *chain(*self._pairs)]
        widths = {value.shape[1] for value in values if isinstance(value, Tensor) and value.dim()}
        lower, upper, *factors = (_parameter(value, *widths) for value in values)
        return lower, upper, *batched(factors, 2)

    def move(self, weight: Tensor, counts: Counts, reach: float) -> Tensor:
        """See :meth:`Response.move`."""
        motion, a = self.rate(counts[:2]), self.relaxation(counts[:2])
        motion.addcmul_(a, weight)
        if self.alike and reach < _SECOND_ORDER_REACH:
            variance = self._variance(weight, counts)
            weight += motion.addcmul_(motion, a, value=0.5)
            return variance
        a -= 1e-30  # expm1(a)/a becomes 1, not NaN, at a = 0
        change = torch.expm1(a)
        mean = torch.div(change, a, out=a)
        motion *= mean
        # The steps change on the way: take those in the middle. Early deviations relax: a factor of expm1(2a)/(2a).
        variance = self._variance(torch.add(weight, motion, alpha=0.5), counts)
        weight += motion
        return variance.mul_(mean).mul_(change.mul_(0.5).add_(1))

    def _variance(self, weight: Tensor, counts: Counts) -> Tensor:
        highest, *others = self.squares
        variance = highest(counts.noise)
        for square in others:
            square.add_to(variance.mul_(weight), counts.noise)
        return self.fixed.add_to(variance, counts[:2])


class CurvedResponse(Response):
    """A response with steps of any shape, integrated by the midpoint rule in substeps of a few percent of the range.

    Args:
        up: the step up as a function of the weight.
        down: the step down as a function of the weight.
        lower: see :class:`Response`.
        upper: see :class:`Response`.
        steepness: see :class:`Response`; a step in units of the range.
        spread: see :class:`Response`.
        deviation: the standard deviation of a step, where it is no multiple of the step. ``spread`` is then 0.
    """

    def __init__(
        self,
        up: _Curve,
        down: _Curve,
        lower: Number,
        upper: Number,
        steepness: float,
        spread: float,
        deviation: _Deviation | None = None,
    ) -> None:
        super().__init__(lower, upper, steepness, spread)
        self.up = up
        self.down = down
        self.deviation = deviation

    def move(self, weight: Tensor, counts: Counts, reach: float) -> Tensor:
        """See :meth:`Response.move`."""
        substeps = max(1, ceil(reach / _SUBSTEP))
        ups = (counts.total + counts.net) / (2 * substeps)
        downs = (counts.total - counts.net) / (2 * substeps)
        net, total = (count / (2 * substeps) for count in counts.noise)
        variance = torch.zeros_like(weight)
        for _ in range(substeps):
            half = ups * self.up(weight) - downs * self.down(weight)
            middle = self.clip(torch.add(weight, half, alpha=0.5))
            with torch.enable_grad():
                middle.requires_grad_()
                up, down = self.up(middle), self.down(middle)
                motion = ups * up - downs * down
                (slope,) = torch.autograd.grad(motion.sum(), middle)
            middle, up, down = middle.detach(), up.detach(), down.detach()
            added = (total + net) * up**2 + (total - net) * down**2
            if self.deviation is not None:
                added += ups * self.deviation(up, middle) ** 2 + downs * self.deviation(down, middle) ** 2
            variance = variance * torch.exp(2 * slope) + added * torch.exp(slope)
            self.clip(weight.add_(motion.detach()))
        return variance


def response_of(device: PulsedDevice, hidden: Mapping[str, Number], whole_pulses: bool) -> Response:
    """Return the response of a device of aihwkit.

    Args:
        device: an instance of one of :data:`SUPPORTED_DEVICES`.
        hidden: the parameters of the device's cross-points, by aihwkit's names.
        whole_pulses: whether counts will be whole numbers. Then n steps of slope k make a factor (1 + k)ⁿ. Otherwise
            the factor is exp(μk), its mean over Poisson counts n of mean μ.
    """
    values: Any = device  # some fields exist on some devices only
    up, down, spread = hidden["dwmin_up"], hidden["dwmin_down"], values.dw_min_std
    lower, upper = _bounds(hidden)
    if isinstance(device, _CURVED):
        steepness = (_typical(up) + _typical(down)) / _typical(_range(hidden)) * _highest(values)
        rise, fall = _steps(values, hidden)
        if getattr(values, "dw_min_std_add", 0.0) == getattr(values, "dw_min_std_slope", 0.0) == 0:
            return CurvedResponse(rise, fall, lower, upper, steepness, spread)
        deviation = partial(_deviation, values, hidden, True)
        return CurvedResponse(rise, fall, lower, upper, steepness, 0.0, deviation)
    steps_up, steps_down = _lines(values, hidden)
    fixed = not getattr(values, "mult_noise", True)
    if whole_pulses:
        steps_up, steps_down = _compounded(*steps_up, 1), _compounded(*steps_down, -1)
    return LinearResponse(
        steps_up,
        steps_down,
        lower,
        upper,
        0.0 if fixed else spread,
        (spread * up, spread * down) if fixed else (0.0, 0.0),
    )


def after_pulse(
    weight: Tensor, device: PulsedDevice, hidden: Mapping[str, Number], upward: bool, noise: Tensor
) -> Tensor:
    """Return weights after one pulse each, which is exact for devices of few states and close to a bound, too.

    Args:
        weight: the weights before, of any shape.
        device: see :func:`response_of`.
        hidden: the parameters of these cross-points, as numbers or in the shape of the weights.
        upward: whether the pulses go up.
        noise: Gaussian numbers in the shape of the weights.
    """
    up, down = _steps(device, hidden)
    step = up(weight) if upward else -down(weight)
    moved = weight + step + _deviation(device, hidden, upward, step, weight) * noise
    lower, upper = (torch.as_tensor(bound, device=weight.device) for bound in _bounds(hidden))
    return moved.clamp_(lower, upper)


def _bounds(hidden: Mapping[str, Number]) -> tuple[Number, Number]:
    reference = hidden.get("reference", 0.0)
    return hidden["min_bound"] - reference, hidden["max_bound"] - reference


def _deviation(device: Any, hidden: Mapping[str, Number], upward: bool, step: Tensor, weight: Tensor) -> Number:
    """Return the standard deviation of a step from cycle to cycle, in weight units."""
    if not getattr(device, "mult_noise", True):
        return device.dw_min_std * hidden["dwmin_up" if upward else "dwmin_down"]
    size = step.abs()
    if isinstance(device, ExpStepDevice):
        size = size + device.dw_min_std_add + device.dw_min_std_slope * weight.abs()
    return device.dw_min_std * size


def _steps(device: Any, hidden: Mapping[str, Number]) -> tuple[_Curve, _Curve]:
    """Return the step up and the step down as functions of the weight."""
    if isinstance(device, PiecewiseStepDevice):
        return _piecewise(device, hidden)
    if isinstance(device, _CURVED):
        return (_exponential if isinstance(device, ExpStepDevice) else _power)(device, hidden)
    (s_up, k_up), (s_down, k_down) = _lines(device, hidden)
    return (lambda weight: s_up + k_up * weight), (lambda weight: s_down + k_down * weight)


def _lines(device: Any, hidden: Mapping[str, Number]) -> tuple[tuple[Number, Number], tuple[Number, Number]]:
    """Return s₊ and k₊, s₋ and k₋ of a device whose steps are linear in the weight."""
    up, down = hidden["dwmin_up"], hidden["dwmin_down"]
    slopes = hidden.get("slope_up", 0.0), hidden.get("slope_down", 0.0)
    if isinstance(device, SoftBoundsReferenceDevice):
        upper, lower = hidden["max_bound"], hidden["min_bound"]
        slopes = -_quotient(up, upper, positive=True), -_quotient(down, lower, positive=False)
    reference = hidden.get("reference", 0.0)
    return (up + slopes[0] * reference, slopes[0]), (down + slopes[1] * reference, slopes[1])


def _highest(device: Any) -> float:
    """Return the largest step of a curved device in units of its parameter ``dw_min``."""
    if isinstance(device, PiecewiseStepDevice):
        return max(device.piecewise_up + device.piecewise_down)
    if not isinstance(device, ExpStepDevice):
        return 1.0
    ends = [2 * device.a * bound / (device.w_max - device.w_min) + device.b for bound in (device.w_min, device.w_max)]
    ups = (1 - device.A_up * exp(device.gamma_up * end) for end in ends)
    downs = (1 - device.A_down * exp(-device.gamma_down * end) for end in ends)
    return max(1.0, *ups, *downs)


def _exponential(device: Any, hidden: Mapping[str, Number]) -> tuple[_Curve, _Curve]:
    scale = 2 * device.a / _range(hidden)

    def up(weight: Tensor) -> Tensor:
        position = weight * scale + device.b
        return (1 - device.A_up * torch.exp(device.gamma_up * position)).clamp(min=0) * hidden["dwmin_up"]

    def down(weight: Tensor) -> Tensor:
        position = weight * scale + device.b
        return (1 - device.A_down * torch.exp(-device.gamma_down * position)).clamp(min=0) * hidden["dwmin_down"]

    return up, down


def _power(device: Any, hidden: Mapping[str, Number]) -> tuple[_Curve, _Curve]:
    lower, upper, length = hidden["min_bound"], hidden["max_bound"], _range(hidden)

    def up(weight: Tensor) -> Tensor:
        return ((upper - weight) / length).clamp(min=1e-6) ** hidden["gamma_up"] * hidden["dwmin_up"]

    def down(weight: Tensor) -> Tensor:
        return ((weight - lower) / length).clamp(min=1e-6) ** hidden["gamma_down"] * hidden["dwmin_down"]

    return up, down


def _piecewise(device: Any, hidden: Mapping[str, Number]) -> tuple[_Curve, _Curve]:
    def curve(nodes: Sequence[float], step: Number) -> _Curve:
        def interpolate(weight: Tensor) -> Tensor:
            values = weight.new_tensor([*nodes, nodes[-1]])
            position = (weight - hidden["min_bound"]) / _range(hidden) * (len(nodes) - 1)
            left = position.detach().floor().clamp(0, len(nodes) - 1).long()
            return torch.lerp(values[left], values[left + 1], position - left) * step

        return interpolate

    return curve(device.piecewise_up, hidden["dwmin_up"]), curve(device.piecewise_down, hidden["dwmin_down"])


def _range(hidden: Mapping[str, Number]) -> Number:
    """Return the width of every cross-point's range; 1 for a cross-point that is stuck."""
    length = hidden["max_bound"] - hidden["min_bound"]
    return torch.where(length > 0, length, 1.0) if isinstance(length, Tensor) else length or 1.0


def _compounded(step: Number, slope: Number, sign: int) -> tuple[Number, Number]:
    """Return the step and slope whose motion over one unit of time equals exactly one pulse."""
    slope = torch.as_tensor(slope, dtype=torch.float64)
    # A step that would go beyond the point where steps vanish ends at that point.
    rate = sign * torch.log1p((sign * slope).clamp(min=-1 + 1e-6))
    ratio = torch.where(slope == 0, 1.0, rate / slope)
    step = step * ratio
    step, rate = (value.float() if value.dim() else float(value) for value in (step, rate))
    return step, rate


def _quotient(step: Number, bound: Number, positive: bool) -> Number:
    """Return step/bound, or 0 where the bound is on the wrong side of zero."""
    bound = torch.as_tensor(bound)
    quotient = torch.where((bound > 0) if positive else (bound < 0), step / bound, 0.0)
    return quotient if quotient.dim() else float(quotient)


def _typical(value: Number) -> float:
    return float(torch.as_tensor(value).abs().median())


class _OfCounts:
    """The sum U·up + D·down as a function of the net and the total count. Terms that vanish are skipped."""

    def __init__(self, up: Number, down: Number) -> None:
        self.of_total = (up + down) * 0.5
        self.of_net = (up - down) * 0.5

    def column(self, index: int) -> "_OfCounts":
        part = copy(self)
        part.of_total, part.of_net = _column(self.of_total, index), _column(self.of_net, index)
        return part

    def __call__(self, counts: _Pair) -> Tensor:
        net, total = counts
        if _vanishes(self.of_total):
            return net * self.of_net
        return _add(total * self.of_total, net, self.of_net)

    def add_to(self, value: Tensor, counts: _Pair) -> Tensor:
        """Add the sum to ``value``, in place."""
        net, total = counts
        return _add(_add(value, total, self.of_total), net, self.of_net)


def _column(value: Number, index: int) -> Number:
    return value[:, index : index + 1] if isinstance(value, Tensor) and value.dim() else value


def _parameter(value: Number, width: int | None = None) -> Any:
    if isinstance(value, Tensor) and value.dim():
        return value.numpy()
    return np.float32(value) if width is None else np.full((1, width), float(value), np.float32)


def _vanishes(value: Number) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _add(value: Tensor, x: Tensor, coefficient: Number) -> Tensor:
    """Add coefficient·x to ``value``, in place."""
    if isinstance(coefficient, Tensor):
        return value.addcmul_(coefficient, x)
    return value if coefficient == 0 else value.add_(x, alpha=coefficient)
