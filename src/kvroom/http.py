"""HTTP servers and clients with kvroom's limits on connections, descriptors, addresses and repeated log lines."""

from __future__ import annotations

from kvroom.bootstrap.site import http_site
from kvroom.dialling.http import Query, describe_http_error, http_session, request, target
from kvroom.listening.loops import log_loop_errors

__all__ = ["Query", "describe_http_error", "http_session", "http_site", "log_loop_errors", "request", "target"]
