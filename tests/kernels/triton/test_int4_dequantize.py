"""int4 weights as floating point, bit for bit."""

import pytest
import torch

pytest.importorskip("triton", reason="these are tests of Triton kernels, and triton is not installed")

from moe_kernels.triton_kernels.int4_dequantize import int4_dequantize
from moe_kernels.triton_kernels.int4_layout import Int4Tiles, dequantize_tiles

from tests.kernels.triton.problems import DTYPES, int4_problem


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "symmetric"), [(64, True), (128, False), (256, False)])
def test_equals_its_twin(dtype: torch.dtype, group: int, symmetric: bool, device: str) -> None:
    tiles = int4_problem(2, 48, 256, group, symmetric, device=device).tiles
    assert torch.equal(int4_dequantize(tiles, dtype), dequantize_tiles(tiles, dtype))


def test_no_slots(device: str) -> None:
    tiles = int4_problem(1, 16, 64, 64, device=device).tiles
    nothing = Int4Tiles(tiles.words_SGOW[:0], tiles.pairs_SGO[:0])
    assert int4_dequantize(nothing, torch.float32).shape == (0, 16, 64)
