"""Which tasks of lm-eval (EleutherAI's lm-evaluation-harness) are wanted, by which metric, and the lists of two papers.

``acc`` is the share of questions whose likeliest answer is the right one; ``acc_norm`` divides each answer's
log-likelihood by its length in bytes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SUITES: Mapping[str, Mapping[str, str]] = {
    # Tasks and num_fewshot=0: the released scripts/evaluation/benchmark/run_benchmark.sh (max_length=4096). Metrics:
    # appendix A.1, "normalized zero-shot accuracy"; lm-eval has a normalised one for four of the eight.
    "unified-framework": {
        "arc_challenge": "acc_norm",
        "boolq": "acc",
        "hellaswag": "acc_norm",
        "mmlu": "acc",
        "openbookqa": "acc_norm",
        "piqa": "acc_norm",
        "rte": "acc",
        "winogrande": "acc",
    },
    # Tasks and num_fewshots 0: the released scripts/expert_prune/eval_config.sh, where ai2_arc is both arc tasks. The
    # metrics are inferred, since neither the script nor what we could read of the paper names them: OLMoE's 44.4 on
    # openbookqa and 49.2 on arc_challenge are of the height of acc_norm, ten and some points above acc.
    "mone": {
        "arc_challenge": "acc_norm",
        "arc_easy": "acc_norm",
        "boolq": "acc",
        "copa": "acc",
        "mmlu": "acc",
        "openbookqa": "acc_norm",
        "piqa": "acc_norm",
        "rte": "acc",
        "winogrande": "acc",
    },
}
"""Zero-shot tasks of a paper and the metric of each: of 2406.02500 (8) and of 2507.00390 (9).

Both papers average them without weights, mmlu as one task (its own accuracy is over all questions of its 57 subjects):
the averages of 2406.02500's table 5 and of 2507.00390's results on OLMoE come out so.
"""

PREFERRED = ("acc_norm", "acc", "exact_match")
"""Metrics in the order in which they are taken where nobody says which."""


@dataclass(frozen=True)
class WantedTask:
    """A task and its metric.

    Attributes:
        name: Task, group or tag, as lm-eval knows it.
        metric: Metric; None for the first of :data:`PREFERRED` that the task has, or else the task's first.
    """

    name: str
    metric: str | None = None


def wanted_tasks(tasks: str | Sequence[str]) -> list[WantedTask]:
    """Read what a user asks for.

    Args:
        tasks: Names, in a list or separated by commas: tasks, groups or tags of lm-eval, ``TASK:METRIC`` to choose the
            metric, or the name of one of :data:`SUITES`.

    Returns:
        The tasks, in their order.

    Raises:
        ValueError: There is none, or one stands there twice.
    """
    given = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    wanted: list[WantedTask] = []
    for item in map(str.strip, given):
        if item in SUITES:
            wanted += [WantedTask(name, metric) for name, metric in SUITES[item].items()]
        elif item:
            name, _, metric = item.partition(":")
            wanted.append(WantedTask(name, metric or None))
    if not wanted:
        raise ValueError(f"tasks: name tasks of lm-eval, or one of the lists {', '.join(SUITES)}; got {tasks!r}")
    names = [task.name for task in wanted]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"tasks: {', '.join(twice)} stands there twice: leave one out")
    return wanted


def is_accuracy(metric: str) -> bool:
    """Say whether a metric is a share of right answers, so that a mean over tasks makes sense.

    Args:
        metric: Its name.
    """
    return metric.startswith(("acc", "exact_match"))
