"""Rows, floors and what is refused of benchmarks of tiny models. No time is asserted."""

import json
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_lightning as ml
from moe_lightning.evaluation import benchmark, benchmark_floors
from moe_lightning.evaluation.benchmark import (
    IMPLEMENTATIONS,
    Entrant,
    ceilings_of,
    described_model,
    described_run,
    entrants_of,
    num_steps,
    run_benchmark,
)
from moe_lightning.evaluation.benchmark_floors import (
    Ceilings,
    RoutedShares,
    floor_seconds,
    pass_bytes,
    pass_flops,
    routed_shares,
    tensor_bytes,
)
from moe_lightning.evaluation.benchmark_rows import BenchmarkRecord, Settings, TimedRow
from moe_lightning.evaluation.speed import Decoding, Prefill
from moe_lightning.plan import DropBlock, NoviceExperts, Quantize
from tests.models import tiny_mixtral
from tests.packed import apply_filled, everywhere

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, WIDTH, EXPERTS, TOP_K, VOCABULARY = 32, 48, 3, 4, 2, 8, 6, 2, 64
EXPERT = 3 * HIDDEN * INTERMEDIATE
ATTENTION = HIDDEN * WIDTH * (2 * HEADS + 2 * KV_HEADS)
COUNTS = (pass_bytes, pass_flops)
CEILINGS = Ceilings(flops_per_second=1e9, bytes_per_second=1e9)


def tokens(batch: int = 4, length: int = 24) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def compressed() -> Any:
    model = tiny_mixtral()
    for edit in (*everywhere(NoviceExperts(0, (1, 4))), *everywhere(Quantize(0, group_size=16)), DropBlock(1)):
        apply_filled(model, [edit])
    return model


NO_NOVICES = {"novices_reached": [0.0] * LAYERS, "novices_picked": [0.0] * LAYERS}
SHARES = RoutedShares([1.0] * LAYERS, [2.0, 4.0, 6.0], **NO_NOVICES, words=3.0)


def test_operations_of_a_prefill_by_hand() -> None:
    model = tiny_mixtral()
    work = Prefill(model, tokens(2, 10))
    products = LAYERS * (ATTENTION + EXPERTS * HIDDEN + TOP_K * EXPERT) + VOCABULARY * HIDDEN
    keys = sum(range(1, 11))  # the first token looks at itself, the tenth at ten
    by_hand = 2 * (10 * 2 * products + keys * 4 * HEADS * WIDTH * LAYERS)
    assert pass_flops(model, "prefill", work, SHARES) == by_hand
    # measure counts every key for every token.
    assert by_hand == 2 * (ml.measure(model, 10).flops - (100 - keys) * 4 * HEADS * WIDTH * LAYERS)
    half = RoutedShares([0.5] * LAYERS, [1.0] * LAYERS, **NO_NOVICES, words=3.0)
    assert pass_flops(model, "prefill", work, half) == by_hand - 2 * 10 * 2 * LAYERS * EXPERT
    model.config.sliding_window = 4
    seen = 1 + 2 + 3 + 7 * 4
    assert pass_flops(model, "prefill", work, SHARES) == by_hand - 2 * (keys - seen) * 4 * HEADS * WIDTH * LAYERS


def test_operations_and_bytes_of_a_step_of_decoding_by_hand() -> None:
    model = tiny_mixtral()
    work = Decoding(model, tokens(3, 10), 4)
    products = LAYERS * (ATTENTION + EXPERTS * HIDDEN + TOP_K * EXPERT) + VOCABULARY * HIDDEN
    keys = (11 + 12 + 13 + 14) / 4
    assert pass_flops(model, "decode", work, SHARES) == 3 * (2 * products + keys * 4 * HEADS * WIDTH * LAYERS)
    numbers: float = LAYERS * (ATTENTION + EXPERTS * HIDDEN + 2 * HIDDEN) + HIDDEN + VOCABULARY * HIDDEN  # norms, head
    numbers += (2 + 4 + 6) * EXPERT  # those that were reached
    numbers += 3 * (HIDDEN + VOCABULARY)  # rows of the embedding, logits
    numbers += 3 * keys * 2 * KV_HEADS * WIDTH * LAYERS
    rotary = WIDTH // 2 * 2  # frequencies, twice
    assert pass_bytes(model, "decode", work, SHARES) == 4 * (numbers + rotary)
    by_bytes = floor_seconds(model, "decode", work, SHARES, Ceilings(1e30, 1e9))
    assert by_bytes == pytest.approx(4 * (numbers + rotary) / 1e9)
    by_operations = floor_seconds(model, "decode", work, SHARES, Ceilings(1e6, 1e30))
    assert by_operations == pytest.approx(3 * (2 * products + keys * 4 * HEADS * WIDTH * LAYERS) / 1e6)


