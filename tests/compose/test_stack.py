"""The whole stack on a Docker engine: up, watched as README says, broken in many ways, scaled, stopped, and nothing lost.

It starts, kills and removes containers, so it runs only where COMPOSE_E2E is set and an engine answers. Where an image cannot be had,
such as Grafana's, COMPOSE_FILE can leave it out (`without-grafana.yml`). Every test begins with a stack that is well.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest
import redis
import requests

from taskplatform.store import connect
from tests.compose.stack import BEATS, MOCK_API, PATIENCE, PROMETHEUS, WORKERS, Stack
from tests.conftest import ROOT
from tests.support import wait_until

DEFINITION = "hourly_data_sync"

pytestmark = pytest.mark.timeout(600)


def _missing() -> str:
    if not os.environ.get("COMPOSE_E2E"):
        return "COMPOSE_E2E is not set: with it, this starts and breaks the stack of docker-compose.yml"
    if shutil.which("docker") is None:
        return "there is no docker command"
    found = subprocess.run(["docker", "compose", "version"], capture_output=True, text=True, check=False)
    if found.returncode == 0:
        found = subprocess.run(["docker", "version"], capture_output=True, text=True, check=False)
    return "" if found.returncode == 0 else f"no Docker engine answers: {found.stderr.strip()[-200:]}"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack, for all tests; it is gone after them."""
    if why := _missing():
        pytest.skip(why)
    stack = Stack(tmp_path_factory.mktemp("stack"))
    try:
        stack.compose("up", "--detach", "--wait", "--wait-timeout", "300")
        stack.run("./scripts/seed-demo")
        yield stack
    finally:
        stack.compose("down", "--volumes")
    assert stack.compose("ps", "--all", "--quiet") == ""


@pytest.fixture
def stack(running: Stack) -> Stack:
    """The stack when all is well."""
    running.settle()
    return running


def triggered(stack: Stack) -> set[str]:
    """The ids of the newest jobs that triggers made."""
    found = stack.api("GET", "/v1/jobs", definition=DEFINITION, user="user1")["items"]
    return {one["id"] for one in found if one["source"] == "trigger"}


def trigger(stack: Stack) -> None:
    """Trigger a definition, and wait until the job that this makes has completed."""
    before = triggered(stack)
    stack.api("POST", f"/v1/definitions/{DEFINITION}/trigger", {"window": "1s"})
    stack.completed(list(wait_until(lambda: triggered(stack) - before, seconds=PATIENCE)))


def test_every_port_leads_to_what_people_know_it_for(stack: Stack) -> None:
    assert stack.leader()
    seen = [stack.ops(port)[1] for port in (*BEATS.values(), *WORKERS[:2])]
    assert [one["role"] for one in seen] == ["beat", "beat", "worker", "worker"]
    assert sorted(one["leads"] for one in seen[:2]) == [False, True]
    assert seen[2]["worker"] != seen[3]["worker"]
    assert [one["slots"] for one in seen[2:]] == [3, 3]
    assert all(check["ok"] for one in seen for check in one["checks"])
    assert stack.api("GET", "/v1/health")["well"]
    assert requests.get(f"{MOCK_API}/status/200", timeout=10).ok
    assert requests.get("http://127.0.0.1:5555/", timeout=10).status_code == 401
    login = stack.compose("exec", "-T", "flower", "printenv", "TASKPLATFORM_FLOWER_LOGIN").strip().partition(":")
    assert requests.get("http://127.0.0.1:5555/", auth=(login[0], login[2]), timeout=10).ok


