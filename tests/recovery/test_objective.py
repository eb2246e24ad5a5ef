"""What a training step minimises: the mixture, what counts, and hidden states by the numbers of the original layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.recovery import Objective, Student, Targets, TopWords, hidden_by_layer, kl_to_teacher
from moe_lightning.recovery.logit_cache import top_words
from moe_lightning.recovery.teachers import ModelTeacher
from tests.models import random_batches, tiny_mixtral

B, S, V, H = 2, 6, 9, 4


def numbers(seed: int, *size: int) -> Tensor:
    return 2 * torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class FixedTeacher:
    """Says what it was given."""

    gives_hidden = True

    def __init__(self, logits: Tensor, hidden: Mapping[int, Tensor] | None = None, top_k: int | None = None) -> None:
        self.logits, self.hidden, self.top_k = logits, hidden or {}, top_k
        self.asked: list[tuple[float, bool]] = []

    def targets(self, batch: Mapping[str, Tensor], temperature: float, hidden: bool) -> Targets:
        self.asked.append((temperature, hidden))
        predictions: Tensor | TopWords = self.logits
        if self.top_k is not None:
            predictions = top_words(self.logits, self.top_k, temperature)
        return Targets(predictions, self.hidden)


class OnlyPredictions(FixedTeacher):
    gives_hidden = False


def problem() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the student's logits, the teacher's, and a batch with tokens that do not count."""
    labels = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(5))
    labels[0, 2], labels[1, 4:] = -100, -100
    batch = {"input_ids": labels.clamp(min=0), "labels": labels}
    return numbers(0, B, S, V).requires_grad_(), numbers(1, B, S, V), batch


