"""The choice of kernels is a function of sizes and device, and the shipped tables are whole."""

import json
from typing import get_args

import pytest
import torch
from moe_kernels.triton_kernels import dispatch
from moe_kernels.triton_kernels.dispatch import FOLDER, Device, Format, Tiles, choose, format_of, slug


@pytest.mark.parametrize("form", get_args(Format))
@pytest.mark.parametrize("arch", [0, 80, 86, 89, 90, 100, 120])
def test_every_number_of_tokens_has_a_choice(form: str, arch: int) -> None:
    for tokens in (0, 1, 8, 9, 16, 17, 64, 65, 8192):
        choice = choose(tokens, form, 4096, 14336, Device(arch))
        assert choice.path == ("decode" if tokens <= (16 if form == "int4 fp32" else 64) else "grouped")
        if choice.path == "decode":
            assert choice.block_tokens >= tokens


def test_rows_of_forms_and_types() -> None:
    assert format_of("sparse24", torch.bfloat16) == "sparse24" and format_of("int4", torch.float32) == "int4 fp32"
    with pytest.raises(ValueError, match="no tables for weights of the form int8"):
        format_of("int8", torch.float16)


def test_tiles_of_int4_divide_the_rows() -> None:
    choice = choose(1, "int4", 96, 16 * 7, Device(90))
    assert choice.gate_up.block_out == 16 and choice.down.block_out == 32
    assert choose(1, "dense", 97, 113, Device(90)).down.block_out == 64
    with pytest.raises(ValueError, match="intermediate size 1000: int4 kernels want a multiple of 16"):
        choose(1, "int4", 4096, 1000, Device(90))


def test_the_table_of_a_device_goes_first(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = json.loads((FOLDER / "sm_90.json").read_text())
    (tmp_path / "sm_80.json").write_text(json.dumps(table))
    table["dense"][0]["gate_up"]["block_out"] = 32
    (tmp_path / "nvidia-h200-triton-3.9.json").write_text(json.dumps(table))
    monkeypatch.setattr(dispatch, "FOLDER", tmp_path)
    dispatch._table.cache_clear()
    try:
        assert choose(1, "dense", 64, 64, Device(90, "NVIDIA H200", "3.9")).gate_up == Tiles(32, 4, 4)
        assert choose(1, "dense", 64, 64, Device(90, "NVIDIA H200", "3.8")).gate_up == Tiles(64, 4, 4)
        assert choose(1, "dense", 64, 64, Device(90, "NVIDIA H100 80GB HBM3", "3.9")).gate_up == Tiles(64, 4, 4)
    finally:
        dispatch._table.cache_clear()
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
