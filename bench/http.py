"""HTTP jobs that take 50 ms, in 16 slots, beside what other task queues do with the same calls.

The workers of all systems run at the same time, and one after the other gets its jobs: an idle one costs next to nothing. A round begins
when a system has all its jobs in the queue and a request from each of its slots waits at the target, and it ends with the last answer. So
the target alone keeps the time, the same way for all, and neither a worker's start nor the submitting is in it. No slot can do better than
one job in 50 ms: that is the ceiling.

All use `requests` with a connection kept by each thread. Each system has its own database on the same server, and one worker process with
16 threads, Celery's with late acknowledgement and events on. Only rq knows no threads: it has 16 processes, which run their jobs themselves
(its SimpleWorker), because with its default, a fork for each job, it would be many times slower.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from bench import http_target
from bench.processes import ROOT, python, wait_for
from taskplatform.catalogue import load
from taskplatform.local import embedded_server
from taskplatform.platform import JobRequest, Platform
from taskplatform.settings import load_settings

ROUNDS = 3
SLOTS = 16
DEFINITIONS = ROOT / "bench" / "http_definitions"


@dataclass(frozen=True)
class _Peer:
    """A system to run beside, as `bench.peers` has it."""

    packages: tuple[str, ...]
    """What it needs: if one is not installed, it is left out."""
    worker: tuple[str, ...]
    """The module that is its worker, and its arguments."""


_THREADS = str(SLOTS)
_CELERY_OPTIONS = ("--pool", "threads", "--concurrency", _THREADS, "--loglevel", "WARNING", "-E", "--without-gossip", "--without-mingle")
_TASKIQ_OPTIONS = ("--workers", "1", "--max-async-tasks", _THREADS, "--max-threadpool-threads", _THREADS, "--log-level", "WARNING")

PEERS = {
    "celery": _Peer(("celery",), ("celery", "-A", "bench.plain", "worker", "-n", "plain@%h", *_CELERY_OPTIONS)),
    "dramatiq": _Peer(("dramatiq",), ("dramatiq", "bench.peers.dramatiq:broker", "--processes", "1", "--threads", _THREADS)),
    "huey": _Peer(("huey",), ("huey.bin.huey_consumer", "bench.peers.huey.app", "-k", "thread", "-w", _THREADS, "-q")),
    "rq": _Peer(("rq",), ("rq.cli", "worker-pool", "--config", "bench.peers.rq", "-w", "rq.SimpleWorker", "-n", str(SLOTS), "-q", "bench")),
    "saq": _Peer(("saq",), ("saq", "bench.peers.saq.settings")),
    "taskiq": _Peer(("taskiq", "taskiq-redis"), ("taskiq", "worker", "bench.peers.taskiq:broker", *_TASKIQ_OPTIONS)),
}


@dataclass(frozen=True)
class _Side:
    """One system, ready to be measured."""

    send: Callable[[int], None]
    worker: subprocess.Popen[bytes]
    log: Path

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Raises RuntimeError with the end of the worker's log, if that ends or takes longer than a minute."""
        try:
            wait_for(lambda: condition() or self.worker.poll() is not None, seconds=60, what=what)
        except TimeoutError as fault:
            raise RuntimeError(f"{fault}; {self._said()}") from None
        if self.worker.poll() is not None:
            raise RuntimeError(f"a worker ended; {self._said()}")

    def _said(self) -> str:
        return f"{self.log.stem}:\n{self.log.read_text('utf-8', 'replace')[-2000:]}"


def run(scale: float = 1.0) -> dict[str, Any]:
    """The figures; at scale 1, 3 × 800 jobs for each system."""
    count = max(2 * SLOTS, int(800 * scale))
    installed = {name: peer for name, peer in PEERS.items() if all(_version(package) for package in peer.packages)}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(embedded_server(folder / "valkey")).url
        server = stack.enter_context(http_target.running())
        sides = {"taskplatform": stack.enter_context(_platform(url, server.url, folder))}
        for database, (name, peer) in enumerate(installed.items(), 1):
            sides[name] = stack.enter_context(_peer(name, peer, url.removesuffix("/0") + f"/{database}", server.url, folder))
        for side in sides.values():
            _round(server, side, 10 * SLOTS)  # warms up
        rounds = [{name: _round(server, side, count) for name, side in sides.items()} for _ in range(ROUNDS)]
    ours = [speeds["taskplatform"] for speeds in rounds]
    theirs = {name: [speeds[name] for speeds in rounds] for name in installed}
    ceiling = SLOTS / http_target.LATENCY_SECONDS
    return {
        "jobs": count,
        "slots": SLOTS,
        "jobs_per_s": round(statistics.median(ours), 1),
        "jobs_per_s_min_max": [round(min(ours), 1), round(max(ours), 1)],
        "ratio_ceiling": round(statistics.median(ours) / ceiling, 3),
        "peers_per_s": {name: round(statistics.median(speeds), 1) for name, speeds in theirs.items()},
        "ratio_peers": {
            name: round(statistics.median(a / b for a, b in zip(ours, speeds, strict=True)), 3) for name, speeds in theirs.items()
        },
        "peers": {package: _version(package) or "not installed" for peer in PEERS.values() for package in peer.packages},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def _platform(url: str, target_url: str, folder: Path) -> Iterator[_Side]:
    settings = load_settings(redis_url=url, tasks_dir=DEFINITIONS)
    platform = Platform.connect(settings, catalogue=load(settings.tasks_dir), actor="bench")
    platform.create_user("u1")
    env = {
        "TASKPLATFORM_REDIS_URL": url,
        "TASKPLATFORM_TASKS_DIR": str(DEFINITIONS),
        "TASKPLATFORM_HTTP_ALLOW": "127.0.0.1",
        "BENCH_TARGET": target_url,
    }
    argv = ["celery", "-A", "taskplatform.app", "worker", "-n", "ours@%h", *_CELERY_OPTIONS]
    log = folder / "ours.log"
    with closing(platform), python(argv, env=env, log=log) as process:
        yield _Side(lambda count: _enqueue(platform, count), process, log)


def _enqueue(platform: Platform, count: int) -> None:
    platform.enqueue_many(JobRequest(definition="fetch", user="u1") for _ in range(count))


@contextmanager
def _peer(name: str, peer: _Peer, url: str, target_url: str, folder: Path) -> Iterator[_Side]:
    os.environ["BENCH_BROKER"] = url  # that of the peer's module here, as of its worker
    send: Callable[[str, int], None] = import_module(f"bench.peers.{name}").send
    log = folder / f"{name}.log"
    with python(peer.worker, env={}, log=log) as process:
        yield _Side(lambda count: send(target_url, count), process, log)


def _round(server: http_target.Target, side: _Side, count: int) -> float:
    """Jobs per second."""
    server.hold()
    side.send(count)
    side.wait(lambda: server.held() >= SLOTS, "requests from all its slots")
    server.go(count)
    side.wait(lambda: server.seconds is not None, "the last answer")
    assert server.seconds is not None
    return count / server.seconds
