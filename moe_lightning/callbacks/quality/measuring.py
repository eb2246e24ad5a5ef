"""Measuring everything of one model at one moment of a run, by all processes together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from transformers import PreTrainedModel

from moe_lightning.architectures import architecture_of
from moe_lightning.callbacks.at_step import language_model
from moe_lightning.callbacks.processes import of_all_processes
from moe_lightning.callbacks.spending import undisturbed
from moe_lightning.evaluation.comparison import BlockScores, join_scores
from moe_lightning.evaluation.quality import Comparison, Text, progress_bar, score_texts, shares, text_routing
from moe_lightning.evaluation.records import QualityMoment, Rate, Routing, Sample, TextScores
from moe_lightning.evaluation.reference_file import ReferenceFile, ReferenceWriter
from moe_lightning.evaluation.samples import continuations
from moe_lightning.evaluation.speed import decode_rate, prefill_rate
from moe_lightning.sizes import measure

REPEATS = 3
"""Times that each speed is measured, behind one that does not count."""

DECODED_TOKENS = 32
"""Steps of decoding that are timed in each repeat."""


@dataclass(frozen=True)
class Wanted:
    """What is measured beside the scores of the texts.

    Attributes:
        routing_tokens: Tokens of the first text whose routing is counted, whole blocks.
        speed: Whether prefill and decoding are timed.
        prompts: Texts to continue.
        new_tokens: Tokens that continue them at most.
        tokenizer: Of the model; None where there are no prompts.
    """

    routing_tokens: int
    speed: bool
    prompts: Sequence[str]
    new_tokens: int
    tokenizer: Any


def measure_moment(
    trainer: Trainer,
    module: LightningModule,
    texts: Sequence[Text],
    reference: ReferenceFile | ReferenceWriter | None,
    wanted: Wanted,
    name: str,
    step: int,
    what: str,
) -> QualityMoment:
    """Measure a model; called by all processes, which get the same.

    The model runs in eval mode and in the trainer's precision. No random number is drawn from the training's sequence.

    Args:
        trainer: The trainer.
        module: Its module.
        texts: The texts.
        reference: What the model before compression said, in the first process; a writer where it is this model.
        wanted: What is measured beside.
        name: Of the moment.
        step: Optimizer steps done.
        what: What happened before it.
    """
    model, rank, processes = language_model(module), trainer.global_rank, trainer.world_size
    with undisturbed(trainer), trainer.precision_plugin.forward_context():
        comparison = Comparison(texts, reference)
        counts = [
            [max(pair) for pair in zip(*rows, strict=True)]
            for rows in zip(comparison.compared, comparison.with_hidden, strict=True)
        ]
        process_of = trainer.strategy.broadcast(shares(texts, counts, processes))

        def mine(text: int, batch: int) -> bool:
            return process_of[text][batch] == rank

        num_batches = sum(process == rank for text in process_of for process in text)
        with progress_bar(f"quality {name}", num_batches, trainer.is_global_zero) as bar:
            try:
                with reference if isinstance(reference, ReferenceWriter) else nullcontext():
                    parts = score_texts(model, texts, comparison, mine, bar)
            except OSError as error:
                # No reason to lose the run.
                warnings.warn(
                    f"QualityEvaluation: the predictions before compression could not be written ({error}): "
                    "divergence, agreement and errors of layers will be missing in this run",
                    stacklevel=2,
                )
                comparison = Comparison(texts, None)
                bar.reset()
                parts = score_texts(model, texts, comparison, mine, bar)
            scores = _joined(of_all_processes(trainer, parts))
            bar.set_postfix_str("routing")
            routing = _routing(model, texts[0], wanted.routing_tokens, rank, processes)
            moment = None
            if trainer.is_global_zero:
                # What a token costs depends on whether it goes to novices: so does the text.
                size = measure(model, texts[0].sizes[0][1], None if routing is None else routing.novice_shares)
                bar.set_postfix_str("speed")
                speed = _speed(model, texts[0]) if wanted.speed else {}
                bar.set_postfix_str("samples")
                moment = QualityMoment(
                    name=name,
                    step=step,
                    what=what,
                    texts={
                        text.name: TextScores(found, text.calibrated, text.fingerprint)
                        for text, found in zip(texts, scores, strict=True)
                    },
                    parameters=size.parameters,
                    bytes=size.bytes,
                    bytes_on_disk=architecture_of(model).shape(model).bytes,
                    flops=size.flops,
                    speed=speed,
                    routing=routing,
                    layer_errors=_finite(comparison.layer_errors.compute(), name),
                    samples=_samples(model, wanted),
                )
            # Nothing but the first process's: the others have none.
            shared: Any = trainer.strategy.broadcast(moment)
            return shared


def _joined(of_processes: Iterable[list[dict[int, BlockScores]]]) -> list[BlockScores]:
    """Put the sums of all processes together, in the order of the blocks."""
    found = []
    for of_text in zip(*of_processes, strict=True):
        batches = {number: scores for part in of_text for number, scores in part.items()}
        found.append(join_scores([batches[number] for number in sorted(batches)]))
    return found


def _routing(model: PreTrainedModel, text: Text, tokens: int, rank: int, processes: int) -> Routing | None:
    batches = [batch for number, batch in enumerate(text.first(text.whole(tokens))) if number % processes == rank]
    try:
        return text_routing(model, batches)
    except ValueError as error:
        warnings.warn(f"QualityEvaluation: the routing was not measured: {error}", stacklevel=2)
        return None


def _speed(model: PreTrainedModel, text: Text) -> dict[str, Rate]:
    ids = next(iter(text.batches))["input_ids"]
    half = max(1, ids.shape[1] // 2)
    steps = max(1, min(DECODED_TOKENS, ids.shape[1] - half))
    return {
        "prefill": prefill_rate(model, ids, repeats=REPEATS),
        "decode": decode_rate(model, ids[:1, :half], steps, repeats=REPEATS),
    }


def _samples(model: PreTrainedModel, wanted: Wanted) -> list[Sample]:
    if not wanted.prompts:
        return []
    return continuations(model, wanted.tokenizer, wanted.prompts, wanted.new_tokens)


def _finite(errors: dict[int, float], name: str) -> dict[int, float]:
    bad = [number for number, error in errors.items() if not math.isfinite(error)]
    if bad:
        warnings.warn(
            f"QualityEvaluation, {name}: what leaves blocks {bad} is not finite, so they have no error", stacklevel=2
        )
    return {number: error for number, error in errors.items() if number not in bad}
