"""Texts that a model is measured on, in one forward pass each: likelihood, divergence, errors of layers.

B blocks of a batch, S tokens of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from moe_lightning.architectures import architecture_of
from moe_lightning.architectures.modes import evaluation_mode
from moe_lightning.criteria import collect
from moe_lightning.evaluation.comparison import Batch, BlockScores, Prediction, prediction_of, score_logits
from moe_lightning.evaluation.layer_errors import LayerErrors, block_outputs
from moe_lightning.evaluation.likelihood import logits_of
from moe_lightning.evaluation.records import Routing
from moe_lightning.evaluation.reference_file import ReferenceFile, ReferenceText, ReferenceWriter, token_fingerprint


class Text:
    """Batches that give the same blocks each time.

    Args:
        name: Its name.
        batches: Dicts with ``input_ids`` [B, S] and, if there are any, ``attention_mask``, ``labels``, ``token_bytes``;
            for as many passes as wanted.
        calibrated: Whether calibration saw text from the same source; None where nobody knows.

    Raises:
        ValueError: There is no batch, or one without ``input_ids``.
    """

    def __init__(self, name: str, batches: Iterable[Batch], calibrated: bool | None) -> None:
        self.name, self.batches, self.calibrated = name, batches, calibrated
        self.sizes: list[tuple[int, int]] = []
        """Blocks, and tokens of each block, of every batch."""
        self.fingerprint = token_fingerprint(self._noted(batches))
        """Of the token ids."""
        if not self.sizes:
            raise ValueError(f"{name}: there is no batch to measure on")

    def _noted(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        for batch in batches:
            if not isinstance(batch, Mapping) or "input_ids" not in batch:
                raise ValueError(f"{self.name}: batches must be dicts with 'input_ids', got {type(batch).__name__}")
            blocks, tokens = batch["input_ids"].shape
            self.sizes.append((blocks, tokens))
            yield batch["input_ids"]

    @property
    def num_blocks(self) -> int:
        """Blocks of all batches."""
        return sum(blocks for blocks, _ in self.sizes)

    def whole(self, tokens: int) -> int:
        """Return how many tokens the whole blocks have that fit into so many; one block at least, none for 0."""
        found = 0
        for blocks, size in self.sizes if tokens > 0 else ():
            fitting = min(blocks, max(tokens - found, 0) // size)
            found += size * (fitting or (found == 0))
            if fitting < blocks:
                break
        return found

    def rows(self, tokens: int) -> list[int]:
        """Return for each batch how many of its blocks stand within the first tokens, of which there are so many."""
        found = []
        for blocks, size in self.sizes:
            found.append(min(blocks, tokens // size))
            tokens = tokens - blocks * size if found[-1] == blocks else 0
        return found

    def first(self, tokens: int) -> Iterator[Batch]:
        """Yield the blocks within the first tokens, in batches."""
        for batch, rows in zip(self.batches, self.rows(tokens), strict=False):
            if not rows:
                return
            yield {name: values[:rows] for name, values in batch.items() if isinstance(values, Tensor)}

    def reference(self, tokens: int) -> ReferenceText:
        """Describe the whole blocks within the first tokens, one block at least.

        Args:
            tokens: How many.
        """
        whole = self.whole(tokens)
        return ReferenceText(whole, token_fingerprint(batch["input_ids"] for batch in self.first(whole)))


def shares(texts: Sequence[Text], compared: Sequence[Sequence[int]], processes: int) -> list[list[int]]:
    """Share the batches of texts between processes.

    The first one takes all that are compared with a file, which others may not see, and those that are left go where
    there is least to do.

    Args:
        texts: The texts.
        compared: Of each text, how many blocks of each batch are compared.
        processes: How many processes there are.

    Returns:
        Of each text, the process of each batch.
    """
    work = [0] * processes
    flat = [
        (number, place, blocks * tokens, rows > 0)
        for number, (text, counts) in enumerate(zip(texts, compared, strict=True))
        for place, ((blocks, tokens), rows) in enumerate(zip(text.sizes, counts, strict=True))
    ]
    found = [[0] * len(text.sizes) for text in texts]
    for number, place, tokens, fixed in sorted(flat, key=lambda item: not item[3]):
        process = 0 if fixed else work.index(min(work))
        work[process] += tokens
        found[number][place] = process
    return found


class Comparison:
    """Compares what a model says with a reference, or makes that reference.

    Args:
        texts: The texts; errors of layers are measured on the first one.
        reference: What the uncompressed model said; a writer for that model itself; None where nothing is compared. Of
            a text whose first tokens are others than those of the reference nothing is compared.
    """

    def __init__(self, texts: Sequence[Text], reference: ReferenceFile | ReferenceWriter | None) -> None:
        self._reference = reference
        held = {} if reference is None else reference.texts
        self.unknown = [
            text.name
            for text in texts
            if reference is not None
            and (text.name not in held or text.reference(held[text.name].tokens) != held[text.name])
        ]
        """Texts of which the reference holds nothing, or something else."""
        known = [text.name not in self.unknown and text.name in held for text in texts]
        self.compared = [
            text.rows(held[text.name].tokens if same else 0) for text, same in zip(texts, known, strict=True)
        ]
        """Of each text, how many blocks of each batch are compared."""
        hidden_tokens = reference.hidden_tokens if reference is not None and known[0] else 0
        self.with_hidden = [texts[0].rows(hidden_tokens), *([0] * len(text.sizes) for text in texts[1:])]
        """The same for what leaves the layers."""
        self.layer_errors = LayerErrors()

    def prediction(self, text: str, first_token: int, logits: Tensor) -> Prediction | None:
        """Return what the uncompressed model says of a block, whose own logits ``[S, V]`` these may be."""
        if not isinstance(self._reference, ReferenceWriter):
            assert self._reference is not None
            return self._reference.prediction(text, first_token, len(logits))
        prediction = prediction_of(logits)
        self._reference.add_predictions(text, first_token, prediction)
        return prediction

    def add_outputs(self, first_token: int, outputs: Mapping[int, Tensor], mask: Tensor | None) -> None:
        """Take what leaves the layers at some blocks of the first text, ``[B, S, H]``."""
        if isinstance(self._reference, ReferenceWriter):
            self._reference.add_hidden(first_token, outputs)
            self.layer_errors.add(outputs, outputs, mask)
            return
        assert self._reference is not None
        size = next(iter(outputs.values())).shape[:2]
        before = self._reference.hidden(first_token, size.numel())
        self.layer_errors.add(outputs, {number: flat.view(*size, -1) for number, flat in before.items()}, mask)


def score_texts(
    model: PreTrainedModel,
    texts: Sequence[Text],
    comparison: Comparison,
    mine: Callable[[int, int], bool] = lambda text, batch: True,
    bar: Any = None,
) -> list[dict[int, BlockScores]]:
    """Measure a model on texts, each in one forward pass.

    Args:
        model: A causal language model. It runs in evaluation mode, without gradients, and is left in its own mode.
        texts: The texts.
        comparison: With what it is compared; afterwards it has the errors of the layers.
        mine: Says whether this process has a batch, by the numbers of text and batch.
        bar: Progress bar that is told of every batch.

    Returns:
        Of each text the sums of each of these batches, by their numbers.

    Cost:
        One forward pass; about ``10 * V`` operations a token that is compared.
    """
    found: list[dict[int, BlockScores]] = []
    with evaluation_mode(model):
        for number, text in enumerate(texts):
            scores: dict[int, BlockScores] = {}
            first = 0
            for place, batch in enumerate(islice(text.batches, len(text.sizes))):
                blocks, tokens = text.sizes[place]
                if mine(number, place):
                    rows = comparison.compared[number][place], comparison.with_hidden[number][place]
                    scores[place] = _score(model, text.name, batch, first, rows, comparison)
                    if bar is not None:
                        bar.update()
                first += blocks * tokens
            found.append(scores)
    return found


def _score(
    model: PreTrainedModel, text: str, batch: Batch, first: int, rows: tuple[int, int], comparison: Comparison
) -> BlockScores:
    compared, with_hidden = rows
    tokens = batch["input_ids"].shape[1]
    with ExitStack() as stack:
        # What leaves the layers is held only where it is wanted.
        outputs = stack.enter_context(block_outputs(model)) if with_hidden else {}
        logits = logits_of(model, batch)
        if with_hidden:
            mask = batch.get("attention_mask")
            kept = {number: states[:with_hidden] for number, states in outputs.items()}
            comparison.add_outputs(first, kept, None if mask is None else mask[:with_hidden])

    def known(block: int) -> Prediction | None:
        return comparison.prediction(text, first + block * tokens, logits[block]) if block < compared else None

    return score_logits(logits, batch, known)


def text_routing(model: PreTrainedModel, batches: Collection[Batch]) -> Routing | None:
    """Measure where the tokens of a text go; in a distributed run of all processes together.

    Args:
        model: A causal language model, compressed or not.
        batches: Dicts with ``input_ids`` and perhaps ``attention_mask``; of this process.

    Returns:
        Load and routing weight of every expert; None where no MoE layer is left.

    Raises:
        ValueError: The routing is not finite.

    Cost:
        One forward pass without the head.
    """
    shape = architecture_of(model).shape(model)
    if not shape.moe_layers:
        return None
    statistics = collect(model, batches, {"routing"}, progress=False)
    load, mass = (_shares_of(statistics[name]) for name in ("count", "gate_sum"))
    novices = [list(layout.novices) for layout in shape.layouts]
    return Routing(list(shape.moe_layers), load, mass, novices)


def _shares_of(sums_LE: Tensor) -> list[list[float | None]]:
    share_LE = sums_LE / sums_LE.nansum(1, keepdim=True)
    return [[None if value != value else value for value in row] for row in share_LE.tolist()]


def progress_bar(name: str, batches: int, shown: bool) -> Any:
    """Return a progress bar over batches, which is seen on a terminal only.

    Args:
        name: What is measured.
        batches: How many batches come.
        shown: Whether this process shows it.
    """
    return tqdm(total=batches, desc=name, unit="batch", disable=None if shown else True, leave=False)


__all__ = ["Comparison", "Text", "progress_bar", "score_texts", "shares", "text_routing"]
