"""What has been measured since the last logged step: sums, so that it stays small where nothing is ever logged."""

Recent = dict[str, tuple[float, int, float]]
"""The sum of the values of each name, their number and the largest."""


def note(recent: Recent, name: str, value: float) -> None:
    """A value has been measured."""
    total, number, largest = recent.get(name, (0.0, 0, value))
    recent[name] = total + value, number + 1, max(largest, value)


def means(recent: Recent) -> dict[str, float]:
    """The mean of each name's values."""
    return {name: total / number for name, (total, number, _) in recent.items()}
