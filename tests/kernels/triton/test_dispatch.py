"""The choice of kernels is a function of sizes and device, and the shipped tables are whole."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from moe_kernels.triton_kernels import dispatch
from moe_kernels.triton_kernels.dispatch import (
    FOLDER,
    Device,
    Format,
    Tiles,
    check_rows,
    choose,
    format_of,
    limits,
    slug,
    table_name,
)


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


H200 = Device(90, "NVIDIA H200", "3.9")


@pytest.fixture
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return where the table of an H200 would lie, beside that of its architecture."""
    shutil.copy(FOLDER / "sm_90.json", tmp_path)
    monkeypatch.setattr(dispatch, "FOLDER", tmp_path)
    dispatch._table.cache_clear()
    yield tmp_path / table_name(H200)
    dispatch._table.cache_clear()


def test_forms_that_nobody_tuned_come_from_the_architecture(own_table: Path) -> None:
    rows = json.loads((FOLDER / "sm_90.json").read_text())["int4"]
    rows[0]["gate_up"]["block_out"] = 32
    own_table.write_text(json.dumps({"made": {"device": "NVIDIA H200"}, "int4": rows}))
    assert choose(1, "int4", 64, 64, H200).gate_up.block_out == 32
    assert choose(1, "dense", 64, 64, H200) == choose(1, "dense", 64, 64, Device(90))
    assert limits("int4", H200) == (8, 16, 32, 64, None)


@pytest.mark.parametrize("text", ["", "{", "[]", '"int4"'])
def test_a_broken_table_is_left_aside(own_table: Path, text: str) -> None:
    own_table.write_text(text)
    with pytest.warns(UserWarning, match=r"nvidia-h200-triton-3.9.json: .*the tiles of the architecture are taken"):
        assert choose(1, "int4", 64, 64, H200) == choose(1, "int4", 64, 64, Device(90))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.clear(), "there are no rows"),
        (lambda rows: rows.pop(), "row 3 is for up to 64 tokens"),
        (lambda rows: rows.reverse(), "row 0 is for up to None tokens"),
        (lambda rows: rows[0].pop("down"), "row 0 is not whole"),
        (lambda rows: rows[0]["down"].update(blocks=3), "row 0 is not whole"),
        (lambda rows: rows[1].update(up_to_tokens=8), "limits rise"),
        (lambda rows: rows[1].update(block_tokens=8), "a tile of 8 tokens does not hold 16"),
        (lambda rows: rows[4].update(path="decode"), "does not hold any number of"),
        (lambda rows: rows[1].update(path="both"), "the path 'both'"),
        (lambda rows: rows[1]["gate_up"].update(num_warps=0), "no positive integers"),
        (lambda rows: rows[1]["gate_up"].update(num_warps="4"), "no positive integers"),
    ],
)
def test_rows_that_are_not_whole_are_left_aside(own_table: Path, change: Any, message: str) -> None:
    table = json.loads((FOLDER / "sm_90.json").read_text())
    table["dense"][0]["gate_up"]["block_out"] = 32
    change(table["int4"])
    own_table.write_text(json.dumps(table))
    with pytest.warns(UserWarning, match=f"for int4: .*{message}"):
        assert choose(1, "int4", 64, 64, H200) == choose(1, "int4", 64, 64, Device(90))
    assert choose(1, "dense", 64, 64, H200).gate_up.block_out == 32


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_shipped_tables_are_whole(arch: int) -> None:
    table = json.loads((FOLDER / f"sm_{arch}.json").read_text())
    assert set(table) == set(get_args(Format))
    for rows in table.values():
        check_rows(rows)
