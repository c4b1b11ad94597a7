"""Flower, as it stands, shows workers and jobs: by definition, with the user."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest
import requests
from pytest_celery import CeleryTestSetup

from taskplatform.model import JobState
from tests.acceptance.nodes import FlowerNode
from tests.acceptance.site import Site, eventually
from tests.acceptance.target import Answer, Target
from tests.support import wait_until


@pytest.fixture(scope="module")
def flower(shared_site: Site) -> FlowerNode:
    node = shared_site.flower()
    node.ready()
    # it shows what happens while it listens
    wait_until(lambda: "Connected to" in node.logs())
    return node


@pytest.fixture
def seen(flower: FlowerNode, celery_setup: CeleryTestSetup) -> str:
    """Flower's address, when it has seen the worker."""
    node = celery_setup.worker.hostname()
    eventually(lambda: any(one["hostname"] == node and one["status"] for one in _workers(flower.url)), "Flower does not see the worker")
    return flower.url


def _workers(url: str) -> list[dict[str, Any]]:
    return list(requests.get(f"{url}/workers", params={"json": 1}, timeout=30).json()["data"])


def _tasks(url: str) -> list[dict[str, Any]]:
    """What the page of tasks is filled with."""
    form = {
        "draw": 1,
        "start": 0,
        "length": 100,
        "search[value]": "",
        "columns[0][data]": "name",
        "order[0][column]": 0,
        "order[0][dir]": "asc",
    }
    return list(requests.post(f"{url}/tasks/datatable", data=form, timeout=30).json()["data"])


def test_it_shows_jobs_by_definition_with_their_user(seen: str, site: Site, target: Target, user: str) -> None:
    target.answer(user, Answer(404), Answer(200))
    failed = site.wait_for(site.platform.enqueue("call", user=user).id)
    ran = site.wait_for(site.platform.enqueue("returning", user=user, params={"b": "unseen"}).id)
    assert (failed.state, ran.state) == (JobState.FAILED, JobState.COMPLETED)

    def shown() -> dict[str, dict[str, Any]]:
        return {
            task["uuid"]: task for task in _tasks(seen) if task["uuid"] in (failed.id, ran.id) and task["state"] in ("SUCCESS", "FAILURE")
        }

    eventually(lambda: len(shown()) == 2, "Flower does not show the jobs")
    for job, name, state in ((failed, "call", "FAILURE"), (ran, "returning", "SUCCESS")):
        task = shown()[job.id]
        assert (task["name"], task["state"]) == (name, state)
        assert task["kwargs"] == str({"user": user})
        page = requests.get(f"{seen}/task/{job.id}", timeout=30)
        assert page.status_code == 200
        assert name in page.text
        assert user in page.text
        assert site.environment["SECRET"] not in page.text + str(task)
    assert "HTTP 404" in shown()[failed.id]["exception"]


def test_its_metrics_count_by_definition(seen: str, site: Site, user: str) -> None:
    site.wait_for(site.platform.enqueue("call", user=user).id)
    wanted = 'flower_events_total{task="call",type="task-succeeded"'
    eventually(lambda: wanted in requests.get(f"{seen}/metrics", timeout=30).text, "no metric of the definition")


def test_it_links_to_the_dashboard(shared_site: Site, celery_setup: CeleryTestSetup, site: Site, user: str) -> None:
    node = shared_site.flower(dashboard_url="https://ops.example.com/ui/")
    node.ready()
    wait_until(lambda: "Connected to" in node.logs())
    job = site.wait_for(site.platform.enqueue("returning", user=user).id)
    assert '<a class="nav-link" href="https://ops.example.com/ui/"' in requests.get(f"{node.url}/workers", timeout=30).text
    eventually(lambda: requests.get(f"{node.url}/task/{job.id}", timeout=30).status_code == 200, "Flower does not know the job")
    assert f'href="https://ops.example.com/ui/jobs/{quote(job.id, safe="")}"' in requests.get(f"{node.url}/task/{job.id}", timeout=30).text
    shared_site.remove(node)
