"""Formats of weights and the edits that make them: what is refused, what is stored, what is written and read."""

import itertools
import json
from typing import Any

import pytest
import torch

from moe_lightning.architectures import architecture_of
from moe_lightning.experts import WeightStack
from moe_lightning.plan import (
    CompressionPlan,
    DropBlock,
    DropMoE,
    Edit,
    KeepChannels,
    KeepExperts,
    MergeExperts,
    ModelShape,
    NoviceExperts,
    Quantize,
    Sparsify,
    WeightFormat,
    plan_table,
)
from moe_lightning.surgery import build
from tests.models import tiny_config
from tests.packed import EDITS, FORMATS


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    with torch.device("meta"):
        return architecture_of(model := build(tiny_config())).shape(model)


SIZES = [(1, 1, 8), (3, 5, 96), (2, 7, 48), (0, 4, 16), (6, 96, 32), (2, 3, 40), (1, 4, 1000)]


def tensor_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@pytest.mark.parametrize("name", FORMATS)
def test_stored_bytes_are_those_of_the_tensors(name: str) -> None:
    for size, dtype in itertools.product(SIZES, (torch.float32, torch.bfloat16, torch.float64)):
        format = FORMATS[name]
        if format.quantized and format.group_size == 16 and size[2] % 16:
            format = WeightFormat(**{**format.to_dict(), "group_size": 8})
        stack = WeightStack.empty(format, *size, dtype=dtype)
        assert stack.format.kind == format.kind == type(stack).kind
        assert tensor_bytes(stack.stored_tensors()) == format.stored_bytes(*size, dtype.itemsize)
        assert tensor_bytes(stack.state_dict()) == format.stored_bytes(*size, dtype.itemsize)
        assert stack.num_weights == size[0] * size[1] * size[2]


