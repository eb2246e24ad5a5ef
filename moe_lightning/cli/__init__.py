"""The command line: ``moe-lightning COMMAND ...``.

This file stays light: ``--version`` and ``--help`` answer without importing torch. Each command lives in a module of
its own, imported when it is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from moe_lightning import __version__

COMMANDS: dict[str, tuple[str, str]] = {
    "fit": ("moe_lightning.cli.lightning", "train a Mixtral on text; compress and recover it in mid-run"),
    "validate": ("moe_lightning.cli.lightning", "likelihood on the validation split"),
    "test": ("moe_lightning.cli.lightning", "likelihood on the test split"),
    "predict": ("moe_lightning.cli.lightning", "continue prompts"),
    "compress": ("moe_lightning.cli.compress", "compress a checkpoint that already exists, without training"),
    "collect": ("moe_lightning.cli.collect", "measure what a checkpoint's experts, layers and blocks do, into a file"),
    "cache-logits": ("moe_lightning.cli.cache_logits", "write a teacher's predictions to files, for recovery"),
    "plan": ("moe_lightning.cli.plan", "try methods out on saved statistics, in seconds and without the model"),
    "benchmark": ("moe_lightning.cli.benchmark", "time models against each other: prefill, decode, memory, floors"),
    "report": ("moe_lightning.cli.report", "one page of what a run did, cost and bought; or several runs side by side"),
    "sweep": ("moe_lightning.cli.sweep", "compare methods on one model at equal budgets, with intervals and figures"),
}
"""Name of each command: the module whose ``main(arguments)`` runs it, and what it does."""

INTERRUPTED, UNREAD = 130, 141
"""Exit status after Ctrl-C, and where nobody reads on: 128 and the number of the signal."""

EXAMPLES = """\
examples:
  moe-lightning fit -c quickstart
  moe-lightning fit -c quickstart --trainer.max_steps 1000 --model.learning_rate 0.001 --run_dir runs/longer
  moe-lightning fit -c quickstart --ckpt_path last
  moe-lightning test -c quickstart --ckpt_path last
  moe-lightning compress -c compress --model runs/quickstart/models/original --output runs/smaller
  moe-lightning collect -c compress --model runs/quickstart/models/original --output stats.safetensors
  moe-lightning benchmark --model runs/smaller --against runs/quickstart/models/original
  moe-lightning report runs/quickstart
  moe-lightning plan --statistics stats.safetensors --methods "[{class_path: Novices, init_args: {ratio: 0.5}}]"
"""


def help_text() -> str:
    """Return what ``moe-lightning --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {description}" for name, (_, description) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: moe-lightning COMMAND [-c CONFIG] [options]",
            "",
            "Train, compress, recover and test mixture-of-experts language models.",
            "",
            "commands:",
            *lines,
            "",
            "options:",
            "  -h, --help     show this text",
            "  --version      show the version",
            "",
            "'moe-lightning COMMAND --help' lists all options of a command. Options can stand in a YAML file too:",
            "-c takes the path of one, or the name of one that comes with the package. Later files and options win.",
            "",
            EXAMPLES,
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Command and options; those of the process when None.

    Returns:
        Exit status: 0 when all went well, 2 for a mistake in the arguments; 130 after Ctrl-C and 141 where nobody reads
        on (``| head``), as the shell says of programs that such a signal ends.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            return _run(given)
        finally:
            # Now, while a pipe that nobody reads can be told from other errors.
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt as error:
        # Also while a command's module is imported.
        return after_interrupt(" ".join(given[:1]), error)
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if _nobody_reads(stream)]
        if not closed:
            raise  # the pipe is one of the command's own
        for stream in closed:
            # Or the interpreter would complain when it flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return UNREAD


def after_interrupt(command: str, error: KeyboardInterrupt) -> int:
    """Say in one line that a command was interrupted, inside the block that caught it.

    Args:
        command: Its name.
        error: What was caught. Its message, if there is one, says what is lost and what was saved.

    Returns:
        Exit status.
    """
    if os.environ.get("MOE_LIGHTNING_TRACEBACK"):
        raise error
    print(f"moe-lightning {command}: {str(error) or 'interrupted'}", file=sys.stderr)
    return INTERRUPTED


def _nobody_reads(stream: TextIO | None) -> bool:
    """Ask the system, without a word, whether a stream is a pipe whose reader is gone."""
    try:
        watch = select.poll()
        watch.register(stream.fileno(), 0)  # type: ignore[union-attr]
    except (AttributeError, OSError, ValueError):
        return False  # no such call in Windows; no stream, or one that is no file
    return any(event & select.POLLERR for _, event in watch.poll(0))


def _run(given: list[str]) -> int:
    """Run a command; see :func:`main`."""
    if not given or given[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    if given[0] == "--version":
        print(f"moe-lightning {__version__}")
        return 0
    command = given[0]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        print(
            f"moe-lightning: there is no command {command!r}.{hint} The commands are {', '.join(COMMANDS)}, and "
            "options come after the command.",
            file=sys.stderr,
        )
        return 2
    run: Callable[[Sequence[str]], int] = importlib.import_module(COMMANDS[command][0]).main
    # The Lightning commands share one module and read the command themselves; the others get their options only.
    return run(given if COMMANDS[command][0].endswith(".lightning") else given[1:])
