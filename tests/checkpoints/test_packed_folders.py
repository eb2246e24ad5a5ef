"""Folders of models with packed matrices: bytes, a fresh process, and what transformers does with them by itself."""

import copy
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.checkpoints import check_checkpoint
from moe_lightning.experts import Int4, Int8, Masked, WeightStack
from moe_lightning.plan import NoviceExperts, Quantize, Sparsify
from moe_lightning.surgery import CompressedMixtralForCausalLM, plan_of
from tests.models import random_batches, tiny_mixtral
from tests.packed import EDITS, everywhere, packed_mixtral

ROOT = Path(__file__).resolve().parents[2]
INPUTS = random_batches(1, 2, 9, seed=5)[0]["input_ids"]
CODED = ("words", "scale", "zero", "codes", "metadata", "bits")
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_local_experts": 4}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


def error_of(found: Tensor, expected: Tensor) -> float:
    """Return the median over tokens of the relative error: in another type, a token may pick another expert."""
    return float(((found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def entries(folder: Path) -> dict[str, int]:
    """Read the bytes of every tensor from the headers of the weight files, without any library."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found |= {name: end - start for name, entry in header.items() for start, end in [entry["data_offsets"]]}
    return found


def stacks_of(model: Any) -> dict[str, WeightStack]:
    return {name: module for name, module in model.named_modules() if isinstance(module, WeightStack)}


def coded(model: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[2] in CODED}


def assert_same_codes(model: Any, other: Any) -> None:
    before, after = coded(model), coded(other)
    assert before and before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype, name


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Write a model of every kind."""
    folder = tmp_path_factory.mktemp("packed")
    models = {name: packed_mixtral(edits) for name, edits in EDITS.items()}
    for name, model in models.items():
        ml.save_pretrained(model, folder / name)
    return models, folder


@pytest.fixture(scope="module")
def loaded(written: Any) -> dict[str, Any]:
    """Load all in one fresh process: weights and logits."""
    _, folder = written
    torch.save(INPUTS, folder / "inputs.pt")
    subprocess.run([sys.executable, "-m", "tests.fresh_process", str(folder)], check=True, cwd=ROOT)
    return torch.load(folder / "logits.pt")


@pytest.mark.parametrize("name", EDITS)
def test_a_fresh_process_reads_what_was_written(name: str, written: Any, loaded: Any) -> None:
    model, folder = written[0][name], written[1] / name
    state, got = loaded[name]
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    torch.testing.assert_close(got, logits(model), rtol=0, atol=2e-6)
    again = ml.from_pretrained(folder)
    assert all(stack.values is None for stack in stacks_of(again).values() if isinstance(stack, Masked))
    assert check_checkpoint(folder)["model_type"] == "moe_lightning_mixtral"


@pytest.mark.parametrize("name", EDITS)
def test_bytes_of_the_files_are_those_of_the_shape(name: str, written: Any) -> None:
    model, folder = written[0][name], written[1] / name
    shape = architecture_of(model).shape(model)
    assert sum(entries(folder).values()) == shape.bytes
    if not any(isinstance(stack, Masked) for stack in stacks_of(model).values()):
        assert ml.measure(model).bytes == shape.bytes
    assert ml.measure(model).parameters == ml.measure(tiny_mixtral()).parameters


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("target", ["experts", "attention"])
def test_bytes_of_an_int4_model(target: Any, symmetric: bool, tmp_path: Path) -> None:
    """Of bf16: 4.16 / 16 on disk with zero points, and in memory as on disk."""
    edits = everywhere(Quantize(0, target, group_size=128, symmetric=symmetric), layers=2)
    model = packed_mixtral(edits, dtype=torch.bfloat16, **WIDE)
    ml.save_pretrained(model, tmp_path / "out")
    sizes = entries(tmp_path / "out")
    stacks = stacks_of(model)
    packed = sum(size for name, size in sizes.items() if name.rpartition(".")[0] in stacks)
    dense = 2 * sum(stack.num_weights for stack in stacks.values())
    assert packed / dense == pytest.approx(
        (4.125 if symmetric else 4.15625) / 16, rel=0 if symmetric else 0.03, abs=0.02
    )
    assert packed / dense == pytest.approx(4.16 / 16, rel=0.03)
    size = ml.measure(model)
    assert size.bytes == sum(sizes.values()) == architecture_of(model).shape(model).bytes
    logits(model)  # what works on a CPU may take another form, of 4.25 bits
    assert ml.measure(model).bytes <= size.bytes + 0.1 * packed
    again = ml.save_pretrained(model, tmp_path / "again")
    assert entries(again) == sizes
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["everything", "2:4", "unstructured", "int8", "attention int4"])
def test_transformers_loads_in_another_type(name: str, dtype: torch.dtype, written: Any) -> None:
    """Whatever the weights are computed in, codes and scales are those in the file."""
    model, folder = written[0][name], written[1] / name
    for options in ({"dtype": dtype}, {"dtype": str(dtype).removeprefix("torch."), "device_map": None}):
        other = AutoModelForCausalLM.from_pretrained(folder, **options)
        assert type(other) is CompressedMixtralForCausalLM
        assert other.dtype == dtype
        assert {parameter.dtype for parameter in other.parameters()} == {dtype}
        assert {stack.dtype for stack in stacks_of(other).values()} == {dtype}
        assert_same_codes(model, other)
        error = error_of(logits(other), logits(model))
        assert error < {torch.float32: 1e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]


@pytest.mark.parametrize("name", ["everything", "2:4", "unstructured"])
def test_transformers_writes_and_reads_by_itself(name: str, written: Any, tmp_path: Path) -> None:
    model = written[0][name]
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    narrow.save_pretrained(tmp_path / "own", max_shard_size="40KB")
    assert len(list((tmp_path / "own").glob("*.safetensors"))) > 1
    assert AutoConfig.from_pretrained(tmp_path / "own").model_type == "moe_lightning_mixtral"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype="auto")
    assert again.dtype == torch.bfloat16
    state = narrow.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
    assert_same_codes(model, again)
    # And from there wider again: what fp32 had beyond bf16 is lost, codes and scales are not.
    wide = CompressedMixtralForCausalLM.from_pretrained(tmp_path / "own", dtype=torch.float32)
    assert_same_codes(model, wide)
    result, info = AutoModelForCausalLM.from_pretrained(tmp_path / "own", output_loading_info=True)
    assert not any(info.values()) and isinstance(result, CompressedMixtralForCausalLM)


@pytest.mark.parametrize("name", ["everything", "2:4", "unstructured"])
def test_what_a_model_of_transformers_can_do(name: str, written: Any) -> None:
    model = copy.deepcopy(written[0][name])
    expected = logits(model)
    plain = tiny_mixtral()
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
    trainable = sum(parameter.numel() for parameter in model.parameters())
    assert model.num_parameters(only_trainable=True) == trainable
    assert model.get_memory_footprint() > 0
    half = copy.deepcopy(model).half()
    assert_same_codes(model, half)
    assert error_of(logits(half), expected) < 3e-3
    assert torch.equal(logits(model), expected)
    model.resize_token_embeddings(64)
    assert torch.equal(logits(model), expected)
    model.resize_token_embeddings(70)
    torch.testing.assert_close(logits(model)[..., :64], expected, rtol=0, atol=2e-6)
    assert plan_of(model) == plan_of(written[0][name])


@pytest.mark.parametrize("name", EDITS)
def test_cached_generation_equals_uncached(name: str, written: Any) -> None:
    model = written[0][name]
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(INPUTS), "eos_token_id": None}
    cached = model.generate(INPUTS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(INPUTS, use_cache=False, **options))
    assert cached.shape == (2, 15)


