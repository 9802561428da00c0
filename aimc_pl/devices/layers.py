"""This module converts a layer to an analog one and back.

Its analog layers are aihwkit's, with a ``weight`` and a ``bias`` that can be read as those of a digital layer. Code
that computes with them or writes to them would bypass the tile, so this is refused.
"""

from collections.abc import Callable
from copy import deepcopy
from math import nan
from typing import Any

import aihwkit.nn
import torch
from aihwkit.nn import conversion
from aihwkit.nn.modules.base import AnalogLayerBase
from aihwkit.simulator.parameters.base import RPUConfigBase
from torch import Tensor, nn

from aimc_pl.devices.private_aihwkit import convert_to_digital_too
from aimc_pl.errors import UsageError
from aimc_pl.private_torch import tree_leaves, without_subclass_functions

_SHAPE = {"shape", "size", "ndim", "dim", "ndimension", "numel", "nelement", "__len__"}
_TYPE = {"dtype", "layout", "element_size", "device", "get_device", "requires_grad", "grad", "grad_fn", "__hash__"}
_COPY = {"detach", "clone", "cpu", "numpy", "tolist", "__array__", "__deepcopy__", "__reduce_ex__"}
_PRINT = {"__repr__", "__format__", "is_contiguous", "stride"}
_COMPARE = {"__eq__", "__ne__", "eq", "ne", "equal", "isclose", "allclose"}


