"""Every answer that is no answer: an OpenAI error object, whatever went wrong and wherever."""

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from utils.errors import UserError

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What the client is told: a status, a sentence, and what the official clients read beside it."""

    def __init__(self, status, message, code=None, param=None, headers=None):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def body(self):
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self):
        return JSONResponse(self.body(), self.status, headers=self.headers)


def busy(message):
    """The server has no room at the moment; clients come again by themselves."""
    return ApiError(429, message, "server_busy", headers={"Retry-After": "1"})


def handle_errors(app):
    """Let everything that is raised in the app end in an error object."""

    def handle(kind, to_error):
        async def handler(_, error):
            return to_error(error).response()

        app.add_exception_handler(kind, handler)

    handle(ApiError, lambda error: error)
    handle(UserError, lambda error: ApiError(400, str(error)))
    handle(RequestValidationError, _invalid)
    handle(HTTPException, lambda error: ApiError(error.status_code, _say(error), headers=error.headers))
    # Starlette raises it again behind the answer, so the log has its traceback; the client learns nothing of it.
    handle(Exception, lambda _: ApiError(500, "the server failed on this request: its log says how"))


def _say(error):
    return {
        404: "there is nothing at this address: the API's paths begin with /v1/",
        405: "this address does not take this method",
    }.get(error.status_code, error.detail)


def _invalid(error):
    """The first thing that is wrong with a body. The value itself is not repeated: it may be anything, of any size."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is no JSON")
    # Between the names of fields stand those of the types that were tried, such as "constrained-str".
    parts = [part for part in first["loc"][1:] if isinstance(part, int) or part.isidentifier()]
    place = ".".join(map(str, parts)) or None
    return ApiError(400, f"{place or 'body'}: {first['msg'].removeprefix('Value error, ')}", param=place)
