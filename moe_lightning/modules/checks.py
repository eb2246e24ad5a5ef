"""What can be wrong with a model's description, found before anything is built or read."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from transformers import MixtralConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_lightning.checkpoints import check_checkpoint

MODEL_FIELDS = (
    frozenset(MixtralConfig.__annotations__)
    - {"model_type", "attribute_map"}
    - {name for name in MixtralConfig.__annotations__ if name.startswith(("base_model_", "keys_to_", "default_"))}
)
"""Names that the option ``model`` may hold: the fields that MixtralConfig itself declares."""

SIZE_FIELDS = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "num_local_experts",
        "num_experts_per_tok",
    }
)
"""Those that are numbers of something that there must be."""

POSSIBLE_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "learning_rate": (lambda value: value > 0, "a number > 0"),
    "min_learning_rate_ratio": (lambda value: 0 <= value <= 1, "a share from 0 to 1"),
    "warmup_steps": (lambda value: value >= 0, "a number of steps >= 0"),
    "weight_decay": (lambda value: value >= 0, "a number >= 0"),
    "betas": (lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value), "two numbers in [0, 1)"),
    "load_balancing_coefficient": (lambda value: value >= 0, "a number >= 0"),
    "max_new_tokens": (lambda value: value >= 1, "a number of tokens >= 1"),
    "temperature": (lambda value: value >= 0, "a number >= 0"),
}
"""Numeric options of MixtralModule: what is possible, as a test and in words."""


def check_options(**options: Any) -> None:
    """Raise where a numeric option of MixtralModule is out of its range.

    Args:
        **options: Values by name.

    Raises:
        ValueError: The first one that is not possible.
    """
    for name, value in options.items():
        is_possible, words = POSSIBLE_OPTIONS[name]
        if not is_possible(value):
            raise ValueError(f"model.{name}={value}: use {words}")


def check_experts_implementation(name: str | None) -> None:
    """Raise where transformers has no experts implementation of that name.

    Args:
        name: Name, or None for transformers' default.

    Raises:
        ValueError: There is none.
    """
    known = ("eager", *sorted(ALL_EXPERTS_FUNCTIONS.keys()))
    if name is not None and name not in known:
        raise ValueError(f"model.experts_implementation={name!r}: use one of {', '.join(known)}")


def check_model_fields(fields: dict[str, Any]) -> None:
    """Raise where a model description cannot be meant.

    transformers accepts unknown keys in silence, so that a typo would train a model of the default size.

    Args:
        fields: Fields of MixtralConfig.

    Raises:
        ValueError: An unknown field, or sizes that do not go together.
    """
    for name in fields:
        if name not in MODEL_FIELDS:
            near = difflib.get_close_matches(name, MODEL_FIELDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"possible are {', '.join(sorted(MODEL_FIELDS))}"
            raise ValueError(f"model.{name}: MixtralConfig has no such field: {hint}")
    for name in SIZE_FIELDS & fields.keys():
        value = fields[name]
        if name == "num_key_value_heads" and value is None:  # as many as num_attention_heads
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"model.{name}={value!r}: use a whole number >= 1")
    if fields.get("hidden_act", "silu") not in ACT2FN:
        raise ValueError(f"model.hidden_act={fields['hidden_act']!r}: use one of {', '.join(sorted(ACT2FN))}")
    try:
        MixtralConfig(**fields)
    except Exception as error:  # transformers checks the types, and has its own classes of errors for that
        raise ValueError(f"model.model: {' '.join(str(error).split())}") from None
    experts, picked = fields.get("num_local_experts", 8), fields.get("num_experts_per_tok", 2)
    if not 1 <= picked <= experts:
        raise ValueError(
            f"model.num_experts_per_tok={picked}: the router picks from {experts} experts: choose 1 to {experts}, or "
            "more experts with model.num_local_experts"
        )
    heads, groups = fields.get("num_attention_heads", 32), fields.get("num_key_value_heads", 8)
    if groups is not None and heads % groups:
        raise ValueError(f"model.num_attention_heads={heads} is not a multiple of model.num_key_value_heads={groups}")
    hidden = fields.get("hidden_size", 4096)
    if fields.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"model.hidden_size={hidden} is not a multiple of model.num_attention_heads={heads}: change one or set "
            "model.head_dim"
        )


def check_checkpoint_folder(directory: str) -> None:
    """Raise where a folder does not hold a whole Mixtral in the Hugging Face layout.

    Args:
        directory: Folder with a ``config.json``.

    Raises:
        FileNotFoundError: No such folder, or a file is missing in it.
        ValueError: The model in it is of another family, or a file is damaged.
    """
    try:
        check_checkpoint(directory)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"model.checkpoint={directory}: {error}") from None
    except ValueError as error:
        raise ValueError(f"model.checkpoint={directory}: {error}") from None
