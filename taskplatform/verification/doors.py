"""Who gets in: the API without a key, with a wrong one and without TLS, old versions of TLS, and Redis likewise.

All of it from outside, by connections of its own. One wrong key is shown, which the API's audit log notes.
"""

from __future__ import annotations

import secrets
import socket
import ssl
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from taskplatform.settings import Settings
from taskplatform.verification.jobs import Drill, Finding, NotRun
from taskplatform.verification.report import Table

_SECONDS = 10.0
_OLD = ssl.TLSVersion.TLSv1_1
#: Statuses by which a server refuses plain HTTP on a port of TLS.
_ASKS_FOR_TLS = (b"301", b"302", b"307", b"308", b"400", b"426", b"497")
#: Errors by which a server, and not this machine's OpenSSL, refuses a version.
_REFUSALS = ("ALERT_PROTOCOL_VERSION", "ALERT_HANDSHAKE_FAILURE", "UNEXPECTED_EOF", "WRONG_VERSION_NUMBER")


def api(drill: Drill, *, url: str | None, ca: Path | None, key: str | None) -> Finding:
    """The control API's key and TLS. `url` is where it is; None: where the settings say, if something listens there."""
    found = Finding()
    asked = url is not None
    url = (url or _configured(drill.settings)).rstrip("/")
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), timeout=_SECONDS).close()
    except OSError as fault:
        if asked:
            found.faults.append(f"the API at {url} is not reached: {fault.strerror or fault}")
            return found
        raise NotRun(f"no API was found at {url}: say with --api where it is") from None
    rows: list[tuple[str, str, str]] = []
    found.facts = {"url": url}
    if parts.scheme == "https":
        try:
            tls = _tls(found, rows, host, port, _context(ca))
        except OSError as fault:
            hint = "" if ca else "; --api-ca names the CA of its certificate"
            found.faults.append(f"no TLS with {url} that verifies its certificate: {_said(fault)}{hint}")
            return found
        answer = _ask_plain(host, port, b"GET / HTTP/1.1\r\nHost: verify\r\nConnection: close\r\n\r\n")
        # a server may say in plain that it wants TLS
        answered = answer.startswith(b"HTTP/") and answer.split(b" ", 2)[1:2] not in ([one] for one in _ASKS_FOR_TLS)
        rows.append(("plain HTTP on its port", "answered" if answered else "refused", "refused"))
        found.facts["plain_http"] = answered
        found.expect(not answered, "", "it answers plain HTTP on its TLS port")
    else:
        tls = "no TLS"
        loopback = host in ("127.0.0.1", "::1", "localhost")
        rows.append(("TLS", "none", "none is needed on a loopback address" if loopback else "1.2 or newer"))
        found.expect(loopback, "", f"{url} is plain HTTP, and not on a loopback address: keys and data can be read on the way")
    wrong = f"verify-{secrets.token_hex(16)}"
    session = requests.Session()
    session.trust_env = False  # no proxy, and no key from a .netrc
    with session:
        for name, given, wanted in (("no key", None, 401), ("a wrong key", wrong, 401), ("the key that was given", key, 200)):
            if given is None and name != "no key":
                continue
            try:
                status = _status(session, f"{url}/v1/limits", given, ca)
            except requests.RequestException as fault:
                found.faults.append(f"with {name} there was no answer: {type(fault).__name__}")
                continue
            rows.append((f"a request with {name}", str(status), str(wanted)))
            found.facts[name.replace(" ", "_")] = status
            # who shows many wrong keys is not answered 401 any more, for a minute
            good = status == wanted or (wanted == 401 and status == 429)
            found.expect(good, "", f"with {name} it answers {status}, and not {wanted}")
    found.tables.append(Table(f"The API at {url}", ("what", "found", "accepted"), rows))
    if not found.faults:
        found.said = [f"{url}: {tls}, no plain HTTP" if parts.scheme == "https" else f"{url}: plain HTTP on a loopback address"]
        found.said[0] += f"; no key {found.facts['no_key']}, a wrong key {found.facts['a_wrong_key']}"
    return found


