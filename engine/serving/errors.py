"""Error responses: every failure becomes an OpenAI error object."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from engine.inference.scheduler import PromptTooLong
from utils.errors import UserError

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
HTTP_MESSAGES = {
    400: "the body is no JSON in UTF-8, or is nested too deeply",
    404: "there is nothing at this address: the API's paths begin with /v1/",
    405: "this address does not take this method",
}
BODY_MESSAGES = {  # errors about the body as a whole
    "missing": "the body is empty: send a JSON object",
    "dict_type": "the body is no JSON object",
    "model_attributes_type": "the body is no JSON object",
    "model_type": "the body is no JSON object",
}


class ApiError(Exception):
    """An error for the client: status, message, and the fields that OpenAI's clients read."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers

    def body(self) -> dict[str, Any]:
        default = "invalid_request_error" if self.status < 500 else "server_error"
        kind = ERROR_TYPES.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


def busy(message: str) -> ApiError:
    """429 with Retry-After, on which clients try again by themselves."""
    return ApiError(429, message, "server_busy", headers={"Retry-After": "1"})


def install_error_handlers(app: FastAPI) -> None:
    """Make every exception in the app an error object."""
    handlers: dict[type[Exception], Callable[[Any], ApiError]] = {
        ApiError: lambda error: error,
        PromptTooLong: lambda error: ApiError(400, str(error), "context_length_exceeded"),
        UserError: lambda error: ApiError(400, str(error)),
        RequestValidationError: _from_validation_error,
        HTTPException: _from_http_exception,
        # Starlette raises it again after the response, so the log has the traceback and the client does not.
        Exception: lambda _: ApiError(500, "the server failed on this request: see its log"),
    }
    for kind, to_api_error in handlers.items():
        app.add_exception_handler(kind, _make_handler(to_api_error))


def _make_handler(to_api_error: Callable[[Any], ApiError]) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handler(_: Request, error: Exception) -> Response:
        return to_api_error(error).response()

    return handler


def _from_http_exception(error: HTTPException) -> ApiError:
    message = HTTP_MESSAGES.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=dict(error.headers) if error.headers else None)


def _from_validation_error(error: RequestValidationError) -> ApiError:
    """The first mistake in a body. The value is not repeated: it may be anything, of any size."""
    first = error.errors()[0]
    details = first.get("ctx", {})
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {details['error']} at character {first['loc'][-1]}")
    if len(first["loc"]) == 1 and first["type"] in BODY_MESSAGES:
        return ApiError(400, BODY_MESSAGES[first["type"]])
    # `loc` also holds the tags of the union members that were tried, which are no identifiers.
    parts = [part for part in first["loc"][1:] if isinstance(part, int) or part.isidentifier()]
    parts += [details["field"]] if first["type"] == "field" else []
    field = ".".join(map(str, parts)) or None
    return ApiError(400, f"{field or 'body'}: {first['msg'].removeprefix('Value error, ')}", param=field)
