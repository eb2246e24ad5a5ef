"""Int4 weights in the layout of torch's own int4 product on a CPU, and back, exactly.

``torch.ops.aten._weight_int4pack_mm_for_cpu`` wants the codes of blocks of rows interleaved, in a way that depends on
the vector width of the machine. How, is found by packing the numbers of the rows. Two codes a byte, as in the stored
form, so one form can stand for the other, and only one of them need be in memory.

Legend: S matrices (slots), O outputs, I inputs, G groups along the input, W words of a row, B blocks of R rows, D half
the rows of a block, H = 2 (those in the low, and those in the high halves of its bytes), X inputs of a group, P rows of
one slot.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_kernels.int4 import SYMMETRIC_ZERO, TILE_WEIGHTS, Int4Matrices, tile_type
from moe_kernels.machine import int4_route, this_machine
from moe_kernels.packing import pack_int4, unpack_int4

_OP_GROUPS = (256, 128, 64, 32)
_ROW_MULTIPLE = 16
_PROBE_INPUTS = (32, 96)


@dataclass(frozen=True)
class RowBlocks:
    """Neighbouring blocks of rows that are packed alike: ``[number, inputs, rows / 2]`` bytes.

    Attributes:
        first: First row.
        number: Blocks.
        rows: Rows of a block.
        low: Where the rows in the low halves of its bytes stand in a block.
        high: Where those in the high halves do.
    """

    first: int
    number: int
    rows: int
    low: slice
    high: slice

    def split(self, tensor: Tensor, dim: int) -> Tensor:
        """Cut the rows of these blocks out of a tensor and turn them into two dimensions, blocks and rows: a view."""
        return tensor.narrow(dim, self.first, self.number * self.rows).unflatten(dim, (self.number, self.rows))

    def bytes_of(self, packed: Tensor, inputs: int) -> Tensor:
        """Return the bytes of these blocks, ``[B, I, D]``: a view of a packed matrix."""
        size = self.number * self.rows * inputs // 2
        part = packed.view(-1).narrow(0, self.first * inputs // 2, size)
        return part.view(self.number, inputs, self.rows // 2)


Layout = tuple[RowBlocks, ...]


@functools.cache
def cpu_layout(outputs: int) -> Layout | None:
    """Find out how torch's int4 product on this machine's CPU wants matrices of some size.

    Args:
        outputs: O.

    Returns:
        The blocks of rows; None where there is no such product, it does not take the size, or the layout is not
        understood: it was used to pack random codes, which must be what torch packs, and come back.
    """
    if outputs <= 0 or outputs % _ROW_MULTIPLE:
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        with torch.inference_mode():
            layout = _read_layout(outputs, _PROBE_INPUTS[0])
            for inputs in _PROBE_INPUTS:
                codes_OI = torch.randint(0, 16, (outputs, inputs), generator=generator, dtype=torch.uint8, device="cpu")
                packed = _pack_rows(codes_OI, layout)
                if not torch.equal(packed, _packed_by_torch(codes_OI)):
                    return None
                if not torch.equal(_unpack_rows(packed, outputs, layout), codes_OI):
                    return None
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return None
    return layout


def _packed_by_torch(codes_OI: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI.int(), 1).flatten()


def _read_layout(outputs: int, inputs: int) -> Layout:
    """Pack the numbers of rows, four bits at a time, and read off which row every half byte belongs to."""
    rows_O1 = torch.arange(outputs, device="cpu")[:, None]
    low, high = torch.zeros(2, outputs * inputs // 2, dtype=torch.int64, device="cpu")
    for shift in range(0, outputs.bit_length(), 4):
        plane = _packed_by_torch((rows_O1 >> shift & 15).to(torch.uint8).expand(outputs, inputs).contiguous()).long()
        low |= (plane & 15) << shift
        high |= (plane >> 4) << shift
    runs: list[RowBlocks] = []
    first = 0
    while first < outputs:
        start = first * inputs // 2
        # Bytes of one input, then of the next: the first row returns after half the rows of a block.
        again = (low[start + 1 : start + 1 + outputs] == low[start]).nonzero()
        half = int(again[0]) + 1 if again.numel() else 0
        in_low, in_high = (_as_slice(part[start : start + half] - first) for part in (low, high))
        found = RowBlocks(first, 1, 2 * half, in_low, in_high)
        last = runs[-1] if runs else None
        if last is not None and replace(last, first=first, number=1) == found:
            runs[-1] = replace(last, number=last.number + 1)
        else:
            runs.append(found)
        first += 2 * half
    return tuple(runs)


def _as_slice(rows_D: Tensor) -> slice:
    """Return rows in even steps as a slice."""
    rows = rows_D.tolist()
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if not rows or step <= 0 or rows[0] < 0:
        raise ValueError(f"rows {rows} are in no order that is known")
    found = slice(rows[0], rows[-1] + 1, step)
    if list(range(*found.indices(rows[-1] + 1))) != rows:
        raise ValueError(f"rows {rows} are in no even steps")
    return found


def _pack_rows(codes_OI: Tensor, layout: Layout) -> Tensor:
    """Return codes in a layout, uint8 ``[O * I / 2]``."""
    parts = []
    for blocks in layout:
        codes_BRI = blocks.split(codes_OI, 0)
        bytes_BDI = codes_BRI[:, blocks.low] | codes_BRI[:, blocks.high] << 4
        parts.append(bytes_BDI.transpose(1, 2).flatten())
    return torch.cat(parts)


def _unpack_rows(packed: Tensor, outputs: int, layout: Layout) -> Tensor:
    """Return the codes ``[O, I]`` that :func:`_pack_rows` packed."""
    inputs = 2 * packed.numel() // outputs
    codes_OI = packed.new_empty(outputs, inputs)
    for blocks in layout:
        codes_BRI = blocks.split(codes_OI, 0)
        bytes_BDI = blocks.bytes_of(packed, inputs).transpose(1, 2)
        codes_BRI[:, blocks.low] = bytes_BDI & 15
        codes_BRI[:, blocks.high] = bytes_BDI >> 4
    return codes_OI


def op_group(group: int) -> int | None:
    """Return the group size that torch's product is given for groups of a size, or None where there is none.

    Larger groups than it knows are cut into several with the same scale.
    """
    if group in _OP_GROUPS:
        return group
    # Smaller cuts would cost more than a few percent of memory.
    return next((size for size in _OP_GROUPS if size >= 128 and group % size == 0), None)


@dataclass(frozen=True)
class CpuMatrices(Int4Matrices):
    """Int4 matrices in the layout of this machine's CPU.

    Attributes:
        packed_SOB: Two codes a byte, uint8 ``[S, O, I / 2]``; where they stand, `cpu_layout` knows.
        scales_SGO2: Scale and ``(8 - zero) * scale``, bfloat16 ``[S, G', O, 2]``, one for each of the product's groups.
    """

    packed_SOB: Tensor
    scales_SGO2: Tensor

    @property
    def outputs(self) -> int:
        """O."""
        return self.packed_SOB.shape[1]

    @property
    def inputs(self) -> int:  # type: ignore[override]
        """I."""
        return 2 * self.packed_SOB.shape[2]

    @property
    def group(self) -> int:
        """Inputs of one of the product's groups."""
        return self.inputs // self.scales_SGO2.shape[1]

    def product(self, slot: int, rows_PI: Tensor, out_PO: Tensor) -> None:
        """See `Int4Matrices.product`."""
        if int4_route(rows_PI.shape[0], rows_PI.dtype, this_machine()) == "op":
            out_PO.copy_(
                torch.ops.aten._weight_int4pack_mm_for_cpu(
                    rows_PI.contiguous(), self.packed_SOB[slot], self.group, self.scales_SGO2[slot]
                )
            )
            return
        rows_PI = rows_PI.to(tile_type(rows_PI))
        for blocks, weight_IBHD in self._tiles(slot, rows_PI.dtype):
            tile_PBHD = (rows_PI @ weight_IBHD.flatten(1)).unflatten(1, weight_IBHD.shape[1:])
            out_PBR = blocks.split(out_PO, 1)
            out_PBR[..., blocks.low], out_PBR[..., blocks.high] = tile_PBHD.unbind(2)

    def transposed_product(self, slot: int, grad_PO: Tensor, out_PI: Tensor) -> None:
        """See `Int4Matrices.transposed_product`."""
        total_PI = torch.zeros_like(out_PI, dtype=torch.promote_types(grad_PO.dtype, torch.float32))
        grad_PO = grad_PO.to(tile_type(grad_PO))
        for blocks, weight_IBHD in self._tiles(slot, grad_PO.dtype):
            grad_PBR = blocks.split(grad_PO, 1)
            grad_PBHD = torch.stack([grad_PBR[..., blocks.low], grad_PBR[..., blocks.high]], 2)
            total_PI += grad_PBHD.flatten(1) @ weight_IBHD.flatten(1).T
        out_PI.copy_(total_PI)

    def _tiles(self, slot: int, dtype: torch.dtype) -> Iterator[tuple[RowBlocks, Tensor]]:
        """Give the weights of some blocks at a time, transposed as they lie: ``[I, B, H, D]``, overwritten by the next.

        Four passes over memory that stays in the cache, and is not asked for again for every tile.
        """
        layout = cpu_layout(self.outputs)
        assert layout is not None
        wide = torch.promote_types(dtype, torch.float32)
        scale_GO = self.scales_SGO2[slot, :, :, 0].to(wide)
        # fp32 holds the product of a scale with a code or a zero exactly, and so their difference.
        offset_GO = -_zeros(self.scales_SGO2[slot]).to(wide) * scale_GO
        for run in layout:
            half = run.rows // 2
            most = min(run.number, max(1, 2 * TILE_WEIGHTS // (run.rows * self.inputs)))
            codes = torch.empty(most, self.inputs, half, dtype=torch.uint8, device="cpu")
            plain, scaled = torch.empty(2, *codes.shape, dtype=wide, device="cpu")
            weight = torch.empty(self.inputs * most * run.rows, dtype=dtype, device="cpu")
            bytes_BID = run.bytes_of(self.packed_SOB[slot], self.inputs)
            low, high = (
                [
                    run.split(table, 1)[..., rows].transpose(0, 1).contiguous()[:, :, None]
                    for table in (offset_GO, scale_GO)
                ]
                for rows in (run.low, run.high)
            )
            for start in range(0, run.number, most):
                number = min(most, run.number - start)
                part = slice(start, start + number)
                weight_IBHD = weight[: self.inputs * number * run.rows].view(self.inputs, number, 2, half)
                codes_BID, plain_BID, scaled_BID = codes[:number], plain[:number], scaled[:number]
                plain_BGXD, scaled_BGXD = (t.unflatten(1, (-1, self.group)) for t in (plain_BID, scaled_BID))
                for side, (offset_BG1D, scale_BG1D) in enumerate((low, high)):
                    if side == 0:
                        torch.bitwise_and(bytes_BID[part], 15, out=codes_BID)
                    else:
                        torch.bitwise_right_shift(bytes_BID[part], 4, out=codes_BID)
                    plain_BID.copy_(codes_BID)
                    torch.addcmul(offset_BG1D[part], plain_BGXD, scale_BG1D[part], out=scaled_BGXD)
                    weight_IBHD[:, :, side].copy_(scaled_BID.transpose(0, 1))
                yield replace(run, first=run.first + start * run.rows, number=number), weight_IBHD


def _zeros(scales_GO2: Tensor) -> Tensor:
    """Return the zeros behind ``(8 - zero) * scale``, fp32 ``[..., G, O]``: bf16 keeps them to 1/32 of a step."""
    scale, shift = scales_GO2.float().unbind(-1)
    return SYMMETRIC_ZERO - (shift / scale).round()


def to_cpu_layout(words_SOW: Tensor, scale_SOG: Tensor, zero_SOB: Tensor | None, inputs: int) -> CpuMatrices | None:
    """Turn stored int4 matrices into the layout of this machine's CPU, one after another.

    Args:
        words_SOW: int32 ``[S, O, ceil(I / 8)]``; see `moe_kernels.int4.dequantize_int4` for these four.
        scale_SOG: bfloat16 ``[S, O, G]``.
        zero_SOB: uint8 ``[S, O, ceil(G / 2)]``, or None.
        inputs: I.

    Returns:
        The matrices, or None where they must stay as they are: no such layout on this machine or for this number of
        outputs, groups or scales of another kind, or anything that would not come back exactly: each matrix is turned
        back, and compared.
    """
    slots, outputs, groups = scale_SOG.shape
    group = op_group(inputs // groups) if groups and inputs % groups == 0 else None
    tensors = (words_SOW, scale_SOG) if zero_SOB is None else (words_SOW, scale_SOG, zero_SOB)
    if group is None or scale_SOG.dtype != torch.bfloat16 or any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    layout = cpu_layout(outputs)
    if layout is None:
        return None
    with torch.inference_mode(False), torch.no_grad():
        # What torch's default device is, must not matter: the stored form is dropped for this one.
        packed_SOB = torch.empty(slots, outputs, inputs // 2, dtype=torch.uint8, device="cpu")
        scales_SGO2 = torch.empty(slots, inputs // group, outputs, 2, dtype=torch.bfloat16, device="cpu")
        for slot in range(slots):
            codes_OI = unpack_int4(words_SOW[slot].view(torch.uint8), inputs)
            packed_SOB[slot] = _pack_rows(codes_OI, layout).view(outputs, -1)
            scale_OG = scale_SOG[slot]
            shift_OG, zero_OG = torch.zeros_like(scale_OG), torch.full_like(scale_OG, SYMMETRIC_ZERO)
            if zero_SOB is not None:
                zero_OG = unpack_int4(zero_SOB[slot], groups)
                shift_OG = ((SYMMETRIC_ZERO - zero_OG.float()) * scale_OG.float()).bfloat16()
            pairs_GO2 = torch.stack([scale_OG, shift_OG], -1).transpose(0, 1)
            if not torch.equal(_zeros(pairs_GO2).T, zero_OG.float()):
                return None  # scales that are zero or not finite
            scales_SGO2[slot] = pairs_GO2.repeat_interleave(inputs // groups // group, 0)
            one = slice(slot, slot + 1)
            back = from_cpu_layout(CpuMatrices(packed_SOB[one], scales_SGO2[one]), groups, zero_SOB is None)
            given = [None if tensor is None else tensor[one] for tensor in (words_SOW, scale_SOG, zero_SOB)]
            if not all(_equal(*pair) for pair in zip(back, given, strict=True)):
                return None
    return CpuMatrices(packed_SOB, scales_SGO2)


def _equal(back: Tensor | None, given: Tensor | None) -> bool:
    if back is None or given is None:
        return back is given
    return back.dtype == given.dtype and torch.equal(back, given)


def from_cpu_layout(matrices: CpuMatrices, groups: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what :func:`to_cpu_layout` was given, bit for bit.

    Args:
        matrices: From :func:`to_cpu_layout` in this process.
        groups: G.
        symmetric: There were no zeros.

    Returns:
        ``words [S, O, W]``, ``scale [S, O, G]`` and packed ``zero [S, O, ceil(G / 2)]`` or None.
    """
    slots, outputs, half = matrices.packed_SOB.shape
    layout = cpu_layout(outputs)
    assert layout is not None
    with torch.inference_mode(False), torch.no_grad():
        words_SOW = torch.empty(slots, outputs, half // 4, dtype=torch.int32, device="cpu")
        for slot in range(slots):
            codes_OI = _unpack_rows(matrices.packed_SOB[slot].flatten(), outputs, layout)
            words_SOW[slot] = pack_int4(codes_OI, torch.uint8).view(torch.int32)
        once_SGO2 = matrices.scales_SGO2[:, :: matrices.scales_SGO2.shape[1] // groups]
        scale_SOG = once_SGO2[..., 0].transpose(1, 2).contiguous()
        zero_SOB = None
        if not symmetric:
            zero_SOB = pack_int4(_zeros(once_SGO2).transpose(1, 2).to(torch.uint8), torch.uint8)
    return words_SOW, scale_SOG, zero_SOB
