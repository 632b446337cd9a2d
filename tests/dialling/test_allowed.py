"""The list of bootstrap addresses: the addresses that an entry covers, in every spelling, and attempts to evade it."""

from __future__ import annotations

import socket

import pytest

from kvroom.dialling.allowed import AllowList, allow_list, read_allowed, require_allowed
from kvroom.dialling.names import FoundAddress
from kvroom.errors import AddressNotAllowed, ConfigurationError
from kvroom.wire.address import HostPort, parse_address

LISTS = {
    "default": allow_list(None, "127.0.0.1", None, None),
    "own host": allow_list(None, "10.0.0.2", "Worker-3.", None),
    "own directory": allow_list([], "127.0.0.1", None, "10.0.0.2:8998"),
    "network": AllowList(["10.0.0.0/8"]),
    "mapped network": AllowList(["::ffff:10.0.0.0/104"]),
    "network of IPv6": AllowList(["fd00::/8"]),
    "all of IPv6": AllowList(["::/0"]),
    "interfaces": AllowList(["fe80::/10"]),
    "address": AllowList(["[FD00::7]", "::ffff:10.0.0.4"]),
    "interface": AllowList(["fe80::1%eth0"]),
    "name": AllowList(["Prefill.PD.svc."]),
    "pattern": AllowList(["*.PD.svc."]),
    "any": AllowList(["Any"]),
    "none": AllowList([]),
}


@pytest.mark.parametrize(
    ("name", "addresses"),
    [
        ("default", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "[::ffff:127.0.0.1]:1", "localhost:1", "LOCALHOST.:1"]),
        ("own host", ["10.0.0.2:1", "worker-3:9", "WORKER-3.:9", "127.0.0.1:1"]),
        ("own directory", ["10.0.0.2:8998", "[::ffff:10.0.0.2]:8998"]),
        ("network", ["10.0.0.4:1", "[::ffff:10.0.0.4]:1", "[::FFFF:a00:4]:1"]),
        ("mapped network", ["10.0.0.4:1", "[::ffff:10.0.0.4]:1"]),
        ("network of IPv6", ["[fd00::7]:1", "[FD00:0:0::7]:1"]),
        ("interfaces", ["[fe80::1%eth0]:1", "[fe80::1%25eth0]:1"]),
        ("address", ["[fd00::7]:1", "10.0.0.4:1"]),
        ("interface", ["[fe80::1%eth0]:1", "[fe80::1%25eth0]:1", "[FE80:0::1%eth0]:1"]),
        ("name", ["prefill.pd.svc:1", "PREFILL.pd.svc.:1"]),
        ("pattern", ["prefill.pd.svc:1", "a.b.PD.SVC.:1"]),
        ("any", ["192.0.2.1:1", "[2001:db8::1]:1", "anything.example:1"]),
    ],
)
def test_what_is_listed_passes_in_every_spelling(name: str, addresses: list[str]) -> None:
    for address in addresses:
        LISTS[name].check(parse_address(address))


@pytest.mark.parametrize(
    ("name", "addresses"),
    [
        ("default", ["10.0.0.1:1", "[::]:1", "0.0.0.0:1", "[::127.0.0.1]:1", "[64:ff9b::7f00:1]:1"]),
        ("default", ["[2002:7f00:1::]:1", "169.254.169.254:1", "128.0.0.1:1", "[::2]:1"]),
        ("default", ["prefill.pd.svc:1", "localhost.example:1", "127.0.0.1.example:1", "xlocalhost:1"]),
        ("own host", ["10.0.0.3:1", "worker-31:1", "x.worker-3:1"]),
        ("own directory", ["10.0.0.2:8999", "127.0.0.1:8998", "localhost:8998"]),
        ("network", ["11.0.0.1:1", "127.0.0.1:1", "[::10.0.0.4]:1", "[fd00::7]:1", "[::1]:1"]),
        ("network of IPv6", ["10.0.0.4:1", "[fe80::1%fd00]:1", "[::ffff:10.0.0.4]:1"]),
        ("all of IPv6", ["10.0.0.4:1", "[::ffff:10.0.0.4]:1"]),
        ("address", ["[fd00::8]:1", "10.0.0.5:1", "localhost:1"]),
        ("interface", ["[fe80::1%eth1]:1", "[fe80::2%eth0]:1"]),
        ("name", ["x.prefill.pd.svc:1", "prefill.pd.svc.example:1", "pd.svc:1", "10.0.0.4:1"]),
        ("pattern", ["pd.svc:1", "xpd.svc:1", "x.pd.svc.example:1", "[fe80::1%x.pd.svc]:1", "127.0.0.1:1"]),
        ("none", ["127.0.0.1:1", "localhost:1"]),
    ],
)  # fmt: skip
def test_what_is_not_listed_is_refused_with_the_value_and_the_remedy(name: str, addresses: list[str]) -> None:
    for address in addresses:
        where = parse_address(address)
        with pytest.raises(AddressNotAllowed) as refused:
            LISTS[name].check(where)
        assert f"bootstrap address {where} is not allowed here" in str(refused.value)
        assert "--bootstrap-allow" in str(refused.value)
        assert "KVROOM_BOOTSTRAP_ALLOW" in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "0:1", "127.1:1", "10.1:1", "0177.0.0.1:1", "0x7f.0.0.1:1", "0x7f000001:1", "2130706433:1", "127.0.0.1..:1",
        "[::1%eth0]:1", "[fe80::1]:1", "127.0.0.1/8:1", "*.pd.svc:1", "10.0.0.0/8", "x@127.0.0.1:1", " 127.0.0.1:1",
    ],
)  # fmt: skip
def test_spellings_that_only_some_readers_know_are_no_addresses(text: str) -> None:
    """They are refused before the list is consulted: `inet_aton` would read some of them as 127.0.0.1."""
    with pytest.raises(ConfigurationError):
        parse_address(text)


