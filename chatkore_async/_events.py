"""The events of an answer, as they arrive, whatever form the answer has and however it ends.

An event stream is cut by `_sse`. A body that is none (JSON in answer to `stream=True`, a web page) is one event, whole.
What had arrived when a connection broke is handed out before the break is reported.
"""

import contextlib
import math
from collections.abc import Callable

from ._call import Call
from ._codec import LARGE, is_crowded
from ._config import Limits
from ._deadlines import NEVER
from ._foreign import FOREIGN
from ._json import BOM
from ._protocol import CROWDED, begins_event_stream, is_whole, without_done
from ._sse import Decoder, EventTooLargeError
from ._transport import Exchange

_BLANK_LIMIT = 64 * 1024

READING_FAILED = (*FOREIGN, EventTooLargeError)
"""What `EventReader.read` and `.take` raise, and `.fail` is for."""


class _AnswerTooLargeError(EventTooLargeError):
    """The events are in all more than `max_body_size` bytes."""

    hint = "raise Limits.max_body_size"


class _CrowdedError(EventTooLargeError):
    """An event would take out of all proportion more memory than it has bytes."""

    hint = None


class EventReader:
    """Reads one exchange into `events`.

    Args:
        call: whose deadlines run while this waits.
        exchange: what is read.
        limits: how large an event, and all of them, may be.

    Attributes:
        events: what arrived and was not taken yet, the next one last (an empty deque takes 600 bytes, a list 56).
        ended: whether the body ended, or broke off.
        cause: why it broke off, or `None` when it just ended.
        whole: whether the body is no event stream, but one event.
        content: the body's reader; `content.total_bytes` is how many bytes came so far.
        max_size: how many there may be.
        began: when the wait began, in the event loop's time.
        max_gap: the longest wait so far, in seconds.
        unskipped: how many events of the last wait were no pings; whoever skips one takes it off.
        read: returns the next bytes of the body, nothing at its end.
    """

    __slots__ = (
        "_blank",
        "_body",
        "_decoder",
        "_exchange",
        "_feed",
        "_last_event",
        "_max_event",
        "_now",
        "began",
        "call",
        "cause",
        "content",
        "ended",
        "events",
        "max_gap",
        "max_size",
        "read",
        "unskipped",
        "whole",
    )

    def __init__(self, call: Call, exchange: Exchange, limits: Limits) -> None:
        self.call = call
        self._exchange = exchange
        self._max_event = limits.max_event_size
        self.max_size = math.inf if limits.max_body_size is None else limits.max_body_size
        self._decoder = Decoder(limits.max_event_size)
        self._now = call.route.now
        self.content = exchange.content
        self.read = exchange.content.readany
        self.began = 0.0
        self.max_gap = -1.0
        self.unskipped = 1  # the first wait has none to go on with
        self._last_event = 0  # bytes so far when there was an event last
        self._feed: Callable[[bytes], list[bytes]] | None = None  # the decoder's, once this is an event stream
        self._blank: bytes | None = b""  # what came before the first byte that tells what the body is
        self._body: list[bytes] = []
        self.events: list[bytes] = []
        self.ended = False
        self.cause: Exception | None = None
        self.whole = False

    def __repr__(self) -> str:
        return f"<EventReader {'ended' if self.ended else 'open'} holding {len(self.events)}>"

    @property
    def is_even(self) -> bool:
        """Whether no event is half there, and the last wait brought one: then a `sole_event` needs nothing of this."""
        return self._decoder.fresh and self.unskipped > 0

    @property
    def has_names(self) -> bool:
        """Whether any event so far had a name."""
        return self._decoder.named

    @property
    def stray(self) -> bytes:
        """Lines that were no fields: where relays put an error after the fact (S3)."""
        return self._decoder.stray

    async def fill(self) -> None:
        """Wait until there is an event, or the end."""
        while not self.events and not self.ended:
            self.begin_wait()
            try:
                self.take(await self.read())
            except READING_FAILED as cause:
                self.fail(cause)

    # What `fill` does, in pieces: whoever reads delta after delta does it without a coroutine in between.

    def begin_wait(self) -> None:
        """Note that the server is waited for from now on.

        Then `await read()`, and `take` what it returns, or `fail` with what either raises of `READING_FAILED`.
        """
        if self.unskipped:
            self.unskipped = 0
            self.began = self._now()
        # Else the last wait goes on: S2, pings in the form of events are no sign of life either.
        self.call.waiting_since = self.began

    def take(self, data: bytes) -> None:
        """Take in what arrived; nothing is the end of the body."""
        if not data:
            self._exchange.let_go()
            self._end(None)
            return
        size = self.content.total_bytes
        if size > self.max_size:
            raise _AnswerTooLargeError(f"the stream is larger than max_body_size ({self.max_size} bytes)")
        events = self._take_other(data) if self._feed is None else self._feed(data)
        # An event has at most the bytes that came since the one before it.
        if size - self._last_event > LARGE:
            self._check(events)
        if events:
            self._last_event = size
            self._add(events)
            self._stop_waiting()

    def _take_other(self, data: bytes) -> list[bytes]:
        """Take in the beginning of a body, or a part of one that is no event stream."""
        if self._blank is not None:
            data = self._blank + data
            if not data.removeprefix(BOM).strip() and len(data) < _BLANK_LIMIT:
                self._blank = data
                return []
            self._blank = None
            if begins_event_stream(data):
                self._feed = self._decoder.feed
                return self._decoder.feed(data)
            self.whole = True
        self._body.append(data)
        if self._max_event is not None and self.content.total_bytes > self._max_event:
            raise EventTooLargeError(f"the answer is larger than max_event_size ({self._max_event} bytes)")
        return []

    def _add(self, events: list[bytes]) -> None:
        if len(events) > 1:
            events.reverse()
        self.events[:0] = events

    def _stop_waiting(self) -> None:
        self.call.waiting_since = NEVER  # whatever is done with an event, the server is not idle meanwhile
        self.unskipped = len(self.events)
        gap = self._now() - self.began
        if gap > self.max_gap:
            self.note_gap(gap)

    def note_gap(self, gap: float) -> None:
        """Note down the longest wait so far, in seconds."""
        self.max_gap = self.call.notes.max_gap = gap

    def fail(self, cause: Exception) -> None:
        """Hand out what had arrived when the body broke off, or a limit was met, and end."""
        # When the call has ended, whoever left the stream closed it, and nobody wants the rest.
        broken_off = not isinstance(cause, EventTooLargeError) and self.call.notes.ended is None
        if broken_off and (rest := self._exchange.rescue()):
            with contextlib.suppress(EventTooLargeError):  # the break is the better reason
                self.take(rest)
        self._exchange.abort()
        self._end(cause)

    def _check(self, events: list[bytes]) -> None:
        """Look at events that may be large, and hand out those before one that is refused."""
        for number, event in enumerate(events):
            if is_crowded(event):
                self._add(events[:number])
                raise _CrowdedError(f"an event of the stream {CROWDED}")

    def _end(self, cause: Exception | None) -> None:
        if self.call.waiting_since != NEVER:
            self._stop_waiting()
        self.ended = True
        self.cause = cause
        if isinstance(cause, EventTooLargeError):
            return  # what is left is too large, or begins what is
        if self.call.expired and self.call.notes.first_token is None:
            return  # an event without its end is no first delta that came in time
        if self.whole:
            body = without_done(b"".join(self._body))
            self._body.clear()
            if is_crowded(body):
                self.cause = _CrowdedError(f"the answer {CROWDED}")
            else:
                self._add([body])
        else:
            # An event that the end cut in two is none; whether the stream was finished decides what that means.
            self._add([event for event in self._decoder.finish() if is_whole(event, broken=cause is not None)])
