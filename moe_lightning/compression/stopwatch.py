"""Where the time goes: wall-clock seconds by what is being done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds by what they were spent on. Every moment counts once: of nested parts the innermost.

    It reads the clock and waits for nothing: what a GPU was given in one part and still works on in the next counts
    where somebody first waits for it.
    """

    def __init__(self, rest: str = "other") -> None:
        """Start.

        Args:
            rest: What the time is spent on where nothing else is said.
        """
        self.rest = rest
        self._spent: dict[str, float] = {}
        self._parts = [rest]
        self._since = time.perf_counter()

    @contextmanager
    def spending(self, part: str) -> Iterator[None]:
        """Count what happens inside a ``with`` block.

        Args:
            part: What it is spent on.
        """
        self._turn()
        self._parts.append(part)
        try:
            yield
        finally:
            self._turn()
            self._parts.pop()

    def turn_to(self, part: str) -> None:
        """Say what the time is spent on from now on, where nothing else is said.

        Args:
            part: What it is spent on.
        """
        self._turn()
        self._parts[0] = part

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds up to now by part, the rest last; together all that went by since the start."""
        self._turn()
        spent = {part: seconds for part, seconds in self._spent.items() if part != self.rest}
        return {**spent, self.rest: self._spent.get(self.rest, 0.0)}

    def _turn(self) -> None:
        now = time.perf_counter()
        part = self._parts[-1]
        self._spent[part] = self._spent.get(part, 0.0) + now - self._since
        self._since = now
