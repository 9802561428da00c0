"""Temporary replacements of attributes, on objects that belong to other libraries or to the user."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from aimc_pl.errors import UsageError

Patch = tuple[Any, str, Any]
"""An object (an instance, a class or a Python module), the name of an attribute, and the attribute's new value."""

_ABSENT = object()


@contextmanager
def patched(*patches: Patch) -> Iterator[None]:
    """Context manager that replaces attributes of objects, and restores the attributes at the end.

    Args:
        patches: objects, names of attributes, and new values. Each pair of object and name may occur only once.

    Raises:
        UsageError: at the end, if other code has replaced such an attribute in the meantime. The attribute is restored
            nevertheless.
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
    """Restore all attributes, and return the names of those that other code has replaced."""
    replaced = []
    for (owner, name, value), old in zip(patches, before, strict=True):
        if vars(owner).get(name, _ABSENT) is not value:
            replaced.append(f"{_name_of(owner)}.{name}")
        _set(owner, name, old)
    return replaced


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, type):
        # The namespace of a class is read-only.
        delattr(owner, name) if value is _ABSENT else setattr(owner, name, value)
    elif value is _ABSENT:
        vars(owner).pop(name, None)
    else:
        vars(owner)[name] = value


def _name_of(owner: Any) -> str:
    return getattr(owner, "__name__", type(owner).__name__)
