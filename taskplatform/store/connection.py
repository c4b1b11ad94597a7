"""The connection to Redis. Its errors become the platform's here, once, for everything that the store does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import redis
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.connection import AbstractConnection
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    LockError,
    NoScriptError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool

from taskplatform.errors import InvalidInput, Outage, StoreError, StoreUnavailable
from taskplatform.sentinel import SentinelUrl

#: What redbeat's lock raises when it is another's by now, or nobody's.
LockLost = LockError

#: A connection that was idle for so long is looked at before it is used.
_HEALTH_SECONDS = 30


def connect(
    url: str,
    *,
    tls: Mapping[str, Any] | None = None,
    greet: Callable[[AbstractConnection], None] | None = None,
    timeout: float = 5,
    retries: int = 3,
) -> redis.Redis:
    """A client with a connection pool, that takes short outages (about 2 s) by itself. Raises StoreError for a URL that is none.

    With a URL of Sentinels (`SentinelUrl`), each new connection goes to the server that they name as the master at that time, and one
    that turns out to be a replica by now is given up.

    `tls` is what redis-py is told of the TLS of a rediss:// or sentinels:// URL (`Settings.redis_tls`); without it, certificate and
    host name are verified with the system's CAs.

    `greet` is called with each new connection before anything else is sent over it. An answer has to come within `timeout` seconds, and
    what failed is tried again so many times.
    """
    options: dict[str, Any] = {
        "decode_responses": True,
        # a heartbeat that got no answer is sent again over a new connection before the worker counts as lost
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "health_check_interval": _HEALTH_SECONDS,
        "retry": Retry(ExponentialWithJitterBackoff(base=0.1, cap=1), retries),
        "retry_on_error": [ConnectionError, TimeoutError] if retries else [],
        **(tls or {}),
    }
    if greet is not None:

        def on_connect(connection: AbstractConnection) -> None:
            # redis-py checks the health of a connection before a command, and one that fails it connects again: checked in here, on a
            # server that accepts and does not answer yet (LOADING), that would go deeper and deeper
            connection.on_connect_check_health(check_health=False)
            greet(connection)

        options["redis_connect_func"] = on_connect
    try:
        client = _by_sentinels(SentinelUrl.parse(url), options, tls or {}) if SentinelUrl.is_one(url) else _Client.from_url(url, **options)
        # so that an unknown option of the URL comes out here, not with the first command
        client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)
    except (TypeError, ValueError) as fault:
        raise StoreError(f"the URL of Redis is not accepted: {fault}") from None
    return client


def _by_sentinels(url: SentinelUrl, options: Mapping[str, Any], tls: Mapping[str, Any]) -> _Client:
    # one that does not answer is not asked again: the next one is
    asking = {**url.asking(tls), "retry": Retry(NoBackoff(), 0)}
    sentinel = _Sentinel(url.sentinels, sentinel_kwargs=asking)  # type: ignore[no-untyped-call]
    pool = _SentinelPool(url.master, sentinel, ssl=url.tls, db=url.database, **url.login, **options)  # type: ignore[no-untyped-call]
    return cast("_Client", _Client.from_pool(pool))


class _Sentinel(Sentinel):
    """Redis-py's, for many threads: two that sort its list at a time would lose Sentinels out of it. And it tells what each one said."""

    def discover_master(self, service_name: str) -> tuple[str, int]:
        """The address of the master. Raises MasterNotFoundError."""
        said = []
        sentinels = list(self.sentinels)
        for number, sentinel in enumerate(sentinels):
            place = sentinel.connection_pool.connection_kwargs
            try:
                state = cast("dict[str, Any]", sentinel.sentinel_masters()).get(service_name)
            except RedisError as fault:
                said.append(f"{place['host']}:{place['port']} says: {fault}")
                continue
            if state and self.check_master_state(state, service_name):  # type: ignore[no-untyped-call]
                self.sentinels = [sentinel, *sentinels[:number], *sentinels[number + 1 :]]  # the one to ask first
                return state["ip"], state["port"]
            said.append(f"{place['host']}:{place['port']} {'takes it for down' if state else 'does not know the name'}")
        raise MasterNotFoundError(f"no Sentinel of redis_url names a master {service_name} that is up ({'; '.join(said)})")


class _SentinelPool(SentinelConnectionPool):
    def disconnect(self, inuse_connections: bool = True) -> None:
        super().disconnect(inuse_connections)
        if inuse_connections:  # the client is closed
            self.sentinel_manager.close()

    def ask_again(self) -> None:
        """The server takes no writes: it may have a successor, and needs up to ten seconds to hear of it."""
        self.disconnect(inuse_connections=False)


