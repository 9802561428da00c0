"""The command ``aimc-pl``: pictures of schedules and devices, and Lightning's command line.

Torch, Lightning and aihwkit are imported where a command needs them only, because these imports take seconds.
"""

import ast
import os
import re
import select
import signal
import sys
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, auto_cli, auto_parser, set_parsing_settings
from jsonargparse.typing import Path_fr

from aimc_pl import command_arguments
from aimc_pl.arguments import check_number, shown
from aimc_pl.cli_errors import one_line
from aimc_pl.config_files import with_kept_strategies, with_shipped_configs
from aimc_pl.errors import PeerError, UsageError
from aimc_pl.schedule import Duplex, Schedule, ScheduleName

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def schedule(
    num_stages: int = 4,
    num_microbatches: int = 4,
    schedule: ScheduleName = "async",
    duplex: Duplex = "half",
    png: Path | None = None,
    trace: Path | None = None,
) -> None:
    """Print (or draw) what every stage does in every clock, from the fill to the drain of a mini-batch.

    The numbers need no names: ``aimc-pl schedule 8 4`` has 8 stages and 4 micro-batches.

    Args:
        num_stages: M, the number of stages of the pipeline, at most 32.
        num_microbatches: B, the number of micro-batches of a mini-batch, as many as fit into 256 clocks.
        schedule: none, sync, 1f1b, zero_bubble or async.
        duplex: for async, one operation of a stage in a clock (half), or a forward and a backward (full).
        png: the file to draw into instead of printing, in the format that the file's name ends with.
        trace: a file for a trace that https://ui.perfetto.dev opens: the table, and a run of it in which every stage
            goes on as soon as it can. A clock cycle is shown as a microsecond.
    """
    from aimc_pl.diagram import MAX_DRAWN_CLOCKS, MAX_DRAWN_STAGES, draw_figure, draw_text

    check_number("num_stages", num_stages, at_least=1, at_most=MAX_DRAWN_STAGES, whole=True)
    try:
        table = Schedule(schedule, num_stages, num_microbatches, duplex)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if table.num_clocks() > MAX_DRAWN_CLOCKS:
        raise UsageError(
            f"num_stages={num_stages} and num_microbatches={shown(num_microbatches)} take more than {MAX_DRAWN_CLOCKS} "
            "clocks, which is too much for a table: lower one"
        )
    if png is not None:
        check_picture(png)
    if trace is not None:
        check_file("trace", trace)
    if png is None:
        print(draw_text(table, num_microbatches))
    else:
        save(draw_figure(table, num_microbatches), png)
    if trace is not None:
        from aimc_pl.cost.trace import planned_and_simulated, write_trace

        write_trace(trace, planned_and_simulated(table))
    print(
        f"{table.name}, {num_microbatches} micro-batches from fill to drain: {table.num_cycles()} clock cycles, "
        f"computation density {table.density():.3f}, speedup over one accelerator {table.speedup():.2f} in clock cycles"
    )
    if table.is_async:
        print(
            f"In training this pipeline stays full: the more micro-batches, the closer its density is to 1, and its "
            f"speedup to {num_stages}."
        )


def devices(name: str | None = None, png: Path | None = None, num_pulses: int = 1000) -> None:
    """List the analog devices, describe one of them, or draw its response to update pulses.

    The name needs no ``--name``: ``aimc-pl devices soft_bounds`` describes that device.

    Args:
        name: the device to describe.
        png: the file to draw the device's response into.
        num_pulses: the number of pulses in each direction, at most 10,000.
    """
    check_number("num_pulses", num_pulses, at_least=1, at_most=10_000, whole=True)
    if name is None:
        if png is not None:
            raise UsageError("which device? Add its name")
        for known, function in device_functions().items():
            print(f"{known:<24} {_text_of(function).partition('\n')[0]}")
    elif png is None:
        function = device_functions().get(name)
        if function is None:
            raise UsageError(f"unknown device {shown(name)}: 'aimc-pl devices' lists the names")
        print(f"{name}({ast.unparse(function.args)})", _text_of(function), sep="\n\n")
        print(f"\nTo see all that aihwkit simulates, in Python: print(aimc_pl.devices.get_device({name!r}))")
    else:
        from aimc_pl.devices import get_device, plot_response

        check_picture(png)
        save(plot_response(get_device(name), name, num_pulses), png)


