"""What enters the modules of an untouched model, seen by hooks, and its moments by loops over tokens.

Nothing here uses the package under test.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.reference import channels_by_hand

EXPERTS, HIDDEN, CHANNELS = 6, 32, 48
"""Of the tiny model."""


def padded(sequences: Sequence[Tensor], length: int, filler: int = 7, left: bool = False) -> dict[str, Tensor]:
    ids = torch.full((len(sequences), length), filler)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(length - len(sequence), length) if left else slice(0, len(sequence))
        ids[row, place], mask[row, place] = sequence, 1
    return {"input_ids": ids, "attention_mask": mask}


class Seen:
    """What hooks on a model saw, token by token and without padding, in float64."""

    def __init__(self, model: Any, batches: Iterable[Mapping[str, Tensor]]) -> None:
        self.rows: dict[tuple[int, str], list[np.ndarray]] = {}
        self.mask: np.ndarray = np.ones(0)
        handles = []
        for number, layer in enumerate(model.model.layers):
            modules = {"q_proj": layer.self_attn.q_proj, "o_proj": layer.self_attn.o_proj, "layer": layer}
            modules["experts"] = layer.mlp.experts
            for name, module in modules.items():
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _module, arguments, key=(number, name): self.see(key, arguments)
                    )
                )
        with torch.no_grad():
            for batch in batches:
                mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
                self.mask = mask.bool().reshape(-1).numpy()
                model(**batch)
        for handle in handles:
            handle.remove()

    def see(self, key: tuple[int, str], arguments: tuple[Tensor, ...]) -> None:
        names = ["", ".index", ".weight"] if key[1] == "experts" else [""]
        for ending, value in zip(names, arguments, strict=False):
            array = value.double().numpy().reshape(-1, value.shape[-1])[self.mask]
            self.rows.setdefault((key[0], key[1] + ending), []).append(array)

    def __getitem__(self, key: tuple[int, str]) -> np.ndarray:
        return np.concatenate(self.rows[key])


def moments(rows: Iterable[np.ndarray], size: int, kind: str) -> np.ndarray:
    """Sum up squares or outer products, row by row."""
    total = np.zeros(size if kind == "diagonal" else (size, size))
    for row in rows:
        total += row**2 if kind == "diagonal" else np.outer(row, row)
    return total


def expected(seen: Seen, layer: int, gate_up: Tensor | None, kind: str, gated: bool) -> np.ndarray:
    """Moments of every expert; of the channels that ``gate_up`` makes, or of the hidden states."""
    hidden, index, weight = (seen[layer, f"experts{name}"] for name in ("", ".index", ".weight"))
    found = []
    for expert in range(EXPERTS):
        rows = []
        for x, chosen, gates in zip(hidden, index, weight, strict=True):
            if expert not in chosen:
                continue
            if gate_up is not None:
                x = channels_by_hand(torch.tensor(x), gate_up[expert].detach().double()).numpy()
            rows.append(x * gates[list(chosen).index(expert)] if gated else x)
        found.append(moments(rows, HIDDEN if gate_up is None else CHANNELS, kind))
    return np.stack(found)


def close(got: Tensor, want: np.ndarray, relative: float = 1e-9) -> None:
    assert got.dtype == (torch.float64 if relative < 1e-8 else torch.float32)
    assert tuple(got.shape) == want.shape
    np.testing.assert_allclose(got.double().numpy(), want, rtol=relative, atol=relative * max(1.0, np.abs(want).max()))
