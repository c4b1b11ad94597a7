"""What `taskplatform verify` says of the API's and Redis' connections: real servers, good ones and bad ones."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from taskplatform.catalogue import Catalogue
from taskplatform.local import EmbeddedServer, find_port
from taskplatform.platform import Platform
from taskplatform.settings import load_settings
from taskplatform.store import Store
from taskplatform.verification import doors
from taskplatform.verification.jobs import Drill, Finding, NotRun
from tests.integration.apiserver import KEY, Api, certificates, running_api
from tests.tls import ADMIN, tls_redis


@pytest.fixture(scope="module")
def api(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("api"), server.url) as running:
        yield running


def _drill(store: Store, **settings: Any) -> Drill:
    chosen = load_settings(**settings)
    return Drill(Platform(store, Catalogue(), chosen, actor="test"), chosen, timeout=timedelta(seconds=5))


class _AnswersAll(BaseHTTPRequestHandler):
    """Lets everybody in, whatever key they show."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextmanager
def _open_door(context: ssl.SSLContext | None = None) -> Iterator[int]:
    """Its port."""
    server = HTTPServer(("127.0.0.1", 0), _AnswersAll)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(60)


def test_a_good_api_passes(store: Store, api: Api) -> None:
    found = doors.api(_drill(store), url=api.url, ca=api.ca, key=KEY)
    assert found.faults == []
    assert found.facts["tls"] in ("TLSv1.2", "TLSv1.3")
    assert {name: found.facts[name] for name in ("no_key", "a_wrong_key", "the_key_that_was_given", "plain_http")} == {
        "no_key": 401,
        "a_wrong_key": 401,
        "the_key_that_was_given": 200,
        "plain_http": False,
    }
    assert found.facts["tls_1_1"] != "accepted"
    assert "no key 401, a wrong key 401" in found.said[0]


def test_a_wrong_key_that_was_given_and_a_ca_that_was_not(store: Store, api: Api) -> None:
    found = doors.api(_drill(store), url=api.url, ca=api.ca, key="not-the-key-" + "0" * 30)
    assert found.faults == ["with the key that was given it answers 401, and not 200"]
    (fault,) = doors.api(_drill(store), url=api.url, ca=None, key=None).faults
    assert "verifies its certificate" in fault
    assert fault.endswith("--api-ca names the CA of its certificate")


def test_an_api_that_lets_everybody_in_fails(store: Store, tmp_path: Path) -> None:
    with _open_door() as port:
        found = doors.api(_drill(store), url=f"http://127.0.0.1:{port}", ca=None, key=None)
        assert found.faults == ["with no key it answers 200, and not 401", "with a wrong key it answers 200, and not 401"]
        # found where the settings say
        named = doors.api(_drill(store, api_insecure_http=True, api_port=port), url=None, ca=None, key=None)
        assert named.faults == found.faults
        # and no TLS where TLS is asked for
        (fault,) = doors.api(_drill(store), url=f"https://127.0.0.1:{port}", ca=None, key=None).faults
        assert "no TLS with" in fault


def test_old_tls_is_found(store: Store, tmp_path: Path) -> None:
    _, files = certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files["api_tls_cert"], files["api_tls_key"])
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = ssl.TLSVersion.TLSv1_1
    with _open_door(context) as port:
        found = doors.api(_drill(store), url=f"https://127.0.0.1:{port}", ca=tmp_path / "ca.pem", key=None)
    assert found.facts["tls_1_1"] == "accepted"
    assert "it accepts TLS 1.1" in found.faults


def test_no_api_is_no_fault_unless_somebody_names_it(store: Store) -> None:
    port = find_port()
    with pytest.raises(NotRun, match="no API was found"):
        doors.api(_drill(store, api_port=port), url=None, ca=None, key=None)
    (fault,) = doors.api(_drill(store), url=f"https://127.0.0.1:{port}", ca=None, key=None).faults
    assert "is not reached" in fault


def _redis(store: Store, url: str, ca: Path | None) -> Finding:
    return doors.redis_tls(_drill(store, redis_url=url, **({} if ca is None else {"redis_ca": ca})))


def test_redis_with_tls_and_without(store: Store, server: EmbeddedServer, tmp_path: Path) -> None:
    with pytest.raises(NotRun, match="its URL begins with redis://"):
        _redis(store, server.url, None)
    with tls_redis(tmp_path / "redis", {}, {}) as secure:
        found = _redis(store, secure.url(ADMIN), secure.ca)
        assert found.faults == []
        assert (found.facts["plain"], found.facts["without_password"], found.facts["tls"]) == (False, False, "TLSv1.3")
        assert "admin-password" not in str(found)
        (fault,) = _redis(store, secure.url(ADMIN), None).faults
        assert "verifies its certificate" in fault
        with secure.client() as client:
            client.acl_setuser("default", enabled=True, nopass=True, categories=["+@all"], keys=["*"])
        assert f"localhost:{secure.port} answers without a password" in _redis(store, secure.url(ADMIN), secure.ca).faults
    (fault,) = _redis(store, f"rediss://127.0.0.1:{server.port}/0", None).faults
    assert "no TLS with" in fault
