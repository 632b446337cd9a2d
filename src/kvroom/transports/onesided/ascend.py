"""`ascend`: the `mooncake` transport with memfabric's engine in its place, for Ascend NPUs.

An engine of memfabric 1.3 has a role. One with the role "Decode" serves: it starts a store at its own address, in which
engines with the role "Prefill" look up its memory when they first write to it. So each side has one engine that serves,
and one engine that writes for each peer. An engine uses only the scheme of the store's URL. The library below the
engines exists once per process: the first engine starts it, and it has to be ended after the last one.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

from msgspec import Meta

from kvroom.dialling.advertised import advertised_host
from kvroom.errors import ConfigurationError, TransportError
from kvroom.plan.blocks import MemoryRange
from kvroom.transports.kit.devices import DeviceBatch, device_memory
from kvroom.transports.kit.options import TransportOptions
from kvroom.transports.kit.probing import Missing, ProbeResult, ascend_npus, package
from kvroom.wire.address import HostPort, bracketed

from . import mooncake
from .engine import OneSidedDescription
from .options import OneSidedOptions
from .pieces import Pieces, cut_at_borders
from .transport import OneSidedTransport

_MODULE = "memfabric_hybrid"
_KINDS = {  # memfabric's way to move bytes: the kinds of memory that it can address
    "SDMA": ("npu",),
    "HOST_RDMA": ("cpu",),
    "DEVICE_RDMA": ("npu", "cpu"),
    "DEVICE_URMA": ("npu", "cpu"),
    "DEVICE_UBOE": ("npu", "cpu"),
}
_SERVES, _WRITES = "Decode", "Prefill"
_ERRORS_ONLY = 3
_DRIVER = (Path("/usr/local/Ascend/driver/version.info"), Path("/etc/ascend_install.info"))  # where memfabric looks
_REMEDY = "install the Ascend driver and CANN, and give this container the NPU's device files (/dev/davinci*)"

_lock = threading.Lock()
_engines: list[Any] = []  # every engine of this process; guarded by `_lock`


class _AscendDescription(OneSidedDescription, frozen=True, tag="ascend"):
    pass


class _AscendSession(mooncake.MooncakeSession):
    """A session that also has the peer's registered pieces: memfabric finds no block that crosses two of them."""

    def __init__(self, where: HostPort, pieces: Pieces) -> None:
        super().__init__(where, None)
        self.address = str(where)
        self.pieces = pieces


class _AscendEngine(mooncake.MooncakeEngine):
    part = "ascend"

    def __init__(self, module: Any, host: str, *, data_op_type: str, store_url: str, device_id: int, nic: str) -> None:
        super().__init__(module, host, data_op_type, "")
        self.kinds = _KINDS[data_op_type]
        self._each_its_own = True
        self._asked = (device_id, getattr(module.TransDataOpType, data_op_type), _SERVES, nic)
        self._store_url = store_url
        self._pieces = Pieces(())

    def fabric(self) -> str:
        return f"memfabric's {self._protocol}"

    def start(self, memory: Sequence[MemoryRange]) -> bytes:
        self._pieces = Pieces(device_memory(self.part, memory, self.kinds))
        return super().start(self._pieces.memory)

    def _new(self, serves: bool = False) -> Any:
        role = _SERVES if serves else _WRITES
        with _lock:
            engine = self._module.TransferEngine()
            _engines.append(engine)
            code = engine.initialize(self._store_url, bracketed(self._host), role, *self._asked)
        what = f"start an engine at {self._host} for {self._protocol}"
        if code == 0:
            what, memory = "register this memory", self._memory
            code = engine.batch_register_memory([m.address for m in memory], [m.nbytes for m in memory])
        if code != 0:
            text = self._last_error()
            self._end(engine)
            raise TransportError(f"ascend: memfabric cannot {what} (code {code}{text}): {_REMEDY}")
        return engine

    def _last_error(self) -> str:
        """Fetch memfabric's last error, for the end of a sentence."""
        text = self._module.get_and_clear_last_err_msg()
        return f", {text!r}" if text else ", no message; see its output"

    def _end(self, engine: Any) -> None:
        engine.destroy()
        with _lock:
            _engines.remove(engine)
            if not _engines:
                engine.unInitialize()

    def join(self, described: OneSidedDescription) -> _AscendSession:
        pieces = Pieces(described.registered)
        return _AscendSession(super().join(described).where, pieces)

    def begins_at_once(self, session: mooncake.MooncakeSession) -> bool:  # noqa: ARG002 - `begin` blocks
        return False

    def begin(self, session: mooncake.MooncakeSession, batch: DeviceBatch) -> None:
        if session.engine is None:
            session.engine = self.guard.call(self._new)
        blocks = cut_at_borders(batch.blocks, self._pieces, cast(_AscendSession, session).pieces)
        rows = [part.tolist() for part in blocks]
        code = session.engine.batch_transfer_sync_write(session.address, *rows)
        if code != 0:
            raise TransportError(f"ascend could not write to {session.address} (code {code}{self._last_error()})")

    def leave(self, session: mooncake.MooncakeSession) -> None:
        engine, session.engine = session.engine, None
        if engine is not None:
            self._end(engine)

    def stop(self) -> None:
        engine, self._served = self._served, None
        if engine is not None:
            for piece in self._memory:
                engine.unregister_memory(piece.address)
            self._end(engine)

    def way(self) -> str:
        return f"{self._protocol} of memfabric"


