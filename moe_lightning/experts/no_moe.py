"""What stands where an MoE sub-layer was."""

from __future__ import annotations

from torch import Tensor, nn


class NoMoE(nn.Module):
    """Contributes nothing: the decoder layer adds its zeros to the residual stream (2406.02500, Layer Drop)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return zeros of the shape of the input, without storage of their own.

        Args:
            hidden_states: ``[batch, sequence, hidden]``.
        """
        return hidden_states.new_zeros(()).expand_as(hidden_states)
