"""Mistakes in the arguments, told in one line."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NoReturn

from moe_lightning import callbacks
from moe_lightning.method import Method

TRACEBACK_VARIABLE = "MOE_LIGHTNING_TRACEBACK"
"""Environment variable that, when set, shows where in the code a mistake was found."""


def _children(kind: type) -> list[type]:
    found: list[type] = []
    for child in list[type](kind.__subclasses__()):
        found += [child, *_children(child)]
    return found


def known_classes() -> list[str]:
    """Return the short names of the classes that config files may hold."""
    methods = [kind.__name__ for kind in _children(Method) if not inspect.isabstract(kind)]
    return [*callbacks.__all__, *methods]


@dataclass
class _Line:
    """A line of a message with the lines that are indented below it."""

    text: str
    below: list[_Line] = field(default_factory=list)


def _tree(message: str) -> list[_Line]:
    root = _Line("")
    path: list[tuple[int, _Line]] = [(-1, root)]
    for line in message.splitlines():
        if line.strip():
            indent = len(line) - len(line.lstrip())
            while path[-1][0] >= indent:
                path.pop()
            path[-1][1].below.append(_Line(line.strip()))
            path.append((indent, path[-1][1].below[-1]))
    return root.below


def _words(lines: list[_Line]) -> str:
    return " ".join(f"{line.text} {_words(line.below)}".strip() for line in lines)


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)


_NO_TYPE_FITS = "Does not validate against any of the Union subtypes"


def _missing_quotes(lines: list[_Line], given: str, errors: list[_Line]) -> str:
    """Return what to do where YAML took words like 2:4 for a number with base 60; nothing where that is not so."""
    is_number = any(line.text == "Given value type: <class 'int'>" for line in lines) and given.isdigit()
    if not is_number or int(given) < 60 or not any(re.search(r"Literal\['\d+:\d+'", line.text) for line in errors):
        return ""
    words = f"{int(given) // 60}:{int(given) % 60}"
    return f"got the number {given}, as which YAML reads {words}: put quotes around it, '{words}'"


def _explain(lines: list[_Line], where: str = "", class_path: str = "") -> str:
    """Return the reason that helps, behind the names of the options and classes that lead to it."""
    first = lines[0]
    if first.text.startswith("- Expected a path but") and len(lines) > 1:
        # What the parser tries first with a word where a dataclass may stand; the reason comes behind it.
        return _explain([_Line(lines[1].text.removeprefix("- "), lines[1].below), *lines[2:]], where, class_path)
    if first.text.startswith(_NO_TYPE_FITS) and first.below:
        lines = [_Line(first.text), *first.below, *lines[1:]]
    if key := re.fullmatch(r'Parser key "(.+?)":(.*)', first.text):
        rest = [*([_Line(key[2].strip())] if key[2].strip() else []), *first.below, *lines[1:]]
        return _explain(rest, f"{where}.{key[1]}" if where else f"--{key[1]}", class_path)
    if problem := re.fullmatch(
        r"(?:Problem with given class_path|Problem with given parent class) '(.+?)':", first.text
    ):
        name = problem[1].rpartition(".")[2]
        return _explain([*first.below, *lines[1:]], f"{where}: {name}" if where else name, problem[1])
    given = next(
        (line.text.removeprefix("Given value: ") for line in lines if line.text.startswith("Given value: ")), ""
    )
    errors = next((line.below for line in lines if line.text == "Errors:"), [])
    if first.text.startswith(_NO_TYPE_FITS) and errors:
        for line in errors:
            line.text = line.text.removeprefix("- ")
        if quotes := _missing_quotes(lines, given, errors):
            return f"{where}: {quotes}" if where else quotes
        # Of the types that an option may have, most say only that the value is none of their own.
        useless: tuple[str, ...] = ("Expected a <class", "Not a valid subclass")
        if any("<class 'float'>" in line.text for line in lines if line.text.startswith("Subtypes:")):
            useless += ("Expected a dot import path",)  # a number was meant, and no class
        helpful = [line for line in errors if not line.text.startswith(useless)]
        if helpful:
            return _explain([helpful[0]], where, class_path)
        expected = (line.text for line in errors if line.text.startswith("Expected a <class"))
        reasons = "; ".join(dict.fromkeys(expected))
        reason = f"{given!r} is not possible" + (f": {reasons}" if reasons else "")
    elif name := re.fullmatch(r"Expected a dot import path string: (.*)", first.text):
        reason = f"there is no class {name[1]!r}{_near(name[1], known_classes())}"
    elif option := re.fullmatch(r"Option '(.+?)' is not accepted", first.text):
        known = _parameters(class_path) if class_path else []
        reason = f"there is no option {option[1]!r}{_near(option[1], known)}"
        reason += f"; possible are {', '.join(known)}" if known else ""
    elif first.text.startswith("Not a valid subclass"):
        reason = f"{first.text}: write class_path and, below it, init_args"
    else:
        reason = _words(lines)
    return f"{where}: {reason}" if where else reason


def in_one_line(message: str) -> str:
    """Return the parser's message about a mistake as one line that begins with the option.

    Args:
        message: jsonargparse's message, which for a value that fits none of several types has a dozen lines.
    """
    line = _explain(_tree(message)) if message.strip() else message
    line = line.replace("Expected a typing.Literal", "Expected one of ")
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", lambda kind: kind[1].replace("NoneType", "null"), line)


class OneLineErrors:
    """Base for parsers (before ``ArgumentParser``): errors of one line with a hint, no list of options before it."""

    prog: str
    _actions: list[argparse.Action]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the mistake and leave with status 2.

        Args:
            message: What is wrong.
            ex: Its cause.

        Raises:
            SystemExit: Always.
        """
        if not getattr(self, "exit_on_error", True):
            # A parser inside another one, for the options of a class: the outer one knows the whole story.
            raise argparse.ArgumentError(None, message) from ex
        if os.environ.get(TRACEBACK_VARIABLE) and ex is not None:
            raise ex
        parser = getattr(ex, "subcommand_parser", None) or self
        message = in_one_line(message)
        words = re.findall(r"[\w.]+", message)
        known = [action.dest for action in parser._actions]
        if re.search("unrecognized|does not accept", message):
            unknown = [word for word in words if "." in word and word not in known]
            near = [match for word in unknown for match in difflib.get_close_matches(word, known, n=1)]
            message += f" (did you mean {', '.join(near)}?)" if near else ""
        program = parser.prog.replace(" [options]", "")
        sys.stderr.write(f"{program}: error: {message}\nAll options: {program} --help\n")
        raise SystemExit(2)
