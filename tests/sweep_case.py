"""Something to sweep over, importable by other processes."""

from pathlib import Path


def square(x, seed):
    """A case; the second attempt at 3 succeeds."""
    if x == 3 and not Path("tried").exists():
        Path("tried").touch()
        raise RuntimeError("no power")
    return [{"point": point, "y": x * x + point + seed} for point in range(2)]
