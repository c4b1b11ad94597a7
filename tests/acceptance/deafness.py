"""Makes a worker of the tests deaf. The platform knows nothing of it: `install` puts it into the worker's transport.

`celery -A tests.acceptance.faulty worker` is the platform's app with it. How it becomes deaf stands in its environment, and when: once
the file `since` exists.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

_KIND, _SINCE = "TEST_DEAF_KIND", "TEST_DEAF_SINCE"


@dataclass(frozen=True)
class Deafness:
    """`connection`: it believes that it asked for a message and did not, on the connections that it has then. `asking`: on all that it
    will ever have. `loop`: its main loop hangs.
    """

    kind: str
    since: Path

    @property
    def environment(self) -> Mapping[str, str]:
        return {_KIND: self.kind, _SINCE: str(self.since)}

    def begin(self) -> None:
        """From now on it is deaf."""
        self.since.touch()


def install() -> None:
    """Put it into this process, if its environment says so."""
    if _KIND not in os.environ:
        return

    from taskplatform.consumer import JobChannel
    from taskplatform.hearing import Hearing

    kind, since = os.environ[_KIND], Path(os.environ[_SINCE])
    ask, make, turn = JobChannel._brpop_start, JobChannel.__init__, Hearing.turned

    @wraps(make)
    def note_birth(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.hears = since.exists() and kind == "connection"

    @wraps(ask)
    def ask_or_not(self: Any, *args: Any, **kwargs: Any) -> None:
        if kind != "loop" and since.exists() and not self.hears:
            self._in_poll = self.client.connection
        else:
            ask(self, *args, **kwargs)

    @wraps(turn)
    def hang(self: Any) -> None:
        turn(self)
        while kind == "loop" and since.exists():
            time.sleep(1)

    patches: list[tuple[type, str, Any]] = [
        (JobChannel, "__init__", note_birth),
        (JobChannel, "_brpop_start", ask_or_not),
        (Hearing, "turned", hang),
    ]
    for owner, name, function in patches:
        setattr(owner, name, function)
