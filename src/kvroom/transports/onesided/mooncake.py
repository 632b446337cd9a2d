"""`mooncake`: the Mooncake transfer engine moves the blocks, with one of its own protocols (tcp, rdma, nvlink, ...).

Over tcp an engine refuses a batch that overflows its queue or meets a dead connection, and after that it refuses
everything for the same peer. So batches stay far below the limit of the queue, and each peer has an engine of its own,
which is discarded after a failure and replaced for the next transfer. Peers write into one more engine, which is none
of these. Other protocols repair their own sessions, and pin memory for each engine: with them one engine does all.

The control channel of an engine uses one address family, the same in the whole process: IPv4 or, with MC_USE_IPV6,
IPv6. An IPv6 channel listens for both and dials IPv4 as `::ffff:10.0.0.1`, so it reaches all peers; this transport
chooses it wherever the machine has IPv6. An engine uses only the first address of a name, so names are resolved here,
and an address that answers is chosen. The data connections go to the host with which the peer's engine was started, and
resolve a name themselves.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from kvroom.dialling.advertised import advertised_host
from kvroom.dialling.dial import Dial, is_numeric
from kvroom.errors import ConfigurationError, TransportError
from kvroom.plan.blocks import MemoryRange
from kvroom.transports.base import MalformedDescription
from kvroom.transports.kit.devices import DeviceBatch, device_memory
from kvroom.transports.kit.options import TransportOptions
from kvroom.transports.kit.probing import ProbeResult, library, nvidia_gpus, package, rdma_devices
from kvroom.wire.address import HostPort, is_ipv6, os_reason, parse_address

from .engine import EngineTransfer, OneSidedDescription, OneSidedEngine, read_card
from .options import OneSidedOptions
from .transport import OneSidedTransport

_MODULE = "mooncake.engine"
_USE_IPV6 = "MC_USE_IPV6"  # if it is set, to any value, the control channels of this process use IPv6
_CONNECT_S = 5.0
_TCP_BLOCKS, _TCP_DEPTH = 128, 4  # measured: more is no faster, and a queue of 4,096 blocks overflows
# Measured: 32 blocks of 512 bytes take 653 us packed and 1249 us directly; each further block 55 us.
_TCP_PACKED_BLOCKS, _TCP_PACKED_BYTES = 32, 16 << 10
_LIBRARIES = (("libibverbs.so.1", "libibverbs1"), ("librdmacm.so.1", "librdmacm1"), ("libnuma.so.1", "libnuma1"))


class _MooncakeDescription(OneSidedDescription, frozen=True, tag="mooncake"):
    pass


class Card(msgspec.Struct, frozen=True):
    """The address of the engine's control channel, and its protocol."""

    session: str
    protocol: str


class MooncakeSession:
    """The address of a peer's engine, and the engine here that writes to it.

    `engine` is None until one is needed; `address`, in the family that the engines use, is "" until it is chosen.
    """

    def __init__(self, where: HostPort, engine: Any) -> None:
        self.where = where
        self.engine = engine
        self.address = ""


class MooncakeEngine(OneSidedEngine[MooncakeSession]):
    """The engines of a module that has a `TransferEngine` like Mooncake's. Ascend's engine derives from this class."""

    part: str = "mooncake"
    """Name in errors."""
    kinds: tuple[str, ...] = ("cpu", "cuda")
    """Kinds of devices whose memory it moves."""

    def __init__(self, module: Any, host: str, protocol: str, devices: str) -> None:
        self._module = module
        self._settings = (host, "P2PHANDSHAKE", protocol, devices)
        self._host, self._protocol = host, protocol
        self._each_its_own = protocol == "tcp"
        if protocol == "tcp":
            self.most_blocks, self.depth = _TCP_BLOCKS, _TCP_DEPTH
            self.packed_blocks, self.packed_bytes = _TCP_PACKED_BLOCKS, _TCP_PACKED_BYTES
        self._memory: list[MemoryRange] = []
        self._served: Any = None  # the engine that peers write into

    def fabric(self) -> str:
        return "" if self._protocol == "tcp" else f"the protocol {self._protocol}"

    def start(self, memory: Sequence[MemoryRange]) -> bytes:
        self._memory = device_memory(self.part, memory, self.kinds)
        try:
            self._served = self._new(serves=True)
        except TransportError as error:
            raise ConfigurationError(str(error)) from error
        where = HostPort(self._host, self._served.get_rpc_port())
        return msgspec.msgpack.encode(Card(str(where), self._protocol))

    def _new(self, serves: bool = False) -> Any:  # noqa: ARG002 - one kind of engine does both
        """Start an engine and register this side's memory with it; raise `TransportError`.

        `serves`: it is for peers to write into; else it writes to a peer.
        """
        engine = self._module.TransferEngine()
        code = engine.initialize(*self._settings)
        if code != 0:
            raise TransportError(
                f"mooncake cannot start its engine on {self._host} with protocol {self._protocol!r} (code {code}): "
                "check the address, the protocol and its devices"
            )
        for piece in self._memory:
            code = engine.register_memory(piece.address, piece.nbytes)
            if code != 0:
                raise TransportError(f"{self.part} cannot register {piece} (code {code})")
        return engine

    def join(self, described: OneSidedDescription) -> MooncakeSession:
        card = read_card(self.part, described, Card)
        if card.protocol != self._protocol:
            raise TransportError(
                f"{self.part}: this side uses {self._protocol!r} and the peer {card.protocol!r}: "
                "choose the same protocol on both sides"
            )
        try:
            where = HostPort.to_dial(*parse_address(card.session))
        except ConfigurationError as error:
            raise MalformedDescription(f"{self.part}: the peer's engine has an invalid address: {error}") from None
        return MooncakeSession(where, None if self._each_its_own else self._served)

    def begins_at_once(self, session: MooncakeSession) -> bool:
        return session.engine is not None and session.address != ""

    def begin(self, session: MooncakeSession, batch: DeviceBatch) -> int | None:
        if not session.address:
            session.address = _address(session.where)
        if session.engine is None:
            session.engine = self.guard.call(self._new)
        begun: int = session.engine.batch_transfer_async_write(session.address, *(p.tolist() for p in batch.blocks))
        if begun in (0, -1):
            raise TransportError(f"mooncake refused {batch.blocks.length.size} blocks for {session.address}")
        return begun

    def finish(self, session: MooncakeSession, begun: int, transfer: EngineTransfer) -> None:  # noqa: ARG002 - it times out
        code = session.engine.get_batch_transfer_status([begun])
        if code != 0:
            raise TransportError(f"mooncake could not write to {session.address} (code {code})")

    def leave(self, session: MooncakeSession) -> None:
        if self._each_its_own:
            session.engine = None  # the last reference: ends its threads and closes its connections, in about a second
            session.address = ""

    def stop(self) -> None:
        if self._served is not None:
            for piece in self._memory:
                self._served.unregister_memory(piece.address)
        self._served = None

    def way(self) -> str:
        return f"protocol {self._protocol}"


