"""A moment of a run on the console and in TensorBoard."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

from lightning.pytorch import Trainer

from moe_lightning.callbacks.at_step import say
from moe_lightning.callbacks.tensorboard_pages import tensorboards
from moe_lightning.evaluation.intervals import Interval, paired_intervals
from moe_lightning.evaluation.records import BEFORE, QualityMoment

MIB = 2**20


def intervals_of(moment: QualityMoment, before: QualityMoment | None) -> dict[str, dict[str, Interval]]:
    """Return what is known of a model on each text; compared with the one before where it saw the same blocks.

    Args:
        moment: The moment.
        before: That of the model before compression, or None.
    """
    others = {} if before is None else before.texts
    return {name: paired_intervals(text, others.get(name)) for name, text in moment.texts.items()}


def tell_moment(trainer: Trainer, moments: Sequence[QualityMoment]) -> None:
    """Say and log the last of some moments; only the first process does.

    Args:
        trainer: The trainer.
        moments: All moments of the run up to it.
    """
    moment = moments[-1]
    before = next((item for item in moments[:-1] if item.name == BEFORE), None)
    intervals = intervals_of(moment, before)
    say(trainer, in_words(moment, before, intervals))
    if not trainer.is_global_zero:
        return
    warn_of_broken(moment)
    numbers = scalars(moment, intervals)
    samples = samples_text(moments)
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=moment.step)
    if samples:
        for logger in tensorboards(trainer):
            logger.experiment.add_text("quality/samples", samples, moment.step)


def warn_of_broken(moment: QualityMoment) -> None:
    """Warn where a model gives something else than numbers.

    Args:
        moment: The moment.
    """
    counts = {name: int((~text.scores.finite).sum()) for name, text in moment.texts.items()}
    blocks = [
        f"{count} of {len(moment.texts[name].scores.nats)} blocks of {name}" for name, count in counts.items() if count
    ]
    if blocks:
        warnings.warn(
            f"QualityEvaluation, {moment.name}: the model gives NaN or infinity on {', '.join(blocks)}: perplexity, "
            "ratio, KL and agreement there are not finite. The model is broken: look at what was done to it before "
            f"({moment.what}), and at the precision it computes in",
            stacklevel=2,
        )


def in_words(
    moment: QualityMoment, before: QualityMoment | None, intervals: Mapping[str, Mapping[str, Interval]]
) -> str:
    """Return a moment as one line.

    Args:
        moment: The moment.
        before: The one before compression, or None.
        intervals: What is known of its texts.
    """
    first, *others = intervals
    parts = [_text_in_words(first, intervals[first], with_perplexity=True)]
    parts += [_text_in_words(name, intervals[name], with_perplexity=False) for name in others]
    size = f"{moment.bytes / MIB:,.1f} MiB in memory, {moment.bytes_on_disk / MIB:,.1f} MiB on disk"
    parts.append(size + (f" ({before.bytes_on_disk / MIB:,.1f} before)" if before is not None else ""))
    for name, words in (("prefill", "prefill"), ("decode", "decoding")):
        if name in moment.speed:
            # Not beside that before: it was timed minutes ago, and a machine drifts more than a model gains.
            parts.append(f"{words} {moment.speed[name].median:,.0f} tokens/s")
    return f"step {moment.step}: quality {moment.name}: {'; '.join(parts)}"


def _text_in_words(name: str, numbers: Mapping[str, Interval], with_perplexity: bool) -> str:
    perplexity, ratio = numbers["perplexity"], numbers.get("perplexity_ratio")
    if not perplexity.finite:
        return f"perplexity not finite on {name}"
    if ratio is None:
        words = f"perplexity {_with_ends(perplexity)} on {name}"
    elif with_perplexity:
        words = f"perplexity {_value(perplexity)} on {name}, {_times(ratio)} times that before"
    else:
        words = f"{_times(ratio)} times on {name}"
    if ratio is not None and with_perplexity and "divergence" in numbers:
        divergence, agreement = numbers["divergence"], numbers["agreement"]
        words += f", KL {divergence.value:.4g} nats a token" if divergence.finite else ", KL not finite"
        words += f", {agreement.value:.1%} agree" if agreement.finite else ""
    return words


def _with_ends(interval: Interval) -> str:
    value = _value(interval)
    return value if math.isnan(interval.low) else f"{value} [{interval.low:.4g}, {interval.high:.4g}]"


def _times(ratio: Interval) -> str:
    """Return a ratio with decimals enough to tell it from 1, as many in its value as in its ends."""
    if not ratio.finite:
        return "not finite"
    ends = "" if math.isnan(ratio.low) else f" [{ratio.low:,.3f}, {ratio.high:,.3f}]"
    return f"{ratio.value:,.3f}{ends}"


def _value(interval: Interval) -> str:
    return f"{interval.value:.4g}" if interval.finite else "not finite"


def scalars(moment: QualityMoment, intervals: Mapping[str, Mapping[str, Interval]]) -> dict[str, float]:
    """Return what TensorBoard shows of a moment, by tag.

    Args:
        moment: The moment.
        intervals: What is known of its texts.

    Returns:
        ``quality/perplexity``, ``bits_per_byte``, ``perplexity_ratio``, ``divergence``, ``agreement`` of the first
        text, ``quality/TEXT/...`` of the others, ``quality/parameters``, ``bytes``, ``bytes_on_disk``, ``flops``,
        ``prefill_tokens_per_second``, ``decode_tokens_per_second``, ``quality/novice_mass`` and
        ``quality/layer_error/layer_NUMBER``; those that are known. Of the moment before all of them begin with
        ``quality_before``: TensorBoard shows one number of a tag and step, and the first compression has its step.
    """
    root = "quality_before" if moment.name == BEFORE else "quality"
    found: dict[str, float] = {}
    for place, (text, numbers) in enumerate(intervals.items()):
        prefix = root if place == 0 else f"{root}/{text}"
        found |= {f"{prefix}/{name}": interval.value for name, interval in numbers.items()}
    for name in ("parameters", "bytes", "bytes_on_disk", "flops"):
        found[f"{root}/{name}"] = float(getattr(moment, name))
    for name, rate in moment.speed.items():
        found[f"{root}/{name}_tokens_per_second"] = rate.median
    routing = moment.routing
    if routing is not None and any(routing.novices):
        found[f"{root}/novice_mass"] = sum(routing.novice_masses) / len(routing.layers)
    found |= {f"{root}/layer_error/layer_{number}": error for number, error in moment.layer_errors.items()}
    return found


def samples_text(moments: Sequence[QualityMoment]) -> str:
    """Return what each model made of each prompt, one under the other, as Markdown; nothing without samples.

    Args:
        moments: The moments.
    """
    lines: list[str] = []
    for sample in moments[-1].samples:
        lines += ["#### Prompt", "", *_block(sample.prompt), ""]
        for moment in moments:
            same = next((item for item in moment.samples if item.prompt == sample.prompt), None)
            if same is not None:
                lines += [f"**{moment.name}**, step {moment.step}", "", *_block(same.continuation), ""]
    return "\n".join(lines)


def _block(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines() or [""]]
