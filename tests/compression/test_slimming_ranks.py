"""Two real processes make the weights of one."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing

from tests.compression.slimming_ranks import CASES, all_batches, further, run_rank, slimmed, starved_error


def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.spawn(run_rank, args=(2, str(tmp_path)), nprocs=2)
    one, other = (torch.load(tmp_path / f"slimmed.{rank}.pt") for rank in range(2))
    assert one.keys() == other.keys()
    for case, mine in one.items():
        if isinstance(mine, str):
            assert mine and mine == other[case]
            continue
        for key in ("matrices", "tokens", "errors"):
            assert mine[key] == other[case][key], f"{case}: {key} differ between the ranks"
        for name, tensor in mine["state"].items():
            assert torch.equal(tensor, other[case]["state"][name]), f"{case}: {name} differs between the ranks"
    for split, name, policy in CASES:
        mine = one[f"{split}, {name}, {policy}"]
        assert one[f"{split}, error"] == starved_error(all_batches())
        if policy == "top_up":
            # Each process draws from data of its own; with what both drew, nobody is short.
            assert min(min(found.values()) for found in mine["tokens"].values()) >= 34
            continue
        alone = slimmed(name, policy, all_batches(), further())
        assert mine["matrices"] == alone["matrices"] and mine["tokens"] == alone["tokens"]
        for key, tensor in alone["state"].items():
            torch.testing.assert_close(mine["state"][key], tensor, rtol=1e-6, atol=1e-9, msg=f"{name}: {key}")
