"""Samples of one prompt: their rooms, after SGLang's own expansion of the request, are the same on both sides."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_helpers import MANAGER, configured, in_child, new_generate, new_tokenized

from kvroom.adapters.sglang import hooks, samples
from kvroom.adapters.sglang.intake import install_in_server
from kvroom.adapters.sglang.samples import sample_room

ROOM = 1 << 40


def test_the_first_keeps_its_number_and_the_others_get_their_own() -> None:
    rooms = [sample_room(room, sample) for room in (1, 2, ROOM, 2**63 - 1) for sample in range(200)]
    assert rooms[0] == 1
    assert rooms[600] == 2**63 - 1
    assert len(set(rooms)) == len(rooms)
    assert all(type(room) is int and 1 <= room < 2**63 for room in rooms)


def test_the_numbers_are_part_of_the_protocol() -> None:
    """Two servers with different versions of kvroom must derive the same numbers."""
    assert [sample_room(7, sample) for sample in (1, 2)] == [7643869921872156431, 3167967750878333780]


class Server:
    """SGLang's `TokenizerManager` with stand-ins for tokenizing, answering and the scheduler."""

    def __init__(self) -> None:
        self.rooms: list[Any] = []
        self.manager = manager = object.__new__(MANAGER)
        transport = SimpleNamespace(
            prepare_for_dispatch_async=self._nothing, prepare_for_dispatch=lambda _: [], cancel_for_dispatch=lambda _: 0
        )
        manager.cuda_vmm_feature_transport = manager.positional_embeds_transport = transport
        manager.rid_to_state, manager.encoder_dispatch_ready = {}, {}
        manager._tokenize_one_request = self._tokenize
        manager._init_req_state = self._state
        manager._wait_one_response = self._answer
        manager._dispatch_to_scheduler = lambda tokenized: self.rooms.append(tokenized.bootstrap_room)
        manager._should_use_batch_tokenization = lambda *_: False

    async def _nothing(self, _: Any) -> list[Any]:
        return []

    async def _tokenize(self, obj: Any) -> Any:
        return new_tokenized(obj.rid, obj.bootstrap_host, obj.bootstrap_port, obj.bootstrap_room)

    def _state(self, obj: Any) -> None:
        stats = SimpleNamespace(
            set_finished_time=lambda: None, set_api_server_dispatch_time=lambda: None,
            set_api_server_dispatch_finish_time=lambda: None,
        )  # fmt: skip
        self.manager.rid_to_state[obj.rid] = SimpleNamespace(time_stats=stats, dispatched=False)

    async def _answer(self, obj: Any, _: Any) -> Any:
        for _step in range(2 if obj.stream else 1):
            yield {"text": "x", "meta_info": {"id": obj.rid}}

    async def ask(self, *, stop_after: int | None = None, **fields: Any) -> int:
        """Send a request as SGLang's HTTP server does, and leave after `stop_after` answers. Return their number."""
        obj = new_generate(bootstrap_host="127.0.0.1", bootstrap_port=8998, **fields)
        obj.normalize_batch_and_arguments()
        states = {}
        if obj.is_single:
            await self.manager._send_one_request(await self._tokenize(obj))
            return 1
        for rid in obj.rid:
            self._state(SimpleNamespace(rid=rid))
            states[rid] = self.manager.rid_to_state[rid]
        count = 0
        async for answer in self.manager._handle_batch_request(obj, None, states):
            count += len(answer) if isinstance(answer, list) else 1
            if stop_after == count:
                break
        return count


def in_server(story: Callable[[Server], Coroutine[Any, Any, Any]]) -> Any:
    """Return the result of `story` in a process with the hooks."""

    def call() -> Any:
        registry: Any = hooks
        registry.HookRegistry.reset()
        with configured("prefill", 8998):
            install_in_server()
            return asyncio.run(story(Server()))

    return in_child(call)


def test_samples_of_one_prompt_get_rooms_of_their_own_on_both_sides() -> None:
    async def story(server: Server) -> Any:
        count = await server.ask(text="a", sampling_params={"n": 3}, bootstrap_room=ROOM)
        other = Server()
        assert await other.ask(text="a", sampling_params={"n": 3}, bootstrap_room=ROOM) == count
        assert other.rooms == server.rooms
        return count, server.rooms

    # SGLang prefills the prompt once, and then sends a request for each sample
    assert in_server(story) == [3, [sample_room(ROOM, sample) for sample in range(4)]]


def test_a_stream_of_samples_does_too() -> None:
    async def story(server: Server) -> Any:
        return await server.ask(text="a", sampling_params={"n": 2}, bootstrap_room=ROOM, stream=True), server.rooms

    assert in_server(story) == [4, [sample_room(ROOM, sample) for sample in range(3)]]


def test_samples_of_several_prompts() -> None:
    async def story(server: Server) -> Any:
        await server.ask(text=["a", "b"], sampling_params={"n": 2}, bootstrap_room=[ROOM, ROOM + 1])
        return server.rooms

    rooms = in_server(story)
    assert rooms[:2] == [ROOM, ROOM + 1]
    assert rooms[2:] == [sample_room(room, sample) for room in (ROOM, ROOM + 1) for sample in (1, 2)]


def test_prompts_without_samples_keep_their_rooms() -> None:
    async def story(server: Server) -> Any:
        await server.ask(text=["a", "b"], sampling_params={}, bootstrap_room=[ROOM, ROOM])
        await server.ask(text="a", sampling_params={}, bootstrap_room=ROOM)
        return server.rooms

    assert in_server(story) == [ROOM] * 3


@pytest.mark.parametrize("stop_after", [None, 1])
def test_nothing_of_it_reaches_a_later_request_of_the_same_task(stop_after: int | None) -> None:
    async def story(server: Server) -> Any:
        await server.ask(text="a", sampling_params={"n": 2}, bootstrap_room=ROOM, stream=True, stop_after=stop_after)
        server.rooms.clear()
        await server.ask(text="a", sampling_params={}, bootstrap_room=ROOM)
        await server.ask(text="a", sampling_params={"n": 2}, bootstrap_room=ROOM)
        return server.rooms

    assert in_server(story) == [ROOM, *(sample_room(ROOM, sample) for sample in range(3))]


def test_requests_at_the_same_time_count_by_themselves() -> None:
    async def story(server: Server) -> Any:
        fields: dict[str, Any] = {"text": "a", "sampling_params": {"n": 2}}
        await asyncio.gather(*(server.ask(bootstrap_room=ROOM + number, **fields) for number in range(3)))
        return sorted(server.rooms)

    assert in_server(story) == sorted(sample_room(ROOM + number, sample) for number in range(3) for sample in range(3))


def test_a_request_without_a_room_has_none() -> None:
    async def story(server: Server) -> Any:
        await server.ask(text="a", sampling_params={"n": 2})
        return server.rooms

    assert in_server(story) == [None] * 3


def test_an_answer_that_fails_leaves_nothing() -> None:
    async def answers() -> Any:
        assert samples._sent.get() is not None
        yield 1
        raise ValueError("planted")

    async def story() -> None:
        obj = SimpleNamespace(parallel_sample_num=2)
        counted = samples.count_samples(lambda *_: answers(), None, obj)
        assert await anext(counted) == 1
        assert samples._sent.get() is None
        with pytest.raises(ValueError, match="planted"):
            await anext(counted)
        assert samples._sent.get() is None

    asyncio.run(story())
