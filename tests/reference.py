"""Independent references: what experts do, recorded on an untouched transformers model, and formulas in numpy.

Nothing here uses the package under test. A compressed model is *emulated* on the untouched one: a deleted expert's
router logit is minus infinity, a novice's output is a constant, all by naive loops. Layer and expert numbers are those
of the original model.

Legend: T tokens without padding, E experts, H hidden, I channels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.models import tiny_mixtral

Array = np.ndarray
Dropped = Mapping[int, Iterable[int]]
Constants = Mapping[tuple[int, int], Tensor | Callable[[Tensor], Tensor]]


@dataclass
class LayerRecord:
    """Everything that happened in one MoE layer, token by token.

    Attributes:
        gate: ``g_i(x)``, zero where not chosen, ``[T, E]``.
        chosen: ``I_i(x)``, bool ``[T, E]``.
        probability: Full softmax, ``[T, E]``.
        output: ``E_i(x)``, NaN where not chosen, ``[T, E, H]``.
        mixed: Output of the block, ``[T, H]``.
        logits: Of the router, ``[T, E]``.
        channel: ``act(gate x) * up x``, NaN where not chosen, ``[T, E, I]``.
        entering: Input of the decoder layer, ``[T, H]``.
        stream: Residual stream after attention, ``[T, H]``.
        leaving: Output of the decoder layer, ``[T, H]``.
        last: Whether the token is the last one of its sequence, bool ``[T]``.
        down: Down matrices ``[E, H, I]``: of the layer, not of its tokens.
    """

    gate: Array
    chosen: Array
    probability: Array
    output: Array
    mixed: Array
    logits: Array
    channel: Array
    entering: Array
    stream: Array
    leaving: Array
    last: Array
    down: Array


@dataclass
class Recorder:
    """Collects the calls of every MoE layer."""

    calls: dict[int, list[dict[str, Array]]] = field(default_factory=dict)

    def layers(self, masks: list[Tensor | None] | None = None) -> list[LayerRecord]:
        """Return one record a layer, the tokens of all calls in a row, padding left out.

        Args:
            masks: For each call the attention mask, or None.
        """
        result = []
        for layer in sorted(self.calls):
            kept = []
            for call, mask in zip(self.calls[layer], masks or [None] * len(self.calls[layer]), strict=True):
                batch, length = call["entering"].shape[:2]
                keep = np.ones((batch, length), bool) if mask is None else mask.bool().numpy()
                last = np.zeros((batch, length), bool)
                for row in range(batch):
                    if keep[row].any():
                        last[row, np.flatnonzero(keep[row])[-1]] = True
                tokens = {"last": last, **{name: array for name, array in call.items() if name != "down"}}
                flat = {
                    name: array.reshape(batch * length, *array.shape[2:])
                    if array.shape[:2] == (batch, length)
                    else array
                    for name, array in tokens.items()
                }
                kept.append({name: array[keep.reshape(-1)] for name, array in flat.items()})
            joined = {name: np.concatenate([call[name] for call in kept]) for name in kept[0]}
            result.append(LayerRecord(down=self.calls[layer][0]["down"], **joined))
        return result


def channels_by_hand(hidden_H: Tensor, gate_up_2IH: Tensor) -> Tensor:
    """Compute ``silu(gate @ x) * (up @ x)`` for one token."""
    half = gate_up_2IH.shape[0] // 2
    gate, up = gate_up_2IH[:half] @ hidden_H, gate_up_2IH[half:] @ hidden_H
    return gate / (1 + torch.exp(-gate)) * up


def _double(tensor: Tensor) -> Array:
    return tensor.detach().double().cpu().numpy()


@contextmanager
def emulated(
    model: Any,
    dropped: Dropped | None = None,
    constants: Constants | None = None,
    silent: Iterable[int] = (),
    skipped: Iterable[int] = (),
) -> Iterator[Recorder]:
    """Make an untouched Mixtral act as a compressed one inside a ``with`` block, and record its experts.

    Args:
        model: A plain ``MixtralForCausalLM``.
        dropped: Experts deleted in each layer.
        constants: What stands for an expert, by (layer, expert): a constant output ``[H]``, or a function of a token.
        silent: Layers whose MoE adds nothing.
        skipped: Layers that give back what they get.
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
            # In fp32 whatever the model is in: as transformers' router does.
            value, index = logits.float().softmax(-1).topk(min(module.top_k, logits.shape[1] - len(gone)), dim=-1)
            output = (logits, value / value.sum(-1, keepdim=True), index)
        memory["logits"] = logits
        return output

    def experts_hook(layer: int, memory: dict[str, Tensor], module: Any, args: Any, output: Tensor) -> Tensor | None:
        hidden, index, weight = args
        tokens, experts = hidden.shape[0], module.gate_up_proj.shape[0]
        gate = torch.zeros(tokens, experts, dtype=torch.float64)
        outputs = torch.full((tokens, experts, hidden.shape[1]), torch.nan, dtype=torch.float64)
        channels = torch.full((tokens, experts, module.down_proj.shape[2]), torch.nan, dtype=torch.float64)
        mixed = torch.zeros(tokens, hidden.shape[1], dtype=torch.promote_types(hidden.dtype, torch.float32))
        for token in range(tokens):
            for expert, g in zip(index[token].tolist(), weight[token], strict=True):
                inner = channels_by_hand(hidden[token], module.gate_up_proj[expert])
                stand_in = constants.get((layer, expert))
                if not isinstance(stand_in, Tensor):
                    channels[token, expert] = inner
                if stand_in is None:
                    out = module.down_proj[expert] @ inner
                else:
                    out = (stand_in(hidden[token]) if callable(stand_in) else stand_in).to(hidden.dtype)
                gate[token, expert] = g
                outputs[token, expert] = out
                mixed[token] += g * out
        changed = bool(constants) or bool(dropped)
        mixed = mixed.to(hidden.dtype) if changed else output
        memory |= {
            "gate": gate,
            "chosen": ~outputs.isnan().any(-1),
            "probability": memory["logits"].double().softmax(-1),
            "output": outputs,
            "mixed": mixed,
            "channel": channels,
            "down": module.down_proj,
        }
        return mixed if changed else None

    def layer_hook(layer: int, memory: dict[str, Tensor], _module: Any, args: Any, output: Tensor) -> None:
        memory |= {"entering": args[0], "leaving": output}
        call = {
            name: tensor.numpy() if tensor.dtype == torch.bool else _double(tensor) for name, tensor in memory.items()
        }
        recorder.calls.setdefault(layer, []).append(call)
        memory.clear()

    for number, layer in enumerate(model.model.layers):
        if number in silent:
            handles.append(layer.mlp.register_forward_hook(lambda m, a, o: torch.zeros_like(o)))
        if number in skipped:
            handles.append(layer.register_forward_hook(lambda m, a, o: a[0]))
        memory: dict[str, Tensor] = {}
        handles.append(
            layer.register_forward_hook(
                lambda m, a, o, number=number, memory=memory: layer_hook(number, memory, m, a, o)
            )
        )
        handles.append(
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda m, a, memory=memory: memory.update(stream=a[0])
            )
        )
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
    channel_mean, channel_m2 = np.zeros((2, experts, layer.channel.shape[2]))
    for expert in range(experts):
        members = layer.channel[chosen[:, expert], expert]
        if len(members):
            channel_mean[expert] = members.mean(0)
            channel_m2[expert] = ((members - members.mean(0)) ** 2).sum(0)
    return {
        "tokens": np.array(float(tokens)),
        "count": count,
        "gate_sum": gate.sum(0),
        "gate_square_sum": (gate**2).sum(0),
        "probability_sum": layer.probability.sum(0),
        "topk_probability_sum": np.where(chosen, layer.probability, 0.0).sum(0),
        "logit_gram": np.einsum("ti,tj->ij", layer.logits, layer.logits),
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
        "gate2_norm_sum": (gate**2 * norm).sum(0),
        "gate_norm_square_sum": (gate * norm**2).sum(0),
        "gate_product_sum": np.einsum("ti,tj->ij", gate, gate),
        "pair_output_sum": np.einsum("ti,tj,tih->ijh", gate, gate, output),
        "channel_count": count,
        "channel_mean": channel_mean,
        "channel_m2": channel_m2,
        "channel_weight_square": (layer.down**2).sum(1),
        "moe_tokens": np.array(float(tokens)),
        "moe_cosine_sum": cosine(layer.stream, layer.stream + layer.mixed).sum(),
        "block_tokens": np.array(float(tokens)),
        "block_cosine_sum": cosine(layer.entering, layer.leaving).sum(),
    }


