"""A certificate authority of one's own, and what it signs: the API's certificate, and certificates of clients.

A folder has `ca.crt` and `ca.key`, `server.crt` and `server.key`, and for each client `client-<name>.crt` and `client-<name>.key`. All are
PEM; keys are EC P-256, PKCS #8 without a password, and readable by their owner alone. Clients need `ca.crt`; `ca.key` is needed to sign
only, and need not lie where the server runs.

Certificates follow RFC 5280, also where OpenSSL checks that strictly (`VERIFY_X509_STRICT`).
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from taskplatform.errors import Conflict, InvalidInput, NotFound

CA_LIFETIME = timedelta(days=3650)
#: Some clients accept no certificate of a server that is valid longer than 398 days.
LIFETIME = timedelta(days=397)
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", re.ASCII)
_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)", re.ASCII)
#: A clock of another machine may be behind by so much.
_SKEW = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Certificate:
    """One certificate in a folder."""

    name: str
    """`ca`, `server` or `client-<name>`."""
    hosts: tuple[str, ...]
    """For whom a server's is valid; none for the others."""
    valid_from_ms: int
    expires_ms: int
    fingerprint: str
    """SHA-256, in hexadecimal digits."""
    issued_by_ca: bool
    """Whether the folder's CA signed it."""

    def state(self, now_ms: int) -> str:
        """`valid`, `expires soon` (within 30 days), `expired`, `not valid yet` or `of another CA`, at that time."""
        if not self.issued_by_ca:
            return "of another CA"
        if now_ms < self.valid_from_ms:
            return "not valid yet"
        if now_ms >= self.expires_ms:
            return "expired"
        return "expires soon" if self.expires_ms - now_ms < 30 * 86_400_000 else "valid"


@dataclass(frozen=True, slots=True)
class _Signer:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make(
    folder: Path,
    *,
    hosts: Sequence[str] = (),
    clients: Sequence[str] = (),
    lifetime: timedelta = LIFETIME,
    ca_lifetime: timedelta = CA_LIFETIME,
    renew: bool = False,
    force: bool = False,
) -> list[str]:
    """Make what is missing of CA, server and `clients`, and return the names of what was made.

    `hosts` are DNS names (`*.` may begin one) and IP addresses; without any they are those of the server's certificate that is there, or
    LOCAL_HOSTS. `renew` makes the server's certificate and those of `clients` anew with the CA that is there, `force` all of
    them and the CA. Nothing lives longer than the CA.

    Raises InvalidInput for a host or a name that is none; Conflict when something is there that differs from what was asked for, or
    cannot be used, and neither `renew` nor `force` is given. Then nothing was written.
    """
    names = [_general_name(host) for host in hosts]
    for client in clients:
        if not CLIENT_NAME.fullmatch(client):
            raise InvalidInput(
                f"client name {client!r} is not accepted: 1 to 64 characters: letters, digits and . _ @ -, the first a letter or digit"
            )
    if min(lifetime, ca_lifetime) <= timedelta():
        raise InvalidInput("a certificate is valid for a day at least")
    there = {} if force else _read(folder)
    server = there.get("server")
    if not names and server is not None:
        names = _names_of(server)
    names = names or [_general_name(host) for host in LOCAL_HOSTS]
    if server is not None and not renew and set(names) != set(_names_of(server)):
        raise Conflict(f"{folder / 'server.crt'} is for {', '.join(_hosts_of(server))}: `--renew` makes one for {', '.join(hosts)}")

    ca, made = _signer(folder, there, ca_lifetime)
    if renew or server is None:
        made["server"] = _issue(ca, "taskplatform server", names, ExtendedKeyUsageOID.SERVER_AUTH, lifetime)
    for client in dict.fromkeys(clients):
        if renew or f"client-{client}" not in there:
            made[f"client-{client}"] = _issue(ca, client, (), ExtendedKeyUsageOID.CLIENT_AUTH, lifetime)
    _write(folder, made)
    return list(made)


def show(folder: Path) -> list[Certificate]:
    """The certificates in a folder: CA, server, clients.

    Raises NotFound where there is none, and Conflict for a file that is no certificate.
    """
    there = _read(folder)
    if not there:
        raise NotFound(f"no certificates in {folder}")
    return [
        Certificate(
            name=name,
            hosts=_hosts_of(certificate),
            valid_from_ms=_instant_ms(certificate.not_valid_before_utc),
            expires_ms=_instant_ms(certificate.not_valid_after_utc),
            fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
            issued_by_ca="ca" in there and _is_issued_by(certificate, there["ca"]),
        )
        for name, certificate in there.items()
    ]


