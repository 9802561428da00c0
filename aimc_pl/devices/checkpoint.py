"""This module handles checkpoints of networks with analog layers.

It lists the classes that such a checkpoint may contain, and checks that its tiles have the module's devices.
"""

import warnings
from collections.abc import Mapping
from importlib import import_module
from types import FunctionType
from typing import Any

from aihwkit.nn.modules.base import AnalogLayerBase
from aihwkit.simulator.tiles.module import TileModule
from torch import Tensor, nn
from torch.serialization import add_safe_globals

from aimc_pl.arguments import listed
from aimc_pl.devices.conversion import convert_to_analog
from aimc_pl.devices.differences import contrast, differences, name_of
from aimc_pl.errors import AnalogCheckpointWarning, UsageError

_MATERIALS = ("Capacitor", "EcRam", "EcRamMO", "Idealized", "ReRamES", "ReRamSB")
_ALGORITHMS = ("AGAD", "ChoppedTTv2", "TTv2", "TikiTaka")
_NAMES = {
    "aihwkit.simulator.configs.compounds": (
        *("BufferedTransferCompound", "ChoppedTransferCompound", "DynamicTransferCompound", "MixedPrecisionCompound"),
        *("OneSidedUnitCell", "TransferCompound"),
    ),
    "aihwkit.simulator.configs.configs": (
        *("DigitalRankUpdateRPUConfig", "FloatingPointRPUConfig", "SingleRPUConfig", "UnitCellRPUConfig"),
    ),
    "aihwkit.simulator.configs.devices": (
        *("ConstantStepDevice", "ExpStepDevice", "FloatingPointDevice", "LinearStepDevice", "PiecewiseStepDevice"),
        *("PowStepDevice", "SoftBoundsDevice", "SoftBoundsReferenceDevice"),
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
        *("CapacitorPreset", "EcRamMOPreset", "EcRamPreset", "GokmenVlasovPreset", "IdealizedPreset", "PCMPreset"),
        *("ReRamESPreset", "ReRamSBPreset"),
    ),
    "aihwkit.simulator.presets.compounds": ("PCMPresetUnitCell",),
    "aihwkit.simulator.presets.devices": (
        *(f"{material}PresetDevice" for material in _MATERIALS),
        *("GokmenVlasovPresetDevice", "PCMPresetDevice", "ReRamArrayHfO2PresetDevice", "ReRamArrayOMPresetDevice"),
    ),
    "aihwkit.simulator.presets.utils": ("PresetIOParameters", "PresetUpdateParameters"),
    "aihwkit.simulator.tiles.analog": ("AnalogTile",),
    "aihwkit.simulator.tiles.array": ("TileModuleArray",),
    "aihwkit.simulator.tiles.floating_point": ("FloatingPointTile",),
    "aimc_pl.devices.mean_field.chopped": ("ChoppedTransferSimulatorTile", "DynamicTransferSimulatorTile"),
    "aimc_pl.devices.mean_field.mixed_precision": ("MixedPrecisionSimulatorTile", "MixedPrecisionTile"),
    "aimc_pl.devices.mean_field.one_sided": ("OneSidedSimulatorTile",),
    "aimc_pl.devices.mean_field.quantized": ("NoisyQuantizedDevice", "NoisyQuantizedSimulatorTile"),
    "aimc_pl.devices.mean_field.tile": (
        "MeanFieldRPUConfig",
        "MeanFieldSimulatorTile",
        "MeanFieldTile",
        "MeanFieldTileArray",
    ),
    "aimc_pl.devices.mean_field.tracking": ("TrackingCompound", "TrackingSimulatorTile"),
    "aimc_pl.devices.mean_field.transfer": ("BufferedTransferSimulatorTile", "TransferSimulatorTile"),
}