def test_bytes_of_packed_experts() -> None:
    """Of int4 in groups of 16 a weight takes half a byte, and a group a scale of two bytes and half of a zero."""
    model = compressed()
    dense = tiny_mixtral(num_hidden_layers=2, num_local_experts=4)
    work = Decoding(model, tokens(1, 10), 1)
    reached = RoutedShares([0.5, 0.5], [1.0, 2.0], [32.0, 0.0], [8.0, 0.0], 1.0)
    rows = 2 * (2 * INTERMEDIATE * HIDDEN + HIDDEN * INTERMEDIATE)
    assert rows == 2 * EXPERT
    groups = 2 * INTERMEDIATE * HIDDEN // 16 + HIDDEN * INTERMEDIATE // 16
    # Two zeros a byte: rows of 2 and of 3 groups take 1 and 2 bytes.
    one = EXPERT / 2 + 2 * groups + 2 * INTERMEDIATE * 1 + HIDDEN * 2
    nobody = RoutedShares([0.0] * 2, [0.0] * 2, [0.0] * 2, [0.0] * 2, 1.0)
    same = pass_bytes(dense, "decode", Decoding(dense, tokens(1, 10), 1), nobody)
    more = (2 * 2 * HIDDEN + HIDDEN) * 4  # two rows more in each router, and the one novice that was reached
    assert pass_bytes(model, "decode", work, reached) == same + more + 3 * one


def test_novices_that_nobody_reached_are_not_counted() -> None:
    """By the weights themselves: a floor above the time of a program that skips them would be none."""
    ranks = {0: (0, 2), 1: (3, 1), 2: (0, 0)}
    model = tiny_mixtral()
    for layer, each in ranks.items():
        apply_filled(model, [NoviceExperts(layer, (1, 4), "low_rank" if any(each) else "mean", each)])
    work = Decoding(model, tokens(1, 10), 2, tokens(1, 12)[:, 10:])
    found = routed_shares(model, work)
    chosen: list[list[Tensor]] = [[] for _ in ranks]
    handles = [
        layer.mlp.gate.register_forward_hook(lambda _m, _a, output, calls=calls: calls.append(output[2]))
        for calls, layer in zip(chosen, model.model.layers, strict=True)
    ]
    work.prepare()
    work.run()
    for handle in handles:
        handle.remove()
    for layer, calls in enumerate(chosen):
        held = dict(zip((1, 4), (HIDDEN * (1 + 2 * rank) for rank in ranks[layer]), strict=True))
        picked = [sum(held.get(expert, 0) for expert in index.flatten().tolist()) for index in calls[-2:]]
        assert found.novices_picked[layer] == found.novices_reached[layer] == sum(picked) / 2
    assert 0 < sum(found.novices_reached) < sum(HIDDEN * (2 + 2 * sum(each)) for each in ranks.values())
    assert found.words == 1.0
    nobody = replace(found, novices_reached=[0.0] * 3, novices_picked=[0.0] * 3)
    reached = sum(found.novices_reached)
    more = [count(model, "decode", work, found) - count(model, "decode", work, nobody) for count in COUNTS]
    assert more == [4 * reached, 2 * reached]
    # Where everybody is reached: all that the model holds, but for the embedding.
    everything = RoutedShares(
        [1.0] * 3, [4.0] * 3, [HIDDEN * (2 + 2 * sum(each)) for each in ranks.values()], [0.0] * 3, 0
    )
    keys = 2 * KV_HEADS * WIDTH * LAYERS * (11 + 12) / 2
    rest = 4 * (VOCABULARY + keys - VOCABULARY * HIDDEN)
    assert pass_bytes(model, "decode", work, everything) == pytest.approx(tensor_bytes(model) + rest)


