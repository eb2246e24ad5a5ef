"""Plain models of transformers with ``set_experts_implementation("moe_kernels")``."""

import copy
from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import moe_lightning  # noqa: F401 - makes the name known
from moe_lightning.experts import implementation
from moe_lightning.experts.implementation import moe_kernels_experts_forward
from moe_lightning.experts.kernel_path import use_kernels
from tests.kernels.triton.problems import relative_error
from tests.models import random_batches, tiny_config, tiny_mixtral

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tiny_olmoe() -> OlmoeForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = OlmoeConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_experts=8,
            num_experts_per_tok=3,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
        model = OlmoeForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


MODELS = pytest.mark.parametrize("make", [tiny_mixtral, tiny_olmoe])


def both(make: Any) -> tuple[Any, Any]:
    """Return a model with our implementation and its twin with transformers' loop."""
    ours = make().to(DEVICE)
    other = copy.deepcopy(ours)
    ours.set_experts_implementation("moe_kernels")
    other.set_experts_implementation("eager")
    assert ours.config._experts_implementation == "moe_kernels"
    return ours, other


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Count sums over experts that go through the kernels."""
    found: list[bool] = []
    mix = implementation.mix_by_kernels

    def counted(*arguments):
        found.append(True)
        return mix(*arguments)

    monkeypatch.setattr(implementation, "mix_by_kernels", counted)
    return found


@MODELS
@pytest.mark.parametrize("use", ["auto", "always"])
def test_equals_eager(make, use: str, calls: list[bool]) -> None:
    if use == "always":
        pytest.importorskip("triton")
    ours, other = both(make)
    ids = random_batches(sequence=9)[0]["input_ids"].to(DEVICE)
    with torch.no_grad(), use_kernels(use):
        got, want = ours(ids, output_router_logits=True), other(ids, output_router_logits=True)
    assert relative_error(got.logits, want.logits) < 1e-5
    assert len(got.router_logits) == len(want.router_logits)
    used = use == "always" or DEVICE == "cuda"
    assert calls == [True] * (ours.config.num_hidden_layers if used else 0)


@MODELS
def test_training_equals_eager(make) -> None:
    gradients = []
    for model in both(make):
        ids = random_batches()[0]["input_ids"].to(DEVICE)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(relative_error(gradients[0][name], want) < 1e-4 for name, want in gradients[1].items())


@MODELS
@pytest.mark.parametrize("use", ["auto", "always"])
def test_inside_generate(make, use: str) -> None:
    if use == "always":
        pytest.importorskip("triton")
    ours, other = both(make)
    ids = random_batches(sequence=2)[0]["input_ids"].to(DEVICE)
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    with use_kernels(use):
        assert torch.equal(ours.generate(ids, **options), other.generate(ids, **options))
    assert ours.config._experts_implementation == "moe_kernels"


def test_is_known_by_name_when_a_model_is_made_and_loaded(tmp_path) -> None:
    model = MixtralForCausalLM(tiny_config(experts_implementation="moe_kernels"))
    assert model.config._experts_implementation == "moe_kernels"
    model.save_pretrained(tmp_path)
    loaded = MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation="moe_kernels")
    assert loaded.config._experts_implementation == "moe_kernels"
    assert "slots" not in str(sorted(loaded.state_dict()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("has_bias", True, "biases"),
        ("is_transposed", True, "laid out"),
        ("is_concatenated", False, "laid out"),
        ("has_gate", False, "another gate"),
        ("has_post_expert_norm", True, "norm"),
    ],
)
def test_experts_of_another_kind(name: str, value: bool, message: str) -> None:
    experts = MixtralExperts(tiny_config())
    setattr(experts, name, value)
    inputs = torch.zeros(1, 32), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2)
    with pytest.raises(ValueError, match=f'does not know MixtralExperts .*{message}.*: take "grouped_mm"'):
        moe_kernels_experts_forward(experts, *inputs)


def test_a_gate_of_its_own() -> None:
    class Clamped(MixtralExperts):
        def _apply_gate(self, gate_up):
            return gate_up.clamp(-1, 1).chunk(2, -1)[0]

    with pytest.raises(ValueError, match="another gate"):
        moe_kernels_experts_forward(Clamped(tiny_config()), *[torch.zeros(1, 2)] * 3)


def test_experts_that_live_elsewhere_count_for_nobody() -> None:
    """Numbers at and above E mark experts of other processes."""
    experts = MixtralExperts(tiny_config())
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    hidden, index = torch.randn(2, 32), torch.tensor([[0, 6], [6, 6]])
    got = moe_kernels_experts_forward(experts, hidden, index, torch.ones(2, 2))
    assert got[0].any() and not got[1].any()
