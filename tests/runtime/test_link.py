"""Links over real sockets: one link per peer, every loss reported once and immediately, nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from link_helpers import HIGHEST, LOWEST, SECRET, WAIT_S, Got, Lost, RawPeer, Recorder, Up, linked

from identities import PROMPT
from kvroom.core.messages import Done, Offer, Peer, Progress
from kvroom.errors import AuthenticationError, ConfigurationError, LimitExceeded, LinkError, RemoteProtocolError
from kvroom.runtime.link import LinkLimits, Links
from kvroom.wire.frames import AskFate, Goodbye, Open, Ping, Pong, Spare, encode_envelope

MESSAGE = Offer(room=1, generation=2, start=0, stop=64, pages=(3, 4, 5), identity=PROMPT, grant=b"grant")


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test's body on a fresh loop; a task that it leaves behind fails it."""

    async def body() -> None:
        await test()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(body())


@pytest.mark.parametrize(("low", "high"), [(1, 2), (2, 1)], ids=["dialler decides", "acceptor decides"])
@pytest.mark.parametrize("secret", [SECRET, b""], ids=["secret", "loopback without"])
def test_two_managers_link_and_talk_in_order(low: int, high: int, secret: bytes) -> None:
    async def test() -> None:
        async with (
            linked(incarnation=low, identity=b"a" * 1_000_000, secret=secret) as (a, at_a),
            linked(incarnation=high, identity=b"b", secret=secret) as (b, at_b),
        ):
            assert await a.dial(b.me.address) == b.me
            assert await at_a.next("up") == ("up", b.me, b"b")
            assert await at_b.next("up") == ("up", a.me, b"a" * 1_000_000)
            sent = [Progress(room=1, generation=2, tokens=n) for n in range(500)] + [
                Done(room=1, generation=2, tokens=3, nbytes=4, identity=PROMPT, aux=b"x" * (1 << 20))
            ]
            for message in sent:
                assert a.send(b.me, message)
                assert b.send(a.me, message)
            for recorder, peer in ((at_a, b.me), (at_b, a.me)):
                got = [await recorder.next("got") for _ in sent]
                assert [event[3:] for event in got] == [(message,) for message in sent]
                assert all(event[1] == peer for event in got)
                seqs: list[Any] = [event[2] for event in got]
                assert seqs == sorted(set(seqs))

    run(test)


@pytest.mark.parametrize("host", ["::1", "localhost"])
def test_ipv6_and_names_work(host: str) -> None:
    async def test() -> None:
        async with linked(host=host) as (a, _), linked() as (b, at_b):
            assert await b.dial(a.me.address) == a.me
            assert (await at_b.next("up"))[1] == a.me

    run(test)


def test_dials_to_one_address_share_one_connection() -> None:
    async def test() -> None:
        async with linked() as (a, at_a), linked() as (b, at_b):
            name = b.me.address.replace("127.0.0.1", "localhost")
            peers = await asyncio.gather(*[a.dial(b.me.address) for _ in range(5)], *[a.dial(name) for _ in range(5)])
            await at_b.next("up")
            peers += [await a.dial(name), await b.dial(a.me.address)]
            assert set(peers) == {b.me, a.me}
            assert a.peers == {b.me}
            assert len(at_a.events) == len(at_b.events) == 1

    run(test)


@pytest.mark.parametrize("round_", range(10))
def test_managers_that_dial_each_other_at_once_get_one_link_and_lose_nothing(round_: int) -> None:
    async def test() -> None:
        async with linked() as (a, at_a), linked() as (b, at_b):
            for links, recorder in ((a, at_a), (b, at_b)):

                def greet(event: Up | Lost | Got, links: Links = links) -> None:
                    if event[0] == "up":
                        links.send(event[1], MESSAGE)

                recorder.react = greet
            assert [*await asyncio.gather(a.dial(b.me.address), b.dial(a.me.address))] == [b.me, a.me]
            for recorder in (at_a, at_b):
                await recorder.next("up")
                await recorder.next("got")
            assert a.send(b.me, Progress(room=1, generation=1, tokens=1))
            assert b.send(a.me, Progress(room=1, generation=1, tokens=1))
            await at_a.next("got")
            await at_b.next("got")
            assert len(at_a.events) == len(at_b.events) == 3

    run(test)


