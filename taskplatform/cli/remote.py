"""Commands over the control API: which one, with which key; and those that do not go over it.

The URL and what belongs to it come from the options of `taskplatform` itself, or from the settings. The key never stands on the command
line, where `ps` shows it to everybody: it comes from a file, from a variable, or is asked for on a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from taskplatform.remote import RemotePlatform

F = TypeVar("F", bound=Callable[..., Any])

_META = "taskplatform.remote"
_MOST_KEY_BYTES = 4096
_FILE = click.Path(path_type=Path, dir_okay=False)


def remote_options(function: F) -> F:
    """The options of `taskplatform` itself."""
    options = (
        click.option("--url", metavar="URL", help="Work over the control API at this URL. Default: TASKPLATFORM_URL; without it on Redis."),
        click.option(
            "--key-file", metavar="FILE", type=_FILE, help="File with its key. Default: TASKPLATFORM_KEY_FILE or TASKPLATFORM_KEY."
        ),
        click.option("--ca", metavar="FILE", type=_FILE, help="CAs to trust instead of the usual ones, PEM. Default: TASKPLATFORM_CA."),
        click.option("--client-cert", metavar="FILE", type=_FILE, help="Client certificate, PEM. Default: TASKPLATFORM_CLIENT_CERT."),
        click.option("--client-key", metavar="FILE", type=_FILE, help="Its key, PEM. Default: TASKPLATFORM_CLIENT_KEY."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def keep_options(ctx: click.Context, **given: Any) -> None:
    """Remember what `taskplatform` itself was given, for the command."""
    ctx.meta[_META] = {name: value for name, value in given.items() if value is not None}


def _given() -> dict[str, Any]:
    context = click.get_current_context(silent=True)
    return {} if context is None else context.meta.get(_META, {})


def wanted() -> bool:
    """Whether the command goes over the API. Raises SettingsError, and UsageError for options that go with no URL."""
    from taskplatform.settings import settings

    given = _given()
    if given.get("url") is not None or settings().url is not None:
        return True
    if given:
        raise click.UsageError(f"{_option(next(iter(given)))} goes with --url, or TASKPLATFORM_URL")
    return False


def refuse_url(*, settings_too: bool = False) -> None:
    """Say so, where a command that does not go over the API is to. With `settings_too` also where only a setting says that it is."""
    given = _given()
    if not given and not (settings_too and wanted()):
        return
    name = click.get_current_context().command_path
    option = f"{_option(next(iter(given)))} does not go with it" if given else "TASKPLATFORM_URL is set"
    where = (
        "works on Redis itself, not over the API: set TASKPLATFORM_REDIS_URL" if settings_too else "works on this machine, not over the API"
    )
    raise click.UsageError(f"`{name}` {where}; {option}")


def connect() -> RemotePlatform:
    """The platform behind the API. Raises SettingsError, and UsageError where there is no key."""
    from taskplatform.remote import RemotePlatform
    from taskplatform.settings import settings

    given, chosen = _given(), settings()
    url = given.get("url") or chosen.url
    assert url is not None
    return RemotePlatform.connect(
        url,
        key=_key(url, given.get("key_file")),
        ca=given.get("ca") or chosen.ca,
        client_cert=given.get("client_cert") or chosen.client_cert,
        client_key=given.get("client_key") or chosen.client_key,
    )


def _key(url: str, file: Path | None) -> str:
    from taskplatform.errors import SettingsError
    from taskplatform.settings import settings

    chosen = settings()
    if file is None and chosen.key is not None:
        if chosen.key_file is not None:
            raise SettingsError("TASKPLATFORM_KEY and TASKPLATFORM_KEY_FILE exclude each other")
        return chosen.key.get_secret_value()
    path = file or chosen.key_file
    if path is None:
        if sys.stdin.isatty() and sys.stderr.isatty():
            return str(click.prompt(f"Key for {url}", hide_input=True, err=True)).strip()
        raise click.UsageError(
            "a URL takes a key: --key-file, TASKPLATFORM_KEY_FILE or TASKPLATFORM_KEY; `taskplatform keys create` makes one"
        )
    try:
        with path.open("rb") as stream:
            content = stream.read(_MOST_KEY_BYTES)
        return content.decode("ascii").strip()
    except OSError as fault:
        raise SettingsError(f"the key file {path} cannot be read: {fault.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"the key file {path} holds no key") from None


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
