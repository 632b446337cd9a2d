"""The actions of engines for one request, on either side, whether or not they behave well.

An engine owns its pages and frees them only when the handle has released them; it polls, compares bytes, and clears. It
aborts, clears early, opens rooms that the other side never opens, uses numbers again and sends the same request twice.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import NamedTuple

from kvroom.core.identity import KVIdentity
from kvroom.core.phases import KVPoll
from kvroom.errors import LimitExceeded, RoomFailed, RoomInUse
from kvroom.runtime.handles import Handle
from kvroom.runtime.manager import KVManager

from .node import Settings
from .pages import Allocation, Pages, content
from .world import Process

SENTENCE = re.compile(r"room \d+ failed on the (?:decode|prefill) side in phase [A-Z]+ \(peer [^)]+\): (.+)", re.DOTALL)
_FAMILIES = [
    "internal error",
    "RoomInUse",
    "aborted",
    "cleared before",
    "was silent",
    "reads too slowly",
    "opened another connection",
    "restarted",
    "the manager was closed",
    "the link",
    "the connection to",
    "the transfer to",
    "cannot be a source",
    "early arrivals",
    "got no request",
    "stopped before",
    "cut off",
    "checksum mismatch",
    "before the checksum",
    "offered pages for",
    "waiting for a decode worker",
    "waiting for links",
    "waiting for the engine",
    "waiting for the first bytes",
    "waiting for more bytes",
    "waiting for its transfers",
    "waiting for its own checksum",
    "to compare the checksum",
    "to send the reason why it revoked its grant",
    "LimitExceeded",
    "(handshake_s)",
    "no answer",
    "cannot connect",
]


class Request(NamedTuple):
    """One use of a room number: the actions of both engines, with their times (`None`: the side never acts)."""

    label: int
    number: int
    prefill: int
    decode: int
    tokens: int
    prefix: int
    chunks: tuple[int, ...]
    checksum: bool
    source_at: tuple[float, ...] | None
    sink_at: tuple[float, float] | None
    source_ends: tuple[str, float] | None
    """"abort" or "clear", and the time."""
    sink_ends: tuple[str, float] | None
    decodes_s: float
    """The time for which the decode engine uses the pages after success."""

    @property
    def identity(self) -> KVIdentity:
        """Return an identity that all uses of a number share, since a late message of one use may meet another."""
        return KVIdentity.of((self.number,))

    @property
    def undisturbed(self) -> bool:
        """Return whether the request succeeds if there is no fault."""
        return None not in (self.source_at, self.sink_at) and self.source_ends is None and self.sink_ends is None


class Engine:
    """The engine of one process, with its open jobs."""

    def __init__(self, process: Process, manager: KVManager, pages: Pages, settings: Settings) -> None:
        self.process, self.manager, self.pages, self.settings = process, manager, pages, settings
        self.world = process.world
        self.jobs: list[Job] = []
        self._look_scheduled = False

    def changed(self) -> None:
        """Schedule one look at all handles: at least one of them has changed."""
        if not self._look_scheduled:
            self._look_scheduled = True
            self.process.call_soon(self._look)

    def _look(self) -> None:
        self._look_scheduled = False
        for job in list(self.jobs):
            job.look()

    def wind_up(self) -> None:
        """Shut the engine down: clear every job. Their pages come back when the rooms release them."""
        for job in list(self.jobs):
            job.clear()


class Job(ABC):
    """One handle of one request. Its pages return to the pool once it is cleared and the room has released them."""

    side: str

    def __init__(self, engine: Engine, request: Request) -> None:
        self.engine, self.request = engine, request
        self.world, self.process = engine.world, engine.process
        self.name = f"{self.side} of {request.label} in room {request.number}"
        self.handle = self._open()
        self.pages: Allocation | None = None
        self.outcome: str | None = None
        self.releases = 0
        self.cleared = False
        engine.jobs.append(self)
        self.say("opens")
        self._ends_by(self._patience_s())

    @abstractmethod
    def _open(self) -> Handle:
        """Open the room on this side."""

    @abstractmethod
    def _patience_s(self) -> float:
        """Return the largest time until the handle must have ended, whatever happens."""

    def say(self, what: str, *about: object) -> None:
        self.world.say(self.process, self.name + " " + what, *about)

    def abort(self) -> None:
        self.say("is aborted")
        self.handle.abort()

    def clear(self) -> None:
        if not self.cleared:
            self.cleared = True
            self.say("is cleared")
            self.handle.clear()
            self._return_pages()

    def end(self, how: str) -> None:
        """End the room in the way that the request planned for this moment."""
        if how == "abort":
            self.abort()
        else:
            self.clear()

    def look(self) -> None:
        """Read the handle, as an engine does between two steps."""
        status = self.handle.poll()
        if self.outcome is None and status in (KVPoll.Failed, KVPoll.Success):
            self._ended(status)
        self._return_pages()

    def released(self, pages: tuple[int, ...]) -> None:
        """Note that the room released its pages. Called by `on_release`, in the loop."""
        self.releases += 1
        self.say("has its pages {} again", pages)
        if self.releases > 1:
            self.world.violate(f"law 6: {self.name} of {self.process} was given its pages back twice")
        if self.pages is not None:
            self.pages.writable = False
        self.engine.changed()

    def _ended(self, status: KVPoll) -> None:
        if status is KVPoll.Success:
            self.outcome = "success"
            self.world.count(f"success: {self.side}")
            self.say("succeeds")
            self.succeeded()
            return
        self.outcome = self._why()
        self.world.ends[self.request.label, self.side] = self.outcome, self.world.now
        self.say("fails: {}", self.outcome)
        self.world.count(f"failure: {_family(self.outcome)}")
        self.process.call_later(self.world.random.uniform(0.0, 0.2), self.clear)

    def succeeded(self) -> None:
        """Check the result of a successful room; then clear it."""
        self.clear()

    def _why(self) -> str:
        try:
            self.handle.failure_exception()
        except (RoomInUse, LimitExceeded) as refused:
            return f"{type(refused).__name__}: {refused}"
        except RoomFailed as failed:
            said = SENTENCE.fullmatch(str(failed))
            if said is None or "internal error" in str(failed):
                self.world.violate(f"law 11: {self.name} of {self.process} fails with {str(failed)!r}")
            return str(failed)
        self.world.violate(f"law 11: {self.name} of {self.process} failed without a cause")
        return "no reason given"

    def _return_pages(self) -> None:
        """Return the pages to the pool if the job is cleared and the room has released them; then drop the job."""
        if not (self.cleared and self.handle.released):
            return
        if self.pages is not None and not self.pages.returned:
            self.engine.pages.give_back(self.pages)
        if self in self.engine.jobs:
            self.engine.jobs.remove(self)
        if self.releases != 1:
            self.world.violate(f"law 6: {self.name} of {self.process} got its pages back {self.releases} times")

    def _ends_by(self, patience_s: float) -> None:
        """Check law 7 after this time, not counting the time for which the process was stopped."""
        started, stopped = self.world.now, self.process.stopped_s

        def check() -> None:
            late_s = self.world.now - started - patience_s - (self.process.stopped_s - stopped)
            if late_s < 0:
                self.process.call_later(-late_s + 0.001, check)
            elif self.handle.poll() not in (KVPoll.Failed, KVPoll.Success):
                self.world.violate(f"law 7: {self.name} of {self.process} has not ended after {patience_s:.1f} s")

        self.process.call_later(patience_s, check)


class PrefillJob(Job):
    """A job of the prefill side: it takes its pages with the first chunk, then sends one chunk after another."""

    side = "source"

    def _open(self) -> Handle:
        self.sender = self.engine.manager.sender(
            self.request.number, identity=self.request.identity, on_release=self.released
        )
        return self.sender

    def _patience_s(self) -> float:
        times = self.engine.settings.timeouts
        renewed = times.waiting_s + times.bootstrap_s  # a sink that came within `bootstrap_s` renews for this long
        return times.bootstrap_s + renewed + (times.waiting_s + times.stall_s) * (len(self.request.chunks) + 2) + 1.0

    def send(self, index: int) -> None:
        """Compute and send chunk `index`."""
        request, pages = self.request, self.engine.pages
        if self.pages is None and not self.cleared and index == 0:
            self.pages = pages.take(self.name, request.tokens)
            if self.pages is None:
                self.world.count("fault: pool is full")
        if self.pages is None or self.cleared or self.handle.released:
            return
        begin = request.chunks[index - 1] if index else 0
        stop = request.chunks[index]
        kv = content(request.label, request.tokens)
        pages.put(self.pages.pages, 0, begin, kv[:, :, begin:stop])
        size = pages.page_tokens
        chunk = self.pages.pages[begin // size : -(-stop // size)]
        self.say("sends tokens {} to {}", begin, stop)
        last = index == len(request.chunks) - 1
        self.sender.send(chunk, stop=stop, last=last, aux=b"%d" % request.label if last else b"")


class DecodeJob(Job):
    """A job of the decode side: it offers pages, and reads them for a while after success."""

    side = "sink"

    def __init__(self, engine: Engine, request: Request, bootstrap_addr: str) -> None:
        self.bootstrap_addr = bootstrap_addr
        super().__init__(engine, request)

    def _open(self) -> Handle:
        self.receiver = self.engine.manager.receiver(
            self.bootstrap_addr, self.request.number, identity=self.request.identity, on_release=self.released
        )
        return self.receiver

    def _patience_s(self) -> float:
        times = self.engine.settings.timeouts
        waits = times.bootstrap_s + 2 * times.waiting_s + times.stall_s * (len(self.request.chunks) + 2)
        return waits + times.waiting_s + 1.0

    def offer(self) -> None:
        """Take pages and offer them; abort if too few are free."""
        request, pages = self.request, self.engine.pages
        if self.cleared or self.handle.released or self.pages is not None:
            return
        first = request.prefix - request.prefix % pages.page_tokens
        self.pages = pages.take(self.name, request.tokens - first if request.prefix < request.tokens else 0)
        if self.pages is None:
            self.say("finds no free pages")
            self.world.count("fault: pool is full")
            self.abort()
            return
        if self.pages.pages:
            prefix = content(request.label, request.tokens)[:, :, first : request.prefix]
            pages.put(self.pages.pages, first, first, prefix)
        self.pages.writable, self.pages.checked = True, request.checksum
        self.say("offers pages {} for tokens {} to {}", self.pages.pages, request.prefix, request.tokens)
        self.receiver.send_metadata(
            self.pages.pages, tokens=request.tokens, decode_prefix_len=request.prefix, checksum=request.checksum
        )

    def succeeded(self) -> None:
        self._compare("when it succeeds")
        opened_at, offered_at = self.request.sink_at or (0.0, 0.0)
        if offered_at - opened_at > self.engine.settings.timeouts.bootstrap_s:
            self.world.count("success: a sink whose offer came late")
        self.process.call_later(self.request.decodes_s, self._decoded)

    def _decoded(self) -> None:
        if not self.cleared:
            self._compare("when it has decoded")
            self.clear()

    def _compare(self, when: str) -> None:
        request, pages = self.request, self.engine.pages
        if self.pages is None or self.pages.returned:
            self.world.violate(f"law 8: {self.name} of {self.process} succeeded without pages")
            return
        if not self.pages.pages:
            return  # the decode side had every token already
        first = request.prefix - request.prefix % pages.page_tokens
        have = pages.get(self.pages.pages, first, first, request.tokens)
        want = content(request.label, request.tokens)[:, :, first:].copy()
        sent = content(int(self.receiver.aux or -1), request.tokens)  # a number may have two uses
        want[:, :, request.prefix - first :] = sent[:, :, request.prefix :]
        wrong = int((have != want).sum())
        self.world.tally["bytes compared"] += want.size
        if wrong:
            self.world.violate(f"law 8: {wrong} wrong bytes in the pages of {self.name} of {self.process} {when}")


def _family(detail: str) -> str:
    """Return the known cause that this sentence contains."""
    return next((family for family in _FAMILIES if family in detail), f"other: {detail}")
