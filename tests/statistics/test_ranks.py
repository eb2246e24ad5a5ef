"""Two real processes get the sums of one."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing

import moe_lightning as ml
from tests.reference import assert_sums_equal, record, reference_sums, untouched
from tests.statistics.ranks import SPLITS, all_batches, observe


def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.spawn(observe, args=(2, str(tmp_path)), nprocs=2)
    expected = reference_sums(record(untouched(), all_batches()))
    for split in SPLITS:
        ranks = [ml.Statistics.load(tmp_path / f"{split}.{rank}.safetensors") for rank in range(2)]
        assert_sums_equal(ranks[0].tensors, expected)
        for name, tensor in ranks[0].tensors.items():
            assert torch.equal(tensor, ranks[1].tensors[name]), f"{split}: {name} differs between the ranks"
        assert [rank.info["batches"] for rank in ranks] == [4, 4]
