"""Sparsity that grows: the formula, the steps, refusals."""

import pytest

import moe_lightning as ml


def test_cubic_is_its_formula() -> None:
    schedule = ml.SparsitySchedule(0.1, 0.6, 100, every=25)
    for step in (0, 10, 25, 99, 100):
        assert schedule.at(step) == pytest.approx(0.6 + (0.1 - 0.6) * (1 - step / 100) ** 3)
    assert schedule.at(0) == pytest.approx(0.1)
    assert schedule.at(100) == schedule.at(5000) == 0.6
    assert schedule.at(-3) == schedule.at(0)
    assert schedule.moments() == (0, 25, 50, 75, 100)


def test_linear() -> None:
    schedule = ml.SparsitySchedule(0.0, 0.5, 10, every=4, shape="linear")
    assert schedule.at(4) == pytest.approx(0.2)
    # Nothing is pruned at a share of zero; the last moment is at the end in any case.
    assert schedule.moments() == (4, 8, 10)


def test_shares_grow_from_moment_to_moment() -> None:
    for shape in ("cubic", "linear"):
        schedule = ml.SparsitySchedule(0.05, 0.9, 37, every=5, shape=shape)
        shares = [schedule.at(moment) for moment in schedule.moments()]
        assert shares == sorted(set(shares))
        assert shares[-1] == 0.9


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": 0.5}, "0 <= start < end < 1"),
        ({"start": -0.1}, "0 <= start < end < 1"),
        ({"end": 1.0}, "0 <= start < end < 1"),
        ({"start": "0.1"}, "start must be a number, a share of zeros from 0 to 1, got '0.1'"),
        ({"end": None}, "end must be a number"),
        ({"start": True}, "start must be a number"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"every": 0}, "every must be a whole number"),
        ({"every": 101}, "beyond steps=100"),
        ({"shape": "square"}, "cubic or linear"),
    ],
)
def test_refusals(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ml.SparsitySchedule(**{"start": 0.0, "end": 0.5, "steps": 100, **options})
