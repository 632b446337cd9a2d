"""Addresses, secrets and allow-lists: functions that read them from settings, and checks for listening beyond loopback.

A name is imported when it is first used, so a command that reads an address loads nothing that only others need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvroom import _lazily

if TYPE_CHECKING:
    from kvroom.dialling.advertised import advertised_host
    from kvroom.dialling.allowed import read_allowed, require_allowed
    from kvroom.dialling.names import NAMES
    from kvroom.listening.sockets import bound_sockets
    from kvroom.runtime.machine_id import MACHINE_ID_VARIABLE, load_machine
    from kvroom.runtime.secret import load_admin_token, load_api_keys, load_secret
    from kvroom.wire.address import (
        HostPort,
        ServerURL,
        is_loopback,
        is_wildcard,
        listen_error,
        loopback_of,
        parse_address,
        read_host,
        read_listen_host,
        read_server_url,
        read_url,
    )
    from kvroom.wire.auth import (
        ADMIN_REALM,
        ADMIN_TOKEN_FILE_VARIABLE,
        ADMIN_TOKEN_VARIABLE,
        API_KEY_FILE_VARIABLE,
        API_KEY_VARIABLE,
        SECRET_FILE_VARIABLE,
        SECRET_VARIABLE,
        bears,
        require_admin_token,
        require_secret,
    )
    from kvroom.wire.frames import UNDECODABLE

__all__ = [
    "ADMIN_REALM",
    "ADMIN_TOKEN_FILE_VARIABLE",
    "ADMIN_TOKEN_VARIABLE",
    "API_KEY_FILE_VARIABLE",
    "API_KEY_VARIABLE",
    "MACHINE_ID_VARIABLE",
    "NAMES",
    "SECRET_FILE_VARIABLE",
    "SECRET_VARIABLE",
    "UNDECODABLE",
    "HostPort",
    "ServerURL",
    "advertised_host",
    "bears",
    "bound_sockets",
    "is_loopback",
    "is_wildcard",
    "listen_error",
    "load_admin_token",
    "load_api_keys",
    "load_machine",
    "load_secret",
    "loopback_of",
    "parse_address",
    "read_allowed",
    "read_host",
    "read_listen_host",
    "read_server_url",
    "read_url",
    "require_admin_token",
    "require_allowed",
    "require_secret",
]

__getattr__, __dir__ = _lazily(
    __name__,
    {
        "kvroom.dialling.advertised": ("advertised_host",),
        "kvroom.dialling.allowed": (
            "read_allowed",
            "require_allowed",
        ),
        "kvroom.dialling.names": ("NAMES",),
        "kvroom.listening.sockets": ("bound_sockets",),
        "kvroom.runtime.machine_id": (
            "MACHINE_ID_VARIABLE",
            "load_machine",
        ),
        "kvroom.runtime.secret": (
            "load_admin_token",
            "load_api_keys",
            "load_secret",
        ),
        "kvroom.wire.address": (
            "HostPort",
            "ServerURL",
            "is_loopback",
            "is_wildcard",
            "listen_error",
            "loopback_of",
            "parse_address",
            "read_host",
            "read_listen_host",
            "read_server_url",
            "read_url",
        ),
        "kvroom.wire.auth": (
            "ADMIN_REALM",
            "ADMIN_TOKEN_FILE_VARIABLE",
            "ADMIN_TOKEN_VARIABLE",
            "API_KEY_FILE_VARIABLE",
            "API_KEY_VARIABLE",
            "SECRET_FILE_VARIABLE",
            "SECRET_VARIABLE",
            "bears",
            "require_admin_token",
            "require_secret",
        ),
        "kvroom.wire.frames": ("UNDECODABLE",),
    },
)
