"""Functions that find the config files of the command, and check that these can be read as they are meant.

They also keep a strategy that is named on the command line from dropping the arguments that a config gives it.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from importlib.resources import as_file, files
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import yaml

from aimc_pl.arguments import shown
from aimc_pl.errors import UsageError
from aimc_pl.schedule import ScheduleName

_STRATEGY = "aimc_pl.strategies.AnalogPipelineStrategy"
_SCHEDULES = {f"aimc_{name}": name for name in get_args(ScheduleName)}


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


def read_config(name: str) -> dict[str, Any]:
    """Return what a config says, before interpolations are resolved.

    Args:
        name: a config file, or the name of a config of the package.

    Raises:
        UsageError: if :func:`check_config` refuses the config.
    """
    return yaml.safe_load(Path(_config_path(name)).read_text("utf-8"))


def with_kept_strategies(args: list[str]) -> list[str]:
    """Return the arguments of the command, in which a strategy's name sets the schedule of the strategy of a config.

    ``--trainer.strategy=aimc_sync`` alone would make a new strategy, without the config's device and other arguments.
    The path of a strategy's class is written as a mapping, since the parser takes a text for a name.

    Raises:
        UsageError: if a config names the strategy that an earlier config sets up, or replaces one that has been named
            before it, or if a device has no name.
    """
    kept: list[str] = []
    is_set_up, named = False, ""
    for before, arg in pairwise(["", *args]):
        kept.append(arg)
        option, _, value = (arg if arg.startswith("-") else f"{before}={arg}").partition("=")
        if option.endswith(".device"):
            _check_named(option, _mapping(value))
        strategy = _strategy(option, value) if value else None
        if isinstance(strategy, dict):
            if named and option != "--trainer.strategy":
                name = f"{option} {Path(value).name}"
                raise UsageError(f"{named} comes before {name}, which sets the strategy again: put it after")
            is_set_up = _is_ours(strategy.get("class_path", _STRATEGY))
        if not isinstance(strategy, str):
            continue
        schedule = _SCHEDULES.get(strategy)
        is_ours = schedule is not None or _is_ours(strategy)
        if option == "--trainer.strategy":
            named = f"{option} {value}"
            if is_ours or "." in strategy:
                del kept[-1 if arg.startswith("-") else -2 :]
        elif is_set_up and is_ours:
            raise UsageError(
                f"{option} {Path(value).name}: strategy: {strategy} would drop the arguments of an earlier config, "
                f"such as its device: write strategy: {{init_args: {{schedule: {schedule or 'NAME'}}}}}"
            )
        if not (is_ours and is_set_up) and (is_ours or "." in strategy):
            path = strategy if "." in strategy else _STRATEGY
            kept.append(f'--trainer.strategy={{"class_path": "{path}"}}')
        if schedule is not None:
            kept.append(f"--trainer.strategy.init_args.schedule={schedule}")
        is_set_up = is_ours
    return kept


def _check_named(option: str, devices: dict[str, Any]) -> None:
    """Check that no layer is given an empty mapping as its device. The parser would leave out the layer."""
    for name, device in devices.items():
        if device == {}:
            raise UsageError(f"{option}: {name!r} has no device: write null for a digital layer")


def _is_ours(class_path: str) -> bool:
    return class_path.rpartition(".")[2] == _STRATEGY.rpartition(".")[2]


def _strategy(option: str, value: str) -> Any:
    """Return what an argument of the command says of the strategy; ``None`` if it says nothing."""
    if option == "--trainer.strategy":
        return _mapping(value) or value
    if option == "--trainer":
        return _mapping(value).get("strategy")
    if option in ("--config", "-c") and Path(value).is_file():
        trainer = _mapping(Path(value).read_text("utf-8")).get("trainer")
        return trainer.get("strategy") if isinstance(trainer, dict) else None
    return None


def _mapping(text: str) -> dict[str, Any]:
    """Return the mapping that a text contains as YAML; empty if it contains anything else."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:  # The parser refuses it later.
        return {}
    return value if isinstance(value, dict) else {}


def _config_path(name: str) -> str:
    """Return the path of a config: a file of that name, or else the config of that name that the package ships.

    Raises:
        UsageError: if the name ends as those of configs do, and there is none.
    """
    shipped = {file.name: file for file in files("aimc_pl.configs").iterdir() if file.name.endswith(".yaml")}
    check_config(Path(name))
    if Path(name).exists() or not name.endswith((".yaml", ".yml")):
        return name
    if name not in shipped:
        alike = get_close_matches(Path(name).name, shipped, n=1)
        hint = f": the package has {alike[0]}" if alike else ""
        raise UsageError(f"config {name} does not exist{hint}")
    with as_file(shipped[name]) as path:
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
        raise UsageError(f"config {path} must have lines NAME: VALUE, got {_in_words(root)}")
    for mapping in _mappings(root, set()):
        lines: dict[str, int] = {}
        for key in (key for key, _ in mapping.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UsageError(f"config {path} has {key.value!r} twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line


def _in_words(node: yaml.Node | None) -> str:
    """Return what a YAML document has instead of a mapping."""
    if node is None:
        return "nothing"
    return shown(node.value) if isinstance(node, yaml.ScalarNode) else "a list"


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
