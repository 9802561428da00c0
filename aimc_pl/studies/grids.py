"""This module runs a config of the command for every combination of some values, and draws the results."""

import json
import logging
import re
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from fcntl import LOCK_EX, LOCK_NB, flock
from io import StringIO
from itertools import product
from pathlib import Path
from shutil import rmtree
from textwrap import shorten
from typing import Any, TextIO
from zlib import crc32

import yaml
from matplotlib.figure import Figure

from aimc_pl.arguments import listed, shown
from aimc_pl.cli_errors import one_line
from aimc_pl.config_files import read_config
from aimc_pl.errors import UsageError
from aimc_pl.figures import styled
from aimc_pl.runs import history
from aimc_pl.studies.rows import Row, read_rows
from aimc_pl.studies.statistics import half_width
from aimc_pl.studies.sweeps import missing_cases, sweep

SEED = "seed_everything"
"""The argument of the command whose values repeat a setting, and are averaged in the figure."""

_FIT = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
_RESULTS = re.compile(r"(train|val|test|clock)/")


def run_grid(
    config: str, grid: Mapping[str, Sequence[Any]], folder: Path, jobs: int | None = None
) -> list[dict[str, str]]:
    """Run ``aimc-pl fit`` for every combination of the grid that the folder lacks, and return a row for each.

    A row has the values of the grid and, of everything that the run logged as ``train/…``, ``val/…``, ``test/…`` or
    ``clock/…``, the last value. Rows are in ``results.csv``, and what the config said is in ``results.yaml``. Each run
    has its own folder in ``runs``, with its table, its checkpoints and what it printed.

    Args:
        config: a config file, or the name of a config of the package.
        grid: arguments of the command by their names, without ``--``, and the values of each.
        folder: the folder of the results, which is made if it does not exist.
        jobs: number of runs at a time; by default one per core.

    Raises:
        UsageError: if a run is refused, if the results in the folder are those of another grid, if the config has
            changed since, or if another sweep runs in the folder. What the command itself refuses of a value is refused
            before the first run.
    """
    fit, table = _Fit(folder), folder / "results.csv"
    cases = [
        {"config": config} | {key: _text(value) for key, value in zip(grid, values, strict=True)}
        for values in product(*grid.values())
    ]
    checked: set[tuple[str, str]] = set()
    for case in missing_cases(cases, table):
        if new := case.items() - checked:
            fit.check(dict(new), **case)
            checked |= new
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            flock(lock, LOCK_EX | LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another sweep runs in {folder}: wait until it has ended, or choose another folder"
            ) from error
        _keep_config(config, folder)
        return sweep(fit, cases, table, jobs)


@styled
def draw_grid(rows: Sequence[Row], keys: Sequence[str], metric: str = "test/accuracy") -> Figure:
    """Return a figure of a metric against the values of the first key, with a line for the values of the others.

    Lines are means over seeds, with Student's 95 % intervals.

    Args:
        rows: the rows of :func:`run_grid`.
        keys: the names of the arguments in the grid.
        metric: the name of a column.

    Raises:
        UsageError: if the rows have no such metric.
    """
    found = [row for row in rows if row.get(metric)]
    if not found:
        columns = [name for name in rows[0] if _RESULTS.match(name)] if rows else []
        raise UsageError(f"the runs have no metric {shown(metric)}: choose one of {listed(columns)}")
    varied = [key for key in keys if key != SEED and len({row[key] for row in found}) > 1]
    axis, *others = varied or [keys[0]]
    lines: dict[str, dict[str, list[float]]] = {}
    for row in found:
        label = ", ".join(f"{_short(key)} {row[key]}" for key in others)
        lines.setdefault(label, {}).setdefault(row[axis], []).append(float(row[metric]))
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for label, values in lines.items():
        x = [_number(value) for value in values]
        means = [sum(runs) / len(runs) for runs in values.values()]
        errors = [half_width(runs) for runs in values.values()]
        axes.errorbar(x, means, errors, marker="o", capsize=3, label=label)
    axes.set(xlabel=_short(axis), ylabel=metric)
    if others:
        axes.legend()
    return figure


