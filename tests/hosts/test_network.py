"""The hosts themselves: what they leave behind, and the result of a run where they cannot be made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import network as module
from .conftest import refuse
from .network import FILES, NAMED, Network, Unavailable, remove, run, sweep


def names() -> set[str]:
    """Return everything of these tests that exists on this machine now."""
    paths = [path for folder in (NAMED, FILES) if folder.is_dir() for path in folder.iterdir()]
    return {path.name for path in paths if path.name.startswith("kvroom-hosts-")}


def test_hosts_are_apart_and_reach_each_other(network: Network) -> None:
    processes = {host.name: run("ip", "netns", "pids", host.name).split() for host in network.hosts}
    boots = set()
    for host in network.hosts:
        assert processes[host.name]
        for other in network.hosts:
            for address in (other.address, other.address6):
                with pytest.raises(ConnectionRefusedError):
                    host.connect(address, 9)
        popen = host.start(["cat", "/proc/sys/kernel/random/boot_id"], os.environ, log=Path(os.devnull))
        boots.add(popen.communicate()[0])
    assert len(boots) == len(network.hosts)


def test_what_a_crashed_run_left_is_removed_and_what_a_living_one_has_is_not(network: Network) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    alive, dead = f"kvroom-hosts-{os.getppid()}-prefill", f"kvroom-hosts-{gone.pid}-prefill"
    ours = {host.name for host in network.hosts}
    try:
        for name in (alive, dead):
            run("ip", "netns", "add", name)
            (FILES / name).mkdir(parents=True)
        left = subprocess.Popen(["ip", "netns", "exec", dead, "cat"], stdin=subprocess.PIPE)
        while str(left.pid) not in run("ip", "netns", "pids", dead).split():
            os.sched_yield()
        assert dead in sweep()
        left.communicate()
        assert left.returncode != 0
        assert dead not in names()
        assert {alive, *ours} <= names()
    finally:
        for name in (alive, dead):
            remove(name)


def test_a_network_that_fails_half_way_leaves_nothing(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names()
    monkeypatch.setattr(module, "_MARK", "kvroom-hosts-half")
    half = Network(tmp_path)
    half.middle.address = "no address"
    try:
        with pytest.raises(Unavailable, match="no address"):
            half.up()
    finally:
        half.down()
    assert names() == before


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_without_namespaces_ci_fails_and_others_skip(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="Operation not permitted"):
        refuse("this machine gives no network namespaces: Operation not permitted")


def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="ip, iptables, ip6tables, unshare, nsenter not found"):
        Network(tmp_path).up()
