"""This module defines an aihwkit tile with a crossbar in torch, whose cost does not grow with the number of pulses.

The module holds the crossbar, the tile around it, the array of tiles, and the configuration that selects these three.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from aihwkit.exceptions import TileError
from aihwkit.simulator.configs import SoftBoundsReferenceDevice, UpdateParameters
from aihwkit.simulator.configs.compounds import MixedPrecisionCompound, TransferCompound
from aihwkit.simulator.configs.devices import PulsedDevice
from aihwkit.simulator.tiles.array import TileModuleArray
from aihwkit.simulator.tiles.base import SimulatorTile, SimulatorTileWrapper
from aihwkit.simulator.tiles.custom import CustomRPUConfig, CustomTile
from aihwkit.simulator.tiles.module import TileModule
from aihwkit.simulator.tiles.periphery import TileWithPeriphery
from torch import Tensor, nn

from aimc_pl.devices.mean_field.converters import (
    acts_as_noise,
    has_bound_management,
    has_row_product,
    input_scale,
    is_perfect,
    never_exceeds,
    noisy_convolution,
    noisy_transposed_convolution,
    product,
    row_product,
)
from aimc_pl.devices.mean_field.crossbar import ROWS, Crossbar
from aimc_pl.devices.mean_field.random_table import TableGenerator
from aimc_pl.devices.mean_field.vectors import Convolution, Gathered, Patches, Vectors
from aimc_pl.devices.private_aihwkit import RecreatedQuietly


class MeanFieldSimulatorTile(SimulatorTile, nn.Module):
    """A tile with one crossbar of pulsed devices, which moves its weights by pulses.

    All random numbers come from the tile's own generator, which is seeded from torch's.

    Args:
        x_size: number of inputs.
        d_size: number of outputs.
        rpu_config: the configuration of converters, devices and pulse trains.
    """

    def __init__(self, x_size: int, d_size: int, rpu_config: "MeanFieldRPUConfig") -> None:
        nn.Module.__init__(self)
        self.x_size = x_size
        self.d_size = d_size
        self.learning_rate = 0.1
        self.set_config(rpu_config)
        self._generator = TableGenerator().manual_seed(int(torch.randint(2**62, ())))
        self.crossbar = self._make_crossbar(rpu_config.device)

    def _make_crossbar(self, device: Any) -> Crossbar:
        return Crossbar(self.x_size, self.d_size, device, self._config.sample_pulses, self._generator)

    @property
    def crossbars(self) -> Sequence[Crossbar]:
        """All crossbars of the tile. Gradients move the first."""
        return [self.crossbar]

    @property
    def _weight(self) -> Tensor:
        """The weights of the products, ``(out, in)``. They keep their memory."""
        return self.crossbar.weight

    def set_config(self, rpu_config: "MeanFieldRPUConfig") -> None:
        """Use the converters and pulse trains of another configuration of the same device."""
        self._config = rpu_config

    def forward(
        self,
        x_input: Tensor,
        bias: bool = False,
        in_trans: bool = False,
        out_trans: bool = False,
        is_test: bool = False,
        non_blocking: bool = False,
    ) -> Tensor:
        """Return the crossbar's products ``(..., out)`` with input vectors ``(..., in)``."""
        io = self._config.forward
        x_input = _with_ones(x_input) if bias else x_input
        return self._product(self._weight, x_input, ROWS, io, has_bound_management(io))

    def backward(
        self,
        d_input: Tensor,
        bias: bool = False,
        in_trans: bool = False,
        out_trans: bool = False,
        non_blocking: bool = False,
    ) -> Tensor:
        """Return the transposed products ``(..., in)`` with errors ``(..., out)``, the gradients of the outputs."""
        weight = self._weight[:, :-1] if bias else self._weight
        return self._product(weight.T, d_input, ROWS, self._config.backward, False)

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x_input: Tensor,
        d_input: Tensor,
        bias: bool = False,
        in_trans: bool = False,
        out_trans: bool = False,
        non_blocking: bool = False,
    ) -> None:
        """Send update pulses to the cross-points, for inputs ``(..., in)`` and errors ``(..., out)``."""
        x_input = _with_ones(x_input) if bias else x_input
        self._update(x_input.reshape(-1, self.x_size), d_input.reshape(-1, self.d_size), ROWS)

    def forward_patches(self, images: Tensor, patches: Patches) -> Tensor:
        """Return the convolution ``(batch, out, *out_size)`` of images."""
        io = self._config.forward
        if is_perfect(io):
            return _times(patches.multiply(self._weight, images), io.out_scale)
        if isinstance(patches, Convolution) and acts_as_noise(self._weight, io):
            y = noisy_convolution(self._weight, images, patches, io, self._generator)
            if y is not None:
                return y
        scale = input_scale(images, patches, io)
        size = patches.out_size(images)
        y = product(
            self._weight,
            lambda gain: patches.columns(images, gain.unflatten(2, size) if isinstance(gain, Tensor) else gain),
            Vectors(1),
            scale.flatten(2) if isinstance(scale, Tensor) else scale,
            io,
            self._generator,
            has_bound_management(io),
        )
        return y.unflatten(2, size)

    def backward_patches(self, error: Tensor, images: Tensor, patches: Patches) -> Tensor:
        """Return the errors of the images, given the errors of the convolution's outputs."""
        io = self._config.backward
        if is_perfect(io):
            return _times(patches.multiply_transposed(self._weight, error, images), io.out_scale)
        if isinstance(patches, Convolution) and acts_as_noise(self._weight.T, io) and never_exceeds(self._weight.T, io):
            return noisy_transposed_convolution(self._weight, error, images, patches, io, self._generator)
        columns = self._product(self._weight.T, error.flatten(2), Vectors(1), io, False)
        return patches.fold(columns, images)

    def update_patches(self, images: Tensor, error: Tensor, patches: Patches, num_images: int | None = None) -> None:
        """Send update pulses to the cross-points, for the patches of images and the errors of the outputs.

        Args:
            images: ``(batch, channels, *size)``.
            error: ``(batch, out, *out_size)``.
            patches: how the images make vectors.
            num_images: the number of images of the whole update, if there are more than these.
        """
        self._update(images, error, patches, num_images)

    def decay(self) -> None:
        """Let the weights leak, as once per mini-batch, if the devices have a lifetime."""
        for crossbar in self.crossbars:
            crossbar.decay()

    def get_weights(self, as_ref: bool = False) -> Tensor:
        """Return the weights ``(out, in)``: a copy on the CPU, or with ``as_ref`` the tensor itself."""
        return self._weight if as_ref else self._weight.detach().cpu().clone()

    def set_weights(self, weight: Tensor) -> None:
        """Program the weights, clipped to the bounds of the cross-points."""
        self.crossbar.write(weight)

    def get_x_size(self) -> int:
        """Return the number of inputs."""
        return self.x_size

    def get_d_size(self) -> int:
        """Return the number of outputs."""
        return self.d_size

    def get_brief_info(self) -> str:
        """Return a description of the tile in one line."""
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        """Return the tile's size, the class of its analog device, and its torch device."""
        return f"{self.d_size}, {self.x_size}, {type(self._config.device).__name__}, {self._weight.device}"

    def get_hidden_parameter_names(self) -> list[str]:
        """Return aihwkit's names of the cross-points' parameters."""
        return self.crossbar.names

    def get_hidden_parameters(self) -> Tensor:
        """Return the cross-points' parameters ``(names, out, in)``, or ``(names, 1, 1)`` if all are equal."""
        return self.crossbar.hidden.clone()

    def set_hidden_parameters(self, params: Tensor) -> None:
        """Replace the cross-points' parameters."""
        self.crossbar.hidden = params.to(self.crossbar.hidden, copy=True)

    def get_learning_rate(self) -> float:
        """Return the learning rate of :meth:`update`."""
        return self.learning_rate

    def set_learning_rate(self, learning_rate: float | None) -> None:
        """Set the learning rate of :meth:`update`."""
        if learning_rate is not None:
            self.learning_rate = float(learning_rate)

    def dump_extra(self) -> dict[str, Any]:
        """Return the state beyond weights and parameters that a resumed run needs to be equal bit for bit."""
        return {"generator": self._generator.get_state()} | self.crossbar.extra()

    def load_extra(self, extra: dict[str, Any], strict: bool = False) -> None:
        """Restore the state that :meth:`dump_extra` returned."""
        self._generator.set_state(extra["generator"].cpu())
        self.crossbar.load_extra(extra)

    def _product(self, weight: Tensor, x: Tensor, vectors: Vectors, io: Any, bound_management: bool) -> Tensor:
        if is_perfect(io):
            return _times(vectors.multiply(weight, x), io.out_scale)
        if vectors is ROWS and has_row_product(weight, x, io):
            return row_product(weight, x, io, self._generator, bound_management)
        return product(weight, x.mul, vectors, input_scale(x, vectors, io), io, self._generator, bound_management)

    def _update(self, x: Tensor, error: Tensor, vectors: Vectors | Patches, num_samples: int | None = None) -> None:
        """Move the weights by vectors and their errors: all of an update, or a part of its ``num_samples``."""
        self.crossbar.pulse(x, error, vectors, self.learning_rate, self._config.update)


