"""This module collects what has been measured since the last logged step.

It keeps sums, which stay small even if nothing is ever logged.
"""

Recent = dict[str, tuple[float, int, float]]
"""For each name, the sum of its values, their number, and the largest value."""


def note(recent: Recent, name: str, value: float) -> None:
    """Add a measured value to those of a name."""
    total, number, largest = recent.get(name, (0.0, 0, value))
    recent[name] = total + value, number + 1, max(largest, value)


def means(recent: Recent) -> dict[str, float]:
    """Return the mean of each name's values."""
    return {name: total / number for name, (total, number, _) in recent.items()}
