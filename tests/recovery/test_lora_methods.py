"""LoRA and MergeLoRA as methods: how terms begin, what merging says and does, and who may not work beside terms."""

import copy
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

import moe_lightning as ml
from moe_lightning.compression import adapters
from moe_lightning.compression.adapters import places_of
from moe_lightning.experts import WeightStack
from moe_lightning.experts.lora import lora_stacks
from moe_lightning.plan import Quantize
from moe_lightning.surgery import plan_of
from tests.lora import BASES, adapted_mixtral, whole_matrices, whole_matrix
from tests.models import random_batches, tiny_mixtral
from tests.packed import packed
from tests.recovery.lora_ranks import RANKED, adapt, run_rank

ANY_BASE = pytest.mark.parametrize("base", BASES)
INPUTS = random_batches(1, 2, 9, seed=5)[0]["input_ids"]
CALIBRATION = random_batches(4, 2, 16, seed=6)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


def compress(model: Any, *methods: Any, batches: Any = None, **options: Any) -> ml.CompressionResult:
    return ml.compress(model, batches, list(methods), progress=False, min_tokens=1, **options)


# ---------------------------------------------------------------- LoRA


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a number from 1 on, got 0"),
        ({"rank": 2.0}, "rank must be a number from 1 on"),
        ({"rank": True}, "rank must be a number from 1 on"),
        ({"alpha": 0}, "alpha must be positive, or None for twice the rank"),
        ({"alpha": -1.0}, "alpha must be positive"),
        ({"targets": "router"}, "targets must be one of experts, attention, experts\\+attention, got 'router'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ml.LoRA(**options)


def test_terms_begin_as_in_the_paper_and_change_nothing() -> None:
    model, other = tiny_mixtral(), tiny_mixtral()
    before = logits(model)
    compress(model, ml.LoRA(rank=8))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-6)
    for name, stack in lora_stacks(model).items():
        bound = stack.lora_A.shape[2] ** -0.5
        assert stack.alpha == 16.0 and not stack.lora_B.any(), name
        assert stack.lora_A.abs().max() <= bound
        # Uniform: a mean of zero and a variance of a third of the squared bound.
        assert abs(float(stack.lora_A.mean())) < 5 * bound / stack.lora_A.numel() ** 0.5
        assert float(stack.lora_A.var()) == pytest.approx(bound**2 / 3, rel=0.2)
    drawn = [stack.lora_A.flatten()[:64] for stack in lora_stacks(model).values()]
    assert all(not torch.equal(a, b) for n, a in enumerate(drawn) for b in drawn[:n])
    with torch.random.fork_rng():
        torch.manual_seed(123)  # whatever the global generator says
        compress(other, ml.LoRA(rank=8))
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items())
    third = tiny_mixtral()
    compress(third, ml.LoRA(rank=8, seed=1))
    one, another = (next(iter(lora_stacks(item).values())).lora_A for item in (model, third))
    assert not torch.equal(one, another)


@pytest.mark.parametrize("targets", ["experts", "attention", "experts+attention"])
def test_only_the_targets_get_terms(targets: Any) -> None:
    model = tiny_mixtral()
    compress(model, ml.LoRA(rank=2, targets=targets))
    found = {name.partition(".layers.")[2].split(".")[1] for name in lora_stacks(model)}
    assert found == {{"experts": "mlp", "attention": "self_attn"}[target] for target in targets.split("+")}


def test_layers_without_real_experts_and_layers_that_went_get_none() -> None:
    model = tiny_mixtral()
    compress(model, ml.Novices(keep=0, criterion="random"), ml.BlockDrop(count=1), batches=CALIBRATION)
    with pytest.raises(ValueError, match="no layer has a real expert to put a term beside"):
        compress(model, ml.LoRA(rank=2, targets="experts"))
    compress(model, ml.LoRA(rank=2))
    assert len(lora_stacks(model)) == 2 * 4


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = ml.build(tiny_mixtral().config)
    compress(model, ml.LoRA(rank=2), ml.MergeLoRA())
    assert all(parameter.is_meta for parameter in model.parameters())


# ---------------------------------------------------------------- MergeLoRA


def exact(base: str) -> bool:
    return not any("quant" in edit.kind for edit in BASES[base])


