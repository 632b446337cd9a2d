"""Workers and a router at IPv6 addresses and names: requests go through, and what the commands print can be used."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from kvroom.cli.cluster import wait_for_router
from kvroom.cli.ports import free_port
from kvroom.transports import probe
from kvroom.wire.address import HostPort, loopback_of
from resolving import needs_ipv6
from serve import helpers
from serve.helpers import post, run, running

SECRET = {"KVROOM_SECRET": "a secret of the workers under test"}
SIZES = ("--page-tokens", "4", "--pages", "64", "--bootstrap-s", "60")
NOWHERE = "http://127.0.0.1:9"
PROXIES = dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"), NOWHERE)
"""An environment with a proxy address at which no process listens."""


class Case(NamedTuple):
    """A transport, the hosts of both workers as options, and the router's host."""

    transport: str
    prefill: Sequence[str]
    decode: Sequence[str]
    router: str = "::1"


TRUSTED = ("--trusted-fabric",)  # required with engines that listen at more addresses than --host
ALLOW = ("--bootstrap-allow", "::1")  # required for a decode worker that listens beyond loopback
CASES = {
    "loopback": Case("local", ("--host", "::1"), ("--host", "[::1]")),
    "every interface": Case(
        "tcp",
        ("--host", "::", "--advertise-host", "[::1]"),
        ("--host", "[::]", "--advertise-host", "::1", *ALLOW),
        "::",
    ),
    "nixl": Case("nixl", ("--host", "::1"), ("--host", "::", "--advertise-host", "::1", *TRUSTED, *ALLOW)),
    "mooncake": Case("mooncake", ("--host", "::1", *TRUSTED), ("--host", "[::1]", *TRUSTED)),
    "name": Case("tcp", ("--host", "both.test"), ("--host", "127.0.0.1", "--advertise-host", "Both.test.")),
}


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start commands in a mount namespace whose /etc/hosts gives the name `both.test` an address of each family."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n::1 both.test\n127.0.0.1 both.test\n")
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-ec", f'mount --bind {hosts} /etc/hosts; exec "$@"', "sh"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode != 0:
        pytest.skip("mount namespaces are not available here, and the names of this test need one")
    monkeypatch.setattr(helpers, "command", lambda *given: [*alone, sys.executable, "-m", "kvroom", *given])


@contextlib.contextmanager
def router(host: str, *workers: str, **changes: str) -> Iterator[str]:
    """Run `kvroom router` in front of two workers, and yield its URL."""
    port = free_port(host)
    with subprocess.Popen(
        helpers.command("router", "--host", host, "--port", str(port), *workers),
        env=helpers.environment(**changes), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            url = HostPort(loopback_of(host), port).url()
            asyncio.run(wait_for_router(url, 2))
            yield url
        finally:
            process.kill()


@needs_ipv6
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled
def test_a_request_goes_through_the_router(model_dir: Path, name: str, request: pytest.FixtureRequest) -> None:
    """Every process has proxies in its environment at which no process listens."""
    transport, first, second, host = CASES[name]
    missing = probe(transport).missing
    if missing:
        pytest.skip(f"{transport} cannot run here: {missing[0].what}")
    if name == "name":
        request.getfixturevalue("names")
    engine = ("--model", str(model_dir), "--transport", transport, *SIZES)
    changes = {**SECRET, **PROXIES}
    with (
        running("prefill", *engine, *first, **changes) as prefill,
        running("decode", *engine, *second, **changes) as decode,
        router(
            host, "--prefill", prefill.url, prefill.ready.facts["bootstrap_port"], "--decode", decode.url, **changes
        ) as url,
    ):  # fmt: skip
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "temperature": 0, "stream": False}
        answer = post(url, "/v1/completions", body)
        assert answer.status == 200, answer.text
        (cost,) = answer.json()["kvroom"]
        assert cost["transport"].startswith(transport)
        assert cost["prompt_tokens_computed"] == 0
        shown = run("rooms", prefill.url, decode.url, "--json", **PROXIES)
        assert shown.returncode == 0, shown.stderr
        compared = run("doctor", "--between", prefill.url, decode.url.removeprefix("http://"), **PROXIES)
        assert compared.returncode == 0, compared.stderr