def test_a_wrong_secret_is_the_same_clear_error_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with linked() as (a, at_a), linked(secret=b"not the same secret") as (b, at_b):
            with pytest.raises(
                AuthenticationError, match="differ, or one has none; set the same KVROOM_SECRET"
            ) as told:
                await b.dial(a.me.address)
            assert str(told.value) in caplog.text
            assert at_a.events == at_b.events == []
            assert a.refused == b.refused == 1
            assert not b.send(a.me, MESSAGE)

    with caplog.at_level(logging.WARNING, "kvroom.runtime.link"):
        run(test)


def test_an_end_is_told_at_once_with_its_cause_on_both_sides() -> None:
    async def test() -> None:
        async with linked() as (a, at_a):
            async with linked() as (b, at_b):
                await b.dial(a.me.address)
                await at_a.next("up")
                await at_b.next("up")
                b.drop(a.me, "the layouts differ")
                assert await at_b.detail() == "the layouts differ"
                assert await at_a.detail() == f"{b.me} ended the link: the layouts differ"
                assert not a.send(b.me, MESSAGE)
                await b.dial(a.me.address)
                await at_a.next("up")
            assert await at_a.detail() == f"{b.me} ended the link: it is shutting down"
            assert a.peers == frozenset()

    run(test)


def test_a_peer_that_dies_is_lost_at_once() -> None:
    async def test() -> None:
        async with linked() as (a, at_a):
            raw = await RawPeer.greet(a, HIGHEST)
            await at_a.next("up")
            await raw.hear()  # closing a socket with unread bytes would reset the connection
            await raw.close()
            assert await at_a.detail() == "10.9.9.9:9 closed the connection"
            raw = await RawPeer.greet(a, HIGHEST, attempt=2)
            await at_a.next("up")
            linger = (1).to_bytes(4, "little") + bytes(4)
            raw.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            raw.writer.transport.abort()
            assert "10.9.9.9:9 broke: Connection reset by peer" in await at_a.detail()

    run(test)


def test_a_silent_peer_is_pinged_once_and_then_lost() -> None:
    async def test() -> None:
        async with linked(limits=LinkLimits(heartbeat_s=0.05)) as (a, at_a):
            raw = await RawPeer.greet(a, HIGHEST)
            await at_a.next("up")
            assert isinstance((await raw.hear()).message, Open)
            start_s = asyncio.get_running_loop().time()
            assert (await raw.hear()).message == Ping()
            assert "10.9.9.9:9 was silent for" in await at_a.detail()
            assert asyncio.get_running_loop().time() - start_s >= 0.05
            assert await raw.heard_end()
            await raw.close()

    run(test)


def test_a_peer_that_answers_pings_is_kept() -> None:
    async def test() -> None:
        async with linked(limits=LinkLimits(heartbeat_s=0.02)) as (a, at_a):
            raw = await RawPeer.greet(a, HIGHEST)
            assert isinstance((await raw.hear()).message, Open)
            for _ in range(8):
                assert (await raw.hear()).message == Ping()
                raw.say(Pong())
            raw.say(Ping())
            assert (await raw.hear()).message == Pong()
            assert len(at_a.events) == 1
            await raw.close()

    run(test)


@pytest.mark.parametrize("incarnation", [LOWEST, HIGHEST], ids=["peer decides", "we decide"])
def test_a_new_connection_of_the_same_run_replaces_the_old_one(incarnation: int) -> None:
    async def test() -> None:
        async with linked() as (a, at_a):
            old = await RawPeer.greet(a, incarnation, attempt=1)
            await at_a.next("up")
            new = await RawPeer.greet(a, incarnation, attempt=2, held=())
            assert "replaced this link: it opened another connection" in await at_a.detail()
            await at_a.next("up")
            old.say(MESSAGE, seq=1)
            new.say(Progress(room=7, generation=7, tokens=7), seq=2)
            assert (await at_a.next("got"))[2:] == (2, Progress(room=7, generation=7, tokens=7))
            assert await old.heard_end()
            await old.close()
            await new.close()

    run(test)


