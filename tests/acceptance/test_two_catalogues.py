"""Beats of two releases side by side, as in a rolling deployment: neither harms the other's plan, and the newer one wins when it leads."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from taskplatform.model import JobState
from taskplatform.store import Enqueue, Store
from tests.acceptance.faults import Fault
from tests.acceptance.nodes import BeatNode
from tests.acceptance.site import Site
from tests.acceptance.target import Target
from tests.support import wait_until

TASKS = """
defaults: {{timeout: 20s, window: 60s}}
tasks:
  - id: steady
    name: The same in both
    interval: &minutely {{type: minutely}}
    config: &config {{endpoint: "${{TARGET}}/steady"}}
  - id: call
    name: Another in each
    interval: *minutely
    priority: {priority}
    config: *config
  - id: {other}
    name: In one alone
    interval: *minutely
    config: *config
"""
OLD, NEW = {"steady", "call", "going"}, {"steady", "call", "coming"}


@pytest.fixture
def site(own_site: Site) -> Site:
    """Its beats are this module's alone."""
    return own_site


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By name, the folder with the definitions."""
    found = {}
    for name, priority, other in (("old", "low", "going"), ("new", "high", "coming")):
        folder = tmp_path_factory.mktemp(name)
        (folder / "all.yaml").write_text(TASKS.format(priority=priority, other=other))
        found[name] = str(folder)
    return found


@pytest.fixture
def store(site: Site) -> Store:
    """With nothing but what beats publish."""
    site.redis.flushall()
    return site.platform.store


def _beat(site: Site, tasks_dir: str, fault: Fault | None = None) -> BeatNode:
    return site.beat(fault=fault, tasks_dir=tasks_dir)


def _soon(holds: Callable[[], bool], message: str) -> None:
    """Long enough for a beat to start and to show that it lives, on a busy machine."""
    wait_until(holds, message=message)


def _leads(store: Store, beat: BeatNode) -> bool:
    return store.planner().get("leader", "").endswith(f"#{beat.pid}")


def _log(store: Store) -> list[tuple[str, str]]:
    return [(one.kind, one.subject) for one in reversed(store.changes()) if one.kind.startswith("definition")]


@pytest.mark.timeout(300)
def test_a_rolling_deployment_and_back(site: Site, store: Store, releases: dict[str, str], target: Target) -> None:
    old = [_beat(site, releases["old"]), _beat(site, releases["old"])]
    _soon(lambda: store.published() == OLD, "the old release is not published")

    # the first one of the new release leads as soon as it has shown that it lives, and dies in the midst of publishing
    fault = site.fault("after:publish", 3)
    _beat(site, releases["new"], fault)
    _soon(lambda: fault.happened, "the new release does not lead")
    _soon(lambda: any(_leads(store, beat) for beat in old), "no old beat leads")
    # the next one completes it, and tells each change once
    first = _beat(site, releases["new"])
    _soon(lambda: store.published() == NEW, "the new release is not published")
    _soon(lambda: _leads(store, first), "the new release does not lead")
    assert not any(beat.leads for beat in old)
    assert any("a beat with a newer catalogue is here: stepping down" in beat.logs() for beat in old)
    assert _log(store) == [
        ("definitions added", "call going steady"),
        # each process publishes what nobody has published yet
        ("definitions added", "coming"),
        ("definition changed", "call"),
        ("definition removed", "going"),
    ]
    logged = _log(store)

    user = site.user()
    job_id = f"coming:{user}:m1"
    store.enqueue([Enqueue(job_id)])
    # as if the new release had another entry in redbeat
    site.redis.sadd("tp:redbeat::statics", "other")
    site.redis.hset("tp:redbeat:other", "definition", "{}")

    # it dies: an old one leads, and takes nothing back
    first.kill("SIGKILL")
    _soon(lambda: any(beat.leads for beat in old), "no old beat leads")
    _soon(lambda: any("newer catalogue was here not long ago" in beat.logs() for beat in old), "it does not say why")
    _soon(lambda: int(store.planner()["tick"]) > int(store.planner()["since"]) + 500, "it does not plan")
    assert (store.published(), _log(store)) == (NEW, logged)
    assert [beat.status for beat in old] == ["running", "running"]
    assert site.redis.sismember("tp:redbeat::statics", "other")
    assert site.redis.exists("tp:redbeat:other", "tp:redbeat:forget-finished-jobs") == 2
    worker = site.worker("--concurrency", "1", tasks_dir=releases["new"])
    assert site.wait_for(job_id).state is JobState.COMPLETED
    assert [call.job for call in target.calls(user=user)] == [job_id]
    site.remove(worker)

    # another one of the new release comes, and the old ones go
    second = _beat(site, releases["new"])
    _soon(lambda: _leads(store, second), "the new release does not lead again")
    # who may publish decides which entries there are
    _soon(lambda: site.redis.smembers("tp:redbeat::statics") == {"forget-finished-jobs"}, "the entries are not its own")
    for beat in old:
        beat.kill(signal.SIGTERM)
        assert beat.wait() == 0
    # the others are forgotten, or long silent; the one that leads says so all the time
    gone_ms = store.now_ms()

    def living() -> list[tuple[bool, bool]]:
        return [(one.leads, one.id.endswith(f"#{second.pid}")) for one in store.beats() if one.heartbeat_ms > gone_ms]

    _soon(lambda: living() == [(True, True)], f"not the new one alone lives and leads: {store.beats()}")
    assert (store.published(), _log(store)) == (NEW, logged)

    # and back: there is no beat of the old release any more, so one that comes now is a deployment
    again = _beat(site, releases["old"])
    _soon(lambda: store.published() == OLD, "the old release is not in force")
    assert (again.leads, second.leads) == (True, False)
    assert _log(store)[len(logged) :] == [("definitions added", "going"), ("definition changed", "call"), ("definition removed", "coming")]
    assert "Traceback" not in site.logs()
