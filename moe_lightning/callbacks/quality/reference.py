"""What the model before compression predicted, as a run keeps it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from moe_lightning.architectures import architecture_of
from moe_lightning.evaluation.quality import Comparison, Text
from moe_lightning.evaluation.reference_file import ReferenceFile, ReferenceWriter, reference_bytes
from moe_lightning.statistics.batches import size_in_words
from moe_lightning.statistics.fingerprint import fingerprint

REFERENCE = Path("quality") / "reference.safetensors"
"""In the run directory."""

LOST = (
    "divergence, agreement and errors of layers will be missing in what is measured from now on (perplexity is still "
    "compared)"
)


class RunReference:
    """The file of one run: how large it may be, who writes it, and whether it is the right one.

    Args:
        divergence_tokens: Tokens of each text whose predictions it holds, at most, in whole blocks.
        layer_tokens: Tokens of the first text whose hidden states it holds, likewise.
        max_bytes: Largest size.
    """

    def __init__(self, divergence_tokens: int, layer_tokens: int, max_bytes: int) -> None:
        self.divergence_tokens, self.layer_tokens, self.max_bytes = divergence_tokens, layer_tokens, max_bytes
        self.weights: list[float] | None = None
        """Fingerprint of the model that this run has compressed; None where it has compressed none."""
        self.file: ReferenceFile | None = None
        """The file; None where it is not there, and in all processes but the first."""

    @staticmethod
    def path(folder: str) -> Path:
        """Return the file of a run directory."""
        return Path(folder) / REFERENCE

    def _advice(self, texts: Sequence[Text], model: PreTrainedModel) -> str:
        """Return options with which the file is small enough: each was tried."""

        def largest(name: str, **fixed: int) -> int | None:
            """Return the largest whole blocks of one option that fit, below what was asked for; 0 is none."""
            size = max(text.sizes[0][1] for text in texts)
            asked: int = getattr(self, name)
            for tokens in (*range((asked - 1) // size * size, 0, -size), 0):
                given = {"divergence_tokens": self.divergence_tokens, "layer_tokens": self.layer_tokens, **fixed}
                smaller = RunReference(**{**given, name: tokens}, max_bytes=self.max_bytes)
                if smaller.bytes(texts, model) <= self.max_bytes:
                    return tokens
            return None

        found = []
        # Hidden states first: they are the larger part for their tokens, and the least of what is told.
        for name in ("layer_tokens", "divergence_tokens"):
            tokens = largest(name) if getattr(self, name) else None
            if tokens or (tokens == 0 and name == "layer_tokens"):
                found.append(f"{name} to {tokens}")
        if not found:
            fitting = largest("divergence_tokens", layer_tokens=0) if self.layer_tokens else 0
            found = [f"divergence_tokens to {fitting or 0} and layer_tokens to 0"]
        return f"set {', or '.join(found)}"

    def _sizes(self, texts: Sequence[Text], model: PreTrainedModel) -> tuple[int, int, int, int, int]:
        shape = architecture_of(model).shape(model)
        predicted = sum(text.whole(self.divergence_tokens) for text in texts)
        hidden = texts[0].whole(self.layer_tokens)
        return predicted, len(model.get_output_embeddings().weight), hidden, shape.hidden_size, len(shape.blocks)

    def bytes(self, texts: Sequence[Text], model: PreTrainedModel) -> int:
        """Return how large the file of a model will be.

        Args:
            texts: What is measured on.
            model: The model.
        """
        return reference_bytes(*self._sizes(texts, model))

    def check(self, texts: Sequence[Text], model: PreTrainedModel, folder: str) -> None:
        """Make sure that the file of a model may be so large, and that there is room for it.

        Args:
            texts: What is measured on.
            model: The model.
            folder: The run directory.

        Raises:
            ValueError: It may not, or there is not.
        """
        predicted, vocab_size, hidden, hidden_size, blocks = self._sizes(texts, model)
        needed = reference_bytes(predicted, vocab_size, hidden, hidden_size, blocks)
        path = self.path(folder)
        what = (
            f"QualityEvaluation: what the model predicts before compression takes {size_in_words(needed)} in {path} "
            f"({predicted:,} tokens in {len(texts)} text(s), {vocab_size:,} words each; hidden states of {hidden:,} "
            f"tokens in {blocks} blocks)"
        )
        if needed > self.max_bytes:
            raise ValueError(
                f"{what}, more than max_reference_bytes {self.max_bytes} ({size_in_words(self.max_bytes)}): "
                f"{self._advice(texts, model)}, or raise max_reference_bytes to {needed}"
            )
        parent = path.absolute().parent
        while not parent.exists():
            parent = parent.parent
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise ValueError(
                f"{what}, but only {size_in_words(free)} are free there: lower divergence_tokens and layer_tokens, or "
                "choose another run directory"
            )

    def writer(self, texts: Sequence[Text], model: PreTrainedModel, folder: str) -> ReferenceWriter | None:
        """Return what writes the file of a model; None where nothing is to be written.

        Args:
            texts: What is measured on.
            model: The model.
            folder: The run directory.
        """
        self.weights = fingerprint(model)
        _, vocab_size, hidden, hidden_size, _ = self._sizes(texts, model)
        if not self.divergence_tokens and not hidden:
            return None
        described = {text.name: text.reference(self.divergence_tokens) for text in texts}
        blocks = architecture_of(model).shape(model).blocks
        return ReferenceWriter(self.path(folder), described, vocab_size, hidden, hidden_size, blocks, self.weights)

    def open(self, texts: Sequence[Text], folder: str) -> None:
        """Open the file of the run; where it is not the one that the run has written go on without it, with a warning.

        Args:
            texts: What is measured on.
            folder: The run directory.
        """
        self.file = None
        if self.weights is None or not (self.divergence_tokens or self.layer_tokens):
            return
        try:
            found = ReferenceFile(self.path(folder))
        except (FileNotFoundError, ValueError) as error:
            warnings.warn(
                f"QualityEvaluation: {error}. It held what the model predicted before its compression: put it back, or "
                f"{LOST}",
                stacklevel=2,
            )
            return
        if found.weights != self.weights:
            warnings.warn(
                f"QualityEvaluation: {found.path} holds the predictions of another model than the one that this run "
                f"has compressed: {LOST}",
                stacklevel=2,
            )
            return
        other = [name for name in Comparison(texts, found).unknown if name in found.texts]
        if other:
            warnings.warn(
                f"QualityEvaluation: {', '.join(other)}: {found.path} holds predictions of other blocks, so there will "
                "be no divergence: use the same data options (--data.seed, --data.test, ...) to have it",
                stacklevel=2,
            )
        self.file = found
