"""Workers that live and hear nothing: they notice, renew their connection, and end where that does not help."""

from __future__ import annotations

import pytest

from taskplatform.model import JobState
from tests.acceptance.nodes import WorkerNode
from tests.acceptance.site import Site, eventually
from tests.acceptance.target import Target


@pytest.fixture
def site(own_site: Site) -> Site:
    """Its workers are deaf."""
    return own_site


def slots(site: Site, worker: WorkerNode) -> int | None:
    """What it offers, or None when it has gone."""
    return next((one.slots for one in site.platform.store.workers() if one.id.startswith(f"{worker.node}#")), None)


def test_a_deaf_worker_renews_its_connection(site: Site, target: Target, user: str) -> None:
    before = site.platform.store.counters().get("deaf", 0)
    deafness = site.deafness("connection")
    worker = site.worker("--concurrency", "2", fault=deafness)
    worker.ready()
    assert site.wait_for(site.platform.enqueue("call", user=user).id).state is JobState.COMPLETED
    deafness.begin()
    # BRPOP that is on its way is answered within a second
    eventually(lambda: not _asks(site), "it still asks")
    job = site.wait_for(site.platform.enqueue("call", user=user).id)
    assert job.state is JobState.COMPLETED
    assert job.attempt == 1
    assert len(target.calls(user=user)) == 2
    assert "this worker is deaf: it has free slots and had no answer from the broker" in worker.logs()
    assert site.platform.store.counters()["deaf"] == before + 1
    assert worker.status == "running"
    site.remove(worker)


def test_a_worker_that_stays_deaf_ends(site: Site) -> None:
    before = site.platform.store.counters().get("deaf", 0)
    deaf, hanging = site.deafness("asking"), site.deafness("loop")
    workers = [site.worker("--concurrency", "1", "--pool", pool, fault=fault) for pool, fault in (("threads", deaf), ("prefork", hanging))]
    for worker in workers:
        worker.ready()
    eventually(lambda: [slots(site, worker) for worker in workers] == [1, 1], "they offer no slots")
    for fault in (deaf, hanging):
        fault.begin()
    # who does not take messages offers no slots, long before it gives up
    eventually(lambda: slots(site, workers[1]) == 0, "it offers slots")
    assert [worker.status for worker in workers] == ["running", "running"]
    for worker in workers:
        assert worker.wait() == 1, worker.logs()
        assert "this worker is deaf again" in worker.logs()
        eventually(lambda worker=worker: not worker.processes(), "it left processes")  # type: ignore[misc]
    assert site.platform.store.counters()["deaf"] == before + 4


def _asks(site: Site) -> bool:
    return any(one["cmd"] == "brpop" for one in site.redis.client_list())
