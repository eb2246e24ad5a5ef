"""What TensorBoard gets when a run has ended: the figures of its report, its summary, its hyper-parameters."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from moe_lightning.callbacks.compress import compressions_of
from moe_lightning.callbacks.recovery.stage import stages_of
from moe_lightning.callbacks.tensorboard_pages import QUALITY, add_pages, tensorboards
from moe_lightning.reporting.quality_figures import ratios
from moe_lightning.reporting.report import Run, summary_text
from moe_lightning.reporting.run_comparison import last_moment

_SUFFIX = ".hparams"
"""Behind the name of the file that holds them."""


def log_run(trainer: Trainer, run: Run) -> None:
    """Put what a run left into TensorBoard, at its last step.

    Figures get the tags ``report/NAME``, each with its caption as text, the summary ``report/summary``. The tab of
    hyper-parameters gets one line, with the metrics ``hp/perplexity``, ``hp/perplexity_ratio``, ``hp/bytes_on_disk``
    and so on. It lies in a file of its own, which replaces that of an earlier part of the run: TensorBoard takes the
    first line that it finds. A logger with ``default_hp_metric=True`` wrote one at the beginning of the run: there its
    ``hp_metric`` becomes the first of these metrics.

    Args:
        trainer: The trainer, whose loggers are still open.
        run: What was read from the run's folder.
    """
    loggers = tensorboards(trainer)
    if not loggers or not trainer.is_global_zero:
        return
    if run.quality is not None:
        add_pages(trainer, QUALITY)
    figures = run.figures  # of a long schedule those of the first and the last; all stand under compression/
    step = trainer.global_step
    parameters, metrics = run_parameters(trainer), run_metrics(run, trainer.callback_metrics)
    sentence, _, table = summary_text(run).partition("\n")
    summary = f"{sentence}\n\n```\n{table}\n```" if table else sentence
    for logger in loggers:
        for name, drawn in figures.items():
            logger.experiment.add_figure(f"report/{name}", drawn.figure, step, close=False)
        told = "\n\n".join(f"**{name}**: {drawn.title}. {drawn.caption}" for name, drawn in figures.items())
        for tag, text in {"summary": summary, "figures": told}.items():
            if text:
                logger.experiment.add_text(f"report/{tag}", text, step)
        write_hyper_parameters(logger, parameters, metrics, step)


def write_hyper_parameters(
    logger: TensorBoardLogger, parameters: Mapping[str, Any], metrics: Mapping[str, float], step: int
) -> None:
    """Write a run's line for the tab of hyper-parameters, in the place of the one that an earlier part wrote.

    Args:
        logger: The logger.
        parameters: Numbers, words and truth values by name.
        metrics: Numbers by tag; without any the tab would show nothing.
        step: Step of the metrics.
    """
    if not metrics:
        return
    if getattr(logger, "_default_hp_metric", False):
        # The logger wrote a line at the beginning of the run, beside which TensorBoard reads no other: of the module's
        # hyper-parameters, with one metric, which waits for its value.
        logger.log_metrics({"hp_metric": next(iter(metrics.values())), **metrics}, step)
        return
    folder = Path(logger.log_dir)
    for old in folder.glob(f"events.out.tfevents.*{_SUFFIX}"):
        old.unlink()
    with SummaryWriter(str(folder), filename_suffix=_SUFFIX) as writer:
        file = writer.file_writer
        assert file is not None
        for summary in hparams(dict(parameters), dict(metrics)):
            file.add_summary(summary, step)
        for tag, value in metrics.items():
            writer.add_scalar(tag, value, step)


# ---------------------------------------------------------------- numbers


_MODEL = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts_per_tok",
    "vocab_size",
)
_DATA = ("sources", "block_size", "batch_size", "seed")
_TRAINER = ("max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val")
_OF_PREDICT = ("max_new_tokens", "temperature")


def run_parameters(trainer: Trainer) -> dict[str, int | float | str | bool]:
    """Return what a run was asked for, flat: methods in words, of model, module, data and trainer what matters.

    Args:
        trainer: The trainer.

    Returns:
        Plain values by name. TensorBoard shows the first names of the alphabet: those of compression come first.
    """
    module: Any = trainer.lightning_module
    datamodule: Any = getattr(trainer, "datamodule", None)
    told = [f"{', '.join(map(str, item.methods))} at {item.at_step}" for item in compressions_of(trainer)]
    stages = [f"{type(stage).__name__} at {stage.first_step}" for stage in stages_of(trainer)]
    found: dict[str, Any] = {
        "compression/methods": "; ".join(told) or "none",
        "compression/recovery": "; ".join(stages) or "none",
    }
    sizes = module.hparams.get("model") or {}
    found |= {f"model/{name}": sizes[name] for name in _MODEL if name in sizes}
    # Options that the module keeps under their names.
    options = inspect.signature(type(module).__init__).parameters.keys() - {"self", "model", "plan", *_OF_PREDICT}
    found |= {f"module/{name}": getattr(module, name) for name in sorted(options) if hasattr(module, name)}
    described = datamodule.describe() if hasattr(datamodule, "describe") else {}
    for name in _DATA:
        found[f"data/{name}"] = described.get(name, getattr(datamodule, name, None))
    found |= {f"trainer/{name}": getattr(trainer, name, None) for name in _TRAINER}
    if seed := os.environ.get("PL_GLOBAL_SEED"):
        found["trainer/seed"] = int(seed)
    plain = {name: ", ".join(map(str, value)) if _is_words(value) else value for name, value in found.items()}
    return {name: value for name, value in plain.items() if isinstance(value, int | float | str | bool)}


def _is_words(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str | int | float) for item in value)


def run_metrics(run: Run, logged: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers that a run ended with.

    Args:
        run: What it left.
        logged: What its module logged last, for runs whose quality was not measured.

    Returns:
        ``hp/perplexity``, ``hp/perplexity_ratio``, ``hp/divergence``, ``hp/agreement``, ``hp/bits_per_byte`` of the
        first text, ``hp/parameters``, ``hp/bytes``, ``hp/bytes_on_disk``, ``hp/flops``,
        ``hp/prefill_tokens_per_second``, ``hp/decode_tokens_per_second``, ``hp/tasks_mean``, ``hp/seconds``: those that
        are known.
    """
    found: dict[str, float] = {}
    moment = last_moment(run.quality)
    if moment is not None:
        if moment.texts:
            known = ratios(moment, run.first if run.first is not moment else None, next(iter(moment.texts)))
            found |= {name: interval.value for name, interval in known.items()}
        found |= {name: float(getattr(moment, name)) for name in ("parameters", "bytes", "bytes_on_disk", "flops")}
        found |= {f"{name}_tokens_per_second": rate.median for name, rate in moment.speed.items()}
    else:
        for name in ("perplexity", "bits_per_byte"):
            value = logged.get(f"test/{name}", logged.get(f"val/{name}"))
            found |= {} if value is None else {name: float(value)}
        after = run.compressions[-1].shape_after if run.compressions else None
        found |= {} if after is None else {"parameters": float(after.parameters), "bytes_on_disk": float(after.bytes)}
    means = [entry["mean"] for entry in run.task_moments if entry.get("mean") is not None]
    found |= {"tasks_mean": float(means[-1])} if means else {}
    found |= {} if run.time is None else {"seconds": float(run.time["total_seconds"])}
    return {f"hp/{name}": value for name, value in found.items()}
