"""Errors as HTTP responses: one JSON object with one sentence, on every route.

400: the request is wrong. 503: another attempt may succeed. 500: no attempt can succeed.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from aiohttp import ClientConnectionResetError, HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

from kvroom.errors import AddressNotAllowed, ConfigurationError, InvalidRequest, KVRoomError, LayoutError, PlanError
from kvroom.listening.repeats import Repeats

log = Repeats(logging.getLogger(__name__))

Body = dict[str, Any]
"""A JSON object."""

_RETRY_AFTER_S = "1"


class BadRequest(InvalidRequest):
    """An invalid request, answered with 400: no room was opened, and a router does not retry it.

    Args:
        message: the sentence for the client.
        param: the name of the invalid field or query parameter.
        status: another status than 400.
        code: OpenAI's code of the error, if it has one.
    """

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


class _ErrorResponse(web.Response):
    """An error response in chunks, without a Content-Length.

    The router smg wraps the body of a decode worker's error in an event but keeps its Content-Length, which would cut
    the message short.
    """

    def name_request(self, request_id: str) -> None:
        """Add the id of the request to the error in the body."""
        body = json.loads(self.text or "{}")
        body["error"]["request_id"] = request_id
        self.text = json.dumps(body)

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Enable chunks, unless the client speaks HTTP/1.0, which has none."""
        if request.version >= HttpVersion11:
            self.enable_chunked_encoding()
        return await super().prepare(request)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> Body:
    """Return an error as a JSON object in OpenAI's format; its `type` follows from the status."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def name_request(response: web.StreamResponse, request_id: str) -> None:
    """Name the request in a response that has not begun: in the header, and in the body of an error."""
    if not response.prepared:
        response.headers["X-Request-Id"] = request_id
        if isinstance(response, _ErrorResponse):
            response.name_request(request_id)


def unavailable_headers(status: int) -> dict[str, str]:
    """Return the headers of a JSON answer with this status: 503 has `Retry-After`."""
    return {"Retry-After": _RETRY_AFTER_S} if status == web.HTTPServiceUnavailable.status_code else {}


def error_response(status: int, message: str, param: str | None = None, *, code: str | None = None) -> web.Response:
    """Return an error as a response with the body of `error_body`; 503 also gets `Retry-After`."""
    body = json.dumps(error_body(status, message, param, code))
    return _ErrorResponse(
        text=body, status=status, content_type="application/json", headers=unavailable_headers(status)
    )


def status_of(error: KVRoomError) -> int:
    """Return the HTTP status for an error.

    400: the request is wrong. 500: every attempt fails. 503: another attempt, in a new room, may succeed.
    """
    if isinstance(error, BadRequest):
        return error.status
    if isinstance(error, InvalidRequest | AddressNotAllowed):
        return 400
    if isinstance(error, ConfigurationError | LayoutError | PlanError):
        return 500
    return 503


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every exception of a handler with `error_response`; a middleware of aiohttp.

    An exception that kvroom does not declare is a bug: its traceback goes to the log and never to the client.
    """
    try:
        return await handler(request)
    except KVRoomError as error:
        if isinstance(error, BadRequest):
            return error_response(error.status, str(error), error.param, code=error.code)
        return error_response(status_of(error), str(error))
    except ClientConnectionResetError:
        # The client closed the connection during the response. The handler has cleaned up, and this goes nowhere.
        return web.Response(status=499)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _routing_error(request, error)
    except web.RequestPayloadError as error:
        cause = error.__cause__
        reason = cause.message if isinstance(cause, HttpProcessingError) else error
        return error_response(400, f"the body cannot be read: {reason}; send it without a content encoding")
    except Exception as error:  # the supervisor of the handlers: aiohttp would answer in plain text
        if request.writer.output_size > 0:
            raise  # a response has begun: aiohttp logs the error and cuts the connection, so that it looks incomplete
        log.exception(f"{type(error).__name__} in the handler of %s %s", request.method, request.path)
        return error_response(500, f"internal error, {type(error).__name__}: see the log of this server; please report")


def _routing_error(request: web.Request, error: web.HTTPException) -> web.Response:
    """Return an error of aiohttp itself, such as an unknown route, with the remedy and its headers."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        response = error_response(error.status, f"{request.method} {request.path}: method not allowed; use {allowed}")
        response.headers["Allow"] = allowed  # RFC 9110, 15.5.6
        return response
    reason = "unknown route on this port" if error.status == web.HTTPNotFound.status_code else error.reason
    return error_response(error.status, f"{request.method} {request.path}: {reason}")
