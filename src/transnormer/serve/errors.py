"""Errors as OpenAI's clients read them: a status, and a body that says what is wrong."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.routing import Route

from transnormer.infer.engine_config import QueueFull

log = logging.getLogger(__name__)
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class Reply(BaseModel):
    """Base of what the server answers; the description shows what stands below its fields."""

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())


class ErrorDetail(Reply):
    """What is wrong."""

    message: str
    """What was found, what was expected, what to do."""
    type: str
    """Kind of error."""
    param: str | None
    """The field of the request."""
    code: str | None
    """A name for programs."""


class ErrorBody(Reply):
    """The body of an answer that is an error."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that gets an error for an answer.

    Args:
        status: of HTTP.
        message: for people.
        param: the field of the request that is wrong.
        code: for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The answer's body."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, kind)
        detail = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": detail}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """The answer to an exception of the engine or of the reading of a request."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, ValueError | TypeError | NotImplementedError):
        return ApiError(400, str(error))
    log.error("a request failed", exc_info=error)
    return ApiError(500, f"the request failed: {type(error).__name__}; see the server's log")


def add_handlers(app: FastAPI) -> None:
    """Let every error of an application come out in one form."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _validation_error(error).response()

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: {request.method} {request.url.path}"
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(sorted(_methods(app, request.url.path)))
        return ApiError(error.status_code, message, headers=headers).response()

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, refused)


def _methods(app: FastAPI, path: str) -> set[str]:
    """The methods of all routes of a path; Starlette names those of one route alone."""
    routes = [route for route in app.routes if isinstance(route, Route)]
    found = {x for route in routes if route.path_regex.match(path) for x in route.methods or ()}
    return found | {"HEAD"} if "GET" in found else found


def _validation_error(error: RequestValidationError) -> ApiError:
    """One clear line for the first of a request's mistakes."""
    first = error.errors()[0]
    # The first place is "body" or "query"; places in a union name the alternatives.
    places = [str(place) for place in first["loc"][1:]]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "malformed")
        return ApiError(400, f"the body is not JSON ({reason}); expected one JSON object")
    param = ".".join(places) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is no known field; expected none such", param=param)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return ApiError(400, message, param=param)
    return ApiError(400, f"{param or 'the body'}: {message}", param=param)
