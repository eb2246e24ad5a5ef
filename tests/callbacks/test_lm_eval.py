"""Tasks of lm-eval in the course of a run: the numbers of lm-eval's own command line, and training none the wiser."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import moe_lightning as ml
from moe_lightning.callbacks.lm_eval import LMEval, tasks_table
from moe_lightning.cli import main
from moe_lightning.cli.config_files import find_config, packaged_configs
from moe_lightning.evaluation import task_data
from moe_lightning.evaluation.tasks import SUITES, harness_version, run_tasks
from tests.local_tasks import topics, write_tasks
from tests.small_runs import small_options, write_config

TASKS = ["endings", "likelihood", "next_word"]
EXPORT_PLAIN = {"class_path": "Export", "init_args": {"name": "plain", "at_step": 4}}
EXPORT_NATIVE = {"class_path": "Export", "init_args": {"name": "native", "at_step": "end"}}
KEPT = {"class_path": "LastCheckpoint", "init_args": {"every_n_train_steps": 4}}


def compress(at_step: Any, method: str, **options: Any) -> dict[str, Any]:
    methods = [{"class_path": method, "init_args": options}]
    return {"class_path": "Compress", "init_args": {"at_step": at_step, "calibration_batches": 2, "methods": methods}}


CALLBACKS = [
    compress(4, "ExpertDrop", ratio=0.25, scope="layer"),
    EXPORT_PLAIN,
    compress("end", "Novices", ratio=0.34),
    EXPORT_NATIVE,
    KEPT,
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tasks and texts."""
    folder = tmp_path_factory.mktemp("lm_eval")
    write_tasks(folder / "tasks")
    (folder / "texts").mkdir()
    for number, part in enumerate(topics().split("\n\n\n")[:60]):
        (folder / "texts" / f"{number:02}.txt").write_text(part)
    return folder


def measured(place: Path, at: list[str] | None = None, **options: Any) -> dict[str, Any]:
    given = {"tasks": TASKS, "include_path": str(place / "tasks"), **({} if at is None else {"at": at}), **options}
    return {"class_path": "LMEval", "init_args": given}


def run(place: Path, folder: Path, callbacks: list[Any], *arguments: str, command: str = "fit", **trainer: Any) -> int:
    model = {**small_options(place)["model"]["model"], "max_position_embeddings": 512}
    options = small_options(place, trainer={"callbacks": callbacks, "max_steps": 8, "val_check_interval": 4, **trainer})
    options["model"]["model"] = model
    config = write_config(folder.with_suffix(".yaml"), options)
    try:
        return main([command, "-c", str(config), "--run_dir", str(folder), *arguments])
    except SystemExit as leaving:
        return int(leaving.code or 0)


def moments(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "results" / "lm_eval.json").read_text())
    assert (content["version"], content["harness"]) == (1, harness_version())
    return {moment["name"]: moment for moment in content["moments"]}


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that compresses twice and measures whenever it can."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run(place, folder, [*CALLBACKS, measured(place, ["before", "compressed", "end"])]) == 0
    return folder


# ---------------------------------------------------------------- the numbers

# What `lm_eval` on the command line is, twice in one process: first as it comes, for a folder that is plain Mixtral,
# then with moe_lightning in it. Its index of 15,000 tasks is left out for the time that it takes; the slow test has it.
COMMAND_LINE = """
import functools, sys
from lm_eval.tasks import TaskManager
if sys.argv[1] == "short":
    TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
from lm_eval.__main__ import cli_evaluate

def evaluate(folder, output):
    sys.argv = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={folder}", "--tasks",
                "endings,likelihood,next_word", "--include_path", TASKS, "--num_fewshot", "0", "--batch_size", "8",
                "--device", "cpu", "--output_path", output]
    cli_evaluate()

RUN, TASKS, OUTPUT = sys.argv[2:]
evaluate(f"{RUN}/models/plain", f"{OUTPUT}/plain.json")
assert not any(name.startswith("moe_lightning") for name in sys.modules)
import moe_lightning
evaluate(f"{RUN}/models/native", f"{OUTPUT}/native.json")
"""


def check_same(moment: dict[str, Any], output: Path, name: str) -> None:
    """Compare a moment with what lm-eval's command line wrote."""
    (file,) = output.glob(f"{name}*.json")
    results = json.loads(file.read_text())["results"]
    assert set(moment["tasks"]) == set(TASKS) == set(results)
    for task, score in moment["tasks"].items():
        theirs, metric = results[task], score["metric"]
        if task == "likelihood":  # the only one that is not made of whole numbers or letters
            assert score["value"] == pytest.approx(theirs[f"{metric},none"], rel=1e-6)
            assert score["stderr"] is None and theirs[f"{metric}_stderr,none"] == "N/A"
        else:
            assert score["value"] == theirs[f"{metric},none"] and 0 < score["value"] < 1
            assert score["stderr"] == theirs[f"{metric}_stderr,none"]
        assert score["samples"] == theirs["sample_len"]


