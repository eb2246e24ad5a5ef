"""A run that is killed in a stage, or between two, and resumed ends exactly where an uninterrupted one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.callbacks.test_resume import checkpoint, differences
from tests.small_runs import small_options, write_config

ROOT = Path(__file__).resolve().parents[3]


def callback(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": options}


def compress(at_step: int, *methods: dict[str, Any]) -> dict[str, Any]:
    some = {"calibration_batches": 2, "min_tokens": 1, "max_fallback": 1.0}
    return callback("Compress", at_step=at_step, methods=list(methods), **some)


NOVICES = callback("Novices", ratio=0.5, novice="low_rank", rank=2)
AFTER_TEACHER = {"teacher": "before", "alpha": 0.5, "temperature": 2.0}
STAGES = ("RouterDistillation", "NoviceTuning", "LoRARecovery", "FullFineTuning")

# Saves happen after every second step and at the end, validations after every third.
CHAINS: dict[str, list[dict[str, Any]]] = {
    "int4": [
        compress(2, NOVICES, callback("RTN", group_size=16, targets="experts+attention")),
        callback("RouterDistillation", at_step=2, learning_rate=0.01, hidden_weight=0.1),
        callback("NoviceTuning", at_step=5, learning_rate=0.05, warmup_steps=1),
        callback("LoRARecovery", at_step=8, steps=4, rank=2, learning_rate=0.02, **AFTER_TEACHER),
        callback("FullFineTuning", at_step=12, learning_rate=0.005),
    ],
    # Zeros grow in number within the stages; at the end of the terms the weights are rounded.
    "pruned": [
        compress(
            2,
            callback("Wanda", sparsity={"start": 0.1, "end": 0.5, "steps": 6, "every": 3}, targets="experts+attention"),
        ),
        callback("RouterDistillation", at_step=3, steps=2, learning_rate=0.01, teacher=None, alpha=0.0),
        callback("FullFineTuning", at_step=6, steps=2, teacher="before"),
        callback("LoRARecovery", at_step=9, steps=3, rank=2, learning_rate=0.02),
        compress(12, NOVICES, callback("GPTQ", group_size=16)),
        callback("NoviceTuning", at_step=13, **AFTER_TEACHER),
    ],
}
TRAINER: dict[str, dict[str, Any]] = {"int4": {}, "pruned": {"accumulate_grad_batches": 2, "val_check_interval": 6}}


@dataclass(frozen=True)
class Scenario:
    """A chain, and kills in turn, each (moment, optimizer steps done by then, step of the checkpoint that is there)."""

    chain: str
    kills: tuple[tuple[str, int, int], ...]


IN_INT4 = (
    ("batch_start", 3, 2),  # compressed and in a stage, and neither is saved
    ("batch_start", 5, 4),  # in the routers' stage; the next one begins
    ("batch_start", 7, 6),  # in the novices'
    ("batch_end", 9, 8),  # the novices' is over and saved, the terms are not
    ("saving", 10, 8),
    ("batch_start", 11, 10),  # in that of the terms
    ("validation", 12, 12),  # merged, saved
    ("batch_end", 15, 14),  # in the last one
)
IN_PRUNED = (
    ("batch_start", 4, 4),
    ("batch_start", 7, 6),
    ("batch_start", 9, 8),
    ("batch_end", 11, 10),
    ("batch_start", 13, 12),
    ("batch_start", 15, 14),
)
# One after the other in the same run; each alone takes minutes.
SCENARIOS = {"int4 everywhere": Scenario("int4", IN_INT4), "pruned": Scenario("pruned", IN_PRUNED[1:5:2])}
ALONE = {
    f"{chain} {moment} {step}": Scenario(chain, ((moment, step, saved),))
    for chain, kills in (("int4", IN_INT4), ("pruned", IN_PRUNED))
    for moment, step, saved in kills
}


def legs(folder: Path, scenarios: dict[str, Scenario]) -> list[dict[str, Any]]:
    """Return the processes to run: an uninterrupted run of each chain, then each scenario's runs."""
    found = []
    for chain, callbacks in CHAINS.items():
        saving = callback("LastCheckpoint", every_n_train_steps=2)
        trainer = {"max_steps": 16, "callbacks": [saving, *callbacks], **TRAINER[chain]}
        config = write_config(folder / f"{chain}.yaml", small_options(folder, trainer=trainer))
        found.append((f"whole-{chain}", ["fit", "-c", str(config), "--run_dir", str(folder / f"whole-{chain}")]))
    for name, scenario in scenarios.items():
        base = ["fit", "-c", str(folder / f"{scenario.chain}.yaml"), "--run_dir", str(folder / name)]
        resume: list[str] = []
        for number, (moment, step, _) in enumerate(scenario.kills):
            kill = [
                "--trainer.callbacks+=tests.kills.KillAt",
                f"--trainer.callbacks.moment={moment}",
                f"--trainer.callbacks.step={step}",
            ]
            found.append((f"{name}-killed-{number}", [*base, *kill, *resume]))
            resume = ["--ckpt_path", "last"]
        found.append((f"{name}-resumed", [*base, *resume]))
    return [{"name": name, "arguments": arguments, "log": str(folder / f"{name}.log")} for name, arguments in found]


