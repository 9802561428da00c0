"""Attributes of objects that are not ours, replaced for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from aimc_pl.errors import UsageError

Patch = tuple[Any, str, Any]
"""An object (an instance, a class or a Python module), the name of an attribute and its value."""

_ABSENT = object()


@contextmanager
def patched(*patches: Patch) -> Iterator[None]:
    """While it is open, objects have other attributes; then they have those of before again.

    Args:
        patches: objects, names and values; each object and name once.

    Raises:
        UsageError: at the end, if somebody else has replaced such an attribute in the meantime. That is undone.
    """
    before = [vars(owner).get(name, _ABSENT) for owner, name, _ in patches]
    for owner, name, value in patches:
        _set(owner, name, value)
    try:
        yield
    except BaseException:
        _put_back(patches, before)
        raise
    if replaced := _put_back(patches, before):
        raise UsageError(
            f"training_step, or a hook, has replaced {', '.join(replaced)}, which the strategy replaces while it runs: "
            "do so before the fit, or put it back before the step ends"
        )


def _put_back(patches: Sequence[Patch], before: Sequence[Any]) -> list[str]:
    """Undo all, and name those that were not there any more."""
    replaced = []
    for (owner, name, value), old in zip(patches, before, strict=True):
        if vars(owner).get(name, _ABSENT) is not value:
            replaced.append(f"{_name_of(owner)}.{name}")
        _set(owner, name, old)
    return replaced


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, type):
        # Its namespace can only be read.
        delattr(owner, name) if value is _ABSENT else setattr(owner, name, value)
    elif value is _ABSENT:
        vars(owner).pop(name, None)
    else:
        vars(owner)[name] = value


def _name_of(owner: Any) -> str:
    return getattr(owner, "__name__", type(owner).__name__)
