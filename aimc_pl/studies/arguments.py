"""This module defines the command line that studies and benchmarks share."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def study_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with ``--folder``, where results go, and ``--quick``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--folder", type=_folder, default=Path(), help="of the results; the current one by default")
    either.add_argument(
        "--quick",
        action=_Quick,
        nargs=0,
        default=False,
        help="a run of seconds, to see that everything works; its results go to the current folder",
    )
    return parser


def sweep_parser(description: str | None, seeds: int) -> argparse.ArgumentParser:
    """Return the parser of :func:`study_parser` with ``--seeds`` and ``--jobs`` for a sweep.

    With ``--quick``, a sweep has one seed and stays in this process.
    """
    parser = study_parser(description)
    parser.add_argument("--seeds", type=at_least_one, default=seeds, help="runs of each setting")
    parser.add_argument("--jobs", type=at_least_one, help="runs at a time; one on each core by default")
    return parser


def at_least_one(text: str) -> int:
    """Convert the text of an argument to a whole number of at least 1 (a ``type`` for argparse)."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


class _Quick(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        namespace.quick, namespace.seeds, namespace.jobs = True, 1, 1


def _folder(text: str) -> Path:
    path = Path(text)
    path.mkdir(parents=True, exist_ok=True)
    return path
