"""Two real processes make the weights of one, and the same ones where they would not agree by themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from tests.compression.slimming_ranks import CASES, DRIFTING, all_batches, further, run_rank, slimmed, starved_error


def check_sums(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Both make what one process makes of all data."""
    assert one.keys() == other.keys()
    assert one["error"] == other["error"] == starved_error(all_batches()) != ""
    for split, name, policy in CASES:
        case = f"{split}, {name}, {policy}"
        mine = one[case]
        for key in ("matrices", "tokens", "errors"):
            assert mine[key] == other[case][key], f"{case}: {key} differ between the ranks"
        for key, tensor in mine["state"].items():
            assert torch.equal(tensor, other[case]["state"][key]), f"{case}: {key} differs between the ranks"
        if policy == "top_up":
            # Each process draws from data of its own; with what both drew, nobody is short.
            assert min(min(found.values()) for found in mine["tokens"].values()) >= 34
            continue
        alone = slimmed(name, policy, all_batches(), further())
        assert mine["matrices"] == alone["matrices"] and mine["tokens"] == alone["tokens"]
        for key, tensor in alone["state"].items():
            torch.testing.assert_close(mine["state"][key], tensor, rtol=1e-6, atol=1e-9, msg=f"{name}: {key}")


def check_drift(name: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    """The second process rounds and breaks ties in another way, and holds what the first one made, moments included."""
    assert one.keys() == other.keys()
    kinds = {key.rpartition(".")[2] for key in one}
    assert kinds >= {"2:4": {"metadata", "values"}, "masked": {"bits", "values"}}.get(name, {"words", "scale", "zero"})
    assert any("exp_avg" in key and value.any() for key, value in one.items())
    assert [key for key in one if not torch.equal(one[key], other[key])] == [], name


def test_two_processes_equal_one_and_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.spawn(run_rank, args=(2, str(tmp_path)), nprocs=2)
    for what in ("slimmed", "drifted"):
        one, other = (torch.load(tmp_path / f"{what}.{rank}.pt") for rank in range(2))
        if what == "slimmed":
            check_sums(one, other)
            continue
        for name in DRIFTING:
            check_drift(name, one[name], other[name])