class AnalogWeight(Tensor):
    """A read-only view of the weight or bias of an analog layer.

    The values are read from the tile when code copies, prints or compares the view. Code that computes with the view or
    writes to it would bypass the tile and is refused. This holds without gradients too, because validation would
    otherwise be digital.
    """

    _owner: "ReadableLayer"
    _read: Callable[[], Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func`` if it only reads values or metadata, and refuse it otherwise."""
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        if name in _COPY | _PRINT | _COMPARE:
            return func(*map(_values, args), **{key: _values(value) for key, value in (kwargs or {}).items()})
        if _asks_for_metadata(name) or (name in ("to", "type_as") and not isinstance(args[0], AnalogWeight)):
            with without_subclass_functions():
                return func(*args, **(kwargs or {}))
        layer = next(x._owner.name for x in tree_leaves((args, kwargs)) if isinstance(x, AnalogWeight))
        if name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__")):
            raise _no_writing(layer)
        raise UsageError(
            f"{name}() computes with the weight of analog layer {layer!r} instead of calling the layer: keep it "
            f"digital with device={{..., {layer!r}: None}} (or a pattern), or use a copy, layer.weight.detach()"
        )

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride], read only here
        """The view itself, so that writing to ``weight.data`` is refused too."""
        return self


class ReadableLayer(AnalogLayerBase):
    """Mixin that gives an analog layer a ``weight`` and a ``bias`` in the shapes of the digital layer.

    Both are read-only views of the tile, and no parameters. A digital bias is an exception: ``bias`` then returns the
    tile's parameter.
    """

    name: str
    in_features: int
    out_features: int
    analog_module: Any

    weight: Any = property(lambda self: self._view(self._layout, 0, self.out_features, self.in_features))
    bias: Any = property(lambda self: self._bias())

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise _no_writing(self.name)
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Program the tile with new initial values, drawn as the digital layer draws them."""
        layer: Any = self
        digital = layer.to_digital(layer)
        digital.reset_parameters()
        self.set_weights(digital.weight, digital.bias)

    def _bias(self) -> Tensor | None:
        if getattr(self.analog_module, "analog_bias", False):
            return self._view(lambda bias: bias, 1, self.out_features)
        return self.analog_module.bias

    def _layout(self, matrix: Tensor) -> Tensor:
        """Return the tile's matrix ``(out, in)`` in the layout of the digital layer's weight."""
        return matrix

    def _view(self, layout: Callable[[Tensor], Tensor], part: int, *shape: int) -> AnalogWeight:
        layer: Any = self
        context = next(layer.analog_tiles()).analog_ctx
        # The expanded NaN takes no memory, and exposes any code that gets past the guard.
        values = torch.full((), nan, dtype=context.dtype, device=context.device).expand(shape)
        view = layout(values).as_subclass(AnalogWeight)
        view._owner = self
        view._read = lambda: layout(layer.get_weights()[part]).to(context.device)
        return view


class AnalogLinear(ReadableLayer, aihwkit.nn.AnalogLinear):
    """An analog linear layer with a readable weight and bias."""


class AnalogLinearTransposed(AnalogLinear):
    """An analog linear layer whose digital layer has a weight ``(in, out)``, as GPT-2's layers in transformers have."""

    def _layout(self, matrix: Tensor) -> Tensor:
        return matrix.T


class _ReadableConv(ReadableLayer):
    in_channels: int
    kernel_size: tuple[int, ...]

    def _layout(self, matrix: Tensor) -> Tensor:
        return matrix.view(-1, self.in_channels, *self.kernel_size)


class AnalogConv1d(_ReadableConv, aihwkit.nn.AnalogConv1d):
    """An analog 1D convolution with a readable weight and bias."""


class AnalogConv2d(_ReadableConv, aihwkit.nn.AnalogConv2d):
    """An analog 2D convolution with a readable weight and bias."""


class AnalogConv3d(_ReadableConv, aihwkit.nn.AnalogConv3d):
    """An analog 3D convolution with a readable weight and bias."""


_READABLE = {
    base: cls for cls in (AnalogLinear, AnalogConv1d, AnalogConv2d, AnalogConv3d) for base in cls.__bases__[1:]
}
convert_to_digital_too([*_READABLE.values(), AnalogLinearTransposed])


def is_transposed_linear(layer: nn.Module) -> bool:
    """Return whether a layer is the linear layer that transformers calls Conv1D. Its weight is transposed."""
    return (type(layer).__module__, type(layer).__name__) == ("transformers.pytorch_utils", "Conv1D")


def to_analog(layer: Any, rpu_config: RPUConfigBase, name: str) -> Any:
    """Convert a digital layer to an analog layer with the same weights.

    Args:
        layer: a Linear or Conv layer, or the Conv1D of transformers.
        rpu_config: the configuration of the layer's tiles.
        name: how messages name the layer.

    Raises:
        UsageError: if aihwkit's tiles for the configuration cannot compute the layer.
    """
    transposed = is_transposed_linear(layer)
    analog: Any = conversion.convert_to_analog(
        _transposed(layer) if transposed else layer, rpu_config, ensure_analog_root=False
    )
    tile = analog.analog_module
    if getattr(analog, "NEEDS_INDEXED", False) and not tile.supports_indexed:
        raise UsageError(
            f"{type(layer).__name__} {name!r} cannot be analog on {type(tile).__name__}, which takes no images: keep "
            "it digital, or use another device, such as soft_bounds"
        )
    analog.__class__ = AnalogLinearTransposed if transposed else _READABLE[type(analog)]
    analog.name = name
    return analog.train(layer.training)


def to_digital_layer(layer: Any) -> Any:
    """Return a digital layer with the weights of an analog layer.

    Raises:
        UsageError: if there is no digital layer that computes the same. See :func:`aimc_pl.export.to_digital`.
    """
    name = getattr(layer, "name", type(layer).__name__)
    if not hasattr(layer, "to_digital"):
        raise UsageError(f"analog layer {name!r} cannot be digital: aihwkit has no digital layer for its class")
    tiles = [*layer.analog_tiles()]
    if any(map(_scales_outputs, tiles)):
        raise UsageError(
            f"analog layer {name!r} scales its outputs apart from its weights (out_scale, or a compensation of drift), "
            "which a digital layer does not do: convert the layer before it drifts, and set out_scale=1"
        )
    with torch.random.fork_rng(devices=[]):  # a new layer draws initial weights
        # The copy is needed because a digital bias would be that of the analog layer.
        digital = deepcopy(layer.to_digital(layer))
        digital = _untransposed(digital) if isinstance(layer, AnalogLinearTransposed) else digital
    return digital.train(layer.training).requires_grad_(any(tile.analog_ctx.requires_grad for tile in tiles))


def _scales_outputs(tile: Any) -> bool:
    config = tile.rpu_config
    is_compensated = getattr(config, "drift_compensation", None) is not None and bool((tile.alpha != 1).any())
    return is_compensated or getattr(getattr(config, "forward", None), "out_scale", 1.0) != 1.0


def _untransposed(linear: nn.Linear) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight = nn.Parameter(linear.weight.detach().T.contiguous())
    layer.bias = linear.bias
    return layer


def _transposed(layer: Any) -> nn.Linear:
    linear = nn.Linear(*layer.weight.shape, bias=layer.bias is not None, device="meta")
    linear.weight, linear.bias = nn.Parameter(layer.weight.detach().T), layer.bias
    return linear


def _no_writing(layer: str) -> UsageError:
    return UsageError(f"analog layer {layer!r} has its weight on a tile: write the weight with layer.set_weights()")


def _asks_for_metadata(name: str) -> bool:
    return name in _SHAPE | _TYPE or name.startswith(("is_", "new_")) or name.endswith("_like")


def _values(value: Any) -> Any:
    return value._read() if isinstance(value, AnalogWeight) else value
