"""The report claims no more than was measured, of the model that the run ended with."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from moe_lightning.evaluation.intervals import Interval
from moe_lightning.evaluation.records import QualityMoment, QualityRecord, Rate
from moe_lightning.reporting.report import Run, comparison_text, read, read_run, summary_text, write_report
from moe_lightning.reporting.report.blocks import Facts
from moe_lightning.reporting.report.columns import final_column
from moe_lightning.reporting.report.comparison import comparison_page
from moe_lightning.reporting.report.speeds import speed_changes
from moe_lightning.reporting.report.summary import summary_section
from moe_lightning.reporting.report.words import decimals, percent, share_with_interval, with_interval
from tests.reporting.pages import Page
from tests.reporting.report_runs import write_run


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures out, which take seconds."""
    monkeypatch.setattr(read, "run_figures", lambda *data: {})


def with_moments(folder: Path, change: Any) -> Run:
    """Return a run whose moments were changed by ``change(moments by name) -> moments``."""
    path = write_run(folder) / "results" / "quality.json"
    (folder / "results" / "benchmark.json").unlink()
    record = QualityRecord.load(path)
    moments = change({moment.name: moment for moment in record.moments})
    QualityRecord(list(moments), record.context).save(path)
    return read_run(folder)


def facts(run: Run) -> dict[str, tuple[str, str]]:
    (found,) = (block for block in summary_section(run).blocks if isinstance(block, Facts))
    return {name: (cell.text, cell.small) for name, cell in found.facts}


def faster(moment: QualityMoment, factor: float, **changes: Any) -> QualityMoment:
    speed = {
        name: dataclasses.replace(rate, median=factor * rate.median, low=factor * rate.low, high=factor * rate.high)
        for name, rate in moment.speed.items()
    }
    return dataclasses.replace(moment, speed=speed, **changes)


# ---------------------------------------------------------------- tests of other models


def test_a_test_of_the_uncompressed_model_is_not_the_headline(tmp_path: Path) -> None:
    plain = with_moments(tmp_path / "plain", lambda found: found.values())
    run = with_moments(
        tmp_path / "tested",
        lambda found: [*found.values(), faster(found["before"], 40, name="test", step=600, what="test of early.ckpt")],
    )
    assert facts(run) == facts(plain)
    assert facts(run)["parameters"][0] == "60.0 %"
    assert final_column(run) == final_column(plain)
    assert final_column(run).values["parameters"] == 600_000
    page = Page(write_report(run).read_text())
    assert page.table_with("", "before").rows[0][-1] == "teststep 600, same model as before"
    assert "The test (test of early.ckpt) was not of the model that the run ended with" in page.text
    assert "WARNING: The test" in summary_text(run)
    assert "test" not in comparison_text([plain, run]).replace("tested", "")


def test_a_test_of_the_last_model_says_so(tmp_path: Path) -> None:
    """A folder knows no step; numbers of another machine differ in the last digits."""

    def tested(found: dict[str, QualityMoment]) -> list[QualityMoment]:
        texts = {
            name: dataclasses.replace(text, scores=dataclasses.replace(text.scores, nats=text.scores.nats * (1 + 1e-6)))
            for name, text in found["end"].texts.items()
        }
        return [*found.values(), dataclasses.replace(found["end"], name="test", step=0, texts=texts)]

    run = with_moments(tmp_path / "run", tested)
    page = Page(write_report(run).read_text())
    assert page.table_with("", "before").rows[0][-1] == "teststep 700, same model as end"
    assert "was not of the model" not in page.text


def test_a_test_alone_is_what_there_is(tmp_path: Path) -> None:
    run = with_moments(tmp_path / "run", lambda found: [dataclasses.replace(found["end"], name="test")])
    assert final_column(run).values["parameters"] == 600_000
    assert "test" in Page(write_report(run).read_text()).table_with("", "test").rows[0][1]


# ---------------------------------------------------------------- words


