"""What a plan remembers of how it was made."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from moe_lightning.method import Method
from moe_lightning.plan import ModelShape, sizes_of_model


def plain(value: Any) -> Any:
    """Turn options into types that JSON and ``weights_only`` checkpoints hold."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def history_step(method: Method, shape: ModelShape, calibration: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the entry of a plan's history for a method.

    Args:
        method: The method.
        shape: Shape of the model that it is applied to.
        calibration: Where its statistics come from.

    Returns:
        Name and options, sizes of the model, calibration and versions, as plain types.
    """
    from moe_lightning import __version__

    versions = {
        "moe-lightning": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    step = {"model": sizes_of_model(shape), "calibration": dict(calibration or {}), "versions": versions}
    return plain({**method.describe(), **step})
