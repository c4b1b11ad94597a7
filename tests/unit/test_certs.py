"""Certificates, held against OpenSSL: handshakes over real sockets, checked as strictly as it can."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from taskplatform.certs import make, show
from taskplatform.cli import cli, main
from taskplatform.errors import Conflict, InvalidInput, NotFound, TaskPlatformError

DAY_MS = 86_400_000


def now_ms() -> int:
    return int(datetime.now(UTC).timestamp() * 1000)


def certificate(folder: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / f"{name}.crt").read_bytes())


def strict(context: ssl.SSLContext) -> ssl.SSLContext:
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def handshake(folder: Path, host: str, *, client: str | None = None, ask: bool = False, trust: Path | None = None) -> bytes:
    """What a server with the folder's certificate says to a client that knows it by `host`. Raises ssl.SSLError as the client meets it.

    `ask`: the server takes only clients with a certificate of the folder's CA.
    """
    at_server = strict(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    at_server.load_cert_chain(folder / "server.crt", folder / "server.key")
    if ask:
        at_server.load_verify_locations(folder / "ca.crt")
        at_server.verify_mode = ssl.CERT_REQUIRED
    at_client = strict(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    at_client.load_verify_locations((trust or folder) / "ca.crt")
    if client is not None:
        at_client.load_cert_chain((trust or folder) / f"{client}.crt", (trust or folder) / f"{client}.key")
    here, there = socket.socketpair()
    here.settimeout(30)
    there.settimeout(30)

    def serve() -> None:
        try:
            with at_server.wrap_socket(there, server_side=True) as connection:
                peer: Any = connection.getpeercert() or {}
                name = dict(part[0] for part in peer.get("subject", ())).get("commonName", "nobody")
                connection.sendall(f"hello {name}".encode())
        except OSError:
            there.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with at_client.wrap_socket(here, server_hostname=host) as connection:
            return connection.recv(100)
    finally:
        here.close()
        thread.join(30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("certificates") / "certs"
    hosts = ("API.example.com", "*.jobs.example.com", "10.1.2.3", "[fe80::1]", "bücher.example")
    assert make(path, hosts=hosts, clients=["alice"]) == ["ca", "server", "client-alice"]
    return path


@pytest.mark.parametrize("host", ["api.example.com", "a.jobs.example.com", "10.1.2.3", "fe80::1", "xn--bcher-kva.example"])
def test_a_client_that_trusts_the_ca_meets_the_server(folder: Path, host: str) -> None:
    assert handshake(folder, host) == b"hello nobody"


@pytest.mark.parametrize("host", ["example.com", "a.b.jobs.example.com", "jobs.example.com", "10.1.2.4", "fe80::2", "localhost"])
def test_a_host_that_is_not_in_the_certificate_is_refused(folder: Path, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"Hostname mismatch|IP address mismatch"):
        handshake(folder, host)


def test_clients_need_a_certificate_where_the_server_asks(folder: Path, tmp_path: Path) -> None:
    assert handshake(folder, "10.1.2.3", client="client-alice", ask=True) == b"hello alice"
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
        handshake(folder, "10.1.2.3", ask=True)
    make(tmp_path, clients=["alice"])
    (tmp_path / "ca.crt").write_bytes((folder / "ca.crt").read_bytes())
    with pytest.raises(ssl.SSLError, match=r"UNKNOWN_CA|DECRYPT_ERROR"):
        handshake(folder, "10.1.2.3", client="client-alice", ask=True, trust=tmp_path)


def test_purposes_are_not_exchanged(folder: Path, tmp_path: Path) -> None:
    """A client's certificate is none for a server, nor the other way round."""
    with pytest.raises(ssl.SSLError, match="UNSUPPORTED_CERTIFICATE"):
        handshake(folder, "10.1.2.3", client="server", ask=True)
    for name in ("crt", "key"):
        (tmp_path / f"server.{name}").write_bytes((folder / f"client-alice.{name}").read_bytes())
    (tmp_path / "ca.crt").write_bytes((folder / "ca.crt").read_bytes())
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        handshake(tmp_path, "alice")


