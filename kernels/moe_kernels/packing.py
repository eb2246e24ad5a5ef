"""Small weights as few bytes, and back, exactly.

Legend: I inputs (columns) of a row, B bytes of a row. Leading dimensions are free: rows are packed one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_INT4_PER_WORD = {torch.int32: 8, torch.uint8: 2}


def pack_int4(codes: Tensor, word: torch.dtype = torch.int32) -> Tensor:
    """Pack codes of 4 bits; the first of a word in its lowest bits.

    Args:
        codes: uint8 ``[..., I]``, each below 16.
        word: ``torch.int32`` for eight codes a word, ``torch.uint8`` for two.

    Returns:
        ``[..., ceil(I / 8)]`` int32 or ``[..., ceil(I / 2)]`` uint8; what is missing in the last word is zero.

    Raises:
        ValueError: A code of more than 4 bits, or another type of word.
    """
    per_word = _per_word(word)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {codes.dtype}")
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"the code {int(codes.max())} does not fit into 4 bits")
    padded = F.pad(codes, (0, -codes.shape[-1] % per_word)).unflatten(-1, (-1, per_word))
    words = torch.zeros(padded.shape[:-1], dtype=word, device=codes.device)
    for place in range(per_word):
        words |= padded[..., place].to(word) << 4 * place
    return words


def unpack_int4(words: Tensor, columns: int) -> Tensor:
    """Return the codes that :func:`pack_int4` packed.

    Args:
        words: int32 or uint8 ``[..., W]``.
        columns: I.

    Returns:
        uint8 ``[..., I]``.

    Raises:
        ValueError: As many codes are not in as many words.
    """
    per_word = _per_word(words.dtype)
    if words.shape[-1] != -(-columns // per_word):
        raise ValueError(f"{columns} codes take {-(-columns // per_word)} words, got {words.shape[-1]}")
    # The sign of a word is shifted in from the left, and cut off here.
    parts = [((words >> 4 * place) & 15).to(torch.uint8) for place in range(per_word)]
    return torch.stack(parts, -1).flatten(-2)[..., :columns].contiguous()


def _per_word(word: torch.dtype) -> int:
    if word not in _INT4_PER_WORD:
        raise ValueError(f"words are int32 or uint8, got {word}")
    return _INT4_PER_WORD[word]


class Packed24(NamedTuple):
    """Rows with at most two non-zero weights in every four neighbours.

    Attributes:
        values: The kept two of every four, ``[..., I / 2]``.
        metadata: Their places, 2 bits each, the lower place first in the lower bits; two groups a byte, uint8
            ``[..., ceil(I / 8)]``.
    """

    values: Tensor
    metadata: Tensor


def pack_24(weight: Tensor) -> Packed24:
    """Pack weights with the pattern 2:4.

    Args:
        weight: ``[..., I]``, I divisible by 4. With fewer than two non-zero weights in a group, zeros are kept too.

    Returns:
        ``1 / 2`` of the values, and a bit for each weight.

    Raises:
        ValueError: A size that 4 does not divide, or more than two non-zero weights in a group.
    """
    if weight.shape[-1] % 4:
        raise ValueError(f"2:4 needs an input size divisible by 4, got {weight.shape[-1]}")
    used = (weight != 0).to(torch.uint8)
    if bool((used.unflatten(-1, (-1, 4)).sum(-1) > 2).any()):
        raise ValueError(
            "a group of four weights has more than two that are not zero: prune with the pattern 2:4 first"
        )
    return pack_24_kept(weight, two_of_four(used))


def two_of_four(used: Tensor) -> Tensor:
    """Mark exactly two of every four neighbours: those used, then the first of the others.

    Args:
        used: Bool or uint8 ``[..., I]``, at most two of every four set.

    Returns:
        Bool ``[..., I]``.
    """
    groups = used.unflatten(-1, (-1, 4)).bool()
    room = 2 - groups.sum(-1, keepdim=True)
    free = ~groups
    return (groups | (free & (free.cumsum(-1) <= room))).flatten(-2)


def pack_24_kept(weight: Tensor, kept: Tensor) -> Packed24:
    """Pack the weights that a mask keeps.

    Args:
        weight: ``[..., I]``.
        kept: Bool ``[..., I]``, exactly two of every four set.
    """
    marks = kept.unflatten(-1, (-1, 4)).to(torch.uint8)
    nibbles = marks.argmax(-1) | (3 - marks.flip(-1).argmax(-1)) << 2
    values = weight[kept].view(*weight.shape[:-1], weight.shape[-1] // 2)
    return Packed24(values, pack_int4(nibbles.to(torch.uint8), torch.uint8))


def unpack_24(packed: Packed24) -> Tensor:
    """Return the weights that :func:`pack_24` packed, ``[..., I]``."""
    pairs = packed.values.unflatten(-1, (-1, 2))
    nibbles = unpack_int4(packed.metadata, pairs.shape[-2]).long()
    places = torch.stack([nibbles & 3, nibbles >> 2], -1)
    dense = torch.zeros(*pairs.shape[:-1], 4, dtype=pairs.dtype, device=pairs.device)
    return dense.scatter(-1, places, pairs).flatten(-2)


def pack_mask(kept: Tensor) -> Tensor:
    """Pack a mask, a bit for each entry, the first in the lowest bit.

    Args:
        kept: Bool ``[..., I]``.

    Returns:
        uint8 ``[..., ceil(I / 8)]``.
    """
    padded = F.pad(kept, (0, -kept.shape[-1] % 8)).to(torch.uint8).unflatten(-1, (-1, 8))
    bits = torch.zeros(padded.shape[:-1], dtype=torch.uint8, device=kept.device)
    for place in range(8):
        bits |= padded[..., place] << place
    return bits


def unpack_mask(bits: Tensor, columns: int) -> Tensor:
    """Return the mask that :func:`pack_mask` packed.

    Args:
        bits: uint8 ``[..., ceil(I / 8)]``.
        columns: I.

    Returns:
        Bool ``[..., I]``.

    Raises:
        ValueError: As many entries are not in as many bytes.
    """
    if bits.shape[-1] != -(-columns // 8):
        raise ValueError(f"{columns} weights take {-(-columns // 8)} bytes, got {bits.shape[-1]}")
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> places) & 1).bool().flatten(-2)[..., :columns]


class PackedBits(NamedTuple):
    """Rows with zeros anywhere.

    Attributes:
        values: All non-zero weights in order, one dimension.
        bits: A bit for each weight, 1 where it is not zero, the first in the lowest bit; uint8 ``[..., ceil(I / 8)]``.
        columns: I.
    """

    values: Tensor
    bits: Tensor
    columns: int


def pack_bits(weight: Tensor) -> PackedBits:
    """Pack weights with zeros anywhere: what is left, and a bit for each weight.

    Args:
        weight: ``[..., I]``.

    Returns:
        The compressed form; smaller than 16-bit weights from ``1 / 16`` zeros on.
    """
    kept = weight != 0
    return PackedBits(weight[kept], pack_mask(kept), weight.shape[-1])


def unpack_bits(packed: PackedBits) -> Tensor:
    """Return the weights that :func:`pack_bits` packed, ``[..., I]``.

    Raises:
        ValueError: As many bits are not set as there are values.
    """
    kept = unpack_mask(packed.bits, packed.columns)
    if int(kept.sum()) != packed.values.numel():
        raise ValueError(f"{int(kept.sum())} weights are marked, but there are {packed.values.numel()} values")
    dense = torch.zeros(kept.shape, dtype=packed.values.dtype, device=packed.values.device)
    return dense.masked_scatter(kept, packed.values)
