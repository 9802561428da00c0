"""This module checks arguments. Each refusal is one line: the argument's name, its value, and what is allowed."""

from collections.abc import Sequence
from math import inf
from numbers import Integral, Real
from os import PathLike
from reprlib import Repr
from types import UnionType
from typing import Any, get_args

from aimc_pl.errors import UsageError

MAX_SEED = 2**32 - 1
"""The largest seed, here as in Lightning."""

_short = Repr(maxother=50, maxstring=50)


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    whole: bool = False,
) -> None:
    """Check that a value is a finite number in a range.

    Args:
        name: the name of the argument.
        value: the value of the argument.
        above: the lower end of the range, exclusive.
        at_least: the lower end of the range, inclusive.
        below: the upper end of the range, exclusive.
        at_most: the upper end of the range, inclusive.
        whole: whether the number must be whole.

    Raises:
        UsageError: if the value is anything else. The message has the name, the value and the range.
    """
    numbers: Any = Integral if whole else Real
    allowed = (
        isinstance(value, numbers)
        and not isinstance(value, bool)
        and -inf < value < inf
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (below is None or value < below)
        and (at_most is None or value <= at_most)
    )
    if not allowed:
        ends = {"above": above, "of at least": at_least, "below": below, "at most": at_most}
        bounds = " and ".join(f"{words} {end}" for words, end in ends.items() if end is not None)
        kind = "whole" if whole else "finite"
        raise UsageError(f"{name} must be a {kind} number{bounds and f' {bounds}'}, got {shown(value)}")


def check_seed(name: str, value: Any) -> None:
    """Check that a value can seed a random generator."""
    check_number(name, value, at_least=0, at_most=MAX_SEED, whole=True)


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Check that a value is one of the values of ``choices``, a ``Literal``."""
    if not isinstance(value, str) or value not in get_args(choices):
        raise UsageError(f"unknown {name} {shown(value)}: choose one of {', '.join(get_args(choices))}")


def check_flag(name: str, value: Any) -> None:
    """Check that a value is ``True`` or ``False``. Python would take other values, such as ``"no"``, for true."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be True or False, got {shown(value)}")


def check_path(name: str, value: Any) -> None:
    """Check that a value is a path."""
    if not isinstance(value, str | PathLike):
        raise UsageError(f"{name} must be a path, got {shown(value)}")


def check_instance(name: str, value: Any, kind: type | UnionType, what: str) -> None:
    """Check that a value is an instance of a class.

    Args:
        name: the name of the argument.
        value: the value of the argument.
        kind: the class, or the classes, such as ``int | float``.
        what: an instance of the class in words, for the message, such as "a torch.nn.Module".

    Raises:
        UsageError: if the value is anything else. The message has the name, the value and the words.
    """
    if not isinstance(value, kind):
        raise UsageError(f"{name} must be {what}, got {shown(value)}")


def check_callable(name: str, value: Any) -> None:
    """Check that a value can be called."""
    if not callable(value):
        raise UsageError(f"{name} must be a function or a class, got {shown(value)}")


def check_list(name: str, value: Any, kinds: type | tuple[type, ...], what: str) -> None:
    """Check that a value is a list, tuple or other sequence, and that its items are of the right type.

    Args:
        name: the name of the argument.
        value: the value of the argument. A string does not count as a list.
        kinds: the types that items may have.
        what: what the items are, in words, for the message.

    Raises:
        UsageError: if the value is anything else. The message has the name, the value and the words.
    """
    if isinstance(value, str):
        raise UsageError(f"{name} is a list of {what}, got the string {shown(value)}")
    if not isinstance(value, Sequence) or not all(isinstance(item, kinds) for item in value):
        raise UsageError(f"{name} is a list of {what}, got {shown(value)}")


def shown(value: Any) -> str:
    """Return a short text of a value, in one line of at most 100 characters."""
    text = " ".join(_short.repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def listed(names: Sequence[str], most: int = 80) -> str:
    """Return the names that fit into ``most`` characters, at least the first, and how many more there are."""
    fitting = [name for end, name in enumerate(names, 1) if end == 1 or len(", ".join(names[:end])) <= most]
    more = f" and {len(names) - len(fitting)} more" if len(fitting) < len(names) else ""
    return ", ".join(fitting) + more
