"""A TensorBoard that is really started serves everything that a run logged."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_lightning.callbacks import last_checkpoint
from moe_lightning.callbacks.run_log import write_hyper_parameters
from moe_lightning.evaluation.records import QualityRecord
from tests.callbacks.tensorboard_run import run

SECONDS = 60.0
"""After which TensorBoard is given up."""


class Server:
    """A TensorBoard that runs."""

    def __init__(self, address: str) -> None:
        self.address = address

    def bytes_of(self, path: str, **query: Any) -> bytes:
        """Return what stands at an address."""
        address = f"{self.address}data/plugin/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=SECONDS) as answer:
            return bytes(answer.read())

    def get(self, path: str, **query: Any) -> Any:
        """Return the JSON at an address."""
        return json.loads(self.bytes_of(path, **query))

    def post(self, path: str, values: dict[str, Any]) -> Any:
        """Return the JSON that answers to one."""
        request = urllib.request.Request(
            f"{self.address}data/plugin/{path}", json.dumps(values).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.loads(answer.read())

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of the tab of hyper-parameters."""
        statuses = [f"STATUS_{status}" for status in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
        asked = {"startIndex": 0, "sliceSize": 10, "allowedStatuses": statuses, "colParams": []}
        return list(self.post("hparams/session_groups", asked)["sessionGroups"])


@contextmanager
def tensorboard(logs: Path, expected: set[str]) -> Iterator[Server]:
    """Start a TensorBoard on a free port of the loopback, and wait until it knows some scalars."""
    told = logs.parent / "tensorboard.log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--host", "127.0.0.1", "--port", "0"]
    with told.open("w") as output:
        process = subprocess.Popen([*command, "--reload_interval", "1"], stdout=output, stderr=output)
    try:
        deadline, tags = time.monotonic() + SECONDS, set[str]()
        while not expected <= tags:
            assert process.poll() is None, told.read_text()
            assert time.monotonic() < deadline, f"{told.read_text()}\nnot served: {expected - tags}"
            time.sleep(0.05)  # between two questions
            if found := re.search(r"http://127\.0\.0\.1:\d+/", told.read_text()):
                server = Server(found[0])
                tags = set(server.get("scalars/tags").get(".", ()))
        yield server
    finally:
        process.terminate()
        process.wait(SECONDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was ended, and went on later with another learning rate."""
    place = tmp_path_factory.mktemp("runs") / "run"
    run(place)
    run(place, steps=6, ckpt_path=last_checkpoint(place), learning_rate=0.02)
    return place


def test_a_real_tensorboard_serves_all_that_was_logged(folder: Path) -> None:
    logs = folder / "logs"
    events = EventAccumulator(str(logs), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    scalars, images = set(tags["scalars"]), set(tags["images"])
    texts = {tag for tag in tags["tensors"] if tag.endswith("/text_summary")}
    assert scalars >= {"train/loss", "val/perplexity", "experts_train/load_max", "compression/parameters"}
    assert scalars >= {"recovery/loss", "run/stage", "quality/perplexity_ratio", "hp/perplexity", "hp/parameters"}
    assert images >= {"experts_val/load", "compression/importance", "report/importance", "report/load_before"}
    assert images >= {"report/quality_against_bytes", "report/novice_mass", "report/layer_errors", "report/time"}
    assert {text.removesuffix("/text_summary") for text in texts} == {
        "compression/plan",
        "quality/samples",
        "report/figures",
        "report/summary",
        "run/stages",
    }
    with tensorboard(logs, scalars) as server:
        assert set(server.get("scalars/tags")) == {"."}
        assert set(server.get("scalars/tags")["."]) == scalars
        for tag in scalars:
            served = server.get("scalars/scalars", run=".", tag=tag)
            # Of several numbers at one step it keeps the last.
            logged = {event.step: event.value for event in events.Scalars(tag)}
            assert {step: value for _, step, value in served} == pytest.approx(logged), tag
        assert set(server.get("images/tags")["."]) == images
        for tag in images:
            pictures = {event.step: event for event in events.Images(tag)}
            served = server.get("images/images", run=".", tag=tag, sample=0)
            assert served and {picture["step"] for picture in served} == pictures.keys(), tag
            for picture in served:
                query = dict(urllib.parse.parse_qsl(picture["query"]))
                shown = Image.open(io.BytesIO(server.bytes_of("images/individualImage", **query)))
                shown.load()
                logged = pictures[picture["step"]]
                assert (shown.format, shown.width, shown.height) == ("PNG", logged.width, logged.height), tag
                assert min(shown.size) > 100, tag
        assert set(server.get("text/tags")["."]) == texts
        for tag in texts:
            (*_, last) = server.get("text/text", run=".", tag=tag)
            assert last["text"].strip(), tag
        _check_pages(server, scalars)
        _check_hyper_parameters(server, folder)


def _check_pages(server: Server, scalars: set[str]) -> None:
    pages = server.get("custom_scalars/layout")["category"]
    assert [page["title"] for page in pages] == ["experts", "quality", "recovery"]
    for page in pages:
        for chart in page["chart"]:
            if chart["title"] == "recovered share":
                continue  # there is none where too little was lost
            for pattern in chart["multiline"]["tag"]:
                assert any(re.match(pattern, tag) for tag in scalars), pattern
                served = server.get("custom_scalars/scalars", run=".", tag=pattern)
                assert served["tag_to_events"], pattern


def _check_hyper_parameters(server: Server, folder: Path) -> None:
    experiment = server.post("hparams/experiment", {})
    (line,) = server.lines()
    known = line["hparams"]
    assert known["module/learning_rate"] == 0.02
    assert known["compression/methods"] == "Novices(ratio=0.5) at 2"
    assert known["compression/recovery"] == "NoviceTuning at 2"
    assert (known["model/num_local_experts"], known["data/block_size"], known["trainer/max_steps"]) == (4, 16, 6)
    assert {info["name"] for info in experiment["hparamInfos"]} == known.keys()
    metrics = {value["name"]["tag"]: value["value"] for value in line["metricValues"]}
    assert {info["name"]["tag"] for info in experiment["metricInfos"]} == metrics.keys()
    end = QualityRecord.load(folder / "results" / "quality.json").moment("end")
    assert end is not None
    scores = next(iter(end.texts.values())).scores
    perplexity = float(torch.exp(scores.nats.sum() / scores.tokens.sum()))
    assert metrics["hp/perplexity"] == pytest.approx(perplexity, rel=1e-6)
    assert metrics["hp/parameters"] == end.parameters
    assert metrics["hp/decode_tokens_per_second"] == pytest.approx(end.speed["decode"].median)
    assert {value["trainingStep"] for value in line["metricValues"]} == {6}


def test_lightnings_own_line_of_hyper_parameters_gets_its_metric(tmp_path: Path) -> None:
    # Its loggers write a line at the beginning of a run unless they are told not to.
    logger = TensorBoardLogger(str(tmp_path), name="logs", version="")
    logger.log_hyperparams({"learning_rate": 0.5})
    write_hyper_parameters(logger, {"learning_rate": 0.5}, {"hp/perplexity": 7.0, "hp/parameters": 3.0}, 4)
    logger.finalize("success")
    with tensorboard(tmp_path / "logs", {"hp_metric", "hp/parameters"}) as server:
        (line,) = server.lines()
        (metric,) = line["metricValues"]
    assert line["hparams"] == {"learning_rate": 0.5}
    assert (metric["name"]["tag"], metric["value"], metric["trainingStep"]) == ("hp_metric", 7.0, 4)
