import time
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moe_lightning.evaluation import decoded_tokens_per_second, speed, tokens_per_second
from moe_lightning.evaluation.speed import Decoding, decode_rate, prefill_rate, seconds_of


@pytest.fixture(scope="module")
def model() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    return MixtralForCausalLM(config)


def test_speed_is_tokens_over_the_median_time(model: MixtralForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 32, (2, 8))
    times = iter([0, 100, 200, 201, 300, 302, 400, 409])  # warm-up 100 s, then 1, 2 and 9 s
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(times))
    assert tokens_per_second(model, ids, repeats=3, warm_up=1) == 16 / 2
    times = iter([0, 1, 10, 14, 20, 22])
    assert decoded_tokens_per_second(model, ids, new_tokens=3, repeats=3, warm_up=0) == 2 * 3 / 2


def test_rates_have_their_spread(model: MixtralForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 32, (2, 8))
    times = iter([0, 100, 200, 201, 300, 302, 400, 410])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(times))
    rate = prefill_rate(model, ids, repeats=3, warm_up=1)
    assert (rate.median, rate.low, rate.high, rate.batch, rate.context) == (8.0, 1.6, 16.0, 2, 8)
    times = iter([0, 1, 10, 14, 20, 22])
    rate = decode_rate(model, ids, new_tokens=3, repeats=3, warm_up=0)
    assert (rate.median, rate.low, rate.high, rate.batch, rate.context) == (3.0, 1.5, 6.0, 2, 8)


@pytest.mark.parametrize("sliding_window", [None, 4])
def test_every_repeat_decodes_the_same(
    model: MixtralForCausalLM, monkeypatch: pytest.MonkeyPatch, sliding_window: int | None
) -> None:
    monkeypatch.setattr(model.config, "sliding_window", sliding_window)
    monkeypatch.setattr(speed, "PROMPT_TOKENS", 6)  # three tokens of each of two sequences at a time
    ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        work = Decoding(model.eval(), ids, 5)
        lengths, logits = [], []
        handle = model.register_forward_hook(lambda _m, _a, output: logits.append(output.logits[:, -1]))
        for _ in range(3):
            seconds_of(work)
            lengths.append(work._cache.get_seq_length())
        handle.remove()
        whole = model(input_ids=ids, use_cache=False).logits[:, -1]
    assert lengths == [13, 13, 13]
    assert len(logits) == (3 + 3 * 5 if sliding_window is None else 3 * (3 + 5))
    torch.testing.assert_close(logits[2], whole)  # in pieces, the prompt gives the same
    torch.testing.assert_close(logits[-5:], logits[3:8], rtol=0, atol=0)


def test_a_slow_model_is_slow(model: MixtralForCausalLM) -> None:
    ids = torch.randint(0, 32, (1, 4))
    handle = model.register_forward_hook(lambda *_: time.sleep(0.02))
    try:
        assert 4 / 0.2 < tokens_per_second(model, ids, repeats=2) < 4 / 0.02
        assert 1 / 0.2 < decoded_tokens_per_second(model, ids, new_tokens=3, repeats=2) < 1 / 0.02
    finally:
        handle.remove()


def test_decoding_takes_one_token_at_a_time_from_the_cache_as_generate_does(model: MixtralForCausalLM) -> None:
    ids = torch.randint(0, 32, (1, 6))
    model.train()
    seen: list[list[int]] = []

    def note(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        seen.append(options["input_ids"][0].tolist())

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    decoded_tokens_per_second(model, ids, new_tokens=5, repeats=1, warm_up=0)
    handle.remove()
    assert model.training
    expected = model.eval().generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)[0].tolist()
    assert seen[0] + [token for step in seen[1:] for token in step] == expected


def test_nothing_to_time_is_an_error(model: MixtralForCausalLM) -> None:
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="repeats 0"):
        tokens_per_second(model, ids, repeats=0)
    with pytest.raises(ValueError, match="new_tokens 0"):
        decoded_tokens_per_second(model, ids, new_tokens=0)
