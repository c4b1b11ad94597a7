"""Flower as the platform runs it: behind its login, read-only unless that is changed, its API closed.

`celery -A taskplatform.app flower` makes this application in place of Flower's own (`app` sees to it). Whatever Flower is told by its
options, its environment or a `flowerconfig.py`:

- It starts with a login alone (`flower_login`, or Flower's own --basic_auth or --auth), or on a loopback address or a unix socket.
- With `flower_read_only`, the default, it answers 403 to whatever is sent to /api, and to every method but GET and HEAD, other than the
  table of tasks, which its page asks for with POST. So nothing can be run, revoked, limited or shut down through it.
- It keeps `flower_max_tasks` tasks at the most, and its table of tasks has arguments, where the user stands, and retries, unless
  --tasks_columns says what it has.
- `/metrics` and `/healthcheck` need no login, and nobody else's page may read an answer.
- Its pages link to the dashboard, and that of a task to the job's, where `dashboard_url` says where that is.
- A Redis whose certificate is not accepted, or that does not let it in, ends it at once.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flower.events
import flower.views
import tornado.template
import tornado.web
from celery.events.receiver import EventReceiver
from flower.app import Flower

from taskplatform.errors import Outage, SettingsError, StoreError, StoreUnavailable
from taskplatform.settings import Settings
from taskplatform.store import connect

_LOOPBACK = "127.0.0.1"
#: What Flower's own pages send with POST to read.
_READ_BY_POST = "/tasks/datatable"
#: Of Flower's templates: where our links go in, and what goes in there.
_LINKS = {
    "navbar.html": ("</ul>", '<li class="nav-item"><a class="nav-link" href="{url}/" rel="noreferrer">Dashboard</a></li>'),
    "task.html": ("</header>", '<a href="{url}/jobs/{{{{ url_escape(task.uuid, plus=False) }}}}" rel="noreferrer">Its whole history</a>'),
}
_FLOWERS_COLUMNS = "name,uuid,state,received,runtime,worker"
_COLUMNS = "name,uuid,state,kwargs,retries,received,runtime,worker"


class PlatformFlower(Flower):  # type: ignore[misc]
    """What `celery flower` runs."""

    def __init__(self, *, options: Any, chosen: Settings, **arguments: Any) -> None:
        # it would open the API to everybody where there is no login
        os.environ.pop("FLOWER_UNAUTHENTICATED_API", None)
        if chosen.flower_login and not options.basic_auth:
            options.basic_auth = [chosen.flower_login]
        if chosen.flower_read_only:
            options.read_only = True
            # The platform's workers send events and heartbeats anyway. To tell them to is an order, which an observer may not give.
            options.enable_events = False
            flower.events.EventReceiver = _Listener
        if not (options.basic_auth or options.auth or options.unix_socket):
            options.address = options.address or _LOOPBACK
            if not _is_loopback(options.address):
                raise SettingsError(
                    f"Flower has no login and is to listen on {options.address}, where others can reach it: set "
                    f"TASKPLATFORM_FLOWER_LOGIN to user:password, or let it listen on {_LOOPBACK}"
                )
        options.max_tasks = min(options.max_tasks, chosen.flower_max_tasks)
        if options.tasks_columns == _FLOWERS_COLUMNS:
            options.tasks_columns = _COLUMNS
        _require_redis(chosen)
        if chosen.sentinel is not None:
            flower.views.Broker = partial(_Queues, chosen)
        if chosen.dashboard_url is not None:
            arguments["template_loader"] = _Linked(arguments["template_path"], chosen.dashboard_url)
        super().__init__(options=options, **arguments)

    def find_handler(self, request: Any, **arguments: Any) -> Any:
        """Closes here, before any handler, what a read-only Flower does not do."""
        if self.options.read_only and not _reads(request.method, self._path(request.path)):
            return self.get_handler_delegate(request, _Closed)
        return super().find_handler(request, **arguments)

    def _path(self, path: str) -> str:
        prefix = f"/{self.options.url_prefix.strip('/')}" if self.options.url_prefix else ""
        return path.removeprefix(prefix)


class _Linked(tornado.template.Loader):
    """Flower's templates, with links to the dashboard; one that has no place for it stays as it is."""

    def __init__(self, folder: str, url: str) -> None:
        super().__init__(folder)
        self._url = url

    def _create_template(self, name: str) -> tornado.template.Template:
        path = Path(self.root, name)
        text = path.read_text(encoding="utf-8")
        if name in _LINKS:
            place, link = _LINKS[name]
            text = text.replace(place, link.format(url=self._url) + place, 1)
        return tornado.template.Template(text, name=name, loader=self)


class _Listener(EventReceiver):  # type: ignore[misc]
    """Hears events, and asks for none."""

    def wakeup_workers(self, channel: Any = None) -> None:
        """Nothing."""


class _Queues:
    """How long the queues are, in place of Flower's `Broker`: that asks one Sentinel alone, and looks into database 0."""

    def __init__(self, chosen: Settings, *_: Any, **__: Any) -> None:
        self._chosen = chosen

    async def queues(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """As Flower's page has them."""
        return await asyncio.to_thread(self._count, list(names))

    def _count(self, names: Sequence[str]) -> list[dict[str, Any]]:
        with connect(self._chosen.redis_url, tls=self._chosen.redis_tls) as client:
            return [{"name": name, "messages": client.llen(name)} for name in names]


class _Closed(tornado.web.RequestHandler):
    """Says no to everything."""

    def prepare(self) -> None:
        self.set_status(403)
        self.set_header("Content-Type", "text/plain; charset=UTF-8")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.finish("This Flower only shows (TASKPLATFORM_FLOWER_READ_ONLY). Use the platform's own API or command line.\n")

    def check_xsrf_cookie(self) -> None:
        """Whatever comes with it, the answer is no."""


def _require_redis(chosen: Settings) -> None:
    """Raises SettingsError where Redis refuses us in a way that does not pass by itself. Flower waits for one that is away."""
    client = connect(chosen.redis_url, tls=chosen.redis_tls)
    try:
        client.ping()
    except StoreUnavailable as fault:
        if fault.outage is Outage.UNTRUSTED:
            raise SettingsError(str(fault)) from None
    except StoreError as fault:
        raise SettingsError(str(fault)) from None
    finally:
        client.close()


def _reads(method: str, path: str) -> bool:
    # as Flower's routes are: from the start, and by its letters
    if path.startswith("/api"):
        return False
    return method in ("GET", "HEAD") or (method == "POST" and path == _READ_BY_POST)


def _is_loopback(address: str) -> bool:
    if address.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return False
