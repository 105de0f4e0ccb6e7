"""What a call writes down while it runs: a few numbers, of which a `CallMeta` is made when somebody asks. No I/O."""

from collections.abc import Mapping

from ._config import Secret
from ._headers import plain_headers, rate_limit, request_id
from ._meta import Attempt, CallMeta, Timings
from ._words import masked

_NO_KEY = Secret()
_NO_HEADERS: Mapping[str, str] = {}


class Notes:
    """What a call noted down, in loop time; `meta()` makes a `CallMeta` of it."""

    __slots__ = (
        "attempts",
        "began",
        "connect",
        "ended",
        "failed",
        "first_byte",
        "first_token",
        "headers",
        "max_gap",
        "secret",
        "sent",
        "started",
        "status",
        "waited",
    )

    def __init__(self, now: float) -> None:
        self.started = now
        self.ended: float | None = None
        self.attempts: list[Attempt] = []  # those that failed
        self.secret = _NO_KEY  # that no echo of it gets out
        self.begin_attempt(now, 0.0)

    def begin_attempt(self, now: float, waited: float) -> None:
        """Forget the last attempt's numbers."""
        self.began = now
        self.waited = waited
        self.failed = False
        self.sent: float | None = None
        self.connect: float | None = None
        self.first_byte: float | None = None
        self.first_token: float | None = None
        self.max_gap: float | None = None
        self.status: int | None = None
        self.headers = _NO_HEADERS

    def end_attempt(self, now: float, error: str | None, reported_id: str | None) -> Attempt:
        """Return what there is to say of the running attempt."""
        return Attempt(
            number=len(self.attempts) + 1,
            status=self.status,
            error=error,
            waited=self.waited,
            elapsed=now - self.began,
            request_id=masked(request_id(self.headers), self.secret) or reported_id,
        )

    def meta(self) -> CallMeta:
        """Return what is known so far."""
        last = () if self.failed else (self.end_attempt(self.ended or self.began, None, None),)
        return CallMeta(
            request_id=masked(request_id(self.headers), self.secret),
            attempts=(*self.attempts, *last),
            timings=Timings(
                queued=_between(self.began, self.sent),
                connect=self.connect,
                first_byte=_between(self.sent, self.first_byte),
                first_token=_between(self.sent, self.first_token),
                max_gap=self.max_gap,
                total=_between(self.started, self.ended),
            ),
            headers=masked(plain_headers(self.headers), self.secret),
            rate_limit=rate_limit(self.headers),
        )


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start
