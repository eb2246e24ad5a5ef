"""Figures and tables for TensorBoard, reports and the README.

Figures are matplotlib objects without any global state (no pyplot: no window, no list of open figures, nothing to
close), in colours that colour-blind people can tell apart, legible at the size of a README.
"""

from moe_lightning.reporting.curves import layer_curves, step_curves
from moe_lightning.reporting.heat_maps import heat_map
from moe_lightning.reporting.style import figure_pixels, save_figure
from moe_lightning.reporting.tables import plan_table

__all__ = ["figure_pixels", "heat_map", "layer_curves", "plan_table", "save_figure", "step_curves"]
