"""What a checkpoint of a network with analog layers holds: classes by an exact list, and the devices of its tiles."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from importlib import import_module
from types import FunctionType
from typing import Any

import numpy as np
from aihwkit.nn.modules.base import AnalogLayerBase
from aihwkit.simulator.parameters.base import RPUConfigBase
from aihwkit.simulator.tiles.module import TileModule
from torch import Tensor, nn
from torch.serialization import add_safe_globals

from aimc_pl.errors import AnalogCheckpointWarning, UsageError

_MATERIALS = ("Capacitor", "EcRam", "EcRamMO", "Idealized", "ReRamES", "ReRamSB")
_ALGORITHMS = ("AGAD", "ChoppedTTv2", "MixedPrecision", "TTv2", "TikiTaka")
_NAMES = {
    "aihwkit.simulator.configs.compounds": (
        *("ChoppedTransferCompound", "DynamicTransferCompound", "MixedPrecisionCompound", "TransferCompound"),
    ),
    "aihwkit.simulator.configs.configs": ("FloatingPointRPUConfig", "SingleRPUConfig"),
    "aihwkit.simulator.configs.devices": (
        *("ConstantStepDevice", "FloatingPointDevice", "LinearStepDevice", "SoftBoundsDevice"),
        "SoftBoundsReferenceDevice",
    ),
    "aihwkit.simulator.parameters.enums": (
        *("AnalogMVType", "BoundManagementType", "NoiseManagementType", "PulseType", "RPUDataType", "WeightNoiseType"),
    ),
    "aihwkit.simulator.parameters.inference": ("DriftParameter", "SimpleDriftParameter"),
    "aihwkit.simulator.parameters.io": ("IOParameters",),
    "aihwkit.simulator.parameters.mapping": ("MappingParameter",),
    "aihwkit.simulator.parameters.pre_post": ("InputRangeParameter", "PrePostProcessingParameter"),
    "aihwkit.simulator.parameters.runtime": ("RuntimeParameter",),
    "aihwkit.simulator.parameters.training": ("UpdateParameters",),
    "aihwkit.simulator.presets.configs": (
        *(f"{algorithm}{material}Preset" for algorithm in _ALGORITHMS for material in _MATERIALS),
        *("EcRamPreset", "GokmenVlasovPreset", "ReRamESPreset", "ReRamSBPreset"),
    ),
    "aihwkit.simulator.presets.devices": (
        *(f"{material}PresetDevice" for material in _MATERIALS),
        "GokmenVlasovPresetDevice",
    ),
    "aihwkit.simulator.presets.utils": ("PresetIOParameters", "PresetUpdateParameters"),
    "aihwkit.simulator.tiles.analog": ("AnalogTile",),
    "aihwkit.simulator.tiles.array": ("TileModuleArray",),
    "aihwkit.simulator.tiles.floating_point": ("FloatingPointTile",),
    "aimc_pl.devices.mean_field.tile": (
        "MeanFieldRPUConfig",
        "MeanFieldSimulatorTile",
        "MeanFieldTile",
        "MeanFieldTileArray",
    ),
}


class AnalogCheckpoint:
    """Stands in a checkpoint with analog layers, and tells a reader other than the strategy how to use it."""

    def __init__(self) -> None:
        # An object without attributes is restored without a word.
        self.is_analog = True

    def __setstate__(self, state: dict[str, bool]) -> None:
        vars(self).update(state)
        warnings.warn(
            "this checkpoint has analog layers: load it with Trainer(strategy=AnalogPipelineStrategy(device=...)), or "
            "make the module analog before its state is loaded, with aimc_pl.devices.convert_to_analog(module, device)",
            AnalogCheckpointWarning,
            stacklevel=2,
        )


def _find(module: str, name: str) -> type:
    found = getattr(import_module(module), name)
    if not isinstance(found, type) or (found.__module__, found.__qualname__) != (module, name):
        raise TypeError(f"{module}.{name} is not a class defined there, and checkpoints may name no other thing")
    return found


CLASSES = (AnalogCheckpoint, *(_find(module, name) for module, names in _NAMES.items() for name in names))
"""The classes that the checkpoints of all devices of the catalogue name, and no other.

