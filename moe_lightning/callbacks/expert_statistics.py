"""What the experts do while the model trains, as TensorBoard scalars and heat-maps.

Legend: L MoE layers, E experts of the original model, R router rows of a layer, N tokens of a batch.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from moe_lightning.architectures import architecture_of
from moe_lightning.callbacks.at_step import language_model
from moe_lightning.callbacks.tensorboard_pages import EXPERTS, add_pages, tensorboards
from moe_lightning.plan import ModelShape
from moe_lightning.reporting import heat_map
from moe_lightning.statistics import RoutingStatistics


class RouterEntropy(Metric):
    """Sum over tokens of the entropy of the router's full softmax, in units of ``log R``, for each layer."""

    full_state_update = False
    entropy_sum: Tensor

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.add_state("entropy_sum", torch.zeros(num_layers, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, row: int, logits_NR: Tensor) -> None:
        """Add the tokens of one layer's call."""
        log_probability_NR = logits_NR.float().log_softmax(-1)
        entropy_N = -(log_probability_NR.exp() * log_probability_NR).sum(-1)
        self.entropy_sum[row] += entropy_N.double().sum() / max(math.log(logits_NR.shape[-1]), 1e-12)

    def compute(self) -> Tensor:
        """Return the sums, ``[L]``."""
        return self.entropy_sum.clone()


class Window:
    """Sums over the batches since the last log, outside of the module that is trained."""

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        """Start from zero for a shape."""
        self.shape, self.device = shape, device
        self.columns = [torch.tensor(layout.router, device=device) for layout in shape.layouts]
        self.routing = RoutingStatistics(len(self.columns), shape.num_experts).to(device)
        self.entropy = RouterEntropy(len(self.columns)).to(device)

    def add(self, row: int, output: tuple[Tensor, Tensor, Tensor], keep_N: Tensor | None) -> None:
        """Add what a router gave, padding left out."""
        logits_NR, weight_NK, index_NK = (tensor.detach() for tensor in output)
        if keep_N is not None:
            logits_NR, weight_NK, index_NK = logits_NR[keep_N], weight_NK[keep_N], index_NK[keep_N]
        self.routing.update(row, self.columns[row], logits_NR, weight_NK, index_NK)
        self.entropy.update(row, logits_NR)

    def summary(self) -> dict[str, Tensor] | None:
        """Return the numbers of the window over all ranks, on the CPU; None where no token was seen.

        ``load [L, E]`` share of the routed pairs, ``weight [L, E]`` mean routing weight when picked, ``entropy [L]``,
        ``novice_mass [L]`` share of the routing weight that novices get. NaN for experts that are gone.
        """
        sums = {name: tensor.cpu() for name, tensor in self.routing.sums().items()}
        entropy_L = self.entropy.compute().cpu().reshape(-1)  # torchmetrics squeezes one layer to a scalar
        if not bool((sums["tokens"] > 0).all()):
            return None
        known = torch.zeros_like(sums["count"], dtype=torch.bool)
        novice = torch.zeros_like(known)
        for row, layout in enumerate(self.shape.layouts):
            known[row, list(layout.router)] = True
            novice[row, list(layout.novices)] = True
        load = sums["count"] / sums["count"].sum(1, keepdim=True)
        weight = sums["gate_sum"] / sums["count"]
        return {
            "load": load.masked_fill(~known, torch.nan),
            "weight": weight.masked_fill(~known, torch.nan),
            "entropy": entropy_L / sums["tokens"],
            "novice_mass": (sums["gate_sum"] * novice).sum(1) / sums["gate_sum"].sum(1),
            "known": known,
            "novice": novice,
        }


class ExpertStatistics(Callback):
    """Log the load and the routing of every expert while training, and over every validation.

    Scalars, under ``experts_train/`` and ``experts_val/``:

    * ``routing_entropy``: mean entropy of the router's softmax, 1 = undecided, 0 = certain; also by layer,
    * ``load_max`` and ``load_min``: largest and smallest share of the routed pairs that an expert of any layer gets,
    * ``load_variation``: standard deviation over mean of the load, mean over layers; also by layer,
    * ``dead_experts``: experts that no token reached,
    * ``novice_mass``: share of the routing weight that novices get; also by layer, once there are novices.

    Figures ``[layers x experts]``, in TensorBoard: ``experts_train/load``, ``experts_train/routing_weight``, and the
    same for ``experts_val``. Experts keep their original numbers; novices are hatched, dropped ones crossed out.

    It sees what the routers give, changes nothing and draws no random number. Padding does not count. In training a
    window is the batches since the last log; a validation is a window of its own.

    Args:
        every_n_steps: Optimizer steps between two logs in training.
        figures_every_n_steps: Optimizer steps between two pairs of heat-maps in training.

    Raises:
        ValueError: A number of steps that is not positive.
    """

    def __init__(self, every_n_steps: int = 50, figures_every_n_steps: int = 200) -> None:
        super().__init__()
        for name, steps in (("every_n_steps", every_n_steps), ("figures_every_n_steps", figures_every_n_steps)):
            if steps < 1:
                raise ValueError(f"ExpertStatistics: {name} must be 1 or more, got {steps}")
        self.every_n_steps = every_n_steps
        self.figures_every_n_steps = figures_every_n_steps
        self._handles: list[RemovableHandle] = []
        self._model: Any = None
        self._config: Any = None
        self._windows: dict[str, Window] = {}
        self._stage: str | None = None
        self._keep_N: Tensor | None = None
        self._seen: set[int] = set()
        self._logged_step = -1
        self._figure_step = -1

    # ------------------------------------------------------------ watching

    def _attach(self, module: LightningModule) -> None:
        """Hook the routers; again after a compression, which starts new windows for the new shape."""
        model = language_model(module)
        if model.config is self._config:
            return
        self._detach()
        architecture = architecture_of(model)
        shape = architecture.shape(model)
        self._model, self._config = model, model.config  # surgery gives the model a new config
        self._windows = {stage: Window(shape, module.device) for stage in ("train", "val")}
        for row, layer in enumerate(architecture.moe_layers(model)):
            self._handles.append(layer.router.register_forward_hook(partial(self._see, row)))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._config = None

    def _see(self, row: int, router: nn.Module, _args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        # Once a batch: gradient checkpointing runs a layer twice. A calibration runs without gradients, in training.
        if self._stage is None or row in self._seen or torch.is_grad_enabled() != (self._stage == "train"):
            return
        if self._model.config is not self._config:
            return  # compressed after this batch began to be watched: the windows are those of the old shape
        self._seen.add(row)
        with torch.no_grad():
            self._windows[self._stage].add(row, output, self._keep_N)

    def _expect(self, stage: str, batch: Any) -> None:
        mask = batch.get("attention_mask") if isinstance(batch, dict) else None
        self._stage = stage
        self._keep_N = None if mask is None else mask.reshape(-1).bool()
        self._seen.clear()

    def _new_window(self, stage: str) -> None:
        old = self._windows[stage]
        self._windows[stage] = Window(old.shape, old.device)

    # ------------------------------------------------------------ training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the routers and lay out TensorBoard's custom scalars."""
        self._attach(pl_module)
        self._logged_step = trainer.global_step
        add_pages(trainer, EXPERTS)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the batch that comes."""
        self._expect("train", batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log when it is time."""
        self._stage = None
        self._attach(pl_module)
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self._logged_step:
            self._logged_step = step
            with_figures = step // self.figures_every_n_steps != self._figure_step // self.figures_every_n_steps
            self._log(trainer, "train", with_figures)
            if with_figures:
                self._figure_step = step
            self._new_window("train")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off."""
        self._detach()

    # ------------------------------------------------------------ validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a window of its own."""
        self._attach(pl_module)
        self._new_window("val")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch the batch that comes."""
        self._expect("val", batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the whole validation."""
        self._stage = None
        if not trainer.sanity_checking:
            self._log(trainer, "val", with_figures=True)
        if trainer.state.fn != TrainerFn.FITTING:
            self._detach()

    # ------------------------------------------------------------ logging

    def _log(self, trainer: Trainer, stage: str, with_figures: bool) -> None:
        window = self._windows[stage]
        numbers = window.summary()  # on every rank: it adds up over them
        if numbers is None or not window.columns or not trainer.is_global_zero:
            return  # no token, or no MoE layer is left
        step = trainer.global_step
        scalars = expert_scalars(numbers, window.shape)
        for logger in trainer.loggers:
            logger.log_metrics({f"experts_{stage}/{name}": value for name, value in scalars.items()}, step=step)
        if not with_figures:
            return
        even = 100.0 / window.shape.num_experts
        common: dict[str, Any] = {
            "layers": window.shape.moe_layers,
            "novices": numbers["novice"].numpy(),
            "dropped": ~numbers["known"].numpy(),
            "undefined_label": "no token",
        }
        words = "training" if stage == "train" else "validation"
        for logger in tensorboards(trainer):
            load = heat_map(
                100 * numbers["load"].numpy(),
                title=f"Load of the experts, {words}, step {step}",
                value_label="share of the routed tokens",
                unit="%",
                reference=(even, "even") if bool(numbers["known"].all()) else None,
                number_format=".1f",
                **common,
            )
            weight = heat_map(
                numbers["weight"].numpy(),
                title=f"Mean routing weight when picked, {words}, step {step}",
                value_label="routing weight",
                **common,
            )
            logger.experiment.add_figure(f"experts_{stage}/load", load, step)
            logger.experiment.add_figure(f"experts_{stage}/routing_weight", weight, step)


def expert_scalars(numbers: dict[str, Tensor], shape: ModelShape) -> dict[str, float]:
    """Reduce the tables of a window to the scalars that are logged.

    Args:
        numbers: From :meth:`Window.summary`.
        shape: The shape that they belong to.

    Returns:
        Value by tag, without the stage.
    """
    load, known = numbers["load"], numbers["known"]
    scalars = {
        "routing_entropy": float(numbers["entropy"].mean()),
        "load_max": float(load[known].max()),
        "load_min": float(load[known].min()),
        "dead_experts": float((load[known] == 0).sum()),
    }
    variations = []
    for row, layer in enumerate(shape.moe_layers):
        present = load[row][known[row]]
        variations.append(float(present.std(correction=0) / present.mean()))
        scalars[f"routing_entropy/layer_{layer}"] = float(numbers["entropy"][row])
        scalars[f"load_variation/layer_{layer}"] = variations[-1]
    scalars["load_variation"] = sum(variations) / len(variations)
    if bool(numbers["novice"].any()):
        scalars["novice_mass"] = float(numbers["novice_mass"].mean())
        for row, layer in enumerate(shape.moe_layers):
            scalars[f"novice_mass/layer_{layer}"] = float(numbers["novice_mass"][row])
    return scalars
