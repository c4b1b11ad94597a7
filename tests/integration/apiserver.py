"""The control API as it is served: over TLS, in a thread of the test's process."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme
import uvicorn

from taskplatform.api.server import listen, make_server, tls_context, url_of
from taskplatform.catalogue import load
from taskplatform.platform import Platform
from taskplatform.settings import Settings, load_settings, settings
from taskplatform.store import Store
from tests.support import wait_until

KEY = "test-key-" + "0123456789abcdef" * 2
TASKS = """
tasks:
  - id: report
    name: Report
    interval: {type: daily, timezone: Europe/Berlin, at_time: {hour: 7, minute: 0}}
    priority: high
    config:
      endpoint: "https://someone:planted-password@api.example/{{user}}?token=planted-token"
      headers: {Authorization: "Bearer planted-header"}
      body: {secret: planted-body}
    params: {format: planted-param}
  - {id: sync, name: Sync, cron: "5 * * * *", config: {endpoint: "https://api.example/sync/{{params.source}}"}, params: {source: crm}}
  - {id: needy, name: Needs a parameter, interval: {type: daily}, config: {endpoint: "https://api.example/{{params.what}}"}}
  - {id: clean, name: Clean up, interval: {type: weekly}, priority: low, call: "tasks.inputs:anything"}
"""


class Api:
    """A client of a running API, with a key."""

    def __init__(self, url: str, platform: Platform, ca: Path, server: uvicorn.Server) -> None:
        self.url = url
        self.platform = platform
        self.ca = ca
        self.server = server
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.verify = str(ca)
        self.session.headers["Authorization"] = f"Bearer {KEY}"

    def __call__(self, method: str, path: str, body: Any = None, *, status: int = 200, **options: Any) -> Any:
        """What is answered, which has this status: JSON, or None for nothing."""
        answer = self.raw(method, path, body, **options)
        assert answer.status_code == status, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def raw(self, method: str, path: str, body: Any = None, *, timeout: float = 60, **options: Any) -> requests.Response:
        """The whole answer."""
        if body is not None:
            options["json"] = body
        return self.session.request(method, self.url + path, timeout=timeout, **options)

    def key(self, *scopes: str) -> dict[str, str]:
        """The header of a new key, which is named as its scopes."""
        _, token = self.platform.store.access.create_key("-".join(scopes), set(scopes), actor="test", log_size=1000)
        return {"Authorization": f"Bearer {token}"}

    def connect(self) -> ssl.SSLSocket:
        """A connection for raw bytes."""
        host, port = self.url.removeprefix("https://").split(":")
        context = ssl.create_default_context(cafile=self.ca)
        found = context.wrap_socket(socket.create_connection((host, int(port)), timeout=60), server_hostname=host)
        found.settimeout(60)
        return found


def certificates(folder: Path) -> tuple[trustme.CA, dict[str, str]]:
    """A CA, and the settings of a server with a certificate of it; the CA's is in `ca.pem`."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    server = ca.issue_cert("127.0.0.1", "localhost")
    server.private_key_pem.write_to_path(str(folder / "key.pem"))
    for place, pem in enumerate(server.cert_chain_pems):
        pem.write_to_path(str(folder / "cert.pem"), append=place > 0)
    return ca, {"api_tls_cert": str(folder / "cert.pem"), "api_tls_key": str(folder / "key.pem")}


@contextmanager
def running_api(folder: Path, redis_url: str, *, send_buffer: int | None = None, **settings: Any) -> Iterator[Api]:
    """An API on a free port. Its definitions are `TASKS`; the system buffers about `send_buffer` bytes of what it sends."""
    _, tls = certificates(folder)
    (folder / "tasks").mkdir()
    (folder / "tasks" / "tasks.yaml").write_text(TASKS, encoding="utf-8")
    chosen: Settings = load_settings(
        **{"api_port": 0, "api_key": KEY, "redis_url": redis_url, "tasks_dir": folder / "tasks", **tls, **settings}
    )
    platform = Platform(Store.connect(redis_url), load(folder / "tasks"), chosen, actor="api")
    server = make_server(platform, tls_context(chosen, insecure_http=False))
    # a test that is held up must not find that its connection has just been closed
    server.config.timeout_keep_alive = 120
    listener = listen(chosen)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    url = url_of("https", listener)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    api = Api(url, platform, folder / "ca.pem", server)
    try:
        yield api
    finally:
        api.session.close()
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not end"
        platform.close()


def work_beside_the_api(folder: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the settings be those of an API on this Redis, and the current folder have the same definitions, and the key."""
    (folder / "tasks").mkdir()
    (folder / "tasks/tasks.yaml").write_text(TASKS)
    (folder / "key").write_text(f"{KEY}\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TASKPLATFORM_REDIS_URL", redis_url)
    monkeypatch.setenv("TASKPLATFORM_VERIFY_DEFINITIONS", "false")
    settings.cache_clear()
