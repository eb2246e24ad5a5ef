"""The table of statistics: what is made of it without a model, what is merged, stored and said of it."""

import copy
import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_lightning.architectures import architecture_of
from moe_lightning.plan import DropBlock, DropMoE, KeepChannels, KeepExperts, NoviceExperts
from moe_lightning.statistics import GROUPS, Statistics, collect, merge_statistics, statistics_bytes
from moe_lightning.statistics import interventions as interventions_module
from moe_lightning.statistics.groups import ENTRIES, sizes_of
from moe_lightning.statistics.similarity import all_cosines, angles, cosine_sum
from tests.models import random_batches, tiny_mixtral

COLLECTED = set(GROUPS) - {"sensitivity"}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_mixtral()


@pytest.fixture(scope="module")
def statistics(model: Any) -> Statistics:
    return collect(model, random_batches(3, 2, 9), COLLECTED, progress=False)


@pytest.fixture(scope="module")
def edited(model: Any) -> Any:
    shape = architecture_of(model).shape(model)
    for edit in (
        KeepExperts(0, (0, 2, 4)),
        DropMoE(1),
        NoviceExperts(2, (1,), ranks=(4,)),
        KeepChannels(2, 40),
        KeepChannels(0, 30),
    ):
        shape = edit.apply(shape)
    return shape


def test_all_groups_of_one_collection(statistics: Statistics) -> None:
    assert statistics.groups == COLLECTED
    for name, tensor in statistics.tensors.items():
        assert tensor.dtype == torch.float64, name
        assert tensor.shape == sizes_of(statistics.shape, ENTRIES[name].dims), name


def test_all_groups_survive_a_file(statistics: Statistics, tmp_path: Path) -> None:
    whole = copy.copy(statistics)
    whole.fits = {(0, 1): "not saved"}
    whole.save(tmp_path / "all.safetensors")
    again = Statistics.load(tmp_path / "all.safetensors")
    assert again.groups == COLLECTED and again.fits == {}
    for name, tensor in statistics.tensors.items():
        assert torch.equal(again[name].nan_to_num(-1), tensor.nan_to_num(-1)), name
    assert again.info == statistics.info and again.info["batches"] == 3


@pytest.mark.parametrize("which", ["whole", "edited", "blocks dropped"])
def test_synthetic_statistics_have_the_form_of_real_ones(model: Any, edited: Any, which: str) -> None:
    shape = architecture_of(model).shape(model) if which == "whole" else edited
    if which == "blocks dropped":
        shape = DropBlock(0).apply(DropBlock(1).apply(shape))
    made = Statistics.synthetic(shape)
    assert made.groups == set(GROUPS)
    for name, tensor in made.tensors.items():
        size = sizes_of(shape, ENTRIES[name].dims.replace("H", "1"))
        assert tensor.shape == size, name
        if which == "whole":
            assert torch.isfinite(tensor).all(), name
            if ENTRIES[name].dims.startswith("L"):
                assert torch.equal(tensor, tensor[:1].expand_as(tensor)), f"{name}: layers differ"
    assert (made.block_cosine > 0.5).all() and (made.block_cosine < 1).all()
    cosine, angle = made.hidden_cosine, made.hidden_angle("last")
    assert torch.equal(cosine.diagonal(), torch.ones(len(cosine), dtype=torch.float64))
    assert torch.equal(angle.diagonal(), torch.zeros(len(angle), dtype=torch.float64))
    torch.testing.assert_close((angle * torch.pi).cos(), cosine)
    assert (made["low_rank_error"].nan_to_num().diff(dim=-1) <= 0).all()


def test_ragged_channels_of_synthetic_statistics(edited: Any) -> None:
    made = Statistics.synthetic(edited)
    mean = made["channel_mean"]
    assert mean.shape == (2, 6, 40)
    assert torch.isfinite(mean[0, [0, 2, 4], :30]).all() and mean[0, :, 30:].isnan().all()
    assert mean[0, [1, 3, 5]].isnan().all() and mean[1, 1].isnan().all() and torch.isfinite(mean[1, 2]).all()
    assert made["coactivation"][0, 0].isnan().tolist() == [False, True, False, True, False, True]


