"""What calls may go to: by table, and by properties over Python's own `ipaddress`."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from taskplatform.addresses import METADATA, TARGET_RULE, AllowList, Target, address_class
from taskplatform.errors import SettingsError
from taskplatform.settings import load_settings

unhurried = settings(deadline=None)  # a busy machine is no fault
PUBLIC = AllowList()
METADATA_ADDRESSES = [
    "169.254.169.254",
    "169.254.170.2",
    "169.254.170.23",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "fd00:ec2::254",
    "fd00:ec2::23",
    "fd20:ce::254",
    "fd00:42::42",
    "fd00:c1::a9fe:a9fe",
]


def allow(*entries: str) -> AllowList:
    return AllowList(map(Target.parse, entries))


def mapped(address: IPv4Address) -> IPv6Address:
    return IPv6Address(int(IPv6Address("::ffff:0:0")) + int(address))


def behind_nat64(address: IPv4Address) -> IPv6Address:
    return IPv6Address(int(IPv6Address("64:ff9b::")) + int(address))


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("0.0.0.0", "unspecified"),
        ("0.255.255.255", "unspecified"),
        ("1.0.0.0", None),
        ("9.255.255.255", None),
        ("10.0.0.0", "private"),
        ("10.255.255.255", "private"),
        ("11.0.0.0", None),
        ("100.63.255.255", None),
        ("100.64.0.0", "shared"),
        ("100.127.255.255", "shared"),
        ("100.128.0.0", None),
        ("126.255.255.255", None),
        ("127.0.0.0", "loopback"),
        ("127.0.0.1", "loopback"),
        ("127.255.255.255", "loopback"),
        ("128.0.0.0", None),
        ("169.253.255.255", None),
        ("169.254.0.1", "link-local"),
        ("169.255.0.0", None),
        ("172.15.255.255", None),
        ("172.16.0.0", "private"),
        ("172.31.255.255", "private"),
        ("172.32.0.0", None),
        ("192.0.0.1", "reserved"),
        ("192.0.1.0", None),
        ("192.0.2.1", "documentation"),
        ("192.88.99.1", "6to4"),
        ("192.167.255.255", None),
        ("192.168.0.1", "private"),
        ("192.169.0.0", None),
        ("198.17.255.255", None),
        ("198.18.0.1", "benchmarking"),
        ("198.19.255.255", "benchmarking"),
        ("198.20.0.0", None),
        ("198.51.100.7", "documentation"),
        ("203.0.113.255", "documentation"),
        ("223.255.255.255", None),
        ("224.0.0.1", "multicast"),
        ("239.255.255.255", "multicast"),
        ("240.0.0.1", "reserved"),
        ("255.255.255.255", "reserved"),
        ("8.8.8.8", None),
        ("::", "unspecified"),
        ("::1", "loopback"),
        ("::2", "reserved"),
        ("::127.0.0.1", "reserved"),
        ("::8.8.8.8", "reserved"),
        ("::ffff:127.0.0.1", "loopback"),
        ("::ffff:7f00:1", "loopback"),
        ("::ffff:10.1.2.3", "private"),
        ("::ffff:169.254.169.254", METADATA),
        ("::ffff:8.8.8.8", None),
        ("::ffff:0:127.0.0.1", "reserved"),
        ("64:ff9b::7f00:1", "loopback"),
        ("64:ff9b::10.0.0.1", "private"),
        ("64:ff9b::169.254.169.254", METADATA),
        ("64:ff9b::8.8.8.8", None),
        ("64:ff9b:1::a00:1", "private"),
        ("100::1", "reserved"),
        ("1fff:ffff::1", "reserved"),
        ("2001::1", "Teredo"),
        ("2001:0:4136:e378:8000:63bf:f5ff:fffe", "Teredo"),
        ("2001:2::1", "benchmarking"),
        ("2001:1ff::1", "reserved"),
        ("2001:200::1", None),
        ("2001:db8::1", "documentation"),
        ("2002:7f00:1::1", "6to4"),
        ("2002:808:808::1", "6to4"),
        ("2606:4700:4700::1111", None),
        ("2606:4700:4700::1111%2", "scoped"),
        ("3fff::1", "documentation"),
        ("4000::1", "reserved"),
        ("5f00::1", "reserved"),
        ("fc00::1", "private"),
        ("fdff::1", "private"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("fec0::1", "private"),
        ("ff02::1", "multicast"),
        *((address, METADATA) for address in METADATA_ADDRESSES),
    ],
)
def test_what_an_address_is(address: str, kind: str | None) -> None:
    assert address_class(ip_address(address)) == kind
    refusal = PUBLIC.refusal("host.example", 443, address)
    assert (refusal is None) == (kind is None)
    assert refusal is None or f"address {address} ({kind}) of host host.example is not allowed" in refusal


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    """By Python's own tables."""
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_link_local or address.is_unspecified)