@ANY_BASE
def test_merged_weights_are_those_computed_by_hand(base: str) -> None:
    model = adapted_mixtral(base)
    wanted, before = whole_matrices(model), logits(model)
    old = {key: unpacked_weight(model, key) for key in wanted}
    result = compress(model, ml.MergeLoRA())
    assert not lora_stacks(model) and plan_of(model) == result.plan
    after = {key: unpacked_weight(model, key) for key in wanted}
    for key, expected in wanted.items():
        found = after[key]
        assert (found - old[key]).abs().max() > 1e-3
        if exact(base):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, msg=str(key))
        # Pruned weights are zero after as before.
        stack = _place(model, key).weight
        if isinstance(stack, WeightStack) and (stack.format.sparsity or stack.format.pattern):
            assert not found[old[key] == 0].any()
    if exact(base):
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert exact(base) == (not any("rounded" in text for text in said(result)))


def said(result: ml.CompressionResult) -> list[str]:
    found = [text for status in result.modules.values() for text in status.matrices.values()]
    assert found
    return found


def unpacked_weight(model: Any, key: tuple[int, str]) -> Tensor:
    return whole_matrix(_place(model, key).weight, None).clone()


def _place(model: Any, key: tuple[int, str]) -> Any:
    target = "experts" if key[1] in ("gate_up_proj", "down_proj") else "attention"
    return places_of(model, key[0], target)[key[1]]


@pytest.mark.parametrize("base", ["int4", "int4 symmetric", "int8", "everything", "int4 of 2:4"])
def test_the_loss_that_is_stated_is_that_of_rounding_in_numpy(base: str) -> None:
    model = adapted_mixtral(base)
    wanted = whole_matrices(model)
    before = {key: unpacked_weight(model, key) for key in wanted}
    formats = {key: _place(model, key).weight.format for key in wanted if _is_packed(model, key)}
    result = compress(model, ml.MergeLoRA())
    checked = 0
    for (layer, name), format in formats.items():
        # Rounded by the tests' own code; the scale is a bf16 number there too.
        again = packed(wanted[layer, name].float(), format)[1]
        found = unpacked_weight(model, (layer, name)).numpy()
        step = numpy.abs(again).max() / (2 ** (format.bits or 4) - 1)
        assert numpy.abs(found - again).max() <= 2.1 * step and numpy.mean(numpy.abs(found - again)) < 0.05 * step
        target = wanted[layer, name].numpy()
        term = target - before[layer, name].numpy()
        for slot, lost in enumerate(result_losses(result, layer, name)):
            expected = numpy.square(found[slot] - target[slot]).sum() / numpy.square(term[slot]).sum()
            assert lost == pytest.approx(expected, rel=1e-3)
            assert 0 < lost < 1
            checked += 1
    assert checked
    assert any("rounded again (rtn)" in text for text in said(result))


def _is_packed(model: Any, key: tuple[int, str]) -> bool:
    return isinstance(_place(model, key).weight, WeightStack)


def result_losses(result: ml.CompressionResult, layer: int, name: str) -> list[float]:
    module = f"model.layers.{layer}." + ("mlp.experts" if name in ("gate_up_proj", "down_proj") else "self_attn")
    losses = result.modules[module].losses
    return [lost for key, lost in losses.items() if key == name or key.endswith(f".{name}")]


def test_terms_of_zero_lose_nothing_and_say_so() -> None:
    model = tiny_mixtral()
    compress(model, ml.RTN(group_size=16))
    compress(model, ml.LoRA(rank=2, targets="experts"))
    stack = model.model.layers[1].mlp.experts.storage.gate_up_lora
    with torch.no_grad():
        stack.lora_B[2].fill_(0.3)  # one expert only
    result = compress(model, ml.MergeLoRA())
    status = result.modules["model.layers.1.mlp.experts"]
    assert status.matrices["0.gate_up_proj"].endswith("merged a term that is zero, rounded again (rtn)")
    assert status.losses["0.gate_up_proj"] == 0.0 < status.losses["2.gate_up_proj"]


