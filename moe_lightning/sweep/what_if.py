"""What a decision would do, from saved statistics alone: the error that it makes, and the size that it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lightning.criteria.naee import pair_errors
from moe_lightning.plan import (
    DropBlock,
    DropMoE,
    Edit,
    KeepChannels,
    KeepExperts,
    MergeExperts,
    ModelShape,
    NoviceExperts,
    Quantize,
    Sparsify,
)
from moe_lightning.statistics import Statistics
from moe_lightning.trimming import novice_values

NOT_IN_FILE = "not in the file"


@dataclass(frozen=True)
class LayerPrediction:
    """What an edit does to the output ``y`` of its layer, per calibration token.

    Attributes:
        layer: Original number of the layer.
        what: The edit in words.
        error: Squared error of ``y`` with each expert for itself, cross terms dropped; None where it is not known.
        joint_error: The same with the cross terms; None where the file does not hold what they need.
        output: Mean of ``|y|^2``, which makes the errors relative; None where the file does not hold it.
        note: What else to know: why there is no error, or what it leaves out.
    """

    layer: int
    what: str
    error: float | None
    joint_error: float | None = None
    output: float | None = None
    note: str = ""

    def relative(self, error: float | None) -> float | None:
        """Return an error as a share of the mean squared output, or None where one of them is not known."""
        return None if error is None or not self.output else error / self.output


def constant_errors(statistics: Statistics, layer: int, experts: Sequence[int], constants_CH: Tensor) -> Tensor:
    """Return what it costs to let constants stand for experts, each for itself.

    ``R_i(v) = (sum g^2 |E|^2 - 2 v . sum g^2 E + |v|^2 sum g^2) / T``

    Args:
        statistics: With the groups ``routing`` and ``outputs``.
        layer: Original number of the layer.
        experts: C original numbers.
        constants_CH: What stands for each, ``[C, H]``.

    Returns:
        ``[C]``, float64, not negative.

    Source: methods section 2.4; smallest for ``v = sum g^2 E / sum g^2``.
    """
    row, columns = statistics.row(layer), list(experts)
    squares_C = statistics["gate2_norm_square_sum"][row, columns]
    sums_CH = statistics["gate2_output_sum"][row, columns]
    weights_C = statistics["gate_square_sum"][row, columns]
    cost_C = squares_C - 2 * (constants_CH * sums_CH).sum(-1) + constants_CH.square().sum(-1) * weights_C
    return cost_C.clamp(min=0) / statistics["tokens"][row]


def predictions(edits: Sequence[Edit], statistics: Statistics) -> list[LayerPrediction]:
    """Predict what edits do to the outputs of their layers.

    Args:
        edits: What is proposed for the model that the statistics are of; whatever follows on an earlier edit of the
            same layer is predicted as if it were alone.
        statistics: Of the model before.
    """
    return [_prediction(edit, statistics) for edit in edits]


def _prediction(edit: Edit, statistics: Statistics) -> LayerPrediction:
    output = None
    if edit.layer in statistics.shape.moe_layers and {"routing", "outputs"} <= statistics.groups:
        row = statistics.row(edit.layer)
        output = float(statistics["layer_output_square_sum"][row] / statistics["tokens"][row])
    if isinstance(edit, DropMoE):
        note = "" if output is not None else NOT_IN_FILE
        return LayerPrediction(edit.layer, "the MoE sub-layer goes", output, output, output, note)
    if isinstance(edit, NoviceExperts):
        what = f"{_numbers(edit.experts)} become novices ({edit.novice}{_ranks(edit)})"
        if output is None:
            return LayerPrediction(edit.layer, what, None, note=NOT_IN_FILE)
        if any(edit.ranks):
            return _low_rank(edit, statistics, what, output)
        constants = novice_values(edit.novice, statistics, edit.layer, edit.experts)
        return _constants(edit.layer, edit.experts, constants, statistics, what, output, "")
    if isinstance(edit, KeepExperts):
        gone = tuple(expert for expert in statistics.shape.layout(edit.layer).real if expert not in edit.experts)
        what = f"{_numbers(gone)} go, router rows {'stay' if edit.router == 'keep' else 'too'}"
        if output is None:
            return LayerPrediction(edit.layer, what, None, note=NOT_IN_FILE)
        zeros = torch.zeros(len(gone), statistics.shape.hidden_size, dtype=torch.float64)
        note = "" if edit.router == "keep" else "approximate: their outputs as zero, without the tokens' new experts"
        return _constants(edit.layer, gone, zeros, statistics, what, output, note)
    what = edit_in_words(edit, statistics.shape)
    return LayerPrediction(edit.layer, what, None, output=output, note="error not predicted")


def edit_in_words(edit: Edit, shape: ModelShape) -> str:
    """Say what an edit does that takes no statistics to say.

    Args:
        edit: The edit.
        shape: Shape of the model before it.
    """
    if isinstance(edit, Sparsify | Quantize):
        after = edit.apply(shape)
        experts = edit.target == "experts"
        return f"{edit.target}: {after.layout(edit.layer).format if experts else after.attention_format(edit.layer)}"
    if isinstance(edit, MergeExperts):
        groups = ["+".join(map(str, group)) for group in edit.groups if len(group) > 1]
        return f"merged: {', '.join(groups) or 'none'}"
    if isinstance(edit, KeepChannels):
        layout = shape.layout(edit.layer)
        now = shape.intermediate_size if layout.width is None else layout.width
        return f"{edit.width} of {now} channels stay in each expert"
    return "the whole layer goes" if isinstance(edit, DropBlock) else edit.kind


def _numbers(experts: Sequence[int]) -> str:
    return " ".join(map(str, experts)) or "none"


def _ranks(edit: NoviceExperts) -> str:
    ranks = sorted(set(edit.ranks))
    return f", rank {' or '.join(map(str, ranks))}" if any(ranks) else ""


def _constants(
    layer: int,
    experts: tuple[int, ...],
    constants_CH: Tensor,
    statistics: Statistics,
    what: str,
    output: float,
    note: str,
) -> LayerPrediction:
    error = float(constant_errors(statistics, layer, experts, constants_CH).sum())
    row = statistics.row(layer)
    joint = None
    zero = not bool(constants_CH.any())
    if zero or "pairs" in statistics.groups:
        pairs_CC = pair_errors(statistics, row, experts, None if zero else constants_CH)
        joint = max(float(pairs_CC.sum() / statistics["tokens"][row]), 0.0)
    return LayerPrediction(layer, what, error, joint, output, note)


def _low_rank(edit: NoviceExperts, statistics: Statistics, what: str, output: float) -> LayerPrediction:
    if "low_rank" not in statistics.groups:
        return LayerPrediction(edit.layer, what, None, output=output, note=f"low-rank fit {NOT_IN_FILE}")
    curve = statistics["low_rank_error"][statistics.row(edit.layer)]
    largest = curve.shape[-1] - 1
    if max(edit.ranks) > largest:
        note = f"the file holds errors up to rank {largest} only"
        return LayerPrediction(edit.layer, what, None, output=output, note=note)
    error = sum(float(curve[expert, rank]) for expert, rank in zip(edit.experts, edit.ranks, strict=True))
    return LayerPrediction(edit.layer, what, error, None, output, "measured on held-out calibration tokens")


def flops_of(shape: ModelShape, sequence_length: int, statistics: Statistics | None = None) -> int:
    """Return the floating-point operations of one sequence, as ``moe_lightning.measure`` counts them in tensors.

    Args:
        shape: Shape of the model.
        sequence_length: S, tokens.
        statistics: How tokens were routed before; novices and absent experts then save what they got. None counts
            real experts for every pick.
    """
    hidden, tokens = shape.hidden_size, sequence_length
    blocks = len(shape.blocks)
    products = blocks * (shape.block_parameters - hidden) + shape.vocab_size * hidden
    products += sum(shape.attention_lora_parameters(block) for block in shape.blocks)
    experts = 0
    for layout in shape.layouts:
        vectors = len(layout.router) + len(layout.novices) + 2 * layout.stored_rank
        products += vectors * hidden
        sizes = shape.expert_sizes(layout).values()
        one = sum(outputs * inputs for outputs, inputs in sizes)
        one += 0 if layout.lora is None else layout.lora.parameters(1, sizes)
        reachable = sum(place >= 0 for place in layout.slot_map)
        picks = float(min(shape.top_k, reachable))
        if statistics is not None:
            count_E = statistics["count"][statistics.row(layout.layer), list(layout.router)]
            places = torch.tensor(layout.slot_map)
            share = float(count_E[places >= 0].sum() / count_E.sum()) if float(count_E.sum()) else 1.0
            picks = min(picks, min(shape.top_k, len(layout.router)) * share)
        experts += round(tokens * picks * one)
    scores = 4 * tokens * tokens * shape.num_attention_heads * shape.head_dim * blocks
    return 2 * (tokens * products + experts) + scores
