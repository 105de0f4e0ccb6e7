"""Who may send now: the protocol of a rate limiter.

A call asks before each attempt and reports after it. What a limiter does with that is its own affair: a semaphore, a
token bucket, an actor that a whole cluster asks.
"""

from collections.abc import Mapping
from typing import Protocol

import msgspec

from ._responses import Usage


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What a limiter is asked for: one attempt.

    Attributes:
        endpoint: the base URL.
        key: names the API key without telling it: the same for the same key, in every process.
        model: as in the request; empty for a call that has none, such as the list of models.
        size: of the request's body, in bytes.
        body: the request itself, as JSON, from which tokens can be estimated; empty for a call that has none. It is
            left out of the `repr`.
        attempt: counts from 1.
    """

    endpoint: str
    model: str
    size: int
    attempt: int
    key: str = ""
    body: bytes = b""

    def __repr__(self) -> str:
        return (
            f"Demand(endpoint={self.endpoint!r}, key={self.key!r}, model={self.model!r}, size={self.size}, "
            f"attempt={self.attempt})"
        )


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How an attempt went.

    Attributes:
        status: the HTTP status, or the one that an error inside a 200 stands for; `None` when none came.
        headers: names in lower case.
        usage: tokens, where the answer says so.
        retry_after: seconds to wait that the server asked for.
        error: the name of the error's class, such as `RateLimitError`; `None` when there was none, and when the call
            was cancelled or its stream was left.
    """

    status: int | None
    headers: Mapping[str, str]
    usage: Usage | None
    retry_after: float | None
    error: str | None = None


class Limiter(Protocol):
    """What `rate_limit=` accepts."""

    async def acquire(self, demand: Demand, /) -> object:
        """Wait until the attempt may be made, and return a permit. May be cancelled."""
        ...

    def release(self, permit: object, report: Report, /) -> None:
        """Take a permit back, with how the attempt went. Called exactly once for each permit; must not raise."""
        ...
