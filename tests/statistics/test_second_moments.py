"""Second moments against explicit token matrices that were recorded on the untouched eager model."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.statistics.second_moments import (
    NUM_FOLDS,
    PADDING,
    FoldMoments,
    SecondMoments,
    iterate_second_moments,
    second_moment_bytes,
    split_folds,
)
from tests.models import random_batches
from tests.reference import record, untouched

HIDDEN, LAYERS, EXPERTS = 32, 3, 6
EVERY_EXPERT = {layer: range(EXPERTS) for layer in range(LAYERS)}


@pytest.fixture(scope="module")
def model() -> Any:
    return untouched()


def inputs_of(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> list[np.ndarray]:
    """Return the inputs of every layer's experts, ``[tokens, H]``, padding included."""
    seen: dict[int, list[Tensor]] = {}
    handles = [
        layer.mlp.experts.register_forward_pre_hook(
            lambda _module, args, number=number: seen.setdefault(number, []).append(args[0].detach())
        )
        for number, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return [torch.cat(seen[number]).numpy() for number in sorted(seen)]


def measure(model: Any, batches: Any, wanted: Any = None, **options: Any) -> dict[tuple[int, int], SecondMoments]:
    moments: dict[tuple[int, int], SecondMoments] = {}
    for group in iterate_second_moments(model, batches, wanted or EVERY_EXPERT, progress=False, **options):
        assert not moments.keys() & group.keys()
        moments.update(group)
    return moments


def by_hand(x: np.ndarray, y: np.ndarray, gate: np.ndarray, tokens: int) -> dict[str, np.ndarray]:
    root = gate[:, None] * x
    return {
        "tokens": np.array(float(tokens)),
        "count": np.array(float(len(gate))),
        "gate2": (gate**2).sum(),
        "gate2_input": (gate[:, None] ** 2 * x).sum(0),
        "gate2_output": (gate[:, None] ** 2 * y).sum(0),
        "gate2_input_square": root.T @ root,
        "gate2_cross": root.T @ (gate[:, None] * y),
        "gate2_norm_square": (gate**2 * (y**2).sum(1)).sum(),
    }


def assert_moments(got: SecondMoments, expected: Sequence[dict[str, np.ndarray]]) -> None:
    for sums, want in zip(got, expected, strict=True):
        for name, value in want.items():
            array = getattr(sums, name).numpy()
            assert array.dtype == np.float64
            assert array.shape == value.shape
            np.testing.assert_allclose(array, value, rtol=1e-9, atol=1e-11 * max(1.0, np.abs(value).max()))


def assert_same(got: Mapping, expected: Mapping) -> None:
    assert got.keys() == expected.keys()
    for pair, folded in got.items():
        assert_moments(folded, [{name: value.numpy() for name, value in vars(sums).items()} for sums in expected[pair]])


def padded(sequences: Sequence[Tensor], length: int, filler: int) -> dict[str, Tensor]:
    ids = torch.full((len(sequences), length), filler)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def sequences() -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (length,), generator=draw) for length in (1, 9, 4, 12, 7, 2, 10, 6, 5)]


