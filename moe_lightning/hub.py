"""Whether the Hugging Face hub is within reach, asked once instead of waited for.

Where it is not, ``datasets`` and ``huggingface_hub`` try each data set again and again, half a minute of warnings. One
look goes ahead, and where nothing answers both libraries work offline for the while: what is in the cache is found as
ever, and what is not is missing within milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

SECONDS_TO_ANSWER = 5.0
"""How long the hub may take to say anything at all."""


@contextmanager
def hub_within_reach(needed: bool = True) -> Iterator[bool]:
    """Let the libraries work offline inside a ``with`` block where the hub is needed and cannot be reached.

    Args:
        needed: Whether it is needed; it is not asked otherwise.

    Yields:
        Whether the hub is within reach, as far as that matters.
    """
    if not needed:
        yield True
        return
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    reached = not any(before) and _answers()
    if not reached:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield reached
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _answers() -> bool:
    """Say whether the hub (or the mirror that HF_ENDPOINT names) answers, through a proxy where one is set."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS_TO_ANSWER)
    except Exception:  # the errors of httpx or requests, whichever the library uses
        return False
    return True