@pytest.mark.parametrize("inputs", [1, 3, 7, 8, 9, 13, 129])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_odd_sizes_take_whole_words(inputs: int, bits: int, symmetric: bool) -> None:
    for group, groups in ((1, inputs), ("channel", 1)):
        format = WeightFormat(bits, group, symmetric)  # type: ignore[arg-type]
        codes = 4 * ((inputs + 7) // 8) if bits == 4 else inputs
        zeros = 0 if symmetric else (groups + 1) // 2 if bits == 4 else groups
        assert format.stored_bytes(3, 5, inputs, 4) == 15 * (codes + 2 * groups + zeros)
        assert tensor_bytes(WeightStack.empty(format, 3, 5, inputs).state_dict()) == format.stored_bytes(
            3, 5, inputs, 4
        )


def test_bytes_by_hand() -> None:
    """Of 16 bits a weight: 4.16 by int4 in groups of 128, 8.19 by int8, 9 by 2:4, 13 by 1:4, 9 by half zeros."""
    bits = {
        WeightFormat(4, 128): 4 + (16 + 4) / 128,
        WeightFormat(4, 128, symmetric=True): 4 + 16 / 128,
        WeightFormat(4, 32): 4 + (16 + 4) / 32,
        WeightFormat(8, 128): 8 + (16 + 8) / 128,
        WeightFormat(pattern="2:4"): 8 + 1,
        WeightFormat(pattern="4:8"): 8 + 1,
        WeightFormat(pattern="1:4"): 12 + 1,
        WeightFormat(sparsity=0.5): 8 + 1,
        WeightFormat(sparsity=0.75, scope="matrix"): 4 + 1,
        WeightFormat(4, 128, pattern="2:4"): 4 + (16 + 4) / 128,
    }
    for format, expected in bits.items():
        assert 8 * format.stored_bytes(8, 28672, 4096, 2) == 8 * 28672 * 4096 * expected, format


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.625, 0.999])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 7), (3, 50), (4, 64)])
def test_kept_weights_of_a_sparsity(sparsity: float, outputs: int, inputs: int) -> None:
    """Halves go away from zero: 0.29 of 50 are 14.5 weights, so 15 zeros."""
    from decimal import ROUND_HALF_UP, Decimal

    def zeros(count: int) -> int:
        return int((Decimal(str(sparsity)) * count).quantize(Decimal(1), ROUND_HALF_UP))

    assert WeightFormat(sparsity=sparsity).kept(outputs, inputs) == outputs * (inputs - zeros(inputs))
    matrix = WeightFormat(sparsity=sparsity, scope="matrix").kept(outputs, inputs)
    assert matrix == outputs * inputs - zeros(outputs * inputs)


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({"bits": 3}, (4, 128), "bits must be 4 or 8, got 3"),
        ({"bits": 4, "group_size": 96}, (4, 128), "group_size 96 does not divide the input size 128.*'auto'"),
        ({"bits": 4, "group_size": 0}, (4, 128), "group_size 0 does not divide"),
        ({"bits": 4, "group_size": -8}, (4, 128), "group_size -8 does not divide"),
        ({"bits": 4, "group_size": "rows"}, (4, 128), "group_size rows does not divide"),
        ({"bits": 8, "group_size": "auto"}, (4, 48), "none of 128, 64, 32 divides the input size 48.*'channel'"),
        ({"pattern": "3:4"}, (4, 8), "pattern '3:4' is none of 2:4, 4:8, 1:4"),
        ({"pattern": "2:4"}, (4, 6), "pattern 2:4 needs an input size divisible by 4, got 6"),
        ({"pattern": "4:8"}, (4, 12), "pattern 4:8 needs an input size divisible by 8, got 12"),
        ({"sparsity": 1.0}, (4, 8), "sparsity is the share of zeros.*got 1.0"),
        ({"sparsity": -0.1}, (4, 8), "sparsity is the share of zeros"),
        ({"sparsity": float("nan")}, (4, 8), "sparsity is the share of zeros"),
        ({"sparsity": 0.5, "scope": "column"}, (4, 8), "scope 'column' is none of row, matrix"),
        ({}, (4, 8), "a format needs bits, a sparsity or a pattern"),
    ],
)
def test_formats_that_cannot_be_are_an_error(options: dict[str, Any], size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightFormat(**options).check(*size)
    with pytest.raises(ValueError, match=message):
        WeightStack.empty(WeightFormat(**options), 1, *size)


def test_auto_takes_the_first_group_that_divides() -> None:
    groups = [WeightFormat(4, "auto").group_of(inputs) for inputs in (4096, 192, 96, 128, 64, 32)]
    assert groups == [128, 64, 32, 128, 64, 32]


def test_formats_read_well() -> None:
    assert str(WeightFormat(4, 128)) == "int4, group 128, asymmetric"
    assert str(WeightFormat(8, "channel", symmetric=True, pattern="2:4")) == "int8, a scale a row, symmetric, 2:4"
    assert str(WeightFormat(sparsity=1 / 3)) == "0.3333 zeros"


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ((Quantize(0),), r"layer 0: cannot quantise gate_up_proj \[96, 32\]: group_size 128 does not divide.* 32"),
        ((Quantize(1, group_size=32),), r"layer 1: cannot quantise down_proj \[32, 48\]: group_size 32 does not"),
        ((Quantize(2, "attention"),), r"layer 2: cannot quantise q_proj \[32, 32\]: group_size 128"),
        ((Quantize(0, bits=5, group_size=16),), "layer 0.*bits must be 4 or 8, got 5"),
        (
            (Quantize(0, group_size=16), Quantize(0, bits=8, group_size=16)),
            "layer 0: cannot quantise the experts again",
        ),
        (
            (Quantize(0, group_size=16), Sparsify(0, sparsity=0.5)),
            "layer 0: cannot prune the experts again.*int4.*before",
        ),
        (
            (Quantize(0, "attention", group_size=16), Sparsify(0, "attention", pattern="2:4")),
            "layer 0: cannot prune the attention again",
        ),
        (
            (Sparsify(0, sparsity=0.5), Sparsify(0, sparsity=0.5)),
            "layer 0.*stored as 0.5 zeros already: ask for more zeros",
        ),
        ((Sparsify(0),), "layer 0: give either a sparsity or a pattern"),
        ((Sparsify(0, sparsity=0.5, pattern="2:4"),), "layer 0: give either a sparsity or a pattern"),
        ((Sparsify(0, sparsity=50),), r"layer 0: cannot prune gate_up_proj.*share of zeros.*50"),
        ((Sparsify(3, "attention", sparsity=0.5),), r"layer 3 is not a decoder layer.*\[0, 1, 2\]"),
        ((Sparsify(3, sparsity=0.5),), r"layer 3 is not an MoE layer.*\[0, 1, 2\]"),
        ((DropMoE(1), Quantize(1, group_size=16)), r"layer 1 is not an MoE layer of this model"),
        ((DropBlock(1), Quantize(1, "attention", group_size=16)), "layer 1 is not a decoder layer"),
        ((NoviceExperts(1, tuple(range(6))), Sparsify(1, pattern="2:4")), "layer 1 has no real expert to prune"),
        (
            (Quantize(0, group_size=16), KeepChannels(0, 24)),
            "layer 0: cannot take channels.*int4.*put ChannelDrop before",
        ),
        ((Sparsify(0, pattern="2:4"), MergeExperts(0, ((0, 1, 2), (3, 4, 5)))), "cannot merge.*2:4.*put Merge before"),
        ((KeepChannels(0, 40), Quantize(0, group_size=16)), r"layer 0: cannot quantise down_proj \[32, 40\]"),
    ],
)
def test_edits_that_do_not_fit_are_an_error(shape: ModelShape, edits: tuple[Edit, ...], message: str) -> None:
    CompressionPlan(edits[:-1]).check(shape)
    with pytest.raises(ValueError, match=message):
        CompressionPlan(edits).check(shape)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("target", "router", "target must be 'experts' or 'attention', not 'router'"),
        ("pattern", 124, "pattern must be such as '2:4', in quotes, not 124"),
        ("sparsity", "half", "sparsity must be a share of zeros"),
        ("sparsity", True, "sparsity must be a share of zeros"),
        ("method", 3, "method must be a name"),
    ],
)
def test_fields_of_another_type_are_an_error(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Edit.from_dict({"kind": "sparsify", "layer": 0, field: value})


@pytest.mark.parametrize("value", ["rows", None, 4.5])
def test_group_sizes_of_another_type_are_an_error(value: object) -> None:
    with pytest.raises(ValueError, match="group_size must be a number, 'channel' or 'auto'"):
        Edit.from_dict({"kind": "quantize", "layer": 0, "group_size": value})


def test_integers_remember_the_zeros_among_them(shape: ModelShape) -> None:
    plan = CompressionPlan((Sparsify(0, pattern="2:4"), Quantize(0, group_size=16), Sparsify(1, sparsity=0.3)))
    after = plan.check(shape)
    assert after.layout(0).format == WeightFormat(4, 16, pattern="2:4")
    assert after.layout(1).format == WeightFormat(sparsity=0.3)
    assert after.layout(2).format is None
    # More zeros may follow, as in a gradual schedule.
    assert plan.extended([Sparsify(1, sparsity=0.6)]).check(shape).layout(1).format == WeightFormat(sparsity=0.6)


@pytest.mark.parametrize("name", EDITS)
def test_written_and_read(shape: ModelShape, name: str) -> None:
    plan = CompressionPlan(EDITS[name])
    again = CompressionPlan.from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan)
    after = plan.check(shape)
    assert ModelShape.from_dict(json.loads(json.dumps(after.to_dict()))) == after
    assert after.uncompressed() == shape
    assert after.parameters == shape.parameters  # a weight of 4 bits is a parameter, and so is a zero
    assert after.bytes < shape.bytes


