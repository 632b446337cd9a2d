"""Words of 8 bytes, each of which identifies one element of one request, and can be decoded.

The law: two different elements never hold an equal word. A word is six fields packed into 64 bits and mixed by an
invertible function. Every byte of it looks random, so lost, moved and doubled bytes are found.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
WORD_BYTES = 8
COMPONENTS = ("k", "v", "latent", "k_scale", "index_k", "ssm", "conv")

# Field: bits, from the lowest. `room` is the room's number modulo FILLER.
_FIELDS = {"lane": 12, "head": 10, "token": 18, "component": 4, "layer": 8, "room": 12}
FILLER = (1 << _FIELDS["room"]) - 1  # the room of words that belong to no request
# The finalizer of SplitMix64 and its inverse: three xor-shifts and two odd factors.
_SHIFTS, _FACTORS = (30, 27, 31), (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def words(**fields: int | U64) -> U64:
    """Return the words of these fields, broadcast against each other. Raise `ValueError` if a field does not fit."""
    packed = np.zeros(1, np.uint64)  # an array: a scalar would warn where it overflows
    shift = 0
    for name, bits in _FIELDS.items():
        value = np.asarray(fields[name], np.uint64)
        if value.size and int(value.max()) >> bits:
            raise ValueError(f"{name} is {int(value.max())}: it must be below {1 << bits}")
        packed = packed | value << np.uint64(shift)
        shift += bits
    return _mix(packed)


def filler(count: int, side: int) -> U64:
    """Return `count` words that belong to no request; each holds its place in the pool and the pool's side."""
    place = np.arange(count, dtype=np.uint64)
    packed = place & np.uint64((1 << 40) - 1) | np.uint64(side << 40)
    return _mix(packed | np.uint64(FILLER << 52))


def read(word: int) -> str:
    """Return the fields of a word as text."""
    packed = int(_unmix(np.asarray([word], np.uint64))[0])
    found, rest = {}, packed
    for name, bits in _FIELDS.items():
        found[name], rest = rest & ((1 << bits) - 1), rest >> bits
    if found["room"] == FILLER:
        return f"filler {packed & ((1 << 40) - 1)} of side {packed >> 40 & 0xFFF}"
    if found["component"] >= len(COMPONENTS):
        return f"not a word of this module ({word:#x})"
    component = COMPONENTS[found["component"]]
    return (
        f"room {found['room']}, layer {found['layer']} {component}, token {found['token']}, head {found['head']}, "
        f"lane {found['lane']}"
    )


def _mix(values: U64) -> U64:
    for shift, factor in zip(_SHIFTS, (*_FACTORS, 1), strict=True):
        values = (values ^ values >> np.uint64(shift)) * np.uint64(factor)
    return values


def _unmix(values: U64) -> U64:
    for shift, factor in zip(reversed(_SHIFTS), (1, *reversed(_FACTORS)), strict=True):
        values = values * np.uint64(pow(factor, -1, 1 << 64))
        undone = values
        for _ in range(64 // shift + 1):
            undone = values ^ undone >> np.uint64(shift)
        values = undone
    return values