class AscendOptions(OneSidedOptions, frozen=True, kw_only=True):
    """Peers reach this side at `advertise`, or at `host` if it is not set."""

    data_op_type: Annotated[
        str | None, Meta(description="memfabric's; if not given, ASCEND_MF_TRANSFER_PROTOCOL, or SDMA")
    ] = None
    store_url: Annotated[
        str | None, Meta(description="the scheme of its stores; if not given, ASCEND_MF_STORE_URL, or tcp://")
    ] = None
    device_id: Annotated[int, Meta(ge=0, description="the NPU of this process")] = 0
    nic: Annotated[str, Meta(description="for HOST_RDMA: tcp://address:port")] = ""
    part: Annotated[str, Meta(description="the module to use; tests name a double")] = _MODULE


class AscendTransport(OneSidedTransport[mooncake.MooncakeSession]):
    """The transport over memfabric. `register` refuses it unless the operator trusts the fabric (`trusted_fabric`).

    The environment variables have SGLang's names. `register` raises `ConfigurationError` if no engine starts.

    Raises:
        ConfigurationError: memfabric cannot be loaded, or an option is invalid.
    """

    name: ClassVar[str] = "ascend"
    options: ClassVar[type[TransportOptions]] = AscendOptions
    description: ClassVar[type[OneSidedDescription]] = _AscendDescription

    def __init__(self, options: AscendOptions | None = None) -> None:
        given = (options or AscendOptions()).checked(self.name)
        how = (given.data_op_type or os.environ.get("ASCEND_MF_TRANSFER_PROTOCOL") or "SDMA").upper()
        if how not in _KINDS:
            raise ConfigurationError(f"ascend: data_op_type={how!r} is invalid: choose one of {', '.join(_KINDS)}")
        store_url = given.store_url or os.environ.get("ASCEND_MF_STORE_URL") or "tcp://"
        try:
            module = importlib.import_module(given.part)
        except (ImportError, OSError) as error:
            raise ConfigurationError(
                f"ascend: {given.part} cannot be loaded ({error}): pip install memfabric-hybrid"
            ) from error
        host = advertised_host(given.host, given.advertise)
        if "ASCEND_MF_LOG_LEVEL" not in os.environ:
            module.set_log_level(_ERRORS_ONLY)
        engine = _AscendEngine(
            module, host, data_op_type=how, store_url=store_url, device_id=given.device_id, nic=given.nic
        )
        super().__init__(engine, given)


def probe() -> ProbeResult:
    """Report if memfabric, an NPU and its driver are present."""
    part, missing = package("memfabric-hybrid", _MODULE)
    if not ascend_npus():
        remedy = "run on a machine with an Ascend NPU, and give its container the device files"
        missing += (Missing("an Ascend NPU (/dev/davinci*)", "device", remedy),)
    if not any(path.exists() for path in _DRIVER):
        missing += (Missing(f"the Ascend driver ({_DRIVER[0]})", "driver", "install the Ascend driver and CANN"),)
    return ProbeResult(
        part, missing, ("npu", "cpu"), fast=not missing, exposes="uses memfabric, which checks no secret"
    )
