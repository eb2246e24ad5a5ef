"""Reading and writing models as Hugging Face folders."""

from moe_lightning.checkpoints.folders import Format, check_format, from_pretrained, may_be_uneven, save_pretrained
from moe_lightning.checkpoints.inspect import check_checkpoint, read_config, stored_bytes, stored_dtype

__all__ = [
    "Format",
    "check_checkpoint",
    "check_format",
    "from_pretrained",
    "may_be_uneven",
    "read_config",
    "save_pretrained",
    "stored_bytes",
    "stored_dtype",
]
