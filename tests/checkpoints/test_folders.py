"""Folders: what is written loads again, in a fresh process too; nothing half-written is left."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

import moe_lightning as ml
from moe_lightning.architectures import MixtralArchitecture
from moe_lightning.checkpoints import check_checkpoint, check_format, stored_bytes
from moe_lightning.plan import CompressionPlan, Quantize
from moe_lightning.surgery import plan_of
from tests.models import random_batches, tiny_mixtral

METHODS = {
    "novices": ml.Novices(ratio=0.5),
    "novices everywhere": ml.Novices(ratio=0.99, novice="gate2_mean"),
    "uneven": ml.Novices(ratio=0.4, scope="global", criterion="residual"),
    "drop": ml.ExpertDrop(keep=3),
    "uneven drop": ml.ExpertDrop(keep=3, scope="global"),
}


def compressed(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_mixtral(dtype=dtype)
    ml.compress(model, random_batches(), METHODS[name], progress=False)
    return model


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**random_batches()[0]).logits


def in_fresh_process(code: str, *arguments: object, isolated: bool = False) -> str:
    """Run code in another process; isolated: without this package on any path."""
    prelude = "" if not isolated else "import sys; sys.modules['moe_lightning'] = None\n"
    result = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_written_loads_with_identical_logits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = compressed(name, dtype)
    folder = ml.save_pretrained(model, tmp_path / "out", format="native")
    again = ml.from_pretrained(folder)
    assert type(again) is type(model)
    assert again.dtype == dtype
    assert plan_of(again) == plan_of(model)
    assert torch.equal(logits_of(again), logits_of(model))
    assert not again.training
    assert abs(stored_bytes(folder) - ml.measure(model).bytes) < 20_000  # the header


@pytest.mark.parametrize("name", ["novices", "uneven drop"])
def test_native_folder_in_a_fresh_process(name: str, tmp_path: Path) -> None:
    model = compressed(name)
    folder = ml.save_pretrained(model, tmp_path / "out")
    save_file({"logits": logits_of(model)}, tmp_path / "logits.safetensors")
    code = """
        import sys, torch, moe_lightning
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
        from tests.models import random_batches
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
        with torch.no_grad():
            logits = model(**random_batches()[0]).logits
        assert torch.equal(logits, load_file(sys.argv[2])["logits"])
        ids = random_batches()[0]["input_ids"]
        print(model.generate(ids, max_new_tokens=3, attention_mask=torch.ones_like(ids)).shape[1])
    """
    # On one thread, as here.
    out = in_fresh_process(
        "import torch; torch.set_num_threads(1)\n" + textwrap.dedent(code), folder, tmp_path / "logits.safetensors"
    )
    assert 11 < int(out) <= 14


def test_uniformly_dropped_folder_loads_where_this_package_cannot_be_imported(tmp_path: Path) -> None:
    model = compressed("drop")
    folder = ml.save_pretrained(model, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "mixtral"
    assert config["num_local_experts"] == 3
    assert config["architectures"] == ["MixtralForCausalLM"]
    names = load_file(folder / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in names  # the hub's layout, which engines read
    save_file({"ids": random_batches()[0]["input_ids"], "logits": logits_of(model)}, tmp_path / "expected.safetensors")
    code = """
        import sys, torch
        torch.set_num_threads(1)
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM, MixtralForCausalLM
        model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
        assert type(model) is MixtralForCausalLM
        assert not any(info.values()), info
        expected = load_file(sys.argv[2])
        with torch.no_grad():
            logits = model.eval()(expected["ids"]).logits
        torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)
        try:
            import moe_lightning
        except ImportError:
            print("alone")
    """
    assert in_fresh_process(code, folder, tmp_path / "expected.safetensors", isolated=True).strip() == "alone"


def test_plain_folder_can_be_compressed_again_as_a_model_of_its_own(tmp_path: Path) -> None:
    folder = ml.save_pretrained(compressed("drop"), tmp_path / "out")
    again = ml.from_pretrained(folder)
    assert type(again) is MixtralForCausalLM
    assert not plan_of(again)
    assert again.config.moe_lightning["lineage"]["edits"]
    ml.compress(again, random_batches(), ml.Novices(keep=2), progress=False)
    assert [
        len(layout.real) for layout in plan_of(again).check(ml.CompressionPlan().check(shape_of(again))).layouts
    ] == [2] * 3
    assert torch.equal(logits_of(ml.from_pretrained(ml.save_pretrained(again, tmp_path / "twice"))), logits_of(again))


def shape_of(model: Any) -> ml.ModelShape:
    from moe_lightning.architectures import architecture_of

    return architecture_of(model).shape(model).uncompressed()


def test_formats_that_cannot_hold_the_model_are_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="novices: use format=native"):
        ml.save_pretrained(compressed("novices"), tmp_path / "out", format="transformers")
    with pytest.raises(ValueError, match=r"different numbers of experts \("):
        ml.save_pretrained(compressed("uneven drop"), tmp_path / "out", format="transformers")
    with pytest.raises(ValueError, match="choose auto, native or transformers"):
        ml.save_pretrained(compressed("drop"), tmp_path / "out", format="hub")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_messages_name_a_few_layers() -> None:
    config = MixtralConfig(num_hidden_layers=40, num_local_experts=4)
    shape = MixtralArchitecture().shape_of_config(config)
    after = CompressionPlan([Quantize(layer) for layer in range(30)]).check(shape)
    with pytest.raises(
        ValueError, match=r"layers \[0, 1, 2, 3, 4, 5, 6, 7\] and 22 more have experts of integers: use"
    ):
        check_format(after, "transformers")


def test_hub_layout_in_bf16_written_by_transformers_alone_is_compressed_and_loads(tmp_path: Path) -> None:
    tiny_mixtral(dtype=torch.bfloat16).save_pretrained(tmp_path / "hub", max_shard_size="60KB")
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 1
    model = ml.from_pretrained(tmp_path / "hub")
    assert model.dtype == torch.bfloat16
    ml.compress(model, random_batches(), METHODS["novices"], progress=False)
    folder = ml.save_pretrained(model, tmp_path / "out", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    names = [name for path in folder.glob("*.safetensors") for name in load_file(path)]
    assert "model.layers.0.mlp.experts.novices" in names
    assert torch.equal(logits_of(ml.from_pretrained(folder)), logits_of(model))


def test_fused_layout_on_disk_loads_too(tmp_path: Path) -> None:
    model = tiny_mixtral()
    model.save_pretrained(tmp_path / "hub")
    save_file(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "hub" / "model.safetensors"
    )
    assert torch.equal(logits_of(ml.from_pretrained(tmp_path / "hub")), logits_of(model))


def test_tokenizer_files_generation_config_and_card(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.chat_template = "{{ messages }}"
    model = compressed("novices")
    model.generation_config.max_new_tokens = 17
    first = ml.save_pretrained(model, tmp_path / "one", tokenizer)
    second = ml.save_pretrained(model, tmp_path / "two", first)
    for folder in (first, second):
        found = PreTrainedTokenizerFast.from_pretrained(folder)
        assert found("a b")["input_ids"] == [1, 2]
        assert found.chat_template == "{{ messages }}"
        assert ml.from_pretrained(folder).generation_config.max_new_tokens == 17
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    card = (first / "README.md").read_text()
    assert "import moe_lightning" in card
    assert '"method": "Novices"' in card
    assert f"{ml.measure(model).parameters:,}" in card


def test_a_folder_that_holds_something_stays_unless_overwriting(tmp_path: Path) -> None:
    model = compressed("novices")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        ml.save_pretrained(model, tmp_path / "out")
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"
    ml.save_pretrained(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "precious.txt").exists()


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed("novices")
    ml.save_pretrained(model, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def fail(*_: Any, **__: Any) -> str:
        raise OSError("disk full")

    monkeypatch.setattr("moe_lightning.checkpoints.folders.model_card", fail)
    for target in ("out", "new"):
        with pytest.raises(OSError, match="disk full"):
            ml.save_pretrained(model, tmp_path / target, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_nothing_that_is_not_finite_is_saved(tmp_path: Path) -> None:
    model = compressed("novices")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.novices[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.novices is not finite"):
        ml.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_and_foreign_folders_are_one_clear_error(tmp_path: Path) -> None:
    folder = ml.save_pretrained(compressed("novices"), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        ml.from_pretrained(tmp_path / "nowhere")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged, message in (
        (whole[:-100], "cut short"),
        (whole[:4], "damaged or cut short"),
        (b"\x08" + b"\x00" * 7 + b"{{{{{{{{", "damaged header"),
    ):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            ml.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        check_checkpoint(folder)
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="'llama' is not supported: moe-lightning compresses mixtral"):
        ml.from_pretrained(tmp_path / "llama")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        ml.from_pretrained(tmp_path / "empty")


@pytest.mark.parametrize("change", ["missing", "unexpected", "size"])
def test_weights_that_do_not_fit_are_never_filled_with_random_values(change: str, tmp_path: Path) -> None:
    folder = ml.save_pretrained(compressed("novices"), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.novices"
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors["model.layers.1.mlp.experts.extra"] = torch.zeros(2)
    else:
        tensors[name] = tensors[name][:1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"layers\.1\.mlp\.experts|do not fit"):
        ml.from_pretrained(folder)


def test_a_plain_class_does_not_load_a_native_folder(tmp_path: Path) -> None:
    folder = ml.save_pretrained(compressed("novices"), tmp_path / "out")
    code = """
        import sys
        from transformers import AutoModelForCausalLM
        try:
            AutoModelForCausalLM.from_pretrained(sys.argv[1])
        except ValueError as error:
            print("moe_lightning_mixtral" in str(error))
    """
    assert in_fresh_process(code, folder, isolated=True).strip() == "True"


def test_uncompressed_model_round_trip(tmp_path: Path) -> None:
    model = tiny_mixtral()
    folder = ml.save_pretrained(model, tmp_path / "out")
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is MixtralForCausalLM
    assert torch.equal(logits_of(ml.from_pretrained(folder)), logits_of(model))


def test_a_tokenizer_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder with tokenizer files"):
        ml.save_pretrained(compressed("novices"), tmp_path / "out", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_lineage_survives_a_plain_folder(tmp_path: Path) -> None:
    first = ml.from_pretrained(ml.save_pretrained(compressed("drop"), tmp_path / "one"))
    ml.compress(first, random_batches(), ml.Novices(keep=2, criterion="reap"), progress=False)
    card = (ml.save_pretrained(first, tmp_path / "two") / "README.md").read_text()
    assert card.index('"method": "ExpertDrop"') < card.index('"method": "Novices"')
    again = ml.from_pretrained(tmp_path / "two")
    assert plan_of(again).origin["lineage"]["edits"]
    plain = ml.from_pretrained(tmp_path / "one")
    assert '"method": "ExpertDrop"' in (ml.save_pretrained(plain, tmp_path / "three") / "README.md").read_text()
