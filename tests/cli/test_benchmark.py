"""``moe-lightning benchmark``: what it writes, and its errors of one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_lightning as ml
from moe_lightning.cli import benchmark as command
from moe_lightning.cli import main
from moe_lightning.cli.commands import inspected
from moe_lightning.evaluation import benchmark, benchmark_floors
from moe_lightning.evaluation.speed import Decoding
from moe_lightning.plan import DropBlock, NoviceExperts, Quantize
from tests.models import tiny_mixtral
from tests.packed import apply_filled, everywhere
from tests.small_checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An uncompressed checkpoint with its tokenizer, and the same one compressed."""
    folder = tmp_path_factory.mktemp("benchmark")
    write_checkpoint(folder)
    model = ml.from_pretrained(folder / "hub")
    for edit in (*everywhere(NoviceExperts(0, (1, 4))), *everywhere(Quantize(0, group_size=16)), DropBlock(1)):
        apply_filled(model, [edit])
    ml.save_pretrained(model, folder / "small", tokenizer=folder / "hub")
    (folder / "small" / "statistics.safetensors").write_bytes(bytes(100))
    tiny_mixtral(vocab_size=80, max_position_embeddings=16).save_pretrained(folder / "other")
    tiny_mixtral(vocab_size=80).save_pretrained(folder / "other2")
    return {name: str(folder / name) for name in ("hub", "small", "other", "other2")}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_floors, "_SECONDS", 0.0)


QUICK = ["--batch_sizes", "2", "--contexts", "8", "--new_tokens", "2", "--repeats", "2", "--warmup", "1"]


