"""Ends what a supervisor that died has left behind; and knows which processes belong to a supervisor.

`taskplatform.local` runs this file first, in a session of its own, and writes to its stdin: `add PID STAGE GRACE START`
for each child that it starts (a session leader), `gone PID` when that child and its session have ended. When stdin ends,
the supervisor is through or dead, by SIGKILL too: what is left then gets SIGTERM by descending stage and, after its
grace, SIGKILL, so that workers end before their server and the server flushes.

What belongs to a run: the sessions of the children, their descendants, and (Linux) every process whose environment
carries the run's token, which finds those that left their session and one that was just being started. A process is
known by pid and start time, so a pid that has been given to a stranger is left alone.

Standard library only, and light: it runs as `python -I -S guardian.py TOKEN`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

TOKEN_VARIABLE = "_TASKPLATFORM_STACK"
"""Carries a run's token in the environment of its processes."""

KILL_SECONDS = 5.0
"""How long SIGKILL is repeated before what does not die (a process stuck in the kernel) is given up."""

STRANGER_GRACE_SECONDS = 1.0


class Process(NamedTuple):
    """One line of the process table. `start` is text that tells two processes with the same pid apart."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    start: str
    zombie: bool


class Child(NamedTuple):
    """A process that the supervisor started as leader of a session."""

    pid: int
    start: str
    stage: int = 0
    grace_seconds: float = 0.0


def main(token: str) -> None:
    """Follow the supervisor until stdin ends, then end what is left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    children: dict[int, Child] = {}
    for line in sys.stdin:
        verb, *values = line.rstrip("\n").split(" ", 4)
        if verb == "add" and len(values) == 4:
            children[int(values[0])] = Child(int(values[0]), values[3], int(values[1]), float(values[2]))
        elif verb == "gone" and values:
            children.pop(int(values[0]), None)
    end(children.values(), token)


def end(children: Iterable[Child], token: str) -> int:
    """End the children by descending stage, and with them all that belongs to the run. Returns how many were found alive."""
    children = list(children)
    found = len(belongings(children, token))
    for stage in sorted({child.stage for child in children}, reverse=True):
        group = [child for child in children if child.stage == stage]
        known = belongings(group, token="")
        leaders = {child.pid for child in group}
        _terminate(process for process in known if process.pid in leaders)  # a Celery worker ends its pool itself
        _wait_for_end(group, max(child.grace_seconds for child in group))
        for process in known:
            send(process, signal.SIGKILL)
        kill(group, token="")
    _end_strangers(token)
    kill(children, token)
    return found


def kill(children: Iterable[Child], token: str) -> None:
    """SIGKILL what belongs to the children and the token, again until nothing new has appeared."""
    children = list(children)
    deadline = time.monotonic() + KILL_SECONDS
    while (left := belongings(children, token)) and time.monotonic() < deadline:
        for process in left:
            send(process, signal.SIGKILL)
        time.sleep(0.02)


def belongings(children: Iterable[Child], token: str) -> list[Process]:
    """The living processes of the children's sessions and groups, those that carry the token, and all their descendants."""
    table = process_table()
    own = {pid for pid in table if _carries(pid, token)} if token else set()
    for child in children:
        leader = table.get(child.pid)
        if leader is None or leader.start == child.start:  # the number is not given away while a session has it
            own |= {process.pid for process in table.values() if child.pid in (process.sid, process.pgid)}
    while more := {process.pid for process in table.values() if process.ppid in own} - own:
        own |= more
    own.discard(os.getpid())
    return [table[pid] for pid in own if not table[pid].zombie]


def process_table() -> dict[int, Process]:
    """All processes, by pid."""
    if sys.platform == "linux":
        found = (_read_process(int(entry)) for entry in os.listdir("/proc") if entry.isdigit())  # noqa: PTH208 - pathlib is slower to import
        return {process.pid: process for process in found if process is not None}
    return _ps("-ax")


def find(pid: int) -> Process | None:
    """The process with this pid, if there is one."""
    return _read_process(pid) if sys.platform == "linux" else _ps("-p", str(pid)).get(pid)


def send(process: Process, number: signal.Signals) -> None:
    """Send a signal to exactly this process; nothing happens if it is gone."""
    now = find(process.pid)
    if now is not None and now.start == process.start:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, number)


# --- helpers ---------------------------------------------------------------------------------------------------------


def _alive(children: Iterable[Child]) -> list[Child]:
    found = ((child, find(child.pid)) for child in children)
    return [child for child, process in found if process is not None and process.start == child.start and not process.zombie]


def _terminate(processes: Iterable[Process]) -> None:
    """SIGTERM, and SIGCONT for one that is stopped."""
    for process in processes:
        send(process, signal.SIGTERM)
        send(process, signal.SIGCONT)


def _wait_for_end(children: list[Child], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while _alive(children) and time.monotonic() < deadline:
        time.sleep(0.05)


def _end_strangers(token: str) -> None:
    """SIGTERM and a short grace for what only the token tells of: there may be a server among them."""
    _terminate(belongings([], token))
    deadline = time.monotonic() + STRANGER_GRACE_SECONDS
    while belongings([], token) and time.monotonic() < deadline:
        time.sleep(0.05)


def _carries(pid: int, token: str) -> bool:
    try:
        return f"{TOKEN_VARIABLE}={token}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _read_process(pid: int) -> Process | None:
    """From /proc/PID/stat (proc(5)); the name in parentheses may hold anything."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    state, ppid, pgid, sid, *rest = stat[stat.rindex(b")") + 2 :].split()
    return Process(pid, int(ppid), int(pgid), int(sid), rest[15].decode(), state in (b"Z", b"X"))


def _ps(*selection: str) -> dict[int, Process]:
    """Where there is no /proc: no session id there, the process group stands in for it."""
    columns = ["-o", "pid=,ppid=,pgid=,state=,lstart="]
    output = subprocess.run(["ps", *selection, *columns], capture_output=True, text=True, check=False).stdout
    table = {}
    for line in output.splitlines():
        pid, ppid, pgid, state, start = line.split(None, 4)
        table[int(pid)] = Process(int(pid), int(ppid), int(pgid), int(pgid), start.strip(), state.startswith("Z"))
    return table


if __name__ == "__main__":
    main(sys.argv[1])
