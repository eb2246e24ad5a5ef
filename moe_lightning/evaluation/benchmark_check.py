"""Only a model whose output was compared can be timed: what compares, and the type that nothing else makes.

A model runs as it will be timed: same tokens, batch and implementation, prefill, then decoding with the cache. Of the
first and the last sequence every decoder layer's output is compared with what an independent slow computation makes of
the layer's input (:mod:`~moe_lightning.evaluation.benchmark_reference`); and so are what enters the first layer and the
logits. Every token of every layer must agree:

    |got - want| <= tolerance * (|attention| + |experts|) + rounding * |residual stream|

and half of the tokens 2.5 times as closely. What a layer adds is a small part of the stream in trained models: measured
against the stream alone, a wrong expert would look like rounding. In bf16 the experts that a router picks last and
those behind them may be equally good within rounding; such a token may agree with any choice among these. So there
is no need to let wrong tokens pass, except in narrow types one in 500, where even more experts are equally good.

Measured on models of 3 and 4 layers, trained and random: up to 1e-6 in fp32, 2e-3 in fp16, 2.4e-2 in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moe_lightning.architectures import architecture_of
from moe_lightning.architectures.modes import evaluation_mode
from moe_lightning.evaluation.benchmark_reference import Reference
from moe_lightning.evaluation.speed import Decoding, Prefill, Work

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)

TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest error of a token by the type of the weights. Routing weights are in fp32 in every type."""

_MEDIAN = 0.4
"""Share of the tolerance that the median of the tokens must keep to."""

_OUTLIERS = {torch.float16: 0.002, torch.bfloat16: 0.002}
"""Share of the tokens that may differ in a layer."""


class Mismatch(ValueError):
    """A model does not compute what its weights say; the message says where."""


@dataclass(frozen=True)
class OutputCheck:
    """A model against the slow computation, in one phase.

    Attributes:
        relative_error: The largest error of a token in a layer or in the logits, outliers left out, in units of what
            the layer adds.
        agreement: Share of the tokens whose likeliest successor is the same by the model's logits and by those of the
            reference.
        tokens: Tokens compared, of all layers alike.
    """

    relative_error: float
    agreement: float
    tokens: int


_PROOF = object()


class CheckedModel:
    """A model that was compared, as it will run on certain tokens. Made by :func:`checked`, and by nothing else.

    Attributes:
        model: The model.
        works: What was compared and may be timed, by phase.
        comparisons: What came out, by phase.
    """

    def __init__(
        self, proof: object, model: Any, works: dict[Phase, Work], comparisons: dict[Phase, OutputCheck]
    ) -> None:
        """Refuse.

        Raises:
            TypeError: Called by anybody but :func:`checked`.
        """
        if proof is not _PROOF:
            raise TypeError("a model is timed only after its output was compared: checked(model, ...) does that")
        self.model = model
        self.works = works
        self.comparisons = comparisons
        self._implementation = model.config._experts_implementation

    def activate(self) -> None:
        """Let the model compute its experts as it did when it was compared."""
        if self.model.config._experts_implementation != self._implementation:
            self.model.set_experts_implementation(self._implementation)


def checked(
    model: Any,
    ids: Tensor,
    new_tokens: int,
    tolerance: float | None = None,
    phases: Sequence[Phase] = PHASES,
    prompt_tokens: int | None = None,
) -> CheckedModel:
    """Compare a model as it will be timed.

    Args:
        model: A Mixtral with its language head, compressed or not, with the implementation of experts that will be
            timed.
        ids: Token ids [batch, context + new_tokens]: prefill of the context, then decoding of the rest.
        new_tokens: Steps of decoding, at least 1.
        tolerance: Largest error of a token; by the type of the weights where None.
        phases: What is compared and may be timed.
        prompt_tokens: Tokens of the prompt that go in at a time before decoding; see `Decoding`.

    Returns:
        The model, which may now be timed on these tokens, in these phases.

    Raises:
        Mismatch: The model computes something else.
        ValueError: Another family, or too few tokens.

    Cost:
        The passes that are compared, and as many FLOPs as two sequences take twice, in fp32.
    """
    context = ids.shape[1] - new_tokens
    if new_tokens < 1 or context < 1:
        raise ValueError(f"{ids.shape[1]} tokens do not hold a context and {new_tokens} steps of decoding, 1 or more")
    prompt, following = ids[:, :context], ids[:, context:]
    works: dict[Phase, Work] = {
        phase: Prefill(model, prompt)
        if phase == "prefill"
        else Decoding(model, prompt, new_tokens, following, prompt_tokens)
        for phase in phases
    }
    kind = next(model.parameters()).dtype
    if tolerance is None:
        tolerance = TOLERANCES.get(kind, TOLERANCES[torch.float32])
    rows = sorted({0, len(ids) - 1})
    comparisons: dict[Phase, OutputCheck] = {}
    with evaluation_mode(model):
        for phase, work in works.items():
            with _watched(model, rows) as seen:
                work.prepare()
                work.run()
            work.forget()
            read = ids[rows, : context if phase == "prefill" else None]
            try:
                comparisons[phase] = _compare(model, read, seen, tolerance, kind)
            except Mismatch as error:
                raise Mismatch(f"{phase} is wrong: {error}") from None
    return CheckedModel(_PROOF, model, works, comparisons)