class MooncakeOptions(OneSidedOptions, frozen=True, kw_only=True):
    """Peers reach this side at `advertise`, or at `host` if it is not set."""

    protocol: Annotated[str, Meta(description="Mooncake's: tcp, rdma, nvlink, ...")] = "tcp"
    devices: Annotated[str, Meta(description="RDMA devices, separated by commas")] = ""
    stall_s: Annotated[
        int, Meta(ge=1, description="how long a tcp connection may make no progress; the first one sets the process's")
    ] = 10


class MooncakeTransport(OneSidedTransport[MooncakeSession]):
    """The transport over Mooncake. Mooncake reads `stall_s` from the environment, once in a process.

    Its engine always listens on every interface of the machine, so `register` raises `ConfigurationError` unless the
    operator trusts the network (`trusted_fabric`).

    Raises:
        ConfigurationError: The package or a system library is missing.
    """

    name: ClassVar[str] = "mooncake"
    options: ClassVar[type[TransportOptions]] = MooncakeOptions
    description: ClassVar[type[OneSidedDescription]] = _MooncakeDescription

    def __init__(self, options: MooncakeOptions | None = None) -> None:
        given = (options or MooncakeOptions()).checked(self.name)
        host_of_peers = advertised_host(given.host, given.advertise)
        if given.protocol == "tcp" or is_ipv6(host_of_peers):
            # Only if a socket of this machine can listen for both families.
            with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as tried:
                tried.bind(("::", 0))
                os.environ.setdefault(_USE_IPV6, "1")
        for setting in ("MC_TCP_PROGRESS_TIMEOUT_SEC", "MC_TCP_STATUS_TIMEOUT_SEC"):
            os.environ.setdefault(setting, str(given.stall_s))
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        try:
            module = importlib.import_module(_MODULE)
        except ImportError as error:
            remedies = "; ".join(missing.remedy for missing in probe().missing) or "reinstall its package"
            raise ConfigurationError(f"mooncake cannot be loaded ({error}): {remedies}") from error
        super().__init__(MooncakeEngine(module, host_of_peers, given.protocol, given.devices), given)


def _address(where: HostPort) -> str:
    """Return the address of the peer's engine in the family that this process uses; raise `TransportError`."""
    family = socket.AF_UNSPEC if _USE_IPV6 in os.environ else socket.AF_INET
    host = where.host
    if not is_numeric(host):
        try:
            with Dial(where, _CONNECT_S, family=family).connect() as found:
                host = HostPort.of_socket(found.getpeername()).host
        except OSError as error:
            raise TransportError(f"mooncake cannot reach the peer's engine at {where}: {os_reason(error)}") from None
    elif family == socket.AF_INET and is_ipv6(host):
        raise TransportError(
            f"mooncake uses IPv4 in this process and cannot reach {where}: set {_USE_IPV6}=1 before it is first used"
        )
    return str(HostPort(host if is_ipv6(host) or family == socket.AF_INET else f"::ffff:{host}", where.port))


def probe() -> ProbeResult:
    """Report if Mooncake's package and the system libraries that it needs are present."""
    part, missing = package("mooncake-transfer-engine-non-cuda", "mooncake")
    for soname, debian in _LIBRARIES:
        missing += library(soname, debian)
    rdma, gpus = rdma_devices(), nvidia_gpus()
    notes = (f"RDMA devices: {', '.join(rdma)}" if rdma else "no RDMA device: protocol tcp",)
    kinds = ("cpu", "cuda") if gpus else ("cpu",)
    reach = "listens on every interface of the machine"
    return ProbeResult(part, missing, kinds, fast=bool(rdma), notes=notes, exposes=reach)
