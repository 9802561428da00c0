"""This module finds hardware by the name of a preset, or in a YAML file of the user's own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from aimc_pl.arguments import check_number, check_path, listed, shown
from aimc_pl.config_files import check_config
from aimc_pl.cost.constants import PRESETS, Hardware, Quantity
from aimc_pl.errors import UsageError


def find_hardware(name: str) -> Hardware:
    """Return the hardware of a name: a preset, or a YAML file that changes some constants of a preset.

    The hardware of a file is named as the file is, so it cannot be taken for a preset.

    A file has the name of the preset as ``base``, and for each constant that it changes a value, a unit and a source::

        base: rasch_2024
        link_latency: {value: 1.0e-6, unit: s, source: measured on my board}

    Raises:
        UsageError: if there is no such preset or file, or if the file is wrong. The message says where.
    """
    check_path("hardware", name)
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"unknown hardware {shown(name)}: choose {', '.join(PRESETS)}, or the path of a YAML file")
    check_config(path)
    changes: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    base = changes.pop("base", None)
    if not isinstance(base, str) or base not in PRESETS:
        raise UsageError(f"hardware {path} needs a line 'base: NAME' with one of {', '.join(PRESETS)}")
    known = [constant for constant, *_ in PRESETS[base].rows()]
    for constant in changes:
        if constant not in known:
            raise UsageError(f"hardware {path} sets {shown(constant)}, which is no constant: they are {listed(known)}")
    quantities = {constant: _quantity(path, constant, value) for constant, value in changes.items()}
    return replace(PRESETS[base], name=name, **quantities)


def _quantity(path: Path, constant: str, value: Any) -> Quantity:
    if not isinstance(value, dict) or value.keys() != {"value", "unit", "source"}:
        raise UsageError(f"hardware {path} needs value, unit and source of {constant}, got {shown(value)}")
    try:
        if isinstance(value["value"], bool):
            raise TypeError
        number = float(value["value"])  # YAML takes 1e-6, without a point, for text
    except (TypeError, ValueError) as error:
        raise UsageError(f"hardware {path}: the value of {constant} is no number: {shown(value['value'])}") from error
    check_number(f"{constant} of hardware {path}", number, at_least=0)
    return Quantity(number, str(value["unit"] or ""), str(value["source"] or ""))
