import math
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from moe_lightning.evaluation import Likelihood, block_sums, evaluate, likelihood


class Bigram(torch.nn.Module):
    """A language model that is a table: the logits of the next token, given the last one."""

    def __init__(self, vocabulary: int = 11, dropout: float = 0.5):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(vocabulary, vocabulary, generator=generator) * 3)
        self.dropout = torch.nn.Dropout(dropout)
        self.modes: list[bool] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, use_cache: bool = True) -> Any:
        self.modes.append(self.training or torch.is_grad_enabled() or use_cache)
        return SimpleNamespace(logits=self.dropout(self.table[input_ids]))


def batch_of(num_blocks: int, seed: int = 0, masked: float = 0.2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (num_blocks, 9), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < masked, -100)
    return {"input_ids": ids, "labels": labels, "token_bytes": torch.randint(0, 6, ids.shape, generator=generator)}


def reference(table: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[list[float], list[int], list[int]]:
    """The same in float64 numpy, one token at a time."""
    logits = table.detach().double().numpy()
    nats, tokens, num_bytes = [], [], []
    ids, labels, sizes = (batch[name].numpy() for name in ("input_ids", "labels", "token_bytes"))
    for row in range(len(ids)):
        sums = [0.0, 0, 0]
        for position in range(1, ids.shape[1]):
            if labels[row, position] == -100:
                continue
            scores = logits[ids[row, position - 1]]
            sums[0] += float(np.log(np.exp(scores).sum()) - scores[labels[row, position]])
            sums[1] += 1
            sums[2] += int(sizes[row, position])
        nats.append(sums[0])
        tokens.append(int(sums[1]))
        num_bytes.append(int(sums[2]))
    return nats, tokens, num_bytes


@pytest.mark.parametrize("chunk_elements", [1 << 24, 33, 1])
def test_block_sums_equal_numpy(monkeypatch: pytest.MonkeyPatch, chunk_elements: int) -> None:
    monkeypatch.setattr(likelihood, "_CHUNK_ELEMENTS", chunk_elements)
    model, batch = Bigram().eval(), batch_of(5)
    sums = block_sums(model(batch["input_ids"]).logits, batch["labels"], batch["token_bytes"])
    nats, tokens, num_bytes = reference(model.table, batch)
    assert sums.nats.dtype == torch.float64
    assert sums.nats.tolist() == pytest.approx(nats, rel=1e-6)
    assert sums.tokens.tolist() == tokens
    assert sums.bytes.tolist() == num_bytes


def test_perplexity_and_bits_per_byte_equal_numpy_for_any_batch_split() -> None:
    model, batch = Bigram(), batch_of(12)
    nats, tokens, num_bytes = (sum(values) for values in reference(model.table, batch))
    for size in (1, 5, 12):
        parts = [{name: value[at : at + size] for name, value in batch.items()} for at in range(0, 12, size)]
        result = evaluate(model, parts, progress=False)
        assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-6)
        assert result.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
        assert result.num_tokens == tokens
        assert len(result.nats) == 12
        metric = Likelihood()
        for part in parts:
            metric.update(model.eval()(part["input_ids"]).logits, part["labels"], part["token_bytes"])
        computed = metric.compute()
        assert {name: float(value) for name, value in computed.items()} == pytest.approx(result.to_dict(), rel=1e-12)


def test_evaluate_leaves_the_model_as_it_was() -> None:
    model = Bigram()
    model.dropout.eval()
    evaluate(model, [batch_of(2)])
    assert model.training
    assert not model.dropout.training
    assert model.modes == [False]

    class Broken(Bigram):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            raise RuntimeError("broken")

    broken = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(broken, [batch_of(2)])
    assert broken.training


def test_padding_and_fillers_do_not_count() -> None:
    model, batch = Bigram(), batch_of(4, masked=0.0)
    whole = evaluate(model, [batch])
    padded = {"input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 3)), "attention_mask": torch.ones(4, 12)}
    padded["attention_mask"][:, 9:] = 0
    assert evaluate(model, [padded]).nats.tolist() == pytest.approx(whole.nats.tolist(), rel=1e-12)
    assert math.isnan(evaluate(model, [padded]).bits_per_byte)
    filler = batch_of(2) | {"labels": torch.full((2, 9), -100)}
    filled = evaluate(model, [batch, filler])
    assert torch.equal(filled.nats, whole.nats)
    assert torch.equal(filled.tokens, whole.tokens)
    assert torch.equal(filled.bytes, whole.bytes)


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="no batch"):
        evaluate(Bigram(), [])
    with pytest.raises(ValueError, match="all labels are -100"):
        evaluate(Bigram(), [batch_of(2, masked=1.0)])
    with pytest.raises(ValueError, match=r"logits \(2, 8, 11\), labels \(2, 9\)"):
        block_sums(torch.zeros(2, 8, 11), torch.zeros(2, 9, dtype=torch.int64))


def test_half_precision_logits_do_not_overflow_and_sums_stay_float64() -> None:
    # torchmetrics' Perplexity gives infinity here
    logits = torch.zeros(1, 3, 7, dtype=torch.float16)
    logits[..., 0] = 60000
    labels = torch.tensor([[0, 0, 1]])
    sums = block_sums(logits, labels)
    assert sums.nats.item() == pytest.approx(60000, rel=1e-3)
    metric = Likelihood()
    metric.update(logits, labels)
    assert float(metric.compute()["perplexity"]) == math.inf


def test_sums_stay_float64_in_a_bf16_module() -> None:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.metric = Likelihood()
            self.layer = torch.nn.Linear(1, 1)

        def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            logits = torch.zeros(1, 258, 1000, dtype=self.layer.weight.dtype)
            self.metric.update(logits, torch.zeros(1, 258, dtype=torch.int64), torch.ones(1, 258, dtype=torch.int64))

        def on_test_epoch_end(self) -> None:
            assert self.layer.weight.dtype == torch.bfloat16
            self.computed = self.metric.compute()
            self.log("tokens", self.computed["tokens"])

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu", precision="bf16-true", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.test(module, torch.utils.data.DataLoader(torch.zeros(3)), verbose=False)
    # bfloat16 could count to 256 only
    assert float(module.computed["tokens"]) == 3 * 257
    assert float(module.computed["perplexity"]) == pytest.approx(1000, rel=1e-6)
    assert float(module.computed["bits_per_byte"]) == pytest.approx(math.log2(1000), rel=1e-6)
    module.metric.reset()
    assert module.metric.nats.dtype == torch.float64


def test_metrics_merge_and_start_anew() -> None:
    one, two, both = Likelihood(), Likelihood(), Likelihood()
    model = Bigram().eval()
    for metric, seed in [(one, 1), (two, 2), (both, 1), (both, 2)]:
        batch = batch_of(3, seed)
        metric.update(model(batch["input_ids"]).logits, batch["labels"], batch["token_bytes"])
    one.merge_state(two)
    assert {name: float(value) for name, value in one.compute().items()} == pytest.approx(
        {name: float(value) for name, value in both.compute().items()}, rel=1e-12
    )
    one.reset()
    assert math.isnan(summed := float(one.compute()["perplexity"])), summed
