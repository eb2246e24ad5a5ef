"""Intervals cover what they promise, and pairing is what makes them narrow."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from moe_lightning.evaluation import LikelihoodResult
from moe_lightning.evaluation.comparison import BlockScores
from moe_lightning.evaluation.intervals import (
    Interval,
    bootstrap,
    lost_share_interval,
    mean_interval,
    paired_differences,
    paired_intervals,
    perplexity_interval,
    perplexity_ratio_interval,
    tail_probability,
    text_intervals,
)
from moe_lightning.evaluation.records import QualityMoment, TextScores


def result(nats: np.ndarray, tokens: np.ndarray | None = None) -> LikelihoodResult:
    counts = np.full(len(nats), 10) if tokens is None else tokens
    return LikelihoodResult(torch.tensor(nats, dtype=torch.float64), torch.tensor(counts), torch.tensor(counts))


def scores_of(
    tokens: np.ndarray,
    nats: np.ndarray,
    num_bytes: np.ndarray | None = None,
    divergence: np.ndarray | None = None,
    agreement: np.ndarray | None = None,
) -> BlockScores:
    nothing = np.full(len(tokens), math.nan)
    return BlockScores(
        nats=torch.tensor(nats, dtype=torch.float64),
        tokens=torch.tensor(tokens),
        bytes=torch.tensor(np.zeros(len(tokens), np.int64) if num_bytes is None else num_bytes),
        divergence=torch.tensor(nothing if divergence is None else divergence),
        agreement=torch.tensor(nothing if agreement is None else agreement),
    )


def expanded(numbers: list[float] | np.ndarray, blocks: int, level: float) -> tuple[float, float]:
    """The interval of draws, by Hesterberg's formula."""
    tail = scipy.stats.norm.cdf(-math.sqrt(blocks / (blocks - 1)) * scipy.stats.t.ppf((1 + level) / 2, blocks - 1))
    low, high = np.quantile(numbers, [tail, 1 - tail])
    return float(low), float(high)


def test_few_blocks_have_a_wider_tail() -> None:
    # The table of the source: the nominal one-sided 2.5 % for samples of 5, 10, 20, 100.
    found = [tail_probability(blocks, 0.95) for blocks in (5, 10, 20, 100)]
    assert found == pytest.approx([0.0010, 0.0086, 0.0159, 0.0231], abs=6e-5)
    assert tail_probability(100_000, 0.9) == pytest.approx(0.05, rel=1e-3)
    # For normal numbers the ends are then those of Student's interval: mean -+ t s / sqrt(n).
    numbers = np.random.default_rng(5).normal(size=12)
    found_interval = mean_interval(torch.tensor(numbers), torch.ones(12), resamples=200_000)
    width = scipy.stats.t.ppf(0.975, 11) * numbers.std(ddof=1) / math.sqrt(12)
    assert (found_interval.high - found_interval.low) / 2 == pytest.approx(width, rel=0.02)


def test_intervals_equal_a_loop_over_draws() -> None:
    draw = np.random.default_rng(0)
    tokens = draw.integers(5, 20, size=30)
    original, baseline, model = (tokens * draw.gamma(4.0, size=30) * scale for scale in (0.5, 0.8, 0.6))
    generator = torch.Generator().manual_seed(3)
    chosen = torch.randint(30, (400, 30), generator=generator).numpy()
    perplexities = [math.exp(model[row].sum() / tokens[row].sum()) for row in chosen]
    shares = [
        (model[row] - original[row]).sum() / (baseline[row] - original[row]).sum()
        for row in chosen
        if (baseline[row] - original[row]).sum() > 0
    ]
    options = {"resamples": 400, "seed": 3, "level": 0.9}
    found = perplexity_interval(result(model, tokens), **options)
    assert found.value == pytest.approx(math.exp(model.sum() / tokens.sum()), rel=1e-12)
    assert (found.low, found.high) == pytest.approx(expanded(perplexities, 30, 0.9), rel=1e-12)
    found = lost_share_interval(result(model, tokens), result(baseline, tokens), result(original, tokens), **options)
    assert (found.low, found.high) == pytest.approx(expanded(shares, 30, 0.9), rel=1e-9)
    assert found == lost_share_interval(
        result(model, tokens), result(baseline, tokens), result(original, tokens), **options
    )
    assert str(found).startswith(f"{found.value:.4g} [")


