"""What goes out and what comes back, without the going and coming. No I/O.

Bytes and headers become a result or a typed error here, for awaited calls and for single events of a stream.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal, TypeVar

import msgspec

from . import _codec, _sse, _tolerant
from ._accumulate import Accumulator
from ._classify import MAX_BODY, Failure, classify, one_line, page_title, request_id
from ._codec import NotJSONError
from ._config import Secret
from ._responses import ChatCompletion, ChatCompletionChunk, Model
from .errors import APIError, InternalServerError, InvalidResponseError, StreamInterruptedError

DONE: Final = "done"
"""What `read_event` answers for `[DONE]`."""


class Head(msgspec.Struct, frozen=True):
    """An answer's status line and headers, and the key that was sent, so that no echo of it gets out.

    `headers` are looked up by lower-case name.
    """

    status: int
    headers: Mapping[str, str]
    secret: Secret = Secret()


def plain_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return headers as a plain dict, names in lower case, repeated ones joined (RFC 9110 §5.3)."""
    plain: dict[str, str] = {}
    for name, value in headers.items():
        known = plain.get(name.lower())
        plain[name.lower()] = value if known is None else f"{known}, {value}"
    return plain


def read_error(head: Head, body: bytes) -> APIError | None:
    """Return the error that an answer is or hides, or `None`."""
    failure = classify(head.status, head.headers, body)
    return None if failure is None else _exception(failure, head)


def _exception(failure: Failure, head: Head) -> APIError:
    error = failure.kind(
        _without(head.secret, failure.message),
        status_code=failure.status,
        code=_without(head.secret, failure.code),
        type=_without(head.secret, failure.type),
        param=_without(head.secret, failure.param),
        body=_without(head.secret, failure.body),
        headers=_without(head.secret, plain_headers(head.headers)),
        retry_after=failure.retry_after,
        hint=failure.hint,
        retryable=failure.retryable,
    )
    error._reported_id = request_id(head.headers) or failure.request_id
    return error


_T = TypeVar("_T")


def _without(secret: Secret, value: _T) -> _T:
    """Return `value` with every echo of the key masked."""
    if not secret:
        return value
    masked: Any = value
    if isinstance(value, str):
        masked = value.replace(secret, "***")
    elif isinstance(value, dict):
        masked = {_without(secret, key): _without(secret, item) for key, item in value.items()}
    elif isinstance(value, list):
        masked = [_without(secret, item) for item in value]
    found: _T = masked
    return found


def read_completion(head: Head, body: bytes) -> ChatCompletion:
    """Return the completion in the answer to an awaited call.

    Raises:
        APIError: the answer is, or hides, an error, or is not what the API speaks.
    """
    if head.status != 200 and (error := read_error(head, body)):
        raise error
    try:
        completion, whole = _codec.decode_completion(body)
    except NotJSONError as cause:
        if _looks_like_events(body):
            return _completion_of_events(head, body)
        raise read_error(head, body) or not_the_api(head, body, cause) from cause
    if whole is not None or not completion.choices:
        if error := read_error(head, body):
            raise error
        if not completion.choices:
            raise not_the_api(head, body, None)
    return completion


def read_models(head: Head, body: bytes) -> list[Model]:
    """Return the models in the answer to `GET /models`.

    Raises:
        APIError: the answer is, or hides, an error, or is not what the API speaks.
    """
    if error := read_error(head, body):
        raise error
    try:
        return _codec.decode_models(body)
    except NotJSONError as cause:
        raise not_the_api(head, body, cause) from cause


def not_the_api(head: Head, body: bytes, cause: NotJSONError | None) -> InvalidResponseError:
    """Return the error for an answer that is neither a result nor an error of the API."""
    text = _without(head.secret, body[:MAX_BODY].decode("utf-8", "replace"))
    hint = None
    # A body that is empty, or was JSON as far as it went, is an answer that was lost on the way.
    lost = not body.strip() or (cause is not None and cause.truncated)
    if (title := page_title(body)) is not None or "<html" in text[:1000].lower():
        message = f"the server answered with a web page{f' ({title})' if title else ''}, not with JSON"
        hint = "check base_url: it usually ends in /v1"
    elif not body.strip():
        message = "the server answered with an empty body"
    elif cause is None:
        message = "the answer has no choices"
    elif cause.truncated:
        message = "the answer was cut: its JSON is incomplete"
    else:
        message = f"the answer is not what the API speaks: {one_line(text)[:200]}"
    error = InvalidResponseError(message, body=text, hint=hint, retryable="unconfirmed" if lost else "never")
    error._reported_id = request_id(head.headers)
    return error


def begins_event_stream(data: bytes) -> bool:
    """Tell from its first bytes whether a body is an event stream; JSON and HTML are not (S12)."""
    return not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b"{", b"[", b"<"))


def _looks_like_events(body: bytes) -> bool:
    start = body.removeprefix(b"\xef\xbb\xbf").lstrip()
    return start.startswith((b"data:", b"event:", b":", b"id:", b"retry:", b"error:"))


def _completion_of_events(head: Head, body: bytes) -> ChatCompletion:
    """S12: an event stream in answer to an awaited call."""
    decoder, merged, done = _sse.Decoder(), Accumulator(), False
    for event in [*decoder.feed(body), *decoder.finish()]:
        chunk = read_event(head, event)
        if chunk == DONE:
            done = True
            break
        if isinstance(chunk, ChatCompletionChunk):
            merged.pending.append(chunk)
    if not merged.started:
        raise read_error(head, decoder.stray) or not_the_api(head, body, None)
    completion = merged.completion()
    if not (done or merged.finished):
        raise StreamInterruptedError(
            "the answer, an event stream, ended before it was finished", partial=completion, retryable="unconfirmed"
        )
    return completion


def read_event(head: Head, data: bytes) -> ChatCompletionChunk | Literal["done"] | None:
    """Return what an event of a stream means: a chunk, `DONE`, or `None` when it is to be skipped.

    Raises:
        APIError: the event is an error (S1), or not what the API speaks (S11).
    """
    name = data.name if isinstance(data, _sse.Event) else ""
    text = data.strip()
    if text == b"[DONE]" or name == "done":
        return DONE
    if name == "error":
        raise _event_error(head, data)
    if not text or name == "ping":
        return None
    try:
        chunk, whole = _codec.decode_chunk(data)
    except NotJSONError as cause:
        text_of = _without(head.secret, data[:MAX_BODY].decode("utf-8", "replace"))
        raise InvalidResponseError(
            f"an event of the stream is not JSON: {one_line(text_of)[:200]}", body=text_of, retryable="unconfirmed"
        ) from cause
    if error := read_error(head, data):
        raise error
    if not chunk.choices and whole.get("type") in ("ping", "keepalive", "heartbeat"):
        return None
    return chunk


def is_whole(data: bytes) -> bool:
    """Tell whether the last event of a body that just ended is one, or the beginning of one that was cut."""
    if isinstance(data, _sse.Event) or data.strip() == b"[DONE]":
        return True
    try:
        _tolerant.parse(data)
    except ValueError:
        return False
    return True


def _event_error(head: Head, data: bytes) -> APIError:
    """S1: an event called `error` is one whatever its data says."""
    if error := read_error(head, data):
        return error
    text = _without(head.secret, data[:MAX_BODY].decode("utf-8", "replace"))
    return InternalServerError(
        one_line(text) or "the stream reported an error without a reason",
        status_code=head.status,
        body=text,
        headers=plain_headers(head.headers),
        retryable="yes",
    )
