"""The tile in this module trains in mixed precision: products are analog, gradients and optimizers are digital.

The tile has a torch parameter of its own, ``shared_weights``, which shows the weights of the crossbar. Its gradient is
δᵀx, computed digitally, so that any torch optimizer can make a step with it. After the step, the change of the
parameter is added to a digital residual H. Cross-points get as many pulses as H contains whole steps of the device,
these are subtracted from H, and the parameter shows the weights of the crossbar again (Le Gallo et al., Nature
Electronics 2018; Nandakumar et al., Front. Neurosci. 2020).
"""

from typing import Any

import torch
from torch import Tensor, nn

from aimc_pl.devices.mean_field.crossbar import Crossbar
from aimc_pl.devices.mean_field.tile import MeanFieldRPUConfig, MeanFieldSimulatorTile, MeanFieldTile
from aimc_pl.devices.mean_field.vectors import Patches, Vectors
from aimc_pl.errors import UsageError
from aimc_pl.private_torch import version


class MixedPrecisionSimulatorTile(MeanFieldSimulatorTile):
    """A crossbar whose cross-points are programmed one by one, by whole numbers of pulses.

    Args:
        x_size: number of inputs.
        d_size: number of outputs.
        rpu_config: the configuration, whose device is a ``MixedPrecisionCompound``.

    Attributes:
        gradients: the sum of all δᵀx ``(out, in)`` of the last :meth:`update`, until it is learned.
    """

    _residual: Tensor

    def __init__(self, x_size: int, d_size: int, rpu_config: MeanFieldRPUConfig) -> None:
        super().__init__(x_size, d_size, rpu_config)
        self.gradients: list[Tensor] = []
        self.register_buffer("_residual", torch.zeros(d_size, x_size), persistent=False)

    def _make_crossbar(self, device: Any) -> Crossbar:
        return Crossbar(self.x_size, self.d_size, device.device, True, self._generator)

    def program(self, shown: Tensor, scales: Tensor | None) -> None:
        """Add the changes of a tensor that shows the weights to the residual, and send the whole steps in it as pulses.

        For the arguments see :meth:`Crossbar.program`.
        """
        self.crossbar.program(self._residual, shown, scales)

    def get_weights(self, as_ref: bool = False) -> Tensor:
        """Return a copy of the weights ``(out, in)`` on the CPU.

        With ``as_ref``, nothing is returned: aihwkit's context must not be a second parameter with the same weights.
        """
        return self._weight.new_empty(0) if as_ref else super().get_weights()

    def dump_extra(self) -> dict[str, Any]:
        """See :meth:`MeanFieldSimulatorTile.dump_extra`."""
        return super().dump_extra() | {"residual": self._residual.clone()}

    def load_extra(self, extra: dict[str, Any], strict: bool = False) -> None:
        """See :meth:`MeanFieldSimulatorTile.load_extra`."""
        super().load_extra(extra, strict)
        self._residual.copy_(extra["residual"])

    def _update(self, x: Tensor, error: Tensor, vectors: Vectors | Patches, num_samples: int | None = None) -> None:
        self.gradients[:] = [vectors.outer(error, x)]