@pytest.mark.parametrize("kind", ["perplexity", "ratio", "share", "mean"])
def test_intervals_cover_as_often_as_they_say(kind: str) -> None:
    """Blocks drawn from a known population: of 95 % intervals about 95 % hold the population's own number."""
    draw = np.random.default_rng(1)
    repeats, blocks, population = 400, 120, 200_000

    def make(size: int) -> tuple[np.ndarray, ...]:
        # Skewed, of different lengths, and shared by the models: what one finds hard the others find hard.
        tokens = draw.integers(100, 256, size=size)
        hard = draw.gamma(9.0, 0.4, size=size)
        extra = draw.gamma(2.0, 0.1, size=size)
        return tokens, tokens * hard, tokens * (hard + extra), tokens * (hard + 0.4 * extra + draw.normal(0, 0.1, size))

    def number(tokens: np.ndarray, original: np.ndarray, baseline: np.ndarray, model: np.ndarray) -> float:
        return {
            "perplexity": math.exp(model.sum() / tokens.sum()),
            "ratio": math.exp((model - original).sum() / tokens.sum()),
            "share": (model - original).sum() / (baseline - original).sum(),
            "mean": model.sum() / tokens.sum(),
        }[kind]

    truth = number(*make(population))
    covered = 0
    for seed in range(repeats):
        tokens, *nats = make(blocks)
        original, baseline, model = (result(values, tokens) for values in nats)
        options = {"resamples": 500, "seed": seed}
        if kind == "perplexity":
            found = perplexity_interval(model, **options)
        elif kind == "ratio":
            found = perplexity_ratio_interval(model, original, **options)
        elif kind == "share":
            found = lost_share_interval(model, baseline, original, **options)
        else:
            found = mean_interval(model.nats, model.tokens, **options)
        covered += found.low <= truth <= found.high
    # Of 400 trials at 95 % the standard deviation is 1.1 %.
    assert 0.92 <= covered / repeats <= 0.98, covered / repeats


