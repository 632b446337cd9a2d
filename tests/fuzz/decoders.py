"""Feed malformed inputs to the pure decoders, guided by code coverage, until one raises an undeclared exception.

python -m fuzz.decoders [--inputs N] [--target NAME]

Each decoder runs in a process of its own, because atheris ends the process. Prints one line for each, with the inputs,
the seconds, and the resident memory at the half and at the end. Ends with 1 if a decoder failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvroom"]):
    from kvroom.errors import KVRoomError

    from .targets import TARGETS

MAX_INPUT_BYTES = 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000_000, help="for all decoders together")
    parser.add_argument("--target", choices=tuple(TARGETS), help="this decoder only, in this process")
    parser.add_argument("--corpus", type=Path, help="a folder of inputs, with --target")
    options = parser.parse_args()
    if options.target is not None:
        _fuzz(options.target, options.inputs, options.corpus)
    share = -(-options.inputs // len(TARGETS))
    return max([_run(name, share) for name in TARGETS])


def _run(name: str, inputs: int) -> int:
    """Fuzz one decoder in a process of its own; return 1 if it failed."""
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(TARGETS[name].seeds):
            Path(corpus, str(number)).write_bytes(seed)
        command = [sys.executable, "-m", "fuzz.decoders", "--target", name, "--inputs", str(inputs), "--corpus", corpus]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        told = [line for line in done.stderr.splitlines() if line.startswith("resident")]
        print(f"{name:22} {inputs:9} inputs {time.monotonic() - began:6.1f} s  {'; '.join(told)}", flush=True)
        if done.returncode:
            print(done.stdout[-4000:], done.stderr[-4000:], flush=True)
        return int(done.returncode != 0)


def _fuzz(name: str, inputs: int, corpus: Path | None) -> None:
    """Fuzz one decoder; atheris ends the process."""
    decode = TARGETS[name].decode
    taken = 0

    def take(data: bytes) -> None:
        nonlocal taken
        taken += 1
        if taken in (inputs // 2, inputs - 1):
            print(f"resident {_resident_kib()} KiB after {taken}", file=sys.stderr, flush=True)
        with contextlib.suppress(KVRoomError):
            decode(data)

    where = [] if corpus is None else [str(corpus)]
    atheris.Setup([sys.argv[0], f"-runs={inputs}", f"-max_len={MAX_INPUT_BYTES}", "-verbosity=0", *where], take)
    atheris.Fuzz()


def _resident_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


if __name__ == "__main__":
    sys.exit(main())
