"""Starts the tests' Celery processes without the imports of each: a process that has them, and forks.

A worker, a beat or Flower spends most of its start on imports, more than a second of a processor, and the tests start hundreds of them.
`python -m tests.acceptance.launcher SOCKET` imports once what does not depend on an environment: not the application, no settings, no
definitions. What it starts is a process in a session of its own, with the environment, files and words that were asked for, and runs
Celery's own program from its first line. `launch` asks it.

What it cannot start as it would be started by itself is left to who asks: another environment of the interpreter or of its libraries
(`PYTHON…`, `LD_…`), or a system without pidfd.
"""

from __future__ import annotations

import array
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

VARIABLE = "TEST_LAUNCHER"
"""In an environment: the launcher's socket. Processes whose environment lacks it are started by themselves."""

_SIZE, _NUMBER = struct.Struct("!I"), struct.Struct("!i")
#: None of these reads the environment, or settings, when it is imported.
_IMPORTED = (
    "celery.bin.celery",
    "celery.apps.beat",
    "celery.apps.worker",
    "celery.concurrency.prefork",
    "celery.concurrency.thread",
    "celery.worker.components",
    "flower.command",
    "redbeat.schedulers",
    "requests",
    "taskplatform.catalogue",
    "taskplatform.consumer",
    "taskplatform.http",
    "taskplatform.metrics",
    "taskplatform.ops",
    "taskplatform.planner",
    "taskplatform.platform",
    "taskplatform.recovery",
    "taskplatform.release",
    "taskplatform.results",
    "taskplatform.stop",
)
_NOT_IMPORTED = ("celeryconfig", "taskplatform.app", "taskplatform.beat", "tests.acceptance.faulty")


class Started(Protocol):
    """What a node needs of `subprocess.Popen`."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...


class Launched:
    """A process that the launcher started. It is reaped there; its exit code, as Popen has it, comes over the socket."""

    def __init__(self, pid: int, line: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._line = line

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        return self._read(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises TimeoutExpired, as Popen does."""
        code = self._read(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def _read(self, seconds: float | None) -> int | None:
        if self.returncode is None:
            self._line.settimeout(seconds)
            try:
                told = self._line.recv(4)
            except (BlockingIOError, TimeoutError):
                return None
            self._line.close()
            assert len(told) == 4, "the launcher has ended"
            (self.returncode,) = _NUMBER.unpack(told)
        return self.returncode


def launch(argv: Sequence[str], *, folder: Path, environment: Mapping[str, str], output: int) -> Started:
    """Start `python -m celery …`, by the launcher where there is one that can. Its stdin is empty; `output` takes stdout and stderr."""
    path = environment.get(VARIABLE)
    if path and list(argv[:3]) == [sys.executable, "-m", "celery"]:
        found = _ask(path, argv[3:], folder, environment, output)
        if found is not None:
            return found
    return subprocess.Popen(
        argv, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )


def _ask(path: str, words: Sequence[str], folder: Path, environment: Mapping[str, str], output: int) -> Launched | None:
    line = socket.socket(socket.AF_UNIX)
    line.connect(path)
    told = json.dumps([list(words), str(folder), dict(environment)]).encode()
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - a device
        socket.send_fds(line, [_SIZE.pack(len(told))], [nothing.fileno(), output, output])
    line.sendall(told)
    (pid,) = _NUMBER.unpack(line.recv(4))
    if pid:
        return Launched(pid, line)
    line.close()
    return None


class Launcher:
    """The process that forks, from the side of the tests. Whoever gave it `environment` ends it by the token there (`Guard`)."""

    def __init__(self, folder: Path, environment: Mapping[str, str], root: Path) -> None:
        self.path = folder / "launcher"
        argv = [sys.executable, "-m", "tests.acceptance.launcher", str(self.path)]
        with (folder / "launcher.out").open("wb") as output:
            self._process = subprocess.Popen(
                argv, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while not self.path.exists():
            assert self._process.poll() is None, (folder / "launcher.out").read_text(encoding="utf-8")
            assert time.monotonic() < deadline, "the launcher does not listen"
            time.sleep(0.01)

    def close(self) -> None:
        """End it. What it started lives on."""
        self._process.kill()
        self._process.wait()


# --- the process that forks ------------------------------------------------------------------------------------------


class _Request(NamedTuple):
    words: list[str]
    folder: str
    environment: dict[str, str]
    files: list[int]


def _serve(path: str) -> _Request:
    """Until it is ended; returns in each process that it starts, with what that is to be."""
    ends: dict[int, tuple[int, socket.socket]] = {}
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(f"{path}.new")
        listener.listen(64)
        selector.register(listener, selectors.EVENT_READ)
        Path(f"{path}.new").rename(path)  # whoever sees it can connect
        while True:
            for key, _ in selector.select():
                if key.fileobj is not listener:
                    selector.unregister(key.fileobj)
                    _tell_end(key.fd, *ends.pop(key.fd))
                    continue
                caller, _ = listener.accept()
                request = _read(caller)
                if not _fits(request.environment):
                    caller.sendall(_NUMBER.pack(0))
                    caller.close()
                elif pid := os.fork():
                    pidfd = os.pidfd_open(pid)
                    ends[pidfd] = pid, caller
                    selector.register(pidfd, selectors.EVENT_READ)
                else:
                    os.setsid()
                    caller.sendall(_NUMBER.pack(os.getpid()))  # now, so that whoever knows its session finds it there
                    for pidfd, (_, line) in ends.items():
                        os.close(pidfd)
                        line.close()
                    caller.close()
                    return request
                for one in request.files:
                    os.close(one)


def _read(caller: socket.socket) -> _Request:
    head, files, _, _ = socket.recv_fds(caller, _SIZE.size, 3)
    (size,) = _SIZE.unpack(head)
    told = array.array("B")
    while len(told) < size:
        told.frombytes(caller.recv(size - len(told)))
    words, folder, environment = json.loads(told.tobytes())
    return _Request(words, folder, environment, list(files))


def _fits(environment: Mapping[str, str]) -> bool:
    """Whether interpreter and libraries would start in that environment as they did in this one."""

    def of_the_interpreter(variables: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in variables.items() if name.startswith(("PYTHON", "LD_"))}

    return hasattr(os, "pidfd_open") and of_the_interpreter(environment) == of_the_interpreter(os.environ)


def _tell_end(pidfd: int, pid: int, caller: socket.socket) -> None:
    os.close(pidfd)
    _, status = os.waitpid(pid, 0)
    try:
        caller.sendall(_NUMBER.pack(os.waitstatus_to_exitcode(status)))
    except OSError:
        pass  # nobody asks any more
    finally:
        caller.close()


def _become(request: _Request) -> None:
    """Be the process that was asked for, until its end."""
    for number, one in enumerate(request.files):
        os.dup2(one, number)
        os.close(one)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.path[0] = request.folder
    sys.argv = ["celery", *request.words]
    runpy.run_module("celery", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for _name in _IMPORTED:
        importlib.import_module(_name)
    assert not set(_NOT_IMPORTED) & sys.modules.keys(), "they would have this process's settings"
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python has it: a caller may be gone
    _become(_serve(sys.argv[1]))
