"""Agreement over `torch.distributed`: a single all_reduce (MIN) if no room has failed.

There are two gloo groups over the ranks of the engine's own group. The first one carries the work, with its own timeout
whatever the engine's is. The second one finds missing ranks: gloo reports that an operation timed out or a connection
closed, but not which rank caused it, and the group cannot be used afterwards. So every remaining rank then exchanges a
greeting with all others through the second group, and the error names the ranks whose greeting does not arrive.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from .rooms import MAX_BODY_BYTES, AgreementError

_GRACE_S = 1.0
"""Added to the timeout of greetings: another rank may notice the failure, and greet, a whole timeout later."""


class TorchCarrier:
    """A `Carrier` over a process group of torch. Every rank of the group creates one, in lockstep.

    Args:
        group: the process group of the ranks; None: all ranks. `torch.distributed` must be initialised.
        timeout_s: the longest time by which one rank may call later than another. After it, finding the missing ranks
            takes at most the same time again.

    Raises:
        AgreementError: the other ranks did not create theirs in time. No group is left open.
    """

    def __init__(self, group: Any = None, *, timeout_s: float = 60.0) -> None:
        # Imported here: kvroom does not depend on torch, and processes without a `TorchCarrier` must not load it.
        self._torch = importlib.import_module("torch")
        self._dist = importlib.import_module("torch.distributed")
        self._ranks: list[int] = self._dist.get_process_group_ranks(group or self._dist.group.WORLD)
        self.rank: int = self._dist.get_rank(group)
        self.size = len(self._ranks)
        self._timeout_s = timeout_s
        self._error: str | None = None
        self._groups: list[Any] = []
        try:
            for _ in ("work", "who is missing"):
                group = self._dist.new_group(
                    self._ranks,
                    timeout=timedelta(seconds=timeout_s),
                    backend="gloo",
                    use_local_synchronization=True,  # ranks outside the group take no part
                )
                self._groups.append(group)
        except RuntimeError as error:
            self.close()
            raise AgreementError(f"the ranks of this engine did not connect: {_first_line(error)}") from None

    def least(self, values: Sequence[int]) -> list[int]:
        """Return the minimum of each value over all ranks; see `Carrier`."""
        tensor = self._torch.tensor(values, dtype=self._torch.int64)
        with self._named_error():
            self._dist.all_reduce(tensor, op=self._dist.ReduceOp.MIN, group=self._groups[0])
        least: list[int] = tensor.tolist()
        return least

    def gather(self, body: bytes) -> list[bytes]:
        """Return the body of each rank; see `Carrier`. Exchanges lengths first, then bodies padded to the longest."""
        lengths = self._all(self._torch.tensor([len(body)], dtype=self._torch.int64))
        longest = max(int(length) for length in lengths)
        if longest > MAX_BODY_BYTES:
            raise AgreementError(
                f"a rank sends {longest} bytes, and the limit is {MAX_BODY_BYTES}: agree on fewer rooms"
            )
        padded = bytearray(body).ljust(max(longest, 1), b"\0")
        bodies = self._all(self._torch.frombuffer(padded, dtype=self._torch.uint8))
        return [bytes(one.numpy())[: int(length)] for one, length in zip(bodies, lengths, strict=True)]

    def close(self) -> None:
        """Destroy both groups; the engine's own group stays. Idempotent; later calls raise `AgreementError`."""
        self._error = self._error or "this carrier is closed"
        while self._groups:
            with contextlib.suppress(RuntimeError):  # a broken group may raise again
                self._dist.destroy_process_group(self._groups.pop())

    def _all(self, tensor: Any) -> list[Any]:
        every = [self._torch.empty_like(tensor) for _ in range(self.size)]
        with self._named_error():
            self._dist.all_gather(every, tensor, group=self._groups[0])
        return every

    @contextlib.contextmanager
    def _named_error(self) -> Iterator[None]:
        if self._error is not None:
            raise AgreementError(self._error)
        try:
            yield
        except RuntimeError as error:
            missing = self._missing()
            self._error = f"the ranks of this engine cannot agree: {missing or _first_line(error)}"
            self.close()
            raise AgreementError(self._error) from None

    def _missing(self) -> str:
        """Exchange greetings with all other ranks, and return a text about the missing ones; empty if there is none."""
        until_s = time.monotonic() + self._timeout_s + _GRACE_S
        others = [index for index in range(self.size) if index != self.rank]
        waits: dict[int, tuple[Any, Any] | None] = {}  # None: the connection is closed
        for index in others:
            rank = self._ranks[index]  # of the whole world
            try:
                waits[index] = (
                    self._dist.isend(self._torch.ones(1), dst=rank, group=self._groups[1]),
                    self._dist.irecv(self._torch.zeros(1), src=rank, group=self._groups[1]),
                )
            except RuntimeError:
                waits[index] = None
        silent: list[int] = []
        gone: list[int] = []
        for index, works in waits.items():
            try:
                if works is None:
                    raise RuntimeError
                for work in works:
                    work.wait(timedelta(seconds=max(until_s - time.monotonic(), 0.001)))
            except RuntimeError:
                (gone if time.monotonic() < until_s else silent).append(index)
        missing = [_ranks(gone, "closed the connection")] if gone else []
        missing += [_ranks(silent, f"did not answer for {2 * self._timeout_s + _GRACE_S:g} s")] if silent else []
        return "; ".join(missing)


def _ranks(ranks: Sequence[int], what: str) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} {what}"


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]
