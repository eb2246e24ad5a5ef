"""The sweep command: every cell is what compress and evaluate give on their own, and nothing is done twice."""

import contextlib
import csv
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from transformers import MixtralConfig

import moe_lightning as ml
from moe_lightning.architectures import MixtralArchitecture
from moe_lightning.checkpoints.inspect import read_header
from moe_lightning.cli.commands import command_parser
from moe_lightning.cli.config_files import packaged_configs
from moe_lightning.cli.sweep import main, sweep_model
from moe_lightning.divergence import kl_divergence, top1_agreement
from moe_lightning.plan import CompressionPlan
from moe_lightning.statistics import CRITERIA
from moe_lightning.surgery import plan_of
from moe_lightning.sweep import cells_of
from moe_lightning.sweep.bench import Bench
from moe_lightning.sweep.operators import SCOPES, SCORED, UNSCORED
from tests.small_checkpoints import write_checkpoint

GRIDS = [
    {
        "criteria": ["residual"],
        "operators": ["delete", "low_rank:2"],
        "scopes": ["layer", "sensitivity"],
        "ratios": [0.5],
    },
    {"criteria": ["mone"], "operators": ["usual"], "ratios": [0.5]},
    {"criteria": ["random"], "operators": ["delete"], "ratios": [0.5], "seeds": [0, 1]},
    {"operators": ["layer_drop", "channels"], "ratios": [0.25, 0.5]},
    {
        "name": "drop, then novices",
        "methods": [
            {"class_path": "ExpertDrop", "init_args": {"keep": 4}},
            {"class_path": "Novices", "init_args": {"keep": 2, "novice": "gate2_mean"}},
        ],
    },
    {"name": "int4", "methods": [{"class_path": "GPTQ", "init_args": {"group_size": 16}}]},
    {
        "name": "half of the weights",
        "methods": [{"class_path": "Wanda", "init_args": {"sparsity": 0.5, "targets": "experts+attention"}}],
    },
]
CELLS = 4 + 1 + 2 + 4 + 1 + 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    data = write_checkpoint(folder)
    options = {"data": data, "grids": GRIDS, "sensitivity_batches": 2, "resamples": 50}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(options))
    return folder


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    assert sweep(place, place / "out", figures=True) == 0
    return place / "out"


def sweep(place: Path, output: Path, *arguments: str, figures: bool = False) -> int:
    given = ["-c", str(place / "sweep.yaml"), "--model", str(place / "hub"), "--output", str(output), *arguments]
    with contextlib.ExitStack() as stack:
        if not figures:  # the pictures take longer than the rest
            stack.enter_context(mock.patch("moe_lightning.cli.sweep.write_figures", return_value=[]))
        try:
            return main(given)
        except SystemExit as leaving:
            return int(leaving.code or 0)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def one_row(folder: Path, **wanted: str) -> dict[str, str]:
    (found,) = [row for row in rows(folder) if all(row[name] == value for name, value in wanted.items())]
    return found


def data_of(place: Path) -> ml.TextDataModule:
    options = yaml.safe_load((place / "sweep.yaml").read_text())["data"]
    return ml.TextDataModule(**options, tokenizer=str(place / "hub")).prepare()


def test_a_sweep_leaves_tables_and_figures(place: Path, finished: Path) -> None:
    table = rows(finished)
    assert len(table) == 1 + CELLS
    assert table[0]["operator"] == "uncompressed"
    budget = int(one_row(finished, criterion="mone")["parameter_budget"])
    for row in table[1:]:
        if row["ratio"] == "0.5":
            assert int(row["parameters"]) <= int(row["parameter_budget"]) == budget
        assert float(row["perplexity_low"]) <= float(row["perplexity"]) <= float(row["perplexity_high"])
        assert float(row["kl_nats_per_token"]) > 0
    # More is removed where what takes its place is larger.
    assert int(one_row(finished, operator="low_rank:2", scope="layer")["experts"]) < int(
        one_row(finished, operator="delete", scope="layer", criterion="residual")["experts"]
    )
    assert float(one_row(finished, criterion="mone")["share_of_baseline_loss"]) == 1.0
    best = min((row for row in table if row["ratio"] == "0.5"), key=lambda row: float(row["perplexity"]))
    assert float(best["perplexity_to_best"]) == 1.0
    text = (finished / "results.md").read_text()
    assert "## 50% of the experts" in text
    assert "## Methods written out" in text
    assert text.count("| random | delete | layer |") == 1  # both seeds in one line
    names = {path.stem for path in (finished / "figures").iterdir()}
    assert {"curves-layer", "curves-baselines", "ranking-50", "decisions-50", "similarity"} <= names
    assert {"dropping-order", "frequency-variance-50"} <= names