def test_accessors_are_means(statistics: Statistics) -> None:
    tokens, sequences = 54, 6
    assert statistics["similarity_tokens"].tolist() == [tokens]
    assert statistics["similarity_sequences"].tolist() == [sequences]
    torch.testing.assert_close(statistics.moe_cosine, statistics["moe_cosine_sum"] / tokens)
    torch.testing.assert_close(statistics.block_cosine, statistics["block_cosine_sum"] / tokens)
    torch.testing.assert_close(statistics.hidden_angle("all"), statistics["hidden_angle_sum"] / tokens)
    torch.testing.assert_close(statistics.hidden_angle(), statistics["hidden_last_angle_sum"] / sequences)
    # A block's cosine is that of the places before and after it.
    torch.testing.assert_close(statistics.hidden_cosine.diagonal(1), statistics.block_cosine, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="'last' or 'all'"):
        statistics.hidden_angle("first")
    with pytest.raises(KeyError, match="similarity"):
        _ = Statistics(statistics.shape, {}).hidden_cosine


def test_means_are_merged_by_their_tokens(model: Any) -> None:
    batches = random_batches(3, 2, 9)
    parts = [collect(model, part, {"interventions"}, progress=False) for part in (batches[:1], batches[1:])]
    whole = collect(model, batches, {"interventions"}, progress=False)
    merged = merge_statistics(parts)
    torch.testing.assert_close(merged["expert_divergence"], whole["expert_divergence"], rtol=1e-9, atol=1e-12)
    assert merged["divergence_tokens"].tolist() == [54]


def test_what_only_one_part_knows_is_kept(statistics: Statistics) -> None:
    blind = copy.deepcopy(statistics)
    blind.tensors["low_rank_error"][0, 2] = torch.nan
    for parts in ([statistics, blind], [blind, statistics]):
        merged = merge_statistics(parts)
        assert torch.equal(merged["low_rank_error"][0, 2], statistics["low_rank_error"][0, 2])
        assert torch.equal(merged["channel_weight_square"], statistics["channel_weight_square"])
        assert torch.equal(merged["output_max_abs"], statistics["output_max_abs"])


def test_sensitivities_are_not_merged_blindly(statistics: Statistics) -> None:
    alone = Statistics(statistics.shape, {"layer_divergence": torch.ones(3, dtype=torch.float64)})
    with pytest.raises(ValueError, match="cannot be merged without 'tokens'"):
        merge_statistics([alone, alone])


def test_sensitivity_is_not_collected(model: Any) -> None:
    with pytest.raises(ValueError, match="scope='sensitivity'"):
        collect(model, random_batches(1), {"sensitivity"}, progress=False)


def test_an_iterator_serves_several_passes(model: Any, statistics: Statistics) -> None:
    again = collect(model, iter(random_batches(3, 2, 9)), COLLECTED, progress=False)
    for name, tensor in statistics.tensors.items():
        assert torch.equal(again[name].nan_to_num(-1), tensor.nan_to_num(-1)), name
    for needs in ({"interventions"}, {"low_rank"}, {"low_rank", "interventions"}):
        with pytest.raises(ValueError, match="no calibration batches"):
            collect(model, iter([]), needs, progress=False)


def test_intact_logits_beyond_the_bound_are_made_again(
    model: Any, statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interventions_module, "LOGIT_BYTES", 5 * 64 * 4)
    again = collect(model, random_batches(3, 2, 9), {"interventions"}, progress=False)
    torch.testing.assert_close(again["expert_divergence"], statistics["expert_divergence"], rtol=1e-4, atol=1e-9)


