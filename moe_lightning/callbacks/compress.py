"""Compressing in the middle of training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from moe_lightning.architectures import architecture_of
from moe_lightning.callbacks.at_step import AtStep, Moment, language_model, say
from moe_lightning.callbacks.strategies import check_strategy, wrap_again
from moe_lightning.compression import CompressionResult, as_methods, check_methods, compress
from moe_lightning.files import write_atomically
from moe_lightning.method import Method
from moe_lightning.plan import ModelShape, plan_table
from moe_lightning.reporting import compression_figures


class Compress(AtStep):
    """Compress the model at a step and go on training what is left.

    Its life::

        match       global_step has reached at_step, and no checkpoint says that it was done
        observe     calibration batches of the datamodule, without gradients, in eval mode
        synchronise the statistics' sums over ranks
        propose     each method decides, from the statistics of the model as the method before left it
        check       the edits against the shape; touched parameters against claimed ones
        fill        the values of novices
        carry over  the optimizer, in place: sliced moments for sliced experts
        re-wrap     DistributedDataParallel
        extend      the module's plan, which travels in its checkpoints
        log         plan, sizes and pictures to TensorBoard; plan and statistics to the run directory
        free        what the model was before

    Args:
        methods: Methods, in the order in which they are applied.
        at_step: Optimizer step before which it happens, or ``end``.
        calibration_batches: Batches of the datamodule's calibration split; None takes all of them.
        batches: Calibration batches where the trainer has no TextDataModule (from Python only).

    Raises:
        ValueError: Something cannot work; found before the first training step.
    """

    def __init__(
        self,
        methods: list[Method],
        at_step: Moment,
        calibration_batches: int | None = None,
        batches: Any = None,
    ) -> None:
        super().__init__(at_step)
        self.methods = as_methods(methods)
        if calibration_batches is not None and calibration_batches < 1:
            raise ValueError(f"Compress: calibration_batches must be 1 or more, got {calibration_batches}")
        self.calibration_batches = calibration_batches
        self.batches: Iterable[Mapping[str, Any]] | None = batches
        self.result: CompressionResult | None = None
        """What the compression did; None before it, and in a run that was resumed after it."""
        self._applied: list[str] | None = None  # methods in words, by another process perhaps

    @property
    def state_key(self) -> str:
        """Tell several instances apart."""
        names = ",".join(type(method).__name__ for method in self.methods)
        return f"Compress[at_step={self.at_step},methods={names}]"

    def state_dict(self) -> dict[str, Any]:
        """Return whether it has acted, and the methods in words."""
        return {**super().state_dict(), "methods": self._applied or list(map(repr, self.methods))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over whether it has acted, and warn where that was something else than what is asked for now."""
        super().load_state_dict(state_dict)
        self._applied = state_dict.get("methods") if self.done else None
        now = list(map(repr, self.methods))
        if self._applied not in (None, now):
            warnings.warn(
                f"Compress at step {self.at_step}: the checkpoint holds a model that was compressed by "
                f"{', '.join(self._applied or ())}, and stays as it is: {', '.join(now)} is not applied. Start from an "
                "earlier checkpoint, or anew, to apply it",
                stacklevel=2,
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try the methods out on the model's shape, and the calibration data, before anything is trained.

        Raises:
            ValueError: The methods do not fit the model, the calibration split is too small, or the strategy shards.
        """
        if self.done:
            return
        check_strategy(trainer, "Compress")
        model = language_model(pl_module)
        check_methods(self._shape_before(trainer, architecture_of(model).shape(model)), self.methods)
        self._calibration(trainer)
        if not hasattr(pl_module, "set_plan"):
            warnings.warn(
                f"{type(pl_module).__name__} has no set_plan: a checkpoint saved after the compression will not know "
                "its plan, so a run cannot be resumed from it. MixtralModule can",
                stacklevel=2,
            )

    def _shape_before(self, trainer: Trainer, shape: ModelShape) -> ModelShape:
        """Return a shape as earlier instances of this callback leave it."""
        earlier = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, Compress) and not callback.done and callback is not self
        ]
        mine = self._order(trainer, self)
        for callback in sorted(earlier, key=lambda other: self._order(trainer, other)):
            if self._order(trainer, callback) < mine:
                shape = check_methods(shape, callback.methods)
        return shape

    @staticmethod
    def _order(trainer: Trainer, callback: Compress) -> tuple[float, int]:
        step = float("inf") if callback.at_step == "end" else callback.at_step
        return step, trainer.callbacks.index(callback)  # type: ignore[attr-defined]

    def _number(self, trainer: Trainer) -> str:
        """Return "" for the first instance of this callback at its step, "-2" for the second: they share a folder."""
        same = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, Compress) and callback.at_step == self.at_step
        ]
        return f"-{same.index(self) + 1}" if same[0] is not self else ""

    def _calibration(self, trainer: Trainer) -> Iterable[Mapping[str, Any]]:
        if self.batches is not None:
            return self.batches
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not hasattr(datamodule, "calibration_batches"):
            raise ValueError("Compress needs calibration data: train with a TextDataModule, or pass batches=...")
        return datamodule.calibration_batches(self.calibration_batches)

    def act(self, trainer: Trainer, module: LightningModule) -> None:
        """Compress; see the class."""
        model = language_model(module)
        datamodule: Any = getattr(trainer, "datamodule", None)
        origin = {"step": trainer.global_step, "calibration_batches": self.calibration_batches}
        if hasattr(datamodule, "describe"):
            origin["data"] = datamodule.describe()
        with trainer.precision_plugin.forward_context():
            result = compress(
                model,
                self._calibration(trainer),
                self.methods,
                origin=origin,
                optimizers=trainer.optimizers,
                progress=trainer.is_global_zero,
            )
        wrap_again(trainer, module)
        set_plan: Any = getattr(module, "set_plan", None)
        if set_plan is not None:
            set_plan(result.plan)
        self._log(trainer, result)
        self.result = result

    def _log(self, trainer: Trainer, result: CompressionResult) -> None:
        say(trainer, f"step {trainer.global_step}: {result}")
        if not trainer.is_global_zero:
            return
        numbers = {
            "compression/parameters": float(result.size_after.parameters),
            "compression/bytes": float(result.size_after.bytes),
            "compression/touched_parameters": float(result.touched),
        }
        # Of several methods only the first saw the model as it was.
        criterion, seed = getattr(self.methods[0], "criterion", None), getattr(self.methods[0], "seed", 0)
        words = f"step {trainer.global_step}"
        wanted = any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
        figures: dict[str, Figure] = {}
        if result.statistics is not None and wanted:
            figures = compression_figures(result.statistics, criterion, result.shape_after, words, seed)
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
            if isinstance(logger, TensorBoardLogger):
                table = plan_table(result.plan, result.shape_after)
                logger.experiment.add_text("compression/plan", table, trainer.global_step)
                for name, figure in figures.items():
                    logger.experiment.add_figure(f"compression/{name}", figure, trainer.global_step)
        folder = Path(trainer.default_root_dir) / "results"
        name = f"compression-{self.at_step}{self._number(trainer)}"
        write_atomically(folder / f"{name}.plan.json", result.plan.to_json())
        if result.statistics is not None:
            result.statistics.save(folder / f"{name}.statistics.safetensors")
