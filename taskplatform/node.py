"""What a worker or a beat tells of itself with its heartbeats, so that `taskplatform doctor` can compare: versions, settings, clock.

It is cheap, has no secret in it, and fails only where the heartbeat itself would.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

#: A clock is compared with that of Redis this often, in seconds.
_COMPARE_SECONDS = 10.0
#: Of Celery's settings those that the platform's promises rest on (`doctor.celery` says what for).
_CELERY = (
    "accept_content",
    "beat_scheduler",
    "broker_channel_error_retry",
    "enable_utc",
    "redbeat_lock_timeout",
    "task_acks_late",
    "task_acks_on_failure",
    "task_acks_on_timeout",
    "task_always_eager",
    "task_ignore_result",
    "task_reject_on_worker_lost",
    "timezone",
    "worker_cancel_long_running_tasks_on_connection_loss",
    "worker_consumer",
    "worker_disable_prefetch",
    "worker_prefetch_multiplier",
)
_TRANSPORT = ("priority_steps", "queue_order_strategy", "socket_connect_timeout", "socket_timeout", "visibility_timeout")


def versions() -> dict[str, str]:
    """Of what can differ between the nodes of one installation."""
    found = {"python": platform.python_version()}
    for name, package in (("version", "taskplatform"), ("celery", "celery"), ("kombu", "kombu")):
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            found[name] = ""
    return found


def digest(definitions: Mapping[str, str]) -> str:
    """Of a catalogue, from its definitions and their versions: two that are the same plan and run the same."""
    return hashlib.sha256(json.dumps(sorted(definitions.items())).encode()).hexdigest()[:12]


def celery_settings(conf: Any, **really: Any) -> dict[str, Any]:
    """The settings of a Celery application that matter here, as JSON has them; `really` are those that an option replaced."""
    found = {name: conf.get(name) for name in _CELERY}
    options = conf.get("broker_transport_options") or {}
    found |= {f"broker_transport_options.{name}": options.get(name) for name in _TRANSPORT}
    found["task_queues"] = [[queue.name, queue.routing_key] for queue in conf.get("task_queues") or ()]
    # what is no class of ours may be a URL with a password in it
    found["result_backend"] = str(conf.get("result_backend") or "").partition("://")[0]
    found |= really
    plain: dict[str, Any] = json.loads(json.dumps(found, default=_name))
    return plain


def _name(value: Any) -> Any:
    """Of a class that is given in place of its name; a list of what is some other collection."""
    if isinstance(value, set | frozenset | tuple):
        return sorted(map(str, value))
    return f"{value.__module__}:{value.__qualname__}" if isinstance(value, type) else str(value)


class ClockGauge:
    """How far this machine's clock is ahead of that of Redis. Asks at most every ten seconds, for one short command."""

    def __init__(self, now_ms: Callable[[], int], *, clock: Callable[[], float] = time.time) -> None:
        self._now_ms = now_ms
        self._clock = clock
        self._next = float("-inf")
        self._last = ""

    def text(self) -> str:
        """`<ms ahead> <ms by which that may be wrong>`, as `read_clock` takes it. Raises StoreError."""
        if time.monotonic() >= self._next:
            ahead_ms, error_ms = self.measure()
            self._last = f"{ahead_ms} {error_ms}"
            self._next = time.monotonic() + _COMPARE_SECONDS
        return self._last

    def measure(self) -> tuple[int, int]:
        """Now: the ms ahead, and the ms by which that may be wrong: the server looked at its clock at some time between question and
        answer. Raises StoreError.
        """
        asked, began = time.monotonic(), self._clock()
        server_ms = self._now_ms()
        took_ms = (time.monotonic() - asked) * 1000
        # this process may have stood still anywhere in between; and the server's instant is a whole millisecond
        return round(began * 1000 + took_ms / 2 - server_ms - 0.5), round(took_ms + 1)


def read_clock(text: str | None) -> tuple[int, int] | None:
    """The reverse of `ClockGauge.text`; None for what a node of another release said, or did not."""
    parts = (text or "").split(" ")
    try:
        return (int(parts[0]), int(parts[1])) if len(parts) == 2 else None
    except ValueError:
        return None


def read_settings(text: str | None) -> dict[str, Any] | None:
    """What `celery_settings` gave, as a node told it in JSON; None as for `read_clock`."""
    try:
        found = json.loads(text or "")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
