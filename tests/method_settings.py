"""One row for each setting of a method; ``test_methods.py`` runs over all of them. A new method is a row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import moe_lightning as ml
from moe_lightning.method import Method


@dataclass(frozen=True)
class Setting:
    """Methods to apply one after the other, made anew for each test.

    Attributes:
        make: Returns the methods.
        plain: Whether the outcome is a plain Mixtral, which transformers alone loads.
    """

    make: Callable[[], Sequence[Method]]
    plain: bool = False


SETTINGS: dict[str, Setting] = {
    "expert drop": Setting(lambda: [ml.ExpertDrop(ratio=0.25)], plain=True),
    "expert drop to top-k": Setting(lambda: [ml.ExpertDrop(keep=2, criterion="reap")], plain=True),
    "expert drop global": Setting(lambda: [ml.ExpertDrop(ratio=0.4, scope="global", criterion="mone")]),
    "novices": Setting(lambda: [ml.Novices(ratio=0.5)]),
    "novices of the paper": Setting(lambda: [ml.Novices(keep=4, criterion="mone_paper")]),
    "novices global": Setting(
        lambda: [ml.Novices(keep=2.5, scope="global", criterion="residual", novice="gate2_mean")]
    ),
    "all experts novices": Setting(lambda: [ml.Novices(keep=0, novice="gate2_mean", criterion="random")]),
    "zero novices": Setting(lambda: [ml.Novices(ratio=0.3, novice="zero", criterion="frequency")]),
    "novices, then drop": Setting(lambda: [ml.Novices(ratio=0.5), ml.ExpertDrop(keep=4, criterion="frequency")]),
    "novices, then drop them": Setting(lambda: [ml.Novices(ratio=0.5), ml.ExpertDrop(keep=3, criterion="mone")], True),
    "drop, then novices": Setting(lambda: [ml.ExpertDrop(keep=4), ml.Novices(keep=2)]),
    "novices twice": Setting(
        lambda: [ml.Novices(keep=4), ml.Novices(keep=2, novice="gate2_mean", criterion="frequency")]
    ),
    "drop twice": Setting(lambda: [ml.ExpertDrop(keep=5), ml.ExpertDrop(keep=3, criterion="reap")], plain=True),
}
