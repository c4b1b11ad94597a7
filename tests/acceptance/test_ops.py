"""`/health`, `/ready` and `/metrics` of real beats, workers and APIs, and a real Prometheus that scrapes them."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from taskplatform.local import find_port
from taskplatform.metrics import PlatformCollector
from taskplatform.model import JobState
from tests.acceptance.nodes import Guard, ProcessNode, WorkerNode
from tests.acceptance.proxy import Proxy
from tests.acceptance.site import Site, eventually
from tests.acceptance.target import Answer, Target
from tests.conftest import ROOT
from tests.support import wait_until

#: A busy machine may need so long to start a process.
READY_SECONDS = 90
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
DASHBOARD = ROOT / "deploy/grafana/dashboards/taskplatform.json"
#: Of what an alert asks for, what a platform that is well does not have.
SELDOM = {'taskplatform_api_requests_total{status=~"5.."}'}
BREAKER_CALLS = 4


def ask(port: int, path: str) -> tuple[int, dict[str, Any]]:
    """The status and the answer; 0 where nobody answers."""
    try:
        answer = requests.get(f"http://127.0.0.1:{port}{path}", timeout=30)
    except requests.ConnectionError:
        return 0, {}
    return answer.status_code, answer.json()


def status(port: int, path: str) -> int:
    return ask(port, path)[0]


def faults(port: int, path: str) -> str:
    return "; ".join(one.get("fault", "") for one in ask(port, path)[1].get("checks", ()))


def metrics(port: int) -> dict[tuple[str, ...], float]:
    """By name and the values of the labels, in the order of the labels' names."""
    text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
    return by_name(text_string_to_metric_families(text))


def by_name(families: Iterable[Metric]) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in families
        for sample in family.samples
    }


def so_far(site: Site) -> dict[tuple[str, ...], float]:
    """What the platform's metrics are now, and not a second ago. What is not there yet is 0."""
    platform = site.platform
    return defaultdict(float, by_name(PlatformCollector(lambda: platform.store, platform.settings, keep=0).collect()))


def an_api(site: Site, ops_port: int, **settings: str) -> ProcessNode:
    """A control API over plain HTTP, on a port that is free; its own address is in its log."""
    environment = {**site.environment, "TASKPLATFORM_OPS_PORT": str(ops_port), "TASKPLATFORM_API_PORT": "0", **settings}
    argv = [sys.executable, "-c", "import sys; from taskplatform.cli import main; sys.exit(main())", "api", "--insecure-http"]
    return ProcessNode(f"api{ops_port}", argv, environment=environment, folder=site.folder)


@dataclass
class Town:
    """A leader, a standby, a worker with three processes, and an API, each with its port."""

    site: Site
    leader: int
    standby: int
    worker: int
    worker_node: WorkerNode
    api: int
    api_node: ProcessNode

    @property
    def ports(self) -> tuple[int, ...]:
        return self.leader, self.standby, self.worker, self.api


@pytest.fixture(scope="module")
def town(new_site: Callable[[], Site]) -> Iterator[Town]:
    site = new_site()
    leader, standby, worker, api = find_port(), find_port(), find_port(), find_port()
    site.beat(ops_port=str(leader))
    node = site.worker("--concurrency", "3", ops_port=str(worker), breaker_calls=str(BREAKER_CALLS), log_format="json")
    api_node = an_api(site, api)
    try:
        eventually(lambda: ask(leader, "/ready")[1].get("leads") is True, "the beat does not lead", seconds=READY_SECONDS)
        site.beat(ops_port=str(standby))
        for port in (standby, worker, api):
            eventually(lambda port=port: status(port, "/ready") == 200, "it is not ready", seconds=READY_SECONDS)  # type: ignore[misc]
        yield Town(site, leader, standby, worker, node, api, api_node)
    finally:
        api_node.remove()


@pytest.fixture
def site(town: Town) -> Site:
    """Its processes are this module's alone."""
    return town.site


def in_session(node: ProcessNode) -> set[int]:
    return {process.pid for process in node.processes()}


