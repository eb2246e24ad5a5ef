"""Int4 matrices in the layout of the kernels come back bit for bit and mean the same."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.triton_kernels.int4_layout import dequantize_tiles, from_tiles, group_sums, kernel_group, to_tiles

from tests.kernels.triton.problems import int4_problem


@settings(max_examples=25, deadline=None)
@given(
    slots=st.integers(0, 3),
    outputs=st.sampled_from([16, 48]),
    groups=st.integers(1, 3),
    group=st.sampled_from([64, 128, 256, 384]),
    symmetric=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_there_and_back(slots: int, outputs: int, groups: int, group: int, symmetric: bool, seed: int) -> None:
    problem = int4_problem(max(slots, 1), outputs, groups * group, group, symmetric, seed)
    tiles = problem.tiles
    assert tiles.inputs == groups * group and tiles.outputs == outputs and tiles.group in (64, 128)
    words, scale, zero = from_tiles(tiles, groups, symmetric)
    assert torch.equal(words, problem.words)
    assert torch.equal(scale, problem.scale)
    assert (zero is None) if problem.zero is None else torch.equal(zero, problem.zero)
    np.testing.assert_array_equal(dequantize_tiles(tiles, torch.float64).numpy(), problem.dense)


def test_where_a_code_stands() -> None:
    """Code 2 * word + half + 32 * plane of a group of 128 stands at bit 4 * plane + 16 * half of its word."""
    problem = int4_problem(2, 16, 256, 128)
    tiles = problem.tiles
    for slot, row, column in ((0, 0, 0), (1, 15, 255), (0, 7, 128 + 32 * 3 + 2 * 5 + 1), (1, 3, 1)):
        group, place = divmod(column, 128)
        plane, rest = divmod(place, 32)
        word = int(tiles.words_SGOW[slot, group, row, rest // 2])
        stored = int(problem.words[slot, row, column // 8])
        assert word >> (4 * plane + 16 * (rest % 2)) & 15 == stored >> 4 * (column % 8) & 15


def test_bytes() -> None:
    tiles = int4_problem(1, 16, 1024, 128).tiles
    assert (tiles.words_SGOW.nbytes + tiles.pairs_SGO.nbytes) * 8 / (16 * 1024) == 4.25


def test_scales_of_any_sign_and_size() -> None:
    problem = int4_problem(1, 16, 128, 128)
    scale = torch.tensor([0.0, -1.5, 1e-30, -1e-38, 3e38, 1.0, -0.0, 2.0] * 2, dtype=torch.bfloat16).view(1, 16, 1)
    back = from_tiles(to_tiles(problem.words, scale, problem.zero, 128), 1, False)
    assert torch.equal(back[1].view(torch.int16), scale.view(torch.int16))
    assert problem.zero is not None and back[2] is not None and torch.equal(back[2], problem.zero)


def test_sums_over_groups() -> None:
    rows = torch.arange(12.0).view(1, 12)
    assert group_sums(rows, 4).tolist() == [[6, 22, 38]]


def test_sizes_that_the_kernels_do_not_know() -> None:
    assert kernel_group(512, 2) == 128 and kernel_group(192, 1) == 64
    assert kernel_group(512, 16) is None and kernel_group(500, 3) is None and kernel_group(64, 0) is None
    problem = int4_problem(1, 16, 128, 32)
    with pytest.raises(ValueError, match="groups of 128 or 64"):
        to_tiles(problem.words, problem.scale, problem.zero, 128)
    problem = int4_problem(1, 8, 128, 128)
    with pytest.raises(ValueError, match="multiple of 16"):
        to_tiles(problem.words, problem.scale, problem.zero, 128)
    problem = int4_problem(1, 16, 128, 128)
    with pytest.raises(ValueError, match="want bfloat16"):
        to_tiles(problem.words, problem.scale.float(), problem.zero, 128)