def test_a_second_connection_is_spare_while_the_peer_still_holds_the_first() -> None:
    async def test() -> None:
        async with linked() as (a, at_a):
            first = await RawPeer.greet(a, HIGHEST, attempt=5)
            await at_a.next("up")
            for attempt, held in ((6, (5,)), (4, ())):
                second = await RawPeer.greet(a, HIGHEST, attempt=attempt, held=held)
                assert (await second.hear()).message == Spare()
                assert await second.heard_end()
                await second.close()
            first.say(MESSAGE, seq=1)
            await at_a.next("got")
            assert len(at_a.events) == 2
            await first.close()

    run(test)


def test_an_overtaken_open_is_void() -> None:
    async def test() -> None:
        async with linked() as (a, at_a):
            overtaken = await RawPeer.connect(a)
            await overtaken.close()
            first = await RawPeer.greet(a, 1, attempt=1)
            second = await RawPeer.greet(a, 1, attempt=2, held=(1,))
            second.say(Open(8))
            await at_a.next("up")
            first.say(Open(7))
            assert await first.heard_end()
            second.say(MESSAGE, seq=1)
            await at_a.next("got")
            assert len(at_a.events) == 2
            await first.close()
            await second.close()

    run(test)


@pytest.mark.parametrize("incarnation", [LOWEST, HIGHEST], ids=["peer decides", "we decide"])
def test_a_peer_that_states_the_address_of_another_takes_neither_its_link_nor_its_dials(incarnation: int) -> None:
    """Both know the secret. The stated address is that of a linked peer, or of one that is not linked yet."""

    async def test() -> None:
        async with linked() as (a, at_a), linked() as (b, at_b), linked() as (late, _):
            await a.dial(b.me.address)
            await at_a.next("up")
            await at_b.next("up")
            hostile = [
                await RawPeer.greet(a, abs(incarnation - number), address, attempt=1)
                for number, address in enumerate((b.me.address, late.me.address))
            ]
            claims = {Peer(b.me.address, incarnation), Peer(late.me.address, abs(incarnation - 1))}
            if incarnation == LOWEST:
                hostile[1].say(Open(1))
            assert {(await at_a.next("up"))[1] for _ in hostile} == claims
            assert a.peers == claims | {b.me}
            assert await a.dial(b.me.address) == b.me
            assert a.send(b.me, MESSAGE)
            await at_b.next("got")
            assert await a.dial(late.me.address) == late.me
            for raw in hostile:
                await raw.close()

    run(test)


def test_a_dial_is_not_answered_by_a_link_that_the_peer_has_dialled_but_settles_on_it() -> None:
    async def test() -> None:
        async with linked(keyed=True) as (a, at_a), linked(keyed=True) as (b, at_b):
            await b.dial(a.me.address)
            await at_a.next("up")
            assert a._reached == {}
            assert await a.dial(b.me.address) == b.me
            assert a._reached == {b.me.address: b.me}
            b.send(a.me, MESSAGE)
            await at_a.next("got")
            assert len(at_a.events) == 2
            assert [event[0] for event in at_b.events] == ["up"]

    run(test)


def test_a_dial_that_reaches_another_run_ends_what_the_earlier_run_has_left() -> None:
    async def test() -> None:
        async with linked(incarnation=5) as (a, at_a), linked(incarnation=7) as (b, _):
            old = await RawPeer.greet(a, HIGHEST, b.me.address)
            await at_a.next("up")
            assert await a.dial(b.me.address) == b.me
            assert (await at_a.next("up"))[1] == b.me
            lost = await at_a.next("lost")
            assert lost[1].incarnation == HIGHEST
            assert "it was restarted" in str(lost[2])
            assert a.peers == {b.me}
            await old.close()

    run(test)


@pytest.mark.parametrize("stated", ["a linked peer's", "a number of its own", "the lowest"])
def test_a_manager_refuses_an_incarnation_without_its_key_and_keeps_the_link(stated: str) -> None:
    async def test() -> None:
        async with linked(keyed=True) as (a, at_a), linked(keyed=True) as (b, _):
            await b.dial(a.me.address)
            await at_a.next("up")
            incarnation = {"a linked peer's": b.me.incarnation, "the lowest": LOWEST}.get(stated, 77)
            with pytest.raises(AuthenticationError, match=f"incarnation {incarnation} of .* has no key of its own"):
                await RawPeer.greet(a, incarnation, b.me.address, attempt=9)
            assert a.peers == {b.me}
            assert b.send(a.me, MESSAGE)
            await at_a.next("got")
            assert len(at_a.events) == 2

    run(test)


