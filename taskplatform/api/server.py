"""`taskplatform api`: the application under uvicorn, over TLS.

It listens with TLS 1.2 or newer, and asks for a client certificate where CAs for these are set. Without a certificate it does not start,
unless plain HTTP is asked for: on a loopback address, or anywhere with the setting `api_insecure_http`.

SIGTERM and SIGINT end it: it takes no more connections, answers what it has been asked for some seconds, and exits with 0.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import uvicorn

from taskplatform import http, logs, tracing
from taskplatform.api.application import guarded, make_app
from taskplatform.api.guard import MOST_HEADER_BYTES, GuardedProtocol
from taskplatform.api.telling import Telling
from taskplatform.errors import SettingsError
from taskplatform.outage import when_reachable
from taskplatform.platform import Platform
from taskplatform.settings import Settings, environment

log = logging.getLogger(__name__)

#: What is being answered at the end may take so long.
GRACE_SECONDS = 10
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_IDLE_SECONDS = 5


def run(settings: Settings, *, insecure_http: bool = False) -> int:
    """Serve until a signal. Returns the exit code. Raises SettingsError, CatalogueError, StoreError."""
    for number in _SIGNALS:
        signal.signal(number, _end)
    secrets = [*settings.secrets]
    logs.log_to_stderr(settings, lambda: tuple(secrets), role="api")
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)
    context = tls_context(settings, insecure_http=insecure_http)
    listener = listen(settings)
    telling = Telling(settings)
    telling.ops.start()
    with closing(listener), closing(_reach(settings, telling)) as platform:
        configs = [definition.config for definition in platform.catalogue.values() if definition.config is not None]
        secrets += http.secrets_in(configs, environment())
        follower = logs.LevelFollower("api", f"api@{socket.gethostname()}#{os.getpid()}")
        follower.run(platform.store.log_levels, settings.heartbeat_interval.total_seconds())
        server = make_server(platform, context, telling)

        def stop(_number: int, _frame: FrameType | None) -> None:
            server.should_exit = True

        # uvicorn has its own while it serves, and raises a signal again when it has ended: the process shall end with 0
        for number in _SIGNALS:
            signal.signal(number, stop)
        log.info("listening on %s", url_of("http" if context is None else "https", listener))
        server.run(sockets=[listener])
        tracing.flush()
        telling.ops.stop()
        return 0 if server.started else 1


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    """Before it serves there is nothing to finish."""
    raise SystemExit(0)


def _reach(settings: Settings, telling: Telling) -> Platform:
    return when_reachable(partial(Platform.connect, settings, actor="api"), log, between=telling.pulse.failed)


def make_server(platform: Platform, context: ssl.SSLContext | None, telling: Telling | None = None) -> uvicorn.Server:
    """The server, without its address."""
    settings = platform.settings
    protocol = type("Protocol", (GuardedProtocol,), {"timeout": settings.api_timeout.total_seconds()})
    telling = telling or Telling(settings)
    config = uvicorn.Config(
        guarded(make_app(platform, telling), settings),
        http=protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # who may say where a request is from is not known here
        server_header=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
    )
    config.load()
    config.ssl = context
    server = uvicorn.Server(config)
    telling.stopping = lambda: server.should_exit
    return server


def listen(settings: Settings) -> socket.socket:
    """A socket that listens where the settings say. Raises SettingsError."""
    host, port = settings.api_host, settings.api_port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(512)
    except OSError as fault:
        raise SettingsError(f"api_host {host!r}, api_port {port}: cannot listen there: {fault.strerror or fault}") from None
    return listener


def url_of(scheme: str, listener: socket.socket) -> str:
    """Where a listener is reached."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def tls_context(settings: Settings, *, insecure_http: bool) -> ssl.SSLContext | None:
    """What the settings say of TLS; None: plain HTTP, where that is allowed. Raises SettingsError."""
    cert, key, client_ca = settings.api_tls_cert, settings.api_tls_key, settings.api_tls_client_ca
    if insecure_http or settings.api_insecure_http:
        if cert or key or client_ca:
            raise SettingsError("plain HTTP excludes api_tls_cert, api_tls_key and api_tls_client_ca: leave one or the other out")
        if not (settings.api_insecure_http or _is_loopback(settings.api_host)):
            raise SettingsError(
                f"api_host {settings.api_host!r} is no loopback address, and over plain HTTP keys can be read on the way: "
                "use a certificate, or set TASKPLATFORM_API_INSECURE_HTTP where something else before it does TLS"
            )
        return None
    if cert is None or key is None:
        missing = " and ".join(name for name, given in (("api_tls_cert", cert), ("api_tls_key", key)) if given is None)
        raise SettingsError(
            f"{missing}: not set, and the API speaks TLS. `taskplatform certs` makes a CA and a certificate; "
            "on a loopback address --insecure-http does without"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["http/1.1"])
    _load("api_tls_cert and api_tls_key", (cert, key), lambda: context.load_cert_chain(cert, key, password=_no_password))
    if client_ca is not None:
        _load("api_tls_client_ca", (client_ca,), lambda: context.load_verify_locations(client_ca))
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load(names: str, paths: Sequence[Path], load: Callable[[], object]) -> None:
    """Load PEM files, or say what is wrong with them. The fault's own text may quote nothing of a key."""
    for path in paths:
        try:
            path.open("rb").close()
        except OSError as fault:
            raise SettingsError(f"{names}: {path} cannot be read: {fault.strerror}") from None
    try:
        load()
    except (OSError, ValueError) as fault:  # ssl.SSLError is an OSError
        reason = getattr(fault, "reason", None) or fault
        shown = " and ".join(map(str, paths))
        raise SettingsError(f"{names}: {shown} cannot be used: {reason}; PEM is accepted, the key without a password") from None


def _no_password() -> str:
    raise ValueError("the key has a password")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