def test_pruned_models_as_plain_ones(written: Any, tmp_path: Path) -> None:
    """With their zeros written out, transformers alone loads them; integers it cannot hold."""
    for name in ("2:4", "unstructured", "attention 2:4 and unstructured"):
        model = written[0][name]
        plain = ml.from_pretrained(ml.save_pretrained(model, tmp_path / name, format="transformers"))
        assert type(plain) is MixtralForCausalLM
        torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=2e-6)
    for name, reason in {
        "int4": r"layers \[0, 1, 2\] have experts of integers",
        "attention int4": r"layers \[0, 1, 2\] have attention matrices of integers",
    }.items():
        with pytest.raises(ValueError, match=reason):
            ml.save_pretrained(written[0][name], tmp_path / "no", format="transformers")
    assert not (tmp_path / "no").exists()


def test_scales_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    model = packed_mixtral(EDITS["int8"])
    stack = next(module for module in model.modules() if isinstance(module, Int8))
    stack.scale[0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"mlp.experts.storage.gate_up_proj.scale is not finite: nothing was written"):
        ml.save_pretrained(model, tmp_path / "out")


def test_a_folder_without_its_scales_is_refused(written: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "out"
    ml.save_pretrained(written[0]["int4"], folder)
    state = load_file(folder / "model.safetensors")
    state.pop("model.layers.1.mlp.experts.storage.down_proj.scale")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config.*missing.*down_proj.scale"):
        ml.from_pretrained(folder)


def test_the_card_names_formats(written: Any) -> None:
    card = (written[1] / "everything/README.md").read_text()
    assert "Attention of layers 0 1 2: int8, group 16, asymmetric" in card
    assert "(int4, group 16, asymmetric)" in card
    assert "(100.0% of 97,056)" in card


def test_a_block_compiled(written: Any) -> None:
    block = copy.deepcopy(written[0]["int4"].model.layers[0].mlp)
    assert isinstance(block.experts.storage.down_proj, Int4)
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = block(hidden)
        torch.testing.assert_close(torch.compile(block, backend="eager")(hidden), expected, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITS)
def test_models_compiled(name: str, written: Any) -> None:
    model = copy.deepcopy(written[0][name])
    expected = logits(model)
    torch.testing.assert_close(logits(torch.compile(model, backend="eager")), expected, rtol=0, atol=2e-6)


def test_novices_and_int4_in_one_folder(tmp_path: Path) -> None:
    """Novices stay in floating point, in the type of the model."""
    edits = (
        *everywhere(NoviceExperts(0, (1, 4))),
        *everywhere(Quantize(0, group_size=16)),
        Sparsify(0, "attention", pattern="2:4"),
    )
    model = packed_mixtral(edits, dtype=torch.bfloat16)
    again = ml.from_pretrained(ml.save_pretrained(model, tmp_path / "out"))
    for layer in again.model.layers:
        assert layer.mlp.experts.novices.dtype == torch.bfloat16
        assert layer.mlp.experts.storage.num_slots == 4
    assert torch.equal(logits(again), logits(model))
