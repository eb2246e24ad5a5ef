"""What ``cache-logits`` takes from the config of the run that will learn from the cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from moe_lightning.cli.config_files import CONFIG_OPTIONS, find_config
from moe_lightning.cli.trainer_options import processes_of

RUN_OPTION = "--run"


def with_options_of_run(arguments: Sequence[str]) -> list[str]:
    """Put what decides about a run's blocks in front of the arguments, all of which win over it.

    Args:
        arguments: Command-line arguments, among them perhaps ``--run CONFIG`` (the last one counts), or ``-c FILE`` of
            a file with the key ``run``.

    Raises:
        FileNotFoundError: There is no such config.
        ValueError: It is no config of fit, or one of fit is given as that of this command.
    """
    run: str | None = None
    for value in _values(arguments, CONFIG_OPTIONS):
        content = _content(value, "-c")
        if "trainer" in content:
            raise ValueError(
                f"-c {value}: this is a config of fit: give it by {RUN_OPTION} {value}, so that the blocks are those "
                "of that run"
            )
        run = content.get("run", run)
    run = next(reversed(list(_values(arguments, (RUN_OPTION,)))), run)
    if run is None:
        return list(arguments)
    content = _content(run, RUN_OPTION)
    trainer = content.get("trainer") or {}
    options: dict[str, Any] = {f"data.{name}": value for name, value in (content.get("data") or {}).items()}
    options["accumulate_grad_batches"] = trainer.get("accumulate_grad_batches") or 1
    options["devices"] = processes_of(trainer)
    given = (value if isinstance(value, str) else json.dumps(value) for value in options.values())
    return [*(f"--{name}={value}" for name, value in zip(options, given, strict=True)), *arguments]


def steps_of_run(run: str) -> int:
    """Return the optimizer steps of a run.

    Args:
        run: Its config, as after ``--run``.

    Raises:
        ValueError: The config does not say.
    """
    steps = (_content(run, RUN_OPTION).get("trainer") or {}).get("max_steps")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"--steps is missing: {run} has no trainer.max_steps to take its place")
    return steps


def _values(arguments: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in names and equals:
            yield value
        elif argument in names and place + 1 < len(arguments):
            yield arguments[place + 1]


def _content(value: str, option: str) -> dict[str, Any]:
    try:
        path: Path = find_config(value)
    except FileNotFoundError as error:
        raise FileNotFoundError(str(error).replace("-c ", f"{option} ", 1)) from None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{option} {value}: this is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{option} {value}: a config file holds options by name, as in 'steps: 60'")
    return content
