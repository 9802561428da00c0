"""This module converts digital layers to analog ones, and optimizers to ones that update analog layers."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from inspect import formatannotation, signature
from types import new_class
from typing import Any

from aihwkit.optim.analog_optimizer import AnalogOptimizerMixin
from aihwkit.simulator.parameters.base import RPUConfigBase
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from aimc_pl.analog import analog_layers, is_analog, learns_by_pulses
from aimc_pl.arguments import check_instance, listed, shown
from aimc_pl.devices.catalogue import AnalogDevice
from aimc_pl.devices.differences import differences
from aimc_pl.devices.layers import AnalogWeight, is_transposed_linear, to_analog
from aimc_pl.devices.mean_field import (
    Convolution,
    MeanFieldRPUConfig,
    MeanFieldTile,
    MeanFieldTileArray,
    to_mean_field,
)
from aimc_pl.devices.names import DEVICES, Device, get_device
from aimc_pl.errors import UsageError
from aimc_pl.private_torch import show_steps_to_schedulers
from aimc_pl.weights import read_weights

DeviceSpec = str | AnalogDevice | Mapping[str | int, Device | None] | RPUConfigBase | None
"""What the argument ``device`` of the strategy accepts: a name, a device, a configuration, or a mapping to these."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MATRICES = (
    *(nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase),
    *(*_CONVOLUTIONS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_FEW = 3
"""How many names a message lists one by one. A longer list is replaced by a pattern."""


def convert_to_analog(network: nn.Module, device: DeviceSpec, split_at: Sequence[str] | None = None) -> list[str]:
    """Replace the network's Linear and Conv layers, in place, by aihwkit's analog layers with the same weights.

    Layers that are already analog are not changed. Layers that cannot be analog stay digital: subclasses with a custom
    computation, grouped convolutions, and layers whose weight other code reads. :func:`describe_layers` names them.

    Args:
        network: the module to convert. Its layers keep their names, and each converted layer gets its own tiles.
        device: one device for all layers, or a mapping to devices. The keys of a mapping are patterns of layer names
            (``"layer4.*"``) and stage numbers; the last key that matches a layer wins. Layers without a match stay
            digital, and so do those whose device is ``None``.
        split_at: the names of the modules with which stages 1 … M−1 begin. Stage numbers in ``device`` need them.

    Returns:
        The names of the layers that have been converted.

    Raises:
        UsageError: if the network is no module, if a device is unknown, if a key matches no layer or names one that
            cannot be analog, if there are stage numbers without ``split_at``, if the network has no layer to convert,
            or if two layers share a weight.
    """
    check_instance("network", network, nn.Module, "a torch.nn.Module")
    digital = _digital_layers(network)
    chosen = {name: value for name, value in _choose(network, device, split_at).items() if name in digital}
    analog = {name: (value, get_device(value)) for name, value in chosen.items() if value is not None}
    _check_untied(network, analog)
    # All layers are made before the first is replaced: an error leaves the network as it was.
    layers = {name: _analog(network, name, rpu_config) for name, (_, rpu_config) in analog.items()}
    for name, layer in layers.items():
        layer.device_name = _text(*analog[name])
        _replace(network, network.get_submodule(name), layer)
    _avoid_nested_tensors(network)
    return list(analog)


def check_devices_stay(network: nn.Module, device: DeviceSpec, split_at: Sequence[str] | None = None) -> None:
    """Check that the layers that :func:`convert_to_analog` has made analog before are on the devices wanted now.

    For the arguments see :func:`convert_to_analog`.

    Raises:
        UsageError: if a layer is on another device. :func:`convert_to_analog` would leave it there.
    """
    for name, value in _choose(network, device, split_at).items():
        layer = network.get_submodule(name)
        if hasattr(layer, "device_name"):
            _check_same(layer, name, value)


def describe_layers(network: nn.Module) -> str:
    """Return a line that counts the analog layers and weights, and lists the digital layers with the reasons."""
    counts = Counter(
        getattr(layer, "device_name", None) or _name_of(next(layer.analog_tiles()).rpu_config)
        for layer in analog_layers(network)
    )
    names = [f"{count} {device}" if len(counts) > 1 else device for device, count in counts.items()]
    obstacles = _obstacles(network)
    reasons = {name: obstacles.get(name, "no device") for name in _digital_layers(network)}
    parameters = [parameter for parameter in network.parameters() if not is_lazy(parameter)]
    tiles = [tile.tile for layer in analog_layers(network) for tile in layer.analog_tiles()]
    share = sum(tile.get_x_size() * tile.get_d_size() for tile in tiles) / read_weights(parameters).numel()
    line = (
        f"{counts.total()} of {counts.total() + len(reasons)} layers analog ({', '.join(names)}), "
        f"{100 * share:.1f} % of weights"
    )
    return f"{line}; digital: {_listed(reasons)}" if reasons else line


def describe_slow(device: DeviceSpec) -> str | None:
    """Return a line on the user's own configurations that aihwkit simulates, though the mean-field tile could.

    ``None`` if there are none.
    """
    devices = device.values() if isinstance(device, Mapping) else [device]
    given = [d.rpu_config if isinstance(d, AnalogDevice) and not d.call else d for d in devices]
    slow = [type(own).__name__ for own in given if isinstance(own, RPUConfigBase) and _fits(own)]
    if not slow:
        return None
    return (
        f"{slow[0]} runs on aihwkit's tiles, which simulate every pulse: device=to_mean_field(...) of "
        "aimc_pl.devices simulates the same device, and is faster"
    )


def _fits(rpu_config: Any) -> bool:
    """Return whether this is a configuration of aihwkit's that the mean-field tile can simulate."""
    if isinstance(rpu_config, MeanFieldRPUConfig):
        return False
    try:
        to_mean_field(rpu_config)
    except UsageError:
        return False
    return True


def make_analog_aware(optimizer: Optimizer, lr_scale: float = 1.0) -> None:
    """Change a torch optimizer, in place, so that its step also applies the pulsed updates of analog tiles.

    The optimizer's class becomes a subclass with aihwkit's ``AnalogOptimizerMixin``, of the kind that
    ``aihwkit.optim.AnalogOptimizer`` creates. The optimizer stays the same object for the schedulers that hold it. Its
    ``zero_grad`` drops updates that are not applied yet, as it drops gradients. An optimizer without analog parameters
    is not changed. Of a tile in mixed precision it needs ``shared_weights`` only.

    Args:
        optimizer: the optimizer.
        lr_scale: the learning rate of layers that learn by pulses, in units of the optimizer's learning rate. A
            scheduler thus changes both in proportion.

    Raises:
        UsageError: if this is no optimizer, if it holds the ``weight`` or ``bias`` of an analog layer, which is a view
            of the tile, or if it updates analog tiles already, and would not do so as ``lr_scale`` or its ``maximize``
            say.
    """
    check_instance("optimizer", optimizer, Optimizer, "a torch optimizer")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        if isinstance(parameter, AnalogWeight):
            raise UsageError("the optimizer has been given layer.weight of an analog layer: give it parameters()")
    for group in optimizer.param_groups:
        _add_contexts(group, set(map(id, parameters)))
    learns = any(is_analog(parameter) for group in optimizer.param_groups for parameter in group["params"])
    if isinstance(optimizer, AnalogOptimizerMixin):
        _check_rule(optimizer, lr_scale)
        if learns and not isinstance(optimizer, _DropsErrors):
            own: Any = type(optimizer)
            optimizer.__class__ = new_class(own.__name__, (_DropsErrors, own))
        return
    if not learns:
        return
    digital: Any = type(optimizer)
    bases = (_DropsErrors, AnalogOptimizerMixin, _ThenTurnsErrors, digital)
    if lr_scale != 1:
        bases = (_DropsErrors, _WithOwnRates, AnalogOptimizerMixin, _ThenTurnsErrors, _ThenScalesRates, digital)
    namespace = {"analog_lr_scale": lr_scale}
    optimizer.__class__ = new_class(f"Analog{digital.__name__}", bases, exec_body=lambda body: body.update(namespace))
    if "step" in vars(optimizer):
        # A scheduler has already wrapped the step of the digital class.
        show_steps_to_schedulers(optimizer)


def describe_updates(network: nn.Module, optimizer: Optimizer) -> str | None:
    """Return a line that says what analog layers do not take from the optimizer; ``None`` if they take all.

    Tiles learn by pulses from the gradient and the learning rate alone. Tiles in mixed precision take all.
    """
    groups = [group for group in optimizer.param_groups if any(map(learns_by_pulses, group["params"]))]
    learning = {id(parameter) for group in groups for parameter in group["params"] if learns_by_pulses(parameter)}
    mixins = (_DropsErrors, AnalogOptimizerMixin, _WithOwnRates, _ThenTurnsErrors, _ThenScalesRates)
    name = next(kind.__name__ for kind in type(optimizer).__mro__ if not issubclass(kind, mixins))
    ignored = {key for group in groups for key in ("momentum", "weight_decay") if group.get(key)}
    if not groups or (name == "SGD" and not ignored):
        return None
    rule = f"the {' and '.join(sorted(ignored))} of SGD" if name == "SGD" else f"the update rule of {name}"
    applies = "apply" if name == "SGD" and len(ignored) > 1 else "applies"
    scale = getattr(optimizer, "analog_lr_scale", 1.0)
    rates = " and ".join(f"{rate:g}" for rate in sorted({float(group["lr"]) * scale for group in groups}))
    layers = [layer for layer in analog_layers(network) if not learning.isdisjoint(map(id, layer.parameters()))]
    return (
        f"{len(layers)} analog layer{'s learn' if len(layers) > 1 else ' learns'} by pulses, at the learning rate "
        f"{rates}: {rule} {applies} to digital parameters only. Typical learning rates of analog layers are 0.05 to 0.5"
    )


def _add_contexts(group: dict[str, Any], known: Collection[int]) -> None:
    """Add the contexts of the tiles in mixed precision whose ``shared_weights`` are in a group of an optimizer.

    aihwkit's mixin finds tiles by their contexts, and has them program every step into their crossbars.

    Args:
        group: the group. Its learning rate does not matter for these contexts.
        known: the identities of the parameters that the optimizer has.
    """
    for number, parameter in enumerate([*group["params"]]):
        tile = getattr(parameter, "shows_tile", None)
        if tile is None or id(tile.analog_ctx) in known:
            continue
        group["params"].append(tile.analog_ctx)
        if "param_names" in group:
            tile_name = group["param_names"][number].removesuffix("shared_weights")
            group["param_names"].append(f"{tile_name}analog_ctx")


def _check_rule(optimizer: AnalogOptimizerMixin, lr_scale: float) -> None:
    """Check that an optimizer that updates analog tiles already does so at the wanted rate, and in its own direction.

    Those of aihwkit maximize with digital parameters only.
    """
    if lr_scale != getattr(optimizer, "analog_lr_scale", 1.0):
        raise UsageError(
            f"lr_scale={lr_scale:g} comes too late for {type(optimizer).__name__}, which updates analog layers "
            "already: use an optimizer of torch"
        )
    if not isinstance(optimizer, _ThenTurnsErrors) and any(map(_maximizes_by_pulses, optimizer.param_groups)):
        raise UsageError(
            f"maximize=True of {type(optimizer).__name__} does not reach layers that learn by pulses: use an optimizer "
            "of torch, or turn the sign of the loss"
        )


def _maximizes_by_pulses(group: Mapping[str, Any]) -> bool:
    return bool(group.get("maximize")) and any(map(learns_by_pulses, group["params"]))


class _DropsErrors(Optimizer):
    """Mixin around aihwkit's mixin: ``zero_grad`` also drops what backwards have left for the tiles."""

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        super().zero_grad(*args, **kwargs)
        for group in self.param_groups:
            for context in filter(is_analog, group["params"]):
                context.reset()


class _ThenTurnsErrors(Optimizer):
    """Mixin between aihwkit's mixin and a torch optimizer: it turns the sign of errors in groups that maximize.

    aihwkit's mixin applies the errors after that, and always descends.
    """

    def step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().step(*args, **kwargs)
        for group in filter(_maximizes_by_pulses, self.param_groups):
            for context in filter(is_analog, group["params"]):
                context.analog_grad_output = [-error for error in context.analog_grad_output]
        return loss


class _ThenScalesRates(Optimizer):
    """Mixin between aihwkit's mixin and a torch optimizer: it scales the learning rates when the torch step is over.

    aihwkit's mixin reads the rates of tiles after that.
    """

    analog_lr_scale: float

    def step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().step(*args, **kwargs)
        for group in self.param_groups:
            group["lr"] = group["lr"] * self.analog_lr_scale
        return loss


class _WithOwnRates(Optimizer):
    """Mixin around aihwkit's mixin, which gives the groups their own learning rates again."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        rates = [group["lr"] for group in self.param_groups]
        try:
            return super().step(*args, **kwargs)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate


def _choose(network: nn.Module, device: DeviceSpec, split_at: Sequence[str] | None) -> dict[str, Device | None]:
    """Return the device chosen for each layer that is analog or can become so."""
    choices = device if isinstance(device, Mapping) else {"*": device}
    if any(isinstance(key, int) for key in choices) and split_at is None:
        raise UsageError("a device per stage needs split_at, the names of the modules with which the stages begin")
    stages = _stages_of_layers(network, split_at or ())
    obstacles = _obstacles(network)
    able = [name for name in stages if name not in obstacles]
    if not able:
        unable = f" but {_listed(obstacles)}" if obstacles else ""
        raise UsageError(
            f"device= has nothing to convert: {type(network).__name__} has no Linear or Conv layer{unable}"
        )
    chosen: dict[str, Device | None] = {}
    for key, value in choices.items():
        if key in obstacles and value is not None:
            raise UsageError(f"layer {key!r} cannot be analog ({obstacles[str(key)]}): keep it digital")
        matches = [n for n, stage in stages.items() if stage == key or fnmatchcase(n, str(key))]
        if not matches:
            raise UsageError(_unmatched(str(key), value, able))
        chosen.update(dict.fromkeys(matches, value))
    return {name: value for name, value in chosen.items() if name not in obstacles}


def _check_same(layer: Any, name: str, device: Device | None) -> None:
    """Check that the tiles of an analog layer have the configuration of a device."""
    wanted = "none"
    if device is not None:
        config = get_device(device)
        wanted = _text(device, config)
        if not any(differences(next(layer.analog_tiles()).rpu_config, config)):
            return
    raise UsageError(
        f"layer {name!r} is on {layer.device_name} already, and device= asks for {wanted}: use a new module, or a "
        "digital copy of this one, aimc_pl.export.to_digital(module)"
    )


def _unmatched(key: str, value: object, able: Sequence[str]) -> str:
    """Return what is wrong with a key of ``device`` that matches no layer."""
    # A config's device whose arguments do not fit arrives here as a mapping of its arguments.
    arguments = {name: each for device in DEVICES.values() for name, each in signature(device).parameters.items()}
    if key in arguments:
        kind = re.sub(r"\b(?:\w+\.)+", "", formatannotation(arguments[key].annotation))
        if "AnalogDevice" in kind:
            kind = "a class_path, such as aimc_pl.devices.soft_bounds, with init_args"
        return f"device argument {key}={shown(value)} must be {kind} (see aimc-pl devices)"
    alike = get_close_matches(key, arguments, n=1)
    hint = f"; did you mean the argument {alike[0]}?" if alike else ""
    return f"device key {shown(key)} matches no layer: the layers are {listed(able, 60)}{hint}"


def _analog(network: nn.Module, name: str, rpu_config: RPUConfigBase) -> Any:
    """Return an analog layer to replace the layer of this name."""
    layer = to_analog(network.get_submodule(name), rpu_config, name)
    _compute_on_images(layer)
    # Tiles compute in float32, but under autocast a digital layer before them may send a lower precision. The hook also
    # keeps nn.TransformerEncoderLayer from its fast path, which reads weights instead of calling layers.
    layer.register_forward_pre_hook(_to_float32)
    return layer


def _replace(network: nn.Module, digital: nn.Module, layer: nn.Module) -> None:
    for path, module in list(network.named_modules(remove_duplicate=False)):
        if module is digital:
            network.set_submodule(path, layer)


def _compute_on_images(layer: Any) -> None:
    """Tell a layer's mean-field tile its convolution. The tile then computes without unfolding the images."""
    tile = layer.analog_module
    if hasattr(layer, "kernel_size") and isinstance(tile, MeanFieldTile | MeanFieldTileArray):
        if getattr(tile, "analog_bias", False):
            return
        tile.convolution = Convolution(layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        layer.use_indexed = True


def _to_float32(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.float() for value in inputs)


def _avoid_nested_tensors(network: nn.Module) -> None:
    """Turn off nested tensors in encoders with analog layers, which prevent the fast path that nested tensors need."""
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoder) and analog_layers(module):
            module.use_nested_tensor = False


def _text(device: Device, rpu_config: RPUConfigBase) -> str:
    if isinstance(device, AnalogDevice):
        return repr(device)
    return device if isinstance(device, str) else _name_of(rpu_config)


def _name_of(rpu_config: Any) -> str:
    return type(getattr(rpu_config, "device", rpu_config)).__name__


def _stages_of_layers(network: nn.Module, split_at: Sequence[str]) -> dict[str, int]:
    stage, stages = 0, {}
    for name, module in network.named_modules():
        stage += name in split_at
        if name and (isinstance(module, _MATRICES) or is_transposed_linear(module) or is_analog(module)):
            stages[name] = stage
    return stages


def _digital_layers(network: nn.Module) -> dict[str, Any]:
    layers = {name: network.get_submodule(name) for name in _stages_of_layers(network, ())}
    return {name: layer for name, layer in layers.items() if not is_analog(layer)}


def _obstacles(network: nn.Module) -> dict[str, str]:
    """Return the layers that cannot be analog, each with the reason."""
    digital = _digital_layers(network)
    parents = {name: network.get_submodule(name.rpartition(".")[0]) for name in digital}
    reasons = {name: _obstacle(layer, parents[name]) for name, layer in digital.items()}
    found = {name: reason for name, reason in reasons.items() if reason is not None}
    able = {name: layer for name, layer in digital.items() if name not in found}
    # A layer that shares its weight with a digital module stays digital too.
    for owner, module in network.named_modules():
        parameters = {id(parameter) for parameter in module.parameters(recurse=False)} if owner not in able else ()
        for name, layer in able.items():
            if id(layer.weight) in parameters:
                found[name] = f"shares its weight with {owner or type(network).__name__}"
    return found


def _obstacle(layer: Any, parent: nn.Module) -> str | None:
    if isinstance(parent, nn.MultiheadAttention):
        return "MultiheadAttention reads its weight"
    if type(layer) not in (nn.Linear, *_CONVOLUTIONS) and not is_transposed_linear(layer):
        kind = type(layer)
        return kind.__name__ if kind.__module__.startswith("torch.") else f"{kind.__module__}.{kind.__qualname__}"
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        return "its weight is computed from others"
    if not layer.weight.requires_grad:
        return "frozen"
    if not isinstance(layer, _CONVOLUTIONS):
        return None
    if layer.groups != 1:
        return "grouped convolution"
    padding = layer.padding if isinstance(layer.padding, str) else layer.padding_mode
    if padding != "zeros":
        return f"padding {padding!r}"
    return "dilated convolution" if not isinstance(layer, nn.Conv2d) and set(layer.dilation) != {1} else None


def _listed(reasons: Mapping[str, str]) -> str:
    """Return names and their reasons as text. A pattern replaces many similar names with the same reason."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, reason in reasons.items():
        alike.setdefault((re.sub(r"\d+", "*", name), reason), []).append(name)
    return ", ".join(
        f"{', '.join(names)} ({reason})" if len(names) <= _FEW else f"{pattern} ({len(names)} layers: {reason})"
        for (pattern, reason), names in alike.items()
    )


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
