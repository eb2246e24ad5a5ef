"""Methods on a whole layer: every matrix as the weight maths alone makes it, in any groups, with starved experts."""

import pytest
import torch
from torch import Tensor

import moe_lightning as ml
from moe_lightning.slimming import (
    Pruned,
    Quantized,
    Scheme,
    Selection,
    SlimmedLayer,
    dequantize,
    output_error,
    prune_by_router_wanda,
    prune_by_sparse_gpt,
    prune_by_wanda,
    round_by_gptq,
    round_to_nearest,
)
from moe_lightning.slimming import base as base_of_methods
from tests.slimming.views import LayerInMemory, attention_layer, experts_layer

SCHEME = Scheme(4, 16, False, torch.bfloat16)
ROUNDED = {"group_size": 16}
METHODS = {
    "magnitude": ml.Magnitude(sparsity=0.5),
    "wanda": ml.Wanda(pattern="2:4"),
    "router wanda": ml.Wanda(sparsity=0.5, router_weighted=True),
    "sparsegpt": ml.SparseGPT(sparsity=0.5),
    "rtn": ml.RTN(**ROUNDED),
    "gptq": ml.GPTQ(**ROUNDED),
    "gptq desc_act": ml.GPTQ(**ROUNDED, desc_act=True),
    "awq": ml.AWQ(**ROUNDED),
    "awq diagonal": ml.AWQ(**ROUNDED, loss="diagonal", power_of_two=False),
}
ANY = pytest.mark.parametrize("name", METHODS)
UNMEASURED = ("magnitude", "rtn")


def slim(method: ml.RTN | ml.Wanda, view: LayerInMemory) -> SlimmedLayer:
    return method.slim(method.edit(view.layer, view.target), view)


def dense(matrix: Quantized | Pruned) -> Tensor:
    return dequantize(matrix) if isinstance(matrix, Quantized) else matrix.weight


def hessians(view: LayerInMemory, name: str) -> Tensor:
    return view.moments(name, "full", range(len(view.weight(name))))


@ANY
@pytest.mark.parametrize("make", [experts_layer, attention_layer])
def test_every_matrix_has_all_it_needs(name: str, make) -> None:
    view = make()
    before = {stack: weight.clone() for stack, weight in view.stacks.items()}
    made = slim(METHODS[name], view)
    assert tuple(made.matrices) == view.matrices == tuple(made.statuses)
    for stack in view.matrices:
        assert torch.equal(view.weight(stack), before[stack]), "weights of the view are not to be changed"
        assert dense(made.matrices[stack]).shape == before[stack].shape
        assert made.statuses[stack] == (name.split(" ")[0] if "wanda" not in name else name,) * len(before[stack])
    if name in UNMEASURED:
        assert made.errors is None
        assert not view.passes
    else:
        for stack in view.matrices:
            assert made.errors[stack].shape == (len(before[stack]),)
            assert ((made.errors[stack] > 0) & (made.errors[stack] < 0.5)).all()
    assert bool(made.rescale) == name.startswith("awq")


def test_matrices_are_those_of_the_weight_maths() -> None:
    view = experts_layer()
    x, h = view.inputs(view.stacks)["gate_up_proj"], view.inputs(view.stacks)["down_proj"]
    half = Selection(sparsity=0.5)

    def norms(tokens: list[Tensor], gated: bool) -> Tensor:
        rows = zip(tokens, view.gates, strict=True)
        return torch.stack([(gate[:, None] * seen if gated else seen).norm(dim=0) for seen, gate in rows])

    for gated, prune in ((False, prune_by_wanda), (True, prune_by_router_wanda)):
        made = slim(ml.Wanda(sparsity=0.5, router_weighted=gated), view)
        for stack, tokens in (("gate_up_proj", x), ("down_proj", h)):
            expected = prune(view.weight(stack), norms(tokens, gated), half)
            assert torch.equal(made.matrices[stack].weight, expected.weight)
            assert torch.equal(made.matrices[stack].keep, expected.keep)
    made = slim(ml.RTN(**ROUNDED), view)
    assert torch.equal(made.matrices["down_proj"].codes, round_to_nearest(view.weight("down_proj"), SCHEME).codes)


@pytest.mark.parametrize("sequential", [True, False])
def test_down_is_measured_behind_what_gate_and_up_have_become(sequential: bool) -> None:
    view = experts_layer()
    x = hessians(view, "gate_up_proj")
    first = round_by_gptq(view.weight("gate_up_proj"), x, SCHEME, tokens=view.tokens).quantized
    seen = {**view.stacks, "gate_up_proj": dequantize(first).double()} if sequential else view.stacks
    h = torch.stack([tokens.mT @ tokens for tokens in view.inputs(seen)["down_proj"]])
    second = round_by_gptq(view.weight("down_proj"), h, SCHEME, tokens=view.tokens).quantized
    made = slim(ml.GPTQ(**ROUNDED, sequential=sequential), view)
    assert torch.equal(made.matrices["gate_up_proj"].codes, first.codes)
    assert torch.equal(made.matrices["down_proj"].codes, second.codes)
    for stack, moment in (("gate_up_proj", x), ("down_proj", h)):
        weight = view.weight(stack)
        expected = output_error(weight, dense(made.matrices[stack]), moment)
        torch.testing.assert_close(made.errors[stack], expected / output_error(weight, 0 * weight, moment))
    view = experts_layer()
    half = Selection(pattern="2:4")
    first = prune_by_sparse_gpt(view.weight("gate_up_proj"), x, half, tokens=view.tokens)
    seen = {**view.stacks, "gate_up_proj": first.weight} if sequential else view.stacks
    h = torch.stack([tokens.mT @ tokens for tokens in view.inputs(seen)["down_proj"]])
    second = prune_by_sparse_gpt(view.weight("down_proj"), h, half, tokens=view.tokens)
    made = slim(ml.SparseGPT(pattern="2:4", sequential=sequential), view)
    torch.testing.assert_close(made.matrices["down_proj"].weight, second.weight)


