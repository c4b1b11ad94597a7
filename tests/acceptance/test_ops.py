"""`/health`, `/ready` and `/metrics` of real beats and workers, and a real Prometheus that scrapes them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families

from taskplatform.local import find_port
from taskplatform.model import JobState
from tests.acceptance.nodes import Guard, ProcessNode, WorkerNode
from tests.acceptance.proxy import Proxy
from tests.acceptance.site import Site, eventually
from tests.conftest import ROOT
from tests.support import wait_until

#: A busy machine may need so long to start a process.
READY_SECONDS = 90
ALERTS = ROOT / "deploy/prometheus/alerts.yml"


def ask(port: int, path: str) -> tuple[int, dict[str, Any]]:
    """The status and the answer; 0 where nobody answers."""
    try:
        answer = requests.get(f"http://127.0.0.1:{port}{path}", timeout=10)
    except requests.ConnectionError:
        return 0, {}
    return answer.status_code, answer.json()


def status(port: int, path: str) -> int:
    return ask(port, path)[0]


def faults(port: int, path: str) -> str:
    return "; ".join(one.get("fault", "") for one in ask(port, path)[1].get("checks", ()))


def metrics(port: int) -> dict[tuple[str, ...], float]:
    """By name and the values of the labels, in the order of the labels' names."""
    text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@dataclass
class Town:
    """A leader, a standby, and a worker with two processes, each with its port."""

    site: Site
    leader: int
    standby: int
    worker: int
    worker_node: WorkerNode


@pytest.fixture(scope="module")
def town(new_site: Callable[[], Site]) -> Town:
    site = new_site()
    leader, standby, worker = find_port(), find_port(), find_port()
    site.beat(ops_port=str(leader))
    node = site.worker("--concurrency", "2", ops_port=str(worker))
    eventually(lambda: ask(leader, "/ready")[1].get("leads") is True, "the beat does not lead", seconds=READY_SECONDS)
    site.beat(ops_port=str(standby))
    for port in (standby, worker):
        eventually(lambda port=port: status(port, "/ready") == 200, "it is not ready", seconds=READY_SECONDS)  # type: ignore[misc]
    return Town(site, leader, standby, worker, node)


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
    for port, role in ((town.leader, "beat"), (town.standby, "beat"), (town.worker, "worker")):
        for path in ("/health", "/ready"):
            code, answer = ask(port, path)
            assert (code, answer["ok"], answer["role"]) == (200, True, role)
    assert [ask(port, "/health")[1]["leads"] for port in (town.leader, town.standby)] == [True, False]
    assert {one["check"] for one in ask(town.worker, "/health")[1]["checks"]} == {"release", "recovery", "consumer"}
    assert [metrics(port)["taskplatform_beat_leads",] for port in (town.leader, town.standby)] == [1, 0]
    assert metrics(town.leader)["taskplatform_leaders",] == 1


def test_every_run_is_counted_whichever_process_ran_it_and_however_that_ended(town: Town, user: str) -> None:
    """Two processes; one is killed in its run, three times, and what ran before and after that is there all the same."""
    site, platform = town.site, town.site.platform
    jobs = [platform.enqueue("returning", user=user).id for _ in range(15)]
    failing = platform.enqueue("raising", user=user, params={"times": 1}).id
    site.wait_for_all(jobs)
    dying = platform.enqueue("dying", user=user, params={"how": "killed"}).id
    assert site.wait_for(dying, seconds=30).reason.startswith("poison pill")
    jobs += [platform.enqueue("returning", user=user, priority="high").id for _ in range(15)]
    site.wait_for_all([*jobs, failing])
    log = town.worker_node.logs()
    assert "ForkPoolWorker-1" in log
    assert "ForkPoolWorker-3" in log

    def counted() -> dict[tuple[str, ...], float]:
        return metrics(town.standby)

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
        ("taskplatform_events_total", "poison_pills"): 1,
        ("taskplatform_dead_letters",): 1,
        ("taskplatform_release_lag_seconds_count", "high"): 15,
        ("taskplatform_release_lag_seconds_count", "medium"): 15 + 2 + 3,
        ("taskplatform_job_states_total", "running"): 30 + 2 + 3,
        ("taskplatform_jobs_in_flight",): 0,
        ("taskplatform_workers",): 1,
        ("taskplatform_slots", "high"): 2,
        ("taskplatform_worker_slots", town.worker_node.node): 2,
    }
    eventually(lambda: expected.items() <= counted().items(), "the figures do not agree")
    # every beat says the same
    assert expected.items() <= metrics(town.leader).items()
    # runs of about nothing are in low buckets, and all are in the last
    found = counted()
    assert found["taskplatform_run_seconds_bucket", "returning", "+Inf"] == 30
    assert found["taskplatform_run_seconds_bucket", "returning", "30"] == 30
    assert 0 < found["taskplatform_run_seconds_sum", "returning"] < 100
    # a process that was forked after the port was opened has not kept it
    pids = in_session(town.worker_node)
    assert len(pids) >= 3
    assert listeners(pids, town.worker) == {town.worker_node.pid}