class _Seen:
    """What went through a model, of some sequences."""

    def __init__(self, num_layers: int) -> None:
        self.entering: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self.leaving: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self.logits: list[Tensor] = []
        self.places: list[Tensor] = []

    @property
    def length(self) -> int:
        return sum(part.shape[1] for part in self.entering[0])


@contextmanager
def _watched(model: Any, rows: Sequence[int]) -> Iterator[_Seen]:
    """Record what goes through the decoder layers. Hooks there change no way that a layer's parts take."""
    layers = architecture_of(model).decoder_layers(model)
    seen = _Seen(len(layers))
    picked = list(rows)

    def note_layer(number: int, arguments: Any, options: Any, output: Any) -> None:
        hidden = arguments[0] if arguments else options["hidden_states"]
        seen.entering[number].append(hidden[picked])
        seen.leaving[number].append(output[picked])

    def note_logits(_model: Any, _arguments: Any, _options: Any, output: Any) -> None:
        logits = output.logits[picked]
        seen.logits.append(logits)
        seen.places.append(torch.arange(seen.length - logits.shape[1], seen.length))

    handles = [
        layer.register_forward_hook(
            lambda _layer, arguments, options, output, number=number: note_layer(number, arguments, options, output),
            with_kwargs=True,
        )
        for number, layer in enumerate(layers)
    ]
    handles.append(model.register_forward_hook(note_logits, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _compare(model: Any, ids: Tensor, seen: _Seen, tolerance: float, kind: torch.dtype) -> OutputCheck:
    reference = Reference(model)
    if reference.num_layers != len(seen.entering):
        raise Mismatch(f"it has {len(seen.entering)} decoder layers, its plan leaves {reference.num_layers}")
    rounding = torch.finfo(kind).eps
    worst = 0.0
    before = reference.embedded(ids)
    for place in range(reference.num_layers):
        lengths = [sum(part.shape[1] for part in parts[place]) for parts in (seen.entering, seen.leaving)]
        if lengths != [ids.shape[1]] * 2:
            raise Mismatch(f"layer {place} saw {lengths[0]} tokens of {ids.shape[1]}")
        entering, leaving = (torch.cat(parts[place], 1).to(reference.dtype) for parts in (seen.entering, seen.leaving))
        _check_tokens(_error(entering, before, before.norm(dim=-1)), tolerance, 0.0, f"what enters layer {place}")
        want = reference.layer(place, entering, tolerance)
        scale = want.added + rounding / tolerance * want.output.norm(dim=-1)
        error = _error(leaving, want.output, scale).flatten()
        others = _error(leaving.flatten(0, 1)[want.token], want.others, scale.flatten()[want.token])
        error = error.scatter_reduce(0, want.token, others, "amin")
        worst = max(worst, _check_tokens(error, tolerance, _OUTLIERS.get(kind, 0.0), f"layer {place}"))
        before = leaving
    got, places = torch.cat(seen.logits, 1), torch.cat(seen.places).to(before.device)
    want_logits = reference.logits(before[:, places])
    worst = max(worst, _check_tokens(_error(got, want_logits, want_logits.norm(dim=-1)), tolerance, 0.0, "the logits"))
    agreement = float((got.argmax(-1) == want_logits.argmax(-1)).double().mean())
    return OutputCheck(worst, agreement, ids.numel())


def _error(got: Tensor, want: Tensor, scale: Tensor) -> Tensor:
    """Return how far each token is off, in units of a scale of its own."""
    error = (got.to(want.dtype) - want).norm(dim=-1) / scale.clamp(min=torch.finfo(want.dtype).tiny)
    return torch.where(error.isfinite(), error, torch.inf)


def _check_tokens(error: Tensor, tolerance: float, outliers: float, what: str) -> float:
    """Return the largest error that is no outlier.

    Raises:
        Mismatch: It, or the median, is too large.
    """
    ranked = error.flatten().sort().values
    largest = float(ranked[len(ranked) - 1 - int(outliers * len(ranked))])
    median = float(ranked[(len(ranked) - 1) // 2])
    for name, value, most in (("largest", largest, tolerance), ("median", median, _MEDIAN * tolerance)):
        if not value <= most:
            raise Mismatch(f"{what}: off by {value:.1e} ({name} of {len(ranked)} tokens), allowed are {most:.1e}")
    return largest
