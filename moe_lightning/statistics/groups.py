"""The table of all statistics: which belong together, how large they are, and how two of a kind are merged.

Legend of the dimensions: L MoE layers that are left, E experts of the *original* model, H hidden, I channels of the
widest expert, B decoder layers that are left, C = B + 1 places between them, R = rank + 1, S = 2^E sets of experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lightning.plan import ModelShape
from moe_lightning.statistics.low_rank import MAX_CURVE_RANK
from moe_lightning.statistics.second_moments import MAX_BYTES, second_moment_bytes


@dataclass(frozen=True)
class Entry:
    """How a statistic is laid out and merged.

    Attributes:
        dims: One letter for each dimension, see above; a digit is itself.
        merge: ``sum``; ``max``; ``moments`` (with its two neighbours); ``same`` (a property of the weights);
            ``mean NAME``: a mean over the tokens that ``NAME`` counts.
    """

    dims: str
    merge: str = "sum"


MOST_SUBSET_EXPERTS = 10
"""Experts of a layer up to which all their sets can be tried out (``subsets``)."""

TOKENS_AT_ONCE = 1024
"""Tokens for which ``subsets`` holds the outputs of all experts at a time."""

LOGIT_BYTES = 2**30
"""Most memory for the intact model's logits of a batch while ``interventions`` are measured."""

TABLE: dict[str, dict[str, Entry]] = {
    "routing": {
        "tokens": Entry("L"),
        "count": Entry("LE"),
        "gate_sum": Entry("LE"),
        "gate_square_sum": Entry("LE"),
        "probability_sum": Entry("LE"),
        "topk_probability_sum": Entry("LE"),
        "coactivation": Entry("LEE"),
        "logit_gram": Entry("LEE"),
    },
    "outputs": {
        "output_count": Entry("LE", "moments"),
        "output_mean": Entry("LEH", "moments"),
        "output_m2": Entry("LEH", "moments"),
        "gate_output_sum": Entry("LEH"),
        "gate2_output_sum": Entry("LEH"),
        "norm_sum": Entry("LE"),
        "norm_square_sum": Entry("LE"),
        "gate_norm_sum": Entry("LE"),
        "gate_norm_square_sum": Entry("LE"),
        "gate2_norm_sum": Entry("LE"),
        "gate2_norm_square_sum": Entry("LE"),
        "output_max_abs": Entry("LE", "max"),
        "output_gram": Entry("LEE"),
        "layer_output_square_sum": Entry("L"),
    },
    "pairs": {"gate_product_sum": Entry("LEE"), "pair_output_sum": Entry("LEEH")},
    "channels": {
        "channel_count": Entry("LE", "moments"),
        "channel_mean": Entry("LEI", "moments"),
        "channel_m2": Entry("LEI", "moments"),
        "channel_weight_square": Entry("LEI", "same"),
    },
    "layers": {"moe_tokens": Entry("L"), "moe_cosine_sum": Entry("L")},
    "blocks": {"block_tokens": Entry("B"), "block_cosine_sum": Entry("B")},
    "similarity": {
        "similarity_tokens": Entry("1"),
        "similarity_sequences": Entry("1"),
        "hidden_cosine_sum": Entry("CC"),
        "hidden_angle_sum": Entry("CC"),
        "hidden_last_angle_sum": Entry("CC"),
    },
    "low_rank": {"low_rank_tokens": Entry("LE"), "low_rank_error": Entry("LER", "mean low_rank_tokens")},
    "interventions": {
        "divergence_tokens": Entry("1"),
        "expert_divergence": Entry("LE", "mean divergence_tokens"),
    },
    "subsets": {"subset_tokens": Entry("1"), "subset_error": Entry("LS", "mean subset_tokens")},
    "sensitivity": {"layer_divergence": Entry("L", "mean tokens")},
}

GROUPS: dict[str, tuple[str, ...]] = {group: tuple(entries) for group, entries in TABLE.items()}
"""Statistics that are measured together, by the name that criteria and methods ask for."""

DEFAULT_GROUPS = frozenset({"routing", "outputs", "layers", "blocks"})
"""What is measured where nothing is asked for: cheap, and enough for most criteria."""

MAY_BE_NAN = frozenset({"low_rank_error", "low_rank_tokens", "subset_error"})
"""Statistics that have no value for some experts or sets that are there, e.g. low-rank errors of novices."""

STREAMED_GROUPS = frozenset(GROUPS) - {"low_rank", "interventions", "subsets", "sensitivity"}
"""Groups that one pass measures together; each of the others makes passes of its own."""

ENTRIES: dict[str, Entry] = {name: entry for entries in TABLE.values() for name, entry in entries.items()}