@pytest.mark.parametrize("base", ["int4", "int8", "everything", "int4 of 2:4"])
def test_integers_left_in_floating_point_lose_nothing(base: str) -> None:
    model = adapted_mixtral(base)
    wanted, before = whole_matrices(model), logits(model)
    result = compress(model, ml.MergeLoRA(dequantize=True))
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    for key, expected in wanted.items():
        torch.testing.assert_close(unpacked_weight(model, key), expected, rtol=1e-6, atol=1e-7)
        assert max(result_losses(result, *key)) < 1e-9
    assert any("integers spelled out" in text for text in said(result))
    kept = [stack for stack in model.modules() if isinstance(stack, WeightStack)]
    assert all(not stack.format.quantized and stack.format.pattern == "2:4" for stack in kept)
    assert bool(kept) == (base == "int4 of 2:4")
    # A better rounding than to the nearest may follow, in one call with the merging too.
    compress(model, ml.GPTQ(group_size=16), batches=CALIBRATION, max_fallback=1.0)


def test_merged_and_rounded_with_calibration_in_one_call() -> None:
    model = adapted_mixtral("int4", targets="experts")
    before = logits(model)
    result = compress(model, ml.MergeLoRA(dequantize=True), ml.GPTQ(group_size=16), batches=CALIBRATION)
    assert [edit.kind for edit in result.plan.edits[-6:]] == ["merge_lora"] * 3 + ["quantize"] * 3
    assert (logits(model) - before).norm() < 0.5 * before.norm()
    texts = [text for text in said(result) if "gptq" in text]
    assert texts and all(text.startswith("merged, integers spelled out, then gptq") for text in texts)


def test_in_half_precision_sums_are_rounded_once() -> None:
    model = adapted_mixtral("dense", dtype=torch.bfloat16)
    wanted = whole_matrices(model)
    compress(model, ml.MergeLoRA())
    for key, expected in wanted.items():
        assert torch.equal(unpacked_weight(model, key), expected.float().bfloat16().double())


class Trouble(RuntimeError):
    pass


def everything_of(model: Any) -> dict[str, Tensor]:
    # Buffers by way of the state dict: packed weights are held in the form that was last used.
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.state_dict().items())}


@pytest.mark.parametrize("base", ["dense", "everything", "2:4", "unstructured", "int4 of 2:4"])
@pytest.mark.parametrize("dequantize", [False, True])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(
    base: str, dequantize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted_mixtral(base)
    state, plan, kind = everything_of(model), plan_of(model), type(model)
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    before = logits(model)
    optimizer = torch.optim.AdamW(model.parameters())
    write, calls = adapters._write, []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 15:
            raise Trouble
        return write(*args)

    monkeypatch.setattr(adapters, "_write", failing)
    with pytest.raises(Trouble):
        compress(model, ml.MergeLoRA(dequantize=dequantize), optimizers=[optimizer])
    assert len(calls) == 15
    assert (plan_of(model), type(model)) == (plan, kind)
    assert everything_of(model).keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in everything_of(model).items())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == objects
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def test_what_is_not_finite_is_refused_and_nothing_is_merged() -> None:
    model = adapted_mixtral("dense", dtype=torch.float16)
    stack = model.model.layers[2].mlp.experts.storage.down_lora
    with torch.no_grad():
        stack.lora_A.fill_(200.0)
        stack.lora_B.fill_(200.0)
    state = everything_of(model)
    with pytest.raises(RuntimeError, match=r"low-rank terms folded in are not finite in torch\.float16"):
        compress(model, ml.MergeLoRA())
    assert all(torch.equal(tensor, state[name]) for name, tensor in everything_of(model).items())


def test_undone_after_the_integers_went_through_the_form_of_a_cpu() -> None:
    """A pass in bf16 holds integers in torch's own form: what was stored before must come back all the same."""
    model = adapted_mixtral(
        [Quantize(layer, target, group_size=32) for layer in (0, 1) for target in ("attention", "experts")],
        dtype=torch.bfloat16,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
    )
    state, before = {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits(model)
    result = compress(model, ml.MergeLoRA(), reversible=True)
    assert not torch.equal(logits(model), before)
    result.undo()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), before)


def test_a_model_without_terms_has_nothing_to_merge() -> None:
    with pytest.raises(ValueError, match="MergeLoRA: the model has no low-rank terms: put LoRA"):
        compress(tiny_mixtral(), ml.MergeLoRA())


