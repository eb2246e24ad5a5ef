"""What a run leaves of its quality, as plain data: reports, comparisons of runs and pictures read it.

The sums of every block are kept, not only what was made of them: any two models that were measured on the same blocks
can be compared in pairs later, in another process.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lightning.evaluation.comparison import BlockScores
from moe_lightning.files import write_atomically

VERSION = 1
BEFORE, END, TEST = "before", "end", "test"
"""Names of moments: of the model before its first compression, of what the run gives back, and of ``moe-lightning
test``, which may be given another model than that."""


@dataclass(frozen=True)
class TextScores:
    """A model on one text.

    Attributes:
        scores: Sums of each block; ``divergence`` and ``agreement`` are NaN in blocks that were not compared with the
            model before compression, ``nats`` in those where the model gives no number.
        calibrated: Whether calibration saw text from the same source; None where nothing was calibrated or it is not
            known.
        fingerprint: Of the blocks' token ids: only equal ones can be compared in pairs.
    """

    scores: BlockScores
    calibrated: bool | None
    fingerprint: str


@dataclass(frozen=True)
class Rate:
    """Tokens per second: the median of several runs and their spread.

    Attributes:
        median: Of the runs.
        low: Of the slowest run.
        high: Of the fastest run.
        batch: Sequences at a time.
        context: Tokens of each that were there before (decode) or went in (prefill).
    """

    median: float
    low: float
    high: float
    batch: int
    context: int


@dataclass(frozen=True)
class Routing:
    """Where the tokens of a text go. Experts have the numbers of the original model.

    Attributes:
        layers: Numbers of the MoE layers, L of them.
        load: Share of the routed pairs ``[L][E]``; None for experts that the router does not know any more.
        mass: Share of the routing weight ``[L][E]``, likewise.
        novices: Experts that are novices, of each layer.
    """

    layers: list[int]
    load: list[list[float | None]]
    mass: list[list[float | None]]
    novices: list[list[int]]

    @property
    def novice_masses(self) -> list[float]:
        """Share of the routing weight that novices get, of each layer."""
        return [
            sum(mass[expert] or 0.0 for expert in novices)
            for mass, novices in zip(self.mass, self.novices, strict=True)
        ]

    @property
    def novice_shares(self) -> list[float]:
        """Share of the routed pairs that novices get, of each layer."""
        return [
            min(1.0, sum(load[expert] or 0.0 for expert in novices))
            for load, novices in zip(self.load, self.novices, strict=True)
        ]


@dataclass(frozen=True)
class Sample:
    """What a model makes of a prompt, greedily.

    Attributes:
        prompt: The prompt.
        continuation: What follows.
    """

    prompt: str
    continuation: str


@dataclass(frozen=True)
class QualityMoment:
    """One model at one moment of a run: everything here was measured on the same object.

    Attributes:
        name: ``before``, ``compressed``, ``compressed-2``, ..., ``end``, ``test``.
        step: Optimizer steps done.
        what: What happened before it, in words.
        texts: By the name of the text; ``test`` or ``validation`` first, then domains.
        parameters: Parameters.
        bytes: Bytes of the weights in memory.
        bytes_on_disk: Bytes of the weights as they are written.
        flops: Floating-point operations of a forward pass over one sequence as long as a block of the first text: on
            this text, with the share of the routed pairs that ``routing`` says really go to novices, which cost next
            to nothing. Where the routing was not measured an upper bound: as if every token picked real experts.
        speed: ``prefill`` and ``decode``; empty where they were not timed.
        routing: None where it was not measured, or no MoE layer is left.
        layer_errors: Squared error of what leaves each block, in units of its squares before compression, by the
            block's original number; empty where it was not measured.
        samples: Continuations of prompts.
    """

    name: str
    step: int
    what: str
    texts: dict[str, TextScores]
    parameters: int
    bytes: int
    bytes_on_disk: int
    flops: int
    speed: dict[str, Rate] = field(default_factory=dict)
    routing: Routing | None = None
    layer_errors: dict[int, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types that JSON and Lightning checkpoints can hold; what is not finite becomes None."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["texts"] = {
            name: {
                "scores": _finite(text.scores.to_dict()),
                "calibrated": text.calibrated,
                "fingerprint": text.fingerprint,
            }
            for name, text in self.texts.items()
        }
        values["speed"] = {name: dataclasses.asdict(rate) for name, rate in self.speed.items()}
        values["routing"] = None if self.routing is None else dataclasses.asdict(self.routing)
        values["layer_errors"] = {str(layer): error for layer, error in self.layer_errors.items()}
        values["samples"] = [dataclasses.asdict(sample) for sample in self.samples]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QualityMoment:
        """Read what :meth:`to_dict` wrote.

        Args:
            values: Plain types.
        """
        given = dict(values)
        given["texts"] = {
            name: TextScores(BlockScores.from_dict(_with_nan(text["scores"])), text["calibrated"], text["fingerprint"])
            for name, text in values["texts"].items()
        }
        given["speed"] = {name: Rate(**rate) for name, rate in values["speed"].items()}
        given["routing"] = None if values["routing"] is None else Routing(**values["routing"])
        given["layer_errors"] = {int(layer): error for layer, error in values["layer_errors"].items()}
        given["samples"] = [Sample(**sample) for sample in values["samples"]]
        return cls(**given)


@dataclass(frozen=True)
class QualityRecord:
    """All moments of a run, in their order.

    Attributes:
        moments: The moments.
        context: Where this was measured: ``data`` (as the datamodule describes itself), ``device``, ``dtype``,
            ``threads``, ``versions``.
    """

    moments: list[QualityMoment]
    context: dict[str, Any]

    def moment(self, name: str) -> QualityMoment | None:
        """Return the last moment of a name, or None.

        Args:
            name: E.g. ``before``.
        """
        return next((moment for moment in reversed(self.moments) if moment.name == name), None)

    def save(self, path: Path) -> None:
        """Write the record as JSON, as a whole or not at all.

        Args:
            path: The file.
        """
        values = {
            "version": VERSION,
            "context": self.context,
            "moments": [moment.to_dict() for moment in self.moments],
        }
        write_atomically(path, json.dumps(values, indent=1, allow_nan=False) + "\n")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QualityRecord:
        """Read what :meth:`save` wrote, as plain types.

        Args:
            values: What the file holds.

        Raises:
            ValueError: It is of another version.
        """
        if values["version"] != VERSION:
            raise ValueError(f"version {values['version']}, this release reads {VERSION}")
        return cls([QualityMoment.from_dict(moment) for moment in values["moments"]], values["context"])

    @classmethod
    def load(cls, path: Path) -> QualityRecord:
        """Read what :meth:`save` wrote.

        Args:
            path: The file.

        Raises:
            ValueError: It is no such record.
        """
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is no record of a run's quality: {error}") from error


def _finite(lists: Mapping[str, list[float]]) -> dict[str, list[float | None]]:
    return {
        name: [None if isinstance(value, float) and not math.isfinite(value) else value for value in values]
        for name, values in lists.items()
    }


def _with_nan(lists: Mapping[str, list[float | None]]) -> dict[str, list[float]]:
    return {name: [math.nan if value is None else value for value in values] for name, values in lists.items()}