def test_another_ca_is_refused(folder: Path, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"unable to get local issuer|unable to verify"):
        handshake(folder, "10.1.2.3", trust=tmp_path)


def test_what_the_certificates_say(folder: Path) -> None:
    ca, server, client = (certificate(folder, name) for name in ("ca", "server", "client-alice"))
    for one, purpose in ((ca, None), (server, "serverAuth"), (client, "clientAuth")):
        assert one.extensions.get_extension_for_class(x509.BasicConstraints).critical
        assert one.extensions.get_extension_for_class(x509.KeyUsage).critical
        assert one.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        assert one.serial_number.bit_length() <= 159
        usage = one.extensions.get_extension_for_class(x509.KeyUsage).value
        assert (usage.key_cert_sign, usage.digital_signature) == ((True, False) if purpose is None else (False, True))
        if purpose is not None:
            purposes = one.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
            assert [each._name for each in purposes] == [purpose]
            assert one.not_valid_after_utc - one.not_valid_before_utc == timedelta(days=397)
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    assert ca.not_valid_after_utc - ca.not_valid_before_utc == timedelta(days=3650)
    assert len({one.serial_number for one in (ca, server, client)}) == 3


def test_keys_are_readable_by_their_owner_alone(folder: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    names = ("ca", "server", "client-alice")
    assert modes == {**{f"{name}.key": 0o600 for name in names}, **{f"{name}.crt": 0o644 for name in names}}


# --- again -----------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_nothing_that_is_there_is_overwritten(tmp_path: Path) -> None:
    make(tmp_path, hosts=["a.example"])
    before = contents(tmp_path)
    assert make(tmp_path) == []
    assert make(tmp_path, hosts=["a.example"]) == []
    with pytest.raises(Conflict, match=r"server\.crt is for a\.example: `--renew` makes one for b\.example"):
        make(tmp_path, hosts=["b.example"])
    assert contents(tmp_path) == before
    assert make(tmp_path, clients=["bob", "bob"]) == ["client-bob"]
    assert before.items() <= contents(tmp_path).items()
    assert handshake(tmp_path, "a.example", client="client-bob", ask=True) == b"hello bob"


def test_renewing_keeps_the_ca_and_the_hosts(tmp_path: Path) -> None:
    make(tmp_path, hosts=["a.example"], clients=["alice"])
    before = contents(tmp_path)
    assert make(tmp_path, renew=True) == ["server"]
    after = contents(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"server.crt", "server.key"}
    assert handshake(tmp_path, "a.example") == b"hello nobody"
    assert make(tmp_path, hosts=["b.example"], renew=True) == ["server"]
    assert handshake(tmp_path, "b.example") == b"hello nobody"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, "a.example")


def test_force_makes_all_anew(tmp_path: Path) -> None:
    make(tmp_path)
    before = contents(tmp_path)
    (tmp_path / "ca.crt").write_text("broken")
    assert make(tmp_path, force=True) == ["ca", "server"]
    assert not before.items() & contents(tmp_path).items()
    assert handshake(tmp_path, "::1") == b"hello nobody"


def test_what_cannot_be_signed_with_is_said_and_nothing_is_written(tmp_path: Path) -> None:
    make(tmp_path)
    key = (tmp_path / "ca.key").read_bytes()
    for content, said in ((None, "No such file"), (b"", "not a key"), ((tmp_path / "server.key").read_bytes(), "not the key of")):
        (tmp_path / "ca.key").unlink()
        if content is not None:
            (tmp_path / "ca.key").write_bytes(content)
        before = contents(tmp_path)
        with pytest.raises(Conflict, match=said):
            make(tmp_path, renew=True)
        assert contents(tmp_path) == before
        (tmp_path / "ca.key").write_bytes(key)
    (tmp_path / "ca.crt").unlink()
    with pytest.raises(Conflict, match=r"no ca\.crt"):
        make(tmp_path)
    (tmp_path / "server.crt").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(Conflict, match=r"server\.crt is not a certificate"):
        make(tmp_path)


