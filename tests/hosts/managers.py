"""Library managers in a process on a host, without torch, and the handle by which a test plays their engine.

Run as a program it reads one JSON object a line, `[method, arguments]`, and answers each with one line. Times in
answers are of the monotonic clock, which all hosts share, so the test can compare them with its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from identities import PROMPT
from kvroom import KVBootstrapServer, KVManager, KVPoll, KVReceiver, KVSender, Timeouts
from kvroom.errors import KVRoomError
from kvroom.runtime.link import LinkLimits
from kvroom.wire.address import HostPort, loopback_of, parse_address
from kvroom_lab.pools import TestPool

from .network import Host
from .starting import SECRET, Where, ended, environment, manager_options

TOKENS = 8
HALF = TOKENS // 2  # one page: a request is two chunks
PATIENCE_S = 30.0


class Engine:
    """One manager with a pool, and the times at which its rooms ended and their pages came back."""

    def __init__(self, stack: contextlib.ExitStack, changed: threading.Condition) -> None:
        self._stack, self._changed = stack, changed
        self._rooms: dict[int, KVSender | KVReceiver] = {}
        self._pages: dict[int, list[int]] = {}
        self.ended_s: dict[int, float] = {}
        self.released_s: dict[int, float] = {}
        self.pool = TestPool()
        stack.callback(self.pool.close)
        self.directory = ""

    def open(
        self,
        role: str,
        where: Where,
        transport: str,
        *,
        heartbeat_s: float = 5.0,
        drain_s: float = 10.0,
        port: int = 0,
        directory_port: int = 0,
    ) -> str:
        """Start the manager, and for prefill its directory. Return the directory's address as others reach it."""
        options = manager_options(where, transport)
        if role == "prefill":
            self.pool.fill(1)
            server = self._stack.enter_context(KVBootstrapServer(where.host, directory_port, secret=SECRET.encode()))
            directory_port = parse_address(server.address).port
            self.directory = str(HostPort(where.reached_by, directory_port))
            options["register_with"] = str(HostPort(loopback_of(where.host), directory_port))
        options["link_limits"] = LinkLimits(heartbeat_s=heartbeat_s)
        options["timeouts"] = Timeouts(drain_s=drain_s)
        manager = KVManager(self.pool.layout, port=port, on_change=self._look, **options)
        self.manager = self._stack.enter_context(manager)
        return self.directory

    def send(self, room: int, pages: list[int], *, stop: int) -> None:
        """Send the pages up to token `stop`; the first call for a room opens it."""
        sender = self._rooms.get(room)
        if sender is None:
            sender = self._rooms[room] = self.manager.sender(room, identity=PROMPT, on_release=self._releasing(room))
        assert isinstance(sender, KVSender)
        self._pages.setdefault(room, []).extend(pages)
        sender.send(pages, stop=stop, last=stop == TOKENS)

    def receive(self, room: int, pages: list[int], directory: str) -> None:
        """Offer pages for a request."""
        receiver = self.manager.receiver(directory, room, identity=PROMPT, on_release=self._releasing(room))
        self._rooms[room], self._pages[room] = receiver, pages
        receiver.send_metadata(pages, tokens=TOKENS)

    def poll(self, room: int) -> KVPoll:
        return self._rooms[room].poll()

    def has_ended(self, room: int) -> bool:
        return room in self.ended_s

    def failure(self, room: int) -> str:
        """Return the reason for which a room failed; empty if it succeeded."""
        try:
            self._rooms[room].wait(0)
        except KVRoomError as error:
            return str(error)
        return ""

    def digest(self, room: int) -> str:
        """Return the digest of the request's bytes in this pool."""
        return hashlib.sha256(self.pool.tokens(self._pages[room], TOKENS).tobytes()).hexdigest()

    def clear(self, room: int) -> None:
        """Clear a room."""
        self._rooms[room].clear()

    def _look(self) -> None:
        with self._changed:
            for room, handle in list(self._rooms.items()):
                if handle.poll() in (KVPoll.Failed, KVPoll.Success):
                    self.ended_s.setdefault(room, time.monotonic())
            self._changed.notify_all()

    def _releasing(self, room: int) -> Callable[[tuple[int, ...]], None]:
        def release(_: tuple[int, ...]) -> None:
            with self._changed:
                self.released_s[room] = time.monotonic()
                self._changed.notify_all()

        return release


class LostLinks(logging.Handler):
    """The times at which lost links were noticed, by the peer's address."""

    def __init__(self, changed: threading.Condition) -> None:
        super().__init__(logging.INFO)
        self._changed = changed
        self.lost_s: dict[str, float] = {}
        self.causes: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "is lost: " in message:
            with self._changed:
                peer = str(getattr(record, "peer", ""))
                self.lost_s[peer] = time.monotonic()
                self.causes[peer] = message
                self._changed.notify_all()


