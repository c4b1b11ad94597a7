"""Fixtures for all tests: a server of the tests' own, and a store with a clock that the test sets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from taskplatform.local import EmbeddedServer, embedded_server
from taskplatform.store import Store, connect

ROOT = Path(__file__).resolve().parents[1]

# Settings of whoever runs the tests must not reach them.
for name in [name for name in os.environ if name.startswith("TASKPLATFORM_")]:
    del os.environ[name]


#: The modules that take longest, the longest first. One of them that began last would keep a whole run waiting for it alone.
LONGEST = (
    "test_stop",
    "test_redis_faults",
    "test_demo",
    "test_docs_commands",
    "test_planning",
    "test_verify",
    "test_clock_steps",
    "test_start",
    "test_life_model",
    "test_ops",
    "test_planning_model",
    "test_local",
    "test_sentinel",
    "test_secure_redis",
    "test_beat",
    "test_worker_loss",
    "test_cuts",
    "test_api_schema",
    "test_secrets",
    "test_two_catalogues",
    "test_fault_points",
    "test_planning_scale",
    "test_telemetry",
    "test_upkeep",
    "test_recovery",
    "test_deaf",
    "test_beat_faults",
    "test_chaos",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest modules first; all others stay in the order that they have been given, a random one."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


class Clock:
    """Milliseconds since the epoch, that pass only when the test says so."""

    def __init__(self, now_ms: int = 1_800_000_000_000) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms

    def advance(self, seconds: float) -> None:
        self.now_ms += round(seconds * 1000)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A real Valkey for the session."""
    with embedded_server(tmp_path_factory.mktemp("valkey")) as running:
        yield running


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[redis.Redis]:
    """A client of the session's server, emptied before the test."""
    connection = connect(server.url)
    connection.flushall()
    yield connection
    connection.close()


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still."""
    return Clock()


@pytest.fixture
def store(client: redis.Redis, clock: Clock) -> Store:
    """A store on the session's server, with the test's clock."""
    return Store(client, clock=clock)