def cosine(left: Array, right: Array) -> Array:
    """Cosines of the rows of two arrays."""
    return (left * right).sum(-1) / np.sqrt((left**2).sum(-1) * (right**2).sum(-1))


def similarities(layers: list[LayerRecord]) -> dict[str, Array]:
    """Compute the sums over all pairs of hidden states; a state's angle with itself is zero by definition."""
    states = [layers[0].entering, *(layer.leaving for layer in layers)]
    places, last = len(states), layers[0].last
    cosines = np.zeros((places, places, len(last)))
    for i, j in np.ndindex(places, places):
        cosines[i, j] = 1.0 if i == j else cosine(states[i], states[j])
    angle = np.arccos(np.clip(cosines, -1, 1)) / np.pi
    return {
        "similarity_tokens": np.array([float(len(last))]),
        "similarity_sequences": np.array([float(last.sum())]),
        "hidden_cosine_sum": cosines.sum(-1),
        "hidden_angle_sum": angle.sum(-1),
        "hidden_last_angle_sum": angle[:, :, last].sum(-1),
    }


def reference_sums(layers: list[LayerRecord]) -> dict[str, Array]:
    """Compute all sums; those of single layers are stacked."""
    rows = [sums(layer) for layer in layers]
    return {**{name: np.stack([row[name] for row in rows]) for name in rows[0]}, **similarities(layers)}


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
        if gone is not None and want.ndim >= 2 and want.shape[:2] == gone.shape:
            lost = np.broadcast_to(gone.reshape(gone.shape + (1,) * (want.ndim - 2)), want.shape).copy()
            if name in ("coactivation", "logit_gram", "output_gram", "gate_product_sum"):
                lost |= gone[:, None, :]
            if name == "pair_output_sum":
                lost |= gone[:, None, :, None]
            assert np.isnan(got[lost]).all(), f"{name}: numbers of deleted experts"
            got[lost] = want[lost] = 0.0
        assert got.shape == want.shape, name
        assert got.dtype == np.float64, name
        assert np.isfinite(got).all(), name
        scale = np.abs(want).max(-1, keepdims=True) if want.ndim >= 3 else np.abs(want)
        error = np.abs(got - want)
        assert (error <= relative * scale).all(), f"{name}: {(error / np.maximum(scale, 1e-300)).max():.3g}"


def untouched(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """Return a tiny Mixtral whose attention and experts are transformers' plain loops."""
    return tiny_mixtral(seed, dtype, **{"attn_implementation": "eager", "experts_implementation": "eager", **changes})
