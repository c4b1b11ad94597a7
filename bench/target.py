"""A target for the benchmarks' HTTP calls, a process of its own: `python -m bench.target` prints its port and serves until its input ends.

It answers everything with 200 and notes when each request arrived, by the monotonic clock, as soon as its headers are read. GET /arrivals
gives these instants by path, in seconds, in the order of arrival.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections import defaultdict

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)

_arrivals: defaultdict[str, list[float]] = defaultdict(list)


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            at = time.monotonic()
            path = head.split(b" ", 2)[1].decode()
            if length := _LENGTH.search(head):
                await reader.readexactly(int(length[1]))
            if path == "/arrivals":
                body = json.dumps(_arrivals).encode()
            else:
                _arrivals[path].append(at)
                body = b"{}"
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # the client has gone
    finally:
        writer.close()


async def _main() -> None:
    server = await asyncio.start_server(_serve, "127.0.0.1", 0, backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main())
