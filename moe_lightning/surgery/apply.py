"""Changing the structure of a live model: its layers, its class and its config, all at once and with an undo."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

from moe_lightning.architectures import architecture_of
from moe_lightning.plan import CompressionPlan, ModelShape
from moe_lightning.surgery.layouts import LayoutChange, ReplacedParameter, change_layouts
from moe_lightning.surgery.models import (
    CompressedMixtralConfig,
    CompressedMixtralForCausalLM,
    as_config,
)


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
        """Parameters that the two shapes say go or come, by arithmetic: experts and router rows out, novices in."""
        before, after = self.before, self.after
        total = 0
        for old, new in zip(before.layouts, after.layouts, strict=True):
            total += (len(old.real) - len(new.real)) * before.expert_parameters
            total += (len(old.router) - len(new.router)) * before.hidden_size
            went = len(set(old.novices) - set(new.novices))
            came = len(set(new.novices) - set(old.novices))
            total += (went + came) * before.hidden_size
        return total

    @property
    def touched(self) -> int:
        """Parameters that went or came, counted in the tensors themselves."""
        total = 0
        for item in self.replaced:
            kept = 0 if item.rows is None else int((item.rows >= 0).sum())
            for parameter in (item.old, item.new):
                if parameter is not None and len(parameter):
                    total += (len(parameter) - kept) * parameter[0].numel()
        return total

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
        The plan, and the number of router rows of each layer in transformers' ``per_layer_config`` form. It stands
        inside our key because, active, it makes every read of ``config.num_local_experts`` raise.
    """
    per_layer = {str(layout.layer): {"num_local_experts": len(layout.router)} for layout in shape.layouts}
    return {"plan": plan.to_dict(), "per_layer_config": per_layer}


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


def apply_plan(model: PreTrainedModel, plan: CompressionPlan) -> Surgery:
    """Extend a live model's plan in place: slice its tensors, change its class and its config.

    Args:
        model: A Mixtral with its language head, compressed or not.
        plan: The whole plan; it must begin with the edits that the model already carries.

    Returns:
        What was done. New novices are zeros; fill them.

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
    change = change_layouts(model, architecture, before, after)
    surgery = Surgery(before, after, change)
    try:
        if surgery.touched != surgery.claimed:
            raise RuntimeError(f"surgery touched {surgery.touched} parameters but the plan claims {surgery.claimed}")
        if not plan:
            return surgery  # nothing is compressed: it stays what it is, and is written as what it is
        new = as_config(model.config, CompressedMixtralConfig, config_entry(plan, after))
        _set_config(change, model, model.config, new)
        change.set(model, "__class__", CompressedMixtralForCausalLM)
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