class Commands:
    """The methods that a test can call in this process. Engines have names."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._changed = threading.Condition()
        self._engines: dict[str, Engine] = {}
        self._links = LostLinks(self._changed)
        logger = logging.getLogger("kvroom")
        logger.setLevel(logging.INFO)
        logger.addHandler(self._links)
        logger.addHandler(logging.StreamHandler())

    def open(self, name: str, **options: Any) -> str:
        engine = self._engines[name] = Engine(self._stack, self._changed)
        return engine.open(where=Where(*options.pop("where")), **options)

    def address(self, name: str) -> str:
        return self._engines[name].manager.address

    def send(self, name: str, room: int, pages: list[int], stop: int) -> None:
        self._engines[name].send(room, pages, stop=stop)

    def receive(self, name: str, room: int, pages: list[int], directory: str) -> None:
        self._engines[name].receive(room, pages, directory)

    def clear(self, name: str, room: int) -> None:
        self._engines[name].clear(room)

    def receives(self, name: str, room: int) -> bool:
        """Wait until bytes of a room have landed here; false if it has failed instead."""
        engine = self._engines[name]
        begun = (KVPoll.Transferring, KVPoll.Failed)
        return self._until(lambda: engine.poll(room) in begun) and engine.poll(room) is KVPoll.Transferring

    def outcome(self, name: str, room: int) -> tuple[float, str, str]:
        """Wait until a room has ended; return the time, the reason of a failure, and the digest of its bytes here."""
        engine = self._engines[name]
        assert self._until(lambda: engine.has_ended(room)), f"room {room} has not ended"
        return engine.ended_s[room], engine.failure(room), engine.digest(room)

    def released(self, name: str, room: int) -> float:
        """Wait until the pages of a room belong to the engine again; return the time."""
        engine = self._engines[name]
        assert self._until(lambda: room in engine.released_s), f"room {room} keeps its pages"
        return engine.released_s[room]

    def keeps(self, name: str, room: int) -> bool:
        """Return True if a room still has its pages."""
        return room not in self._engines[name].released_s

    def phase(self, name: str, room: int, phase: str) -> dict[str, Any]:
        """Wait until a room is in a phase, and return the manager's description of it."""
        manager = self._engines[name].manager
        found: dict[str, Any] = {}

        def is_there() -> bool:
            for view in manager.room(room):
                found.update(phase=view.phase, failure=view.failure, pages=view.pages, waits_for=view.waits_for)
            return found.get("phase") == phase

        assert self._until(is_there), f"room {room} is {found}"
        return found

    def fence(self, name: str, where: str) -> list[dict[str, Any]]:
        """Declare a host gone, as its operator; return the error's sentence where there is nothing to fence."""
        try:
            return [msgspec.to_builtins(one) for one in self._engines[name].manager.fence(where)]
        except KVRoomError as error:
            return [{"refused": str(error)}]

    def quarantined(self, name: str) -> int:
        """Return the number of pages in quarantine."""
        return self._engines[name].manager.audit().quarantined_pages

    def lost(self, peer: str, since_s: float) -> tuple[float, str]:
        """Wait until the link to a peer was lost after this time; return the time and the reason."""
        assert self._until(lambda: self._links.lost_s.get(peer, 0.0) > since_s), f"the link to {peer} is up"
        return self._links.lost_s[peer], self._links.causes[peer]

    def _until(self, predicate: Callable[[], bool]) -> bool:
        with self._changed:
            return self._changed.wait_for(predicate, PATIENCE_S)


class Managers:
    """The test's end of such a process: `ask("outcome", name, room=1)` calls the method of `Commands`."""

    def __init__(self, popen: subprocess.Popen[str], log: Path) -> None:
        self._popen, self._log = popen, log

    def kill(self) -> None:
        """End the process with SIGKILL; its host stays as it is."""
        children = Path(f"/proc/{self._popen.pid}/task/{self._popen.pid}/children").read_text().split()
        for pid in map(int, children):  # nsenter forks to enter the process namespace
            os.kill(pid, signal.SIGKILL)
        self._popen.wait(PATIENCE_S)

    def says(self) -> str:
        """Return what the process has logged so far."""
        return self._log.read_text()

    def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended; its log has the reason
            self._popen.stdin.write(json.dumps([method, arguments, options]) + "\n")
            self._popen.stdin.flush()
        line = self._popen.stdout.readline()
        assert line, f"{method} ended the process: {self.says()[-3000:]}"
        return json.loads(line)


@contextlib.contextmanager
def managers(host: Host, log: Path, machine: str | None = None) -> Iterator[Managers]:
    """Run a process for managers on a host until the block ends. `machine`: the identity that its operator states."""
    stated = {} if machine is None else {"KVROOM_MACHINE_ID": machine}
    popen = host.start([sys.executable, "-m", "hosts.managers"], environment(**stated), log=log)
    with ended(popen):
        yield Managers(popen, log)


def main() -> None:
    """Answer until the test closes the pipe."""
    with contextlib.ExitStack() as stack:
        commands = Commands(stack)
        for line in sys.stdin:
            method, arguments, options = json.loads(line)
            print(json.dumps(getattr(commands, method)(*arguments, **options)), flush=True)


if __name__ == "__main__":
    main()
