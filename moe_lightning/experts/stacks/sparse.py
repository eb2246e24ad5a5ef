"""What is left of matrices after pruning.

Legend: S matrices (slots), O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from moe_kernels import sparse24_grouped_linear
from moe_kernels.packing import Packed24, pack_24_kept, pack_mask, unpack_24, unpack_int4, unpack_mask
from torch import Tensor, nn

from moe_lightning.experts.stacks.base import WeightStack, slot_index
from moe_lightning.plan import WeightFormat


class Sparse24(WeightStack):
    """Two of every four neighbours along the input, and where they stand. The values can be trained.

    Attributes:
        values: ``[S, O, I / 2]``.
        metadata: Their places, 2 bits each, uint8 ``[S, O, ceil(I / 8)]``.
    """

    kind = "sparse24"
    values: nn.Parameter
    metadata: Tensor

    def __init__(self, format: WeightFormat, values: nn.Parameter, metadata: Tensor) -> None:
        """Hold values and their places.

        Args:
            format: Of the stack.
            values: ``[S, O, I / 2]``.
            metadata: uint8 ``[S, O, ceil(I / 8)]``.
        """
        super().__init__(format, values.shape[0], values.shape[1], 2 * values.shape[2], values.dtype)
        self.values = values
        self.register_buffer("metadata", metadata)

    @classmethod
    def _empty(cls, format: WeightFormat, size: tuple[int, int, int], dtype: torch.dtype, device: Any) -> Sparse24:
        values = torch.zeros(*size[:2], size[2] // 2, dtype=dtype, device=device)
        # Places 0 and 1 in every group: a table that is one, until it is loaded.
        metadata = torch.full((*size[:2], -(-size[2] // 8)), 0x44, dtype=torch.uint8, device=device)
        return cls(format, nn.Parameter(values), metadata)

    @classmethod
    def pack(cls, format: WeightFormat, weight: Tensor, keep: Tensor) -> Sparse24:
        """Make a stack of weights ``[S, O, I]``, of which ``keep`` marks exactly two in every four.

        Raises:
            ValueError: It marks more or fewer.
        """
        if keep.device.type != "meta" and bool((keep.unflatten(-1, (-1, 4)).sum(-1) != 2).any()):
            raise ValueError("the mask does not keep exactly two of every four neighbours, as the pattern 2:4 says")
        packed = pack_24_kept(weight.detach(), keep)
        return cls(format, nn.Parameter(packed.values.contiguous()), packed.metadata)

    @property
    def places(self) -> Tensor:
        """Input of every value, int64 ``[S, O, I / 2]``."""
        nibbles = unpack_int4(self.metadata, self.inputs // 4).long()
        first = 4 * torch.arange(self.inputs // 4, device=nibbles.device)
        return torch.stack([first + (nibbles & 3), first + (nibbles >> 2)], -1).flatten(-2)

    def zeros_kept(self) -> Tensor:
        """Return which weights may be other than zero, bool ``[S, O, I]``."""
        kept = torch.zeros(self.slots, self.outputs, self.inputs, dtype=torch.bool, device=self.values.device)
        return kept.scatter(-1, self.places, True)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weights in floating point, ``[S, O, I]``; differentiable in the values."""
        return unpack_24(Packed24(self.values, self.metadata)).to(dtype or self.dtype)

    def linear(self, rows_PI: Tensor, offsets_S: Tensor) -> Tensor:
        """Multiply each group of rows with its own matrix, ``[P, O]``; differentiable in the rows and the values.

        On a CPU only matrices that rows reached are spelled out, tile by tile.

        Args:
            rows_PI: Rows sorted by slot, in the type to compute in.
            offsets_S: End of each slot's rows, int32.
        """
        return sparse24_grouped_linear(rows_PI, offsets_S, self.values, self.metadata)

    def select(self, slots: Sequence[int]) -> Sparse24:
        """Return a stack of some of the matrices."""
        index = slot_index(slots, self.values.device)
        values = nn.Parameter(self.values.detach()[index], requires_grad=self.values.requires_grad)
        return Sparse24(self.format, values, self.metadata[index])


