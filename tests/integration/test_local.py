"""The supervisor, the embedded server and the guardian, on real processes."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import redis

from taskplatform import guardian, local
from taskplatform.local import PrefixedLog, ProcessSpec, StartError, Supervisor, embedded_server, find_port
from taskplatform.settings import load_settings
from tests.support import wait_until

ROOT = Path(__file__).resolve().parents[2]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


# --- the embedded server ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_the_server_goes_on_where_it_ended(tmp_path: Path, end: str) -> None:
    with embedded_server(tmp_path) as server, redis.Redis.from_url(server.url, decode_responses=True) as client:
        client.set("kept", "yes")
        before = (server.url, server.pid)
        getattr(server, end)()
        assert server.pid is None
        with pytest.raises(redis.ConnectionError):
            client.ping()
        server.start()
        assert client.get("kept") == "yes"
        assert server.url == before[0]
        assert server.pid != before[1]
    with embedded_server(tmp_path) as server, redis.Redis.from_url(server.url, decode_responses=True) as client:
        assert client.get("kept") == "yes"


def test_the_server_is_configured_to_lose_nothing(tmp_path: Path) -> None:
    with embedded_server(tmp_path) as server, redis.Redis.from_url(server.url, decode_responses=True) as client:
        chosen = {name: client.config_get(name)[name] for name in ("appendonly", "appendfsync", "maxmemory-policy", "save", "bind", "dir")}
    assert chosen == {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "save": "",
        "bind": "127.0.0.1",
        "dir": str(tmp_path / "valkey"),
    }


def test_a_data_directory_is_used_once(tmp_path: Path) -> None:
    with embedded_server(tmp_path) as server:
        with (
            pytest.raises(StartError, match=rf"{re.escape(str(tmp_path))} is in use by another run \(process {os.getpid()}\)"),
            embedded_server(tmp_path),
        ):
            pass
        with redis.Redis.from_url(server.url) as client:
            assert client.ping()
    with embedded_server(tmp_path):
        pass


def test_a_server_that_cannot_start_says_why(tmp_path: Path, taken_port: int) -> None:
    with (
        pytest.raises(StartError, match=r"valkey exited with code 1 before it was ready; its last lines:(.|\n)*Address already in use"),
        embedded_server(tmp_path, taken_port),
    ):
        pass


# --- start -----------------------------------------------------------------------------------------------------------


def test_a_start_waits_until_all_are_ready_in_the_order_of_needs(supervise: Supervise) -> None:
    probes = iter([False, False, True])
    first = spec("first", "print('almost'); time.sleep(0.3); print('now ready'); rest()", ready=re.compile("now ready"))
    second = spec("second", "rest()", needs=("first",), ready=lambda: next(probes))
    supervisor = supervise(first, second)
    assert supervisor.is_ready("first")
    assert supervisor.is_ready("second")
    assert next(probes, None) is None
    assert [line for line in supervise.lines if "ready" in line] == ["first: now ready", "up: first is ready", "up: second is ready"]


def test_a_process_that_is_not_ready_in_time_is_reported_with_its_last_lines(supervise: Supervise) -> None:
    other = spec("other", "rest()")

    def never() -> bool:
        wait_until(lambda: "slow: two" in supervise.lines)  # however late it comes to say so
        return False

    slow = spec("slow", "print('one'); print('two'); rest()", ready=never, ready_seconds=0.5)
    with pytest.raises(StartError, match=r"^slow was not ready after 0.5 s; its last lines:\n  one\n  two$"):
        supervise(other, slow)
    assert supervise.last.pid("other") is None
    assert supervise.last.pid("slow") is None


def test_a_process_that_dies_before_it_is_ready_is_reported_at_once(supervise: Supervise) -> None:
    began = time.monotonic()
    with pytest.raises(StartError, match=r"^dead exited with code 3 before it was ready; its last lines:\n  no such thing$"):
        supervise(spec("dead", "sys.exit(print('no such thing') or 3)", ready=lambda: False))
    assert time.monotonic() - began < 30, "it waited for what is ready after a minute"


def test_a_program_that_does_not_exist_is_reported(supervise: Supervise) -> None:
    with pytest.raises(StartError, match=r"^nothing cannot be started: .*No such file"):
        supervise(ProcessSpec(name="nothing", argv=["/does/not/exist"]))


def test_a_process_that_dies_ready_while_others_still_start_is_restarted(supervise: Supervise, tmp_path: Path) -> None:
    folder = str(tmp_path)
    brief = spec("brief", f"print('up'); once({folder!r}) or (Path({folder!r}, 'again').touch(), rest())", ready=re.compile("up"))
    # it is not ready before the other runs again
    waits = f"while not Path({folder!r}, 'again').exists(): time.sleep(0.02)\n"
    slow = spec("slow", waits + "print('up'); rest()", ready=re.compile("up"))
    supervisor = supervise(brief, slow)
    wait_until(lambda: supervisor.is_ready("brief"))
    assert "up: brief exited with code 0; starts again in 0.05 s" in supervise.lines


def test_needs_must_name_earlier_processes() -> None:
    with pytest.raises(ValueError, match="only processes named before can be needed"):
        Supervisor([spec("a", "", needs=("b",)), spec("b", "")])


# --- restart ---------------------------------------------------------------------------------------------------------


def test_what_dies_is_restarted_with_growing_delays(supervise: Supervise) -> None:
    supervise(spec("weak", "time.sleep(0.1); sys.exit(7)"))
    wait_until(lambda: len(deaths(supervise)) >= 4)
    assert deaths(supervise)[:4] == [f"up: weak exited with code 7; starts again in {delay} s" for delay in ("0.05", "0.1", "0.2", "0.2")]


def test_the_delay_is_short_again_after_a_quiet_time(supervise: Supervise, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Supervisor, "QUIET_SECONDS", 0.2)
    supervise(spec("weak", "time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)"))
    wait_until(lambda: len(deaths(supervise)) >= 3)
    assert set(deaths(supervise)) == {"up: weak was ended by SIGKILL; starts again in 0.05 s"}


def test_a_dead_process_takes_its_session_with_it(supervise: Supervise, tmp_path: Path) -> None:
    """Else a worker's pool would go on beside the pool of the worker's successor."""
    supervisor = supervise(family(tmp_path, "plain", "group"))
    old = pids(tmp_path)
    supervisor.send("family", signal.SIGKILL)
    wait_until(lambda: len(pids(tmp_path)) == 2 * len(old))
    assert [pid for pid in old if alive(pid)] == []


# --- stop ------------------------------------------------------------------------------------------------------------

NOTE_STOP = """
together = ""
def note(number, frame):
    print("told")
    if together:
        Path(together, str(os.getpid())).touch()
        while len(list(Path(together).iterdir())) < 2: time.sleep(0.02)
    print("bye")
    sys.exit(0)
