"""Which addresses calls may go to.

A call goes to addresses of the public internet, and to what the setting `http_allow` names. Everything else is refused:
what a definition, an answer or a name server says must not make the platform speak to its own network.

An address is judged as it is handed to the socket, whatever name or spelling led to it. IPv4 inside a mapped address
(`::ffff:10.0.0.5`) or behind the well-known NAT64 prefix (RFC 6052) counts as that IPv4 address. The networks are those of
the IANA registries of special-purpose addresses (RFC 6890); of IPv6 only what is handed out as global unicast is public.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

METADATA = "cloud metadata"
TARGET_RULE = (
    'a host name ("api.internal", "*.internal" for all below it), an address ("10.1.2.3", "fd00::5") or a network ("10.1.0.0/16"), '
    'with a port where only that is meant ("api.internal:8443", "[fd00::5]:8443", "10.1.0.0/16:8443")'
)

# The first that holds an address says what it is.
_CLASSES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        METADATA,
        (
            "169.254.169.254",  # AWS, Azure, Google Cloud, Oracle and most others
            "169.254.170.2",  # credentials of AWS containers
            "169.254.170.23",  # credentials of AWS EKS pods
            "169.254.42.42",  # Scaleway
            "169.254.0.23",  # Tencent Cloud
            "100.100.100.200",  # Alibaba Cloud
            "168.63.129.16",  # Azure's agent, although the address is a public one
            "192.0.0.192",  # Oracle Cloud, of old
            "fd00:ec2::254",  # AWS
            "fd00:ec2::23",  # credentials of AWS EKS pods
            "fd20:ce::254",  # Google Cloud
            "fd00:42::42",  # Scaleway
            "fd00:c1::a9fe:a9fe",  # Oracle Cloud
        ),
    ),
    ("unspecified", ("0.0.0.0/8", "::/128")),
    ("loopback", ("127.0.0.0/8", "::1/128")),
    ("private", ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7", "fec0::/10", "64:ff9b:1::/48")),
    ("link-local", ("169.254.0.0/16", "fe80::/10")),
    ("shared", ("100.64.0.0/10",)),
    ("benchmarking", ("198.18.0.0/15", "2001:2::/48")),
    ("documentation", ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32", "3fff::/20")),
    ("multicast", ("224.0.0.0/4", "ff00::/8")),
    # they lead into IPv4 by a relay of somebody's, also to private addresses
    ("Teredo", ("2001::/32",)),
    ("6to4", ("2002::/16", "192.88.99.0/24")),
    ("reserved", ("192.0.0.0/24", "240.0.0.0/4", "2001::/23")),
)
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_HOLDING_IPV4 = (IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96"))


def address_class(address: Address) -> str | None:
    """What an address is that calls do not go to, such as "loopback" or "cloud metadata"; None: a public one."""
    reached = _reached(address)
    for name, networks in _networks():
        if any(reached in network for network in networks):
            return name
    if isinstance(reached, IPv6Address) and reached not in _GLOBAL_UNICAST:
        return "reserved"
    # the zone of an address means something on this machine only
    return "scoped" if isinstance(reached, IPv6Address) and reached.scope_id else None


def is_public(address: str) -> bool:
    """Whether every call may go to the address that is written so."""
    try:
        return address_class(ip_address(address)) is None
    except ValueError:
        return False


@lru_cache(maxsize=1)
def _networks() -> tuple[tuple[str, tuple[Network, ...]], ...]:
    return tuple((name, tuple(ip_network(text) for text in texts)) for name, texts in _CLASSES)


def _reached(address: Address) -> Address:
    """The IPv4 address that a packet to this IPv6 address gets to, if it is one of those that hold it."""
    if isinstance(address, IPv6Address) and any(address in network for network in _HOLDING_IPV4):
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


@dataclass(frozen=True, slots=True)
class Target:
    """One entry of the allow list: a network, or a host name, and a port if only that is meant."""

    text: str
    network: Network | None = None
    host: str = ""
    """In lower case. One that begins with a dot stands for every name that ends so."""
    port: int | None = None

    @classmethod
    def parse(cls, text: object) -> Target:
        """Raises ValueError, which says what is accepted."""
        entry = text.strip().lower() if isinstance(text, str) else ""
        match = _TARGET.fullmatch(entry)
        if match is None or not _is_port(match["port"]):
            raise ValueError(f"{_shown(text)} is not accepted; it takes {TARGET_RULE}")
        port = int(match["port"]) if match["port"] else None
        if match["host"] and not _ENDS_AS_NUMBER.search(match["host"]):
            return cls(entry, host=match["host"].removeprefix("*").removesuffix("."), port=port)
        return cls(entry, network=_network(match["six"] or match["bare"] or match["host"] or match["four"]), port=port)

    def __str__(self) -> str:
        return self.text

    def allows(self, host: str, port: int, address: Address) -> bool:
        """Whether a call to this host and port may go to this address, which is one that it has."""
        if self.port not in (None, port):
            return False
        if self.network is None:
            # whoever answers for the name must not get at the machine's own credentials
            named = host.endswith(self.host) if self.host.startswith(".") else host == self.host
            return named and address_class(address) != METADATA
        reached = _reached(address)
        if self.network.num_addresses > 1 and address_class(reached) == METADATA:
            return False  # a wide network was hardly meant for it
        return reached in self.network


_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_TARGET = re.compile(
    rf"(?:\[(?P<six>[0-9a-f:./]+)\]|(?P<four>[0-9.]+/[0-9]+)|(?P<host>(?=.{{1,253}}(?::|$))(?:\*\.)?{_LABEL}(?:\.{_LABEL})*\.?))"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"|(?P<bare>[0-9a-f]*:[0-9a-f]*:[0-9a-f:./]*)",
)
_ENDS_AS_NUMBER = re.compile(r"(?:^|\.)(?:[0-9]+|0x[0-9a-f]*)\.?$")
"""Of a name that the system's resolver takes for an IPv4 address, in one of its spellings."""


