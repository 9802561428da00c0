"""Checkpoints with analog tiles under torch's restricted unpickler."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from os import PathLike
from pathlib import Path

from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

_PACKAGES = ("aihwkit.", "aimc_pl.devices.")


@contextmanager
def trust_aihwkit(path: str | PathLike[str]) -> Iterator[None]:
    """Let ``torch.load(path, weights_only=True)`` restore tiles and their configuration, aihwkit's and ours only."""
    names = get_unsafe_globals_in_checkpoint(path) if Path(path).is_file() else []
    trusted = []
    for module, _, name in (name.rpartition(".") for name in names if name.startswith(_PACKAGES)):
        trusted.append(getattr(import_module(module), name))
    with safe_globals(trusted):
        yield
