"""`taskplatform certs`: a CA, and certificates for the API and its clients."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from taskplatform.cli.arguments import example, json_option
from taskplatform.cli.output import Columns, moment_text, plain, remark, show_rows

if TYPE_CHECKING:
    from taskplatform.certs import Certificate

_MOST_DAYS = 36_500
_dir_option = click.option(
    "--dir", "folder", type=click.Path(path_type=Path, file_okay=False), default="certs", show_default=True, help="The folder."
)


@click.group(invoke_without_command=True)
@_dir_option
@click.option("--host", "hosts", metavar="NAME|IP", multiple=True, help="For whom. Repeatable. Default: localhost, 127.0.0.1, ::1.")
@click.option("--client", "clients", metavar="NAME", multiple=True, help="Also a certificate for a client. Repeatable.")
@click.option("--days", type=click.IntRange(1, _MOST_DAYS), default=397, show_default=True, help="How long they are valid.")
@click.option("--ca-days", type=click.IntRange(1, _MOST_DAYS), default=3650, show_default=True, help="How long the CA is valid.")
@click.option("--renew", is_flag=True, help="New certificates for the server and the named clients, of the same CA.")
@click.option("--force", is_flag=True, help="All anew, also the CA: its old certificates are worth nothing then.")
@click.pass_context
def certs(
    ctx: click.Context,
    folder: Path,
    hosts: tuple[str, ...],
    clients: tuple[str, ...],
    days: int,
    ca_days: int,
    *,
    renew: bool,
    force: bool,
) -> None:
    """Make certificates for the API.

    That is a CA and what it signs, or what is missing of them. Nothing that is there is overwritten, but with --renew or --force.

    \b
    Example:
      taskplatform certs --host api.example.com --client alice
    """
    from taskplatform.certs import make
    from taskplatform.cli.remote import refuse_url

    refuse_url()
    if ctx.invoked_subcommand is not None:
        return
    made = make(
        folder,
        hosts=hosts,
        clients=clients,
        lifetime=timedelta(days=days),
        ca_lifetime=timedelta(days=ca_days),
        renew=renew,
        force=force,
    )
    _show(folder, set(made), as_json=False)
    if not made:
        remark("all of it was there, and nothing was made: --renew makes a new server certificate, --force makes all anew")
    if "server" in made:
        remark(f"for the server: {folder / 'server.crt'} and {folder / 'server.key'}; clients trust {folder / 'ca.crt'}")
    if "ca" in made:
        remark(f"{folder / 'ca.key'} signs: keep it where nobody else reads it; the server does not need it")


@certs.command("show", epilog=example("certs show --dir certs"))
@_dir_option
@json_option
def show_certs(folder: Path, *, as_json: bool) -> None:
    """List them, and when they expire."""
    _show(folder, None, as_json=as_json)


def _show(folder: Path, made: set[str] | None, *, as_json: bool) -> None:
    from time import time_ns

    from taskplatform.certs import show

    now_ms = time_ns() // 1_000_000
    columns: Columns[Certificate] = {
        "certificate": lambda one: str(folder / f"{one.name}.crt"),
        "state": lambda one: "made" if made and one.name in made else one.state(now_ms),
        "expires": lambda one: moment_text(one.expires_ms),
        "hosts": lambda one: ", ".join(one.hosts),
        "sha256": lambda one: one.fingerprint,
    }
    show_rows(show(folder), columns, as_json=as_json, record=lambda one: {**plain(one), "state": one.state(now_ms)})
