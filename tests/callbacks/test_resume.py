"""A run that is killed and resumed ends exactly where an uninterrupted one does: weights, optimizer, schedule, plan."""

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
import torch
from filelock import FileLock

from tests.small_runs import small_options, write_config

ROOT = Path(__file__).resolve().parents[2]


def compress_at(step: int, *methods: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {
        "class_path": "Compress",
        "init_args": {"methods": list(methods), "at_step": step, "calibration_batches": 2, **options},
    }


def slim_at(step: int, *methods: dict[str, Any]) -> dict[str, Any]:
    # Some of the few experts see no token at all.
    return compress_at(step, *methods, min_tokens=1, max_fallback=1.0)


# Saves happen after steps 4, 8 and 12 (the last), validations after 3, 6, 9 and 12.
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "one_epoch": {},
    # Six batches an epoch: the second kill falls into the second epoch.
    "epochs": {"trainer": {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 6}},
    "accumulating": {"trainer": {"accumulate_grad_batches": 2, "val_check_interval": 6}},
    # Two compressions, so that one of them can be behind a save and the other not.
    "compressing": {
        "trainer": {
            "callbacks": [
                {"class_path": "LastCheckpoint", "init_args": {"every_n_train_steps": 4}},
                compress_at(6, {"class_path": "Novices", "init_args": {"ratio": 0.5, "criterion": "mone"}}),
                compress_at(10, {"class_path": "ExpertDrop", "init_args": {"ratio": 0.25}}),
            ]
        }
    },
    # Layers, blocks, channels and experts go, and new kinds of parameters come.
    "trimming": {
        "trainer": {
            "callbacks": [
                {"class_path": "LastCheckpoint", "init_args": {"every_n_train_steps": 4}},
                compress_at(
                    6,
                    {"class_path": "ChannelDrop", "init_args": {"ratio": 0.3}},
                    {"class_path": "Novices", "init_args": {"ratio": 0.5, "novice": "low_rank", "rank": 2}},
                ),
                compress_at(
                    10,
                    {"class_path": "LayerDrop", "init_args": {"count": 1}},
                    {"class_path": "BlockDrop", "init_args": {"count": 1}},
                ),
            ]
        }
    },
    # What is packed is no parameter any more, beside novices, a layer less.
    "quantized": {
        "trainer": {
            "callbacks": [
                {"class_path": "LastCheckpoint", "init_args": {"every_n_train_steps": 4}},
                slim_at(
                    6,
                    {"class_path": "BlockDrop", "init_args": {"count": 1}},
                    {"class_path": "Novices", "init_args": {"ratio": 0.5, "novice": "low_rank", "rank": 2}},
                    {"class_path": "GPTQ", "init_args": {"group_size": 16, "targets": "experts+attention"}},
                ),
            ]
        }
    },
    # Before steps 2, 5, 8 and 10 more weights become zero.
    "pruned": {
        "trainer": {
            "callbacks": [
                {"class_path": "LastCheckpoint", "init_args": {"every_n_train_steps": 4}},
                slim_at(
                    2,
                    {
                        "class_path": "Wanda",
                        "init_args": {
                            "sparsity": {"start": 0.1, "end": 0.6, "steps": 8, "every": 3, "shape": "cubic"},
                            "targets": "experts+attention",
                        },
                    },
                ),
            ]
        }
    },
    "two_of_four": {
        "trainer": {
            "callbacks": [
                {"class_path": "LastCheckpoint", "init_args": {"every_n_train_steps": 4}},
                slim_at(
                    6, {"class_path": "SparseGPT", "init_args": {"pattern": "2:4", "targets": "experts+attention"}}
                ),
            ]
        }
    },
    # Low-rank terms come beside integers, train with all that is left, and are folded in.
    "adapted": {
        "trainer": {
            "callbacks": [
                {"class_path": "LastCheckpoint", "init_args": {"every_n_train_steps": 4}},
                slim_at(
                    6,
                    {"class_path": "RTN", "init_args": {"group_size": 16, "targets": "experts+attention"}},
                    {"class_path": "LoRA", "init_args": {"rank": 2}},
                ),
                compress_at(10, {"class_path": "MergeLoRA"}),
            ]
        }
    },
    # After step 6 only the novices train: others keep their optimizer state and get no gradient.
    "tuning": {
        "trainer": {
            "callbacks": [
                {"class_path": "LastCheckpoint", "init_args": {"every_n_train_steps": 4}},
                compress_at(6, {"class_path": "Novices", "init_args": {"ratio": 0.5, "criterion": "mone"}}),
                {"class_path": "NoviceTuning", "init_args": {"at_step": 6, "learning_rate": 0.05}},
            ]
        }
    },
}


