"""Layers to train, and their sum over experts in float64 from the equations, pair by pair."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tests.kernels.triton.problems import int4_problem, routing_problem

HIDDEN, INNER, GROUP = 64, 64, 64
NAMES = ["hidden", "weight", "gate_up", "down", "reads_up", "gives_up", "reads_down", "gives_down", "bias"]
NOVICE_NAMES = ["vectors", "map_in", "map_out"]


@dataclass
class Problem:
    """Arguments of the operation.

    Attributes:
        tensors: What can be differentiated, by name; dense stacks in the type that is multiplied.
        tiles: Both stacks of int4 weights, if they are: ``tensors`` then holds them dequantised, in float64.
    """

    tensors: dict[str, Tensor]
    index: Tensor
    slot_map: Tensor
    scales: list[float]
    owners: Tensor
    tiles: list[list[Tensor]] = field(default_factory=list)

    def to(self, device: str) -> "Problem":
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        tiles = [[tensor.to(device) for tensor in form] for form in self.tiles]
        return replace(
            self,
            tensors=moved,
            index=self.index.to(device),
            slot_map=self.slot_map.to(device),
            owners=self.owners.to(device),
            tiles=tiles,
        )

    def leaves(self, wide: bool = False) -> dict[str, Tensor]:
        """Return fresh tensors that want gradients; int4 weights want none."""
        names = [name for name in self.tensors if not (self.tiles and name in ("gate_up", "down"))]
        return {
            name: (self.tensors[name].double() if wide else self.tensors[name].clone()).requires_grad_()
            for name in names
        }

    def arguments(self, held: dict[str, Tensor]) -> tuple:
        """Return the arguments of `train_experts` with some tensors."""
        forms = self.tiles or [[held["gate_up"]], [held["down"]]]
        lora = [held[name] for name in NAMES[4:8] if name in held]
        return (
            held["hidden"],
            self.index,
            held["weight"],
            self.slot_map,
            *forms,
            lora,
            self.scales if lora else [],
            held.get("bias"),
        )


def make_problem(
    form: str = "dense",
    tokens: int = 9,
    experts: int = 5,
    top_k: int = 2,
    novices: tuple[int, ...] = (),
    ranks: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    map_ranks: int = 0,
    hidden: int = HIDDEN,
    inner: int = INNER,
    seed: int = 0,
) -> Problem:
    draw = torch.Generator().manual_seed(seed)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=draw) * scale).to(dtype)

    index, weight, slot_map = routing_problem(tokens, experts, top_k, novices, seed)
    slots = experts - len(novices)
    tensors, tiles = {"hidden": random(tokens, hidden), "weight": weight}, []
    if form == "int4":
        problems = [int4_problem(slots, 2 * inner, hidden, GROUP), int4_problem(slots, hidden, inner, GROUP, seed=1)]
        tiles = [[problem.tiles.words_SGOW, problem.tiles.pairs_SGO] for problem in problems]
        tensors["gate_up"], tensors["down"] = (torch.from_numpy(problem.dense) for problem in problems)
    else:
        tensors["gate_up"] = random(slots, 2 * inner, hidden, scale=hidden**-0.5)
        tensors["down"] = random(slots, hidden, inner, scale=inner**-0.5)
    if ranks:
        up, down = ranks
        shapes = [(slots, up, hidden), (slots, 2 * inner, up), (slots, down, inner), (slots, hidden, down)]
        tensors |= {
            name: random(*shape, scale=shape[2] ** -0.5) for name, shape in zip(NAMES[4:8], shapes, strict=True)
        }
    if bias:
        tensors["bias"] = random(slots, hidden)
    if novices:
        tensors["vectors"] = random(len(novices), hidden)
    if map_ranks:
        tensors["map_in"], tensors["map_out"] = random(map_ranks, hidden, scale=0.1), random(map_ranks, hidden)
    owners = torch.randint(0, max(len(novices), 1), (map_ranks,), generator=draw)
    return Problem(tensors, index, slot_map, [1.5, 0.5], owners, tiles)


def in_float64(problem: Problem, held: dict[str, Tensor], novices: bool) -> Tensor:
    """``y = sum_i g_i(x) E_i(x)`` from the equation, for tensors in float64."""
    everything = {name: tensor.double() for name, tensor in problem.tensors.items()} | held
    hidden = everything["hidden"]
    rows = []
    for token, experts in enumerate(problem.index.tolist()):
        row = 0 * hidden[token]
        for place, expert in enumerate(experts):
            slot = int(problem.slot_map[expert]) if 0 <= expert < len(problem.slot_map) else -99
            if slot >= 0:
                output = expert_in_float64(everything, slot, hidden[token], problem.scales)
            elif novices and -1 - slot < len(everything.get("vectors", ())):
                output = everything["vectors"][-1 - slot]
                if "map_in" in everything:
                    mine = (problem.owners == -1 - slot).to(output)
                    output = output + ((everything["map_in"] @ hidden[token]) * mine) @ everything["map_out"]
            else:
                continue
            row = row + everything["weight"][token, place] * output
        rows.append(row)
    return torch.stack(rows) if rows else 0 * hidden


def expert_in_float64(tensors: dict[str, Tensor], slot: int, x: Tensor, scales: list[float]) -> Tensor:
    def product(name: str, row: Tensor, reads: str, gives: str, scale: float) -> Tensor:
        output = tensors[name][slot] @ row
        if reads in tensors:
            output = output + scale * (tensors[gives][slot] @ (tensors[reads][slot] @ row))
        return output

    gate, up = product("gate_up", x, "reads_up", "gives_up", scales[0]).chunk(2)
    output = product("down", gate * torch.sigmoid(gate) * up, "reads_down", "gives_down", scales[1])
    return output + tensors["bias"][slot] if "bias" in tensors else output