# --- making ----------------------------------------------------------------------------------------------------------

_Made = dict[str, _Signer]


def _signer(folder: Path, there: dict[str, x509.Certificate], lifetime: timedelta) -> tuple[_Signer, _Made]:
    """The folder's CA, made if it has none."""
    certificate = there.get("ca")
    if certificate is None:
        if there:
            raise Conflict(f"{folder} has certificates, and no ca.crt: put it back, or make all anew with `--force`")
        ca = _new_ca(lifetime)
        return ca, {"ca": ca}
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        raise Conflict(f"{folder / 'ca.crt'} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: make all anew with `--force`")
    path = folder / "ca.key"
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as fault:
        raise Conflict(f"{path} cannot be read, and nothing can be signed without it: {fault.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise Conflict(f"{path} is not a key that can be read") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise Conflict(f"{path} is not the key of ca.crt")
    return _Signer(certificate, key), {}


def _new_ca(lifetime: timedelta) -> _Signer:
    key = ec.generate_private_key(ec.SECP256R1())
    # with a part of its own, so that two CAs, also an old and a new one, are not taken for each other
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"taskplatform CA {os.urandom(4).hex()}")])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _builder(name, name, key, lifetime, None)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return _Signer(certificate, key)


def _issue(
    ca: _Signer, common_name: str, names: Sequence[x509.GeneralName], purpose: x509.ObjectIdentifier, lifetime: timedelta
) -> _Signer:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    identifier = ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        _builder(subject, ca.certificate.subject, key, lifetime, ca.certificate.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return _Signer(builder.sign(ca.key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, lifetime: timedelta, latest: datetime | None
) -> x509.CertificateBuilder:
    now = datetime.now(UTC).replace(microsecond=0)
    ends = now + lifetime - _SKEW
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(min(ends, latest) if latest is not None else ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        pass
    wildcard = "*." if host.startswith("*.") else ""
    try:
        name = host.removeprefix(wildcard).lower().encode("idna").decode("ascii")
    except UnicodeError:
        name = ""
    labels = name.split(".")
    # the last label of a name is never a number, else it would be a wrong address
    if not name or len(name) > 250 or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():
        raise InvalidInput(f"host {host!r} is neither a DNS name, such as api.example.com or *.example.com, nor an IP address")
    return x509.DNSName(wildcard + name)


# --- files -----------------------------------------------------------------------------------------------------------


def _read(folder: Path) -> dict[str, x509.Certificate]:
    """By name, the certificates that are there: CA, server, clients."""
    found = {}
    for path in [folder / "ca.crt", folder / "server.crt", *sorted(folder.glob("client-*.crt"))]:
        try:
            found[path.stem] = x509.load_pem_x509_certificate(path.read_bytes())
        except FileNotFoundError:
            continue
        except OSError as fault:
            raise Conflict(f"{path} cannot be read: {fault.strerror}") from None
        except ValueError:
            raise Conflict(f"{path} is not a certificate in PEM") from None
    return found


def _write(folder: Path, made: _Made) -> None:
    """Each file is replaced at once, the key before its certificate."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, signer in made.items():
            private = signer.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            _replace(folder / f"{name}.key", private, 0o600)
            _replace(folder / f"{name}.crt", signer.certificate.public_bytes(Encoding.PEM), 0o644)
    except OSError as fault:
        raise Conflict(f"{fault.filename or folder} cannot be written: {fault.strerror}") from None


def _replace(path: Path, content: bytes, mode: int) -> None:
    # mkstemp makes it readable by its owner alone, from the first moment
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(descriptor, mode)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _names_of(certificate: x509.Certificate) -> list[x509.GeneralName]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def _hosts_of(certificate: x509.Certificate) -> tuple[str, ...]:
    return tuple(str(name.value) for name in _names_of(certificate))


def _is_issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except Exception:  # of several kinds, by what does not fit
        return False
    return True


def _instant_ms(instant: datetime) -> int:
    return int(instant.timestamp() * 1000)
