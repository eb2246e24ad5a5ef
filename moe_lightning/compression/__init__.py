"""The one driver: observe, propose, check, fill."""

from moe_lightning.compression.driver import as_methods, check_methods, compress
from moe_lightning.compression.memory import calibration_bytes, made_bytes, trial_edits
from moe_lightning.compression.provenance import history_step, plain
from moe_lightning.compression.result import CompressionResult, ModuleStatus

__all__ = [
    "CompressionResult",
    "ModuleStatus",
    "as_methods",
    "calibration_bytes",
    "check_methods",
    "compress",
    "history_step",
    "made_bytes",
    "plain",
    "trial_edits",
]
