"""Hosts, addresses and URLs are read in every form that others write, into one, and written back the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from kvroom.errors import AuthenticationError, ConfigurationError, TransportError
from kvroom.wire.address import (
    HostPort,
    is_loopback,
    is_wildcard,
    loopback_of,
    loopback_remedy,
    parse_address,
    read_host,
    read_listen_host,
    read_url,
)

NAMES = st.from_regex(r"[a-z0-9_]([a-z0-9_-]{0,20}[a-z0-9])?(\.[a-z]{2,5}){1,2}", fullmatch=True)
SCOPED = st.builds("fe80::{:x}%{}".format, st.integers(1, 0xFFFF), st.sampled_from(["eth0", "2", "br-lan.7", "251"]))
NUMBERS = st.ip_addresses().filter(lambda ip: not ip.is_link_local).map(str)
HOSTS = NAMES | NUMBERS | SCOPED

FORMS = [
    ("10.0.0.1", "10.0.0.1"),
    ("127.0.0.1.", "127.0.0.1"),
    ("worker-3", "worker-3"),
    ("Worker-3.Example", "worker-3.example"),
    ("worker-3.example.", "worker-3.example"),
    ("my_app_prefill_1", "my_app_prefill_1"),
    ("é.example", "xn--9ca.example"),
    ("::1", "::1"),
    ("[::1]", "::1"),
    ("FD00:0:0::A", "fd00::a"),
    ("[FD00::A]", "fd00::a"),
    ("fe80::1%eth0", "fe80::1%eth0"),
    ("[fe80::1%eth0]", "fe80::1%eth0"),
    ("[fe80::1%25eth0]", "fe80::1%eth0"),
    ("FE80::1%25Br-Lan.7", "fe80::1%Br-Lan.7"),
    ("fe80::1%2", "fe80::1%2"),
    ("fe80::1%251", "fe80::1%251"),
    ("::ffff:10.0.0.1", "10.0.0.1"),
    ("[::FFFF:7f00:1]", "127.0.0.1"),
    ("\uff11\uff10.0\u30020.1", "10.0.0.1"),
]
"""Texts of other programs, and the form in which this package writes them."""

NO_HOSTS = [
    ("", "is empty"),
    ("[]", "is not an IPv6 address"),
    ("[[::1]]", "is not an IPv6 address"),
    ("[::1", "is not an IPv6 address"),
    ("::1]", "give the port separately"),
    ("[10.0.0.1]", "is not an IPv6 address"),
    ("[worker-3]", "is not an IPv6 address"),
    ("[::1]:8998", "give the port separately"),
    ("10.0.0.1:8998", "give the port separately"),
    ("http://127.0.0.1", "a URL or a path"),
    ("127.0.0.1/../", "a URL or a path"),
    ("fd00::1/64", "a URL or a path"),
    ("a b", "is not a host"),
    (" worker-3", "is not a host"),
    ("worker-3\n", "is not a host"),
    ("work\x00er", "is not a host"),
    ("user@worker-3", "is not a host"),
    ("a..b", "is not a host"),
    (".", "is not a host"),
    ("-", "is not a host"),
    ("worker-", "is not a host"),
    ("x" * 64 + ".example", "is not a host"),
    ("é" * 80, "is not a host"),
    ("x." * 130 + "x", "too long"),
    ("0", "four numbers"),
    ("127.1", "four numbers"),
    ("0x7f.0.0.1", "four numbers"),
    ("010.0.0.1", "four numbers"),
    ("10.0.0.256", "four numbers"),
    ("10.0.0.0x1", "four numbers"),
    ("fe80::1", "link-local address without its interface"),
    ("fe80::1%", "not an interface"),
    ("fe80::1%eth 0", "not an interface"),
    ("fe80::1%eth0%eth1", "not an interface"),
    ("::1%lo", "only link-local addresses"),
    ("fd00::1%eth0", "only link-local addresses"),
    ("12345::1", "is not an IPv6 address"),
    (":::", "is not an IPv6 address"),
]


@pytest.mark.parametrize(("text", "host"), FORMS)
def test_each_form_of_a_host_is_read_into_one(text: str, host: str) -> None:
    assert read_host(text) == host
    assert HostPort.of(text, 8998) == HostPort(host, 8998) == parse_address(str(HostPort(host, 8998)))


@pytest.mark.parametrize(("text", "says"), NO_HOSTS)
def test_what_is_no_host_is_named_with_the_remedy(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match="write a name, an IPv4 or an IPv6 address") as caught:
        read_host(text)
    assert repr(text) in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize("value", [None, b"worker-3", 8998, ["worker-3"]])
def test_a_host_of_another_type_is_refused(value: object) -> None:
    for read in (read_host, parse_address, read_url):
        with pytest.raises(ConfigurationError, match="not text"):
            read(value)  # type: ignore[arg-type]


def test_a_long_text_is_not_shown_whole() -> None:
    with pytest.raises(ConfigurationError, match="too long") as caught:
        read_host("x" * 1_000_000)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("port", [-1, 65536, True, "8998", 8998.0, None])
def test_a_port_is_a_number_in_range(port: object) -> None:
    with pytest.raises(ConfigurationError, match=r"is not a number in \[0, 65536\)"):
        HostPort.of("worker-3", port)  # type: ignore[arg-type]


@given(HOSTS, st.integers(0, 65535))
def test_an_address_survives_writing_and_reading(host: str, port: int) -> None:
    where = HostPort.of(host, port)
    assert parse_address(str(where)) == where == HostPort.of(where.host, port)
    assert read_url(where.url("/rooms")) == where.url("/rooms")


@given(HOSTS, st.integers(0, 65535))
def test_a_url_has_the_same_host_and_port_for_its_client(host: str, port: int) -> None:
    where = HostPort.of(host, port)
    url = URL(where.url("/rooms"))
    assert (url.host, url.port, url.path) == (where.host, port, "/rooms")


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_one_clear_error(text: str) -> None:
    detail = ""
    try:
        parsed = parse_address(text)
    except ConfigurationError as error:
        detail = str(error)
    if detail:
        assert repr(text) in detail
        assert "write host:port" in detail
    else:
        assert parsed == HostPort.of(parsed.host, parsed.port)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no port"),
        ("host", "has no port"),
        ("[::1]", "has no port"),
        (":80", "has no port"),
        ("::1:80", "needs brackets"),
        ("[host]:80", "is not an IPv6 address"),
        ("[10.0.0.1]:80", "is not an IPv6 address"),
        ("[::1]8:80", "give the port separately"),
        ("host:", "is not a number"),
        ("host:65536", "is not a number"),
        ("host:-1", "is not a number"),
        ("host:٣", "is not a number"),
        ("http://host:80", "needs brackets"),
        ("user@host:80", "is not a host"),
        ("two..dots:80", "is not a host"),
        ("x" * 64 + ".example:80", "is not a host"),
    ],
)
def test_a_malformed_address_is_named_with_the_remedy(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match="write host:port") as caught:
        parse_address(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("http://[::1]:8000/", "http://[::1]:8000"),
        ("HTTP://[FE80::1%25eth0]:80", "http://[fe80::1%25eth0]:80"),
        ("http://[fe80::1%eth0]:80", "http://[fe80::1%25eth0]:80"),
        ("http://[fe80::1%252]:80", "http://[fe80::1%252]:80"),
        ("http://[fe80::1%2]:80", "http://[fe80::1%252]:80"),
        ("https://Worker-3.:8000/pool/", "https://worker-3:8000/pool"),
        ("worker-3", "http://worker-3"),
        ("[::1]", "http://[::1]"),
    ],
)
def test_each_form_of_a_url_is_read_into_one(text: str, url: str) -> None:
    assert read_url(text) == url


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("http://x:y", "is not a number"),
        ("::1:8000", "needs brackets"),
        ("http://::1:8000", "needs brackets"),
        ("http://[[::1]]:8000", "is not an IPv6 address"),
        ("grpc://worker-3:8000", "http:// or https://"),
        ("http://", "is empty"),
        ("http://user@worker-3:8000", "not have a user, query or fragment"),
        ("worker-3:8000?x=1", "not have a user, query or fragment"),
        ("worker-3:8000/a b", "not have a user, query or fragment"),
    ],
)
def test_what_is_no_url_is_named_with_the_remedy(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match="write a URL, for example") as caught:
        read_url(text)
    assert repr(text) in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "LOCALHOST.", "::ffff:127.0.0.1"]
)
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    assert not is_wildcard(host)


WILDCARDS = ["0.0.0.0", "::", "[::]", "0:0::0", "", "::ffff:0.0.0.0", "\uff10.0.0.0"]


@pytest.mark.parametrize("host", WILDCARDS)
def test_wildcards(host: str) -> None:
    assert is_wildcard(host)
    assert not is_loopback(host)
    assert loopback_of(host) == ("::1" if host in ("::", "[::]", "0:0::0") else "127.0.0.1")


@pytest.mark.parametrize("host", ["10.0.0.1", "example.org", "fe80::1%eth0", "127.1", "a b", "localhost.example"])
def test_neither_loopback_nor_wildcard(host: str) -> None:
    assert not is_loopback(host)
    assert not is_wildcard(host)


def test_a_server_that_listens_at_one_address_is_reached_there() -> None:
    assert loopback_of("[FD00::1]") == "fd00::1"
    assert loopback_of("worker-3") == "worker-3"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        *((lambda host=host: HostPort.to_dial(host, 8998), "cannot be dialled|is empty") for host in WILDCARDS),
        (lambda: HostPort.to_dial("worker-3", 0), "port 0 of host 'worker-3' cannot be dialled"),
    ],
)
def test_what_only_listens_cannot_be_dialled(make: Callable[[], HostPort], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        make()


def test_every_interface_may_be_said_by_nothing_where_a_server_listens() -> None:
    assert read_listen_host("") == ""
    assert read_listen_host("[::]") == "::"
    with pytest.raises(ConfigurationError, match="a URL"):
        read_listen_host("http://x")


def test_the_address_of_a_socket_keeps_its_interface() -> None:
    assert str(HostPort.of_socket(("10.0.0.1", 80))) == "10.0.0.1:80"
    assert str(HostPort.of_socket(("fd00::1", 80, 0, 0))) == "[fd00::1]:80"
    assert str(HostPort.of_socket(("fe80::1", 80, 0, 4))) == "[fe80::1%4]:80"
    assert str(HostPort.of_socket(("::ffff:10.0.0.1", 80, 0, 0))) == "10.0.0.1:80"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
@pytest.mark.parametrize("error", [ConnectionRefusedError(), AuthenticationError("it is another server")])
def test_a_loopback_address_of_a_peer_has_its_remedy(host: str, error: Exception) -> None:
    assert loopback_remedy(host, error).startswith(f"; {host} is this machine itself: a worker on another machine must")


@pytest.mark.parametrize(
    ("host", "error"),
    [
        ("10.0.0.1", ConnectionRefusedError()),
        ("worker-3", ConnectionRefusedError()),
        ("127.0.0.1", TimeoutError()),
        ("127.0.0.1", TransportError("too many open files")),
    ],
)
def test_where_loopback_is_not_the_reason_no_remedy_is_named(host: str, error: Exception) -> None:
    assert loopback_remedy(host, error) == ""
