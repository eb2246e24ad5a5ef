"""Parameter groups, and an optimizer that lives through a change of structure.

Groups are always in ``named_parameters()`` order, whatever ``requires_grad`` says: an optimizer's state is saved by
position, and a state loaded into another order is wrong without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_lightning.surgery.layouts import ReplacedParameter

GROUP_NAMES = ("decay", "no_decay", "novices")


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if name.endswith(".novices"):
        return "novices"
    return "decay" if parameter.ndim >= 2 else "no_decay"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Sort a model's parameters into three groups for an optimizer.

    Args:
        model: The model.
        weight_decay: Decay of the matrices.

    Returns:
        Always three groups, some perhaps empty: ``decay`` (matrices), ``no_decay`` (vectors) and ``novices`` (no
        decay, a learning rate of their own where wished). Always the same number, so that schedulers survive a change
        of structure.
    """
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUP_NAMES}
    for name, parameter in model.named_parameters():
        groups[_group_of(name, parameter)].append(parameter)
    return [
        {"name": name, "params": groups[name], "weight_decay": weight_decay if name == "decay" else 0.0}
        for name in GROUP_NAMES
    ]


def _carried_state(state: dict[str, Any], item: ReplacedParameter) -> dict[str, Any]:
    assert item.old is not None and item.rows is not None
    carried = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == item.old.shape and value.ndim > 0:
            rows = item.rows.to(value.device)
            carried[key] = value.index_select(0, rows.clamp(min=0))
            carried[key][rows < 0] = 0  # novices that are new among old ones have no moments yet
        else:
            carried[key] = value
    return carried


@torch.no_grad()
def carry_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, replaced: Sequence[ReplacedParameter]) -> None:
    """Edit an existing optimizer in place after a change of structure.

    Schedulers and the trainer hold the optimizer, so it stays the same object. Surviving parameters keep their state:
    fused experts and router rows are sliced, and so are their moments.

    Args:
        optimizer: The optimizer of the model before the change.
        model: The model after the change.
        replaced: What surgery replaced; of several surgeries all of it, in their order. (After the first of two
            surgeries alone, the optimizer would hold parameters that the second took out of the model.)

    Parameters of the optimizer that are none of the model's (a module may train more than its model) stay where they
    are, behind those of the model.
    """
    successor = {id(item.old): item for item in replaced if item.old is not None}
    positions = {id(parameter): place for place, parameter in enumerate(model.parameters())}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held: set[int] = set()
    homes: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        members = []
        for parameter in group["params"]:
            last: nn.Parameter | None = parameter
            while last is not None and (item := successor.get(id(last))) is not None:
                state = optimizer.state.pop(last, None)
                if state and item.new is not None:
                    optimizer.state[item.new] = _carried_state(state, item)
                last = item.new
            if last is not None:
                members.append(last)
        group["params"][:] = members
        held.update(id(parameter) for parameter in members)
        for parameter in members:
            homes.setdefault(names.get(id(parameter), ""), group)
    named_groups = {group["name"]: group for group in optimizer.param_groups if "name" in group}
    for item in replaced:
        if item.new is None or id(item.new) in held or id(item.new) in successor:
            continue
        # Novices have no predecessor: the group made for them, or else the one that trains their layer's experts.
        home = named_groups.get("novices") or homes.get(item.name.removesuffix("novices") + "storage.down_proj")
        if home is not None:
            home["params"].append(item.new)
            held.add(id(item.new))
    for group in optimizer.param_groups:
        group["params"].sort(key=lambda parameter: positions.get(id(parameter), len(positions)))
