"""Looks at a Redis server for `taskplatform doctor`: only reads, and waits for nothing longer than it was told to.

A connection of its own, which does not greet the server as the platform's do (that writes), and on which no script runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from redis.exceptions import ConnectionError, NoPermissionError, ResponseError, TimeoutError

from taskplatform.errors import StoreError
from taskplatform.model import Priority, Schedule, schedule_from_json
from taskplatform.store.acl import COMMANDS, Role
from taskplatform.store.connection import connect
from taskplatform.store.keys import UNACKED, UNACKED_INDEX, key
from taskplatform.store.store import Store

_SHA = "0" * 40
#: Behind a command and its key, what makes it one that the server would take. Nothing of it is ever carried out, see `missing_rights`.
_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "get": (),
    "set": ("",),
    "incr": (),
    "incrby": ("0",),
    "del": (),
    "exists": (),
    "expire": ("1",),
    "pexpire": ("1",),
    "pttl": (),
    "hget": ("f",),
    "hmget": ("f",),
    "hgetall": (),
    "hset": ("f", "v"),
    "hsetnx": ("f", "v"),
    "hdel": ("f",),
    "hexists": ("f",),
    "hincrby": ("f", "0"),
    "hkeys": (),
    "hlen": (),
    "lindex": ("0",),
    "llen": (),
    "lpush": ("v",),
    "lrange": ("0", "0"),
    "ltrim": ("0", "0"),
    "rpush": ("v",),
    "brpop": ("1",),
    "sadd": ("v",),
    "scard": (),
    "sismember": ("v",),
    "smembers": (),
    "srandmember": (),
    "srem": ("v",),
    "zadd": ("0", "v"),
    "zcard": (),
    "zcount": ("0", "0"),
    "zmscore": ("v",),
    "zrange": ("0", "0"),
    "zrangebyscore": ("0", "0"),
    "zrem": ("v",),
    "zremrangebyscore": ("0", "0"),
    "zscore": ("v",),
    "xadd": ("*", "f", "v"),
    "xlen": (),
    "xrevrange": ("+", "-"),
}
#: The same of commands without a key.
_KEYLESS: Mapping[str, tuple[str, ...]] = {
    "ping": (),
    "info": ("server",),
    "select": ("0",),
    "time": (),
    "eval": ("return 1", "0"),
    "evalsha": (_SHA, "0"),
    "script|exists": (_SHA,),
    "script|load": ("return 1",),
    "publish": ("{events}", ""),
    "subscribe": ("{events}",),
    "psubscribe": ("{all_events}",),
    "unsubscribe": ("{events}",),
    "punsubscribe": ("{all_events}",),
}
#: Asked before the others, and carried out: they change nothing.
_TRANSACTION: Mapping[str, tuple[str, ...]] = {"watch": ("{key}",), "unwatch": (), "exec": (), "multi": ()}
#: What only an administrator needs. That it can be queued says enough.
_ADMINISTRATION: Mapping[str, tuple[str, ...]] = {
    "CONFIG": ("config", "get", "maxmemory"),
    "ACL": ("acl", "list"),
    "CLIENT LIST": ("client", "list"),
    "KEYS": ("keys", "doctor"),
}
_FOREIGN_KEY = "taskplatform-doctor-foreign-key"
_PINGS = 20


@dataclass(frozen=True, slots=True)
class Latency:
    """How long the server took for short commands, one after the other, in seconds."""

    count: int
    median: float
    longest: float


@dataclass(frozen=True, slots=True)
class Rights:
    """What this user may do."""

    missing: tuple[str, ...]
    """What the platform needs and the user may not, as in an ACL rule: `+hset`, `~tp:*`, `&/0.celeryev/*`."""
    administration: tuple[str, ...]
    """Commands for administrators that the user may use."""
    foreign_keys: bool
    """Whether the user may read keys that are not the platform's."""


