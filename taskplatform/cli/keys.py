"""`taskplatform keys`: who may use the API; and `taskplatform audit`: who did what."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import click

from taskplatform.cli.arguments import duration, example, json_option, on_redis
from taskplatform.cli.output import Columns, counted, moment_text, plain, remark, show_json, show_rows

if TYPE_CHECKING:
    from taskplatform.keys import ApiKey
    from taskplatform.store.access import AuditEntry

# the same as Scope, without its module's imports
SCOPES = ("read", "submit", "admin")


@click.group()
def keys() -> None:
    """Who may use the API.

    A key is shown once, when it is made. TASKPLATFORM_API_KEY gives one more, named bootstrap, which is not stored.
    """


_expires_option = click.option(
    "--expires", "lifetime", metavar="DURATION", type=duration, help="How long it is valid, such as 90d. Default: until it is revoked."
)


@keys.command("create", epilog=example("keys create ci --scope read --scope submit --expires 90d"))
@click.argument("name")
@click.option("--scope", "scopes", type=click.Choice(SCOPES), multiple=True, required=True, help="What it may do. Repeatable.")
@_expires_option
@json_option
def create_key(name: str, scopes: tuple[str, ...], lifetime: timedelta | None, *, as_json: bool) -> None:
    """Make a key, and show it this once.

    admin may do everything; read and submit do not contain each other.
    """
    with on_redis(definitions=False) as platform:
        key, token = platform.store.access.create_key(
            name, set(scopes), lifetime=_some(lifetime), actor=platform.actor, log_size=platform.settings.audit_size
        )
    _show(key, token, as_json=as_json)


@keys.command("rotate", epilog=example("keys rotate ci --overlap 24h"))
@click.argument("name")
@click.option("--overlap", metavar="DURATION", type=duration, default="24h", show_default=True, help="How long the old one is still valid.")
@click.option(
    "--expires", "lifetime", metavar="DURATION", type=duration, help="How long the new one is valid. Default: as the old one was."
)
@json_option
def rotate_key(name: str, overlap: timedelta, lifetime: timedelta | None, *, as_json: bool) -> None:
    """Give a key a new secret, and show it this once.

    The old one stays valid for the overlap, so that those who use it can change over.
    """
    with on_redis(definitions=False) as platform:
        key, token = platform.store.access.rotate_key(
            name, overlap=overlap, lifetime=_some(lifetime), actor=platform.actor, log_size=platform.settings.audit_size
        )
    _show(key, token, as_json=as_json)


def _some(lifetime: timedelta | None) -> timedelta | None:
    if lifetime is not None and lifetime <= timedelta():
        raise click.BadParameter("must be longer than 0", param_hint="'--expires'")
    return lifetime


def _show(key: ApiKey, token: str, *, as_json: bool) -> None:
    if as_json:
        show_json({**plain(key), "token": token})
        return
    until = f"valid until {moment_text(key.expires_ms)}" if key.expires_ms is not None else "valid until it is revoked"
    remark(f"{key.name} ({key.id}): {', '.join(key.scopes)}; {until}. It is not shown again:")
    click.echo(token)


@keys.command("list", epilog=example("keys list --json"))
@json_option
def list_keys(*, as_json: bool) -> None:
    """List the keys, without their secrets.

    Those that expired or were revoked are listed for 30 days more.
    """
    with on_redis(definitions=False) as platform:
        found = platform.store.access.list_keys()
        now_ms = platform.store.now_ms()
    columns: Columns[ApiKey] = {
        "name": lambda one: one.name,
        "id": lambda one: one.id,
        "scopes": lambda one: ",".join(one.scopes),
        "state": lambda one: one.state(now_ms),
        "created": lambda one: moment_text(one.created_ms),
        "by": lambda one: one.created_by,
        "expires": lambda one: moment_text(one.expires_ms),
        "last used": lambda one: moment_text(one.last_used_ms),
        "revoked": lambda one: moment_text(one.revoked_ms),
    }
    show_rows(found, columns, as_json=as_json, record=lambda one: {**plain(one), "state": one.state(now_ms)})


@keys.command("revoke", epilog=example("keys revoke ci"))
@click.argument("which", metavar="NAME|ID")
def revoke_key(which: str) -> None:
    """End a key for good, at once.

    A name means all keys that it has; an id means only that one, such as the old one after a rotation.
    """
    with on_redis(definitions=False) as platform:
        revoked = platform.store.access.revoke_key(which, actor=platform.actor, log_size=platform.settings.audit_size)
    click.echo(f"{counted(revoked, 'key')} revoked" if revoked else f"{which} was not valid any more")


@click.command(epilog=example("audit --last 20 --key ci"))
@click.option("--last", "limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many.")
@click.option("--key", metavar="NAME|ID", help="Only what was done with a key, or to it.")
@json_option
def audit(limit: int, key: str | None, *, as_json: bool) -> None:
    """List who did what over the API.

    The newest first: each request that changes something, each that was not let in, and each key that was made, rotated or revoked.
    """
    columns: Columns[AuditEntry] = {
        "at": lambda one: moment_text(one.at_ms),
        "who": lambda one: one.actor or (f"{one.key} ({one.key_id})" if one.key else ""),
        "from": lambda one: one.address,
        "what": lambda one: f"{one.action} {one.key} ({one.key_id})" if one.kind == "keys" else one.action,
        "answer": lambda one: "refused" if one.kind == "refused" else one.status,
        "about": lambda one: one.about,
        "request": lambda one: one.request,
    }
    with on_redis(definitions=False) as platform:
        found = platform.store.access.audit(key=key, limit=limit)
    show_rows(found, columns, as_json=as_json)
