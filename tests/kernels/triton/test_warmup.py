"""What is launched before it is needed: every kernel that a call may take, once for each way to compile it."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="these are tests of Triton kernels, and triton is not installed")

import triton
from moe_kernels.triton_kernels.dispatch import Device, limits
from moe_kernels.triton_kernels.interpreting import INTERPRETED
from moe_kernels.triton_kernels.launches import recorded_launches
from moe_kernels.triton_kernels.warmup import tokens_of_choices, tokens_up_to, warmup_kernels
from torch import nn

import moe_lightning as ml
from moe_lightning.experts import CompressedExperts
from moe_lightning.experts.kernel_path import use_kernels
from tests.architectures.compressed_models import make_model

interpreted = pytest.mark.skipif(not INTERPRETED, reason="counts launches in triton's interpreter: there is a GPU")

FORMS = ("dense", "int4", "sparse24")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[str, str]]]:
    """Count launches by name and constants, and run none of them."""
    found: Counter[tuple[str, str]] = Counter()

    def count(kernel: Any, *_: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        found[kernel.fn.__name__, repr(sorted(constants.items()))] += 1

    monkeypatch.setattr(triton.runtime.interpreter.InterpretedFunction, "run", count)
    yield found


def names(launched: Counter[tuple[str, str]]) -> Counter[str]:
    """Count the ways in which each kernel was launched."""
    return Counter(name.removesuffix("_kernel") for name, _ in launched)


@interpreted
@pytest.mark.parametrize("form", FORMS)
def test_every_kernel_of_every_choice_once(form: Any, launched: Counter[tuple[str, str]]) -> None:
    done = warmup_kernels(64, 128, 2, 4, form, (1, 2, 3, 8, 16, 32, 64, 65, 200, 4096), group=64, device="cpu")
    assert done.reason is None and not done.kernels and done.seconds > 0
    rows = limits(form, Device(0))
    decode = len(rows) - 1
    found = names(launched)
    assert done.tokens == (*(limit for limit in rows if limit), 4096)
    assert found[f"{form}_gate_up"] == found[f"{form}_down"] == decode
    # Tables of one token and of many; more than one row may take the same splits.
    assert found["grouped_gate_up"] == found["grouped_down"] == found["count"] == found["plan"] == found["place"] == 1
    assert found["routing"] == found["router"] == 1 and found["combine"] == 2
    expanding = {"int4": "int4_dequantize", "sparse24": "sparse24_expand"}
    assert form not in expanding or found[expanding[form]] == 2
    products = [count for (name, _), count in launched.items() if "gate_up" in name or "down" in name]
    assert set(products) == {1}


def test_one_number_of_tokens_for_each_row() -> None:
    device = Device(90)
    rows = limits("int4", device)
    assert rows[0] == 8 and rows[-1] is None
    assert tokens_of_choices("int4", device, (1, 5, 7)) == (7,)
    assert tokens_of_choices("int4", device, (9, 1, 16, 999)) == (1, 16, 999)
    assert tokens_up_to("int4", device, 1) == (1,)
    assert tokens_up_to("int4", device, 8) == (8,)
    assert tokens_up_to("int4", device, 9) == (8, 9)
    assert tokens_up_to("int4", device, 100)[-2:] == (rows[-2], 100)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_done() -> None:
    done = warmup_kernels(64, 64, 2, 4)
    assert done.reason == "there is no GPU" and str(done) == "nothing to warm up: there is no GPU"


def test_groups_that_the_kernels_do_not_know() -> None:
    with pytest.raises(ValueError, match="groups of 32 of 64 inputs: int4 kernels want 128 or 64"):
        warmup_kernels(64, 64, 2, 4, "int4", group=32, device="cpu" if INTERPRETED else "cuda")


@interpreted
@pytest.mark.parametrize(("name", "kinds"), [("dense", 3), ("int4 and novices", 2), ("2:4 and novices", 2)])
def test_layers_of_a_model_once_for_each_kind(name: str, kinds: int, launched: Counter[tuple[str, str]]) -> None:
    model = make_model(name)
    with use_kernels("always"):
        done = ml.warmup(model, max_tokens=9)
    assert len(done.layers) == 3 and not done.reasons and str(done).startswith("3 layers ready: 0 kernels compiled")
    # Of 16 tokens at most: one row of fp32's tables.
    routers = sum(count for (kernel, _), count in launched.items() if kernel == "router_kernel")
    assert routers == kinds
    found = names(launched)
    assert found["combine"] >= 2
    if name == "int4 and novices":
        experts = next(module for module in model.modules() if isinstance(module, CompressedExperts))
        assert experts.storage.gate_up_proj.in_kernel_form and found["int4_gate_up"] == 1


@interpreted
def test_a_model_of_transformers(launched: Counter[tuple[str, str]]) -> None:
    model = make_model("dense").base_model.layers[1]
    with use_kernels("always"):
        assert ml.warmup(model).layers == ("mlp",)
    assert names(launched)["grouped_gate_up"] == 1


def test_switched_off_says_so() -> None:
    with use_kernels("off"):
        done = ml.warmup(make_model("dense"))
    assert not done.layers and not done.kernels and len(done.reasons) == 3
    assert str(done) == "no kernels to warm up: the kernels are switched off"
    assert str(ml.warmup(nn.Linear(2, 2))) == "no kernels to warm up: the model has no experts"
    with pytest.raises(ValueError, match="max_tokens = 0"):
        ml.warmup(nn.Linear(2, 2), 0)


@interpreted
def test_the_interpreter_has_no_specialisations() -> None:
    with pytest.raises(RuntimeError, match="process without it"), recorded_launches(90):
        pass


@pytest.mark.parametrize("arch", [80, 90])
def test_no_number_of_tokens_compiles_anything_anew(arch: int) -> None:
    """By triton's own keys, in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    program = [sys.executable, "-W", "ignore", "-m", "tests.kernels.triton.launched_kernels", str(arch)]
    ran = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    assert not ran.returncode, ran.stderr
    found = json.loads(ran.stdout)
    assert set(found) == {f"{form} {dtype}" for form in FORMS for dtype in ("bfloat16", "float32")}
    for form, rows in found.items():
        for row in rows:
            first, *others = row.values()
            assert len(row) == 4 and len(first) >= 5, form
            assert all(other == first for other in others), f"{form}, {', '.join(row)} tokens"
