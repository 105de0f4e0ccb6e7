"""Everything that can be raised, under one root.

```
ChatKoreError
├─ ConfigurationError
├─ InvalidRequestError
├─ BatchError
└─ APIError
   ├─ APIConnectionError
   │  └─ APITimeoutError
   ├─ APIStatusError
   │  ├─ BadRequestError
   │  │  ├─ ContextLengthExceededError
   │  │  └─ ContentPolicyError
   │  ├─ AuthenticationError
   │  ├─ PermissionDeniedError
   │  ├─ NotFoundError
   │  ├─ ConflictError
   │  ├─ RequestTooLargeError
   │  ├─ UnprocessableEntityError
   │  ├─ InsufficientQuotaError
   │  ├─ RateLimitError
   │  └─ InternalServerError
   │     └─ NoChannelError
   ├─ InvalidResponseError
   └─ StreamError
      ├─ StreamInterruptedError
      └─ StreamStalledError
```

The class names the cause and `.status_code` the status; the two may differ, since relays report a caller's
mistake as a 500 and an empty purse as a 401. `ConfigurationError`, `InvalidRequestError` and `BatchError` are
also `ValueError`s, `APITimeoutError` is also a `TimeoutError`, and `StreamStalledError` is also an `APITimeoutError`.
"""

import re
from typing import Any, Literal

from ._meta import Attempt, CallMeta, MetaSource
from ._responses import ChatCompletion

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIStatusError",
    "APITimeoutError",
    "AuthenticationError",
    "BadRequestError",
    "BatchError",
    "ChatKoreError",
    "ConfigurationError",
    "ConflictError",
    "ContentPolicyError",
    "ContextLengthExceededError",
    "InsufficientQuotaError",
    "InternalServerError",
    "InvalidRequestError",
    "InvalidResponseError",
    "NoChannelError",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitError",
    "RequestTooLargeError",
    "StreamError",
    "StreamInterruptedError",
    "StreamStalledError",
    "UnprocessableEntityError",
]

_LABEL = r"[\w.-]{1,64}"

Phase = Literal["queue", "pool", "connect", "answer", "first_token", "idle", "total"]

Retryable = Literal["yes", "once", "unconfirmed", "never"]
"""May it be tried again: as often as the policy says, once, once and only where a second bill is accepted, never."""


def _rebuild(cls: "type[ChatKoreError]", args: tuple[object, ...], state: dict[str, Any]) -> "ChatKoreError":
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ChatKoreError(Exception):
    """The root of all errors of this library."""

    def __reduce__(self) -> tuple[Any, ...]:
        state = dict(self.__dict__)
        if "_meta" in state:
            state["_meta"] = self.meta  # type: ignore[attr-defined]
        return _rebuild, (type(self), self.args, state)


class ConfigurationError(ChatKoreError, ValueError):
    """The client was set up wrongly, or used after it was closed. No request was made."""


class InvalidRequestError(ChatKoreError, ValueError):
    """The arguments of a call cannot be sent. No request was made.

    `path` is where the fault lies, such as `$.messages[2].role`; `$` is the request itself.
    """

    def __init__(self, message: str, *, path: str = "$") -> None:
        super().__init__(message)
        self.path = path


