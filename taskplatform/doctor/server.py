"""The checks of Redis."""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import ip_address
from urllib.parse import urlsplit

from taskplatform.doctor.report import Finding, Severity
from taskplatform.doctor.trend import growth
from taskplatform.doctor.visit import Visit
from taskplatform.errors import Outage, StoreError, StoreUnavailable
from taskplatform.model import span_text
from taskplatform.node import ClockGauge
from taskplatform.settings import shown_url
from taskplatform.store.acl import Role, rules

#: The first Redis that has all that the scripts and the API use (`SET` with `NX` and `GET`; `ZRANGE` and `ZMSCORE` came before).
OLDEST_REDIS = (7, 0)
#: Seconds.
SLOW_MEDIAN, VERY_SLOW_MEDIAN, SLOW_ONCE = 0.02, 0.2, 1.0
#: This machine and Redis may differ by so much; by more, calls that are signed are refused by their targets.
CLOCK_MS, CLOCK_BAD_MS = 1000, 300_000
_MOST_OF_MACHINE = 0.75
_MOST_FRAGMENTATION, _WORTH_BYTES = 1.5, 100 * 1024 * 1024
_LONGEST_LAG = 10
_FULL_HOURS = 24


def reach(visit: Visit) -> Iterator[Finding]:
    """Whether it answers."""
    shown = shown_url(visit.settings.redis_url)
    try:
        visit.redis()
    except StoreError as fault:
        loads = isinstance(fault, StoreUnavailable) and fault.outage is Outage.LOADING
        yield Finding(
            code="redis_loading" if loads else "redis_away",
            severity=Severity.CRITICAL,
            subject=shown,
            what=str(fault),
            why="Nothing is planned, released or recorded while Redis cannot be used. Checks that ask it were not made.",
            mend=_reach_again(fault).format(url=shown),
        )
    else:
        visit.seen(shown)


def _reach_again(fault: StoreError) -> str:
    if not isinstance(fault, StoreUnavailable):
        return "TASKPLATFORM_REDIS_URL=… with the right user and password; redis-cli -u {url} ACL WHOAMI"
    if fault.outage is Outage.LOADING:
        return "wait; redis-cli INFO persistence says how far it is"
    if fault.outage is Outage.CLIENTS:
        return "redis-cli CONFIG SET maxclients 15000; look which processes open so many"
    if fault.outage is Outage.UNTRUSTED:
        return "TASKPLATFORM_REDIS_CA=… of the CA that signed its certificate, and the name in it in TASKPLATFORM_REDIS_URL"
    return "start that server, or set TASKPLATFORM_REDIS_URL; redis-cli -u {url} PING"


def version(visit: Visit) -> Iterator[Finding]:
    """Whether it has what the scripts use."""
    info = visit.info()
    valkey = info.get("valkey_version")
    text = str(valkey or info.get("redis_version", ""))
    visit.seen(f"{'Valkey' if valkey else 'Redis'} {text}")
    numbers = tuple(map(int, re.findall(r"\d+", str(info.get("redis_version", "")))[:2]))
    if not valkey and numbers < OLDEST_REDIS:
        yield Finding(
            code="redis_old",
            severity=Severity.CRITICAL,
            subject="",
            what=f"Redis {text} is older than {'.'.join(map(str, OLDEST_REDIS))}.",
            why="Scripts use commands that it does not have, or has in another way: they fail in the middle of work.",
            mend="install Redis 7.0 or newer, or Valkey",
        )


def persistence(visit: Visit) -> Iterator[Finding]:
    """What a crash of the server would cost."""
    info = visit.info()
    if info.get("aof_last_bgrewrite_status", "ok") != "ok":
        yield Finding(
            code="redis_rewrite_failed",
            severity=Severity.WARNING,
            subject="",
            what="Redis could not rewrite its append-only file the last time.",
            why="The file grows until the disk is full, and then Redis takes no writes.",
            mend="df -h; redis-cli BGREWRITEAOF",
        )
    yield from visit.health(lambda code: code in ("redis_aof_off", "redis_cannot_save"))
    if not info.get("aof_enabled"):
        visit.seen("no append-only file")
        return
    fsync = visit.redis().config("appendfsync")
    visit.seen(f"append-only file, appendfsync {fsync or 'not known: this user may not ask'}")
    if fsync == "no":
        yield Finding(
            code="redis_fsync_no",
            severity=Severity.WARNING,
            subject="",
            what="appendfsync is no.",
            why="When the machine crashes, all that the kernel has not written yet is lost: half a minute or more.",
            mend="redis-cli CONFIG SET appendfsync everysec && redis-cli CONFIG REWRITE",
        )


