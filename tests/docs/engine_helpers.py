"""The engines of examples/engine/two_to_one.py as processes, and the test's end of their stdin and stdout."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "engine" / "two_to_one.py"
SECRET = "sixteen bytes or more, alike on both hosts"
PATIENCE_S = 120.0
Start = Callable[[list[str], dict[str, str], Path], subprocess.Popen[str]]


def program() -> ModuleType:
    """Return the program as a module, for its stand-in of a model."""
    spec = importlib.util.spec_from_file_location("two_to_one", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def start_here(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[str]:
    """Start a process of this machine with pipes for stdin and stdout."""
    with log.open("w") as errors:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )


class Engine:
    """One process of the program. `heard` has each line that it has printed."""

    def __init__(self, popen: subprocess.Popen[str], log: Path) -> None:
        self.popen, self.log = popen, log
        self.heard: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def tell(self, **request: Any) -> None:
        """Write one request to stdin."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(request) + "\n")
        self.popen.stdin.flush()

    def wait_for(self, key: str, room: int | None = None) -> dict[str, Any]:
        """Return the first line that has this key, about this room; wait until it comes."""

        def found() -> dict[str, Any] | None:
            return next((line for line in self.heard if key in line and line.get("room") == room), None)

        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended, PATIENCE_S)
            line = found()
        assert line is not None, f"no {key!r} of room {room}: {self.heard}; {self.log.read_text()[-3000:]}"
        return line

    def idle(self) -> dict[str, Any]:
        """Wait until no room is open, 20 seconds at most, and return what its window then shows."""
        self._look("?idle_within_s=20")
        return self._look("")

    def wait_for_phase(self, phase: str) -> None:
        """Wait until a room is in this phase, 20 seconds at most."""
        self._look(f"?phase={phase}&within_s=20")

    def finish(self) -> int:
        """End its stdin, and return its exit status."""
        assert self.popen.stdin is not None
        self.popen.stdin.close()
        return self.popen.wait(PATIENCE_S)

    def close(self) -> None:
        """Kill it if it still runs."""
        self.popen.kill()
        self.popen.wait()
        self._reader.join()
        for pipe in (self.popen.stdin, self.popen.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # it ended without reading everything
                pipe.close()

    def _look(self, query: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.wait_for('ready')['rooms']}/rooms{query}", timeout=60) as answer:
            shown: dict[str, Any] = json.load(answer)
        return shown

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for text in self.popen.stdout:
            with self._changed:
                self.heard.append(json.loads(text))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


@contextlib.contextmanager
def engines(folder: Path, *starts: tuple[Start, Sequence[str]]) -> Iterator[list[Engine]]:
    """Start processes of the program at the same time, wait until all are ready, and kill what is left at the end."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("KVROOM_")}
    environment = {**kept, "KVROOM_SECRET": SECRET, "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        begun = []
        for start, options in starts:
            log = folder / f"{options[0]}-{len(list(folder.iterdir()))}.log"
            engine = Engine(start([sys.executable, str(PROGRAM), *options], environment, log), log)
            stack.callback(engine.close)
            begun.append(engine)
        for engine in begun:
            engine.wait_for("ready")
        yield begun


def prefill_options(folder: Path, rank: int, *more: str) -> list[str]:
    """Return the command line of a prefill rank. The ranks meet in a file of this folder."""
    where = ["--ranks", f"file://{folder / 'ranks'}", "--bootstrap-port", "0"]
    return ["prefill", "--rank", str(rank), *where, *more]