def alone(sequences: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    return [{"input_ids": sequence[None]} for sequence in sequences]


def test_every_sum_of_every_fold_equals_explicit_token_matrices(model: Any, sequences: list[Tensor]) -> None:
    batches = alone(sequences)
    fold = torch.cat([fold.reshape(-1) for fold in split_folds(batches)]).numpy()
    layers, inputs = record(model, batches), inputs_of(model, batches)
    got = measure(model, batches)
    assert list(got) == [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    for (layer, expert), folded in got.items():
        seen, expected = layers[layer], []
        for number in range(NUM_FOLDS):
            here = seen.chosen[:, expert] & (fold == number)
            expected.append(
                by_hand(
                    inputs[layer][here],
                    seen.output[here, expert],
                    seen.gate[here, expert],
                    int((fold == number).sum()),
                )
            )
        assert_moments(folded, expected)


@pytest.mark.parametrize("experts_at_once", [1, 4, 7])
def test_several_passes_give_what_one_gives(model: Any, sequences: list[Tensor], experts_at_once: int) -> None:
    batches = alone(sequences)
    most = experts_at_once * second_moment_bytes(HIDDEN, 1)
    sizes = [
        len(group) for group in iterate_second_moments(model, batches, EVERY_EXPERT, progress=False, max_bytes=most + 8)
    ]
    assert max(sizes) == experts_at_once
    assert sum(sizes) == LAYERS * EXPERTS
    assert_same(measure(model, batches, max_bytes=most), measure(model, batches))


def test_not_even_one_expert_fits_goes_on_one_by_one(model: Any, sequences: list[Tensor]) -> None:
    groups = iterate_second_moments(model, alone(sequences), {1: [2, 0]}, progress=False, max_bytes=1)
    assert [list(group) for group in groups] == [[(1, 0)], [(1, 2)]]


def test_neither_batches_nor_padding_matter(model: Any, sequences: list[Tensor]) -> None:
    expected = measure(model, alone(sequences))
    for filler in (5, 40):
        batches = [padded(sequences[:4], 12, filler), padded(sequences[4:], 14, filler)]
        assert_same(measure(model, batches), expected)
    nothing = padded([sequences[0][:0]], 3, 5)
    assert_same(measure(model, [nothing, *alone(sequences), nothing]), expected)


def test_the_order_matters_to_the_folds_only(model: Any, sequences: list[Tensor]) -> None:
    def total(batches: list[dict[str, Tensor]]) -> dict:
        return {pair: (FoldMoments.total(folded),) for pair, folded in measure(model, batches).items()}

    assert_same(total(alone(sequences[::-1])), total(alone(sequences)))


def test_batches_may_come_from_a_generator(model: Any, sequences: list[Tensor]) -> None:
    batches = alone(sequences)
    one_expert = second_moment_bytes(HIDDEN, 1)
    got = measure(model, (batch for batch in batches), {0: [1, 2], 2: [0]}, max_bytes=one_expert)
    assert_same(got, {pair: folded for pair, folded in measure(model, batches).items() if pair in got})


def test_folds_are_sections_of_the_pass() -> None:
    folds = torch.cat([fold.reshape(-1) for fold in split_folds(random_batches(5, 4, 6))])
    assert folds.tolist() == [0] * 30 + [1] * 30 + [2] * 30 + [3] * 30


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((8,), [[0, 0, 1, 1, 2, 2, 3, 3]]),
        ((2, 3, 1), [[0, 0], [1, 2, 2], [3]]),
        ((0, 3), [[], [0, 1, 2]]),
        ((0,), [[]]),
    ],
)
def test_folds_of_few_tokens(lengths: tuple[int, ...], expected: list[list[int]]) -> None:
    batches = [padded([torch.arange(length) + 7], 9, 5) for length in lengths]
    for fold, want in zip(split_folds(batches), expected, strict=True):
        assert fold.tolist() == [want + [PADDING] * (9 - len(want))]


def test_nothing_after_the_last_wanted_layer_runs(model: Any, sequences: list[Tensor]) -> None:
    ran = []
    handles = [
        layer.mlp.experts.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(model.model.layers)
    ]
    try:
        measure(model, alone(sequences[:5]), {0: [1], 1: [0]})
    finally:
        for handle in handles:
            handle.remove()
    # The experts of layer 1 themselves are not needed any more: theirs is computed for the wanted ones only.
    assert set(ran) == {0}