SPECIAL = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.168.0.0/16"),
    *("198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4"),
]


@unhurried
@given(st.ip_addresses(v=4) | st.sampled_from(SPECIAL).flatmap(lambda text: st.ip_addresses(network=text)))
def test_no_ipv4_address_that_is_not_public_gets_through(address: IPv4Address) -> None:
    for form in (address, mapped(address), behind_nat64(address)):
        if PUBLIC.refusal("a.example", 80, str(form)) is None:
            assert _is_public(address)
    assert PUBLIC.refusal("a.example", 80, str(IPv6Address(int(address)))) is not None, "the IPv4-compatible form"
    assert PUBLIC.refusal("a.example", 80, str(IPv6Address((0x2002 << 112) + (int(address) << 80)))) is not None, "6to4"
    teredo = (0x20010000 << 96) + (int(address) ^ 0xFFFF_FFFF)
    assert PUBLIC.refusal("a.example", 80, str(IPv6Address(teredo))) is not None, "Teredo"


@unhurried
@given(st.ip_addresses(v=6))
@example(IPv6Address("fe80::1%lo"))
@example(IPv6Address("64:ff9b::100:0"))
@example(IPv6Address("::ffff:b00:0"))
def test_no_ipv6_address_that_is_not_public_gets_through(address: IPv6Address) -> None:
    if PUBLIC.refusal("a.example", 80, str(address)) is None:
        inner = any(address in IPv6Network(network) for network in ("::ffff:0:0/96", "64:ff9b::/96"))
        assert _is_public(IPv4Address(int(address) & 0xFFFF_FFFF) if inner else address)
        assert inner or address in IPv6Network("2000::/3")


def test_what_is_public_is_not_refused() -> None:
    """So that the properties above are not kept by refusing all."""
    for address in ("8.8.8.8", "1.1.1.1", "93.184.215.14", "2606:4700::1111", "2a00:1450:4001::200e", "64:ff9b::8.8.8.8"):
        assert PUBLIC.refusal("a.example", 80, address) is None