def _is_port(text: str | None) -> bool:
    return text is None or 1 <= int(text) <= 65535


def _network(text: str) -> Network:
    try:
        network = ip_network(text, strict=False)
        exact = "/" not in text or ip_address(text.partition("/")[0]) == network.network_address
    except ValueError:
        raise ValueError(f"{_shown(text)} is not an address or network; it takes {TARGET_RULE}") from None
    if not exact:
        raise ValueError(f"{_shown(text)} is not a network, whose address ends where its length says (did you mean {str(network)!r}?)")
    if isinstance(network, IPv6Network) and any(network.subnet_of(holding) for holding in _HOLDING_IPV4):
        return IPv4Network((int(network.network_address) & 0xFFFF_FFFF, network.prefixlen - 96))
    return network


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class AllowList:
    """What calls may go to: public addresses, and the targets that it is made of."""

    def __init__(self, targets: Iterable[Target] = ()) -> None:
        self._targets = tuple(targets)

    def refusal(self, host: str, port: int, address: str, *, after_public: bool = False) -> str | None:
        """Why a call to `host` and `port` must not go to `address`, one of those that it has; None if it may.

        `host` is what the URL says, a name or an address; `address` is what is given to the socket, a zone included. With
        `after_public` a public target redirected the call there: then it goes to public addresses only, whatever is in the list.
        """
        try:
            ip = ip_address(address)
        except ValueError:
            return f"address {_shown(address)} is not an IP address"
        kind = address_class(ip)
        name = host.strip("[]").lower().removesuffix(".")
        if kind is None or (not after_public and any(target.allows(name, port, ip) for target in self._targets)):
            return None
        of = "" if name == address else f" of host {host}"
        if after_public:
            can = "a public target may redirect only to public ones"
        else:
            can = "only the address itself in http_allow can allow it" if kind == METADATA else "http_allow can allow it"
        return f"address {address} ({kind}){of} is not allowed; {can}"

    def foreseen_refusal(self, host: str, port: int) -> str | None:
        """The refusal that is known without asking a name server: of an address in any spelling, and of localhost."""
        name = host.strip("[]").lower().removesuffix(".")
        if name == "localhost" or name.endswith(".localhost"):
            return self.refusal(host, port, "127.0.0.1")
        try:
            found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except (OSError, UnicodeError):
            return None
        return self.refusal(host, port, str(found[0][4][0]))