def test_the_model_is_left_as_it_was(model: Any, sequences: list[Tensor]) -> None:
    batches = alone(sequences[:4])
    before = model(**batches[1]).logits
    model.train()
    try:
        measure(model, batches, {0: [1]})
        assert all(module.training for module in model.modules())
        with pytest.raises(IndexError):
            measure(model, [*batches, {"input_ids": torch.full((1, 3), 10**6)}], {0: [1]})
        assert all(module.training for module in model.modules())
    finally:
        model.eval()
    assert torch.equal(model(**batches[1]).logits, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_compressed_model_has_its_real_experts_only(model: Any, sequences: list[Tensor]) -> None:
    batches = alone(sequences)
    compressed = copy.deepcopy(model)
    ml.compress(compressed, batches, [ml.ExpertDrop(keep=5), ml.Novices(keep=3)], progress=False)
    shape = architecture_of(compressed).shape(compressed)
    layout = shape.layouts[0]
    # Up to the first layer's input nothing was changed, and Mixtral's router renormalises over the experts left.
    gone = [expert for expert in range(EXPERTS) if expert not in layout.router]
    layers = record(model, batches, dropped={0: gone})
    fold = torch.cat([fold.reshape(-1) for fold in split_folds(batches)]).numpy()
    inputs = inputs_of(model, batches)[0]
    for (_, expert), folded in measure(compressed, batches, {0: layout.real}).items():
        expected = []
        for number in range(NUM_FOLDS):
            here = layers[0].chosen[:, expert] & (fold == number)
            seen = (inputs[here], layers[0].output[here, expert], layers[0].gate[here, expert])
            expected.append(by_hand(*seen, int((fold == number).sum())))
        assert_moments(folded, expected)
    with pytest.raises(ValueError, match="layer 0 has no real expert"):
        measure(compressed, batches, {0: layout.novices[:1]})


def test_narrow_experts_with_a_bias_and_layers_that_are_gone(model: Any) -> None:
    batches = random_batches(4, 2, 11)
    compressed = copy.deepcopy(model)
    ml.compress(compressed, batches, [ml.ChannelDrop(ratio=0.4), ml.LayerDrop(count=1)], progress=False)
    shape = architecture_of(compressed).shape(compressed)
    assert len(shape.layouts) == LAYERS - 1
    wanted = {layout.layer: layout.real for layout in shape.layouts}
    # Another way to the same sums: the observer of the streamed statistics.
    statistics = ml.collect(compressed, batches, {"routing", "outputs"}, progress=False)
    for (layer, expert), folded in measure(compressed, batches, wanted).items():
        sums, at = FoldMoments.total(folded), (statistics.row(layer), expert)
        for mine, other in (
            ("count", "count"),
            ("gate2", "gate_square_sum"),
            ("gate2_output", "gate2_output_sum"),
            ("gate2_norm_square", "gate2_norm_square_sum"),
        ):
            torch.testing.assert_close(getattr(sums, mine), statistics[other][at], rtol=1e-9, atol=1e-12)


def test_merged_experts_are_one_with_the_sum_of_their_weights(model: Any) -> None:
    batches = random_batches(4, 2, 11)
    compressed = copy.deepcopy(model)
    ml.compress(compressed, batches, ml.Merge(keep=2), progress=False)
    layer = architecture_of(compressed).moe_layers(compressed)[0]
    layout = architecture_of(compressed).shape(compressed).layouts[0]
    seen: list[tuple[Tensor, ...]] = []
    hook = layer.experts.register_forward_pre_hook(lambda _module, args: seen.append(args))
    with torch.no_grad():
        for batch in batches:
            compressed(**batch)
    hook.remove()
    x, index, weight = (torch.cat(parts) for parts in zip(*seen, strict=True))
    opened = architecture_of(compressed).open_experts(layer)
    for slot, owner in enumerate(layout.real):
        group = [row for row, at in enumerate(opened.slot_map.tolist()) if at == slot]
        gate = sum((weight.double() * (index == row)).sum(1) for row in group)
        (folded,) = measure(compressed, batches, {0: [owner]}).values()
        here = (gate > 0).nonzero().squeeze(-1)
        gate_half, up_half = (x[here] @ opened.gate_up_proj[slot].T).chunk(2, dim=-1)
        outputs = (silu(gate_half) * up_half) @ opened.down_proj[slot].T
        expected = by_hand(x[here].numpy(), outputs.detach().numpy(), gate[here].numpy(), len(index))
        assert_moments((FoldMoments.total(folded),), [expected])
    assert layout.merged


def test_bytes_are_those_of_the_sums(model: Any, sequences: list[Tensor]) -> None:
    (folded,) = measure(model, alone(sequences), {2: [4]}).values()
    held = sum(tensor.numel() * tensor.element_size() for sums in folded for tensor in vars(sums).values())
    assert held == second_moment_bytes(HIDDEN, 1)
    # A Mixtral expert takes 1 GiB.
    assert second_moment_bytes(4096, 1) == 2**30 + 4 * 8 * (2 * 4096 + 4)


def test_errors_name_what_is_wrong(model: Any, sequences: list[Tensor]) -> None:
    batches = alone(sequences[:2])
    with pytest.raises(ValueError, match=r"layer 1 has no real expert 6: choose from \[0, 1"):
        measure(model, batches, {1: [6]})
    with pytest.raises(ValueError, match="no real expert 0"):
        measure(model, batches, {3: [0]})
    with pytest.raises(ValueError, match="no token outside the padding"):
        measure(model, [padded([sequences[0][:0]], 3, 5)], {0: [0]})
    with pytest.raises(ValueError, match="no token outside the padding"):
        measure(model, [], {0: [0]})
    broken = copy.deepcopy(model)
    broken.model.layers[1].mlp.experts.down_proj.data[2] = torch.inf
    with pytest.raises(ValueError, match="expert 2 in layer 1 are not finite"):
        measure(broken, alone(sequences), {1: [2]})
