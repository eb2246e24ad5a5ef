"""Figures and tables for TensorBoard, reports and the README."""

from moe_lightning.reporting.figures import figure_pixels, heat_map, layer_curves, save_figure, step_curves
from moe_lightning.reporting.tables import plan_table

__all__ = ["figure_pixels", "heat_map", "layer_curves", "plan_table", "save_figure", "step_curves"]