def listeners(pids: set[int], port: int) -> set[int]:
    """Which of the processes have the listening socket of the port open (proc(5), proc_pid_net(5))."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]]
    inodes = {f"socket:[{line[9]}]" for line in lines if line[3] == "0A" and int(line[1].rpartition(":")[2], 16) == port}
    assert inodes
    return {pid for pid in pids if any(str(one.readlink()) in inodes for one in Path(f"/proc/{pid}/fd").iterdir() if one.is_symlink())}


def test_all_are_well(town: Town) -> None:
    for port, role in zip(town.ports, ("beat", "beat", "worker", "api"), strict=True):
        for path in ("/health", "/ready"):
            code, answer = ask(port, path)
            assert (code, answer["ok"], answer["role"]) == (200, True, role)
    assert [ask(port, "/health")[1]["leads"] for port in (town.leader, town.standby)] == [True, False]
    assert {one["check"] for one in ask(town.worker, "/health")[1]["checks"]} == {"release", "recovery", "consumer"}
    assert [metrics(port)["taskplatform_beat_leads",] for port in (town.leader, town.standby)] == [1, 0]
    for port in (town.leader, town.api):
        assert metrics(port)["taskplatform_leaders",] == 1
    assert {one["check"] for one in ask(town.api, "/ready")[1]["checks"]} == {"stopping", "requests", "redis", "leader"}


def test_every_run_is_counted_whichever_process_ran_it_and_however_that_ended(town: Town, user: str) -> None:
    """Three processes; one is killed in its run, three times, and what ran before and after that is there all the same."""
    site, platform = town.site, town.site.platform
    before = so_far(site)
    jobs = [platform.enqueue("returning", user=user).id for _ in range(15)]
    failing = platform.enqueue("raising", user=user, params={"times": 1}).id
    site.wait_for_all(jobs)
    dying = platform.enqueue("dying", user=user, params={"how": "killed"}).id
    assert site.wait_for(dying).reason.startswith("poison pill")
    jobs += [platform.enqueue("returning", user=user, priority="high").id for _ in range(15)]
    site.wait_for_all([*jobs, failing])
    log = town.worker_node.logs()
    # those that it began with, and one that came for one that was killed
    killed = set(re.findall(r"Process 'ForkPoolWorker-\d+' pid:(\d+) exited", log))
    ran = {pid for line in log.splitlines() if " succeeded in " in line for pid in re.findall(r'"pid": (\d+)', line)}
    assert len(killed) == 3, log
    assert ran - killed, log

    def agree(port: int) -> bool:
        now = metrics(port)
        grown = all(now.get(name, 0) - before[name] == by for name, by in expected.items())
        return grown and {name: now.get(name) for name in present} == present

    expected = {
        ("taskplatform_jobs_ended_total", "returning", "medium", "completed"): 15,
        ("taskplatform_jobs_ended_total", "returning", "high", "completed"): 15,
        ("taskplatform_run_seconds_count", "returning"): 30,
        ("taskplatform_jobs_ended_total", "raising", "medium", "completed"): 1,
        ("taskplatform_retries_total", "raising", "medium"): 1,
        ("taskplatform_run_seconds_count", "raising"): 2,
        ("taskplatform_jobs_ended_total", "dying", "medium", "failed"): 1,
        ("taskplatform_runs_lost_total", "dying"): 3,
        ("taskplatform_run_seconds_count", "dying"): 0,
        ("taskplatform_timeouts_total", "raising"): 0,
        ("taskplatform_events_total", "poison_pills"): 1,
        ("taskplatform_dead_letters",): 1,
        ("taskplatform_release_lag_seconds_count", "high"): 15,
        ("taskplatform_release_lag_seconds_count", "medium"): 15 + 2 + 3,
        ("taskplatform_job_states_total", "running"): 30 + 2 + 3,
        # runs of about nothing are in low buckets, and all are in the last
        ("taskplatform_run_seconds_bucket", "returning", "+Inf"): 30,
        ("taskplatform_run_seconds_bucket", "returning", "30"): 30,
    }
    present = {
        ("taskplatform_jobs_in_flight",): 0,
        ("taskplatform_workers",): 1,
        ("taskplatform_slots", "high"): 3,
        ("taskplatform_worker_slots", town.worker_node.node): 3,
    }
    # every beat and the API say the same
    for port in (town.standby, town.leader, town.api):
        eventually(lambda port=port: agree(port), "the figures do not agree")  # type: ignore[misc]
    name = ("taskplatform_run_seconds_sum", "returning")
    assert 0 < metrics(town.standby)[name] - before[name] < 100
    # a process that was forked after the port was opened has not kept it
    pids = in_session(town.worker_node)
    assert len(pids) >= 4
    assert listeners(pids, town.worker) == {town.worker_node.pid}


def test_what_waits_and_what_runs(town: Town, user: str) -> None:
    platform = town.site.platform
    jobs = [platform.enqueue("sleeping", user=user, priority="low").id for _ in range(9)]

    def found() -> bool:
        now = metrics(town.leader)
        return (
            now["taskplatform_jobs_running", "sleeping"] == 3
            and now["taskplatform_jobs_queued", "low"] == 3
            and now.get(("taskplatform_jobs_waiting", "sleeping", "low")) == now.get(("taskplatform_jobs_due", "sleeping", "low")) == 3
            and now["taskplatform_oldest_waiting_seconds", "low"] > 0
            and now["taskplatform_worker_running", town.worker_node.node] == 3
        )

    eventually(found, "the figures do not agree")
    assert metrics(town.worker)["taskplatform_pool_running",] >= 3
    for job_id in jobs:
        platform.cancel(job_id)
    eventually(lambda: metrics(town.leader)["taskplatform_jobs_in_flight",] == 0, "they do not end")
    assert metrics(town.leader)["taskplatform_oldest_waiting_seconds", "low"] == 0


# --- a real Prometheus -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def binaries() -> tuple[str, str]:
    """Prometheus and promtool, from Debian's package."""
    found = shutil.which("prometheus"), shutil.which("promtool")
    if found[0] is None or found[1] is None:
        if os.environ.get("CI"):
            pytest.fail("prometheus is not installed, and CI has it")
        pytest.skip("prometheus is not installed")
    return found[0], found[1]


