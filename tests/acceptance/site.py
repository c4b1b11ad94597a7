"""An installation of the platform for tests: a server, short settings, the real app, and the processes that tests start."""

from __future__ import annotations

import importlib
import itertools
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
from celery import Celery

import taskplatform
import taskplatform.settings
from taskplatform.local import find_port
from taskplatform.model import Job, JobState, Transition
from taskplatform.platform import Platform
from tests.acceptance.clocks import SteppedClock
from tests.acceptance.deafness import Deafness
from tests.acceptance.faults import MACHINE, Fault
from tests.acceptance.nodes import ROOT, BeatNode, FlowerNode, ProcessNode, ServerNode, WorkerNode
from tests.acceptance.proxy import Proxy
from tests.support import wait_until

N = TypeVar("N", bound=ProcessNode)

HEARTBEAT_TIMEOUT_SECONDS = 4.0
BEAT_LOCK_SECONDS = 2.0
#: Within so long after the timeout a lost worker's jobs are taken back.
LATE_SECONDS = 5.0
SETTINGS = {
    "TASKPLATFORM_TASKS_DIR": str(Path(__file__).parent / "definitions"),
    "TASKPLATFORM_HEARTBEAT_INTERVAL": "500ms",
    "TASKPLATFORM_HEARTBEAT_TIMEOUT": "15s",  # no machine stands still for so long that a worker is lost by chance
    "TASKPLATFORM_BEAT_INTERVAL": "200ms",
    "TASKPLATFORM_BEAT_LOCK_TIMEOUT": f"{BEAT_LOCK_SECONDS:g}s",
    "TASKPLATFORM_PLAN_HORIZON": "1s",
    "TASKPLATFORM_HTTP_ALLOW": "127.0.0.1",  # where the tests' target listens
    "TASKPLATFORM_VERIFY_DEFINITIONS": "false",  # but for the tests of `verify`
    "TASKPLATFORM_LOG_FORMAT": "console",  # the tests look for what people read
}

LOSING = {"TASKPLATFORM_HEARTBEAT_TIMEOUT": f"{HEARTBEAT_TIMEOUT_SECONDS:g}s"}
"""For the tests whose workers are to be lost, soon."""


