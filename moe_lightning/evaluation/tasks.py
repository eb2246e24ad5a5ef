"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness) on a model that is in memory.

The numbers are those of lm-eval's own command line on the exported folder::

    lm_eval --model hf --model_args pretrained=FOLDER --tasks arc_easy,boolq --num_fewshot 0 --batch_size 8

A folder that transformers alone cannot read (uneven layers, novices, low-rank maps, packed weights) needs moe_lightning
in that process, which registers its architecture with transformers' Auto classes; the options are the same::

    python -c "import moe_lightning, lm_eval.__main__ as m; m.cli_evaluate()" --model hf ...

Under mixed precision add ``mixed_precision_dtype=bfloat16`` to ``--model_args``.
"""

from __future__ import annotations

import copy
import importlib.metadata
import math
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_lightning.architectures.modes import evaluation_mode
from moe_lightning.evaluation.task_data import MissingLibrary, Tasks, check_tasks, quiet, require_lm_eval
from moe_lightning.evaluation.task_names import PREFERRED, SUITES, is_accuracy, wanted_tasks

__all__ = ["SUITES", "MissingLibrary", "check_tasks", "harness_version", "require_lm_eval", "run_tasks", "wanted_tasks"]

CUT = ("exceeds model's maximum length", "Left truncation applied")
"""What lm-eval says of a question that it cuts."""


SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
"""Options of lm-eval."""


def harness_version() -> str:
    """Return the version of lm-eval that is installed."""
    return importlib.metadata.version("lm_eval")


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str],
    *,
    include_path: str | Sequence[str] | None = None,
    num_fewshot: int | None = 0,
    limit: int | float | None = None,
    batch_size: int | Literal["auto"] = 8,
    max_length: int | None = None,
    seed: int | None = None,
    mixed_precision_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run tasks of lm-eval on a model that is in memory, where it is and as it is.

    Modes of its modules, the tokenizer and the states of Python's, numpy's and torch's random generators are afterwards
    what they were.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        tasks: Names, in a list or separated by commas: tasks, groups or tags of lm-eval, ``TASK:METRIC`` to choose the
            metric, or the name of one of :data:`SUITES`.
        include_path: Folder (or several) with YAML files of further tasks.
        num_fewshot: Solved examples before each question; None leaves it to the task.
        limit: Use only this many of each task's questions; below 1 a share of them.
        batch_size: Requests at a time; ``auto`` tries how many fit (up to 64).
        max_length: Tokens that the model sees at most, where its config allows more.
        seed: Of the choice of examples; None takes lm-eval's own seeds.
        mixed_precision_dtype: Autocast to this type.
        progress: Whether to show progress bars (on a terminal).

    Returns:
        ``tasks``: by the name of each task ``metric``, ``value``, ``stderr`` (None where lm-eval has none), ``samples``
        (questions) and ``num_fewshot``; ``mean``: that of the values, without weights, None where some are no
        accuracies.

    Raises:
        MissingLibrary: lm-eval is not installed.
        ValueError: A task is not known, its result has no such metric, or an answer is too long for the model.
    """
    found = Tasks(tasks, include_path)
    if found.unknown():
        raise ValueError(f"lm-eval has no task {', '.join(task.name for task in found.unknown())}")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    seeds = {} if seed is None else dict.fromkeys(SEEDS, seed)
    longest = getattr(model.config, "max_position_embeddings", None)
    if max_length is not None and longest is not None:
        max_length = min(max_length, longest)
    mixed = {} if mixed_precision_dtype is None else {"mixed_precision_dtype": mixed_precision_dtype}
    with quiet() as heard, found.within_reach(), _bars(progress), _random_states(), evaluation_mode(model):
        harness = HFLM(
            pretrained=model,
            # It may get a padding token.
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            max_length=max_length,
            **mixed,
        )
        try:
            results: Any = simple_evaluate(
                model=harness,
                tasks=[task.name for task in found.wanted],
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=found.manager,
                log_samples=False,
                **seeds,
            )
        except AssertionError as error:
            # It cuts a question that is too long, but not an answer, and says nothing.
            raise ValueError(
                f"lm-eval: an answer has more than the {harness.max_length} tokens that the model takes at once, or a "
                "task is not as it should be: leave out the tasks with long answers"
            ) from error
    cut = sum(any(mark in text for mark in CUT) for text in heard)
    if cut:
        warnings.warn(
            f"lm-eval cut {cut} requests from the left, which have more than the {harness.max_length} tokens that the "
            "model takes at once",
            stacklevel=2,
        )
    scores = {name: _score(results, name, task.metric) for task in found.wanted for name in found.reported(task.name)}
    values = [score["value"] for score in scores.values()]
    mean = None
    if None not in values and all(is_accuracy(score["metric"]) for score in scores.values()):
        mean = sum(values) / len(values)
    return {"tasks": scores, "mean": mean}


def _score(results: dict[str, Any], name: str, metric: str | None) -> dict[str, Any]:
    """Return what is kept of a task or a group."""
    numbers = results["results"][name]
    # "acc,none": a metric and the filter that made an answer of the model's text. "none" is no filter.
    measured = {
        key.removesuffix(",none"): key
        for key in numbers
        if "," in key and "_stderr" not in key and isinstance(numbers[key], int | float)
    }
    choices = [metric] if metric is not None else [*PREFERRED, *(key.partition(",")[0] for key in measured)]
    chosen = next((key for choice in choices for key in measured if choice in (key, key.partition(",")[0])), None)
    if chosen is None:
        has = ", ".join(measured) or "no number"
        raise ValueError(f"{name}: lm-eval gives no metric {metric or ', '.join(PREFERRED)} for it; it has {has}")
    kind, _, way = measured[chosen].partition(",")
    stderr, shots = numbers.get(f"{kind}_stderr,{way}"), results["n-shot"].get(name)
    return {
        "metric": chosen,
        "value": _plain(numbers[measured[chosen]]),
        "stderr": _plain(stderr),
        "samples": int(numbers["sample_len"]),
        "num_fewshot": shots if isinstance(shots, int) else None,
    }


def _plain(value: Any) -> float | None:
    """Return a number as JSON has it; None for NaN, infinity and lm-eval's N/A."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@contextmanager
def _random_states() -> Iterator[None]:
    """Put the global random generators back when a ``with`` block ends; lm-eval seeds them."""
    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)


@contextmanager
def _bars(progress: bool) -> Iterator[None]:
    """Let lm-eval's bars, one or two for each task, vanish when they are full, and show on a terminal only.

    What else it says and asks for the sake of its own files is left out.
    """
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface
    from tqdm import tqdm

    def bar(*arguments: Any, **options: Any) -> Any:
        disable = True if options.pop("disable", False) or not progress else None
        return tqdm(*arguments, **{**options, "disable": disable, "leave": False})

    def nothing(*arguments: Any) -> None:
        """Stand in for what nobody reads here: a look at the whole machine, of seconds, and git, which complains."""

    places: list[tuple[Any, str, Any]] = [
        (lm_eval.api.model, "tqdm", bar),
        (lm_eval.api.task, "tqdm", bar),
        (lm_eval.models.huggingface, "tqdm", bar),
        (lm_eval.evaluator, "add_env_info", nothing),
        (lm_eval.evaluator, "get_git_commit_hash", nothing),
    ]
    places = [place for place in places if hasattr(*place[:2])]
    before = [getattr(module, name) for module, name, _ in places]
    try:
        for module, name, new in places:
            setattr(module, name, new)
        yield
    finally:
        for (module, name, _), old in zip(places, before, strict=True):
            setattr(module, name, old)
