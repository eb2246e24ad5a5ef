"""Independent references: what experts do, recorded on an untouched transformers model, and formulas in numpy.

Nothing here uses the package under test. A compressed model is *emulated* on the untouched one: a deleted expert's
router logit is minus infinity, a novice's output is a constant, all by naive loops. Layer and expert numbers are those
of the original model.

Legend: T tokens without padding, E experts, H hidden.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.models import tiny_mixtral

Array = np.ndarray
Dropped = Mapping[int, Iterable[int]]
Constants = Mapping[tuple[int, int], Tensor]


@dataclass
class LayerRecord:
    """Everything that happened in one MoE layer, token by token.

    Attributes:
        gate: ``g_i(x)``, zero where not chosen, ``[T, E]``.
        chosen: ``I_i(x)``, bool ``[T, E]``.
        probability: Full softmax, ``[T, E]``.
        output: ``E_i(x)``, NaN where not chosen, ``[T, E, H]``.
        mixed: Output of the block, ``[T, H]``.
    """

    gate: Array
    chosen: Array
    probability: Array
    output: Array
    mixed: Array


@dataclass
class Recorder:
    """Collects the calls of every MoE layer."""

    calls: dict[int, list[LayerRecord]] = field(default_factory=dict)

    def layers(self, masks: list[Tensor | None] | None = None) -> list[LayerRecord]:
        """Return one record a layer, the tokens of all calls in a row, padding left out.

        Args:
            masks: For each call the attention mask, or None.
        """
        result = []
        for layer in sorted(self.calls):
            calls = self.calls[layer]
            keeps = [
                np.ones(len(call.gate), bool) if mask is None else mask.reshape(-1).bool().numpy()
                for call, mask in zip(calls, masks or [None] * len(calls), strict=True)
            ]
            names = ("gate", "chosen", "probability", "output", "mixed")
            result.append(
                LayerRecord(
                    *(
                        np.concatenate([getattr(c, name)[keep] for c, keep in zip(calls, keeps, strict=True)])
                        for name in names
                    )
                )
            )
        return result


def expert_by_hand(hidden_H: Tensor, gate_up_2IH: Tensor, down_HI: Tensor) -> Tensor:
    """Compute ``down @ (silu(gate @ x) * (up @ x))`` for one token."""
    half = gate_up_2IH.shape[0] // 2
    gate, up = gate_up_2IH[:half] @ hidden_H, gate_up_2IH[half:] @ hidden_H
    return down_HI @ (gate / (1 + torch.exp(-gate)) * up)


def _double(tensor: Tensor) -> Array:
    return tensor.detach().double().cpu().numpy()


@contextmanager
def emulated(model: Any, dropped: Dropped | None = None, constants: Constants | None = None) -> Iterator[Recorder]:
    """Make an untouched Mixtral act as a compressed one inside a ``with`` block, and record its experts.

    Args:
        model: A plain ``MixtralForCausalLM``.
        dropped: Experts deleted in each layer.
        constants: Constant output ``[H]`` of an expert, by (layer, expert).
    """
    dropped, constants = dropped or {}, constants or {}
    recorder = Recorder()
    handles = []

    def router_hook(layer: int, memory: dict[str, Tensor], module: Any, _args: Any, output: Any) -> Any:
        logits = output[0]
        gone = list(dropped.get(layer, ()))
        if gone:
            logits = logits.clone()
            logits[:, gone] = -torch.inf
            value, index = logits.float().softmax(-1).topk(module.top_k, dim=-1)
            output = (logits, value / value.sum(-1, keepdim=True), index)
        memory["logits"] = logits
        return output

    def experts_hook(layer: int, memory: dict[str, Tensor], module: Any, args: Any, output: Tensor) -> Tensor | None:
        hidden, index, weight = args
        tokens, experts = hidden.shape[0], module.gate_up_proj.shape[0]
        gate = torch.zeros(tokens, experts, dtype=torch.float64)
        outputs = torch.full((tokens, experts, hidden.shape[1]), torch.nan, dtype=torch.float64)
        mixed = torch.zeros(tokens, hidden.shape[1], dtype=torch.promote_types(hidden.dtype, torch.float32))
        for token in range(tokens):
            for expert, g in zip(index[token].tolist(), weight[token], strict=True):
                if (layer, expert) in constants:
                    out = constants[layer, expert].to(hidden.dtype)
                else:
                    out = expert_by_hand(hidden[token], module.gate_up_proj[expert], module.down_proj[expert])
                gate[token, expert] = g
                outputs[token, expert] = out
                mixed[token] += g * out
        changed = bool(constants) or bool(dropped)
        mixed = mixed.to(hidden.dtype) if changed else output
        probability = memory["logits"].double().softmax(-1)
        recorder.calls.setdefault(layer, []).append(
            LayerRecord(
                _double(gate),
                (~outputs.isnan().any(-1)).numpy(),
                _double(probability),
                _double(outputs),
                _double(mixed),
            )
        )
        return mixed if changed else None

    for number, layer in enumerate(model.model.layers):
        memory: dict[str, Tensor] = {}
        handles.append(
            layer.mlp.gate.register_forward_hook(
                lambda m, a, o, number=number, memory=memory: router_hook(number, memory, m, a, o)
            )
        )
        handles.append(
            layer.mlp.experts.register_forward_hook(
                lambda m, a, o, number=number, memory=memory: experts_hook(number, memory, m, a, o)
            )
        )
    try:
        with torch.no_grad():
            yield recorder
    finally:
        for handle in handles:
            handle.remove()


def record(
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],
    dropped: Dropped | None = None,
    constants: Constants | None = None,
) -> list[LayerRecord]:
    """Run batches through an (emulated) model and return one record a layer, padding left out."""
    masks = []
    with emulated(model, dropped, constants) as recorder:
        for batch in batches:
            model(**{name: batch[name] for name in ("input_ids", "attention_mask") if name in batch})
            masks.append(batch.get("attention_mask"))
    return recorder.layers(masks)


def sums(layer: LayerRecord) -> dict[str, Array]:
    """Compute every sum of the statistics of one layer in two passes over the recorded tokens."""
    gate, chosen = layer.gate, layer.chosen
    tokens, experts, hidden = layer.output.shape
    output = np.where(chosen[:, :, None], layer.output, 0.0)
    norm = np.sqrt((output**2).sum(-1))
    count = chosen.sum(0).astype(float)
    mean, m2 = np.zeros((experts, hidden)), np.zeros((experts, hidden))
    for expert in range(experts):
        members = output[chosen[:, expert], expert]
        if len(members):
            mean[expert] = members.mean(0)
            m2[expert] = ((members - members.mean(0)) ** 2).sum(0)
    weighted = gate[:, :, None] * output
    return {
        "tokens": np.array(float(tokens)),
        "count": count,
        "gate_sum": gate.sum(0),
        "gate_square_sum": (gate**2).sum(0),
        "probability_sum": layer.probability.sum(0),
        "coactivation": np.einsum("ti,tj->ij", chosen.astype(float), chosen.astype(float)),
        "output_count": count,
        "output_mean": mean,
        "output_m2": m2,
        "gate_output_sum": weighted.sum(0),
        "gate2_output_sum": (gate[:, :, None] ** 2 * output).sum(0),
        "norm_sum": norm.sum(0),
        "norm_square_sum": (norm**2).sum(0),
        "gate_norm_sum": (gate * norm).sum(0),
        "gate2_norm_square_sum": (gate**2 * norm**2).sum(0),
        "output_max_abs": np.abs(output).max((0, 2)) if tokens else np.zeros(experts),
        "output_gram": np.einsum("tih,tjh->ij", weighted, weighted),
        "layer_output_square_sum": np.array((layer.mixed**2).sum()),
    }


def reference_sums(layers: list[LayerRecord]) -> dict[str, Array]:
    """Stack the sums of all layers."""
    rows = [sums(layer) for layer in layers]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def assert_sums_equal(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Array], relative: float = 1e-9, gone: Array | None = None
) -> None:
    """Compare statistics with a reference, each vector relative to its own largest entry.

    Args:
        tensors: Statistics under test.
        expected: The reference.
        relative: Largest relative error.
        gone: Experts that must be NaN, bool ``[layers, experts]``.
    """
    for name, tensor in tensors.items():
        got, want = tensor.numpy().copy(), expected[name].copy()
        if gone is not None and want.ndim >= 2:
            lost = np.broadcast_to(gone.reshape(gone.shape + (1,) * (want.ndim - 2)), want.shape).copy()
            if name in ("coactivation", "output_gram"):
                lost |= gone[:, None, :]
            assert np.isnan(got[lost]).all(), f"{name}: numbers of deleted experts"
            got[lost] = want[lost] = 0.0
        assert got.shape == want.shape, name
        assert got.dtype == np.float64, name
        assert np.isfinite(got).all(), name
        scale = np.abs(want).max(-1, keepdims=True) if want.ndim == 3 else np.abs(want)
        error = np.abs(got - want)
        assert (error <= relative * scale).all(), f"{name}: {(error / np.maximum(scale, 1e-300)).max():.3g}"


def untouched(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """Return a tiny Mixtral whose attention and experts are transformers' plain loops."""
    return tiny_mixtral(seed, dtype, **{"attn_implementation": "eager", "experts_implementation": "eager", **changes})