@pytest.mark.parametrize(
    ("wanted", "methods"),
    [
        (
            {"criterion": "residual", "operator": "low_rank:2", "scope": "layer"},
            lambda budget: [ml.Novices(parameters=budget, criterion="residual", novice="low_rank", rank=2)],
        ),
        (
            {"criterion": "random", "seed": "1"},
            lambda budget: [ml.ExpertDrop(parameters=budget, criterion="random", seed=1)],
        ),
        (
            {"operator": "drop, then novices"},
            lambda _: [ml.ExpertDrop(keep=4), ml.Novices(keep=2, novice="gate2_mean")],
        ),
        ({"operator": "int4"}, lambda _: [ml.GPTQ(group_size=16)]),
        ({"operator": "half of the weights"}, lambda _: [ml.Wanda(sparsity=0.5, targets="experts+attention")]),
    ],
)
def test_a_row_equals_an_independent_evaluation(
    place: Path, finished: Path, tmp_path: Path, wanted: dict[str, str], methods: Any
) -> None:
    """Compress without shared statistics, evaluate by the public functions, and sum the divergence token by token."""
    row, data = one_row(finished, **wanted), data_of(place)
    model, teacher = ml.from_pretrained(place / "hub"), ml.from_pretrained(place / "hub")
    budget = int(row["parameter_budget"]) if row["parameter_budget"] else None
    ml.compress(model, data.calibration_batches(), methods(budget), progress=False)
    likelihood = ml.evaluate(model, data.test_dataloader(), progress=False)
    assert float(row["perplexity"]) == pytest.approx(likelihood.perplexity, rel=1e-5)
    assert float(row["bits_per_byte"]) == pytest.approx(likelihood.bits_per_byte, rel=1e-5)
    assert int(row["tokens"]) == likelihood.num_tokens
    size = ml.measure(model, data.block_size)
    assert (int(row["parameters"]), int(row["bytes"]), int(row["flops_per_sequence"])) == (
        size.parameters,
        size.bytes,
        size.flops,
    )
    ml.save_pretrained(model, tmp_path / "out", format="native")
    headers = [read_header(path) for path in (tmp_path / "out").glob("*.safetensors")]
    written = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for one in headers for entry in one.values())
    assert int(row["bytes_on_disk"]) == written
    divergence = agreement = 0.0
    for batch in data.test_dataloader():
        with torch.no_grad():
            pair = [one(batch["input_ids"]).logits[:, :-1].double() for one in (teacher, model)]
        divergence += float(kl_divergence(*pair).sum())
        agreement += float(top1_agreement(*pair).sum())
    assert float(row["kl_nats_per_token"]) == pytest.approx(divergence / likelihood.num_tokens, rel=1e-4)
    assert float(row["top1_agreement"]) == pytest.approx(agreement / likelihood.num_tokens, abs=1e-3)
    kept = json.loads((finished / "cells" / f"{row['cell']}.json").read_text())["plan"]
    assert CompressionPlan.from_dict(kept) == plan_of(model)


