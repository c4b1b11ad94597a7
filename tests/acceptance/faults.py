"""Points at which a process of the tests dies or stops. The platform knows nothing of them: `install` puts them around its steps.

`celery -A tests.acceptance.faulty worker | beat` is the platform's app with them. What a process is to do stands in its environment
(`Fault.environment`), and it does it once: also the process that takes its place will not do it again.

Points are
- `before:<step>` and `after:<step>` for each script of the store, by its name, and each other command that the store sends, in small
  letters; `step` counts all of these, so that the n-th is between two calls, whichever they are
- `popped`: a message has been taken from its queue, and nobody has been told
- `received`: the worker's main process has made a request of it
- `called`: the request has been sent to the target, and its answer has not been read
- `before:ack`: the job has ended, and its message is about to be acknowledged
- `released`: the release loop has moved at least one job to its queue
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

_POINT, _NTH, _SIGNAL, _WHO, _FIRST, _MARK = (f"TEST_FAULT_{name}" for name in ("POINT", "NTH", "SIGNAL", "WHO", "FIRST", "MARK"))

MACHINE = "TEST_MACHINE"
"""In a process's environment: it takes itself to run on a machine of this name."""


@dataclass(frozen=True)
class Fault:
    """What happens where. `mark` is a file that exists once it has happened."""

    mark: Path
    point: str
    nth: int = 1
    """At the how manieth time, in one process."""
    signal: signal.Signals = signal.SIGKILL
    whole_node: bool = True
    """To all processes of the node, not only to the one that comes to the point."""
    fresh: bool = False
    """Only at the first delivery of a job, so that no job meets two faults."""

    @property
    def environment(self) -> Mapping[str, str]:
        who = "node" if self.whole_node else "process"
        common = {_POINT: self.point, _NTH: str(self.nth), _SIGNAL: str(int(self.signal)), _MARK: str(self.mark)}
        return {**common, _WHO: who, _FIRST: str(int(self.fresh))}

    @property
    def happened(self) -> bool:
        return self.mark.exists()

    @property
    def job(self) -> str:
        """At which job it happened, where the point is one of a job's steps."""
        return self.mark.read_text(encoding="utf-8").rpartition("#")[0]

    @property
    def at_ms(self) -> int:
        """When it happened."""
        return self.mark.stat().st_mtime_ns // 1_000_000


_passes: defaultdict[str, itertools.count[int]] = defaultdict(lambda: itertools.count(1))
_thread = threading.local()


def _pass(point: str, tag: str = "") -> None:
    """A process comes to a point with a delivery, `<job>#<number>`, or with none."""
    if point != os.environ[_POINT] or (os.environ[_FIRST] == "1" and tag and not tag.endswith("#1")):
        return
    if next(_passes[point]) != int(os.environ[_NTH]):
        return
    mark = Path(os.environ[_MARK])
    own = mark.with_suffix(f".{os.getpid()}")
    own.write_text(tag, encoding="utf-8")
    try:
        os.link(own, mark)  # with all that is in it, for whoever sees it
    except FileExistsError:
        return
    number = int(os.environ[_SIGNAL])
    if os.environ[_WHO] == "node":
        os.killpg(os.getsid(0), number)
    if os.environ[_WHO] != "node" or os.getpgrp() != os.getsid(0):
        # else it was among them, and one that goes on after a stop must not stop again
        os.kill(os.getpid(), number)
    time.sleep(0.05)  # the kernel may let this thread run on for a moment


def _around(step: str, call: Callable[[], Any], tag: str = "") -> Any:
    _pass(f"before:{step}", tag)
    _pass("step")
    result = call()
    _pass(f"after:{step}", tag)
    return result


#: Scripts whose first arguments are a job and the number of its delivery.
_OF_A_DELIVERY = ("start", "finish", "renew", "lose")


def install() -> None:
    """Put the points into this process, if it has a fault to make, and it onto another machine, if it is to be on one."""
    if MACHINE in os.environ:
        from taskplatform import process

        name = os.environ[MACHINE]
        process.machine = lambda: name
    if _POINT not in os.environ:
        return

    from kombu.transport import virtual

    from taskplatform.app import PlatformRequest
    from taskplatform.consumer import JobQoS
    from taskplatform.http import connections
    from taskplatform.store import connection
    from taskplatform.store.scripts import Scripts

    run, execute_command, execute = Scripts.run, connection._Client.execute_command, connection._Pipeline.execute
    deliver, make_request, ack = virtual.Transport._deliver, PlatformRequest.__init__, JobQoS.ack
    get_response = connections._Connection.getresponse

    @wraps(run)
    def run_script(self: Any, name: str, *args: Any) -> Any:
        tag = f"{args[0]}#{args[1]}" if name in _OF_A_DELIVERY else ""
        if name == "start":
            _thread.tag = tag
        result = _around(name, lambda: run(self, name, *args), tag)
        if name == "release" and result[0]:
            _pass("released")
        return result

    @wraps(execute_command)
    def send_command(self: Any, *args: Any, **options: Any) -> Any:
        if args[0] in ("EVALSHA", "EVAL"):
            return execute_command(self, *args, **options)
        return _around(str(args[0]).lower(), lambda: execute_command(self, *args, **options))

    @wraps(execute)
    def send_pipeline(self: Any, raise_on_error: bool = True) -> list[Any]:
        return list(_around("pipeline", lambda: execute(self, raise_on_error)))

    @wraps(deliver)
    def note_popped(self: Any, message: Any, queue: str) -> Any:
        headers = message.get("headers", {})
        if "delivery" in headers:  # others are of Celery's remote control
            _pass("popped", f"{headers['id']}#{headers['delivery']}")
        return deliver(self, message, queue)

    @wraps(make_request)
    def note_received(self: Any, *args: Any, **kwargs: Any) -> None:
        make_request(self, *args, **kwargs)
        _pass("received", f"{self.id}#{self.delivery}")

    @wraps(ack)
    def note_ack(self: Any, delivery_tag: str) -> None:
        _pass("before:ack", delivery_tag)
        ack(self, delivery_tag)

    @wraps(get_response)
    def note_called(self: Any, *args: Any, **options: Any) -> Any:
        _pass("called", _thread.tag)
        return get_response(self, *args, **options)

    patches: list[tuple[type, str, Any]] = [
        (Scripts, "run", run_script),
        (connection._Client, "execute_command", send_command),
        (connection._Pipeline, "execute", send_pipeline),
        (virtual.Transport, "_deliver", note_popped),
        (PlatformRequest, "__init__", note_received),
        (JobQoS, "ack", note_ack),
        (connections._Connection, "getresponse", note_called),
    ]
    for owner, name, function in patches:
        setattr(owner, name, function)