class MeanFieldTile(RecreatedQuietly, CustomTile):
    """A tile for aihwkit's layers, around a :class:`MeanFieldSimulatorTile`.

    The attribute ``convolution`` describes the convolution of the layer. Without it, the tile unfolds images by the
    layer's table of indices.

    Args:
        out_size: number of outputs.
        in_size: number of inputs.
        rpu_config: see :class:`MeanFieldRPUConfig`.
        bias: whether there is a bias. The configuration's mapping says whether it is on the crossbar or digital.
        in_trans: not supported.
        out_trans: not supported.
    """

    supports_indexed = True
    convolution: Convolution | None = None
    patches: Patches

    def __init__(
        self,
        out_size: int,
        in_size: int,
        rpu_config: "MeanFieldRPUConfig",
        bias: bool = False,
        in_trans: bool = False,
        out_trans: bool = False,
    ) -> None:
        if in_trans or out_trans:
            raise TileError("transposed inputs and outputs are not supported")
        # CustomTile's own constructor refuses analog bias.
        TileModule.__init__(self)
        SimulatorTileWrapper.__init__(self, out_size, in_size, rpu_config, bias)  # pyright: ignore[reportArgumentType]
        TileWithPeriphery.__init__(self)

    # Dynamo cannot trace aihwkit's context parameter. The code around the tile can still be compiled.
    @torch.compiler.disable
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x_input: Tensor, tensor_view: tuple[int, ...] | None = None
    ) -> Tensor:
        """Return the outputs for vectors ``(..., in)`` or images, in float32 under autocast too."""
        with torch.autocast(x_input.device.type, enabled=False):
            return super().forward(x_input.float(), tensor_view)

    def set_indexed(self, indices: Tensor, image_sizes: Sequence[int]) -> None:
        """Compute on images from now on (called by aihwkit's convolutions)."""
        # With an analog bias, aihwkit's table has one row of ones per channel, of which one is used.
        gathered = Gathered(indices, tuple(image_sizes)).part(0, self.tile.x_size)
        self.compute_on(self.convolution or gathered)

    def compute_on(self, patches: Patches) -> None:
        """Take images instead of vectors from now on, with their ``patches`` as input vectors."""
        self.patches = patches
        self.analog_ctx.set_indexed()

    def is_indexed(self) -> bool:
        """Return whether the tile computes on images."""
        return self.analog_ctx.use_indexed

    @torch.no_grad()
    def joint_forward_indexed(self, x_input: Tensor, is_test: bool = False, ctx: Any = None) -> Tensor:
        """Return the convolution ``(batch, out, *out_size)`` of images ``(batch, channels, *size)``."""
        x_input = self.pre_forward(x_input, 1, is_test, ctx)
        return self.post_forward(self.tile.forward_patches(x_input, self.patches), 1, is_test, ctx)

    def backward(self, d_input: Tensor, ctx: Any = None) -> Any:
        """Return the errors of the inputs, given those of the outputs, or ``None`` if nothing needs them."""
        return super().backward(d_input, ctx) if self._needs_errors(ctx) else None

    def backward_indexed(self, d_input: Tensor, ctx: Any = None) -> Any:
        """Return the errors of the images, given those of the convolution, or ``None`` if nothing needs them."""
        if not self._needs_errors(ctx):
            return None
        d_input = self.pre_backward(d_input, 1, ctx)
        d_output = self.tile.backward_patches(d_input, ctx.saved_analog_tensors[0], self.patches)
        return self.post_backward(d_output, 1, ctx)

    def _needs_errors(self, ctx: Any) -> bool:
        return ctx is None or ctx.needs_input_grad[2] or self.input_range is not None

    @torch.no_grad()
    def update_indexed(self, x_input: Tensor, d_input: Tensor) -> None:
        """Update the weights with images and the errors of their convolution."""
        x_input, d_input = self.pre_update(x_input, 1, d_input, 1)
        # aihwkit's optimizers call this method for each micro-batch of an update.
        num_images = sum(map(len, self.analog_ctx.analog_input))
        self.tile.update_patches(x_input, d_input, self.patches, max(num_images, len(x_input)))

    @torch.no_grad()
    def update(self, x_input: Tensor, d_input: Tensor) -> None:
        """Update the weights with inputs ``(..., in)`` and errors ``(..., out)``."""
        super().update(x_input, d_input)

    @torch.no_grad()
    def move_to(self, weight: Tensor) -> None:
        """Move the weights on the crossbar, without an analog bias, to other ones ``(out, in)``.

        They are clipped to the bounds of the cross-points. Write noise stays on top of them.
        """
        crossbar = self.tile.crossbar
        bias = crossbar.weight[:, weight.shape[1] :]
        crossbar.move_to(torch.cat([weight.to(bias), bias], 1))

    @torch.no_grad()
    def post_update_step(self) -> None:
        """Let the weights leak (called by aihwkit's optimizers, once per step)."""
        self.tile.decay()

    def __getstate__(self) -> dict[str, Any]:
        # aihwkit creates the crossbar again, from the configuration and the rest of the state.
        state = super().__getstate__()
        return state | {"_modules": {name: m for name, m in state["_modules"].items() if name != "tile"}}