``torch.load`` may make objects of them with ``weights_only=True``. None of them runs what a file says.
"""

add_safe_globals([*CLASSES])


def classes_of_tiles(module: nn.Module) -> list[type]:
    """The classes beyond the catalogue's that the configurations of a module's tiles consist of."""
    found, left = set[type](), [tile.rpu_config for tile in _tiles(module).values()]
    while left:
        value = left.pop()
        if isinstance(value, type):
            found.add(value)
        elif isinstance(value, list | tuple):
            left += value
        elif isinstance(value, dict):
            left += value.values()
        elif hasattr(value, "__dict__") and not isinstance(value, Tensor | FunctionType):
            found.add(type(value))
            left += vars(value).values()
    return [*found.difference(CLASSES)]


def leave_out_contexts(state: dict[str, Any]) -> dict[str, Any]:
    """A module's state dict without the entries that aihwkit neither fills nor reads: they show unused memory."""
    return {
        key: value
        for key, value in state.items()
        if not (key.endswith(".analog_ctx") and f"{key.removesuffix('analog_ctx')}analog_tile_state" in state)
    }


def check_devices(module: nn.Module, state: Mapping[str, Any]) -> None:
    """See that a state dict is of a module with the same layers on the same devices.

    Args:
        module: that is to take the state.
        state: of another module, by the same names.

    Raises:
        UsageError: naming the first layer that differs, what it is in both, and what to do.
    """
    for name, tile in _tiles(module).items():
        saved = state.get(f"{name}.analog_tile_state")
        layer = name.partition(".analog_module")[0]
        if saved is not None and (differing := [*_differing(saved["rpu_config"], tile.rpu_config)]):
            theirs, ours = _contrast(differing, saved["rpu_config"], tile.rpu_config)
            raise UsageError(
                f"layer {layer!r} has another device than in the checkpoint: {theirs} there, {ours} here. Set device= "
                "to the checkpoint's, or begin a new run without ckpt_path"
            )
        if saved is None and f"{layer}.weight" in state:
            raise UsageError(
                f"layer {layer!r} is digital in the checkpoint, and analog here ({_name(tile.rpu_config)}): leave out "
                "device=, or load the weights into the module before a fit without ckpt_path"
            )
    for key, saved in state.items():
        layer, is_tile, _ = key.partition(".analog_module.")
        if is_tile and key.endswith(".analog_tile_state") and _is_digital(module, layer):
            raise UsageError(
                f"layer {layer!r} is analog in the checkpoint ({_name(saved['rpu_config'])}), and digital here: set "
                "device= to the checkpoint's"
            )


def _tiles(module: nn.Module) -> dict[str, Any]:
    return {name: tile for name, tile in module.named_modules() if isinstance(tile, TileModule)}


def _is_digital(module: nn.Module, name: str) -> bool:
    layer = dict(module.named_modules()).get(name)
    return layer is not None and not isinstance(layer, AnalogLayerBase)


def _name(config: RPUConfigBase) -> str:
    """The configuration's class and its device's."""
    device = getattr(config, "device", None)
    return type(config).__name__ if device is None else f"{type(device).__name__} in a {type(config).__name__}"


def _contrast(differing: Sequence[tuple[str, Any, Any]], theirs: RPUConfigBase, ours: RPUConfigBase) -> tuple[str, str]:
    """Both configurations in words that tell them apart."""
    if _name(theirs) != _name(ours):
        return _name(theirs), _name(ours)
    named = differing[:_FEW]
    return (
        f"{_name(theirs)} with {', '.join(f'{path}={value}' for path, value, _ in named)}",
        f"{', '.join(f'{path}={value}' for path, _, value in named)}",
    )


_FEW = 4
"""How many differing parameters a message names."""


def _differing(theirs: Any, ours: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The parameters in which two configurations differ, by their paths."""
    if type(theirs) is not type(ours):
        yield path, type(theirs).__name__, type(ours).__name__
    elif isinstance(theirs, list | tuple) and len(theirs) == len(ours):
        for index, pair in enumerate(zip(theirs, ours, strict=True)):
            yield from _differing(*pair, f"{path}[{index}]")
    elif isinstance(theirs, Tensor | np.ndarray):
        if not np.array_equal(theirs, ours):
            yield path, theirs, ours
    elif hasattr(theirs, "__dict__") and not isinstance(theirs, type | Enum):
        for name in sorted(vars(theirs).keys() | vars(ours).keys()):
            inner = f"{path}.{name}" if path else name
            yield from _differing(getattr(theirs, name, None), getattr(ours, name, None), inner)
    elif theirs != ours:
        yield path, theirs, ours
