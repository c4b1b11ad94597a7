"""Makes the checks: side by side, each bounded in time, and none hides another.

A check is a function that is given the visit and yields findings. What it looked at it tells with `visit.seen`. It raises Nothing where
there is nothing to look at; whatever else it raises makes it *unknown*, and what it had found by then counts.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from taskplatform.catalogue import Catalogue, resolve_calls
from taskplatform.catalogue import check as check_files
from taskplatform.doctor.report import Finding, Report, Result, Severity, State
from taskplatform.errors import StoreUnavailable, TaskPlatformError
from taskplatform.health import Health
from taskplatform.health import check as check_health
from taskplatform.settings import Settings
from taskplatform.store import Beat, Figures, Sample, Vitals
from taskplatform.store.diagnosis import Diagnosis

log = logging.getLogger(__name__)

T = TypeVar("T")

#: The whole visit, and what Redis may take for one answer.
MOST_SECONDS = 8.0
REDIS_SECONDS = 3.0
#: What was noted before a time without a leading beat says nothing of what grows now.
_GAP_MS = 5 * 60_000


class Nothing(Exception):
    """There is nothing to look at; the message says why."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What many checks judge by, read from Redis once."""

    vitals: Vitals
    health: Health
    beats: Sequence[Beat]


@dataclass(slots=True)
class _Made:
    """A check as far as it got."""

    seen: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    reason: str = ""
    state: State | None = None


class Visit:
    """What checks have at hand. `environment` are the variables of this process, that the definitions may take."""

    def __init__(self, settings: Settings, environment: Mapping[str, str], *, seconds: float = MOST_SECONDS) -> None:
        self.settings = settings
        self.environment = environment
        self.ends = time.monotonic() + seconds
        self._local = threading.local()
        self._shared: dict[str, Future[Any]] = {}
        self._lock = threading.Lock()

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self.ends - time.monotonic())

    def seen(self, text: str) -> None:
        """Tell what this check looked at; may be called again."""
        self._local.made.seen.append(text)

    def redis(self) -> Diagnosis:
        """The server. Raises StoreError where it cannot be asked."""
        return self._once("redis", self._connect)

    def info(self) -> Mapping[str, Any]:
        """What the server says of itself, also while it answers nothing else because it reads its data. Raises StoreError."""
        return self._once("info", lambda: self.redis().info())

    def read(self) -> Seen:
        """What was read of Redis at the beginning. Raises StoreError."""
        return self._once("read", self._read)

    def figures(self) -> Figures:
        """The platform in numbers, read once. Raises StoreError."""
        return self._once("figures", lambda: self.redis().store.figures())

    def samples(self) -> Sequence[Sample]:
        """How it was minute by minute, as far as it was noted without a gap up to now; the oldest first. Raises StoreError."""
        return self._once("samples", self._read_samples)

    def catalogue(self) -> tuple[Catalogue, list[str]]:
        """The definitions here, and the faults of their files."""
        return self._once("catalogue", self._load)

    def health(self, code: Callable[[str], bool]) -> Iterator[Finding]:
        """What `Platform.health` finds under such codes."""
        for one in self.read().health.problems:
            if code(one.code):
                known = KNOWN[one.code]
                severity = {"error": Severity.CRITICAL, "warning": Severity.WARNING, "info": Severity.INFO}[one.severity]
                mend = known.mend.format(subject=one.subject)
                yield Finding(code=one.code, severity=severity, subject=one.subject, what=one.text, why=known.why, mend=mend)

    def close(self) -> None:
        """Close the connections; who still waits for an answer gets none."""
        with self._lock:
            made = self._shared.get("redis")
        if made is not None and made.done() and made.exception() is None:
            made.result().close()

    def _once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives, for all checks together; whoever asks first makes it."""
        with self._lock:
            future, first = self._shared.get(name), name not in self._shared
            if future is None:
                future = self._shared[name] = Future()
        if first:
            try:
                future.set_result(make())
            except BaseException as fault:
                future.set_exception(fault)
        found: T = future.result()
        return found

    def _connect(self) -> Diagnosis:
        chosen = self.settings
        found = Diagnosis(chosen.redis_url, tls=chosen.redis_tls, namespace=chosen.namespace, timeout=REDIS_SECONDS)
        try:
            found.info()
        except BaseException:
            found.close()
            raise
        return found

    def _read(self) -> Seen:
        store = self.redis().store
        return Seen(store.vitals(), check_health(store, self.settings), store.beats())

    def _read_samples(self) -> Sequence[Sample]:
        store = self.redis().store
        found, before_ms = [], store.now_ms()
        for one in reversed(store.samples()):
            if abs(before_ms - one.at_ms) > _GAP_MS:
                break
            found.append(one)
            before_ms = one.at_ms
        return found[::-1]

    def _load(self) -> tuple[Catalogue, list[str]]:
        import_from_here()
        catalogue, faults = check_files([self.settings.tasks_dir], environment=self.environment)
        return catalogue, list(map(str, [*faults, *resolve_calls(catalogue)]))


Check = Callable[[Visit], Iterator[Finding]]


def import_from_here() -> None:
    """Let what lies in the current folder be imported, as the celery command has it."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)