class AnalogCheckpoint:
    """A marker in checkpoints with analog layers.

    Code other than the strategy that loads such a checkpoint gets a warning that says how to use it.
    """

    def __init__(self) -> None:
        # Without any attribute, unpickling would not call __setstate__.
        self.is_analog = True

    def __setstate__(self, state: dict[str, bool]) -> None:
        vars(self).update(state)
        warnings.warn(
            "this checkpoint has analog layers: load it with Trainer(strategy=AnalogPipelineStrategy(device=...)) or "
            "aimc_pl.strategies.load_from_checkpoint, or make the module analog first, with aimc_pl.devices."
            "convert_to_analog(module, device)",
            AnalogCheckpointWarning,
            stacklevel=2,
        )


def _find(module: str, name: str) -> type:
    found = getattr(import_module(module), name)
    if not isinstance(found, type) or (found.__module__, found.__qualname__) != (module, name):
        raise TypeError(f"{module}.{name} is not a class defined there, and checkpoints may only name such classes")
    return found


CLASSES = (AnalogCheckpoint, *(_find(module, name) for module, names in _NAMES.items() for name in names))
"""The classes that the checkpoints of the catalogue's devices contain, and no others.

With ``weights_only=True``, ``torch.load`` may create objects of these classes. None of them executes code from a file.
"""

add_safe_globals([*CLASSES])


def classes_of_tiles(module: nn.Module) -> list[type]:
    """Return the classes in the configurations of a module's tiles that are not in :data:`CLASSES`."""
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
    """Return a module's state dict without the entries of the parameters that stand for the weights of tiles.

    The weights are in the state of the tile. aihwkit does not read the entries of such parameters in a state dict, and
    the entry of a context shows unused memory.
    """
    return {
        key: value
        for key, value in state.items()
        if not (
            key.endswith((".analog_ctx", ".shared_weights")) and f"{key.rpartition('.')[0]}.analog_tile_state" in state
        )
    }


def convert_as_saved(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Make those layers of a module analog, in place, that are analog in a state dict, on the devices they have there.

    Args:
        module: the module that will load the state.
        state: the state dict, with the names of ``module``.

    Raises:
        UsageError: if the module does not have such a layer.
    """
    configs: dict[str | int, Any] = {
        key.partition(".analog_module.")[0]: saved["rpu_config"]
        for key, saved in state.items()
        if key.endswith(".analog_tile_state")
    }
    if missing := sorted(map(str, configs.keys() - dict(module.named_modules()).keys())):
        raise UsageError(
            f"the checkpoint has analog layers that {type(module).__name__} does not have: {listed(missing)}"
        )
    if digital := {name: config for name, config in configs.items() if _is_digital(module, str(name))}:
        convert_to_analog(module, digital)


def check_devices(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Check that a state dict belongs to a module with the same layers on the same devices.

    Args:
        module: the module that will load the state.
        state: the state dict, with the names of ``module``.

    Raises:
        UsageError: if a layer differs. The message names the first such layer, both its devices, and what to do.
    """
    for name, tile in _tiles(module).items():
        saved = state.get(f"{name}.analog_tile_state")
        layer = name.partition(".analog_module")[0]
        if saved is not None and (differing := [*differences(saved["rpu_config"], tile.rpu_config)]):
            how = contrast(differing, saved["rpu_config"], tile.rpu_config)
            raise UsageError(
                f"layer {layer!r} has another device than in the checkpoint: {how}. Set that device=, or leave out "
                "ckpt_path"
            )
        if saved is None and f"{layer}.weight" in state:
            raise UsageError(
                f"layer {layer!r} is digital in the checkpoint, and analog here ({name_of(tile.rpu_config)}): leave "
                "out device=, or load the weights into the module before a fit without ckpt_path"
            )
    for key, saved in state.items():
        layer, is_tile, _ = key.partition(".analog_module.")
        if is_tile and key.endswith(".analog_tile_state") and _is_digital(module, layer):
            raise UsageError(
                f"layer {layer!r} is analog in the checkpoint ({name_of(saved['rpu_config'])}), and digital here: set "
                "device= to the checkpoint's"
            )


def _tiles(module: nn.Module) -> dict[str, Any]:
    return {name: tile for name, tile in module.named_modules() if isinstance(tile, TileModule)}


def _is_digital(module: nn.Module, name: str) -> bool:
    layer = dict(module.named_modules()).get(name)
    return layer is not None and not isinstance(layer, AnalogLayerBase)
