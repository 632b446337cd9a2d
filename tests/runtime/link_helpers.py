"""Common parts of the link tests: a handler that records its calls, and a peer of raw bytes that may misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from kvroom.core.messages import Message, Peer
from kvroom.errors import AuthenticationError
from kvroom.runtime.link import LinkLimits, Links
from kvroom.wire.address import parse_address
from kvroom.wire.frames import Control, Envelope, FrameReader, Inquiry, Open, decode_envelope, encode_envelope
from kvroom.wire.handshake import Handshake, LinkIdentity, Role

SECRET = b"a secret for tests, long enough"
WAIT_S = 20.0
LOWEST, HIGHEST = 0, 2**64 - 1

Up = tuple[str, Peer, bytes]
Lost = tuple[str, Peer, str]
Got = tuple[str, Peer, int, Message | Inquiry]


@dataclass
class Recorder:
    """A `LinkHandler` that keeps every call, in order, and lets a test wait for the next one."""

    events: list[Up | Lost | Got] = field(default_factory=list)
    react: Callable[[Up | Lost | Got], None] | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _read: int = 0

    def on_up(self, peer: Peer, identity: bytes) -> None:
        self._note(("up", peer, identity))

    def on_lost(self, peer: Peer, detail: str) -> None:
        self._note(("lost", peer, detail))

    def on_message(self, peer: Peer, seq: int, message: Message | Inquiry) -> None:
        self._note(("got", peer, seq, message))

    def _note(self, event: Up | Lost | Got) -> None:
        self.events.append(event)
        self._news.set()
        if self.react is not None:
            self.react(event)

    async def next(self, kind: str) -> Up | Lost | Got:
        """The next event, which must be of this kind."""
        while self._read == len(self.events):
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), WAIT_S)
        event = self.events[self._read]
        self._read += 1
        assert event[0] == kind, f"expected {kind}, got {event}"
        return event

    async def detail(self) -> str:
        event = await self.next("lost")
        assert isinstance(event[2], str)
        return event[2]


@contextlib.asynccontextmanager
async def linked(
    *,
    host: str = "127.0.0.1",
    advertise_host: str | None = None,
    secret: bytes = SECRET,
    incarnation: int | None = None,
    keyed: bool = False,
    identity: bytes = b"id",
    limits: LinkLimits | None = None,
) -> AsyncIterator[tuple[Links, Recorder]]:
    """Listening links with their recorder; with `keyed`, as those of a real manager, with which no `RawPeer` links.

    When the block ends, nothing may be left: no socket, no stranger, no dial.
    """
    recorder = Recorder()
    if incarnation is None and not keyed:
        incarnation = secrets.randbits(64)
    links = Links(
        recorder,
        identity=identity,
        host=host,
        advertise_host=advertise_host,
        secret=secret,
        incarnation=incarnation,
        limits=limits,
    )
    await links.start()
    try:
        yield links, recorder
    finally:
        await links.close()
        assert not links._connections
        assert not links._strangers
        assert not links._links
        assert not links._reached
        assert not links._dials
        ups = [event[1] for event in recorder.events if event[0] == "up"]
        losts = [event[1] for event in recorder.events if event[0] == "lost"]
        assert sorted(ups) == sorted(losts)


class RawPeer:
    """One connection driven by hand, over asyncio streams and the sans-IO parts only."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._frames = FrameReader()

    @classmethod
    async def connect(cls, links: Links) -> RawPeer:
        host, port = parse_address(links.me.address)
        return cls(*await asyncio.open_connection(host, port))

    @classmethod
    async def greet(
        cls, links: Links, incarnation: int, address: str = "10.9.9.9:9", attempt: int = 1, held: tuple[int, ...] = ()
    ) -> RawPeer:
        """Connect and finish the handshake; with the lower incarnation also send `Open(attempt)`."""
        raw = await cls.connect(links)
        handshake = Handshake(
            Role.DIALLER,
            SECRET,
            Peer(address, incarnation),
            lambda _: LinkIdentity(b"raw", attempt, held),
            dialled=links.me.address,
        )
        raw.writer.write(handshake.take())
        try:
            while not handshake.complete:
                handshake.receive(await raw.frame())
                raw.writer.write(handshake.take())
        except AuthenticationError:
            await raw.close()
            raise
        if incarnation == LOWEST:
            raw.say(Open(attempt))
        return raw

    def say(self, message: Message | Control, seq: int = 0) -> None:
        self.writer.write(encode_envelope(seq, message))

    async def frame(self) -> bytes:
        while (body := self._frames.next_frame()) is None:
            data = await asyncio.wait_for(self.reader.read(1 << 16), WAIT_S)
            if not data:
                raise EOFError
            self._frames.feed(data)
        return body

    async def hear(self) -> Envelope:
        return decode_envelope(await self.frame())

    async def heard_end(self) -> bool:
        """Read until the other side closes, in whatever way; return whether it did."""
        try:
            while await asyncio.wait_for(self.reader.read(1 << 16), WAIT_S):
                pass
        except ConnectionError:
            return True
        return True

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()
