"""Tasks of lm-eval in the course of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision

from moe_lightning.callbacks.at_step import AtTheEnd, language_model, say
from moe_lightning.callbacks.checkpointing import steps_behind
from moe_lightning.callbacks.compress import has_compressed
from moe_lightning.callbacks.spending import undisturbed
from moe_lightning.callbacks.strategies import check_whole
from moe_lightning.callbacks.tensorboard_pages import tensorboards
from moe_lightning.evaluation.tasks import check_tasks, harness_version, require_lm_eval, run_tasks, wanted_tasks
from moe_lightning.files import write_atomically

VERSION = 1
LONG = timedelta(days=30)
"""How long the other processes wait for the first one: tasks may take longer than Lightning's own patience."""

When = Literal["before", "compressed", "end", "test"]
Result = TypeVar("Result")


class LMEval(AtTheEnd):
    """Run tasks of lm-eval (EleutherAI's lm-evaluation-harness) on the model of the run, in memory.

    Every moment is a line on the console, a row of numbers in TensorBoard (``tasks/TASK/METRIC``, ``tasks/mean``; of
    ``moe-lightning test`` ``test/tasks/...``) and an entry of ``RUN/results/lm_eval.json``. Before anything is trained
    or tested it makes sure that lm-eval knows all tasks and that their data load: what is missing is named, all of it.

    ``before`` is right before the first compression of the run, ``compressed`` right after each, ``end`` when training
    has ended and all that happens then has been done, ``test`` in ``moe-lightning test``. There is no ``before`` in a
    run that compresses nothing.

    Training goes on as if nothing had been run. Under several processes the first one works and the others wait. Under
    mixed precision the model computes as it does in training.

    Args:
        tasks: Names of tasks, groups or tags of lm-eval, ``TASK:METRIC`` to choose the metric, or a list that comes
            with the package: unified-framework (the 8 of 2406.02500) or mone (the 9 of 2507.00390).
        include_path: Folder with YAML files of further tasks.
        num_fewshot: Solved examples before each question; null leaves it to the task.
        limit: Use only this many of each task's questions; below 1 a share of them.
        batch_size: Requests at a time; auto tries how many fit.
        max_length: Tokens that the model sees at most, where its config allows more.
        seed: Of the choice of examples; the default is lm-eval's own.
        at: Moments: before, compressed, end, test. The default is before, end and test.

    Raises:
        ValueError: An option is out of its range, or lm-eval is not installed; before the run: a task cannot be run.
    """

    def __init__(
        self,
        tasks: list[str] | str,
        include_path: str | None = None,
        num_fewshot: int | None = 0,
        limit: int | float | None = None,
        batch_size: int | Literal["auto"] = 8,
        max_length: int | None = None,
        seed: int | None = None,
        at: list[When] | None = None,
    ) -> None:
        super().__init__()
        require_lm_eval()
        try:
            wanted_tasks(tasks)
        except ValueError as error:
            raise ValueError(f"LMEval: {error}") from None
        at = ["before", "end", "test"] if at is None else list(at)
        if not at or not set(at) <= set(get_args(When)):
            raise ValueError(f"LMEval: at is a list of {', '.join(get_args(When))}, got {at}")
        for name, value, least in (
            ("limit", limit, None),
            ("num_fewshot", num_fewshot, 0),
            ("batch_size", None if batch_size == "auto" else batch_size, 1),
            ("max_length", max_length, 1),
        ):
            if value is not None and (value <= 0 if least is None else value < least):
                raise ValueError(f"LMEval: {name} must be {'more than 0' if least is None else f'{least} or more'}")
        self.tasks, self.include_path = tasks, include_path
        self.num_fewshot, self.limit, self.batch_size = num_fewshot, limit, batch_size
        self.max_length, self.seed, self.at = max_length, seed, at
        self.moments: list[dict[str, Any]] = []
        """Entries of the file."""
        self.compressions = 0
        """How many have begun."""
        self._closing = False

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured."""
        return {"moments": json.loads(json.dumps(self.moments)), "compressions": self.compressions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what was measured."""
        self.moments, self.compressions = list(state_dict["moments"]), int(state_dict["compressions"])

    @staticmethod
    def file(trainer: Trainer) -> Path:
        """Return the file that is written.

        Args:
            trainer: The trainer.
        """
        return Path(trainer.default_root_dir) / "results" / "lm_eval.json"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew; see :class:`~moe_lightning.callbacks.at_step.AtTheEnd`."""
        super().setup(trainer, pl_module, stage)
        self._closing = False

    def outstanding(self, trainer: Trainer) -> bool:
        """Say whether the end of an ended run was not measured; it comes after the last checkpoint."""
        lacking = "end" in self.at and not any(
            moment["name"] == "end" and moment["step"] == trainer.global_step for moment in _read(self.file(trainer))
        )
        return bool(trainer.strategy.broadcast(lacking))

    # ------------------------------------------------------------ before the run

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that the tasks can be run, before anything is trained.

        Raises:
            ValueError: Some cannot, or there is no tokenizer, or the strategy shards the model.
        """
        if set(self.at) != {"test"}:
            self._check(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that the tasks can be run, before anything is tested.

        Raises:
            ValueError: See :meth:`on_fit_start`.
        """
        if "test" in self.at:
            self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, module: LightningModule) -> None:
        language_model(module)
        self._tokenizer(trainer)
        check_whole(trainer, "LMEval")
        try:
            with undisturbed(trainer):
                _by_the_first(trainer, lambda: check_tasks(self.tasks, self.include_path))
        except ValueError as error:
            raise ValueError(f"LMEval: {error}") from None

    def _tokenizer(self, trainer: Trainer) -> Any:
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                "LMEval needs the model's tokenizer: run with a TextDataModule, or with a datamodule that has it in "
                "its attribute 'tokenizer'"
            )
        return tokenizer

    # ------------------------------------------------------------ moments

    def before_compression(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure the model of before the first compression."""
        # A checkpoint from before this callback was there knows nothing of compressions that lie behind it.
        if "before" in self.at and not self.compressions and not has_compressed(trainer):
            self._measure(trainer, module, "before")
        self.compressions += 1

    def after_compression(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure what a compression left."""
        if "compressed" in self.at:
            self._measure(trainer, module, f"compressed{f'-{self.compressions}' if self.compressions > 1 else ''}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Know whether training has ended, or only the time was up."""
        self._closing = self.has_ended(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what the run gives back, behind all that happens at the end of training."""
        if self._closing and "end" in self.at:
            self._measure(trainer, pl_module, "end")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the model that is tested."""
        if "test" in self.at:
            self._measure(trainer, pl_module, "test")

    def _measure(self, trainer: Trainer, module: LightningModule, name: str) -> None:
        def work() -> dict[str, Any]:
            return run_tasks(
                language_model(module),
                self._tokenizer(trainer),
                self.tasks,
                include_path=self.include_path,
                num_fewshot=self.num_fewshot,
                limit=limit,
                batch_size=self.batch_size,
                max_length=self.max_length,
                seed=self.seed,
                mixed_precision_dtype=_autocast(trainer),
            )

        # One question of each task where Lightning runs one batch of everything.
        limit = getattr(trainer, "fast_dev_run", 0) or self.limit
        with undisturbed(trainer):
            found = _by_the_first(trainer, work)
        if found is None:
            return
        moment = {"name": name, "step": steps_behind(trainer), "limit": limit, **found}
        known = _read(self.file(trainer)) if name == "test" else self.moments
        self.moments = [*(other for other in known if other["name"] != name), moment]
        content = {"version": VERSION, "harness": harness_version(), "moments": self.moments}
        write_atomically(self.file(trainer), json.dumps(content, indent=2, allow_nan=False) + "\n")
        self._tell(trainer, moment)

    def _tell(self, trainer: Trainer, moment: dict[str, Any]) -> None:
        name, step, mean = moment["name"], moment["step"], moment["mean"]
        place = "test/tasks" if name == "test" else "tasks"
        numbers: dict[str, float] = {}
        words: list[str] = []
        for task, score in moment["tasks"].items():
            if score["value"] is not None:
                numbers[f"{place}/{task}/{score['metric'].replace(',', '_')}"] = score["value"]
            words.append(f"{task} {score['metric']} {_with_error(score)}")
        if mean is not None:
            numbers[f"{place}/mean"] = mean
            if len(words) > 1:
                words.append(f"mean {mean:.4f}")
        when = {"before": "before compression", "end": "at the end", "test": "tested"}.get(name, "after compressing")
        few = "" if moment["limit"] is None else f" (limit {moment['limit']:g})"
        say(trainer, f"step {step}: tasks {when}: {', '.join(words)}{few}")
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)
        for logger in tensorboards(trainer):
            logger.experiment.add_text(f"{place}/table", tasks_table(self.moments), step)


def tasks_table(moments: list[dict[str, Any]]) -> str:
    """Return the moments side by side, as a Markdown table with a row for each task.

    Args:
        moments: Entries of ``lm_eval.json``.
    """
    names = [moment["name"] for moment in moments]
    lines = [
        f"| task | metric | examples | questions | {' | '.join(names)} |",
        f"| --- | --- | ---: | ---: |{' ---: |' * len(names)}",
    ]
    rows = dict.fromkeys((task, score["metric"]) for moment in moments for task, score in moment["tasks"].items())
    for task, metric in rows:
        scores = [moment["tasks"].get(task) for moment in moments]
        found = [score if score is not None and score["metric"] == metric else None for score in scores]
        last = next(score for score in reversed(found) if score is not None)
        shots = "" if last["num_fewshot"] is None else last["num_fewshot"]
        cells = " | ".join("" if score is None else _with_error(score) for score in found)
        lines.append(f"| {task} | {metric} | {shots} | {last['samples']:,} | {cells} |")
    means = ["" if moment["mean"] is None else f"{moment['mean']:.4f}" for moment in moments]
    if any(means):
        lines.append(f"| mean | | | | {' | '.join(means)} |")
    return "\n".join(lines)


def _with_error(score: dict[str, Any]) -> str:
    if score["value"] is None:
        return "no number"
    error = "" if score["stderr"] is None else f" +- {score['stderr']:.4f}"
    return f"{score['value']:.4f}{error}"


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the moments of a file; none where there is no such file, or one of another release."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return list(content["moments"]) if content["version"] == VERSION else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _autocast(trainer: Trainer) -> torch.dtype | None:
    plugin = trainer.precision_plugin
    if not isinstance(plugin, MixedPrecision):
        return None
    return torch.bfloat16 if plugin.precision == "bf16-mixed" else torch.float16


def _by_the_first(trainer: Trainer, work: Callable[[], Result]) -> Result | None:
    """Let the first process work and the others wait, and all of them fail where it fails.

    Args:
        trainer: The trainer.
        work: What to do.

    Returns:
        What came of it, in the first process; None in the others.
    """
    if trainer.world_size == 1:
        return work()
    # Not the group of the training: its processes give one another up after minutes.
    group = torch.distributed.new_group(backend="gloo", timeout=LONG)
    result, failure, told = None, None, [None]
    if trainer.is_global_zero:
        try:
            result = work()
        except Exception as error:
            failure, told = error, [str(error)]  # type: ignore[list-item]
    torch.distributed.broadcast_object_list(told, src=0, group=group)
    torch.distributed.destroy_process_group(group)
    if failure is not None:
        raise failure
    if told[0] is not None:
        raise ValueError(f"in the first process: {told[0]}")
    return result
