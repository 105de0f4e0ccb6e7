"""Replies to bytes on the wire, and the faults that need to count those bytes. No I/O."""

import zlib
from http import HTTPStatus
from typing import Literal, TypeVar

import msgspec

from chatkore_async.testing._steps import Cut, Framing, Ping, Raw, Reply, Reset, Stall, Step

__all__ = ["compressed", "cut_after", "render", "reset_after", "stall_after"]

_Script = TypeVar("_Script", Reply, Raw)

_REASONS = {status.value: status.phrase for status in HTTPStatus}
_LAST_CHUNK = b"0\r\n\r\n"


def render(reply: Reply, *, http11: bool = True, keep_alive: bool = True) -> Raw:
    """Return everything that goes on the wire for a reply, but its latency.

    The head is sent together with the first bytes of the body, unless the script waits between them.

    Args:
        reply: The reply.
        http11: Whether the client understands chunks (RFC 9112 §6.1); if not, they become ``"close"``.
        keep_alive: Whether the client is willing to reuse the connection.

    """
    framing = _framing(reply)
    if framing == "chunked" and not http11:
        framing = "close"
    connection = reply.header("connection")
    keep_alive = keep_alive and framing != "close" and (connection or "").lower() != "close"
    lines = [f"HTTP/1.1 {reply.status} {_REASONS.get(reply.status, '')}"]
    lines += [f"{name}: {value}" for name, value in reply.headers]
    if framing == "length":
        lines.append(f"Content-Length: {len(reply.body)}")
    elif framing == "chunked":
        lines.append("Transfer-Encoding: chunked")
    if not keep_alive and connection is None:
        lines.append("Connection: close")
    head = "\r\n".join([*lines, "", ""]).encode()
    body = _plain(reply.steps)
    if framing == "chunked":
        body = [*map(_chunk, body), _LAST_CHUNK]
    if body and isinstance(body[0], bytes):
        return Raw((head + body[0], *body[1:]), keep_alive)
    return Raw((head, *body), keep_alive)


def cut_after(reply: _Script, n: int) -> _Script:
    """Return the reply with a :class:`Cut` after ``n`` bytes of its body (for :class:`Raw`: of everything).

    The headers still announce the whole body.

    Raises:
        ValueError: If ``n`` is negative.

    """
    return _ending(reply, n, Cut())


def reset_after(reply: _Script, n: int) -> _Script:
    """Return the reply with a :class:`Reset` after ``n`` bytes of its body (for :class:`Raw`: of everything).

    Raises:
        ValueError: If ``n`` is negative.

    """
    return _ending(reply, n, Reset())


def stall_after(reply: _Script, n: int) -> _Script:
    """Return the reply with a :class:`Stall` after ``n`` bytes of its body (for :class:`Raw`: of everything).

    Raises:
        ValueError: If ``n`` is negative.

    """
    return _ending(reply, n, Stall())


def compressed(reply: Reply, encoding: Literal["gzip", "deflate"] = "gzip") -> Reply:
    """Return the reply with its body compressed; each step can still be decoded as soon as it arrives.

    Compress first, then cut: ``cut_after(compressed(stream("Hello")), 40)``.

    Raises:
        ValueError: If the reply announces its length already, as after :func:`cut_after`.

    """
    if reply.header("content-length") is not None:
        raise ValueError("the length is announced already: compress first, then cut")
    # RFC 9110 §8.4.1.2: "deflate" is the zlib format; 16 more window bits select gzip.
    compressor = zlib.compressobj(wbits=zlib.MAX_WBITS + (16 if encoding == "gzip" else 0))
    steps: list[Step] = [
        compressor.compress(step) + compressor.flush(zlib.Z_SYNC_FLUSH) if isinstance(step, bytes) else step
        for step in _plain(reply.steps)
    ]
    match steps:
        case [*others, bytes(last)]:
            # The trailer is no step of its own, so that a body of one step is still sent with its length.
            steps = [*others, last + compressor.flush()]
        case _:
            steps.append(compressor.flush())
    headers = (*reply.headers, ("Content-Encoding", encoding))
    return msgspec.structs.replace(reply, headers=headers, steps=tuple(steps))


def _framing(reply: Reply) -> Framing | None:
    """Return how the body is framed; ``None`` where the headers, or the status, leave nothing to say."""
    if reply.header("content-length") is not None or reply.header("transfer-encoding") is not None:
        return None
    if reply.status in (204, 304) or reply.status < 200:
        return None
    if reply.framing != "auto":
        return reply.framing
    return "length" if len(reply.steps) < 2 and all(isinstance(step, bytes) for step in reply.steps) else "chunked"


def _ending(reply: _Script, n: int, fault: Step) -> _Script:
    if n < 0:
        raise ValueError(f"a fault comes after 0 bytes or more, not {n}")
    steps = (*_first(_plain(reply.steps), n), fault)
    if isinstance(reply, Raw):
        return msgspec.structs.replace(reply, steps=steps)
    # Settled before the fault adds a step, and a promise of bytes that will not come.
    framing = _framing(reply)
    if framing == "length":
        reply = _announced(reply)
    return msgspec.structs.replace(reply, steps=steps, framing=framing or reply.framing)


def _announced(reply: Reply) -> Reply:
    return msgspec.structs.replace(reply, headers=(*reply.headers, ("Content-Length", str(len(reply.body)))))


def _plain(steps: tuple[Step, ...]) -> list[Step]:
    return [step.encode() if isinstance(step, Ping) else step for step in steps]


def _first(steps: list[Step], n: int) -> list[Step]:
    kept: list[Step] = []
    for step in steps:
        if n == 0:
            break
        kept.append(step[:n] if isinstance(step, bytes) else step)
        n -= min(n, len(step)) if isinstance(step, bytes) else 0
    return kept


def _chunk(step: Step) -> Step:
    # An empty chunk would end the body (RFC 9112 §7.1).
    return b"%x\r\n%b\r\n" % (len(step), step) if isinstance(step, bytes) and step else step
