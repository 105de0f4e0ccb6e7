"""What happened, counted: a `Hook` that sees every call, and the numbers it ends up with."""

import math
from collections import Counter
from collections.abc import Sequence
from http import HTTPStatus
from typing import Protocol

from chatkore_async import APIStatusError, Hook, PoolStats
from chatkore_async.types import Usage

# The records that hooks are given have no public names; what is read of them is this.


class _Failed(Protocol):
    @property
    def error(self) -> Exception: ...


class _Began(Protocol):
    @property
    def elapsed(self) -> float: ...


class _Ended(Protocol):
    @property
    def outcome(self) -> str: ...
    @property
    def error(self) -> Exception | None: ...


class Tally(Hook):
    """Count what the client tells its hooks.

    Attributes:
        running: calls that are not over; `most` is the highest that was.
        ended: calls by outcome: ok, error, cancelled, left.
        sent: requests, retries included.
        retries: by what made them necessary: an HTTP status, or the class of an error.
        failures: calls that failed, by the same.
        first_tokens: for each stream, the seconds from its request to its first delta.
        prompt_tokens: what the answers' usage says.
        completion_tokens: what the answers' usage says.
    """

    def __init__(self) -> None:
        self.running = 0
        self.most = 0
        self.ended: Counter[str] = Counter()
        self.sent = 0
        self.retries: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.first_tokens: list[float] = []
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def on_call_start(self, event: object, /) -> None:  # noqa: ARG002 - a hook is given it
        """Count a call in."""
        self.running += 1
        self.most = max(self.most, self.running)

    def on_attempt(self, event: object, /) -> None:  # noqa: ARG002
        """Count a request."""
        self.sent += 1

    def on_retry(self, event: _Failed, /) -> None:
        """Count a retry under its cause."""
        self.retries[_cause(event.error)] += 1

    def on_first_token(self, event: _Began, /) -> None:
        """Keep a time to first token."""
        self.first_tokens.append(event.elapsed)

    def on_call_end(self, event: _Ended, /) -> None:
        """Count a call out."""
        self.running -= 1
        self.ended[event.outcome] += 1
        if event.error is not None:
            self.failures[_cause(event.error)] += 1

    def add(self, usage: Usage | None) -> None:
        """Add the tokens of an answer, if it told them."""
        if usage is not None:
            self.prompt_tokens += usage.prompt_tokens
            self.completion_tokens += usage.completion_tokens

    def rows(self, pool: PoolStats, elapsed: float) -> list[tuple[str, str]]:
        """Return the table of what happened, as names and values.

        Args:
            pool: the client's connections.
            elapsed: seconds that it all took.
        """
        failed = self.ended.total() - self.ended["ok"]
        by_cause = [(f"retried after {cause}", _explained(cause, n)) for cause, n in sorted(self.retries.items())]
        times = self.first_tokens
        return [
            ("calls", f"{self.ended['ok']} ended well, {failed} failed"),
            ("calls at once", f"at most {self.most}"),
            ("requests sent", f"{self.sent}"),
            *(by_cause or [("retries", "none")]),
            ("connections opened", f"{pool.created}"),
            ("connections reused", f"{pool.reused} times"),
            ("first token, p50", f"{_percentile(times, 50) * 1000:.0f} ms, of {len(times)} streams"),
            ("first token, p99", f"{_percentile(times, 99) * 1000:.0f} ms"),
            ("tokens", f"{self.prompt_tokens:,} prompt, {self.completion_tokens:,} completion"),
            ("time", f"{elapsed:.1f} s"),
        ]


def listed(counts: Counter[str]) -> str:
    """Return counts in a line, such as `31 x 429, 12 x 503`."""
    return ", ".join(f"{n} x {name}" for name, n in sorted(counts.items()))


def _cause(error: Exception) -> str:
    return str(error.status_code) if isinstance(error, APIStatusError) else type(error).__name__


def _explained(cause: str, n: int) -> str:
    known = {str(status.value): status.phrase for status in HTTPStatus}
    return f"{n} times ({known[cause]})" if cause in known else f"{n} times"


def _percentile(values: Sequence[float], percent: int) -> float:
    """Return the least value that `percent` of the values do not exceed: one of them, nothing between two."""
    if not values:
        return math.nan
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]
