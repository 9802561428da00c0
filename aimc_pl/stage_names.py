"""This module names values of stages: by one name for all loggers, and by a tag and a folder for TensorBoard."""

import re

_OF_A_STAGE = re.compile(r"((?:staleness|devices)(?:/[a-z]+)?)[/_]stage_(\d+)")


def tag_and_folder(name: str) -> tuple[str, str] | None:
    """Return the tag and the folder of values with this name, or ``None`` if they are not those of a stage.

    The tag of ``staleness/drift_stage_3`` is ``staleness/drift``, and that of ``staleness/stage_3`` is ``staleness``.
    The folder is ``stage_03``: with two digits, TensorBoard sorts stages by their numbers.
    """
    match = _OF_A_STAGE.fullmatch(name)
    return (match[1], f"stage_{int(match[2]):02}") if match else None


def name_of(tag: str, folder: str) -> str:
    """Return the name of the values with this tag in the folder of a stage."""
    return f"{tag}{'_' if '/' in tag else '/'}stage_{int(folder.removeprefix('stage_'))}"