class MeanFieldTileArray(TileModuleArray):
    """aihwkit's array of tiles, for a layer that is too large for one crossbar. This array can take images too.

    For the attribute ``convolution`` see :class:`MeanFieldTile`.

    Args:
        out_size: number of outputs of the whole array.
        in_size: number of inputs of the whole array.
        rpu_config: the configuration of each tile.
        bias: whether there is a bias, which is digital.
    """

    supports_indexed = True
    analog_bias = False
    convolution: Convolution | None = None

    def set_indexed(self, indices: Tensor, image_sizes: Sequence[int]) -> None:
        """Compute on images from now on (called by aihwkit's convolutions)."""
        self.compute_on(self.convolution or Gathered(indices, tuple(image_sizes)))

    def compute_on(self, patches: Patches) -> None:
        """Take images instead of vectors from now on, with their ``patches`` as input vectors."""
        start = 0
        for size, tiles in zip(self.in_sizes, self._tiles, strict=True):
            for tile in tiles:
                tile.compute_on(patches.part(start, start + size))
            start += size

    @property
    def is_cuda(self) -> bool:
        """Whether the tiles are on a GPU (read by aihwkit's convolutions)."""
        return self._tiles[0][0].is_cuda

    def is_indexed(self) -> bool:
        """Return whether the tiles compute on images."""
        return all(tile.is_indexed() for tiles in self._tiles for tile in tiles)

    def forward(self, x_input: Tensor, tensor_view: tuple[int, ...] | None = None) -> Tensor:
        """Return the outputs of the whole array for vectors ``(..., in)`` or images ``(batch, channels, *size)``."""
        if not self.is_indexed():
            return super().forward(x_input, tensor_view)
        y = sum(torch.cat([tile(x_input, tensor_view=tensor_view) for tile in tiles], 1) for tiles in self._tiles)
        assert isinstance(y, Tensor)
        assert tensor_view is not None
        return y if self.bias is None else y + self.bias.view(tensor_view)

    @property
    def _tiles(self) -> Sequence[Sequence[MeanFieldTile]]:
        tiles: Any = self.array
        return tiles


@dataclass
class MeanFieldRPUConfig(CustomRPUConfig):
    """A crossbar of pulsed devices whose updates are computed from the numbers of pulses, not pulse by pulse."""

    tile_class: type = MeanFieldTile
    simulator_tile_class: type = MeanFieldSimulatorTile
    tile_array_class: type = MeanFieldTileArray

    device: PulsedDevice | TransferCompound | MixedPrecisionCompound = field(default_factory=SoftBoundsReferenceDevice)
    """One of aihwkit's step devices, or a compound of such devices, with all parameters."""

    # In CustomRPUConfig, this field holds the parameters of updates without pulses.
    update: UpdateParameters = field(default_factory=UpdateParameters)  # pyright: ignore[reportIncompatibleVariableOverride]
    """The parameters of pulse trains and of their management."""

    sample_pulses: bool = False
    """Whether pulse trains are drawn and their coincidences counted, instead of using the counts' mean and variance."""


def _times(y: Tensor, scale: float) -> Tensor:
    return y if scale == 1 else y * scale


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)
