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

    `endpoint` is the base URL and `model` the model; `size` is the request's body in bytes, from which tokens can be
    estimated; `attempt` counts from 1.
    """

    endpoint: str
    model: str
    size: int
    attempt: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How an attempt went: the status or `None`, the headers (names in lower case), tokens used, seconds to wait."""

    status: int | None
    headers: Mapping[str, str]
    usage: Usage | None
    retry_after: float | None


class Limiter(Protocol):
    """What `rate_limit=` accepts."""

    async def acquire(self, demand: Demand, /) -> object:
        """Wait until the attempt may be made, and return a permit. May be cancelled."""
        ...

    def release(self, permit: object, report: Report, /) -> None:
        """Take a permit back, with how the attempt went. Called exactly once for each permit; must not raise."""
        ...