def test_words_that_come_twice_are_read_once() -> None:
    model = tiny_mixtral()
    ids = tokens(2, 12)
    ids[1] = ids[0]
    shares = routed_shares(model, Prefill(model, ids))
    assert shares.words == len(set(ids[0].tolist()))
    tied = tiny_mixtral(tie_word_embeddings=True)
    work = Prefill(tied, ids)
    assert pass_bytes(tied, "prefill", work, shares) == pass_bytes(tied, "prefill", work, replace(shares, words=0))


def test_where_tokens_go_is_counted() -> None:
    """Against the routers' own choices."""
    model = compressed()
    for phase, work in (("prefill", Prefill(model, tokens(2, 12))), ("decode", Decoding(model, tokens(2, 12), 3))):
        chosen: list[list[Tensor]] = [[], []]
        handles = [
            layer.mlp.gate.register_forward_hook(lambda _m, _a, output, calls=calls: calls.append(output[2]))
            for calls, layer in zip(chosen, model.model.layers, strict=True)
        ]
        found = routed_shares(model, work)
        for handle in handles:
            handle.remove()
        calls = 1 if phase == "prefill" else 3
        for number, indices in enumerate(chosen):
            picks = [index[:] for index in indices[-calls:]]
            real = [[expert for expert in index.flatten().tolist() if expert not in (1, 4)] for index in picks]
            assert found.real[number] == pytest.approx(sum(map(len, real)) / sum(index.numel() for index in picks))
            assert found.reached[number] == pytest.approx(sum(len(set(each)) for each in real) / calls)


def test_tensor_bytes_agree_with_measure() -> None:
    for model in (tiny_mixtral(), tiny_mixtral(tie_word_embeddings=True), compressed()):
        frequencies = 2 * WIDTH // 2 * 4
        assert tensor_bytes(model) == ml.measure(model).bytes + frequencies


def test_speeds_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_floors, "_SECONDS", 0.0)
    monkeypatch.setattr(benchmark_floors, "_PRODUCT", {"cpu": 32})
    models = [tiny_mixtral(), tiny_mixtral(dtype=torch.bfloat16)]
    monkeypatch.setattr(benchmark_floors, "_least_seconds", lambda run, device: (run(), 0.5)[1])
    found = ceilings_of([Entrant(str(number), model, "eager") for number, model in enumerate(models)])
    assert found["0"] == Ceilings(2 * 32**3 / 0.5, 2 * 2**20 / 0.5)  # a copy is no smaller than a MiB
    assert found["1"].flops_per_second == 2 * 32**3 / 0.5


@pytest.fixture(scope="module")
def record() -> BenchmarkRecord:
    small, large = compressed(), tiny_mixtral()
    entrants = [*entrants_of("small", small), *entrants_of("large", large)]
    settings = Settings((1, 3), (4, 9), new_tokens=3, repeats=2, warmup=1)
    ceilings = {"small": CEILINGS, "large": CEILINGS}
    steps: list[str] = []
    rows = run_benchmark(entrants, tokens(), settings, ceilings, steps.append)
    assert len(steps) == num_steps(entrants, settings) == 2 * 2 * (5 + 2)
    models = {
        name: described_model(model, "", settings, CEILINGS) for name, model in (("small", small), ("large", large))
    }
    return BenchmarkRecord(described_run(torch.device("cpu"), ["float32"], "random", settings), models, rows)


