"""These tests run the programs of the first pages, and check that the site has a page for every name and document."""

import json
import re
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import lightning as L
import pytest
import yaml

from aimc_pl.strategies import AnalogPipelineStrategy

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = ("strategies", "callbacks", "devices", "data", "models", "cost")


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture
def quiet_trainer(monkeypatch):
    """Make the programs of pages write no files and no progress bar, and repeat by their seed."""
    L.seed_everything(0, verbose=False)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    monkeypatch.setattr(L, "Trainer", partial(L.Trainer, **options, enable_model_summary=False))


def test_the_parts_of_the_page_on_tensorboard_exist():
    (program,) = blocks("docs/TENSORBOARD.md")
    names = {"L": L, "strategy": AnalogPipelineStrategy(2)}
    exec(program, names)
    assert names["trainer"].loggers[0].save_dir == "logs"


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_trainer")
@pytest.mark.parametrize("page", ["README.md", "docs/YOUR_MODULE.md"])
def test_the_module_of_the_page_learns_on_crossbars(page):
    (program,) = blocks(page)
    names = {}
    exec(re.sub(r"max_epochs=\d+", "max_epochs=2", program), names)
    module = names["strategy"].lightning_module
    assert any(hasattr(layer, "analog_module") for layer in module.modules())
    # The accuracy after 2 of the page's 8 or 10 epochs. 0.1 is chance.
    assert module.trainer.callback_metrics["accuracy"] > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted(DOCS.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_the_notebook_runs(notebook, monkeypatch, capsys):
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)  # as in a notebook
    cells = json.loads(notebook.read_text())["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    accuracies = [float(number) for number in re.findall(r"accuracy (\d\.\d+)", capsys.readouterr().out)]
    assert len(accuracies) >= 4
    assert min(accuracies) > 0.3  # after an epoch or two; 0.1 is chance


@pytest.mark.parametrize("number", range(len(blocks("docs/DEVICES.md"))))
def test_the_lines_of_the_page_of_devices_run(number):
    exec(blocks("docs/DEVICES.md")[number], {})


def documented():
    return set(re.findall(r"^::: aimc_pl\.([\w.]+)", "".join(p.read_text() for p in DOCS.glob("api/*.md")), re.M))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_the_package(package):
    assert package in documented()
    assert import_module(f"aimc_pl.{package}").__all__  # The reference shows exactly these names.


def nav(entries):
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from nav(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_sites_table_of_contents():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    listed = set(nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert pages <= listed
    notebooks = {path.relative_to(DOCS).with_suffix(".md").as_posix() for path in DOCS.glob("notebooks/*.ipynb")}
    assert listed - pages == notebooks | {"index.md", "CHANGELOG.md", "CONTRIBUTING.md"}
