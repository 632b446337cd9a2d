"""Addresses are read in one way and written back the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvroom.errors import ConfigurationError
from kvroom.wire.address import HostPort, is_loopback, is_wildcard, parse_address

hosts = st.ip_addresses().map(str) | st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z]{2,5})?", fullmatch=True)


@given(hosts, st.integers(0, 65535))
def test_an_address_survives_writing_and_reading(host: str, port: int) -> None:
    assert parse_address(str(HostPort(host, port))) == HostPort(host, port)


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_one_clear_error(text: str) -> None:
    fault = ""
    try:
        parsed = parse_address(text)
    except ConfigurationError as error:
        fault = str(error)
    if fault:
        assert repr(text) in fault
        assert "write host:port" in fault
    else:
        assert parsed.host
        assert 0 <= parsed.port < 65536


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no port"),
        ("host", "has no port"),
        (":80", "has no port"),
        ("::1:80", "needs brackets"),
        ("[host]:80", "is not an IPv6 address"),
        ("[10.0.0.1]:80", "is not an IPv6 address"),
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


def test_loopback_and_wildcard() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.8.8.8", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "example.org", ""]))
    assert all(map(is_wildcard, ["0.0.0.0", "::", ""]))
    assert not any(map(is_wildcard, ["127.0.0.1", "::1", "localhost"]))
