"""A toy engine that misuses the library: its room fails or goes on with one clear error, and all others succeed.

Two prefill ranks (tensor parallel) in this process hand over to one decode rank in another. Beside each mistake a room
of another request is half done, and must succeed afterwards.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import queue
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import pytest

from kvroom import (
    Audit,
    KVBootstrapServer,
    KVIdentity,
    KVLayout,
    KVManager,
    KVReceiver,
    KVRoomError,
    KVSender,
    Parallel,
    Place,
    Timeouts,
)
from kvroom.plan import array_regions

TIMES = Timeouts(bootstrap_s=30, waiting_s=30, stall_s=30, drain_s=5)
HEADS, TOKENS, PAGE = 4, 8, 4
TWO, ONE = Parallel(tp=2, kv_heads=HEADS), Parallel(kv_heads=HEADS)
REQUEST = KVIdentity.of(range(TOKENS))
WAIT_S = 20.0


def new_pool(parallel: Parallel, rank: int = 0) -> tuple[Any, KVLayout]:
    """Return zeroed memory of one rank and its layout: 2 layers, 16 pages of 4 tokens, this rank's heads."""
    first, stop = parallel.heads(rank)
    pool = np.zeros((2, 2, 16, PAGE, stop - first, 8), np.uint8)
    regions = array_regions(
        pool.ctypes.data, pool.shape, pool.strides, "LCPTHD", itemsize=1, layers=range(2), first_head=first
    )
    return pool, KVLayout(regions, dtype="uint8")


def fail(*_: object) -> None:
    raise ValueError("planted by the test")


