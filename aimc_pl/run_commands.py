"""The commands ``aimc-pl compare`` and ``aimc-pl sweep``.

Imports that take seconds wait until the arguments have been read.
"""

import sys
from collections.abc import Sequence
from math import nan
from pathlib import Path

from aimc_pl import command_arguments
from aimc_pl.cli import ELSEWHERE, check_picture, save
from aimc_pl.cli_errors import OneLineParser
from aimc_pl.config_files import with_shipped_configs


def compare(args: Sequence[str]) -> None:
    """Print the largest, the smallest and the last value of a metric of several runs, and draw them.

    Args:
        args: the arguments of the command, without its name.

    Raises:
        UsageError: if an argument is wrong, if a run cannot be read, or if no run has the metric.
    """
    parser = OneLineParser("aimc-pl compare", ELSEWHERE["compare"][1])
    command_arguments.compare(parser)
    options = parser.parse_args(args)
    if options.png is not None:
        check_picture(options.png)
    from aimc_pl.runs import draw_runs, history, names_of

    runs = {name: history(path) for name, path in names_of(options.runs).items()}
    figure = draw_runs(runs, options.metric)
    width = max(map(len, [*runs, "run"]))
    print(options.metric)
    print(f"{'run':<{width}} {'largest':>10} {'smallest':>10} {'last':>10} {'cycles':>12}")
    for name, rows in runs.items():
        values = [row[options.metric] for row in rows if options.metric in row]
        cycles = [row["clock/cycles"] for row in rows if "clock/cycles" in row]
        numbers = [max(values), min(values), values[-1]] if values else [nan] * 3
        last = f"{cycles[-1]:,.0f}" if cycles else "-"
        print(f"{name:<{width}} {' '.join(f'{value:10.4f}' for value in numbers)} {last:>12}")
    if options.png is not None:
        save(figure, options.png)


def sweep(args: Sequence[str]) -> None:
    """Run a config for every combination of some values of its arguments, which a stopped sweep continues.

    Args:
        args: the arguments of the command, without its name.

    Raises:
        UsageError: if an argument is wrong, if a run is refused, if the results belong to another sweep, or if no run
            has the metric.
    """
    parser = OneLineParser("aimc-pl sweep", ELSEWHERE["sweep"][1])
    command_arguments.sweep(parser)
    options = parser.parse_args(args)
    with_shipped_configs(["--config", options.config])  # refuses a config that does not exist
    from aimc_pl.studies.grids import draw_grid, run_grid

    folder = options.folder or Path("sweeps", Path(options.config).stem)
    try:
        rows = run_grid(options.config, dict(options.grid), folder, options.jobs)
    except KeyboardInterrupt:
        print("stopped: the runs that have ended are kept, and the same command goes on")
        sys.exit(130)
    print(f"{len(rows)} runs in {folder / 'results.csv'}")
    save(draw_grid(rows, [key for key, _ in options.grid], options.metric), folder / "results.png")