class Prometheus:
    """One that runs, and what it knows."""

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str, **query: str) -> Any:
        answer = requests.get(f"{self._url}/api/v1/{path}", params=query, timeout=30)
        content = answer.json()
        assert content["status"] == "success", content
        return content["data"]

    def value(self, expression: str) -> list[float]:
        return [float(one["value"][1]) for one in self.get("query", query=expression)["result"]]

    def answers(self) -> bool:
        try:
            return requests.get(f"{self._url}/-/ready", timeout=30).status_code == 200
        except requests.ConnectionError:
            return False


@pytest.fixture(scope="module")
def prometheus(binaries: tuple[str, str], town: Town, guard: Guard, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder, port = tmp_path_factory.mktemp("prometheus"), find_port()
    scraped = [f"127.0.0.1:{one}" for one in town.ports]
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": "taskplatform", "static_configs": [{"targets": scraped}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    argv = [binaries[0], f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*argv, f"--web.listen-address=127.0.0.1:{port}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **guard.environment},
            cwd=folder,
        )
        running = Prometheus(f"http://127.0.0.1:{port}")
        try:
            wait_until(running.answers, message="prometheus does not answer")
            yield running
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


@pytest.fixture(scope="module")
def watched(prometheus: Prometheus, town: Town, target: Target) -> Prometheus:
    """It saw jobs run, fail, be tried again, be late and be given up, under limits, a host that fails, and an API that is asked."""
    site, platform = town.site, town.site.platform
    wait_until(lambda: prometheus.value("sum(up)") == [4], seconds=60, message="not all are up")
    before, user = so_far(site), site.user()
    platform.set_limit("total", "1000/s", burst=1000)
    platform.set_limit("user", concurrency=50)
    target.answer(user, Answer(500))
    jobs = [platform.enqueue("call", user=user).id for _ in range(BREAKER_CALLS)]
    jobs += [platform.enqueue(name, user=user).id for name in ("raising", "soft_limited")]
    jobs += [platform.enqueue("returning", user=user, priority="low").id for _ in range(3)]
    found = re.search(r"listening on (http://\S+)", town.api_node.logs())
    assert found is not None
    for path, code in (("/health", 200), ("/v1/jobs/no-such-job", 401)):
        assert requests.get(found.group(1) + path, timeout=30).status_code == code
    # a rate takes a second request after the first was scraped
    wait_until(lambda: prometheus.value("sum(taskplatform_api_requests_total)") == [2], seconds=60)
    assert requests.get(f"{found.group(1)}/health", timeout=30).status_code == 200
    site.wait_for_all(jobs)
    host = target.url.removeprefix("http://")
    happened = {
        ("taskplatform_timeouts_total", "soft_limited"): 2,
        ("taskplatform_retries_total", "soft_limited", "medium"): 1,
        ("taskplatform_jobs_ended_total", "soft_limited", "medium", "timed_out"): 1,
        ("taskplatform_retries_total", "raising", "medium"): 2,
        ("taskplatform_jobs_ended_total", "call", "medium", "failed"): BREAKER_CALLS,
        ("taskplatform_events_total", "breaker_opened"): 1,
        ("taskplatform_events_total", "dead_letters"): BREAKER_CALLS + 2,
        ("taskplatform_breaker_state", host, "open"): 1,
        ("taskplatform_hosts_held", "open"): 1,
    }
    now = so_far(site)
    assert {name: now[name] - before[name] for name in happened} == happened
    assert (now["taskplatform_host_failure_ratio", host], now["taskplatform_limit_utilization_ratio", "concurrency", "user"]) == (1, 0)
    asked = metrics(town.api)
    assert asked["taskplatform_api_requests_total", "GET", "/health", "200"] == 2
    assert asked["taskplatform_api_request_seconds_count", "GET", "none"] == 1  # who has no key does not learn which routes there are
    return prometheus