def test_nothing_outlives_its_ca(tmp_path: Path) -> None:
    make(tmp_path, ca_lifetime=timedelta(days=10))
    assert certificate(tmp_path, "server").not_valid_after_utc == certificate(tmp_path, "ca").not_valid_after_utc


def test_an_expired_ca_signs_nothing(tmp_path: Path) -> None:
    make(tmp_path, ca_lifetime=timedelta(minutes=30))  # it began an hour ago
    with pytest.raises(Conflict, match=r"ca\.crt expired on"):
        make(tmp_path, renew=True)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(tmp_path, "localhost")


@pytest.mark.parametrize(
    "host", ["", " ", "a b", "-a.example", "a..b", "a.example:443", "https://a", "1.2.3", "256.1.1.1", "*", "a.*.b", "x" * 300, "*.*.a"]
)
def test_a_host_that_is_none_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(InvalidInput, match="is neither a DNS name"):
        make(tmp_path / "none", hosts=[host])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("client", ["", "../x", "a/b", "ä", "x" * 65, "a\n"])
def test_a_client_that_is_none_is_refused(tmp_path: Path, client: str) -> None:
    with pytest.raises(InvalidInput, match="client name"):
        make(tmp_path / "none", clients=[client])
    assert not (tmp_path / "none").exists()


@given(st.text(max_size=60))
def test_any_text_as_a_host_is_taken_or_refused_in_words(text: str) -> None:
    from taskplatform.certs import _general_name

    try:
        name = _general_name(text)
    except TaskPlatformError:
        return
    assert isinstance(name, x509.DNSName | x509.IPAddress)


# --- the commands ----------------------------------------------------------------------------------------------------


def test_states(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no certificates in"):
        show(tmp_path)
    make(tmp_path, lifetime=timedelta(days=40))
    ca, server = show(tmp_path)
    assert (ca.name, server.name, server.hosts) == ("ca", "server", ("localhost", "127.0.0.1", "::1"))
    now = now_ms()
    at = {"not valid yet": now - DAY_MS, "valid": now, "expires soon": now + 11 * DAY_MS, "expired": now + 41 * DAY_MS}
    assert {state: server.state(instant) for state, instant in at.items()} == {state: state for state in at}
    other = tmp_path / "other"
    make(other)
    (tmp_path / "ca.crt").write_bytes((other / "ca.crt").read_bytes())
    assert show(tmp_path)[1].state(now) == "of another CA"


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["certs", "--host", "api.example.com", "--client", "alice", "--days", "20"]) == 0
    said = capsys.readouterr()
    assert [line.split("\t")[:2] for line in said.out.splitlines()[1:]] == [
        ["certs/ca.crt", "made"],
        ["certs/server.crt", "made"],
        ["certs/client-alice.crt", "made"],
    ]
    assert "clients trust certs/ca.crt" in said.err
    assert "PRIVATE" not in said.out + said.err
    assert main(["certs"]) == 0
    assert "nothing was made" in capsys.readouterr().err
    assert main(["certs", "show"]) == 0
    assert "certs/server.crt\texpires soon\t" in capsys.readouterr().out
    assert main(["certs", "--host", "other.example"]) == 1
    assert capsys.readouterr().err.startswith("error: certs/server.crt is for api.example.com")
    assert main(["certs", "show", "--dir", "nowhere"]) == 1
    assert capsys.readouterr().err == "error: no certificates in nowhere\n"
    (tmp_path / "file").touch()
    assert main(["certs", "--dir", "file/below"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert CliRunner().invoke(cli, ["certs", "--days", "0"]).exit_code == 2
