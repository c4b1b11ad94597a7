"""The run of a verification: leftovers of earlier ones, the checks, and what it has made removed again, however it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from taskplatform.catalogue import Catalogue
from taskplatform.drills import CALL, drills
from taskplatform.errors import InvalidInput, StoreError, TaskPlatformError, UnknownDefinition
from taskplatform.faults import did_you_mean
from taskplatform.platform import Platform
from taskplatform.settings import Settings, shown_url
from taskplatform.store import Store
from taskplatform.verification import checks, disruptive, doors
from taskplatform.verification.disruptive import Disruption
from taskplatform.verification.jobs import Drill, Finding, NotRun
from taskplatform.verification.report import Line, Outcome, Report

TIMEOUT = timedelta(seconds=60)

#: By name, in the order of the report.
TITLES: Mapping[str, str] = {
    "services": "Services and versions",
    "heartbeats": "Heartbeats",
    "leader": "One leader",
    "latency": "Assignment latency",
    "priority": "Strict priority",
    "lifecycle": "Every transition of a job",
    "retry": "Retry and backoff",
    "idempotency": "Idempotency",
    "distribution": "Distribution over the window",
    "limit": "Limit over all workers",
    "api": "API: keys and TLS",
    "redis_tls": "Redis: TLS",
    "takeover": "Take-over of a killed leader",
    "orphans": "Jobs of a killed worker",
}
_DISRUPTIVE = ("takeover", "orphans")
#: Generators, that have to wait for their jobs.
_PATIENT = ("lifecycle", "retry", "distribution")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is to be verified, and how."""

    only: Collection[str] = ()
    """Names of checks; empty: all."""
    disruption: Disruption | None = None
    """None: nothing is killed."""
    timeout: timedelta = TIMEOUT
    """How long each check waits for its jobs."""
    api_url: str | None = None
    api_ca: Path | None = None
    api_key: str | None = field(default=None, repr=False)
    window: timedelta = checks.WINDOW
    """Over which the occurrence of the distribution is spread."""
    listen: str | None = None
    """Address and port of the target of calls, where it is not that of `verify_target`."""

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in TITLES:
                raise InvalidInput(f"there is no check {name!r}{did_you_mean(name, TITLES)}: {', '.join(TITLES)} are")
        if not timedelta(seconds=1) <= self.timeout <= timedelta(minutes=10):
            raise InvalidInput(f"timeout {self.timeout} is not accepted: 1 s to 10 min is")


def connect(chosen: Settings, *, actor: str = "verify") -> Platform:
    """The deployed platform, through Redis, with the verification's definitions and no others.

    Publishes nothing: what beat and workers do not have cannot be run. Raises StoreError.
    """
    store = Store.connect(chosen.redis_url, tls=chosen.redis_tls, namespace=chosen.namespace, change_log_size=chosen.change_log_size)
    try:
        store.ping()
        # what is deployed says whether there is a target, not the settings of whoever verifies
        called = store.host_of(CALL) if CALL in store.published() else None
        target = chosen.verify_target or (None if called is None else f"http://{called}")
        own = drills(target if called is not None else None)
        return Platform(store, Catalogue.of(*own), chosen, actor=actor)
    except BaseException:
        store.close()
        raise


def verify(platform: Platform, settings: Settings, options: Options, *, say: Callable[[str], object] = lambda _: None) -> Report:
    """Verify a platform: `Platform`, or another with its methods. `say` is told each check's outcome.

    The users and jobs that it made are removed at the end, also of a KeyboardInterrupt. Raises StoreError where Redis cannot be reached,
    and UnknownDefinition where the platform does not have the verification's definitions.
    """
    drill = Drill(platform, settings, timeout=options.timeout, say=say)
    _require_definitions(drill)
    began, clock = datetime.now(UTC), time.monotonic()
    removed, running = drill.remove_leftovers()
    if removed:
        say(f"{removed} users that an earlier verification had left were removed")
    try:
        lines = list(_lines(drill, options))
    finally:
        own = drill.remove_own()
    text = f"{own} users of this verification were removed, with their jobs"
    text += f"; {removed} that an earlier one had left, too" if removed else ""
    text += f"; {running} of another verification that goes on were left" if running else ""
    return Report(
        run=drill.run,
        began=began,
        seconds=time.monotonic() - clock,
        where=_where(drill, options),
        disruptive=options.disruption is not None,
        lines=lines,
        removed=text,
    )


