"""Predictions in a file: what is read is what was written, as large as was said, whole or not at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_lightning.evaluation.comparison import prediction_of
from moe_lightning.evaluation.reference_file import (
    ReferenceFile,
    ReferenceText,
    ReferenceWriter,
    reference_bytes,
    token_fingerprint,
)

VOCABULARY, HIDDEN = 7, 5
TEXTS = {"test": ReferenceText(6, "a"), "other text/1": ReferenceText(4, "b")}


def writer(path: Path, hidden_tokens: int = 3) -> ReferenceWriter:
    return ReferenceWriter(path, TEXTS, VOCABULARY, hidden_tokens, HIDDEN, [0, 2], [1.5, 2.5])


def logits(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(tokens, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fill(file: ReferenceWriter) -> None:
    for first in (3, 0):  # in any order
        file.add_predictions("test", first, prediction_of(logits(6, 0)[first : first + 3]))
    file.add_predictions("other text/1", 0, prediction_of(logits(4, 1)))
    states = torch.arange(2 * 3 * HIDDEN).float().view(2, 1, 3, HIDDEN)
    file.add_hidden(0, {0: states[0], 2: states[1].bfloat16()})


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "reference.safetensors"
    with writer(path) as file:
        fill(file)
    size = reference_bytes(10, VOCABULARY, 3, HIDDEN, 2)
    assert size == 10 * (4 * VOCABULARY + 8) + 4 * 3 * HIDDEN * 2
    assert size < path.stat().st_size < size + 1000
    # Anybody's reader understands it.
    tensors = load_file(path)
    assert tensors["predictions/test"].shape == (6, VOCABULARY) and tensors["hidden/2"].dtype == torch.float32
    found = ReferenceFile(path)
    assert (found.texts, found.weights, found.blocks, found.hidden_tokens) == (TEXTS, [1.5, 2.5], [0, 2], 3)
    for text, tokens, seed in (("test", 6, 0), ("other text/1", 4, 1)):
        expected = logits(tokens, seed).log_softmax(-1)[1:4]
        known = found.prediction(text, 1, 3)
        assert known is not None and known.log_probability.dtype == torch.float32
        assert torch.allclose(known.log_probability.double(), expected, atol=1e-6)
        assert torch.equal(known.likeliest, expected.argmax(-1))
    assert found.hidden(1, 2)[2].tolist() == [[20, 21, 22, 23, 24], [25, 26, 27, 28, 29]]
    # What it does not hold as a whole it does not know.
    assert found.prediction("test", 4, 3) is None and found.prediction("strange", 0, 1) is None
    assert found.hidden(2, 2) == {}


def test_a_failure_leaves_what_there_was(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    with writer(path, hidden_tokens=0) as file:
        for text, tokens in (("test", 6), ("other text/1", 4)):
            file.add_predictions(text, 0, prediction_of(logits(tokens, 0)))
    before = path.read_bytes()
    with pytest.raises(OSError, match="full"), writer(path) as file:
        file.add_predictions("test", 0, prediction_of(logits(6, 1)))
        raise OSError("the disk is full")
    with pytest.raises(RuntimeError, match="bytes were written"), writer(path):
        pass
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert ReferenceFile(path).blocks == [] and ReferenceFile(path).hidden(0, 1) == {}


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    child = os.fork()
    if child == 0:
        try:
            with writer(path) as file:
                assert file._file is not None
                file._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".partial" and left.stat().st_size > 0
    others = [tmp_path / ".reference.safetensors.x", tmp_path / ".another.safetensors.7.partial"]
    for other in others:
        other.touch()
    with writer(path) as file:
        assert not left.exists()
        fill(file)
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing"):
        ReferenceFile(tmp_path / "nothing")
    path = tmp_path / "reference.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="is damaged or no reference of ours"):
        ReferenceFile(path)
    with writer(path) as file:
        fill(file)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is damaged or no reference of ours"):
        ReferenceFile(path)


def test_fingerprints_are_of_blocks() -> None:
    ids = torch.arange(24).view(4, 6)
    first = token_fingerprint([ids])
    assert first == token_fingerprint([ids[:1], ids[1:].int()])
    assert first != token_fingerprint([ids[:3]]) and first != token_fingerprint([ids.view(8, 3)])
    assert first != token_fingerprint([ids.flip(0)])
