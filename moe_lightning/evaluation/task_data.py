"""Finding lm-eval's tasks and their data before anything is run on them.

Loading a task loads its data set; see :mod:`moe_lightning.hub` for where the Hugging Face hub cannot be reached.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_lightning.evaluation.task_names import WantedTask, wanted_tasks
from moe_lightning.hub import hub_within_reach

FILE_READERS = ("arrow", "csv", "json", "parquet", "text")
"""Data sets of ``datasets`` that are files of the user's."""

CHATTER = ("datasets", "evaluate", "huggingface_hub", "lm_eval")
"""Loggers that write lines by the task."""


class MissingLibrary(ImportError, ValueError):
    """An optional dependency is asked for and is not installed."""


def require_lm_eval() -> None:
    """Make sure that lm-eval is installed.

    Raises:
        MissingLibrary: It is not.
    """
    missing = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingLibrary(
            f"tasks are run by lm-eval, and {' and '.join(missing)} is not installed: pip install 'moe-lightning[eval]'"
        )


class Tasks:
    """The tasks that are wanted, as lm-eval finds them.

    Reading lm-eval's own index, some 15,000 files, takes ten to twenty seconds, once in a process. It is left out where
    ``include_path`` has all that is wanted.

    Args:
        tasks: See :func:`~moe_lightning.evaluation.task_names.wanted_tasks`.
        include_path: Folder (or several) with YAML files of further tasks, as lm-eval's option of that name.

    Raises:
        MissingLibrary: lm-eval is not installed.
        ValueError: A task has no name, or the folder does not exist.
    """

    def __init__(self, tasks: str | Sequence[str], include_path: str | Sequence[str] | None = None) -> None:
        require_lm_eval()
        self.wanted = wanted_tasks(tasks)
        paths = (include_path,) if isinstance(include_path, str) else tuple(include_path or ())
        for path in paths:
            if not Path(path).expanduser().is_dir():
                raise ValueError(f"include_path: there is no folder {path}: name the one with the tasks' YAML files")
        folders = tuple(str(Path(path).expanduser()) for path in paths)
        with quiet():
            # Anew each time: somebody may be writing on the files.
            own: Any = _manager(folders, False) if folders else None
            whole = own is not None and all(_is_whole(own.task_index, task.name) for task in self.wanted)
            self.manager: Any = own if whole else _whole_manager(folders)
        self.index: dict[str, Any] = self.manager.task_index

    def unknown(self) -> list[WantedTask]:
        """Return the tasks that lm-eval does not know."""
        return [task for task in self.wanted if task.name not in self.index]

    def leaves(self, name: str) -> list[str]:
        """Return the tasks that a name stands for: those below a group or a tag, or itself.

        Args:
            name: A known name.
        """
        found: list[str] = []
        for child in _children(self.index[name]):
            # What a group defines in its own file is loaded with the group.
            found += self.leaves(child) if child in self.index else [name]
        return list(dict.fromkeys(found)) or [name]

    def reported(self, name: str) -> list[str]:
        """Return the names under which lm-eval reports what a name stands for: a group without a mean has no number.

        Args:
            name: A known name.
        """
        entry = self.index[name]
        if entry.kind.name == "TASK" or entry.kind.name == "PY_TASK" or (entry.cfg or {}).get("aggregate_metric_list"):
            return [name]
        return [item for child in _children(entry) if child in self.index for item in self.reported(child)]

    def data_set(self, name: str) -> str:
        """Return which data set a task reads, for a message; empty where its file does not say.

        Args:
            name: A known task.
        """
        config = self.index[name].cfg or {}
        path, part = config.get("dataset_path"), config.get("dataset_name")
        if path in FILE_READERS:
            return f"{path} files {(config.get('dataset_kwargs') or {}).get('data_files', '')}".strip()
        return f"{path}{f' ({part})' if part else ''}" if path else ""

    def needs_hub(self, name: str) -> bool:
        """Say whether the data of a task may come from the hub.

        Args:
            name: A known task.
        """
        config = self.index[name].cfg or {}
        path = config.get("dataset_path")
        local = path in FILE_READERS or (path is not None and Path(path).exists())
        return not local or "://" in str(config.get("dataset_kwargs"))

    @contextmanager
    def within_reach(self) -> Iterator[bool]:
        """Let the libraries work offline inside a ``with`` block where the hub is needed and cannot be reached.

        Yields:
            Whether the hub is within reach, as far as that matters.
        """
        known = [task.name for task in self.wanted if task.name in self.index]
        needed = any(self.needs_hub(leaf) for name in known for leaf in self.leaves(name))
        with hub_within_reach(needed) as reached:
            yield reached