class _Fit:
    """Run the command once. The class is a function that other processes can import, with a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._runs = self._folder / "runs"

    def __call__(self, config: str, **values: str) -> list[dict[str, float]]:
        from aimc_pl.cli import main

        _keep_config(config, self._folder)  # refuses a config that has changed while the sweep runs
        folder = self._runs / _name_of(config, values)
        rmtree(folder, ignore_errors=True)  # what a stopped sweep has left
        folder.mkdir(parents=True)
        with (folder / "output.txt").open("w") as output, _printing_to(output):
            try:
                main(self._arguments(config, values))
            except SystemExit as stop:
                raise UsageError(str(stop).removeprefix("aimc-pl: error: ")) from stop
        return [{name: value for row in history(folder) for name, value in row.items() if _RESULTS.match(name)}]

    def check(self, new: Mapping[str, str], config: str, **values: str) -> None:
        """Check that the command can run, without the run.

        Args:
            new: those of the arguments that have not been checked.
            config: the config.
            values: the values of the grid.

        Raises:
            UsageError: if it cannot run. The message names the new argument if there is only one.
        """
        from aimc_pl.training_cli import check_fit

        try:
            with _printing_to(StringIO()):
                check_fit(self._arguments(config, values))
        except (UsageError, ArgumentError) as error:
            reason = one_line(str(error))
            (key, value), *others = new.items()
            is_named = others or (_short(key) in reason and value in reason)
            raise UsageError(reason if is_named else f"{key}={shorten(value, 50)}: {reason}") from error

    def _arguments(self, config: str, values: Mapping[str, str]) -> list[str]:
        logger = {"save_dir": str(self._runs), "name": _name_of(config, values), "version": ""}
        table = json.dumps({"class_path": "aimc_pl.callbacks.RunTable", "init_args": logger})
        overrides = [f"--{key}={value}" for key, value in values.items()]
        return ["fit", "--config", config, *_FIT, f"--trainer.logger={table}", *overrides]


def _keep_config(config: str, folder: Path) -> None:
    """Keep what a config says beside the results, of which the config's name identifies the rows.

    Raises:
        UsageError: if the config has changed since the first of its runs in the folder.
    """
    path = folder / "results.yaml"
    kept = yaml.safe_load(path.read_text("utf-8")) if path.exists() else {}
    content = read_config(config)
    if config in kept:
        before, now = _flat(kept[config]), _flat(content)
        changed = sorted(key for key in before | now if before.get(key, _flat) != now.get(key, _flat))
        if changed:
            raise UsageError(
                f"{config} has changed since its runs in {folder}, in {listed(changed, 60)}: undo that, or start anew "
                "with another --folder"
            )
    elif any(row.get("config") == config for row in read_rows(folder / "results.csv")):
        raise UsageError(f"{folder} does not say with which {config} its results were made: choose another --folder")
    else:
        path.write_text(yaml.safe_dump({**kept, config: content}, sort_keys=False), "utf-8")


def _flat(config: Any, name: str = "") -> dict[str, Any]:
    """Return the values in a config by their dotted names."""
    if not isinstance(config, dict) or not config:
        return {name: config}
    parts = [_flat(value, f"{name}.{key}".lstrip(".")) for key, value in config.items()]
    return {key: value for part in parts for key, value in part.items()}


@contextmanager
def _printing_to(output: TextIO) -> Iterator[None]:
    """Context manager that prints to a file what a run prints, without the lines of the Trainer.

    The progress bar would get lost in these.
    """
    logging.disable(logging.INFO)
    try:
        with redirect_stdout(output), redirect_stderr(output):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _name_of(config: str, values: Mapping[str, str]) -> str:
    """Return a name for the folder of a run, which no other run of the sweep has."""
    readable = re.sub(r"[^\w.=,-]+", "_", ",".join(f"{_short(key)}={value}" for key, value in values.items()))
    return f"{readable[:80]}-{crc32(repr((config, values)).encode()):08x}"


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
