"""The module that stands in ``mlp.experts`` of a compressed layer.

Legend: N tokens, H hidden, E experts the router knows, K top-k, S real experts, V novices, R rows of their maps, P
routed pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from moe_kernels import ABSENT, NoviceMaps, combine_with_novices, sort_pairs
from moe_kernels.experts import Activation
from torch import Tensor, nn

from moe_lightning.experts.kernel_path import (
    KernelInputs,
    kernel_inputs,
    mix_by_kernels,
    storage_weights,
    train_by_kernels,
    wants_gradient,
    why_no_kernels,
)
from moe_lightning.experts.storage import Dense, Packed


class CompressedExperts(nn.Module):
    """The experts of a layer, of which only the real ones store weights.

    Has the signature of transformers' experts modules, ``forward(hidden [tokens, hidden], index [tokens, k],
    weight [tokens, k]) -> [tokens, hidden]``, and its own dispatch: transformers' implementations would index a stack
    of fewer experts with the router's numbers.

    ``y = sum_{i real} g_i(x) E_i(x) + sum_{i novice} g_i(x) (v_i + map_i(x))`` (2406.02500 eq. 7 with the novices of
    2507.00390; their low-rank maps are ours).

    Attributes:
        storage: Weights of the real experts, one slot each.
        novices: Novice vectors ``[novices, hidden]``, or None where the layer has none.
        novice_in: What the novices' low-rank maps read, ``[rows, hidden]``, or None where all are constants.
        novice_out: What they add, ``[rows, hidden]``.
        novice_map: Number of the novice that each row of the maps belongs to.
        slot_map: For each router row the slot (``>= 0``), ``-1 - number`` of a novice, or ``ABSENT``. Derived from the
            plan, so it is in no state dict.
        num_experts: Router rows, E.
    """

    novices: nn.Parameter | None
    novice_in: nn.Parameter | None
    novice_out: nn.Parameter | None

    def __init__(
        self,
        storage: Dense | Packed,
        slot_map: Sequence[int],
        novices: nn.Parameter | None,
        act_fn: Activation,
        novice_in: nn.Parameter | None = None,
        novice_out: nn.Parameter | None = None,
        novice_map: Sequence[int] = (),
    ) -> None:
        """Put storage, novices and the map between them together.

        Args:
            storage: Weights of the real experts.
            slot_map: One entry for each router row; several rows may share a slot.
            novices: ``[novices, hidden]`` or None.
            act_fn: Activation of the gate half.
            novice_in: ``[rows, hidden]`` or None.
            novice_out: ``[rows, hidden]`` or None.
            novice_map: One entry for each row.

        Raises:
            ValueError: The map does not name every slot, and every novice once, or the low-rank maps do not fit.
        """
        super().__init__()
        num_novices = 0 if novices is None else novices.shape[0]
        named = sorted(place for place in slot_map if place < 0 and place != ABSENT)
        slots = {place for place in slot_map if place >= 0}
        if named != list(range(-num_novices, 0)) or slots != set(range(storage.num_slots)):
            raise ValueError(
                f"slot map {list(slot_map)} must name each of {storage.num_slots} slots and {num_novices} novices"
            )
        rows = [0 if stack is None else stack.shape[0] for stack in (novice_in, novice_out)]
        if rows != [len(novice_map)] * 2 or any(not 0 <= number < num_novices for number in novice_map):
            raise ValueError(f"maps of {rows} rows do not fit the novices {list(novice_map)} that own them")
        self.storage = storage
        self.slot_map = tuple(slot_map)
        self.novice_map = tuple(novice_map)
        self.act_fn = act_fn
        self.register_parameter("novices", novices)
        self.register_parameter("novice_in", novice_in)
        self.register_parameter("novice_out", novice_out)
        self._slot_map_tensor: Tensor | None = None
        self._novice_map_tensor: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """Router rows, E."""
        return len(self.slot_map)

    @property
    def num_novices(self) -> int:
        """Novices, V."""
        return 0 if self.novices is None else self.novices.shape[0]

    def slot_map_on(self, device: torch.device) -> Tensor:
        """Return ``slot_map`` as an int64 tensor ``[E]`` on a device, made once."""
        # A buffer would stay on the meta device after transformers' loading, which fills only what the files hold.
        if self._slot_map_tensor is None or self._slot_map_tensor.device != device:
            with torch.inference_mode(False):
                self._slot_map_tensor = torch.tensor(self.slot_map, dtype=torch.int64, device=device)
        return self._slot_map_tensor

    def maps_on(self, device: torch.device) -> NoviceMaps | None:
        """Return the novices' low-rank maps, or None where all are constants."""
        if self.novice_in is None or self.novice_out is None:
            return None
        if self._novice_map_tensor is None or self._novice_map_tensor.device != device:
            with torch.inference_mode(False):
                self._novice_map_tensor = torch.tensor(self.novice_map, dtype=torch.int64, device=device)
        return NoviceMaps(self.novice_in, self.novice_out, self._novice_map_tensor)

    def forward(self, hidden_NH: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """Mix real experts and novices: by the Triton kernels where they are switched on; see `kernel_path`.

        Args:
            hidden_NH: Input of the block after its norm, ``[tokens, hidden]``.
            index_NK: Router rows chosen, int64 ``[tokens, k]``.
            weight_NK: Routing weights, ``[tokens, k]``.

        Returns:
            ``[tokens, hidden]`` in the type of ``hidden_NH``; sums are in fp32.
        """
        if why_no_kernels(hidden_NH, self.act_fn) is None:
            mixed_NH = self._mixed_by_kernels(hidden_NH, index_NK, weight_NK)
            if mixed_NH is not None:
                return mixed_NH
        slot_map = self.slot_map_on(hidden_NH.device)
        pairs = sort_pairs(index_NK, slot_map, self.storage.num_slots)
        outputs_PH = self.storage(hidden_NH, pairs, self.act_fn)
        maps = self.maps_on(hidden_NH.device)
        return combine_with_novices(outputs_PH, pairs, index_NK, weight_NK, slot_map, self.novices, hidden_NH, maps).to(
            hidden_NH.dtype
        )

    def kernel_inputs(self, hidden_NH: Tensor) -> KernelInputs | None:
        """Return what the kernels for inference take of this layer; None where they do not know it.

        Args:
            hidden_NH: Input of the block after its norm.
        """
        return None if self._has_lora else self._kernel_inputs(hidden_NH)

    @property
    def _has_lora(self) -> bool:
        return self.storage.gate_up_lora is not None or self.storage.down_lora is not None

    def _kernel_inputs(self, hidden_NH: Tensor) -> KernelInputs | None:
        weights = storage_weights(self.storage, hidden_NH)
        if isinstance(weights, str):
            return None
        slot_map, maps = self.slot_map_on(hidden_NH.device), self.maps_on(hidden_NH.device)
        return kernel_inputs(hidden_NH, slot_map, weights, self.novices, maps)

    def _mixed_by_kernels(self, hidden_NH: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor | None:
        """Do what `forward` does by the kernels; None where they do not know the weights."""
        inputs = self._kernel_inputs(hidden_NH)
        if inputs is None:
            return None
        # Only those that train know low-rank terms.
        if self._has_lora or wants_gradient(hidden_NH, weight_NK, self.parameters()):
            return train_by_kernels(hidden_NH, index_NK, weight_NK, inputs, self.storage)
        return mix_by_kernels(hidden_NH, index_NK, weight_NK, inputs)

    def extra_repr(self) -> str:
        """Say how many experts are real and how many are novices, of what rank together."""
        ranks = f", ranks={len(self.novice_map)}" if self.novice_map else ""
        return f"num_experts={self.num_experts}, real={self.storage.num_slots}, novices={self.num_novices}{ranks}"
