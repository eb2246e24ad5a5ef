"""What each process of ``test_slimming_ranks.py`` runs; a module of its own, so that a fresh process can import it."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import moe_lightning as ml
from moe_lightning.method import Method
from moe_lightning.slimming.balancing import AWQ
from moe_lightning.slimming.pruners import SparseGPT, Wanda
from moe_lightning.slimming.quantizers import GPTQ
from tests.models import random_batches
from tests.reference import untouched

PARTS = {"uneven": ((0, 1, 2), (3,)), "one rank has nothing": ((0, 1, 2, 3), ())}
"""Batches of each of two ranks."""

METHODS: dict[str, Callable[[], list[Method]]] = {
    "gptq": lambda: [GPTQ(group_size=16, targets="experts+attention")],
    "awq": lambda: [AWQ(group_size=16)],
    "wanda, original": lambda: [Wanda(sparsity=0.5, propagate="original", router_weighted=True)],
    "sparsegpt, then gptq": lambda: [ml.Novices(keep=4), SparseGPT(pattern="2:4"), GPTQ(group_size=16)],
}

POLICIES: dict[str, dict[str, Any]] = {
    "warn": {},
    "fallback": {"starved": "fallback", "min_tokens": 30},
    "top_up": {"starved": "top_up", "min_tokens": 34},
}


CASES = (
    ("uneven", "gptq", "warn"),
    ("uneven", "awq", "fallback"),
    ("uneven", "wanda, original", "top_up"),
    ("one rank has nothing", "sparsegpt, then gptq", "fallback"),
    ("one rank has nothing", "wanda, original", "top_up"),
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
    except ValueError as error:
        return str(error)
    return ""


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
            outcome[f"{split}, error"] = starved_error(batches)
        torch.save(outcome, f"{folder}/slimmed.{rank}.pt")
    finally:
        dist.destroy_process_group()
