"""What is known about a call beside its answer: attempts, timings, headers, rate limit.

Structs only. A call that succeeds writes down a handful of numbers while it runs; the structs are made from
them when somebody asks (see `Carrier`), so that a caller who never looks at `.meta` does not pay for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import msgspec


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time of a call went, in seconds; `None` where a phase was not met.

    `queued` is the wait for the rate limiter and for a place in the pool, `connect` the time to open a
    connection (`None` when one was reused), `first_byte` from sending to the status line, `first_token` from
    sending to the first delta of a stream, `max_gap` the longest wait between two arrivals of a stream,
    `total` from the start of the call to its end. All but `total` describe the last attempt.
    """

    queued: float | None = None
    connect: float | None = None
    first_byte: float | None = None
    first_token: float | None = None
    max_gap: float | None = None
    total: float | None = None


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt of a call.

    `number` counts from 1; `status` is the HTTP status or `None` when none arrived; `error` is the name of the
    error's class or `None`; `waited` is the back-off before the attempt and `elapsed` its own duration, both in
    seconds; `request_id` is the server's name for it.
    """

    number: int
    status: int | None = None
    error: str | None = None
    waited: float = 0.0
    elapsed: float = 0.0
    request_id: str | None = None


class RateLimitInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the server said of its limits in `x-ratelimit-*` headers; `reset_*` in seconds from the answer."""

    limit_requests: int | None = None
    remaining_requests: int | None = None
    reset_requests: float | None = None
    limit_tokens: int | None = None
    remaining_tokens: int | None = None
    reset_tokens: float | None = None


class CallMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What happened around an answer or an error. Never encoded to the wire.

    `headers` are the last answer's, names in lower case, repeated ones joined by a comma (RFC 9110 §5.3).
    """

    request_id: str | None = None
    attempts: tuple[Attempt, ...] = ()
    timings: Timings = Timings()
    headers: dict[str, str] = {}
    rate_limit: RateLimitInfo | None = None


class PoolStats(msgspec.Struct, frozen=True, kw_only=True):
    """The pool at one moment, over all event loops.

    `open` connections are `in_use` or `idle`; `waiting` calls wait for a place; `created` connections were opened
    since the client was made, and `reused` counts the requests that found one open. Of a session that the caller
    brought, only `in_use` and `waiting` are known.
    """

    open: int = 0
    in_use: int = 0
    idle: int = 0
    waiting: int = 0
    created: int = 0
    reused: int = 0


class MetaSource(Protocol):
    """Something that can tell the `CallMeta` of a call, when asked."""

    def meta(self) -> CallMeta:
        """Return what is known so far."""
        ...


class Carrier:
    """A slotted base in front of `msgspec.Struct`: what an object carries and never encodes.

    A slot costs about 30 ns where a `__dict__` would cost twice that. The price is that pickling and copying
    have to be told about the slots.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        reduced: Any = super().__reduce__()
        make, args = reduced
        carried: dict[str, object] = {}
        for name in self._slots():
            value: Any = getattr(self, name, None)
            # A call's running notes are not picklable and need not be: what they tell is.
            carried[name] = value.meta() if hasattr(value, "meta") else value
        return _revive, (make, args, {name: value for name, value in carried.items() if value is not None})

    def __copy__(self) -> Any:
        revive, args = self.__reduce__()
        return revive(*args)

    @classmethod
    def _slots(cls) -> Iterator[str]:
        for base in cls.__mro__:
            if issubclass(base, Carrier):
                # msgspec gives each struct slots for its fields too; `__reduce__` of the struct has those.
                yield from (n for n in base.__dict__.get("__slots__", ()) if not hasattr(base, "__struct_fields__"))


def _revive(make: Any, args: tuple[Any, ...], carried: dict[str, object]) -> Any:
    thing = make(*args)
    for name, value in carried.items():
        setattr(thing, name, value)
    return thing


class MetaCarrier(Carrier):
    """Carries a call's metadata, made on demand, and the bytes that were decoded."""

    __slots__ = ("_meta", "_raw")

    _meta: CallMeta | MetaSource
    _raw: bytes

    @property
    def meta(self) -> CallMeta:
        """The `CallMeta` of the call this came from; an empty one for an object made by hand."""
        held = getattr(self, "_meta", None)
        if held is None:
            return CallMeta()
        if not isinstance(held, CallMeta):
            held = self._meta = held.meta()
        return held
