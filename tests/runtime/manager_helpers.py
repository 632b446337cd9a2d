"""Two managers in this process, each with a pool, and a bootstrap directory between them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

from identities import PROMPT
from kvroom import Audit, KVBootstrapServer, KVManager, KVPoll, KVReceiver, KVSender, Timeouts
from kvroom.transports import create
from kvroom_lab.pools import TestPool

TIMES = Timeouts(bootstrap_s=20, waiting_s=20, stall_s=20, drain_s=5, decline_s=1)


LAST_ROOM = 2**63 - 1


class Pair:
    """A prefill and a decode manager, each with a pool, and a bootstrap directory."""

    def __init__(
        self,
        transport: str,
        stack: contextlib.ExitStack,
        *,
        settings: Mapping[str, Any] | None = None,
        decode_timeouts: Timeouts | None = None,
        **options: Any,
    ) -> None:
        """Start both managers. `settings` are of the transport, `options` of the managers."""
        self.directory = stack.enter_context(KVBootstrapServer(secret=options.get("secret", b"")))
        self.addr = self.directory.address
        self.pools = TestPool(), TestPool(page_tokens=4, pages=32)
        for pool in self.pools:
            stack.callback(pool.close)
        self.source_pool, self.sink_pool = self.pools
        self.source_pool.fill(1)
        self.transports = create(transport, **(settings or {})), create(transport, **(settings or {}))
        self.changed = threading.Condition()
        options = {"timeouts": TIMES, "on_change": self._notify, **options}
        self.prefill = stack.enter_context(
            KVManager(self.source_pool.layout, transport=self.transports[0], register_with=self.addr, **options)
        )
        options["timeouts"] = decode_timeouts or options["timeouts"]
        self.decode = stack.enter_context(KVManager(self.sink_pool.layout, transport=self.transports[1], **options))

    def _notify(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def sender(self, *room: int, **options: Any) -> KVSender:
        """Open the prefill side of a room; all rooms have the same request."""
        return self.prefill.sender(*room, identity=PROMPT, **options)

    def receiver(self, *room: int, **options: Any) -> KVReceiver:
        """Open the decode side of a room; all rooms have the same request."""
        return self.decode.receiver(self.addr, *room, identity=PROMPT, **options)

    def until(self, predicate: Callable[[], bool]) -> None:
        """Wait until a handle has published what the predicate wants."""
        with self.changed:
            assert self.changed.wait_for(predicate, 20)

    def check_clean(self) -> None:
        """Check that nothing is left on either side, once all messages have arrived: links keep their order."""
        # The links come first, however long a busy machine takes: a source waits only `bootstrap_s` for its offer.
        # A room of its own for that would leave a decline, which the prefill side keeps for `decline_s`.
        with self.receiver(LAST_ROOM) as receiver:
            self.until(lambda: receiver.poll() is KVPoll.WaitingForInput)
            with self.sender(LAST_ROOM) as sender:
                receiver.send_metadata([0], tokens=1)
                sender.send([0], stop=1, last=True)
                receiver.wait(20)
                sender.wait(20)
        assert self.prefill.wait_idle(10)
        assert self.decode.wait_idle(10)
        assert self.prefill.audit() == self.decode.audit() == Audit()