def redis_tls(drill: Drill) -> Finding:
    """Redis' TLS: its version, its certificate, nobody without it and nobody without a password."""
    found = Finding()
    chosen = drill.settings
    if drill.remote:
        raise NotRun("it needs Redis, and the platform is reached through its API")
    bare, login = chosen.redis_address
    parts = urlsplit(bare)
    if parts.scheme != "rediss":
        raise NotRun(f"TLS with Redis is not configured: its URL begins with {parts.scheme}://")
    host, port = parts.hostname or "", parts.port or 6379
    rows: list[tuple[str, str, str]] = []
    context = _context(chosen.redis_ca)
    if chosen.redis_cert is not None:
        context.load_cert_chain(chosen.redis_cert, chosen.redis_key)
    try:
        tls = _tls(found, rows, host, port, context)
        answer = _ask(_wrapped(host, port, context), b"PING\r\n")
    except OSError as fault:
        found.faults.append(f"no TLS with {host}:{port} that verifies its certificate: {_said(fault)}")
        return found
    plain = _ask_plain(host, port, b"PING\r\n").startswith((b"+", b"-"))
    rows.append(("a connection without TLS", "answered" if plain else "refused", "refused"))
    found.expect(not plain, "", f"{host}:{port} answers without TLS")
    open_ = answer.startswith(b"+")
    rows.append(("without a password", "answered" if open_ else answer.decode(errors="replace").strip()[:40] or "closed", "refused"))
    found.expect(not open_, "", f"{host}:{port} answers without a password")
    found.facts |= {"host": host, "port": port, "plain": plain, "without_password": open_, "user": login.get("username", "default")}
    found.tables.append(Table(f"Redis at {host}:{port}", ("what", "found", "accepted"), rows))
    if not found.faults:
        found.said = [f"{host}:{port}: {tls} with a certificate that is verified; nothing without TLS or without a password"]
    return found


def _configured(chosen: Settings) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(chosen.api_host, chosen.api_host)
    scheme = "https" if chosen.api_tls_cert is not None or not chosen.api_insecure_http else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{chosen.api_port}"


def _context(ca: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context()
        if ca is not None:
            context.load_verify_locations(ca)
    except OSError as fault:
        raise NotRun(f"the CA in {ca} cannot be read: {_said(fault)}") from None
    return context


def _wrapped(host: str, port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection((host, port), timeout=_SECONDS)
    try:
        return context.wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


def _tls(found: Finding, rows: list[tuple[str, str, str]], host: str, port: int, context: ssl.SSLContext) -> str:
    """What is negotiated, and whether an old version would be too. Raises OSError where the certificate is not accepted."""
    with _wrapped(host, port, context) as connection:
        version, cipher = connection.version() or "", connection.cipher()
    found.facts |= {"tls": version, "cipher": cipher[0] if cipher else ""}
    rows.append(("TLS", version, "TLSv1.2 or newer"))
    found.expect(version in ("TLSv1.2", "TLSv1.3"), "", f"it speaks {version}")
    old = _old_version(host, port)
    found.facts["tls_1_1"] = old
    rows.append(("TLS 1.1", old, "refused"))
    found.expect(old != "accepted", "", "it accepts TLS 1.1")
    return version


def _old_version(host: str, port: int) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only the version is looked at
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = _OLD
        context.set_ciphers("ALL:@SECLEVEL=0")
        with _wrapped(host, port, context):
            return "accepted"
    except ssl.SSLError as fault:
        reason = fault.reason or ""
        return "refused" if any(one in reason for one in _REFUSALS) else f"not tried: {reason or _said(fault)}"
    except (OSError, ValueError) as fault:
        return "refused" if isinstance(fault, ConnectionError) else f"not tried: {_said(fault)}"


def _ask_plain(host: str, port: int, question: bytes) -> bytes:
    try:
        return _ask(socket.create_connection((host, port), timeout=_SECONDS), question)
    except OSError:
        return b""


def _ask(connection: socket.socket, question: bytes) -> bytes:
    with connection:
        connection.settimeout(_SECONDS)
        try:
            connection.sendall(question)
            return connection.recv(256)
        except (ConnectionError, ssl.SSLError):
            return b""


def _status(session: requests.Session, url: str, key: str | None, ca: Path | None) -> int:
    headers: Mapping[str, str] = {} if key is None else {"Authorization": f"Bearer {key}"}
    options: dict[str, Any] = {"verify": str(ca)} if ca is not None else {}
    return session.get(url, headers=headers, timeout=_SECONDS, allow_redirects=False, **options).status_code


def _said(fault: Exception) -> str:
    return str(getattr(fault, "verify_message", "") or getattr(fault, "reason", "") or getattr(fault, "strerror", "") or fault)