class BatchError(ChatKoreError, ValueError):
    """The files of a batch are not what a batch can be run with, or not any more. What is in the output is kept.

    `faults` are the lines that say what is wrong, the first few of them; empty when the message says all.
    """

    def __init__(self, message: str, *, faults: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.faults = faults


class APIError(ChatKoreError):
    """A call failed after it was begun.

    Attributes:
        message: what went wrong, one line, without what `str()` adds.
        meta: the `CallMeta` of the call: its attempts, timings and the last answer's headers.
        partial: what a stream had delivered when it failed, merged to a `ChatCompletion`, or `None`.
        hint: what to change, where that is known, else `None`.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        retryable: Retryable = "never",
        meta: CallMeta | MetaSource | None = None,
        partial: ChatCompletion | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.partial = partial
        self.retry_after: float | None = None
        self._retryable: Retryable = retryable
        self._reported_id: str | None = None
        self._meta: CallMeta | MetaSource = CallMeta() if meta is None else meta
        self._budget_empty = False

    @property
    def meta(self) -> CallMeta:
        """What happened around the error. Made once the call is over, when it is first asked for."""
        if not isinstance(self._meta, CallMeta):
            self._meta = self._meta.meta()
        return self._meta

    @property
    def request_id(self) -> str | None:
        """The server's name for the last attempt, from its headers or its message. Support asks for it."""
        return self.meta.request_id or self._reported_id

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """Every attempt of the call, the failed last one included."""
        return self.meta.attempts

    def _headline(self) -> str:
        return self.message

    def __str__(self) -> str:
        line = self._headline()
        if self.hint:
            line = f"{line.rstrip('.')}. Hint: {self.hint.rstrip('.')}"
        about: list[str] = []
        if self.request_id:
            about.append(f"request id: {self.request_id}")
        if self.attempts:
            count = len(self.attempts)
            total = self.meta.timings.total or 0.0
            about.append(f"{count} attempt{'s' * (count > 1)} in {total:.1f} s")
        if self._budget_empty:
            about.append("not retried further: the retry budget is empty")
        return f"{line} ({', '.join(about)})" if about else line


class APIConnectionError(APIError):
    """No usable connection, or it broke before the answer was whole. The foreign cause is in `__cause__`."""


class APITimeoutError(APIConnectionError, TimeoutError):
    """A deadline passed. `phase` is what was being waited for.

    One of `queue` (the rate limiter), `pool` (a free connection), `connect`, `answer`, `first_token`, `idle`
    (the next event of a stream), or `total` once deltas flowed.
    """

    def __init__(self, message: str, *, phase: Phase, **details: Any) -> None:
        super().__init__(message, **details)
        self.phase: Phase = phase


class APIStatusError(APIError):
    """The server answered with an error: a status, or an error in the body of a 200 or of a stream.

    Attributes:
        status_code: the HTTP status; for an error inside a 200, the status its code stands for, else 200.
        code, type, param: as the body has them, or `None`; a number becomes a string.
        body: the decoded JSON, or the text of anything else, capped at 64 KiB.
        headers: the answer's, names in lower case.
        retry_after: seconds the server asks to wait, or `None`.
    """

    def __init__(
        self,
        message: str,
        *,
        status_code: int,
        code: str | None = None,
        type: str | None = None,  # noqa: A002 - the field's name on the wire
        param: str | None = None,
        body: object = None,
        headers: dict[str, str] | None = None,
        retry_after: float | None = None,
        **details: Any,
    ) -> None:
        super().__init__(message, **details)
        self.status_code = status_code
        self.code = code
        self.type = type
        self.param = param
        self.body = body
        self.headers: dict[str, str] = {} if headers is None else headers
        self.retry_after = retry_after

    def _headline(self) -> str:
        for label in (self.code, self.type):
            # The status again says nothing new; a URL (RFC 9457) or a sentence is no label.
            if label and label != str(self.status_code) and re.fullmatch(_LABEL, label):
                return f"{self.status_code} {label}: {self.message}"
        return f"{self.status_code}: {self.message}"


class BadRequestError(APIStatusError):
    """400, or a caller's mistake under another status: the request will not work as it is."""


class ContextLengthExceededError(BadRequestError):
    """The prompt, or the prompt and `max_tokens` together, do not fit into the model's context."""


class ContentPolicyError(BadRequestError):
    """The prompt was refused by a content filter."""


class AuthenticationError(APIStatusError):
    """401: the key is missing, wrong or expired."""


class PermissionDeniedError(APIStatusError):
    """403: the key is known, and may not do this."""


class NotFoundError(APIStatusError):
    """404: no such model, or no such URL."""


class ConflictError(APIStatusError):
    """409: the request collides with another."""


class RequestTooLargeError(APIStatusError):
    """413: the request body is larger than the server takes."""


class UnprocessableEntityError(APIStatusError):
    """422: the request is well-formed, and wrong."""


class InsufficientQuotaError(APIStatusError):
    """Money or quota is gone, whatever the status. Waiting does not help, so it is never retried."""


class RateLimitError(APIStatusError):
    """429: too many requests or tokens for now. `retry_after` tells how long to wait, where the server does."""


class InternalServerError(APIStatusError):
    """5xx: the server, or something behind it, failed."""


class NoChannelError(InternalServerError):
    """The relay has no channel that serves the model: misspelt, not enabled for the key, or all are down."""


class InvalidResponseError(APIError):
    """The answer is not what the API speaks: HTML, no choices, not JSON. `body` is its text, capped at 64 KiB."""

    def __init__(self, message: str, *, body: str = "", **details: Any) -> None:
        super().__init__(message, **details)
        self.body = body


class StreamError(APIError):
    """A stream failed as a stream. `partial` holds what it had delivered."""


class StreamInterruptedError(StreamError):
    """A stream was cut, or ended before every choice had its finish reason."""


class StreamStalledError(StreamError, APITimeoutError):
    """Nothing but silence or pings arrived for the `idle` time of the `Timeout`."""
