"""Flower's door: who comes in, and what can be done there."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import requests
from flower import urls
from pytest_celery import CeleryTestSetup

from taskplatform.errors import SettingsError
from taskplatform.flower import PlatformFlower
from taskplatform.local import find_port
from taskplatform.model import JobState
from taskplatform.settings import load_settings
from tests.acceptance.nodes import FlowerNode
from tests.acceptance.site import Site, eventually

LOGIN = ("ops", "flower:pass-word")
#: For what takes one or two where nothing else runs.
SECONDS = 60.0
REACHABLE = "--address=0.0.0.0"


@pytest.fixture(scope="module")
def flower(shared_site: Site) -> FlowerNode:
    """With a login, where others could reach it, and told by its own ways to let everybody do everything."""
    node = shared_site.flower(REACHABLE, "--read_only=false", flower_login=":".join(LOGIN))
    node.ready()
    return node


def _paths() -> list[str]:
    """Every route of the installed Flower, with something in the place of each group."""
    patterns = [one.regex.pattern if hasattr(one, "regex") else one[0] for one in urls.handlers]
    return sorted({re.sub(r"\(.*?\)", "call", pattern).rstrip("$").replace("/?", "") for pattern in patterns} - {".*"})


def test_pages_need_the_login(flower: FlowerNode) -> None:
    pages = [path for path in _paths() if not path.startswith(("/api", "/static", "/metrics", "/healthcheck", "/login", "/logout"))]
    assert {"/", "/workers", "/tasks", "/broker", "/tasks/datatable"} <= set(pages)
    for path in pages:
        for login in (None, ("ops", "wrong"), ("", ""), ("ops", ""), ("OPS", LOGIN[1]), ("öps", "ü")):
            assert requests.get(flower.url + path, auth=login, timeout=SECONDS).status_code == 401, (path, login)
    for header in ("Basic", "Basic !!!", f"Bearer {LOGIN[1]}", "Basic " + "A" * 3000):
        assert requests.get(flower.url, headers={"Authorization": header}, timeout=SECONDS).status_code == 401, header
    for path in ("/", "/workers", "/tasks", "/broker"):
        assert requests.get(flower.url + path, auth=LOGIN, timeout=SECONDS).status_code == 200


def test_health_and_metrics_do_not(flower: FlowerNode) -> None:
    for path in ("/healthcheck", "/metrics"):
        answer = requests.get(flower.url + path, timeout=SECONDS)
        assert answer.status_code == 200
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_nothing_can_be_changed(flower: FlowerNode, site: Site, celery_setup: CeleryTestSetup, user: str) -> None:
    running = site.platform.enqueue("sleeping", user=user, params={"seconds": 60})
    site.wait_for(running.id, JobState.RUNNING)
    worker = site.default_worker.node
    paths = _paths()
    assert len([path for path in paths if path.startswith("/api/")]) >= 20
    orders = [
        f"/api/worker/shutdown/{worker}",
        f"/api/worker/pool/shrink/{worker}",
        f"/api/worker/queue/cancel-consumer/{worker}?queue=high",
        f"/api/task/revoke/{running.id}?terminate=true",
        f"/api/task/abort/{running.id}",
        f"/api/task/rate-limit/taskplatform.sweep?workername={worker}&ratelimit=0/s",
    ]
    for path in [*paths, *orders]:
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            if (method, path) == ("POST", "/tasks/datatable"):
                continue  # reads, and is tested with what it shows
            answer = requests.request(method, flower.url + path, auth=LOGIN, data=json.dumps({"kwargs": {"user": user}}), timeout=SECONDS)
            assert answer.status_code == 403, (method, path)
    for path in (path for path in paths if path.startswith("/api")):
        assert requests.get(flower.url + path, auth=LOGIN, timeout=SECONDS).status_code == 403, path
    assert site.platform.job(running.id).state is JobState.RUNNING
    assert len(site.platform.jobs(user=user).items) == 1
    assert site.default_worker.status == "running"
    site.platform.cancel(running.id)
    site.wait_for(running.id)


def test_without_a_login_others_cannot_reach_it(shared_site: Site) -> None:
    node = shared_site.flower(REACHABLE)
    assert node.wait(SECONDS) == 1
    assert "Flower has no login and is to listen on 0.0.0.0" in node.logs()
    assert "TASKPLATFORM_FLOWER_LOGIN" in node.logs()
    assert "Traceback" not in node.logs()
    shared_site.remove(node)


@pytest.mark.parametrize("address", ["::", "[::]", "192.0.2.1", "::ffff:192.0.2.1", "taskplatform.example", "127.0.0.1.example"])
def test_what_others_can_reach(address: str) -> None:
    told = SimpleNamespace(basic_auth=None, auth=None, unix_socket=None, address=address)
    with pytest.raises(SettingsError, match="Flower has no login and is to listen on"):
        PlatformFlower(options=told, chosen=load_settings(flower_read_only="false"))


def test_with_a_switch_it_controls_behind_the_login(shared_site: Site, celery_setup: CeleryTestSetup) -> None:
    node = shared_site.flower(flower_login=":".join(LOGIN), flower_read_only="false")
    node.ready()
    order = f"{node.url}/api/task/rate-limit/taskplatform.sweep?workername={shared_site.default_worker.node}&ratelimit=1000/s"
    assert requests.post(order, timeout=SECONDS).status_code == 401
    eventually(lambda: requests.post(order, auth=LOGIN, timeout=SECONDS).status_code == 200, "no order can be given", seconds=SECONDS)
    shared_site.remove(node)


def test_the_api_stays_closed_where_there_is_no_login(shared_site: Site) -> None:
    # as an operator may have set it for another Flower
    told = {"FLOWER_UNAUTHENTICATED_API": "true", "TASKPLATFORM_FLOWER_READ_ONLY": "false"}
    node = FlowerNode("open-flower", find_port(), environment={**shared_site.environment, **told}, folder=shared_site.folder)
    try:
        node.ready()
        assert requests.get(f"{node.url}/", timeout=SECONDS).status_code == 200
        answer = requests.get(f"{node.url}/api/workers", timeout=SECONDS)
        assert answer.status_code == 401
        assert "Access-Control-Allow-Origin" not in answer.headers
    finally:
        node.remove()
