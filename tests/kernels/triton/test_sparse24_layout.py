"""2:4 matrices are read as they are stored, and mean the same with their zeros."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="these are tests of Triton kernels, and triton is not installed")

from moe_kernels.packing import pack_24_kept
from moe_kernels.triton_kernels.sparse24_expand import sparse24_expand
from moe_kernels.triton_kernels.sparse24_layout import Sparse24Tiles, expand_tiles, why_no_tiles

from tests.kernels.triton.sparse24_problems import sparse24_problem

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PLACES = [(first, second) for second in range(4) for first in range(second)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("slots", "outputs", "inputs"), [(2, 48, 256), (3, 5, 72), (1, 1, 8), (1, 40, 512)])
def test_expansion_is_exact(dtype: torch.dtype, slots: int, outputs: int, inputs: int, device: str) -> None:
    problem = sparse24_problem(slots, outputs, inputs, dtype, device=device)
    twin = expand_tiles(problem.tiles, dtype)
    np.testing.assert_array_equal(twin.double().cpu().numpy(), problem.dense)
    expanded = sparse24_expand(problem.tiles)
    assert expanded.dtype == dtype and torch.equal(expanded, twin)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_places_in_both_halves_of_a_byte(dtype: torch.dtype, device: str) -> None:
    """With values of every bit: what is no number, infinite, or a zero with a sign moves as it is."""
    kept = torch.zeros(36, 8, dtype=torch.bool)
    for row, (lower, upper) in enumerate((lower, upper) for lower in PLACES for upper in PLACES):
        kept[row, list(lower)] = kept[row, [4 + place for place in upper]] = True
    odd = [torch.inf, -torch.inf, -0.0, torch.finfo(dtype).tiny / 4, -torch.finfo(dtype).max, -1.0, 1.5, 0.0]
    weight = torch.stack([torch.tensor(odd).roll(row) for row in range(36)]).to(dtype)
    packed = pack_24_kept(weight[None], kept[None])
    expanded = sparse24_expand(Sparse24Tiles(packed.values.to(device), packed.metadata.to(device)))[0].cpu()
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(expanded.view(whole), weight.masked_fill(~kept, 0).view(whole))


def test_nothing_to_expand(device: str) -> None:
    tiles = sparse24_problem(1, 16, 64, device=device).tiles
    assert sparse24_expand(Sparse24Tiles(tiles.values_SOV[:0], tiles.metadata_SOB[:0])).shape == (0, 16, 64)


def test_no_other_form_is_made() -> None:
    """The values may be parameters that train: the kernels must read them where the optimizer writes."""
    tiles = sparse24_problem(2, 16, 64).tiles
    assert tiles.words.data_ptr() == tiles.values_SOV.data_ptr()
    held = tiles.values_SOV.nbytes + tiles.metadata_SOB.nbytes
    assert (held - tiles.metadata_SOB.nbytes) / 4 == 0.5 * 2 * 16 * 64
    assert tiles.metadata_SOB.nbytes * 8 == 2 * 16 * 64
    assert (tiles.slots, tiles.outputs, tiles.inputs) == (2, 16, 64)


def test_values_in_the_middle_of_64_bits(device: str) -> None:
    """As a part of a flat tensor may begin."""
    tiles = sparse24_problem(2, 16, 64, torch.float16, device=device).tiles
    flat = torch.cat([tiles.values_SOV.new_zeros(1), tiles.values_SOV.flatten()])
    shifted = Sparse24Tiles(flat[1:].view(tiles.values_SOV.shape), tiles.metadata_SOB)
    assert torch.equal(sparse24_expand(shifted), sparse24_expand(tiles))


def test_matrices_that_the_kernels_do_not_know() -> None:
    tiles = sparse24_problem(2, 16, 64).tiles
    values, metadata = tiles.values_SOV, tiles.metadata_SOB
    assert why_no_tiles(values, metadata) is None
    assert "60 inputs: the kernels for 2:4 want a multiple of 8" in str(why_no_tiles(values[..., :30], metadata))
    assert "take uint8 [2, 16, 8]" in str(why_no_tiles(values, metadata[..., :7]))
    assert "take uint8 [2, 16, 8]" in str(why_no_tiles(values, metadata.int()))