def test_prometheus_scrapes_all(prometheus: Prometheus) -> None:
    # nothing is refused: neither twice, nor out of order
    def errors() -> list[str]:
        return [one["lastError"] for one in prometheus.get("targets")["activeTargets"]]

    wait_until(lambda: prometheus.value("sum(up)") == [4] and errors() == [""] * 4, seconds=60, message=f"not all are up: {errors()}")
    eventually(lambda: prometheus.value("sum(taskplatform_beat_leads)") == [1], "not one leads", seconds=60)
    eventually(lambda: prometheus.value("max(taskplatform_workers)") == [1], "not one works", seconds=60)
    assert prometheus.value("count(taskplatform_run_seconds_bucket) > 100")
    assert [name for name in prometheus.get("label/__name__/values") if name.endswith("_created")] == []


def queries() -> Iterator[tuple[str, str]]:
    """Of the dashboard, by what it is for."""
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for one in panel.get("targets", ()):
            assert one["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            yield panel["title"], one["expr"].replace("$__rate_interval", "30m")


def test_every_query_of_the_dashboard_has_data(watched: Prometheus) -> None:
    asked = list(queries())
    assert len(asked) > 50
    missing = asked

    def all_have() -> bool:
        # a scrape may time out on a busy machine, and then what it would have brought is away for a moment
        nonlocal missing
        missing = [(title, query) for title, query in missing if all(map(math.isnan, watched.value(query)))]
        return not missing

    try:
        wait_until(all_have, seconds=60)
    except AssertionError:
        raise AssertionError(f"no data: {missing}") from None


def test_the_alerts_can_be_asked_and_none_that_is_critical_is_raised(watched: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        return [rule for group in watched.get("rules")["groups"] for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] == "ok" for rule in rules()), message="the rules are not evaluated")
    assert {rule["name"] for rule in rules()} == {rule["alert"] for rule in alerts()}
    eventually(lambda: not [one for one in rules() if (one["labels"]["severity"], one["state"]) == ("critical", "firing")], "one is raised")
    # an expression with a name or a label that is not exported gives nothing for ever, and that is no error
    selectors = {found for rule in alerts() for found in re.findall(r"\b(?:taskplatform_\w+|up)\b(?:\{[^}]*\})?", rule["expr"])}
    assert len(selectors) > 20
    assert {one for one in selectors if not watched.value(f"count(last_over_time({one}[30m]))")} <= SELDOM


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]


