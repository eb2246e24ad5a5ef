"""Changing the structure of a live model: its layers, its class and its config, all at once and with an undo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import MixtralConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

from moe_lightning.architectures import architecture_of
from moe_lightning.plan import CompressionPlan, ModelShape
from moe_lightning.surgery.layouts import change_layouts
from moe_lightning.surgery.models import (
    CompressedMixtralConfig,
    CompressedMixtralForCausalLM,
    as_config,
)
from moe_lightning.surgery.packed import Stacks
from moe_lightning.surgery.replaced import LayoutChange, ReplacedParameter


@dataclass
class Surgery:
    """What a change of structure did.

    Attributes:
        before: Shape of the model before.
        after: Shape of the model after.
        change: Replaced parameters and undo steps.
    """

    before: ModelShape
    after: ModelShape
    change: LayoutChange

    @property
    def replaced(self) -> list[ReplacedParameter]:
        """Every parameter that was sliced, filled anew or made."""
        return self.change.replaced

    @property
    def claimed(self) -> int:
        """Parameters that the two shapes say go, come or are stored in another form, by arithmetic on the edits."""
        before, after = self.before, self.after
        hidden, whole = before.hidden_size, before.intermediate_size
        total = (len(before.blocks) - len(after.blocks)) * before.block_parameters
        for old in before.layouts:
            if old.layer not in after.moe_layers:
                total += old.parameters(hidden, whole) + hidden  # with its norm
                continue
            new = after.layout(old.layer)
            widths = [whole if layout.width is None else layout.width for layout in (old, new)]
            total += 3 * hidden * (len(old.real) * widths[0] - len(new.real) * widths[1])
            total += (len(old.router) - len(new.router)) * hidden
            if old.format != new.format:
                total += 3 * hidden * len(new.real) * widths[1]  # every weight that is left, in another form
            biases = [0 if layout.width is None else len(layout.real) for layout in (old, new)]
            total += abs(biases[0] - biases[1]) * hidden
            ranks = [dict(zip(layout.novices, layout.novice_ranks, strict=True)) for layout in (old, new)]
            total += sum((1 + 2 * ranks[0][expert]) * hidden for expert in ranks[0].keys() - ranks[1].keys())
            total += sum((1 + 2 * ranks[1][expert]) * hidden for expert in ranks[1].keys() - ranks[0].keys())
        for old in after.layouts:  # what goes with its layer was counted above
            terms = before.layout(old.layer), old
            if terms[0].lora != old.lora:
                total += sum(layout.lora_parameters(hidden, whole) for layout in terms)
        changed_terms = dict(before.attention_lora), dict(after.attention_lora)
        for block in before.blocks:
            if changed_terms[0].get(block) != changed_terms[1].get(block):
                total += before.attention_lora_parameters(block)
                total += after.attention_lora_parameters(block)
        matrices = before.block_parameters - hidden
        changed = [
            number for number in after.blocks if before.attention_format(number) != after.attention_format(number)
        ]
        return total + len(changed) * matrices

    @property
    def touched(self) -> int:
        """Parameters that went, came or are stored in another form, counted in the tensors themselves."""
        return sum(item.numbers_gone_and_new for item in self.replaced) + self.change.packed_weights

    def rescale(self, parameter: nn.Parameter, factor: Tensor) -> None:
        """Multiply a parameter in place; it is put back when the surgery is undone.

        Args:
            parameter: The parameter.
            factor: What to multiply with, of a shape that fits it.
        """
        self.change.rescale(parameter, factor)

    def undo(self) -> None:
        """Put the model back as it was."""
        self.change.undo()


def plan_of(model: nn.Module) -> CompressionPlan:
    """Return the plan of a live model; empty for an uncompressed one."""
    return architecture_of(model).plan_of_config(model.config)


def config_entry(plan: CompressionPlan, shape: ModelShape) -> dict[str, object]:
    """Return what stands under ``moe_lightning`` in a compressed model's config.

    Args:
        plan: The plan.
        shape: The shape after the plan.

    Returns:
        The plan; the number of router rows of each layer that is left in transformers' ``per_layer_config`` form (it
        stands inside our key because, active, it makes every read of ``config.num_local_experts`` raise); and the
        number of layers of the original model, which the plan counts by.
    """
    per_layer: dict[str, dict[str, object]] = {}
    for place, number in enumerate(shape.blocks):
        if number in shape.moe_layers:
            per_layer[str(place)] = {"num_local_experts": len(shape.layout(number).router)}
        elif number in shape.original_moe_layers:
            per_layer[str(place)] = {"skip": ["mlp"]}
    original = {"num_hidden_layers": shape.num_layers}
    return {"plan": plan.to_dict(), "per_layer_config": per_layer, "original": original}


def _set_config(change: LayoutChange, model: nn.Module, old: object, new: object) -> None:
    for module in model.modules():
        if getattr(module, "config", None) is old:
            change.set(module, "config", new)


def check_class(model: nn.Module) -> None:
    """Make sure that surgery can change a model's class.

    Raises:
        ValueError: A child of ``MixtralForCausalLM``, or a wrapper around it.
    """
    architecture_of(model)
    if type(model) not in (MixtralForCausalLM, CompressedMixtralForCausalLM):
        raise ValueError(
            f"cannot compress a {type(model).__name__}: pass the MixtralForCausalLM itself, before "
            "torch.compile or other wrappers"
        )


def compressed_config(config: MixtralConfig, plan: CompressionPlan, shape: ModelShape) -> CompressedMixtralConfig:
    """Return the config of the compressed model that a plan leads to.

    Args:
        config: Config of the model before, plain or compressed.
        plan: The whole plan.
        shape: The shape after the plan.
    """
    new = as_config(config, CompressedMixtralConfig, config_entry(plan, shape))
    new.num_hidden_layers = len(shape.blocks)
    return new


def apply_plan(
    model: PreTrainedModel,
    plan: CompressionPlan,
    channels: Mapping[int, Tensor] | None = None,
    stacks: Stacks | None = None,
) -> Surgery:
    """Extend a live model's plan in place: slice its tensors, change its class and its config.

    Args:
        model: A Mixtral with its language head, compressed or not.
        plan: The whole plan; it must begin with the edits that the model already carries.
        channels: For layers whose experts lose channels the ones that each keeps, int64 ``[S, width]``, ascending.
        stacks: Packed matrices that are filled already, by layer and name; others come without values.

    Returns:
        What was done. New novices and biases are zeros, and merged experts are their owners: fill them.

    Raises:
        ValueError: The model carries other edits, or the plan does not fit it. Nothing is changed then.
        RuntimeError: The parameters counted differ from the parameters claimed. Nothing is changed then.
    """
    check_class(model)
    architecture = architecture_of(model)
    carried = architecture.plan_of_config(model.config)
    if not plan.starts_with(carried):
        raise ValueError(
            f"the model already carries {len(carried.edits)} edit(s) that are not the beginning of this plan "
            f"({len(plan.edits)} edit(s)): start from the model that the plan was made for"
        )
    before = architecture.shape(model)
    after = plan.check(before.uncompressed())
    change = change_layouts(model, architecture, before, after, channels, stacks, opened=True)
    surgery = Surgery(before, after, change)
    try:
        if surgery.touched != surgery.claimed:
            raise RuntimeError(f"surgery touched {surgery.touched} parameters but the plan claims {surgery.claimed}")
        if not plan:
            return surgery  # nothing is compressed: it stays what it is, and is written as what it is
        new = compressed_config(model.config, plan, after)
        _set_config(change, model, model.config, new)
        change.set(model, "__class__", CompressedMixtralForCausalLM)
        architecture.fuse_layers(model, change)
        if "_weight_conversions" in vars(model):
            # How the names of the folder that the model came from are written back: the compressed class has its own.
            change.set(model, "_weight_conversions", None)
    except BaseException:
        change.undo()
        raise
    return surgery


def rebuild(model: PreTrainedModel, plan: CompressionPlan) -> Surgery | None:
    """Give a model the structure of a plan; does nothing where it has it already.

    Args:
        model: A Mixtral with its language head.
        plan: The whole plan.

    Returns:
        What was done, or None.

    Raises:
        ValueError: The model carries edits that are not the beginning of the plan, or the plan does not fit.
    """
    if plan_of(model).edits == plan.edits:
        return None
    return apply_plan(model, plan)
