"""Plain processes in place of pytest-celery's containers.

pytest-celery asks a container for little: name, state, log, signals, restart. `ProcessNode` gives that for a process in a
session of its own, and stands before pytest-celery's own classes, so that nothing needs a Docker engine. A node's log is that
of its present life: after a restart there is no stale line in it to be matched.
"""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import redis
import requests
from pytest_celery import CeleryWorkerContainer, RedisContainer

from taskplatform import guardian
from taskplatform.local import EmbeddedServer
from tests.acceptance.launcher import launch
from tests.support import wait_until
from tests.tls import TlsRedis

ROOT = Path(__file__).resolve().parents[2]
READY_SECONDS = 120.0


class Guard:
    """Ends every process of a test session that is left, also when the session itself is killed.

    The platform's own guardian does it: it waits for the end of its stdin and then looks for the token in environments.
    """

    def __init__(self) -> None:
        token = secrets.token_hex(16)
        self.environment = {guardian.TOKEN_VARIABLE: token}
        argv = [sys.executable, "-I", "-S", str(guardian.__file__), token]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True)

    def close(self) -> None:
        """Return when nothing is left."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class ProcessNode:
    """A process, and all others of its session, as a node."""

    ready_prompt: str | None = None

    def __init__(self, name: str, argv: Sequence[str], *, environment: Mapping[str, str], folder: Path) -> None:
        self._name = name
        self.argv = list(argv)
        self.environment = dict(environment)
        self._folder = folder
        self._life = 0
        self._start()

    def _start(self) -> None:
        self._life += 1
        self._folder.mkdir(parents=True, exist_ok=True)
        self.log_path = self._folder / f"{self.name}.{self._life}.log"
        with self.log_path.open("wb") as log:
            self._process = launch(self.argv, folder=ROOT, environment=self.environment, output=log.fileno())
        found = guardian.find(self._process.pid)
        self._session = guardian.Child(self._process.pid, found.start if found else "")

    # what pytest-celery asks for

    @property
    def name(self) -> str:
        return self._name

    @property
    def id(self) -> str:
        return self._name

    @property
    def status(self) -> str:
        return "running" if self._process.poll() is None else "exited"

    @property
    def attrs(self) -> dict[str, Any]:
        state = {"Status": self.status, "Pid": self.pid, "ExitCode": self._process.returncode or 0}
        return {"Id": self.id, "Name": self.name, "State": state, "Config": {"Hostname": self.id}}

    def logs(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def kill(self, signal: str | int | None = None) -> None:
        """SIGKILL ends the whole session, as the end of a container would; any other signal goes to the main process alone."""
        number = _signal(signal)
        if number == _signal("SIGKILL"):
            guardian.kill([self._session], token="")
            self._process.wait()
        elif self.status == "running":
            os.kill(self.pid, number)

    def restart(self, timeout: float = 30) -> None:
        self.stop(timeout)
        self._start()
        self.ready()

    def start_again(self) -> None:
        """After it ended: first what is left of its session ends, as with any supervisor. It is not ready yet."""
        self.kill("SIGKILL")
        self._start()

    def reload(self) -> None:
        """Nothing is cached here."""

    def exec_run(self, command: str | Sequence[str], **_: Any) -> tuple[int, bytes]:
        argv = shlex.split(command) if isinstance(command, str) else list(command)
        done = subprocess.run(argv, cwd=ROOT, env=self.environment, capture_output=True, check=False)
        return done.returncode, done.stdout + done.stderr

    def ready(self) -> bool:
        """Wait until it is; fail with its log when it ends before."""

        def said() -> bool:
            assert self.status == "running", f"{self.name} ended with {self._process.returncode} before it was ready:\n{self.logs()}"
            return self.is_ready()

        return wait_until(said, seconds=READY_SECONDS, message=f"{self.name} is not ready")

    def teardown(self) -> None:
        """Nothing: as with containers, who made the node removes it."""

    def remove(self, **_: Any) -> None:
        """End it and whatever it has left."""
        self.kill("SIGKILL")

    # what the tests ask for beside that

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_ready(self) -> bool:
        return self.ready_prompt is None or self.ready_prompt in self.logs()

    def processes(self) -> list[guardian.Process]:
        """The living ones of the session."""
        return guardian.belongings([self._session], token="")

    def pause(self) -> None:
        """Stop all of them, as a frozen machine would."""
        for process in self.processes():
            guardian.send(process, signal.SIGSTOP)

    def resume(self) -> None:
        for process in self.processes():
            guardian.send(process, signal.SIGCONT)

    def wait(self, seconds: float = 60) -> int:
        """Its exit code, when it has ended by itself."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} has not ended within {seconds:g} s:\n{self.logs()[-3000:]}") from None

    def stop(self, seconds: float = 30) -> None:
        """End it by SIGTERM, and by SIGKILL what is left."""
        self.kill("SIGTERM")
        self.resume()
        deadline = time.monotonic() + seconds
        while self.status == "running" and time.monotonic() < deadline:
            time.sleep(0.02)
        self.kill("SIGKILL")