@dataclass(frozen=True, slots=True)
class InForce:
    """A published definition, as the scripts know it."""

    id: str
    priority: Priority
    window_ms: int
    version: str
    host: str
    """Which it calls, as far as a beat knew; "" for none."""
    paused: bool
    overlap: str
    """`skip` or `allow`."""
    timeout_ms: int | None
    schedule: Schedule | None
    """Of those without an own one; None: nobody ever subscribed so."""
    subscribers: int


class Diagnosis:
    """One server, over a few connections. Every method raises StoreError, and StoreUnavailable where there is no answer in time."""

    def __init__(self, url: str, *, tls: Mapping[str, Any], namespace: str, timeout: float) -> None:
        self._redis = connect(url, tls=tls, timeout=timeout, retries=0)
        self._namespace = namespace
        self._database = int(self._redis.connection_pool.connection_kwargs.get("db") or 0)
        #: For verbs that only read, as `vitals`.
        self.store = Store(self._redis, namespace=namespace)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def info(self) -> dict[str, Any]:
        """What INFO says, as redis-py reads it."""
        return self._redis.info()

    def config(self, name: str) -> str | None:
        """A setting of the server; None where this user may not ask."""
        found = self._if_allowed("CONFIG", "GET", name)
        return None if not found else str(dict(found if isinstance(found, Mapping) else zip(found[::2], found[1::2], strict=True))[name])

    def slow_commands(self) -> int | None:
        """Entries of the slow log; None where this user may not ask."""
        found = self._if_allowed("SLOWLOG", "LEN")
        return None if found is None else int(found)

    def user(self) -> str | None:
        """Who this is for the server; None where this user may not ask."""
        found = self._if_allowed("ACL", "WHOAMI")
        return None if found is None else str(found)

    def _if_allowed(self, *command: str) -> Any:
        try:
            return self._redis.execute_command(*command)  # type: ignore[no-untyped-call] # as in connection.py
        except StoreError as fault:
            # a managed server may not have the command at all
            if isinstance(fault.__cause__, ResponseError):
                return None
            raise

    def latency(self) -> Latency:
        """Of some PINGs."""
        took = []
        for _ in range(_PINGS):
            began = time.perf_counter()
            self._redis.ping()
            took.append(time.perf_counter() - began)
        return Latency(len(took), statistics.median(took), max(took))

    def certificate(self) -> bytes | None:
        """What the server showed, in DER; None without TLS."""
        pool = self._redis.connection_pool
        connection: Any = pool.get_connection()
        try:
            connection.connect()
            used: Any = getattr(connection, "_sock", None)
            return cast("bytes | None", used.getpeercert(True)) if hasattr(used, "getpeercert") else None
        except (ConnectionError, TimeoutError) as fault:
            raise StoreError(f"Redis cannot be reached: {fault}") from fault
        finally:
            pool.release(connection)

    def definitions(self) -> list[InForce]:
        """Those that are published, in order of their ids."""

        def name(kind: str, part: str = "") -> str:
            return key(self._namespace, kind, part)

        ids = sorted(self.store.published())
        pipe = self._redis.pipeline(transaction=False)
        pipe.hgetall(name("subscribers"))
        for one in ids:
            pipe.hmget(name("definition", one), "priority", "window", "version", "host", "paused", "overlap", "timeout")
            pipe.hget(name("group", one), "schedule")
        subscribers, *rows = pipe.execute()
        found = []
        for one, (priority, window, version, host, paused, overlap, timeout), schedule in zip(ids, rows[::2], rows[1::2], strict=True):
            found.append(
                InForce(
                    id=one,
                    priority=Priority(priority),
                    window_ms=int(window or 0),
                    version=version or "",
                    host=host or "",
                    paused=paused is not None,
                    overlap=overlap or "",
                    timeout_ms=int(timeout) if timeout else None,
                    schedule=schedule_from_json(schedule) if schedule else None,
                    subscribers=int(subscribers.get(one, 0)),
                )
            )
        return found

    def oldest_ended_ms(self) -> dict[str, int]:
        """When the first of those that are kept ended, by kind: finished, dead. A kind of which there is none is missing."""
        pipe = self._redis.pipeline(transaction=False)
        kinds = ("finished", "dead")
        for kind in kinds:
            pipe.zrange(key(self._namespace, kind), 0, 0, withscores=True)
        return {kind: int(rows[0][1]) for kind, rows in zip(kinds, pipe.execute(), strict=True) if rows}

    # --- rights ------------------------------------------------------------------------------------------------------

    def rights(self) -> Rights:
        """What this user may do, as the server itself says.

        Redis checks rights when a command is queued in a transaction. So everything is queued, and the connection closed: nothing is
        carried out. What is refused stands in the server's ACL LOG.
        """
        known = key(self._namespace, "server")
        places = {
            f"~{self._namespace}:*": known,
            **{f"~{priority}": str(priority) for priority in Priority},
            f"~{UNACKED}": UNACKED,
            f"~{UNACKED_INDEX}": UNACKED_INDEX,
            "~unacked_mutex": "unacked_mutex",
            "~_kombu.*": "_kombu.binding.high",
            "~*.celery.pidbox": "doctor.celery.pidbox",
            "~celeryev.*": "celeryev.doctor",
        }
        events, orders = f"/{self._database}.celeryev/", f"/{self._database}.celery.pidbox"
        channels = {f"&{events}*": f"{events}worker.heartbeat", f"&{orders}": orders}
        fill = {"events": f"{events}worker.heartbeat", "all_events": f"{events}*", "key": known}
        asked: list[tuple[str, tuple[str, ...]]] = []
        for command in COMMANDS[Role.PLATFORM]:
            if command in _KEYLESS:
                rest = tuple(word.format(**fill) for word in _KEYLESS[command])
                asked.append((f"+{command}", (*command.split("|"), *rest)))
            elif command not in _TRANSACTION:
                asked.append((f"+{command}", (command, known, *_ARGUMENTS[command])))
        asked += [(rule, (command, place)) for rule, place in places.items() for command in ("exists", "del")]
        asked += [(rule, ("publish", channel, "")) for rule, channel in channels.items()]
        asked += _ADMINISTRATION.items()
        asked.append((_FOREIGN_KEY, ("exists", _FOREIGN_KEY)))
        transaction = [(f"+{name}", (name, *(word.format(**fill) for word in words))) for name, words in _TRANSACTION.items()]

        refused: dict[str, str] = {}
        connection: Any = self._redis.connection_pool.get_connection()
        try:
            for rule, words in transaction:
                (answer,) = _answers(connection, [words])
                # for EXEC that is a transaction that is aborted
                if isinstance(answer, ResponseError) and ("no permissions" in str(answer) or isinstance(answer, NoPermissionError)):
                    refused[rule] = str(answer)
            if "+multi" in refused:
                # what follows would be carried out
                return Rights(tuple(refused), (), False)
            for (rule, _), answer in zip(asked, _answers(connection, [words for _, words in asked]), strict=True):
                if isinstance(answer, NoPermissionError):
                    refused.setdefault(rule, str(answer))
        except (ConnectionError, TimeoutError) as fault:
            raise StoreError(f"Redis cannot be reached: {fault}") from fault
        finally:
            connection.disconnect()
            self._redis.connection_pool.release(connection)
        # without its commands nothing can be said of a key or channel
        about = {*_ADMINISTRATION, _FOREIGN_KEY}
        missing = [rule for rule, why in refused.items() if rule not in about and (rule[0] == "+" or "run the" not in why)]
        # a key or channel that is refused is not the command's fault
        missing = [rule for rule in missing if rule[0] != "+" or "run the" in refused[rule] or "subcommand" in refused[rule]]
        return Rights(
            missing=tuple(missing),
            administration=tuple(one for one in _ADMINISTRATION if one not in refused),
            foreign_keys=_FOREIGN_KEY not in refused,
        )


def _answers(connection: Any, commands: Iterable[Sequence[str]]) -> list[Any]:
    """In their order; what the server refuses is an error among them."""
    asked = list(commands)
    connection.send_packed_command(connection.pack_commands(asked))
    found = []
    for _ in asked:
        try:
            found.append(connection.read_response())
        except ResponseError as fault:
            found.append(fault)
    return found
