"""The identity of machines, pid namespaces and processes, the fate of another process, and the settings of Yama.

A process is identified by (boot id, pid namespace, pid, start time): pids are reused, and start times distinguish the
uses. A machine is identified by a digest that no other machine has. It runs one boot at a time, and each boot has a new
random id, so a process of another boot of the same machine has ended. See proc(5), pidfd_open(2), ptrace(2),
machine-id(5), random(4).
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import hashlib
import os
import re
import select
from pathlib import Path

import msgspec

from kvroom.errors import TransportError
from kvroom.transports.base import OutOfReach
from kvroom.wire.frames import MachineDigest

_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)
_CAP_SYS_PTRACE = 19
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_PRODUCT_UUID = Path("/sys/class/dmi/id/product_uuid")
_MACHINE_ID = Path("/etc/machine-id")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_PLACEHOLDERS = {
    "03000200-0400-0500-0006-000700080009",
    "00020003-0004-0005-0006-000700080009",
    "01020304-0506-0708-090a-0b0c0d0e0f10",
    "12345678-1234-5678-90ab-cddeefaabbcc",
    "12345678-1234-1234-1234-123456789abc",
}
"""Product UUIDs that thousands of boards share. UUIDs of one repeated byte (all 00, all FF) are placeholders, too."""


class Process(msgspec.Struct, frozen=True):
    """The identity of one process."""

    boot: str
    pid_namespace: int
    """An inode number."""
    pid: int
    started: int
    """Clock ticks since boot, as counted in the process's time namespace."""
    uid: int
    time_namespace: int = 0
    """An inode number; 0 if the kernel has no time namespaces."""
    machine: MachineDigest = ""
    """A `digest` that is the same in every boot of this machine and differs from every other machine; "" if unknown."""

    @classmethod
    def current(cls, machine: str = "") -> Process:
        """Return the identity of the calling process."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pid = os.getpid()
        try:
            time_namespace = os.stat("/proc/self/ns/time").st_ino
        except FileNotFoundError:  # a kernel before 5.6
            time_namespace = 0
        return cls(
            boot=boot,
            pid_namespace=os.stat("/proc/self/ns/pid").st_ino,
            pid=pid,
            started=_started(pid),
            uid=os.getuid(),
            time_namespace=time_namespace,
            machine=machine,
        )

    def sees(self, other: Process) -> bool:
        """Return True if the two can look each other up.

        That needs the same boot, the same pid namespace, and the same time namespace, whose clock start times refer to.
        """
        mine, theirs = ((p.boot, p.pid_namespace, p.time_namespace) for p in (self, other))
        return bool(self.boot) and mine == theirs

    def outlived_by(self, other: Process) -> bool:
        """Return True if the other process belongs to another boot of the same machine.

        Two such processes never run at the same time. If `other` runs now and this one ran earlier, this one has ended.
        """
        same_machine = bool(self.machine) and self.machine == other.machine
        return same_machine and bool(self.boot and other.boot) and self.boot != other.boot


class Fate(enum.Enum):
    """The fate of a process, as far as the calling one can tell."""

    GONE = "gone"
    RUNNING = "running"
    UNKNOWN = "unknown"


def look_up(process: Process, machine: str = "") -> Fate:
    """Return the fate of exactly this process. `machine` is the digest of this machine, if it is known.

    GONE is proof, so there are only four reasons for it: the process belongs to another boot of this machine, no
    process has its pid, the process with its pid started at another time, or all its threads have ended. If the system
    does not show the process (no descriptor left, no permission, a hidden /proc, another machine or namespace), the
    fate is UNKNOWN.
    """
    me = Process.current(machine)
    if process.outlived_by(me):
        return Fate.GONE
    if not me.sees(process):
        return Fate.UNKNOWN
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return Fate.GONE
    except (OSError, OverflowError):
        return Fate.UNKNOWN
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, pidfd)
        try:
            started = _started(process.pid)  # the open pidfd shows below if the pid was reused since
        except OSError:
            return Fate.GONE if exited(pidfd) else Fate.UNKNOWN
        return Fate.GONE if exited(pidfd) or started != process.started else Fate.RUNNING


def this_machine() -> str:
    """Return the digest of this machine, or "" if it cannot be distinguished from others.

    Images copy /etc/machine-id, and firmware ships with placeholder UUIDs, so neither is enough by itself: both must be
    readable (the product UUID only by root) and real.
    """
    try:
        product, system = (path.read_text().strip().lower() for path in (_PRODUCT_UUID, _MACHINE_ID))
    except (OSError, UnicodeDecodeError):
        return ""
    if not _UUID.fullmatch(product) or not re.fullmatch(r"[0-9a-f]{32}", system):
        return ""
    return "" if is_placeholder(product) or is_placeholder(system) else digest("found", product, system)


def is_placeholder(text: str) -> bool:
    """Return True for a UUID that many machines share, written with or without dashes."""
    plain = text.strip().lower().replace("-", "")
    known = {uuid.replace("-", "") for uuid in _PLACEHOLDERS}
    return plain in known or re.fullmatch(r"([0-9a-f]{2})\1{15}", plain) is not None


def digest(source: str, *parts: str) -> str:
    """Return 128 bits of SHA-256, in hex, that identify a machine. `source` names the origin of the parts."""
    framed = b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in (source, *parts))
    return hashlib.sha256(b"kvroom machine" + framed).hexdigest()[:32]


def _started(pid: int) -> int:
    # Field 2, the command name, is in brackets and may contain any character; the start time is field 22.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def watch(process: Process) -> int:
    """Return a pidfd of exactly this process, which the caller must close.

    Raises:
        OutOfReach: The process is on another machine or in another pid or time namespace.
        TransportError: The process is gone or cannot be watched.
    """
    me = Process.current()
    if process.boot != me.boot:
        raise OutOfReach("local: the peer is on another machine")
    if process.time_namespace != me.time_namespace:
        raise OutOfReach("local: the peer is in another time namespace (container); share one to use `local`")
    if process.pid_namespace != me.pid_namespace:
        raise OutOfReach("local: the peer is in another pid namespace (container); share one to use `local`")
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError as error:
        raise TransportError(f"local: the peer's process {process.pid} cannot be watched: {error.strerror}") from error
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, pidfd)
        try:
            started = _started(process.pid)  # with the pidfd open, a reuse of the pid is noticed
        except OSError as error:
            raise TransportError(f"local: the peer's process {process.pid} is gone: {error.strerror}") from error
        if started != process.started or exited(pidfd):
            raise TransportError(f"local: the peer's process {process.pid} is gone")
        undo.pop_all()
    return pidfd


def exited(pidfd: int) -> bool:
    """Return True if every thread of the process has ended, so that it can no longer write anywhere."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def yama_scope() -> int | None:
    """Return Yama's ptrace_scope (0 to 3), or None if the kernel has no Yama."""
    try:
        return int(_YAMA.read_text())
    except OSError:
        return None


def allow_same_user_writers() -> None:
    """If Yama restricts ptrace to ancestors, allow every process of this user to write here, as without Yama."""
    if yama_scope() == 1:
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)


def writing_refused() -> str | None:
    """Return why process_vm_writev(2) into this user's other processes is refused here, or None if it is permitted.

    A refusal that depends on the two processes (another user, a hardened process) shows when they connect.
    """
    cell = ctypes.create_string_buffer(8)
    here = (ctypes.c_uint64 * 2)(ctypes.addressof(cell), len(cell))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.process_vm_writev(os.getpid(), here, 1, here, 1, 0) != len(cell):  # into itself, which only seccomp refuses
        reason = os.strerror(ctypes.get_errno())
        return f"the kernel or the container's seccomp profile refuses process_vm_writev ({reason})"
    scope = yama_scope()
    is_capable = False
    if scope == 2:
        status = Path("/proc/self/status").read_text()
        effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
        is_capable = bool(int(effective.split()[1], 16) >> _CAP_SYS_PTRACE & 1)
    if (scope == 2 and not is_capable) or scope == 3:
        return f"kernel.yama.ptrace_scope is {scope}"
    return None