def test_the_sequence_goes_on_after_a_link_was_replaced() -> None:
    async def test() -> None:
        async with linked() as (a, at_a):
            seqs = []
            for attempt in (1, 2, 3):
                raw = await RawPeer.greet(a, HIGHEST, attempt=attempt)
                assert isinstance((await raw.hear()).message, Open)
                assert a.send(Peer("10.9.9.9:9", HIGHEST), MESSAGE)
                seqs.append((await raw.hear()).seq)
                await raw.close()
                await at_a.next("up")
                await at_a.next("lost")
            assert seqs == sorted(set(seqs))

    run(test)


def test_a_stranger_that_says_nothing_is_closed_and_only_so_many_are_kept() -> None:
    async def test() -> None:
        async with linked(limits=LinkLimits(handshake_s=0.05)) as (a, _):
            raw = await RawPeer.connect(a)
            assert await raw.heard_end()
            await raw.close()
        async with linked(limits=LinkLimits(strangers=2, handshake_s=10 * WAIT_S)) as (a, at_a):
            strangers = [await RawPeer.connect(a) for _ in range(3)]
            assert await strangers[0].heard_end()
            assert len(a._strangers) <= 2
            friend = await RawPeer.greet(a, HIGHEST)
            await at_a.next("up")
            for raw in (*strangers, friend):
                await raw.close()

    run(test)


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0\0\0\1\xc1", b"\0\1\0\1", bytes(100)])
def test_garbage_closes_its_connection_and_nothing_else(garbage: bytes) -> None:
    async def test() -> None:
        async with linked() as (a, at_a):
            good = await RawPeer.greet(a, HIGHEST)
            await at_a.next("up")
            bad = await RawPeer.connect(a)
            bad.writer.write(garbage)
            assert await bad.heard_end()
            await bad.close()
            good.say(MESSAGE, seq=1)
            await at_a.next("got")
            assert a.refused == 1
            await good.close()

    run(test)


def test_garbage_on_an_open_link_ends_it_with_a_named_cause() -> None:
    async def test() -> None:
        async with linked() as (a, at_a):
            raw = await RawPeer.greet(a, HIGHEST)
            await at_a.next("up")
            raw.writer.write(b"\0\0\0\2\x91\x01")
            assert "is not a message" in await at_a.detail()
            assert isinstance((await raw.hear()).message, Open)
            farewell = (await raw.hear()).message
            assert isinstance(farewell, Goodbye)
            assert "is not a message" in farewell.detail
            await raw.close()

    run(test)


def test_a_message_before_the_link_is_open_is_refused() -> None:
    async def test() -> None:
        async with linked() as (a, at_a):
            raw = await RawPeer.greet(a, 1)
            raw.say(MESSAGE, seq=1)
            farewell = (await raw.hear()).message
            assert isinstance(farewell, Goodbye)
            assert "before the link was open" in farewell.detail
            assert at_a.events == []
            await raw.close()

    run(test)


def test_a_handler_may_refuse_a_message_and_its_own_faults_are_not_silent() -> None:
    async def test() -> None:
        reported: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        async with linked() as (a, at_a), linked() as (b, at_b):
            for error, detail in (
                (RemoteProtocolError("page 9 was not offered"), "page 9 was not offered"),
                (ZeroDivisionError("a bug"), "internal error: ZeroDivisionError('a bug')"),
            ):

                def refuse(event: Up | Lost | Got, error: Exception = error) -> None:
                    if event[0] == "got":
                        raise error

                at_a.react = refuse
                await b.dial(a.me.address)
                await at_a.next("up")
                await at_b.next("up")
                b.send(a.me, MESSAGE)
                await at_a.next("got")
                assert detail in await at_a.detail()
                await at_b.next("lost")
        assert [type(context["exception"]) for context in reported] == [ZeroDivisionError]

    run(test)


