"""The report of a run, written when the run has ended."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from moe_lightning.callbacks.at_step import language_model, say
from moe_lightning.callbacks.compression_log import set_aside_other_branches
from moe_lightning.callbacks.run_log import log_run
from moe_lightning.reporting.report import Run, read_run, write_report
from moe_lightning.reporting.statistics_figures import FIGURE_NEEDS
from moe_lightning.surgery import plan_of


class CompressionReport(Callback):
    """Write ``RUN/report.html`` and ``RUN/report.md`` (with ``RUN/figures``) when a fit or a test has ended.

    They tell what was done, what it touched, what it cost and what it bought: everything that the other callbacks left
    in ``RUN/results``. ``QualityEvaluation`` brings quality, sizes and speed, ``LMEval`` tasks, ``TimeSpent`` where the
    time went; what was not measured is named there with the way to get it. It is written when all other callbacks are
    done, wherever this one stands in their list, and again by ``moe-lightning report RUN`` from the same files.
    TensorBoard gets the figures under ``report/``, the summary, and a line in the tab of hyper-parameters.

    ``Compress`` measures what the report's figures show of the model as it was in the calibration pass of its first
    method. Where that makes none (``Wanda`` and ``GPTQ`` measure layer by layer, ``RTN`` not at all) there are no such
    figures: no pass is made for them.

    A report that cannot be written costs nothing but the report: a warning says why, and the run ends as it would have.
    """

    figure_needs = FIGURE_NEEDS
    """Groups of statistics that ``Compress`` measures for the figures."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = False
        self.error: Exception | None = None
        """Why the last report could not be written; None where it was."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew."""
        self._ended = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the fit has ended, and did not fail."""
        self._ended = True

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the test has ended."""
        self._ended = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the report: every other callback has written its files in the hooks before this one."""
        if not self._ended or not trainer.is_global_zero:
            return
        self._ended, self.error = False, None
        doing = "the report could not be written"
        try:
            if stage == "fit" and not getattr(trainer, "fast_dev_run", False):
                # What a test is given may be any model; what a fit ends with is the run's.
                set_aside_other_branches(trainer, plan_of(language_model(pl_module)))
            run = self._read(trainer)
            if run is None:
                return say(trainer, "CompressionReport: the run left nothing to report")
            path = write_report(run)
            say(trainer, f"wrote {path} and {path.with_suffix('.md').name}")
            doing = "the report is written, but could not be put into TensorBoard"
            log_run(trainer, run)
        except Exception as error:
            # The model is trained and saved: an exception here would end a script that has more to do with it.
            self.error = error
            told = " ".join(str(error).split())
            warnings.warn(
                f"CompressionReport: {doing} ({type(error).__name__}: {told}); the run itself is complete. Mend that "
                f"and write the report with moe-lightning report {trainer.default_root_dir}",
                stacklevel=2,
            )

    @staticmethod
    def _read(trainer: Trainer) -> Run | None:
        """Return what the run left, with the numbers of a test that no file has yet; None where that is nothing."""
        folder = Path(trainer.default_root_dir)
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
        try:
            run = read_run(folder)
        except FileNotFoundError:
            run = Run(folder, folder.resolve().name)
            if not logged:
                return None
        return dataclasses.replace(run, tested=logged) if logged else run
