"""The scheduler's side: vLLM's calls about requests become orders for the workers, where the rooms are.

Some of vLLM's calls pass a request and others only its id, so this side keeps one ticket for each request that takes
part, from its arrival to its end. `finished` is called once for every request and removes the ticket. Nothing else is
kept. A ticket records what this side has promised to vLLM, not the state of the room.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.request import RequestStatus

from kvroom import ROOM_NUMBERS, KVIdentity
from kvroom.errors import KVRoomError, PlanError
from kvroom.network import parse_address

from .blocks import BlockTables
from .orders import AbortRoom, Drop, Expect, Failures, Finish, Load, OpenRoom, Orders, SendChunk
from .requests import Consume, Produce, read_params, request_identity

log = logging.getLogger("vllm." + __name__)
BlockIds = tuple[list[int], ...]
_COMPLETE = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


@dataclass
class _Ticket:
    """One request that takes part."""

    request: Any
    handed: int
    """The number of prompt tokens that are handed over."""
    identity: KVIdentity | None = None
    """None only if `error` is set."""
    error: str | None = None
    """The reason if the request's parameters are invalid or do not fit its prompt."""

    @property
    def id(self) -> str:
        """The request's id in vLLM."""
        return str(self.request.request_id)


@dataclass
class _Producing(_Ticket):
    """A request that this engine computes for another one."""

    room: int | None = None
    """The room; None if its number is chosen when the prompt is computed."""
    sent: int = 0
    """The number of tokens whose blocks the workers have orders to send."""
    aborted: str | None = None
    """The reason why the room can no longer succeed."""


@dataclass
class _Consuming(_Ticket):
    """A request whose prompt another engine computes."""

    wants: Consume = field(default_factory=lambda: Consume(0, ""))
    """The room to load from. It has no meaning if `error` comes from invalid parameters."""
    promised: bool = False
    """True while vLLM waits for a report on the load."""
    settled: bool = False
    """True once there is no further load for the request."""
    failure: str | None = None
    """The reason why the load failed, for the reply."""


