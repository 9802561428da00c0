"""This module finds the blocks of code on the pages of the docs, and runs them as a reader would."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import yaml
from torch.distributed.run import get_args_parser

from aimc_pl.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
QUICK = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "limit_test_batches": 1}
"""What a Trainer of a page gets, so that its program takes seconds."""

_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]*?) -->\n)?"
    r'```(?P<language>\w*)(?: title="(?P<title>[^"]*)")?\n(?P<text>.*?)^```$',
    re.M | re.S,
)


class Block(NamedTuple):
    """A block of code on a page."""

    language: str
    title: str | None
    """The file that the page asks the reader to make of the block."""
    text: str
    reason: str | None
    """Why the block is not run, from an HTML comment above it."""


def blocks(page, language=None):
    """Return the blocks of a page, from top to bottom."""
    found = (Block(m["language"], m["title"], m["text"], m["reason"]) for m in _BLOCK.finditer(page.read_text()))
    return [block for block in found if language in (None, block.language)]


def commands(block):
    """Return the commands of a block, each as its words. A line that ends with a backslash goes on in the next."""
    lines = block.text.replace("\\\n", "").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_page(page):
    """Run the blocks of a page in the current folder, in one namespace. Return the namespace.

    Blocks with a title are appended to that file.
    """
    names = {"__name__": "page"}
    for block in blocks(page):
        if block.title is not None:
            with Path(block.title).open("a") as file:
                file.write(block.text)
        if block.reason is None and block.language == "python":
            exec(compile(block.text, page.name, "exec"), names)
        elif block.reason is None and block.language == "bash":
            for words in commands(block):
                run_command(words)
    return names


def run_command(words):
    """Run a command of a page, as quickly as possible.

    - ``aimc-pl fit`` trains for two mini-batches. With several processes it only reads its arguments.
    - ``aimc-pl sweep`` takes the first value of each axis, in this process.
    - Of the project's Python scripts, the parser of arguments runs. Of its shell scripts, the syntax is checked.
    - Of ``torchrun`` and ``srun`` the options are parsed. SLURM need not be installed.
    - ``tensorboard`` lists what is in the folder, and ends.
    """
    program, *arguments = words
    if program == "aimc-pl":
        run_aimc_pl(arguments)
    elif program.startswith("./scripts/"):
        subprocess.run(["bash", "-n", ROOT / program], check=True)
    elif program.endswith("python") and (ROOT / arguments[0]).exists():
        parse_arguments_of(ROOT / arguments[0], arguments[1:])
    elif program == "python":
        assert Path(arguments[0]).exists(), "no block of the page has the script as its title"
    elif program == "torchrun":
        get_args_parser().parse_args(arguments)
    elif program == "tensorboard":
        server = [sys.executable, "-m", "tensorboard.main", *arguments, "--inspect"]
        subprocess.run(server, check=True, capture_output=True)
    elif program == "srun":
        slurm = argparse.ArgumentParser(exit_on_error=False)
        for option in ("--nodes", "--ntasks-per-node"):
            slurm.add_argument(option, type=int)
        _, rest = slurm.parse_known_args(arguments)
        assert rest[0] == "python", f"unknown options of srun: {rest}"
    else:
        raise ValueError(f"no way is known to run {words}: mark the block with <!-- not run: REASON -->")


def run_aimc_pl(arguments):
    output = None
    if ">" in arguments:
        *arguments, _, output = arguments
    if arguments[0] == "sweep":
        arguments = ["sweep", *(first_value(argument) for argument in arguments[1:]), "--jobs=1"]
        arguments += [f"--grid=trainer.{name}=[{value}]" for name, value in QUICK.items()]
    elif "--trainer.devices" in arguments:
        arguments = [*arguments, "--print_config"]
    elif arguments[0] == "fit" and not any("help" in argument for argument in arguments):
        arguments = [*arguments, *(f"--trainer.{name}={value}" for name, value in QUICK.items())]
    with patch.object(sys, "argv", ["aimc-pl"]), Path(output or "/dev/null").open("w") as file:
        try:
            with redirect_stdout(file):
                main(arguments)
        except SystemExit as end:  # --help and --print_config end the program
            if end.code:
                raise RuntimeError(f"aimc-pl {shlex.join(arguments)}: {end.code}") from end


def first_value(argument):
    """Return an axis of a sweep with the first of its values."""
    key, _, values = argument.partition("=[")
    return f"{key}=[{yaml.safe_load('[' + values)[0]}]" if values else argument


class ArgumentsParsed(BaseException):
    """Ends a script that has parsed its arguments."""


def parse_arguments_of(script, arguments):
    """Run a script until it has parsed its arguments."""

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *args):
        parse(parser, *args)
        raise ArgumentsParsed

    with patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop):
        try:
            with patch.object(sys, "argv", [str(script), *arguments]):
                runpy.run_path(str(script), run_name="__main__")
        except ArgumentsParsed:
            return
    raise AssertionError(f"{script} has not parsed its arguments")
