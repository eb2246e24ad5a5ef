"""Who knows what should be predicted: another model, or predictions that were written down before.

Legend: B blocks, S tokens of a block.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_lightning.architectures import architecture_of
from moe_lightning.recovery.logit_cache import LogitCache
from moe_lightning.recovery.objective import Targets, hidden_by_layer


class ModelTeacher:
    """A model that is run beside the one that learns.

    It is no ``torch.nn.Module``, so that whoever holds it holds none of its weights: they come into no state dict and
    no checkpoint of the student.

    Args:
        model: A Mixtral, compressed or not. It is put into eval mode, and its parameters take no gradient any more.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        shape = architecture_of(model).shape(model)
        self._blocks, self._num_layers = shape.blocks, shape.num_layers

    @property
    def gives_hidden(self) -> bool:
        """It does."""
        return True

    def targets(self, batch: Mapping[str, Tensor], temperature: float, hidden: bool) -> Targets:
        """Run the model on a batch.

        Whatever precision is set around the call (autocast) holds for the teacher as it does for the student.

        Args:
            batch: ``input_ids`` ``[B, S]`` and perhaps ``attention_mask``.
            temperature: Without effect: logits are returned as they are.
            hidden: Give what enters every decoder layer as well.
        """
        with torch.no_grad():
            outputs = self.model.model(
                input_ids=batch["input_ids"],
                attention_mask=batch.get("attention_mask"),
                use_cache=False,
                output_hidden_states=hidden,
            )
            logits = self.model.lm_head(outputs.last_hidden_state)
        states = hidden_by_layer(outputs.hidden_states, self._blocks, self._num_layers) if hidden else {}
        return Targets(logits, states)


class CachedTeacher:
    """Predictions that were written down before: no second model is held.

    Args:
        cache: The predictions.
    """

    def __init__(self, cache: LogitCache) -> None:
        self.cache = cache

    @property
    def gives_hidden(self) -> bool:
        """It does not."""
        return False

    def targets(self, batch: Mapping[str, Tensor], temperature: float, hidden: bool) -> Targets:
        """Look a batch up.

        Args:
            batch: ``input_ids`` ``[B, S]``.
            temperature: That of the cache.
            hidden: Not possible.

        Raises:
            ValueError: Another temperature, hidden states, or a block that is not cached.
        """
        if temperature != self.cache.header.temperature:
            raise ValueError(
                f"{self.cache.folder} holds predictions of temperature {self.cache.header.temperature}, and "
                f"{temperature} is asked for: set temperature to it, or write another cache"
            )
        if hidden:
            raise ValueError(f"{self.cache.folder} holds no hidden states: set hidden_weight to 0, or name a model")
        return Targets(self.cache.look_up(batch["input_ids"]))