signal.signal(signal.SIGTERM, note)
print("up")
rest()
"""


def test_stop_goes_down_the_stages(supervise: Supervise, tmp_path: Path) -> None:
    """Those of one stage are told together: here neither ends before both are."""
    names = {"server": 0, "worker1": 1, "worker2": 1, "beat": 2}
    of_two = NOTE_STOP.replace('together = ""', f"together = {str(tmp_path)!r}")
    supervisor = supervise(
        *(spec(name, of_two if stage == 1 else NOTE_STOP, stage=stage, ready=re.compile("up")) for name, stage in names.items())
    )
    supervisor.stop()
    told = [line for line in supervise.lines if line.endswith(("told", "bye"))]
    assert told[:2] == ["beat: told", "beat: bye"]
    # each one's lines come by a thread of its own
    assert sorted(told[2:6]) == ["worker1: bye", "worker1: told", "worker2: bye", "worker2: told"]
    assert told[6:] == ["server: told", "server: bye"]


def test_a_process_that_does_not_stop_gets_the_next_signal_and_is_killed_at_last(supervise: Supervise) -> None:
    deaf = """
def note(number, frame):
    print("got", signal.Signals(number).name)
signal.signal(signal.SIGTERM, note)
signal.signal(signal.SIGQUIT, note)
print("up")
rest()
"""
    stop = ((signal.SIGTERM, 2.0), (signal.SIGQUIT, 2.5))  # time to say what it got
    supervisor = supervise(spec("deaf", deaf, ready=re.compile("up"), stop=stop))
    supervisor.stop()
    # what it says and what is said of it come by threads of their own
    assert [line for line in supervise.lines if line.startswith("deaf: got")] == ["deaf: got SIGTERM", "deaf: got SIGQUIT"]
    assert [line for line in supervise.lines if "deaf" in line and line.startswith("up")][1:] == [
        "up: deaf has not ended; SIGQUIT",
        "up: deaf has not ended; SIGKILL",
        "up: deaf stopped (was ended by SIGKILL)",
    ]


def test_a_stopped_process_can_be_ended(supervise: Supervise) -> None:
    supervisor = supervise(spec("frozen", NOTE_STOP, ready=re.compile("up")))
    supervisor.send("frozen", signal.SIGSTOP)
    supervisor.stop()
    assert "frozen: bye" in supervise.lines


# --- signals and death of a real supervisor --------------------------------------------------------------------------

DRIVER = """
import re, signal, sys
from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.path.insert(0, {root!r})
from taskplatform import local
directory = Path({directory!r})
lock = local.DirectoryLock(directory, say=print)
lock.acquire()
port = local.find_port()
up = re.compile("up")
specs = [
    local._valkey_spec(directory / "valkey", port),
    local.ProcessSpec(name="family", argv={family!r}, ready=up, stage=1, stop=((signal.SIGTERM, 0.2),)),
    local.ProcessSpec(name="deaf", argv={deaf!r}, ready=up, stage=2, stop=((signal.SIGTERM, {grace}),)),
]
with local.Supervisor(specs, signals=True, lock=lock) as supervisor:
    for name in ("valkey", "family", "deaf"):
        (directory / f"pid-{{supervisor.pid(name)}}").touch()
    (directory / f"pid-{{supervisor._guard._popen.pid}}").write_text("guardian")
    supervisor.say(f"redis://127.0.0.1:{{port}}/0")
    supervisor.wait()
