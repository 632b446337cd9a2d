"""SGLang's metadata rows, which travel as the `extra` of an aux message.

On each side, a request has one row of SGLang's `MetadataBuffers`, which holds its first token, log probabilities,
number of cached tokens and more. The prefill side reads its row when it sends the last chunk. The decode side writes
the same bytes into its own row before `poll` returns `Success` to SGLang.

The row is sent as msgpack, as a list with the bytes of each buffer, under the name `EXTRA`. The version in that name
must be raised when SGLang changes the meaning of its buffers.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import msgspec

from kvroom import Aux
from kvroom.errors import ConfigurationError, RemoteProtocolError
from kvroom.network import UNDECODABLE

EXTRA = "sglang.metadata.1"
_TOKEN, _CACHED, _LOGPROB = 0, 1, 2  # the indices of the first buffers, see `MetadataBuffers.get_buf_infos`


class RowContent(NamedTuple):
    """The part of a row that every engine understands."""

    first_token: int | None
    """None if the token in the row is negative, which means that SGLang has not sampled one."""
    cached_tokens: int
    """The number of prompt tokens that the prefill side had in its prefix cache."""
    first_logprob: float
    """The log probability of the first token."""


class Rows:
    """The metadata rows of one scheduler. Use it only in the scheduler's thread, which also writes the rows itself."""

    def __init__(self, args: Any) -> None:
        """Use the buffers of `args`, SGLang's `KVArgs`, which must be in host memory.

        Raises `ConfigurationError` if the buffers differ in their number of rows, or if there are fewer than expected.
        """
        self._bases = [int(base) for base in args.aux_data_ptrs]
        self._lengths = [int(length) for length in args.aux_item_lens]
        counts = {int(n) // int(length) for n, length in zip(args.aux_data_lens, args.aux_item_lens, strict=True)}
        if len(counts) != 1 or len(self._lengths) <= _LOGPROB:
            raise ConfigurationError(
                f"expected at least {_LOGPROB + 1} metadata buffers with the same number of rows from SGLang, got "
                f"{len(self._lengths)} with {sorted(counts)} rows: use a tested version of SGLang"
            )
        self._count = counts.pop()

    def read(self, row: int) -> dict[str, bytes]:
        """Return row `row` as the `extra` of an aux message."""
        self._check(row)
        parts = [ctypes.string_at(b + row * n, n) for b, n in zip(self._bases, self._lengths, strict=True)]
        return {EXTRA: msgspec.msgpack.encode(parts)}

    def content(self, row: int) -> RowContent:
        """Return the part of row `row` that every engine understands."""
        self._check(row)
        token = ctypes.c_int32.from_address(self._address(_TOKEN, row)).value
        cached = ctypes.c_int32.from_address(self._address(_CACHED, row)).value
        return RowContent(
            token if token >= 0 else None,
            max(0, cached),
            ctypes.c_float.from_address(self._address(_LOGPROB, row)).value,
        )

    def write(self, row: int, aux: Aux) -> None:
        """Write the row that the prefill side sent in `aux` into row `row`.

        Raises `RemoteProtocolError` if `aux` contains no row, or a row with other buffers than this side has. Row `row`
        is unchanged then.
        """
        self._check(row)
        if EXTRA not in aux.extra:
            names = ", ".join(sorted(aux.extra)) or "nothing"
            raise RemoteProtocolError(
                f"the prefill side sent {names} instead of {EXTRA}: SGLang can only continue a prompt that SGLang has "
                f"prefilled"
            )
        try:
            parts = msgspec.msgpack.decode(aux.extra[EXTRA], type=list[bytes])
        except UNDECODABLE as error:
            raise RemoteProtocolError(
                f"the prefill side sent an invalid metadata row, which is not a list of bytes: {error}"
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
            raise ConfigurationError(f"invalid metadata row {row}: SGLang has {self._count} rows")
