"""What subscriptions that are made in bulk, or a pause that ends, would spoil."""

from __future__ import annotations

import threading
import time
from collections import Counter

from taskplatform.forecast import warnings_of
from taskplatform.platform import Platform

#: A forecast is arithmetic, which leaves a process's other calls little time.
ONE_AT_A_TIME = threading.Lock()


#: So many subscribers and more are many.
MANY = 1000
#: A forecast that others hold up for longer is left out: nothing of what was asked for waits for it.
_PATIENCE = 10.0


def warnings_of_resume(platform: Platform, definition: str) -> list[str]:
    """What gets worse in the next 24 hours if a definition is not paused any more. It is asked before that; of few subscribers
    nothing. Raises UnknownDefinition, StoreError."""
    if platform.count_subscribers(definition) < MANY or definition not in platform.store.definition_pauses():
        return []
    if not ONE_AT_A_TIME.acquire(timeout=_PATIENCE):
        return []
    try:
        return warnings_of(platform.forecast(resume=[definition]))
    finally:
        ONE_AT_A_TIME.release()


class Growth:
    """Looks ahead when many subscriptions were made through this process since it last did, and says what that would spoil.

    Many are `MANY`, and 1 % of all that there are; and it looks at the most once in `PAUSE` seconds. So
    what is made one by one is never held up.
    """

    MANY = MANY
    PAUSE = 30.0

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._came: Counter[str] = Counter()
        self._looked_at = -self.PAUSE

    def warnings(self, platform: Platform, created: Counter[str]) -> list[str]:
        """So many were just made of each definition. What is worse than without all that came since the last look."""
        with self._lock:
            self._came += created
            count = self._came.total()
            if not created or count < self.MANY or time.monotonic() < self._looked_at + self.PAUSE:
                return []
            if count < platform.store.count_subscriptions() / 100:
                return []
            came, self._came = self._came, Counter()
            self._looked_at = time.monotonic()
        with ONE_AT_A_TIME:
            return warnings_of(platform.forecast(came=list(came.items())))
