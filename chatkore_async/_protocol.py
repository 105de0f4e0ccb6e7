"""What goes out and what comes back, without the going and coming. No I/O.

Bytes and headers become a result or a typed error here, for awaited calls and for single events of a stream.
"""

from typing import Final, Literal

from . import _codec, _sse, _tolerant
from ._accumulate import OVERFLOWED, Accumulator, has_delta
from ._classify import classify
from ._codec import LARGE, NotJSONError, decode_completion_strictly
from ._headers import plain_headers, request_id
from ._json import BOM
from ._notes import Head
from ._responses import ChatCompletion, ChatCompletionChunk, Model
from ._words import MAX_BODY, is_page, masked, one_line, page_title
from .errors import APIError, InvalidResponseError, StreamInterruptedError

CROWDED: Final = f"is made of more than {_codec.MAX_OBJECTS:,} objects and arrays"

DONE: Final = "done"
"""What `read_event` answers for `[DONE]`."""


def read_error(head: Head, body: bytes, whole: object = None, *, certain: bool = False) -> APIError | None:
    """Return the error that an answer is or hides, or `None`.

    Args:
        head: of the answer.
        body: its body, or an event's data.
        whole: the JSON in `body`, where it is decoded already.
        certain: whether it is an error whatever the body says.
    """
    failure = classify(head.status, head.headers, body, secret=head.secret, whole=whole, certain=certain)
    if failure is None:
        return None
    error = failure.kind(
        failure.message,
        status_code=failure.status,
        code=failure.code,
        type=failure.type,
        param=failure.param,
        body=failure.body,
        headers=masked(plain_headers(head.headers), head.secret),
        retry_after=failure.retry_after,
        hint=failure.hint,
        retryable=failure.retryable,
    )
    error._reported_id = _request_id(head) or failure.request_id
    return error


def _request_id(head: Head) -> str | None:
    found: str | None = masked(request_id(head.headers), head.secret)
    return found


def read_completion(head: Head, body: bytes) -> ChatCompletion:
    """Return the completion in the answer to an awaited call.

    Raises:
        APIError: the answer is, or hides, an error, or is not what the API speaks.
    """
    if head.status == 200 and len(body) <= LARGE:
        completion = decode_completion_strictly(body)
        if completion is not None and completion.choices:
            return completion  # nearly all are like this, and hide nothing
    found = _completion_or_error(head, body)
    if isinstance(found, ChatCompletion):
        return found
    try:
        raise found
    finally:
        # The body may echo the key, and tracebacks show locals; the error would hold itself by its traceback.
        del found, body


def _completion_or_error(head: Head, body: bytes) -> ChatCompletion | APIError:
    if head.status != 200 and (error := read_error(head, body)):
        return error
    if len(body) > LARGE and _codec.is_crowded(body):
        return crowded(head, body)
    try:
        completion, whole = _codec.decode_completion(body)
    except NotJSONError as error:
        if (before := without_done(body)) is not body and not begins_event_stream(body):
            return _completion_or_error(head, before)
        cause = _harmless(error)
    else:
        # Nearly all are like this, and hide nothing.
        return completion if whole is None and completion.choices else _checked(head, body, completion, whole)
    if _looks_like_events(body):
        return _completion_of_events(head, body)
    return read_error(head, body) or not_the_api(head, body, cause)


def _checked(head: Head, body: bytes, completion: ChatCompletion, whole: object) -> ChatCompletion | APIError:
    """Look for what an odd completion may hide: one that was read tolerantly, or has no choices."""
    if error := read_error(head, body, whole):
        error.partial = completion if completion.text else None
        return error
    return completion if completion.choices else not_the_api(head, body, None)


def is_finished(body: bytes) -> bool:
    """Tell whether a body that broke off holds a whole completion: only HTTP's end of it is missing."""
    found = _completion_or_error(Head(200, {}), body)
    return isinstance(found, ChatCompletion) and found.completeness == "complete"


def read_models(head: Head, body: bytes) -> list[Model]:
    """Return the models in the answer to `GET /models`.

    Raises:
        APIError: the answer is, or hides, an error, or is not what the API speaks.
    """
    found = _models_or_error(head, body)
    if isinstance(found, list):
        return found
    try:
        raise found
    finally:
        del found, body  # as above


def _models_or_error(head: Head, body: bytes) -> list[Model] | APIError:
    if head.status != 200 and (error := read_error(head, body)):
        return error
    if _codec.is_crowded(body):
        return crowded(head, body)
    try:
        models = _codec.decode_models(body)
    except NotJSONError as error:
        return read_error(head, body) or not_the_api(head, body, _harmless(error))
    # Only an answer without models can be an error; lists of models are long.
    return models or read_error(head, body) or models


def not_the_api(head: Head, body: bytes, cause: NotJSONError | None) -> InvalidResponseError:
    """Return the error for an answer that is neither a result nor an error of the API.

    `cause` tells why it is no JSON object, and is the error's; `None` for one that is.
    """
    text = _text(head, body)
    hint = None
    # A body that is empty, or was JSON as far as it went, is an answer that was lost on the way.
    lost = not body.strip() or (cause is not None and cause.truncated)
    if is_page(body):
        title = one_line(page_title(body), head.secret)
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
    error._reported_id = _request_id(head)
    error.__cause__ = cause
    return error


