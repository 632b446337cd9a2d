"""What engines do for one request, on either side, well behaved or not.

An engine owns its pages and gives them back only when the handle has let them go; it polls, compares bytes, and clears.
It aborts, clears early, opens rooms that nobody else opens, uses numbers again and sends the same request twice.
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
    "to say why it took its grant back",
    "LimitExceeded",
    "(handshake_s)",
    "no answer",
    "cannot connect",
]


class Request(NamedTuple):
    """One use of a room number: what both engines will do, at which times (`None`: not at all)."""

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
    """"abort" or "clear", and when."""
    sink_ends: tuple[str, float] | None
    decodes_s: float
    """How long the decode engine works with the pages after success."""

    @property
    def identity(self) -> KVIdentity:
        """The same for every use of a number, because a late message of one may meet another."""
        return KVIdentity.of((self.number,))

    @property
    def undisturbed(self) -> bool:
        """Without a fault, it succeeds."""
        return None not in (self.source_at, self.sink_at) and self.source_ends is None and self.sink_ends is None


class Engine:
    """The engine of one process and everything that it has in hand."""

    def __init__(self, process: Process, manager: KVManager, pages: Pages, settings: Settings) -> None:
        self.process, self.manager, self.pages, self.settings = process, manager, pages, settings
        self.world = process.world
        self.jobs: list[Job] = []
        self._looking = False

    def changed(self) -> None:
        """Some handle has changed: look at all of them, soon."""
        if not self._looking:
            self._looking = True
            self.process.call_soon(self._look)

    def _look(self) -> None:
        self._looking = False
        for job in list(self.jobs):
            job.look()

    def wind_up(self) -> None:
        """The engine is shutting down: it clears whatever it has, and waits for its pages."""
        for job in list(self.jobs):
            job.clear()


class Job(ABC):
    """One handle of one request. Its pages are the engine's again once it is done with them and they are released."""

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
        """How long it may take until the handle has ended, whatever happens."""

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
            self._let_go()

    def end(self, how: str) -> None:
        """What the engine had planned for this moment."""
        if how == "abort":
            self.abort()
        else:
            self.clear()

    def look(self) -> None:
        """Read the handle, as an engine does between two steps."""
        status = self.handle.poll()
        if self.outcome is None and status in (KVPoll.Failed, KVPoll.Success):
            self._ended(status)
        self._let_go()

    def released(self, pages: tuple[int, ...]) -> None:
        """`on_release`: in the loop, at once."""
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
        """The bytes are there."""
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
        self.world.violate(f"law 11: {self.name} of {self.process} failed and does not say why")
        return "no reason given"

    def _let_go(self) -> None:
        """Pages go back when the engine is done and the handle has let them go; then the job is forgotten."""
        if not (self.cleared and self.handle.released):
            return
        if self.pages is not None and not self.pages.returned:
            self.engine.pages.give_back(self.pages)
        if self in self.engine.jobs:
            self.engine.jobs.remove(self)
        if self.releases != 1:
            self.world.violate(f"law 6: {self.name} of {self.process} got its pages back {self.releases} times")

    def _ends_by(self, patience_s: float) -> None:
        """Law 7, by this process's own time: while it is stopped, nothing can end."""
        started, stopped = self.world.now, self.process.stopped_s

        def check() -> None:
            late_s = self.world.now - started - patience_s - (self.process.stopped_s - stopped)
            if late_s < 0:
                self.process.call_later(-late_s + 0.001, check)
            elif self.handle.poll() not in (KVPoll.Failed, KVPoll.Success):
                self.world.violate(f"law 7: {self.name} of {self.process} has not ended after {patience_s:.1f} s")

        self.process.call_later(patience_s, check)


class PrefillJob(Job):
    """The prefill side: pages at the start, one chunk after the other."""

    side = "source"

    def _open(self) -> Handle:
        self.sender = self.engine.manager.sender(
            self.request.number, identity=self.request.identity, on_release=self.released
        )
        return self.sender

    def _patience_s(self) -> float:
        times = self.engine.settings.timeouts
        renewed = times.waiting_s + times.bootstrap_s  # a sink that came within `bootstrap_s` renews for so long
        return times.bootstrap_s + renewed + (times.waiting_s + times.stall_s) * (len(self.request.chunks) + 2) + 1.0

    def send(self, index: int) -> None:
        """Chunk `index` is computed."""
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
    """The decode side: it offers pages, and after success it reads them for a while."""

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
        """There are pages: offer them."""
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
        sent = content(int(self.receiver.aux or -1), request.tokens)  # the source that met us, whichever it was
        want[:, :, request.prefix - first :] = sent[:, :, request.prefix :]
        wrong = int((have != want).sum())
        self.world.tally["bytes compared"] += want.size
        if wrong:
            self.world.violate(f"law 8: {wrong} wrong bytes in the pages of {self.name} of {self.process} {when}")


def _family(detail: str) -> str:
    """Which of the known causes this sentence tells."""
    return next((family for family in _FAMILIES if family in detail), f"other: {detail}")
