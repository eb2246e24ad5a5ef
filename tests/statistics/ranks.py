"""What each process of the distributed test runs; a module of its own, so that a fresh process can import it."""

import torch
import torch.distributed as dist

import moe_lightning as ml
from tests.models import random_batches
from tests.reference import untouched

SPLITS = {
    "uneven": ((0, 1, 2), (3,)),
    "one rank has nothing": ((0, 1, 2, 3), ()),
}
"""Batches of each of two ranks."""


def all_batches() -> list[dict[str, torch.Tensor]]:
    """Three batches of five tokens and one of one token."""
    return [*random_batches(3, 1, 5, seed=1), *random_batches(1, 1, 1, seed=2)]


def observe(rank: int, world: int, folder: str) -> None:
    """Collect statistics as one of several processes and save what this process got."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        for name, parts in SPLITS.items():
            batches = [all_batches()[number] for number in parts[rank]]
            ml.collect(untouched(), batches, progress=False).save(f"{folder}/{name}.{rank}.safetensors")
    finally:
        dist.destroy_process_group()