def base_environment(target_url: str, guard: Mapping[str, str]) -> dict[str, str]:
    """For every process: the settings, what the definitions take from the environment, and the guard's token."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TASKPLATFORM_")}
    own = {"TARGET": target_url, "SECRET": f"secret-{secrets.token_hex(12)}", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return {**inherited, **guard, **SETTINGS, **own}


class Site:
    """One installation. Its processes live until it is closed, or until they are removed."""

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        *,
        server_clock: SteppedClock | None = None,
        server: ServerNode | None = None,
    ) -> None:
        self._folder = self.folder = folder
        self._names = itertools.count(1)
        self._users = itertools.count(1)
        self._nodes: list[ProcessNode] = []
        self._default_worker: WorkerNode | None = None
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (server_clock.environment if server_clock else {}).items():
                patch.setenv(name, value)
            self.server = server or ServerNode("server", folder=folder / "server")
        self.environment = {**environment, **self.server.settings}
        self._module = _fresh_app(self.environment)
        self.app: Celery = self._module.app
        self.platform: Platform = self._module.platform()
        self.redis = self.server.client()

    def close(self) -> None:
        """End every process."""
        for node in self._nodes:
            node.remove()
        self.redis.close()
        self.platform.close()
        self.app.close()
        self.server.remove()

    # processes

    @property
    def default_worker(self) -> WorkerNode:
        """Of four slots, started when it is first asked for, and again when it has gone."""
        if self._default_worker is None or self._default_worker.status != "running":
            self._default_worker = self.worker("--concurrency", "4")
            self._default_worker.ready()
        return self._default_worker

    def worker(
        self,
        *options: str,
        fault: Fault | Deafness | None = None,
        proxy: Proxy | None = None,
        machine: str = "",
        clock: SteppedClock | None = None,
        **settings: str,
    ) -> WorkerNode:
        """Start a worker. It is not ready yet, so that several can start at a time.

        It has a `fault` to make, speaks to Redis through `proxy`, takes itself to run on another `machine`, lives by `clock`, and has
        `settings` (by their names, heartbeat_timeout="5s") of its own.
        """
        environment = self._environment(fault, proxy, settings, clock)
        if machine:
            environment[MACHINE] = machine
        return self._keep(WorkerNode(self._name("w"), options, environment=environment, folder=self._folder))

    def beat(
        self, *, fault: Fault | None = None, proxy: Proxy | None = None, clock: SteppedClock | None = None, **settings: str
    ) -> BeatNode:
        """Start a beat. It is not ready yet. The rest is as for `worker`."""
        return self._keep(BeatNode(self._name("beat"), environment=self._environment(fault, proxy, settings, clock), folder=self._folder))

    def clock(self) -> SteppedClock:
        """A clock for some processes of this site."""
        return SteppedClock(self._folder / self._name("clock"))

    def fault(self, point: str, nth: int = 1, **options: Any) -> Fault:
        """A fault for a worker or a beat of this site, see `Fault`."""
        return Fault(self._folder / f"{self._name('fault')}.happened", point, nth, **options)

    def deafness(self, kind: str) -> Deafness:
        """A deafness for a worker of this site, as its `fault`; see `Deafness`."""
        return Deafness(kind, self._folder / f"{self._name('deaf')}.since")

    def _environment(
        self, fault: Fault | Deafness | None, proxy: Proxy | None, settings: Mapping[str, str], clock: SteppedClock | None
    ) -> dict[str, str]:
        own = {f"TASKPLATFORM_{name.upper()}": value for name, value in settings.items()}
        through = {} if proxy is None else {"TASKPLATFORM_REDIS_URL": proxy.url}
        return {**self.environment, **(fault.environment if fault else {}), **(clock.environment if clock else {}), **through, **own}

    def flower(self, *options: str, **settings: str) -> FlowerNode:
        """Start Flower. It is not ready yet."""
        environment = self._environment(None, None, settings, None)
        return self._keep(FlowerNode(self._name("flower"), find_port(), *options, environment=environment, folder=self._folder))

    def remove(self, *nodes: ProcessNode) -> None:
        """End these now."""
        for node in nodes:
            node.remove()
            self._nodes.remove(node)

    def logs(self) -> str:
        """Of all processes, in all their lives."""
        return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(self._folder.glob("*.log")))

    def _name(self, kind: str) -> str:
        return f"{kind}{next(self._names)}"

    def _keep(self, node: N) -> N:
        self._nodes.append(node)
        return node

    # jobs

    def user(self) -> str:
        """A new user, so that tests can share a site."""
        name = f"user{next(self._users)}-{secrets.token_hex(3)}"
        self.platform.create_user(name)
        return name

    def wait_for(self, job_id: str, *states: JobState, seconds: float = 60) -> Job:
        """The job, when it is in one of the states; without any, when it is finished."""

        def reached() -> bool:
            state = self.platform.job(job_id).state
            return state in states if states else state.terminal

        try:
            wait_until(reached, seconds=seconds)
        except AssertionError:
            raise AssertionError(
                f"{job_id} is not {' or '.join(states) or 'finished'} after {seconds:g} s:\n{self.story(job_id)}"
            ) from None
        return self.platform.job(job_id)

    def wait_for_all(self, jobs: Sequence[str], *, seconds: float = 60) -> list[Job]:
        """The jobs, when all are finished."""
        return [self.wait_for(job_id, seconds=seconds) for job_id in jobs]

    def wait_for_loss(self, job: Job, since_ms: int) -> Job:
        """The job, which a worker began that was lost at `since_ms`, when it has ended elsewhere. It was taken back in time."""
        ended = self.wait_for(job.id)
        back = next(line for line in self.changes(job.id) if line.at_ms >= since_ms)
        assert back.to_state in (JobState.PENDING, JobState.RETRYING), self.story(job.id)
        assert back.at_ms - since_ms < (HEARTBEAT_TIMEOUT_SECONDS + LATE_SECONDS) * 1000, self.story(job.id)
        return ended

    def story(self, job_id: str) -> str:
        """The history, for messages."""
        return "\n".join(map(str, self.platform.history(job_id)))

    def states(self, job_id: str) -> list[JobState]:
        """Which states the job entered, in this order."""
        return [line.to_state for line in self.changes(job_id)]

    def changes(self, job_id: str) -> list[Transition]:
        """The history without notes."""
        return [line for line in self.platform.history(job_id) if line.from_state is not line.to_state]

    def notes(self, job_id: str) -> list[str]:
        """What the history says beside transitions."""
        return [line.reason for line in self.platform.history(job_id) if line.from_state is line.to_state]


@contextmanager
def running_site(
    folder: Path, environment: Mapping[str, str], *, server_clock: SteppedClock | None = None, server: ServerNode | None = None
) -> Iterator[Site]:
    """A site that is closed at the end. Its server is one of its own, that lives by `server_clock`, or the one that is given."""
    site = Site(folder, environment, server_clock=server_clock, server=server)
    try:
        yield site
    finally:
        site.close()


def _fresh_app(environment: Mapping[str, str]) -> ModuleType:
    """`taskplatform.app` as a process with this environment would import it, beside any that this process has imported."""
    names = ("taskplatform.app", "celeryconfig")
    before = {name: sys.modules.pop(name, None) for name in names}
    attribute = getattr(taskplatform, "app", None)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            if name.startswith(("TASKPLATFORM_", "PLANTED_")) or name in ("TARGET", "SECRET"):
                patch.setenv(name, value)
        patch.chdir(ROOT)
        taskplatform.settings.settings.cache_clear()
        try:
            module = importlib.import_module("taskplatform.app")
            module.app.finalize()
            assert taskplatform.settings.settings().redis_url == environment["TASKPLATFORM_REDIS_URL"]
            assert module.app.conf.broker_url == taskplatform.settings.settings().broker_url
            module.platform()
            assert module.app.backend  # now, because it imports the application's module
        finally:
            taskplatform.settings.settings.cache_clear()
            for name, one in before.items():
                sys.modules.pop(name, None)
                if one is not None:
                    sys.modules[name] = one
            if attribute is not None:
                vars(taskplatform)["app"] = attribute
    return module


def eventually(holds: Callable[[], bool], message: str, *, seconds: float = 60) -> None:
    """Wait until it holds; `message` says what did not."""
    wait_until(holds, seconds=seconds, message=message)
