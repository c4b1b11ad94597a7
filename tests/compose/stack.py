"""The stack of docker-compose.yml as it runs on a Docker engine, driven and looked at from outside."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import requests

from tests.conftest import ROOT
from tests.support import wait_until

API = "https://localhost:8443"
PROMETHEUS = "http://127.0.0.1:9090"
MOCK_API = "http://127.0.0.1:8000"
BEATS = {"beat": 8081, "beat-standby": 8082}
WORKERS = (8092, 8094, 8096, 8098, 8100)
#: It shares the machine with everything else: how long a step may take, in seconds.
PATIENCE = 180
#: Ends what the container's first process started, as if it had crashed. Its init ends then, and the engine starts the container anew.
_CRASH = """
import os, pathlib
for one in pathlib.Path("/proc").glob("[0-9]*"):
    if one.name != str(os.getpid()) and (one / "stat").read_text().rpartition(")")[2].split()[1] == "1":
        os.kill(int(one.name), 9)
"""


class Stack:
    """What `docker compose` in the project's folder speaks of."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, *command: str, seconds: float = 300) -> str:
        """What a command in the project's folder prints. Raises AssertionError where its exit code is not 0."""
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
        assert done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def compose(self, *words: str, seconds: float = 300) -> str:
        """`docker compose …`."""
        return self.run("docker", "compose", *words, seconds=seconds)

    def command_line(self, *words: str) -> str:
        """`taskplatform …` in the stack."""
        return self.compose("exec", "-T", "api", "taskplatform", *words)

    def crash(self, service: str, index: int = 1) -> None:
        """SIGKILL the process of a container, and wait until the engine has seen it end."""
        before = self._started(service, index)
        command = ("docker", "compose", "exec", "-T", "--index", str(index), service, "python", "-c", _CRASH)
        subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False)  # it may end with its container
        wait_until(lambda: self._started(service, index) != before, seconds=PATIENCE)

    def _started(self, service: str, index: int) -> str:
        labels = {"com.docker.compose.container-number": str(index)}
        found = [one for one in self.containers(service) if labels.items() <= one["Config"]["Labels"].items()]
        return str(found[0]["State"]["StartedAt"])

    def containers(self, *services: str) -> list[dict[str, Any]]:
        """What the engine says of them; of all without a name."""
        ids = self.compose("ps", "--all", "--quiet", *services).split()
        found: list[dict[str, Any]] = json.loads(self.run("docker", "inspect", *ids))
        return found

    def _health(self, service: str) -> list[str]:
        return [str(one["State"].get("Health", one["State"])["Status"]) for one in self.containers(service)]

    # over the published ports

    @cached_property
    def _session(self) -> requests.Session:
        ca = self._folder / "ca.crt"
        ca.write_text(self.compose("exec", "-T", "api", "cat", "/tls/ca.crt"), encoding="ascii")
        key = self.compose("exec", "-T", "api", "printenv", "TASKPLATFORM_API_KEY").strip()
        session = requests.Session()
        session.trust_env = False  # else REQUESTS_CA_BUNDLE would win
        session.verify = str(ca)
        session.headers["Authorization"] = f"Bearer {key}"
        session.headers["Connection"] = "close"  # the API ends one that is idle, perhaps just as it is used again
        return session

    def api(self, method: str, path: str, body: object = None, **query: Any) -> Any:
        """The answer of the API as JSON. Raises requests' errors."""
        answer = self._session.request(method, f"{API}{path}", json=body, params=query, timeout=30)
        assert answer.ok, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json()

    def submit(self, definition: str, count: int, **more: object) -> list[str]:
        """Submit jobs of user1, and return their ids."""
        items = [{"definition": definition, "user": "user1", **more} for _ in range(count)]
        return [one["job"]["id"] for one in self.api("POST", "/v1/jobs/batch", {"items": items})["items"]]

    def states(self, ids: Sequence[str]) -> list[str]:
        """The states of jobs."""
        return [self.api("GET", f"/v1/jobs/{one}")["state"] for one in ids]

    def completed(self, ids: Sequence[str]) -> None:
        """Wait until they are. None may end otherwise."""

        def over() -> bool:
            states = self.states(ids)
            assert not {"failed", "timed_out", "canceled", "rejected"} & set(states), states
            return set(states) == {"completed"}

        wait_until(over, seconds=PATIENCE)

    def calls(self, ids: Sequence[str]) -> list[int]:
        """How often each was heard of at the mock API."""
        heard = [job for _, job in requests.get(f"{MOCK_API}/calls-of-jobs", timeout=10).json()]
        return [heard.count(one) for one in ids]

    def ops(self, port: int, path: str = "/ready") -> tuple[int, Mapping[str, Any]]:
        """Status and answer of a process's own port; 0 where there is none."""
        try:
            answer = requests.get(f"http://127.0.0.1:{port}{path}", timeout=5)
        except requests.RequestException:
            return 0, {}
        return answer.status_code, answer.json()

    def leader(self) -> str:
        """The name of the service whose beat says that it leads; "" where it is not just one."""
        leads = [service for service, port in BEATS.items() if self.ops(port, "/health")[1].get("leads")]
        return leads[0] if len(leads) == 1 else ""

    def workers(self) -> list[Mapping[str, Any]]:
        """The workers of which the platform heard within its heartbeat's timeout."""
        return [one for one in self.api("GET", "/v1/nodes")["items"] if one["silent_ms"] < 15_000]

    def settle(self, *, workers: int = 2) -> None:
        """Wait until two beats and just so many workers are ready, one beat leads, and the API and the mock API are ready."""
        wanted = {**BEATS, **{f"worker {place}": port for place, port in enumerate(WORKERS[:workers], 1)}}

        def missing() -> list[str]:
            found = [f"{name}: {answer}" for name, port in wanted.items() if (answer := self.ops(port))[0] != 200]
            found += [] if self.leader() else ["no beat leads, or more than one"]
            # one that was paused is unhealthy for the engine until it is asked again, some seconds later
            found += [f"mock API: {one}" for one in self._health("mock-api") if one != "healthy"]
            try:
                ready = self._session.get(f"{API}/ready", timeout=10)
                found += [] if ready.ok else [f"api: {ready.text}"]
                alive = [one["id"] for one in self.workers()] if ready.ok else []
            except requests.RequestException as fault:
                return [*found, f"api: {fault}"]
            return found if len(alive) == workers else [*found, f"workers: {alive}"]

        deadline = time.monotonic() + PATIENCE
        while faults := missing():
            assert time.monotonic() < deadline, f"not well within {PATIENCE} s: {faults}"
            time.sleep(0.5)

    def query(self, expression: str) -> list[tuple[Mapping[str, str], float]]:
        """What Prometheus answers: labels and value of each series."""
        answer = requests.get(f"{PROMETHEUS}/api/v1/query", params={"query": expression}, timeout=10).json()
        return [(one["metric"], float(one["value"][1])) for one in answer["data"]["result"]]

    def targets(self) -> list[tuple[str, str, str]]:
        """What Prometheus scrapes: job, how that went last time, and what was wrong."""
        found = requests.get(f"{PROMETHEUS}/api/v1/targets", timeout=10).json()["data"]["activeTargets"]
        return sorted((one["labels"]["job"], one["health"], one["lastError"]) for one in found)
