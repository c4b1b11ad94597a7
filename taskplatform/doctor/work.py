"""The checks of definitions, and of the hosts that they call."""

from __future__ import annotations

import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from taskplatform.addresses import AllowList
from taskplatform.capacity import Demand, fit
from taskplatform.doctor.report import Finding, Severity
from taskplatform.doctor.server import span_text
from taskplatform.doctor.visit import Nothing, Visit
from taskplatform.model import Priority, Schedule
from taskplatform.schedule import occurrences
from taskplatform.store.diagnosis import InForce

_DAY_MS = 86_400_000
#: Looked at, for how often a definition comes due.
_MOST_OCCURRENCES = 300
#: A limit that is used by so much in the long run is nearly used up.
_NEARLY = 0.8
_SHOWN_FAULTS = 5
#: Name lookup, and then connecting.
_CONNECT_SECONDS = 3.0
_MOST_HOSTS = 64


def files(visit: Visit) -> Iterator[Finding]:
    """Whether the definitions here can be loaded, as a worker would."""
    catalogue, faults = visit.catalogue()
    visit.seen(f"{len(catalogue)} in {visit.settings.tasks_dir}")
    for fault in faults[:_SHOWN_FAULTS]:
        yield Finding(
            code="definition_fault",
            severity=Severity.WARNING,
            subject=fault.partition(" ")[0].rstrip(":"),
            what=fault,
            why="A worker or beat that starts here, with this environment, ends at once.",
            mend="taskplatform tasks check",
        )
    if len(faults) > _SHOWN_FAULTS:
        yield Finding(
            code="definition_faults_more",
            severity=Severity.WARNING,
            subject="",
            what=f"{len(faults) - _SHOWN_FAULTS} faults more.",
            why="A worker or beat that starts here, with this environment, ends at once.",
            mend="taskplatform tasks check",
        )


def capacity(visit: Visit) -> Iterator[Finding]:
    """Whether the limits let through what comes due, in the long run."""
    yield from visit.health(lambda code: code == "definition_paused")
    redis = visit.redis()
    rates = {name: limit.sustained for name, limit in redis.store.limits().items() if limit.sustained}
    known = [one for one in redis.definitions() if one.schedule is not None and one.subscribers and not one.paused]
    now_ms = redis.store.now_ms()
    visit.seen(f"{len(known)} definitions with subscribers, {len(rates)} limits")
    demand: defaultdict[str, float] = defaultdict(float)
    asked: defaultdict[str, list[str]] = defaultdict(list)
    for one in known:
        assert one.schedule is not None
        period_ms = period(one.schedule, now_ms)
        if period_ms is None:
            continue
        limits = tuple(name for name in (f"definition:{one.id}", f"host:{one.host}", "total") if name in rates)
        for name in limits:
            demand[name] += one.subscribers / period_ms * 1000
            asked[name].append(one.id)
        yield from _alone(one, limits, rates, period_ms)
    for name, per_second in sorted(demand.items()):
        used = per_second / rates[name]
        if used > _NEARLY and not (used > 1 and len(asked[name]) == 1):
            yield Finding(
                code="limit_cannot_carry" if used > 1 else "limit_nearly_used",
                severity=Severity.CRITICAL if used > 1 else Severity.WARNING,
                subject=name,
                what=f"{len(asked[name])} definitions ask for {per_second:.2f} jobs a second in the long run, and limit {name} "
                f"lets {rates[name]:g} through ({used:.0%}).",
                why="The backlog grows without end." if used > 1 else "After an outage there is hardly room to catch up.",
                mend=f"taskplatform limits set {name} --rate …, or fewer subscribers or occurrences",
            )


def _alone(one: InForce, limits: Sequence[str], rates: Mapping[str, float], period_ms: float) -> Iterator[Finding]:
    """A definition by itself: its window beside the time to its next occurrence."""
    rank = list(Priority).index(one.priority)
    (found,) = fit(rates, (), [Demand(0, one.window_ms, one.subscribers, rank, tuple(limits))])
    if found.window_ms > period_ms:
        yield Finding(
            code="definition_cannot_be_met",
            severity=Severity.CRITICAL,
            subject=one.id,
            what=f"{one.subscribers:,} subscribers need a window of {span_text(found.window_ms / 1000)}"
            f"{f' under limit {found.limit}' if found.limit else ''}, and it comes due every {span_text(period_ms / 1000)}.",
            why="The next occurrence comes due before this one is done: each is later than the one before.",
            mend=f"taskplatform limits set {found.limit} --rate …"
            if found.limit
            else f"a shorter window for {one.id}, or a longer interval",
        )
    elif found.window_ms > one.window_ms:
        yield Finding(
            code="window_widened",
            severity=Severity.INFO,
            subject=one.id,
            what=f"Its window of {span_text(one.window_ms / 1000)} becomes {span_text(found.window_ms / 1000)} under limit {found.limit}.",
            why="Its users' jobs come later than its window says.",
            mend=f"taskplatform occurrences {one.id}; taskplatform limits set {found.limit} --rate …, or a longer window",
        )