def _require_definitions(drill: Drill) -> None:
    if drill.remote:
        for one in drills():
            drill.platform.definition(one.id)
        return
    missing = {one.id for one in drills()} - drill.store.published()
    if missing:
        raise UnknownDefinition(
            "no beat and no worker has published the verification's definitions: none of this release runs with this Redis and namespace, "
            "or their setting TASKPLATFORM_VERIFY_DEFINITIONS is false"
        )


def _where(drill: Drill, options: Options) -> str:
    return f"the API at {options.api_url}" if drill.remote else f"Redis at {shown_url(drill.settings.redis_url)}"


_Check = Callable[[Drill], Finding | Iterator[Finding]]


def _lines(drill: Drill, options: Options) -> Iterator[Line]:
    """In the order of the report. What has to wait for its jobs begins before the others, and is judged after them."""
    wanted = [name for name in TITLES if not options.only or name in options.only]
    made = {name: _Attempt(name, check, drill) for name, check in _all(options).items() if name in wanted}
    # jobs of the others would stand in the way of what is measured
    first = ("services", "heartbeats", "leader", "latency")
    for name in first:
        if name in made:
            made[name].finish()
    for one in made.values():
        if one.patient:
            one.begin()
    for name, one in made.items():
        if not one.patient and name not in _DISRUPTIVE:
            one.finish()
    for name, one in made.items():
        if name not in _DISRUPTIVE:
            one.finish()
    for name in _DISRUPTIVE:
        if name in made:
            made[name].finish()
    return (made[name].line() for name in wanted)


def _all(options: Options) -> dict[str, _Check]:
    harmless: dict[str, _Check] = {
        "services": checks.services,
        "heartbeats": checks.heartbeats,
        "leader": checks.leader,
        "latency": checks.latency,
        "priority": checks.priority,
        "lifecycle": checks.lifecycle,
        "retry": checks.retry,
        "idempotency": checks.idempotency,
        "distribution": partial(checks.distribution, window=options.window),
        "limit": partial(checks.limit, listen=options.listen),
        "api": partial(doors.api, url=options.api_url, ca=options.api_ca, key=options.api_key),
        "redis_tls": doors.redis_tls,
    }
    if options.disruption is None:
        return {**harmless, **dict.fromkeys(_DISRUPTIVE, _not_asked_for)}
    how = options.disruption
    return {**harmless, "takeover": partial(disruptive.takeover, disruption=how), "orphans": partial(disruptive.orphans, disruption=how)}


def _not_asked_for(_: Drill) -> Finding:
    raise NotRun("it kills a process: ask for it with --disruptive")


class _Attempt:
    """A check as it is made, in one step or in two."""

    def __init__(self, name: str, check: _Check, drill: Drill) -> None:
        self._name = name
        self._check = check
        self._drill = drill
        self._seconds = 0.0
        self._rest: Iterator[Finding] | None = None
        self._line: Line | None = None
        self.patient = name in _PATIENT

    def begin(self) -> None:
        """The first step; of a check of one step all of it."""
        began = time.monotonic()
        with_rest: Iterator[Finding] | None = None
        try:
            found = self._check(self._drill)
            if not isinstance(found, Finding):
                with_rest = found
                next(with_rest)
            else:
                self._end(found.line(self._name, TITLES[self._name], time.monotonic() - began))
        except (NotRun, TaskPlatformError) as fault:
            self._broken(fault, time.monotonic() - began)
        else:
            self._rest = with_rest
        self._seconds = time.monotonic() - began

    def finish(self) -> None:
        """All of it, or what is left."""
        if self._line is None and self._rest is None:
            self.begin()
        if self._line is not None or self._rest is None:
            return
        began = time.monotonic()
        try:
            found = next(self._rest)
        except (NotRun, TaskPlatformError) as fault:
            self._broken(fault, self._seconds + time.monotonic() - began)
        else:
            self._end(found.line(self._name, TITLES[self._name], self._seconds + time.monotonic() - began))

    def line(self) -> Line:
        """What came of it."""
        assert self._line is not None
        return self._line

    def _broken(self, fault: TaskPlatformError, seconds: float) -> None:
        """What cannot be made, and what a platform that does not work makes impossible."""
        if isinstance(fault, StoreError):
            raise fault
        outcome = Outcome.NOT_RUN if isinstance(fault, NotRun) else Outcome.FAILED
        self._end(Line(check=self._name, title=TITLES[self._name], outcome=outcome, text=str(fault), seconds=seconds))

    def _end(self, line: Line) -> None:
        self._line = line
        self._drill.say(f"{line.outcome.value:8} {line.title}: {line.text}")
