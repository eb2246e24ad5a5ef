"""Reading and writing models as Hugging Face folders."""

from moe_lightning.checkpoints.adapters import load_adapters, save_adapters
from moe_lightning.checkpoints.folders import (
    Format,
    check_format,
    from_pretrained,
    may_be_uneven,
    plain_structure,
    save_pretrained,
    written_shape,
)
from moe_lightning.checkpoints.inspect import (
    check_checkpoint,
    has_weights,
    read_config,
    stored_bytes,
    stored_dtype,
    weights_bytes,
)

__all__ = [
    "Format",
    "check_checkpoint",
    "check_format",
    "from_pretrained",
    "has_weights",
    "load_adapters",
    "may_be_uneven",
    "plain_structure",
    "read_config",
    "save_adapters",
    "save_pretrained",
    "stored_bytes",
    "stored_dtype",
    "weights_bytes",
    "written_shape",
]
