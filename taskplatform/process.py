"""What this machine knows of processes: who one is, whether it has ended for sure, that a child ends with its parent, and can log.

Most of it needs Linux and its /proc; elsewhere nothing is known, and nobody is taken for dead by it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def machine() -> str:
    """The boot of the machine, and the namespaces in which its pids and start times count; "" where that is not known."""
    try:
        if str(Path("/proc/self").readlink()) != str(os.getpid()):  # a /proc of other namespaces than this process has
            return ""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        spaces = [str(one.readlink()) for one in map(Path, ("/proc/self/ns/pid", "/proc/self/ns/time")) if one.exists()]
    except OSError:
        return ""
    return " ".join([boot, *spaces])


def identity() -> dict[str, str]:
    """Who this process is, for `has_ended`."""
    pid = os.getpid()
    return {"pid": str(pid), "machine": machine(), "born": _born(pid) or ""}


@cache
def versions() -> dict[str, str]:
    """What this process runs on, by name, as its installation says."""
    found = {"python": platform.python_version()}
    for name in ("celery", "taskplatform"):
        with suppress(PackageNotFoundError):  # run from its sources, without being installed
            found[name] = version(name)
    return found


def has_ended(who: Mapping[str, str]) -> bool:
    """Whether the process that gave this `identity` has ended for sure. False where this machine cannot tell."""
    place, born = who.get("machine"), who.get("born")
    if not place or not born or place != machine():
        return False
    pid = int(who["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        pass
    now = _born(pid)
    return now is not None and now != born


def die_with_parent(parent: int) -> None:
    """Be killed as soon as the process `parent` ends, however it does, or the thread of it that forked this one."""
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    if os.getppid() != parent:  # it ended before that was said
        os.kill(os.getpid(), signal.SIGKILL)


def fork_between_log_lines() -> None:
    """From now on, fork only while no thread is about to write a log line.

    A stream that was being written to stays locked in the child, for ever: logging makes new locks for its handlers there, and the stream
    behind a handler has one of its own.
    """
    held: list[logging.Handler] = []

    def before() -> None:
        for reference in list(logging._handlerList):  # type: ignore[attr-defined]
            handler = reference()
            if handler is not None and handler.lock is not None:
                handler.acquire()
                held.append(handler)

    def after_in_parent() -> None:
        while held:
            held.pop().release()

    os.register_at_fork(before=before, after_in_parent=after_in_parent, after_in_child=held.clear)


def _born(pid: int) -> str | None:
    """When the process started, in ticks since the boot (proc(5)). "ended" for one that only waits to be reaped, None if not known."""
    with suppress(OSError, ValueError, IndexError):
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        fields = stat[stat.rindex(b")") + 2 :].split()
        return "ended" if fields[0] in (b"Z", b"X") else fields[19].decode("ascii")
    return None
