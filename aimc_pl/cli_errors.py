"""Messages about a bad argument of the command, in one line: those of argparse, and shortened ones of jsonargparse.

If an argument may have one of several types, jsonargparse says for every type why the argument does not have it, and
repeats all values around the argument. Only one of these reasons helps: the first that says more than "Expected a …".
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
_EXPECTED = re.compile(
    r"^Expected an? (?:<class '(?:\w+\.)*(?P<name>\w+)'>|(?P<text>[^\n:]*?))"
    r"(?:: (?P<word>[^\n]*?))?(?:\. Got value: (?P<given>.*))?$"
)
_NOT_MEANT = re.compile(r"^(Import path .* does not correspond to a subclass of|Expected a path but) ")
_GIVEN = re.compile(r"^ *Given value: (.*)", re.M | re.S)
_NESTED = re.compile(r"NestedArg\(key='([^']*)'")
_CLASS_PATH = re.compile(r"NestedArg\(key='(?P<key>[^']*class_path)', val='(?P<given>[^']*)'\)")
_NO_CLASS = "'NoneType' object has no attribute 'get'"
"""What jsonargparse says of a ``class_path`` of an argument of a class that names nothing."""
_NO_MAPPING = re.compile(r"^'(\w+)' object has no attribute 'keys'")
"""What jsonargparse says of the ``init_args`` of a class that are no mapping."""
_NO_ARGUMENT = re.compile(r"^Option '(?P<name>\w+)[\w.]*' is not accepted$")
_NO_ATTRIBUTE = re.compile(r"^module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'$")
_CALLABLE = re.compile(r"^Type \S*Callable\[.*\] expects a function or a callable class:\s*")
_WORDS = {
    "NoneType": "null",
    "dot import path string": "the name of a class",
    "Sequence": "a list",
    "Iterable": "a list",
}


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
        else:
            break
    if nested := _NESTED.search(reason):
        # An argument of a class has been given, and the class has not.
        argument = ".".join(keys)
        reason = f"give its class before --{argument}.{nested[1]}, such as --{argument}=CLASS or a --config with one"
    elif callable_type := _CALLABLE.match(reason):
        return one_line(f'Parser key "{".".join(keys)}":\n{reason[callable_type.end() :]}')
    elif reason.startswith(_NO_CLASS) and (unknown := _CLASS_PATH.search(message)):
        keys.append(unknown["key"])
        reason = f"{unknown['given']} is no class or function that can be imported and used here"
        if unknown["given"].startswith("aihwkit."):
            reason = f"{unknown['given']} is no device: aimc_pl.devices.ConfiguredDevice takes it as rpu_config"
    elif wrong := _NO_MAPPING.match(reason):
        reason = f"init_args must have lines NAME: VALUE, got a {wrong[1]}"
    if wrong := _EXPECTED.match(reason):
        reason = _expected([wrong], wrong["given"])
    reason, *_ = reason.split("\nSubclass types expect one of:")
    reason, *_ = reason.split(". Got value: Namespace(")
    reason, *_ = reason.split("\n    full_key: ")  # what OmegaConf adds
    reason = " ".join(reason.split())
    return f"{'.'.join(keys)}: {reason}{_hint(reason, owner)}".removeprefix(": ")


def _hint(reason: str, owner: str) -> str:
    """Return the question whether another name was meant, if there is one like the name that a reason does not know.

    Args:
        reason: the reason.
        owner: the path of the class or function whose arguments the reason is about. jsonargparse has imported it.
    """
    names: Iterable[str] = ()
    if unknown := _NO_ARGUMENT.match(reason):
        module, _, name = owner.rpartition(".")
        with suppress(TypeError, ValueError):  # it cannot be found, or has no signature
            known: Any = getattr(sys.modules.get(module), name, None)
            names = signature(known).parameters
    elif unknown := _NO_ATTRIBUTE.match(reason):
        names = dir(sys.modules.get(unknown["module"]))
    alike = get_close_matches(unknown["name"], names, n=1) if unknown else []
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
    telling = [reason for reason in reasons if not _NOT_MEANT.match(reason)]
    expected = [_EXPECTED.match(reason) for reason in telling]
    given = _GIVEN.search("\n".join(lines[end:]))
    found = (reason for reason, match in zip(telling, expected, strict=True) if not match)
    return next(found, _expected([match for match in expected if match], given and given[1]))


def _expected(types: Sequence[re.Match[str]], given: str | None) -> str:
    """Return what was expected: the names of types, and the values of all literals as one list."""
    names, values = dict[str, None](), dict[str, None]()
    for match in types:
        name = match["name"] or match["text"]
        if name.startswith("typing.Literal"):
            values |= dict.fromkeys(map(str, ast.literal_eval(name.removeprefix("typing.Literal"))))
            name = "values"
        names[_WORDS.get(name, name)] = None
    one_of = f"{'one of ' if len(values) > 1 else ''}{', '.join(values)}"
    expected = " or ".join(one_of if name == "values" else name for name in names)
    given = given or next((match["word"] for match in types if match["word"]), None)
    return f"expected {expected}{f', got {given}' if given else ''}"
