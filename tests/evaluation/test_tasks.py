"""Tasks of lm-eval on a model in memory, and what is found before they run. No network, and no data but local ones."""

import importlib.util
import json
import logging
import random
from pathlib import Path
from typing import Any

import lm_eval
import numpy
import pytest
import torch
import torch.nn.functional as F
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

from moe_lightning.evaluation import task_data
from moe_lightning.evaluation.task_data import require_lm_eval
from moe_lightning.evaluation.tasks import SUITES, check_tasks, run_tasks, wanted_tasks
from tests.local_tasks import topics, write_tasks
from tests.models import tiny_mixtral

STOCK = Path(lm_eval.__file__).parent / "tasks"
FOLDERS = ("arc", "glue", "hellaswag", "mmlu/default", "openbookqa", "piqa", "super_glue", "winogrande")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tasks(tmp_path_factory.mktemp("tasks")))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([topics()], vocab_size=400, special_tokens=["<end>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_mixtral(vocab_size=400, max_position_embeddings=256, eos_token_id=0)


@pytest.fixture(autouse=True)
def own_tasks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave lm-eval's own index out, which takes ten seconds to read."""
    monkeypatch.setattr(task_data, "_whole_manager", lambda folders: task_data._manager(folders, False))


# ---------------------------------------------------------------- names


def test_the_lists_are_tasks_of_lm_eval_with_these_metrics() -> None:
    index = TaskManager(include_defaults=False, include_path=[str(STOCK / name) for name in FOLDERS]).task_index
    assert [len(suite) for suite in SUITES.values()] == [8, 9]
    for suite in SUITES.values():
        for task, metric in suite.items():
            config = index[task].cfg
            metrics = [item["metric"] for item in config.get("metric_list") or config["aggregate_metric_list"]]
            # The normalised accuracy wherever there is one.
            assert metric in metrics and ("acc_norm" in metrics) == (metric == "acc_norm")
            assert config.get("num_fewshot") is None
    assert index["mmlu"].kind.name == "GROUP"
    found = object.__new__(task_data.Tasks)
    found.index = index
    assert len(found.leaves("mmlu")) == 57 and found.reported("mmlu") == ["mmlu"]
    assert found.reported("ai2_arc") == ["arc_challenge", "arc_easy"] and found.data_set("rte") == "nyu-mll/glue (rte)"
    assert found.needs_hub("rte")


def test_how_tasks_are_asked_for() -> None:
    assert [(task.name, task.metric) for task in wanted_tasks("a, b:acc")] == [("a", None), ("b", "acc")]
    names = [task.name for task in wanted_tasks(["mone", "wikitext"])]
    assert names == [*SUITES["mone"], "wikitext"]
    for tasks, words in (("", "name tasks"), ([], "unified-framework"), ("a,b,a:acc", "a stands there twice")):
        with pytest.raises(ValueError, match=words):
            wanted_tasks(tasks)


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    for error in (ImportError, ValueError):
        with pytest.raises(error, match=r"lm_eval is not installed: pip install 'moe-lightning\[eval\]'"):
            require_lm_eval()


# ---------------------------------------------------------------- before the run


def test_all_that_is_missing_is_in_one_error(place: str, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    stock = "test_split: train\noutput_type: loglikelihood\ndoc_to_text: a\ndoc_to_target: b\n"
    for name in ("first", "second"):
        (own / f"{name}.yaml").write_text(f"task: {name}\ndataset_path: nobody/{name}\ndataset_name: part\n{stock}")
    (own / "all.yaml").write_text("group: all_of_them\ntask: [first, second]\n")
    (own / "gone.yaml").write_text(
        f"task: gone\ndataset_path: json\ndataset_kwargs: {{data_files: {{train: {own}/gone.jsonl}}}}\n{stock}"
    )
    with pytest.raises(ValueError) as raised:
        check_tasks("endingz,all_of_them,gone,likelihood,endings:accuracy,pair", [place, str(own)])
    text = str(raised.value)
    for words in (
        "endingz: lm-eval has no such task; near are endings",
        "first: the data set nobody/first is not in the cache, and the Hugging Face hub cannot be reached",
        "second: the data set nobody/second is not",
        f"gone: the data set json files {{'train': '{own}/gone.jsonl'}} does not load: FileNotFoundError",
        "endings has no metric accuracy: it has acc, acc_norm",
        "endings is part of endings and of pair",
        "likelihood is part of likelihood and of pair",
        "HF_HOME=FOLDER",
    ):
        assert words in text
    assert "\n  likelihood: " not in text
    check_tasks("both,likelihood:bits_per_byte,next_word", place)
    with pytest.raises(ValueError, match="there is no folder nowhere"):
        check_tasks("endings", "nowhere")
    with pytest.raises(ValueError, match="both has no metric acc_norm: it has acc"):
        check_tasks("both:acc_norm", place)


def test_a_group_whose_data_are_missing_is_named_once(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.yaml").write_text(
            f"task: subject_{number}\ndataset_path: nobody/subjects\ndataset_name: part_{number}\ntest_split: test\n"
            "output_type: loglikelihood\ndoc_to_text: a\ndoc_to_target: b\ntag: subjects\n"
        )
    (tmp_path / "group.yaml").write_text("group: exam\ntask: [subjects]\naggregate_metric_list: [{metric: acc}]\n")
    with pytest.raises(ValueError, match=r"exam \(all 6 of its tasks\): the data set nobody/subjects is not in"):
        check_tasks("exam", str(tmp_path))


# ---------------------------------------------------------------- the run


def test_results_are_plain_and_those_of_the_model(
    place: str,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # not below a folder of git's, which lm-eval asks for one
    found = run_tasks(model, tokenizer, "endings:acc,likelihood,next_word", include_path=place, batch_size=3)
    assert json.loads(json.dumps(found)) == found and found["mean"] is None
    # Counted here anew: the four ends of a sentence by their likelihood.
    right, rows = 0, list(map(json.loads, (Path(place) / "endings.jsonl").read_text().splitlines()))
    for row in rows:
        start = tokenizer(row["start"], return_tensors="pt").input_ids
        totals = []
        for choice in row["choices"]:
            whole = tokenizer(f"{row['start']} {choice}", return_tensors="pt").input_ids
            with torch.no_grad():
                logits = model(whole).logits
            nats = F.cross_entropy(logits[0, :-1], whole[0, 1:], reduction="none")
            totals.append(-float(nats[start.shape[1] - 1 :].sum()))
        right += totals.index(max(totals)) == row["answer"]
    endings = found["tasks"]["endings"]
    assert endings["value"] == right / len(rows) and 0 < right < len(rows)
    share = endings["value"]
    assert endings["stderr"] == pytest.approx((share * (1 - share) / (len(rows) - 1)) ** 0.5)
    assert (endings["metric"], endings["samples"], endings["num_fewshot"]) == ("acc", 24, 0)
    assert found["tasks"]["likelihood"]["metric"] == "word_perplexity"
    assert found["tasks"]["likelihood"]["stderr"] is None
    assert 0 < found["tasks"]["next_word"]["value"] < 1
    assert capfd.readouterr() == ("", "")


def test_groups_tags_examples_and_limits(place: str, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    def run(tasks: str, **options: Any) -> dict[str, Any]:
        return run_tasks(model, tokenizer, tasks, include_path=place, **options)

    half = run("half:acc", limit=0.5)["tasks"]["half"]
    whole = run("both", limit=12)
    assert half["samples"] == 12
    # Both halves of the group are the same questions.
    assert whole["tasks"]["both"]["value"] == half["value"] == whole["mean"]
    assert whole["tasks"]["both"]["samples"] == 24 and whole["tasks"]["both"]["num_fewshot"] == 0
    assert list(run("pair", limit=2)["tasks"]) == ["endings", "likelihood"]
    assert list(run("sentences", limit=2)["tasks"]) == ["endings", "next_word"]
    shots = [run("endings", limit=4, num_fewshot=2, seed=seed)["tasks"]["endings"] for seed in (1, 1)]
    assert shots[0] == shots[1] and shots[0]["num_fewshot"] == 2
    with pytest.raises(ValueError, match=r"next_word: lm-eval gives no metric acc for it; it has likeness"):
        run("next_word:acc", limit=2)
    with pytest.raises(ValueError, match="lm-eval has no task nothing"):
        run("nothing")
    rows = map(json.loads, (Path(place) / "endings.jsonl").read_text().splitlines()[:8])
    lengths = [len(tokenizer(f"{row['start']} {choice}").input_ids) for row in rows for choice in row["choices"]]
    # The last token of an answer is predicted, and not seen.
    cut = sum(length > 41 for length in lengths)
    with pytest.warns(UserWarning, match=f"cut {cut} requests from the left, which have more than the 40 tokens"):
        run("endings", limit=8, max_length=40)
    with pytest.raises(ValueError, match="an answer has more than the 5 tokens"):
        run("endings", limit=8, max_length=5)


def test_everything_is_left_as_it_was(place: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_mixtral(vocab_size=400, max_position_embeddings=256, eos_token_id=0, tie_word_embeddings=True)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    parameters = dict(model.named_parameters())
    values = {name: parameter.clone() for name, parameter in parameters.items()}
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    loggers = [logging.getLogger(name) for name in task_data.CHATTER]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    assert tokenizer.pad_token is None
    run_tasks(model, tokenizer, "endings,next_word", include_path=place, limit=2, seed=3, num_fewshot=1)
    assert tokenizer.pad_token is None
    assert [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers] == before
    assert (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert [module.training for module in model.modules()] == modes
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(values[name], parameter) for name, parameter in parameters.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in parameters.values())
