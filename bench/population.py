"""Users and subscriptions in the numbers that the benchmarks want."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from taskplatform.model import Definition
from taskplatform.store import Store, Subscribe

_CHUNK = 1000


def http_definitions(count: int, *, interval: str) -> list[Definition]:
    """Definitions like the shipped ones, all due at the same time."""
    return [
        Definition.model_validate(
            {
                "id": f"account_sync_{number}",
                "name": "Account sync",
                "interval": {"type": interval},
                "config": {"endpoint": "http://127.0.0.1:1/sync/{{user}}", "body": {"since": "last_success"}},
            }
        )
        for number in range(count)
    ]


def create_users(store: Store, count: int) -> None:
    """Users user0, user1, …"""
    store.create_users((f"user{number}" for number in range(count)), actor="bench")


def subscribe_all(store: Store, users: int, definitions: Sequence[str]) -> None:
    """Each of the users that `create_users` made to each of the definitions."""

    def subscribe(start: int) -> None:
        numbers = range(start, min(start + _CHUNK, users))
        some = [Subscribe(f"user{number}", definition) for number in numbers for definition in definitions]
        store.subscribe(some, horizon=timedelta(), actor="bench", log=False)

    # two, so that one prepares while the server works for the other
    with ThreadPoolExecutor(2) as threads:
        for _ in threads.map(subscribe, range(0, users, _CHUNK)):
            pass