def test_interventions_leave_the_model_as_it_was_after_an_exception() -> None:
    model = tiny_mixtral().train()
    calls = 0

    def fail(module: nn.Module, _args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise RuntimeError("the disk is gone")

    handle = model.model.layers[1].mlp.gate.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        collect(model, random_batches(1), {"interventions"}, progress=False)
    handle.remove()
    for module in model.modules():
        assert "forward" not in module.__dict__ and module.training
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_memory_is_known_before_the_pass(model: Any) -> None:
    shape = architecture_of(model).shape(model)
    layers, experts, hidden, tokens = 3, 6, 32, 22
    routing = layers * (1 + 5 * experts + 2 * experts**2) * 8
    assert statistics_bytes(shape, {"routing"}) == routing == statistics_bytes(shape, {"routing"}, tokens)
    similarity = (2 + 3 * 16) * 8
    assert statistics_bytes(shape, ["similarity"]) == similarity
    assert statistics_bytes(shape, {"similarity"}, tokens) == similarity + 4 * tokens * hidden * 4
    assert statistics_bytes(shape, None) < statistics_bytes(shape, GROUPS.keys() - {"sensitivity"})
    half = dataclasses.replace(shape, weight_bytes=2)
    assert statistics_bytes(half, {"similarity"}, tokens) == similarity + 4 * tokens * hidden * 2
    with pytest.raises(ValueError, match="unknown"):
        statistics_bytes(shape, {"hessian"})


@pytest.mark.parametrize(
    ("group", "module", "said"),
    [
        ("similarity", "collect", "calibration (similarity; 11.4 KiB)"),
        # Four states of 22 tokens, the logits of 64 words, and the sums.
        (
            "interventions",
            "interventions",
            f"interventions ({(4 * 22 * 32 * 4 + 22 * 64 * 4 + 19 * 8) / 1024:.1f} KiB)",
        ),
    ],
)
def test_the_bar_says_what_is_measured(
    model: Any, group: str, module: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not by attributes: the package's function `collect` hides the module.
    place = importlib.import_module(f"moe_lightning.statistics.{module}")
    bars: list[str] = []
    real = place.tqdm

    def recording(*args: Any, **options: Any) -> Any:
        bars.append(options["desc"])
        return real(*args, **options)

    monkeypatch.setattr(place, "tqdm", recording)
    collect(model, random_batches(1), {group}, progress=False)
    assert bars == [said]


def test_cosines_are_not_made_narrow_by_autocast(model: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        statistics = collect(model, random_batches(2, 2, 9), {"blocks", "similarity"}, progress=False)
    torch.testing.assert_close(statistics.hidden_cosine.diagonal(1), statistics.block_cosine, rtol=1e-5, atol=0)


def test_states_that_overflow_are_an_error() -> None:
    model = tiny_mixtral()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[:] = torch.inf
    with pytest.raises(ValueError, match="hidden_cosine_sum"):
        collect(model, random_batches(1), {"similarity"}, progress=False)


def test_batches_without_a_token_move_nothing(model: Any, statistics: Statistics) -> None:
    nothing = {"input_ids": torch.full((2, 3), 7), "attention_mask": torch.zeros(2, 3, dtype=torch.int64)}
    batches = [nothing, *random_batches(3, 2, 9), nothing]
    again = collect(model, batches, {"interventions", "similarity"}, progress=False)
    for name, tensor in again.tensors.items():
        torch.testing.assert_close(tensor, statistics[name])


def test_cosines_of_zeros_and_of_narrow_types() -> None:
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(300, 24, generator=draw, dtype=torch.float64) for _ in range(2))
    left[3] = 0
    want = (left * right).sum(-1) / (left.norm(dim=-1) * right.norm(dim=-1)).clamp(min=1e-300)
    assert float(cosine_sum(left, right)) == pytest.approx(float(want.sum()), rel=1e-12)
    pairs = all_cosines(torch.stack([left, right], 1))
    torch.testing.assert_close(pairs[:, 0, 1], want)
    assert torch.equal(pairs.diagonal(dim1=1, dim2=2), torch.ones(300, 2, dtype=torch.float64))
    # Nearly parallel states in bfloat16: cosines closer than its spacing of 0.004 are told apart.
    near = torch.stack([left[0], left[0] + 0.03 * right[0], left[0] + 0.04 * right[0]]).bfloat16()[None]
    wide = near.double()
    exact = torch.nn.functional.cosine_similarity(wide[:, :1], wide, dim=-1)
    got = all_cosines(near)[:, 0]
    assert 0 < float(got[0, 1] - got[0, 2]) < 0.004
    torch.testing.assert_close(got, exact, rtol=1e-6, atol=0)
    assert float(angles(torch.tensor(1 + 1e-9, dtype=torch.float64))) == 0
