"""What a stage holds while it lasts: the parameters that do not train, and the learning rate of those that do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer


class HeldParameters:
    """Lets some parameters of a module train and nothing else, and knows how it was before."""

    def __init__(self) -> None:
        self._frozen_before: dict[str, nn.Parameter] | None = None

    @property
    def frozen_before(self) -> frozenset[int]:
        """``id`` of each parameter that did not train before; empty where nothing is held."""
        return frozenset(map(id, (self._frozen_before or {}).values()))

    def remember(self, module: nn.Module) -> None:
        """Note what does not train, unless something is held already."""
        if self._frozen_before is None:
            named = module.named_parameters()
            self._frozen_before = {name: parameter for name, parameter in named if not parameter.requires_grad}

    def hold(self, module: nn.Module, chosen: Collection[nn.Parameter]) -> None:
        """Let these train and nothing else; again after a change of structure.

        Args:
            module: The whole module.
            chosen: Parameters of it.
        """
        self.remember(module)
        wanted = set(map(id, chosen))
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) in wanted)
            if id(parameter) not in wanted:
                # What a frozen parameter keeps here an optimizer would still apply.
                parameter.grad = None

    def release(self, module: nn.Module) -> None:
        """Let train again what trained before."""
        if self._frozen_before is None:
            return
        named = dict(module.named_parameters())
        # A compression in between may have numbered layers anew, and replaced some parameters under their old names.
        there = set(map(id, named.values()))
        replaced = {name for name, parameter in self._frozen_before.items() if id(parameter) not in there}
        frozen = self.frozen_before
        for name, parameter in named.items():
            parameter.requires_grad_(id(parameter) not in frozen and name not in replaced)
        self._frozen_before = None


class HeldRate:
    """Puts a learning rate into optimizers for one step at a time.

    Between the steps their own is there: schedulers go on from it, and it is what a checkpoint holds.
    """

    def __init__(self) -> None:
        self._own: dict[int, dict[int, Any]] = {}
        self._rate: float | None = None
        self._handles: dict[int, Any] = {}
        self._optimizers: dict[int, Optimizer] = {}

    def set(self, optimizers: Sequence[Optimizer], rate: float) -> None:
        """Let the next step of each optimizer be taken with a learning rate.

        Args:
            optimizers: The optimizers.
            rate: The learning rate of all their groups.
        """
        for optimizer in optimizers:
            key = id(optimizer)
            if key not in self._handles:
                self._optimizers[key] = optimizer
                self._handles[key] = optimizer.register_step_post_hook(self._after_step)
            own = self._own.setdefault(key, {})
            for number, group in enumerate(optimizer.param_groups):
                # Another one than ours: a scheduler went on though no step was taken (overflow in half precision).
                if number not in own or group["lr"] != self._rate:
                    own[number] = group["lr"]
                group["lr"] = rate
        self._rate = rate

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for number, rate in self._own.pop(id(optimizer), {}).items():
            optimizer.param_groups[number]["lr"] = rate

    def release(self) -> None:
        """Leave the optimizers as they were."""
        for key, optimizer in self._optimizers.items():
            self._after_step(optimizer)
            self._handles[key].remove()
        self._handles.clear()
        self._optimizers.clear()


def forget_moments(optimizers: Sequence[Optimizer], chosen: Collection[nn.Parameter]) -> None:
    """Take the state of all parameters but some out of optimizers: memory for what does not train.

    Args:
        optimizers: The optimizers.
        chosen: Parameters whose state stays.
    """
    kept = set(map(id, chosen))
    for optimizer in optimizers:
        for parameter in [parameter for parameter in optimizer.state if id(parameter) not in kept]:
            del optimizer.state[parameter]


def parameters_of(optimizers: Sequence[Optimizer]) -> set[int]:
    """Return ``id`` of each parameter that optimizers hold."""
    return {id(item) for optimizer in optimizers for group in optimizer.param_groups for item in group["params"]}
