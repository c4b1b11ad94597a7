"""What must lie in the volumes before the other containers start: `python -m taskplatform.prepare`, once on each `docker compose up`.

- In `/acl`, for Redis: `users.acl`, with nobody as `default`, and the users `platform` (beats, workers, API, command line), `flower`
  (only watches) and `admin` (everything, for people). It has digests of the passwords in REDIS_PASSWORD, REDIS_FLOWER_PASSWORD and
  REDIS_ADMIN_PASSWORD. Their rights are those of `store.acl`.
- In `/pki`, which nothing else mounts: a CA, and the API's certificate, for this machine and the names in API_HOSTS. In `/tls`, for
  the API: that certificate, its key, and the CA's certificate. It is made anew 30 days before it expires, and when the names change.

Where a secret still has the value that stands in docker-compose.yml for everybody to read, it says so.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from taskplatform import certs
from taskplatform.errors import Conflict, NotFound, TaskPlatformError
from taskplatform.settings import settings
from taskplatform.store.acl import DEFAULT_USER, Role, rules

#: How the secrets begin that docker-compose.yml has by itself.
DEMO = "demo-"
SECRETS = ("REDIS_PASSWORD", "REDIS_FLOWER_PASSWORD", "REDIS_ADMIN_PASSWORD", "API_KEY", "FLOWER_PASSWORD", "GRAFANA_PASSWORD")
_ROLES = {
    "platform": ("REDIS_PASSWORD", Role.PLATFORM),
    "flower": ("REDIS_FLOWER_PASSWORD", Role.OBSERVER),
}
_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~")


def acl(environment: Mapping[str, str], *, namespace: str = "tp", database: int = 0) -> str:
    """The ACL file for Redis. Raises Conflict where a password is missing, or would not stand in a URL as it is."""
    lines = [DEFAULT_USER]
    for user, (name, role) in _ROLES.items():
        lines.append(f"user {user} on #{_digest(environment, name)} {rules(role, namespace=namespace, database=database)}")
    lines.append(f"user admin on #{_digest(environment, 'REDIS_ADMIN_PASSWORD')} ~* &* +@all")
    return "\n".join(lines) + "\n"


def _digest(environment: Mapping[str, str], name: str) -> str:
    password = environment.get(name, "")
    if len(password) < 8 or not _SAFE.issuperset(password):
        raise Conflict(
            f"{name}: 8 characters or more are expected, of a to z, A to Z, 0 to 9 and - . _ ~, such as `openssl rand -hex 24` gives"
        )
    return hashlib.sha256(password.encode()).hexdigest()


def certificate(authority: Path, served: Path, hosts: list[str], *, now_ms: int) -> list[str]:
    """Make what is missing of the API's certificate, or no longer right. Returns the names of what was made."""
    try:
        there = {one.name: one for one in certs.show(authority)}
    except NotFound:
        there = {}
    server = there.get("server")
    fits = server is not None and set(server.hosts) == set(hosts) and server.state(now_ms) == "valid"
    made = certs.make(authority, hosts=hosts, renew=server is not None and not fits)
    for name, mode in (("server.key", 0o600), ("server.crt", 0o644), ("ca.crt", 0o644)):
        _write(served / name, (authority / name).read_bytes(), mode)
    return made


def _write(path: Path, content: bytes, mode: int) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.touch(mode)
    temporary.write_bytes(content)
    temporary.replace(path)


def main() -> int:
    """The command. Returns the exit code."""
    try:
        text = acl(os.environ, namespace=settings().namespace)
        hosts = [*certs.LOCAL_HOSTS, "api", *os.environ.get("API_HOSTS", "").lower().replace(",", " ").split()]
        _write(Path("/acl/users.acl"), text.encode(), 0o644)
        made = certificate(Path("/pki"), Path("/tls"), hosts, now_ms=time.time_ns() // 1_000_000)
    except (OSError, TaskPlatformError) as fault:
        print(f"nothing else can start: {fault}", file=sys.stderr)
        return 1
    print(f"rights of the users of Redis written; certificates made: {', '.join(made) or 'none, they are there'}")
    known = [name for name in SECRETS if os.environ.get(name, "").startswith(DEMO)]
    if known:
        print(f"{', '.join(known)}: still as docker-compose.yml has it, which everybody can read; see docs/deploying-compose.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
