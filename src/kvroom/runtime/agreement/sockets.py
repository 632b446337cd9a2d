"""Agreement over plain TCP: a star with rank 0 in the middle. Blocking, for the engine's own thread; no torch.

    each step  every rank sends its part to rank 0, which sends all of them the whole
    a fault    whoever sees it says why in `Stop`, so that all ranks raise the same sentence

Rank 0 waits `timeout_s` for the parts, the others twice as long for the whole: rank 0 may come that much later, and
then speaks first about who is missing.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from kvroom.errors import ConfigurationError
from kvroom.runtime.agreement.lines import (
    FAREWELL_S,
    MAX_RANKS,
    MAX_REASON_CHARS,
    Frame,
    Gather,
    Join,
    Least,
    Lost,
    RankDoor,
    RankSocket,
    Stop,
    cannot_agree,
    dial,
)
from kvroom.runtime.agreement.rooms import MAX_BODY_BYTES, AgreementError
from kvroom.wire.auth import check_secret

_Work = TypeVar("_Work", Least, Gather)


class SocketCarrier:
    """The rank `rank` of `size`, for which rank 0 listens at `address` ("host:port", or a socket that listens already).

    Returns when all ranks are here. `timeout_s`: how long the ranks may be apart in each step; `join_s`: in the first
    one. Beyond loopback a `secret` is required. The listening socket is closed when all are here. Raises
    `ConfigurationError`, or `AgreementError` with who did not come or was refused; nothing is left open then.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        address: str | socket.socket,
        *,
        secret: bytes = b"",
        timeout_s: float = 60.0,
        join_s: float = 60.0,
    ) -> None:
        if not 1 <= size <= MAX_RANKS or not 0 <= rank < size:
            raise ConfigurationError(f"rank {rank} of {size}: give a rank in [0, size) and at most {MAX_RANKS} ranks")
        check_secret(secret)
        self.rank = rank
        self.size = size
        self._timeout_s = timeout_s
        self._step = 0
        self._fault: str | None = None
        self._lines: dict[int, RankSocket] = {}
        if size == 1:
            return
        until_s = time.monotonic() + join_s
        try:
            if rank == 0:
                with contextlib.closing(RankDoor(size, address, secret, self._lines)) as door:
                    door.wait(until_s, join_s)
                self._spread(Gather(0, []), until_s)
            else:
                self._lines[0] = dial(Join(rank, size), str(address), secret, until_s, join_s)
                self._collect(until_s, join_s)
        except AgreementError as error:
            self._give_up(str(error))
            raise

    def least(self, values: Sequence[int]) -> list[int]:
        """See `Carrier`."""
        self._step += 1
        parts = self._exchange(Least(self._step, list(values)))
        self._check([len(part.values) for part in parts], len(values), "values")
        if self.rank:
            return parts[0].values
        whole = [min(column) for column in zip(*(part.values for part in parts), strict=True)]
        self._answer(Least(self._step, whole))
        return whole

    def gather(self, body: bytes) -> list[bytes]:
        """See `Carrier`."""
        self._check([int(len(body) > MAX_BODY_BYTES)], 0, f"bodies over {MAX_BODY_BYTES} bytes")
        self._step += 1
        parts = self._exchange(Gather(self._step, [body]))
        whole = [body for part in parts for body in part.bodies]
        self._check([len(whole)], self.size, "bodies")
        if not self.rank:
            self._answer(Gather(self._step, whole))
        return whole

    def close(self) -> None:
        """See `Carrier`."""
        self._give_up(f"rank {self.rank} of this engine was closed")

    def _exchange(self, part: _Work) -> list[_Work]:
        """Rank 0: the parts of all, by rank. The others: the whole alone."""
        if self._fault is not None:
            raise AgreementError(self._fault)
        try:
            timeout_s = self._timeout_s if self.rank == 0 else 2 * self._timeout_s
            until_s = time.monotonic() + timeout_s
            if self.rank:
                self._spread(part, until_s)
            found = self._collect(until_s, timeout_s)
            for rank, frame in found.items():
                if type(frame) is not type(part) or frame.step != part.step:
                    raise AgreementError(
                        f"rank {rank} is at another point ({_at(frame)}) than rank {self.rank} ({_at(part)}): "
                        f"call agree on every rank alike, one call after the other"
                    )
        except AgreementError as error:
            self._fail(str(error))
        parts = {self.rank: part} if self.rank == 0 else {}
        return list((parts | found).values())  # type: ignore[arg-type]  # the types were compared

    def _check(self, found: Sequence[int], wanted: int, what: str) -> None:
        if any(count != wanted for count in found):
            counts = ", ".join(map(str, found))
            self._fail(f"the ranks of this engine cannot agree: rank {self.rank} found {counts} {what}, not {wanted}")

    def _answer(self, whole: Frame) -> None:
        try:
            self._spread(whole, time.monotonic() + self._timeout_s)
        except AgreementError as error:
            self._fail(str(error))

    def _spread(self, frame: Frame, until_s: float) -> None:
        for rank, line in self._lines.items():
            try:
                line.send(frame, until_s)
            except Lost as error:
                raise AgreementError(cannot_agree([rank], str(error))) from None

    def _collect(self, until_s: float, timeout_s: float) -> dict[int, Frame]:
        """One frame of every other rank. The first that is lost ends it; all that are silent are named."""
        found: dict[int, Frame] = {}
        with selectors.DefaultSelector() as selector:
            for rank, line in self._lines.items():
                selector.register(line.socket, selectors.EVENT_READ, rank)
                _keep(found, rank, line.next)
            while len(found) < len(self._lines):
                ready = selector.select(max(until_s - time.monotonic(), 0))
                if not ready and time.monotonic() >= until_s:
                    silent = [rank for rank in self._lines if rank not in found]
                    raise AgreementError(cannot_agree(silent, f"did not answer for {timeout_s:g} s; is it up?"))
                for key, _ in ready:
                    _keep(found, key.data, self._lines[key.data].read)
            for key, _ in selector.select(0) if self.rank == 0 else ():
                # It sent its part, waited too long and has gone since: to go on would be to agree without it.
                _keep(found, key.data, self._lines[key.data].read)
        return dict(sorted(found.items()))

    def _fail(self, reason: str) -> NoReturn:
        self._give_up(reason)
        raise AgreementError(reason)

    def _give_up(self, reason: str) -> None:
        """Say why to whom still listens, and close."""
        self._fault = self._fault or reason
        until_s = time.monotonic() + FAREWELL_S
        for line in self._lines.values():
            with contextlib.suppress(Lost):
                line.send(Stop(reason[:MAX_REASON_CHARS]), until_s)
            line.socket.close()
        self._lines.clear()


def _keep(found: dict[int, Frame], rank: int, read: Callable[[], Frame | None]) -> None:
    """Put the frame of that rank into `found`, if it is here; `AgreementError` if the rank has stopped or is lost."""
    try:
        frame = read()
    except Lost as error:
        raise AgreementError(cannot_agree([rank], str(error))) from None
    if isinstance(frame, Stop):
        raise AgreementError(frame.reason)
    if frame is not None and rank in found:
        raise AgreementError(cannot_agree([rank], f"spoke out of turn ({_at(frame)} after {_at(found[rank])})"))
    if frame is not None:
        found[rank] = frame


def _at(frame: Frame) -> str:
    return "stopped" if isinstance(frame, Stop) else f"{type(frame).__name__.lower()} {frame.step}"
