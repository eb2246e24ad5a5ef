"""What is found out about the CPU, and what the environment says instead."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import pytest
import torch
from moe_kernels import machine
from moe_kernels.machine import Int4Product, Machine, this_machine


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(machine.VARIABLE, raising=False)
    machine.found_out.cache_clear()
    yield
    machine.found_out.cache_clear()


def test_what_was_found_is_kept_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, machine.logger.name)
    found = this_machine()
    assert this_machine() is found and found.bf16_over_fp32 > 0 and found.op_over_fp32 > 0
    (line,) = (record.getMessage() for record in caplog.records)
    assert f"{found.bf16_over_fp32:.2f}" in line and machine.VARIABLE in line


def with_kernel(there: bool, monkeypatch: pytest.MonkeyPatch, pairs: bool = True) -> None:
    monkeypatch.setattr(machine, "available", lambda: there)
    monkeypatch.setattr(machine, "multiplies_pairs", lambda: there and pairs)


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("int4", get_args(Int4Product))
def test_the_environment_decides_whatever_is_measured(
    emulated: bool, int4: Int4Product, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, machine.logger.name)
    with_kernel(True, monkeypatch)
    monkeypatch.setenv(machine.VARIABLE, f"{'emulated' if emulated else 'native'}, {int4}")
    monkeypatch.setattr(machine, "_measure", lambda: pytest.fail("measured all the same"))
    found = this_machine()
    assert (found.bf16_emulated, found.int4) == (emulated, int4)
    (line,) = (record.getMessage() for record in caplog.records)
    assert "not measured" in line and machine.VARIABLE in line


@pytest.mark.parametrize(
    ("words", "kernel", "times", "expected"),
    [
        ("native", False, (2.0, 9.0), (False, "tiles")),
        ("emulated", False, (0.5, 0.5), (True, "op")),
        ("op", True, (2.0, 9.0), (True, "op")),
        ("tiles", True, (0.5, 0.5), (False, "tiles")),
        ("", False, (0.5, 9.0), (False, "tiles")),
        ("", False, (2.0, float("inf")), (True, "tiles")),
        ("", True, (2.0, 0.1), (True, "kernel")),
        ("kernel", True, (0.5, 0.1), (False, "kernel")),
    ],
)
def test_what_is_not_said_is_found_out(
    words: str,
    kernel: bool,
    times: tuple[float, float],
    expected: tuple[bool, Int4Product],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_kernel(kernel, monkeypatch)
    monkeypatch.setenv(machine.VARIABLE, words)
    monkeypatch.setattr(machine, "_measure", lambda: times)
    assert this_machine() == Machine(*expected, *times)


@pytest.mark.parametrize(("bf16_over_fp32", "expected"), [(0.4, "op"), (2.0, "kernel")])
def test_an_old_compiler_is_not_asked_for_what_torch_does_better(
    bf16_over_fp32: float, expected: Int4Product, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, machine.logger.name)
    with_kernel(True, monkeypatch, pairs=False)
    monkeypatch.setattr(machine, "_measure", lambda: (bf16_over_fp32, 0.3))
    assert this_machine().int4 == expected
    assert ("older than this CPU" in caplog.text) == (expected == "op")


def test_a_kernel_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernel(False, monkeypatch)
    monkeypatch.setattr(machine, "what_failed", lambda: "there is no C compiler: install gcc")
    monkeypatch.setenv(machine.VARIABLE, "native,kernel")
    with pytest.raises(ValueError, match="there is no kernel, there is no C compiler: install gcc; leave the word out"):
        this_machine()


@pytest.mark.parametrize("words", ["fast", "native,emulated", "op,tiles,native", "kernel,op", "native,amx"])
def test_unknown_and_contradicting_words_are_refused(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.VARIABLE, words)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{machine.VARIABLE}={words}: give native or emulated"):
            this_machine()


def test_threads_get_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    honest = machine._measure
    monkeypatch.setattr(machine, "_measure", lambda: measured.append(True) or honest())
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: this_machine(), range(4)))
    assert len(measured) == 1 and all(answer is answers[0] for answer in answers)


def test_the_default_device_and_type_are_left_alone() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert 0 < this_machine().bf16_over_fp32 < 50
    finally:
        torch.set_default_dtype(torch.float32)