def test_a_shape_written_before_there_were_formats(shape: ModelShape) -> None:
    values = shape.to_dict()
    del values["attention"]
    for layout in values["layouts"]:
        del layout["format"]
    assert ModelShape.from_dict(values) == shape


def test_formats_of_blocks_that_go_go_with_them(shape: ModelShape) -> None:
    plan = CompressionPlan((*EDITS["everything"], DropBlock(1), DropMoE(2)))
    after = plan.check(shape)
    assert [block for block, _ in after.attention] == [0, 2]
    assert [layout.layer for layout in after.layouts] == [0]
    int8, int4 = WeightFormat(8, 16), WeightFormat(4, 16)
    one = sum(int8.stored_bytes(1, *size, 4) for size in after.attention_sizes.values())
    experts = sum(int4.stored_bytes(6, *size, 4) for size in after.expert_sizes(after.layout(0)).values())
    plain = 2 * 64 * 32 + 32 + 2 * 32 + (6 * 32 + 32)  # embedding and head, norms, one router
    assert after.bytes == 2 * one + experts + 4 * plain


def test_bytes_of_experts_that_are_left(shape: ModelShape) -> None:
    edits = (Sparsify(0, pattern="2:4"), NoviceExperts(0, (1, 2)), KeepExperts(0, (0, 1, 3)))
    after = CompressionPlan(edits).check(shape)
    format = after.layout(0).format
    assert format is not None
    dense = 4 * 2 * 3 * 32 * 48
    packed = sum(format.stored_bytes(2, *size, 4) for size in after.expert_sizes(after.layout(0)).values())
    assert after.bytes == 4 * after.parameters - dense + packed


def test_the_table_names_formats(shape: ModelShape) -> None:
    plan = CompressionPlan((*EDITS["attention 2:4 and unstructured"], Quantize(0, group_size=16), DropMoE(2)))
    table = plan_table(plan, plan.check(shape))
    assert "Attention of layers 0: 2:4" in table and "Attention of layers 1: 0.3 zeros" in table
    assert "| 0 | 0 1 2 3 4 5 (int4, group 16, asymmetric) | - | - |" in table
    assert "| 1 | 0 1 2 3 4 5 | - | - |" in table


def test_pruned_weights_do_not_come_back(shape: ModelShape) -> None:
    pruned = Sparsify(0, sparsity=0.5).apply(shape)
    with pytest.raises(ValueError, match=r"layer 0: 0\.3 zeros asks for fewer zeros than there are in its experts"):
        Sparsify(0, sparsity=0.3).apply(pruned)
    with pytest.raises(ValueError, match="ask for more"):
        Sparsify(0, pattern="1:4").apply(pruned)
    Sparsify(0, sparsity=0.6).apply(pruned)
    quantized = Quantize(0, group_size="channel").apply(pruned).layout(0).format
    assert quantized is not None and quantized.sparsity == 0.5