def make(visit: Visit, checks: Mapping[str, Check]) -> Report:
    """All of them, in threads that may outlive the visit: a name server cannot be interrupted."""
    made = {name: _Made() for name in checks}
    threads = {
        name: threading.Thread(target=partial(_make, visit, check, made[name]), name=f"doctor {name}", daemon=True)
        for name, check in checks.items()
    }
    for thread in threads.values():
        thread.start()
    for thread in threads.values():
        thread.join(visit.left)
    results = tuple(_result(name, one, done=not threads[name].is_alive()) for name, one in made.items())
    visit.close()
    return Report(at_ms=time.time_ns() // 1_000_000, results=results)


def _make(visit: Visit, check: Check, made: _Made) -> None:
    visit._local.made = made
    try:
        made.findings.extend(check(visit))
    except Nothing as why:
        made.state, made.reason = State.SKIPPED, str(why)
    except StoreUnavailable:
        made.state, made.reason = State.UNKNOWN, "Redis cannot be asked"
    except TaskPlatformError as fault:
        made.state, made.reason = State.UNKNOWN, str(fault)
    except Exception as fault:
        log.debug("a check failed", exc_info=True)
        made.state, made.reason = State.UNKNOWN, f"the check itself failed: {type(fault).__name__}: {fault}"


def _result(name: str, made: _Made, *, done: bool) -> Result:
    order = list(Severity)
    findings = sorted(made.findings, key=lambda one: order.index(one.severity))
    worst = next((State(one.severity) for one in findings if one.severity is not Severity.INFO), None)
    state, reason = made.state, made.reason
    if not done:
        state, reason = State.UNKNOWN, "it took too long"
    return Result(
        check=name,
        state=worst or state or State.OK,
        seen="; ".join(made.seen),
        reason=reason,
        findings=tuple(findings),
    )


# --- what health finds -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Known:
    """What there is to say of a problem that `health` found."""

    why: str
    mend: str


_LOG = "read the log of "
_JOBS = "taskplatform jobs show {subject}"

#: By the code of the problem. `{subject}` is what it is about.
KNOWN: Mapping[str, Known] = {
    "redis_not_master": Known("A replica refuses every write.", "TASKPLATFORM_REDIS_URL=… of the master"),
    "redis_memory": Known("When it is full, Redis refuses new jobs.", "redis-cli CONFIG SET maxmemory …; TASKPLATFORM_RETENTION=1d"),
    "redis_evicts": Known("Jobs and plans are thrown away without a word.", "redis-cli CONFIG SET maxmemory-policy noeviction"),
    "redis_aof_off": Known(
        "A crash of the server loses jobs, histories and subscriptions.", "redis-cli CONFIG SET appendonly yes && redis-cli CONFIG REWRITE"
    ),
    "redis_cannot_save": Known("What is done now is lost with a crash, and Redis may refuse writes.", "redis-cli INFO persistence; df -h"),
    "redis_clients": Known("Processes that start find no connection.", "redis-cli CONFIG SET maxclients …; redis-cli CLIENT LIST"),
    "planner_missing": Known("Nothing is planned.", "celery -A taskplatform.app beat"),
    "planner_stopped": Known("Nothing is planned while no beat leads.", "celery -A taskplatform.app beat"),
    "planner_behind": Known("Jobs are made late.", _LOG + "{subject}"),
    "planner_failing": Known("What cannot be planned makes no jobs.", _LOG + "{subject}"),
    "no_worker": Known("No job runs, and what a dead worker left is taken over by nobody.", "celery -A taskplatform.app worker"),
    "worker_late": Known("It may be about to count as lost; then its jobs run again elsewhere.", _LOG + "{subject}"),
    "recovery_stuck": Known("Its jobs are recorded as running, and nobody runs them.", "restart the workers, one after the other"),
    "queue_unserved": Known("Jobs of this priority do not run.", "celery -A taskplatform.app worker -Q {subject}"),
    "release_stuck": Known("Jobs wait although there is room for them.", "restart a worker; its log has lines about release"),
    "queue_stuck": Known("Released jobs are not taken.", "restart that worker"),
    "run_too_long": Known("It holds a slot, and nothing ends it.", _JOBS),
    "breaker_open": Known("Jobs of this host wait.", "taskplatform breakers reset {subject}"),
    "host_held": Known("Jobs of this host wait, as it asked for.", "taskplatform breakers reset {subject}"),
    "probe_stuck": Known("All other jobs of this host wait for that one.", "taskplatform breakers reset {subject}"),
    "dead_letters": Known("Somebody has to decide what becomes of them.", "taskplatform dead-letters list"),
    "definition_paused": Known("None of its jobs are planned or released.", "taskplatform resume {subject}"),
}
