"""The picture of TensorBoard's page after a run of the demo with write noise, as a browser shows it.

It needs Chromium (on Debian: apt-get install chromium). Two minutes. Usage:

    .venv/bin/python docs/images/tensorboard_page.py --folder docs/images
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

from playwright.sync_api import Page, sync_playwright

from aimc_pl.studies.arguments import study_parser

CHROMIUM = which("chromium") or which("google-chrome")
"""The browser of this machine, or ``None`` if there is none."""

CHART = "tf-custom-scalar-multi-line-chart-card"
LINE = ".line-plot:not(.ghost) path.line[d]"
"""TensorBoard's names of a chart, and of a line in it. Ghosts are the values before smoothing."""

NOISE = '[{"class_path": "aimc_pl.callbacks.WriteNoise", "init_args": {"std": 0.002}}]'


@contextmanager
def tensorboard(folder: str | Path, load_fast: bool = False) -> Iterator[str]:
    """Context manager in which TensorBoard serves the runs in a folder on a free port. It gives the address.

    Args:
        folder: the folder.
        load_fast: whether TensorBoard reads the files as it does by default, while it serves them. A chart that is
            drawn too early then stays empty. Otherwise all data are read before the server starts.
    """
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--host", "127.0.0.1", "--port", "0"]
    if not load_fast:
        command += ["--load_fast", "false", "--reload_interval", "0", "--reload_task", "blocking"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = ""
        for line in server.stderr:
            if address := re.search(r"http://[\d.]+:\d+/", line):
                yield address[0]
                return
            said += line
        raise RuntimeError(f"TensorBoard has not started: {said}")
    finally:
        server.terminate()
        server.communicate()


@contextmanager
def browser_page(width: int, height: int, scale: float = 1.0) -> Iterator[Page]:
    """Context manager with an empty page of Chromium. Pictures of it have ``scale`` pixels for each of its pixels."""
    with sync_playwright() as playwright:
        # Chromium does not start as root with its sandbox.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
            page.set_default_timeout(120_000)  # milliseconds; a busy machine takes its time
            yield page
        finally:
            browser.close()


def open_charts(page: Page, address: str) -> None:
    """Open the custom-scalars page and wait until all charts are drawn and no line moves any more."""
    page.goto(f"{address}#custom_scalars")
    page.locator(CHART).first.wait_for()
    for chart in page.locator(CHART).all():
        chart.locator(LINE).first.wait_for(state="attached")
    before: list[str | None] = []
    while (lines := [line.get_attribute("d") for line in page.locator(LINE).all()]) != before:
        before = lines
        page.wait_for_timeout(500)


def train(epochs: int) -> None:
    """Train the demo with write noise, and log to the current folder."""
    command = [sys.executable, "-c", "from aimc_pl.cli import main; main()", "fit", "--config", "digits_async.yaml"]
    noise = ["--trainer.callbacks+=aimc_pl.callbacks.DeviceNoise", f"--trainer.callbacks.noise={NOISE}"]
    subprocess.run(
        [*command, *noise, f"--trainer.max_epochs={epochs}", "--trainer.enable_progress_bar=false"], check=True
    )


def main() -> None:
    """Train, and write the picture."""
    args = study_parser(__doc__).parse_args()
    path = args.folder.resolve() / "tensorboard.png"
    with TemporaryDirectory() as folder, chdir(folder):
        train(3 if args.quick else 20)
        with tensorboard("logs/digits_async") as address, browser_page(1080, 1820, scale=1.5) as page:
            open_charts(page, address)
            page.screenshot(path=path)


if __name__ == "__main__":
    main()
