"""Tables in Markdown."""

from __future__ import annotations

from moe_lightning.plan import plan_table

__all__ = ["plan_table"]
