"""Real processes for the benchmarks: a server, workers (the platform's, and plain Celery's beside it), a target of HTTP calls."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from taskplatform.catalogue import load
from taskplatform.local import embedded_server
from taskplatform.platform import Platform
from taskplatform.settings import load_settings

ROOT = Path(__file__).resolve().parents[1]
DEFINITIONS = ROOT / "bench" / "definitions"


def wait_for(condition: Callable[[], bool], *, seconds: float, what: str, every: float = 0.02) -> None:
    """Return when the condition holds. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(every)


@contextmanager
def server() -> Iterator[str]:
    """The URL of a server of its own, as `taskplatform up` runs it: with an append-only file, synchronised every second."""
    with tempfile.TemporaryDirectory() as folder, embedded_server(Path(folder)) as running:
        yield running.url


@dataclass(frozen=True)
class Site:
    """A server and the platform on it, and what its workers and beat are started with."""

    platform: Platform
    env: Mapping[str, str]
    folder: Path

    @contextmanager
    def workers(self, *, count: int = 1, pool: str, slots: int) -> Iterator[list[int]]:
        """So many workers of `slots` slots each, as the platform runs them; their process ids."""
        options = ["worker", "--pool", pool, "--concurrency", str(slots), "--loglevel", "WARNING"]
        with ExitStack() as running:
            processes = [
                running.enter_context(
                    celery(
                        "taskplatform.app",
                        [*options, "-n", f"worker{number}@%h"],
                        env=self.env,
                        log=self.folder / f"worker{number}.log",
                        ready=lambda number=number: len(self.platform.store.workers()) > number,  # type: ignore[misc]
                    )
                )
                for number in range(count)
            ]
            yield [process.pid for process in processes]

    @contextmanager
    def beat(self) -> Iterator[int]:
        """A beat that leads; its process id."""
        with celery(
            "taskplatform.app",
            ["beat", "--loglevel", "WARNING"],
            env=self.env,
            log=self.folder / "beat.log",
            ready=lambda: "tick" in self.platform.store.planner(),
        ) as process:
            yield process.pid


@contextmanager
def site(definitions: Path = DEFINITIONS, **env: str) -> Iterator[Site]:
    """A server of its own and the platform with these definitions. `env` is what they refer to."""
    with server() as url, tempfile.TemporaryDirectory() as folder:
        settings = load_settings(redis_url=url, tasks_dir=definitions)
        own = {
            "TASKPLATFORM_REDIS_URL": url,
            "TASKPLATFORM_TASKS_DIR": str(definitions),
            "TASKPLATFORM_LOG_LEVEL": "WARNING",
            "TASKPLATFORM_HTTP_ALLOW": "127.0.0.1",
        }
        with closing(Platform.connect(settings, catalogue=load(definitions), actor="bench")) as platform:
            yield Site(platform, {**own, **env}, Path(folder))


@contextmanager
def target() -> Iterator[str]:
    """The URL of a target of HTTP calls, see `bench.target`."""
    command = [sys.executable, "-m", "bench.target"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"


@contextmanager
def python(command: Sequence[str], *, env: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m command …`, ended with all its processes."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env={**os.environ, **env, "PYTHONUNBUFFERED": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def celery(
    app: str, command: Sequence[str], *, env: Mapping[str, str], log: Path, ready: Callable[[], bool]
) -> Iterator[subprocess.Popen[bytes]]:
    """`celery -A app command …`, yielded when `ready` holds."""
    with python(["celery", "-A", app, *command], env=env, log=log) as process:
        wait_for(lambda: ready() or process.poll() is not None, seconds=60, what=str(log))
        if process.poll() is not None:
            raise RuntimeError(f"{app} {command[0]} ended:\n{log.read_text('utf-8', 'replace')[-2000:]}")
        yield process
