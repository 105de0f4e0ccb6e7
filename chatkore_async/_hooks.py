"""Hooks: what a caller can watch of a call, for metrics, traces and logs.

Each method of a hook is optional and synchronous, and is given one frozen record. A hook that raises is logged and
never breaks a call. A client without hooks makes no records.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from ._meta import CallMeta

logger = logging.getLogger("chatkore_async")

Outcome = Literal["ok", "error", "cancelled", "left"]
"""How a call ended: answered, failed, cancelled, or a stream that its reader left before the end."""


class CallStart(msgspec.Struct, frozen=True, kw_only=True):
    """A call begins. `call_id` is the same in all records of a call."""

    call_id: str
    model: str
    stream: bool
    url: str


class AttemptStart(msgspec.Struct, frozen=True, kw_only=True):
    """A request is about to be sent; `number` counts from 1."""

    call_id: str
    number: int


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt failed with `error`, and another follows in `delay` seconds."""

    call_id: str
    number: int
    error: Exception
    delay: float


class FirstToken(msgspec.Struct, frozen=True, kw_only=True):
    """The first delta of a stream came, `elapsed` seconds after its request was sent."""

    call_id: str
    elapsed: float


class CallEnd(msgspec.Struct, frozen=True, kw_only=True):
    """A call ended. `error` is what the caller was given, `None` unless `outcome` is `"error"`."""

    call_id: str
    outcome: Outcome
    error: Exception | None
    meta: CallMeta


class Hook(Protocol):
    """What a hook may have; leave out what is not needed.

    An explicit subclass inherits methods that do nothing.
    """

    def on_call_start(self, event: CallStart, /) -> None:
        """See a call begin."""

    def on_attempt(self, event: AttemptStart, /) -> Mapping[str, str] | None:
        """See an attempt begin; may return headers to add to it, for trace context."""

    def on_retry(self, event: Retry, /) -> None:
        """See an attempt fail that will be repeated."""

    def on_first_token(self, event: FirstToken, /) -> None:
        """See the first delta of a stream."""

    def on_call_end(self, event: CallEnd, /) -> None:
        """See a call end, exactly once, also when it was cancelled."""


def notify(hooks: Sequence[object], method: str, event: object) -> dict[str, str]:
    """Tell every hook that has `method`; return the headers that `on_attempt` gave, later hooks winning."""
    headers: dict[str, str] = {}
    for hook in hooks:
        try:
            listener = getattr(hook, method, None)
            given = None if listener is None else listener(event)
            if given is not None and method == "on_attempt":
                headers.update(dict(given))  # whole or not at all
        except Exception:
            logger.exception("a hook failed in %s; the call goes on", method)
    return headers