def eviction(visit: Visit) -> Iterator[Finding]:
    """Whether it may throw data away."""
    info = visit.info()
    policy = str(info.get("maxmemory_policy", ""))
    visit.seen(f"maxmemory-policy {policy or 'not told'}")
    found = list(visit.health(lambda code: code == "redis_evicts"))
    yield from found
    if policy not in ("", "noeviction") and not found:
        yield Finding(
            code="redis_would_evict",
            severity=Severity.WARNING,
            subject="",
            what=f"maxmemory-policy is {policy}; without maxmemory nothing is thrown away yet.",
            why="As soon as maxmemory is set, jobs and plans are thrown away without a word.",
            mend="redis-cli CONFIG SET maxmemory-policy noeviction && redis-cli CONFIG REWRITE",
        )


def memory(visit: Visit) -> Iterator[Finding]:
    """How much room is left."""
    info = visit.info()
    used, most, machine = (int(info.get(name, 0)) for name in ("used_memory", "maxmemory", "total_system_memory"))
    visit.seen(f"{_megabytes(used)} of {_megabytes(most) if most else 'no maxmemory'}")
    yield from visit.health(lambda code: code == "redis_memory")
    if not most and machine and used > machine * _MOST_OF_MACHINE:
        yield Finding(
            code="redis_fills_machine",
            severity=Severity.WARNING,
            subject="",
            what=f"Redis uses {used / machine:.0%} of its machine's memory and has no maxmemory.",
            why="The kernel ends it when memory is used up. With maxmemory it refuses new jobs instead, and goes on with what it has.",
            mend="redis-cli CONFIG SET maxmemory … && redis-cli CONFIG REWRITE",
        )
    yield from _fills(visit, used, most or int(machine * _MOST_OF_MACHINE))
    fragmentation = float(info.get("mem_fragmentation_ratio", 1))
    resident = int(info.get("used_memory_rss", 0))
    if fragmentation > _MOST_FRAGMENTATION and used > _WORTH_BYTES:
        yield Finding(
            code="redis_fragmented",
            severity=Severity.WARNING,
            subject="",
            what=f"Redis holds {_megabytes(resident)} of memory for {_megabytes(used)} of data.",
            why="What is fragmented is used up for the machine, and holds nothing.",
            mend="redis-cli CONFIG SET activedefrag yes, or redis-cli MEMORY PURGE",
        )


def _fills(visit: Visit, used: int, room: int) -> Iterator[Finding]:
    """Whether it will be full within a day, if it grows as in the last hours."""
    grown = growth(visit.samples(), lambda one: one.memory)
    if grown is None or not room or used >= room:
        return
    hours = (room - used) / grown.per_hour
    if hours < _FULL_HOURS:
        yield Finding(
            code="redis_memory_grows",
            severity=Severity.WARNING,
            subject="",
            what=f"Redis' data grew by {_megabytes(grown.per_hour)} an hour; so it is full, at {_megabytes(room)}, in "
            f"{span_text(hours * 3_600_000)}.",
            why="A full Redis takes no new jobs; without maxmemory the kernel ends it.",
            mend="taskplatform jobs list; redis-cli CONFIG SET maxmemory …, or a shorter TASKPLATFORM_RETENTION",
        )


def latency(visit: Visit) -> Iterator[Finding]:
    """How fast it answers."""
    found = visit.redis().latency()
    slow = visit.redis().slow_commands()
    logged = "" if slow is None else f", {slow} slow commands logged"
    visit.seen(f"median {found.median * 1000:.1f} ms, longest {found.longest * 1000:.1f} ms of {found.count}{logged}")
    if found.median > SLOW_MEDIAN or found.longest > SLOW_ONCE:
        yield Finding(
            code="redis_slow",
            severity=Severity.CRITICAL if found.median > VERY_SLOW_MEDIAN else Severity.WARNING,
            subject="",
            what=f"Redis answers a PING in {found.median * 1000:.1f} ms (median of {found.count}), the slowest took {found.longest:.2f} s.",
            why="Each start and each end of a job is a round trip: a worker runs fewer jobs, and moments are missed.",
            mend="redis-cli --latency; redis-cli SLOWLOG GET 10; run Redis near the workers",
        )


def clients(visit: Visit) -> Iterator[Finding]:
    """How many connections it has."""
    info = visit.info()
    visit.seen(f"{info.get('connected_clients', '?')} of {info.get('maxclients', '?')}")
    yield from visit.health(lambda code: code == "redis_clients")


