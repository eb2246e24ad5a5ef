"""Gate and up projections of many tokens, and SwiGLU: ``inner = silu(gate x) * up x``.

Programs stay and take one tile after another from a list that the GPU made. Weights come through tensor descriptors
(by Hopper's copy engine where there is one), rows of the input by pointers, as they are not neighbours.

Legend: N tokens, H hidden, I intermediate, S slots, K top-k, P places of pairs sorted by slot, M places of a tile, O
channels of a tile, X inputs of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.triton_kernels.interpreting import compute_type
from moe_kernels.triton_kernels.schedule import Schedule


@triton.jit
def tile_of(number, tiles_m, tiles_o, TILES_TOGETHER: tl.constexpr):
    """Turn the number of a tile into its row and column: some rows of tiles share the weights while they are near."""
    width = TILES_TOGETHER * tiles_o
    first = number // width * TILES_TOGETHER
    height = tl.minimum(tiles_m - first, TILES_TOGETHER)
    return first + number % width % height, number % width // height


@triton.jit
def weight_tile(
    weights,
    matrix,
    column,
    first,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Load a tile of one of several stacked matrices, by a descriptor of all their rows or by a pointer to the first.

    A tile that reaches over the last row holds rows of the next matrix (or the last one again); what comes of them is
    not stored. Behind the last input stand zeros.
    """
    if DESCRIPTORS:
        return weights.load([matrix * OUTPUTS + column * BLOCK_OUT, first])
    else:
        row_O = column * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        if OUTPUTS % BLOCK_OUT != 0:
            row_O = tl.minimum(row_O, OUTPUTS - 1)
        in_X = tl.arange(0, BLOCK_IN)
        base = weights + matrix.to(tl.int64) * OUTPUTS * INPUTS + first
        tile_OX = base + row_O.to(tl.int64)[:, None] * INPUTS + in_X[None, :]
        if INPUTS % BLOCK_IN == 0:
            return tl.load(tile_OX)
        else:
            return tl.load(tile_OX, mask=(first + in_X < INPUTS)[None, :], other=0.0)


