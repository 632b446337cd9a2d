"""The id and `traceparent` of a request as its client gave them. They name the request in logs, `/stats` and errors.

A text that a stranger chose goes into the log, so it is bounded and has visible ASCII characters only. Any other text
is replaced by an id of this worker; the request is not refused for it.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from kvroom import RequestTrace
from kvroom.status import name_request

REQUEST_ID_HEADER = "X-Request-Id"
_FIELDS = ("rid", "request_id")
_current: ContextVar[RequestTrace] = ContextVar("kvroom_request")


@web.middleware
async def named(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Name the request by its headers while it is handled, and name it in the response."""
    given = request.headers.getall(REQUEST_ID_HEADER, [])
    request_id = given[0] if given and RequestTrace.is_id(given[0]) else uuid.uuid4().hex
    parents = request.headers.getall("traceparent", [])
    # Two of them are no valid header (W3C Trace Context, 3.2).
    _current.set(RequestTrace(request_id, RequestTrace.read_traceparent(parents[0]) if len(parents) == 1 else None))
    response = await handler(request)
    name_request(response, current().request_id)
    return response


def current() -> RequestTrace:
    """Return the name of the request that the running task handles."""
    return _current.get()


def named_by_body(headers: Mapping[str, str], body: Mapping[str, Any]) -> RequestTrace:
    """Take the name from the fields `rid` or `request_id` of the body, if no header gives one. Return the name."""
    if REQUEST_ID_HEADER not in headers:
        given = [body[name] for name in _FIELDS if RequestTrace.is_id(body.get(name))]
        if given:
            _current.set(current()._replace(request_id=given[0]))
    return current()
