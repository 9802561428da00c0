"""These tests compare docs/COST.md with the constants in the code and with what the command prints."""

import re
import sys
from pathlib import Path

import pytest

from aimc_pl.cli import main
from aimc_pl.cost import PRESETS, spread
from aimc_pl.cost.constants import OTHER_VALUES
from aimc_pl.cost.report import engineering

PAGE = (Path(__file__).parents[2] / "docs" / "COST.md").read_text()


def table(heading, rows):
    return "\n".join([f"| {' | '.join(row)} |" for row in [heading, ["---"] * len(heading), *rows]])


def constants():
    """Return the tables of constants: those that all presets share, those of each preset, and further values."""
    rows = {name: [*hardware.rows()] for name, hardware in PRESETS.items()}
    shared = {row for row in rows["rasch_2024"] if all(row in own for own in rows.values())}
    for name in ("", *PRESETS):
        found = [row for row in rows[name or "rasch_2024"] if (row in shared) == (name == "")]
        lines = []
        for constant, unit, what, quantity in found:
            least, most = (engineering(each.value, unit) for each in spread(constant))
            between = "" if least == most else f"{least} to {most}"
            lines.append([f"`{constant}`", what, engineering(quantity.value, unit), between, quantity.source])
        yield table(["constant", "meaning", "value", "all sources", "source"], lines)
    further = [
        [f"`{name}`", engineering(quantity.value, quantity.unit), quantity.source]
        for name, quantities in OTHER_VALUES.items()
        for quantity in quantities
    ]
    yield table(["constant", "value", "source"], further)


def test_the_page_lists_the_constants_of_the_code():
    for each in constants():
        assert each in PAGE


@pytest.mark.slow
def test_the_page_shows_what_the_command_prints(monkeypatch, capsys):
    ((command, printed),) = re.findall(r"```bash\n(aimc-pl .*)\n```\n\nprints\n\n```text\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.setattr(sys, "argv", ["aimc-pl"])
    main(command.split()[1:])
    assert capsys.readouterr().out.strip() == printed.strip()


@pytest.mark.slow
def test_the_page_says_what_zero_bubble_saves_in_mixed_precision(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["aimc-pl"])
    main(["cost", "--config=digits_async.yaml", "--trainer.strategy.init_args.device=mixed_precision"])
    times = dict(re.findall(r"^(\w+) +([\d.]+ ns) ", capsys.readouterr().out, re.MULTILINE))
    said = f"`1f1b` takes {times['1f1b']} for a sample and `zero_bubble` {times['zero_bubble']}."
    assert said in " ".join(PAGE.split())
