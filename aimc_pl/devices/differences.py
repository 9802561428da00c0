"""This module compares configurations of aihwkit."""

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

import numpy as np
from aihwkit.simulator.parameters.base import RPUConfigBase
from torch import Tensor

from aimc_pl.arguments import shown


def name_of(config: RPUConfigBase) -> str:
    """Return the names of the configuration's class and of its device's class."""
    device = getattr(config, "device", None)
    return type(config).__name__ if device is None else f"{type(device).__name__} in a {type(config).__name__}"


def contrast(differing: Sequence[tuple[str, Any, Any]], theirs: RPUConfigBase, ours: RPUConfigBase) -> str:
    """Return how one configuration, there, differs from another one, here, in their kinds or in a parameter."""
    if name_of(theirs) != name_of(ours):
        return f"{name_of(theirs)} there, {name_of(ours)} here"
    path, there, here = next((each for each in differing if each[0] == "device.w_max"), differing[0])  # τ tells most
    return f"{path} is {shown(there)} there, {shown(here)} here"


def differences(theirs: Any, ours: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the path and both values of each parameter in which two configurations differ."""
    if type(theirs) is not type(ours):
        yield path, type(theirs).__name__, type(ours).__name__
    elif isinstance(theirs, list | tuple) and len(theirs) == len(ours):
        for index, pair in enumerate(zip(theirs, ours, strict=True)):
            yield from differences(*pair, f"{path}[{index}]")
    elif isinstance(theirs, Tensor | np.ndarray):
        if not np.array_equal(theirs, ours):
            yield path, theirs, ours
    elif hasattr(theirs, "__dict__") and not isinstance(theirs, type | Enum):
        for name in sorted(vars(theirs).keys() | vars(ours).keys()):
            inner = f"{path}.{name}" if path else name
            yield from differences(getattr(theirs, name, None), getattr(ours, name, None), inner)
    elif theirs != ours:
        yield path, theirs, ours
