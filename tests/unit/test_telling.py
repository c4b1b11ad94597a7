"""What an API process tells of itself on its port for health and metrics."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import requests

from taskplatform.api.telling import Telling
from taskplatform.errors import Outage, StoreUnavailable
from taskplatform.local import find_port
from taskplatform.settings import load_settings
from tests.support import wait_until


@pytest.fixture
def telling() -> Iterator[Telling]:
    made = Telling(load_settings(ops_port=str(find_port()), ops_patience="500ms"))
    made.ops.start()
    wait_until(lambda: made.ops.port is not None)
    yield made
    made.ops.stop()


def ask(telling: Telling, path: str) -> tuple[int, str]:
    answer = requests.get(f"http://127.0.0.1:{telling.ops.port}{path}", timeout=60)
    return answer.status_code, answer.text


def test_an_event_loop_that_stands_still_is_ill_and_one_that_turns_again_is_well(telling: Telling) -> None:
    loop, go = asyncio.new_event_loop(), threading.Event()
    # Redis is never reached: that is no matter of liveness
    turning = loop.create_task(telling.turn())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    wait_until(lambda: ask(telling, "/health")[0] == 200)
    loop.call_soon_threadsafe(go.wait, 60)
    wait_until(lambda: ask(telling, "/health")[0] == 503)
    assert "its loop requests stands still for" in ask(telling, "/health")[1]
    assert "taskplatform_live 0.0" in ask(telling, "/metrics")[1]
    go.set()
    wait_until(lambda: ask(telling, "/health")[0] == 200)
    loop.call_soon_threadsafe(turning.cancel)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(60)
    loop.close()


def test_before_redis_is_reached_it_says_why_it_is_not_ready(telling: Telling) -> None:
    assert "its loop requests has not begun yet" in ask(telling, "/ready")[1]
    telling.pulse.failed(StoreUnavailable("Redis cannot be reached at a.example", Outage.UNREACHABLE))
    status, text = ask(telling, "/ready")
    assert status == 503
    assert "Redis cannot be reached at a.example" in text
    found = ask(telling, "/metrics")[1]
    assert "taskplatform_figures_read 0.0" in found
    assert 'taskplatform_build_info{role="api"' in found


def test_one_that_is_to_stop_is_alive_and_not_ready(telling: Telling) -> None:
    telling.stopping = lambda: True
    assert ask(telling, "/health")[0] == 200
    assert "it is about to end" in ask(telling, "/ready")[1]
