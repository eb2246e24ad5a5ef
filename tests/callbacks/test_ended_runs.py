"""A run that is killed after its last step, before what happens at the end is done, and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from lightning.pytorch import Callback, Trainer

import moe_lightning as ml
from moe_lightning.callbacks import Compress, Export, LastCheckpoint, last_checkpoint
from moe_lightning.plan import MergeLora, Quantize
from moe_lightning.surgery import plan_of
from tests.callbacks.recovery.stage_runs import moved, stage, state_of
from tests.callbacks.small_fit import batches, loader, tiny_module
from tests.callbacks.test_resume import checkpoint, differences
from tests.small_runs import small_options, write_config

ROOT = Path(__file__).resolve().parents[2]
KILLS = ("compressing", "compressed", "train_end")


def callback(class_path: str, **options: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": options}


SOME = {"calibration_batches": 2, "min_tokens": 1, "max_fallback": 1.0}
CALLBACKS = [
    callback("RecoveredShare", num_batches=2),
    callback("Compress", at_step=1, methods=[callback("Novices", ratio=0.5, novice="low_rank", rank=2)], **SOME),
    callback("LoRARecovery", at_step=2, rank=2, learning_rate=0.02, teacher="before", alpha=0.5),
    callback("Compress", at_step="end", methods=[callback("GPTQ", group_size=16)], **SOME),
    callback("Export", name="recovered"),
    callback("LastCheckpoint", every_n_train_steps=2),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, dict[str, int]]:
    """Run everything once, whichever worker comes first, and return the folder and the exit statuses."""
    shared = tmp_path_factory.getbasetemp()
    folder = (shared.parent if hasattr(request.config, "workerinput") else shared) / "ended"
    with FileLock(f"{folder}.lock"):
        statuses = folder / "statuses.json"
        if not statuses.is_file():
            folder.mkdir(exist_ok=True)
            options = small_options(folder, trainer={"max_steps": 4, "callbacks": CALLBACKS, "val_check_interval": 4})
            base = ["fit", "-c", str(write_config(folder / "run.yaml", options))]
            found = [("whole", [*base, "--run_dir", str(folder / "whole")])]
            for moment in KILLS:
                place = [*base, "--run_dir", str(folder / moment)]
                kill = [f"--trainer.callbacks.moment={moment}", "--trainer.callbacks.step=4"]
                found.append((f"{moment} killed", [*place, "--trainer.callbacks+=tests.kills.KillAt", *kill]))
                for name in ("resumed", "again"):
                    found.append((f"{moment} {name}", [*place, "--ckpt_path", "last"]))
            more = ["--ckpt_path", "last", "--trainer.max_steps", "6"]
            found.append(("more", [*base, "--run_dir", str(folder / "whole"), *more]))
            legs = [{"name": name, "arguments": given, "log": str(folder / f"{name}.log")} for name, given in found]
            done = subprocess.run(
                [sys.executable, "-m", "tests.kills"],
                input=json.dumps(legs),
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
                stdout=subprocess.PIPE,
                text=True,
                timeout=600,
                check=True,
            )
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            statuses.write_text(json.dumps({line["name"]: line["status"] for line in lines}))
    return folder, json.loads(statuses.read_text())


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("moment", KILLS)
def test_what_is_left_at_the_end_is_done(moment: str, runs: tuple[Path, dict[str, int]]) -> None:
    folder, statuses = runs
    logs = {name: (folder / f"{moment} {name}.log").read_text() for name in ("killed", "resumed", "again")}
    assert statuses["whole"] == 0, (folder / "whole.log").read_text()
    assert statuses[f"{moment} killed"] == -signal.SIGKILL, logs["killed"]
    assert statuses[f"{moment} resumed"] == 0, logs["resumed"]
    assert "what waited for its end happens now (Compress, Export)" in logs["resumed"]
    assert "nothing to do" not in logs["resumed"]
    whole, resumed = checkpoint(folder / "whole"), checkpoint(folder / moment)
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "hyper_parameters"):
        assert not differences(whole[part], resumed[part], part)
    assert whole["callbacks"].keys() == resumed["callbacks"].keys()
    for key in whole["callbacks"]:
        assert not differences(whole["callbacks"][key], resumed["callbacks"][key], key)
    expected = files(folder / "whole" / "models")
    assert "recovered/model.safetensors" in expected and files(folder / moment / "models") == expected
    results = "results/recovery.json"
    assert json.loads((folder / moment / results).read_text()) == json.loads((folder / "whole" / results).read_text())
    # Then everything is done.
    assert statuses[f"{moment} again"] == 0
    assert "nothing to do: the run has ended, at step 4, and its model was compressed there" in logs["again"]


def test_more_steps_behind_a_compressed_end_are_refused(runs: tuple[Path, dict[str, int]]) -> None:
    folder, statuses = runs
    log = (folder / "more.log").read_text()
    assert statuses["more"] == 2 and "Traceback" not in log
    assert "error: Compress at the end: the run had ended, at step 4, and its model was compressed by GPTQ" in log
    assert "start a new run from the folder that was exported" in log


class Copy(Callback):
    """Keep the checkpoint that there is at the end before anything happens then, or after a step."""

    def __init__(self, target: Path, step: int | None = None) -> None:
        super().__init__()
        self.target, self.step = target, step

    def _copy(self, trainer: Trainer) -> None:
        shutil.copy(last_checkpoint(trainer.default_root_dir), self.target)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self._copy(trainer)

    def on_train_end(self, trainer: Trainer, *args: Any) -> None:
        if self.step is None:
            self._copy(trainer)


def run(folder: Path, *more: Any, steps: int = 4, path: Path | None = None) -> Any:
    """Train with a Trainer of one's own, with a stage and what acts at the end."""
    module = tiny_module()
    trainer = Trainer(
        max_steps=steps,
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[*more, stage("LoRARecovery", 1), end(), Export("last"), LastCheckpoint(2)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(batches(6)), ckpt_path=path, weights_only=True)
    return module


def end() -> Compress:
    return Compress([ml.RTN(group_size=16)], at_step="end")


def test_with_a_trainer_of_ones_own(tmp_path: Path) -> None:
    before_end, middle = tmp_path / "before_end.ckpt", tmp_path / "middle.ckpt"
    whole = run(tmp_path / "whole", Copy(before_end))
    resumed = run(tmp_path / "resumed", path=before_end)
    assert not moved(state_of(whole), state_of(resumed)) and not differences(whole.hparams, resumed.hparams)
    assert files(tmp_path / "whole" / "models") == files(tmp_path / "resumed" / "models") != {}
    # In the middle of a run that is shorter now: the stage is left, then the rest follows.
    run(tmp_path / "long", Copy(middle, step=4), steps=6)
    shorter = run(tmp_path / "shorter", path=middle)
    kinds = [type(edit) for edit in plan_of(shorter.model).edits]
    assert MergeLora in kinds and kinds[-1] is Quantize
    saved = checkpoint(tmp_path / "shorter")["callbacks"]
    assert all(state["done"] for key, state in saved.items() if key.startswith(("LoRA", "Compress", "Export")))
    assert saved["LoRARecovery[at_step=1]"]["left_at"] == 4


def test_a_folder_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    run(tmp_path)
    written = tmp_path / "models" / "last" / "model.safetensors"
    then = written.stat().st_ino
    run(tmp_path, path=last_checkpoint(tmp_path))
    assert written.stat().st_ino == then
    with pytest.raises(ValueError, match="would not happen again after more steps: start a new run from the folder"):
        run(tmp_path, path=last_checkpoint(tmp_path), steps=6)
