"""These tests check rules of the project: imports, the wheel, docstrings and private names."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LIGHTNING_ALLOWED = {"cli.py", "training_cli.py", "tasks.py", "images.py", "text.py"}


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
        if path.name not in ("cli.py", "training_cli.py"):
            assert not name.startswith(("aimc_pl.strategies", "aimc_pl.callbacks"))
        if path.name == "schedule.py":
            assert not name.startswith(("torch", "aimc_pl", "aihwkit"))


@pytest.mark.parametrize("path", sorted((ROOT / "strategies").glob("*.py")), ids=lambda path: path.stem)
def test_strategies_do_not_know_callbacks(path):
    assert not any(name.startswith("aimc_pl.callbacks") for name in imports_of(path))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_installed_wheel_trains(wheel, tmp_path):
    """Check that the installed package trains from another folder, with one of its own configs."""
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    fit = ["fit", "--config", "digits_async.yaml", "--trainer.max_epochs=1", "--trainer.limit_train_batches=4"]
    program = f"import aimc_pl.cli; print(aimc_pl.cli.__file__); aimc_pl.cli.main({fit})"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith(str(tmp_path / "site"))
    assert "clock cycles on 4 accelerators" in run.stdout + run.stderr
    assert list(tmp_path.glob("logs/digits_async/version_0/checkpoints/*.ckpt"))


@pytest.mark.slow
def test_wheel_installs_nothing_but_aimc_pl(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"aimc_pl", f"aimc_pl-{PROJECT['version']}.dist-info"}
    for expected in ("strategies/analog_pipeline.py", "callbacks/clock.py", "configs/digits_async.yaml", "py.typed"):
        assert f"aimc_pl/{expected}" in names
    sources = {p.relative_to(ROOT).as_posix() for folder in ("aimc_pl",) for p in (ROOT / folder).rglob("*.py")}
    sources |= {
        f"aimc_pl/{p.relative_to(ROOT).as_posix()}"
        for f in ("strategies", "callbacks")
        for p in (ROOT / f).rglob("*.py")
    }
    assert sources <= set(names)


@pytest.mark.slow
def test_the_sdist_has_every_file_of_the_repository(tmp_path):
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("here is no git repository, which knows its files")
    source = tmp_path / "source"  # because setuptools packs again what an earlier build in the same folder has packed
    for path in tracked:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
    assert set(tracked) <= packed


@pytest.mark.parametrize(
    "package",
    ["aimc_pl.strategies", "aimc_pl.callbacks", "aimc_pl.cost", "aimc_pl.devices", "aimc_pl.data", "aimc_pl.models"],
)
def test_public_names_are_documented(package):
    module = import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{package}.{name} has no docstring"


def foreign_private_names(tree):
    """Yield imports of private names, and attributes with an underscore that nothing in the file defines."""
    nodes = [*ast.walk(tree)]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    of_self = {id(a) for a in attributes if isinstance(a.value, ast.Name) and a.value.id in ("self", "cls")}
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {a.attr for a in attributes if id(a) in of_self and isinstance(a.ctx, ast.Store)}
    for node in nodes:
        names = []
        if isinstance(node, ast.ImportFrom) and not node.module.startswith("aimc_pl"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute) and id(node) not in of_self and node.attr not in own:
            names = [node.attr]
        for name in names:
            # The methods of namedtuple are public, and begin with an underscore to avoid clashes with fields.
            if name.startswith("_") and not name.endswith("__") and name not in ("_replace", "_asdict", "_"):
                yield f"line {node.lineno}: {name}"


PYTHON = sorted(
    path
    for folder in ("aimc_pl", "strategies", "callbacks", "scripts", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if not path.name.startswith(("private_", "test_"))
)
EXCEPTIONS = {
    "user_code.py": ("_python_dispatch",),
    "forked.py": (": _exit",),
    "link_exchange.py": (": _exchanges", ": _send"),
}
"""Names that users must import too, a documented function of ``os``, and own names that a forger would use."""


@pytest.mark.slow
@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_private_names_of_other_libraries_live_in_one_file_each(path):
    found = [*foreign_private_names(ast.parse(path.read_text()))]
    allowed = EXCEPTIONS.get(path.name, ())
    assert [name for name in found if not name.endswith(allowed)] == []


def test_foreign_private_names_are_found():
    source = """
from torch._C import x
import torch.utils._pytree
from lightning.fabric.utilities.seed import _set_rng_states
class A:
    def __init__(self): self._mine = 1
    def f(self, module): return self._mine, module._mine, module._hooks, super()._other(), module.__dict__
module._written = 1
from aimc_pl.a import _b
"""
    names = [found.split()[-1] for found in foreign_private_names(ast.parse(source))]
    assert sorted(names) == ["_C", "_hooks", "_other", "_pytree", "_set_rng_states", "_written"]


@pytest.mark.parametrize("path", sorted((ROOT / "callbacks").glob("*.py")), ids=lambda path: path.stem)
def test_callbacks_learn_from_events_only(path):
    """Check that callbacks import neither stages nor the code that divides and runs a step."""
    imported = {*imports_of(path)}
    inside = {"planning", "training", "training_step", "placement", "ownership", "batches"}
    assert not any(name.startswith(f"aimc_pl.strategies.{room}") for name in imported for room in inside)
    assert not any(name.startswith(("aimc_pl.flight", "aimc_pl.passage", "aimc_pl.trial")) for name in imported)
    assert "Stage" not in {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}


def test_what_is_said_about_the_package_agrees():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    classified = [text.split()[-1] for text in PROJECT["classifiers"] if "Python :: 3." in text]
    assert tested == classified == ["3.12", "3.13"]
    assert PROJECT["requires-python"] == ">=3.12,<3.14"


def test_the_newest_release_of_the_changelog_is_the_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert next(name for name in headings if name != "Unreleased") == PROJECT["version"]
    assert "Unreleased" not in headings[1:]


def test_a_release_has_the_text_of_its_section():
    def notes(tag):
        script = [sys.executable, ROOT / "scripts" / "release_notes.py", tag]
        return subprocess.run(script, capture_output=True, text=True)

    printed = notes(f"v{PROJECT['version']}").stdout
    assert printed.startswith("- ")
    assert printed in (ROOT / "CHANGELOG.md").read_text()
    assert "\n## " not in printed
    for wrong in ("v0.0.1", PROJECT["version"]):
        assert notes(wrong).returncode == 1
        assert f"give the tag v{PROJECT['version']}, got {wrong}" in notes(wrong).stderr
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    assert any("scripts/release_notes.py" in step.get("run", "") for step in workflow["jobs"]["release"]["steps"])


def test_no_file_names_a_registry():
    hosts = ("pypi" + ".org", "pytorch" + ".org/whl", "python" + "hosted", "npm" + "js")
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True).stdout.split()
    texts = {path: (ROOT / path).read_bytes() for path in tracked if (ROOT / path).is_file()}
    assert [path for path, text in texts.items() for host in hosts if host.encode() in text] == []