@pytest.mark.parametrize("blocks", [16, 64])
def test_few_blocks_cover_as_often_as_they_say(blocks: int) -> None:
    """Heavy tails, blocks of different lengths, two models that find the same blocks hard."""

    def make(draw: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = draw.integers(60, 256, size=size)
        hard = 3.5 * np.exp(draw.normal(0.0, 0.3, size=size))
        damage = 0.05 * hard + 0.05 * draw.standard_t(4, size=size)
        return tokens, tokens * hard, tokens * (hard + damage)

    tokens, original, model = make(np.random.default_rng(11), 1_000_000)
    truth = {
        "perplexity": math.exp(model.sum() / tokens.sum()),
        "perplexity_ratio": math.exp((model - original).sum() / tokens.sum()),
    }
    draw = np.random.default_rng(blocks)
    repeats = 1000
    covered = dict.fromkeys(truth, 0)
    for number in range(repeats):
        tokens, original, model = make(draw, blocks)
        # A seed serves a hundred data sets, which are independent: its draws need not be made again.
        found = text_intervals(scores_of(tokens, model), scores_of(tokens, original), seed=number // 100)
        for name, value in truth.items():
            covered[name] += found[name].low <= value <= found[name].high
    # Three standard deviations of the binomial (2.1 %), and half a percent for tails that no few blocks can know.
    # The plain percentile interval of 16 blocks covers 91 %.
    tolerance = 3 * math.sqrt(0.95 * 0.05 / repeats) + 0.005
    for name, count in covered.items():
        assert abs(count / repeats - 0.95) <= tolerance, (name, count / repeats)


def some_scores(seed: int, blocks: int = 25) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    tokens = np.random.default_rng(77).integers(5, 40, size=blocks)
    return {
        "tokens": tokens,
        "nats": tokens * draw.gamma(4.0, size=blocks),
        "num_bytes": 4 * tokens + np.random.default_rng(78).integers(0, 9, size=blocks),
        "divergence": tokens * draw.gamma(0.3, size=blocks),
        "agreement": np.floor(tokens * draw.uniform(0.5, 1.0, size=blocks)),
    }


def drawn(blocks: int, resamples: int = 2000) -> np.ndarray:
    return torch.randint(blocks, (resamples, blocks), generator=torch.Generator().manual_seed(0)).numpy()


def check(found: Interval, value: float, numbers: np.ndarray, blocks: int, level: float = 0.95) -> None:
    assert found.value == pytest.approx(value, rel=1e-12)
    assert (found.low, found.high) == pytest.approx(expanded(numbers, blocks, level), rel=1e-10)


def test_what_is_known_of_a_text_equals_a_loop_over_draws() -> None:
    one, before = some_scores(1), some_scores(2)
    one["divergence"][7:], one["agreement"][7:] = math.nan, math.nan
    found = text_intervals(scores_of(**one), scores_of(**before), level=0.9)
    rows, few = drawn(25), drawn(7)

    def total(name: str, rows: np.ndarray) -> np.ndarray:
        return one[name][rows].sum(-1)

    nats, tokens, length = one["nats"], one["tokens"], one["num_bytes"]
    drawn_tokens = total("tokens", rows)
    check(found["perplexity"], np.exp(nats.sum() / tokens.sum()), np.exp(total("nats", rows) / drawn_tokens), 25, 0.9)
    bits = total("nats", rows) / np.log(2) / total("num_bytes", rows)
    check(found["bits_per_byte"], nats.sum() / np.log(2) / length.sum(), bits, 25, 0.9)
    ratios = np.exp(total("nats", rows) / drawn_tokens) / np.exp(before["nats"][rows].sum(-1) / drawn_tokens)
    value = np.exp(nats.sum() / tokens.sum()) / np.exp(before["nats"].sum() / tokens.sum())
    check(found["perplexity_ratio"], value, ratios, 25, 0.9)
    for name in ("divergence", "agreement"):
        numbers = total(name, few) / total("tokens", few)
        check(found[name], one[name][:7].sum() / tokens[:7].sum(), numbers, 7, 0.9)
    assert {found[name].level for name in found} == {0.9}


def test_numbers_that_nobody_counted_are_absent() -> None:
    one = some_scores(1)
    bare = text_intervals(scores_of(one["tokens"], one["nats"]))
    assert set(bare) == {"perplexity"}
    single = text_intervals(scores_of(**{name: values[:1] for name, values in one.items()}))
    assert set(single) == {"perplexity", "bits_per_byte", "divergence", "agreement"}
    assert single["perplexity"].value == pytest.approx(math.exp(one["nats"][0] / one["tokens"][0]))
    assert all(math.isnan(interval.low) and math.isnan(interval.high) for interval in single.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("block", [3, 20])
def test_one_block_that_is_not_finite_spoils_every_number_of_the_text(bad: float, block: int) -> None:
    """In a block that was compared with the model before, or in another one; as measured, and as read from a file."""
    one, before = some_scores(1), some_scores(2)
    one["divergence"][7:], one["agreement"][7:] = math.nan, math.nan
    one["nats"][block] = bad
    if block < 7:
        one["divergence"][block] = bad
    scores, other = scores_of(**one), scores_of(**before)
    moment = QualityMoment("end", 1, "", {"test": TextScores(scores, None, "x")}, 1, 1, 1, 1)
    read = QualityMoment.from_dict(moment.to_dict()).texts["test"].scores
    for known in (scores, read):
        assert known.finite.tolist() == [number != block for number in range(25)]
        assert known.compared.tolist() == [number < 7 for number in range(25)]
        found = text_intervals(known, other)
        assert set(found) == {"perplexity", "bits_per_byte", "perplexity_ratio", "divergence", "agreement"}
        for name, interval in {**found, **paired_differences(known, other)}.items():
            assert not interval.finite and str(interval) == "not finite", name
            assert math.isnan(interval.low) and math.isnan(interval.high), name
    assert not text_intervals(other, scores)["perplexity_ratio"].finite
    assert text_intervals(other, scores)["divergence"].finite  # the other model is whole
    assert not perplexity_interval(scores.likelihood).finite and math.isnan(perplexity_interval(scores.likelihood).low)


def test_a_divergence_may_be_infinite_alone() -> None:
    """A token that the model before expects and this one rules out: the likelihood of the text does not show it."""
    one = some_scores(1)
    one["divergence"][3] = math.inf
    moment = QualityMoment("end", 1, "", {"test": TextScores(scores_of(**one), None, "x")}, 1, 1, 1, 1)
    read = QualityMoment.from_dict(moment.to_dict()).texts["test"].scores
    for known in (scores_of(**one), read):
        found = text_intervals(known)
        assert not found["divergence"].finite and found["agreement"].finite and found["perplexity"].finite


def test_pairs_are_of_the_same_blocks() -> None:
    scores, other = scores_of(**some_scores(1)), scores_of(**some_scores(2))
    text, before = TextScores(scores, None, "x"), TextScores(other, None, "x")
    assert paired_intervals(text, before) == text_intervals(scores, other)
    for alone in (None, text, TextScores(other, None, "y")):
        assert paired_intervals(text, alone) == text_intervals(scores)


def test_differences_of_two_models_equal_a_loop_over_draws() -> None:
    one, other = some_scores(1), some_scores(2)
    one["divergence"][3], one["agreement"][3] = math.nan, math.nan
    other["divergence"][9:], other["agreement"][9:] = math.nan, math.nan
    found = paired_differences(scores_of(**one), scores_of(**other))
    rows, few = drawn(25), drawn(8)
    tokens = one["tokens"]
    nats = one["nats"] - other["nats"]
    differences = nats[rows].sum(-1) / tokens[rows].sum(-1)
    check(found["nats_per_token"], nats.sum() / tokens.sum(), differences, 25)
    check(found["perplexity_ratio"], math.exp(nats.sum() / tokens.sum()), np.exp(differences), 25)
    kept = [0, 1, 2, 4, 5, 6, 7, 8]
    for name in ("divergence", "agreement"):
        values = (one[name] - other[name])[kept]
        numbers = values[few].sum(-1) / tokens[kept][few].sum(-1)
        check(found[name], values.sum() / tokens[kept].sum(), numbers, 8)
    again = paired_differences(scores_of(**other), scores_of(**one))
    assert again["nats_per_token"].value == -found["nats_per_token"].value
    same = paired_differences(scores_of(**other), scores_of(**other))
    assert (same["nats_per_token"].low, same["nats_per_token"].high) == (0.0, 0.0)


def test_unpaired_intervals_would_be_wider() -> None:
    """The ratio of two models, each read on draws of its own, by numpy."""
    draw = np.random.default_rng(3)
    tokens = draw.integers(60, 256, size=50)
    hard = draw.gamma(9.0, 0.4, size=50)
    original, model = tokens * hard, tokens * (1.02 * hard + draw.normal(0.0, 0.02, size=50))
    paired = text_intervals(scores_of(tokens, model), scores_of(tokens, original))["perplexity_ratio"]
    first, second = draw.integers(50, size=(2, 2000, 50))
    ratios = np.exp(model[first].sum(1) / tokens[first].sum(1) - original[second].sum(1) / tokens[second].sum(1))
    low, high = expanded(ratios, 50, 0.95)
    assert paired.low > 1.0 > low
    assert high - low > 10 * (paired.high - paired.low)


def test_pairing_makes_intervals_narrow() -> None:
    draw = np.random.default_rng(2)
    hard = draw.gamma(9.0, 4.0, size=200)
    worse = hard * 1.01
    ratio = perplexity_ratio_interval(result(worse), result(hard))
    assert ratio.low > 1.0
    alone = perplexity_interval(result(hard))
    assert (alone.high - alone.low) / alone.value > 20 * (ratio.high - ratio.low)


def test_the_same_model_twice_has_no_doubt() -> None:
    one = result(np.random.default_rng(0).gamma(9.0, size=20))
    assert perplexity_ratio_interval(one, one).high == 1.0
    assert math.isnan(lost_share_interval(one, one, one).value)
    assert math.isnan(lost_share_interval(one, one, one).low)


def test_mistakes_are_named() -> None:
    one, other = result(np.ones(4)), result(np.ones(5))
    with pytest.raises(ValueError, match="same blocks"):
        perplexity_ratio_interval(one, other)
    with pytest.raises(ValueError, match="same blocks"):
        perplexity_ratio_interval(one, result(np.ones(4), np.array([10, 10, 10, 11])))
    with pytest.raises(ValueError, match="same blocks"):
        text_intervals(scores_of(np.ones(4), np.ones(4)), scores_of(np.ones(5), np.ones(5)))
    with pytest.raises(ValueError, match="same blocks"):
        paired_differences(scores_of(np.ones(4), np.ones(4)), scores_of(np.ones(4) * 2, np.ones(4)))
    with pytest.raises(ValueError, match="at least 2 blocks"):
        perplexity_interval(result(np.ones(1)))
    with pytest.raises(ValueError, match="level"):
        bootstrap(torch.ones(1, 4), lambda total: total[0], level=1.0)
    with pytest.raises(ValueError, match="resamples"):
        bootstrap(torch.ones(1, 4), lambda total: total[0], resamples=0)
