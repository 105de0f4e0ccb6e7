"""The events of an answer, as they arrive, whatever form the answer has and however it ends.

An event stream is cut by `_sse`. A body that is none (JSON in answer to `stream=True`, a web page) is one event, whole.
What had arrived when a connection broke is handed out before the break is reported.
"""

import collections
import contextlib
import math

from ._call import Call
from ._codec import LARGE, is_crowded
from ._config import Limits
from ._protocol import CROWDED, begins_event_stream, is_whole, without_done
from ._sse import Decoder, EventTooLargeError
from ._transport import FOREIGN, Exchange

_BLANK_LIMIT = 64 * 1024


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
        events: what arrived and was not taken yet.
        ended: whether the body ended, or broke off.
        cause: why it broke off, or `None` when it just ended.
        whole: whether the body is no event stream, but one event.
        skipped: how many events of the last wait were pings; whoever reads them counts.
    """

    __slots__ = (
        "_began",
        "_blank",
        "_body",
        "_call",
        "_decoder",
        "_exchange",
        "_filled",
        "_last_event",
        "_max_event",
        "_max_size",
        "_size",
        "cause",
        "ended",
        "events",
        "skipped",
        "whole",
    )

    def __init__(self, call: Call, exchange: Exchange, limits: Limits) -> None:
        self._call = call
        self._exchange = exchange
        self._max_event = limits.max_event_size
        self._max_size = math.inf if limits.max_body_size is None else limits.max_body_size
        self._decoder = Decoder(limits.max_event_size)
        self._began = 0.0  # when the wait began, in the event loop's time
        self._filled = 0  # events that the last wait brought
        self.skipped = -1  # not as many as came: the first wait has none to go on with
        self._size = 0  # bytes so far
        self._last_event = 0  # bytes so far when there was an event last
        self._blank: bytes | None = b""  # what came before the first byte that tells what the body is
        self._body: list[bytes] = []
        self.events: collections.deque[bytes] = collections.deque()
        self.ended = False
        self.cause: Exception | None = None
        self.whole = False

    def __repr__(self) -> str:
        return f"<EventReader {'ended' if self.ended else 'open'} holding {len(self.events)}>"

    @property
    def stray(self) -> bytes:
        """Lines that were no fields: where relays put an error after the fact (S3)."""
        return self._decoder.stray

    async def fill(self) -> None:
        """Wait until there is an event, or the end."""
        call, read = self._call, self._exchange.content.readany
        loop, notes = call.pool.loop, call.notes
        if self.skipped != self._filled:
            self._began = loop.time()
        # Else the last wait goes on: S2, pings in the form of events are no sign of life either.
        began = self._began
        call.wait_for_event(began)
        try:
            while not self.events and not self.ended:
                if data := await read():
                    self._take(data)
                else:
                    self._exchange.let_go()
                    self._end(None)
        except FOREIGN as cause:
            self._break_off(cause)
        except EventTooLargeError as cause:
            self._exchange.abort()
            self._end(cause)
        finally:
            call.stop_waiting()
        self.skipped, self._filled = 0, len(self.events)
        gap = loop.time() - began
        if notes.max_gap is None or gap > notes.max_gap:
            notes.max_gap = gap

    def _take(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._max_size:
            raise _AnswerTooLargeError(f"the stream is larger than max_body_size ({self._max_size} bytes)")
        if self._blank is not None:
            data = self._blank + data
            if not data.removeprefix(b"\xef\xbb\xbf").strip() and len(data) < _BLANK_LIMIT:
                self._blank = data
                return
            self._blank = None
            self.whole = not begins_event_stream(data)
        if not self.whole:
            events = self._decoder.feed(data)
            # An event has at most the bytes that came since the one before it.
            if self._size - self._last_event > LARGE:
                self._check(events)
            if events:
                self._last_event = self._size
                self.events.extend(events)
            return
        self._body.append(data)
        if self._max_event is not None and self._size > self._max_event:
            raise EventTooLargeError(f"the answer is larger than max_event_size ({self._max_event} bytes)")

    def _check(self, events: list[bytes]) -> None:
        """Look at events that may be large, and hand out those before one that is refused."""
        for number, event in enumerate(events):
            if is_crowded(event):
                self.events.extend(events[:number])
                raise _CrowdedError(f"an event of the stream {CROWDED}")

    def _break_off(self, cause: Exception) -> None:
        if self._call.notes.ended is None:  # else it was closed by whoever left the stream, and nobody wants the rest
            with contextlib.suppress(EventTooLargeError):  # the break is the better reason
                self._take(self._exchange.rescue())
        self._exchange.abort()
        self._end(cause)

    def _end(self, cause: Exception | None) -> None:
        self.ended = True
        self.cause = cause
        if isinstance(cause, EventTooLargeError):
            return  # what is left is too large, or begins what is
        if self._call.expired and self._call.notes.first_token is None:
            return  # an event without its end is no first delta that came in time
        if self.whole:
            body = without_done(b"".join(self._body))
            self._body.clear()
            if is_crowded(body):
                self.cause = _CrowdedError(f"the answer {CROWDED}")
            else:
                self.events.append(body)
        else:
            # An event that the end cut in two is none; whether the stream was finished decides what that means.
            self.events.extend(event for event in self._decoder.finish() if is_whole(event, broken=cause is not None))
