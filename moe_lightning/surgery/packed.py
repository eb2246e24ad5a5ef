"""Putting packed matrices in the place of others.

Legend: S real experts (slots), O outputs, X inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_lightning.architectures import Architecture
from moe_lightning.experts import LoraLinear, Masked, PackedLinear, WeightStack
from moe_lightning.plan import ExpertLayout, ModelShape, WeightFormat
from moe_lightning.surgery.replaced import LayoutChange, ReplacedParameter

Stacks = Mapping[tuple[int, str], WeightStack]
"""Packed weights by the original number of the layer and the name of the matrix (``gate_up_proj``, ``q_proj``, ...)."""


def open_stacks(model: nn.Module) -> None:
    """Let every masked matrix of a model hold all its weights, as it works; before there is an optimizer."""
    for module in model.modules():
        if isinstance(module, Masked):
            module.open()


def check_stacks(before: ModelShape, after: ModelShape, given: Stacks) -> None:
    """Make sure that every stack given has a place.

    Args:
        before: Shape of the model before.
        after: Shape after.
        given: Stacks that are filled already.

    Raises:
        ValueError: A stack of matrices whose format does not change.
    """
    places = {
        (layout.layer, name)
        for layout in after.layouts
        if layout.format != before.layout(layout.layer).format
        for name in after.expert_sizes(layout)
    }
    changed = [block for block in after.blocks if before.attention_format(block) != after.attention_format(block)]
    places |= {(block, name) for block in changed for name in after.attention_sizes}
    strangers = sorted(given.keys() - places)
    if strangers:
        raise ValueError(f"the plan has no place for the packed matrices {strangers}: it changes {sorted(places)}")


def expert_stacks(
    shape: ModelShape, before: ExpertLayout, after: ExpertLayout, given: Stacks, like: Tensor, opened: bool
) -> dict[str, WeightStack | None]:
    """Return what comes into the place of a layer's experts, by the name of the matrix.

    Args:
        shape: Shape of the model.
        before: Layout before.
        after: Layout after.
        given: Stacks that are filled already.
        like: A tensor of the model's type and on its device.
        opened: Whether masked matrices are to be open.

    Returns:
        A stack; None where the stack that is there is only sliced.
    """
    if after.format is None:
        return {}
    sizes = shape.expert_sizes(after)
    if before.format == after.format:
        return dict.fromkeys(sizes)
    slots = len(after.real)
    return {
        name: _given_or_empty(given.get((after.layer, name)), after.format, (slots, *size), like, opened)
        for name, size in sizes.items()
    }


def _given_or_empty(
    given: WeightStack | None, format: WeightFormat, size: tuple[int, int, int], like: Tensor, opened: bool
) -> WeightStack:
    if given is not None:
        if given.format != format or (given.slots, given.outputs, given.inputs) != size:
            raise ValueError(f"a stack of {given.extra_repr()} does not fit the plan, which has {format} {size}")
        return given
    with torch.inference_mode(False):
        stack = WeightStack.empty(format, *size, dtype=like.dtype, device=like.device)
    if opened and isinstance(stack, Masked):
        stack.open()
    return stack


def replace_weights(
    change: LayoutChange,
    name: str,
    old: nn.Parameter | WeightStack,
    slots: Sequence[int],
    new: WeightStack | None,
    new_name: str | None = None,
) -> WeightStack:
    """Note that a stack of matrices takes the place of others, and how an optimizer's state follows.

    Args:
        change: Gets the notes.
        name: Name of the matrices in the model.
        old: What was there: stacks, or a single matrix.
        slots: Slots of ``old`` that are left.
        new: What comes; None picks the slots of ``old``, which is packed already.
        new_name: Name of what comes, where it is another one.

    Returns:
        What comes.
    """
    rows = torch.tensor(list(slots), dtype=torch.int64, device="cpu")
    if new is None:
        assert isinstance(old, WeightStack)
        with torch.inference_mode(False):
            stack = old.select(slots)
        change.packed_weights += old.num_weights - stack.num_weights
        for (inner, before), after in zip(old.named_parameters(), stack.parameters(), strict=True):
            change.replaced.append(ReplacedParameter(f"{name}.{inner}", before, after, rows, counts=False))
        return stack
    went = old.num_weights if isinstance(old, WeightStack) else old.numel()
    # Every weight that is left is stored in another form.
    change.packed_weights += went - len(slots) * new.outputs * new.inputs + new.num_weights
    parameter = old if isinstance(old, nn.Parameter) else next(old.parameters(), None)
    trained = next(iter(new.named_parameters()), None)
    if trained is None:
        if parameter is not None:
            change.replaced.append(ReplacedParameter(name, parameter, None, None, counts=False))
        return new
    inner, after = trained
    if parameter is not None:
        after.requires_grad_(parameter.requires_grad)
    # Values that were packed already have no state that could be spread out again.
    plain = parameter is not None and parameter.shape[-2:] == (new.outputs, new.inputs)
    item = ReplacedParameter(
        f"{new_name or name}.{inner}",
        parameter,
        after,
        rows if plain else None,
        stack=new if plain else None,
        counts=False,
    )
    change.replaced.append(item)
    return new


def in_floating_point(stack: WeightStack) -> Tensor:
    """Return packed matrices as ``[S, O, X]``, one after another: what spelling out works with is of one of them."""
    size = (stack.slots, stack.outputs, stack.inputs)
    result_SOX = torch.empty(size, dtype=stack.dtype, device=stack.device)
    for slot, dense_OX in enumerate(result_SOX):
        dense_OX.copy_(stack.slot(slot).dense()[0])
    return result_SOX


def spelled_out(change: LayoutChange, name: str, old: WeightStack, new: nn.Parameter) -> None:
    """Note that weights in floating point take the place of packed ones."""
    for inner, parameter in old.named_parameters():
        change.replaced.append(ReplacedParameter(f"{name}.{inner}", parameter, None, None, counts=False))
    change.packed_weights += old.num_weights
    change.replaced.append(ReplacedParameter(name, None, new, None, counts=False))


def change_attention(
    change: LayoutChange,
    architecture: Architecture,
    decoder_layer: Any,
    prefix: str,
    shape: ModelShape,
    block: int,
    given: Stacks,
    opened: bool,
) -> None:
    """Put packed matrices in the place of the attention's.

    Args:
        change: Gets what is done.
        architecture: The model's.
        decoder_layer: The layer.
        prefix: Its name in the model.
        shape: Shape after.
        block: Original number of the layer.
        given: Stacks that are filled already.
        opened: Whether masked matrices are to be open.

    Raises:
        ValueError: An attention with biases.
    """
    format = shape.attention_format(block)
    attention = architecture.attention_of(decoder_layer)
    for name, linear in architecture.attention_linears(decoder_layer).items():
        packed = isinstance(linear, PackedLinear)
        if getattr(linear, "bias", None) is not None:
            raise ValueError(f"layer {block}: {name} has a bias, which packed matrices do not: target the experts only")
        old = linear.stack if packed else linear.weight
        path = f"{prefix}.{architecture.attention_name}.{name}"
        if format is None:
            change.set(attention, name, _plain_linear(change, path, linear))
            continue
        reference = next(iter(decoder_layer.parameters()))
        size = (1, *shape.attention_sizes[name])
        new = _given_or_empty(given.get((block, name)), format, size, reference, opened)
        replace_weights(change, f"{path}.{'stack' if packed else 'weight'}", old, [0], new, f"{path}.stack")
        module = PackedLinear(new)
        module.lora = getattr(linear, "lora", None)
        module.train(linear.training)
        change.set(attention, name, module)


def _plain_linear(change: LayoutChange, path: str, packed: PackedLinear) -> nn.Module:
    """Spell out a packed matrix of attention; a low-rank term moves along."""
    module = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
    with torch.inference_mode(False), torch.no_grad():
        module.weight = nn.Parameter(packed.stack.dense()[0])
    spelled_out(change, f"{path}.stack", packed.stack, module.weight)
    change.replaced[-1] = dataclasses.replace(change.replaced[-1], name=f"{path}.weight")
    if packed.lora is not None:
        return LoraLinear(module.weight, packed.lora).train(packed.training)
    return module.train(packed.training)
