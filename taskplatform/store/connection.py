"""The connection to Redis. Its errors become the platform's here, once, for everything that the store does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import ExponentialWithJitterBackoff
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

from taskplatform.errors import InvalidInput, Outage, StoreError, StoreUnavailable

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

    `tls` is what redis-py is told of a rediss:// URL's TLS (`Settings.redis_tls`); without it, certificate and host name are verified
    with the system's CAs.

    `greet` is called with each new connection before anything else is sent over it. An answer has to come within `timeout` seconds, and
    what failed is tried again so many times.
    """
    options: dict[str, Any] = dict(tls or {})
    if greet is not None:

        def on_connect(connection: AbstractConnection) -> None:
            # redis-py checks the health of a connection before a command, and one that fails it connects again: checked in here, on a
            # server that accepts and does not answer yet (LOADING), that would go deeper and deeper
            connection.on_connect_check_health(check_health=False)
            greet(connection)

        options["redis_connect_func"] = on_connect
    try:
        client = _Client.from_url(
            url,
            decode_responses=True,
            # a heartbeat that got no answer is sent again over a new connection before the worker counts as lost
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            health_check_interval=_HEALTH_SECONDS,
            retry=Retry(ExponentialWithJitterBackoff(base=0.1, cap=1), retries),
            retry_on_error=[ConnectionError, TimeoutError] if retries else [],
            **options,
        )
        # so that an unknown option of the URL comes out here, not with the first command
        client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)
    except (TypeError, ValueError) as fault:
        raise StoreError(f"the URL of Redis is not accepted: {fault}") from None
    return client


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except NoScriptError:
        raise  # redis-py loads the script and tries again
    except AuthenticationError as fault:
        raise StoreError(f"Redis did not let us in: {fault}") from fault
    except (ConnectionError, TimeoutError, ResponseError) as fault:
        raise _translate(fault) from fault
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
        with _translated():
            return super().execute_command(*args, **options)  # type: ignore[no-untyped-call] # redis-py has no types here

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> _Pipeline:
        return _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


class _Pipeline(redis.client.Pipeline):
    def execute(self, raise_on_error: bool = True) -> list[Any]:
        with _translated():
            return super().execute(raise_on_error)
