"""HTTP servers and clients with the limits of this package: connections, descriptors, addresses, faults in the log."""

from __future__ import annotations

from kvroom.bootstrap.site import http_site
from kvroom.dialling.http import Query, http_fault, http_session, request, target
from kvroom.listening.loops import report_faults

__all__ = ["Query", "http_fault", "http_session", "http_site", "report_faults", "request", "target"]
