"""The factor of the inverse, and the damping that grows."""

import pytest
import torch

from moe_lightning.slimming import output_error
from moe_lightning.slimming.hessian import inverse_factor
from tests.slimming.problems import damped, hessian_of, inputs_of, weights


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = hessian_of(inputs_of(3, 50, 12))
    inverse = inverse_factor(hessian, dtype=torch.float64)
    assert torch.equal(inverse.factor, inverse.factor.triu())
    for slot in range(3):
        mean = hessian[slot].diagonal().mean()
        expected = torch.linalg.cholesky(torch.linalg.inv(damped(hessian[slot]) / mean), upper=True)
        torch.testing.assert_close(inverse.factor[slot], expected, rtol=1e-9, atol=1e-11)
    assert inverse.statuses("gptq", "rtn") == ("gptq",) * 3


def test_damping_grows_for_those_that_need_it() -> None:
    """Rounding can leave a matrix with a negative eigenvalue; its neighbours must not be damped for it."""
    hessian = torch.eye(4, dtype=torch.float64).repeat(4, 1, 1)
    hessian[1, 0, 1] = hessian[1, 1, 0] = 1.05
    hessian[2, 0, 1] = hessian[2, 1, 0] = 1e12
    hessian[3] = 0
    inverse = inverse_factor(hessian, dtype=torch.float64)
    assert inverse.growths == (0, 1, 0, 0)
    statuses = inverse.statuses("gptq", "rtn")
    assert statuses[:2] == ("gptq", "gptq damp x10")
    assert statuses[2] == "rtn fallback: its Hessian is not positive definite with any damping"
    assert statuses[3] == "rtn fallback: no input reached it"
    torch.testing.assert_close(inverse.factor[0], torch.eye(4, dtype=torch.float64) / 1.01**0.5)
    assert torch.equal(inverse.factor[2:], torch.eye(4, dtype=torch.float64).repeat(2, 1, 1))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_number_of_tokens_does_not_leave_the_range_of_fp32(scale: float) -> None:
    hessian = hessian_of(inputs_of(2, 50, 12)).float()
    expected = inverse_factor(hessian).factor
    torch.testing.assert_close(inverse_factor(hessian * scale).factor, expected, rtol=1e-4, atol=1e-5)


def test_one_token_among_many_inputs_in_fp32() -> None:
    hessian = hessian_of(inputs_of(1, 1, 256)).float()
    inverse = inverse_factor(hessian)
    exact = inverse_factor(hessian.double(), dtype=torch.float64)
    assert inverse.statuses("gptq", "rtn") == ("gptq",)
    torch.testing.assert_close(inverse.factor.double(), exact.factor, rtol=0, atol=2e-3 * float(exact.factor.max()))


def test_output_error_is_that_of_the_outputs() -> None:
    weight, other, tokens = weights(3, 5, 8), weights(3, 5, 8, seed=1), inputs_of(3, 20, 8)
    expected = (tokens @ (weight - other).mT).square().sum((1, 2))
    torch.testing.assert_close(output_error(weight, other, hessian_of(tokens)), expected)
    alone = torch.diag_embed(tokens.square().sum(1))
    torch.testing.assert_close(output_error(weight, other, tokens.square().sum(1)), output_error(weight, other, alone))


def test_damping_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        inverse_factor(torch.eye(2)[None], damping=0.0)
