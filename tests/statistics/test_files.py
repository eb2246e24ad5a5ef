"""Statistics written and read again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import moe_lightning as ml
from tests.models import random_batches, tiny_mixtral


@pytest.fixture(scope="module")
def statistics() -> Any:
    model = tiny_mixtral()
    ml.compress(model, random_batches(), ml.ExpertDrop(keep=4), progress=False)
    return ml.collect(model, random_batches(), progress=False)


def test_round_trip_is_exact(statistics: Any, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "calibration.safetensors"
    statistics.info["data"] = {"files": ["a.txt"], "seed": 3}
    statistics.save(path)
    again = ml.Statistics.load(path)
    assert again.tensors.keys() == statistics.tensors.keys()
    for name, tensor in statistics.tensors.items():
        assert again[name].dtype == torch.float64
        assert torch.equal(again[name].view(torch.int64), tensor.contiguous().view(torch.int64)), name
    assert again.shape == statistics.shape
    assert again.info == statistics.info
    assert torch.equal(again.score("mone").nan_to_num(-1), statistics.score("mone").nan_to_num(-1))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_an_error(statistics: Any, tmp_path: Path, part: float) -> None:
    path = tmp_path / "calibration.safetensors"
    statistics.save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ValueError, match=r"calibration.safetensors is not a readable.*collect"):
        ml.Statistics.load(path)


def test_other_files_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no statistics file"):
        ml.Statistics.load(tmp_path / "nothing")
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no statistics"):
        ml.Statistics.load(tmp_path / "model.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "new", {"format": "moe-lightning statistics", "version": "99"})
    with pytest.raises(ValueError, match="version 2"):
        ml.Statistics.load(tmp_path / "new")


def test_a_failed_write_keeps_the_old_file(statistics: Any, tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    statistics.save(path)
    data = path.read_bytes()
    bad = ml.Statistics(statistics.shape, statistics.tensors, {"seed": object()})
    with pytest.raises(TypeError):
        bad.save(path)
    assert path.read_bytes() == data
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    statistics = ml.collect(tiny_mixtral(), random_batches(2), progress=False)
    statistics.tensors["gate_sum"][1, 2] = torch.nan
    statistics.save(tmp_path / "damaged.safetensors")
    with pytest.raises(ValueError, match=r"damaged.safetensors is damaged: gate_sum"):
        ml.Statistics.load(tmp_path / "damaged.safetensors")
