"""How soon work goes on after SIGKILL of a worker, and planning after SIGKILL of the beat that leads; beside plain Celery with redbeat.

The platform runs with its defaults: heartbeats every 3 s, lost after 15 s, the lock 15 s. Plain Celery has late acknowledgement on the
same server; its defaults cannot be waited for. A message of a killed worker comes back after the visibility timeout, an hour by default
and 20 s here, with the default rhythm in which workers look for such. Redbeat's lock lasts 1,500 s and a standby looks every 300 s; here
both are a sixtieth, 25 s and 5 s.

- worker: some workers of one slot each hold one call. They are killed, one after the other, and the time runs from the kill until the job's
  call arrives at the target from another worker, which takes itself to be on another machine.
- worker_here: the same, where it knows that it is on the same one, and sees that the processes have ended.
- beat: two beats. The one that leads is killed, and the time runs until the next job is made (plain: the next message sent) by the other.
  Then it is started again as the standby, some times in turn.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from bench.processes import ROOT, Site, celery, site, wait_for
from taskplatform.store import connect
from tests.acceptance.faults import MACHINE

DEFINITIONS = ROOT / "bench" / "recovery_definitions"
VISIBILITY_SECONDS, BEAT_INTERVAL_SECONDS = 20, 5
#: Subscribers of the definition that is planned all the time: so many jobs a minute.
SUBSCRIBERS = 600
#: kombu looks for messages to restore every 10 × 10 s; nothing takes longer than this.
PATIENCE_SECONDS = 200.0
WORKER = ["worker", "--pool", "threads", "--loglevel", "INFO"]


def run(scale: float = 1.0) -> dict[str, Any]:
    """The figures. At scale 1, five workers are killed on either side, and four leaders on ours and two on the plain one."""
    victims, ours, plain = max(2, round(5 * scale)), max(1, round(4 * scale)), max(1, round(2 * scale))
    with _target() as target, site(DEFINITIONS, BENCH_TARGET=target.url) as place:
        side = {
            "BENCH_BROKER": place.platform.settings.redis_url.removesuffix("/0") + "/1",
            "BENCH_VISIBILITY": str(VISIBILITY_SECONDS),
            "BENCH_BEAT_INTERVAL": str(BEAT_INTERVAL_SECONDS),
        }
        # at the same time: all that they do is wait
        with ThreadPoolExecutor() as threads:
            beats = threads.submit(_take_over, place, ours)
            plain_beats = threads.submit(_take_over_plain, side, place.folder, plain)
            plain_workers = threads.submit(_recover_plain, side, place.folder, target, victims)
            workers = threads.submit(_recover, place, target, victims, "far")
            measured = {
                "worker_s": workers.result(),
                "worker_here_s": _recover(place, target, victims, "near"),
                "worker_plain_s": plain_workers.result(),
                "beat_s": beats.result(),
                "beat_plain_s": plain_beats.result(),
            }
    return {
        **{name: {"median": round(statistics.median(times), 1), "max": round(max(times), 1)} for name, times in measured.items()},
        "times_s": {name: [round(time_s, 1) for time_s in times] for name, times in measured.items()},
        "plain_visibility_timeout_s": VISIBILITY_SECONDS,
        "plain_lock_timeout_s": 5 * BEAT_INTERVAL_SECONDS,
    }


# --- workers ---------------------------------------------------------------------------------------------------------


def _recover(place: Site, target: _Target, victims: int, where: str) -> list[float]:
    platform = place.platform

    def submit() -> dict[str, int]:
        jobs = {}
        for number in range(victims):
            platform.create_user(f"{where}{number}")
            jobs[f"{where}{number}"] = platform.enqueue("held", user=f"{where}{number}").id
        wait_for(lambda: all(target.calls(name) for name in jobs), seconds=60, what="the first calls")
        # victim3@host#mark
        return {name: int(platform.job(job_id).worker.split("@")[0].removeprefix("victim")) for name, job_id in jobs.items()}

    # the tests' app is the platform's, on a machine that the environment names
    app = "taskplatform.app" if where == "near" else "tests.acceptance.faulty"
    return _kill_workers(app, place.env, place.folder, target, victims, submit, lambda _: [])


def _recover_plain(side: Mapping[str, str], folder: Path, target: _Target, victims: int) -> list[float]:
    """Each victim has a queue of its own, so that it is known what it holds; who takes over serves all."""
    code = (
        "import sys; from bench.plain import fetch\n"
        "for number in range(int(sys.argv[2])): fetch.apply_async(args=[f'{sys.argv[1]}/plain{number}'], queue=f'plain{number}')"
    )

    def submit() -> dict[str, int]:
        subprocess.run([sys.executable, "-c", code, target.url, str(victims)], cwd=ROOT, env={**os.environ, **side}, check=True)
        return {f"plain{number}": number for number in range(victims)}

    def queues(numbers: Sequence[int]) -> list[str]:
        return ["--queues", ",".join(f"plain{number}" for number in numbers)]

    return _kill_workers("bench.plain", side, folder, target, victims, submit, queues)


def _kill_workers(
    app: str,
    env: Mapping[str, str],
    folder: Path,
    target: _Target,
    victims: int,
    submit: Callable[[], dict[str, int]],
    queues: Callable[[Sequence[int]], list[str]],
) -> list[float]:
    """From the kill of each of these workers to the second call of what it held. `submit` says which victim holds what."""

    def worker(name: str, serves: Sequence[int]) -> AbstractContextManager[subprocess.Popen[bytes]]:
        log = folder / f"{app}-{name}.log"
        options = [*WORKER, "-n", f"{name}@%h", "--concurrency", "1" if len(serves) == 1 else str(victims), *queues(serves)]
        return celery(app, options, env={**env, MACHINE: name}, log=log, ready=lambda: _says(log, " ready."))

    with ExitStack() as running:
        with ThreadPoolExecutor() as threads:
            started = [threads.submit(running.enter_context, worker(f"victim{number}", [number])) for number in range(victims)]
            processes = [one.result() for one in started]
        holders = submit()
        wait_for(lambda: all(target.calls(name) for name in holders), seconds=60, what=f"the first calls of {app}")
        running.enter_context(worker("survivor", range(victims)))
        killed = []
        for process in processes:
            # not in step with any rhythm
            time.sleep(random.uniform(0.8, 2))
            killed.append(time.monotonic())
            os.killpg(process.pid, signal.SIGKILL)
        wait_for(lambda: all(len(target.calls(name)) > 1 for name in holders), seconds=PATIENCE_SECONDS, what=f"the second calls of {app}")
        return [target.calls(name)[1] - killed[number] for name, number in holders.items()]


# --- beats -----------------------------------------------------------------------------------------------------------


def _take_over(place: Site, rounds: int) -> list[float]:
    platform = place.platform
    platform.create_users(f"user{number}" for number in range(SUBSCRIBERS))
    for number in range(SUBSCRIBERS):
        platform.subscribe(f"user{number}", "planned")

    def leads(pid: int, _log: Path) -> bool:
        return platform.store.planner().get("leader", "").rpartition("#")[2] == str(pid)

    def newest_s() -> float:
        jobs = platform.jobs(definition="planned", limit=1).items
        return jobs[0].created_ms / 1000 if jobs else 0.0

    return _kill_leaders("taskplatform.app", place.env, place.folder, rounds, leads, newest_s)


def _take_over_plain(side: Mapping[str, str], folder: Path, rounds: int) -> list[float]:
    client = connect(side["BENCH_BROKER"])
    seen = [0, 0.0]

    def newest_s() -> float:
        length = client.llen("every-second")
        if length != seen[0]:
            seen[:] = [length, time.time()]
        return seen[1]

    def leads(_pid: int, log: Path) -> bool:
        return _says(log, "Acquired lock")

    try:
        return _kill_leaders("bench.plain", side, folder, rounds, leads, newest_s)
    finally:
        client.close()


def _kill_leaders(
    app: str, env: Mapping[str, str], folder: Path, rounds: int, leads: Callable[[int, Path], bool], newest_s: Callable[[], float]
) -> list[float]:
    """From each kill of the leader until something newer than the kill is there."""
    with ExitStack() as running:
        beats: list[tuple[subprocess.Popen[bytes], Path]] = []

        def start(number: int) -> None:
            log = folder / f"{app}-beat{number}.log"
            options = ["beat", "--loglevel", "INFO"]
            process = running.enter_context(celery(app, options, env=env, log=log, ready=lambda: _says(log, "beat: Starting")))
            beats.append((process, log))

        def leader() -> tuple[subprocess.Popen[bytes], Path] | None:
            return next((one for one in beats if leads(one[0].pid, one[1])), None)

        start(0)
        wait_for(lambda: leader() is not None, seconds=60, what=f"a leading beat of {app}")
        start(1)
        wait_for(lambda: newest_s() > 0, seconds=90, what=f"the first of {app}")
        times = []
        for number in range(rounds):
            # at different places between two looks of the standby
            time.sleep(3 + 0.37 * number)
            wait_for(lambda: leader() is not None, seconds=60, what=f"a leading beat of {app}")
            victim = leader()
            assert victim is not None
            killed_s = time.time()
            os.killpg(victim[0].pid, signal.SIGKILL)
            victim[0].wait()
            last_s = newest_s()
            beats.remove(victim)
            wait_for(lambda: newest_s() > last_s, seconds=PATIENCE_SECONDS, what=f"another leader of {app}")  # noqa: B023
            times.append(newest_s() - killed_s)
            if number + 1 < rounds:
                start(number + 2)
        return times


def _says(log: Path, words: str) -> bool:
    return words in log.read_text("utf-8", "replace")


# --- the target ------------------------------------------------------------------------------------------------------


class _Target(ThreadingHTTPServer):
    """Holds the first call of each path that is not a user's, answers all others, and notes when they came."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.closed = threading.Event()
        self._lock = threading.Lock()
        self._calls: defaultdict[str, list[float]] = defaultdict(list)

    def calls(self, name: str) -> list[float]:
        with self._lock:
            return list(self._calls[name])

    def note(self, name: str) -> int:
        with self._lock:
            self._calls[name].append(time.monotonic())
            return len(self._calls[name])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Callers are killed here on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Target

    def do_GET(self) -> None:
        name = self.path.strip("/")
        if self.server.note(name) == 1 and not name.startswith("user"):
            self.server.closed.wait(PATIENCE_SECONDS)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: Any) -> None:
        """The log is what was noted."""


@contextmanager
def _target() -> Iterator[_Target]:
    target = _Target()
    threading.Thread(target=target.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield target
    finally:
        target.closed.set()
        target.shutdown()
        target.server_close()
