"""What a reader is told of an error that happened behind the service: a status and a message that are meant for it.

A service asks with its own key. What went wrong with that, or with the model's server, is the operator's business and
goes to the log. What is wrong with the reader's request is the reader's, and is told in the words of the API.
"""

import math
from typing import Final

import msgspec

from chatkore_async import (
    APIStatusError,
    APITimeoutError,
    BadRequestError,
    ChatKoreError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    RateLimitError,
    RequestTooLargeError,
    UnprocessableEntityError,
)

__all__ = ["SHUTTING_DOWN", "Refusal", "refusal"]


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """An error as a reader sees it.

    Attributes:
        status: of the answer, if none was begun.
        message, type, code, param: as in the API's errors.
        retry_after: seconds, rounded up.
    """

    status: int
    message: str
    type: str
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The headers that belong to the status."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def to_dict(self) -> dict[str, dict[str, str | None]]:
        """Return the body, in the API's form."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def to_event(self) -> bytes:
        """Return the event that ends a stream."""
        return b"data: %b\n\n" % msgspec.json.encode(self.to_dict())


SHUTTING_DOWN: Final = Refusal(
    status=503,
    message="The service is shutting down; ask again.",
    type="server_error",
    code="shutting_down",
    retry_after=1,
)

# What is wrong with a request, whatever status it came with: relays report a caller's mistake as a 500, too.
_OF_THE_READER: Final = {
    BadRequestError: 400,
    NotFoundError: 404,
    ConflictError: 409,
    RequestTooLargeError: 413,
    UnprocessableEntityError: 422,
}


def refusal(error: ChatKoreError) -> Refusal:
    """Return what a reader is told of an error.

    400, 404, 409, 413 and 422 keep the server's message, since they are about the request. 429 says when to come again.
    A timeout is a 504, all else a 502, and neither says why.
    """
    if isinstance(error, InvalidRequestError):
        return Refusal(status=400, message=str(error), type="invalid_request_error", param=error.path or None)
    if isinstance(error, APIStatusError):
        for kind, status in _OF_THE_READER.items():
            if isinstance(error, kind):
                return Refusal(
                    status=status,
                    message=error.message,
                    type=error.type or "invalid_request_error",
                    code=error.code,
                    param=error.param,
                )
    if isinstance(error, RateLimitError):
        return Refusal(
            status=429,
            message="Too many requests at the moment; ask again later.",
            type="rate_limit_error",
            code="rate_limit_exceeded",
            retry_after=None if error.retry_after is None else math.ceil(error.retry_after),
        )
    if isinstance(error, APITimeoutError):
        return Refusal(status=504, message="The model did not answer in time.", type="server_error", code="timeout")
    return Refusal(status=502, message="The model could not answer.", type="server_error", code="bad_gateway")