def period(schedule: Schedule, now_ms: int) -> float | None:
    """Milliseconds between two occurrences, on average over a day, or between the next two. None where there are no two."""
    found: list[int] = []
    for at_ms in islice(occurrences(schedule, now_ms, now_ms + 800 * _DAY_MS), _MOST_OCCURRENCES):
        found.append(at_ms)
        if len(found) > 1 and at_ms > now_ms + _DAY_MS:
            break
    return (found[-1] - found[0]) / (len(found) - 1) if len(found) > 1 else None


# --- hosts -----------------------------------------------------------------------------------------------------------


def hosts(visit: Visit) -> Iterator[Finding]:
    """Whether what the definitions call can be reached from here."""
    catalogue, _ = visit.catalogue()
    servers: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    unknown = 0
    for id_, definition in catalogue.items():
        if definition.config is None:
            continue
        server = definition.config.server(visit.environment)
        if server is None:
            unknown += 1
        else:
            servers[server].append(id_)
    if unknown:
        visit.seen(f"of {unknown} definitions the host is not known here")
    found: dict[tuple[str, int], str] = {}
    guard = AllowList(visit.settings.http_allow)
    chosen = sorted(servers)[:_MOST_HOSTS]
    threads = [threading.Thread(target=_try, args=(guard, server, found), name=f"doctor {server[0]}", daemon=True) for server in chosen]
    for thread in threads:
        thread.start()
    ends = min(visit.ends - 0.5, time.monotonic() + 2 * _CONNECT_SECONDS)
    for thread in threads:
        thread.join(max(0.0, ends - time.monotonic()))
    reached = [server for server in chosen if found.get(server) == ""]
    visit.seen(
        f"{len(reached)} of {len(chosen)} hosts reached"
        + (f", {len(servers) - len(chosen)} not tried" if len(servers) > len(chosen) else "")
    )
    for server in chosen:
        fault = found.get(server, "no answer in time")
        if fault:
            yield _unreachable(server, fault, servers[server])
    if not servers and unknown == 0:
        visit.seen("no definition calls one")
    yield from visit.health(lambda code: code in ("breaker_open", "host_held", "probe_stuck"))


def _unreachable(server: tuple[str, int], fault: str, ids: Sequence[str]) -> Finding:
    host, port = server
    shown = f"{f'[{host}]' if ':' in host else host}:{port}"
    others = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
    what = f"{shown}, which {ids[0]}{others} call, cannot be called: {fault}"
    if fault.startswith("address "):
        return Finding(
            code="host_refused",
            severity=Severity.CRITICAL,
            subject=shown,
            what=what,
            why="Each of these jobs fails for good, because the platform refuses the address.",
            mend=f"TASKPLATFORM_HTTP_ALLOW={shown}, if that is meant",
        )
    return Finding(
        code="host_unreachable",
        severity=Severity.WARNING,
        subject=shown,
        what=what,
        why="Each of these jobs fails and is tried again, if the workers' network is as that of this machine.",
        mend=f"curl -v telnet://{shown}; check name, network and the host itself",
    )


def _try(guard: AllowList, server: tuple[str, int], found: dict[tuple[str, int], str]) -> None:
    """Look the name up and connect, as a call would; sends nothing."""
    host, port = server
    fault = "the name has no address"
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            text = str(address[0])
            refusal = guard.refusal(host, port, text)
            if refusal:
                fault = refusal
                continue
            with socket.socket(family, kind, protocol) as one:
                one.settimeout(_CONNECT_SECONDS)
                try:
                    one.connect(address)
                except OSError as problem:
                    fault = str(problem.strerror or problem).lower()
                else:
                    found[server] = ""
                    return
    except socket.gaierror as problem:
        fault = f"the name cannot be looked up: {problem.strerror}"
    except (OSError, UnicodeError) as problem:
        fault = str(problem)
    found[server] = fault


def needs_files(visit: Visit) -> None:
    """Raises Nothing where there are no definitions."""
    if not visit.catalogue()[0]:
        raise Nothing(f"there are no definitions in {visit.settings.tasks_dir}")
