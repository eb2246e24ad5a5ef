"""Where config files come from: a path, or the name of one that comes with the package."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

CONFIG_OPTIONS = ("-c", "--config")


def packaged_configs() -> dict[str, Path]:
    """Return the config files that come with the package, by name (without ``.yaml``)."""
    folder = Path(str(resources.files("moe_lightning"))) / "configs"
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}


def find_config(value: str) -> Path:
    """Return the config file that the value of ``-c`` means.

    Args:
        value: Path of a YAML file, or the name of a packaged one such as ``quickstart``. A path that exists wins.

    Raises:
        FileNotFoundError: Neither exists.
    """
    path = Path(value)
    if path.is_file():
        return path
    packaged = packaged_configs()
    name = value.removesuffix(".yaml").removeprefix("configs/")
    if name in packaged:
        return packaged[name]
    names = ", ".join(packaged) or "none"
    raise FileNotFoundError(
        f"-c {value}: there is no such file, and no config of that name comes with the package (those are: {names})"
    )


def resolve_configs(arguments: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Replace config names among command-line arguments by paths.

    Args:
        arguments: Command-line arguments.

    Returns:
        The arguments with paths in them, and those paths in the order given.

    Raises:
        FileNotFoundError: A config that does not exist, see :func:`find_config`.
    """
    resolved: list[str] = []
    found: list[Path] = []
    expects_value = False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if expects_value:
            found.append(find_config(argument))
            resolved.append(str(found[-1]))
        elif equals and option in CONFIG_OPTIONS:
            found.append(find_config(value))
            resolved.append(f"{option}={found[-1]}")
        else:
            resolved.append(argument)
        expects_value = not expects_value and argument in CONFIG_OPTIONS
    return resolved, found


def run_name(configs: Sequence[Path]) -> str:
    """Return the default name of a run directory: the names of its configs, joined with ``+``."""
    return "+".join(dict.fromkeys(path.stem for path in configs)) or "default"