def test_redis_keeps_all_and_lets_in_who_has_a_password(stack: Stack) -> None:
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=6380).ping()
    lines = stack.compose("exec", "-T", "redis", "env").splitlines()
    passwords = dict(line.split("=", 1) for line in lines if line.startswith(("REDISCLI_AUTH", "MADE_FOR")))
    platform = connect(f"redis://platform:{passwords['REDISCLI_AUTH']}@127.0.0.1:6380/0")
    assert platform.ping()
    with pytest.raises(redis.exceptions.NoPermissionError):
        redis.Redis(port=6380, username="platform", password=passwords["REDISCLI_AUTH"]).config_get("*")
    admin = redis.Redis(port=6380, username="admin", password=passwords["MADE_FOR"].split()[1], decode_responses=True)
    kept = admin.config_get("appendonly", "maxmemory-policy")
    assert kept == {"appendonly": "yes", "maxmemory-policy": "noeviction"}
    # Flower asks once, before it hears that it may not, and redis-py tells its name
    denied = [one for one in admin.acl_log() if one["username"] == "platform" and one["object"] not in ("config|get", "client|setinfo")]
    assert denied == []
    for one in (platform, admin):
        one.close()


def test_containers_can_do_no_more_than_they_must(stack: Stack) -> None:
    for one in stack.containers():
        name, host = one["Name"], one["HostConfig"]
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert any(option.startswith("no-new-privileges") for option in host["SecurityOpt"]), name
        assert one["Config"]["User"] not in ("", "0", "root"), name
        assert host["Memory"] > 0, name
        assert host["PidsLimit"] > 0, name
        published = [binding["HostIp"] for bindings in (host["PortBindings"] or {}).values() for binding in bindings]
        assert set(published) <= {"127.0.0.1"}, name
    for tool in ("pip", "gcc", "cc", "make"):
        assert stack.compose("exec", "-T", "api", "sh", "-c", f"command -v {tool} || true") == ""
    with pytest.raises(AssertionError, match="Read-only file system"):
        stack.compose("exec", "-T", "worker", "touch", "/app/written")


def test_the_commands_in_the_readme_do_what_it_says(stack: Stack) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## docker compose\n")[2].partition("\n## ")[0]
    commands = re.findall(r"^\$ (.*)$", section, re.MULTILINE)
    assert len(commands) > 8
    printed = {}
    for command in commands:
        if command.startswith("docker compose down"):  # that is this module's end
            continue
        printed[command.partition(" #")[0].strip()] = stack.run("bash", "-euo", "pipefail", "-c", command)

    def shown(part: str) -> str:
        return next(output for command, output in printed.items() if part in command)

    assert shown("users count").strip() == "4"
    assert "user1" in shown("subscribers")
    assert "INFO" in shown("logs") or '"level"' in shown("logs")
    assert '"leads"' in shown(":8081")
    assert '"worker"' in shown(":8092")
    assert "triggered" in shown("trigger")
    # what it scaled up
    stack.compose("up", "--detach", "--wait")


def test_every_job_completes_and_is_called_once(stack: Stack) -> None:
    ids = [one for priority in ("low", "medium", "high") for one in stack.submit(DEFINITION, 12, priority=priority)]
    trigger(stack)
    stack.completed(ids)
    assert stack.calls(ids) == [1] * 36


def test_the_standby_leads_when_the_leader_is_killed(stack: Stack) -> None:
    leader = stack.leader()
    other = next(service for service in BEATS if service != leader)
    stack.compose("kill", leader)  # it stays away, else it may be the one that leads after the lock's end
    wait_until(lambda: stack.ops(BEATS[other])[1].get("leads"), seconds=PATIENCE)
    trigger(stack)
    stack.compose("up", "--detach", "--wait")
    stack.settle()
    assert stack.leader() == other


def test_jobs_of_a_killed_worker_run_elsewhere(stack: Stack) -> None:
    stack.compose("pause", "mock-api")  # so that calls are under way
    try:
        ids = stack.submit(DEFINITION, 6)
        wait_until(lambda: stack.states(ids) == ["running"] * 6, seconds=PATIENCE)
        killed = stack.ops(WORKERS[0])[1]["worker"]
        held = [one for one in ids if stack.api("GET", f"/v1/jobs/{one}")["worker"] == killed]
        assert held
        stack.crash("worker")
    finally:
        stack.compose("unpause", "mock-api")
    stack.completed(ids)
    for one in held:
        history = stack.api("GET", f"/v1/jobs/{one}/history")["items"]
        assert any("lost" in line["reason"] and killed in line["reason"] + line["worker"] for line in history), history
    stack.settle()
    assert stack.ops(WORKERS[0])[1]["worker"] != killed


