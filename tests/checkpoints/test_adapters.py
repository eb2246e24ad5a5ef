"""Low-rank terms in a folder of their own: what peft makes of it, and what a live model does."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moe_lightning as ml
from moe_lightning.checkpoints.adapters import OWN_CONFIG, PEFT_CONFIG, WEIGHTS_FILE
from moe_lightning.experts.lora import lora_stacks
from moe_lightning.plan import AddLora, NoviceExperts, Quantize, Sparsify
from moe_lightning.surgery import apply_plan, plan_of
from tests.lora import BASES, adapted_mixtral, fill_terms
from tests.models import random_batches, tiny_mixtral
from tests.packed import apply_filled, everywhere

INPUTS = random_batches(1, 2, 9, seed=5)[0]["input_ids"]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def by_peft(base: Any, folder: Path) -> Any:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as keys that it did not expect
        warnings.simplefilter("ignore", FutureWarning)
        # Said of every pattern for a parameter: it looks among modules. Such patterns do act, as the logits tell.
        warnings.filterwarnings("ignore", ".*keys did not match any targeted module", RuntimeWarning)
        return peft.PeftModel.from_pretrained(base, folder).eval()


# ---------------------------------------------------------------- peft reads what we write


@pytest.mark.parametrize("targets", ["experts", "attention", "experts+attention"])
def test_peft_says_what_the_live_model_says(targets: Any, tmp_path: Path) -> None:
    model = adapted_mixtral(targets=targets)
    expected = logits(model)
    folder = ml.save_adapters(model, tmp_path / "adapters", "somewhere/base")
    base = tiny_mixtral()
    before = logits(base)
    wrapped = by_peft(base, folder)
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(logits(wrapped), expected, rtol=1e-4, atol=2e-5)
    config = json.loads((folder / PEFT_CONFIG).read_text())
    assert config["base_model_name_or_path"] == "somewhere/base" and config["rank_pattern"] == {}
    assert json.loads((folder / OWN_CONFIG).read_text())["why_not_peft"] is None
    # Merged by peft, the weights are those that MergeLoRA makes.
    merged = wrapped.merge_and_unload().state_dict()
    ml.compress(model, None, ml.MergeLoRA(), progress=False)
    assert merged.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6, msg=name)


def test_ranks_that_differ_by_layer_and_layers_without_terms(tmp_path: Path) -> None:
    model = tiny_mixtral()
    terms = (
        AddLora(0, "experts", 3, 5.0),
        AddLora(2, "experts", 3, 2.0),
        AddLora(0, "attention", 4, 8.0),
        AddLora(1, "attention", 3, 5.0),
        AddLora(2, "attention", 3, 5.0),
    )
    apply_plan(model, ml.CompressionPlan(terms))
    fill_terms(model)
    folder = ml.save_adapters(model, tmp_path / "adapters")
    wrapped = by_peft(tiny_mixtral(), folder)
    torch.testing.assert_close(logits(wrapped), logits(model), rtol=1e-4, atol=2e-5)
    other = tiny_mixtral()
    ml.load_adapters(other, folder)
    assert sorted(plan_of(other).edits, key=repr) == sorted(terms, key=repr)
    assert torch.equal(logits(other), logits(model))


def test_peft_reads_terms_beside_the_attention_of_a_compressed_model(tmp_path: Path) -> None:
    edits = [NoviceExperts(1, (0, 3)), Quantize(2, group_size=16)]
    model = adapted_mixtral(edits, targets="attention")
    folder = ml.save_adapters(model, tmp_path / "adapters")
    base = tiny_mixtral()
    apply_filled(base, edits)
    ml.save_pretrained(base, tmp_path / "base")
    wrapped = by_peft(ml.from_pretrained(tmp_path / "base"), folder)
    torch.testing.assert_close(logits(wrapped), logits(model), rtol=1e-4, atol=2e-5)


def test_experts_were_dropped_and_the_base_is_a_plain_folder(tmp_path: Path) -> None:
    model = tiny_mixtral()
    methods = [ml.ExpertDrop(ratio=0.25), ml.BlockDrop(count=1)]
    ml.compress(model, random_batches(3, 2, 11), methods, progress=False)
    ml.save_pretrained(model, tmp_path / "base")
    ml.compress(model, None, ml.LoRA(rank=2), progress=False)
    fill_terms(model)
    folder = ml.save_adapters(model, tmp_path / "adapters", tmp_path / "base")
    wrapped = by_peft(ml.from_pretrained(tmp_path / "base"), folder)
    torch.testing.assert_close(logits(wrapped), logits(model), rtol=1e-4, atol=2e-5)
    plain = ml.from_pretrained(tmp_path / "base")
    ml.load_adapters(plain, folder)
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("edits", "why"),
    [
        (everywhere(Quantize(0, group_size=16)), "the experts of layer 0 are stored as"),
        (everywhere(Sparsify(0, pattern="2:4")), "the experts of layer 0 are stored as"),
        ((NoviceExperts(1, (2,)),), "the experts of layer 1 are not all there, or not alone"),
        ((Quantize(2, "attention", group_size=16),), r"attention matrices of layers \[2\] are packed"),
    ],
)
def test_what_peft_cannot_wrap_it_does_not_get_to_see(edits: Any, why: str, tmp_path: Path) -> None:
    model = adapted_mixtral(edits)
    folder = ml.save_adapters(model, tmp_path / "adapters")
    said = json.loads((folder / OWN_CONFIG).read_text())["why_not_peft"]
    assert re.search(why, said)
    assert {path.name for path in folder.iterdir()} == {WEIGHTS_FILE, OWN_CONFIG}
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match=PEFT_CONFIG):
        peft.PeftModel.from_pretrained(tiny_mixtral(), folder)


# ---------------------------------------------------------------- a live model reads both


@pytest.mark.parametrize("base", BASES)
def test_loaded_beside_the_same_matrices_all_is_as_it_was(base: str, tmp_path: Path) -> None:
    model = adapted_mixtral(base)
    folder = ml.save_adapters(model, tmp_path / "adapters")
    other = tiny_mixtral()
    apply_filled(other, BASES[base])
    plan = ml.load_adapters(other, folder)
    assert plan == plan_of(other) and plan.edits == plan_of(model).edits
    assert torch.equal(logits(other), logits(model))
    state, expected = other.state_dict(), model.state_dict()
    assert state.keys() == expected.keys() and all(
        torch.equal(tensor, state[name]) for name, tensor in expected.items()
    )
    assert all(parameter.requires_grad for stack in lora_stacks(other).values() for parameter in stack.parameters())
    again = ml.save_adapters(other, tmp_path / "again")
    for name in (WEIGHTS_FILE, OWN_CONFIG):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    ml.compress(other, None, ml.MergeLoRA(), progress=False)


def test_novices_and_channels_do_not_mind(tmp_path: Path) -> None:
    edits = [NoviceExperts(0, (1,), "low_rank", (3,)), NoviceExperts(2, (0, 1, 2, 3, 4, 5)), ml.KeepChannels(1, 20)]
    model = adapted_mixtral(edits)
    folder = ml.save_adapters(model, tmp_path / "adapters")
    other = tiny_mixtral()
    apply_filled(other, edits)
    ml.load_adapters(other, folder)
    assert torch.equal(logits(other), logits(model))


def test_in_another_type(tmp_path: Path) -> None:
    model = adapted_mixtral("int4")
    folder = ml.save_adapters(model, tmp_path / "adapters")
    other = tiny_mixtral(dtype=torch.bfloat16)
    apply_filled(other, BASES["int4"])
    ml.load_adapters(other, folder)
    expected = lora_stacks(model)
    for name, stack in lora_stacks(other).items():
        assert torch.equal(stack.lora_A, expected[name].lora_A.bfloat16())
        assert torch.equal(stack.lora_B, expected[name].lora_B.bfloat16())


def warned(model: Any, folder: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ml.load_adapters(model, folder)
    return [str(item.message) for item in found if "saved from a model with other weights" in str(item.message)]


@pytest.mark.parametrize("base", ["dense", "int4", "2:4"])
def test_other_weights_under_the_terms_are_told(base: str, tmp_path: Path) -> None:
    folder = ml.save_adapters(adapted_mixtral(base), tmp_path / "adapters")

    def model(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        found = tiny_mixtral(dtype=dtype, **options)
        apply_filled(found, BASES[base])
        return found

    # Of the terms themselves nothing is in the comparison, and another type rounds.
    assert not warned(model(), folder)
    assert not warned(model(torch.bfloat16), folder)
    routed = model()
    with torch.no_grad():
        routed.model.layers[1].mlp.gate.weight.mul_(1.001)
    (said,) = warned(routed, folder)
    assert "(routers differ)" in said and str(folder) in said
    assert lora_stacks(routed), "it is a warning, no refusal"
    (said,) = warned(model(seed=7), folder)
    assert "(routers and experts differ)" in said
    (said,) = warned(model(torch.bfloat16, seed=7), folder)
    assert "differ)" in said
    # Folders that were written before say nothing of it.
    own = json.loads((folder / OWN_CONFIG).read_text())
    del own["weights"]
    (folder / OWN_CONFIG).write_text(json.dumps(own))
    assert not warned(model(seed=7), folder)


PEFT_TARGETS: dict[str, dict[str, Any]] = {
    "all": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "two of attention": {"target_modules": ["q_proj", "v_proj"]},
    "the first half of the experts": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    "patterns": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {r"layers\.1\.self_attn\.[qv]_proj": 7}},
}


@pytest.mark.parametrize("name", PEFT_TARGETS)
@pytest.mark.parametrize("base", ["dense", "int4"])
def test_what_peft_trained_is_read(name: str, base: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, **PEFT_TARGETS[name]}
    wrapped = peft.get_peft_model(tiny_mixtral(), peft.LoraConfig(**options)).eval()
    draw = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    wrapped.save_pretrained(tmp_path / "peft")
    model = tiny_mixtral()
    apply_filled(model, BASES[base])
    ml.load_adapters(model, tmp_path / "peft")
    assert all(bool(stack.lora_A.any()) for stack in lora_stacks(model).values()), "terms that cannot be trained"
    if base == "dense":
        torch.testing.assert_close(logits(model), logits(wrapped), rtol=1e-4, atol=2e-5)


# ---------------------------------------------------------------- errors


def refused(model: Any, folder: Path, message: str, kind: type[Exception] = ValueError) -> None:
    state, plan = state_of(model), plan_of(model)
    with pytest.raises(kind, match=message):
        ml.load_adapters(model, folder)
    assert plan_of(model) == plan
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return ml.save_adapters(adapted_mixtral("int4"), tmp_path / "adapters")


def int4_base() -> Any:
    model = tiny_mixtral()
    apply_filled(model, BASES["int4"])
    return model


def test_a_model_of_another_structure_is_refused(saved: Path, tmp_path: Path) -> None:
    refused(tiny_mixtral(), saved, "saved from a model of another structure: decoder layer 0 of it was .*int4")
    refused(tiny_mixtral(num_hidden_layers=2), saved, "it had 3 decoder layers, here are 2")
    refused(tiny_mixtral(hidden_size=64), saved, "hidden_size was 32, here it is 64")
    other = tiny_mixtral()
    apply_filled(other, [NoviceExperts(0, (1,)), *BASES["int4"]])
    refused(other, saved, "decoder layer 0 of it was")
    refused(adapted_mixtral("int4"), saved, "has low-rank terms already: merge them first")


def test_folders_that_are_incomplete_or_damaged_are_refused(saved: Path, tmp_path: Path) -> None:
    refused(int4_base(), tmp_path / "nowhere", "nowhere is no folder", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(int4_base(), tmp_path / "empty", "holds neither", FileNotFoundError)
    tensors = load_file(saved / WEIGHTS_FILE)
    first = next(iter(tensors))

    def broken(change: Any, message: str) -> None:
        changed = dict(tensors)
        change(changed)
        save_file(changed, saved / WEIGHTS_FILE)
        refused(int4_base(), saved, message)

    broken(lambda found: found.pop(first.replace("lora_A", "lora_B")), "do not fit|belongs to no matrix")
    broken(lambda found: found.update({first: found[first][:, :5].contiguous()}), "do not fit")
    broken(lambda found: found.update(stranger=torch.zeros(2)), "stranger.* belongs to no matrix of this model")
    broken(lambda found: found.update({first: torch.full_like(found[first], float("nan"))}), "is not finite")
    broken(lambda found: found.clear() or found.update(x=torch.zeros(1)), "belongs to no matrix")
    (saved / WEIGHTS_FILE).unlink()
    refused(int4_base(), saved, "is missing", FileNotFoundError)
    own = json.loads((saved / OWN_CONFIG).read_text())
    (saved / OWN_CONFIG).write_text(json.dumps({**own, "version": 99}))
    refused(int4_base(), saved, "has version 99")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "holds LoRA with use_dora"),
        ({"use_rslora": True}, "holds LoRA with use_rslora"),
        ({"bias": "all"}, "only LoRA without biases is read"),
        ({"peft_type": "IA3"}, "holds IA3"),
    ],
)
def test_other_kinds_of_adapters_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = ml.save_adapters(adapted_mixtral(), tmp_path / "adapters")
    (folder / OWN_CONFIG).unlink()
    config = json.loads((folder / PEFT_CONFIG).read_text())
    ml.load_adapters(tiny_mixtral(), folder)
    (folder / PEFT_CONFIG).write_text(json.dumps({**config, **change}))
    refused(tiny_mixtral(), folder, message)


def test_ranks_that_differ_inside_a_layer_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2})
    peft.get_peft_model(tiny_mixtral(), config).save_pretrained(tmp_path / "peft")
    refused(tiny_mixtral(), tmp_path / "peft", "must have one rank and alpha, not q_proj rank 2 .* v_proj rank 4")


def test_nothing_to_save_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no low-rank terms to save"):
        ml.save_adapters(tiny_mixtral(), tmp_path / "adapters")
    model = adapted_mixtral()
    with torch.no_grad():
        next(iter(lora_stacks(model).values())).lora_B[0, 0] = float("inf")
    with pytest.raises(ValueError, match="is not finite: nothing was written"):
        ml.save_adapters(model, tmp_path / "adapters")
    assert not (tmp_path / "adapters").exists()


def test_a_folder_is_replaced_only_when_asked_and_only_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ml.save_adapters(adapted_mixtral(), tmp_path / "adapters")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = adapted_mixtral(seed=3)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        ml.save_adapters(other, folder)

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("moe_lightning.checkpoints.adapters.save_file", full_disk)
        with pytest.raises(OSError, match="no space"):
            ml.save_adapters(other, folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]
    ml.save_adapters(other, folder, overwrite=True)
    assert (folder / WEIGHTS_FILE).read_bytes() != before[WEIGHTS_FILE]