lock.release()
"""
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); rest()"


def driver_program(
    directory: Path, *, grace: float = 0.2, members: tuple[str, ...] = ("plain", "group", "session"), deaf: Sequence[str] = ()
) -> str:
    return DRIVER.format(
        root=str(ROOT), directory=str(directory), family=family(directory, *members).argv, deaf=[*deaf, *python(DEAF)], grace=grace
    )


@pytest.mark.parametrize(
    ("number", "members"),
    [
        (signal.SIGINT, ("plain",)),
        (signal.SIGHUP, ("plain",)),
        pytest.param(signal.SIGTERM, ("plain", "group", "session"), marks=linux_only),
    ],
)
def test_a_signal_ends_the_supervisor_and_leaves_nothing(
    tmp_path: Path, drive: Drive, number: signal.Signals, members: tuple[str, ...]
) -> None:
    driver = drive(driver_program(tmp_path, members=members))
    driver.wait_for("redis://")
    processes = pids(tmp_path)
    assert len(processes) == 4 + len(members)
    # a terminal's Ctrl-C must reach the supervisor alone
    assert os.getsid(driver.popen.pid) not in {os.getsid(pid) for pid in processes}
    driver.popen.send_signal(number)
    assert driver.popen.wait(60) == 0
    driver.read_all()
    assert [pid for pid in processes if alive(pid)] == []
    stopping = driver.lines[driver.lines.index(f"up       │ stopping ({number.name}); once more hurries") :]
    assert [line for line in stopping if "stopped" in line] == [
        "up       │ deaf stopped (was ended by SIGKILL)",
        "up       │ family stopped (was ended by SIGKILL)",
        "up       │ valkey stopped (exited with code 0)",
    ]


def test_a_second_signal_hurries(tmp_path: Path, drive: Drive) -> None:
    driver = drive(driver_program(tmp_path, grace=300, members=()))
    driver.wait_for("redis://")
    processes = pids(tmp_path)
    driver.popen.send_signal(signal.SIGINT)
    driver.wait_for("stopping")
    time.sleep(0.3)  # it must not end by itself
    assert driver.popen.poll() is None
    driver.popen.send_signal(signal.SIGINT)
    assert driver.popen.wait(60) == 0
    assert [pid for pid in processes if alive(pid)] == []


def test_a_signal_during_the_start_ends_it(tmp_path: Path, drive: Drive) -> None:
    program = driver_program(tmp_path, members=("plain",))
    driver = drive(program.replace("ready=up, stage=2", "ready=lambda: False"))
    driver.wait_for("family is ready")
    processes = pids(tmp_path)
    driver.popen.send_signal(signal.SIGTERM)
    assert driver.popen.wait(60) != 0
    driver.read_all()
    assert "KeyboardInterrupt" in driver.lines
    assert not [line for line in driver.lines if "redis://" in line]
    assert [pid for pid in processes if alive(pid)] == []


@linux_only
def test_sigkill_of_the_supervisor_leaves_nothing_and_loses_nothing(tmp_path: Path, drive: Drive) -> None:
    # a cleared environment has no token, a session of one's own is not one that the guardian was told of
    driver = drive(driver_program(tmp_path, members=("plain", "group", "session"), deaf=["env", "-i"]))
    url = driver.wait_for("redis://").split()[-1]
    with redis.Redis.from_url(url) as client:
        client.set("kept", "yes")
    processes = pids(tmp_path)
    assert len(processes) == 7
    driver.popen.kill()
    wait_until(lambda: not [pid for pid in processes if alive(pid)], message="processes are left")
    with embedded_server(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        assert client.get("kept") == b"yes"


def test_the_next_run_waits_until_a_killed_one_is_cleaned_up(tmp_path: Path, drive: Drive) -> None:
    driver = drive(driver_program(tmp_path))
    driver.wait_for("redis://")
    processes = pids(tmp_path)
    driver.popen.kill()
    driver.popen.wait()
    said: list[str] = []
    lock = local.DirectoryLock(tmp_path, say=said.append)
    lock.acquire()
    try:
        assert said == ["the last run ended abnormally; waiting until its processes are gone"]
        assert [pid for pid in processes if alive(pid) and not is_guardian(tmp_path, pid)] == []
    finally:
        lock.release()


@linux_only
def test_the_next_run_ends_what_is_left_when_even_the_guardian_was_killed(tmp_path: Path, drive: Drive) -> None:
    driver = drive(driver_program(tmp_path))
    driver.wait_for("redis://")
    processes = pids(tmp_path)
    driver.popen.send_signal(signal.SIGSTOP)  # it would start another guardian
    watcher = next(pid for pid in processes if is_guardian(tmp_path, pid))
    os.kill(watcher, signal.SIGKILL)
    wait_until(lambda: not alive(watcher))
    driver.popen.kill()
    driver.popen.wait()
    said: list[str] = []
    lock = local.DirectoryLock(tmp_path, say=said.append)
    lock.acquire()
    lock.release()
    assert said == ["ended 6 processes that an earlier run had left"]
    assert [pid for pid in processes if alive(pid)] == []


@linux_only
def test_a_killed_guardian_is_replaced(tmp_path: Path, drive: Drive) -> None:
    driver = drive(driver_program(tmp_path))
    driver.wait_for("redis://")
    processes = pids(tmp_path)
    os.kill(next(pid for pid in processes if is_guardian(tmp_path, pid)), signal.SIGKILL)
    driver.wait_for("a new one watches")
    driver.popen.kill()
    wait_until(lambda: not [pid for pid in processes if alive(pid)], message="processes are left")


@linux_only
def test_the_guardian_cannot_be_ended_by_a_signal_that_ends_its_supervisor(supervise: Supervise) -> None:
    supervisor = supervise(spec("a", "rest()"))
    popen = supervisor._guard._popen
    assert popen is not None
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    wait_until(lambda: all(ignores(popen.pid, number) for number in numbers))
    for number in numbers:
        popen.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        popen.wait(0.5)


@linux_only
def test_nothing_is_inherited_that_would_outlive_the_supervisor(tmp_path: Path) -> None:
    """A child with the guardian's pipe would hide the supervisor's death; one with the lock would keep the next run out."""
    with embedded_server(tmp_path) as server:
        assert server.pid is not None
        opened = {str(entry.readlink()) for entry in Path(f"/proc/{server.pid}/fd").iterdir()}
        assert not any(name.endswith("lock") for name in opened)
        supervisor = server._supervisor
        assert supervisor is not None
        popen = supervisor._guard._popen
        assert popen is not None
        assert popen.stdin is not None
        pipe = str(Path(f"/proc/self/fd/{popen.stdin.fileno()}").readlink())
        assert pipe not in opened
        watched = {entry.name: str(entry.readlink()) for entry in Path(f"/proc/{popen.pid}/fd").iterdir()}
        lock = [number for number, name in watched.items() if name == str(tmp_path / "lock")]
        assert len(lock) == 1
        assert {number: name for number, name in watched.items() if number not in lock} == {"0": pipe, "1": "/dev/null", "2": "/dev/null"}


def test_the_guardian_ends_what_it_was_told_of_in_order(tmp_path: Path) -> None:
    """Workers before their server, each with the time to end well; what it was told to be gone is not its business."""
    log = tmp_path / "log"
    children = {name: subprocess.Popen(python(NOTE_END.format(log=str(log), name=name)), start_new_session=True) for name in "abcd"}
    try:
        wait_until(lambda: log.exists() and len(log.read_text().split()) == 4)
        log.unlink()
        starts = {name: found.start for name, child in children.items() if (found := guardian.find(child.pid))}
        told = [f"add {children[name].pid} {stage} 5.0 {starts[name]}" for name, stage in (("a", 0), ("b", 2), ("c", 1), ("d", 3))]
        told += [f"gone {children['d'].pid}"]
        program = [sys.executable, "-I", "-S", guardian.__file__, "no-such-token"]
        subprocess.run(program, input="\n".join([*told, ""]), text=True, check=True, timeout=120)
        assert log.read_text().split() == ["b", "c", "a"]
        assert children["d"].poll() is None
    finally:
        for child in children.values():
            child.kill()
            child.wait()


@linux_only
def test_a_pid_that_was_given_to_a_stranger_is_left_alone() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True) as stranger:
        try:
            found = guardian.find(stranger.pid)
            assert found is not None
            guardian.end([guardian.Child(stranger.pid, "12345")], token="")
            guardian.send(found._replace(start="12345"), signal.SIGKILL)
            time.sleep(0.1)  # nothing must come
            assert stranger.poll() is None
            guardian.end([guardian.Child(stranger.pid, found.start)], token="")
            assert stranger.wait(60) == -signal.SIGTERM or stranger.returncode == -signal.SIGKILL
        finally:
            stranger.kill()


NOTE_END = """
def note(*_):
    time.sleep(0.1)
    with open({log!r}, "a") as log: log.write("{name} ")
    if _: sys.exit(0)
