"""What Celery's own tools say of the platform: its options are the definitions', its queues the priorities."""

from __future__ import annotations

import re
import subprocess
import sys

from pytest_celery import CeleryTestSetup

from taskplatform.message import time_limits
from taskplatform.model import JobState
from tests.acceptance.nodes import ROOT
from tests.acceptance.site import Site


def test_a_worker_registers_each_definition_with_its_options(celery_setup: CeleryTestSetup, site: Site) -> None:
    node = celery_setup.worker.hostname()
    shown = ("rate_limit", "time_limit", "soft_time_limit", "max_retries", "retry_backoff", "retry_backoff_max", "retry_jitter")
    lines = site.app.control.inspect([node]).registered(*shown)[node]
    options = {line.split(" ")[0]: dict(re.findall(r"(\w+)=([^\s\]]+)", line)) for line in lines}
    assert options.keys() >= site.platform.catalogue.keys()

    assert options["limited_call"] == {
        # Celery's limit is for each worker, and only a backstop: it must not bind while the platform keeps its own
        "rate_limit": "305/s",
        "time_limit": "40.0",
        "soft_time_limit": "32.0",
        "max_retries": "7",
        "retry_backoff": "4",
        "retry_backoff_max": "50",
        "retry_jitter": "True",
    }
    assert options["raising"]["retry_backoff"] == "False"
    for name, definition in site.platform.catalogue.items():
        hard, soft = time_limits(definition)
        assert (options[name]["time_limit"], options[name]["soft_time_limit"]) == (str(hard), str(soft))
        assert options[name]["max_retries"] == str(definition.retries)
        assert ("rate_limit" in options[name]) == (definition.rate_limit is not None)


def test_the_queues_are_the_priorities_and_nothing_is_fetched_in_advance(celery_setup: CeleryTestSetup, site: Site) -> None:
    node = celery_setup.worker.hostname()
    inspect = site.app.control.inspect([node])
    queues = inspect.active_queues()[node]
    assert [queue["name"] for queue in queues] == ["high", "medium", "low"]
    assert [queue["routing_key"] for queue in queues] == ["high", "medium", "low"]
    conf = inspect.conf()[node]
    assert conf["broker_transport_options"]["queue_order_strategy"] == "priority"
    assert (conf["task_acks_late"], conf["worker_prefetch_multiplier"], conf["worker_disable_prefetch"]) == (True, 1, True)
    stats = inspect.stats()[node]
    assert stats["pool"]["max-concurrency"] == 4


def test_a_task_is_routed_by_its_definitions_priority(site: Site) -> None:
    for name, definition in site.platform.catalogue.items():
        assert site.app.amqp.router.route({}, name)["queue"].name == definition.priority


def test_a_worker_announces_itself_to_the_platform(celery_setup: CeleryTestSetup, site: Site) -> None:
    node = celery_setup.worker.hostname()
    (worker,) = (one for one in site.platform.store.workers() if one.id.startswith(f"{node}#"))
    assert (worker.slots, worker.queues) == (4, ("high", "medium", "low"))
    assert site.platform.store.now_ms() - worker.heartbeat_ms < 60_000
    assert int(worker.info["pid"]) == celery_setup.worker.container.pid


EMBEDDED = """
from celery.contrib.testing.worker import start_worker
from taskplatform.app import app

with start_worker(app, perform_ping_check=False):
    input()
"""


def test_a_worker_of_celerys_test_kit_runs_jobs(calm_site: Site) -> None:
    """It is not the worker program, with its signals, but a thread of another."""
    argv = [sys.executable, "-c", EMBEDDED]
    with subprocess.Popen(argv, cwd=ROOT, env=calm_site.environment, stdin=subprocess.PIPE) as process:
        try:
            job = calm_site.platform.enqueue("returning", user=calm_site.user())
            assert calm_site.wait_for(job.id).state is JobState.COMPLETED
            process.communicate(b"\n", timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0
