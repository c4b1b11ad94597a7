"""Debian's Redis as primary and replicas, and Sentinels that look after them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
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
#: A server that does not answer for so long is down: far more than a busy machine takes, until a test lets one die.
PATIENCE_MS, IMPATIENCE_MS = 60_000, 1_500
PERIODS_MS = {"info-period": 500, "publish-period": 300, "tilt-trigger": 60_000}
#: What Sentinels, and a replica, must be allowed at a server with users: Redis' documentation names it for both.
SENTINEL_RULES = "allchannels +multi +slaveof +ping +exec +subscribe +config|rewrite +role +publish +info +client|setname +client|kill"
REPLICA_RULES = "+psync +replconf +ping"


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
        self._process.wait(60)


class Cluster:
    """Servers, the first of which begins as the primary, and Sentinels. With `tls`, nobody speaks without it."""

    def __init__(self, folder: Path, *, tls: bool = False, servers: int = 3, sentinels: int = 3) -> None:
        self._programs = (redis_sentinel(), redis_server())
        folder.mkdir(parents=True)
        self.tls = tls
        self.ca = folder / "ca.pem"
        self._secure = self._certificates(folder) if tls else []
        self._replicas = servers - 1
        self.servers: list[Program] = []
        self.sentinels: list[Program] = []
        try:
            for number in range(servers):
                self.servers.append(self._server(folder / f"server{number}"))
            wait_until(self._replicates, seconds=60, message="the replicas do not follow")
            for number in range(sentinels):
                self.sentinels.append(self._sentinel(folder / f"sentinel{number}", quorum=sentinels // 2 + 1))
            for one in self.sentinels:
                with self.ask(one) as client:
                    wait_until(partial(_answers, client), seconds=60)
                    # quicker than they are by themselves, and not disturbed by a machine that is too busy to let them run
                    client.execute_command("SENTINEL", "DEBUG", *(str(word) for pair in PERIODS_MS.items() for word in pair))
            wait_until(self._knows_all, seconds=60, message="the Sentinels do not know each other and the replicas")
        except BaseException:
            self.close()
            raise

    def _server(self, folder: Path) -> Program:
        """The first one is nobody's replica."""
        port = find_port()
        users = {"admin": ("admin", "~* &* +@all"), "sentinel": ("sentinel", SENTINEL_RULES), "replica": ("replica", REPLICA_RULES)}
        users[USER] = (PASSWORD, rules(Role.PLATFORM))
        lines = self._listening(port)
        lines += ["user default off", *(f'user {name} on ">{password}" {what}' for name, (password, what) in users.items())]
        lines += ["masteruser replica", "masterauth replica", "appendonly yes", "maxmemory-policy noeviction", "repl-diskless-sync-delay 0"]
        # a primary that is cut off from its replicas takes no writes: they would be lost
        lines += ["min-replicas-to-write 1" if self._replicas else "", "min-replicas-max-lag 60"]
        lines += [f"replicaof 127.0.0.1 {self.servers[0].port}"] if self.servers else []
        return Program(self._programs[1], folder, lines, port)

    def _sentinel(self, folder: Path, *, quorum: int) -> Program:
        port = find_port()
        lines = self._listening(port)
        lines += [f'requirepass "{SENTINEL_PASSWORD}"', f'sentinel sentinel-pass "{SENTINEL_PASSWORD}"']
        lines += [f"sentinel monitor {MASTER} 127.0.0.1 {self.servers[0].port} {quorum}"]
        lines += [f"sentinel auth-user {MASTER} sentinel", f"sentinel auth-pass {MASTER} sentinel"]
        lines += [f"sentinel down-after-milliseconds {MASTER} {PATIENCE_MS}", f"sentinel failover-timeout {MASTER} 5000"]
        return Program(self._programs[0], folder, lines, port)

    def _listening(self, port: int) -> list[str]:
        return [*self._secure, f"tls-port {port}", "port 0", "tls-replication yes"] if self.tls else [f"port {port}"]

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

    def kill_primary(self) -> Program:
        """Return it, when the Sentinels have chosen another."""
        old = self.primary
        old.end(signal.SIGKILL)
        self._be_patient(IMPATIENCE_MS)
        wait_until(lambda: self.primary is not old, seconds=120, message="the Sentinels chose no other primary")
        self._be_patient(PATIENCE_MS)
        return old

    def fail_over(self) -> Program:
        """Let the Sentinels choose another primary, and return the old one, that lives on, when no replica follows it any more.

        Until the last has left it the old one takes writes, which are lost: Sentinel moves one replica after the other.
        """
        old = self.primary

        def accepted() -> bool:
            # until a Sentinel has looked at the replicas, it says that there is no good one
            with suppress(redis.ResponseError), self.ask(self.sentinels[0]) as sentinel:
                return bool(sentinel.execute_command("SENTINEL", "FAILOVER", MASTER))
            return False

        for _ in range(5):
            wait_until(accepted, seconds=60, message="no Sentinel begins a failover")
            # where the machine is busy they may break it off
            with suppress(AssertionError):
                wait_until(lambda: self.primary is not old, seconds=20)
                break
        else:
            raise AssertionError("the Sentinels chose no other primary")
        wait_until(lambda: self._is_left(old), seconds=120, message="a replica stays with the old primary")
        return old

    def _is_left(self, server: Program) -> bool:
        """Whether it takes no writes for lack of replicas, or is a replica itself by now."""
        with self.admin(server) as client:
            about = client.info("replication")
        return about["role"] == "slave" or int(about["connected_slaves"]) == 0

    def _be_patient(self, milliseconds: int) -> None:
        for one in self.sentinels:
            with self.ask(one) as sentinel:
                sentinel.sentinel_set(MASTER, "down-after-milliseconds", milliseconds)

    def admin(self, server: Program) -> redis.Redis:
        """Closed by the caller."""
        return self._client(server.port, username="admin", password="admin")

    def ask(self, sentinel: Program) -> redis.Redis:
        """Closed by the caller."""
        return self._client(sentinel.port, password=SENTINEL_PASSWORD)

    def replicated(self) -> int:
        """Wait until the replicas have all that was written until now. Returns how many said so."""
        with self.admin(self.primary) as client:
            client.set("mark", "1")  # WAIT waits for what its own connection wrote, and so for all before it
            return int(client.wait(self._replicas, 60_000))

    def follows(self, server: Program) -> bool:
        """Whether it is a replica that has caught up."""
        with suppress(redis.RedisError), self.admin(server) as client:
            about = client.info("replication")
            return bool(about["role"] == "slave" and about["master_link_status"] == "up" and about["master_port"] == self.primary.port)
        return False

    def close(self) -> None:
        """End all."""
        for one in [*self.sentinels, *self.servers]:
            one.end(signal.SIGKILL)

    def _client(self, port: int, **login: str) -> redis.Redis:
        secure = {"ssl": True, "ssl_ca_certs": str(self.ca)} if self.tls else {}
        return redis.Redis(port=port, host="127.0.0.1", decode_responses=True, retry=None, socket_timeout=90, **login, **secure)  # type: ignore[arg-type]

    def _replicates(self) -> bool:
        with suppress(redis.RedisError), self.admin(self.servers[0]) as client:
            return int(client.info("replication")["connected_slaves"]) == self._replicas
        return False

    def _knows_all(self) -> bool:
        with suppress(redis.RedisError):
            for one in self.sentinels:
                with self.ask(one) as sentinel:
                    state = sentinel.sentinel_master(MASTER)
                    if int(state["num-slaves"]) != self._replicas or int(state["num-other-sentinels"]) != len(self.sentinels) - 1:
                        return False
            return all(self.follows(one) for one in self.servers[1:])
        return False

    def _certificates(self, folder: Path) -> list[str]:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.ca)
        issued = authority.issue_cert("127.0.0.1")
        issued.private_key_pem.write_to_path(folder / "server.key")
        issued.cert_chain_pems[0].write_to_path(folder / "server.pem")
        files = {"tls-cert-file": folder / "server.pem", "tls-key-file": folder / "server.key", "tls-ca-cert-file": self.ca}
        return [*(f"{name} {path}" for name, path in files.items()), "tls-auth-clients no"]


def _answers(client: redis.Redis) -> bool:
    with suppress(redis.ConnectionError):
        return bool(client.ping())
    return False


@contextmanager
def cluster(folder: Path, *, tls: bool = False, servers: int = 3, sentinels: int = 3) -> Iterator[Cluster]:
    """A cluster that is up, and ended afterwards."""
    running = Cluster(folder, tls=tls, servers=servers, sentinels=sentinels)
    try:
        yield running
    finally:
        running.close()