def device_functions() -> dict[str, ast.FunctionDef]:
    """Return the functions of all devices, by their names.

    The source is read and not imported, because aihwkit would be imported too.
    """
    sources = {path.stem: ast.parse(path.read_text("utf-8")) for path in Path(__file__).parent.glob("devices/*.py")}
    functions = {
        node.name: node for tree in sources.values() for node in tree.body if isinstance(node, ast.FunctionDef)
    }
    (table,) = (node for node in sources["names"].body if ast.unparse(node).startswith("DEVICES"))
    names = (node.id for node in ast.walk(table) if isinstance(node, ast.Name))
    return {name: functions[name] for name in names if name in functions}


def _text_of(function: ast.FunctionDef) -> str:
    """Return the docstring of a function, without the markup of the API reference."""
    return without_markup(ast.get_docstring(function) or "")


def without_markup(text: str) -> str:
    """Return a docstring, or a part of one, without the markup of the API reference."""
    return re.sub(r"(?::\w+:)?(`+)~?([^`]*)\1", r"\2", text)


TRAINING = {
    "fit": "Train a model, with a validation after every epoch.",
    "validate": "Validate a model once.",
    "test": "Test a model once.",
    "predict": "Run predict_step on the data to predict for.",
}
"""The commands of Lightning's command line."""

COMMANDS: dict[str, Callable[..., None]] = {"schedule": schedule, "devices": devices}
"""The other commands. Their arguments can be given by name or by position."""


STRICT: Any = {"exit_on_error": False, "allow_abbrev": False}
"""Arguments of parsers: :func:`main` prints errors, and a part of a name is a mistake instead of an abbreviation."""

ELSEWHERE = {
    "cost": ("aimc_pl.cost.cli", "Estimate what a config costs on hardware: time, energy, memory."),
    "sweep": (
        "aimc_pl.run_commands",
        "Run a config for every combination of some values, or go on with a stopped sweep.",
    ),
    "compare": ("aimc_pl.run_commands", "Compare a metric of several runs."),
}
"""Commands that are functions of other modules: these modules, and a line of help. They take a list of arguments.

Their arguments are those of the functions of the same names in :mod:`aimc_pl.command_arguments`.
"""


_MORE_HELP = """\
More help:
  aimc-pl {0} --config digits_async.yaml --help
      lists all arguments, such as --trainer.max_epochs; --print_config shows their values
  aimc-pl fit --trainer.strategy.help AnalogPipelineStrategy
      explains the arguments of the pipeline, such as --trainer.strategy.num_stages
  aimc-pl devices
      lists the devices
"""


def main(args: list[str] | None = None) -> None:
    """Run the command ``aimc-pl``. A request that cannot work, or a lost process, ends in one line and exit code 1.

    Args:
        args: the arguments of the command; by default those of the process.
    """
    args = sys.argv[1:] if args is None else args
    try:
        with _ending_with_its_reader():
            _run(args)
    except (UsageError, PeerError, ArgumentError) as error:
        sys.exit(f"aimc-pl: error: {one_line(str(error))}")


def _run(args: list[str]) -> None:
    if args[1:] in (["-h"], ["--help"]) and args[0] in (*TRAINING, "cost"):
        # The help of all arguments has hundreds of lines, and its imports take seconds.
        _overview().parse_args(args)
    elif args and args[0] in TRAINING:
        sys.argv[1:] = with_kept_strategies(with_shipped_configs(args))
        from aimc_pl.training_cli import train

        train()
    elif args and args[0] in COMMANDS:
        command = COMMANDS[args[0]]
        words = " ".join(f"[{name.upper()}]" for name in signature(command).parameters)
        usage = f"aimc-pl {args[0]} {words} [--ARGUMENT VALUE ...]"
        auto_cli(command, _with_names(command, args[1:]), **STRICT, usage=usage)
    elif args and args[0] in ELSEWHERE:
        module, _ = ELSEWHERE[args[0]]
        getattr(import_module(module), args[0])(with_kept_strategies(with_shipped_configs(args[1:])))
    elif args[:1] == ["--print_completion"] and find_spec("shtab") is None:
        raise UsageError("--print_completion needs another package: pip install shtab")
    else:
        _overview().parse_args(args or ["--help"])


