"""What was drawn, read from the figures."""

from typing import Any

from matplotlib.figure import Figure

from moe_lightning.evaluation.records import QualityRecord
from moe_lightning.reporting import RunFigure
from moe_lightning.reporting.captions import Drawn
from moe_lightning.reporting.quality_figures import Candidate, tradeoff_figures


def errorbars(axes: Any) -> list[tuple[float, float]]:
    """Return the points of all error bars, in the order in which they were drawn."""
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line, *_ in axes.containers]


def axes_of(drawn: Figure | Drawn | RunFigure | None) -> Any:
    """Return the axes of a figure that must have been drawn."""
    assert drawn is not None
    return (drawn if isinstance(drawn, Figure) else drawn.figure).axes[0]


def cost_figures(quality: QualityRecord) -> dict[str, Drawn]:
    """Draw quality against cost of one run."""
    before = quality.moment("before")
    models = [Candidate(moment.name, moment.name, moment, before) for moment in quality.moments]
    return tradeoff_figures(models, "Quality", path=True)


def labels_of(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]