def test_what_is_claimed_holds_for_these_documents(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    text = Page(write_report(run).read_text()).text
    assert "times that before: worse on these documents." in text
    assert "other documents move the numbers by more" in text
    page = comparison_page([run, read_run(write_run(tmp_path / "other", worse=0.5))])
    told = str(page)
    assert "better on these documents" in told and "other documents move the numbers by more" in told


def test_only_the_page_that_loads_nothing_says_so(tmp_path: Path) -> None:
    path = write_report(read_run(write_run(tmp_path / "run")))
    assert "loads nothing from anywhere" in path.read_text()
    markdown = path.with_suffix(".md").read_text()
    assert "loads nothing" not in markdown and "no address" not in markdown
    assert "from the files of the run." in markdown


def test_the_worst_text_and_agreement_are_headlines(tmp_path: Path) -> None:
    """Two thirds of a nat more on the second text, by hand; where it is the only one nothing is worst."""
    extra = math.log(1.5)

    def worse(found: dict[str, QualityMoment]) -> list[QualityMoment]:
        end = found["end"]
        text = found["before"].texts["python-topics"]
        scores = dataclasses.replace(text.scores, nats=text.scores.nats + extra * text.scores.tokens)
        texts = {**end.texts, "python-topics": dataclasses.replace(text, scores=scores)}
        return [found["before"], found["compressed"], dataclasses.replace(end, texts=texts)]

    run = with_moments(tmp_path / "run", worse)
    shown = facts(run)
    assert shown["perplexity, worst text"] == ("x 1.500", "'python-topics' (not calibrated on) [1.500, 1.500]")
    assert shown["same next token as before"] == (
        final_column(run).cells["agreement"].text,
        final_column(run).cells["agreement"].small,
    )
    assert "it is worst on 'python-topics' (not calibrated on): 1.5000" in summary_text(run)
    alone = with_moments(
        tmp_path / "alone",
        lambda found: [dataclasses.replace(item, texts={"test": item.texts["test"]}) for item in found.values()],
    )
    assert "perplexity, worst text" not in facts(alone) and "worst on" not in summary_text(alone)


def test_operations_are_those_of_the_text_or_an_upper_bound(tmp_path: Path) -> None:
    """Novices get another share at each moment: the same count at both was made without their picks."""

    def routed(found: dict[str, QualityMoment], flops: tuple[int, int]) -> list[QualityMoment]:
        compressed, end = found["compressed"], found["end"]
        assert end.routing is not None
        load = [[2 * value for value in row] for row in end.routing.mass]  # type: ignore[operator]
        routing = dataclasses.replace(end.routing, load=load)
        return [
            found["before"],
            dataclasses.replace(compressed, flops=flops[0]),
            dataclasses.replace(end, flops=flops[1], routing=routing),
        ]

    for name, flops, bound in (("old", (10**9, 10**9), True), ("new", (10**9, 9 * 10**8), False)):
        page = Page(write_report(with_moments(tmp_path / name, lambda found, f=flops: routed(found, f))).read_text())
        row = next(row for row in page.table_with("", "before").rows if row[0] == "GFLOP per sequence, on this text")
        assert ["upper bound" in cell for cell in row[1:]] == [False, bound, bound]
        assert [("upper bound" in row[-1]) for row in page.table_with("moment", "parameters").rows[1:]] == [
            False,
            bound,
            bound,
        ]
    plain = with_moments(
        tmp_path / "plain", lambda found: [dataclasses.replace(item, routing=None) for item in found.values()]
    )
    assert final_column(plain).cells["flops"].small == "60.0 %, upper bound"


def test_long_prompts_are_cut_and_folded(tmp_path: Path) -> None:
    long = "".join(f"line {place}\n" for place in range(40))
    page = write_report(read_run(write_run(tmp_path / "run", prompt=long))).read_text()
    table = Page(page).table_with("prompt", "before")
    (cell,) = [row[0] for row in table.rows if "line 39" in row[0]]
    assert cell.startswith("[...] ") and "line 34" in cell and "line 33" not in cell
    assert page.count("line 3\n") == 1 and "Whole prompts: 1 of 2 were cut" in page


# ---------------------------------------------------------------- speed


def test_a_speed_whose_range_overlaps_shows_no_difference(tmp_path: Path) -> None:
    """By hand: 5,000 [4,900 to 5,100] before; the end has the same with another median, then one just apart."""
    base = Rate(5000.0, 4900.0, 5100.0, 8, 256)
    for now, expected in (
        (Rate(6000.0, 5100.0, 6500.0, 8, 256), "no difference shown"),
        (Rate(6000.0, 5101.0, 6500.0, 8, 256), "x 1.20"),
        (Rate(4000.0, 3000.0, 4900.0, 8, 256), "no difference shown"),
        (Rate(4000.0, 3000.0, 4899.0, 8, 256), "x 0.800"),
    ):
        folder = tmp_path / f"{now.low} {now.high}"
        run = with_moments(
            folder,
            lambda found, now=now: [
                dataclasses.replace(found["before"], speed={"prefill": base}),
                dataclasses.replace(found["end"], speed={"prefill": now}),
            ],
        )
        assert "prefill" not in facts(run)  # not timed in turn: no headline
        cell = speed_changes(run, run.moments[-1])["prefill"].cell
        text, small = cell.text, cell.small
        assert text == expected
        assert small.endswith("tokens/s; before 5,000 [4,900 to 5,100]")
        assert f"[{now.low:,.0f} to {now.high:,.0f}]" in small
        row = Page(write_report(run).read_text()).table_with("moment", "phase").rows[-1]
        assert ("ranges overlap" in row[-1]) == (expected == "no difference shown")
        assert "use moe-lightning benchmark" in summary_section(run).blocks[-1].text  # type: ignore[union-attr]


def test_models_that_were_timed_in_turn_count_more(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / "results" / "benchmark.json"
    values = json.loads(path.read_text())
    assert "prefill" not in facts(read_run(folder))  # there is one model only
    sizes = {"small": (600_000, 2_400_000), "big": (1_000_000, 4_000_900)}
    values["models"] = {name: {"parameters": count, "bytes_on_disk": disk} for name, (count, disk) in sizes.items()}
    row = values["rows"][0]
    rows = []
    for model, batch, median in (("small", 1, 900), ("big", 1, 450), ("small", 8, 300), ("big", 8, 100)):
        timed = {"median": median, "low": 0.99 * median, "high": 1.01 * median}
        rows.append({**row, "model": model, "batch": batch, "context": 256, "tokens_per_second": timed})
        rows.append({**rows[-1], "implementation": "eager", "tokens_per_second": {**timed, "median": 1}})
    path.write_text(json.dumps({**values, "rows": rows}))
    found = facts(read_run(folder))
    assert found["prefill"][0] == "x 3.00"  # batch 8 and context 256, as in the run
    assert found["prefill"][1].endswith("; in turn") and "decode" not in found
    note = str(summary_section(read_run(folder)).blocks[-1])
    assert "both models were timed by benchmark of small and big (batch 8, context 256)" in note


def test_a_benchmark_tells_the_operations_of_its_text_beside_the_bound(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run") / "results" / "benchmark.json"
    values = json.loads(path.read_text())
    counts = {
        "small": (12 * 10**8, 9 * 10**8),
        "big": (2 * 10**9, 2 * 10**9),
        "old": (10**9, None),
        "none": (None, None),
    }
    values["models"] = {
        name: {"flops": bound, "routed_flops": routed, "sequence_length": 2048}
        for name, (bound, routed) in counts.items()
    }
    path.write_text(json.dumps(values))
    page = Page(write_report(read_run(tmp_path / "run")).read_text())
    rows = page.table_with("model", "folder").rows
    assert rows[0][-1] == "GFLOP per sequence"
    assert {row[0]: row[-1] for row in rows[1:]} == {
        "small": "0.9000upper bound 1.200",
        "big": "2.000",
        "old": "1.000upper bound",
        "none": "-",
    }
    assert "GFLOP: of one sequence of 2,048 tokens, with the picks of its tokens" in page.text


def test_a_benchmark_that_was_interrupted_says_so(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run") / "results" / "benchmark.json"
    values = json.loads(path.read_text())
    values["context"]["measurements"] = 12
    for interrupted in (False, True):
        path.write_text(json.dumps({**values, "context": {**values["context"], "interrupted": interrupted}}))
        page = Page(write_report(read_run(tmp_path / "run")).read_text())
        told = "Interrupted: 3 of 12 measurements were done"
        assert (told in page.text) == interrupted and "interrupted" not in page.text
        if interrupted:
            assert page.text.index(told) < page.text.index("GFLOP: of one sequence")
            assert ("p", "class", "warning") in page.attributes


# ---------------------------------------------------------------- what is no number


def test_a_broken_model_is_told(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run") / "results" / "quality.json"
    values = json.loads(path.read_text())
    for name in ("nats", "divergence"):
        values["moments"][2]["texts"]["test"]["scores"][name][4] = None
    path.write_text(json.dumps(values))
    run = read_run(tmp_path / "run")
    page = Page(write_report(run).read_text())
    words = "The model is broken (end, step 700): it gives NaN or infinity in 1 of 12 blocks of 'test'"
    assert words in page.text and f"WARNING: {words}" in summary_text(run)
    assert "At the end perplexity on 'test' is not finite." in page.text
    assert facts(run)["perplexity"] == ("not finite", "")
    rows = page.table_with("text", "calibrated", "moment").rows
    assert rows[3][3:5] == ["not finite", "not finite"] and rows[6][4].startswith("1.")
    assert "nan" not in page.text.lower().replace("nan or infinity", "")
    other = read_run(write_run(tmp_path / "other"))
    assert "not finite" in comparison_text([run, other]) and "nan" not in comparison_text([run, other])
    pairs = str(comparison_page([run, other]).sections[2])
    assert "not finite" in pairs


def test_what_was_not_measured_is_something_else() -> None:
    broken = Interval(math.nan, math.nan, math.nan)
    assert [with_interval(None, 2).text, with_interval(broken, 2).text] == ["-", "not finite"]
    assert [share_with_interval(None).text, share_with_interval(broken).text] == ["-", "not finite"]
    assert [decimals(None, 2), decimals(math.inf, 2), percent(None), percent(math.nan)] == ["-", "not finite"] * 2


def test_metrics_that_are_no_shares_stay_as_they_are(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run") / "results" / "lm_eval.json"
    values = json.loads(path.read_text())
    row = {"stderr": 0.01, "samples": 10, "num_fewshot": 0}
    tasks = {
        "wikitext": {**row, "metric": "word_perplexity", "value": 12.3},
        "enwik8": {**row, "metric": "bits_per_byte", "value": 0.85},
        "broken": {**row, "metric": "acc", "value": None, "stderr": None},
        "arc": {**row, "metric": "acc", "value": 0.5},
    }
    values["moments"] = [{"name": "end", "step": 700, "limit": None, "mean": None, "tasks": tasks}]
    path.write_text(json.dumps(values))
    rows = Page(write_report(read_run(tmp_path / "run")).read_text()).table_with("task", "metric").rows[1:]
    assert [(row[0], row[4].partition("+")[0]) for row in rows] == [
        ("wikitext", "12.30"),
        ("enwik8", "0.8500"),
        ("broken", "no number"),
        ("arc", "50.00 %"),
    ]


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("lm_eval", ("moments", 0, "tasks", "arc_easy", "stderr"), "N/A"),
        ("lm_eval", ("moments", 0, "limit"), "ten"),
        ("quality", ("moments", 0, "parameters"), None),
        ("quality", ("moments", 0, "speed", "prefill", "low"), None),
        ("recovery", ("boundaries", 0, "recovered_share"), "all"),
        ("benchmark", ("rows", 0, "milliseconds", "median"), "fast"),
        ("benchmark", ("models", "small", "parameters"), "many"),
        ("benchmark", ("models", "small", "routed_flops"), "few"),
        ("benchmark", ("context", "measurements"), "all"),
        ("compression-600", ("modules",), [1]),
        ("compression-600", ("touched_parameters",), "some"),
        ("compression-600", ("methods",), 7),
    ],
)
def test_what_a_file_should_not_hold_is_told_with_its_name(
    tmp_path: Path, name: str, place: tuple[Any, ...], value: Any
) -> None:
    path = write_run(tmp_path / "run") / "results" / f"{name}.json"
    values = inside = json.loads(path.read_text())
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    path.write_text(json.dumps(values))
    assert list(read_run(tmp_path / "run").damaged) == [str(path)]