signal.signal(signal.SIGTERM, note)
note()
rest()
"""


# --- the log ---------------------------------------------------------------------------------------------------------


def test_lines_come_whole_prefixed_and_clean_whatever_is_written() -> None:
    program = r"""
out = sys.stdout.buffer
out.write("grüße ✓\n".encode())
out.write(b"bad \xff\xfe bytes\r\n")
out.write(b"\x1b[31mred\x1b[0m and a \x00\n")
out.write(b"\n")
out.write(b"x" * 10000 + b"\n")
out.flush()
print("from stderr", file=sys.stderr)
out.write("ü".encode()[:1]); out.flush(); time.sleep(0.1); out.write("ü".encode()[1:] + b"\n")
out.write(b"no line end")
out.flush()
sys.exit(0)
"""
    stream = io.StringIO()
    supervisor = Supervisor([ProcessSpec(name="a-very-long-name", argv=python(program), restart=False)], sink=PrefixedLog(stream))
    with supervisor:
        wait_until(lambda: "exited with code 0" in stream.getvalue())
    lines = [line for line in stream.getvalue().split("\n") if line.startswith("a-very-l │ ")]
    texts = [line.removeprefix("a-very-l │ ") for line in lines]
    assert texts == [
        "grüße ✓",
        "bad \ufffd\ufffd bytes",
        "\ufffd[31mred\ufffd[0m and a \ufffd",
        "",
        "x" * 4096,
        "x" * 4096,
        "x" * 1808,
        "from stderr",
        "ü",
        "no line end",
    ]
    assert "up       │ a-very-long-name exited with code 0" in stream.getvalue()


def test_output_without_line_ends_does_not_pile_up(supervise: Supervise) -> None:
    supervisor = supervise(spec("endless", "sys.stdout.write('x' * 1_000_000); sys.stdout.flush(); rest()"))
    wait_until(lambda: sum(len(line) for line in supervise.lines) >= 996_000)
    assert max(len(line) for line in supervise.lines) <= len("endless: ") + 4096
    assert supervisor.pid("endless") is not None


@pytest.mark.parametrize(
    ("terminal", "variables", "coloured"),
    [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False)],
)
def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch, terminal: bool, variables: dict[str, str], coloured: bool) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    log = PrefixedLog(stream)
    log("beat", "one")
    log("worker1", "two")
    log("beat", "three")
    plain = "beat     │ one\nworker1  │ two\nbeat     │ three\n"
    assert re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()) == plain
    codes = re.findall(r"\x1b\[([1-9][0-9]*)m", stream.getvalue())
    assert (len(codes) == 3 and codes[0] == codes[2] != codes[1]) if coloured else stream.getvalue() == plain


def test_a_log_that_nobody_reads_stops_nobody(tmp_path: Path) -> None:
    reading = threading.Event()
    lines: list[str] = []

    def sink(name: str, line: str) -> None:
        reading.wait()
        lines.append(f"{name}: {line}")

    program = f"print('\\n'.join(['x' * 100] * 200_000)); Path({str(tmp_path)!r}, 'written').touch(); rest()"
    with Supervisor([spec("chatty", program)], sink=sink):
        try:
            wait_until((tmp_path / "written").exists, message="the process is blocked by its log")
        finally:
            reading.set()
        wait_until(
            lambda: [line for line in lines if re.fullmatch(r"up: 1\d{5} lines were dropped here, because the log was not read", line)]
        )


def test_a_healthy_log_loses_no_line(supervise: Supervise) -> None:
    supervise(spec("chatty", "print('\\n'.join(map(str, range(100_000)))); rest()"))
    wait_until(lambda: "chatty: 99999" in supervise.lines)
    assert [line for line in supervise.lines if line.startswith("chatty")] == [f"chatty: {number}" for number in range(100_000)]


def test_a_log_whose_reader_is_gone_ends_the_wait() -> None:
    def sink(name: str, line: str) -> None:
        raise BrokenPipeError(f"{name} {line}")

    with Supervisor([spec("chatty", "print('hello'); rest()")], sink=sink) as supervisor:
        supervisor.wait()
        assert isinstance(supervisor.log_fault, BrokenPipeError)


# --- ports and the stack ---------------------------------------------------------------------------------------------


def test_a_taken_port_is_replaced(taken_port: int) -> None:
    port = find_port(taken_port)
    assert port != taken_port
    with socket.create_server(("127.0.0.1", port)):
        assert find_port(port) != port
    assert find_port(port) == port
    assert find_port(port, avoid={port}) != port


def test_stacks_that_start_at_the_same_time_choose_different_ports(tmp_path: Path) -> None:
    """Each finds the port free, because neither listens yet."""
    port, said = find_port(), []
    first, second, third = (
        local.Stack(load_settings(), sink=lambda _, line: said.append(line), data_dir=tmp_path / name)
        for name in ("first", "second", "third")
    )
    assert first._port("API", port) == port
    other = second._port("API", port)
    assert other != port
    assert said == [f"port {port} is taken; API uses {other}"]
    first.stop()
    assert third._port("API", port) == port
    for stack in (second, third):
        stack.stop()


def test_a_server_on_all_addresses_takes_the_port() -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = listener.getsockname()[1]
        assert find_port(port) != port


def test_a_redis_that_is_set_must_be_reachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    url = f"redis://:secret@127.0.0.1:{find_port()}/0"
    stack = local.Stack(load_settings(redis_url=url), sink=local.silent, data_dir=tmp_path)
    assert not stack.embedded
    with pytest.raises(StartError, match=r"which cannot be reached: .*refused") as caught:
        stack.start()
    assert "secret" not in str(caught.value)


def test_the_children_read_the_settings_that_the_stack_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("API_BASE_URL", raising=False)
    monkeypatch.setenv("API_TOKEN", "given")
    limit = {"rate": "10/s", "burst": 15}
    given = load_settings(
        namespace="other",
        heartbeat_interval="1500ms",
        rate_limit=limit,
        host_limits={"localhost:8000": {"rate": "5/s", "concurrency": 2}, "api.example.com": {"concurrency": 1}},
        fairness=True,
        queue_buffer=0.5,
        tasks_dir="elsewhere",
        worker_slots=7,
        http_allow=["*.internal", "[fd00::/8]:443"],
    )
    stack = local.Stack(given, slots=2, sink=local.silent, data_dir=tmp_path / "data")
    stack.redis_url, stack.mock_url, stack.verify_target = "redis://127.0.0.1:1/0", "http://127.0.0.1:2", "http://127.0.0.1:3"
    stack.api_url, stack.flower_url = "https://localhost:4", "http://127.0.0.1:5"
    variables = stack._environment()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    allowed = "*.internal,[fd00::/8]:443,127.0.0.1:2,127.0.0.1:3"  # the mock API too, and where `verify` counts calls
    changed = {"redis_url": stack.redis_url, "data_dir": tmp_path / "data", "worker_slots": 2, "http_allow": allowed}
    changed |= {"dashboard_url": "https://localhost:4/ui", "flower_url": "http://127.0.0.1:5"}  # each links to the other
    changed |= {"verify_target": stack.verify_target, "log_format": "console"}  # `up` writes for people
    assert load_settings().model_dump() == given.model_dump() | changed
    assert (variables["API_BASE_URL"], variables["API_TOKEN"]) == ("http://127.0.0.1:2/anything", "given")


def test_a_stack_is_for_the_project_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StartError, match=r"has no celeryconfig\.py"):
        local.Stack(load_settings(), sink=local.silent, data_dir=tmp_path).start()


def test_up_runs_the_whole_platform(tmp_path: Path, drive: Drive, taken_port: int) -> None:
    driver = drive(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from taskplatform import local\n"
        "from taskplatform.settings import load_settings\n"
        f"local.VALKEY_PORT = {taken_port}\n"
        f"local.MOCK_PORT, local.FLOWER_PORT = {find_port()}, {find_port()}\n"
        f"sys.exit(local.up(load_settings(), workers=1, slots=1, data_dir=Path({str(tmp_path)!r})))\n"
    )
    driver.wait_for("all is ready", seconds=120)
    assert any(re.search(rf"│ port {taken_port} is taken; Valkey uses \d+$", line) for line in driver.lines)
    for what in (
        "Redis     redis://127.0.0.1:",
        "Mock API  http://127.0.0.1:",
        "Dashboard https://localhost:",
        "Flower    http://127.0.0.1:",
        "Commands  export TASKPLATFORM_REDIS_URL=redis://127.0.0.1:",
    ):
        assert any(f"up       │ {what}" in line for line in driver.lines)
    driver.popen.terminate()
    assert driver.popen.wait(120) == 0
    driver.read_all()
    stopped = [line.split()[2] for line in driver.lines if re.search(r"│ \w+ stopped \(", line)]
    assert sorted(stopped[:2]) == ["api", "flower"]
    assert stopped[2:] == ["beat", "worker1", "mock", "valkey"]


# --- helpers ---------------------------------------------------------------------------------------------------------

PRELUDE = """
import os, signal, sys, time
from pathlib import Path
def rest():
    while True: time.sleep(60)
