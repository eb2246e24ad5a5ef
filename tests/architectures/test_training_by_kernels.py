"""Compressed models whose experts train by the Triton kernels: loss and every gradient are those of plain torch."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="these are tests of the way to Triton kernels, and triton is not installed")
pytest.importorskip("moe_kernels.triton_kernels.training.operation")

from moe_lightning.experts import kernel_path
from moe_lightning.experts.kernel_path import use_kernels
from moe_lightning.experts.lora import lora_stacks
from moe_lightning.plan import AddLora, Edit, KeepChannels, KeepExperts, NoviceExperts, Quantize, Sparsify
from tests.architectures.compressed_models import DEVICE, SIZES, fill_new, tokens
from tests.kernels.triton.problems import relative_error
from tests.packed import packed_mixtral

NOVICES = NoviceExperts(0, (0, 2, 4), "low_rank", (3, 0, 1))
INT4 = Quantize(0, group_size=64)
MODELS: dict[str, tuple[Edit, ...]] = {
    "dense": (KeepExperts(0, (0, 1, 3)),),
    "channels": (KeepChannels(0, 32),),
    "only novices": (NoviceExperts(0, (0, 1, 2, 3, 4, 5)),),
    "int4 and novices": (NOVICES, INT4),
    "dense with terms": (NOVICES, AddLora(0, rank=3)),
    "int4 with terms": (NOVICES, INT4, AddLora(0, rank=2)),
}
"""Edits of the only layer by name."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Note for each sum over experts whether these kernels knew it."""
    found: list[bool] = []
    operation = kernel_path.train_by_kernels

    def noted(*arguments: Any) -> Tensor | None:
        result = operation(*arguments)
        found.append(result is not None)
        return result

    monkeypatch.setattr("moe_lightning.experts.compressed.train_by_kernels", noted)
    return found


PRUNED_INT4 = (Sparsify(0, pattern="2:4"), INT4, AddLora(0, rank=2))


def make_model(*edits: Edit, dtype: torch.dtype = torch.float32) -> Any:
    return fill_new(packed_mixtral(edits, dtype=dtype, **{**SIZES, "num_hidden_layers": 1})).to(DEVICE)


def step(model: Any, use: kernel_path.Use) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and gradients of a step with everything that can train."""
    model = copy.deepcopy(model).train()
    ids = tokens(6)
    with use_kernels(use):
        loss = model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True).loss
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(gradients) == sum(parameter.requires_grad for parameter in model.parameters())
    return loss.detach(), gradients


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_torch(name: str, calls: list[bool]) -> None:
    model = make_model(*MODELS[name])
    want_loss, want = step(model, "off")
    assert not calls
    got_loss, got = step(model, "always")
    assert calls == [name != "only novices"]
    assert relative_error(got_loss, want_loss) <= 1e-5
    assert got.keys() == want.keys()
    for key, gradient in want.items():
        if gradient.any():
            assert relative_error(got[key], gradient) <= 1e-4, key
        else:  # the first half of a term whose second half is zero, or an expert that nobody chose
            assert not got[key].any(), key


@pytest.mark.parametrize("name", ["dense with terms", "int4 with terms"])
def test_low_rank_terms_count_where_nothing_trains(name: str, calls: list[bool]) -> None:
    model = make_model(*MODELS[name])
    found = {}
    uses: tuple[kernel_path.Use, ...] = ("off", "always")
    for use in uses:
        with torch.no_grad(), use_kernels(use):
            found[use] = model(input_ids=tokens(5)).logits
    assert calls == [True] and relative_error(found["always"], found["off"]) <= 1e-5
    with torch.no_grad(), use_kernels("always"):
        for stack in lora_stacks(model).values():
            stack.lora_B.zero_()
        assert relative_error(model(input_ids=tokens(5)).logits, found["off"]) > 1e-3


@pytest.mark.parametrize("gone", ["gate_up_lora", "down_lora"])
def test_a_term_beside_one_projection_alone(gone: str, calls: list[bool]) -> None:
    model = make_model(*MODELS["int4 with terms"])
    setattr(model.model.layers[0].mlp.experts.storage, gone, None)
    (want_loss, want), (got_loss, got) = step(model, "off"), step(model, "always")
    assert calls == [True] and relative_error(got_loss, want_loss) <= 1e-5
    assert all(relative_error(got[key], gradient) <= 1e-4 for key, gradient in want.items() if gradient.any())


@pytest.mark.parametrize(
    ("edits", "dtype", "known"),
    [
        ((Sparsify(0, pattern="2:4"),), torch.float32, [False]),
        ((Quantize(0, bits=8, group_size=64),), torch.float32, []),
        ((KeepExperts(0, (0, 1, 3)),), torch.float64, []),
        # There the terms are cut to the weights that are left, which the kernels do not do.
        (PRUNED_INT4, torch.float32, []),
    ],
    ids=["2:4", "int8", "float64", "terms beside int4 of 2:4"],
)
def test_what_these_kernels_do_not_know_trains_by_torch(
    edits: tuple[Edit, ...], dtype: torch.dtype, known: list[bool], calls: list[bool]
) -> None:
    model = make_model(*edits, dtype=dtype)
    (want_loss, want), (got_loss, got) = step(model, "off"), step(model, "always")
    assert calls == known
    assert torch.equal(got_loss, want_loss) and all(torch.equal(got[key], want[key]) for key in want)


def test_pruned_int4_goes_by_the_kernels_where_there_are_no_terms(calls: list[bool]) -> None:
    """Only where a term is cut do the kernels step back, and integers stay in the form that they have then."""
    model = make_model(*PRUNED_INT4)
    storage = model.model.layers[0].mlp.experts.storage
    step(model, "always")
    assert not calls and not storage.gate_up_proj.in_kernel_form
    storage.gate_up_lora = storage.down_lora = None
    (want_loss, _), (got_loss, _) = step(model, "off"), step(model, "always")
    assert calls == [True] and relative_error(got_loss, want_loss) <= 1e-5
