"""A server that listens at every interface is reached at an address of this machine and of its family."""

from __future__ import annotations

import ipaddress
import shutil
import socket
import subprocess
import sys

import pytest

from kvroom.dialling.advertised import advertised_host
from kvroom.errors import ConfigurationError

IN_A_NETWORK = ["unshare", "--map-root-user", "--net", "sh", "-e", "-c"]
"""Command that runs a script in a new network namespace, where it may create interfaces."""
ONE = "ip link set lo up; ip link add v0 type veth peer name v1; ip addr add 10.7.0.1/24 dev v0; ip link set v0 up;"
ONE += "ip link set v1 up; ip -6 addr add fd77::1/64 dev v0 nodad;"
TWO = f"{ONE} ip addr add 10.8.0.1/24 dev v1; ip -6 addr add fd78::1/64 dev v1 nodad;"
ROUTED = f"{TWO} ip route add default via 10.8.0.7; ip -6 route add default via fd78::7;"
ASK = f"""exec {sys.executable} -c '
import sys
from kvroom.dialling.advertised import advertised_host
from kvroom.errors import ConfigurationError
try:
    print(advertised_host(sys.argv[1]))
except ConfigurationError as error:
    print(error)
' """


def in_a_network(script: str) -> str:
    done = subprocess.run([*IN_A_NETWORK, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def can_make_networks() -> bool:
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    return subprocess.run([*IN_A_NETWORK, f"{ONE} exit 0"], capture_output=True, timeout=60).returncode == 0


@pytest.fixture(scope="module")
def networks() -> None:
    if not can_make_networks():
        pytest.skip("this machine gives no user its own network namespaces")


@pytest.mark.parametrize(
    ("host", "advertise", "told"),
    [
        ("127.0.0.1", None, "127.0.0.1"),
        ("[::1]", None, "::1"),
        ("Worker-3.", None, "worker-3"),
        ("0.0.0.0", "10.0.0.7", "10.0.0.7"),
        ("::", "[FD00::7]", "fd00::7"),
        ("127.0.0.1", "worker-3", "worker-3"),
    ],
)
def test_what_was_said_is_advertised(host: str, advertise: str | None, told: str) -> None:
    assert advertised_host(host, advertise) == told


@pytest.mark.parametrize("advertise", ["0.0.0.0", "[::]", "::ffff:0.0.0.0"])
def test_every_interface_is_no_place_to_dial(advertise: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be dialled"):
        advertised_host("127.0.0.1", advertise)


@pytest.mark.parametrize(("host", "advertise"), [("a b", None), ("::", ""), ("::", "http://x"), ("127.1", None)])
def test_what_cannot_be_read_is_refused(host: str, advertise: str | None) -> None:
    with pytest.raises(ConfigurationError, match="write a name"):
        advertised_host(host, advertise)


@pytest.mark.parametrize(("host", "version"), [("0.0.0.0", 4), ("::", 6)])
def test_the_address_is_one_of_this_machine(host: str, version: int) -> None:
    try:
        told = ipaddress.ip_address(advertised_host(host))
    except ConfigurationError as error:
        pytest.skip(str(error))
    assert told.version == version
    with socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET) as here:
        here.bind((str(told), 0))


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize(("host", "told"), [("0.0.0.0", "10.7.0.1"), ("::", "fd77::1"), ("[::]", "fd77::1")])
def test_the_only_address_is_told(host: str, told: str) -> None:
    assert in_a_network(f"{ONE} {ASK} {host!r}") == told
    assert in_a_network(f"{ROUTED} {ASK} {host!r}") == told.replace("7.0.1", "8.0.1").replace("77", "78")


@pytest.mark.usefixtures("networks")
def test_without_a_choice_or_an_address_it_is_said_by_the_user() -> None:
    assert in_a_network(f"ip link set lo up; {ASK} ::") == (
        "host '::' means every interface, and this machine has no IPv6 address that others could dial: set "
        "advertise_host to the address or name by which others reach it"
    )
    assert "has no IPv4 or IPv6 address" in in_a_network(f"ip link set lo up; {ASK} ''")
    assert "has several (fd77::1, fd78::1)" in in_a_network(f"{TWO} {ASK} ::")
