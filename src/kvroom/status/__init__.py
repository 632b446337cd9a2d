"""The rooms, metrics and health of one manager over HTTP, in any process. Nothing here changes a room.

A name is imported when it is first used: metrics need the package prometheus_client, the rest does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvroom import _lazily

if TYPE_CHECKING:
    from kvroom.runtime.logs import configure_logs

    from .admin import Admission
    from .answers import BadRequest, error_body, error_response, errors_as_json, name_request, status_of
    from .metrics import MetricsPage, manager_families
    from .rooms import MAX_WAIT_S, RoomsWindow
    from .server import StatusServer

__all__ = [
    "MAX_WAIT_S",
    "Admission",
    "BadRequest",
    "MetricsPage",
    "RoomsWindow",
    "StatusServer",
    "configure_logs",
    "error_body",
    "error_response",
    "errors_as_json",
    "manager_families",
    "name_request",
    "status_of",
]

__getattr__, __dir__ = _lazily(
    __name__,
    {
        "kvroom.runtime.logs": ("configure_logs",),
        "kvroom.status.admin": ("Admission",),
        "kvroom.status.answers": (
            "BadRequest",
            "error_body",
            "error_response",
            "errors_as_json",
            "name_request",
            "status_of",
        ),
        "kvroom.status.metrics": ("MetricsPage", "manager_families"),
        "kvroom.status.rooms": ("MAX_WAIT_S", "RoomsWindow"),
        "kvroom.status.server": ("StatusServer",),
    },
)
