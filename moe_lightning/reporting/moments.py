"""Which moments of a run are drawn, and which of them are one and the same model."""

from __future__ import annotations

import torch

from moe_lightning.evaluation.records import BEFORE, END, TEST, QualityMoment, QualityRecord

_SAME_SUM = 1e-4
"""Largest relative difference of the nats of a block that one model may show: other devices add up in other orders."""


def same_model(one: QualityMoment, other: QualityMoment) -> bool:
    """Say whether two moments are of one model: as large, and with the same sums on the same blocks.

    Speeds say nothing: those of one model differ from run to run.

    Args:
        one: A moment.
        other: Another one, of any run.

    Returns:
        Whether all texts that both saw (the same blocks of them) agree; False where there is none.
    """
    if (one.parameters, one.bytes) != (other.parameters, other.bytes):
        return False
    pairs = [
        (text.scores.nats, other.texts[name].scores.nats)
        for name, text in one.texts.items()
        if name in other.texts and other.texts[name].fingerprint == text.fingerprint
    ]
    return bool(pairs) and all(
        mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=_SAME_SUM, atol=0.0, equal_nan=True)
        for mine, theirs in pairs
    )


def drawn_moments(quality: QualityRecord) -> list[QualityMoment]:
    """Return the moments that fit into one picture: of many compressions the first two and the last.

    A test of a model that is there already is the same point once more: it is left out.

    Args:
        quality: The record.
    """
    compressed = [moment for moment in quality.moments if moment.name not in (BEFORE, END, TEST)]
    chosen = compressed if len(compressed) <= 3 else [*compressed[:2], compressed[-1]]
    # A name may come again where a run was resumed: the last one counts.
    names = [BEFORE, *(moment.name for moment in chosen), END]
    found = [moment for name in dict.fromkeys(names) if (moment := quality.moment(name)) is not None]
    test = quality.moment(TEST)
    if test is not None and not any(test.step == moment.step and same_model(test, moment) for moment in found):
        found.append(test)
    return found


def moments_left_out(quality: QualityRecord) -> str:
    """Return what :func:`drawn_moments` leaves out, in sentences of a caption; empty where that is nothing.

    Args:
        quality: The record.
    """
    drawn = {moment.name for moment in drawn_moments(quality)}
    names = list(dict.fromkeys(moment.name for moment in quality.moments if moment.name not in {*drawn, TEST}))
    notes = [left_out("between the first two compressions and the last", names)]
    if TEST not in drawn and quality.moment(TEST) is not None:
        notes.append(left_out("the same model on the same blocks as another moment", [TEST]))
    return joined(*notes)


def left_out(why: str, names: list[str]) -> str:
    """Return a sentence about what a picture does not show; empty where it shows everything.

    Args:
        why: Why not, in words.
        names: What.
    """
    named = names if len(names) <= 6 else [*names[:5], f"{len(names) - 5} more"]
    return f"Not drawn ({why}): {', '.join(named)}." if names else ""


def joined(*sentences: str) -> str:
    """Return sentences one behind the other, without those that are empty.

    Args:
        sentences: The sentences.
    """
    return " ".join(sentence for sentence in sentences if sentence)
