"""What the HTTP jobs call: a server in its own process that answers each GET with a small JSON body after 50 ms, and keeps the time.

While it holds, requests wait unanswered. So a round can begin with every slot of a worker busy and every job submitted, and the time that
it takes is that of the jobs alone: from the moment that the server goes on until it has sent the last answer, whatever the worker's own
books say. `python -m bench.http_target` is the server: it prints its port, obeys the lines `hold`, `held` and `go COUNT` on its standard
input, and ends with that.
"""

from __future__ import annotations

import asyncio
import json
import selectors
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from select import select
from typing import IO, Any, cast

from bench.processes import ROOT

LATENCY_SECONDS = 0.05
_BODY = b'{"ok": true}'
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)


class Target:
    """The running server, as a benchmark sees it."""

    def __init__(self, requests: IO[bytes], answers: IO[bytes]) -> None:
        self._requests = requests
        self._answers = answers
        self._seconds: float | None = None
        self.url = f"http://127.0.0.1:{self._answer()}/job"

    def hold(self) -> None:
        """Leave requests unanswered from now on, and count anew."""
        self._ask("hold")
        self._seconds = None

    def held(self) -> int:
        """How many requests wait."""
        return int(self._ask("held"))

    def go(self, count: int) -> None:
        """Answer what waits, and what comes, 50 ms later."""
        self._tell(f"go {count}")

    @property
    def seconds(self) -> float | None:
        """How long it took from `go` until the last of the answers was sent; None before that."""
        if self._seconds is None and select([self._answers], [], [], 0)[0]:
            self._seconds = float(self._answer())
        return self._seconds

    def _ask(self, line: str) -> Any:
        self._tell(line)
        return self._answer()

    def _tell(self, line: str) -> None:
        self._requests.write(f"{line}\n".encode())

    def _answer(self) -> Any:
        return json.loads(self._answers.readline())


@contextmanager
def running() -> Iterator[Target]:
    """A server of its own, on a free port."""
    argv = [sys.executable, "-m", "bench.http_target"]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Target(process.stdin, process.stdout)
        finally:
            process.stdin.close()
            process.wait(10)


class _Server:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: list[asyncio.Transport] = []
        self._holds = False
        self._began = 0.0
        self._left = 0

    def asked(self, connection: asyncio.Transport) -> None:
        if self._holds:
            self._waiting.append(connection)
        else:
            self._loop.call_later(LATENCY_SECONDS, self._reply, connection)

    def obey(self, line: str) -> None:
        command, _, count = line.partition(" ")
        if command == "hold":
            self._holds = True
            _say(0)
        elif command == "held":
            _say(len(self._waiting))
        elif command == "go":
            self._holds, self._began, self._left = False, self._loop.time(), int(count)
            waiting, self._waiting = self._waiting, []
            for connection in waiting:
                self.asked(connection)

    def _reply(self, connection: asyncio.Transport) -> None:
        connection.write(_ANSWER)
        self._left -= 1
        if self._left == 0:
            _say(self._loop.time() - self._began)


class _Connection(asyncio.Protocol):
    """Reads requests without a body, which is what a GET is."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        *heads, self._received = (self._received + data).split(b"\r\n\r\n")
        for _ in heads:
            self._server.asked(self._transport)


def _say(value: float) -> None:
    print(json.dumps(value), flush=True)


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = _Server(loop)
    listener = await loop.create_server(lambda: _Connection(server), "127.0.0.1", 0, backlog=256)
    _say(listener.sockets[0].getsockname()[1])
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        server.obey(line.decode().strip())
    listener.close()


def main() -> None:
    """Serve until the end of the standard input."""
    # epoll waits for whole milliseconds, always up: that would be 1 % of an answer's time
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(_serve())


if __name__ == "__main__":
    main()
