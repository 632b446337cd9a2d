"""Two managers that hand rooms over, and requests to the status server of one of them."""

from __future__ import annotations

import contextlib
import http.client
import json
from typing import Any, NamedTuple

from identities import PROMPT
from kvroom import KVBootstrapServer, KVManager, Timeouts
from kvroom_lab.pools import TestPool

TIMES = Timeouts(bootstrap_s=60, waiting_s=20, stall_s=20, drain_s=5, decline_s=1)


class Answer(NamedTuple):
    """One HTTP response with its whole body."""

    status: int
    content_type: str
    text: str

    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> str:
        """Return the message of an error response."""
        return str(self.json()["error"]["message"])


def ask(address: str, path: str, method: str = "GET", **headers: str) -> Answer:
    """Send one request on a new connection."""
    with contextlib.closing(http.client.HTTPConnection(address, timeout=30)) as connection:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        assert response.getheader("Retry-After") == ("1" if response.status == 503 else None)
        assert (response.getheader("Allow") is not None) == (response.status == 405)
        return Answer(response.status, response.getheader("Content-Type") or "", response.read().decode())


class Pair:
    """A prefill and a decode manager over transport `memory`, and their directory."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        directory = stack.enter_context(KVBootstrapServer())
        self.addr = directory.address
        pools = TestPool(), TestPool()
        for pool in pools:
            stack.callback(pool.close)
        self.prefill, self.decode = (
            stack.enter_context(KVManager(pool.layout, transport="memory", timeouts=TIMES, register_with=register_with))
            for pool, register_with in zip(pools, (self.addr, None), strict=True)
        )

    def hand_over(self, room: int) -> int:
        """Run one room from its opening to its end, and return the number of bytes that it moved."""
        with (
            self.prefill.sender(room, identity=PROMPT) as sender,
            self.decode.receiver(self.addr, room, identity=PROMPT) as receiver,
        ):
            receiver.send_metadata([1], tokens=1)
            sender.send([1], stop=1, last=True)
            sender.wait(20)
            return receiver.wait(20).nbytes
