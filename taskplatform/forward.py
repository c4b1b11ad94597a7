"""Fixed ports in front of the replicas of a service.

A port that an engine publishes belongs to one container, and one of a range to whichever replica comes first. So in docker compose this
stands in front of the workers: `python -m taskplatform.forward 8092=worker-1:8090 8094=worker-2:8090` takes connections on ports 8092
and 8094, and each goes to its own worker. The name is looked up anew for each connection, because a container that is made anew has
another address. A connection to a replica that is not there is closed. It ends on SIGTERM.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial

_CONNECT_SECONDS = 3.0
#: Answers of /health, /ready and /metrics are short, and their server closes a connection after 10 s.
_LONGEST_SECONDS = 30.0
_PIECE = 65_536


def parse(words: Sequence[str]) -> dict[int, tuple[str, int]]:
    """Which port goes where, from words such as `8092=worker-1:8090`. Raises ValueError for another word, or a port twice."""
    found: dict[int, tuple[str, int]] = {}
    for word in words:
        listen, _, target = word.partition("=")
        host, _, port = target.rpartition(":")
        if not (host and all(one.isascii() and one.isdigit() and 0 < int(one) < 65_536 for one in (listen, port))):
            raise ValueError(f"{word!r}: PORT=HOST:PORT is expected, such as 8092=worker-1:8090")
        if int(listen) in found:
            raise ValueError(f"{word!r}: port {listen} is given twice")
        found[int(listen)] = host, int(port)
    return found


async def forward(targets: dict[int, tuple[str, int]], *, host: str = "0.0.0.0") -> None:
    """Forward until SIGTERM or SIGINT. Raises OSError where a port is taken."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with AsyncExitStack() as servers:
        for port, target in targets.items():
            await servers.enter_async_context(await asyncio.start_server(partial(_serve, target), host, port))
            print(f"port {port} leads to {target[0]}:{target[1]}", flush=True)
        await stopped.wait()


async def _serve(target: tuple[str, int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, TimeoutError):
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                there_reader, there_writer = await asyncio.open_connection(*target)
        except (OSError, TimeoutError):
            writer.close()
            return
        try:
            async with asyncio.timeout(_LONGEST_SECONDS), asyncio.TaskGroup() as both:
                both.create_task(_copy(reader, there_writer))
                both.create_task(_copy(there_reader, writer))
        finally:
            there_writer.close()
            writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while piece := await reader.read(_PIECE):
            writer.write(piece)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


def main() -> int:
    """The command. Returns the exit code."""
    try:
        targets = parse(sys.argv[1:])
        if not targets:
            raise ValueError("PORT=HOST:PORT is expected, once or more")
        asyncio.run(forward(targets))
    except (OSError, ValueError) as fault:
        print(f"taskplatform.forward: {fault}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
