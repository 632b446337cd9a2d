"""The operator's settings: `kv_connector_extra_config` as one checked value. An unknown or invalid key is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kvroom import Timeouts
from kvroom.errors import ConfigurationError
from kvroom.network import (
    advertised_host,
    read_allowed,
    read_host,
    read_listen_host,
    require_admin_token,
    require_allowed,
)

Seconds = Annotated[float, Meta(gt=0, le=86400)]
Port = Annotated[int, Meta(ge=0, lt=65536)]
_LAST_PORT = 65535


class VLLMSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of `kv_connector_extra_config`, all optional. Times are in seconds."""

    host: str = "127.0.0.1"
    """The host that this engine's ranks listen on: an address or name, or `0.0.0.0` or `::` for every interface. Beyond
    loopback, a secret is required."""
    advertise_host: str | None = None
    """The host that the other engine's ranks dial, if it differs from `host` (default for every interface: an address
    of this machine)."""
    link_port: Port = 0
    """The port where peers link, for a firewall rule. Rank r of all ranks takes `link_port + r`; 0 takes free ones."""
    bootstrap_host: str | None = None
    """The host of the bootstrap directory, which the first rank of a producer serves (default: `advertise_host`)."""
    bootstrap_port: Port = 8998
    """Its port. Each further data-parallel rank, an engine of its own in vLLM, takes the next one. 0 takes a free one,
    for an engine of one rank."""
    rooms_host: str = "127.0.0.1"
    """The host on which a worker's status server listens. Beyond loopback, the variable KVROOM_ADMIN_TOKEN_FILE or
    KVROOM_ADMIN_TOKEN is required."""
    rooms_port: Port | None = 0
    """Its port, for `kvroom rooms`. Rank r of all ranks takes `rooms_port + r`; 0 takes a free port, and with null
    there is no status server."""
    transport: str = "auto"
    """The transport that moves the blocks, see docs/transports.md."""
    transport_options: dict[str, Any] = {}
    """The transport's own options, see there."""
    trusted_fabric: bool = False
    """True if every process that can reach the ports or the fabric of the transport's engine may access the KV pool."""
    bootstrap_allow: str | list[str] | None = None
    """Consumer: the directories that requests may name, see `kvroom.dialling.allowed`. Required beyond loopback (the
    default on loopback: its addresses, `host` and `advertise_host`)."""
    secret_file: str | None = None
    """The file with the secret that all engines share (default: the variables KVROOM_SECRET_FILE and KVROOM_SECRET)."""
    checksum: bool = False
    """Consumer: compare checksums of each room's bytes between both sides."""
    bootstrap_s: Seconds = 30.0
    """Producer: the time that finished blocks stay pinned for a consumer that neither comes nor renews."""
    renew_s: Seconds | None = None
    """Consumer: the interval at which a request that waits for blocks renews the producer's lease (default:
    `bootstrap_s` / 6)."""
    waiting_s: Seconds = 300.0
    """Consumer: time for vLLM to allocate blocks once the links are up, then from the offer to the first bytes, and
    for each chunk that is not computed yet. Producer: time for the next chunk to be computed."""
    stall_s: Seconds = 60.0
    """The longest time that a transfer may make no progress."""
    drain_s: Seconds = 10.0
    """After a failure, the time without proof of the drain after which the pages count as quarantined."""
    heartbeat_s: Seconds = 5.0
    """The interval at which an idle link is tested."""
    idle_wait_s: Annotated[float, Meta(ge=0, le=1)] = 0.02
    """The time that a worker with nothing to compute waits for news of its rooms before it returns to vLLM, which calls
    again immediately. It delays a request that arrives in that time. 0 never waits, at the price of a busy core."""

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> VLLMSettings:
        """Check the keys and return the settings.

        Raises:
            ConfigurationError: A key is unknown or its value invalid. The message names the key and the remedy.
        """
        try:
            read = msgspec.convert(dict(extra), cls)
        except msgspec.ValidationError as error:
            known = ", ".join(cls.__struct_fields__)
            raise ConfigurationError(f"kv_connector_extra_config: {error}; the keys are {known}") from None
        try:
            read.reached_by  # noqa: B018 - an invalid host is refused now, and not after the model was loaded
            directory = None if read.bootstrap_host is None else read_host(read.bootstrap_host)
            read_allowed(read.bootstrap_allow)
            rooms_host = read_listen_host(read.rooms_host)
        except ConfigurationError as error:
            raise ConfigurationError(f"kv_connector_extra_config: {error}") from None
        host = read_listen_host(read.host)
        return msgspec.structs.replace(read, host=host, rooms_host=rooms_host, bootstrap_host=directory)

    def check_ports(self, ranks: int, *, directories: int) -> None:
        """Raise `ConfigurationError` if the ports of all ranks do not exist, or overlap with each other.

        Args:
            ranks: All ranks of all data-parallel engines, each with a link port and a status server.
            directories: The data-parallel engines that serve a directory; 0 for a consumer.
        """
        taken: dict[int, str] = {}
        for name, count in (("link_port", ranks), ("rooms_port", ranks), ("bootstrap_port", directories)):
            first = getattr(self, name)
            for port in range(first, first + count) if first else ():
                if port > _LAST_PORT:
                    raise ConfigurationError(
                        f"kv_connector_extra_config: {name} {first} leaves no port for each of {count} ranks: give at "
                        f"most {_LAST_PORT + 1 - count}"
                    )
                if port in taken:
                    raise ConfigurationError(
                        f"kv_connector_extra_config: {name} {first} and {taken[port]} {getattr(self, taken[port])} "
                        f"both need port {port}, because each of {count} ranks takes the next one: set them further "
                        f"apart"
                    )
                taken[port] = name

    def check_status_server(self, token: bytes) -> None:
        """Raise `ConfigurationError` if the status server may not listen on its host with this admin token."""
        if self.rooms_port is not None:
            require_admin_token(self.rooms_host, token)

    @property
    def timeouts(self) -> Timeouts:
        """The deadlines of the rooms. A sink may search for its sources as long as the producer's lease lasts."""
        return Timeouts(
            bootstrap_s=self.bootstrap_s,
            waiting_s=self.waiting_s,
            stall_s=self.stall_s,
            drain_s=self.drain_s,
            renew_s=self.renew_s or self.bootstrap_s / 6,
        )

    def check_consumer(self) -> None:
        """Raise `ConfigurationError` for a consumer beyond loopback without a list of allowed directories."""
        require_allowed(self.host, self.bootstrap_allow, '"bootstrap_allow": "10.0.0.0/8,*.pd.svc"')

    @property
    def reached_by(self) -> str:
        """The host by which other engines reach this one."""
        return advertised_host(self.host, self.advertise_host)
