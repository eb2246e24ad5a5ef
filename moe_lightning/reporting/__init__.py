"""Figures and tables for TensorBoard, reports and the README.

Figures are matplotlib objects without any global state (no pyplot: no window, no list of open figures, nothing to
close), in colours that colour-blind people can tell apart, legible at the size of a README.
"""

from moe_lightning.reporting.curves import layer_curves, step_curves
from moe_lightning.reporting.decision_maps import decision_maps, dropping_order
from moe_lightning.reporting.decisions import compression_figures, roles
from moe_lightning.reporting.heat_maps import heat_map
from moe_lightning.reporting.interval_plots import Curve, RankedValue, interval_curves, interval_ranking
from moe_lightning.reporting.matrices import matrix_summary, matrix_table, module_line
from moe_lightning.reporting.model_maps import frequency_variance, similarity_map
from moe_lightning.reporting.run_comparison import ComparedRun, comparison_figures
from moe_lightning.reporting.run_figures import RunFigure, run_figures
from moe_lightning.reporting.run_records import CompressionRecord, read_compressions
from moe_lightning.reporting.slimming_maps import slimming_figures
from moe_lightning.reporting.style import figure_pixels, save_figure

__all__ = [
    "ComparedRun",
    "CompressionRecord",
    "Curve",
    "RankedValue",
    "RunFigure",
    "comparison_figures",
    "compression_figures",
    "decision_maps",
    "dropping_order",
    "figure_pixels",
    "frequency_variance",
    "heat_map",
    "interval_curves",
    "interval_ranking",
    "layer_curves",
    "matrix_summary",
    "matrix_table",
    "module_line",
    "read_compressions",
    "roles",
    "run_figures",
    "save_figure",
    "similarity_map",
    "slimming_figures",
    "step_curves",
]
