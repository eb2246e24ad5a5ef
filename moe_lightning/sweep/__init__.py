"""Grids of methods on one model: criterion x operator x scope x ratio at equal budget, and what-if without a model."""

from moe_lightning.sweep.grid import Cell, Grid, cells_of
from moe_lightning.sweep.store import CellResult, SweepFolder

__all__ = ["Cell", "CellResult", "Grid", "SweepFolder", "cells_of"]
