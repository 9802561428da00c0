"""This module reads and writes weights, and reads gradients, alike for digital parameters and analog tiles."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aimc_pl.analog import analog_layers, is_analog, learns_by_pulses

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def weight_layers(module: nn.Module) -> dict[str, Any]:
    """Return the Linear and Conv layers of a module, digital or analog, by name."""
    return {
        str(name): layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or is_analog(layer)
    }


def has_hidden_weights(layer: Any) -> bool:
    """Return whether a layer's tiles hold more than the weights that can be read, which writing weights would erase.

    These are several crossbars, or on aihwkit's own tiles the weights without write noise.
    """
    return is_analog(layer) and any(map(_has_hidden_weights, layer.analog_tiles()))


def _has_hidden_weights(tile: Any) -> bool:
    from aimc_pl.devices.mean_field import MeanFieldTile  # this imports aihwkit, which only analog networks need

    device = tile.rpu_config.device
    noise = getattr(getattr(device, "device", device), "write_noise_std", 0.0)
    return hasattr(device, "unit_cell_devices") or (noise > 0 and not isinstance(tile, MeanFieldTile))


def read_weights(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return all weights in one vector.

    A tile's context, a parameter that stands for a tile, gives the tile's weights, unless these are a parameter too.
    """
    return torch.cat([_values(parameter).detach().flatten().float() for parameter in parameters])


def read_gradients(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the gradients of some of a module's parameters in one vector, as :func:`gradients_of` gives them."""
    return torch.cat([gradient.detach().flatten().float() for gradient in gradients_of(module, parameters)])


def gradients_of(module: nn.Module, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the gradients of some of a module's parameters.

    The gradient is zero where a parameter has none. For a tile's context, a parameter that stands for a tile, the
    gradient is the sum of δᵀx over the tile's pending pairs of an input x and an error δ.
    """
    layers = {id(tile.analog_ctx): layer for layer in analog_layers(module) for tile in layer.analog_tiles()}
    return [
        _pending_gradient(layers[id(parameter)], parameter)
        if is_analog(parameter)
        else (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for parameter in parameters
    ]


def _values(parameter: Any) -> Tensor:
    if not is_analog(parameter):
        return parameter
    # A tile returns a copy on the CPU.
    weights = parameter.analog_tile.get_weights()[0] if learns_by_pulses(parameter) else torch.empty(0)
    return weights.to(parameter.device)


def _pending_gradient(layer: Any, context: Any) -> Tensor:
    # This imports aihwkit, which only analog networks need.
    from aimc_pl.devices.mean_field import Convolution, MeanFieldTile

    total, tile = torch.zeros_like(_values(context)), context.analog_tile
    for x, error in zip(context.analog_input, context.analog_grad_output, strict=True):
        if not context.use_indexed:
            total += error.flatten(0, -2).T @ x.flatten(0, -2)
        elif isinstance(tile, MeanFieldTile):
            total += tile.patches.outer(error, x)[:, : total.shape[1]]  # without the column of an analog bias
        else:
            convolution = Convolution(layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            total += convolution.outer(error, x)
    return total


def move_weight(layer: Any, weight: Tensor) -> None:
    """Set a layer's weight, in the shape that :func:`layer_weight` gives, and leave all else as it is.

    A tile clips the weight to its devices' bounds. It keeps the scales of aihwkit's mapping, and a mean-field tile also
    keeps its write noise on top of the weight.
    """
    if not is_analog(layer):
        with torch.no_grad():
            layer.weight.copy_(weight)
        return
    from aimc_pl.devices.mean_field import MeanFieldTile

    for tile, part in _of_tiles(layer, weight.reshape(len(weight), -1)):
        scales = tile.get_scales()
        raw = part if scales is None else part / scales.view(-1, 1).to(part)
        if isinstance(tile, MeanFieldTile):
            tile.move_to(raw)
        else:
            tile.set_weights(raw, tile.get_weights()[1], apply_weight_scaling=False)


def _of_tiles(layer: Any, weight: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """Yield the tiles of a layer, each with its part of a weight ``(out, in)``."""
    tiles = layer.analog_module
    if not hasattr(tiles, "array"):
        yield tiles, weight
        return
    for column, columns in zip(tiles.array, weight.split(tiles.in_sizes, 1), strict=True):
        yield from zip(column, columns.split(tiles.out_sizes), strict=True)


def layer_weight(layer: Any) -> Tensor:
    """Return a copy of a layer's weight, on the layer's device."""
    if is_analog(layer):
        return layer.get_weights()[0].detach().to(next(layer.analog_tiles()).device)
    return layer.weight.detach().clone()


def product(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Return the output of a Linear or Conv layer for the input ``x``, with another weight and without bias."""
    if not hasattr(layer, "kernel_size"):
        return F.linear(x, weight)
    weight = weight.view(layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    convolution = _CONVOLUTIONS[len(layer.kernel_size) - 1]
    return convolution(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
