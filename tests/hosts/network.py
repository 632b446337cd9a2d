"""Hosts on one machine: network namespaces on a bridge, each with processes, names and a machine identity of its own.

Nothing is added to the machine's own network: no interface, no address, no rule. Namespaces are named after the process
that made them; `sweep` removes those of processes that no longer run.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

TOOLS = ("ip", "iptables", "ip6tables", "unshare", "nsenter")
NAMED = Path("/run/netns")
FILES = Path("/etc/netns")
TIMEOUT_S = 20
_CLONE_NEWNET = 0x40000000
_MARK = "kvroom-hosts"
_OURS = re.compile(rf"{_MARK}-(\d+)-\w+")
_NO_DAD = ("nodad",)  # an address that is being probed for duplicates cannot be used for a second
_OWN_IDENTITY = (
    'mount --bind "$0" /proc/sys/kernel/random/boot_id && mount --bind "$1" /etc/machine-id && echo up && exec cat'
)


class Unavailable(Exception):
    """Namespaces cannot be made on this machine; the text has the reason and a remedy."""


def run(*command: str) -> str:
    """Run a command to its end and return its output. Raise `Unavailable` with its error text if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except OSError as error:
        raise Unavailable(f"{command[0]} cannot be run: {error.strerror}") from None
    if done.returncode != 0:
        raise Unavailable(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class Host:
    """One host: `address` (IPv4) and `address6`, and a process namespace in which everything dies together."""

    def __init__(self, name: str, address: str, address6: str, folder: Path) -> None:
        self.name, self.address, self.address6 = name, address, address6
        self._folder = folder
        self._identity = tuple(folder / f"{name}.{what}" for what in ("boot", "machine"))
        self._first: subprocess.Popen[str] | None = None
        self._net = -1

    def boot(self) -> None:
        """Start the host's first process, with a new boot of the same machine."""
        boot, machine = self._identity
        boot.write_text(f"{uuid.uuid4()}\n")
        if not machine.exists():
            machine.write_text(f"{uuid.uuid4().hex}\n")
        inside = ["unshare", "--pid", "--ipc", "--uts", "--fork", "--mount-proc", "--kill-child"]
        self._first = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *inside, "sh", "-c", _OWN_IDENTITY, str(boot), str(machine)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._first.stdout is not None
        if self._first.stdout.readline() != "up\n":
            raise Unavailable(f"a host's first process failed: {self._first.communicate(timeout=TIMEOUT_S)[1].strip()}")
        if self._net < 0:
            self._net = os.open(NAMED / self.name, os.O_RDONLY | os.O_CLOEXEC)

    def crash(self) -> None:
        """Kill every process of this host at the same time, as SIGKILL does; its addresses stay."""
        if self._first is None:
            return
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._first.communicate(timeout=TIMEOUT_S)
        self._first = None

    def remove(self) -> None:
        """Kill everything that runs here, and remove the namespace. A missing namespace is no error."""
        self.crash()
        if self._net >= 0:
            os.close(self._net)
            self._net = -1
        remove(self.name)

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], *, log: Path
    ) -> subprocess.Popen[str]:  # fmt: skip
        """Start a command on this host; its stderr goes to `log`."""
        enter = ["nsenter", "--target", str(self._first_pid()), "--net", "--mount", "--pid", "--ipc", "--uts", "--"]
        with log.open("w") as errors:
            return subprocess.Popen(
                [*enter, *command], env=dict(environment), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip

    def connect(self, address: str, port: int, timeout_s: float = TIMEOUT_S) -> socket.socket:
        """Connect from this host.

        The thread that enters the namespace ends before this returns; the socket stays there.
        """
        made: list[socket.socket | OSError] = []

        def enter() -> None:
            libc = ctypes.CDLL(None, use_errno=True)
            try:
                if libc.setns(self._net, _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
                made.append(socket.create_connection((address, port), timeout_s))
            except OSError as error:
                made.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        (outcome,) = made
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    def http(self, address: str, port: int, timeout_s: float = 60) -> http.client.HTTPConnection:
        """An HTTP connection from this host, which the caller closes."""
        connection = http.client.HTTPConnection(address, port, timeout=timeout_s)
        connection.sock = self.connect(address, port, timeout_s)
        return connection

    def wait_for_http(self, address: str, port: int, path: str, words: str, limit_s: float) -> None:
        """Poll a starting server until its answer contains these words; only the server knows when it is ready."""
        end_s, said = time.monotonic() + limit_s, "nothing yet"
        while words not in said:
            assert time.monotonic() < end_s, f"{address}:{port}{path} says {said}"
            time.sleep(0.1)
            with contextlib.suppress(OSError), contextlib.closing(self.http(address, port)) as connection:
                connection.request("GET", path)
                said = connection.getresponse().read().decode()

    def resolve(self, name: str) -> list[str]:
        """Return the IPv4 addresses of a name, in the order in which this host prefers them."""
        lines = run("ip", "netns", "exec", self.name, "getent", "ahostsv4", name).splitlines()
        return [line.split()[0] for line in lines if "STREAM" in line]

    def drop_from(self, other: Host) -> None:
        """Drop everything that comes from another host, without an answer."""
        for tool, address in (("iptables", other.address), ("ip6tables", other.address6)):
            run("ip", "netns", "exec", self.name, tool, "-A", "INPUT", "-s", address, "-j", "DROP")

    def be_silent_at(self, address: str) -> None:
        """Add an address from which no answer comes, not even a refusal."""
        run("ip", "-n", self.name, "addr", "add", f"{address}/24", "dev", "eth0")
        run("ip", "netns", "exec", self.name, "iptables", "-A", "INPUT", "-d", address, "-j", "DROP")

    def redirect(self, address: str, port: int) -> None:
        """Add an address of which every TCP port leads to this port."""
        run("ip", "-n", self.name, "addr", "add", f"{address}/24", "dev", "eth0")
        rule = ("PREROUTING", "-p", "tcp", "-d", address, "-j", "REDIRECT", "--to-ports", str(port))
        run("ip", "netns", "exec", self.name, "iptables", "-t", "nat", "-A", *rule)

    def hear_everybody(self) -> None:
        """Undo `drop_from`."""
        for tool in ("iptables", "ip6tables"):
            run("ip", "netns", "exec", self.name, tool, "-F", "INPUT")

    def _first_pid(self) -> int:
        """The pid of the host's first process, in the machine's own namespace."""
        assert self._first is not None
        return int(Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children").read_text().split()[0])

    def _pids(self) -> list[int]:
        return [int(line) for line in run("ip", "netns", "pids", self.name).split()]


class Network:
    """Three hosts on a bridge: `prefill`, `decode` and `middle`, which reach each other and nothing else."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._switch = f"{_MARK}-{os.getpid()}-switch"
        host = partial(Host, folder=folder)
        self.prefill = host(f"{_MARK}-{os.getpid()}-prefill", "10.77.0.4", "fd77::4")
        self.decode = host(f"{_MARK}-{os.getpid()}-decode", "10.77.0.8", "fd77::8")
        self.middle = host(f"{_MARK}-{os.getpid()}-middle", "10.77.0.3", "fd77::3")
        self.hosts = (self.prefill, self.decode, self.middle)
        # The resolver prefers addresses that share more leading bits with the host's own (RFC 6724, rule 9).
        self.silent = "10.77.0.5"

    def up(self) -> None:
        """Make everything. After `Unavailable`, `down` removes what was made."""
        if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
            raise Unavailable(f"{', '.join(missing)} not found: install iproute2, iptables and util-linux")
        run("ip", "netns", "add", self._switch)
        run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", self._switch, "link", "set", "br0", "up")
        for host in self.hosts:
            self._plug_in(host)
        self.middle.be_silent_at(self.silent)

    def down(self) -> None:
        """Remove everything, including what `up` made only in part."""
        for host in self.hosts:
            host.remove()
        remove(self._switch)

    def cut(self, *deaf: Host) -> None:
        """Let these hosts receive nothing from the other one of prefill and decode."""
        for host in deaf:
            host.drop_from(self.decode if host is self.prefill else self.prefill)

    def heal(self) -> None:
        """Undo every cut between prefill and decode."""
        for host in (self.prefill, self.decode):
            host.hear_everybody()

    def take_over(self, host: Host, address: str, owner: Host) -> None:
        """Give `owner`'s address to `host`; `owner` keeps running without a network."""
        run("ip", "-n", self._switch, "link", "set", owner.name.rpartition("-")[2], "down")
        run("ip", "-n", host.name, "addr", "add", f"{address}/24", "dev", "eth0")
        for other in self.hosts:
            run("ip", "-n", other.name, "neigh", "flush", "dev", "eth0")

    def give_back(self, host: Host, address: str, owner: Host) -> None:
        """Undo `take_over`."""
        run("ip", "-n", host.name, "addr", "del", f"{address}/24", "dev", "eth0")
        run("ip", "-n", self._switch, "link", "set", owner.name.rpartition("-")[2], "up")
        for other in self.hosts:
            run("ip", "-n", other.name, "neigh", "flush", "dev", "eth0")

    def _plug_in(self, host: Host) -> None:
        port = host.name.rpartition("-")[2]
        files = FILES / host.name
        files.mkdir(parents=True)
        (files / "hosts").write_text(self._names())
        run("ip", "netns", "add", host.name)
        run(
            "ip", "link", "add", port, "netns", self._switch, "type", "veth", "peer", "name", "eth0", "netns", host.name
        )
        run("ip", "-n", self._switch, "link", "set", port, "master", "br0", "up")
        run("ip", "-n", host.name, "link", "set", "lo", "up")
        run("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
        run("ip", "-n", host.name, "addr", "add", f"{host.address6}/64", "dev", "eth0", *_NO_DAD)
        run("ip", "-n", host.name, "link", "set", "eth0", "up")
        host.boot()

    def _names(self) -> str:
        """Return the hosts file of every host: the first address of `prefill.test` and `decode.test` never answers."""
        lines = ["127.0.0.1 localhost", "::1 localhost"]
        for host in (self.prefill, self.decode):
            name = host.name.rpartition("-")[2]
            lines += [f"{self.silent} {name}.test", f"{host.address} {name}.test", f"{host.address} one.{name}.test"]
        return "\n".join(lines) + "\n"


def remove(name: str) -> None:
    """Kill what is left in a namespace and remove it, with its files. A missing namespace is no error."""
    if (NAMED / name).exists():
        for pid in run("ip", "netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        run("ip", "netns", "del", name)
    shutil.rmtree(FILES / name, ignore_errors=True)


def leftovers() -> Iterator[str]:
    """Yield the namespaces of test runs whose process no longer exists."""
    for folder in (NAMED, FILES):
        for path in folder.iterdir() if folder.is_dir() else ():
            ours = _OURS.fullmatch(path.name)
            if ours is not None and not Path("/proc", ours[1]).exists():
                yield path.name


def sweep() -> list[str]:
    """Remove what crashed runs have left, and return the names. Namespaces of running tests stay."""
    names = sorted(set(leftovers()))
    for name in names:
        remove(name)
    return names
