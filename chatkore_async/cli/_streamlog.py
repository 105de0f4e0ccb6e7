"""The log of a stream as it comes over the wire: what came when. No I/O; the time is passed in."""

import re
from typing import Any, cast

import msgspec

from chatkore_async.cli._observed import RawStream

# A CR at the end of what came may be the first half of a CR LF.
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")
_CONTENTS = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls")
_PINGS = ("ping", "keepalive", "keep-alive", "heartbeat")


class StreamLog:
    """Reads server-sent events without the client's code, and notes times.

    Attributes:
        seen: what there is to say so far.
        size: bytes of the body.

    Args:
        began: when the request was sent.
        whole: whether the body is one JSON document, and no stream.
    """

    def __init__(self, began: float, *, whole: bool = False) -> None:
        self.seen = RawStream()
        self.size = 0
        self._began = self._last = began
        self._first: float | None = None
        self._whole = whole
        self._held = bytearray()
        self._data: list[bytes] = []
        self._name = ""
        self._pings = 0  # since the last event

    def feed(self, piece: bytes, now: float) -> None:
        """Note bytes of the body that came just now."""
        self.size += len(piece)
        undecided = self._held.endswith(b"\r")
        self._held += piece
        # Not looked at again for each piece of an endless line.
        if self._whole or not (undecided or b"\n" in piece or b"\r" in piece):
            return
        *lines, rest = _LINE_END.split(bytes(self._held))
        self._held = bytearray(rest)
        for line in lines:
            self._read(line, now)

    def finish(self, now: float) -> RawStream:
        """Return everything, the body having ended just now."""
        rest = bytes(self._held)
        if self._whole:
            self._event(rest, now)
        else:
            for line in (*rest.splitlines(), b""):
                self._read(line, now)
        if not self.seen.done:
            self._heard(now)
        return self.seen

    def _read(self, line: bytes, now: float) -> None:
        if self.seen.done:
            self._note(after_done=self.seen.after_done + len(line))
            return
        if not line:
            self._dispatch(now)
            return
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not field:
            self._ping()
        elif field == b"data":
            self._data.append(value)
        elif field == b"event":
            self._name = value.decode("latin-1").strip()

    def _dispatch(self, now: float) -> None:
        data, name = b"\n".join(self._data).strip(), self._name
        self._data, self._name = [], ""
        if data == b"[DONE]" or name == "done":
            self._note(done=True)
        elif name in _PINGS:
            self._ping()
        elif data:
            self._event(data, now)
        if data or name == "done":
            self._heard(now)

    def _ping(self) -> None:
        self._pings += 1
        self._note(pings=self.seen.pings + 1)

    def _heard(self, now: float) -> None:
        if now - self._last > self.seen.silence:
            self._note(silence=now - self._last, silent_pings=self._pings)
        self._last, self._pings = now, 0

    def _event(self, data: bytes, now: float) -> None:
        self._note(events=self.seen.events + 1)
        chunk = _object(_decoded(data))
        first = _object(next(iter(_list(chunk.get("choices"))), None))
        if chunk.get("usage") is not None or first.get("usage") is not None:
            self._note(usage=True)
        delta = _object(first.get("delta") or first.get("message"))
        if any(delta.get(name) for name in _CONTENTS):
            if self._first is None:
                self._first = now
                self._note(first_delta=now - self._began)
            self._note(deltas=self.seen.deltas + 1, spread=now - self._first)

    def _note(self, **changes: object) -> None:
        self.seen = msgspec.structs.replace(self.seen, **changes)


def _decoded(data: bytes) -> object:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None  # what the client says of it, it has said


def _object(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else []
