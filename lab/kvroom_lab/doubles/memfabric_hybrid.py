"""A double of memfabric_hybrid 1.3 for `ascend`, without NPU and driver: it moves bytes between local processes.

Names, arguments and codes are the real module's. The double refuses what the real module refuses: an engine that is not
initialised, a store that cannot be reached, memory that is not registered on either side or spans two pieces, lists of
different lengths; a negative number is a TypeError. As in the real module, a process has one library; a writer's memory
is only noted until the writer contacts a session; and an engine that serves does not write.
"""

from __future__ import annotations

import enum
import itertools
import socket
import threading
from collections.abc import Sequence

from kvroom.plan.blocks import Blocks
from kvroom.transports.kit.ranges import u64

from .remote import Remote, Served, Table

_OK, _FAILED, _INVALID = 0, -1, -2000
_CONNECT_S = 30.0
_ROLES = ("Prefill", "Decode")
_MOST_CAPACITY = 2**64


class _Library:
    """The state of which a process has only one."""

    def __init__(self) -> None:
        self.initialised = False
        self.message = ""

    def refuse(self, message: str, code: int = _FAILED) -> int:
        self.message = message
        return code


_library = _Library()
_stores: list[Served] = []  # made by `create_config_store`; they live as long as the process


class TransDataOpType(enum.IntEnum):
    SDMA = 1
    HOST_RDMA = 2
    DEVICE_RDMA = 8
    DEVICE_URMA = 64
    DEVICE_UBOE = 128


_DataOp = TransDataOpType  # inside the class, its own attribute hides the name `TransDataOpType`


def create_config_store(store_url: str) -> int:
    """Start a store. Engines of this version start their own."""
    try:
        host, port = _split(store_url.rpartition("://")[2])
        _stores.append(Served(host, port, Table()))
    except (ValueError, OSError) as error:
        return _library.refuse(f"input store URL invalid: {error}", _INVALID)
    return _OK


def set_log_level(level: int) -> int:
    """Accept a level from 0 to 3; the double logs nothing."""
    return _OK if 0 <= level <= 3 else _INVALID


def get_last_err_msg() -> str:
    return _library.message


def get_and_clear_last_err_msg() -> str:
    message, _library.message = _library.message, ""
    return message


class TransferEngine:
    TransDataOpType = TransDataOpType

    def __init__(self) -> None:
        self._table = Table()  # the memory that this engine registered; a piece's identity is its address
        self._served: Served | None = None
        self._session = ""
        self._port = 0
        self._links: dict[str, Remote] = {}
        self._lock = threading.Lock()

    def initialize(
        self,
        store_url: str,  # noqa: ARG002 - the real module, too, reads only the scheme of this
        session_id: str,
        role: str,
        device_id: int,
        data_op_type: _DataOp = _DataOp.SDMA,
        store_server_role: str = "Decode",
        nic: str = "",  # noqa: ARG002
    ) -> int:
        if role not in _ROLES:
            return _FAILED  # the real module prints the reason, and leaves no message
        if not isinstance(data_op_type, _DataOp) or device_id < 0:
            raise TypeError(f"initialize(): incompatible function arguments: {data_op_type!r}, {device_id!r}")
        _library.initialised = True
        host, port = _split(session_id)
        try:
            if role == store_server_role:
                self._served = Served(host, port, self._table)
                self._port = self._served.port
            else:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                with socket.create_server((host, port), family=family) as free:
                    self._port = free.getsockname()[1]
        except OSError as error:
            return _library.refuse(f"no available port at {session_id}: {error}")
        self._session = session_id
        return _OK

    def get_rpc_port(self) -> int:
        """Return the port; 0 before `initialize`."""
        return self._port

    def register_memory(self, buffer_addr: int, capacity: int) -> int:
        return self.batch_register_memory([buffer_addr], [capacity])

    def batch_register_memory(self, buffer_addrs: Sequence[int], capacities: Sequence[int]) -> int:
        for address, capacity in itertools.zip_longest(_sizes(buffer_addrs), _sizes(capacities)):
            if address is None or capacity is None:
                return _FAILED
            if not address or not capacity or not self._table.add(address, address, capacity):
                return _library.refuse(f"cannot register {capacity} bytes at {address:#x}", _INVALID)
        return _OK

    def unregister_memory(self, buffer_addr: int) -> int:
        known = self._table.remove(*_sizes([buffer_addr]))
        return _OK if known or self._served is None else _library.refuse("the memory is not registered", _INVALID)

    def batch_transfer_sync_write(
        self,
        dest_session: str,
        buffers: Sequence[int],
        peer_buffers: Sequence[int],
        lengths: Sequence[int],
        flags: int = 0,  # noqa: ARG002
    ) -> int:
        blocks = Blocks(*(u64(_sizes(each)) for each in (buffers, peer_buffers, lengths)))
        if not _library.initialised or not self._session:
            return _library.refuse("smem trans not initialized yet")
        if self._served is not None:
            return _library.refuse("an engine that decodes does not write")
        if not blocks.src.size == blocks.dst.size == blocks.length.size:
            return _FAILED
        try:
            return self._write(self._link(dest_session), blocks)
        except (OSError, ValueError) as error:
            self._drop(dest_session)
            return _library.refuse(f"session {dest_session}: {error}")

    def _link(self, session: str) -> Remote:
        with self._lock:
            if session not in self._links:
                self._links[session] = Remote(*_split(session), _CONNECT_S)
            return self._links[session]

    def _write(self, link: Remote, blocks: Blocks) -> int:
        if not self._table.holds(blocks.src, blocks.length):
            return _library.refuse("local address is not registered", _INVALID)
        if not link.table().holds(blocks.dst, blocks.length):
            return _library.refuse("remote address is not registered", _INVALID)
        link.write(blocks)
        return _OK

    def _drop(self, session: str) -> None:
        with self._lock:
            link = self._links.pop(session, None)
        if link is not None:
            link.close()

    def destroy(self) -> None:
        self._table.clear()
        served, self._served = self._served, None
        if served is not None:
            served.close()
        for session in list(self._links):
            self._drop(session)

    def unInitialize(self) -> None:
        _library.initialised = False


def _split(session: str) -> tuple[str, int]:
    """Return host and port; port 0 if none is given. Raise `ValueError` if the port is not a number.

    An IPv6 address needs brackets; the real module refuses others ("non-bracketed ipv6 endpoint is not supported").
    """
    if session.startswith("["):
        host, _, rest = session[1:].partition("]")
        return host, int(rest.removeprefix(":") or 0)
    host, colon, port = session.rpartition(":")
    if ":" in host:
        raise ValueError(f"{session}: an IPv6 address without brackets")
    return (host, int(port)) if colon else (session, 0)


def _sizes(values: Sequence[int]) -> list[int]:
    """Return the values as a list. Like pybind11 for size_t, accept only ints from 0 to below 2**64."""
    listed = list(values)
    if any(type(each) is not int or not 0 <= each < _MOST_CAPACITY for each in listed):
        raise TypeError("incompatible function arguments")
    return listed
