"""Constructors of scripted answers, from the happy one to the malformed: values to values, no I/O."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

import msgspec

from chatkore_async.testing._shapes import DONE, Head, choice, error_body, event, split, tool_deltas
from chatkore_async.testing._shapes import usage as usage_object
from chatkore_async.testing._steps import Cut, Framing, Hold, Pause, Ping, Raw, Reply, Reset, Stall, Step

__all__ = ["completion", "error", "events", "html", "json_reply", "raw", "sse", "stream"]

_Headers = Mapping[str, str] | Sequence[tuple[str, str]]

_JSON = ("Content-Type", "application/json")
_HTML = ("Content-Type", "text/html")
_SSE = (("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-cache"))
_HEAD = Head("chatcmpl-scripted", "gpt-4o-mini")
# What a scripted answer says about a prompt that it does not know.
_PROMPT_TOKENS = 10

_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def completion(
    text: str | None = "Hello from the loopback server.",
    *,
    model: str | None = None,
    finish_reason: str | None = "stop",
    usage: Mapping[str, object] | bool = True,
    tool_calls: Sequence[Mapping[str, object]] | None = None,
    message: Mapping[str, object] | None = None,
    headers: _Headers = (),
    latency: float = 0.0,
    **fields: object,
) -> Reply:
    """Script a whole ``chat.completion``.

    Args:
        text: The message's content.
        model: The model named in the answer, ``None`` for ``"gpt-4o-mini"``.
        finish_reason: Why the model ended. With ``tool_calls``, ``"stop"`` becomes ``"tool_calls"``.
        usage: ``True`` for an estimate, ``False`` for none, or the object itself.
        tool_calls: Calls as :func:`tool_call` makes them.
        message: More fields of the message, such as ``reasoning_content``; they win over the ones above.
        headers: Headers beside the content type.
        latency: Seconds between the request and the status line.
        **fields: More fields of the completion; they win (``choices=None``, ``id=7``).

    """
    content: dict[str, object] = {"role": "assistant", "content": text, "refusal": None}
    if tool_calls is not None:
        content["tool_calls"] = tool_calls
        finish_reason = "tool_calls" if finish_reason == "stop" else finish_reason
    content.update(message or {})
    choices = [choice("message", content, finish_reason=finish_reason)]
    body = _head(model).completion(choices, _usage(text or "", given=usage))
    if usage is False:
        del body["usage"]
    return json_reply({**body, **fields}, headers=headers, latency=latency)


def stream(
    text_or_pieces: str | Iterable[str | Step] = "Hello from the loopback server.",
    *,
    interval: float = 0.0,
    first_delay: float = 0.0,
    pings: int = 0,
    finish_reason: str | None = "stop",
    usage: Mapping[str, object] | bool = True,
    done: bool = True,
    tool_calls: Sequence[Mapping[str, object]] = (),
    reasoning: str = "",
    model: str | None = None,
    id: str | None = None,  # noqa: A002 - the field's name on the wire
    headers: _Headers = (),
    latency: float = 0.0,
) -> Reply:
    """Script a stream: a chunk with the role, one for each piece, one with the finish reason, usage, ``[DONE]``.

    Each chunk is one event, one write and one HTTP chunk.

    Args:
        text_or_pieces: A string is sent word by word. An iterable is sent piece by piece, and may have steps among
            the pieces: ``["Hel", Hold(event), "lo", Reset()]``.
        interval: Seconds between two pieces.
        first_delay: Seconds between the headers and the first chunk.
        pings: How many ``: PING`` comments are sent before the first chunk, spread over ``first_delay``.
        finish_reason: ``None`` leaves its chunk out. With ``tool_calls``, ``"stop"`` becomes ``"tool_calls"``.
        usage: ``True`` for a last chunk with an estimate, ``False`` for no such chunk, or the object itself.
        done: Whether ``data: [DONE]`` ends the stream.
        tool_calls: Calls as :func:`tool_call` makes them, streamed after the text: name first, then arguments in
            fragments.
        reasoning: Streamed before the text, word by word, as ``reasoning_content``.
        model: The model named in each chunk, ``None`` for ``"gpt-4o-mini"``.
        id: The id in each chunk, ``None`` for the one that all scripted answers have.
        headers: Headers beside those of an event stream.
        latency: Seconds between the request and the status line.

    """
    head = _head(model, id)
    pieces = split(text_or_pieces) if isinstance(text_or_pieces, str) else list(text_or_pieces)
    thoughts = [{"reasoning_content": piece} for piece in split(reasoning)]
    calls = list(tool_deltas(tool_calls))
    if calls and finish_reason == "stop":
        finish_reason = "tool_calls"
    wait: list[Step] = [Pause(first_delay / (pings + 1))] if first_delay else []
    steps: list[Step] = [*wait, *(step for _ in range(pings) for step in (Ping(), *wait))]
    steps.append(event(head.chunk(choice("delta", {"role": "assistant", "content": None if calls else ""}))))
    waits = False
    for piece in [*thoughts, *pieces, *calls]:
        if not isinstance(piece, str | dict):
            steps.append(piece)
            continue
        if waits:
            steps.append(Pause(interval))
        waits = interval > 0
        delta: object = {"content": piece} if isinstance(piece, str) else piece
        steps.append(event(head.chunk(choice("delta", delta))))
    if finish_reason is not None:
        steps.append(event(head.chunk(choice("delta", {}, finish_reason=finish_reason))))
    if usage is not False:
        text = "".join(piece for piece in pieces if isinstance(piece, str))
        steps.append(event({**head.chunk(), "usage": _usage(text, given=usage)}))
    if done:
        steps.append(DONE)
    return sse(*steps, headers=headers, latency=latency)


def events(*payloads: object, done: bool = True, headers: _Headers = (), latency: float = 0.0) -> Reply:
    """Script a stream of arbitrary events, each ``data: …`` and one write.

    Args:
        *payloads: ``bytes`` are the data as they stand (valid JSON or not), a step (``Hold``, ``Cut``, …) is a step,
            anything else is encoded as JSON. For events with other fields than ``data``, see :func:`sse`.
        done: Whether ``data: [DONE]`` ends the stream.
        headers: Headers beside those of an event stream.
        latency: Seconds between the request and the status line.

    """
    steps: list[Step] = [
        payload if isinstance(payload, Pause | Hold | Stall | Cut | Reset | Ping) else event(payload)
        for payload in payloads
    ]
    if done:
        steps.append(DONE)
    return sse(*steps, headers=headers, latency=latency)


def sse(*steps: Step, headers: _Headers = (), latency: float = 0.0, framing: Framing = "chunked") -> Reply:
    r"""Script an event stream whose bytes are the script's own: ``sse(b"event: error\\ndata: busy\n\n", Stall())``."""
    return Reply(headers=_merged(_SSE, headers), steps=steps, latency=latency, framing=framing)