@dataclass(frozen=True)
class Scenario:
    """Kills in turn, each (moment, optimizer steps done), and the step that the resumed run starts from."""

    kind: str
    kills: tuple[tuple[str, int], ...]
    resumes_from: int


SCENARIOS = {
    "mid_epoch": Scenario("one_epoch", (("batch_start", 6),), 4),
    "in_validation": Scenario("one_epoch", (("validation", 6),), 4),
    "while_saving": Scenario("one_epoch", (("saving", 8),), 4),
    "at_the_end_of_a_step": Scenario("one_epoch", (("batch_end", 7),), 4),
    "twice": Scenario("one_epoch", (("batch_start", 5), ("validation", 9)), 8),
    "second_epoch": Scenario("epochs", (("batch_start", 9),), 8),
    "between_epochs": Scenario("epochs", (("batch_start", 6),), 4),
    "accumulating": Scenario("accumulating", (("batch_end", 5),), 4),
    "before_compression": Scenario("compressing", (("batch_end", 5),), 4),
    "compressed_but_not_saved": Scenario("compressing", (("batch_start", 7),), 4),
    "compressed_and_saving": Scenario("compressing", (("saving", 8),), 4),
    "compressed_and_saved": Scenario("compressing", (("validation", 9),), 8),
    "tuning_not_saved": Scenario("tuning", (("batch_start", 7),), 4),
    "tuning_saved": Scenario("tuning", (("batch_end", 10),), 8),
    "trimmed_but_not_saved": Scenario("trimming", (("batch_start", 7),), 4),
    "trimmed_twice": Scenario("trimming", (("batch_start", 9), ("batch_end", 11)), 8),
    "quantized_twice": Scenario("quantized", (("batch_start", 7), ("batch_end", 9)), 8),
    "pruned_in_part": Scenario("pruned", (("batch_end", 7), ("batch_start", 9)), 8),
    "two_of_four": Scenario("two_of_four", (("batch_start", 9),), 8),
    "adapted_and_merged": Scenario("adapted", (("batch_start", 9), ("batch_end", 11)), 8),
    "compressed_twice": Scenario("compressing", (("batch_start", 9), ("batch_end", 11)), 8),
}