def test_as_lm_evals_own_command_line(place: Path, finished: Path, tmp_path: Path) -> None:
    assert (finished / "models" / "plain" / "config.json").exists()
    given = [sys.executable, "-c", COMMAND_LINE, "short", str(finished), str(place / "tasks"), str(tmp_path)]
    subprocess.run(given, check=True, capture_output=True, cwd=tmp_path)
    found = moments(finished)
    check_same(found["compressed"], tmp_path, "plain")
    check_same(found["end"], tmp_path, "native")
    assert found["compressed-2"]["tasks"] == found["end"]["tasks"]
    assert len({found[name]["tasks"]["likelihood"]["value"] for name in ("before", "compressed", "end")}) == 3


@pytest.mark.slow
def test_as_users_type_it(place: Path, finished: Path, tmp_path: Path) -> None:
    ways = {
        "plain": ["-m", "lm_eval"],
        "native": ["-c", "import moe_lightning, lm_eval.__main__ as m; m.cli_evaluate()"],
    }
    for name, way in ways.items():
        given = ["--model", "hf", "--model_args", f"pretrained={finished}/models/{name}", "--tasks", ",".join(TASKS)]
        given += ["--include_path", str(place / "tasks"), "--num_fewshot", "0", "--batch_size", "8"]
        command = [sys.executable, *way, *given, "--output_path", str(tmp_path / f"{name}.json")]
        subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    check_same(moments(finished)["compressed"], tmp_path, "plain")
    check_same(moments(finished)["end"], tmp_path, "native")


def test_what_a_run_leaves(finished: Path) -> None:
    found = moments(finished)
    assert [(name, moment["step"]) for name, moment in found.items()] == [
        ("before", 4),
        ("compressed", 4),
        ("compressed-2", 8),
        ("end", 8),
    ]
    endings = found["before"]["tasks"]["endings"]
    assert set(endings) == {"metric", "value", "stderr", "samples", "num_fewshot"} and endings["metric"] == "acc_norm"
    # A perplexity is no share of right answers.
    assert found["before"]["mean"] is None and found["before"]["limit"] is None
    events = EventAccumulator(str(finished / "logs")).Reload()
    assert [(item.step, round(item.value, 4)) for item in events.Scalars("tasks/endings/acc_norm")] == [
        (moment["step"], round(moment["tasks"]["endings"]["value"], 4)) for moment in found.values()
    ]
    assert "tasks/mean" not in events.Tags()["scalars"]
    table = events.Tensors("tasks/table/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert table == tasks_table(list(found.values()))
    assert (
        table.splitlines()[0] == "| task | metric | examples | questions | before | compressed | compressed-2 | end |"
    )
    assert table.splitlines()[2].startswith(f"| endings | acc_norm | 0 | 24 | {endings['value']:.4f} +- ")


def test_training_is_bit_for_bit_that_without(place: Path, finished: Path, tmp_path: Path) -> None:
    assert run(place, tmp_path / "without", CALLBACKS) == 0
    states = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (finished, tmp_path / "without")
    ]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        ours, theirs = (json.dumps(_plain(state[part])) for state in states)
        assert ours == theirs
    # Dropout drew from it.
    ours, theirs = (json.dumps(_plain(state["callbacks"]["RandomState"])) for state in states)
    assert ours == theirs


