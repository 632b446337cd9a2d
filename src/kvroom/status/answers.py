"""Faults as HTTP answers: one JSON object with one clear sentence, on every route.

400 is what the asker did wrong, 503 what another attempt may cure, 500 what none can.
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
    """A request that is not allowed; `param` is the field at fault. Nothing was opened, a router never retries it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class _ErrorResponse(web.Response):
    """It is sent in chunks: smg wraps the body of a decode worker's error in an event of its own but keeps our
    Content-Length, which would cut the message short. A client of HTTP/1.0 knows no chunks.
    """

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        if request.version >= HttpVersion11:
            self.enable_chunked_encoding()
        return await super().prepare(request)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> Body:
    """An error in OpenAI's shape."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(status: int, message: str, param: str | None = None, *, code: str | None = None) -> web.Response:
    """An error as a response."""
    body = json.dumps(error_body(status, message, param, code))
    response = _ErrorResponse(text=body, status=status, content_type="application/json")
    if status == web.HTTPServiceUnavailable.status_code:
        response.headers["Retry-After"] = _RETRY_AFTER_S
    return response


def status_of(error: KVRoomError) -> int:
    """400: the client's fault. 500: it will fail each time. 503: another attempt, in a new room, may succeed."""
    if isinstance(error, InvalidRequest | AddressNotAllowed):
        return 400
    if isinstance(error, ConfigurationError | LayoutError | PlanError):
        return 500
    return 503


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every fault of a handler with `error_response`.

    An exception that no part of kvroom declares is a bug: its traceback goes to the log and never to the client.
    """
    try:
        return await handler(request)
    except KVRoomError as error:
        return error_response(status_of(error), str(error), getattr(error, "param", None))
    except ClientConnectionResetError:
        # The client went away while we wrote; the handler has cleaned up and nobody reads this.
        return web.Response(status=499)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return error_response(error.status, f"{request.method} {request.path}: {error.reason}")
    except web.RequestPayloadError as error:
        cause = error.__cause__
        reason = cause.message if isinstance(cause, HttpProcessingError) else error
        return error_response(400, f"the body cannot be read: {reason}; send it as it is")
    except Exception as error:  # the supervisor of the handlers: aiohttp would answer in plain text
        if request.writer.output_size > 0:
            raise  # an answer has begun: aiohttp logs the fault and cuts the connection, so that it cannot look whole
        log.exception(f"{type(error).__name__} in the handler of %s %s", request.method, request.path)
        return error_response(500, f"{type(error).__name__} in this server: its log says where; please report it")
