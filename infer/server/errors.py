"""What a client is told when a request fails: OpenAI's error object, and gRPC's codes."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}

_USUAL_WAIT_SECONDS = 10
_LONGEST_WAIT_SECONDS = 24 * 60 * 60


class ApiError(Exception):
    """Raised anywhere below a route; `status` is HTTP's. param: the field at fault.

    retry_after_seconds: when to come again, for 429 and 503; 10 where nobody knows better.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        if retry_after_seconds is None and status in (429, 503):
            retry_after_seconds = _USUAL_WAIT_SECONDS
        self.retry_after_seconds = retry_after_seconds

    def to_json(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": _TYPES[self.status],
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after_seconds is None:
            return {}
        # Whole seconds: not one too few, and never 0, which clients read as "at once".
        seconds = min(self.retry_after_seconds, _LONGEST_WAIT_SECONDS)
        return {"retry-after": str(max(1, math.ceil(seconds)))}


def unknown_model(message: str) -> ApiError:
    """No model, version or adapter has the name that was given."""
    return ApiError(404, message, param="model", code="model_not_found")


def not_ready(message: str) -> ApiError:
    """Of a model that will soon be there."""
    return ApiError(503, message, code="model_not_ready", retry_after_seconds=2)


def shutting_down() -> ApiError:
    message = "the server is shutting down"
    return ApiError(503, message, code="shutting_down", retry_after_seconds=5)


@contextmanager
def without_reason(code: str, message: str) -> Iterator[None]:
    """For clients: a reason names files, which are for the log and for admins."""
    try:
        yield
    except ApiError as error:
        if error.code != code:
            raise
        raise ApiError(503, message, code=code) from error


def unforeseen(request_id: str) -> ApiError:
    """What a client is told of an error that is logged, under the id of its request."""
    return ApiError(500, f"internal error (request {request_id})", code="internal")
