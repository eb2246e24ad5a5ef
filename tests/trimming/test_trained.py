"""The same laws on a trained model, and the order of methods that only a trained one can show."""

import copy
import warnings

import pytest
import torch

import moe_lightning as ml
from moe_lightning.method import Method
from tests.method_settings import SETTINGS
from tests.reference import emulated
from tests.stand_ins import stand_ins, take_over_the_rest
from tests.trained import loss, text_batches, trained_mixtral

CALIBRATION = text_batches(12, seed=3)
HELD_OUT = text_batches(8, seed=9, held_out=True)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore:.*no calibration token reached", "ignore:min_tokens")
def test_equals_the_untouched_model_with_masks_and_stand_ins(name: str) -> None:
    model = trained_mixtral(torch.float64)
    original = copy.deepcopy(model)
    few = text_batches(2, 4, seed=4)
    # So few tokens leave some experts without any.
    shape = ml.compress(model, few, SETTINGS[name].make(), max_fallback=1.0, progress=False).shape_after
    take_over_the_rest(original, model, shape)
    dropped = {layout.layer: set(range(6)) - set(layout.router) for layout in shape.layouts}
    silent, skipped = set(shape.blocks) - set(shape.moe_layers), set(range(3)) - set(shape.blocks)
    inputs = text_batches(1, 1, seed=5)[0]["input_ids"]
    with torch.no_grad(), emulated(original, dropped, stand_ins(model, shape), silent, skipped):
        expected = original(inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(model(inputs).logits, expected, rtol=0, atol=1e-8)


def after(*methods: Method) -> float:
    """Return the held-out loss of the trained model after some methods."""
    model = trained_mixtral()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ml.compress(model, CALIBRATION, methods, progress=False)
    return loss(model, HELD_OUT)


def test_what_replaces_an_expert_matters_in_the_order_of_what_it_can_express() -> None:
    options = {"keep": 3, "criterion": "residual"}
    zero, mean, best, rank_2, rank_8 = (
        after(ml.Novices(**options, novice="zero")),
        after(ml.Novices(**options, novice="mean")),
        after(ml.Novices(**options, novice="gate2_mean")),
        after(ml.Novices(**options, novice="low_rank", rank=2)),
        after(ml.Novices(**options, novice="low_rank", rank=8)),
    )
    # A few thousand tokens tell rank 2 from a constant, but not rank 8 from rank 2, nor one constant from another.
    assert max(rank_2, rank_8) < min(best, mean)
    assert max(best, mean) < zero


def test_a_budget_over_all_layers_and_a_criterion_beat_chance() -> None:
    control = (
        sum(after(ml.Novices(keep=3, criterion="random", novice="gate2_mean", seed=seed)) for seed in range(3)) / 3
    )
    in_each_layer = after(ml.Novices(keep=3, criterion="residual", novice="gate2_mean"))
    over_all = after(ml.Novices(keep=3, criterion="residual", novice="gate2_mean", scope="global"))
    measured = after(ml.Novices(keep=3, criterion="residual", novice="gate2_mean", scope="sensitivity"))
    assert max(over_all, measured) < in_each_layer < control


def test_the_error_that_the_statistics_predict_ranks_the_layers_losses() -> None:
    """Replacing an expert with more residual costs more: rank correlation over single experts."""
    statistics = ml.collect(trained_mixtral(), CALIBRATION, progress=False)
    score = statistics.score("residual")
    losses, scores = [], []
    for layer in range(3):
        for expert in range(6):
            model = trained_mixtral()
            plan = ml.CompressionPlan((ml.NoviceExperts(layer, (expert,), "gate2_mean"),))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                ml.compress(model, CALIBRATION, plan=plan, progress=False)
            losses.append(loss(model, HELD_OUT))
            scores.append(float(score[layer, expert]))
    ranks = torch.tensor([scores, losses]).argsort(1).argsort(1).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.7
