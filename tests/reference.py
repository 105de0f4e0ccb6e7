"""Server-sent events as the WHATWG writes them: slow, plain, and what the decoder is held against."""

import re

from chatkore_async._sse import Decoder, Event

Told = list[tuple[str, bytes]]


def told(events: list[bytes]) -> Told:
    """Events as pairs of name and data."""
    return [(event.name if isinstance(event, Event) else "", bytes(event)) for event in events]


def decode(*pieces: bytes) -> tuple[Told, bytes]:
    """All events of a body that came in pieces, and its stray lines."""
    decoder = Decoder()
    events = [event for piece in pieces for event in decoder.feed(piece)]
    return told([*events, *decoder.finish()]), decoder.stray


def reference(body: bytes) -> tuple[Told, bytes]:
    """The rules as the WHATWG writes them, line by line, with our liberties marked. Slow and plain on purpose."""
    lines = re.split(rb"\r\n|\n|\r", body.removeprefix(b"\xef\xbb\xbf"))
    events: Told = []
    stray = b""
    data, name = b"", b""
    for line in [*lines, b""]:  # liberty: the end of the body ends an event
        if line == b"":
            if data:
                # The rules say that a block with an empty `data` field is an event. Liberty: only if it has a name.
                value = data[:-1]
                if value or name:
                    events.append((name.decode("utf-8", "replace"), value))
            data, name = b"", b""
            continue
        if line.startswith(b":"):
            continue
        field, colon, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"event":
            name = value
        elif field == b"data":
            data += value + b"\n"
        elif field in (b"id", b"retry"):
            pass
        elif field == b"error" and colon:  # liberty: an event of its own
            events.append(("error", value))
        else:  # liberty: kept
            stray += line + b"\n"
    return events, stray
