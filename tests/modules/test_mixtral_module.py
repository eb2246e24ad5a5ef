"""MixtralModule against plain transformers and plain arithmetic."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_lightning.checkpoints import save_pretrained
from moe_lightning.data import TextDataModule
from moe_lightning.experts.balancing import load_balancing_loss
from moe_lightning.modules import MixtralModule
from moe_lightning.plan import CompressionPlan, DropBlock, NoviceExperts
from moe_lightning.recovery import next_token_loss
from moe_lightning.surgery import plan_of, rebuild
from tests.small_runs import MODEL, small_options

FIELDS: dict[str, Any] = {**MODEL, "vocab_size": 50, "attention_dropout": 0.0}


def made(**options: Any) -> MixtralModule:
    module = MixtralModule(**({"model": FIELDS} | options))
    module.configure_model()
    return module


def random_batch(rows: int = 3, tokens: int = 12, padded: bool = True) -> dict[str, torch.Tensor]:
    input_ids = torch.randint(3, 50, (rows, tokens))
    mask = torch.ones_like(input_ids)
    if padded:
        mask[1, 7:] = 0
    labels = torch.where(mask.bool(), input_ids, -100)
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": labels,
        "token_bytes": torch.where(mask.bool(), 2, 0),
    }


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def data(folder: Path, **options: Any) -> TextDataModule:
    return TextDataModule(**(small_options(folder)["data"] | options))


def quiet_trainer(folder: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": 4,
        "default_root_dir": str(folder),
    }
    return Trainer(**(defaults | options))


# Losses


def test_next_token_loss_is_transformers_own() -> None:
    module, batch = made(), random_batch()
    logits, _ = module(batch)
    expected = MixtralForCausalLM.forward(
        module.model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss
    torch.testing.assert_close(next_token_loss(logits, batch["labels"]), expected)


def test_next_token_loss_of_nothing_is_zero() -> None:
    assert next_token_loss(torch.randn(2, 5, 7), torch.full((2, 5), -100)) == 0


@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_loss_of_one_layer_is_transformers_own_divided_by_k(masked: bool) -> None:
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[2, 5:] = 0
    given = mask if masked else None
    layers = [torch.randn(36, 6) * 2 for _ in range(3)]
    expected = [load_balancing_loss_func((layer,), 6, 2, given) / 2 for layer in layers]
    for layer, value in zip(layers, expected, strict=True):
        torch.testing.assert_close(load_balancing_loss([layer], 2, given), value)
    torch.testing.assert_close(load_balancing_loss(layers, 2, given), torch.stack(expected).mean())


def test_load_balancing_loss_of_layers_of_different_size() -> None:
    layers = [torch.randn(20, experts) for experts in (3, 8, 5)]
    means = []
    for logits in layers:
        probabilities = logits.softmax(-1)
        picked = torch.zeros(logits.shape[1])
        for row in probabilities:
            picked[row.topk(2).indices] += 1 / 20
        means.append(float((picked * probabilities.mean(0)).sum()) * logits.shape[1] / 2)
    assert float(load_balancing_loss(layers, 2)) == pytest.approx(sum(means) / 3, rel=1e-6)


def test_training_loss_adds_the_weighted_balance(data_folder: Path) -> None:
    losses = {}
    for weight in (0.0, 0.5):
        torch.manual_seed(1)
        module = MixtralModule(model=MODEL | {"attention_dropout": 0.0}, load_balancing_coefficient=weight)
        trainer = quiet_trainer(data_folder, max_steps=1, limit_val_batches=0)
        seen: dict[str, torch.Tensor] = {}
        step = module.training_step
        module.training_step = lambda batch, i, step=step, seen=seen: seen.setdefault("loss", step(batch, i))
        trainer.fit(module, data(data_folder))
        metrics = trainer.callback_metrics
        losses[weight] = (float(seen["loss"].detach()), float(metrics["train/loss"]), float(metrics["train/aux_loss"]))
        assert float(metrics["train/perplexity"]) == pytest.approx(math.exp(losses[weight][1]), rel=1e-5)
        assert float(metrics["train/tokens_per_second"]) > 0
    assert losses[0.0][0] == pytest.approx(losses[0.0][1])
    assert losses[0.5][0] == pytest.approx(losses[0.5][1] + 0.5 * losses[0.5][2], rel=1e-6)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "exactly one of"),
        ({"checkpoint": "somewhere"}, "exactly one of"),
        ({"model": {"hidden_sise": 3}}, "did you mean 'hidden_size'"),
        ({"model": FIELDS | {"num_experts_per_tok": 5}}, "picks from 4 experts"),
        ({"model": FIELDS | {"hidden_size": 33}}, "not a multiple of"),
        ({"model": FIELDS | {"hidden_size": "big"}}, "model.hidden_size='big': use a whole number"),
        ({"model": FIELDS | {"num_local_experts": 4.5}}, "model.num_local_experts=4.5: use a whole number"),
        ({"model": FIELDS | {"num_hidden_layers": 0}}, "model.num_hidden_layers=0: use a whole number >= 1"),
        ({"model": FIELDS | {"hidden_act": "nope"}}, "model.hidden_act='nope': use one of .*silu"),
        ({"model": FIELDS | {"rms_norm_eps": "tiny"}}, "rms_norm_eps"),
        ({"learning_rate": 0.0}, "model.learning_rate=0.0"),
        ({"min_learning_rate_ratio": 1.5}, "from 0 to 1"),
        ({"betas": (0.9, 1.0)}, "model.betas"),
        ({"experts_implementation": "fast"}, "grouped_mm"),
        ({"temperature": -1.0}, "model.temperature"),
    ],
)
def test_impossible_options_are_named_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtralModule(**({"model": FIELDS} | options))


def test_hparams_hold_structure_only() -> None:
    assert set(MixtralModule(model=FIELDS, learning_rate=0.5).hparams) == {"model", "checkpoint", "plan"}


def test_module_does_not_change_the_callers_fields() -> None:
    fields = dict(FIELDS)
    made(model=fields).hparams["model"]["vocab_size"] = 1
    assert fields == FIELDS


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(3)
    first = MixtralModule(model=FIELDS)
    torch.randn(17)  # preparing the data may draw numbers, or not, when it is cached
    first.configure_model()
    torch.manual_seed(3)
    second = made()
    for (name, ours), other in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(ours, other), name
    third = made()
    assert not torch.equal(third.model.lm_head.weight, second.model.lm_head.weight)


def test_parameter_groups_and_decay_of_matrices_only(data_folder: Path) -> None:
    module = MixtralModule(model=MODEL, weight_decay=0.3)
    trainer = quiet_trainer(data_folder, max_steps=1, limit_val_batches=0)
    trainer.fit(module, data(data_folder))
    groups = {group["name"]: group for group in trainer.optimizers[0].param_groups}
    decays = {name: group["weight_decay"] for name, group in groups.items()}
    assert decays == {"decay": 0.3, "no_decay": 0, "novices": 0, "adapters": 0}
    assert all(parameter.ndim >= 2 for parameter in groups["decay"]["params"])
    assert all(parameter.ndim == 1 for parameter in groups["no_decay"]["params"])
    assert sum(len(group["params"]) for group in groups.values()) == len(list(module.model.parameters()))


def test_schedule_warms_up_and_ends_at_the_floor(data_folder: Path) -> None:
    module = MixtralModule(model=MODEL, learning_rate=0.1, warmup_steps=4, min_learning_rate_ratio=0.25)
    trainer = quiet_trainer(data_folder, max_steps=12, limit_val_batches=0)
    module.trainer = trainer
    factors = [module.learning_rate_factor(step) for step in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.25 + 0.75 * 0.5)
    assert factors[12] == pytest.approx(0.25)
    assert factors[4:] == sorted(factors[4:], reverse=True)


# Vocabulary and tokenizer


def test_vocabulary_comes_from_the_tokenizer_and_back_with_the_checkpoint(data_folder: Path, tmp_path: Path) -> None:
    module, datamodule = MixtralModule(model=MODEL), data(data_folder)
    trainer = quiet_trainer(tmp_path, max_steps=2)
    trainer.fit(module, datamodule)
    tokenizer = datamodule.tokenizer
    assert module.hparams["model"]["vocab_size"] == len(tokenizer) == module.model.config.vocab_size
    assert module.model.config.eos_token_id == tokenizer.eos_token_id

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = MixtralModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    batch = next(iter(datamodule.val_dataloader()))
    torch.testing.assert_close(loaded.eval()(batch)[0], module.eval()(batch)[0], rtol=0, atol=0)


def test_tokenizer_larger_than_the_vocabulary_is_an_error(data_folder: Path) -> None:
    module = MixtralModule(model=MODEL | {"vocab_size": 64})
    with pytest.raises(ValueError, match=r"300 tokens but the model's vocabulary only 64"):
        quiet_trainer(data_folder).fit(module, data(data_folder))


def test_no_vocabulary_and_no_data_is_an_error() -> None:
    with pytest.raises(ValueError, match="vocab_size is missing"):
        made(model=MODEL)


# Checkpoint folders


@pytest.fixture
def folder(tmp_path: Path, data_folder: Path) -> Path:
    """A Mixtral written by transformers alone, in bf16, with its tokenizer."""
    datamodule = data(data_folder)
    model = MixtralForCausalLM(MixtralConfig(**FIELDS | {"vocab_size": len(datamodule.tokenizer)})).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "folder")
    datamodule.tokenizer.save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def test_a_folder_trains_and_its_checkpoint_does_not_need_it_any_more(
    folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    module, datamodule = MixtralModule(checkpoint=str(folder)), data(data_folder, tokenizer=str(folder))
    trainer = quiet_trainer(tmp_path, max_steps=2)
    before = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).lm_head.weight
    seen = {}
    module.on_train_start = lambda start=module.on_train_start: (
        start(),
        seen.update(training=module.model.training, weight=module.model.lm_head.weight.detach().clone()),
    )
    trainer.fit(module, datamodule)
    assert seen["training"], "transformers loads in eval mode, and nobody else changes that"
    assert torch.equal(seen["weight"], before), "fp32 training starts from the bf16 values"

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    shutil.rmtree(folder)
    loaded = MixtralModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(loaded.model.lm_head.weight, module.model.lm_head.weight)


def test_a_folder_without_some_of_its_layers_goes_on_after_a_checkpoint(
    folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    model = MixtralForCausalLM.from_pretrained(folder)
    layers = model.config.num_hidden_layers
    rebuild(model, CompressionPlan((DropBlock(0), NoviceExperts(layer=layers - 1, experts=(0,)))))
    save_pretrained(model, tmp_path / "dropped")
    module = MixtralModule(checkpoint=str(tmp_path / "dropped"))
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(module, data(data_folder, tokenizer=str(folder)))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = MixtralModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert len(loaded.model.model.layers) == layers - 1
    for name, tensor in module.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name


def test_a_folder_with_a_tokenizer_trained_anew_is_an_error(folder: Path, data_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"set --data\.tokenizer"):
        quiet_trainer(data_folder).fit(MixtralModule(checkpoint=str(folder)), data(data_folder))


def test_folders_without_a_mixtral_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.checkpoint=.*nowhere"):
        MixtralModule(checkpoint=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        MixtralModule(checkpoint=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"llama.*mixtral"):
        MixtralModule(checkpoint=str(tmp_path))


def test_a_truncated_weights_file_is_found_before_anything_else(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.checkpoint=.*cut short"):
        MixtralModule(checkpoint=str(folder))


# Structure


def novices() -> CompressionPlan:
    return CompressionPlan((NoviceExperts(layer=1, experts=(0, 2)),))


def test_checkpoint_of_a_compressed_model_brings_its_structure(data_folder: Path, tmp_path: Path) -> None:
    module, datamodule = MixtralModule(model=MODEL | {"attention_dropout": 0.0}), data(data_folder)
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(module, datamodule)
    rebuild(module.model, novices())
    # The plan in a checkpoint is the model's own, even where nobody called set_plan.
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)

    loaded = MixtralModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert plan_of(loaded.model).edits == novices().edits
    batch = next(iter(datamodule.val_dataloader()))
    torch.testing.assert_close(loaded.eval()(batch)[0], module.eval()(batch)[0], rtol=0, atol=0)
    _, router_logits = loaded(batch)
    assert len(router_logits) == 2


def test_plan_option_builds_the_structure() -> None:
    assert plan_of(made(plan=novices().to_dict()).model).edits == novices().edits


# Evaluation and prediction


def test_validation_equals_a_plain_loop(data_folder: Path, tmp_path: Path) -> None:
    module, datamodule = MixtralModule(model=MODEL), data(data_folder)
    trainer = quiet_trainer(tmp_path)
    trainer.validate(module, datamodule, verbose=False)
    nats, tokens, text_bytes = 0.0, 0, 0
    module.model.eval()
    with torch.no_grad():
        for batch in datamodule.val_dataloader():
            logits = module.model(batch["input_ids"]).logits[:, :-1].double()
            targets = batch["labels"][:, 1:]
            nats += float(functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            tokens += int((targets != -100).sum())
            text_bytes += int(batch["token_bytes"][:, 1:][targets != -100].sum())
    metrics = trainer.callback_metrics
    assert float(metrics["val/loss"]) == pytest.approx(nats / tokens, rel=1e-5)
    assert float(metrics["val/perplexity"]) == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert float(metrics["val/bits_per_byte"]) == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


def test_predict_continues_as_a_loop_without_cache_does(data_folder: Path, tmp_path: Path) -> None:
    prompts = ["abc def", "a", "bed feed cab"]
    module = MixtralModule(model=MODEL, max_new_tokens=6)
    datamodule = data(data_folder, prompts=prompts, eval_batch_size=3)
    results = quiet_trainer(tmp_path).predict(module, datamodule)
    assert results is not None
    (rows,) = results
    assert [row["prompt"] for row in rows] == prompts
    tokenizer = datamodule.tokenizer
    module.model.eval()
    for prompt, row in zip(prompts, rows, strict=True):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        start = ids.shape[1]
        for _ in range(6):
            with torch.no_grad():
                following = module.model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
            if int(following) == tokenizer.eos_token_id:
                break
        assert row["continuation"] == tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_predict_refuses_padding_on_the_right() -> None:
    module = made()
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(tokenizer=object()))
    with pytest.raises(ValueError, match="padded on the left"):
        module.predict_step({"input_ids": torch.ones(1, 2), "attention_mask": torch.tensor([[1, 0]])}, 0)
