"""The arguments of the commands ``cost``, ``sweep`` and ``compare``.

They are apart from the commands, because shells complete them: nothing here needs an import that takes seconds.
"""

from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path
from typing import Any

import yaml

from aimc_pl.studies.arguments import at_least_one


def cost(parser: ArgumentParser) -> None:
    """Add the arguments that ``aimc-pl cost`` has besides those of a fit."""
    parser.add_argument(
        "--hardware", default="rasch_2024", help="a name, such as rasch_2024 or isaac_2016, or a YAML file of your own"
    )
    parser.add_argument("--num_minibatches", type=int, default=16, help="how many mini-batches to simulate")
    parser.add_argument("--png", type=Path, default=None, help="a file to draw the estimate into")
    parser.add_argument("--trace", type=Path, default=None, help="a file for a Chrome or Perfetto trace")


def sweep(parser: ArgumentParser) -> None:
    """Add the arguments of ``aimc-pl sweep``."""
    parser.add_argument("config", help="a config file, or the name of a config of the package")
    parser.add_argument(
        "--grid",
        action="append",
        required=True,
        type=_axis,
        metavar="KEY=[VALUE, ...]",
        help="an argument of 'aimc-pl fit' and its values, in quotes; the first is the horizontal axis of the figure",
    )
    parser.add_argument("--folder", type=Path, help="of the results; sweeps/NAME-OF-THE-CONFIG by default")
    parser.add_argument("--jobs", type=at_least_one, help="runs at a time; one on each core by default")
    parser.add_argument("--metric", default="test/accuracy", help="what the figure shows; test/accuracy by default")


def compare(parser: ArgumentParser) -> None:
    """Add the arguments of ``aimc-pl compare``."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run, or its metrics.csv")
    parser.add_argument("--metric", default="val/accuracy", help="the metric; val/accuracy by default")
    parser.add_argument("--png", type=Path, help="the file to draw into: the metric against epochs and clock cycles")


def _axis(text: str) -> tuple[str, list[Any]]:
    key, _, values = text.partition("=")
    try:
        read = yaml.safe_load(values)
    except yaml.YAMLError:
        read = None
    if not key or not isinstance(read, list) or not read:
        raise ArgumentTypeError(f"must be KEY=[VALUE, ...], got {text!r}")
    return key.removeprefix("--"), read