def test_every_row_is_there_and_complete(record: BenchmarkRecord, tmp_path: Path) -> None:
    cells = [(row.model, row.implementation, row.phase, row.batch, row.context) for row in record.rows]
    names = [("small", "moe_lightning"), *(("large", name) for name in IMPLEMENTATIONS)]
    assert sorted(cells) == sorted(
        (*name, phase, batch, context)
        for name in names
        for phase in ("prefill", "decode")
        for batch in (1, 3)
        for context in (4, 9)
    )
    assert not record.failures
    record.save(tmp_path / "results" / "benchmark.json")
    written = json.loads((tmp_path / "results" / "benchmark.json").read_text())
    assert written["version"] == 1
    assert written["context"].keys() >= {
        *("device", "threads", "dtype", "versions", "machine", "repeats", "warmup", "new_tokens", "tokens"),
    }
    assert written["context"]["machine"].keys() >= {"cpu", "cores", "load"}
    assert written["context"]["threads"] == 1
    for described in written["models"].values():
        assert described.keys() >= {"folder", "parameters", "bytes", "bytes_on_disk", "flops", "sequence_length"}
    assert written["models"]["large"]["flops"] == ml.measure(tiny_mixtral(), 9).flops
    assert written["models"]["small"]["bytes"] < written["models"]["large"]["bytes"]
    for row in written["rows"]:
        assert row.keys() == {
            *("model", "implementation", "phase", "batch", "context", "tokens_per_second", "milliseconds"),
            *("flops", "floor_milliseconds", "peak_bytes", "weight_bytes", "relative_error", "agreement", "refused"),
        }
        assert row["peak_bytes"] is None  # there is no such number on a CPU
        assert row["weight_bytes"] == written["models"][row["model"]]["bytes"]
        if row["refused"]:
            assert row["tokens_per_second"] is row["milliseconds"] is row["floor_milliseconds"] is None
            continue
        rate, took = row["tokens_per_second"], row["milliseconds"]
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
        assert 0 < took["low"] <= took["median"] <= took["high"]
        passed = row["batch"] * (row["context"] if row["phase"] == "prefill" else 1)
        assert rate["median"] * took["median"] == pytest.approx(1e3 * passed)
        assert rate["low"] * took["high"] == pytest.approx(1e3 * passed)
        assert row["floor_milliseconds"] > 0 and 0 < row["relative_error"] < 1e-5 and row["agreement"] > 0.9


def test_batched_mm_is_left_out_where_it_would_copy_too_much(record: BenchmarkRecord) -> None:
    refused = {(row.implementation, row.phase, row.batch, row.context) for row in record.rows if row.refused}
    # Up to four tokens a pass: decoding with three sequences, and the prefill of one with four.
    assert refused == {("batched_mm", "prefill", batch, context) for batch, context in ((1, 9), (3, 4), (3, 9))}
    assert all("copies the weights" in (row.refused or "") for row in record.rows if row.refused)
    assert not record.failures


def test_the_table(record: BenchmarkRecord) -> None:
    lines = record.table()
    assert {len(line) for line in lines} == {14}
    assert "peak" not in lines[0]  # nothing is measured on a CPU
    shares = [line[lines[0].index("of floor")] for line in lines[1:] if "refused" not in line]
    assert all(share.endswith("%") and share[-3] == "." for share in shares)
    eager = [line for line in lines if line[1] == "eager"]
    assert len(eager) == 8 and {line[7] for line in eager} == {"1.00"}  # what the others are compared with
    text = record.text().splitlines()
    assert len(text) == 1 + len(record.rows) + 1
    assert text[-1].startswith("refused: large, batched_mm: batched_mm copies")
    assert text[-1].endswith("(prefill 1 x 9, prefill 3 x 4, prefill 3 x 9)") or "prefill 3 x 4" in text[-1]
    starts = [[at for at, (left, right) in enumerate(pairwise(line)) if (left, right) == (" ", " ")] for line in text]
    assert all(len(found) > 10 for found in starts[:-1])
    markdown = record.markdown().splitlines()
    assert "1 CPU thread of" in markdown[0] and "load" in markdown[0]
    table = [line for line in markdown if line.startswith("|")]
    assert len(table) == 2 + len(record.rows) and {line.count("|") for line in table} == {15}
    assert markdown[-1].startswith("* refused:")


