"""SGLang's metadata rows, carried as the `extra` of an aux message.

A request owns one row of SGLang's `MetadataBuffers` on each side: its first token, log probabilities, cached tokens
and the like. The prefill side reads its row when it sends the last chunk, and the decode side writes the same bytes
into its own row before SGLang is told that the hand-off succeeded.

The row travels as msgpack, a list with the bytes of each buffer, under the name `EXTRA`. The version in that name is
raised when SGLang changes the meaning of its buffers.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import msgspec

from kvroom import Aux
from kvroom.errors import ConfigurationError, RemoteProtocolError
from kvroom.network import UNDECODABLE

EXTRA = "sglang.metadata.1"
_TOKEN, _CACHED, _LOGPROB = 0, 1, 2  # the order of the first buffers, `MetadataBuffers.get_buf_infos`


class RowContent(NamedTuple):
    """The content of a row in engine-independent terms."""

    first_token: int | None
    """None if the row has a negative one, because SGLang has not chosen a token."""
    cached_tokens: int
    first_logprob: float


class Rows:
    """The metadata rows of one scheduler. Not thread-safe: the scheduler's thread writes and reads the rows, too."""

    def __init__(self, args: Any) -> None:
        """Read the buffers of `args`, SGLang's `KVArgs`. Raise `ConfigurationError` if they have an unknown form."""
        self._bases = [int(base) for base in args.aux_data_ptrs]
        self._lengths = [int(length) for length in args.aux_item_lens]
        counts = {int(n) // int(length) for n, length in zip(args.aux_data_lens, args.aux_item_lens, strict=True)}
        if len(counts) != 1 or len(self._lengths) <= _LOGPROB:
            raise ConfigurationError(
                f"SGLang's metadata buffers hold {sorted(counts)} rows in {len(self._lengths)} buffers; kvroom expects "
                f"one number of rows in all of them: use a tested version of SGLang"
            )
        self._count = counts.pop()

    def read(self, row: int) -> dict[str, bytes]:
        """Return row `row` as the `extra` of an aux message."""
        self._check(row)
        parts = [ctypes.string_at(b + row * n, n) for b, n in zip(self._bases, self._lengths, strict=True)]
        return {EXTRA: msgspec.msgpack.encode(parts)}

    def content(self, row: int) -> RowContent:
        """Return the content of row `row` in engine-independent terms."""
        self._check(row)
        token = ctypes.c_int32.from_address(self._address(_TOKEN, row)).value
        cached = ctypes.c_int32.from_address(self._address(_CACHED, row)).value
        return RowContent(
            token if token >= 0 else None,
            max(0, cached),
            ctypes.c_float.from_address(self._address(_LOGPROB, row)).value,
        )

    def write(self, row: int, aux: Aux) -> None:
        """Write into row `row` what the prefill side read from its own.

        Raises `RemoteProtocolError` if `aux` has no row, or one of other buffers; the row is then unchanged.
        """
        self._check(row)
        if EXTRA not in aux.extra:
            names = ", ".join(sorted(aux.extra)) or "nothing"
            raise RemoteProtocolError(
                f"the prefill side sent no {EXTRA} but {names}: SGLang can only continue what SGLang has prefilled"
            )
        try:
            parts = msgspec.msgpack.decode(aux.extra[EXTRA], type=list[bytes])
        except UNDECODABLE as error:
            raise RemoteProtocolError(
                f"the prefill side sent a metadata row that is no list of bytes: {error}"
            ) from None
        lengths = [len(part) for part in parts]
        if lengths != self._lengths:
            raise RemoteProtocolError(
                f"the prefill side's metadata row has buffers of {lengths} bytes, this side's has {self._lengths}: "
                f"start both sides with the same version of SGLang, the same speculative decoding, and the same "
                f"SGLANG_ENABLE_DISAGG_SAMPLING_MASK"
            )
        for index, part in enumerate(parts):
            ctypes.memmove(self._address(index, row), part, len(part))

    def _address(self, index: int, row: int) -> int:
        return self._bases[index] + row * self._lengths[index]

    def _check(self, row: int) -> None:
        if not 0 <= row < self._count:
            raise ConfigurationError(f"metadata row {row} is not among SGLang's {self._count} rows")