def error(
    status: int,
    message: str = "The server had an error while processing your request.",
    *,
    code: object = None,
    type: str | None = None,  # noqa: A002 - the field's name on the wire
    param: object = None,
    headers: _Headers = (),
    body: object = None,
    latency: float = 0.0,
) -> Reply:
    """Script an error in the shape OpenAI gives it, or in another.

    Args:
        status: HTTP status; 200 is one that relays do send.
        message: What the error says.
        code: String, number or ``None``.
        type: ``None`` for the one that goes with the status.
        param: The parameter at fault.
        headers: Headers such as ``{"retry-after": "2"}``; a content type among them wins.
        body: What is sent instead of all the above: ``bytes`` as they are and without a content type of ours
            (``b""`` for none), anything else as JSON.
        latency: Seconds between the request and the status line.

    """
    if isinstance(body, bytes):
        return Reply(status=status, headers=_merged((), headers), steps=(body,) if body else (), latency=latency)
    if body is None:
        usual = _ERROR_TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
        body = error_body(message, usual if type is None else type, code=code, param=param)
    return json_reply(body, status, headers=headers, latency=latency)


def json_reply(obj: object, status: int = 200, *, headers: _Headers = (), latency: float = 0.0) -> Reply:
    """Script any JSON document, sent with its length."""
    return Reply(status=status, headers=_merged((_JSON,), headers), steps=(msgspec.json.encode(obj),), latency=latency)


def html(status: int, title: str, *, headers: _Headers = (), latency: float = 0.0) -> Reply:
    """Script the page that a proxy puts in front of a failure, as nginx writes it."""
    name = escape(title)
    page = f"<html>\r\n<head><title>{name}</title></head>\r\n<body><h1>{name}</h1></body>\r\n</html>\r\n"
    return Reply(
        status=status,
        headers=_merged((("Content-Type", "text/html"),), headers),
        steps=(page.encode(),),
        latency=latency,
    )


def raw(*steps: Step, keep_alive: bool = False) -> Raw:
    r"""Script everything on the wire, status line included: ``raw(b"HTTP/1.1 200", Pause(1), b" OK\r\n\r\n")``."""
    return Raw(steps, keep_alive)


def _head(model: str | None, identity: str | None = None) -> Head:
    return Head(_HEAD.id if identity is None else identity, _HEAD.model if model is None else model)


def _usage(text: str, *, given: Mapping[str, object] | bool) -> Mapping[str, object]:
    return usage_object(_PROMPT_TOKENS, len(split(text))) if isinstance(given, bool) else given


def _merged(defaults: Iterable[tuple[str, str]], headers: _Headers) -> tuple[tuple[str, str], ...]:
    given = tuple(headers.items()) if isinstance(headers, Mapping) else tuple(headers)
    names = {name.lower() for name, _ in given}
    return (*(pair for pair in defaults if pair[0].lower() not in names), *given)
