"""These tests run every block of code on the pages, and check that the site has a page for every name and document."""

import json
import re
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import lightning as L
import pytest
import yaml
from pages import PAGES, QUICK, blocks, run_page

from aimc_pl.cli import COMMANDS, ELSEWHERE, TRAINING

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = ("strategies", "callbacks", "devices", "data", "models", "cost")
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def runs_in_a_moment(page):
    """Return whether a page has nothing that trains or imports a command."""
    code = "".join(block.text for block in blocks(page) if block.language in ("python", "bash"))
    return not re.search(r"aimc-pl|\.fit\(|scripts/studies|tensorboard", code)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.stem, marks=() if runs_in_a_moment(page) else pytest.mark.slow) for page in PAGES],
)
def test_every_block_of_the_page_runs(page, monkeypatch):
    """Run a page from top to bottom, with two mini-batches in the place of each training."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer
    monkeypatch.setattr(L, "Trainer", lambda **options: trainer(**(options | QUICK | QUIET)))
    run_page(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_what_it_is(page):
    """Check that no code escapes the test above: every block names its language, and a file is used by a command."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    assert not re.findall(r"^\n(?: {4,}|\t)\S.*", text, re.M)  # Markdown's other way to write code
    assert "```" not in text
    for block in blocks(page):
        assert block.language in ("python", "bash", "yaml", "text", "bibtex")
        if block.language == "yaml":
            assert any(block.title in other.text for other in blocks(page) if other.language == "bash")


INLINE = re.compile(r"`(?:\.venv/bin/python )?((?:aimc-pl|(?:\./)?scripts/[^\s`]+)(?: [^`]*)?)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_within_sentences_name_what_exists(page):
    for command in INLINE.findall(page.read_text()):
        program, *arguments = command.split()
        if program != "aimc-pl":
            assert (ROOT / program).exists()
        elif arguments:
            assert arguments[0] in (*TRAINING, *COMMANDS, *ELSEWHERE, "--print_completion")


@pytest.fixture
def quiet_trainer(monkeypatch):
    """Make the programs of pages write no files and no progress bar, and repeat by their seed."""
    L.seed_everything(0, verbose=False)
    monkeypatch.setattr(L, "Trainer", partial(L.Trainer, **QUIET))


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_trainer")
@pytest.mark.parametrize("page", ["README.md", "docs/YOUR_MODULE.md"])
def test_the_module_of_the_page_learns_on_crossbars(page):
    (program,) = (block.text for block in blocks(ROOT / page, "python"))
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
            exec("".join(line for line in cell["source"] if not line.startswith("%")), names)
    accuracies = [float(number) for number in re.findall(r"accuracy (\d\.\d+)", capsys.readouterr().out)]
    assert len(accuracies) >= 4
    assert min(accuracies) > 0.3  # after an epoch or two; 0.1 is chance


@pytest.mark.parametrize("notebook", sorted(DOCS.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_the_notebook_has_its_outputs(notebook):
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    assert "stderr" not in {output.get("name") for output in outputs}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert notebook.stat().st_size < 200_000


def documented():
    return set(re.findall(r"^::: aimc_pl\.([\w.]+)", "".join(p.read_text() for p in DOCS.glob("api/*.md")), re.M))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_the_package(package):
    assert package in documented()
    assert import_module(f"aimc_pl.{package}").__all__  # The reference shows exactly these names.


def test_the_reference_has_all_modules_for_studies_and_what_pages_import():
    modules = {f"studies.{path.stem}" for path in (ROOT / "aimc_pl" / "studies").glob("[a-z]*.py")}
    for page in PAGES:
        modules |= set(re.findall(r"from aimc_pl\.([\w.]+) import", page.read_text()))
    assert {"studies.grids", "runs"} <= modules <= documented()


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


def test_the_error_of_an_unknown_strategy_is_on_the_page_as_lightning_says_it():
    with pytest.raises(ValueError, match="invalid strategy name") as caught:
        L.Trainer(strategy="aimc_unknown")
    said = str(caught.value).partition(" Example")[0].replace("aimc_unknown", "aimc_async")
    # pytorch_lightning is the same code with its own name, and importing it here would make other tests warn.
    said = said.replace("lightning.pytorch.", "pytorch_lightning.")
    assert f"``{said} …``" in (DOCS / "TROUBLESHOOTING.md").read_text()


LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


def anchors(page):
    """Return the anchors of the headings of a page, as Python-Markdown and GitHub make them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page):
    for path, anchor in LINK.findall(page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_every_picture_is_on_a_page():
    shown = {(page.parent / path).resolve() for page in PAGES for path, _ in LINK.findall(page.read_text())}
    assert set(DOCS.rglob("*.png")) <= shown
