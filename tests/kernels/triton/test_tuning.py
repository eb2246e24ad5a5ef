"""The tuner: what it tries, what it leaves out before anything runs, and the table that comes of it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="these are tests of Triton kernels, and triton is not installed")

from moe_kernels.triton_kernels import dispatch, trials, tuning
from moe_kernels.triton_kernels.compile_only import Request, Resources, can_compile
from moe_kernels.triton_kernels.dispatch import Choice, Device, Tiles, check_rows, choose, limits, table_name
from moe_kernels.triton_kernels.trials import Trials, WrongOutput
from moe_kernels.triton_kernels.tuning import (
    Timed,
    block_tokens_for,
    by_figures,
    kept_of,
    main,
    measurements,
    rows_of,
    tune,
    write_table,
)
from moe_kernels.triton_kernels.tuning_candidates import Figures, Problem, as_lines, best, candidates, figures

from tests.kernels.triton.compiled_kernels import Sizes, grouped, int4_gate_up

MIXTRAL = Problem("int4", 4096, 14336, 8, 2)
TINY = Problem("dense", 64, 64, 4, 2, torch.float32)
H200 = Device(90, "NVIDIA H200", "3.6")
GOOD = Resources(50_000, 128, 0, 900, 400, 32, {"HMMA": 32}, True, True)


def made_up(problem: Problem, tokens: tuple[int, ...]) -> dict[tuple, list[Figures]]:
    """Return figures of all candidates: the larger the tile, the fewer the instructions."""
    found: dict[tuple, list[Figures]] = {}
    for path, block in {block for number in tokens for block in block_tokens_for(problem, number)}:
        for projection in ("gate_up", "down"):
            tiles = candidates(problem, path, projection)
            several = [Figures(path, block, projection, one, 100 / one.block_out + one.num_warps / 10) for one in tiles]
            found[path, block, projection] = several
    return found


def seconds(choice: Choice, tokens: int) -> float:
    """Sorting costs 50 and then little; without it every token costs 1; four warps and six splits would be best."""
    own = abs(choice.gate_up.num_warps - 4) + abs(choice.down.num_warps - 4) + abs(choice.gate_up.block_out - 64) / 100
    if choice.path == "decode":
        return tokens + own + choice.block_tokens / 100 + abs(choice.down.splits - 6) / 100
    return 50 + tokens / 100 + own + choice.block_tokens / 1000


@pytest.mark.parametrize("form", ["dense", "int4", "sparse24"])
@pytest.mark.parametrize("path", ["decode", "grouped"])
def test_candidates_fit_the_sizes(form, path) -> None:
    problem = Problem(form, 96, 4096, 8, 2)
    for projection in ("gate_up", "down"):
        found = candidates(problem, path, projection)
        assert len(set(found)) == len(found) >= 6
    downs = candidates(problem, path, "down")
    assert all(tiles.block_out <= 96 for tiles in downs)
    assert form != "int4" or path != "decode" or all(96 % tiles.block_out == 0 for tiles in downs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"shared_bytes": 232_449}, "232449 bytes of shared memory"),
        ({"spills": 1}, "1 spills"),
        ({"has_mma": False}, "no tensor cores"),
    ],
)
def test_what_compiling_says_leaves_candidates_out(monkeypatch: pytest.MonkeyPatch, change: dict, reason) -> None:
    from moe_kernels.triton_kernels import tuning_candidates

    found = Resources(**{**GOOD.__dict__, **change})
    monkeypatch.setattr(tuning_candidates, "product_request", lambda *_: None)
    monkeypatch.setattr(tuning_candidates, "resources", lambda _: found)
    got = figures(MIXTRAL, "decode", 16, "gate_up", Tiles(64, 2, 4), 90)
    assert got.refused == reason and got.per_weight == pytest.approx(400 * 64 / (2 * 64 * 128))
    down = figures(MIXTRAL, "decode", 16, "down", Tiles(64, 2, 4), 90)
    assert down.per_weight == pytest.approx(2 * got.per_weight)
    grouped = figures(MIXTRAL, "grouped", 128, "down", Tiles(128, 8, 4), 90)
    assert grouped.per_weight == pytest.approx(400 * 256 / (128 * 64 * 128))
    assert (best([got], 1) == [got]) == (reason is None)
    assert (reason or "64") in as_lines([got])[1]


def test_a_compiler_that_fails_leaves_a_candidate_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_kernels.triton_kernels import tuning_candidates

    def fail(_: object) -> None:
        raise RuntimeError("out of registers\nand more")

    monkeypatch.setattr(tuning_candidates, "product_request", lambda *_: None)
    monkeypatch.setattr(tuning_candidates, "resources", fail)
    got = figures(MIXTRAL, "decode", 16, "gate_up", Tiles(64, 2, 4), 90)
    assert got.refused == "RuntimeError: out of registers"


def test_the_fewest_instructions_go_on() -> None:
    several = [Figures("decode", 8, "down", Tiles(size, 4, 3), 100 / size, 9, size) for size in (32, 128, 64)]
    several.append(Figures("decode", 8, "down", Tiles(256, 4, 3), 0.1, 9, 9, "spills"))
    assert [figure.tiles.block_out for figure in best(several, 2)] == [128, 64]


def test_the_best_tiles_and_the_end_of_the_row_are_found() -> None:
    tokens = (1, 8, 16, 40, 128, 2048)
    kept = kept_of(made_up(MIXTRAL, tokens), 100)
    count = 0

    def counted(choice: Choice, number: int) -> float:
        nonlocal count
        count += 1
        return seconds(choice, number)

    def tick() -> None:
        nonlocal ticks
        ticks += 1

    ticks = 0
    timed = tune(MIXTRAL, tokens, kept, counted, tick)
    assert ticks == count == measurements(MIXTRAL, tokens, kept)
    assert [one.choice.path for one in timed] == ["decode"] * 4 + ["grouped"] * 2
    assert all(one.choice.gate_up == resized(one, 64, 4) and one.choice.down.num_warps == 4 for one in timed)
    rows = rows_of(timed, seconds)
    # A tile of 64 tokens costs 0.64 more; the kernels for many cost 50.064 and a hundredth for each token.
    assert [row["up_to_tokens"] for row in rows] == [8, 16, pytest.approx(50, abs=3), None]
    assert [row["block_tokens"] for row in rows] == [8, 16, 64, 64]
    assert "splits" not in rows[-1]["down"] and rows[0]["down"]["splits"] in (4, 8)


def resized(timed: Timed, block_out: int, num_warps: int) -> Tiles:
    return replace(timed.choice.gate_up, block_out=block_out, num_warps=num_warps)


def test_rows_need_a_last_one_for_any_number() -> None:
    few = Timed(8, Choice("decode", 8, Tiles(64, 4, 3), Tiles(64, 4, 3, splits=4)), 1.0)
    with pytest.raises(ValueError, match="8 tokens still want the kernels for few: tune for more"):
        rows_of([few], seconds)


def test_nothing_that_ran() -> None:
    kept = kept_of(made_up(MIXTRAL, (8,)), 1)
    with pytest.raises(RuntimeError, match="no tiles ran for 8 tokens"):
        tune(MIXTRAL, (8,), kept, lambda *_: float("inf"), lambda: None)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder of tables with that of sm_90."""
    (tmp_path / "sm_90.json").write_text((dispatch.FOLDER / "sm_90.json").read_text())
    monkeypatch.setattr(dispatch, "FOLDER", tmp_path)
    dispatch._table.cache_clear()
    yield tmp_path
    dispatch._table.cache_clear()


