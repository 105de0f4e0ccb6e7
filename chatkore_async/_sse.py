"""Server-sent events: bytes in, events out. No I/O.

Operations: `feed(data)` returns the events that are whole; `finish()` returns what the end of the body completes.

Goals, in this order: the events of the WHATWG rules whatever the split of the bytes; time linear in the bytes fed,
also for one line of many megabytes; memory bounded by `max_event_size`; a well-formed segment at the price of one
`split`.

Plan: nearly all that arrives is whole events of one `data: …` line each, ended by an empty line, LF throughout.
Such a segment is recognised by a few scans in C and cut by one `split`; the short beginning of an event at its end
waits for the next. Everything else (CR, comments, other fields, events of many segments) goes line by line through the
rules. After it the fast way is open again.

Source: WHATWG HTML §9.2 "Server-sent events", on bytes: only LF, CR and CRLF end a line, so that U+2028 and its like
inside strings do not. Four liberties, for what relays send (`wire.md` S1, S2, S3): a field named `error` is an event of
its own; an event without a name whose data is empty is a ping, and skipped; a line that is no field is kept for the
end of the stream, where it may turn out to be a bare JSON error; the end of the body ends an event as well.
"""

from ._json import BOM

_FIELD = len(b"data: ")
_LF, _CR = 10, 13

MAX_STRAY = 64 * 1024
"""Bytes of lines that are no fields kept for `stray`; an error's body is shorter."""

SHORT_TAIL = 16 * 1024
"""Bytes of an incomplete event that are joined to the next segment rather than taken apart line by line."""


class Event(bytes):
    """An event with a name: its data, as `bytes`, and `name`. Events without a name are plain `bytes`."""

    name: str

    @classmethod
    def of(cls, name: str, data: bytes) -> "Event":
        """Return the event called `name`."""
        event = cls(data)
        event.name = name
        return event


class EventTooLargeError(Exception):
    """One event grew beyond `max_event_size` bytes; or, where `hint` says so, another limit was met."""

    hint: str | None = "raise Limits.max_event_size"


def sole_event(data: bytes) -> bytes:
    """Return the event of a segment that is one event and nothing else, as most are; nothing for any other.

    That is one `data: ` line and an empty line, LF throughout.
    """
    # Slices and single bytes, since `find` and `startswith` take longer to parse their arguments than to look.
    event = data[_FIELD:-2]
    if _LF in event or _CR in event or data[:_FIELD] != b"data: " or data[-2:] != b"\n\n":
        return b""
    return event