def expected_parts(student: Tensor, teacher: Tensor, labels: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Return cross-entropy and tau^2 KL, token by token."""
    entropy, kl, count = torch.zeros(()).double(), torch.zeros(()).double(), 0
    for row in range(B):
        for place in range(S - 1):
            if int(labels[row, place + 1]) == -100:
                continue
            count += 1
            entropy = entropy - torch.softmax(student[row, place], -1)[labels[row, place + 1]].log()
            p, q = (torch.softmax(logits[row, place] / tau, -1) for logits in (teacher, student))
            kl = kl + tau**2 * (p * (p / q).log()).sum()
    return entropy / count, kl / count


@pytest.mark.parametrize("top_k", [None, V])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_mixture_counts_only_what_labels_count(alpha: float, top_k: int | None) -> None:
    student, teacher, batch = problem()
    objective = Objective(FixedTeacher(teacher, top_k=top_k), alpha=alpha, temperature=2.0)
    loss, parts = objective(Student(student), batch)
    entropy, kl = expected_parts(student, teacher, batch["labels"], 2.0)
    torch.testing.assert_close(loss, (1 - alpha) * entropy + alpha * kl, rtol=1e-9, atol=0)
    assert float(parts["loss"]) == pytest.approx(float(entropy), rel=1e-9)
    assert ("kl" in parts) == (alpha > 0)
    if alpha > 0:
        assert float(parts["kl"]) == pytest.approx(float(kl), rel=1e-9)
    (got,) = torch.autograd.grad(loss, student)
    (expected,) = torch.autograd.grad((1 - alpha) * entropy + alpha * kl, student)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)
    assert not got[:, -1].any() and not got[0, 1].any()


def saved_numbers(function: Callable[[], object]) -> int:
    """Return how many numbers in floating point a computation keeps for its gradient."""
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel() if tensor.is_floating_point() else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(saved)


def test_a_teacher_alone_keeps_no_graph_of_the_text() -> None:
    student, teacher, batch = problem()
    objective = {alpha: Objective(FixedTeacher(teacher), alpha=alpha) for alpha in (0.5, 1.0)}
    counts_BS = batch["labels"][:, 1:] != -100
    rows_NV = [logits[:, :-1][counts_BS] for logits in (student, teacher)]
    alone = saved_numbers(lambda: kl_to_teacher(rows_NV[0], rows_NV[1]))
    kept = {alpha: saved_numbers(lambda a=alpha: objective[a](Student(student), batch)) for alpha in objective}  # type: ignore[misc]
    assert kept[1.0] == alone < kept[0.5] - B * (S - 1) * V + 1
    _, parts = objective[1.0](Student(student), batch)
    assert torch.equal(parts["loss"], objective[0.5](Student(student), batch)[1]["loss"])


def test_without_a_teacher_it_is_the_text_alone() -> None:
    student, teacher, batch = problem()
    loss, parts = Objective()(Student(student), batch)
    entropy, _ = expected_parts(student, teacher, batch["labels"], 1.0)
    assert parts.keys() == {"loss"}
    assert float(loss) == pytest.approx(float(entropy), rel=1e-6)


def test_a_batch_in_which_nothing_counts() -> None:
    student, teacher, batch = problem()
    batch["labels"][:] = -100
    loss, _ = Objective(FixedTeacher(teacher), alpha=0.5)(Student(student), batch)
    assert float(loss) == 0
    (gradient,) = torch.autograd.grad(loss, student)
    assert not gradient.any()


def test_hidden_states_without_padding_and_of_common_layers() -> None:
    student, teacher, batch = problem()
    batch["attention_mask"] = torch.ones(B, S, dtype=torch.int64)
    batch["attention_mask"][1, 4:] = 0
    theirs = {layer: numbers(10 + layer, B, S, H) for layer in range(4)}
    mine = {layer: numbers(20 + layer, B, S, H) for layer in (0, 2, 3)}  # layer 1 was dropped
    objective = Objective(FixedTeacher(teacher, theirs), hidden_weight=0.7)
    loss, parts = objective(Student(student, mine), batch)
    known = batch["attention_mask"].bool()
    # What enters layer 0 is the embedding alone.
    terms = [(mine[n] - theirs[n])[known].square().sum() / theirs[n][known].square().sum() for n in (2, 3)]
    expected = sum(terms) / 2
    assert float(parts["hidden_error"]) == pytest.approx(float(expected), rel=1e-9)
    entropy, _ = expected_parts(student, teacher, batch["labels"], 1.0)
    assert float(loss) == pytest.approx(float(entropy + 0.7 * expected), rel=1e-9)
    assert objective.teacher.asked == [(1.0, True)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 1.5}, "alpha"),
        ({"alpha": -0.1}, "alpha"),
        ({"temperature": 0.0}, "temperature"),
        ({"hidden_weight": -1.0}, "hidden_weight"),
        ({"alpha": 0.5}, "teacher"),
        ({"hidden_weight": 0.5}, "teacher"),
        ({"teacher": OnlyPredictions(torch.zeros(0)), "hidden_weight": 0.5}, "cached predictions"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Objective(**options)


def test_hidden_states_by_layer() -> None:
    states = [numbers(seed, 1) for seed in range(3)]
    assert hidden_by_layer(states, (1, 4), 6) == {1: states[0], 4: states[1], 6: states[2]}
    with pytest.raises(ValueError):
        hidden_by_layer(states, (1, 4, 5), 6)


class Recorder:
    """What enters each decoder layer of a model, and what leaves its last norm, by hooks of its own."""

    def __init__(self, model: Any) -> None:
        self.states: list[Tensor] = []
        self.handles = [
            layer.register_forward_pre_hook(lambda _, inputs: self.states.append(inputs[0].detach().clone()))
            for layer in model.model.layers
        ]
        self.handles.append(
            model.model.norm.register_forward_hook(lambda _, __, output: self.states.append(output.detach().clone()))
        )


def test_the_hidden_states_of_a_model_that_teaches() -> None:
    model = tiny_mixtral(num_hidden_layers=4)
    ml.compress(model, random_batches(1), [ml.BlockDrop(count=1)])
    blocks = architecture_of(model).shape(model).blocks
    assert len(blocks) == 3
    recorder, batch = Recorder(model), random_batches(1, seed=3)[0]
    targets = ModelTeacher(model).targets(batch, 1.0, hidden=True)
    assert list(targets.hidden) == [*blocks, 4]
    for got, expected in zip(targets.hidden.values(), recorder.states, strict=True):
        assert torch.equal(got, expected)
    with torch.no_grad():
        assert torch.equal(targets.predictions, model(**batch).logits)  # type: ignore[arg-type]


def test_a_student_with_dropped_blocks_is_compared_layer_by_layer() -> None:
    """Of a student whose other blocks are those of the teacher, what enters the layers before the gap is the same."""
    original = tiny_mixtral(num_hidden_layers=4)
    student_model = copy.deepcopy(original)
    ml.compress(student_model, random_batches(1), [ml.BlockDrop(count=1)])
    blocks = architecture_of(student_model).shape(student_model).blocks
    (gap,) = set(range(4)) - set(blocks)
    batch = random_batches(1, seed=3)[0]
    batch["labels"] = batch["input_ids"]
    outputs = student_model.model(input_ids=batch["input_ids"], output_hidden_states=True, use_cache=False)
    student = Student(
        student_model.lm_head(outputs.last_hidden_state), hidden_by_layer(outputs.hidden_states, blocks, 4)
    )
    teacher = ModelTeacher(original)
    loss, parts = Objective(teacher, hidden_weight=1.0)(student, batch)
    theirs = teacher.targets(batch, 1.0, hidden=True).hidden
    terms = {}
    for layer in (*blocks, 4):
        error = (student.hidden[layer] - theirs[layer]).double().square().sum()
        terms[layer] = float(error / theirs[layer].double().square().sum())
    assert all(terms[layer] < 1e-10 for layer in blocks if layer <= gap)
    assert all(terms[layer] > 1e-6 for layer in (*blocks, 4) if layer > gap)
    counted = [layer for layer in (*blocks, 4) if layer != 0]
    assert len(counted) == 4 - (0 in blocks)
    assert float(parts["hidden_error"]) == pytest.approx(
        sum(terms[layer] for layer in counted) / len(counted), rel=1e-4
    )
    loss.backward()
    assert all(parameter.grad is None for parameter in original.parameters())