class CeleryNode(ProcessNode):
    """A process of the platform's Celery app: beat, Flower. With the tests' fault points, which do nothing unless its environment says."""

    def __init__(self, name: str, command: Sequence[str], *, environment: Mapping[str, str], folder: Path) -> None:
        argv = [sys.executable, "-m", "celery", "-A", "tests.acceptance.faulty", *command]
        super().__init__(name, argv, environment=environment, folder=folder)


class WorkerNode(CeleryNode, CeleryWorkerContainer):  # type: ignore[misc]
    """A worker. Celery knows it as `node`."""

    ready_prompt = " ready."

    def __init__(self, name: str, options: Sequence[str], *, environment: Mapping[str, str], folder: Path) -> None:
        self.node = f"{self.worker_name()}@{name}"
        super().__init__(name, ["worker", "-n", self.node, "--loglevel", "INFO", *options], environment=environment, folder=folder)

    @classmethod
    def worker_name(cls) -> str:
        return "worker"

    @classmethod
    def worker_queue(cls) -> str:
        return "high,medium,low"


class BeatNode(CeleryNode):
    """A beat: leader or standby."""

    ready_prompt = "beat: Starting"

    def __init__(self, name: str, *, environment: Mapping[str, str], folder: Path) -> None:
        super().__init__(name, ["beat", "--loglevel", "INFO"], environment=environment, folder=folder)

    @property
    def leads(self) -> bool:
        """Whether it leads by now: it may have stepped down since it began to."""
        lines = [line for line in self.logs().splitlines() if "beat leads and plans" in line or "stepping down" in line]
        return bool(lines) and "stepping down" not in lines[-1]


class FlowerNode(CeleryNode):
    """Flower on a port of the loopback interface."""

    def __init__(self, name: str, port: int, *options: str, environment: Mapping[str, str], folder: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        super().__init__(name, ["flower", f"--port={port}", *options], environment=environment, folder=folder)

    def is_ready(self) -> bool:
        try:
            return requests.get(f"{self.url}/healthcheck", timeout=30).status_code == 200
        except requests.RequestException:
            return False


class ServerNode(ProcessNode, RedisContainer):  # type: ignore[misc]
    """The embedded Valkey. Its port stays the same over restarts."""

    def __init__(self, name: str, *, folder: Path) -> None:
        self._name = name
        self._folder = folder
        self._server = EmbeddedServer(folder)
        self._server.start()

    @property
    def pid(self) -> int:
        return self._server.pid or 0

    @property
    def status(self) -> str:
        return "exited" if self._server.pid is None else "running"

    @property
    def attrs(self) -> dict[str, Any]:
        state = {"Status": self.status, "Pid": self.pid, "ExitCode": 0}
        return {"Id": self.id, "Name": self.name, "State": state, "Config": {"Hostname": self.hostname}}

    @property
    def hostname(self) -> str:
        return "127.0.0.1"

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def host_url(self) -> str:
        return self._server.url

    @property
    def settings(self) -> dict[str, str]:
        """What a process of the platform must be told to use it."""
        return {"TASKPLATFORM_REDIS_URL": self.url}

    def client(self) -> redis.Redis:
        """For the tests. Closed by the caller."""
        return redis.Redis.from_url(self.url, decode_responses=True)

    def logs(self) -> str:
        return ""

    def is_ready(self) -> bool:
        return True

    def kill(self, signal: str | int | None = None) -> None:
        if _signal(signal) == _signal("SIGKILL"):
            self._server.kill()
        else:
            self._server.stop()

    def restart(self, timeout: float = 10) -> None:  # noqa: ARG002
        self._server.stop()
        self._server.start()

    @property
    def append_only_file(self) -> Path:
        """What it writes its changes to; while it does not run a test may change that."""
        (path,) = (self._folder / "valkey" / "appendonlydir").glob("*.incr.aof")
        return path

    def remove(self, **_: Any) -> None:
        self._server.stop()


class SecureServerNode(ServerNode):
    """Debian's Redis with TLS, that somebody else starts and ends, as one of its users sees it. The tests' own client is the admin's."""

    def __init__(self, server: TlsRedis, user: str) -> None:
        self._name = "server"
        self.secure = server
        self._user = user

    @property
    def pid(self) -> int:
        assert self.secure.process is not None
        return self.secure.process.pid

    @property
    def status(self) -> str:
        return "running"

    @property
    def hostname(self) -> str:
        return self.secure.host

    @property
    def port(self) -> int:
        return self.secure.port

    @property
    def url(self) -> str:
        return self.secure.url(self._user)

    @property
    def settings(self) -> dict[str, str]:
        return self.secure.settings(self._user)

    def client(self) -> redis.Redis:
        return self.secure.client()

    def remove(self, **_: Any) -> None:
        """Nothing: who started it ends it."""


def _signal(wanted: str | int | None) -> signal.Signals:
    if wanted is None:
        return signal.SIGKILL
    return signal.Signals[wanted] if isinstance(wanted, str) else signal.Signals(wanted)