def once(directory):
    try: Path(directory, "once").touch(exist_ok=False)
    except FileExistsError: return False
    return True
"""

FAMILY = """
def member(change):
    if os.fork() == 0:
        change()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path({directory!r}, f"pid-{{os.getpid()}}").touch()
        os.write(write, b"x")
        rest()
changes = {{"plain": lambda: None, "group": os.setpgrp, "session": os.setsid}}
read, write = os.pipe()
for name in {names!r}:
    member(changes[name])
for name in {names!r}:
    os.read(read, 1)
print("all up")
rest()
"""


class Supervise:
    """Starts supervisors whose lines it collects, and which end with the test."""

    def __init__(self) -> None:
        self.raw: list[str] = []
        self._supervisors: list[Supervisor] = []

    def __call__(self, *specs: ProcessSpec) -> Supervisor:
        supervisor = Supervisor(specs, sink=lambda name, line: self.raw.append(f"{name}: {line}"))
        self._supervisors.append(supervisor)
        supervisor.start()
        return supervisor

    @property
    def last(self) -> Supervisor:
        return self._supervisors[-1]

    @property
    def lines(self) -> list[str]:
        """Without what differs from run to run."""
        return [re.sub(r" \([0-9.]+ s\)$| after [0-9.]+ s(?=;)", "", line) for line in list(self.raw)]

    def close(self) -> None:
        for supervisor in self._supervisors:
            supervisor.stop()


@pytest.fixture
def supervise(monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervise]:
    monkeypatch.setattr(Supervisor, "RESTART_SECONDS", (0.05, 0.2))
    supervisors = Supervise()
    yield supervisors
    supervisors.close()


class Driver:
    """A Python process that runs a supervisor, and the lines that it has written."""

    def __init__(self, program: str) -> None:
        self.lines: list[str] = []
        self.popen = subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, text=True
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """The first line with `text`."""

        def found() -> list[str]:
            lines = [line for line in list(self.lines) if text in line]
            assert lines or self.popen.poll() is None, f"ended without {text!r}: {self.lines}"
            return lines

        return wait_until(found, seconds=seconds, message=f"no {text!r} in {self.lines}")[0]

    def read_all(self) -> None:
        """After its end."""
        self._reader.join(60)

    def close(self) -> None:
        """By SIGTERM, so that it cleans up; its guardian does if it cannot."""
        self.popen.terminate()
        self.popen.send_signal(signal.SIGCONT)
        try:
            self.popen.wait(60)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        with self.popen.stdout as stream:
            self.lines.extend(line.rstrip("\n") for line in stream)


Drive = Callable[[str], Driver]


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Drive]:
    drivers: list[Driver] = []

    def start(program: str) -> Driver:
        drivers.append(Driver(program))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.close()
    for pid in pids(tmp_path):
        with suppress(ProcessLookupError):
            if alive(pid) and not is_guardian(tmp_path, pid):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def python(program: str) -> list[str]:
    return [sys.executable, "-u", "-c", PRELUDE + program]


def spec(
    name: str,
    program: str,
    *,
    ready: Callable[[], bool] | re.Pattern[str] | None = None,
    ready_seconds: float = 60,
    needs: tuple[str, ...] = (),
    stage: int = 0,
    stop: tuple[tuple[signal.Signals, float], ...] = ((signal.SIGTERM, 20.0),),
) -> ProcessSpec:
    return ProcessSpec(name=name, argv=python(program), ready=ready, ready_seconds=ready_seconds, needs=needs, stage=stage, stop=stop)


def family(directory: Path, *names: str) -> ProcessSpec:
    """A process with children that do not heed SIGTERM: `plain`, in a process `group` or in a `session` of its own."""
    program = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FAMILY.format(directory=str(directory), names=names)
    return spec("family", program, ready=re.compile("all up"), stage=1, stop=((signal.SIGTERM, 0.2),))


def pids(directory: Path) -> list[int]:
    return [int(path.name.removeprefix("pid-")) for path in directory.glob("pid-*")]


def is_guardian(directory: Path, pid: int) -> bool:
    return (directory / f"pid-{pid}").read_text() == "guardian"


def alive(pid: int) -> bool:
    """Whether it runs; a dead one whose parent has not asked for it does not."""
    state = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout.strip()
    return state != "" and not state.startswith("Z")


def ignores(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = re.search(r"^SigIgn:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return ignored is not None and bool(int(ignored[1], 16) & (1 << (number - 1)))


def deaths(supervise: Supervise) -> list[str]:
    return [line for line in supervise.lines if "starts again" in line]