def test_nothing_is_lost_while_redis_cannot_be_reached(stack: Stack) -> None:
    if os.geteuid() != 0 or not (shutil.which("nsenter") and shutil.which("iptables")):
        pytest.skip("cutting a container's network needs root, nsenter and iptables")
    (container,) = stack.containers("redis")
    # nothing comes in any more and nothing is told so: as a network that is cut. (Docker's own way, to take it off the network, cannot
    # always be undone.)
    rule = ("INPUT", "-i", "eth0", "-p", "tcp", "--dport", "6379", "-j", "DROP")
    firewall = ("nsenter", "--net", "--target", str(container["State"]["Pid"]), "iptables")
    stack.compose("pause", "mock-api")
    try:
        ids = stack.submit(DEFINITION, 4) + stack.submit(DEFINITION, 4, countdown=5)
        wait_until(lambda: stack.states(ids[:4]) == ["running"] * 4, seconds=PATIENCE)
        stack.run(*firewall, "-I", *rule)
    finally:
        stack.compose("unpause", "mock-api")
    try:
        # away is said, and is no reason to be started anew
        wait_until(lambda: all(stack.ops(port)[0] == 503 for port in (*BEATS.values(), *WORKERS[:2])), seconds=PATIENCE)
        assert [stack.ops(port, "/health")[0] for port in (*BEATS.values(), *WORKERS[:2])] == [200] * 4
    finally:
        stack.run(*firewall, "-D", *rule)
    stack.settle()
    stack.completed(ids)


def test_nothing_is_lost_when_redis_starts_anew(stack: Stack) -> None:
    ids = stack.submit(DEFINITION, 6) + stack.submit(DEFINITION, 6, countdown=5)
    stack.compose("restart", "redis")
    stack.settle()
    stack.completed(ids)


def test_it_scales_and_prometheus_follows(stack: Stack) -> None:
    stack.compose("up", "--detach", "--wait", "--scale", "worker=5")
    stack.settle(workers=5)
    assert len({stack.ops(port)[1]["worker"] for port in WORKERS}) == 5
    wait_until(lambda: len(stack.query('up{job="taskplatform-worker"} == 1')) == 5, seconds=PATIENCE)
    wait_until(lambda: stack.query("max(taskplatform_workers)")[0][1] == 5, seconds=PATIENCE)
    ids = stack.submit(DEFINITION, 40)
    stack.compose("up", "--detach", "--wait", "--scale", "worker=2")  # the others end with what they have
    stack.settle()
    stack.completed(ids)
    assert stack.calls(ids) == [1] * 40


def test_prometheus_reaches_all_and_knows_the_rules(stack: Stack) -> None:
    ours = ["api", "beat", "beat", "worker", "worker"]
    wanted = ["flower", "prometheus", *(f"taskplatform-{role}" for role in ours)]
    deadline = time.monotonic() + PATIENCE
    while (found := stack.targets()) != [(job, "up", "") for job in wanted]:
        assert time.monotonic() < deadline, found
        time.sleep(1)
    wait_until(lambda: stack.query("max(taskplatform_leaders)") == [({}, 1.0)], seconds=PATIENCE)
    groups = requests.get(f"{PROMETHEUS}/api/v1/rules", timeout=10).json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) >= 15
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}


def test_it_stops_in_time_and_goes_on_where_it_was(stack: Stack) -> None:
    waiting = stack.submit(DEFINITION, 5, countdown=10)
    stack.compose("stop")
    for one in stack.containers():
        state = one["State"]
        service = one["Config"]["Labels"]["com.docker.compose.service"]
        assert state["ExitCode"] != 137, service  # it had to be killed
        assert not state["OOMKilled"], service
        if service in (*BEATS, "worker", "api", "worker-ports", "redis"):
            assert state["ExitCode"] == 0, service
    stack.compose("up", "--detach", "--wait")
    assert stack.command_line("users", "count").strip() == "4"
    stack.completed(waiting)
    stack.settle()
