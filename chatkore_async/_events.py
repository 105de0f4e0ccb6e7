"""The events of an answer, as they arrive, whatever form the answer has and however it ends.

An event stream is cut by `_sse`. A body that is none (JSON in answer to `stream=True`, a web page) is one event, whole.
What had arrived when a connection broke is handed out before the break is reported.
"""

import collections
import contextlib

from ._call import Call
from ._protocol import begins_event_stream, is_whole
from ._sse import Decoder, EventTooLargeError
from ._transport import FOREIGN, Exchange

_BLANK_LIMIT = 64 * 1024


class EventReader:
    """Reads one exchange into `events`.

    Args:
        call: whose deadlines run while this waits.
        exchange: what is read.
        max_event_size: bytes of one event, or of a body that is no event stream.

    Attributes:
        events: what arrived and was not taken yet.
        ended: whether the body ended, or broke off.
        cause: why it broke off, or `None` when it just ended.
        whole: whether the body is no event stream, but one event.
    """

    __slots__ = (
        "_blank",
        "_body",
        "_body_size",
        "_call",
        "_decoder",
        "_exchange",
        "_max",
        "cause",
        "ended",
        "events",
        "whole",
    )

    def __init__(self, call: Call, exchange: Exchange, max_event_size: int | None) -> None:
        self._call = call
        self._exchange = exchange
        self._max = max_event_size
        self._decoder = Decoder(max_event_size)
        self._blank: bytes | None = b""  # what came before the first byte that tells what the body is
        self._body: list[bytes] = []
        self._body_size = 0
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
        began = loop.time()
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
        gap = loop.time() - began
        if notes.max_gap is None or gap > notes.max_gap:
            notes.max_gap = gap

    def _take(self, data: bytes) -> None:
        if self._blank is not None:
            data = self._blank + data
            if not data.removeprefix(b"\xef\xbb\xbf").strip() and len(data) < _BLANK_LIMIT:
                self._blank = data
                return
            self._blank = None
            self.whole = not begins_event_stream(data)
        if not self.whole:
            self.events.extend(self._decoder.feed(data))
            return
        self._body.append(data)
        self._body_size += len(data)
        if self._max is not None and self._body_size > self._max:
            raise EventTooLargeError(f"the answer is larger than max_event_size ({self._max} bytes)")

    def _break_off(self, cause: Exception) -> None:
        if self._call.notes.ended is None:  # else it was closed by whoever left the stream, and nobody wants the rest
            with contextlib.suppress(EventTooLargeError):  # the break is the better reason
                self._take(self._exchange.rescue())
        self._exchange.abort()
        self._end(cause)

    def _end(self, cause: Exception | None) -> None:
        self.ended = True
        self.cause = cause
        if self.whole:
            if not isinstance(cause, EventTooLargeError):
                self.events.append(b"".join(self._body))
        else:
            # An event that the end cut in two is none; whether the stream was finished decides what that means.
            self.events.extend(event for event in self._decoder.finish() if is_whole(event))
