"""This module makes plain modules from modules with analog layers, for export or for other hardware."""

from copy import deepcopy

from aihwkit.nn.modules.container import AnalogSequential, AnalogWrapper
from torch import nn

from aimc_pl.analog import analog_layers
from aimc_pl.arguments import check_instance
from aimc_pl.devices.layers import to_digital_layer


def to_digital[M: nn.Module](module: M) -> M:
    """Return a copy of a module with digital layers in place of analog ones. The module itself is not changed.

    A digital layer has the weights with which the analog layer computes: scaled by the mapping, assembled from all
    tiles of an array, and added up from all crossbars of a training algorithm (W + γP for residual learning). The
    outputs of the copy differ from the module's by what the converters do: noise, rounding and clipping. With perfect
    converters they are equal, but for the rounding of float32.

    Weights are copied, and not measured through the converters as hardware would have to.

    Args:
        module: any module, such as a LightningModule after a fit. A copy of a LightningModule has no trainer.

    Raises:
        UsageError: if ``module`` is no module, if aihwkit gives no digital layer for an analog one, or if a layer
            scales its outputs apart from its weights, with ``out_scale`` of its converters or with a compensation of
            drift.
    """
    check_instance("module", module, nn.Module, "a torch.nn.Module")
    # A layer that is already in the memo of the copy is not copied itself.
    copy = deepcopy(module, {id(layer): to_digital_layer(layer) for layer in analog_layers(module)})
    for part in copy.modules():
        if type(part) is AnalogSequential or isinstance(part, AnalogWrapper):
            # aihwkit makes the class of a container from one of its own and the digital one.
            part.__class__ = type(part).__bases__[1]
    return copy