def test_dispatch_reads_what_was_written(tables: Path) -> None:
    tokens = (16, 2048)
    timed = tune(MIXTRAL, tokens, kept_of(made_up(MIXTRAL, tokens), 8), seconds, lambda: None)
    rows = rows_of(timed, seconds)
    path = tables / table_name(H200)
    assert path.name == "nvidia-h200-triton-3.6.json"
    before = choose(1, "int4", 4096, 14336, H200)
    write_table(path, "int4", rows, {"device": H200.name})
    assert choose(1, "int4", 4096, 14336, H200) == timed[0].choice != before
    assert choose(99, "int4", 4096, 14336, H200).path == "grouped"
    other = Device(90, "NVIDIA H200", "3.7")
    assert choose(1, "int4", 4096, 14336, other) == before
    assert choose(1, "dense", 64, 64, H200) == choose(1, "dense", 64, 64, Device(90))
    assert limits("int4", H200)[-1] is None
    # Another form joins; the same one is replaced; a broken file too. Nothing else is left in the folder.
    write_table(path, "dense", rows, {"device": H200.name, "date": "today"})
    held = json.loads(path.read_text())
    assert set(held) == {"made", "int4", "dense"} and held["made"]["dense"]["date"] == "today"
    assert set(held["made"]) == {"int4", "dense"}
    path.write_text("{")
    write_table(path, "dense", rows, {})
    assert set(json.loads(path.read_text())) == {"made", "dense"}
    assert {file.name for file in tables.iterdir()} == {"sm_90.json", path.name}


def test_rows_that_are_not_whole_are_not_written(tables: Path) -> None:
    with pytest.raises(ValueError, match="there are no rows"):
        write_table(tables / "some.json", "int4", [], {})
    assert [file.name for file in tables.iterdir()] == ["sm_90.json"]