# --- the allow list --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "host", "port", "address", "allowed"),
    [
        ("10.0.0.5", "a.example", 80, "10.0.0.5", True),
        ("10.0.0.5", "a.example", 80, "10.0.0.6", False),
        ("10.0.0.5", "10.0.0.5", 80, "10.0.0.5", True),
        ("10.0.0.0/8", "a.example", 80, "10.9.9.9", True),
        ("10.0.0.0/8", "a.example", 80, "11.0.0.0", True),
        ("10.0.0.0/8", "a.example", 80, "192.168.0.1", False),
        ("10.0.0.0/8:8080", "a.example", 8080, "10.9.9.9", True),
        ("10.0.0.0/8:8080", "a.example", 80, "10.9.9.9", False),
        ("10.0.0.0/8", "a.example", 80, "::ffff:10.0.0.5", True),
        ("::ffff:10.0.0.0/104", "a.example", 80, "10.0.0.5", True),
        ("[64:ff9b::10.0.0.5]:80", "a.example", 80, "10.0.0.5", True),
        ("fd00::/8", "a.example", 80, "fd12::1", True),
        ("[fd00::/8]", "a.example", 80, "fd12::1", True),
        ("[fd00::5]:443", "a.example", 443, "fd00::5", True),
        ("[fd00::5]:443", "a.example", 80, "fd00::5", False),
        ("::1", "localhost", 80, "::1", True),
        ("::1", "localhost", 80, "127.0.0.1", False),
        ("fe80::/10", "a.example", 80, "fe80::1%2", True),
        ("api.internal", "api.internal", 80, "10.0.0.5", True),
        ("API.Internal.", "api.internal", 80, "10.0.0.5", True),
        ("api.internal", "API.INTERNAL.", 80, "10.0.0.5", True),
        ("api.internal", "x.api.internal", 80, "10.0.0.5", False),
        ("api.internal", "xapi.internal", 80, "10.0.0.5", False),
        ("api.internal", "api.internal.evil.example", 80, "10.0.0.5", False),
        ("api.internal:8443", "api.internal", 8443, "10.0.0.5", True),
        ("api.internal:8443", "api.internal", 443, "10.0.0.5", False),
        ("*.internal", "a.internal", 80, "10.0.0.5", True),
        ("*.internal", "a.b.internal", 80, "10.0.0.5", True),
        ("*.internal", "internal", 80, "10.0.0.5", False),
        ("*.internal", "evilinternal", 80, "10.0.0.5", False),
        ("*.internal:80", "a.internal", 81, "10.0.0.5", False),
        ("localhost", "localhost.", 80, "127.0.0.1", True),
        ("localhost", "127.0.0.1", 80, "127.0.0.1", False),
        ("0.0.0.0/0", "a.example", 80, "127.0.0.1", True),
        ("0.0.0.0/0", "a.example", 80, "::1", False),
    ],
)
def test_what_an_entry_allows(entry: str, host: str, port: int, address: str, allowed: bool) -> None:
    assert (allow(entry).refusal(host, port, address) is None) == allowed


@pytest.mark.parametrize("address", METADATA_ADDRESSES)
def test_only_its_very_address_allows_cloud_metadata(address: str) -> None:
    wide = ("0.0.0.0/0", "::/0", "169.254.0.0/16", "169.254.169.254/31", "100.64.0.0/10", "fd00::/8", "metadata.internal", "*.internal")
    refusal = allow(*wide).refusal("metadata.internal", 80, address)
    assert refusal is not None
    assert refusal.endswith("only the address itself in http_allow can allow it")
    assert allow(address).refusal("metadata.internal", 80, address) is None
    bracketed = f"[{address}]" if ":" in address else address
    assert allow(f"{bracketed}:80").refusal("metadata.internal", 80, address) is None


networks = st.one_of(
    st.builds(lambda address, length: ip_network((int(address), length), strict=False), st.ip_addresses(v=4), st.integers(0, 32)),
    st.builds(lambda address, length: IPv6Network((int(address), length), strict=False), st.ip_addresses(v=6), st.integers(0, 128)),
)


def _holds_another(address: IPv4Address | IPv6Address) -> bool:
    """Whether it is judged as the IPv4 address that it holds."""
    return isinstance(address, IPv6Address) and any(address in IPv6Network(holding) for holding in ("64:ff9b::/96", "::ffff:0:0/96"))


@unhurried
@given(networks, st.ip_addresses())
@example(IPv4Network("0.0.0.0/0"), IPv4Address("169.254.169.254"))
@example(IPv4Network("0.0.0.0/0"), IPv6Address("::ffff:0:0"))
def test_a_network_allows_what_is_in_it_and_nothing_else(network: IPv4Network | IPv6Network, address: IPv4Address | IPv6Address) -> None:
    refusal = allow(str(network)).refusal("a.example", 80, str(address))
    if address_class(address) is None:
        assert refusal is None
    elif address not in network and not _holds_another(address):
        assert refusal is not None
    inside = network.network_address
    if _holds_another(inside):
        return
    refusal = allow(str(network)).refusal("a.example", 80, str(inside))
    assert (refusal is None) == (address_class(inside) != METADATA or network.num_addresses == 1)


