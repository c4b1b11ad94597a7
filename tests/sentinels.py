"""Debian's Redis as primary and replica, and three Sentinels that look after them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import pytest
import redis
import trustme

from taskplatform.local import find_port
from taskplatform.store.acl import Role, rules
from tests.support import wait_until
from tests.tls import redis_server

MASTER = "jobs"
USER, PASSWORD = "platform", "p@ss/w:rd#?,;%ü"
SENTINEL_PASSWORD = "sent%2Binel&=1"
#: What Sentinels, and a replica, must be allowed at a server with users: Redis' documentation names it for both.
SENTINEL_RULES = "allchannels +multi +slaveof +ping +exec +subscribe +config|rewrite +role +publish +info +client|setname +client|kill"
REPLICA_RULES = "+psync +replconf +ping"
#: A server that does not answer for so long is down.
DOWN_MS = 700


def redis_sentinel() -> str:
    """The program. Skips the test where it is not installed, and fails it with CI set."""
    redis_server()
    binary = shutil.which("redis-sentinel")
    if binary is None:
        if os.environ.get("CI"):
            pytest.fail("redis-sentinel is not installed, and CI has it")
        pytest.skip("redis-sentinel is not installed")
    return binary


class Program:
    """A server or a Sentinel, with a configuration file that it may rewrite, and a log. It keeps its port when it is started again."""

    def __init__(self, binary: str, folder: Path, lines: Sequence[str], port: int) -> None:
        self.port = port
        folder.mkdir(parents=True)
        self._argv = [binary, str(folder / "own.conf")]
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "own.conf").write_text("\n".join([f"dir {folder}", "bind 127.0.0.1", *lines]) + "\n")
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._argv, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(20)


class Cluster:
    """Two servers, the first of which begins as the primary, and three Sentinels. With `tls`, nobody speaks without it."""

    def __init__(self, folder: Path, *, tls: bool = False, sentinels: int = 3) -> None:
        sentinel, server = redis_sentinel(), redis_server()
        self.tls = tls
        folder.mkdir(parents=True)
        self.ca = folder / "ca.pem"
        secure = self._certificates(folder) if tls else []
        self.servers: list[Program] = []
        for number in range(2):
            port = find_port()
            users = {"admin": ("admin", "~* &* +@all"), "sentinel": ("sentinel", SENTINEL_RULES), "replica": ("replica", REPLICA_RULES)}
            users[USER] = (PASSWORD, rules(Role.PLATFORM))
            lines = [*secure, f"tls-port {port}", "port 0", "tls-replication yes"] if tls else [f"port {port}"]
            lines += ["user default off", *(f'user {name} on ">{password}" {what}' for name, (password, what) in users.items())]
            lines += ["masteruser replica", "masterauth replica", "appendonly yes", "maxmemory-policy noeviction", "repl-diskless-sync-delay 0"]
            lines += [f"replicaof 127.0.0.1 {self.servers[0].port}"] if number else []
            self.servers.append(Program(server, folder / f"server{number}", lines, port))
        self.sentinels: list[Program] = []
        # a Sentinel asks for replicas when it begins, and then each ten seconds
        wait_until(self._replicates, seconds=40, message="the replica does not follow")
        for number in range(sentinels):
            port = find_port()
            lines = [*secure, f"tls-port {port}", "port 0", "tls-replication yes"] if tls else [f"port {port}"]
            lines += [f'requirepass "{SENTINEL_PASSWORD}"', f'sentinel sentinel-pass "{SENTINEL_PASSWORD}"']
            lines += [f"sentinel monitor {MASTER} 127.0.0.1 {self.servers[0].port} {sentinels // 2 + 1}"]
            lines += [f"sentinel auth-user {MASTER} sentinel", f"sentinel auth-pass {MASTER} sentinel"]
            lines += [f"sentinel down-after-milliseconds {MASTER} {DOWN_MS}", f"sentinel failover-timeout {MASTER} 3000"]
            self.sentinels.append(Program(sentinel, folder / f"sentinel{number}", lines, port))
        wait_until(self._knows_all, seconds=40, message="the Sentinels do not know each other and the replica")

    def url(self, *, host: str = "127.0.0.1") -> str:
        """For redis_url."""
        hosts = ",".join(f"{host}:{one.port}" for one in self.sentinels)
        own = f"&sentinel_password={quote(SENTINEL_PASSWORD, safe='')}"
        return f"sentinel{'s' if self.tls else ''}://{USER}:{quote(PASSWORD, safe='')}@{hosts}/0?master={MASTER}{own}"

    @property
    def settings(self) -> Mapping[str, str]:
        """For a process of the platform."""
        return {"TASKPLATFORM_REDIS_URL": self.url(), **({"TASKPLATFORM_REDIS_CA": str(self.ca)} if self.tls else {})}

    @property
    def primary(self) -> Program:
        """As the first Sentinel has it."""
        with self.ask(self.sentinels[0]) as sentinel:
            _, port = sentinel.sentinel_get_master_addr_by_name(MASTER)
        return next(one for one in self.servers if one.port == port)

    @property
    def replica(self) -> Program:
        """The other one, whether it lives or not."""
        return next(one for one in self.servers if one is not self.primary)

    def admin(self, server: Program) -> redis.Redis:
        """Closed by the caller."""
        return self._client(server.port, username="admin", password="admin")

    def ask(self, sentinel: Program) -> redis.Redis:
        """Closed by the caller."""
        return self._client(sentinel.port, password=SENTINEL_PASSWORD)

    def replicated(self) -> int:
        """Wait until the replica has all that was written until now. Returns how many replicas said so."""
        with self.admin(self.primary) as client:
            client.set("mark", "1")  # WAIT waits for what its own connection wrote, and so for all before it
            return int(client.wait(1, 10_000))

    def follows(self, server: Program) -> bool:
        """Whether it is a replica that has caught up."""
        with suppress(redis.RedisError), self.admin(server) as client:
            about = client.info("replication")
            return about["role"] == "slave" and about["master_link_status"] == "up" and about["master_port"] == self.primary.port
        return False

    def close(self) -> None:
        """End all."""
        for one in [*self.sentinels, *self.servers]:
            one.end(signal.SIGKILL)

    def _client(self, port: int, **login: str) -> redis.Redis:
        secure = {"ssl": True, "ssl_ca_certs": str(self.ca)} if self.tls else {}
        return redis.Redis(port=port, host="127.0.0.1", decode_responses=True, retry=None, socket_timeout=30, **login, **secure)  # type: ignore[arg-type]

    def _replicates(self) -> bool:
        with suppress(redis.RedisError), self.admin(self.servers[0]) as client:
            return int(client.info("replication")["connected_slaves"]) == 1
        return False

    def _knows_all(self) -> bool:
        with suppress(redis.RedisError):
            for one in self.sentinels:
                with self.ask(one) as sentinel:
                    state = sentinel.sentinel_master(MASTER)
                    if int(state["num-slaves"]) != 1 or int(state["num-other-sentinels"]) != len(self.sentinels) - 1:
                        return False
            return self.follows(self.servers[1])
        return False

    def _certificates(self, folder: Path) -> list[str]:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.ca)
        issued = authority.issue_cert("127.0.0.1")
        issued.private_key_pem.write_to_path(folder / "server.key")
        issued.cert_chain_pems[0].write_to_path(folder / "server.pem")
        files = {"tls-cert-file": folder / "server.pem", "tls-key-file": folder / "server.key", "tls-ca-cert-file": self.ca}
        return [*(f"{name} {path}" for name, path in files.items()), "tls-auth-clients no"]


@contextmanager
def cluster(folder: Path, *, tls: bool = False, sentinels: int = 3) -> Iterator[Cluster]:
    """A cluster that is up, and ended afterwards."""
    running = Cluster(folder, tls=tls, sentinels=sentinels)
    try:
        yield running
    finally:
        running.close()
