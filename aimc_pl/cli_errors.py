"""Messages about a bad argument of the command, in one line: those of argparse, and shortened ones of jsonargparse.

If an argument may have one of several types, jsonargparse says for every type why the argument does not have it, and
repeats all values around the argument. Only one of these reasons helps: the one that gets deepest. A class that refuses
an argument says more than that another class was expected, and this says more than that a number was.
"""

import ast
import re
import sys
import textwrap
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from inspect import signature
from typing import Any, NoReturn, override

from aimc_pl.errors import UsageError

_UNION = re.compile(r"^Does not validate against any of the Union subtypes\n.*?^(?P<indent> *)Errors:\n", re.M | re.S)
_PATH = re.compile(r"^(?:Parser key \"(?P<key>[^\"]*)\":|Problem with given class_path '(?P<owner>[^']*)':) *\n*")
_CALLABLE = re.compile(r"^Type \S*Callable\[.*\] expects a function or a callable class:\s*")
_OF_CLASS = re.compile(r"\. Got value: Namespace\(class_path='(?P<owner>[^']*)'")
_EXPECTED = re.compile(
    r"^Expected an? (?:<class '(?:\w+\.)*(?P<name>\w+)'>|(?P<text>[^\n:]*?))"
    r"(?:: (?P<word>[^\n]*?))?(?:\. Got value: (?P<given>.*))?$"
)
_NOT_MEANT = re.compile(r"^Expected a path but ")
_NO_CLASS_PATH = re.compile(
    r"^(?:Not a valid subclass of (?P<name>\w+)|Expected an instantiatable class, but [\w.]*?(?P<base>\w+) is abstract)"
    r"(?:\. Got value: (?P<given>[^\n]*))?"
)
_NO_SUBCLASS = re.compile(r"^Import path ?(?P<path>\S*) does not correspond to a subclass of (?P<name>\w+)")
_GIVEN = re.compile(r"^ *Given value: (.*)", re.M | re.S)
_NESTED = re.compile(r"NestedArg\(key='([^']*)'")
_CLASS_PATH = re.compile(r"NestedArg\(key='(?P<key>[^']*class_path)', val='(?P<given>[^']*)'\)")
_NO_CLASS = "'NoneType' object has no attribute 'get'"
"""What jsonargparse says of a ``class_path`` of an argument of a class that names nothing."""
_NO_MAPPING = re.compile(r"^'(\w+)' object has no attribute 'keys'")
"""What jsonargparse says of the ``init_args`` of a class that are no mapping."""
_NO_ARGUMENT = re.compile(r"^Option '(?P<name>[^']*)' is not accepted")
_NO_ATTRIBUTE = re.compile(r"^(?P<reason>module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)')")
_SEVERAL = re.compile(r"^Multiple subclasses with name (?P<name>\w+)\..*?: (?P<path>[\w.]+)", re.S)
_UNRESOLVED = re.compile(
    r"^\w+ raised while resolving interpolation: (?P<reason>[^\n]*)\n *full_key: (?:\w+\.(?=trainer))?(?P<key>\S*)"
)
_WORDS = {
    "NoneType": "null",
    "dot import path string": "the name of a class",
    "Sequence": "a list",
    "Iterable": "a list",
}
_WITH_CLASSES = (
    *("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "torch.optim", "torch.optim.lr_scheduler"),
    *("aimc_pl.callbacks", "aimc_pl.data", "aimc_pl.devices", "aimc_pl.models", "aimc_pl.tasks"),
)
"""The modules with the classes and functions that configs name most."""
_LONGEST = 60
"""The number of characters of a wrong value that a message repeats."""


class OneLineParser(ArgumentParser):
    """argparse's parser, which refuses a bad argument in one line, and names in full only.

    Raises:
        UsageError: while it parses, if an argument is missing, unknown or wrong.
    """

    def __init__(self, prog: str, description: str | None = None) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    @override
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def one_line(message: str) -> str:
    """Return the innermost reason in a message of jsonargparse, after the dotted name of the argument."""
    reason, keys, owner = message.strip(), list[str](), ""
    while True:
        if path := _PATH.match(reason):
            keys += [path["key"]] if path["key"] else []
            owner = path["owner"] or owner
            reason = textwrap.dedent(reason[path.end() :])
        elif union := _UNION.match(reason):
            reason = _telling(reason[union.end() :], len(union["indent"]))
        elif reason.startswith("- "):
            reason = _telling(reason, -1)
        elif callable_type := _CALLABLE.match(reason):
            given = _OF_CLASS.search(reason)
            owner = given["owner"] if given else owner
            reason = reason[callable_type.end() :]
        else:
            break
    if nested := _NESTED.search(reason):
        # An argument of a class has been given, and the class has not.
        argument = ".".join(keys)
        reason = f"give its class before --{argument}.{nested[1]}, such as --{argument}=CLASS or a --config with one"
    elif reason.startswith(_NO_CLASS) and (unknown := _CLASS_PATH.search(message)):
        keys.append(unknown["key"])
        reason = f"{unknown['given']} is no class or function that can be imported and used here"
        if unknown["given"].startswith("aihwkit."):
            reason = f"{unknown['given']} is no device: aimc_pl.devices.ConfiguredDevice takes it as rpu_config"
    elif wrong := _NO_MAPPING.match(reason):
        reason = f"init_args must have lines NAME: VALUE, got a {wrong[1]}"
    elif wrong := _NO_ARGUMENT.match(reason):
        reason = _no_argument(wrong["name"], owner)
    elif wrong := _NO_ATTRIBUTE.match(reason):
        reason = wrong["reason"] + _meant(wrong["name"], dir(sys.modules.get(wrong["module"])))
    elif wrong := _UNRESOLVED.match(reason):
        reason = f"{wrong['key']}: {wrong['reason']}"
    elif wrong := _SEVERAL.match(reason):
        reason = f"several classes have the name {wrong['name']}: give the path of one, such as {wrong['path']}"
    elif wrong := _EXPECTED.match(reason):
        reason = _expected([wrong], wrong["given"])
    reason, *_ = reason.split("\nSubclass types expect one of:")
    reason, *_ = reason.split(". Got value: Namespace(")
    reason, *_ = reason.split("\n    full_key: ")  # what OmegaConf adds
    reason = " ".join(reason.split())
    return f"{'.'.join(keys)}: {reason}".removeprefix(": ")


def _no_argument(name: str, owner: str) -> str:
    """Return that an argument does not exist, and which one may be meant.

    Args:
        name: the argument's name, and after a dot what it was given.
        owner: the path of the class or function that has been given it. jsonargparse has imported it.
    """
    module, _, function = owner.rpartition(".")
    known = _arguments(getattr(sys.modules.get(module), function, None))
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    if last in known and first != last:
        # A mapping has been taken for the arguments of the class that was there before.
        return f"{name.removesuffix(f'.{last}')!r} needs a class_path, with {last} in its init_args"
    if first == "class_path":
        return "besides class_path, a mapping may have init_args only"
    if function == "RPUConfigBase":
        # The class_path before is a device's name alone, or there is none.
        return f"write class_path: aimc_pl.devices.NAME, such as aimc_pl.devices.soft_bounds, with {first} in init_args"
    wrong = last if _meant(last, known) and not _meant(first, known) else first
    return f"{function or 'this'} has no argument {wrong!r}{_meant(wrong, known)}"


def _arguments(function: Any) -> list[str]:
    """Return the names of the arguments of a function or a class, and of those from which the class inherits."""
    known: list[str] = []
    for each in getattr(function, "__mro__", [function]):
        with suppress(TypeError, ValueError):  # it is nothing to call, or has no signature
            known += signature(each).parameters
    return known


def _meant(name: str, known: Iterable[str]) -> str:
    """Return the question whether another name was meant, if there is one like it."""
    alike = get_close_matches(name, known, n=1)
    return f": did you mean {alike[0]}?" if alike else ""


def _telling(text: str, indent: int) -> str:
    """Return the reason that helps most, of a list of reasons.

    Args:
        text: the list, and what follows it.
        indent: the list ends at the first line that is indented by at most so many spaces.
    """
    lines = text.splitlines()
    indents = [len(line) - len(line.lstrip()) if line.strip() else indent + 1 for line in lines]
    end = next((n for n, found in enumerate(indents) if found <= indent), len(lines))
    items = re.split(r"^- ", textwrap.dedent("\n".join(lines[:end])), flags=re.M)[1:]
    reasons = [textwrap.dedent(f"  {item}").strip() for item in items]
    given = _GIVEN.search("\n".join(lines[end:]))
    of_classes, of_types = list[str](), list[re.Match[str]]()
    for reason in (reason for reason in reasons if not _NOT_MEANT.match(reason)):
        if wrong := _NO_CLASS_PATH.match(reason):
            of_classes.append(_no_class_path(wrong["name"] or wrong["base"], wrong["given"] or (given and given[1])))
        elif wrong := _NO_SUBCLASS.match(reason):
            of_classes.append(f"{wrong['path'] or _cut(given[1] if given else 'this')} is no {wrong['name']}")
        elif wrong := _EXPECTED.match(reason):
            of_types.append(wrong)
        else:
            return reason
    # Most arguments may also be a number, text or null. Which class was expected says more, and which is unknown most.
    unknown = [match for match in of_types if match["word"]]
    if of_classes and not unknown:
        return of_classes[0]
    return _expected(unknown if of_classes else of_types, given and given[1])


def _no_class_path(name: str, given: str | None) -> str:
    """Return that a value names no class: if it is a mapping, with the keys that it has.

    Args:
        name: of the class that was expected.
        given: the value as Python writes it, if it is known.
    """
    with suppress(ValueError, SyntaxError):  # It is not known, or holds more than literals.
        value = ast.literal_eval(given or "")
        if isinstance(value, dict):
            return f"{name} needs class_path and init_args, got {_cut(', '.join(map(str, value)) or '{}')}"
    return f"expected {name}{f', got {_cut(given)}' if given else ''}"


def _expected(types: Sequence[re.Match[str]], given: str | None) -> str:
    """Return what was expected: the names of types, and the values of all literals as one list."""
    names, values = dict[str, None](), dict[str, None]()
    for match in types:
        name = match["name"] or match["text"]
        if name.startswith("typing.Literal"):
            values |= dict.fromkeys(map(str, ast.literal_eval(name.removeprefix("typing.Literal"))))
            name = "values"
        is_item = match["given"] and given and given.startswith("[")
        names[f"a list of {name}" if is_item else _WORDS.get(name, name)] = None
    one_of = f"{'one of ' if len(values) > 1 else ''}{', '.join(values)}"
    expected = " or ".join(one_of if name == "values" else name for name in names)
    word = next((match["word"] for match in types if match["word"]), "")
    if word and (not given or word in given):
        given = word
    meant = _meant(given or "", values) or _meant_class(word)
    return f"expected {expected}{f', got {_cut(given)}' if given else ''}{meant}"


def _meant_class(word: str) -> str:
    """Return the question whether a class or function was meant whose name is like a word, or the same."""
    modules = {path: sys.modules[path] for path in _WITH_CLASSES if path in sys.modules}
    paths = {name: f"{path}.{name}" for path, module in modules.items() for name in dir(module)}
    alike = get_close_matches(word, paths, n=1, cutoff=0.75)
    return f": did you mean {paths[alike[0]]}?" if alike else ""


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
