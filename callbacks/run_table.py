"""The logger in this module writes what a run logs to a CSV file beside the files of other loggers."""

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, override

from lightning.pytorch.loggers import CSVLogger


class RunTable(CSVLogger):
    """Lightning's ``CSVLogger``, with a column ``time`` and in a folder that other loggers use too.

    The file is ``metrics.csv``, which :func:`aimc_pl.runs.history` reads. The column ``time`` holds the seconds since
    the logger was made. The arguments are those of ``CSVLogger``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._start = time.monotonic()
        # The version is found now. Later, another logger may have made the folder of this version.
        assert self.version is not None

    @property
    @override
    def experiment(self) -> Any:
        with warnings.catch_warnings():
            if not Path(self.log_dir, "metrics.csv").exists():
                # Lightning warns that it will delete a file, but the folder has files of others only.
                warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
            return super().experiment

    # A decorator hides the signature of the method that this one overrides.
    @override
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().log_metrics({**metrics, "time": time.monotonic() - self._start}, step)