def test_columns_that_say_nothing_are_left_out(record: BenchmarkRecord) -> None:
    once = BenchmarkRecord({**record.context, "repeats": 1}, record.models, record.rows)
    assert "slowest-fastest" not in once.table()[0] and {len(line) for line in once.table()} == {13}
    assert "1 repeat after" in once.markdown() and "2 repeats in turn after" in record.markdown()
    first, *rest = record.rows
    on_gpu = BenchmarkRecord(record.context, record.models, [replace(first, peak_bytes=3 << 20), *rest])
    place = on_gpu.table()[0].index("peak")
    assert [line[place] for line in on_gpu.table()[1:3]] == ["3.0 MiB", "-"]


def test_operations_by_the_routing_that_was_counted() -> None:
    """The picks that novices got cost no expert; the upper bound stays beside it."""
    model, ids = tiny_mixtral(), tokens(1, 9)
    for edit in everywhere(NoviceExperts(0, (1, 4))):
        apply_filled(model, [edit])
    settings = small_settings(contexts=(9,))
    real = routed_shares(model, Prefill(model, ids)).real
    described = described_model(model, "", settings, CEILINGS, ids)
    none = described_model(model, "", settings, CEILINGS)
    assert none["routed_flops"] is None and none["flops"] == described["flops"]
    lost = 2 * 9 * TOP_K * EXPERT * sum(1 - share for share in real)
    assert sum(real) < LAYERS and described["routed_flops"] == pytest.approx(described["flops"] - lost, abs=1)
    (row,) = rows_of([Entrant("a", model, "moe_lightning")], small_settings(phases=("prefill",)))
    work = Prefill(model, tokens()[:2, :6])
    assert row.flops == pass_flops(model, "prefill", work, routed_shares(model, work))


def test_weights_are_told_in_one_form() -> None:
    """Packed weights that have worked on a CPU are held in another one."""
    model = tiny_mixtral(hidden_size=64, intermediate_size=64, head_dim=16)
    for edit in everywhere(Quantize(0, group_size=32)):
        apply_filled(model, [edit])
    model.bfloat16()
    before = described_model(model, "", small_settings(), CEILINGS)["bytes"]
    rows = rows_of(entrants_of("small", model), small_settings(batch_sizes=(1, 2)))
    assert not any(row.refused for row in rows)
    assert {row.weight_bytes for row in rows} == {before}
    assert before == described_model(model, "", small_settings(), CEILINGS, tokens())["bytes"]


def test_rows_that_were_done_stay_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds_of, rows = benchmark.seconds_of, list[TimedRow]()

    def stop(work: Any) -> float:
        if isinstance(work, Decoding):
            raise KeyboardInterrupt
        return seconds_of(work)

    monkeypatch.setattr(benchmark, "seconds_of", stop)
    entrants = entrants_of("a", tiny_mixtral(), ["eager"])
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(entrants, tokens(), small_settings(), {"a": CEILINGS}, rows=rows)
    assert [row.phase for row in rows] == ["prefill"] and small_settings().num_rows(1) == 2


def small_settings(**changes: Any) -> Settings:
    return Settings(**{"batch_sizes": (2,), "contexts": (6,), "new_tokens": 2, "repeats": 1, "warmup": 0, **changes})


def rows_of(entrants: list[Entrant], settings: Settings | None = None) -> list[TimedRow]:
    ceilings = dict.fromkeys([entrant.label for entrant in entrants], CEILINGS)
    return run_benchmark(entrants, tokens(), settings or small_settings(), ceilings)


def test_a_wrong_model_is_not_timed_and_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, right = tiny_mixtral(), tiny_mixtral()
    experts = wrong.model.layers[1].mlp.experts
    forward = experts.forward
    experts.forward = lambda *arguments: 1.1 * forward(*arguments)
    timed: list[Any] = []
    seconds_of = benchmark.seconds_of

    def note(work: Any) -> float:
        timed.append(work.model)
        return seconds_of(work)

    monkeypatch.setattr(benchmark, "seconds_of", note)
    rows = rows_of([Entrant("wrong", wrong, "eager"), Entrant("right", right, "eager")])
    by_model = {(row.model, row.phase): row for row in rows}
    for phase in ("prefill", "decode"):
        row = by_model["wrong", phase]
        assert row.failed and "prefill is wrong: layer 1: off by" in (row.refused or "")
        assert row.tokens_per_second is row.milliseconds is row.relative_error is None
        assert by_model["right", phase].tokens_per_second is not None
    assert timed and all(model is right for model in timed)


