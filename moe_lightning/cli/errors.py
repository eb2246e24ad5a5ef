"""Mistakes in the arguments, told in one line."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from typing import NoReturn

TRACEBACK_VARIABLE = "MOE_LIGHTNING_TRACEBACK"
"""Environment variable that, when set, shows where in the code a mistake was found."""


def in_one_line(message: str) -> str:
    """Return the parser's message about a mistake as one line that begins with the option.

    Args:
        message: jsonargparse's message, which for a value that fits none of several types has a dozen lines.
    """
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    key = re.match(r'Parser key "(.+?)":', lines[0])
    if key is None:
        return " ".join(lines)
    value = next((line.removeprefix("Given value: ") for line in lines if line.startswith("Given value: ")), None)
    if value is None:
        return f"--{key[1]}: " + " ".join([lines[0][key.end() :], *lines[1:]]).strip()
    # Each type says why the value is none of its own.
    reasons = dict.fromkeys(line.removeprefix("- ") for line in lines if line.startswith("- Expected"))
    return f"--{key[1]}: {value!r} is not possible: {'; '.join(reasons)}"


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
