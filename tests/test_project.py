"""Rules of the house that tests can keep: imports, the wheel, docstrings."""

import ast
import inspect
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIGHTNING_ALLOWED = {"cli.py", "tasks.py", "images.py", "text.py"}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", sorted((ROOT / "aimc_pl").rglob("*.py")), ids=lambda path: path.stem)
def test_imports_run_one_way(path):
    for name in imports_of(path):
        if path.name not in LIGHTNING_ALLOWED:
            assert not name.startswith("lightning")
        if path.name != "cli.py":
            assert not name.startswith(("aimc_pl.strategies", "aimc_pl.callbacks"))
        if path.name == "schedule.py":
            assert not name.startswith(("torch", "aimc_pl", "aihwkit"))


@pytest.mark.parametrize("path", sorted((ROOT / "strategies").glob("*.py")), ids=lambda path: path.stem)
def test_strategies_do_not_know_callbacks(path):
    assert not any(name.startswith("aimc_pl.callbacks") for name in imports_of(path))


def test_wheel_installs_nothing_but_aimc_pl(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"aimc_pl", "aimc_pl-0.1.0.dist-info"}
    for expected in ("strategies/analog_pipeline.py", "callbacks/clock.py", "configs/digits_async.yaml", "py.typed"):
        assert f"aimc_pl/{expected}" in names
    sources = {p.relative_to(ROOT).as_posix() for folder in ("aimc_pl",) for p in (ROOT / folder).rglob("*.py")}
    sources |= {
        f"aimc_pl/{p.relative_to(ROOT).as_posix()}"
        for f in ("strategies", "callbacks")
        for p in (ROOT / f).rglob("*.py")
    }
    assert sources <= set(names)


@pytest.mark.parametrize(
    "package",
    ["aimc_pl.strategies", "aimc_pl.callbacks", "aimc_pl.devices", "aimc_pl.data", "aimc_pl.models"],
)
def test_public_names_are_documented(package):
    module = import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{package}.{name} has no docstring"
