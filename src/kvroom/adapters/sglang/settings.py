"""The operator's settings: environment variables as one checked value.

The variable of a field is `KVROOM_` and the field's name in capitals, for example `KVROOM_TRANSPORT` for `transport`.
They are variables because SGLang has no option that a backend could use for its own settings, and because all of its
processes have the environment of the server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kvroom import Timeouts
from kvroom.errors import ConfigurationError
from kvroom.network import (
    ADMIN_TOKEN_FILE_VARIABLE,
    ADMIN_TOKEN_VARIABLE,
    MACHINE_ID_VARIABLE,
    SECRET_FILE_VARIABLE,
    SECRET_VARIABLE,
    HostPort,
    advertised_host,
    loopback_of,
    read_allowed,
    read_listen_host,
    require_admin_token,
    require_allowed,
)

PREFIX = "KVROOM_"
Seconds = Annotated[float, Meta(gt=0, le=86400)]
Port = Annotated[int, Meta(ge=0, lt=65536)]


class SGLangSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of this backend, all optional. Times are in seconds.

    Settings that the vLLM adapter has, too, have the same names there. The secret and the identity of the machine are
    no fields: `kvroom.load_secret` and `kvroom.load_machine` read their variables.
    """

    host: str | None = None
    """The host on which this server's manager listens for its peers (default: SGLang's `--host`). Beyond loopback, a
    secret is required."""
    advertise_host: str | None = None
    """The host that peers dial, if it differs from `host` (default for 0.0.0.0 and ::, every interface: an address of
    this machine)."""
    link_port: Port = 0
    """The port where peers link, for a firewall rule. 0 takes a free one."""
    rooms_host: str = "127.0.0.1"
    """The host on which the status server for `kvroom rooms` and `/metrics` listens. Beyond loopback, the variable
    KVROOM_ADMIN_TOKEN_FILE or KVROOM_ADMIN_TOKEN is required."""
    rooms_port: Port | None = 0
    """Its port. 0 takes a free port, which is logged; with "null" there is no status server."""
    transport: str = "auto"
    """The transport that moves the pages, see docs/transports.md."""
    transport_options: dict[str, Any] = {}
    """The transport's own options, see there. The variable holds a JSON object."""
    trusted_fabric: bool = False
    """True if every process that can reach the ports or the fabric of the transport's engine may access the KV pool."""
    bootstrap_allow: str | None = None
    """Decode side: the directories that requests may name, separated by commas, see `kvroom.dialling.allowed`. Required
    beyond loopback (the default on loopback: its addresses, `host` and `advertise_host`)."""
    checksum: bool = False
    """Decode side: compare checksums of each room's bytes between both sides."""
    bootstrap_s: Seconds = 60.0
    """Prefill side: the time that a request waits for its decode side to open the room, and for each renewal. Decode
    side: the time that a request waits for the directory and for links to the prefill side."""
    renew_s: Seconds | None = None
    """Decode side: the interval at which a request without pages renews its room (default: `bootstrap_s` / 6)."""
    waiting_s: Seconds = 300.0
    """Decode side: the time that a request may wait for pages, and then for its first bytes. Prefill side: the time
    that a request may wait for its next chunk."""
    stall_s: Seconds = 60.0
    """The longest time that a transfer may make no progress."""
    drain_s: Seconds = 10.0
    """After a failure, the time without proof of the drain after which the pages count as quarantined."""
    heartbeat_s: Seconds = 5.0
    """The interval at which an idle link is tested."""

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> SGLangSettings:
        """Return the settings in `environ`. Raises `ConfigurationError` with the variable and the values it takes."""
        given: dict[str, object] = {}
        for name in cls.__struct_fields__:
            text = environ.get(PREFIX + name.upper())
            if text is None:
                continue
            given[name] = text
            if name == "transport_options":
                try:
                    given[name] = json.loads(text)
                except ValueError as error:
                    raise ConfigurationError(
                        f"{PREFIX}{name.upper()} is {text!r}, which is invalid JSON ({error}): write an object like "
                        f'{{"threads": 2}}'
                    ) from None
        try:
            return msgspec.convert(given, cls, strict=False)
        except msgspec.ValidationError as error:
            reason, _, where = str(error).partition(" - at `$.")
            name = where.rstrip("`").split(".")[0].split("[")[0]
            raise ConfigurationError(
                f"{PREFIX}{name.upper()} is {given.get(name)!r}: {reason}; see the table of settings in docs/sglang.md"
            ) from None

    @classmethod
    def unknown(cls, environ: Mapping[str, str]) -> list[str]:
        """Return the variables in `environ` that begin with `KVROOM_` but are not settings, so probably misspelt."""
        known = {PREFIX + name.upper() for name in cls.__struct_fields__}
        known |= {SECRET_VARIABLE, SECRET_FILE_VARIABLE, ADMIN_TOKEN_VARIABLE, ADMIN_TOKEN_FILE_VARIABLE}
        known.add(MACHINE_ID_VARIABLE)
        return sorted(name for name in environ if name.startswith(PREFIX) and name not in known)

    @property
    def timeouts(self) -> Timeouts:
        """The deadlines of the rooms."""
        return Timeouts(
            bootstrap_s=self.bootstrap_s,
            waiting_s=self.waiting_s,
            stall_s=self.stall_s,
            drain_s=self.drain_s,
            renew_s=self.renew_s or self.bootstrap_s / 6,
        )

    def check_allowed(self, serving_host: str) -> None:
        """Raise `ConfigurationError` if `bootstrap_allow` is invalid, or missing beyond loopback.

        For decode servers only. `serving_host` is SGLang's `--host`.
        """
        try:
            read_allowed(self.bootstrap_allow)
        except ConfigurationError as error:
            raise ConfigurationError(f"{PREFIX}BOOTSTRAP_ALLOW: {error}") from None
        require_allowed(
            self.listen_host(serving_host), self.bootstrap_allow, f"{PREFIX}BOOTSTRAP_ALLOW='10.0.0.0/8,*.pd.svc'"
        )

    def check_status_server(self, token: bytes) -> None:
        """Raise `ConfigurationError` if the status server may not listen on its host with this admin token."""
        if self.rooms_port is not None:
            require_admin_token(read_listen_host(self.rooms_host), token)

    def listen_host(self, serving_host: str) -> str:
        """Return the host on which the manager listens. `serving_host` is SGLang's `--host`.

        Raises `ConfigurationError` for a host that peers cannot dial.
        """
        host = read_listen_host(self.host or serving_host)
        advertised_host(host, self.advertise_host, f"{PREFIX}ADVERTISE_HOST")
        return host


def directory_address(serving_host: str, port: int) -> str:
    """Return the address at which a server on `serving_host` reaches its own bootstrap directory."""
    return str(HostPort(loopback_of(serving_host), port))
