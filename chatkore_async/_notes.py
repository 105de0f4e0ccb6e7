"""What a call writes down while it runs: a few numbers, of which a `CallMeta` is made when somebody asks. No I/O."""

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from ._config import Secret
from ._headers import plain_headers, rate_limit, request_id
from ._meta import Attempt, CallMeta, Timings
from ._words import masked

_NO_KEY = Secret()
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Head(msgspec.Struct, gc=False):
    """An answer's status line and headers, and the key that was sent, so that no echo of it gets out.

    `headers` are looked up by lower-case name. A status of 0 is none yet.
    """

    status: int = 0
    headers: Mapping[str, str] = _NO_HEADERS
    secret: Secret = _NO_KEY

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.status}>"  # a header may echo the key

    @property
    def is_success(self) -> bool:
        """Whether the status promises an answer: 200, or what a framework made of it (E14)."""
        return 200 <= self.status < 300


class Notes(Head, kw_only=True, gc=False):
    """What a call noted down, in loop time; `meta()` makes a `CallMeta` of it.

    It begins with the head of the answer to the last attempt, and goes on with the times of that. A struct, since one
    with these defaults is made in C.
    """

    started: float
    began: float
    ended: float | None = None
    attempts: tuple[Attempt, ...] = ()  # those that failed; no list, which each call would keep empty
    waited: float = 0.0
    failed: bool = False
    sent: float | None = None
    connect: float | None = None
    first_byte: float | None = None
    first_token: float | None = None
    max_gap: float | None = None

    def begin_attempt(self, now: float, waited: float) -> None:
        """Forget the last attempt's numbers, and its head but for the key."""
        self.began, self.waited, self.failed = now, waited, False
        self.sent = self.connect = self.first_byte = self.first_token = self.max_gap = None
        self.status, self.headers = 0, _NO_HEADERS

    def end_attempt(self, now: float, error: str | None, reported_id: str | None) -> Attempt:
        """Return what there is to say of the running attempt."""
        return Attempt(
            number=len(self.attempts) + 1,
            status=self.status or None,
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
