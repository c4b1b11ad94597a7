"""The connection to Redis. Its errors become the platform's here, once, for everything that the store does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.connection import AbstractConnection
from redis.exceptions import AuthenticationError, ConnectionError, NoScriptError, ResponseError, TimeoutError
from redis.retry import Retry

from taskplatform.errors import InvalidInput, StoreError, StoreUnavailable


def connect(url: str, *, greet: Callable[[AbstractConnection], None] | None = None) -> redis.Redis:
    """A client with a connection pool, that takes short outages (about 2 s) by itself. Raises StoreError for a URL that is none.

    `greet` is called with each new connection before anything else is sent over it.
    """
    options: dict[str, Any] = {}
    if greet is not None:

        def on_connect(connection: AbstractConnection) -> None:
            connection.on_connect()  # type: ignore[no-untyped-call]
            greet(connection)

        options["redis_connect_func"] = on_connect
    try:
        client = _Client.from_url(
            url,
            decode_responses=True,
            socket_timeout=10,
            socket_connect_timeout=5,
            health_check_interval=30,
            retry=Retry(ExponentialWithJitterBackoff(base=0.1, cap=1), 3),
            retry_on_error=[ConnectionError, TimeoutError],
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
    except (ConnectionError, TimeoutError) as fault:
        raise StoreUnavailable(f"Redis cannot be reached: {fault}") from fault
    except UnicodeEncodeError as fault:
        raise InvalidInput(f"{fault.object!r} is not Unicode text") from None
    except ResponseError as fault:
        raise StoreError(f"Redis refused: {fault}") from fault


class _Client(redis.Redis):
    def execute_command(self, *args: Any, **options: Any) -> Any:
        with _translated():
            return super().execute_command(*args, **options)  # type: ignore[no-untyped-call] # redis-py has no types here  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> _Pipeline:
        return _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


class _Pipeline(redis.client.Pipeline):
    def execute(self, raise_on_error: bool = True) -> list[Any]:
        with _translated():
            return super().execute(raise_on_error)