def test_nothing_is_delivered_after_a_link_was_dropped_in_the_middle_of_a_burst() -> None:
    async def test() -> None:
        async with linked() as (a, at_a), linked() as (b, at_b):
            at_a.react = lambda event: a.drop(event[1], "enough") if event[0] == "got" else None
            await b.dial(a.me.address)
            for number in range(3):
                b.send(a.me, Progress(room=1, generation=1, tokens=number))
            await at_a.next("up")
            await at_a.next("got")
            assert await at_a.detail() == "enough"
            await at_b.next("up")
            assert await at_b.detail() == f"{a.me} ended the link: enough"
            assert len(at_a.events) == 3

    run(test)


def test_a_peer_that_does_not_read_is_lost_when_its_queue_is_full() -> None:
    async def test() -> None:
        async with linked(limits=LinkLimits(queue_bytes=1 << 20)) as (a, at_a):
            raw = await RawPeer.greet(a, HIGHEST)
            peer = (await at_a.next("up"))[1]
            raw.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket transport can
            sent = 0
            while a.send(peer, Done(room=1, generation=2, tokens=3, nbytes=4, identity=PROMPT, aux=b"x" * (1 << 20))):
                sent += 1
                await asyncio.sleep(0)  # one loop turn, not a wait
                assert sent < 1000
            assert "reads too slowly" in await at_a.detail()
            await raw.close()

    run(test)


@pytest.mark.parametrize(
    "question",
    [
        Ping(),
        AskFate(boot="boot", pid_namespace=1, time_namespace=1, pid=1, started=1, machine=""),
        Progress(room=1, generation=2, tokens=3),
    ],
    ids=["Ping", "AskFate", "Progress"],
)
def test_a_peer_that_asks_and_does_not_read_is_lost_when_its_answers_fill_the_queue(question: Any) -> None:
    async def test() -> None:
        async with linked(limits=LinkLimits(queue_bytes=1 << 18)) as (a, at_a):

            def answer(event: Up | Lost | Got) -> None:
                if len(event) == 4:
                    a.send(event[1], event[3])  # a `Ping` is answered by the link itself

            at_a.react = answer
            raw = await RawPeer.greet(a, HIGHEST)
            await at_a.next("up")
            raw.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket transport can
            questions = encode_envelope(0 if isinstance(question, Ping) else 1, question) * 10_000
            sent = 0
            with contextlib.suppress(OSError):
                while at_a.events[-1][0] != "lost":
                    raw.writer.write(questions)
                    await asyncio.wait_for(raw.writer.drain(), WAIT_S)
                    sent += len(questions)
                    assert sent < 1 << 26, "the answers wait without a limit"
            raw.writer.transport.abort()
            await raw.close()
            while at_a.events[-1][0] != "lost":
                await asyncio.sleep(0)  # gives other tasks a turn: the end comes over the socket
            assert "reads too slowly" in str(at_a.events[-1][2])

    run(test)


def test_what_will_be_said_again_leaves_half_of_the_queue_to_the_rest() -> None:
    async def test() -> None:
        async with linked(limits=LinkLimits(queue_bytes=1 << 20)) as (a, at_a):
            raw = await RawPeer.greet(a, HIGHEST)
            peer = (await at_a.next("up"))[1]
            raw.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket transport can
            small = Done(room=1, generation=2, tokens=3, nbytes=4, identity=PROMPT)
            assert a.send(peer, small, again=True)
            sent = 0
            while a.send(
                peer, Done(room=1, generation=2, tokens=3, nbytes=4, identity=PROMPT, aux=b"x" * (1 << 16)), again=True
            ):
                sent += 1
                await asyncio.sleep(0)  # one loop turn, not a wait
                assert sent < 1000
            assert not a.send(peer, small, again=True)
            assert a.send(peer, small)  # a message that is not repeated still fits
            assert peer in a.peers
            await raw.close()

    run(test)