def _plain(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return item.tolist()
    if isinstance(item, dict):
        return {str(key): _plain(value) for key, value in item.items()}
    return [_plain(value) for value in item] if isinstance(item, list | tuple) else item


# ---------------------------------------------------------------- moments


def test_resumed_runs_and_tests_add_to_the_file(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    callbacks = [compress(2, "Novices", ratio=0.25), KEPT, measured(place, limit=4, tasks="endings,half:acc")]
    assert run(place, folder, callbacks, max_steps=4) == 0
    first = moments(folder)
    assert [(name, moment["step"]) for name, moment in first.items()] == [("before", 2), ("end", 4)]
    values = [score["value"] for score in first["end"]["tasks"].values()]
    assert first["end"]["mean"] == sum(values) / 2 and first["end"]["limit"] == 4
    assert "step 4: tasks at the end: endings acc_norm" in capsys.readouterr().out
    # The end that a killed run did not come to is measured by the next.
    (folder / "results" / "lm_eval.json").unlink()
    assert run(place, folder, callbacks, "--ckpt_path", "last", max_steps=4) == 0
    assert moments(folder) == first
    capsys.readouterr()
    assert run(place, folder, callbacks, "--ckpt_path", "last", max_steps=4) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run(place, folder, callbacks, "--ckpt_path", "last", max_steps=6) == 0
    longer = moments(folder)
    assert longer["before"] == first["before"] and [*longer] == ["before", "end"] and longer["end"]["step"] == 6
    assert run(place, folder, callbacks, "--ckpt_path", "last", command="test") == 0
    tested = moments(folder)
    assert [*tested] == ["before", "end", "test"] and tested["test"]["step"] == 6
    assert tested["test"]["tasks"] == longer["end"]["tasks"]
    events = EventAccumulator(str(folder / "logs")).Reload()
    assert events.Scalars("test/tasks/mean")[0].value == pytest.approx(tested["test"]["mean"])
    # In no order: event files of one second are read by their names.
    assert sorted(item.step for item in events.Scalars("tasks/mean")) == [2, 4, 4, 6]


@pytest.mark.parametrize("name", ["unified-framework", "mone"])
def test_a_folder_by_a_packaged_config(name: str, place: Path, finished: Path, tmp_path: Path) -> None:
    assert {key for key in packaged_configs() if key.startswith("evaluate/")} == {f"evaluate/{key}" for key in SUITES}
    (callback,) = yaml.safe_load(find_config(f"evaluate/{name}").read_text())["trainer"]["callbacks"]
    assert callback["class_path"] == "LMEval"
    assert (callback["init_args"]["tasks"], callback["init_args"]["num_fewshot"]) == (name, 0)
    given = ["--model.checkpoint", str(finished / "models" / "native"), "--model.model", "null"]
    given += ["--data.sources", f"{place}/texts/*.txt", "--data.block_size", "64", "--trainer.limit_test_batches", "1"]
    given += ["--trainer.callbacks.include_path", str(place / "tasks"), "--data.cache_dir", str(place / "cache")]
    given += ["--trainer.callbacks.tasks", ",".join(TASKS), "--trainer.accelerator", "cpu"]
    assert main(["test", "-c", f"evaluate/{name}", *given, "--run_dir", str(tmp_path / "run")]) == 0
    found = moments(tmp_path / "run")
    assert [*found] == ["test"] and found["test"]["step"] == 0
    assert found["test"]["tasks"] == moments(finished)["end"]["tasks"]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_in_other_precisions(precision: str, place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    callbacks = [EXPORT_NATIVE, measured(place, ["end"])]
    assert run(place, folder, callbacks, max_steps=1, precision=precision) == 0
    model = ml.from_pretrained(folder / "models" / "native")
    mixed = None
    if precision == "bf16-true":
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    else:
        mixed = torch.bfloat16
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "models" / "native")
    options = {"include_path": str(place / "tasks"), "mixed_precision_dtype": mixed}
    assert run_tasks(model, tokenizer, TASKS, **options)["tasks"] == moments(folder)["end"]["tasks"]


def test_one_question_in_a_fast_dev_run(place: Path, tmp_path: Path) -> None:
    assert run(place, tmp_path / "run", [measured(place)], fast_dev_run=True) == 0
    (moment,) = moments(tmp_path / "run").values()
    assert moment["limit"] == 1 and {score["samples"] for score in moment["tasks"].values()} == {1}


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": []}, "name tasks of lm-eval"),
        ({"tasks": "mone,mone"}, "stands there twice"),
        ({"tasks": "a", "at": []}, "at is a list of before, compressed, end, test"),
        ({"tasks": "a", "at": ["after"]}, "at is a list of"),
        ({"tasks": "a", "limit": 0}, "limit must be more than 0"),
        ({"tasks": "a", "batch_size": 0}, "batch_size must be 1 or more"),
        ({"tasks": "a", "num_fewshot": -1}, "num_fewshot must be 0 or more"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"LMEval: .*{words}"):
        LMEval(**options)


@pytest.mark.parametrize("command", ["fit", "test"])
def test_missing_tasks_before_anything_is_done(
    command: str,
    place: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(task_data, "_whole_manager", lambda folders: task_data._manager(folders, False))
    last = str(finished / "checkpoints" / "last.ckpt")
    given = ["--ckpt_path", last] if command == "test" else []
    folder = tmp_path / "run"
    assert run(place, folder, [measured(place, tasks="endigs,likelihood")], *given, command=command) == 2
    said = capsys.readouterr().err
    assert f"moe-lightning {command}: error: LMEval: tasks that cannot be run:\n  endigs: lm-eval has no such" in said
    assert not folder.exists()
    # Nobody asks in a run that has no such moment.
    if command == "fit":
        assert run(place, folder, [measured(place, ["test"], tasks="endigs")], max_steps=1) == 0


def test_a_tokenizer_is_needed(place: Path, tmp_path: Path) -> None:
    from tests.callbacks.small_fit import fit, tiny_module

    callback = LMEval(TASKS, include_path=str(place / "tasks"))
    with pytest.raises(ValueError, match="LMEval needs the model's tokenizer"):
        fit(tiny_module(), tmp_path, [callback], steps=1)


@pytest.mark.slow
def test_on_two_processes(place: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"):
        environment.pop(name, None)

    def start(tasks: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "tests.callbacks.lm_eval_ddp_run", str(place), tasks]
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)

    result = start("endings,next_word")
    assert result.returncode == 0, result.stderr
    found = moments(place / "ddp")
    assert [(name, moment["step"]) for name, moment in found.items()] == [("before", 2), ("end", 4), ("test", 4)]
    # Four questions of each, by one process: neither eight, nor two.
    assert {score["samples"] for moment in found.values() for score in moment["tasks"].values()} == {4}
    assert found["test"]["tasks"] == found["end"]["tasks"]
    # Both end where one finds a mistake.
    result = start("endings:accuracy")
    assert result.returncode != 0 and "endings has no metric accuracy" in result.stderr
