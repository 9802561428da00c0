"""The pictures of docs/WHATS_NEW.md: what release 0.1.0 showed, and the terminal of a run as it is now.

The code of the tag v0.1.0 runs, as it was. It needs Chromium, as tensorboard_page.py does. Three minutes. Usage:

    .venv/bin/python docs/images/whats_new.py --folder docs/images
"""

import os
import pty
import re
import subprocess
import sys
from contextlib import chdir
from fcntl import ioctl
from io import StringIO
from pathlib import Path
from shutil import copy
from struct import pack
from sysconfig import get_path
from tempfile import TemporaryDirectory
from termios import TIOCSWINSZ

from rich.console import Console
from rich.text import Text
from tensorboard_page import NOISE, browser_page, open_charts, tensorboard

from aimc_pl.studies.arguments import study_parser

ROOT = Path(__file__).parents[2]
OLD = "v0.1.0"

COLUMNS, ROWS = 120, 21
"""The size of the terminal."""

_PIECE = re.compile(r"(?P<erase>\x1b\[2K)|(?P<up>\x1b\[1A)|(?P<next>\r?\n)|\r|\x1b\[\?25[lh]")
_PAGE = """\
<body style="background: #1e1e1e; color: #d4d4d4; margin: 12px">
<pre style="font: 13px/1.35 'DejaVu Sans Mono', monospace; margin: 0">{code}</pre></body>"""


def check_out(folder: Path) -> None:
    """Write the code of the old release into a folder, importable as its installation made it."""
    archive = subprocess.run(["git", "-C", ROOT, "archive", OLD], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    for package in ("strategies", "callbacks", "configs"):
        (folder / "aimc_pl" / package).symlink_to(folder / package)


def terminal_output(arguments: tuple[str, ...], code: Path | None = None) -> str:
    """Run ``aimc-pl`` in a terminal, by default of this package. Return all that it writes.

    Args:
        arguments: those of the command.
        code: the folder of another version.
    """
    command = (sys.executable, "-c", "from aimc_pl.cli import main; main()", *arguments)
    process, terminal = pty.fork()
    if not process:
        terminal_variables = {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
        os.execvpe(command[0], command, os.environ | terminal_variables | ({"PYTHONPATH": str(code)} if code else {}))
    ioctl(terminal, TIOCSWINSZ, pack("HHHH", ROWS, COLUMNS, 0, 0))
    written = bytearray()
    try:
        while part := os.read(terminal, 1 << 16):
            written += part
    except OSError:  # Linux says so when the command has ended.
        pass
    _, status = os.waitpid(process, 0)
    if status:
        raise RuntimeError(f"{command} has failed: {written[-2000:].decode(errors='replace')}")
    return written.decode()


def fit(epochs: int, config: str | Path) -> tuple[str, ...]:
    """Return the arguments that train the demo with write noise."""
    noise = ("--trainer.callbacks+=aimc_pl.callbacks.DeviceNoise", f"--trainer.callbacks.noise={NOISE}")
    return ("fit", f"--config={config}", f"--trainer.max_epochs={epochs}", *noise)


def screen(written: str, shown: str) -> list[str]:
    """Return the rows of a terminal at the moment when a row first matches a pattern.

    Rich needs few of a terminal's controls: erase the row, go up, next row. Colours stay in the rows.
    """
    rows, row, start = [""], 0, 0
    for piece in _PIECE.finditer(written):
        rows[row] += written[start : piece.start()]
        start = piece.end()
        if piece["next"]:
            row += 1
            rows += [""] * (row == len(rows))
        elif piece["erase"] and any(re.search(shown, bar) for bar in rows[row - 1 :]):
            return rows
        elif piece["erase"]:
            rows[row] = ""
        elif piece["up"]:
            row -= 1
    raise RuntimeError(f"the terminal has never shown {shown}")


def photograph(rows: list[str], path: Path) -> None:
    """Write a picture of what a terminal shows. Paths of this machine are shortened."""
    text = "\n".join(rows).rstrip().replace(get_path("purelib"), "site-packages")
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True, color_system="truecolor")
    lines = Text.from_ansi(text).wrap(console, COLUMNS)
    for line in lines[-ROWS:]:
        console.print(line, soft_wrap=True)
    with browser_page(COLUMNS * 8 + 24, 10, scale=1.5) as page:
        page.set_content(console.export_html(code_format=_PAGE, inline_styles=True))
        page.screenshot(path=path, full_page=True)


def main() -> None:
    """Train with both versions, and write the pictures."""
    args = study_parser(__doc__).parse_args()
    results = args.folder.resolve()
    epochs = 2 if args.quick else 20
    moment = rf"Epoch {epochs // 4}/{epochs - 1} .* 2\d/41"
    with TemporaryDirectory() as folder, chdir(folder):
        written = terminal_output(fit(epochs, "digits_async.yaml"))
        photograph(screen(written, moment), results / "bar.png")
    if args.quick:  # The old code does not change.
        return
    with TemporaryDirectory() as folder, chdir(folder):
        old = Path(folder, OLD)
        old.mkdir()
        check_out(old)
        schedule = ("schedule", "--num_stages=4", "--num_microbatches=4", "--schedule=async", "--png=schedule.png")
        terminal_output(schedule, old)
        copy("schedule.png", results / "old_schedule.png")
        written = terminal_output(fit(epochs, old / "configs" / "digits_async.yaml"), old)
        photograph(screen(written, moment), results / "old_bar.png")
        # The old page shows its staleness only as TensorBoard reads files by default.
        with tensorboard("logs/digits_async", load_fast=True) as address, browser_page(1080, 1820) as page:
            page.wait_for_timeout(10_000)  # until the files are read
            open_charts(page, address)
            page.screenshot(path=results / "old_tensorboard.png")


if __name__ == "__main__":
    main()
