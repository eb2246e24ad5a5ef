"""What each process of ``test_slimming_ranks.py`` runs; a module of its own, so that a fresh process can import it."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import moe_lightning as ml
from moe_lightning.method import Method
from moe_lightning.slimming.balancing import AWQ
from moe_lightning.slimming.policy import TooFewTokens
from moe_lightning.slimming.pruners import SparseGPT, Wanda
from moe_lightning.slimming.pruning import Pruned
from moe_lightning.slimming.quantizers import GPTQ
from moe_lightning.slimming.rounding import Quantized
from moe_lightning.slimming.view import LayerView, SlimmedLayer
from tests.models import random_batches
from tests.reference import untouched

PARTS = {"uneven": ((0, 1, 2), (3,)), "one rank has nothing": ((0, 1, 2, 3), ())}
"""Batches of each of two ranks."""

METHODS: dict[str, Callable[[], list[Method]]] = {
    "wanda, original": lambda: [Wanda(sparsity=0.5, propagate="original", router_weighted=True)],
    "sparsegpt, then gptq": lambda: [
        ml.Novices(keep=4),
        SparseGPT(pattern="2:4"),
        GPTQ(group_size=16, targets="experts+attention"),
    ],
}

POLICIES: dict[str, dict[str, Any]] = {
    "fallback": {"starved": "fallback", "min_tokens": 30},
    "top_up": {"starved": "top_up", "min_tokens": 34},
}


CASES = (
    ("uneven", "wanda, original", "top_up"),
    ("one rank has nothing", "sparsegpt, then gptq", "fallback"),
)


def all_batches() -> list[dict[str, torch.Tensor]]:
    """Three batches of two sequences and one of one token."""
    return [*random_batches(3, 2, 12, seed=1), *random_batches(1, 1, 1, seed=2)]


def further() -> list[dict[str, torch.Tensor]]:
    """Batches to draw from."""
    return random_batches(40, 1, 6, seed=9)


def slimmed(name: str, policy: str, batches: Any, more: Any) -> dict[str, Any]:
    """Return what a compression makes, and what it says."""
    model = untouched()
    options = dict(POLICIES[policy])
    if policy == "top_up":
        options["top_up"] = more
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = ml.compress(model, batches, METHODS[name](), progress=False, max_fallback=1.0, **options)
    return {
        "state": model.state_dict(),
        "matrices": {key: module.matrices for key, module in result.modules.items()},
        "tokens": {key: module.tokens for key, module in result.modules.items()},
        "errors": {key: module.errors for key, module in result.modules.items()},
    }


def starved_error(batches: Any) -> str:
    """Return the message of a compression that fails before it begins."""
    try:
        ml.compress(untouched(), batches, GPTQ(group_size=16), progress=False, starved="error", min_tokens=30)
    except TooFewTokens as error:
        return str(error)
    return ""


def second() -> bool:
    """Say whether this is the second of two processes."""
    return dist.get_rank() == 1


class DriftingWanda(Wanda):
    """Breaks ties the other way on the second process."""

    def slim(self, edit: Any, view: LayerView) -> SlimmedLayer:
        """Keep the neighbour of one weight in its place."""
        done = super().slim(edit, view)
        for name, matrix in done.matrices.items() if second() else ():
            assert isinstance(matrix, Pruned)
            keep, weight = matrix.keep.clone(), matrix.weight.clone()
            row = keep[0, 0, :4] if self.pattern else keep[0, 0]
            place, other = int(row.nonzero()[0]), int((~row).nonzero()[0])
            keep[0, 0, place], keep[0, 0, other] = False, True
            weight[0, 0] = view.weight(name)[0, 0]
            done.matrices[name] = matrix._replace(keep=keep, weight=weight)
        return done


class DriftingAWQ(AWQ):
    """Rounds a code, a scale and the factors for the norm the other way on the second process."""

    def slim(self, edit: Any, view: LayerView) -> SlimmedLayer:
        """Change one number of each."""
        done = super().slim(edit, view)
        for matrix in done.matrices.values() if second() else ():
            assert isinstance(matrix, Quantized)
            # Of one that was not pruned: the zero point stays where it is.
            place = int((matrix.codes[0, 0, :16] != matrix.zero[0, 0, 0]).nonzero()[0])
            matrix.codes[0, 0, place] ^= 1
            matrix.scale[1, 0, 0] *= 1.5
        if second():
            done.rescale = [(what, factor * 1.0001) for what, factor in done.rescale]
        return done


DRIFTING: dict[str, Callable[[], list[Method]]] = {
    "2:4": lambda: [DriftingWanda(pattern="2:4")],
    "masked, then int4": lambda: [DriftingWanda(sparsity=0.5), DriftingAWQ(group_size=16)],
    "masked": lambda: [DriftingWanda(sparsity=0.5)],
}


def drifted(name: str) -> dict[str, Any]:
    """Return the weights and an optimizer's moments after methods that differ between the processes."""
    model, batches = untouched().train(), all_batches()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ml.compress(model, batches, DRIFTING[name](), progress=False, max_fallback=1.0, optimizers=[optimizer])
    moments = {
        f"{key}: {moment}": value
        for key, parameter in model.named_parameters()
        for moment, value in optimizer.state[parameter].items()
    }
    return {**model.state_dict(), **moments}


def run_rank(rank: int, world: int, folder: str) -> None:
    """Compress as one of several processes and save what this process got."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        outcome: dict[str, Any] = {}
        # Each process draws from data of its own.
        more = further()[rank::world]
        for split, name, policy in CASES:
            batches = [all_batches()[number] for number in PARTS[split][rank]]
            outcome[f"{split}, {name}, {policy}"] = slimmed(name, policy, batches, more)
        outcome["error"] = starved_error(batches)
        torch.save({name: drifted(name) for name in DRIFTING}, f"{folder}/drifted.{rank}.pt")
        torch.save(outcome, f"{folder}/slimmed.{rank}.pt")
    finally:
        dist.destroy_process_group()