class Decoder:
    """Turns the bytes of an event stream into events.

    Args:
        max_event_size: bytes that one event may take while it is incomplete; `None` disables the limit. An event that
            is whole is handed out whatever its size, since its memory is spent.

    Attributes:
        fresh: whether nothing is held, and a BOM was looked for: then a `sole_event` may pass this by.
        named: whether any event so far had a name.
    """

    __slots__ = (
        "_begun",
        "_data",
        "_data_size",
        "_line",
        "_line_size",
        "_max",
        "_name",
        "_short",
        "_skip_lf",
        "_stray",
        "_tail",
        "fresh",
        "named",
    )

    def __init__(self, max_event_size: int | None = None) -> None:
        self._max = max_event_size
        self._tail: bytes = b""  # the beginning of an event, not looked at yet
        self._short = SHORT_TAIL if max_event_size is None else min(SHORT_TAIL, max_event_size)
        self.fresh = self.named = False
        self._begun = False  # until the first bytes are seen, a BOM may come
        self._skip_lf = False  # the last segment ended in CR: an LF at the start of the next belongs to it
        self._line: list[bytes] = []  # pieces of a line that is not whole
        self._line_size = 0
        self._data: bytes | bytearray | None = None  # data lines of an event that is not whole
        self._data_size = 0
        self._name = b""
        self._stray: bytearray | None = None  # nearly no stream has any

    def __repr__(self) -> str:
        return f"<Decoder holding {len(self._tail) + self._line_size + self._data_size} bytes>"

    @property
    def stray(self) -> bytes:
        """The lines that were no fields of any event, such as a JSON error without `data:` before it."""
        return bytes(self._stray or b"")

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that `data` completes, in order.

        Raises:
            EventTooLargeError: an incomplete event is larger than `max_event_size`, and no event is complete.
        """
        if self.fresh and (event := sole_event(data)):
            return [event]
        if not self._line and self._data is None and not self._name and not self._skip_lf:
            if self._tail:
                data = self._tail + data
                self._tail = b""
            # Cut behind the last event that is whole. What follows waits, unless it is long: to join a long tail to
            # every segment that comes would take more than linear time.
            end = data.rfind(b"\n\n") + 2
            if 2 <= end > len(data) - self._short and data.startswith(b"data: ") and b"\r" not in data:
                events = data[6 : end - 2].split(b"\n\ndata: ")
                # No event has a second line, which may be a comment, and none is empty. To join them and look once is
                # done with most of the speed of memory; to count line ends takes as long as cutting.
                if _LF not in b"".join(events) and all(events):
                    self._tail = data[end:]
                    self._begun = True
                    self.fresh = not self._tail
                    return events
        self.fresh = False
        return self._feed_lines(data)

    def finish(self) -> list[bytes]:
        """Return what the end of the body completes.

        The rules discard an event that no empty line ends. Servers that leave it out after their last event are
        common enough that we do not: an event whose line is whole, or that is all there is, counts.
        """
        events: list[bytes] = []
        if self._tail:
            tail, self._tail = self._tail, b""
            events = self._feed_lines(tail)
        if self._line:
            line = b"".join(self._line)
            self._line.clear()
            self._line_size = 0
            self._take_line(line, events)
        self._take_line(b"", events)
        return events

    def _called(self, name: str, data: bytes) -> Event:
        self.named = True
        return Event.of(name, data)

    def _feed_lines(self, data: bytes) -> list[bytes]:
        events: list[bytes] = []
        if not self._begun:
            data = self._without_bom(data)
            if not self._begun:
                return events
        if self._skip_lf and data:
            self._skip_lf = False
            if data.startswith(b"\n"):
                data = data[1:]
        if b"\r" in data:
            self._skip_lf = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = data.split(b"\n")
        for line in lines:
            whole = line
            if self._line:
                whole = b"".join([*self._line, line])
                self._line.clear()
                self._line_size = 0
            self._take_line(whole, events)
        if rest:
            self._line.append(rest)
            self._line_size += len(rest)
        # Whole events before the large one are handed out first; feeding it on will raise.
        if self._max is not None and self._line_size + self._data_size > self._max and not events:
            raise EventTooLargeError(f"an event of the stream is larger than max_event_size ({self._max} bytes)")
        return events

    def _without_bom(self, data: bytes) -> bytes:
        """Return `data` without the BOM the stream may begin with, once enough bytes came to tell."""
        data = b"".join([*self._line, data])
        self._line.clear()
        self._line_size = 0
        if len(data) < len(BOM) and BOM.startswith(data):
            if data:
                self._line.append(data)
                self._line_size = len(data)
            return b""
        self._begun = True
        return data.removeprefix(BOM)

    def _take_line(self, line: bytes, events: list[bytes]) -> None:
        if not line:
            if self._data is not None:
                data = bytes(self._data)  # which copies only what came in more lines than one
                if self._name:
                    events.append(self._called(self._name.decode("utf-8", "replace"), data))
                elif data:
                    events.append(data)
            self._data = None
            self._data_size = 0
            self._name = b""
            return
        field, colon, value = line.partition(b":")
        if value.startswith(b" "):
            value = value[1:]
        if field == b"data":
            if self._data is None:
                self._data = value
            else:
                # Not a list of lines: each would be an object, and a line of one byte take fifty.
                if isinstance(self._data, bytes):
                    self._data = bytearray(self._data)
                self._data += b"\n" + value
            self._data_size += len(value) + 1
        elif field == b"event":
            self._name = value
        elif field == b"error" and colon:
            events.append(self._called("error", value))
        elif field in (b"", b"id", b"retry"):
            pass  # a comment, or a field for clients that reconnect
        else:
            if self._stray is None:
                self._stray = bytearray()
            if len(self._stray) < MAX_STRAY:
                self._stray += line[: MAX_STRAY - len(self._stray)] + b"\n"