def test_what_waits_and_what_runs(town: Town, user: str) -> None:
    platform = town.site.platform
    jobs = [platform.enqueue("sleeping", user=user, priority="low").id for _ in range(7)]

    def found() -> bool:
        now = metrics(town.leader)
        return (
            now["taskplatform_jobs_running", "sleeping"] == 2
            and now["taskplatform_jobs_queued", "low"] == 2
            and now.get(("taskplatform_jobs_waiting", "sleeping", "low")) == now.get(("taskplatform_jobs_due", "sleeping", "low")) == 3
            and now["taskplatform_oldest_waiting_seconds", "low"] > 0
            and now["taskplatform_worker_running", town.worker_node.node] == 2
        )

    eventually(found, "the figures do not agree")
    assert metrics(town.worker)["taskplatform_pool_running",] >= 2
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
        answer = requests.get(f"{self._url}/api/v1/{path}", params=query, timeout=10)
        content = answer.json()
        assert content["status"] == "success", content
        return content["data"]

    def value(self, expression: str) -> list[float]:
        return [float(one["value"][1]) for one in self.get("query", query=expression)["result"]]

    def answers(self) -> bool:
        try:
            return requests.get(f"{self._url}/-/ready", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False


@pytest.fixture(scope="module")
def prometheus(binaries: tuple[str, str], town: Town, guard: Guard, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder, port = tmp_path_factory.mktemp("prometheus"), find_port()
    scraped = [f"127.0.0.1:{one}" for one in (town.leader, town.standby, town.worker)]
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
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
            wait_until(running.answers, seconds=30, message="prometheus does not answer")
            yield running
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def test_prometheus_scrapes_all(prometheus: Prometheus, town: Town) -> None:
    wait_until(lambda: prometheus.value("sum(up)") == [3], seconds=20, message="not all are up")
    assert prometheus.value("sum(taskplatform_beat_leads)") == [1]
    assert prometheus.value("max(taskplatform_workers)") == [1]
    assert prometheus.value("count(taskplatform_run_seconds_bucket) > 100")
    # nothing was refused: neither twice, nor out of order
    targets = prometheus.get("targets")["activeTargets"]
    assert [one["lastError"] for one in targets] == [""] * 3


def test_prometheus_takes_the_alerts_and_none_is_raised(prometheus: Prometheus) -> None:
    wanted = {rule["alert"] for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]}

    def rules() -> list[dict[str, Any]]:
        return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] == "ok" for rule in rules()), message="the rules are not evaluated")
    assert {rule["name"] for rule in rules()} == wanted
    critical = [rule["name"] for rule in rules() if rule["labels"]["severity"] == "critical" and rule["state"] == "firing"]
    assert critical == []


def test_the_alerts_speak_of_metrics_that_there_are(prometheus: Prometheus) -> None:
    """An expression with a name that is not exported gives nothing for ever, and that is no error."""
    wait_until(lambda: prometheus.value("sum(up)") == [3], seconds=20)
    known = set(prometheus.get("label/__name__/values"))
    text = ALERTS.read_text(encoding="utf-8")
    named = set(re.findall(r"\btaskplatform_\w+", "".join(re.findall(r"expr:(.*?)(?:for|labels):", text, re.DOTALL))))
    assert len(named) > 12
    # the first retry or event makes the series
    assert named - known <= {"taskplatform_retries_total", "taskplatform_events_total"}


def test_promtool_finds_no_fault(binaries: tuple[str, str], town: Town) -> None:
    for port in (town.leader, town.worker):
        text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).content
        done = subprocess.run([binaries[1], "check", "metrics"], input=text, capture_output=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, b"")
    rules = subprocess.run([binaries[1], "check", "rules", str(ALERTS)], capture_output=True, text=True, check=False)
    assert rules.returncode == 0, rules.stdout + rules.stderr


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
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        worker = ill_site.worker("--concurrency", "1", fault=hangs, ops_port=str(port), ops_patience="1500ms", heartbeat_timeout="20s")
        worker.ready()
        assert ill_site.wait_for(ill_site.platform.enqueue("returning", user=ill_site.user()).id, seconds=30).state is JobState.COMPLETED
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
    assert worker.wait(30) == 0
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
    eventually(lambda: status(port, "/health") == status(port, "/ready") == 200, "it has not recovered", seconds=30)
    ill_site.remove(beat)


def test_without_redis_all_are_alive_and_none_is_ready(ill_site: Site, proxy: Proxy) -> None:
    """Also one that starts meanwhile."""
    beat, worker, late = find_port(), find_port(), find_port()
    nodes: list[ProcessNode] = [
        ill_site.beat(proxy=proxy, ops_port=str(beat)),
        ill_site.worker("--concurrency", "1", proxy=proxy, ops_port=str(worker)),
    ]
    for port in (beat, worker):
        eventually(lambda port=port: status(port, "/ready") == 200, "it is not ready", seconds=READY_SECONDS)  # type: ignore[misc]
    proxy.cut()
    nodes.append(ill_site.beat(proxy=proxy, ops_port=str(late)))
    for port in (beat, worker, late):
        eventually(lambda port=port: status(port, "/ready") == 503, "it is said to be ready", seconds=READY_SECONDS)  # type: ignore[misc]
        assert status(port, "/health") == 200
        eventually(lambda port=port: "Redis cannot be reached" in faults(port, "/ready"), "it does not say why", seconds=30)  # type: ignore[misc]
    assert metrics(beat)["taskplatform_figures_read",] == 0
    assert [node.status for node in nodes] == ["running"] * 3
    proxy.heal()
    for port in (beat, worker, late):
        eventually(lambda port=port: status(port, "/ready") == 200, "it has not recovered", seconds=30)  # type: ignore[misc]
    ill_site.remove(*nodes)
