"""For processes under a stepped clock: libfaketime breaks `time.sleep`, which waits for an instant of the clock that it leaves alone."""

from __future__ import annotations

import select
import time


def _sleep(seconds: float, /) -> None:
    if seconds < 0:
        raise ValueError("sleep length must be non-negative")
    select.select([], [], [], seconds)


vars(time)["sleep"] = _sleep
