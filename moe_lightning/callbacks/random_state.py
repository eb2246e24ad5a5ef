"""Randomness that a resumed run continues where the saved one was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


def random_states() -> dict[str, Any]:
    """Return the states of the global random generators, as tensors and plain types only (``weights_only`` loading)."""
    version, internal, gauss_next = random.getstate()
    generator: Any = numpy.random.get_state(legacy=False)
    states: dict[str, Any] = {
        "python": [version, list(internal), gauss_next],
        "numpy": {
            "bit_generator": str(generator["bit_generator"]),
            "key": torch.from_numpy(generator["state"]["key"].astype("int64")),
            "pos": int(generator["state"]["pos"]),
            "has_gauss": int(generator["has_gauss"]),
            "gauss": float(generator["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Set the global random generators.

    Args:
        states: What :func:`random_states` returned.
    """
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    generator = states["numpy"]
    numpy.random.set_state(
        {
            "bit_generator": generator["bit_generator"],
            "state": {"key": generator["key"].cpu().numpy().astype("uint32"), "pos": generator["pos"]},
            "has_gauss": generator["has_gauss"],
            "gauss": generator["gauss"],
        }
    )
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


@contextmanager
def same_random_states() -> Iterator[None]:
    """Leave the global random generators as they were, whatever is drawn inside a ``with`` block."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


class RandomState(Callback):
    """Make a resumed run draw the same random numbers as one that was never interrupted.

    It belongs first in the list of callbacks, since others may draw numbers. The generators' states go into every
    checkpoint. They come back at the first training batch: what happens before it, making the data and the model, draws
    numbers too. Validation is taken out of the sequence, so that training does not depend on how often it is
    interrupted by it. Under several processes each keeps its own sequence, but a checkpoint holds that of the first one
    only: there a resumed run is a valid continuation, not the identical one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._to_restore: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the generators now."""
        return random_states()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states for the first training batch."""
        self._to_restore = state_dict

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore the states of the checkpoint, once."""
        self._restore(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore them where no batch was left, for what acts at the end."""
        self._restore(trainer)

    def _restore(self, trainer: Trainer) -> None:
        if self._to_restore is not None:
            if trainer.world_size == 1:
                set_random_states(self._to_restore)
            self._to_restore = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where training was."""
        self._before_validation = random_states()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return to where training was."""
        if self._before_validation is not None:
            set_random_states(self._before_validation)
            self._before_validation = None