@pytest.mark.parametrize("text", ["１２７.0.0.1:1", "127。0。0。1:1", "①27.0.0.1:1"])  # noqa: RUF001 - what is tested
def test_digits_of_other_scripts_are_read_as_the_address_that_they_are(text: str) -> None:
    where = parse_address(text)
    assert where.host == "127.0.0.1"
    with pytest.raises(AddressNotAllowed):
        AllowList(["10.0.0.0/8", "*.pd.svc"]).check(where)


def found(*addresses: str) -> list[FoundAddress]:
    """Return what a resolver gives for these addresses."""
    return [
        FoundAddress(*row)
        for address in addresses
        for row in socket.getaddrinfo(address, 8998, type=socket.SOCK_STREAM)
    ]


def hosts(answer: list[FoundAddress]) -> list[str]:
    return [each.address[0] for each in answer]


def test_of_a_name_those_addresses_are_dialled_that_are_listed() -> None:
    listed = AllowList(["10.0.0.0/8", "fd00::7"])
    where = HostPort("prefill.example", 8998)
    listed.check(where)
    answer = listed.among(where, found("127.0.0.1", "10.0.0.4", "192.0.2.1", "fd00::7", "fd00::8"))
    assert hosts(answer) == ["10.0.0.4", "fd00::7"]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::", "169.254.169.254"])
def test_a_name_that_stands_for_no_listed_address_is_refused_without_naming_them(address: str) -> None:
    where = HostPort("prefill.example", 8998)
    with pytest.raises(AddressNotAllowed, match=r"bootstrap address prefill\.example:8998 is not allowed") as refused:
        AllowList(["10.0.0.0/8"]).among(where, found(address))
    assert address not in str(refused.value).replace("10.0.0.0/8, fd00::/8", "")


def test_a_listed_name_stands_for_any_address() -> None:
    where = HostPort("prefill.pd.svc", 8998)
    for entries in (["*.pd.svc"], ["prefill.pd.svc", "fd00::/8"], ["any"]):
        assert hosts(AllowList(entries).among(where, found("192.0.2.1"))) == ["192.0.2.1"]


def test_without_a_network_an_unlisted_name_is_not_looked_up() -> None:
    where = HostPort("prefill.example", 8998)
    for listed in (AllowList(["10.0.0.4", "*.pd.svc"]), LISTS["default"], LISTS["own host"]):
        with pytest.raises(AddressNotAllowed):
            listed.check(where)
        with pytest.raises(AddressNotAllowed):
            listed.among(where, found("127.0.0.1", "10.0.0.4"))


def test_a_directory_of_ones_own_comes_and_goes() -> None:
    listed, where = AllowList([]), HostPort("127.0.0.1", 8998)
    listed.add("127.0.0.1:8998")
    listed.check(where)
    listed.remove("127.0.0.1:8998")
    with pytest.raises(AddressNotAllowed):
        listed.check(where)


@pytest.mark.parametrize(
    "entry",
    [
        "", " ", "10.0.0.1/8", "10.0.0.0/33", "10.0.0.0/255.0.0.0", "10.0.0.0/0.255.255.255", "fe80::%eth0/10", "10/8",
        "fd00::/129", "*", "*.", "*.1", "*.*.svc", "prefill-*.svc", "*pd.svc", "10.0.0.4:8998", "http://prefill",
        "127.1", "0", "fe80::1", "any/0",
    ],
)  # fmt: skip
def test_a_wrong_entry_is_named_with_what_it_may_be(entry: str) -> None:
    for given in (entry, ["fd00::/8", entry], f"fd00::/8,{entry}"):
        with pytest.raises(ConfigurationError) as wrong:
            read_allowed(given)
        assert f"entry {entry.strip()!r} of the bootstrap addresses" in str(wrong.value)
        assert "write a network (10.0.0.0/8, fd00::/8), an address, a name, a pattern (*.pd.svc) or any" in str(
            wrong.value
        )


def test_entries_come_one_by_one_or_with_commas() -> None:
    assert read_allowed("10.0.0.0/8, *.pd.svc") == ("10.0.0.0/8", "*.pd.svc")
    assert read_allowed(["10.0.0.0/8,fd00::/8", "any"]) == ("10.0.0.0/8", "fd00::/8", "any")
    assert read_allowed(None) is None
    with pytest.raises(ConfigurationError, match="entry 7 of the bootstrap addresses is not text"):
        read_allowed([7])  # type: ignore[list-item]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.2", "worker-3", "fd00::2"])
def test_beyond_loopback_a_list_is_required(host: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is not loopback, and clients name .* for example --list 10\.0"):
        require_allowed(host, None, "--list 10.0.0.0/8")
    require_allowed(host, ("any",), "--list 10.0.0.0/8")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.7", "::1", "[::1]", "localhost"])
def test_on_loopback_none_is(host: str) -> None:
    require_allowed(host, None, "--list 10.0.0.0/8")
