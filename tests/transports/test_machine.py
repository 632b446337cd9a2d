"""The fate of a process: it is gone only where that is proven."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvroom.transports.kit import machine
from kvroom.transports.kit.machine import Fate, Process, look_up


def process_of(pid: int) -> Process:
    return msgspec.structs.replace(Process.current(), pid=pid, started=machine._started(pid))


def test_a_process_runs_then_is_a_zombie_then_is_no_more() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as popen:
        process = process_of(popen.pid)
        assert look_up(process) is Fate.RUNNING
        assert look_up(msgspec.structs.replace(process, started=process.started - 1)) is Fate.GONE
        popen.kill()
        os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOWAIT)
        assert look_up(process) is Fate.GONE
    assert look_up(process) is Fate.GONE


@pytest.mark.parametrize("other", [{"boot": "x"}, {"pid_namespace": 1}, {"time_namespace": 1}, {"pid": 2**31}])
def test_what_cannot_be_seen_from_here_is_unknown(other: dict[str, object]) -> None:
    assert look_up(msgspec.structs.replace(Process.current(), **other)) is Fate.UNKNOWN


# -- machines and their boots -----------------------------------------------------------------------------------------

UUID, SYSTEM = "4C4C4544-0044-4310-8059-B9C04F465432", "3d1219c7c4c5404aaa1f6d2a48adfda4"
M, OTHER = machine.digest("found", "one"), machine.digest("found", "another")


def test_a_process_of_another_boot_of_this_machine_is_gone() -> None:
    before = msgspec.structs.replace(Process.current(M), boot="the boot before", pid=1, pid_namespace=7)
    assert look_up(before, M) is Fate.GONE


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"boot": "x", "machine": M}, OTHER),
        ({"boot": "x", "machine": M}, ""),
        ({"boot": "x"}, M),
        ({"boot": "x"}, ""),
        ({"boot": "", "machine": M}, M),
        ({"pid_namespace": 1, "machine": M}, M),
        ({"time_namespace": 1, "machine": M}, M),
    ],
)
def test_another_boot_of_what_may_be_another_machine_is_unknown(theirs: dict[str, Any], ours: str) -> None:
    assert look_up(msgspec.structs.replace(Process.current(), **theirs), ours) is Fate.UNKNOWN


@pytest.mark.parametrize("boots", [("", "x"), ("x", ""), ("", ""), ("x", "x")])
def test_without_two_boots_none_has_outlived_the_other(boots: tuple[str, str]) -> None:
    one, other = (Process(boot, 1, 2, 3, 0, machine=M) for boot in boots)
    assert not one.outlived_by(other)


@pytest.fixture
def firmware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, str | None], str]:
    """Return a function that sets the texts of firmware and system and returns the machine's id; None: unreadable."""

    def known_by(product: str | None, system: str | None) -> str:
        for name, text in (("_PRODUCT_UUID", product), ("_MACHINE_ID", system)):
            path = tmp_path / name
            path.unlink(missing_ok=True)
            if text is not None:
                path.write_bytes(text.encode("latin-1"))
            monkeypatch.setattr(machine, name, path)
        return machine.this_machine()

    return known_by


def test_a_machine_is_known_by_its_firmware_and_its_system_together(firmware: Callable[..., str]) -> None:
    known = firmware(UUID, SYSTEM)
    assert len(known) == 32
    assert firmware(f"{UUID.lower()}\n", f"{SYSTEM}\n") == known
    assert firmware(UUID.replace("4C", "4D"), SYSTEM) != known, "the image was copied to another machine"
    assert firmware(UUID, SYSTEM.replace("3d", "3e")) != known
    assert SYSTEM not in known
    assert UUID.lower() not in known


@pytest.mark.parametrize(
    ("product", "system"),
    [
        (None, SYSTEM),
        (UUID, None),
        (None, None),
        ("", SYSTEM),
        (UUID, ""),
        (UUID, "uninitialized"),
        (UUID, "0" * 32),
        ("Not Settable", SYSTEM),
        ("\xff\xfe", SYSTEM),
        (UUID + "0", SYSTEM),
        ("00000000-0000-0000-0000-000000000000", SYSTEM),
        ("FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF", SYSTEM),
        ("FEFEFEFE-FEFE-FEFE-FEFE-FEFEFEFEFEFE", SYSTEM),
        ("03000200-0400-0500-0006-000700080009", SYSTEM),
        ("00020003-0004-0005-0006-000700080009", SYSTEM),
        ("12345678-1234-5678-90AB-CDDEEFAABBCC", SYSTEM),
    ],
)
def test_a_machine_like_many_is_not_known(
    firmware: Callable[..., str], product: str | None, system: str | None
) -> None:
    assert firmware(product, system) == ""


def test_parts_of_a_digest_are_not_run_together() -> None:
    digests = {machine.digest(*parts) for parts in (("a", "bc"), ("a", "b", "c"), ("ab", "c"), ("a", "cb"))}
    assert len(digests) == 4


@pytest.mark.parametrize("text", ["a" * 31, "a" * 33, "A" * 32, "g" * 32, "a" * 32 + "\n", "a" * 2**20])
def test_a_machine_that_is_no_digest_is_refused(text: str) -> None:
    ours = msgspec.msgpack.encode(msgspec.structs.replace(Process.current(), machine=text))
    with pytest.raises(msgspec.ValidationError, match="machine"):
        msgspec.msgpack.decode(ours, type=Process)


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), PermissionError(1, "Operation not permitted")])
def test_a_look_that_fails_is_no_proof(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def refused(pid: int) -> int:
        raise error

    monkeypatch.setattr(os, "pidfd_open", refused)
    assert look_up(Process.current()) is Fate.UNKNOWN


def test_a_hidden_proc_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    me, read = Process.current(), Path.read_text

    def hidden(self: Path) -> str:
        if self.name == "stat":
            raise FileNotFoundError(2, "No such file or directory")
        return read(self)

    monkeypatch.setattr(machine.Process, "current", classmethod(lambda cls, machine="": me))
    monkeypatch.setattr(Path, "read_text", hidden)
    assert look_up(me) is Fate.UNKNOWN