@ANY
@pytest.mark.parametrize("make", [experts_layer, attention_layer])
def test_groups_of_slots_make_no_difference(name: str, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what fits into memory at a time, nor what is worked on at a time."""
    expected = slim(METHODS[name], make())
    monkeypatch.setattr(base_of_methods, "WORK", 1)
    for at_once in (1, 2):
        made = slim(METHODS[name], make(at_once=at_once))
        for stack, matrix in expected.matrices.items():
            torch.testing.assert_close(dense(made.matrices[stack]), dense(matrix), rtol=1e-9, atol=1e-11)
            assert made.statuses[stack] == expected.statuses[stack]
            if expected.errors is not None:
                torch.testing.assert_close(made.errors[stack], expected.errors[stack], rtol=1e-9, atol=1e-12)


def test_q_k_and_v_are_measured_together() -> None:
    for method in (ml.Wanda(sparsity=0.5), ml.SparseGPT(sparsity=0.5), ml.GPTQ(**ROUNDED)):
        view = attention_layer()
        slim(method, view)
        assert view.passes == [("q_proj", (0,)), ("o_proj", (0,))]


@ANY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starved_experts(name: str, dtype: torch.dtype) -> None:
    """None, one and two tokens: something sensible is made of each, and said."""
    method = METHODS[name]
    for use_fallback in (False, True):
        view = experts_layer(
            slots=4, dtype=dtype, counts=[0, 1, 2, 60], min_tokens=32, use_fallback=use_fallback, tokens=64
        )
        made = slim(method, view)
        for stack, matrix in made.matrices.items():
            weight = dense(matrix)
            assert weight.isfinite().all()
            # Nothing has become all zeros.
            assert (weight.count_nonzero((1, 2)) >= weight[0].numel() // 4).all()
            if isinstance(matrix, Pruned):
                zeros = (~matrix.keep).flatten(1).sum(1)
                assert (zeros == weight[0].numel() // 2).all()
            if name in UNMEASURED:
                continue
            kind = "magnitude" if isinstance(matrix, Pruned) else "rtn"
            own = made.statuses[stack][3]
            assert "fallback" not in own
            said = [f"{kind} fallback: {count}" for count in ("0 tokens", "1 token", "2 tokens")]
            few = [own, own]
            if name.startswith(("gptq", "sparsegpt")):
                # 32 or 16 inputs, for one token and for two.
                few = [f"{own} damp x{times}" for times in ((3000, 1000) if stack == "gate_up_proj" else (1000, 1000))]
            expected = [*said, own] if use_fallback else [said[0], *few, own]
            assert list(made.statuses[stack]) == expected
            measured = made.errors[stack].isfinite().tolist()
            assert measured == ([False] * 3 + [True] if use_fallback else [False, True, True, True])
        if use_fallback and name.startswith("gptq"):
            nearest = slim(ml.RTN(**ROUNDED), view)
            for stack in view.matrices:
                assert torch.equal(made.matrices[stack].codes[:3], nearest.matrices[stack].codes[:3])


@pytest.mark.parametrize("name", ["gptq", "gptq desc_act", "awq", "rtn"])
def test_rounding_after_pruning_keeps_zeros(name: str) -> None:
    view = experts_layer()
    pruned = slim(ml.SparseGPT(pattern="2:4"), view)
    stacks = {stack: matrix.weight for stack, matrix in pruned.matrices.items()}
    masks = {stack: matrix.keep for stack, matrix in pruned.matrices.items()}
    again = experts_layer()
    later = LayerInMemory(
        "experts", stacks, again.inputs, again.gates, norm=again.norm_weight, router=again.router_weight, masks=masks
    )
    made = slim(METHODS[name], later)
    for stack in later.matrices:
        assert (dense(made.matrices[stack])[~masks[stack]] == 0).all()


@pytest.mark.parametrize("kind", [ml.Magnitude, ml.Wanda, ml.SparseGPT])
def test_pruning_twice_nests(kind: type) -> None:
    view = experts_layer()
    masks: dict[str, Tensor] = {}
    for share in (0.25, 0.5, 0.75):
        view.masks = masks
        made = slim(kind(sparsity=share), view)
        for stack, matrix in made.matrices.items():
            assert stack not in masks or not (matrix.keep & ~masks[stack]).any()
            assert (~matrix.keep).sum() == share * matrix.keep.numel()
            # What training does in between.
            view.stacks[stack] = matrix.weight * 1.1
        masks = {stack: matrix.keep for stack, matrix in made.matrices.items()}
