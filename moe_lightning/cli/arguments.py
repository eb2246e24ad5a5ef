"""Small conveniences for command-line arguments that the parser does not have."""

from __future__ import annotations

from collections.abc import Sequence


def with_bare_flags(arguments: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Let ``--flag`` alone mean ``--flag true``.

    Args:
        arguments: Command-line arguments.
        flags: Options that hold true or false.

    Returns:
        The arguments with the missing values.
    """
    filled: list[str] = []
    for place, argument in enumerate(arguments):
        filled.append(argument)
        following = arguments[place + 1].lower() if place + 1 < len(arguments) else ""
        if argument in flags and following not in ("true", "false", "yes", "no", "1", "0"):
            filled.append("true")
    return filled


def with_replaced_lists(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """Let a list on the command line replace the one of a config file.

    The parser would mix the options of items that stand at the same place in both.

    Args:
        arguments: Command-line arguments.
        options: Options that hold lists of objects.

    Returns:
        The arguments, with each of the options emptied before it is set.
    """
    replaced: list[str] = []
    for argument in arguments:
        name = argument.partition("=")[0]
        if name in options:
            replaced += [name, "[]"]
        replaced.append(argument)
    return replaced