@pytest.mark.parametrize(
    "entry",
    [
        "",
        " ",
        "*",
        "*.",
        "*.*.internal",
        "a.*.internal",
        "http://api.internal",
        "api.internal/path",
        "user@api.internal",
        "api internal",
        "api..internal",
        "-api.internal",
        "größe.example",
        "api.internal:0",
        "api.internal:65536",
        "api.internal:http",
        "api.internal:",
        "127.1",
        "0x7f.1",
        "0x7f000001",
        "2130706433",
        "017700000001",
        "1.2.3.4.5",
        "300.1.1.1",
        "api.1",
        "10.0.0.1/8",
        "10.0.0.0/33",
        "10.0.0.0/-1",
        "10.0.0.0/255.0.0.0",
        "fd00::1/8",
        "fd00::/129",
        "[::1",
        "::1]",
        "[localhost]:80",
        "fe80::1%eth0",
        "1:2:3:4:5:6:7:8:9",
        "a" * 254,
        "a" * 64 + ".internal",
        "١٠.0.0.5",
        None,
        5,
        ["10.0.0.5"],
    ],
)
def test_what_is_no_entry_is_refused_by_name(entry: object) -> None:
    with pytest.raises(ValueError, match=r"it takes a host name|did you mean '(10.0.0.0|fd00::)/8'") as raised:
        Target.parse(entry)
    assert repr(entry)[:70].lower() in str(raised.value).lower()


pieces = st.sampled_from(
    ["10.0.0.0", "::1", "fd00::", "[", "]", "/", "8", ":", "80", "*.", ".", "api", "%eth0", "0x7f", "internal", " ", ","]
)


@unhurried
@given(st.one_of(st.text(max_size=30), st.lists(pieces, max_size=7).map("".join)))
def test_any_text_is_an_entry_or_is_refused(text: str) -> None:
    try:
        target = Target.parse(text)
    except ValueError:
        return
    assert Target.parse(str(target)) == target
    guard = AllowList([target])
    for address in METADATA_ADDRESSES:
        assert guard.refusal("a.example", 80, address) is not None or str(target).strip("[]").startswith(address)


@unhurried
@given(st.text(max_size=30), st.integers(1, 65535), st.text(max_size=30))
def test_any_address_text_gives_an_answer(host: str, port: int, address: str) -> None:
    refusal = allow("10.0.0.0/8", "*.internal").refusal(host, port, address)
    assert refusal is None or "is not" in refusal


# --- the setting -----------------------------------------------------------------------------------------------------


def test_the_setting_takes_text_and_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().http_allow == ()
    given_list = load_settings(http_allow=["*.internal", "10.0.0.0/8:80"]).http_allow
    monkeypatch.setenv("TASKPLATFORM_HTTP_ALLOW", " *.Internal, 10.0.0.0/8:80 ,")
    assert load_settings().http_allow == given_list
    assert [str(target) for target in given_list] == ["*.internal", "10.0.0.0/8:80"]


def test_a_bad_entry_of_the_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKPLATFORM_HTTP_ALLOW", "api.internal,http://b,10.0.0.1/8")
    with pytest.raises(SettingsError) as raised:
        load_settings()
    first, second = str(raised.value).splitlines()
    assert first.startswith("TASKPLATFORM_HTTP_ALLOW (environment): ")
    assert "'http://b' is not accepted" in first
    assert TARGET_RULE in first
    assert "'10.0.0.1/8' is not a network" in second


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0x7f.1", "127.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("017700000001", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("LOCALHOST.", "127.0.0.1"),
        ("a.localhost", "127.0.0.1"),
        ("[::ffff:127.0.0.1]", "::ffff:127.0.0.1"),
        ("::1", "::1"),
    ],
)
def test_a_refusal_that_is_known_beforehand(host: str, reached: str) -> None:
    refusal = PUBLIC.foreseen_refusal(host, 80)
    assert refusal is not None
    assert f"address {reached} (loopback)" in refusal
    assert allow("127.0.0.0/8", "::1").foreseen_refusal(host, 80) is None


@pytest.mark.parametrize("host", ["8.8.8.8", "api.example.com", "localhost.example.com", "", "a..b", "\N{SNOWMAN}" * 70, "[::g]"])
def test_what_is_known_only_later_is_not_foreseen(host: str) -> None:
    assert PUBLIC.foreseen_refusal(host, 80) is None
