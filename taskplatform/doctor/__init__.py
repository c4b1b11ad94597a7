"""Finds what is wrong with an installation, why that matters, and what mends it. `taskplatform doctor`; docs/doctor.md lists the checks.

What it promises: it changes nothing; it is done in less than ten seconds, also when Redis, a host or a name server does not answer; and a
check that fails, in whatever way, hides no other.

Imports go one way: the modules with checks use `visit`, and all use `report`; `celery`, `demand` and `nodes` use what
they share with `server` and `nodes`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from taskplatform.doctor import access, celery, demand, nodes, server, work
from taskplatform.doctor.report import EXIT_CODES, Finding, Report, Result, Severity, State
from taskplatform.doctor.visit import MOST_SECONDS, Check, Visit, make
from taskplatform.errors import InvalidInput
from taskplatform.settings import Settings

__all__ = ["CHECKS", "EXIT_CODES", "Finding", "Report", "Result", "Severity", "State", "chosen", "examine"]

#: All checks, in the order in which they are shown. A part of a name before the dot stands for all that begin so.
CHECKS: Mapping[str, Check] = {
    "redis.reach": server.reach,
    "redis.version": server.version,
    "redis.persistence": server.persistence,
    "redis.eviction": server.eviction,
    "redis.memory": server.memory,
    "redis.latency": server.latency,
    "redis.clients": server.clients,
    "redis.replicas": server.replicas,
    "redis.clock": server.clock,
    "redis.rights": server.rights,
    "redis.tls": server.tls,
    "nodes.workers": nodes.workers,
    "nodes.leader": nodes.leader,
    "nodes.clocks": nodes.clocks,
    "nodes.releases": nodes.releases,
    "celery.running": celery.running,
    "celery.here": celery.here,
    "work.sets": nodes.sets,
    "work.definitions": work.files,
    "work.capacity": demand.capacity,
    "work.runs": demand.runs,
    "work.hosts": work.hosts,
    "access.keys": access.keys,
    "access.certificates": access.certificates,
    "access.settings": access.settings,
}


def chosen(only: Collection[str] = (), skip: Collection[str] = ()) -> dict[str, Check]:
    """The checks that these names, or first parts of names, choose; without `only`, all. Raises InvalidInput for a name that is none."""
    known = {*CHECKS, *(name.partition(".")[0] for name in CHECKS)}
    unknown = sorted({*only, *skip} - known)
    if unknown:
        raise InvalidInput(f"there is no check {unknown[0]!r}; checks are {', '.join(CHECKS)}, or the first part of such a name")

    def named(name: str, names: Collection[str]) -> bool:
        return name in names or name.partition(".")[0] in names

    return {name: check for name, check in CHECKS.items() if (not only or named(name, only)) and not named(name, skip)}


def examine(
    settings: Settings,
    environment: Mapping[str, str],
    *,
    only: Collection[str] = (),
    skip: Collection[str] = (),
    seconds: float = MOST_SECONDS,
) -> Report:
    """Make the checks. `environment` are the variables that definitions may take. Raises InvalidInput for a check that there is not."""
    return make(Visit(settings, environment, seconds=seconds), chosen(only, skip))
