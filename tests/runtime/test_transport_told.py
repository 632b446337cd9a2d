"""The transport that moved a room's bytes: the source reports what it used, and both sides show the same."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from manager_helpers import TIMES, Pair

from identities import PROMPT
from kvroom import KVBootstrapServer, KVManager
from kvroom.core import effects as do
from kvroom.core import inputs as asked
from kvroom.core.messages import TEXT_CHARS, Done, Offer, Peer
from kvroom.core.settings import Timeouts
from kvroom.core.sink import Sink
from kvroom.core.source import Source
from kvroom.plan import Parallel, Place
from kvroom.transports.memory import MemoryTransport
from kvroom_lab.pools import TestPool

WAIT_S = 20.0
SOURCES = tuple(Peer(f"10.0.0.{number}:1", number) for number in range(4))


class Named(MemoryTransport):
    """Has reasons of its own for the choice, as a confined process has other reasons than its peer."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self._why = why

    def explain(self, peer: int) -> str:
        return self._why


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def manager(stack: contextlib.ExitStack, directory: str | None, why: str, dp: int = 0) -> KVManager:
    pool = TestPool()
    stack.callback(pool.close)
    made = KVManager(
        pool.layout,
        transport=Named(why),
        register_with=directory,
        timeouts=TIMES,
        parallel=Parallel(dp=2) if directory else Parallel(),
        place=Place(dp, 0, 0, 0),
    )
    return stack.enter_context(made)


def test_the_decode_side_tells_what_the_prefill_side_wrote_by(stack: contextlib.ExitStack) -> None:
    directory = stack.enter_context(KVBootstrapServer()).address
    said = ["tcp, because local was refused", "local: same machine"]
    prefill = [manager(stack, directory, why, dp) for dp, why in enumerate(said)]
    decode = manager(stack, None, "the other direction")
    for room in range(4):
        with (
            prefill[room % 2].sender(room, identity=PROMPT) as sender,
            decode.receiver(directory, room, identity=PROMPT) as receiver,
        ):
            for stop in (4, 8):
                sender.send([stop // 4], stop=stop, last=stop == 8)
            receiver.send_metadata([1, 2], tokens=8)
            assert receiver.wait(WAIT_S).transport == sender.wait(WAIT_S).transport == said[room % 2]


def test_what_moved_no_byte_names_no_transport_on_either_side() -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair("memory", stack)
        with pair.sender(7) as sender, pair.receiver(7) as receiver:
            receiver.send_metadata([], tokens=8, decode_prefix_len=8)
            sender.send([1, 2], stop=8, last=True)
            assert receiver.wait(WAIT_S).transport == sender.wait(WAIT_S).transport == ""


def test_words_that_are_too_long_for_a_message_are_cut_alike_on_both_sides(stack: contextlib.ExitStack) -> None:
    directory = stack.enter_context(KVBootstrapServer()).address
    why = "é" * (TEXT_CHARS + 1)
    prefill = [manager(stack, directory, why, dp) for dp in range(2)]
    decode = manager(stack, None, "")
    with prefill[0].sender(2, identity=PROMPT) as sender, decode.receiver(directory, 2, identity=PROMPT) as receiver:
        receiver.send_metadata([1], tokens=4)
        sender.send([2], stop=4, last=True)
        assert receiver.wait(WAIT_S).transport == sender.wait(WAIT_S).transport == why[:TEXT_CHARS]


def test_a_sink_with_several_sources_names_each_way_once_and_leaves_out_who_wrote_nothing() -> None:
    sink = Sink(Timeouts(), identity=PROMPT)
    sink.admit(7, 1, 0.0)
    sink.handle(asked.Resolved(sources=SOURCES), 0.0)
    sink.handle(asked.OfferPages(pages=(1,), start=0, stop=4, nbytes=12), 0.0)
    for source, nbytes, by in zip(SOURCES, (4, 4, 4, 0), ("tcp", "local", "tcp", ""), strict=True):
        sink.receive(source, Done(room=7, generation=1, tokens=4, nbytes=nbytes, identity=PROMPT, transport=by), 1.0)
    assert sink.status.name == "Success"
    assert sink.transports == ("tcp", "local")


def test_a_source_tells_each_sink_what_it_wrote_to_that_one() -> None:
    source = Source(Timeouts(), identity=PROMPT)
    source.admit(7, None, 0.0)
    source.handle(asked.SendPages(pages=(1,), stop=4, last=True, start=0), 0.0)
    for number, start in enumerate((0, 0, 4)):  # the last one has everything already
        source.receive(
            SOURCES[number],
            Offer(room=7, generation=number, start=start, stop=4, pages=(1,), identity=PROMPT, sinks=3),
            0.0,
        )
    todo = source.take_effects()
    for effect in todo:
        if isinstance(effect, do.Submit):
            by = "tcp" if effect.peer == SOURCES[0] else "local"
            source.handle(asked.Landed(transfer=effect.transfer, nbytes=4, transport=by), 1.0)
    said = [effect for effect in (*todo, *source.take_effects()) if isinstance(effect, do.Send)]
    told = {one.peer: one.message.transport for one in said if isinstance(one.message, Done)}
    assert told == {SOURCES[0]: "tcp", SOURCES[1]: "local", SOURCES[2]: ""}
    assert source.transports == ("tcp", "local")


CONFINED = textwrap.dedent(
    """
    import ctypes, sys
    filter = bytes.fromhex(sys.argv[2])
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
    libc, held = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(filter, len(filter))
    program = Program(len(filter) // 8, ctypes.cast(held, ctypes.c_void_p).value)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER

    from identities import PROMPT
    from kvroom import KVManager
    from kvroom_lab.pools import TestPool

    pool = TestPool()
    with KVManager(pool.layout, register_with=sys.argv[1]) as manager, manager.sender(7, identity=PROMPT) as sender:
        print("up", flush=True)
        sender.send([1], stop=4, last=True)
        print(sender.wait(20).transport, flush=True)
    """
)
_PROCESS_VM_WRITEV = 311
_EPERM = 1


def refusing(syscall: int, error: int) -> bytes:
    """A seccomp filter (linux/filter.h) for x86-64 under which one system call fails."""
    return b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (0x20, 0, 0, 0),  # load the number of the call
            (0x15, 0, 1, syscall),  # is it this one?
            (0x06, 0, 0, 0x00050000 | error),  # SECCOMP_RET_ERRNO
            (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
        )
    )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter has the number of a system call on x86-64")
def test_a_confined_prefill_side_is_told_alike_by_both_processes() -> None:
    """In the other direction `auto` would use `local`: only the side that writes is confined."""
    assert ctypes.CDLL(None).prctl(21, 0, 0, 0, 0) >= 0, "a kernel without seccomp (PR_GET_SECCOMP)"
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(KVBootstrapServer()).address
        pool = TestPool()
        stack.callback(pool.close)
        confined = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", CONFINED, directory, refusing(_PROCESS_VM_WRITEV, _EPERM).hex()],
                stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
            )
        )  # fmt: skip
        stack.callback(confined.kill)
        assert confined.stdout is not None
        assert confined.stdout.readline() == "up\n"
        decode = stack.enter_context(KVManager(pool.layout))
        receiver = stack.enter_context(decode.receiver(directory, 7, identity=PROMPT))
        receiver.send_metadata([1], tokens=4)
        told = receiver.wait(WAIT_S).transport
        assert "process_vm_writev into process" in told
        assert told == confined.stdout.readline().strip()