def crowded(head: Head, body: bytes) -> InvalidResponseError:
    """Return the error for a message that would take out of all proportion more memory than it has bytes."""
    error = InvalidResponseError(f"the answer {CROWDED}", body=_text(head, body[:MAX_BODY]))
    error._reported_id = _request_id(head)
    return error


def _harmless(cause: NotJSONError) -> NotJSONError:
    """Return a cause without its frames: they hold the answer, which may echo the key."""
    cause.__cause__ = cause.__context__ = None
    return cause.with_traceback(None)


def _text(head: Head, body: bytes) -> str:
    text: str = masked(body.decode("utf-8", "replace"), head.secret)
    return text[:MAX_BODY]


def begins_event_stream(data: bytes) -> bool:
    """Tell from its first bytes whether a body is an event stream; JSON and HTML are not (S12)."""
    return not data.removeprefix(BOM).lstrip().startswith((b"{", b"[", b"<"))


def without_done(body: bytes) -> bytes:
    """Return a body without the `[DONE]` that relays write after whatever they passed on (E14)."""
    before, _, after = body.rpartition(b"data:")
    return before.rstrip() if after.strip() == b"[DONE]" and before.endswith((b"\n", b"\r")) else body


def _looks_like_events(body: bytes) -> bool:
    start = body.removeprefix(BOM).lstrip()
    return start.startswith((b"data:", b"event:", b":", b"id:", b"retry:", b"error:"))


def _completion_of_events(head: Head, body: bytes) -> ChatCompletion | APIError:
    """S12: an event stream in answer to an awaited call."""
    decoder, merged = _sse.Decoder(), Accumulator()
    said = done = usage_came_last = False
    whole = [*decoder.feed(body), *(event for event in decoder.finish() if is_whole(event))]
    events = [part for event in whole for part in separated(event)]
    try:
        for event in events:
            chunk = read_event(head, event, merged)
            if chunk == DONE:
                done = True
                break
            if isinstance(chunk, ChatCompletionChunk):
                usage_came_last = chunk.usage is not None and not chunk.choices
                said = said or has_delta(chunk)
                merged.pending.append(chunk)
    except APIError as error:
        if said:
            error.partial = merged.completion()
        return error.with_traceback(None)
    completion = merged.completion()
    done = done or usage_came_last
    if merged.overflowed:
        return InvalidResponseError(f"the answer {OVERFLOWED}", partial=completion)
    if said and (done or merged.finished):
        return completion
    found = read_error(head, decoder.stray)
    if found is None and said:
        found = StreamInterruptedError(
            "the answer, an event stream, ended before it was finished", retryable="unconfirmed"
        )
    elif found is None:
        found = not_the_api(head, body, None)
        found._retryable = "unconfirmed"  # S7
    found.partial = completion if said else None
    return found


def separated(event: bytes) -> list[bytes]:
    """Return the chunks of an event that is several, since its server ends events with one line end, not two (S9)."""
    if b"\n" not in event or isinstance(event, _sse.Event):
        return [event]
    lines = event.split(b"\n")
    one_each = all(line == b"[DONE]" or (line.startswith(b"{") and line.endswith(b"}")) for line in lines)
    return lines if one_each else [event]


def read_event(
    head: Head, data: bytes, so_far: Accumulator | None = None
) -> ChatCompletionChunk | Literal["done"] | None:
    """Return what an event of a stream means: a chunk, `DONE`, or `None` when it is to be skipped.

    Args:
        head: of the answer.
        data: the event's.
        so_far: what the events before it were merged to.

    Raises:
        APIError: the event is an error (S1), or not what the API speaks (S11).
    """
    name = data.name if isinstance(data, _sse.Event) else ""
    text = data.strip()
    if text == b"[DONE]" or name == "done":
        return DONE
    if name == "error":
        reported = read_error(head, data, certain=True)
        assert reported is not None
        raise reported
    if not text or text == b"null" or name in _KEEP_ALIVE:
        return None
    try:
        chunk, whole = _codec.decode_chunk(data)
    except NotJSONError as cause:
        fragment = _text(head, data)
        raise InvalidResponseError(
            f"an event of the stream is not JSON: {one_line(fragment)[:200]}", body=fragment, retryable="unconfirmed"
        ) from _harmless(cause)
    if error := read_error(head, data, whole):
        raise error
    if not chunk.choices and whole.get("type") in _KEEP_ALIVE:
        return None
    if so_far is not None:
        so_far.drop_repetition(chunk, whole)
    return chunk


_KEEP_ALIVE = ("ping", "keepalive", "keep-alive", "heartbeat")


def is_whole(data: bytes, *, broken: bool = False) -> bool:
    """Tell whether the last event of a body is one, or the beginning of one that was cut.

    Args:
        data: the event's.
        broken: whether the body broke off, and did not just end.
    """
    if isinstance(data, _sse.Event) or data.strip() == b"[DONE]":
        return True
    if len(separated(data)) > 1:
        return True
    if not broken and data.lstrip()[:1] not in (b"{", b"["):
        return True  # S11: it begins nothing of the API's, such as an exception's text
    try:
        _tolerant.parse(data)
    except ValueError:
        return False
    return True
