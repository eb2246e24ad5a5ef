"""A model slimmed with the pattern 2:4, through the kernels and without them."""

import pytest
import torch

pytest.importorskip("triton", reason="these are tests of the way to Triton kernels, and triton is not installed")

import moe_lightning as ml
from moe_lightning.experts import Sparse24
from tests.architectures.compressed_models import DEVICE, by_kernels, tokens
from tests.kernels.triton.problems import relative_error
from tests.models import tiny_mixtral

SIZES = {"hidden_size": 64, "intermediate_size": 72, "num_hidden_layers": 1}


def test_a_slimmed_model_says_the_same() -> None:
    """Also after a step of training, as the values are parameters that the kernels read."""
    model = ml.compress(tiny_mixtral(**SIZES), None, methods=[ml.Magnitude(pattern="2:4")]).model.to(DEVICE)
    stacks = [module for module in model.modules() if isinstance(module, Sparse24)]
    assert len(stacks) == 2 * SIZES["num_hidden_layers"]

    def both_ways() -> torch.Tensor:
        inputs = {"input_ids": tokens(), "use_cache": False}
        with torch.no_grad():
            want = model(**inputs).logits
            with by_kernels() as found:
                got = model(**inputs).logits
        assert found == ["block"] * SIZES["num_hidden_layers"]
        assert relative_error(got, want) <= 1e-5
        return got

    before = both_ways()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with by_kernels():
        model.train()(input_ids=tokens(12), labels=tokens(12)).loss.backward()
    optimizer.step()
    model.eval()
    assert all(stack.values.grad is not None and bool(stack.values.grad.any()) for stack in stacks)
    assert relative_error(both_ways(), before) > 1e-3