def legs(folder: Path) -> list[dict[str, Any]]:
    """Return the processes to run: an uninterrupted run of each kind, then each scenario's runs."""
    found = []
    used = {scenario.kind for scenario in SCENARIOS.values()}
    for kind in sorted(used):
        config = write_config(folder / f"{kind}.yaml", small_options(folder, **KINDS[kind]))
        found.append((f"whole-{kind}", ["fit", "-c", str(config), "--run_dir", str(folder / f"whole-{kind}")]))
    for name, scenario in SCENARIOS.items():
        base = ["fit", "-c", str(folder / f"{scenario.kind}.yaml"), "--run_dir", str(folder / name)]
        for number, (moment, step) in enumerate(scenario.kills):
            kill = [
                "--trainer.callbacks+=tests.kills.KillAt",
                f"--trainer.callbacks.moment={moment}",
                f"--trainer.callbacks.step={step}",
            ]
            found.append((f"{name}-killed-{number}", base + kill + (["--ckpt_path", "last"] if number else [])))
        found.append((f"{name}-resumed", [*base, "--ckpt_path", "last"]))
    return [{"name": name, "arguments": arguments, "log": str(folder / f"{name}.log")} for name, arguments in found]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, dict[str, int]]:
    """Run everything once, whichever worker comes first, and return the folder and the exit statuses."""
    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        shared = shared.parent
    folder = shared / "kills"
    with FileLock(str(folder) + ".lock"):
        statuses_file = folder / "statuses.json"
        if not statuses_file.is_file():
            folder.mkdir(exist_ok=True)
            result = subprocess.run(
                [sys.executable, "-m", "tests.kills"],
                input=json.dumps(legs(folder)),
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


def checkpoint(run: Path) -> dict[str, Any]:
    """Return what a run would go on with, but for the seconds that it took."""
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    content["callbacks"].pop("TimeSpent", None)
    return content


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Return where two nested structures differ; tensors must be equal to the last bit."""
    if isinstance(first, dict) and isinstance(second, dict):
        if first.keys() != second.keys():
            return [f"{path}: keys {sorted(map(str, first.keys() ^ second.keys()))}"]
        return [text for key in first for text in differences(first[key], second[key], f"{path}/{key}")]
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        if len(first) != len(second):
            return [f"{path}: lengths {len(first)} and {len(second)}"]
        return [
            text for i, pair in enumerate(zip(first, second, strict=True)) for text in differences(*pair, f"{path}/{i}")
        ]
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if first.shape == second.shape and torch.equal(first, second) else [f"{path}: tensors differ"]
    return [] if first == second else [f"{path}: {first!r} and {second!r}"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_and_resumed_equals_uninterrupted(name: str, runs: tuple[Path, dict[str, int]]) -> None:
    folder, statuses = runs
    scenario = SCENARIOS[name]
    for number in range(len(scenario.kills)):
        assert statuses[f"{name}-killed-{number}"] == -signal.SIGKILL, (
            folder / f"{name}-killed-{number}.log"
        ).read_text()
    assert statuses[f"whole-{scenario.kind}"] == 0, (folder / f"whole-{scenario.kind}.log").read_text()
    log = (folder / f"{name}-resumed.log").read_text()
    assert statuses[f"{name}-resumed"] == 0, log
    assert "Restored all states" in log

    whole, resumed = checkpoint(folder / f"whole-{scenario.kind}"), checkpoint(folder / name)
    assert whole["global_step"] == resumed["global_step"] > scenario.resumes_from
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "hyper_parameters"):
        assert not differences(whole[part], resumed[part], part)
    plain = ("one_epoch", "epochs", "accumulating")
    assert bool(whole["hyper_parameters"]["plan"]["edits"]) == (scenario.kind not in plain)
    for key in (key for key in whole["callbacks"] if key.startswith("Compress")):
        assert not differences(whole["callbacks"][key], resumed["callbacks"][key], key)
    # The random numbers went on in the same place too.
    assert not differences(whole["callbacks"]["RandomState"], resumed["callbacks"]["RandomState"])


def test_what_was_packed_is_packed_in_checkpoints(runs: tuple[Path, dict[str, int]]) -> None:
    folder, _ = runs
    for kind, expected in (
        ("quantized", {"words", "scale", "zero"}),
        ("pruned", {"values", "bits"}),
        ("two_of_four", {"values", "metadata"}),
    ):
        saved = checkpoint(folder / f"whole-{kind}")
        names = [name for name in saved["state_dict"] if "experts.storage" in name or "self_attn" in name]
        assert {name.rpartition(".")[2] for name in names} == expected
    acts = [state["acts"] for key, state in checkpoint(folder / "whole-pruned")["callbacks"].items() if "Wanda" in key]
    assert acts == [4]


def test_uninterrupted_runs_of_different_kinds_differ(runs: tuple[Path, dict[str, int]]) -> None:
    """What the test above compares is not the same for everything."""
    folder, _ = runs
    assert differences(
        checkpoint(folder / "whole-one_epoch")["state_dict"], checkpoint(folder / "whole-accumulating")["state_dict"]
    )


def test_half_written_file_is_never_under_the_good_name(runs: tuple[Path, dict[str, int]]) -> None:
    """The kill while saving left half a file; the resumed run replaced it."""
    folder, _ = runs
    assert "Restoring states" in (folder / "while_saving-resumed.log").read_text()
    assert not list((folder / "while_saving" / "checkpoints").glob("*.tmp"))