def test_a_compressed_model_against_the_original(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results" / "benchmark.json"
    threads = torch.get_num_threads()
    options = ["--model", folders["small"], "--against", folders["hub"], "--implementations", "eager,grouped_mm"]
    status = main(["benchmark", *options, *QUICK, "--threads", "1", "--output", str(output)])
    told = capsys.readouterr().out
    assert status == 0 and torch.get_num_threads() == threads
    written = json.loads(output.read_text())
    assert list(written["models"]) == ["small", "hub"]
    assert written["models"]["small"]["folder"] == folders["small"]
    weights = Path(folders["small"]) / "model.safetensors"
    assert (weights.parent / "statistics.safetensors").is_file()  # beside them, and no weights
    assert written["models"]["small"]["bytes_on_disk"] == weights.stat().st_size
    assert written["context"]["device"] == "cpu" and written["context"]["threads"] == 1
    assert written["context"]["tokens"] == f"python-stdlib in the tokens of {folders['small']}"
    assert [(row["model"], row["implementation"], row["phase"]) for row in written["rows"]] == [
        (*name, phase)
        for phase in ("prefill", "decode")
        for name in (("small", "moe_lightning"), ("hub", "eager"), ("hub", "grouped_mm"))
    ]
    assert all(row["refused"] is None and row["tokens_per_second"]["median"] > 0 for row in written["rows"])
    lines = told.splitlines()
    assert sum(line.startswith(("small  moe_lightning", "hub    eager", "hub    grouped_mm")) for line in lines) == 6
    assert any(line == f"wrote {output} and benchmark.md" for line in lines)
    assert "| hub | eager | decode | 2 | 8 |" in output.with_suffix(".md").read_text()


def test_options_in_a_file_and_a_table_in_markdown(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "benchmark.yaml"
    config.write_text(
        f"model: {folders['other']}\nagainst: [{folders['other2']}]\nbatch_sizes: [1, 2]\ncontexts: 4\nnew_tokens: 1\n"
        "repeats: 1\nwarmup: 0\nimplementations: [eager]\n"
    )
    assert main(["benchmark", "-c", str(config), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| other | eager |") for line in lines) == 4
    assert any("random tokens, seed 0, which are routed unlike text" in line for line in lines)
    # The command line wins.
    assert main(["benchmark", "-c", str(config), "--against", folders["other2"], "--batch_sizes", "1"]) == 0
    assert sum(line.startswith("other2  eager") for line in capsys.readouterr().out.splitlines()) == 2


def test_a_wrong_model_ends_with_status_1(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = command.from_pretrained

    def broken(*arguments: Any) -> Any:
        model = load(*arguments)
        if arguments[0] == folders["small"]:
            model.model.layers[1].self_attn.layer_idx = 0
        return model

    monkeypatch.setattr(command, "from_pretrained", broken)
    output = tmp_path / "benchmark.json"
    options = ["--model", folders["small"], "--against", folders["hub"], "--implementations", "eager"]
    assert main(["benchmark", *options, *QUICK, "--output", str(output)]) == 1
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert error.startswith("moe-lightning benchmark: 2 of 4 measurements were refused; the first is small, moe_light")
    assert "decode is wrong: layer 0: off by" in error
    rows = json.loads(output.read_text())["rows"]
    assert [bool(row["refused"]) for row in rows] == [True, False] * 2
    assert "refused: small, moe_lightning: it does not compute what its weights say: decode is wrong" in captured.out


@pytest.mark.parametrize("writes", [True, False])
def test_an_interrupt_keeps_what_was_timed(
    writes: bool,
    folders: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seconds_of = benchmark.seconds_of

    def stop(work: Any) -> float:
        if isinstance(work, Decoding):
            raise KeyboardInterrupt
        return seconds_of(work)

    monkeypatch.setattr(benchmark, "seconds_of", stop)
    output = tmp_path / "benchmark.json"
    options = ["--model", folders["small"], *QUICK, *(["--output", str(output)] if writes else [])]
    assert main(["benchmark", *options]) == 130
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if "interrupted" in line]
    kept = f"in {output}, marked as interrupted" if writes else "printed above, and nowhere else"
    assert line.startswith(f"moe-lightning benchmark: interrupted after 1 of 2 measurements, which are {kept}")
    assert "Traceback" not in captured.err and "Interrupted, so not everything was measured." in captured.out
    assert output.exists() == writes
    if writes:
        written = json.loads(output.read_text())
        assert written["context"]["interrupted"] is True and written["context"]["measurements"] == 2
        assert [row["phase"] for row in written["rows"]] == ["prefill"]


def test_an_interrupt_before_anything_was_timed(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    output = tmp_path / "benchmark.json"
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "checked", stop)
        assert main(["benchmark", "--model", folders["small"], *QUICK, "--output", str(output)]) == 130
    assert "there is nothing to write" in capsys.readouterr().err and not output.exists()


def test_the_size_of_packed_weights_in_a_type_they_were_not_saved_in(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "data_size", lambda count: f"{count} bytes")
    output = tmp_path / "benchmark.json"
    given = ["--model", folders["small"], *QUICK, "--dtype", "bfloat16", "--output", str(output)]
    assert main(["benchmark", *given]) == 0
    told = capsys.readouterr().out.splitlines()
    written = json.loads(output.read_text())
    shape = inspected(folders["small"])[0]
    assert written["models"]["small"]["bytes"] == replace(shape, weight_bytes=2).bytes != shape.bytes // 2
    assert told[0].endswith(f", {written['models']['small']['bytes']} bytes")


def test_models_that_do_not_fit_together(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(command, "from_pretrained", full)
    assert main(["benchmark", "--model", folders["hub"], *QUICK]) == 1
    assert "the models do not fit into memory together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--model", "{hub}", "--against", "{hub}"], "is named twice"),
        (["--model", "{hub}", "--against", "{other}"], "the models have different vocabularies ("),
        (["--model", "{hub}", "--contexts", "64"], "set --contexts to at most 32"),
        (["--model", "{other}"], "--new_tokens 32: the longest sequence of {other} has 16"),
        (["--model", "{hub}", "--contexts", "8,x"], "--contexts 8,x: give whole numbers with commas"),
        (["--model", "{hub}", "--batch_sizes", "0"], "--batch_sizes 0: give numbers from 1 on"),
        (["--model", "{hub}", "--batch_sizes", "[]"], "--batch_sizes []: give numbers from 1 on"),
        (["--model", "{hub}", "--repeats", "0"], "--repeats 0: it must be at least 1"),
        (["--model", "{hub}", "--warmup", "-1"], "--warmup -1: it must be at least 0"),
        (["--model", "{hub}", "--new_tokens", "0"], "--new_tokens 0: it must be at least 1"),
        (["--model", "{hub}", "--tolerance", "2"], "--tolerance 2.0: it is a relative error"),
        (["--model", "{hub}", "--implementations", "eagre"], "--implementations eagre: choose from moe_lightning, "),
        (["--model", "{hub}", "--device", "tpu"], "--device tpu"),
        (["--model", "{hub}", "--threads", "0"], "--threads 0: it must be at least 1"),
        (["--model", "{hub}", "--output", "x.csv"], "--output x.csv: name a .json file"),
        (["--model", "{hub}", "--output", "{there}"], "is there already: choose another file or pass --overwrite"),
    ],
)
def test_errors_of_one_line(
    options: list[str],
    words: str,
    folders: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before any model is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "from_pretrained", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "there.md").write_text("")  # the table of benchmark there.json
    named = {**folders, "there": str(tmp_path / "there.json")}
    assert main(["benchmark", *(option.format(**named) for option in options)]) == 2
    captured = capsys.readouterr()
    assert words.format(**named) in captured.err
    assert len(captured.err.splitlines()) == 1


def test_the_usual_contexts_are_as_long_as_the_models_allow(folders: dict[str, str]) -> None:
    def contexts(new_tokens: int) -> tuple[int, ...]:
        return command._settings({"hub": folders["hub"]}, "1,4", None, new_tokens, 5, 2, None).contexts

    assert contexts(8) == (56,)
    assert command.USUAL_CONTEXTS == (128, 512)


def test_text_is_read_on_where_documents_end(folders: dict[str, str]) -> None:
    ids, source = command.token_ids([folders["other"], folders["hub"]], 3, 40, 300)
    assert ids.shape == (3, 40) and source.endswith(folders["hub"])
    again, _ = command.token_ids([folders["hub"]], 2, 60, 300)
    assert torch.equal(ids.flatten(), again.flatten())
    with pytest.raises(ValueError, match="tokens, the models know 80"):
        command.token_ids([folders["hub"]], 1, 4, 80)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--against", "a", "b", "--model", "c"], ["--model", "c", '--against=["a", "b"]']),
        (["--against=a,b", "--against", "c"], ['--against=["a", "b", "c"]']),
        (["--model", "c"], ["--model", "c"]),
        (["--against", "[a, b]"], ['--against=["a", "b"]']),
    ],
)
def test_several_models_to_compare_with(given: list[str], kept: list[str]) -> None:
    assert command.gathered(given, "--against") == kept


def test_labels_tell_models_apart(tmp_path: Path) -> None:
    given = [str(tmp_path / "runs" / "a" / "model"), str(tmp_path / "runs" / "b" / "model")]
    assert command._labels(given) == {"a/model": given[0], "b/model": given[1]}
    assert command._labels(given[:1]) == {"model": given[0]}