@contextmanager
def _translated(pool: redis.ConnectionPool) -> Iterator[None]:
    try:
        yield
    except NoScriptError:
        raise  # redis-py loads the script and tries again
    except AuthenticationError as fault:
        raise StoreError(f"Redis did not let us in: {fault}") from fault
    except (ConnectionError, TimeoutError, ResponseError) as fault:
        known = _translate(fault)
        if isinstance(pool, _SentinelPool) and isinstance(known, StoreUnavailable) and known.outage in _NO_LONGER_MASTER:
            pool.ask_again()
        raise known from fault
    except UnicodeEncodeError as fault:
        raise InvalidInput(f"{fault.object!r} is not Unicode text") from None


#: By the first word of what Redis answers. What helps stands behind the colon.
_OUTAGES = {
    "LOADING": (Outage.LOADING, "Redis reads its data from disk after a start: it answers when it has read them"),
    "READONLY": (
        Outage.READ_ONLY,
        "Redis takes no writes, it is a read-only replica: point redis_url at the master, or make this one the master (REPLICAOF NO ONE)",
    ),
    "OOM": (
        Outage.MEMORY,
        "Redis has no memory left (maxmemory, noeviction), so nothing new is taken: raise its maxmemory, or keep finished jobs for "
        "a shorter time (retention)",
    ),
    "MISCONF": (Outage.DISK, "Redis takes no writes, because it cannot save them: look at the disk and the log of the server"),
    "BUSY": (Outage.BUSY, "Redis runs a script that does not end: wait for it, or stop it (SCRIPT KILL)"),
    "NOREPLICAS": (Outage.REPLICAS, "Redis takes no writes, because it has too few replicas (min-replicas-to-write): bring them back"),
    "MASTERDOWN": (Outage.REPLICAS, "Redis is a replica that has lost its master: bring the master back, or make this one the master"),
    "CLUSTERDOWN": (Outage.REPLICAS, "Redis is part of a cluster that is down: bring its nodes back"),
    "TRYAGAIN": (Outage.REPLICAS, "Redis is part of a cluster that is just moving its keys: it answers when they are moved"),
}
#: What a server says that was the master, and has a successor or is cut off from its replicas.
_NO_LONGER_MASTER = (Outage.READ_ONLY, Outage.REPLICAS)
_UNVERIFIED = "CERTIFICATE_VERIFY_FAILED"
_NO_MORE_CLIENTS = "max number of clients reached"


def unavailable(fault: BaseException) -> StoreUnavailable | None:
    """For code that speaks to Redis without the store, as redbeat: what its error is, if it is one that passes by itself."""
    if isinstance(fault, RedisError):
        fault = _translate(fault)
    return fault if isinstance(fault, StoreUnavailable) else None


def _translate(fault: RedisError) -> StoreError:
    text = str(fault)
    # redis-py takes the first word off the errors that it knows
    code = getattr(fault, "status_code", None) or text.rpartition(" caused error: ")[2].partition(" ")[0]
    if isinstance(fault, BusyLoadingError):
        code = "LOADING"
    if code in _OUTAGES:
        outage, message = _OUTAGES[code]
        return StoreUnavailable(message, outage)
    if isinstance(fault, NoScriptError):
        return StoreUnavailable("Redis forgot its scripts just now (SCRIPT FLUSH): they are given to it again", Outage.SCRIPTS)
    if _NO_MORE_CLIENTS in text:
        return StoreUnavailable(
            "Redis takes no more connections (maxclients): raise its maxclients, or close what is not needed", Outage.CLIENTS
        )
    if _UNVERIFIED in text:
        return StoreUnavailable(
            f"Redis cannot be trusted: {text.partition(_UNVERIFIED)[2].strip(' ]:')}. Its certificate must name the host of "
            "redis_url, and be signed by a CA in redis_ca or of the system",
            Outage.UNTRUSTED,
        )
    if isinstance(fault, ConnectionError | TimeoutError):
        return StoreUnavailable(f"Redis cannot be reached: {text}")
    return StoreError(f"Redis refused: {text}")


class _Client(redis.Redis):
    def execute_command(self, *args: Any, **options: Any) -> Any:
        with _translated(self.connection_pool):
            return super().execute_command(*args, **options)  # type: ignore[no-untyped-call] # redis-py has no types here

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> _Pipeline:
        return _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


class _Pipeline(redis.client.Pipeline):
    def execute(self, raise_on_error: bool = True) -> list[Any]:
        with _translated(self.connection_pool):
            return super().execute(raise_on_error)
