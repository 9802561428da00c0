"""Functions that find the config files of the command, and check that these can be read as they are meant."""

from collections.abc import Iterator
from importlib.resources import as_file, files
from itertools import pairwise
from pathlib import Path

import yaml

from aimc_pl.arguments import shown
from aimc_pl.errors import UsageError


def with_shipped_configs(args: list[str]) -> list[str]:
    """Return the arguments of the command, with paths in place of the names of configs that the package ships.

    Raises:
        UsageError: if :func:`check_config` refuses a config.
    """
    found = []
    for before, arg in pairwise(["", *args]):
        if before in ("--config", "-c"):
            found.append(_config_path(arg))
        elif arg.startswith(("--config=", "-c=")):
            option, _, name = arg.partition("=")
            found.append(f"{option}={_config_path(name)}")
        else:
            found.append(arg)
    return found


def _config_path(name: str) -> str:
    """Return the path of a config: a file of that name, or else the config of that name that the package ships."""
    shipped = files("aimc_pl.configs") / name
    check_config(Path(name))
    if Path(name).exists() or Path(name).name != name or not shipped.is_file():
        return name
    with as_file(shipped) as path:
        return str(path)


def check_config(path: Path) -> None:
    """Check that a config file, if it exists, is YAML and sets nothing twice. YAML would silently take the last value.

    Raises:
        UsageError: if the file cannot be read or is wrong. The message names the file and, if known, the line.
    """
    if not path.is_file():
        return
    try:
        root = yaml.compose(path.read_text("utf-8"), yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config {path} cannot be read as text: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"config {path} is not YAML{line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"config {path} must have lines NAME: VALUE, got {shown(root.value) if root else 'nothing'}")
    for mapping in _mappings(root, set()):
        lines: dict[str, int] = {}
        for key in (key for key, _ in mapping.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UsageError(f"config {path} has {key.value!r} twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line


def _mappings(node: yaml.Node, seen: set[int]) -> Iterator[yaml.MappingNode]:
    """Yield all mappings of a YAML document, each once, even if aliases repeat it."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _mappings(item, seen)
