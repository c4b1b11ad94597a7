"""What the connection makes of a server that is there and not ready."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

import pytest

from taskplatform.errors import Outage, StoreUnavailable
from taskplatform.store import Store


def test_a_server_that_loads_its_data_is_unavailable() -> None:
    """It accepts connections and refuses every command. A health check that fails inside of a new connection must not nest."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        accepted = []

        def refuse(client: socket.socket) -> None:
            with client, suppress(OSError):
                while client.recv(65536):
                    client.sendall(b"-LOADING Redis is loading the dataset in memory\r\n")

        def accept() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    accepted.append(client)
                    threading.Thread(target=refuse, args=(client,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        store = Store.connect(f"redis://127.0.0.1:{listener.getsockname()[1]}/0")
        with pytest.raises(StoreUnavailable, match="reads its data") as error:
            store.ping()
        assert error.value.outage is Outage.LOADING
        assert 1 <= len(accepted) <= 20
        store.close()
        listener.shutdown(socket.SHUT_RDWR)