def test_a_message_over_the_frame_limit_is_refused_and_the_link_stays() -> None:
    async def test() -> None:
        async with linked() as (a, _), linked() as (b, at_b):
            await a.dial(b.me.address)
            with pytest.raises(LimitExceeded, match="over the limit"):
                a.send(b.me, Done(room=1, generation=2, tokens=3, nbytes=4, identity=PROMPT, aux=bytes(17 << 20)))
            a.send(b.me, MESSAGE)
            await at_b.next("up")
            await at_b.next("got")

    run(test)


def test_a_dial_that_cannot_succeed_says_why() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            address = f"127.0.0.1:{deaf.getsockname()[1]}"
            async with linked(limits=LinkLimits(handshake_s=0.05)) as (a, _):
                with pytest.raises(
                    LinkError, match=r"timed out after 0\.05 s \(handshake_s\): no link with 127\.0\.0\.1:\d+"
                ):
                    await a.dial(address)
        async with linked(secret=b"") as (a, at_a):
            for where, error, says in (
                (address, LinkError, f"cannot connect to {address}: connection refused; is the worker up"),
                (a.me.address, RemoteProtocolError, "is this manager itself"),
                ("nonsense", ConfigurationError, "write host:port"),
                ("10.1.2.3:80", ConfigurationError, r"10\.1\.2\.3 is not loopback and needs a shared secret"),
            ):
                with pytest.raises(error, match=says):
                    await a.dial(where)
            assert at_a.events == []
        async with linked() as (a, _):
            with pytest.raises(LinkError, match=r"cannot be resolved|no answer"):
                await a.dial("no-such-host.invalid:80")

    run(test)


def test_one_cancelled_caller_does_not_cancel_the_others() -> None:
    async def test() -> None:
        async with linked() as (a, _), linked() as (b, _):
            first = asyncio.ensure_future(a.dial(b.me.address))
            second = asyncio.ensure_future(a.dial(b.me.address))
            await asyncio.sleep(0)  # both are in
            first.cancel()
            assert await second == b.me
            with pytest.raises(asyncio.CancelledError):
                await first

    run(test)


def test_closing_ends_dials_under_way_and_is_idempotent() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            async with linked() as (a, _):
                dial = asyncio.ensure_future(a.dial(f"127.0.0.1:{deaf.getsockname()[1]}"))
                while not a._connections:
                    await asyncio.sleep(0)
                await a.close()
                with pytest.raises(LinkError, match=r"are closing|shutting down"):
                    await dial
                with pytest.raises(LinkError, match="are not open"):
                    await a.dial("127.0.0.1:9")
                await a.close()

    run(test)


def test_what_cannot_be_listened_on_is_refused_with_the_remedy() -> None:
    async def test() -> None:
        async with linked() as (a, _):
            port = int(a.me.address.rpartition(":")[2])
            with pytest.raises(ConfigurationError, match=f"port {port} on 127.0.0.1 is in use: stop the program"):
                await Links(Recorder(), identity=b"", port=port).start()
        with pytest.raises(ConfigurationError, match=r"203\.0\.113\.7 is not an address of this machine"):
            await Links(Recorder(), identity=b"", host="203.0.113.7", secret=SECRET).start()
        with pytest.raises(ConfigurationError, match="needs a shared secret: set KVROOM_SECRET"):
            Links(Recorder(), identity=b"", host="0.0.0.0")
        with pytest.raises(ConfigurationError, match="advertise_host '::' means every interface"):
            Links(Recorder(), identity=b"", host="0.0.0.0", advertise_host="::", secret=SECRET)
        with pytest.raises(ConfigurationError, match=r"host '\[::1\]:8998' is not a host alone"):
            Links(Recorder(), identity=b"", host="[::1]:8998", secret=SECRET)
        with pytest.raises(ConfigurationError, match="identity of 5000000 bytes"):
            Links(Recorder(), identity=bytes(5_000_000))
        with pytest.raises(ConfigurationError, match="no address before start"):
            _ = Links(Recorder(), identity=b"").me

    run(test)


def test_listening_everywhere_announces_the_advertised_host() -> None:
    async def test() -> None:
        links = Links(Recorder(), identity=b"", host="0.0.0.0", advertise_host="127.0.0.1", secret=SECRET)
        me = await links.start()
        async with linked(keyed=True) as (a, _):
            assert await a.dial(me.address) == me
        await links.close()

    run(test)
