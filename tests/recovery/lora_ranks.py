"""What each process of ``test_lora_methods.py`` runs; a module of its own, so that a fresh process can import it."""

from __future__ import annotations

import torch
import torch.distributed as dist

import moe_lightning as ml
from moe_lightning.experts.lora import lora_stacks
from tests.lora import BASES
from tests.models import tiny_mixtral
from tests.packed import apply_filled

RANKED = ("dense", "int4", "unstructured")


def adapt(base: str, rank: int) -> dict[str, torch.Tensor]:
    """Put terms beside a model, let this process's terms drift, merge, and return all that there is."""
    model = tiny_mixtral()
    apply_filled(model, BASES[base])
    ml.compress(model, None, ml.LoRA(rank=2, seed=rank), progress=False)
    begun = {f"begun {name}": tensor.detach().clone() for name, tensor in model.named_parameters() if "lora" in name}
    with torch.no_grad():
        for stack in lora_stacks(model).values():
            stack.lora_B.fill_(0.1 + rank)  # what no run does: ranks that differ
    ml.compress(model, None, ml.MergeLoRA(), progress=False)
    return begun | dict(model.state_dict())


def run_rank(rank: int, world: int, folder: str) -> None:
    """Adapt as one of several processes and save what this process got."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save({base: adapt(base, rank) for base in RANKED}, f"{folder}/adapted.{rank}.pt")
    finally:
        dist.destroy_process_group()