class SchedulerSide:
    """The scheduler's side of the connector. `engine_id` is vLLM's name of this engine."""

    def __init__(self, tables: BlockTables, *, produces: bool, consumes: bool, engine_id: str) -> None:
        self.tables = tables
        self.bootstrap_addr: str | None = None  # of this engine's directory, once a worker has reported it
        self._produces, self._consumes = produces, consumes
        self._engine_id = engine_id
        self._tickets: dict[str, _Ticket] = {}
        self._next = Orders()

    # -- the life of a request -----------------------------------------------------------------------------------------

    def new_request(self, request: Any) -> None:
        """Take in a new request. If it takes part, it gets a ticket, and its room opens before it has any block."""
        ticket = self._ticket(request)
        if ticket is None:
            return
        self._tickets[ticket.id] = ticket
        if isinstance(ticket, _Consuming) and ticket.error is None:
            if getattr(request, "abort_immediately", False):
                return  # vLLM ends it immediately: it exists only to release the room
            assert ticket.identity is not None  # because there is no error
            wants = ticket.wants
            self._next.expects.append(Expect(ticket.id, wants.room, wants.bootstrap_addr, ticket.identity))
        elif isinstance(ticket, _Producing) and ticket.error is None:
            _shorten(request, ticket.handed)
            if ticket.room is not None:
                request.max_tokens = 1  # the router sent both legs, and takes the answer from the consumer
                assert ticket.identity is not None  # because there is no error
                self._next.opens.append(OpenRoom(ticket.id, ticket.room, ticket.identity))
        elif ticket.error is not None and not getattr(request, "abort_immediately", False):
            # A request with `abort_immediately` is the repetition of one whose error has been logged.
            log.error("request %s: %s", ticket.id, ticket.error)

    def matched(self, request: Any, computed: int) -> int:
        """Return the number of prompt tokens beyond the first `computed` that will be loaded. Has no side effects."""
        ticket = self._tickets.get(request.request_id)
        if not isinstance(ticket, _Consuming) or ticket.settled or ticket.promised:
            return 0
        return max(0, ticket.handed - computed) if self.tables.loads_after(computed, ticket.handed) else 0

    def allocated(self, request: Any, block_ids: BlockIds, external: int) -> None:
        """Order the load into a request's blocks, if vLLM expects `external` > 0 tokens; otherwise drop its room."""
        ticket = self._tickets.get(request.request_id)
        if not isinstance(ticket, _Consuming) or ticket.settled or ticket.promised:
            return
        if external == 0:
            self._drop(ticket, "the decode engine computes this prompt by itself")
            return
        ticket.promised = True  # set first: whatever happens below, vLLM waits for a report
        start, stop = ticket.handed - external, ticket.handed
        load = Load(
            request=ticket.id,
            room=ticket.wants.room,
            bootstrap_addr=ticket.wants.bootstrap_addr,
            start=start,
            stop=stop,
            identity=ticket.identity,
        )
        self._next.loads.append(load)
        load.error = ticket.error
        try:
            load.blocks = self.tables.main_blocks(block_ids, start, stop)
            load.pages = self.tables.pages(block_ids, start, stop)
            load.windows = self.tables.windows(block_ids, stop)
        except PlanError as error:
            load.error = load.error or str(error)

    def orders(self, output: Any) -> Orders:
        """Return the workers' orders for this step (a vLLM `SchedulerOutput`)."""
        for request_id in output.preempted_req_ids or ():
            ticket = self._tickets.get(request_id)
            # vLLM reuses the blocks. A transfer from them that is still in flight may move wrong bytes, so the room
            # must fail.
            if isinstance(ticket, _Producing) and ticket.sent and ticket.aborted is None:
                self._abort(ticket, "the prefill engine preempted the request and freed its blocks")
        for request_id, scheduled in output.num_scheduled_tokens.items():
            ticket = self._tickets.get(request_id)
            if not isinstance(ticket, _Producing) or ticket.room is None or ticket.aborted is not None:
                continue
            # The blocks that this step fills. A partly filled last block is sent with the last chunk.
            computed = ticket.request.num_computed_tokens + scheduled
            last = computed >= ticket.handed
            stop = ticket.handed if last else self.tables.align(computed)
            if ticket.sent < stop:
                block_ids = output.kv_connector_block_state.get_block_ids(ticket.id)
                try:
                    self._send(ticket, ticket.room, block_ids, stop, last)
                except PlanError as error:
                    self._abort(ticket, str(error))
        orders, self._next = self._next, Orders()
        orders.idle = output.total_num_scheduled_tokens == 0
        orders.tickets = len(self._tickets)
        return orders

    def reported(self, output: Any) -> None:
        """Take in the workers' reports of this step (a vLLM `KVConnectorOutput`)."""
        failures = output.kv_connector_worker_meta
        for request_id, detail in failures.details.items() if isinstance(failures, Failures) else ():
            ticket = self._tickets.get(request_id)
            if isinstance(ticket, _Consuming):
                ticket.failure = detail
        for request_id in output.finished_recving or ():
            ticket = self._tickets.get(request_id)
            if isinstance(ticket, _Consuming):
                ticket.promised, ticket.settled = False, True

    def finished(self, request: Any, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        """End a request. Return True if vLLM must keep its blocks until it is reported, and the reply's parameters."""
        ticket = self._tickets.pop(request.request_id, None)
        if isinstance(ticket, _Producing):
            return self._produced(ticket, block_ids)
        if not isinstance(ticket, _Consuming):
            return False, None
        if ticket.promised:
            detail = f"the decode engine ended the request: {_end(ticket.request)}"
            self._next.finishes.append(Finish(ticket.id, detail))
        elif not ticket.settled:
            self._drop(ticket, f"the decode engine ended the request before it had blocks: {_end(ticket.request)}")
        return False, {"bootstrap_room": ticket.wants.room, "failure": ticket.failure} if ticket.failure else None

    # -- the producer --------------------------------------------------------------------------------------------------

    def _send(self, ticket: _Producing, room: int, block_ids: BlockIds, stop: int, last: bool) -> None:
        pages = self.tables.pages(block_ids, ticket.sent, stop)
        windows = self.tables.windows(block_ids, stop) if last else {}
        self._next.sends.append(
            SendChunk(request=ticket.id, room=room, pages=pages, windows=windows, stop=stop, last=last)
        )
        ticket.sent = stop

    def _abort(self, ticket: _Producing, detail: str) -> None:
        ticket.aborted = detail
        self._next.aborts.append(AbortRoom(ticket.id, detail))

    def _produced(self, ticket: _Producing, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        request, complete = ticket.request, ticket.request.status in _COMPLETE
        if ticket.error is not None:
            return False, {"failure": ticket.error}
        if ticket.room is None:
            return self._hand_over(ticket, block_ids) if complete else (False, None)
        reply = self._reply(ticket.room)
        if complete and ticket.sent == ticket.handed and ticket.aborted is None:
            self._next.finishes.append(Finish(ticket.id))
            return True, reply
        reason = ticket.aborted or _end(request)
        detail = f"the prefill engine ended the request before its KV cache was complete: {reason}"
        if ticket.sent == 0:
            self._next.drops.append(Drop(ticket.id, ticket.room, detail))
            return False, None
        self._next.finishes.append(Finish(ticket.id, detail))
        return True, None

    def _hand_over(self, ticket: _Producing, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        """Choose the room of a computed prompt, for routers that call the consumer afterwards; the reply names it."""
        room = secrets.randbelow(ROOM_NUMBERS)
        try:
            self._send(ticket, room, block_ids, ticket.handed, last=True)
        except PlanError as error:  # no order was given
            log.error("request %s: %s", ticket.id, error)
            return False, {"failure": str(error)}
        assert ticket.identity is not None  # a ticket with an error is not handed over
        self._next.opens.append(OpenRoom(ticket.id, room, ticket.identity))
        self._next.finishes.append(Finish(ticket.id))
        return True, self._reply(room)

    def _reply(self, room: int) -> dict[str, Any]:
        assert self.bootstrap_addr is not None  # a producer's workers have reported it before the first request
        host, port = parse_address(self.bootstrap_addr)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "bootstrap_host": host,
            "bootstrap_port": port,
            "bootstrap_room": room,
            "remote_engine_id": self._engine_id,
        }

    # -- the consumer --------------------------------------------------------------------------------------------------

    def _drop(self, ticket: _Consuming, detail: str) -> None:
        ticket.settled = True
        wants = ticket.wants
        if wants.bootstrap_addr:
            self._next.drops.append(Drop(ticket.id, wants.room, detail, wants.bootstrap_addr))

    # -- the parameters of a request -----------------------------------------------------------------------------------

    def _ticket(self, request: Any) -> _Ticket | None:
        """Return a ticket for the request, with `error` set if it is invalid, or None if it does not take part."""
        params: Mapping[str, Any] | None = request.kv_transfer_params
        handed = self.tables.handed(int(request.num_prompt_tokens))
        try:
            wants = read_params(params, produces=self._produces, consumes=self._consumes)
        except KVRoomError as error:
            loads = self._consumes and not (self._produces and (params or {}).get("do_remote_decode"))
            return (_Consuming if loads else _Producing)(request, handed, error=str(error))
        if wants is None:
            return None
        identity, invalid = None, None
        try:
            identity = request_identity(request)
        except KVRoomError as error:
            invalid = str(error)
        if isinstance(wants, Produce):
            return _Producing(request, handed, identity, invalid, wants.room)
        return _Consuming(request, handed, identity, invalid, wants)


def _end(request: Any) -> str:
    """Return how vLLM ended a request, as one word: aborted (its client left), error, ..."""
    name: str = request.status.name
    return name.removeprefix("FINISHED_").lower()


def _shorten(request: Any, tokens: int) -> None:
    """Cut the prompt to the tokens that are handed over.

    When a request ends, vLLM frees the blocks before the window of the next token. The consumer computes the first
    token after those that it receives, so that token must be the next one here, too. vLLM's own connectors cut prompts
    in the same way. The token that is sampled here is not used.
    """
    if not 0 < tokens < request.num_prompt_tokens or request.skip_reading_prefix_cache:
        return
    del request.prompt_token_ids[tokens:]
    del request._all_token_ids[tokens:]  # noqa: SLF001 - vLLM has no other way
    request.num_prompt_tokens = tokens
    request.max_tokens = 1
