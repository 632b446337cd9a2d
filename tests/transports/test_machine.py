"""What became of a process: gone only where that is proven."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("fault", [OSError(24, "Too many open files"), PermissionError(1, "Operation not permitted")])
def test_a_look_that_fails_is_no_proof(monkeypatch: pytest.MonkeyPatch, fault: OSError) -> None:
    def refused(pid: int) -> int:
        raise fault

    monkeypatch.setattr(os, "pidfd_open", refused)
    assert look_up(Process.current()) is Fate.UNKNOWN


def test_a_hidden_proc_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    me, read = Process.current(), Path.read_text

    def hidden(self: Path) -> str:
        if self.name == "stat":
            raise FileNotFoundError(2, "No such file or directory")
        return read(self)

    monkeypatch.setattr(machine.Process, "current", classmethod(lambda cls: me))
    monkeypatch.setattr(Path, "read_text", hidden)
    assert look_up(me) is Fate.UNKNOWN