def replicas(visit: Visit) -> Iterator[Finding]:
    """Its role, and whether its replicas follow."""
    info = visit.info()
    count = int(info.get("connected_slaves", 0))
    visit.seen(f"{info.get('role', '?')} with {count} replica{'' if count == 1 else 's'}")
    yield from visit.health(lambda code: code == "redis_not_master")
    for number in range(count):
        one = info.get(f"slave{number}")
        if not isinstance(one, dict):
            continue
        lag, state = int(one.get("lag", 0)), str(one.get("state", ""))
        if state != "online" or lag > _LONGEST_LAG:
            yield Finding(
                code="redis_replica_behind",
                severity=Severity.WARNING,
                subject=f"{one.get('ip', '')}:{one.get('port', '')}",
                what=f"The replica is {state or 'not known'} and was heard {lag} s ago.",
                why="A fail-over to it loses all that it has not got.",
                mend="redis-cli INFO replication; read the log of the replica",
            )


def clock(visit: Visit) -> Iterator[Finding]:
    """This machine's clock beside that of Redis."""
    ahead_ms, error_ms = ClockGauge(visit.redis().store.now_ms).measure()
    visit.seen(f"this machine is {ahead_ms:+d} ms, give or take {error_ms} ms")
    yield from clock_finding("this machine", ahead_ms, error_ms)


def clock_finding(whose: str, ahead_ms: int, error_ms: int) -> Iterator[Finding]:
    """One where the clocks differ by too much."""
    surely = abs(ahead_ms) - error_ms
    if surely > CLOCK_MS:
        yield Finding(
            code="clock_off",
            severity=Severity.CRITICAL if surely > CLOCK_BAD_MS else Severity.WARNING,
            subject=whose,
            what=f"The clock of {whose} is {abs(ahead_ms) / 1000:.1f} s {'ahead of' if ahead_ms > 0 else 'behind'} that of Redis.",
            why="Jobs go by the clock of Redis. Logs, certificates, signatures of calls and dates in answers go by each machine's own.",
            mend="chronyc makestep, or timedatectl set-ntp true, on the machine whose clock is wrong",
        )


def rights(visit: Visit) -> Iterator[Finding]:
    """Whether this user may do what the platform does, and no more."""
    redis, chosen = visit.redis(), visit.settings
    found, user = redis.rights(), redis.user()
    path = urlsplit(chosen.redis_url).path.strip("/")
    database = int(path) if path.isdigit() and chosen.redis_url.startswith("redis") else 0
    _, login = chosen.redis_address
    name = user or login.get("username") or "default"
    visit.seen(f"user {name}")
    mend = f"redis-cli ACL SETUSER {name} {rules(Role.PLATFORM, namespace=chosen.namespace, database=database)}"
    if found.missing:
        more = " and perhaps more" if "+multi" in found.missing else ""
        yield Finding(
            code="redis_rights_missing",
            severity=Severity.CRITICAL,
            subject=name,
            what=f"User {name} lacks rights that the platform needs: {' '.join(found.missing)}{more}.",
            why="Scripts fail in the middle of work, or workers cannot take messages.",
            mend=mend,
        )
    if found.administration or found.foreign_keys:
        remote = not is_local(chosen.redis_url)
        may = [*(f"use {command}" for command in found.administration), *(["read keys of others"] if found.foreign_keys else [])]
        bare = " and no password is asked for" if not login.get("password") else ""
        yield Finding(
            code="redis_rights_wide",
            severity=(Severity.CRITICAL if bare else Severity.WARNING) if remote else Severity.INFO,
            subject=name,
            what=f"User {name} may also {', '.join(may)}{bare}.",
            why="Whoever gets at one process, or reaches the server, can read other data, change the server, and delete everything.",
            mend=mend.replace(f"SETUSER {name} ", "SETUSER taskplatform on '>PASSWORD' "),
        )


def tls(visit: Visit) -> Iterator[Finding]:
    """Whether what goes to Redis can be read on the way."""
    url = visit.settings.redis_url
    visit.seen("TLS, verified" if url.startswith("rediss:") else "on this machine" if is_local(url) else "no TLS")
    if not url.startswith("rediss:") and not is_local(url):
        yield Finding(
            code="redis_no_tls",
            severity=Severity.WARNING,
            subject="",
            what=f"{shown_url(url)} is another machine, and the connection is not encrypted.",
            why="The password, parameters of jobs and whole calls can be read and changed on the way.",
            mend="TASKPLATFORM_REDIS_URL=rediss://… and TASKPLATFORM_REDIS_CA=…",
        )


def is_local(url: str) -> bool:
    """Whether a URL of Redis leads to this machine."""
    if url.startswith("unix:"):
        return True
    return is_loopback(urlsplit(url).hostname or "")


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


def _megabytes(size: float) -> str:
    return f"{size / 1024 / 1024:,.0f} MiB"