def test_finished_cells_are_not_done_again(
    place: Path, finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (finished / "results.csv").read_text()
    # A cell is missing, as after a kill between two cells; another was cut off, as by a full disk.
    lost = finished / "cells" / f"{one_row(finished, criterion='mone')['cell']}.json"
    lost.unlink()
    broken = finished / "cells" / f"{one_row(finished, seed='0')['cell']}.json"
    broken.write_text(broken.read_text()[:100])
    done = []
    measure = Bench.measure
    monkeypatch.setattr(Bench, "measure", lambda self, cell: done.append(cell.name) or measure(self, cell))
    with pytest.warns(UserWarning, match="is not whole: the cell is done again"):
        assert sweep(place, finished) == 0
    assert f"{CELLS - 2} of {CELLS} are done, 2 to do" in capsys.readouterr().out
    assert sorted(done) == ["mone mean layer 50%", "random delete layer 50% seed 0"]
    after = (finished / "results.csv").read_text()

    def numbers(text: str) -> list[list[str]]:
        return [[value for key, value in row.items() if key != "seconds"] for row in csv.DictReader(text.splitlines())]

    assert numbers(after) == numbers(before)

    # Nothing left to do: no model is loaded, the tables are written anew.
    def no_model(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded with nothing to do")

    monkeypatch.setattr("moe_lightning.cli.sweep.from_pretrained", no_model)
    monkeypatch.setattr("moe_lightning.sweep.bench.from_pretrained", no_model)
    (finished / "results.md").unlink()
    assert sweep(place, finished) == 0
    assert (finished / "results.md").is_file()


def test_two_processes_give_the_same_numbers(place: Path, finished: Path, tmp_path: Path) -> None:
    arguments = ["--workers", "2", "--teacher_cache_mib", "0", "--grids", json.dumps(GRIDS[1:3])]
    assert sweep(place, tmp_path / "out", *arguments) == 0
    for row in rows(tmp_path / "out")[1:]:
        alone = one_row(finished, cell=row["cell"])
        for name in ("perplexity", "kl_nats_per_token", "top1_agreement"):
            assert float(row[name]) == pytest.approx(float(alone[name]), rel=1e-5)


def test_another_model_or_other_data_are_refused(
    place: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "results.csv").read_text()
    assert sweep(place, finished, "--calibration_batches", "2") == 2
    assert "different are: calibration blocks (was 8, is 4)" in capsys.readouterr().err
    assert sweep(place, finished, "--data.seed", "5") == 2
    assert "different are: data (was" in capsys.readouterr().err
    model = ml.from_pretrained(place / "hub")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1.0
    ml.save_pretrained(model, tmp_path / "other", place / "hub")
    assert sweep(place, finished, "--model", str(tmp_path / "other")) == 2
    assert "different are: model (was" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("mine")
    assert sweep(place, tmp_path / "full") == 2
    assert "holds something that is no sweep" in capsys.readouterr().err
    assert (finished / "results.csv").read_text() == before


def test_few_tokens_are_told(place: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the tables, and with the options that the messages name."""
    model = ml.from_pretrained(place / "hub")
    with pytest.warns(UserWarning, match="calibration tokens reach layer"):
        result = ml.compress(model, data_of(place).calibration_batches(), ml.GPTQ(group_size=16), progress=False)
    few = sum(count < 32 for module in result.modules.values() for count in module.tokens.values())
    row = one_row(finished, operator="int4")
    assert int(row["starved_experts"]) == few > 0 and row["own_passes"] == "yes"
    assert one_row(finished, criterion="mone")["own_passes"] == ""
    text = (finished / "results.md").read_text()
    assert f"\n* int4: {few} starved experts" in text
    assert "not on the shared one: residual delete sensitivity 50%" in text and "drop, then novices, int4, half" in text
    grid = ["--grids", json.dumps(GRIDS[-2:-1])]
    assert sweep(place, tmp_path / "a", *grid, "--starved", "fallback", "--max_fallback", "1") == 0
    assert "int4: perplexity" in capsys.readouterr().out
    row = one_row(tmp_path / "a", operator="int4")
    assert int(row["fallback_matrices"]) >= 2 * few
    assert f"{row['fallback_matrices']} of 36 matrices without measurement" in (tmp_path / "a/results.md").read_text()
    assert sweep(place, tmp_path / "b", *grid, "--starved", "fallback", "--max_fallback", "0") == 1
    assert "more than max_fallback=0.0 allows" in capsys.readouterr().err
    assert sweep(place, tmp_path / "c", *grid, "--min_tokens", "1") == 0
    assert one_row(tmp_path / "c", operator="int4")["starved_experts"] == "0"
    assert (
        sweep(place, tmp_path / "d", *grid, "--calibration_batches", "1", "--starved", "top_up", "--min_tokens", "6")
        == 0
    )
    assert sweep(place, tmp_path / "c", *grid, "--min_tokens", "2") == 2
    assert "different are: min_tokens (was 1, is 2)" in capsys.readouterr().err


def test_a_cell_that_fails_does_not_stop_the_others(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Bench.measure

    def fail(self: Bench, cell: Any) -> Any:
        if cell.seed == 0:
            raise ValueError("it is Sunday")
        return measure(self, cell)

    monkeypatch.setattr(Bench, "measure", fail)
    assert sweep(place, tmp_path / "out", "--grids", json.dumps(GRIDS[2:3])) == 1
    error = capsys.readouterr().err
    assert "1 of 2 cells failed and are left out of the results: random delete layer 50% seed 0: it is Sunday" in error
    assert len(rows(tmp_path / "out")) == 2
    monkeypatch.setattr(Bench, "measure", measure)
    assert sweep(place, tmp_path / "out", "--grids", json.dumps(GRIDS[2:3])) == 0
    assert len(rows(tmp_path / "out")) == 3


def test_an_interrupt_keeps_what_is_done(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Bench.measure

    def interrupt(self: Bench, cell: Any) -> Any:
        if cell.seed == 1:
            raise KeyboardInterrupt
        return measure(self, cell)

    monkeypatch.setattr(Bench, "measure", interrupt)
    assert sweep(place, tmp_path / "out", "--grids", json.dumps(GRIDS[2:3])) == 130
    assert "interrupted; the finished cells are kept" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cells", "statistics.safetensors", "sweep.json"}
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 2  # the uncompressed model and one cell


def test_dry_run_says_what_would_be_done(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(place, tmp_path / "out", "--dry_run") == 0
    printed = capsys.readouterr().out
    for words in ("memory", f"0 of {CELLS} are done, {CELLS} to do", "nothing was measured", "for all cells"):
        assert words in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grids", "[]"], "--grids is empty"),
        (["--grids", "[{criteria: [magic], operators: [mean]}]"], "unknown criterion 'magic'"),
        (["--grids", "[{criteria: [mone], operators: [melt]}]"], "unknown operator 'melt'"),
        (["--grids", "[{criteria: [mone], operaters: [mean]}]"], "operaters"),
        (["--grids", "[{criteria: [mone], operators: [delete], ratios: [0.9]}]"], "mone delete layer 90%"),
        (["--grids", "[{name: x, methods: [{class_path: Novices, init_args: {ratio: 2}}]}]"], r"ratio must lie in"),
        (["--calibration_batches", "999"], "calibration"),
        (["--workers", "0"], "--workers 0"),
        (["--starved", "top_up"], "--starved top_up: there are no further calibration batches"),
        (["--max_fallback", "2"], "max_fallback must be a share"),
        (
            ["--grids", "[{name: x, methods: [{class_path: Wanda, init_args: {sparsity: 0.001}}]}]"],
            "--grids: x: Wanda(sparsity=0.001) would set no weight to zero",
        ),
        (["--sensitivity_batches", "0"], "--sensitivity_batches 0"),
        (["--level", "95"], "--level 95"),
        (["--device", "toaster"], "--device toaster"),
        (["--data.sources", "/nowhere/*.txt"], "/nowhere"),
        (["--data.test", "0"], "--data.test"),
        (["--data.test", "1"], "raise --data.test"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--baseline", "{criterion: residuum, operator: mean, scope: layer}"], "is no cell of the grids"),
        (["-c", "sweeps/nowhere"], "sweeps/quickstart"),
    ],
)
def test_mistakes_are_one_line_before_any_work(
    arguments: list[str],
    message: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_work(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded before the mistake was found")

    monkeypatch.setattr("moe_lightning.cli.sweep.from_pretrained", no_work)
    assert sweep(place, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if "error:" in line]) == 1
    assert not (tmp_path / "out").exists()


def test_a_compressed_model_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ml.from_pretrained(place / "hub")
    ml.compress(model, [], ml.Novices(keep=4, criterion="random", novice="zero"), progress=False)
    ml.save_pretrained(model, tmp_path / "small", place / "hub")
    assert sweep(place, tmp_path / "out", "--model", str(tmp_path / "small")) == 2
    assert "is compressed already" in capsys.readouterr().err


def test_the_packaged_sweep_is_what_it_says() -> None:
    """Every criterion and operator is in it, it fits the quickstart's model, and nothing held out was trained on."""
    config = packaged_configs()
    options = yaml.safe_load(config["sweeps/quickstart"].read_text())
    training = yaml.safe_load(config["quickstart"].read_text())
    data = {name: value for name, value in training["data"].items() if name != "vocab_size"}
    assert options["data"] == {**data, "test": options["data"]["test"]}
    assert f"--data.test {options['data']['test']} " in config["sweeps/quickstart"].read_text()
    assert options["data"]["test"] * (options["data"]["block_size"] - 1) >= 100_000
    parser = command_parser("sweep", sweep_model)
    given = ["-c", str(config["sweeps/quickstart"]), "--model", "somewhere", "--output", "elsewhere"]
    grids = parser.instantiate(parser.parse_args(given)).grids
    shape = MixtralArchitecture().shape_of_config(MixtralConfig(**training["model"]["model"], vocab_size=2048))
    cells = cells_of(grids, shape)
    assert len({cell.name for cell in cells}) == len(cells)
    own_norm = {"mone_l1", "mone_paper_l1", "variance_l1"}  # ablations of a norm
    assert {cell.criterion.partition(":")[0] for cell in cells} - {""} == set(CRITERIA) - own_norm
    operators = {cell.operator.partition(":")[0] for cell in cells if cell.ratio is not None}
    assert operators == {*SCORED, *UNSCORED} - {"keep_router"}
    for criterion in ("residual", "mone", "reap"):
        tried = {(cell.operator, cell.scope, cell.ratio) for cell in cells if cell.criterion == criterion}
        assert len(tried) == 5 * len(SCOPES) * 2