def check_needs(needs: Iterable[str] | None) -> frozenset[str]:
    """Return the groups asked for, the default ones for None.

    Raises:
        ValueError: An unknown group, or one that cannot be collected.
    """
    if needs is None:
        return DEFAULT_GROUPS
    wanted = frozenset([needs] if isinstance(needs, str) else needs)
    unknown = wanted - frozenset(GROUPS)
    if unknown:
        raise ValueError(f"unknown statistics {sorted(unknown)}: choose from {sorted(set(GROUPS) - {'sensitivity'})}")
    return wanted


def widths(shape: ModelShape) -> list[int]:
    """Return the channels of the real experts of each MoE layer."""
    return [shape.intermediate_size if layout.width is None else layout.width for layout in shape.layouts]


def sizes_of(shape: ModelShape, dims: str) -> tuple[int, ...]:
    """Return the size of every dimension of an entry for a model.

    Args:
        shape: Shape of the model.
        dims: Letters as in :class:`Entry`.
    """
    sizes = {
        "L": len(shape.layouts),
        "E": shape.num_experts,
        "H": shape.hidden_size,
        "I": max(widths(shape), default=shape.intermediate_size),
        "B": len(shape.blocks),
        "C": len(shape.blocks) + 1,
        "S": 1 << min(shape.num_experts, MOST_SUBSET_EXPERTS),
        "R": min(shape.hidden_size, MAX_CURVE_RANK) + 1,
    }
    return tuple(sizes[letter] if letter in sizes else int(letter) for letter in dims)


def known_experts(shape: ModelShape) -> Tensor:
    """Return which experts the router knows, bool ``[L, E]``."""
    known = torch.zeros(len(shape.layouts), shape.num_experts, dtype=torch.bool, device="cpu")
    for row, layout in enumerate(shape.layouts):
        known[row, list(layout.router)] = True
    return known


def real_experts(shape: ModelShape) -> Tensor:
    """Return which experts have weights of their own, bool ``[L, E]``."""
    real = torch.zeros(len(shape.layouts), shape.num_experts, dtype=torch.bool, device="cpu")
    for row, layout in enumerate(shape.layouts):
        real[row, list(layout.real)] = True
    return real


def mark_absent(shape: ModelShape, tensors: dict[str, Tensor]) -> None:
    """Write NaN, in place, where a model has no such expert or channel.

    Args:
        shape: Shape of the model.
        tensors: Statistics by name.
    """
    gone, unreal = ~known_experts(shape), ~real_experts(shape)
    for name, tensor in tensors.items():
        dims = ENTRIES[name].dims if name in ENTRIES else ""
        if not dims.startswith("LE"):
            continue
        tensor[unreal if name in GROUPS["channels"] else gone] = torch.nan
        if dims.startswith("LEE"):
            tensor.transpose(1, 2)[gone] = torch.nan
        if dims == "LEI":
            for row, width in enumerate(widths(shape)):
                tensor[row, :, width:] = torch.nan


def statistics_bytes(shape: ModelShape, needs: Iterable[str] | None = None, tokens_per_batch: int = 0) -> int:
    """Say how much memory a collection takes beside the model and its forward pass.

    Counted are the sums (float64), and what is held of one batch: every block's hidden states for ``similarity`` and
    ``interventions``, one layer's for ``layers``, and the outputs of one layer's experts (with their inner activations
    for ``channels``) for the groups that read those.

    Args:
        shape: Shape of the model.
        needs: Groups; None takes the default ones.
        tokens_per_batch: Tokens of the largest batch; 0 counts the sums only.

    Returns:
        Bytes.
    """
    wanted = check_needs(needs)
    total = 0
    for group in wanted:
        for entry in TABLE[group].values():
            count = 8
            for size in sizes_of(shape, entry.dims):
                count *= size
            total += count
    if "low_rank" in wanted:
        total += min(MAX_BYTES, second_moment_bytes(shape.hidden_size, sum(len(item.real) for item in shape.layouts)))
    if "subsets" in wanted:
        # Every expert's output and their products for some tokens.
        total += 8 * TOKENS_AT_ONCE * shape.num_experts * (shape.hidden_size + shape.num_experts)
    states = tokens_per_batch * shape.hidden_size * shape.weight_bytes
    total += states * (len(shape.blocks) + 1) * len(wanted & {"similarity", "interventions"})
    if "interventions" in wanted:
        total += min(LOGIT_BYTES, tokens_per_batch * shape.vocab_size * shape.weight_bytes)
    if "layers" in wanted:
        total += states
    if wanted & {"outputs", "pairs", "channels"}:
        # The pairs' outputs by expert and again by token.
        total += 2 * states * shape.top_k
    if "channels" in wanted:
        total += tokens_per_batch * shape.top_k * sizes_of(shape, "I")[0] * shape.weight_bytes
    return total