class _OnlyKept(torch.autograd.Function):
    """Weights as they are, whose gradient is zero where they were pruned.

    No second copy of them is made, as a product with a mask would keep for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, weight_SOI: Tensor, bits: Tensor) -> Tensor:
        ctx.save_for_backward(bits)
        return weight_SOI.view_as(weight_SOI)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient_SOI,) = gradients
        (bits,) = ctx.saved_tensors
        return gradient_SOI.masked_fill(~unpack_mask(bits, gradient_SOI.shape[-1]), 0), None


class Masked(WeightStack):
    """Weights with zeros anywhere: compressed on disk, plain in memory, where no product gains from the zeros.

    *Closed*, as it is built and written, it holds the values that are left; *open*, as it works, all weights. A state
    dict is always that of the closed form.

    What is outside the mask is zero, whatever anybody writes there: updates that are not zero where the gradient is
    (Muon, averages of older weights, noise) are taken out again before the next product in training, when the module
    goes into training or evaluation, and before its values are saved. So the model that is saved is the one that works.

    Attributes:
        bits: A bit for each weight, 1 where it may be other than zero, uint8 ``[S, O, ceil(I / 8)]``.
        values: Closed: the weights kept, ``[S, kept]``. None where open.
        weight: Open: ``[S, O, I]``. None where closed.
    """

    kind = "sparse"
    bits: Tensor
    values: nn.Parameter | None
    weight: nn.Parameter | None

    def __init__(
        self,
        format: WeightFormat,
        size: tuple[int, int, int],
        bits: Tensor,
        values: nn.Parameter | None = None,
        weight: nn.Parameter | None = None,
    ) -> None:
        """Hold one of values and weight.

        Args:
            format: Of the stack.
            size: S, O and I.
            bits: uint8 ``[S, O, ceil(I / 8)]``.
            values: ``[S, kept]``, or None.
            weight: ``[S, O, I]``, zero where the mask is; or None.
        """
        held = values if values is not None else weight
        assert held is not None and (values is None or weight is None)
        super().__init__(format, *size, held.dtype)
        self.register_buffer("bits", bits)
        self.register_parameter("values", values)
        self.register_parameter("weight", weight)
        self._cleared: tuple[int, int] | None = None

    @classmethod
    def _empty(cls, format: WeightFormat, size: tuple[int, int, int], dtype: torch.dtype, device: Any) -> Masked:
        kept = format.kept(*size[1:])
        values = torch.zeros(size[0], kept, dtype=dtype, device=device)
        # A mask of as many weights, until it is loaded.
        mask = torch.zeros(size[1] * size[2], dtype=torch.bool, device=device)
        mask[:kept] = True
        bits = pack_mask(mask.view(size[1:])).expand(size[0], -1, -1).clone()
        return cls(format, size, bits, values=nn.Parameter(values))

    @classmethod
    def pack(cls, format: WeightFormat, weight: Tensor, keep: Tensor) -> Masked:
        """Make an open stack of weights ``[S, O, I]`` and a mask.

        Raises:
            ValueError: The mask does not keep as many weights of each matrix as the format says.
        """
        kept = format.kept(*weight.shape[1:])
        counts = keep.flatten(1).sum(1)
        if weight.device.type != "meta" and bool((counts != kept).any()):
            raise ValueError(f"the mask keeps {counts.tolist()} weights of the matrices, {format} keeps {kept}")
        values = weight.detach().masked_fill(~keep, 0)
        return cls(format, tuple(weight.shape), pack_mask(keep), weight=nn.Parameter(values))  # type: ignore[arg-type]

    def zeros_kept(self) -> Tensor:
        """Return which weights may be other than zero, bool ``[S, O, I]``."""
        return unpack_mask(self.bits, self.inputs)

    def _expanded(self) -> Tensor:
        assert self.values is not None
        zeros = self.values.new_zeros(self.slots, self.outputs, self.inputs)
        if zeros.device.type == "meta":
            return zeros
        return zeros.masked_scatter(self.zeros_kept(), self.values)

    def open(self) -> None:
        """Hold all weights from now on; a new parameter, so before there is an optimizer."""
        if self.values is None:
            return
        trained = self.values.requires_grad
        with torch.inference_mode(False), torch.no_grad():
            self.weight = nn.Parameter(self._expanded(), requires_grad=trained)
        self.values = None

    @torch.compiler.disable
    def _clear(self, always: bool) -> None:
        """Take out of the open weights what somebody wrote outside the mask.

        Args:
            always: Also where the weights do not seem to have been written to: some optimizers write to ``.data``, of
                which autograd's count of changes knows nothing.
        """
        weight = self.weight
        if weight is None or weight.device.type == "meta":
            return
        now = None if weight.is_inference() else (weight.data_ptr(), weight._version)
        if always or now is None or now != self._cleared:
            with torch.inference_mode(weight.is_inference()), torch.no_grad():
                # No change that autograd should count: zeros become zeros while a graph may hold these weights.
                weight.data.masked_fill_(~self.zeros_kept(), 0)
            self._cleared = now

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weights in floating point, ``[S, O, I]``; pruned ones are zeros and get no gradient."""
        if self.weight is None:
            weight = self._expanded()
        elif torch.is_grad_enabled() and self.weight.requires_grad:
            # The backward pass reads the mask as well: a tenth of the time of a product with 256 rows for each matrix.
            self._clear(always=True)
            weight = _OnlyKept.apply(self.weight, self.bits)
        else:
            self._clear(always=False)
            weight = self.weight
        return weight.to(dtype or self.dtype)

    def train(self, mode: bool = True) -> Self:
        """Go into training or evaluation, with zeros where the mask says so."""
        self._clear(always=True)
        return super().train(mode)

    def select(self, slots: Sequence[int]) -> Masked:
        """Return a stack of some of the matrices, open or closed like this one."""
        self._clear(always=True)
        index = slot_index(slots, self.bits.device)
        held = self.values if self.weight is None else self.weight
        assert held is not None
        chosen = nn.Parameter(held.detach()[index], requires_grad=held.requires_grad)
        size = (len(slots), self.outputs, self.inputs)
        name = "values" if self.weight is None else "weight"
        return Masked(self.format, size, self.bits[index], **{name: chosen})

    def slot(self, number: int) -> Masked:
        """Return one of the matrices as a stack of one, to read from; an open one shares its weights with this stack.

        Args:
            number: Slot.
        """
        if self.weight is None:
            return super().slot(number)  # type: ignore[return-value]
        part = slice(number, number + 1)
        shared = nn.Parameter(self.weight.detach()[part], requires_grad=False)
        return Masked(self.format, (1, self.outputs, self.inputs), self.bits[part], weight=shared)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._clear(always=True)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination.pop(f"{prefix}weight", None)
        if weight is not None:
            with torch.no_grad():
                kept = self.format.kept(self.outputs, self.inputs)
                if weight.device.type == "meta":
                    values = weight.new_zeros(self.slots, kept)
                else:
                    values = weight.detach()[self.zeros_kept()].view(self.slots, kept)
            destination[f"{prefix}values"] = values

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        name = f"{prefix}values"
        if self.weight is None or name not in state_dict or f"{prefix}bits" not in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        # An open stack is loaded through a closed one.
        bits = state_dict[f"{prefix}bits"]
        values = state_dict[name]
        kept = unpack_mask(bits, self.inputs) if bits.shape == self.bits.shape else None
        changed = dict(state_dict)
        del changed[name]
        if kept is not None and kept.device.type != "meta" and int(kept.sum()) == values.numel():
            zeros = values.new_zeros(self.slots, self.outputs, self.inputs)
            changed[f"{prefix}weight"] = zeros.masked_scatter(kept, values)
        super()._load_from_state_dict(changed, prefix, *args)
