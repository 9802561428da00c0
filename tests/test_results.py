"""The numbers of the docs are no older than the code that they depend on, or the pages that show them say so."""

import re
import subprocess
import tomllib
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


def changed_since(commit):
    """The files that are not as they were, under their names of today; to be moved is no change."""
    changes = (line.split("\t") for line in git("diff", "--name-status", "--find-renames", commit).splitlines())
    return {names[-1] for status, *names in changes if status != "R100"}


@pytest.mark.slow
@pytest.mark.usefixtures("history")
@pytest.mark.parametrize("name", RESULTS)
def test_results_are_as_new_as_their_code_or_say_why_not(name):
    result = RESULTS[name]
    code = [*result["files"], *(path for group in result["groups"] for path in MEASURED["groups"][group])]
    assert [path for path in code if not (ROOT / path).exists()] == []
    newer = [file for file in sorted(changed_since(result["commit"])) if file.startswith(tuple(code))]
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
