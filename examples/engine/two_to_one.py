"""Hand requests from two prefill ranks to one decode rank on another host. docs/engine.md explains every part of it.

    python examples/engine/two_to_one.py prefill --rank 0 --ranks tcp://10.0.0.1:29500 --host 10.0.0.1
    python examples/engine/two_to_one.py prefill --rank 1 --ranks tcp://10.0.0.1:29500 --host 10.0.0.1
    python examples/engine/two_to_one.py decode --host 10.0.0.2 --bootstrap-allow 10.0.0.1

All three need the same KVROOM_SECRET_FILE (or KVROOM_SECRET). Rank 0 of the prefill engine and the decode engine read
requests from stdin, one JSON object per line; the same line goes to both, in any order, as from a router:

    {"room": 1, "tokens": [3, 1, 4, 1, 5], "bootstrap": "10.0.0.1:8998"}

Results are printed on stdout in the same form, and the log is on stderr. The end of stdin ends an engine.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import queue
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from kvroom import (
    Agreement,
    Aux,
    Carrier,
    KVBootstrapServer,
    KVIdentity,
    KVLayout,
    KVManager,
    KVPoll,
    KVReceiver,
    KVRoomError,
    KVSender,
    Parallel,
    Place,
    RankConsensus,
    TorchCarrier,
    array_regions,
    decode_aux,
    encode_aux,
    load_secret,
)
from kvroom.network import HostPort, parse_address
from kvroom.status import StatusServer, configure_logs

# -- what both engines know: the request, the model, the pool --------------------------------------------------------

MODEL, LAYERS, HEADS, DIM, PAGE_TOKENS = "stand-in", 2, 4, 8, 16
ADAPTERS = {"", "french"}


class Request(msgspec.Struct):
    """One request as the router sends it to both engines."""

    room: int
    tokens: list[int]
    bootstrap: str = ""  # host:port of the prefill engine's directory; only the decode engine needs it
    adapter: str = ""

    def identity(self) -> KVIdentity:
        """Return everything that decides the KV cache; the room compares it before a byte is written."""
        return KVIdentity.of(self.tokens, adapter=self.adapter)

    def pages(self) -> int:
        """Return the number of pages that the request needs."""
        return -(-len(self.tokens) // PAGE_TOKENS)


def compute(tokens: Sequence[int], heads: tuple[int, int]) -> np.ndarray:
    """Return the KV cache of a prompt for these heads, [layers, 2, tokens, heads, DIM]. It stands in for a model."""
    history = np.cumsum(np.arange(1, len(tokens) + 1) * np.asarray(tokens)) % 9973  # of each token and all before it
    weights = np.arange(1, LAYERS * 2 * HEADS * DIM + 1).reshape(LAYERS, 2, 1, HEADS, DIM)
    cache = history[:, None, None] * weights % 65521
    return cache[:, :, :, heads[0] : heads[1]].astype(np.float32)


class Pool:
    """The KV pool of one rank, and the list of its free pages."""

    def __init__(self, pages: int, heads: tuple[int, int]) -> None:
        first, stop = heads
        self.memory = np.zeros((LAYERS, 2, pages, PAGE_TOKENS, stop - first, DIM), np.float32)
        regions = array_regions(
            self.memory.ctypes.data,
            self.memory.shape,
            self.memory.strides,
            "LCPTHD",
            itemsize=4,
            layers=range(LAYERS),
            first_head=first,
        )
        self.layout = KVLayout(regions, dtype="float32", model=MODEL)
        self.pages = pages
        self.free = list(range(pages))

    def take(self, count: int) -> list[int]:
        """Take pages off the free list."""
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def give_back(self, pages: Sequence[int]) -> None:
        """Put pages back on the free list."""
        self.free += pages

    def slots(self, pages: Sequence[int], start: int, stop: int) -> tuple[Any, ...]:
        """Return the index of tokens [start, stop) of a request that has these pages."""
        tokens = np.arange(start, stop)
        return (slice(None), slice(None), np.asarray(pages)[tokens // PAGE_TOKENS], tokens % PAGE_TOKENS)


def say(**facts: object) -> None:
    """Print one line for the caller of this process."""
    print(json.dumps(facts), flush=True)


# -- the prefill engine: two ranks in lockstep -----------------------------------------------------------------------

RANKS = 2
CHUNK_TOKENS = 32
PATIENCE_S = 60.0  # a rank that is silent for this long counts as gone
IDLE_S, BUSY_S = 0.5, 0.005  # rank 0 waits this long for the next request before the ranks take their next step


@dataclass(eq=False)
class Sending:
    """A request on one prefill rank."""

    request: Request
    sender: KVSender
    pages: list[int] = field(default_factory=list)
    computed: int = 0  # tokens
    over: bool = False  # the ranks have agreed on its end


class PrefillRank:
    """One rank of the prefill engine. Every rank takes the same steps with the same requests."""

    def __init__(self, manager: KVManager, pool: Pool, heads: tuple[int, int], carrier: Carrier) -> None:
        self.manager, self.pool, self.heads, self.carrier = manager, pool, heads, carrier
        self.agreement = Agreement(carrier)
        self.jobs: dict[int, Sending] = {}  # by room

    def step(self, arrivals: Sequence[Request]) -> None:
        """Open the rooms of new requests, compute a chunk of each open one, and end those on which all ranks agree."""
        for request in arrivals:
            self.open(request)
        for job in self.jobs.values():
            self.advance(job)
        states = {room: state(job.sender) for room, job in self.jobs.items() if not job.over}
        for room, agreed in self.agreement.agree(states).items():
            if agreed.status in (KVPoll.Success, KVPoll.Failed):
                self.end(self.jobs[room], agreed)
        over = [job for job in self.jobs.values() if job.over]
        released = self.carrier.least([job.sender.released for job in over]) if over else []
        for job, everywhere in zip(over, released, strict=True):
            if everywhere:  # no transfer of any rank reads the pages: all ranks free them in the same step
                self.pool.give_back(job.pages)
                del self.jobs[job.request.room]
                say(room=job.request.room, freed=len(job.pages))

    def open(self, request: Request) -> None:
        """Open the room, or reject the request, so that the decode engine gets the cause when it joins."""
        room = request.room
        if room in self.jobs:
            say(room=room, failed=f"room {room} is still in use here")
        elif request.adapter not in ADAPTERS:
            reason = f"there is no adapter {request.adapter!r} here"
            self.manager.sender(room).abort_and_linger(reason)
            say(room=room, failed=reason)
        elif request.pages() > self.pool.pages:
            reason = f"the prompt needs {request.pages()} pages, the prefill engine has {self.pool.pages}"
            self.manager.sender(room).abort_and_linger(reason)
            say(room=room, failed=reason)
        else:
            self.jobs[room] = Sending(request, self.manager.sender(room, identity=request.identity()))

    def advance(self, job: Sending) -> None:
        """Compute the next chunk of a request and hand it over while the following one is computed."""
        tokens = job.request.tokens
        if job.over or job.computed == len(tokens):
            return
        if not job.pages:
            if job.request.pages() > len(self.pool.free):
                return  # later; the decode engine waits
            job.pages = self.pool.take(job.request.pages())
        start, stop = job.computed, min(job.computed + CHUNK_TOKENS, len(tokens))
        cache = compute(tokens, self.heads)[:, :, start:stop]
        self.pool.memory[self.pool.slots(job.pages, start, stop)] = cache
        last = stop == len(tokens)
        aux = encode_aux(Aux(tokens=len(tokens), first_token=int(sum(tokens)) % 1000)) if last else b""
        pages = job.pages[start // PAGE_TOKENS : -(-stop // PAGE_TOKENS)]
        job.sender.send(pages, stop=stop, last=last, aux=aux)
        job.computed = stop

    def end(self, job: Sending, agreed: RankConsensus) -> None:
        """End the room with the result of the rank that was first to fail, or last to succeed."""
        room = job.request.room
        if agreed.status is KVPoll.Failed:
            job.sender.abort(agreed.detail or "")  # does nothing if it has ended here, too
            say(room=room, failed=agreed.sentence(room))
        else:
            say(room=room, succeeded=True)
        job.sender.clear()
        job.over = True

    def give_up(self, cause: str) -> None:
        """End every room with this cause."""
        for job in self.jobs.values():
            job.sender.abort(cause)


def state(handle: KVSender) -> tuple[KVPoll, str | None]:
    """Return the status of a room on this rank, and the cause if it failed."""
    status = handle.poll()
    try:
        handle.failure_exception()
    except KVRoomError as error:
        return status, str(error)
    return status, None


def prefill(options: argparse.Namespace) -> None:
    """Run one prefill rank until stdin of rank 0 ends, or another rank is gone."""
    import torch.distributed as dist  # the decode engine, one rank alone, needs no torch

    secret = load_secret(os.environ)
    reached_by = options.advertise_host or options.host
    parallel = Parallel(tp=RANKS, kv_heads=HEADS)
    heads = parallel.heads(options.rank)
    pool = Pool(options.pages, heads)
    with contextlib.ExitStack() as stack:
        dist.init_process_group("gloo", init_method=options.ranks, rank=options.rank, world_size=RANKS)
        stack.callback(dist.destroy_process_group)
        carrier = TorchCarrier(timeout_s=PATIENCE_S)
        stack.callback(carrier.close)
        directory = b""
        if options.rank == 0:  # one directory for the whole engine
            server = KVBootstrapServer(options.host, options.bootstrap_port, secret=secret)
            port = parse_address(stack.enter_context(server).address).port
            directory = str(HostPort(reached_by, port)).encode()
        directory = carrier.gather(directory)[0]  # of rank 0
        manager = KVManager(
            pool.layout,
            host=options.host,
            advertise_host=options.advertise_host,
            transport="tcp",
            secret=secret,
            register_with=directory.decode(),
            parallel=parallel,
            place=Place(dp=0, cp=0, tp=options.rank, pp=0),
        )
        stack.enter_context(manager)
        window = stack.enter_context(StatusServer(manager, port=options.status_port))
        engine = PrefillRank(manager, pool, heads, carrier)
        inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        if options.rank == 0:
            read_requests(inbox)
        say(ready=True, bootstrap=directory.decode(), rooms=window.url)
        try:
            while True:
                found = arrived(inbox, BUSY_S if engine.jobs else IDLE_S) if options.rank == 0 else []
                arrivals = msgspec.json.decode(carrier.gather(msgspec.json.encode(found))[0], type=list[Request | None])
                if None in arrivals:
                    return
                engine.step([request for request in arrivals if request is not None])
        except KVRoomError as error:  # another rank is gone, and this rank's part is of no use alone
            engine.give_up(str(error))
            raise SystemExit(str(error)) from None


def read_requests(inbox: queue.SimpleQueue[Any]) -> None:
    """Put the requests of stdin into a queue, from a thread of its own, and None at the end."""

    def read() -> None:
        for line in sys.stdin:
            inbox.put(msgspec.json.decode(line, type=Request))
        inbox.put(None)

    threading.Thread(target=read, daemon=True).start()


def arrived(inbox: queue.SimpleQueue[Request | None], timeout_s: float) -> list[Request | None]:
    """Return the items that have arrived; wait at most `timeout_s` for the first one."""
    found = []
    with contextlib.suppress(queue.Empty):
        found.append(inbox.get(timeout=timeout_s))
        while True:
            found.append(inbox.get_nowait())
    return found


# -- the decode engine: one rank -------------------------------------------------------------------------------------


@dataclass(eq=False)
class Receiving:
    """A request on the decode engine. Its pages are free once it is `over` and `released`, whichever comes last."""

    request: Request
    receiver: KVReceiver
    pages: list[int] = field(default_factory=list)
    over: bool = False  # this engine is done with the request
    released: bool = False  # no prefill rank can write into its pages


class DecodeEngine:
    """The decode engine. It keeps the pages of the request that ended last, for a prompt that begins like that one."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.jobs: dict[int, Receiving] = {}  # by room
        self.kept, self.kept_pages = Request(room=0, tokens=[]), list[int]()

    def run(self, manager: KVManager) -> None:
        """Serve until stdin ends. A new request, a change of a room and a release are events; the rest is waiting."""
        read_requests(self.events)
        while (event := self.events.get()) is not None:
            if isinstance(event, Request):
                self.open(manager, event)
            elif isinstance(event, int):
                self.jobs[event].released = True
            for job in list(self.jobs.values()):
                self.advance(job)

    def counts(self) -> dict[str, Any]:
        """Return the figures at the top of `/rooms`. The status server calls this in its own thread."""
        return {"free_pages": len(self.pool.free)}

    def open(self, manager: KVManager, request: Request) -> None:
        """Open the room even without pages for it, to show the prefill engine that the request is wanted."""
        room = request.room
        if room in self.jobs:
            say(room=room, failed=f"room {room} is still in use here")
            return
        try:
            receiver = manager.receiver(
                request.bootstrap, room, identity=request.identity(), on_release=lambda _: self.events.put(room)
            )
        except KVRoomError as error:  # no address, or one that is not allowed: there is no room
            say(room=room, failed=str(error))
            return
        self.jobs[room] = Receiving(request, receiver)
        if request.pages() > self.pool.pages:
            receiver.abort(f"the prompt needs {request.pages()} pages, the decode engine has {self.pool.pages}")

    def advance(self, job: Receiving) -> None:
        """Take the next step that a request can take."""
        status = job.receiver.poll()
        if not job.over and status is KVPoll.Success:
            self.decode(job)
            self.end(job)
        elif not job.over and status is KVPoll.Failed:
            try:
                job.receiver.failure_exception()
            except KVRoomError as error:
                say(room=job.request.room, failed=str(error))
            self.end(job)
        elif not job.over and not job.pages and job.request.pages() <= len(self.pool.free) + len(self.kept_pages):
            self.offer(job)
        if job.over and job.released:
            self.free(job, keep=status is KVPoll.Success)

    def offer(self, job: Receiving) -> None:
        """Offer pages for those tokens whose cache is not here yet. Without enough pages the room waits, and renews."""
        request = job.request
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(request.tokens, self.kept.tokens, strict=False))
        whole = min(sum(1 for _ in same) // PAGE_TOKENS, len(self.kept_pages))
        if request.adapter != self.kept.adapter:
            whole = 0
        self.pool.give_back(self.kept_pages[whole:])
        job.pages = self.kept_pages[:whole] + self.pool.take(request.pages() - whole)
        self.kept_pages = []
        job.receiver.send_metadata(job.pages[whole:], tokens=len(request.tokens), decode_prefix_len=whole * PAGE_TOKENS)
        say(room=request.room, offered=len(job.pages) - whole)

    def decode(self, job: Receiving) -> None:
        """Read the cache. A real engine decodes here, and holds the pages until it has finished."""
        cache = self.pool.memory[self.pool.slots(job.pages, 0, len(job.request.tokens))]
        result = job.receiver.wait(0)  # present when `poll` returns Success
        say(
            room=job.request.room,
            succeeded=True,
            first_token=decode_aux(result.aux).first_token,
            nbytes=result.nbytes,
            cache=hashlib.sha256(cache.tobytes()).hexdigest(),
        )

    def end(self, job: Receiving) -> None:
        """Clear the room. Its pages are released through `on_release`, which may have been called already."""
        job.receiver.clear()
        job.over = True

    def free(self, job: Receiving, *, keep: bool) -> None:
        """Free the pages of a request, or keep them instead of those that were kept before."""
        if keep:
            self.pool.give_back(self.kept_pages)
            self.kept, self.kept_pages = job.request, job.pages
        else:
            self.pool.give_back(job.pages)
        del self.jobs[job.request.room]
        say(room=job.request.room, released=True)
        self.events.put("pages are free")


def decode(options: argparse.Namespace) -> None:
    """Run the decode engine until stdin ends."""
    engine = DecodeEngine(Pool(options.pages, (0, HEADS)))
    manager = KVManager(
        engine.pool.layout,
        host=options.host,
        advertise_host=options.advertise_host,
        transport="tcp",
        secret=load_secret(os.environ),
        bootstrap_allow=options.bootstrap_allow,
        parallel=Parallel(kv_heads=HEADS),
        on_change=lambda: engine.events.put("a room has changed"),
    )
    with manager, StatusServer(manager, port=options.status_port, extra=engine.counts) as window:
        say(ready=True, rooms=window.url)
        engine.run(manager)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="two prefill ranks and one decode rank")
    parser.add_argument("role", choices=("prefill", "decode"))
    parser.add_argument("--host", default="127.0.0.1", help="the address at which this process listens")
    parser.add_argument("--advertise-host", help="the address by which the other host reaches it, if it is another")
    parser.add_argument("--pages", type=int, default=64, help="pages of the pool")
    parser.add_argument("--status-port", type=int, default=0, help="port of /rooms and /metrics on 127.0.0.1")
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    parser.add_argument("--rank", type=int, default=0, help="prefill: which of the two ranks this is")
    parser.add_argument("--ranks", default="tcp://127.0.0.1:29500", help="prefill: where the ranks meet (torch)")
    parser.add_argument("--bootstrap-port", type=int, default=8998, help="prefill, rank 0: port of the directory")
    parser.add_argument("--bootstrap-allow", help="decode: the hosts whose directories requests may name")
    options = parser.parse_args()
    configure_logs("info", options.log_format)
    run = prefill if options.role == "prefill" else decode
    run(options)


if __name__ == "__main__":
    main()