def test_terms_twice_are_refused_before_anything_is_done() -> None:
    model = adapted_mixtral()
    state = everything_of(model)
    with pytest.raises(ValueError, match=r"ha(s|ve) low-rank terms already: merge them first"):
        compress(model, ml.LoRA(rank=2))
    assert all(torch.equal(tensor, state[name]) for name, tensor in everything_of(model).items())


# ---------------------------------------------------------------- other methods beside terms


@pytest.mark.parametrize(
    "method",
    [
        ml.ExpertDrop(ratio=0.25),
        ml.Novices(ratio=0.5),
        ml.Merge(ratio=0.5),
        ml.ChannelDrop(ratio=0.4),
        ml.GPTQ(group_size=16),
        ml.AWQ(group_size=16),
        ml.RTN(group_size=16),
        ml.Wanda(sparsity=0.5),
        ml.SparseGPT(pattern="2:4"),
        ml.Magnitude(sparsity=0.5),
    ],
    ids=lambda method: type(method).__name__,
)
def test_methods_that_change_such_matrices_refuse_before_any_work(method: Any) -> None:
    model = adapted_mixtral()
    state = everything_of(model)
    read: list[int] = []

    def batches() -> Any:
        read.append(1)
        yield from CALIBRATION

    with pytest.raises(ValueError, match=r"low-rank terms: fold .* MergeLoRA in front"):
        compress(model, method, batches=batches())
    assert not read, "calibration data was read before"
    assert all(torch.equal(tensor, state[name]) for name, tensor in everything_of(model).items())
    # In one call with the merging they work.
    compress(model, ml.MergeLoRA(), method, batches=CALIBRATION, max_fallback=1.0)


def test_attention_with_terms_may_stand_beside_experts_that_are_made_smaller() -> None:
    model = adapted_mixtral(targets="attention")
    before = whole_matrices(model)
    compress(model, ml.Novices(ratio=0.5), ml.GPTQ(group_size=16), batches=CALIBRATION, max_fallback=1.0)
    assert len(lora_stacks(model)) == 12
    compress(model, ml.MergeLoRA())
    for layer in range(3):
        torch.testing.assert_close(unpacked_weight(model, (layer, "q_proj")), before[layer, "q_proj"])


@pytest.mark.parametrize("method", [ml.LayerDrop(count=1), ml.BlockDrop(count=1), ml.Angular(count=1)])
def test_methods_that_drop_layers_take_their_terms_along(method: Any) -> None:
    model = adapted_mixtral()
    result = compress(model, method, batches=CALIBRATION)
    assert result.touched == result.claimed
    compress(model, ml.MergeLoRA())


@pytest.mark.parametrize("base", ["dense", "int4", "2:4"])
def test_statistics_of_a_model_with_terms_are_those_of_the_merged_model(base: str) -> None:
    plain_loops: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = adapted_mixtral(base, dtype=torch.float64, **plain_loops)
    twin = copy.deepcopy(model)
    compress(twin, ml.MergeLoRA(dequantize=True))
    needs = ["routing", "outputs", "pairs", "channels", "layers", "blocks", "similarity", "interventions"]
    found, expected = (ml.collect(item, CALIBRATION, needs, progress=False) for item in (model, twin))
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-6, atol=1e-8, msg=name)
    assert found.info["weights"] == pytest.approx(expected.info["weights"], rel=1e-9)
    with pytest.raises(ValueError, match="were measured on other weights"):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.model.layers[1].mlp.experts.storage.down_lora.lora_B.mul_(1.01)
        compress(other, ml.LayerDrop(count=1), batches=CALIBRATION, statistics=found)
    given = ml.collect(model, CALIBRATION, {"layers"}, progress=False)
    compress(model, ml.LayerDrop(count=1), batches=CALIBRATION, statistics=given)


# ---------------------------------------------------------------- several processes


def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.spawn(run_rank, args=(2, str(tmp_path)), nprocs=2)
    one, other = (torch.load(tmp_path / f"adapted.{rank}.pt") for rank in range(2))
    for base in RANKED:
        alone = adapt(base, 0)
        assert one[base].keys() == other[base].keys() == alone.keys()
        for name, tensor in alone.items():
            assert torch.equal(one[base][name], tensor), f"{base}: {name} is not that of one process"
            assert torch.equal(other[base][name], tensor), f"{base}: {name} differs between the ranks"
