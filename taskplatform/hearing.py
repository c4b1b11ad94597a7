"""Whether a worker still hears its broker.

A worker can live and heartbeat and take no message all the same: its main loop hangs, or it believes that it asks for messages and does
not, or it asks a server that is not the platform's any more. `Hearing` is told what the main loop does and judges that, by a clock that
nobody sets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

#: A worker that starts may need so long until its loop turns.
_START_SECONDS = 30.0
#: An answer of Redis that came later than this says nothing about the worker.
_SLOW_SECONDS = 1.0


class Hearing:
    """What a worker's main loop last did. The loop tells it, and any thread may ask; `judge` is for one thread.

    `patience` is how long a worker may hear nothing, in seconds, and `interval` how often `judge` is called.
    """

    def __init__(self, *, patience: float, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience = patience
        self._interval = interval
        self._clock = clock
        now = clock()
        self._turned = now + _START_SECONDS
        self._answered = self._took = now
        #: Before this nothing counts.
        self._since = self._looked = now
        self._had_place = now
        self._heads: dict[str, tuple[str, float]] = {}

    # the main loop

    def turned(self) -> None:
        """The loop has turned."""
        self._turned = self._clock()

    def answered(self, *, message: bool) -> None:
        """The broker has answered that there is a message, or none."""
        self._answered = self._clock()
        if message:
            self._took = self._answered

    # others

    def turns(self, *, within: float) -> bool:
        """Whether the loop has turned within so many seconds."""
        return self._clock() - self._turned <= within

    def begin(self) -> None:
        """Judge only by what comes from now on."""
        self._since = self._looked = self._had_place = self._clock()
        self._heads.clear()

    def judge(self, heads: Callable[[], Mapping[str, str] | None], *, has_place: bool) -> str | None:
        """Why the worker is deaf, or None.

        `heads` asks for a mark of the next message in each queue that it serves, and gives None when Redis cannot be asked. `has_place`
        says whether it could take a message now. What was away or slow, Redis or this process itself, is nobody's deafness: then the
        time begins anew.
        """
        asked = self._clock()
        held_up = asked - self._looked > 2 * self._interval + _SLOW_SECONDS
        found = heads()
        now = self._looked = self._clock()
        if found is None or held_up or now - asked > _SLOW_SECONDS:
            self.begin()
            return None
        if not has_place:
            self._had_place = now
        known = self._heads
        self._heads = {queue: known[queue] if known.get(queue, (None,))[0] == mark else (mark, now) for queue, mark in found.items()}
        return self._reason(now)

    def _reason(self, now: float) -> str | None:
        def for_long(*since: float) -> bool:
            return now - max(self._since, *since) > self._patience

        if for_long(self._turned):
            return f"its main loop has not turned for {now - self._turned:.1f} s"
        if for_long(self._answered, self._had_place):
            return f"it has free slots and had no answer from the broker for {now - self._answered:.1f} s"
        for queue, (_, seen) in self._heads.items():
            if for_long(seen, self._took, self._had_place):
                return f"it has free slots, and a message lies in queue {queue} for {now - seen:.1f} s"
        return None
