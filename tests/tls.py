"""Debian's redis-server with TLS and users, for tests of both."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis
import trustme

from taskplatform.local import find_port
from taskplatform.store.acl import DEFAULT_USER
from tests.support import wait_until

#: The name in the server's certificate, and the one that the tests call it by.
HOST = "localhost"
ADMIN = "admin"


@dataclass
class TlsRedis:
    """A running server. Each of its users has a password of its own."""

    folder: Path
    port: int
    ca: Path
    passwords: Mapping[str, str]
    host: str = HOST
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def url(self, user: str, *, host: str = "", password: str | None = None) -> str:
        """With user and password, escaped."""
        secret = self.passwords[user] if password is None else password
        return f"rediss://{quote(user, safe='')}:{quote(secret, safe='')}@{host or self.host}:{self.port}/0"

    def settings(self, user: str, **others: str) -> dict[str, str]:
        """The settings of a process that uses it, as environment variables."""
        return {"TASKPLATFORM_REDIS_URL": self.url(user, **others), "TASKPLATFORM_REDIS_CA": str(self.ca)}

    def client(self, user: str = ADMIN, **options: Any) -> redis.Redis:
        """Closed by the caller."""
        return redis.Redis.from_url(self.url(user), ssl_ca_certs=str(self.ca), **{"decode_responses": True, **options})


def redis_server() -> str:
    """The program. Skips the test where it is not installed, and fails it with CI set."""
    binary = shutil.which("redis-server")
    if binary is None:
        if os.environ.get("CI"):
            pytest.fail("redis-server is not installed, and CI has it")
        pytest.skip("redis-server is not installed")
    return binary


@contextmanager
def tls_redis(
    folder: Path, users: Mapping[str, str], passwords: Mapping[str, str], *, certificate_for: str = HOST, clients: bool = False
) -> Iterator[TlsRedis]:
    """A server whose `users` have the rights that are given as ACL rules; an admin is there too.

    Its certificate is for `certificate_for`, by a CA of its own. With `clients`, it asks for a client certificate: `client.pem`.
    """
    binary = redis_server()
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name, identity in (("server", certificate_for), ("client", "client@example.com")):
        issued = authority.issue_cert(identity)
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    everybody = {ADMIN: "~* &* +@all", **users}
    secrets = {ADMIN: "admin-password", **passwords}
    lines = [f"user {name} on #{hashlib.sha256(secrets[name].encode()).hexdigest()} {rules}" for name, rules in everybody.items()]
    (folder / "users.acl").write_text("\n".join([DEFAULT_USER, *lines]) + "\n")
    port = find_port()
    options = {
        "port": "0",
        "tls-port": str(port),
        "bind": "127.0.0.1",
        "tls-cert-file": str(folder / "server.pem"),
        "tls-key-file": str(folder / "server.key"),
        "tls-ca-cert-file": str(folder / "ca.pem"),
        "tls-auth-clients": "yes" if clients else "no",
        "aclfile": str(folder / "users.acl"),
        "acllog-max-len": "10000",
        "dir": str(folder),
        "save": "",
        "maxmemory-policy": "noeviction",
    }
    argv = [binary, *(word for name, value in options.items() for word in (f"--{name}", value))]
    with (folder / "redis.log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT)
        running = TlsRedis(folder, port, folder / "ca.pem", secrets, process=process)
        try:
            wait_until(lambda: _listens(running), message="redis-server to listen")
            yield running
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _listens(server: TlsRedis) -> bool:
    assert server.process is not None
    assert server.process.poll() is None, (server.folder / "redis.log").read_text()
    return "Ready to accept connections" in (server.folder / "redis.log").read_text()
