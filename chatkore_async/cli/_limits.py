"""A limit of requests per minute, as the servers of vendors have it: how many are let in, and what they are told."""

import math
from collections.abc import Callable

import msgspec

from chatkore_async.testing import Reply, error


class Decision(msgspec.Struct, frozen=True):
    """What a limit says to one request.

    Attributes:
        limit: requests per minute.
        remaining: requests that would be let in right after this one.
        reset: seconds until `remaining` is `limit` again.
        retry_after: seconds until one more is let in; 0 for a request that was.
    """

    limit: int
    remaining: int
    reset: float
    retry_after: float = 0.0

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """The limit as headers, under the names and in the units of OpenAI."""
        told = (
            ("x-ratelimit-limit-requests", str(self.limit)),
            ("x-ratelimit-remaining-requests", str(self.remaining)),
            ("x-ratelimit-reset-requests", duration(self.reset)),
        )
        if not self.retry_after:
            return told
        # Whole seconds (RFC 9110 §10.2.3) are never too early; who reads milliseconds need not wait for the rest.
        return (
            *told,
            ("retry-after", str(math.ceil(self.retry_after))),
            ("retry-after-ms", str(math.ceil(self.retry_after * 1000))),
        )

    def refusal(self, model: str) -> Reply:
        """Return the 429 for a request that was not let in."""
        return error(
            429,
            f"Rate limit reached for {model} on requests per min (RPM): Limit {self.limit}, Used {self.limit}, "
            f"Requested 1. Please try again in {duration(self.retry_after)}.",
            type="requests",
            code="rate_limit_exceeded",
            headers=self.headers,
        )


class RequestLimit:
    """Let in so many requests a minute: a bucket that is full at first, and filled again evenly.

    Args:
        per_minute: how many; as many may come at once.
        clock: seconds, from anywhere, never going back.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._limit = per_minute
        self._clock = clock
        self._left = float(per_minute)
        self._then = clock()

    def ask(self) -> Decision:
        """Let one request in, or not."""
        now = self._clock()
        rate = self._limit / 60
        self._left = min(self._limit, self._left + (now - self._then) * rate)
        self._then = now
        # What fills in steps misses a whole one by a rounding error; a waiter of exactly `retry_after` is let in.
        if self._left < 1 - 1e-6:
            return Decision(self._limit, 0, (self._limit - self._left) / rate, (1 - self._left) / rate)
        self._left = max(0.0, self._left - 1)
        return Decision(self._limit, int(self._left + 1e-6), (self._limit - self._left) / rate)


def duration(seconds: float) -> str:
    """Return seconds as OpenAI writes them: `20ms`, `1.5s`, `6m0s`; rounded up, since it is a time to wait."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"
