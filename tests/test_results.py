"""These tests check that the numbers in the docs are as new as their code, or that the pages say otherwise."""

import ast
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "results"
MEASURED = tomllib.loads((FOLDER / "measured.toml").read_text())
RESULTS = MEASURED["results"]
PAGES = {path.name: " ".join(path.read_text().split()) for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}


def git(*arguments):
    return subprocess.run(["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def history():
    try:
        is_shallow = git("rev-parse", "--is-shallow-repository").strip() == "true"
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("here is no git repository, whose log tells what is newer")
    if is_shallow:
        pytest.skip("a shallow clone does not reach the commits at which results were measured")


@cache
def code_in(source):
    """Return how a Python module computes: its syntax tree without docstrings, comments and functions that draw."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [part for part in node.body if not (is_docstring(part) or is_drawing(part))]
    return ast.dump(tree)


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def is_drawing(node):
    if isinstance(node, ast.ImportFrom):
        return node.module == "aimc_pl.figures" or node.module.startswith("matplotlib")
    if not isinstance(node, ast.FunctionDef):
        return False
    types = [*ast.walk(node.args), *(ast.walk(node.returns) if node.returns else ())]
    return any(isinstance(name, ast.Name) and name.id in ("Axes", "Axis", "Figure") for name in types)


@cache
def changes_since(commit):
    return [line.split("\t") for line in git("diff", "--name-status", "--find-renames", commit).splitlines()]


def changed_since(commit, code):
    """Return the files of which the code has changed, by their present names, sorted.

    Moved files and new words do not count.

    Args:
        commit: the commit to compare with.
        code: what the paths begin with.
    """
    changed = []
    for status, *names in changes_since(commit):
        old, new = names[0], names[-1]
        is_kept = status[0] in "MR" and new.endswith(".py")
        if new.startswith(code) and not (
            is_kept and code_in(git("show", f"{commit}:{old}")) == code_in((ROOT / new).read_text())
        ):
            changed.append(new)
    return sorted(changed)


def test_words_are_no_code():
    source = "def f(x):\n    return x + 1\n"
    with_words = '"""Module."""\n\ndef f(x):\n    """Add 1."""\n    # why\n    return x + 1\n'
    assert code_in(source) == code_in(with_words) != code_in(source.replace("1", "2"))


def test_pictures_are_no_numbers():
    source = "from aimc_pl.figures import RED\ndef f(x):\n    return x + 1\ndef draw() -> Figure:\n    return RED\n"
    assert code_in(source) == code_in(source.replace("RED", "BLUE")) != code_in(source.replace("1", "2"))


@pytest.mark.slow
@pytest.mark.usefixtures("history")
@pytest.mark.parametrize("name", RESULTS)
def test_results_are_as_new_as_their_code_or_say_why_not(name):
    result = RESULTS[name]
    code = (*result["files"], *(path for group in result["groups"] for path in MEASURED["groups"][group]))
    assert [path for path in code if not (ROOT / path).exists()] == []
    newer = changed_since(result["commit"], code)
    if "stale" in result:
        assert newer, f"{name}.csv is up to date: its `stale` in measured.toml can go"
    else:
        assert not newer, f"{name}.csv is older than {', '.join(newer)}: measure again, or say in `stale` why not"


def test_every_csv_file_says_what_it_was_measured_at():
    assert {path.stem.removesuffix("_operations") for path in FOLDER.glob("*.csv")} == set(RESULTS)


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_commits_and_what_is_stale(page):
    for name, commit in re.findall(r"results/(\w+)\.csv\)(?:, (\w+))?", PAGES[page]):
        assert commit == RESULTS[name]["commit"], f"{page} shows {name}.csv"
        assert RESULTS[name].get("stale", "") in PAGES[page]
