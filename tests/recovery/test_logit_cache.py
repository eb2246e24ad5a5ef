"""Cached predictions: what comes back, how precisely, where it is found, and what a kill leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from moe_lightning.recovery import Objective, Student, kl_to_teacher, kl_to_top_words
from moe_lightning.recovery.logit_cache import CacheHeader, LogitCache, block_hashes, read_header
from moe_lightning.recovery.logit_cache_writer import LogitCacheWriter
from moe_lightning.recovery.teachers import CachedTeacher

S, V = 8, 50
ROOT = Path(__file__).resolve().parents[2]


def tokens(count: int, seed: int = 0, vocab_size: int = V) -> Tensor:
    return torch.randint(0, vocab_size, (count, S), generator=torch.Generator().manual_seed(seed))


def logits_of(input_ids: Tensor, vocab_size: int = V) -> Tensor:
    """Return predictions that depend on a block's tokens alone."""
    rows = []
    for block in input_ids:
        generator = torch.Generator().manual_seed(int((block * torch.arange(1, S + 1)).sum()))
        rows.append(4 * torch.randn(S, vocab_size, generator=generator))
    return torch.stack(rows)


def header(**changes: Any) -> CacheHeader:
    options: dict[str, Any] = {"vocab_size": V, "block_size": S, "top_k": 5, "temperature": 2.0}
    return CacheHeader(**{**options, "teacher": {"folder": "somewhere", "fingerprint": [1.5, 2.5]}, **changes})


def write(folder: Path, input_ids: Tensor, head: CacheHeader | None = None, **options: Any) -> None:
    head = head or header()
    with LogitCacheWriter(folder, head, **options) as writer:
        for part in input_ids.split(3):
            writer.add(part, logits_of(part, head.vocab_size))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("storage", ["float16", "float32"])
