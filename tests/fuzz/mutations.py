"""Mutations of valid inputs: bits, cuts, repeats, and the bytes on which decoders of msgpack and JSON stumble."""

from __future__ import annotations

from random import Random

ODD = (
    b"\x00", b"\xff", b"\x7f", b"\x80", b"\xc0", b"\xc1", b"\xc4\x00", b"\xdd\xff\xff\xff\xff", b"\xdc\xff\xff",
    b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xcf" + b"\xff" * 8, b"\xd3\x80" + b"\0" * 7,
    b"\xcb\x7f\xf0" + b"\0" * 6, b"\xcb\x7f\xf8" + b"\0" * 6, b"\xa3\xed\xa0\x80", b"\xa1\xff", b"\x91" * 300,
    b"\x81\xa1a" * 300, b"[" * 1500, b'{"a":' * 1500, b"1e999", b"-1", b"-0", b"1.5", b"NaN", b"1" * 400, b"9" * 5000,
    b'"\\ud800"', b'""', b"null", b"true", b"18446744073709551616",
)  # fmt: skip


def mutate(random: Random, seed: bytes) -> bytes:
    """Return `seed` with one to eight changes."""
    data = bytearray(seed)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        at = random.randrange(len(data) + 1)
        change = random.randrange(8)
        if change == 0 and data:
            data[at % len(data)] = random.randrange(256)
        elif change == 1 and data:
            data[at % len(data)] ^= 1 << random.randrange(8)
        elif change == 2:
            del data[at : at + random.randrange(1, 9)]
        elif change == 3:
            data[at:at] = random.choice(ODD)
        elif change == 4:
            data[at : at + random.randrange(1, 6)] = random.choice(ODD)
        elif change == 5:
            del data[at:]
        elif change == 6:
            data[at:at] = data[at // 2 : at // 2 + random.randrange(1, 40)]
        else:
            data += random.randbytes(random.randrange(1, 30))
    return bytes(data)