def test_wrong_decoding_alone_is_not_timed_at_all() -> None:
    model = compressed()
    model.model.layers[1].self_attn.layer_idx = 0
    rows = rows_of(entrants_of("wrong", model))
    assert len(rows) == 2 and all("decode is wrong: layer 0" in (row.refused or "") and row.failed for row in rows)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        MemoryError(),
        RuntimeError("can't allocate memory"),
    ],
)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_what_does_not_fit_is_a_row_and_the_rest_goes_on(
    error: Exception, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tiny_mixtral(), tiny_mixtral()
    seconds_of = benchmark.seconds_of
    runs: list[Any] = []

    def full(work: Any) -> float:
        runs.append(work)
        kind = Prefill if phase == "prefill" else Decoding
        if work.model is first and isinstance(work, kind) and sum(other is work for other in runs) == 2:
            raise error
        return seconds_of(work)

    monkeypatch.setattr(benchmark, "seconds_of", full)
    settings = small_settings(repeats=3)
    rows = rows_of([Entrant("first", first, "eager"), Entrant("second", second, "eager")], settings)
    refused = [(row.model, row.phase, row.refused, row.failed) for row in rows if row.refused]
    assert refused == [("first", phase, "out of memory", True)]
    assert sum(row.tokens_per_second is not None for row in rows) == 3
    assert sum(work.model is second for work in runs) == 6


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, str]] = []
    models = {"a": tiny_mixtral(), "b": tiny_mixtral()}
    names = {id(model): name for name, model in models.items()}
    times = iter(range(1, 1000))

    def seconds_of(work: Any) -> float:
        order.append((type(work).__name__, names[id(work.model)]))
        return float(next(times))

    monkeypatch.setattr(benchmark, "seconds_of", seconds_of)
    entrants = [Entrant(name, model, "eager") for name, model in models.items()]
    rows = rows_of(entrants, small_settings(repeats=3, warmup=1))
    assert order == [("Prefill", "a"), ("Prefill", "b")] * 4 + [("Decoding", "a"), ("Decoding", "b")] * 4
    # Of the times 1 to 8 the first of each is a warm-up.
    assert rows[0].milliseconds == {"median": 5000.0, "low": 3000.0, "high": 7000.0}
    assert rows[1].tokens_per_second == {"median": 12 / 6, "low": 12 / 8, "high": 12 / 4}
    assert rows[2].milliseconds == {"median": 13e3 / 2, "low": 11e3 / 2, "high": 15e3 / 2}  # of a step


def test_implementations_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mixtral()
    seen: list[str] = []
    seconds_of = benchmark.seconds_of

    def note(work: Any) -> float:
        seen.append(work.model.config._experts_implementation)
        return seconds_of(work)

    monkeypatch.setattr(benchmark, "seconds_of", note)
    rows_of(entrants_of("model", model, ["grouped_mm", "moe_lightning", "eager"]))
    assert seen == ["grouped_mm", "moe_kernels", "eager"] * 2
    assert [entrant.implementation for entrant in entrants_of("small", compressed())] == ["moe_lightning"]


def test_peak_memory_is_that_of_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others hold 1000 bytes meanwhile; the prompt goes in before the measurement begins."""
    model, order = tiny_mixtral(), list[str]()
    work = Decoding(model, tokens(), 2)
    monkeypatch.setattr(work, "prepare", lambda: order.append("prompt"))
    monkeypatch.setattr(work, "run", lambda: order.append("run"))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: order.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5000)
    assert benchmark._peak_bytes(model, work) == 4000 + tensor_bytes(model)
    assert order == ["prompt", "reset", "run"]


def test_settings_that_time_nothing() -> None:
    for changes in ({"batch_sizes": ()}, {"contexts": (0,)}, {"new_tokens": 0}, {"repeats": 0}, {"warmup": -1}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            small_settings(**changes)
    with pytest.raises(ValueError, match=r"\[4, 24\] token ids are too few for 5 sequences of 8"):
        rows_of([], small_settings(batch_sizes=(5,)))