@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (5, 2.0), (V - 1, 0.5), (V, 2.0)])
def test_what_comes_back(tmp_path: Path, storage: Any, top_k: int, temperature: float) -> None:
    input_ids = tokens(7)
    head = header(top_k=top_k, temperature=temperature, storage=storage)
    write(tmp_path / "cache", input_ids, head, max_shard_bytes=2 * head.bytes_per_block)
    got = LogitCache(tmp_path / "cache").look_up(input_ids)

    wide = logits_of(input_ids).double().numpy() / temperature
    log = wide - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True)) - wide.max(-1, keepdims=True)
    order = np.argsort(-log, -1)
    words = order[..., :top_k]
    assert np.array_equal(got.words, words)
    assert got.words.dtype == torch.int64 and got.log_probability.dtype == torch.float32
    expected = np.take_along_axis(log, words, -1)
    # Half an ulp of float16 of the distance to the likeliest word, and what adding up to 1 shifts.
    distance = expected[..., :1] - expected
    tolerance = (2**-22 if storage == "float32" else 2**-11) * np.maximum(1, distance)
    tolerance += 2e-6 if storage == "float32" else 5e-4
    assert (np.abs(got.log_probability.numpy() - expected) <= tolerance).all()
    total = torch.cat([got.log_probability, got.rest[..., None]], -1).double().logsumexp(-1)
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-6)
    if top_k == V:
        assert bool((got.rest == -torch.inf).all())
    else:
        others = np.logaddexp.reduce(np.take_along_axis(log, order[..., top_k:], -1), -1)
        np.testing.assert_allclose(got.rest, others, atol=2e-3 if storage == "float16" else 1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_by_a_cache(tmp_path: Path, temperature: float) -> None:
    """With all words the cached teacher's loss is the live one's, to what half precision leaves."""
    input_ids = tokens(4)
    write(tmp_path, input_ids, header(top_k=V, temperature=temperature))
    student = logits_of(tokens(4, seed=9)).requires_grad_()
    batch = {"input_ids": input_ids, "labels": input_ids}
    teacher = CachedTeacher(LogitCache(tmp_path))
    loss, _ = Objective(teacher, alpha=1.0, temperature=temperature)(Student(student), batch)
    rows = student[:, :-1].reshape(-1, V), logits_of(input_ids)[:, :-1].reshape(-1, V)
    live = kl_to_teacher(*rows, temperature)
    assert loss.item() == pytest.approx(live.item(), rel=1e-4)
    gradients = [torch.autograd.grad(value, student)[0] for value in (loss, live)]
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-3


def test_order_and_batch_size_do_not_matter(tmp_path: Path) -> None:
    input_ids = tokens(9)
    write(tmp_path, input_ids, max_shard_bytes=4 * header().bytes_per_block)
    assert len(shards(tmp_path)) == 3
    cache = LogitCache(tmp_path)
    whole = cache.look_up(input_ids)
    order = torch.tensor([8, 0, 3, 3, 5])
    for wanted in (order, order[:1], order.flip(0)):
        for type_ in (torch.int64, torch.int32):
            got = cache.look_up(input_ids[wanted].to(type_))
            assert torch.equal(got.words, whole.words[wanted])
            assert torch.equal(got.log_probability, whole.log_probability[wanted])
            assert torch.equal(got.rest, whole.rest[wanted])
    # A slice of something larger has other strides.
    wide = torch.zeros(9, 2 * S, dtype=torch.int64)
    wide[:, ::2] = input_ids
    assert torch.equal(cache.look_up(wide[:, ::2]).words, whole.words)


@pytest.mark.parametrize(("vocab_size", "kind"), [(300, "U16"), (1 << 16, "U16"), ((1 << 16) + 1, "I32")])
def test_word_numbers_of_every_size(tmp_path: Path, vocab_size: int, kind: str) -> None:
    input_ids, head = tokens(2), header(vocab_size=vocab_size, top_k=4)
    logits = torch.zeros(2, S, vocab_size)
    logits[..., -1], logits[..., 0], logits[..., vocab_size // 2], logits[..., 7] = 9, 8, 7, 6
    with LogitCacheWriter(tmp_path, head) as writer:
        writer.add(input_ids, logits)
    got = LogitCache(tmp_path).look_up(input_ids)
    assert got.words[1, 3].tolist() == [vocab_size - 1, 0, vocab_size // 2, 7]
    with safe_open(shards(tmp_path)[0], "pt") as file:
        assert file.get_slice("words").get_dtype() == kind
        size = sum(
            int(np.prod(file.get_slice(name).get_shape())) * {"U8": 1, "U16": 2, "F16": 2}.get(dtype, 4)
            for name in file.keys()  # noqa: SIM118 - it is no dict
            for dtype in [file.get_slice(name).get_dtype()]
        )
    assert size == 2 * head.bytes_per_block


def test_the_header(tmp_path: Path) -> None:
    write(tmp_path, tokens(5), header(data={"seed": 3}))
    entries = json.loads((tmp_path / "cache.json").read_text())
    mass = (logits_of(tokens(5)) / 2).softmax(-1).topk(5).values.sum(-1).mean()
    assert entries.pop("kept_mass") == pytest.approx(float(mass), rel=1e-3)
    assert entries == {
        "version": 1,
        "blocks": 5,
        "bytes_per_block": header().bytes_per_block,
        "vocab_size": V,
        "block_size": S,
        "top_k": 5,
        "temperature": 2.0,
        "storage": "float16",
        "teacher": {"folder": "somewhere", "fingerprint": [1.5, 2.5]},
        "data": {"seed": 3},
    }
    assert read_header(tmp_path) == header(data={"seed": 3})


def test_blocks_that_are_there_are_not_written_twice(tmp_path: Path) -> None:
    input_ids = tokens(6)
    write(tmp_path, input_ids[:4])
    before = {path: path.stat().st_mtime_ns for path in shards(tmp_path)}
    with LogitCacheWriter(tmp_path, header()) as writer:
        assert writer.holds(input_ids).tolist() == [True] * 4 + [False] * 2
        writer.add(input_ids, logits_of(input_ids))
        writer.add(input_ids, logits_of(input_ids))
        assert len(writer) == 6
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    cache = LogitCache(tmp_path)
    assert len(cache) == 6 and cache.holds(input_ids).all()
    write(tmp_path, input_ids[:2], header(top_k=3), overwrite=True)
    assert len(LogitCache(tmp_path)) == 2


def test_hashes_tell_blocks_apart() -> None:
    first = tokens(1)
    other = first.clone()
    other[0, -1] += 1
    assert (block_hashes(first) == block_hashes(first.int())).all()
    assert (block_hashes(first) != block_hashes(other)).all()
    # As on every machine: fixed by the format.
    assert block_hashes(torch.arange(S)[None]).tobytes().hex() == "eec355880b2f43a220bbeccbbdfbfab0"


def test_what_is_not_cached(tmp_path: Path) -> None:
    write(tmp_path, tokens(5))
    cache = LogitCache(tmp_path)
    with pytest.raises(ValueError, match=r"1 of the 2 blocks .* not among the 5 .*cache-logits --output"):
        cache.look_up(torch.cat([tokens(1), tokens(1, seed=4)]))
    with pytest.raises(ValueError, match=r"blocks of 8 tokens.*--data\.block_size"):
        cache.look_up(tokens(1)[:, :-1])
    teacher = CachedTeacher(cache)
    with pytest.raises(ValueError, match=r"temperature 2\.0"):
        teacher.targets({"input_ids": tokens(1)}, 1.0, False)
    with pytest.raises(ValueError, match="hidden_weight"):
        teacher.targets({"input_ids": tokens(1)}, 2.0, True)
    assert not teacher.gives_hidden


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 4}, "top_k 5, not 4"),
        ({"temperature": 1.0}, "temperature 2.0, not 1.0"),
        ({"storage": "float32"}, "storage float16, not float32"),
        ({"teacher": {"fingerprint": [1.5, 2.6]}}, "another teacher"),
    ],
)
def test_a_folder_holds_one_kind(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write(tmp_path, tokens(2))
    with pytest.raises(ValueError, match=words):
        LogitCacheWriter(tmp_path, header(**changes))
    assert len(LogitCache(tmp_path)) == 2


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(FileExistsError, match="no cache"):
        LogitCacheWriter(tmp_path / "other", header(), overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        LogitCacheWriter(tmp_path / "other" / "file", header())
    with pytest.raises(ValueError, match="top_k"):
        header(top_k=V + 1)
    with pytest.raises(ValueError, match="temperature"):
        header(temperature=0.0)
    with LogitCacheWriter(tmp_path / "cache", header()) as writer:
        with pytest.raises(ValueError, match="not finite"):
            writer.add(tokens(1), torch.full((1, S, V), torch.nan))
        with pytest.raises(ValueError, match="blocks of 8 tokens and 50 words"):
            writer.add(tokens(1), torch.zeros(1, S, V + 1))


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cache\.json"):
        LogitCache(tmp_path)
    write(tmp_path, tokens(5))
    content = shards(tmp_path)[0].read_bytes()
    shards(tmp_path)[0].write_bytes(content[:-10])
    with pytest.raises(ValueError, match="delete it and write the missing blocks again"):
        LogitCache(tmp_path)
    entries = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps(entries | {"version": 2}))
    with pytest.raises(ValueError, match="version 2"):
        LogitCache(tmp_path)
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        LogitCache(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from moe_lightning.recovery.logit_cache_writer import LogitCacheWriter
from tests.recovery.test_logit_cache import header, logits_of, tokens

torch.set_num_threads(1)
replace, head, statuses = os.replace, header(), []
for last in map(int, sys.argv[2:]):
    child = os.fork()
    if child == 0:
        calls = []

        def replace_or_die(source, target):
            calls.append(target)
            if len(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = replace_or_die
        folder = Path(sys.argv[1], str(last))
        with LogitCacheWriter(folder, head, max_shard_bytes=2 * head.bytes_per_block) as writer:
            for block in tokens(9).split(1):
                writer.add(block, logits_of(block))
        os._exit(0)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(statuses)
"""

# A kill before a file gets its name: the first header; the first file; the header behind it; the header of the second.
KEPT_AT_CALL = {1: 0, 2: 0, 3: 2, 5: 4, 6: 4}


def test_a_killed_writer_goes_on(tmp_path: Path) -> None:
    calls = map(str, KEPT_AT_CALL)
    command = [sys.executable, "-c", KILLED, str(tmp_path), *calls]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == str([-signal.SIGKILL] * len(KEPT_AT_CALL)), done.stderr
    write(tmp_path / "whole", tokens(9), max_shard_bytes=2 * header().bytes_per_block)
    for call, kept in KEPT_AT_CALL.items():
        check_goes_on(tmp_path / str(call), tmp_path / "whole", kept)


def check_goes_on(cache: Path, whole: Path, kept: int) -> None:
    assert any(path.name.endswith(".partial") for path in cache.iterdir())
    before = {path.name: path.read_bytes() for path in shards(cache)}
    with LogitCacheWriter(cache, header(), max_shard_bytes=2 * header().bytes_per_block) as writer:
        assert len(writer) == kept
        new = tokens(9)[~writer.holds(tokens(9))]
        assert len(new) == 9 - kept
        writer.add(new, logits_of(new))
    assert all((cache / name).read_bytes() == content for name, content in before.items())
    assert [path.name for path in sorted(cache.iterdir())] == [path.name for path in sorted(whole.iterdir())]
    assert all((whole / path.name).read_bytes() == path.read_bytes() for path in cache.iterdir())


def test_an_interruption_keeps_what_was_computed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        with LogitCacheWriter(tmp_path, header()) as writer:
            writer.add(tokens(3), logits_of(tokens(3)))
            raise KeyboardInterrupt
    assert len(LogitCache(tmp_path)) == 3


def test_fewer_words_are_a_smaller_divergence(tmp_path: Path) -> None:
    input_ids = tokens(3)
    student = logits_of(tokens(3, seed=9)).reshape(-1, V)
    values = []
    for top_k in (1, 5, 20, V):
        write(tmp_path / str(top_k), input_ids, header(top_k=top_k, storage="float32"))
        got = LogitCache(tmp_path / str(top_k)).look_up(input_ids)
        parts = got.log_probability.reshape(-1, top_k), got.words.reshape(-1, top_k), got.rest.reshape(-1)
        values.append(float(kl_to_top_words(student, *parts, temperature=2.0)))
    assert values == sorted(values)
    whole = float(kl_to_teacher(student, logits_of(input_ids).reshape(-1, V), 2.0))
    assert values[-1] == pytest.approx(whole, rel=1e-5)
