"""The checks of keys, certificates and settings."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from cryptography import x509

from taskplatform.doctor.report import Finding, Severity
from taskplatform.doctor.server import is_local, is_loopback
from taskplatform.doctor.visit import Nothing, Visit
from taskplatform.keys import ApiKey, Scope

#: A key, and a certificate, is told of so long before it ends.
KEY_DAYS, CERTIFICATE_DAYS = 7, 30
#: A key that ended is told of for so long.
_ENDED_DAYS = 7
_DAY_MS = 86_400_000


def keys(visit: Visit) -> Iterator[Finding]:
    """API keys that ended, or end soon, without another of their name."""
    store = visit.redis().store
    found, now_ms = store.access.list_keys(), store.now_ms()
    live = [one for one in found if one.state(now_ms) == "live"]
    visit.seen(f"{len(live)} valid")
    if visit.settings.api_key is not None:
        administers = any(Scope.ADMIN in one.scopes for one in live)
        yield Finding(
            code="bootstrap_key",
            severity=Severity.WARNING if administers else Severity.INFO,
            subject="TASKPLATFORM_API_KEY",
            what="The key of the settings, that may do everything, is accepted" + (" beside keys of its kind." if administers else "."),
            why="It does not end, cannot be revoked, and nobody knows whose it is. It is for the beginning.",
            mend="take TASKPLATFORM_API_KEY away"
            if administers
            else "taskplatform keys create NAME --scope admin; then take TASKPLATFORM_API_KEY away",
        )
    for one in found:
        others = [other for other in live if other.name == one.name and other.id != one.id and _lasts(other, one)]
        if not others and one.expires_ms is not None and one.revoked_ms is None:
            yield from _key(one, one.expires_ms - now_ms)


def _lasts(other: ApiKey, one: ApiKey) -> bool:
    return other.expires_ms is None or (one.expires_ms is not None and other.expires_ms > one.expires_ms)


def _key(one: ApiKey, left_ms: int) -> Iterator[Finding]:
    days = left_ms / _DAY_MS
    scopes = " --scope ".join(one.scopes)
    if -_ENDED_DAYS < days <= 0:
        yield Finding(
            code="key_expired",
            severity=Severity.WARNING,
            subject=one.name,
            what=f"API key {one.name} ({one.id}) expired {_days(-days)} ago.",
            why="Whoever still uses it is answered 401.",
            mend=f"taskplatform keys create {one.name} --scope {scopes}",
        )
    elif 0 < days <= KEY_DAYS:
        yield Finding(
            code="key_expires",
            severity=Severity.WARNING,
            subject=one.name,
            what=f"API key {one.name} ({one.id}) expires in {_days(days)}.",
            why="From then on whoever uses it is answered 401.",
            mend=f"taskplatform keys rotate {one.name}",
        )


def _days(days: float) -> str:
    return f"{days:.0f} days" if days >= 2 else f"{days * 24:.0f} h"


def certificates(visit: Visit) -> Iterator[Finding]:
    """All that the settings name, and what Redis shows."""
    chosen = visit.settings
    named: dict[str, tuple[Path, str]] = {}
    for setting, path in (
        ("api_tls_cert", chosen.api_tls_cert),
        ("api_tls_client_ca", chosen.api_tls_client_ca),
        ("redis_ca", chosen.redis_ca),
        ("redis_cert", chosen.redis_cert),
    ):
        if path is not None:
            named[setting] = (path, f"TASKPLATFORM_{setting.upper()}")
    tls = chosen.redis_url.startswith("rediss:")
    if not named and not tls:
        raise Nothing("the settings name none, and Redis is spoken to without TLS")
    count = 0
    for setting, (path, where) in named.items():
        renew = "taskplatform certs --renew" if setting == "api_tls_cert" else f"a new certificate in {where}"
        try:
            found = x509.load_pem_x509_certificates(path.read_bytes())
        except (OSError, ValueError) as fault:
            yield Finding(
                code="certificate_unreadable",
                severity=Severity.CRITICAL,
                subject=str(path),
                what=f"{where} {path} is no certificate that can be read: {getattr(fault, 'strerror', None) or 'not PEM'}",
                why="Processes that start with this setting end at once.",
                mend="taskplatform certs, or the right path in " + where,
            )
            continue
        count += len(found)
        for one in found:
            yield from _certificate(one, f"{where} {path}", renew)
    for setting, key in (("api_tls_key", chosen.api_tls_key), ("redis_key", chosen.redis_key)):
        if key is not None:
            yield from _private(key, f"TASKPLATFORM_{setting.upper()}")
    visit.seen(f"{count} in files")
    if tls:
        shown = visit.redis().certificate()
        if shown is not None:
            visit.seen("that of Redis")
            yield from _certificate(
                x509.load_der_x509_certificate(shown), "the certificate that Redis shows", "a new one in Redis' tls-cert-file"
            )


def _certificate(one: x509.Certificate, where: str, mend: str) -> Iterator[Finding]:
    now = datetime.now(one.not_valid_after_utc.tzinfo)
    left = (one.not_valid_after_utc - now).total_seconds() / 86_400
    name = one.subject.rfc4514_string() or "a certificate"
    if now < one.not_valid_before_utc:
        what, code = f"{where}: {name} is not valid before {one.not_valid_before_utc:%Y-%m-%d %H:%M} UTC.", "certificate_not_valid_yet"
    elif left <= 0:
        what, code = f"{where}: {name} expired on {one.not_valid_after_utc:%Y-%m-%d}.", "certificate_expired"
    elif left <= CERTIFICATE_DAYS:
        what, code = f"{where}: {name} expires in {_days(left)}.", "certificate_expires"
    else:
        return
    yield Finding(
        code=code,
        severity=Severity.WARNING if code == "certificate_expires" else Severity.CRITICAL,
        subject=where,
        what=what,
        why="Connections are refused by whoever verifies it, and everybody does.",
        mend=mend,
    )


def _private(path: Path, where: str) -> Iterator[Finding]:
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # what starts with it says so
    if mode & (stat.S_IRGRP | stat.S_IROTH) and os.name == "posix":
        yield Finding(
            code="key_file_open",
            severity=Severity.WARNING,
            subject=str(path),
            what=f"{where} {path} can be read by other users of this machine.",
            why="Who has the key can be taken for this server.",
            mend=f"chmod 600 {path}",
        )


def settings(visit: Visit) -> Iterator[Finding]:
    """What the settings here leave open."""
    chosen, variables = visit.settings, visit.environment
    visit.seen("of this environment")
    login = bool(chosen.flower_login or variables.get("FLOWER_BASIC_AUTH") or variables.get("FLOWER_AUTH"))
    address = variables.get("FLOWER_ADDRESS", "")
    if not login and address and not is_loopback(address):
        yield Finding(
            code="flower_open",
            severity=Severity.WARNING,
            subject="FLOWER_ADDRESS",
            what=f"Flower is to listen on {address}, and has no login.",
            why="It does not start so: whoever reaches it would see users and jobs.",
            mend="TASKPLATFORM_FLOWER_LOGIN=user:password",
        )
    if chosen.api_insecure_http and not is_loopback(chosen.api_host):
        yield Finding(
            code="api_without_tls",
            severity=Severity.WARNING,
            subject="TASKPLATFORM_API_INSECURE_HTTP",
            what=f"The API may listen on {chosen.api_host} without TLS.",
            why="Keys can be read on the way, unless something before it does TLS.",
            mend="taskplatform certs; TASKPLATFORM_API_TLS_CERT and TASKPLATFORM_API_TLS_KEY; TASKPLATFORM_API_INSECURE_HTTP=false",
        )
    if not chosen.ops_ports:
        yield Finding(
            code="no_ops_port",
            severity=Severity.INFO,
            subject="TASKPLATFORM_OPS_PORT",
            what="Beats and workers that start here serve neither /health nor /metrics.",
            why="Nothing notices a process that lives and does nothing, and there is nothing to plot.",
            mend="TASKPLATFORM_OPS_PORT=8092-8099",
        )
    if is_local(chosen.redis_url) and not _writable(chosen.data_dir):
        yield Finding(
            code="data_dir_not_writable",
            severity=Severity.INFO,
            subject=str(chosen.data_dir),
            what=f"{chosen.data_dir} cannot be written.",
            why="`taskplatform up` keeps its server's data there, and does not start.",
            mend="TASKPLATFORM_DATA_DIR=… of a folder that this user may write",
        )


def _writable(path: Path) -> bool:
    """Whether it could be made or written, without trying."""
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