def test_promtool_finds_no_fault(binaries: tuple[str, str], town: Town) -> None:
    for port in (town.leader, town.worker, town.api):
        text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=30).content
        done = subprocess.run([binaries[1], "check", "metrics"], input=text, capture_output=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_the_alerts_are_raised_when_they_should_be(binaries: tuple[str, str]) -> None:
    for command, file in (("check", ALERTS), ("test", ALERTS.with_name("alerts_test.yml"))):
        done = subprocess.run([binaries[1], command, "rules", str(file)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    tests = yaml.safe_load(ALERTS.with_name("alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    assert {rule["alert"] for rule in alerts()} <= {one["name"] for one in tests}


# --- when something is wrong -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proxy(ill_site: Site) -> Iterator[Proxy]:
    with Proxy(ill_site.server.port) as made:
        yield made


@pytest.fixture(scope="module")
def ill_site(new_site: Callable[[], Site]) -> Site:
    return new_site()


def test_a_port_that_is_taken_stops_nothing_and_a_loop_that_stands_still_is_ill_health(ill_site: Site) -> None:
    hangs = ill_site.deafness("loop")
    port = find_port()  # which nobody else is given, when it is free
    with socket.create_server(("127.0.0.1", port)):
        worker = ill_site.worker("--concurrency", "1", fault=hangs, ops_port=str(port), ops_patience="1500ms", heartbeat_timeout="20s")
        worker.ready()
        assert ill_site.wait_for(ill_site.platform.enqueue("returning", user=ill_site.user()).id).state is JobState.COMPLETED
        assert f"serves no /health, /ready and /metrics: 127.0.0.1:{port}: Address already in use" in worker.logs()
    eventually(lambda: status(port, "/ready") == 200, "it has not taken the port when it was free", seconds=READY_SECONDS)
    assert status(port, "/health") == 200
    hangs.begin()
    eventually(lambda: status(port, "/health") == 503, "it is said to be well")
    assert "its loop consumer stands still for" in faults(port, "/health")
    # the others go on
    checks = {one["check"]: one["ok"] for one in ask(port, "/health")[1]["checks"]}
    assert checks == {"release": True, "recovery": True, "consumer": False}
    assert metrics(port)["taskplatform_live",] == 0
    hangs.since.unlink()
    eventually(lambda: status(port, "/health") == 200, "it has not recovered")
    worker.kill("SIGTERM")
    assert worker.wait() == 0
    assert status(port, "/health") == 0
    ill_site.remove(worker)


def test_a_beat_whose_tick_hangs_is_ill(ill_site: Site, proxy: Proxy) -> None:
    port = find_port()
    beat = ill_site.beat(proxy=proxy, ops_port=str(port), ops_patience="1s")
    eventually(lambda: status(port, "/ready") == 200, "it is not ready", seconds=READY_SECONDS)
    proxy.freeze()
    eventually(lambda: status(port, "/health") == 503, "it is said to be well")
    assert "its loop tick stands still for" in faults(port, "/health")
    # also now each scrape is answered, without what Redis would have to say
    found = metrics(port)
    assert (found["taskplatform_figures_read",], found["taskplatform_live",]) == (0, 0)
    assert ("taskplatform_workers",) not in found
    proxy.heal()
    eventually(lambda: status(port, "/health") == status(port, "/ready") == 200, "it has not recovered")
    ill_site.remove(beat)


def test_without_redis_all_are_alive_and_none_is_ready(ill_site: Site, proxy: Proxy, request: pytest.FixtureRequest) -> None:
    """Also one that starts meanwhile."""
    beat, worker, late, late_api = find_port(), find_port(), find_port(), find_port()
    nodes: list[ProcessNode] = [
        ill_site.beat(proxy=proxy, ops_port=str(beat)),
        ill_site.worker("--concurrency", "1", proxy=proxy, ops_port=str(worker)),
    ]
    for port in (beat, worker):
        eventually(lambda port=port: status(port, "/ready") == 200, "it is not ready", seconds=READY_SECONDS)  # type: ignore[misc]
    proxy.cut()
    nodes.append(ill_site.beat(proxy=proxy, ops_port=str(late)))
    api = an_api(ill_site, late_api, TASKPLATFORM_REDIS_URL=proxy.url)
    request.addfinalizer(api.remove)
    for port in (beat, worker, late, late_api):
        eventually(lambda port=port: status(port, "/ready") == 503, "it is said to be ready", seconds=READY_SECONDS)  # type: ignore[misc]
        assert status(port, "/health") == 200
        eventually(lambda port=port: "Redis cannot be reached" in faults(port, "/ready"), "it does not say why")  # type: ignore[misc]
    for port in (beat, late_api):
        assert metrics(port)["taskplatform_figures_read",] == 0
    assert [node.status for node in (*nodes, api)] == ["running"] * 4
    proxy.heal()
    for port in (beat, worker, late, late_api):
        eventually(lambda port=port: status(port, "/ready") == 200, "it has not recovered")  # type: ignore[misc]
    ill_site.remove(*nodes)
