"""The choice of experts against its twin and the untouched routers of transformers."""

import pytest
import torch

pytest.importorskip("triton", reason="these are tests of Triton kernels, and triton is not installed")

from moe_kernels.triton_kernels.router import choose_experts, choose_experts_twin
from transformers import MixtralConfig, OlmoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

from tests.kernels.triton.problems import DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(1, 8, 2), (17, 5, 1), (33, 64, 8), (4, 3, 3), (16, 1, 1), (0, 8, 2)]
)
def test_equals_its_twin(
    dtype: torch.dtype, renormalize: bool, tokens: int, experts: int, top_k: int, device: str
) -> None:
    logits = (torch.randn(tokens, experts) * 3).to(dtype).to(device)
    index, weight = choose_experts(logits, top_k, renormalize)
    want_index, want_weight = choose_experts_twin(logits, top_k, renormalize)
    assert index.dtype == torch.int64 and weight.dtype == torch.float32
    assert torch.equal(index, want_index)
    torch.testing.assert_close(weight, want_weight, rtol=2e-6, atol=0)


def test_equal_probabilities_in_the_order_of_experts(device: str) -> None:
    logits = torch.tensor([[1.0, 2, 2, 1, 2], [0, 0, 0, 0, 0], [-200, -150, 300, -100, -120]], device=device)
    index, weight = choose_experts(logits, 3)
    # In the last row all but one underflow to the same zero.
    assert index.tolist() == [[1, 2, 4], [0, 1, 2], [2, 0, 1]]
    torch.testing.assert_close(weight[1].cpu(), torch.full((3,), 1 / 3))
    assert weight[2].tolist() == [1, 0, 0]
    assert torch.equal(index, choose_experts_twin(logits, 3)[0])


def test_equals_the_untouched_routers_of_transformers(device: str) -> None:
    mixtral = MixtralTopKRouter(MixtralConfig(hidden_size=16, num_local_experts=8, num_experts_per_tok=2))
    olmoe = OlmoeTopKRouter(OlmoeConfig(hidden_size=16, num_experts=16, num_experts_per_tok=4, norm_topk_prob=False))
    hidden = torch.randn(21, 16, device=device)
    for router, renormalize in ((mixtral, True), (olmoe, False)):
        torch.nn.init.normal_(router.weight)
        logits, weight, index = router.to(device)(hidden)
        got_index, got_weight = choose_experts(logits.detach(), index.shape[1], renormalize)
        assert torch.equal(got_index, index)
        torch.testing.assert_close(got_weight, weight.detach(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("top_k", [0, 9])
def test_more_experts_than_there_are(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k = {top_k} of 8 experts"):
        choose_experts(torch.zeros(1, 8), top_k)