def run_all(shared: Path, name: str, scenarios: dict[str, Scenario]) -> tuple[Path, dict[str, int]]:
    """Run everything once, whichever worker comes first, and return the folder and the exit statuses."""
    folder = shared / name
    with FileLock(f"{folder}.lock"):
        statuses_file = folder / "statuses.json"
        if not statuses_file.is_file():
            folder.mkdir(exist_ok=True)
            result = subprocess.run(
                [sys.executable, "-m", "tests.kills"],
                input=json.dumps(legs(folder, scenarios)),
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
                stdout=subprocess.PIPE,
                text=True,
                timeout=600,
                check=True,
            )
            statuses = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
            statuses_file.write_text(json.dumps({leg["name"]: leg["status"] for leg in statuses}))
    return folder, json.loads(statuses_file.read_text())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    base = tmp_path_factory.getbasetemp()
    return base.parent if hasattr(request.config, "workerinput") else base


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        *((name, "recovery-kills") for name in SCENARIOS),
        *(pytest.param(name, "recovery-kills-alone", marks=pytest.mark.slow) for name in ALONE),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(name: str, folder: str, shared: Path) -> None:
    runs, statuses = run_all(shared, folder, ALONE if folder.endswith("alone") else SCENARIOS)
    scenario = (SCENARIOS | ALONE)[name]
    assert statuses[f"whole-{scenario.chain}"] == 0, (runs / f"whole-{scenario.chain}.log").read_text()
    for number in range(len(scenario.kills)):
        log = (runs / f"{name}-killed-{number}.log").read_text()
        assert statuses[f"{name}-killed-{number}"] == -signal.SIGKILL, log
        assert ("Restored all states" in log) == (number > 0)
    log = (runs / f"{name}-resumed.log").read_text()
    assert statuses[f"{name}-resumed"] == 0, log
    # Each process goes on in a stage that was saved, and does not enter it again. What happens at the step of the
    # checkpoint happens behind it, before the next batch.
    last = max(saved for *_, saved in scenario.kills)
    assert not any(f"step {step}: kept the model" in log for step in range(last))

    whole, resumed = checkpoint(runs / f"whole-{scenario.chain}"), checkpoint(runs / name)
    assert whole["global_step"] == resumed["global_step"] == 16
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "hyper_parameters"):
        assert not differences(whole[part], resumed[part], part)
    keys = [key for key in whole["callbacks"] if not key.startswith(("LastCheckpoint", "KillAt", "ModelCheckpoint"))]
    assert {"RandomState", "RecoveredShare"} < set(keys) and sum(key.startswith(STAGES) for key in keys) == 4
    for key in keys:
        assert not differences(whole["callbacks"][key], resumed["callbacks"][key], key)
    found = [
        json.loads((run / "results" / "recovery.json").read_text())
        for run in (runs / name, runs / f"whole-{scenario.chain}")
    ]
    assert found[0] == found[1] and len(found[0]["boundaries"]) >= 5


def test_what_the_stages_left(shared: Path) -> None:
    """Checkpoints hold tensors and plain types only; terms are merged, the teacher's weights are not among them."""
    runs, _ = run_all(shared, "recovery-kills", SCENARIOS)
    for chain in CHAINS:
        saved = checkpoint(runs / f"whole-{chain}")
        names = set(saved["state_dict"])
        assert not any("lora" in name or "teacher" in name for name in names)
        assert any(name.endswith(".words") for name in names) and any("novice" in name for name in names)
        stages = {key: state for key, state in saved["callbacks"].items() if key.startswith(STAGES)}
        assert all(state["left"] and state["entered"] for state in stages.values())
        events = [item["event"] for item in saved["callbacks"]["RecoveredShare"]["boundaries"]]
        assert [event for event in events if event in STAGES] == [
            name.split("[")[0] for name in sorted(stages, key=lambda key: stages[key]["left_at"])
        ]
        kinds = [edit["kind"] for edit in saved["hyper_parameters"]["plan"]["edits"]]
        assert kinds.count("add_lora") == kinds.count("merge_lora") > 0