@contextmanager
def _ending_with_its_reader() -> Iterator[None]:
    """Context manager that ends the process in silence when nobody reads what it prints, as after ``| head``."""
    try:
        try:
            yield
        except SystemExit:  # after a help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout, 0)
        if not poll.poll(0):
            raise  # another pipe is broken
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)  # what a shell says of a tool that such a pipe has ended


def _overview() -> ArgumentParser:
    """Return a parser that knows the names of all commands, for the help and for the completion of shells."""
    set_parsing_settings(add_print_completion_argument=True)
    parser = ArgumentParser(
        prog="aimc-pl",
        description="Train LightningModules on pipelines of analog in-memory computing accelerators.",
        version=version("aimc-pl"),
        formatter_class=Help,
        exit_on_error=False,
    )
    commands = parser.add_subcommands(title="commands", metavar="COMMAND", description="add --help for their arguments")
    for name, line in TRAINING.items():
        training = ArgumentParser(**described(name, line))
        training.add_argument("--config", type=Path_fr, help="a config file, or the name of a config of the package")
        training.add_argument("--ckpt_path", type=Path_fr, help="the checkpoint to begin with")
        commands.add_subcommand(name, training, help=line)
    for name, command in COMMANDS.items():
        own = auto_parser(command)
        commands.add_subcommand(name, own, help=own.description)
    for name, (_, line) in ELSEWHERE.items():
        other = ArgumentParser(**described(name, line)) if name == "cost" else ArgumentParser(description=line)
        if name == "cost":
            other.add_argument("--config", type=Path_fr, help="a config file, or the name of a config of the package")
        getattr(command_arguments, name)(other)
        commands.add_subcommand(name, other, help=line)
    return parser


class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's help, with lines as they are written."""


def described(command: str, line: str) -> dict[str, Any]:
    """Return arguments of the parser of a command that takes Lightning's arguments too: its help, and ``STRICT``."""
    return {
        "usage": f"aimc-pl {command} [--config CONFIG] [--ARGUMENT VALUE ...]",
        "description": line,
        "epilog": _MORE_HELP.format(command),
        **STRICT,
    }


def _with_names(command: Callable[..., None], args: Sequence[str]) -> list[str]:
    """Return the arguments with names for those that have none, which jsonargparse would refuse."""
    parameters = signature(command).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.default is not parameter.empty]
    if len(names) < len(parameters):
        return [*args]
    named, others, rest = list[str](), list[str](), iter(args)
    for arg in rest:
        if arg.startswith("-"):
            # Every option but --help has one value.
            others += [arg, *([] if "=" in arg or arg in ("-h", "--help") else islice(rest, 1))]
        elif len(named) < len(names):
            named.append(f"--{names[len(named)]}={arg}")
        else:
            others.append(arg)
    return [*named, *others]


def check_file(name: str, path: Path) -> None:
    """Check that a file can be written to a path, before there is anything to write.

    Args:
        name: the name of the argument.
        path: the path.

    Raises:
        UsageError: if the path is a folder, or lies in no folder.
    """
    if path.is_dir():
        raise UsageError(f"{name}={path} is a folder: add the name of a file")
    if not path.parent.is_dir():
        raise UsageError(f"{name}={path} cannot be written: there is no folder {path.parent}")


def check_picture(path: Path) -> None:
    """Check that a picture can be written to a path, before it is drawn.

    Raises:
        UsageError: if :func:`check_file` refuses the path, or if it names no known format.
    """
    from matplotlib.figure import Figure

    check_file("png", path)
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known:
        raise UsageError(f"png={path} must end in .png, or another of {', '.join(known)}")


def save(figure: "Figure", path: Path) -> None:
    """Write a picture.

    Raises:
        UsageError: if the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UsageError(f"png={path} cannot be written: {error.strerror or error}") from error