@pytest.mark.parametrize("form", ["dense", "int4", "sparse24"])
def test_outputs_are_checked_before_they_are_timed(form, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = Trials(Problem(form, 64, 64, 3, 1, torch.float32, 64), torch.device(device), seconds=0.01)
    choice = choose(1, tried.problem.format, 64, 64, Device(90))
    assert tried.seconds(choice, 1) > 0
    calls = 0

    def wrong_for_one_set(_: Choice, *arguments) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return trials.mix_experts_twin(*arguments) * (1.01 if calls % 4 == 3 else 1)

    monkeypatch.setattr(trials, "mix_as_chosen", wrong_for_one_set)
    with pytest.raises(WrongOutput, match=r"at 1 tokens: relative error 1\.0.e-02"):
        tried.seconds(choice, 1)
    monkeypatch.setattr(trials, "mix_as_chosen", lambda _, *given: trials.mix_experts_twin(*given) * torch.nan)
    with pytest.raises(WrongOutput, match="relative error nan"):
        tried.seconds(choice, 1)


def test_too_few_sets_would_stay_in_the_cache() -> None:
    with pytest.raises(ValueError, match="3 sets of weights"):
        Trials(TINY, torch.device("cpu"), sets=3)


def test_by_figures_few_tokens_take_the_kernels_for_few() -> None:
    found = made_up(MIXTRAL, (16, 64, 512))
    measure = by_figures(found)
    rows = rows_of(tune(MIXTRAL, (16, 64, 512), kept_of(found, 4), measure, lambda: None), measure)
    assert [row["up_to_tokens"] for row in rows] == [16, 64, None]
    assert rows[0]["gate_up"]["block_out"] == 128 and rows[0]["down"]["splits"] == 4


COMMAND = "--form int4 --hidden 256 --intermediate 256 --experts 4 --top-k 2 --group 128"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", "there is no GPU: give --compile-only"),
        ("--compile-only", "--compile-only wants an --arch"),
        ("--tokens 0", "at least 1"),
        ("--top-k 5", "no token chooses more experts than there are"),
    ],
)
def test_errors_say_what_to_do(
    more: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main([*COMMAND.split(), *more.split()])
    assert message in capsys.readouterr().err


def test_the_interpreter_cannot_tune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(tuning, "INTERPRETED", True)
    with pytest.raises(SystemExit):
        main(COMMAND.split())
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.mark.parametrize("written", [False, True])
def test_compile_only_prints_and_writes_only_when_asked(
    written: bool, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "compiled", lambda problem, tokens, arch: made_up(problem, tokens))
    target = tmp_path / "found.json"
    output = ["--output", str(target)] if written else []
    assert main([*COMMAND.split(), "--compile-only", "--arch", "90", "--tokens", "16", "512", *output]) == 0
    printed = capsys.readouterr().out
    assert "int4, decode, 16 tokens a tile, gate_up, sm_90" in printed and "per weight" in printed
    assert target.exists() == written and len(list(tables.iterdir())) == 1 + written
    if written:
        held = json.loads(target.read_text())
        check_rows(held["int4"])
        assert held["made"]["int4"]["device"] == "sm_90, compiled only: nothing was timed"


REQUESTS = """
import dataclasses, json, sys, torch
from moe_kernels.triton_kernels.dispatch import Choice, Tiles
from moe_kernels.triton_kernels.tuning_candidates import Problem, product_request
found = []
for form in ("dense", "int4", "sparse24"):
    problem = Problem(form, 512, 512, 8, 2)
    decode = Choice("decode", 16, Tiles(64, 4, 3), Tiles(64, 4, 3, splits=4))
    found += [product_request(problem, decode, name, 90) for name in ("gate_up", "down")]
grouped = Choice("grouped", 128, Tiles(128, 8, 3), Tiles(128, 8, 3))
found += [product_request(Problem("dense", 512, 512, 8, 2), grouped, name, 90) for name in ("gate_up", "down")]
json.dump([dataclasses.asdict(one) for one in found], sys.stdout)
"""


@pytest.mark.skipif(can_compile() is not None, reason=f"kernels cannot be compiled: {can_compile()}")
def test_what_is_compiled_is_what_is_launched() -> None:
    """The same requests as those written by hand for the bounds, from a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    program = [sys.executable, "-W", "ignore", "-c", REQUESTS]
    ran = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    assert not ran.returncode, ran.stderr
    requests = [Request(**request) for request in json.loads(ran.stdout)]
    assert len(requests) == 8 and len({request.kernel for request in requests}) == 8
    sizes, tiles = Sizes(512, 512, 2, 8), Tiles(64, 4, 3)
    wide = Choice("grouped", 128, Tiles(128, 8, 3), Tiles(128, 8, 3))
    by_hand = int4_gate_up(sizes, 90, Choice("decode", 16, tiles, replace(tiles, splits=4))).request
    for request, hand in ((requests[2], by_hand), (requests[-2], next(grouped(sizes, 90, wide)).request)):
        signature = {name: kind.replace(" ", "") for name, kind in request.signature.items()}
        assert signature == hand.signature and request.constants == hand.constants
        assert (request.kernel, request.num_warps, request.num_stages) == (hand.kernel, hand.num_warps, hand.num_stages)
