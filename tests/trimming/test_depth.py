"""Layer Drop, Block Drop and Angular: what goes, and that nothing else changes.

References are hooks on the untouched transformers model, and numpy on the hidden states that they saw.
"""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.plan import CompressionPlan, DropBlock, DropMoE
from moe_lightning.statistics import Statistics
from moe_lightning.surgery import build
from moe_lightning.trimming.angular import Angular
from moe_lightning.trimming.block_drop import BlockDrop
from moe_lightning.trimming.layer_drop import LayerDrop
from tests.models import random_batches, tiny_mixtral
from tests.reference import untouched

LAYERS = 5
BATCHES = random_batches(3, 2, 11)
INPUTS = random_batches(1, 2, 9, seed=5)[0]["input_ids"]


def padded(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Give every batch a mask: a short sequence padded on the left in one, on the right in the next."""
    result = []
    for number, batch in enumerate(batches):
        mask = torch.ones_like(batch["input_ids"])
        mask[0, slice(0, 4) if number % 2 else slice(-3, None)] = 0
        result.append({**batch, "attention_mask": mask})
    return result


def compress(model: Any, methods: Any, batches: Any = BATCHES, **options: Any) -> ml.CompressionResult:
    return ml.compress(model, batches, methods, progress=False, **options)


def logits(model: Any, inputs: Tensor = INPUTS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=inputs).logits


# What the methods rank by, in numpy.


class Seen(NamedTuple):
    """Tokens of all batches without padding, ``[T, H]``, and which of them are the last of their sequence."""

    states: list[np.ndarray]
    """Input of every block, then the output of the last."""
    middles: list[np.ndarray]
    """Residual stream of every block after attention."""
    last: np.ndarray


def seen(model: Any, batches: list[dict[str, Tensor]]) -> Seen:
    layers = list(model.model.layers)
    states: list[list[np.ndarray]] = [[] for _ in range(len(layers) + 1)]
    middles: list[list[np.ndarray]] = [[] for _ in layers]
    last, handles, keep = [], [], np.array([])

    def store(target: list[np.ndarray], tensor: Tensor) -> None:
        target.append(tensor.detach().double().reshape(-1, tensor.shape[-1]).numpy()[keep])

    for number, layer in enumerate(layers):
        handles += [
            layer.register_forward_pre_hook(lambda m, args, number=number: store(states[number], args[0])),
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda m, args, number=number: store(middles[number], args[0])
            ),
        ]
    handles.append(layers[-1].register_forward_hook(lambda m, args, out: store(states[-1], out)))
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).numpy().astype(bool)
        keep = mask.reshape(-1)
        final = np.zeros_like(mask)
        for row in range(len(mask)):
            final[row, np.flatnonzero(mask[row])[-1]] = True
        last.append(final.reshape(-1)[keep])
        with torch.no_grad():
            model(**batch)
    for handle in handles:
        handle.remove()
    return Seen([np.concatenate(s) for s in states], [np.concatenate(s) for s in middles], np.concatenate(last))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


def angle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.arccos(np.clip(cosine(a, b), -1, 1)) / np.pi


def model_with(layers: int = LAYERS, seed: int = 0, **changes: Any) -> Any:
    """Return a model whose blocks, and MoE layers, differ in how much they add."""
    # transformers' eager attention gives NaN for padding on the left in float64.
    model = untouched(seed=seed, num_hidden_layers=layers, attn_implementation="sdpa", **changes)
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.experts.down_proj):
                weight *= generator.uniform(0.1, 3.0)
    return model


@functools.cache
def measured(seed: int, with_padding: bool) -> tuple[Statistics, Seen]:
    batches = padded(BATCHES) if with_padding else BATCHES
    model = model_with(seed=seed)
    return ml.collect(model, batches, {"layers", "blocks", "similarity"}, progress=False), seen(model, batches)


def dropped(method: Any, statistics: Statistics) -> list[int]:
    return [edit.layer for edit in method.propose(statistics.shape, statistics)]


BOTH = pytest.mark.parametrize("with_padding", [False, True], ids=["whole", "padded"])


@BOTH
@pytest.mark.parametrize("count", [1, 3])
def test_the_highest_cosines_go(count: int, with_padding: bool) -> None:
    for seed in range(3):
        statistics, (states, middles, _) = measured(seed, with_padding)
        layers = [cosine(middles[n], states[n + 1]).mean() for n in range(LAYERS)]
        blocks = [cosine(states[n], states[n + 1]).mean() for n in range(LAYERS)]
        assert np.argsort(layers).tolist() != np.argsort(blocks).tolist(), "the two scores say the same"
        assert dropped(LayerDrop(count=count), statistics) == sorted(np.argsort(layers)[::-1][:count])
        assert dropped(BlockDrop(count=count), statistics) == sorted(np.argsort(blocks)[::-1][:count])


@BOTH
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_best_run_of_blocks_goes(count: int, with_padding: bool) -> None:
    """The gap is the length of the run, and the run may end with the last block."""
    starts = set()
    for seed in range(4):
        statistics, (states, _, last) = measured(seed, with_padding)
        pairs = [(states[i], states[i + count]) for i in range(LAYERS - count + 1)]
        wanted = (
            (BlockDrop(count=count, mode="consecutive"), np.argmax([cosine(a, b).mean() for a, b in pairs])),
            (Angular(count=count, tokens="all"), np.argmin([angle(a, b).mean() for a, b in pairs])),
            (Angular(count=count), np.argmin([angle(a[last], b[last]).mean() for a, b in pairs])),
        )
        for method, start in wanted:
            assert dropped(method, statistics) == list(range(start, start + count))
            starts.add(int(start))
    assert len(starts) > 1, "always the same run: the test shows little"


# Statistics made by hand: ties, reach of the range, budgets.


def by_hand(layers: int, **tensors: list[Any]) -> Statistics:
    shape = architecture_of(tiny_mixtral()).shape_of_config(tiny_mixtral(num_hidden_layers=layers).config)
    return Statistics(shape, {name: torch.tensor(values, dtype=torch.float64) for name, values in tensors.items()})


@pytest.mark.parametrize(("count", "wanted"), [(0, []), (1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3])])
def test_of_equal_cosines_the_first_goes(count: int, wanted: list[int]) -> None:
    layers = by_hand(4, moe_cosine_sum=[2.0, 3.0, 1.0, 3.0], moe_tokens=[4.0] * 4)
    assert dropped(LayerDrop(count=count), layers) == wanted
    if count < 4:
        blocks = by_hand(4, block_cosine_sum=[2.0, 3.0, 1.0, 3.0], block_tokens=[4.0] * 4)
        assert dropped(BlockDrop(count=count), blocks) == wanted


def test_means_count_not_sums() -> None:
    """A layer that saw more tokens is not more similar for that."""
    statistics = by_hand(3, moe_cosine_sum=[8.0, 3.0, 1.0], moe_tokens=[16.0, 4.0, 4.0])
    assert dropped(LayerDrop(count=1), statistics) == [1]


@pytest.mark.parametrize("best", [0, 1, 2])
def test_a_run_may_start_with_the_first_and_end_with_the_last_block(best: int) -> None:
    cosines = np.full((5, 5), 0.5)
    cosines[best, best + 2] = 0.9
    cosines[0, 3] = cosines[1, 4] = 0.99  # three blocks apart: not asked for
    counts = {"similarity_tokens": [1.0], "similarity_sequences": [1.0]}
    statistics = by_hand(
        4,
        hidden_cosine_sum=cosines.tolist(),
        hidden_angle_sum=(1 - cosines).tolist(),
        hidden_last_angle_sum=(1 - cosines).tolist(),
        **counts,
    )
    for method in (BlockDrop(count=2, mode="consecutive"), Angular(count=2), Angular(count=2, tokens="all")):
        assert dropped(method, statistics) == [best, best + 1]


def test_of_equal_runs_the_first_goes() -> None:
    same = np.full((4, 4), 0.5).tolist()
    statistics = by_hand(
        3,
        hidden_cosine_sum=same,
        hidden_last_angle_sum=same,
        similarity_tokens=[1.0],
        similarity_sequences=[1.0],
    )
    assert dropped(BlockDrop(count=2, mode="consecutive"), statistics) == [0, 1]
    assert dropped(Angular(count=2), statistics) == [0, 1]


@pytest.mark.parametrize("kind", [LayerDrop, BlockDrop, Angular])
@pytest.mark.parametrize("name", ["parameters", "bytes"])
def test_a_target_drops_as_few_as_meet_it(kind: Any, name: str) -> None:
    statistics, _ = measured(0, False)
    shape = statistics.shape
    for count in range(LAYERS):
        after = CompressionPlan(kind(count=count).propose(shape, statistics)).check(shape)
        for slack in (0, 1):
            edits = kind(**{name: getattr(after, name) + slack}).propose(shape, statistics)
            assert len(edits) == count
        if count:
            fewer = kind(**{name: getattr(after, name) - 1}).propose(shape, statistics) if count < LAYERS - 1 else None
            assert fewer is None or len(fewer) == count + 1
    assert kind(**{name: 10 * getattr(shape, name)}).propose(shape, statistics) == ()


def test_ratios_round_halves_up() -> None:
    statistics = by_hand(5, moe_cosine_sum=[1.0] * 5, moe_tokens=[4.0] * 5)
    assert [len(dropped(LayerDrop(ratio=ratio), statistics)) for ratio in (0.0, 0.09, 0.1, 0.5, 1.0)] == [0, 0, 1, 3, 5]


# What the smaller model computes.


@contextmanager
def emulated_depth(model: Any, silent: list[int], skipped: list[int]) -> Iterator[None]:
    """Force the MoE output of some layers of an untouched model to zero; let others return their input."""
    handles = [
        model.model.layers[number].mlp.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
        for number in silent
    ]
    handles += [model.model.layers[number].register_forward_hook(lambda m, args, out: args[0]) for number in skipped]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fixed(silent: list[int], skipped: list[int]) -> CompressionPlan:
    return CompressionPlan((*(DropMoE(n) for n in silent), *(DropBlock(n) for n in skipped)))


DEPTHS = [
    ([0], []),
    ([1, 3], []),
    ([0, 1, 2, 3, 4], []),
    ([], [0]),
    ([], [4]),
    ([], [1, 2]),
    ([], [0, 1, 2, 3]),
    ([0, 4], [1]),
    ([2], [2, 3]),
]


@pytest.mark.parametrize(("silent", "skipped"), DEPTHS)
def test_equals_the_untouched_model_without_what_went(silent: list[int], skipped: list[int]) -> None:
    original = model_with()
    model = copy.deepcopy(original)
    compress(model, None, plan=fixed(silent, skipped))
    with emulated_depth(original, silent, skipped):
        expected = logits(original)
    assert (logits(original) - expected).abs().max() > 1e-3, "nothing was removed"
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "method", [LayerDrop(count=2), BlockDrop(count=2), BlockDrop(count=2, mode="consecutive"), Angular(count=2)]
)
def test_the_methods_do_what_they_decide(method: Any) -> None:
    original = model_with(seed=2)
    model = copy.deepcopy(original)
    numbers = [edit.layer for edit in compress(model, method).plan.edits]
    assert len(numbers) == 2
    silent, skipped = (numbers, []) if isinstance(method, LayerDrop) else ([], numbers)
    with emulated_depth(original, silent, skipped):
        torch.testing.assert_close(logits(model), logits(original), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("silent", "skipped"), DEPTHS)
def test_greedy_generation_with_a_cache_equals_that_without(silent: list[int], skipped: list[int]) -> None:
    model = model_with()
    model.generation_config.eos_token_id = None
    compress(model, None, plan=fixed(silent, skipped))
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(LAYERS - len(skipped)))
    assert model.config.num_hidden_layers == LAYERS - len(skipped)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    cached = model.generate(INPUTS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(INPUTS, use_cache=False, **options))
    # Step by step: one token at a time through the cache, each time with the logits of the whole text so far.
    cache, text = None, INPUTS
    with torch.no_grad():
        for _ in range(8):
            step = text if cache is None else text[:, -1:]
            output = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            torch.testing.assert_close(output.logits[:, -1], logits(model, text)[:, -1], rtol=0, atol=1e-10)
            text = torch.cat([text, output.logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(text, cached)
    assert cache is not None and len(cache) == LAYERS - len(skipped)


@pytest.mark.parametrize("file_format", ["native", "auto"])
@pytest.mark.parametrize(("silent", "skipped"), [([1, 3], []), ([], [0]), ([], [0, 1, 2, 3]), ([0, 4], [1])])
def test_saved_and_loaded(silent: list[int], skipped: list[int], file_format: Any, tmp_path: Any) -> None:
    model = tiny_mixtral(num_hidden_layers=LAYERS)
    compress(model, None, plan=fixed(silent, skipped))
    ml.save_pretrained(model, tmp_path, format=file_format)
    loaded = ml.from_pretrained(tmp_path)
    if file_format == "native":
        assert type(loaded) is type(model)
        assert architecture_of(loaded).shape(loaded) == architecture_of(model).shape(model)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    # Tensors of a file may be aligned otherwise in memory, which changes the last bit of a product.
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    inputs = INPUTS[:, :3]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(loaded.generate(inputs, **options), model.generate(inputs, use_cache=False, **options))


@pytest.mark.parametrize("method", [LayerDrop(count=0), BlockDrop(ratio=0.0), Angular(count=0)])
def test_dropping_nothing_changes_nothing(method: Any) -> None:
    model = tiny_mixtral()
    expected, before = logits(model), type(model)
    result = compress(model, method)
    assert type(model) is before and not result.plan.edits
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("methods", [[LayerDrop(count=2)], [BlockDrop(count=2)], [LayerDrop(ratio=1.0)]])
def test_sizes_are_those_counted(methods: Any) -> None:
    model = tiny_mixtral(num_hidden_layers=LAYERS)
    result = compress(model, methods)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert result.shape_after.parameters == result.size_after.parameters == counted
    assert result.touched == result.claimed == result.size_before.parameters - counted > 0


# One after the other: numbers stay those of the original model.


def test_blocks_then_moe_layers() -> None:
    original = model_with(seed=3)
    model = copy.deepcopy(original)
    edits = compress(model, [BlockDrop(count=2), LayerDrop(count=1), BlockDrop(count=1), LayerDrop(count=1)]).plan.edits
    gone = [edit.layer for edit in edits if isinstance(edit, DropBlock)]
    silent = [edit.layer for edit in edits if isinstance(edit, DropMoE)]
    assert len(set(gone)) == 3 and len(set(silent)) == 2
    assert edits[2].layer not in gone[:2], "the second method named a layer that was gone"
    with emulated_depth(original, silent, gone):
        torch.testing.assert_close(logits(model), logits(original), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", [BlockDrop(count=2), BlockDrop(count=2, mode="consecutive"), Angular(count=2)])
def test_runs_are_named_by_the_original_numbers(method: Any) -> None:
    """Blocks 0 and 3 are gone: a run among the others may reach over the gap."""
    original = model_with(seed=5)
    model = copy.deepcopy(original)
    compress(model, None, plan=fixed([], [0, 3]))
    edits = compress(model, method).plan.edits
    gone = [edit.layer for edit in edits]
    assert len(set(gone)) == 4
    with emulated_depth(original, [], gone):
        torch.testing.assert_close(logits(model), logits(original), rtol=0, atol=1e-12)


def test_the_second_method_measures_what_the_first_left() -> None:
    model = model_with(seed=4)
    compress(model, LayerDrop(count=2))
    left = list(architecture_of(model).shape(model).moe_layers)
    original = model_with(seed=4)
    with emulated_depth(original, [n for n in range(LAYERS) if n not in left], []):
        again = seen(original, BATCHES)
    score = {n: cosine(again.middles[n], again.states[n + 1]).mean() for n in left}
    edits = compress(model, LayerDrop(count=1)).plan.edits
    assert edits[2] == DropMoE(max(score, key=score.__getitem__))


def test_an_moe_layer_goes_once() -> None:
    model = tiny_mixtral()
    compress(model, LayerDrop(count=1))
    with pytest.raises(ValueError, match="LayerDrop: count=3 is more than can go: the model has 2 MoE sub-layers"):
        compress(model, LayerDrop(count=3))
    compress(model, LayerDrop(count=2))
    assert architecture_of(model).shape(model).moe_layers == ()
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("layers", [1, 2])
def test_models_of_one_and_two_layers(layers: int) -> None:
    original = model_with(layers)
    model = copy.deepcopy(original)
    compress(model, LayerDrop(ratio=1.0))
    with emulated_depth(original, list(range(layers)), []):
        torch.testing.assert_close(logits(model), logits(original), rtol=0, atol=1e-12)
    for method in (BlockDrop(count=1), BlockDrop(count=1, mode="consecutive"), Angular(count=1)):
        model = copy.deepcopy(original)
        if layers == 1:
            with pytest.raises(ValueError, match=r"count=1 is more than can go: the model has 1 .* at most 0"):
                compress(model, method)
            assert compress(model, type(method)(ratio=0.25)).plan.edits == ()
            continue
        (edit,) = compress(model, method).plan.edits
        with emulated_depth(original, [], [edit.layer]):
            torch.testing.assert_close(logits(model), logits(original), rtol=0, atol=1e-12)


# Bad input.


class Untouchable:
    """Batches that must not be read."""

    def __iter__(self) -> Any:
        raise AssertionError("calibration began before the options were checked")


@pytest.mark.parametrize("kind", [LayerDrop, BlockDrop, Angular])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs exactly one of count, ratio, parameters and bytes: got none"),
        ({"count": 1, "ratio": 0.5}, "needs exactly one.*count=1, ratio=0.5"),
        ({"count": -1}, "count must be a whole number"),
        ({"count": 1.5}, "count must be a whole number"),
        ({"count": True}, "count must be a whole number"),
        ({"ratio": 1.1}, r"ratio must lie in \[0, 1\], got 1.1"),
        ({"ratio": float("nan")}, "ratio must lie"),
        ({"parameters": 0}, "parameters must be more than 0"),
        ({"bytes": -5}, "bytes must be more than 0"),
    ],
)
def test_options_out_of_range(kind: Any, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}.*{message}"):
        kind(**options)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="BlockDrop: unknown mode 'sparse': choose discrete or consecutive"):
        BlockDrop(count=1, mode="sparse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Angular: unknown tokens 'first': choose last or all"):
        Angular(count=1, tokens="first")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LayerDrop(count=4), "LayerDrop: count=4 is more than can go: the model has 3 MoE sub-layers.*at most 3"),
        (BlockDrop(count=3), "BlockDrop: count=3 is more than can go: the model has 3 decoder layers.*at most 2"),
        (BlockDrop(ratio=1.0, mode="consecutive"), "BlockDrop: ratio=1.0 removes 3, which is more than can go"),
        (Angular(count=3), "Angular: count=3 is more than can go"),
        (LayerDrop(parameters=100), "LayerDrop: parameters=100 is out of reach.*still has [0-9]+: raise parameters"),
        (BlockDrop(bytes=100), "BlockDrop: bytes=100 is out of reach"),
    ],
)
def test_budgets_that_do_not_fit_are_found_before_calibration(method: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress(tiny_mixtral(), method, Untouchable())


def test_similarities_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match=r"LayerDrop: the similarity.*no calibration token"):
        dropped(LayerDrop(count=1), by_hand(2, moe_cosine_sum=[0.0, 0.0], moe_tokens=[0.0, 0.0]))
    with pytest.raises(ValueError, match=r"BlockDrop: the similarity.*overflowed"):
        dropped(BlockDrop(count=1), by_hand(2, block_cosine_sum=[1.0, float("nan")], block_tokens=[1.0, 1.0]))


# Figures of the paper.


@pytest.mark.parametrize(
    ("edits", "parameters", "teraflops"),
    [
        ((), 46_702_792_704, 54.42),
        (tuple(DropMoE(layer) for layer in range(20, 28)), 35_428_208_640, 42.87),
        (tuple(DropBlock(layer) for layer in (18, 21, 22, 24, 25)), 39_446_441_984, 46.00),
    ],
    ids=["base", "Layer Drop 8", "Block Drop 5"],
)
def test_mixtral_8x7b_has_the_sizes_of_the_paper(edits: Any, parameters: int, teraflops: float) -> None:
    """2406.02500, Table 3."""
    config = MixtralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    with torch.device("meta"):
        model = build(config, CompressionPlan(edits))
    size = ml.measure(model, sequence_length=2048)
    assert size.parameters == parameters
    assert architecture_of(model).shape(model).parameters == parameters
    assert round(size.flops / 1e12, 2) == teraflops
