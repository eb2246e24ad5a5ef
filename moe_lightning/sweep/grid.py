"""What a sweep tries: groups of cells as a config file lists them, and the cells that they stand for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_lightning.compression import check_methods, plain
from moe_lightning.method import Method
from moe_lightning.plan import ModelShape
from moe_lightning.statistics import criterion_named
from moe_lightning.sweep.budget import parameter_budget
from moe_lightning.sweep.operators import SCOPES, UNSCORED, operator_method, split_operator, usual_operator

RANDOM = "random"
"""The criterion that draws lots: the only one that takes seeds."""


@dataclass
class Grid:
    """A group of cells: every combination of what is listed, or methods written out.

    Args:
        criteria: Names of criteria: which experts go. Empty for operators that rank by themselves.
        operators: What becomes of an expert: delete, keep_router (deleted, its router row stays), mean, zero,
            gate2_mean, low_rank:RANK, usual (the one that the criterion was published with). Without criteria:
            layer_drop, block_drop, block_drop:consecutive, angular, angular:all, channels, merge:METHOD.
        scopes: Where the budget holds: layer, global, sensitivity.
        ratios: Shares of the experts to remove. They set the number of parameters that every cell may have.
        seeds: Seeds of the criterion random; every other criterion is tried once.
        methods: Methods in the order in which they are applied, as for compress, instead of all the above.
        name: What to call the cell of methods.
    """

    criteria: list[str] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)
    scopes: list[str] = field(default_factory=lambda: ["layer"])
    ratios: list[float] = field(default_factory=lambda: [0.25, 0.5])
    seeds: list[int] = field(default_factory=lambda: [0])
    methods: list[Method] = field(default_factory=list)
    name: str = ""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: Unknown names, values out of range, or options that exclude each other.
        """
        if self.methods:
            if self.criteria or self.operators:
                raise ValueError("grids: methods written out exclude criteria and operators: make two items of them")
            if not self.name:
                raise ValueError(
                    "grids: methods written out need a name, e.g. {name: blocks then novices, methods: ...}"
                )
            return
        if not self.operators:
            raise ValueError(
                "grids: an item needs operators, or methods and a name, e.g. "
                "{criteria: [residual], operators: [delete, mean]}"
            )
        for name in ("scopes", "ratios", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"grids: {name} is empty: leave it out for its default")
        for criterion in self.criteria:
            criterion_named(criterion)
        for scope in self.scopes:
            if scope not in SCOPES:
                raise ValueError(f"grids: unknown scope {scope!r}: choose from {', '.join(SCOPES)}")
        for ratio in self.ratios:
            if not 0.0 < ratio < 1.0:
                raise ValueError(
                    f"grids: ratios must lie in (0, 1), got {ratio}: 0.25 removes a quarter of the experts"
                )
        for operator in self.operators:
            kind, _ = split_operator(operator)
            if (kind in UNSCORED) == bool(self.criteria):
                raise ValueError(
                    f"grids: operator {operator!r} "
                    + (
                        "ranks by itself: put it into an item without criteria"
                        if self.criteria
                        else "needs criteria: name at least one, e.g. criteria: [residual]"
                    )
                )


@dataclass(frozen=True)
class Cell:
    """One compressed model that a sweep measures.

    Attributes:
        criterion: Which experts go; empty where the operator ranks by itself or methods were written out.
        operator: What becomes of them, or the name of methods written out.
        scope: Where the budget holds; empty as above.
        ratio: Share of the experts that set the budget; None for methods written out.
        seed: Seed of the criterion.
        methods: What is applied.
        parameters: Most parameters that the model may have; None for methods written out.
    """

    criterion: str
    operator: str
    scope: str
    ratio: float | None
    seed: int
    methods: tuple[Method, ...] = field(compare=False)
    parameters: int | None

    @property
    def name(self) -> str:
        """What the cell is called in messages."""
        words = [self.criterion, self.operator, self.scope, "" if self.ratio is None else f"{self.ratio:.0%}"]
        seed = f"seed {self.seed}" if self.criterion == RANDOM else ""
        return " ".join(word for word in (*words, seed) if word)

    @property
    def label(self) -> tuple[str, str, str, float | None]:
        """What cells have in common that differ in their seed alone."""
        return self.criterion, self.operator, self.scope, self.ratio

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the outcome on a given model and data, as plain types."""
        return {"methods": [plain(method.describe()) for method in self.methods]}

    @property
    def key(self) -> str:
        """Name of the cell's file: a hash of its settings."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def cells_of(grids: Sequence[Grid], shape: ModelShape) -> list[Cell]:
    """Return the cells of all groups, each once, and make sure that every budget can be met.

    Args:
        grids: The groups.
        shape: Shape of the model.

    Returns:
        The cells in the order of the config.

    Raises:
        ValueError: No cells, or one that does not fit the model; the message names it and the option to change.
    """
    cells = [cell for grid in grids for cell in _cells_of_grid(grid, shape)]
    if not cells:
        raise ValueError("--grids is empty: give at least one item, see configs/sweeps/quickstart.yaml")
    unique: dict[str, Cell] = {}
    for cell in cells:
        unique.setdefault(cell.key, cell)
    for cell in unique.values():
        try:
            check_methods(shape, cell.methods)
        except ValueError as error:
            raise ValueError(f"--grids: {cell.name}: {error}") from None
    return list(unique.values())


def _cells_of_grid(grid: Grid, shape: ModelShape) -> list[Cell]:
    if grid.methods:
        return [Cell("", grid.name, "", None, 0, tuple(grid.methods), None)]
    cells = []
    # The budget outermost: what is compared with each other stands together.
    for ratio in grid.ratios:
        parameters = parameter_budget(shape, ratio)
        for criterion in grid.criteria or [""]:
            for operator in grid.operators:
                chosen = usual_operator(criterion) if operator == "usual" else operator
                for scope in grid.scopes if criterion else [""]:
                    for seed in grid.seeds if criterion == RANDOM else [0]:
                        method = operator_method(chosen, criterion, scope, parameters, seed)
                        cells.append(Cell(criterion, chosen, scope, ratio, seed, (method,), parameters))
    return cells
