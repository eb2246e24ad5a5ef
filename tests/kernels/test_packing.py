"""There and back, to the last bit, for any size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.packing import (
    Packed24,
    pack_24,
    pack_bits,
    pack_int4,
    pack_mask,
    two_of_four,
    unpack_24,
    unpack_bits,
    unpack_int4,
    unpack_mask,
)

from moe_lightning.slimming import Quantized, Scheme, Selection, dequantize, prune_by_magnitude, round_to_nearest

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
quick = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**31)


@quick
@given(st.lists(st.integers(0, 4), max_size=2), st.integers(1, 70), st.sampled_from([torch.int32, torch.uint8]), seeds)
def test_int4(shape: list[int], columns: int, word: torch.dtype, seed: int) -> None:
    codes = torch.randint(0, 16, (*shape, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = pack_int4(codes, word)
    assert words.dtype == word
    assert words.shape[-1] == -(-columns // (8 if word == torch.int32 else 2))
    assert torch.equal(unpack_int4(words, columns), codes)


def test_the_layout_of_int4() -> None:
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 15, 9], dtype=torch.uint8)
    assert pack_int4(codes, torch.uint8).tolist() == [0x21, 0x43, 0x65, 0xF7, 0x09]
    assert pack_int4(codes).tolist() == [0xF7654321 - 2**32, 9]


@quick
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.booleans(), seeds)
def test_a_rounded_matrix_in_words(
    slots: int, outputs: int, groups: int, size: int, symmetric: bool, seed: int
) -> None:
    weight = torch.randn(slots, outputs, groups * size, generator=torch.Generator().manual_seed(seed))
    quantized = round_to_nearest(weight, Scheme(4, size, symmetric, torch.bfloat16))
    again = Quantized(
        unpack_int4(pack_int4(quantized.codes), groups * size),
        quantized.scale,
        unpack_int4(pack_int4(quantized.zero), groups),
    )
    assert torch.equal(dequantize(again), dequantize(quantized))


def test_bytes_of_int4() -> None:
    """4.16 bits a weight with bf16 scales and packed zeros in groups of 128."""
    quantized = round_to_nearest(torch.randn(2, 16, 1024), Scheme(4, 128, scale_dtype=torch.bfloat16))
    parts = (pack_int4(quantized.codes), quantized.scale, pack_int4(quantized.zero))
    assert sum(part.nbytes for part in parts) * 8 / quantized.codes.numel() == 4.15625


@quick
@given(st.lists(st.integers(0, 3), max_size=2), st.integers(1, 9), st.sampled_from(DTYPES), st.booleans(), seeds)
def test_24(shape: list[int], groups: int, dtype: torch.dtype, sparser: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, groups * 4, generator=generator).to(dtype)
    order = torch.rand(*shape, groups, 4, generator=generator).argsort(-1)
    weight = weight.masked_fill((order < 2).flatten(-2), 0)
    if sparser:
        weight = weight * (torch.rand(weight.shape, generator=generator) < 0.5)
    packed = pack_24(weight)
    assert packed.values.shape[-1] == groups * 2
    assert packed.metadata.shape[-1] == -(-groups // 2)
    assert torch.equal(unpack_24(packed), weight)
    assert unpack_24(packed).dtype == dtype


def test_the_layout_of_24() -> None:
    weight = torch.tensor([5.0, 0, 0, 6, 0, 7, 8, 0, 0, 0, 0, 9])
    packed = pack_24(weight)
    assert packed.values.tolist() == [5, 6, 7, 8, 0, 9]
    assert packed.metadata.tolist() == [0b1001_1100, 0b1100]
    assert torch.equal(unpack_24(Packed24(*packed)), weight)


def test_bytes_of_24() -> None:
    pruned = prune_by_magnitude(torch.randn(2, 16, 64).bfloat16(), Selection(pattern="2:4")).weight
    assert sum(part.nbytes for part in pack_24(pruned)) == 1.125 * pruned.numel()


@quick
@given(st.lists(st.integers(0, 3), max_size=2), st.integers(1, 40), st.sampled_from(DTYPES), st.floats(0, 1), seeds)
def test_bits(shape: list[int], columns: int, dtype: torch.dtype, sparsity: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, columns, generator=generator).to(dtype)
    weight = weight * (torch.rand(weight.shape, generator=generator) >= sparsity)
    packed = pack_bits(weight)
    assert packed.values.numel() == weight.count_nonzero()
    assert packed.bits.shape[-1] == -(-columns // 8)
    assert torch.equal(unpack_bits(packed), weight)
    assert unpack_bits(packed).dtype == dtype


def test_refusals() -> None:
    with pytest.raises(ValueError, match="does not fit into 4 bits"):
        pack_int4(torch.tensor([16], dtype=torch.uint8))
    with pytest.raises(ValueError, match="must be uint8"):
        pack_int4(torch.tensor([1]))
    with pytest.raises(ValueError, match="int32 or uint8"):
        pack_int4(torch.tensor([1], dtype=torch.uint8), torch.int64)
    with pytest.raises(ValueError, match="17 codes take 3 words"):
        unpack_int4(torch.zeros(2, dtype=torch.int32), 17)
    with pytest.raises(ValueError, match="divisible by 4"):
        pack_24(torch.zeros(6))
    with pytest.raises(ValueError, match="more than two"):
        pack_24(torch.ones(4))
    packed = pack_bits(torch.ones(9))
    with pytest.raises(ValueError, match="marked"):
        unpack_bits(packed._replace(values=packed.values[1:]))
    with pytest.raises(ValueError, match="bytes"):
        unpack_bits(packed._replace(columns=8))


@quick
@given(st.integers(1, 40), st.integers(1, 70), seeds)
def test_masks_come_back(rows: int, columns: int, seed: int) -> None:
    kept = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_mask(kept)
    assert bits.shape == (rows, -(-columns // 8))
    assert torch.equal(unpack_mask(bits, columns), kept)


def test_two_of_four_takes_the_first_of_those_that_are_free() -> None:
    used = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0, 0]], dtype=torch.uint8)
    expected = torch.tensor([[1, 1, 0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0]], dtype=torch.bool)
    assert torch.equal(two_of_four(used), expected)
