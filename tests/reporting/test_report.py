"""The report: all of it in one file, every row of the data in it, nothing of the user's as markup."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from moe_lightning.evaluation.intervals import Interval, perplexity_ratio_interval
from moe_lightning.evaluation.records import QualityRecord
from moe_lightning.reporting.report import damage_of, distinct_names, read, read_run, summary_text, write_report
from moe_lightning.reporting.report.blocks import Cell, Table
from moe_lightning.reporting.report.words import data_size, duration, number, with_interval
from moe_lightning.reporting.report.write import markdown_words
from tests.reporting.pages import Page
from tests.reporting.report_runs import NASTY, write_compressed_folder, write_run

SECTIONS = [
    "Summary",
    "What was done",
    "Quality by text",
    "Tasks",
    "Recovery",
    "Size",
    "Speed",
    "What the decision saw",
    "Where the tokens go",
    "Status of every module and matrix",
    "Tokens per expert",
    "Where the time went",
    "What it writes",
    "Settings",
]
LAYERS, EXPERTS = 5, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose name and prompts try to be markup, with its report."""
    path = tmp_path_factory.mktemp("reports") / "<script>alert(1)<" / "b|c"
    write_report(read_run(write_run(path, LAYERS, EXPERTS, bits=4)))
    return path


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures out, which take seconds."""
    monkeypatch.setattr(read, "run_figures", lambda *data: {})


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


@pytest.fixture(scope="module")
def markdown(folder: Path) -> str:
    return (folder / "report.md").read_text()


def test_nothing_comes_from_outside_and_nothing_runs(page: Page) -> None:
    assert page.outside() == []
    assert page.wrong == []
    policy = next(value for tag, name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'")


def test_links_lead_to_sections_with_something_in_them(page: Page) -> None:
    links = [value for tag, name, value in page.attributes if name == "href"]
    assert links and len(set(page.ids)) == len(page.ids)
    assert [link.removeprefix("#") for link in links] == page.ids
    assert [title for level, title in page.headings if level == 2] == SECTIONS
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(title.strip() for _, title in page.headings)
    assert all(summary.strip() for summary in page.summaries)


def test_figures_are_in_the_page_with_twice_their_dots(page: Page, folder: Path) -> None:
    assert page.images
    for image, attributes in page.images:
        assert attributes["alt"].strip()
        assert abs(image.width - 2 * int(attributes["width"])) <= 2
        assert abs(image.height - 2 * int(attributes["height"])) <= 2
    files = sorted(path.stem for path in (folder / "figures").glob("*.png"))
    assert len(files) == len(page.images)


def test_tables_are_whole(page: Page) -> None:
    assert len(page.tables) > 12
    for table in page.tables:
        assert len(table.rows) > 1, table.rows
        assert {len(row) for row in table.rows} == {len(table.rows[0])}, table.rows


def test_every_matrix_has_its_row(page: Page, folder: Path) -> None:
    summary = json.loads((folder / "results" / "compression-600.json").read_text())
    rows = page.table_with("module", "matrix").rows[1:]
    expected = {
        (module, matrix): status for module, mine in summary["matrices"].items() for matrix, status in mine.items()
    }
    assert len(expected) == LAYERS * EXPERTS  # half of the experts, two matrices each
    assert {(row[0], row[1]): row[3] for row in rows} == expected
    assert len(rows) == len(expected)
    assert {row[4] for row in rows} == {"1.230 %"}
    assert any(f"{len(expected):,} matrices: 35 gptq, damping x1.5; 5 rtn fallback" in told for told in page.summaries)
    assert len(page.table_with("module", "status").rows) == 1 + LAYERS


def test_every_expert_has_its_count(page: Page) -> None:
    for name in ("layer", "module"):
        table = page.table_with(name, "expert 0", "expert 1")
        assert table.rows[0][1:] == [f"expert {expert}" for expert in range(EXPERTS)]
        assert len(table.rows) == 1 + LAYERS
    counted = page.table_with("module", "expert 0").rows[1]
    assert counted[1:] == [f"{100 * expert:,}" for expert in range(EXPERTS)]
    assert any(
        f"{LAYERS * EXPERTS} experts in {LAYERS} layers" in told and f"{LAYERS} saw no token" in told
        for told in page.summaries
    )
    picked = page.table_with("layer", "expert 0").rows[1]
    assert ["novice" in cell for cell in picked[1:]] == [True] * 4 + [False] * 4


def test_quality_has_every_text_and_moment_with_the_intervals_of_the_blocks(page: Page, folder: Path) -> None:
    rows = page.table_with("text", "calibrated", "moment").rows[1:]
    assert [row[0] for row in rows] == ["test"] * 3 + ["python-topics"] * 3
    assert [row[1] for row in rows] == ["yes"] * 3 + ["no"] * 3
    record = QualityRecord.load(folder / "results" / "quality.json")
    before, end = record.moment("before"), record.moment("end")
    assert before is not None and end is not None
    ratio = perplexity_ratio_interval(end.texts["test"].scores.likelihood, before.texts["test"].scores.likelihood)
    assert rows[2][4] == f"{ratio.value:.4f}[{ratio.low:.4f}, {ratio.high:.4f}]"
    assert rows[0][4] == "-"
    assert f"{ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}] times that before" in page.text


def test_all_numbers_of_the_files_are_there(page: Page) -> None:
    assert "claimed = touched" in page.text
    tasks = page.table_with("task", "metric").rows
    assert [row[0] for row in tasks[1:]] == ["arc_easy", "wikitext", "mean"]
    assert tasks[1][4] == "50.00 %+- 1.00" and tasks[2][4] == "24.50"
    assert "limit 100" in page.text
    assert "Compressions cost 0.2000 [0.1500, 0.2500] nats per token" in page.text and "75.0 % of that" in page.text
    assert [row[1] for row in page.table_with("step", "what ended there").rows[1:]] == ["compressed", "NoviceTuning"]
    benchmark = page.table_with("model", "computed by").rows
    assert benchmark[1][7] == "2.5025.0 %" and benchmark[3][11] == "outputs differ by 0.3" and benchmark[3][5] == "-"
    assert page.table_with("part", "time").rows[1:] == [
        ["training", "1 min 10 s", "70.0 %"],
        ["compression", "20.0 s", "20.0 %"],
        ["other", "10.0 s", "10.0 %"],
        ["in all", "1 min 40 s", ""],
    ]
    assert page.table_with("compression", "observe").rows[1] == [
        "compression-600 (step 600)",
        "3.5 s",
        "10 ms",
        "12.0 s",
        "15.5 s",
    ]
    assert len(page.table_with("layer", "real experts").rows) == 1 + LAYERS


def test_the_text_of_users_is_text(page: Page, folder: Path, markdown: str) -> None:
    assert "script" not in page.tags and "b" not in page.tags
    samples = page.table_with("prompt", "before").rows
    assert samples[1][0] == NASTY and samples[1][1] == f"before says: {NASTY}"
    assert page.headings[0][1] == folder.name == "b|c"
    assert "<script" not in (folder / "report.html").read_text()
    assert "<script" not in markdown and "&lt;script&gt;" in markdown


def test_markdown_shows_the_same_and_its_links_are_files(folder: Path, markdown: str, page: Page) -> None:
    links = re.findall(r"!?\[[^\]]*\]\(([^)]*)\)", markdown)
    assert len(links) == len(page.images)
    assert all((folder / link).is_file() for link in links)
    assert [line.removeprefix("## ") for line in markdown.splitlines() if line.startswith("## ")] == SECTIONS
    assert markdown.count("<details>") == markdown.count("</details>") == page.tags.count("details")
    tables: list[list[int]] = []
    for before, line in zip(["", *markdown.splitlines()], markdown.splitlines(), strict=False):
        if line.startswith("|"):
            if not before.startswith("|"):
                tables.append([])
            tables[-1].append(len(re.findall(r"(?<!\\)\|", line)))
    assert len(tables) == len(page.tables)
    for counts, table in zip(tables, page.tables, strict=True):
        assert counts == [len(table.rows[0]) + 1] * (len(table.rows) + 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a|b", r"a\|b"),
        ("one\ntwo", "one<br>two"),
        ("<b> & `x` *y* $z$ ~", r"&lt;b&gt; &amp; \`x\` \*y\* \$z\$ \~"),
        ("relative_error _x_", r"relative_error \_x\_"),
        ("[54.9, 56.0] [a](b)", r"[54.9, 56.0] [a\](b)"),
        ("# no heading", r"\# no heading"),
        ("1. no list", r"1\. no list"),
        ("- no list", r"\- no list"),
        ("back\\slash", r"back\\slash"),
    ],
)
def test_markdown_shows_words_as_they_are(text: str, expected: str) -> None:
    assert markdown_words(text) == expected


def test_a_run_of_an_earlier_release_says_how_to_get_what_it_lacks(tmp_path: Path, undrawn: None) -> None:
    whole = write_run(tmp_path / "run")
    for path in whole.glob("results/*"):
        if path.name not in ("compression-600.plan.json", "compression-600.statistics.safetensors", "test.json"):
            path.unlink()
    run = read_run(whole)
    page = Page(write_report(run).read_text())
    assert [title for level, title in page.headings if level == 2] == SECTIONS
    assert page.wrong == [] and page.outside() == []
    for words in ("QualityEvaluation", "LMEval", "TimeSpent", "RecoveredShare", "moe-lightning benchmark"):
        assert words in page.text
    assert "21.50" in summary_text(run) and "Novices at step 600" in summary_text(run)
    assert "was not written down" in page.text


def test_what_compress_wrote_has_a_report(tmp_path: Path, undrawn: None) -> None:
    run = read_run(write_compressed_folder(tmp_path / "smaller"))
    page = Page(write_report(run, tmp_path / "elsewhere", "small.html").read_text())
    assert page.wrong == [] and page.outside() == []
    assert "1.1000 times that before" in page.text and "claimed = touched" in page.text
    assert page.table_with("compression", "observe").rows[1][-1] == "12.5 s"
    assert (tmp_path / "elsewhere" / "small.md").is_file()
    assert not (tmp_path / "smaller" / "report.html").exists()


def test_claims_that_do_not_hold_are_a_warning(tmp_path: Path, undrawn: None) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / "results" / "compression-600.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "touched_parameters": 7}))
    page = Page(write_report(read_run(folder)).read_text())
    assert "do not trust this compression" in page.text
    assert ("p", "class", "warning") in page.attributes


@pytest.mark.parametrize(
    "name",
    [
        "quality",
        "lm_eval",
        "time",
        "recovery",
        "test",
        "benchmark",
        "compression-600",
        "compression-600.plan",
    ],
)
@pytest.mark.parametrize("content", ["{", "[1, 2]"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / "results" / f"{name}.json"
    path.write_text(content)
    run = read_run(folder)
    assert list(run.damaged) == [str(path)]
    assert f"{path} is damaged" in damage_of(run)[0]


def test_folders_without_results_say_what_is_expected(tmp_path: Path) -> None:
    for folder, words in ((tmp_path, "there are no results"), (tmp_path / "nowhere", "does not exist")):
        with pytest.raises(FileNotFoundError, match=f"{words}.*results/quality.json.*compression.json"):
            read_run(folder)


def test_blocks_of_another_text_are_not_paired(tmp_path: Path, undrawn: None) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / "results" / "quality.json"
    values = json.loads(path.read_text())
    values["moments"][2]["texts"]["test"]["fingerprint"] = "other"
    path.write_text(json.dumps(values))
    page = Page(write_report(read_run(folder)).read_text())
    rows = page.table_with("text", "calibrated").rows[1:]
    assert [row[4] == "-" for row in rows] == [True, False, True, True, False, False]
    assert "was not measured on the same blocks" in page.text


def test_of_many_compressions_the_last_is_shown_first(tmp_path: Path, undrawn: None) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / "results" / "quality.json"
    values: dict[str, Any] = json.loads(path.read_text())
    before, compressed, end = values["moments"]
    again = [{**compressed, "name": f"compressed-{place}", "step": 600 + place} for place in (2, 3)]
    path.write_text(json.dumps({**values, "moments": [before, compressed, *again, end]}))
    page = Page(write_report(read_run(folder)).read_text())
    assert page.table_with("", "before").rows[0] == ["", "beforestep 600", "compressed, 3 of 3step 603", "endstep 700"]
    assert len(page.table_with("text", "calibrated").rows) == 1 + 2 * 5


def test_names_are_as_short_as_they_can_be() -> None:
    assert distinct_names(["/a/x", "/a/y"]) == ["x", "y"]
    assert distinct_names(["/a/one/run", "/a/two/run", "/b/other"]) == ["one/run", "two/run", "b/other"]
    assert distinct_names(["/a/run"]) == ["run"]


def test_numbers_are_written_for_people() -> None:
    assert [number(value, 3) for value in (0.01234, 1.5, 123.4, 12345.6, 0, None, float("nan"), 1e-7)] == [
        "0.0123", "1.50", "123", "12,346", "0", "-", "not finite", "1.00e-07",
    ]  # fmt: skip
    assert [data_size(value) for value in (12, 15_502_536, 3 * 2**30, None)] == ["12 B", "14.8 MiB", "3.0 GiB", "-"]
    assert [duration(value) for value in (0.0123, 12.34, 75, 7320, None)] == [
        "12.3 ms",
        "12.3 s",
        "1 min 15 s",
        "2 h 2 min",
        "-",
    ]


def test_intervals_of_small_numbers_keep_their_digits() -> None:
    assert with_interval(Interval(0.0638, 0.0536, 0.0783), 4) == Cell("0.0638", "[0.0536, 0.0783]")
    assert with_interval(Interval(3.27e-6, -1.2e-6, 4e-6), 4) == Cell("3.3e-06", "[-1.2e-06, 4.0e-06]")
    assert with_interval(Interval(0.0, 0.0, 0.0), 4) == Cell("0.0000", "[0.0000, 0.0000]")
    assert with_interval(Interval(30.1, float("nan"), float("nan")), 2) == Cell("30.10")


def test_a_table_with_holes_is_refused() -> None:
    with pytest.raises(ValueError, match="1 cells in a row of a table with the columns a, b"):
        Table([Cell("a"), Cell("b")], [[Cell("1")]], "ll")
