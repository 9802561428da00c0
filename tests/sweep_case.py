"""Cases for sweeps that other processes can import."""

import time
from pathlib import Path


def square(x, seed, folder=Path()):
    """Return two rows. The first call with x = 3 raises an error, and later ones succeed."""
    if x == 3 and not (folder / "tried").exists():
        (folder / "tried").touch()
        raise RuntimeError("no power")
    return [{"point": point, "y": x * x + point + seed} for point in range(2)]


def wait(x):
    """Return a row after 0.4 seconds."""
    time.sleep(0.4)  # the sweep is killed while cases are still queued
    return [{"y": x}]