class Decode:
    """The decode engine, in a process of its own. Each public method is a command."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._pool, layout = new_pool(ONE)
        self._news: queue.Queue[None] = queue.Queue()
        self.manager = KVManager(
            layout, transport="tcp", parallel=ONE, timeouts=TIMES, on_change=lambda: self._news.put(None)
        )
        self._rooms: dict[int, KVReceiver] = {}

    def open(self, room: int, **options: Any) -> None:
        self._rooms[room] = self.manager.receiver(self._address, room, **{"identity": REQUEST, **options})

    def open_with_a_callback_that_raises(self, room: int) -> None:
        self.open(room, on_release=fail)

    def offer(self, room: int, **wrong: Any) -> None:
        pages = wrong.pop("pages", [room % 8 * 2, room % 8 * 2 + 1])
        self._rooms[room].send_metadata(pages, **{"tokens": TOKENS, **wrong})

    def abort(self, room: int, detail: Any) -> None:
        self._rooms[room].abort(detail)

    def end(self, room: int) -> tuple[bytes, bytes] | str:
        """Wait for a room. Return its metadata and the bytes of its pages, or the reason of its failure."""
        try:
            done = self._rooms[room].wait(WAIT_S)
        except KVRoomError as error:
            return str(error)
        finally:
            self._rooms.pop(room).clear()
        return done.aux, self._pool[:, :, room % 8 * 2 : room % 8 * 2 + 2].tobytes()

    def new_manager(self, **options: Any) -> None:
        KVManager(new_pool(ONE)[1], transport="tcp", **options).close()

    def peers(self) -> int:
        return len(self.manager.peers())

    def idle(self) -> tuple[bool, Audit]:
        return self.manager.wait_idle(WAIT_S), self.manager.audit()


def decode_process(control: Connection, address: str) -> None:
    engine = Decode(address)
    with engine.manager:
        while True:
            name, arguments, options = control.recv()
            try:
                control.send((True, getattr(engine, name)(*arguments, **options)))
            except KVRoomError as error:
                control.send((False, f"{type(error).__name__}: {error}"))


class Engines:
    """Both sides, as a test calls them."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        address = stack.enter_context(KVBootstrapServer()).address
        self.pools, self.managers = [], []
        for rank in range(2):
            pool, layout = new_pool(TWO, rank)
            pool[:] = np.random.default_rng(rank).integers(1, 256, pool.shape, np.uint8)
            self.pools.append(pool)
            self.managers.append(
                stack.enter_context(
                    KVManager(
                        layout,
                        transport="tcp",
                        parallel=TWO,
                        place=Place(0, 0, rank, 0),
                        timeouts=TIMES,
                        register_with=address,
                        on_change=fail if rank else None,  # one of the mistakes, in every test
                    )
                )
            )
        context = multiprocessing.get_context("spawn")
        self._control, theirs = context.Pipe()
        process = context.Process(target=decode_process, args=(theirs, address), daemon=True)
        process.start()
        theirs.close()
        stack.callback(process.join)
        stack.callback(process.kill)
        self.numbers = itertools.count(1)

    def decode(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Call the decode engine. Raises `KVRoomError` with its error's type and text."""
        self._control.send((name, arguments, options))
        assert self._control.poll(2 * WAIT_S)
        well, answer = self._control.recv()
        if not well:
            raise KVRoomError(answer)
        return answer

    def open(self, room: int, **options: Any) -> list[KVSender]:
        return [manager.sender(room, **{"identity": REQUEST, **options}) for manager in self.managers]

    def succeed(self, room: int, senders: list[KVSender]) -> None:
        """Send the rest of a room that was offered, and compare every byte on the other side."""
        for sender in senders:
            sender.send([room % 8 * 2, room % 8 * 2 + 1], start=0, stop=TOKENS, last=True, aux=b"first")
        aux, pages = self.decode("end", room)
        for sender in senders:
            assert sender.wait(WAIT_S).tokens == TOKENS
            sender.clear()
        ours = np.concatenate([pool[:, :, room % 8 * 2 : room % 8 * 2 + 2] for pool in self.pools], axis=4)
        assert (aux, pages) == (b"first", ours.tobytes())


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    with contextlib.ExitStack() as stack:
        yield Engines(stack)


@pytest.fixture
def bystander(engines: Engines) -> Iterator[None]:
    """Keep a room of another request half done during the test, and finish it afterwards; nothing is left then."""
    room = next(engines.numbers)
    senders = engines.open(room)
    engines.decode("open", room)
    engines.decode("offer", room)
    yield
    engines.succeed(room, senders)
    assert engines.decode("idle") == (True, Audit())
    for manager in engines.managers:
        assert manager.wait_idle(WAIT_S)
        assert manager.audit() == Audit()
    assert engines.decode("peers") == 2  # no link was lost because of the mistake


class Mistake(NamedTuple):
    """Wrong arguments of one call, and the words that the error must contain."""

    wrong: dict[str, Any]
    words: str


OFFERS = [
    Mistake({"pages": "0,1"}, "pages is a str, '0,1': give a flat sequence of page numbers"),
    Mistake({"pages": [0.0, 1.0]}, "a page number in pages is 0.0: give an int"),
    Mistake({"pages": np.array([[0, 1]])}, r"a page number in pages is \[0, 1\]: give an int"),
    Mistake({"pages": [0, 99]}, "99"),
    Mistake({"pages": [0, 0]}, "twice|distinct|different"),
    Mistake({"tokens": 8.0}, "tokens is 8.0: give an int"),
    Mistake({"tokens": "8"}, "tokens is '8': give an int"),
    Mistake(
        {"tokens": 2**70, "decode_prefix_len": 2**70, "pages": []}, "tokens is 1180591620717411303424: give an int"
    ),
    Mistake({"decode_prefix_len": None}, "decode_prefix_len is None: give an int"),
    Mistake({"stop": np.float64(8)}, r"stop is .*8.0\)?: give an int"),
    Mistake({"checksum": "no"}, "checksum is 'no': give True or False"),
    Mistake({"windows": [("swa", [1])]}, "windows is a list, .*: give a mapping"),
    Mistake({"windows": {"swa": [1]}}, "swa"),
]
SENDS = [
    Mistake({"pages": None}, "pages is a NoneType, None: give a flat sequence of page numbers"),
    Mistake({"pages": [True, False]}, "a page number in pages is True: give an int"),
    Mistake({"stop": np.float32(8)}, r"stop is .*8.0\)?: give an int"),
    Mistake({"stop": -8}, "stop is -8: give an int"),
    Mistake({"start": "0"}, "start is '0': give an int"),
    Mistake({"last": 1}, "last is 1: give True or False"),
    Mistake({"aux": "first"}, "aux is a str, 'first': give bytes"),
    Mistake({"aux": {"token": 1}}, "aux is a dict, .*: give bytes"),
    Mistake({"aux": bytes((1 << 20) + 1)}, "aux has 1048577 bytes, and the limit is 1048576"),
    Mistake({"windows": {"swa": [1]}}, "swa"),
]


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("mistake", OFFERS, ids=lambda mistake: str(mistake.wrong)[:60])
def test_a_wrong_offer_is_refused_at_the_call_and_may_be_repeated(engines: Engines, mistake: Mistake) -> None:
    room = next(engines.numbers)
    senders = engines.open(room)
    engines.decode("open", room)
    with pytest.raises(KVRoomError, match=mistake.words):
        engines.decode("offer", room, **mistake.wrong)
    engines.decode("offer", room)
    engines.succeed(room, senders)


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("mistake", SENDS, ids=lambda mistake: str(mistake.wrong)[:60])
def test_a_wrong_send_is_refused_at_the_call_and_may_be_repeated(engines: Engines, mistake: Mistake) -> None:
    room = next(engines.numbers)
    senders = engines.open(room)
    engines.decode("open", room)
    engines.decode("offer", room)
    pages = mistake.wrong.get("pages", [room % 8 * 2, room % 8 * 2 + 1])
    options = {"stop": TOKENS, "last": True, **mistake.wrong}
    options.pop("pages", None)
    for sender in senders:
        with pytest.raises(KVRoomError, match=mistake.words):
            sender.send(pages, **options)
    engines.succeed(room, senders)


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize(
    ("call", "options", "words"),
    [
        ("open", {"identity": "digest"}, r"invalid identity of room None: 'digest'; give KVIdentity.of\(token_ids\)"),
        ("open", {"identity": KVIdentity((("tokens", "x" * 65),))}, r"give KVIdentity.of\(token_ids\)"),
        ("open", {"identity": KVIdentity((("tokens", "x"), ("\ud800", "x")))}, r"give KVIdentity.of\(token_ids\)"),
        ("new_manager", {"secret": b"x"}, "the secret has 1 bytes, too short to be safe"),
        ("new_manager", {"secret": "a text that is long enough"}, "the secret is of type str: give bytes"),
    ],
)
def test_other_wrong_calls(engines: Engines, call: str, options: dict[str, Any], words: str) -> None:
    arguments = (next(engines.numbers),) if call == "open" else ()
    with pytest.raises(KVRoomError, match=words):
        engines.decode(call, *arguments, **options)


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("number", ["7", 7.0, None, True, -1, 2**63, b"7"])
def test_a_wrong_room_number(engines: Engines, number: Any) -> None:
    handle = engines.managers[0].sender()
    with pytest.raises(KVRoomError, match=r"bootstrap_room is .*: give an int of at least 0"):
        handle.init(number)
    handle.clear()


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("address", [None, 8998, b"127.0.0.1:8998", ("127.0.0.1", 8998)])
def test_a_directory_that_is_no_text(engines: Engines, address: Any) -> None:
    with pytest.raises(KVRoomError, match=r"bootstrap_addr is .*: give the directory's address, host:port"):
        engines.managers[0].receiver(address, next(engines.numbers))


@pytest.mark.usefixtures("bystander")
def test_numbers_of_numpy_are_numbers(engines: Engines) -> None:
    room = np.int64(next(engines.numbers))
    senders = engines.open(room)
    engines.decode("open", int(room))
    pages = np.array([room % 8 * 2, room % 8 * 2 + 1], np.int32)
    engines.decode("offer", int(room), pages=pages, tokens=np.int64(TOKENS), checksum=np.bool_(True))
    for sender in senders:
        sender.send(pages[:1], stop=np.uint8(PAGE), last=bool(np.bool_(False)), aux=bytearray(b"early"))
        sender.send(pages[1:], stop=np.int16(TOKENS), last=True, aux=memoryview(b"first"))
    assert engines.decode("end", int(room))[0] == b"first"
    for sender in senders:
        sender.wait(WAIT_S)
        sender.clear()


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_callback_that_raises_concerns_nobody_else(
    engines: Engines, caplog: pytest.LogCaptureFixture, side: str
) -> None:
    room = next(engines.numbers)
    senders = engines.open(room, on_release=fail if side == "prefill" else None)
    engines.decode("open" if side == "prefill" else "open_with_a_callback_that_raises", room)
    engines.decode("offer", room)
    engines.succeed(room, senders)
    assert all(sender.released for sender in senders)
    if side == "prefill":
        assert f"the engine's on_release of room {room} raised" in caplog.text
        assert "planted by the test" in caplog.text


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("detail", ["x" * 5000, "a lone surrogate \ud800", 17, None, ValueError("an exception")])
def test_any_cause_of_an_abort_reaches_the_other_side(engines: Engines, side: str, detail: Any) -> None:
    room = next(engines.numbers)
    senders = engines.open(room)
    engines.decode("open", room)
    engines.decode("offer", room)
    if side == "prefill":
        senders[0].abort(detail)
    else:
        engines.decode("abort", room, str(detail) if isinstance(detail, Exception) else detail)
    words = str(detail)[:200].replace("\ud800", "?")
    assert words in engines.decode("end", room)
    for sender in senders:
        with pytest.raises(KVRoomError) as failed:
            sender.wait(WAIT_S)
        assert words in str(failed.value)
        sender.clear()


def test_the_callback_that_raised_all_the_time_was_logged(engines: Engines, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        sender = engines.managers[1].sender(next(engines.numbers), identity=REQUEST)
        sender.abort("to change something")
        with pytest.raises(KVRoomError):
            sender.wait(WAIT_S)
        sender.clear()
    assert engines.managers[1].wait_idle(WAIT_S)
    assert "the engine's on_change raised; no room is affected" in caplog.text
