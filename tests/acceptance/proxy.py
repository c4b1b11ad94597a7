"""A network that tests can cut, freeze and slow down: a TCP proxy on the loopback interface, before a server."""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import suppress


class Proxy:
    """Between its `port` and the server at `upstream`, for `with`."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._flows = threading.Event()
        self._flows.set()
        self._stranded: set[socket.socket] = set()
        self._refuses = False
        self._delay_seconds = 0.0
        self._closed = False
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]

    @property
    def url(self) -> str:
        """For Redis."""
        return f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it and all connections."""
        self._closed = True
        self._flows.set()
        self._listener.close()
        self._reset_all()

    def cut(self) -> None:
        """Every connection is reset, and new ones are, until `heal`."""
        self._refuses = True
        self._reset_all()

    def reset(self) -> None:
        """Every connection is reset; new ones are let through."""
        self._reset_all()

    def freeze(self) -> None:
        """Nothing comes through any more, and nobody is told: half-open connections, until `heal`."""
        self._flows.clear()

    def strand(self) -> None:
        """Nothing comes through the present connections any more, and nobody is told, not even after `heal`; new ones are let through."""
        with self._lock:
            self._stranded |= self._sockets

    def slow(self, seconds: float) -> None:
        """All that the server sends arrives so much later."""
        self._delay_seconds = seconds

    def heal(self) -> None:
        """As if nothing had been. What was held back arrives."""
        self._refuses = False
        self._delay_seconds = 0.0
        self._flows.set()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._sockets) // 2

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refuses:
                _reset(client)
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._upstream), timeout=30)
            except OSError:
                _reset(client)
                continue
            server.settimeout(None)
            with self._lock:
                self._sockets |= {client, server}
            for source, sink, delayed in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pump, args=(source, sink, delayed), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, delayed: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if delayed and self._delay_seconds:
                    time.sleep(self._delay_seconds)
                self._flows.wait()
                if source not in self._stranded:
                    sink.sendall(data)
        # an end is not seen either while nothing comes through
        self._flows.wait()
        if source in self._stranded and not self._closed:
            return
        with self._lock:
            self._sockets -= {source, sink}
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _reset_all(self) -> None:
        with self._lock:
            doomed = list(self._sockets)
            self._sockets.clear()
        for one in doomed:
            _reset(one)


def _reset(one: socket.socket) -> None:
    """Close with RST, as a machine that has gone answers."""
    with suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.shutdown(socket.SHUT_RDWR)
    one.close()
