"""What a loop says and does while Redis cannot be used: a line at once, one a minute, one when it is over; and longer and longer waits."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from taskplatform.errors import Outage, StoreUnavailable

#: Between two lines of one outage.
_SAY_EVERY_SECONDS = 60.0
_FIRST_WAIT_SECONDS = 0.2
#: The longest wait: so late, at the worst, it is noticed that Redis is well again.
LONGEST_WAIT_SECONDS = 3.0

T = TypeVar("T")


class OutageLog:
    """For one loop, whose work is named `what`."""

    def __init__(self, log: logging.Logger, what: str) -> None:
        self._log = log
        self._what = what
        self._failures = 0
        self._began = 0.0
        self._said = 0.0

    def failed(self, fault: BaseException) -> float:
        """It failed, perhaps not for the first time. Returns how many seconds to wait before it is tried again."""
        now = time.monotonic()
        if not self._failures:
            self._began = now
        if not self._failures or now - self._said >= _SAY_EVERY_SECONDS:
            since = f", for {now - self._began:.0f} s by now" if self._failures else ""
            self._log.warning("%s waits%s: %s", self._what, since, fault)
            self._said = now
        wait = min(LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2.0 ** min(self._failures, 10))
        self._failures += 1
        # not all processes at the same moment
        return wait * random.uniform(0.5, 1.0)

    def over(self, *, ago: float = 0.0) -> None:
        """It succeeded, so many seconds ago."""
        if self._failures:
            self._log.warning("%s goes on, after %.1f s", self._what, time.monotonic() - ago - self._began)
            self._failures = 0


def when_reachable(connect: Callable[[], T], log: logging.Logger, *, between: Callable[[StoreUnavailable], object] = lambda _: None) -> T:
    """What `connect` returns, for processes that may start before Redis does: they wait for it, and call `between` with each fault.

    Where Redis does not let us in, or its certificate is not accepted, waiting is no help: raises that StoreError.
    """
    outage = OutageLog(log, "the start")
    while True:
        try:
            connected = connect()
        except StoreUnavailable as fault:
            if fault.outage is Outage.UNTRUSTED:
                raise
            between(fault)
            time.sleep(outage.failed(fault))
        else:
            outage.over()
            return connected