@triton.jit
def grouped_gate_up_kernel(
    hidden_ptr,
    weights,
    order_ptr,
    ends_ptr,
    tile_slot_ptr,
    tile_first_ptr,
    num_tiles_ptr,
    inner_ptr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    TILES_TOGETHER: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """All tiles whose numbers leave the same rest."""
    TILES_OUT: tl.constexpr = (INNER + BLOCK_OUT - 1) // BLOCK_OUT
    tiles_m = tl.load(num_tiles_ptr)
    in_X = tl.arange(0, BLOCK_IN)
    for number in tl.range(tl.program_id(0), tiles_m * TILES_OUT, tl.num_programs(0)):
        tile, column = tile_of(number, tiles_m, TILES_OUT, TILES_TOGETHER)
        slot = tl.load(tile_slot_ptr + tile)
        place_M = tl.load(tile_first_ptr + tile).to(tl.int64) + tl.arange(0, BLOCK_ROWS)
        known_M = place_M < tl.load(ends_ptr + slot)
        token_M = tl.load(order_ptr + place_M, mask=known_M, other=0).to(tl.int64) // TOP_K
        input_MX = hidden_ptr + token_M[:, None] * HIDDEN + in_X[None, :]
        gate_MO = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        up_MO = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        for first in tl.range(0, HIDDEN, BLOCK_IN, num_stages=STAGES):
            if HIDDEN % BLOCK_IN == 0:
                part_MX = tl.load(input_MX + first, mask=known_M[:, None], other=0.0).to(COMPUTE)
            else:
                inside_MX = known_M[:, None] & (first + in_X < HIDDEN)[None, :]
                part_MX = tl.load(input_MX + first, mask=inside_MX, other=0.0).to(COMPUTE)
            gate_OX = weight_tile(weights, 2 * slot, column, first, INNER, HIDDEN, BLOCK_OUT, BLOCK_IN, DESCRIPTORS).to(
                COMPUTE
            )
            up_OX = weight_tile(
                weights, 2 * slot + 1, column, first, INNER, HIDDEN, BLOCK_OUT, BLOCK_IN, DESCRIPTORS
            ).to(COMPUTE)
            gate_MO = tl.dot(part_MX, gate_OX.T, gate_MO, input_precision="ieee")
            up_MO = tl.dot(part_MX, up_OX.T, up_MO, input_precision="ieee")
        inner_MO = (gate_MO / (1 + tl.exp(-gate_MO)) * up_MO).to(inner_ptr.dtype.element_ty)
        out_O = column * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        target_MO = inner_ptr + place_M[:, None] * INNER + out_O[None, :]
        tl.store(target_MO, inner_MO, mask=known_M[:, None] & (out_O < INNER)[None, :])


def grouped_gate_up(
    hidden_NH: Tensor,
    gate_up_S2IH: Tensor,
    schedule: Schedule,
    block_out: int = 128,
    block_in: int = 64,
    tiles_together: int = 16,
    num_warps: int = 8,
    num_stages: int = 3,
    programs: int | None = None,
    descriptors: bool | None = None,
) -> Tensor:
    """Compute the inner activations of all pairs that reach a real expert.

    Args:
        hidden_NH: Input of the block after its norm, ``[N, H]``, contiguous.
        gate_up_S2IH: Gate rows, then up rows, ``[S, 2I, H]``, contiguous.
        schedule: The pairs sorted by slot; its tiles' rows are those of the tiles here.
        block_out: Channels of a tile.
        block_in: Inputs of a tile.
        tiles_together: Rows of tiles that go through the weights together.
        num_warps: Warps of a block.
        num_stages: Tiles on their way at a time.
        programs: Programs that stay; one for each of the GPU's processors where None.
        descriptors: Load weights by descriptors; where None, decided by :func:`has_descriptors`.

    Returns:
        ``[P, I]``; places behind the last are not written.
    """
    slots, rows, hidden_size = gate_up_S2IH.shape
    inner_size = rows // 2
    descriptors = has_descriptors(gate_up_S2IH) if descriptors is None else descriptors
    places = schedule.order_P.shape[0]
    inner_PI = hidden_NH.new_empty(places, inner_size)
    if inner_PI.numel() and slots:
        grouped_gate_up_kernel[(programs or processors(hidden_NH.device),)](
            hidden_NH,
            weights_of(gate_up_S2IH, block_out, block_in) if descriptors else gate_up_S2IH,
            schedule.order_P,
            schedule.ends_S,
            schedule.tile_slot_M,
            schedule.tile_first_M,
            schedule.num_tiles,
            inner_PI,
            HIDDEN=hidden_size,
            INNER=inner_size,
            TOP_K=schedule.slot_NK.shape[1],
            BLOCK_ROWS=schedule.tile_rows,
            BLOCK_OUT=block_out,
            BLOCK_IN=block_in,
            TILES_TOGETHER=tiles_together,
            STAGES=num_stages,
            DESCRIPTORS=descriptors,
            COMPUTE=compute_type(hidden_NH.dtype),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return inner_PI


def has_descriptors(weight: Tensor) -> bool:
    """Say whether a GPU loads weights by descriptors: from Hopper on, rows and memory aligned to 16 bytes."""
    aligned = weight.shape[-1] * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0
    return aligned and weight.is_cuda and torch.cuda.get_device_capability(weight.device) >= (9, 0)


def weights_of(weight_SOX: Tensor, block_out: int, block_in: int) -> TensorDescriptor:
    """Describe all rows of a stack of matrices."""
    return TensorDescriptor.from_tensor(weight_SOX.view(-1, weight_SOX.shape[-1]), [block_out, block_in])


def processors(device: torch.device) -> int:
    """Return the number of a GPU's processors; of programs that suffice where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def grouped_gate_up_twin(hidden_NH: Tensor, gate_up_S2IH: Tensor, schedule: Schedule) -> Tensor:
    """Say the same in plain torch, place by place, in fp32 or wider: ``[P', I]`` with the last place as its end."""
    wide = torch.promote_types(hidden_NH.dtype, torch.float32)
    outputs, start = [], 0
    for gate_up_2IH, end in zip(gate_up_S2IH, schedule.ends_S.tolist(), strict=True):
        rows = hidden_NH[schedule.order_P[start:end].long() // schedule.slot_NK.shape[1]].to(wide)
        gate, up = (rows @ gate_up_2IH.to(wide).T).chunk(2, -1)
        outputs.append(torch.nn.functional.silu(gate) * up)
        start = end
    return torch.cat(outputs)
