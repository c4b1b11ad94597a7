"""Whether a loop makes progress: it says when it has gone round, and others ask how long ago that was."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pulse:
    """Of one loop. The loop tells, any thread may ask. Spans are by a clock that nobody sets."""

    def __init__(self, name: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.rounds = 0
        """Ends of rounds, successful or not."""
        self.fault = ""
        """Why the last round failed; "" where it did what it is for."""
        self._clock = clock
        self._turned = clock()
        self._succeeded: float | None = None

    def step(self) -> None:
        """It is in a round and gets on; or it waits, as it should."""
        self._turned = self._clock()

    def succeeded(self) -> None:
        """A round did what it is for."""
        self.rounds += 1
        self.fault = ""
        self._turned = self._succeeded = self._clock()

    def failed(self, fault: object) -> None:
        """A round failed. The loop goes on."""
        self.rounds += 1
        self.fault = str(fault) or type(fault).__name__
        self.step()

    @property
    def age_seconds(self) -> float:
        """How long ago it last got on, or began."""
        return self._clock() - self._turned

    @property
    def success_age_seconds(self) -> float | None:
        """How long ago a round last succeeded. None: it never has."""
        return None if self._succeeded is None else self._clock() - self._succeeded
