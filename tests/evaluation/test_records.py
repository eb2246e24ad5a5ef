"""What is kept of a run's quality, and read back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moe_lightning.evaluation.records import QualityRecord, Routing


def test_what_novices_get_of_each_layer() -> None:
    routing = Routing(
        layers=[0, 2, 5],
        load=[[0.5, 0.25, 0.25], [0.5, None, 0.5], [0.25, 0.75, 0.0]],
        mass=[[0.125, 0.375, 0.5], [0.75, None, 0.25], [0.5, 0.5, 0.0]],
        novices=[[1, 2], [1, 2], []],
    )
    assert routing.novice_shares == [0.5, 0.5, 0.0]
    assert routing.novice_masses == [0.875, 0.25, 0.0]


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    QualityRecord([], {"device": "cpu"}).save(path)
    written = json.loads(path.read_text())
    assert QualityRecord.from_dict(written) == QualityRecord.load(path) == QualityRecord([], {"device": "cpu"})
    newer = {**written, "version": written["version"] + 1}
    path.write_text(json.dumps(newer))
    told = f"version {newer['version']}, this release reads {written['version']}"
    with pytest.raises(ValueError, match=told):
        QualityRecord.from_dict(newer)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is no record of a run's quality: {told}"):
        QualityRecord.load(path)
