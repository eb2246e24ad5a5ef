"""What each process of ``test_ranks.py`` runs; a module of its own, so that a fresh process can import it."""

from typing import Any

import torch
import torch.distributed as dist

import moe_lightning as ml
from tests.method_settings import SETTINGS
from tests.models import random_batches
from tests.reference import untouched

SPLITS = {
    "uneven": ((0, 1, 2), (3,)),
    "one rank has nothing": ((0, 1, 2, 3), ()),
}
"""Batches of each of two ranks."""

MEASURED = ("routing", "outputs", "pairs", "channels", "layers", "blocks", "similarity", "interventions")


def all_batches() -> list[dict[str, torch.Tensor]]:
    """Three batches of five tokens and one of one token."""
    return [*random_batches(3, 1, 5, seed=1), *random_batches(1, 1, 1, seed=2)]


def compressed(name: str, batches: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Return the plan and the weights of a compressed model."""
    model = untouched()
    result = ml.compress(model, batches, SETTINGS[name].make(), progress=False)
    return {"plan": result.plan.to_json(), "state": model.state_dict()}


def run_rank(rank: int, world: int, folder: str) -> None:
    """Collect and compress as one of several processes and save what this process got."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        for name, parts in SPLITS.items():
            batches = [all_batches()[number] for number in parts[rank]]
            ml.collect(untouched(), batches, MEASURED, progress=False).save(f"{folder}/{name}.{rank}.safetensors")
        batches = [all_batches()[number] for number in SPLITS["uneven"][rank]]
        outcome = {name: compressed(name, batches) for name in SETTINGS}
        torch.save(outcome, f"{folder}/compressed.{rank}.pt")
    finally:
        dist.destroy_process_group()
