"""Digital layers to analog ones, and optimizers that know how to update them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from fnmatch import fnmatchcase
from types import new_class
from typing import Any

from aihwkit.nn import conversion
from aihwkit.nn.modules.base import AnalogLayerBase
from aihwkit.optim.analog_optimizer import AnalogOptimizerMixin
from aihwkit.optim.context import AnalogContext
from aihwkit.simulator.parameters.base import RPUConfigBase
from torch import Tensor, nn
from torch.optim import Optimizer

from aimc_pl.devices.catalogue import DEVICES, AnalogDevice
from aimc_pl.devices.mean_field import Convolution, MeanFieldTile, MeanFieldTileArray
from aimc_pl.errors import UsageError

Device = str | AnalogDevice | RPUConfigBase
DeviceSpec = str | AnalogDevice | Mapping[str | int, Device | None] | RPUConfigBase | None

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def get_device(device: Device) -> RPUConfigBase:
    """The aihwkit configuration of a device, given by name (with its defaults), as itself or as configuration.

    Raises:
        UsageError: if no device has that name, or it is none of these.
    """
    if isinstance(device, str) and device in DEVICES:
        device = DEVICES[device]()
    rpu_config = device.rpu_config if isinstance(device, AnalogDevice) else device
    if not isinstance(rpu_config, RPUConfigBase):
        raise UsageError(f"unknown device {device!r}: choose one of {', '.join(DEVICES)}, or pass an aihwkit RPUConfig")
    return deepcopy(rpu_config)


def convert_to_analog(network: nn.Module, device: DeviceSpec, split_at: Sequence[str] | None = None) -> list[str]:
    """Replace the network's Linear and Conv layers in place by aihwkit's, with the same weights.

    Layers that are analog already stay as they are.

    Args:
        network: names of its parameters stay; each layer gets tiles of its own.
        device: for all layers, or a mapping from patterns of layer names (``"layer4.*"``) and stage numbers to
            devices; the last match wins, ``None`` and layers without a match stay digital.
        split_at: names of the modules with which stages 1 … M−1 begin, to know a layer's stage by.

    Returns:
        The names of the layers that have been converted.

    Raises:
        UsageError: for an unknown device, a key that matches no layer, a network without layers, tied weights.
    """
    stages = _stages_of_layers(network, split_at or ())
    if not stages:
        raise UsageError(f"device= has nothing to convert: {type(network).__name__} has no Linear or Conv layer")
    choices = device if isinstance(device, Mapping) else {"*": device}
    if any(isinstance(key, int) for key in choices) and split_at is None:
        raise UsageError("a device per stage needs split_at, the names of the modules with which the stages begin")
    chosen: dict[str, Device | None] = {}
    for key, value in choices.items():
        matches = [n for n, stage in stages.items() if stage == key or fnmatchcase(n, str(key))]
        if not matches:
            raise UsageError(
                f"device key {key!r} matches no layer: the layers are {', '.join(stages)} (if it was meant as an "
                "argument of a device, see aimc-pl devices for the values it takes)"
            )
        chosen.update(dict.fromkeys(matches, value))
    analog = {
        name: get_device(value)
        for name, value in chosen.items()
        if value is not None and type(network.get_submodule(name)) in _LAYERS
    }
    _check_untied(network, analog)
    for name, rpu_config in analog.items():
        parent, _, child = name.rpartition(".")
        if getattr(network.get_submodule(name), "groups", 1) != 1:
            raise UsageError(
                f"layer {name!r} is a grouped convolution, for which aihwkit has no tiles: keep it digital"
            )
        layer = conversion.convert_to_analog(network.get_submodule(name), rpu_config, ensure_analog_root=False)
        _compute_on_images(layer)
        # Tiles compute in float32, also where autocast makes a digital layer before them send less.
        layer.register_forward_pre_hook(_to_float32)
        setattr(network.get_submodule(parent), child, layer)
    return list(analog)


def analog_layers(module: nn.Module) -> list[AnalogLayerBase]:
    """The analog layers of a module, without the containers that aihwkit makes analog too."""
    return [m for m in module.modules() if isinstance(m, AnalogLayerBase) and not m.IS_CONTAINER]


def reset_pending_updates(module: nn.Module) -> None:
    """Drop what backwards have left for the tiles' next update, which ``zero_grad`` does not."""
    for parameter in module.parameters():
        if isinstance(parameter, AnalogContext):
            parameter.reset()


@contextmanager
def own_pending_errors(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Around a backward: what it leaves with the tiles is a copy of the errors.

    With micro-batches of one sample autograd makes the same tensor the gradient of a digital bias, to which the next
    micro-batch adds in place.
    """
    contexts = [parameter for parameter in parameters if isinstance(parameter, AnalogContext)]
    pending = [len(context.analog_grad_output) for context in contexts]
    yield
    for context, first in zip(contexts, pending, strict=True):
        context.analog_grad_output[first:] = [error.clone() for error in context.analog_grad_output[first:]]


def detach_pending_updates(module: nn.Module) -> None:
    """Cut what tiles hold for their next update from its graph, so that the module can be deep-copied."""
    for parameter in module.parameters():
        if isinstance(parameter, AnalogContext):
            parameter.analog_input = [x.detach() for x in parameter.analog_input]
            parameter.analog_grad_output = [error.detach() for error in parameter.analog_grad_output]


def make_analog_aware(optimizer: Optimizer) -> None:
    """Turn a torch optimizer, in place, into one whose step also applies the pulsed updates of analog tiles.

    It becomes a subclass with aihwkit's ``AnalogOptimizerMixin``, as ``aihwkit.optim.AnalogOptimizer`` makes them, but
    stays the same object for the schedulers that hold it. Without analog parameters it is left as it is.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if isinstance(optimizer, AnalogOptimizerMixin) or not any(isinstance(p, AnalogContext) for p in parameters):
        return
    digital: Any = type(optimizer)
    optimizer.__class__ = new_class(f"Analog{digital.__name__}", (AnalogOptimizerMixin, digital))
    if "step" in vars(optimizer):
        # A scheduler has wrapped the digital class's step to see that it is called; wrap the analog one alike.
        def step(*args: Any, **kwargs: Any) -> Any:
            optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]
            return type(optimizer).step(optimizer, *args, **kwargs)

        step._wrapped_by_lr_sched = True  # pyright: ignore[reportFunctionMemberAccess]
        optimizer.step = step


def _compute_on_images(layer: Any) -> None:
    """Tell a mean-field tile the convolution it belongs to, so that it need not unfold the images."""
    tile = layer.analog_module
    if hasattr(layer, "kernel_size") and isinstance(tile, MeanFieldTile | MeanFieldTileArray):
        if getattr(tile, "analog_bias", False):
            return
        tile.convolution = Convolution(layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        layer.use_indexed = True


def _to_float32(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.float() for value in inputs)


def _stages_of_layers(network: nn.Module, split_at: Sequence[str]) -> dict[str, int]:
    stage, stages = 0, {}
    for name, module in network.named_modules():
        stage += name in split_at
        if type(module) in _LAYERS or (isinstance(module, AnalogLayerBase) and not module.IS_CONTAINER):
            stages[name] = stage
    return stages


def _check_untied(network: nn.Module, names: Mapping[str, Any]) -> None:
    owners: dict[int, str] = {}
    for name in names:
        weight = id(network.get_submodule(name).weight)
        if weight in owners:
            raise UsageError(
                f"layers {owners[weight]!r} and {name!r} share their weight, which two crossbars cannot: keep one of "
                "them digital with device={...}, or untie them"
            )
        owners[weight] = name
