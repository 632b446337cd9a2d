"""A plug-in of SGLang for its own backend `mooncake_tcp`, which `bench/sglang_pair.py` measures beside kvroom.

It lets that backend run on a machine without CUDA, where its sender would request pinned memory. It also counts the
entries in the tables of its manager: SIGUSR2 to a scheduler writes the number to the file that `COUNTS` names.
"""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

COUNTS = "KVROOM_BENCH_COUNTS"
NAME = "kvroom_bench_baseline"


def register() -> None:
    """Prepare a process of SGLang. SGLang calls it in each of its processes."""
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

    MooncakeKVSender.supports_host_tensor_indices = False
    signal.signal(signal.SIGUSR2, _tell)


def install(folder: Path) -> None:
    """Write the metadata into `folder` with which SGLang finds this plug-in if the folder is on PYTHONPATH."""
    about = folder / f"{NAME}-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{NAME} = {NAME}:register\n")
    (folder / f"{NAME}.py").write_text(Path(__file__).read_text())


def _tell(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a signal handler
    from sglang.srt.disaggregation.common.conn import CommonKVManager

    managers = [one for one in gc.get_objects() if isinstance(one, CommonKVManager)]
    Path(os.environ[COUNTS]).write_text(str(sum(_entries(manager) for manager in managers)))


def _entries(manager: Any) -> int:
    """Return the number of entries in the manager's tables whose key is or contains a room number."""
    tables = (table for table in vars(manager).values() if isinstance(table, dict | set))
    return sum(1 for table in tables for key in table if any(_is_room(part) for part in _parts(key)))


def _parts(key: object) -> tuple[object, ...]:
    return key if isinstance(key, tuple) else (key,)


def _is_room(part: object) -> bool:
    return type(part) is int and part >= 1 << 20  # room numbers of a bench are larger; ranks and ports are smaller
