"""Parameter groups, and an optimizer that lives through a change of structure.

Groups are always in ``named_parameters()`` order, whatever ``requires_grad`` says: an optimizer's state is saved by
position, and a state loaded into another order is wrong without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_lightning.experts import is_lora
from moe_lightning.surgery.replaced import ReplacedParameter

GROUP_NAMES = ("decay", "no_decay", "novices", "adapters")
NOVICE_PARAMETERS = ("novices", "novice_in", "novice_out")
"""Last part of the names of the parameters that make up novices."""


def is_novice(name: str) -> bool:
    """Say whether a parameter of this name belongs to a novice."""
    return name.rpartition(".")[2] in NOVICE_PARAMETERS


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if is_novice(name):
        return "novices"
    if is_lora(name):
        return "adapters"
    # Biases of experts are stacked, and vectors all the same.
    return "decay" if parameter.ndim >= 2 and not name.endswith(".bias") else "no_decay"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Sort a model's parameters into groups for an optimizer.

    Args:
        model: The model.
        weight_decay: Decay of the matrices.

    Returns:
        Always four groups, some perhaps empty: ``decay`` (matrices), ``no_decay`` (vectors), ``novices`` and
        ``adapters`` (the low-rank terms beside matrices; both without decay, with a learning rate of their own where
        wished). Always the same number, so that schedulers survive a change of structure.
    """
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUP_NAMES}
    for name, parameter in model.named_parameters():
        groups[_group_of(name, parameter)].append(parameter)
    return [
        {"name": name, "params": groups[name], "weight_decay": weight_decay if name == "decay" else 0.0}
        for name in GROUP_NAMES
    ]


def add_missing_groups(state: dict[str, Any]) -> None:
    """Add to an optimizer's saved state the empty groups that an earlier release did not have yet.

    Args:
        state: ``state_dict`` of an optimizer over :func:`parameter_groups`; another one is left alone.
    """
    groups = state.get("param_groups", [])
    names = [group.get("name") for group in groups]
    if not groups or names == list(GROUP_NAMES) or names != list(GROUP_NAMES[: len(names)]):
        return
    groups += [{**groups[-1], "name": name, "params": [], "weight_decay": 0.0} for name in GROUP_NAMES[len(names) :]]


def _carried_state(state: dict[str, Any], item: ReplacedParameter) -> dict[str, Any]:
    """Slice everything in a parameter's state that has a row for each of the parameter's rows."""
    assert item.old is not None and item.rows is not None
    carried = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            carried[key] = value
        elif value.ndim == item.old.ndim and len(value) == 1 < len(item.old) and item.stack is None:
            carried[key] = value  # a factor that all rows share
        elif value.ndim == item.old.ndim and (len(value) == len(item.old) or (value.ndim == 2 and item.stack)):
            # Novices that are new among old ones have no moments yet: zeros.
            carried[key] = _carried_values(item, value)
        else:
            raise RuntimeError(
                f"the optimizer's state {key!r} of {item.name} has the shape {tuple(value.shape)}, which cannot "
                f"be sliced like the parameter's {tuple(item.old.shape)}: compress with an optimizer such as AdamW"
            )
    return carried


def _carried_values(item: ReplacedParameter, value: Tensor) -> Tensor:
    assert item.old is not None and item.rows is not None
    if item.axis is not None and value.shape[item.axis] != item.old.shape[item.axis]:
        # Factored moments: the rows are there, but no entry for each channel.
        return ReplacedParameter(item.name, item.old, item.new, item.rows).carried(value)
    return item.carried(value)


def carry_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, replaced: Sequence[ReplacedParameter]) -> None:
    """Edit an existing optimizer in place after a change of structure, wholly or not at all.

    Args and Raises are those of :func:`planned_carry`.
    """
    planned_carry(optimizer, model, replaced)()


@torch.no_grad()
def planned_carry(
    optimizer: torch.optim.Optimizer, model: nn.Module, replaced: Sequence[ReplacedParameter]
) -> Callable[[], None]:
    """Prepare to edit an existing optimizer after a change of structure; nothing is changed yet.

    Schedulers and the trainer hold the optimizer, so it stays the same object. Surviving parameters keep their state:
    fused experts and router rows are sliced, and so are their moments.

    Parameters of the optimizer that are none of the model's (a module may train more than its model) stay where they
    are, behind those of the model.

    Args:
        optimizer: The optimizer of the model before the change.
        model: The model after the change.
        replaced: What surgery replaced; of several surgeries all of it, in their order. (After the first of two
            surgeries alone, the optimizer would hold parameters that the second took out of the model.)

    Returns:
        What does it, and cannot fail.

    Raises:
        RuntimeError: The optimizer keeps state that cannot be sliced.
    """
    successor = {id(item.old): item for item in replaced if item.old is not None}
    positions = {id(parameter): place for place, parameter in enumerate(model.parameters())}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[list[nn.Parameter]] = []
    states: dict[Tensor, dict[str, Any]] = {}
    gone: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        members = []
        for parameter in group["params"]:
            last: nn.Parameter | None = parameter
            state = optimizer.state.get(parameter)
            while last is not None and (item := successor.get(id(last))) is not None:
                gone.append(last)
                follows = item.new is not None and item.rows is not None
                state = _carried_state(state, item) if state and follows else None
                last = item.new
            if last is not None:
                members.append(last)
                if last is not parameter and state:
                    states[last] = state
        groups.append(members)
    _add_new_ones(optimizer, groups, replaced, names)

    def commit() -> None:
        for group, members in zip(optimizer.param_groups, groups, strict=True):
            group["params"][:] = sorted(members, key=lambda parameter: positions.get(id(parameter), len(positions)))
        for parameter in gone:
            optimizer.state.pop(parameter, None)
        optimizer.state.update(states)

    return commit


def _add_new_ones(
    optimizer: torch.optim.Optimizer,
    groups: list[list[nn.Parameter]],
    replaced: Sequence[ReplacedParameter],
    names: dict[int, str],
) -> None:
    """Give novices, low-rank terms and biases without a predecessor a group: theirs, their layer's experts', the last.

    Weights that were integers before join the matrices, where the optimizer has a group of that name.
    """
    held = {id(parameter) for members in groups for parameter in members}
    home_of = {names[id(parameter)]: members for members in groups for parameter in members if id(parameter) in names}
    named = list(zip((group.get("name") for group in optimizer.param_groups), groups, strict=True))
    own = {name: members for name, members in named if name is not None}
    for item in replaced:
        if item.new is None or id(item.new) in held or id(item.new) not in names:
            continue
        wanted = _group_of(item.name, item.new)
        if wanted == "decay" and (item.old is not None or wanted not in own):
            continue
        # Its name now: a later surgery may have numbered the layers anew.
        prefix = names[id(item.new)].partition(".experts.")[0] + ".experts.storage.down_proj"
        # A packed matrix has its parameter one level further down.
        experts = home_of.get(prefix, home_of.get(f"{prefix}.values", home_of.get(f"{prefix}.weight")))
        home = own.get(wanted, experts if experts is not None else groups[-1])
        home.append(item.new)
        held.add(id(item.new))