def check_tasks(tasks: str | Sequence[str], include_path: str | Sequence[str] | None = None) -> None:
    """Make sure that tasks can be run: that lm-eval knows them, that they have their metric, and that their data load.

    Data sets that are not in the cache are downloaded, where there is a network: called there, this fetches all that
    the tasks need (``HF_HOME`` says whereto).

    Args:
        tasks: See :func:`~moe_lightning.evaluation.task_names.wanted_tasks`.
        include_path: Folder (or several) with YAML files of further tasks.

    Raises:
        MissingLibrary: lm-eval is not installed.
        ValueError: Tasks that cannot be run: all of them, and why.
    """
    found = Tasks(tasks, include_path)
    problems = [f"{task.name}: lm-eval has no such task{_near(task.name, found.index)}" for task in found.unknown()]
    loaded: dict[str, Any] = {}
    missing: dict[str, list[str]] = {}  # reason: tasks
    with quiet(), found.within_reach() as reached:
        known = [task for task in found.wanted if task.name in found.index]
        for leaf in dict.fromkeys(leaf for task in known for leaf in found.leaves(task.name)):
            try:
                loaded |= found.manager.load([leaf])["tasks"]
            except Exception as error:  # of datasets, of the file, of the task's own code
                missing.setdefault(_why(found, leaf, error, reached), []).append(leaf)
    problems += [f"{_short(found, leaves)}: {why}" for why, leaves in missing.items()]
    owners: dict[str, str] = {}
    for task in known:
        for leaf in found.leaves(task.name):
            if owners.setdefault(leaf, task.name) != task.name:
                problems.append(f"{leaf} is part of {owners[leaf]} and of {task.name}: leave one of them out")
        metrics = _metrics(found, task.name, loaded)
        if task.metric is not None and metrics and task.metric.partition(",")[0] not in metrics:
            problems.append(f"{task.name} has no metric {task.metric}: it has {', '.join(sorted(metrics))}")
    if not problems:
        return
    advice = ""
    if missing:
        names = ",".join(task.name for task in found.wanted)
        advice = (
            "\nFetch what is missing where there is a network, and bring the folder here: HF_HOME=FOLDER python -c "
            f"\"from moe_lightning.evaluation.tasks import check_tasks; check_tasks('{names}')\". Or give tasks with "
            "data of your own (include_path), or leave those tasks out"
        )
    raise ValueError("tasks that cannot be run:\n" + "\n".join(f"  {item}" for item in problems) + advice)


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Keep the libraries' remarks off the console inside a ``with`` block.

    Yields:
        What lm-eval warned of, one text each, as it comes.
    """
    import datasets

    heard: list[str] = []
    # Its bars know nothing of files that they are written to.
    no_bars = not sys.stderr.isatty() and datasets.is_progress_bar_enabled()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    loggers = [logging.getLogger(name) for name in CHATTER]
    before = [(logger, logger.level, logger.propagate, logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        logger.handlers = [Listener()] if logger.name == "lm_eval" else [logging.NullHandler()]
    if no_bars:
        datasets.disable_progress_bars()
    try:
        yield heard
    finally:
        if no_bars:
            datasets.enable_progress_bars()
        for logger, level, propagate, handlers in before:
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers


def _manager(folders: tuple[str, ...], defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders) or None, include_defaults=defaults)


@functools.lru_cache(maxsize=4)
def _whole_manager(folders: tuple[str, ...]) -> Any:
    return _manager(folders, True)


def _children(entry: Any) -> list[str]:
    """Return the names right below a group or a tag; none for a task."""
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    items = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    items = items if isinstance(items, list) else []
    return [item if isinstance(item, str) else str(item.get("group") or item.get("task")) for item in items]


def _is_whole(index: dict[str, Any], name: str) -> bool:
    """Say whether an index has a name and everything below it."""
    return name in index and all(_is_whole(index, child) for child in _children(index[name]))


def _metrics(found: Tasks, name: str, loaded: dict[str, Any]) -> set[str]:
    """Return the metrics that a name has a number for; empty where that is not known."""
    listed = (found.index[name].cfg or {}).get("aggregate_metric_list")
    if listed and found.index[name].kind.name == "GROUP":
        listed = listed if isinstance(listed, list) else [listed]
        return {item["metric"] for item in listed}
    tasks = [loaded[item] for item in found.leaves(name) if item in loaded]
    return set().union(*(task.aggregation() for task in tasks))


def _near(name: str, index: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, index, n=3)
    return f"; near are {', '.join(near)}" if near else " (a task of your own: give its folder by include_path)"


def _why(found: Tasks, leaf: str, error: Exception, reached: bool) -> str:
    said = str(error).strip().split("\n")[0] or type(error).__name__
    data = found.data_set(leaf).partition(" (")[0]
    if isinstance(error, ConnectionError) and not reached:
        return f"the data set {data or said} is not in the cache, and the Hugging Face hub cannot be reached"
    return f"{f'the data set {data} does' if data else 'it does'} not load: {type(error).__name__}: {said}"


def _short(found: Tasks, leaves: list[str]) -> str:
    """Return names of tasks; of a group that is there as a whole its own."""
    words: list[str] = []
    left = list(leaves)
    for task in found.wanted:
        parts = found.leaves(task.name) if task.name in found.index else []
        if len(parts) > 1 and set(parts) <= set(left):
            words.append(f"{task.name} (all {len(parts)} of its tasks)")
            left = [name for name in left if name not in parts]
    words += left if len(left) <= 4 else [*left[:3], f"{len(left) - 3} more"]
    return ", ".join(words)
