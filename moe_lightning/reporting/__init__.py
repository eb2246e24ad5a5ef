"""Figures and tables for TensorBoard, reports and the README."""

from moe_lightning.reporting.tables import plan_table

__all__ = ["plan_table"]