class MixedPrecisionTile(MeanFieldTile):
    """A tile for aihwkit's layers, around a :class:`MixedPrecisionSimulatorTile`.

    An optimizer trains the parameter ``shared_weights``: the weights of the layer, with the scales of aihwkit's mapping
    and with an analog bias as the last column. Steps reach the crossbar if aihwkit's ``AnalogOptimizerMixin`` is a part
    of the optimizer's class, as after ``make_analog_aware``, which knows the tile by the parameter's ``shows_tile``.

    Args:
        out_size: number of outputs.
        in_size: number of inputs.
        rpu_config: the configuration, whose device is a ``MixedPrecisionCompound``.
        bias: see :class:`MeanFieldTile`.
        in_trans: not supported.
        out_trans: not supported.
    """

    _gradient: Tensor | None = None
    """Where :meth:`update` leaves the gradient during a backward."""

    def __init__(
        self,
        out_size: int,
        in_size: int,
        rpu_config: MeanFieldRPUConfig,
        bias: bool = False,
        in_trans: bool = False,
        out_trans: bool = False,
    ) -> None:
        super().__init__(out_size, in_size, rpu_config, bias, in_trans, out_trans)
        self.shared_weights: Any = nn.Parameter(torch.zeros(self.tile.d_size, self.tile.x_size))
        self.shared_weights.shows_tile = self
        self._show()
        self.register_load_state_dict_post_hook(_show_loaded)

    @torch.compiler.disable
    def forward(self, x_input: Tensor, tensor_view: tuple[int, ...] | None = None) -> Tensor:
        """Return the outputs for vectors ``(..., in)`` or images.

        Raises:
            UsageError: if the parameter has been changed and the crossbar has not.
        """
        if version(self.shared_weights) != self._shown:
            if not torch.equal(self.shared_weights, self._weight):
                raise UsageError(
                    f"the weights of an analog layer {self.in_size}x{self.out_size} have been changed, but not on its "
                    "crossbar: call make_analog_aware(optimizer) for optimizers (not LBFGS), or layer.set_weights()"
                )
            self._shown = version(self.shared_weights)
        parent: Any = super()
        return parent.forward(x_input, tensor_view)

    @torch.no_grad()
    def post_update_step(self) -> None:
        """Program the change of the parameter into the crossbar, and let the weights leak.

        Optimizers call this after every step.
        """
        # Optimizers leave parameters without a gradient alone. Those of other processes have no memory here.
        if self.shared_weights.grad is not None:
            self._program()
            if self.tile.crossbar.leaks:
                super().post_update_step()
                self._show()

    def set_weights(self, *args: Any, **kwargs: Any) -> None:
        """Program new weights, clipped to the bounds of the cross-points. The residual stays."""
        super().set_weights(*args, **kwargs)
        self._show()

    def move_to(self, weight: Tensor) -> None:
        """See :meth:`MeanFieldTile.move_to`. The residual stays."""
        super().move_to(weight)
        self._show()

    def ensure_shared_weights(self, shared_weights: Tensor | None = None) -> None:
        """Do nothing (called by aihwkit before products): the crossbar has its own weights."""

    def set_delta_weights(self, delta_weights: Tensor) -> None:
        """Let the next update write the parameter's gradient to ``delta_weights`` (called by aihwkit in a backward)."""
        self._gradient = delta_weights

    def reset_delta_weights(self) -> None:
        """Let updates change weights again (called by aihwkit in a backward)."""
        self._gradient = None

    def pre_update(self, x_input: Tensor, x_dim: int, d_input: Tensor, d_dim: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and errors whose outer products are the gradient of the parameter."""
        return self.apply_input_range(x_input), d_input

    @torch.no_grad()
    def update(self, x_input: Tensor, d_input: Tensor) -> None:
        """Compute the gradient of the parameter. Outside of a backward, make a step of SGD with it."""
        super().update(x_input, d_input)
        self._learn()

    @torch.no_grad()
    def update_indexed(self, x_input: Tensor, d_input: Tensor) -> None:
        """Do the same as :meth:`update` with images and the errors of their convolution."""
        super().update_indexed(x_input, d_input)
        self._learn()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.shared_weights.shows_tile = self  # copies of parameters have no attributes
        self._show()

    @property
    def _scales(self) -> Tensor | None:
        """The scales of aihwkit's mapping, for every output or for all."""
        return None if self.mapping_scales is None else self.mapping_scales.view(-1, 1)

    @property
    def _weight(self) -> Tensor:
        """The weights that the parameter shows."""
        weight = self.tile.crossbar.weight
        return weight if self._scales is None else weight * self._scales

    def _program(self) -> None:
        self.tile.program(self.shared_weights, self._scales)
        self._shown = version(self.shared_weights)

    @torch.no_grad()
    def _show(self) -> None:
        self.shared_weights.copy_(self._weight)
        self._shown = version(self.shared_weights)

    def _learn(self) -> None:
        gradient = self.tile.gradients.pop()
        if self._gradient is not None:
            self._gradient.set_(gradient)
        else:
            self.shared_weights.sub_(gradient, alpha=self.tile.get_learning_rate())
            self._program()


def _show_loaded(tile: MixedPrecisionTile, incompatible_keys: Any) -> None:
    tile._show()
