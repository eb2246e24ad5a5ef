"""Merging experts: who joins whom, which channel corresponds to which, and the weights of the merged expert.

Legend: S real experts, E experts of the original model, H hidden, I intermediate (channels of an expert).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.cluster.hierarchy import linkage
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Groups = tuple[tuple[int, ...], ...]


class ExpertWeights(NamedTuple):
    """Weights of one expert.

    Attributes:
        gate_up: Gate rows, then up rows, ``[2I, H]``.
        down: ``[H, I]``.
        bias: What channels that are gone leave behind, ``[H]``, or None.
    """

    gate_up: Tensor
    down: Tensor
    bias: Tensor | None = None


def sorted_groups(groups: Sequence[Sequence[int]]) -> Groups:
    """Order the members of every group, and the groups by their first member.

    >>> sorted_groups([[5, 2], [0], [4, 1]])
    ((0,), (1, 4), (2, 5))
    """
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def join_cores(logit_gram_EE: Tensor, experts: Sequence[int], cores: Sequence[int]) -> Groups:
    """Let every expert join the core expert whose router logits are most like its own.

    Args:
        logit_gram_EE: ``sum over tokens of l_i l_j`` with the router logits ``l``, ``[E, E]``.
        experts: Experts to group.
        cores: Those of them that lead a group; at least one.

    Returns:
        One group for each core. Of cores that are equally alike the first gets the expert. Logits that are zero
        everywhere are like nobody's: cosine 0.

    Source: 2310.01334 (MC-SMoE), section 3.2.
    """
    norm_E = logit_gram_EE.diagonal().clamp(min=0).sqrt()
    scale_EE = norm_E[:, None] * norm_E[None, :]
    cosine = torch.where(scale_EE > 0, logit_gram_EE / scale_EE, 0.0).tolist()
    groups: dict[int, list[int]] = {core: [core] for core in sorted(cores)}
    for expert in experts:
        if expert not in groups:
            nearest = max(sorted(cores), key=lambda core: cosine[expert][core])
            groups[nearest].append(expert)
    return sorted_groups(list(groups.values()))


def cluster(points_SH: Tensor, number: int) -> list[list[int]]:
    """Join the two nearest clusters until a number of them is left (average linkage, Euclidean).

    Args:
        points_SH: One point for each expert, ``[S, H]``.
        number: Clusters to leave, in [1, S].

    Returns:
        Positions of each cluster's members: exactly ``number`` clusters, ties or not.

    Source: 2410.08589 (HC-SMoE), section 3.2.
    """
    count = points_SH.shape[0]
    clusters: dict[int, list[int]] = {place: [place] for place in range(count)}
    if number < count:
        # Cut by the number of joins: a cut by distance would leave fewer clusters where distances are equal.
        joins = linkage(points_SH.double().cpu().numpy(), method="average", metric="euclidean")
        for step in range(count - number):
            first, second = int(joins[step, 0]), int(joins[step, 1])
            clusters[count + step] = clusters.pop(first) + clusters.pop(second)
    return list(clusters.values())


def aligned(expert: ExpertWeights, core: ExpertWeights) -> ExpertWeights:
    """Reorder an expert's channels so that each stands where the core's most similar channel stands.

    The order changes nothing of what the expert computes. Channels are matched one to one with the largest sum of inner
    products of ``[gate row, up row, down column]``: the permutation with the least squared distance to the core.

    Args:
        expert: The expert.
        core: The expert it is aligned to, of the same sizes.

    Returns:
        The expert with its channels in the core's order.

    Cost: ``3 H I^2`` multiply-adds, a table ``[I, I]`` in float64, and Hungarian matching, up to ``I^3`` steps.

    Source: 2310.01334 (MC-SMoE), section 3.1; the matching of weights is that of 2209.04836 (Git Re-Basin).
    """
    similarity_II = _channels(core) @ _channels(expert).T
    _, order = linear_sum_assignment(similarity_II.double().cpu().numpy(), maximize=True)
    place_I = torch.as_tensor(order, dtype=torch.int64, device=expert.down.device)
    rows = torch.cat([place_I, place_I + expert.down.shape[1]])
    return ExpertWeights(expert.gate_up[rows], expert.down[:, place_I], expert.bias)


def _channels(expert: ExpertWeights) -> Tensor:
    """Return gate row, up row and down column of every channel, ``[I, 3H]``, in fp32 or wider."""
    gate_IH, up_IH = expert.gate_up.chunk(2)
    rows = torch.cat([gate_IH, up_IH, expert.down.T], dim=1)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def merged(experts: Sequence[ExpertWeights], usage: Sequence[float], align: bool) -> ExpertWeights:
    """Merge experts into one: the mean of their weights, each weighted by how often it is used.

    Args:
        experts: At least one.
        usage: Tokens that picked each. Where nobody picked any of them the mean is a plain one.
        align: Bring every expert's channels into the order of the one that is used most (of equal ones the last)
            before the mean.

    Returns:
        The merged weights, summed in fp32 or wider, in the types of the experts.

    Source: 2310.01334 (MC-SMoE), eq. 3.
    """
    if len(experts) == 1:
        return experts[0]
    total = float(sum(usage))
    shares = [amount / total for amount in usage] if total else [1 / len(experts)] * len(experts)
    if align:
        # The same one that the grouping made the core: it sorts by (usage, number), the largest last.
        core = max(range(len(experts)), key=lambda place: (usage[place], place))
        experts = [expert if place == core else aligned(expert, experts[core]) for place, expert in enumerate(experts)]
    gate_up = _weighted([expert.gate_up for expert in experts], shares)
    down = _weighted([expert.down for expert in experts], shares)
    biases = [expert.bias for expert in experts if expert.bias is not None]
    return ExpertWeights(gate_up, down, _weighted(biases, shares) if biases else None)


def _weighted(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    total = torch.zeros_like(tensors[0], dtype=wide)
    for tensor, share in zip(tensors, shares, strict=True):
        total += share * tensor.to(wide)
    return total.to(tensors[0].dtype)
