"""Bytes and headers become a result or a typed error, without I/O."""

import contextlib
import json
import time
import traceback
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from chatkore_async._config import Secret
from chatkore_async._protocol import (
    DONE,
    Head,
    begins_event_stream,
    is_whole,
    plain_headers,
    read_completion,
    read_error,
    read_event,
    read_models,
)
from chatkore_async._responses import ChatCompletion, ChatCompletionChunk
from chatkore_async._sse import Event
from chatkore_async.errors import (
    APIError,
    APIStatusError,
    AuthenticationError,
    InternalServerError,
    InvalidResponseError,
    NotFoundError,
    RateLimitError,
    StreamInterruptedError,
)

OK = Head(200, {})
KEY = "Zx9-planted-key-Zx9"


def encoded(value: object) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def completion(**fields: Any) -> dict[str, Any]:
    return {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
        **fields,
    }


def chunk(text: str = "hi", finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}], **fields}


def events(*values: object) -> bytes:
    return b"".join(b"data: " + (v if isinstance(v, bytes) else encoded(v)) + b"\n\n" for v in values)


def raised(read: Any, *args: Any) -> APIError:
    with pytest.raises(APIError) as caught:
        read(*args)
    return caught.value


# Awaited answers.


@pytest.mark.parametrize(
    "body",
    [
        encoded(completion()),
        b"\xef\xbb\xbf " + encoded(completion()),
        encoded([completion()]),
        encoded(completion(error=None)),
        encoded(completion(error={})),
        encoded(completion(error={"message": "", "type": "", "code": None})),
        encoded(completion(created="1.0", usage={})),
        events(chunk("h"), chunk("i", "stop"), b"[DONE]"),
        events(chunk("h"), chunk("i", "stop")),
        events(chunk("h"), chunk("i"), b"[DONE]"),
        events(chunk("hi"), b"[DONE]", b"nonsense"),
        b": PING\n\n" + events(chunk("hi", "stop")) + b"stray words\n",
        b"event: ping\ndata: {}\n\n" + events(chunk("hi", "stop")),
        events(chunk("hi", "stop")).rstrip(),
    ],
)
@pytest.mark.parametrize("status", [200, 201])
def test_a_completion_is_read_in_whatever_form(body: bytes, status: int) -> None:
    """S12: JSON, or an event stream that nobody asked for, becomes what the caller asked for."""
    assert read_completion(Head(status, {"content-type": "text/html"}), body).text == "hi"


@pytest.mark.parametrize(
    "status, body, kind, retryable, message",
    [
        (200, b"", InvalidResponseError, "unconfirmed", "the server answered with an empty body"),
        (204, b" \n", InvalidResponseError, "unconfirmed", "the server answered with an empty body"),
        (
            200,
            encoded(completion())[:-9],
            InvalidResponseError,
            "unconfirmed",
            "the answer was cut: its JSON is incomplete",
        ),
        (200, encoded({"choices": []}), InvalidResponseError, "never", "the answer has no choices"),
        (200, encoded({"choices": None}), InvalidResponseError, "never", "the answer has no choices"),
        (200, b"{}", InvalidResponseError, "never", "the answer has no choices"),
        (200, b"plain\n words", InvalidResponseError, "never", "the answer is not what the API speaks: plain words"),
        (200, b"[]", InvalidResponseError, "never", "the answer is not what the API speaks: []"),
        (
            200,
            b"<html><title>One API</title>",
            InvalidResponseError,
            "never",
            "the server answered with a web page (One API), not with JSON",
        ),
        (
            200,
            b"\n<!DOCTYPE html><div>",
            InvalidResponseError,
            "never",
            "the server answered with a web page, not with JSON",
        ),
        (200, encoded({"error": {"message": "m", "code": 429}}), RateLimitError, "yes", "m"),
        (200, encoded(completion(error={"message": "m", "code": 502})), InternalServerError, "yes", "m"),
        (200, encoded([{"error": {"message": "m", "code": 401}}]), AuthenticationError, "never", "m"),
        (200, b'{"error":{"message":"m","code":429}}{"x":1}', RateLimitError, "yes", "m"),
        (404, encoded({"error": "no"}), NotFoundError, "never", "no"),
        (302, b"", APIStatusError, "never", "redirected to nowhere"),
        (200, events({"error": {"message": "m", "code": 429}}), RateLimitError, "yes", "m"),
        (200, events(b"[DONE]"), InvalidResponseError, "unconfirmed", "the answer has no choices"),
        (200, b": PING\n\n" + encoded({"error": "late"}) + b"\n", InternalServerError, "yes", "late"),
        (200, events(b"oh no"), InvalidResponseError, "unconfirmed", "an event of the stream is not JSON: oh no"),
    ],
)
def test_what_is_no_completion_is_a_typed_error(
    status: int, body: bytes, kind: type[APIError], retryable: str, message: str
) -> None:
    """Errors in a 200, pages, cut and empty answers: one of our classes, with what was wrong and whether to repeat it."""
    error = raised(read_completion, Head(status, {"x-request-id": "r1"}), body)
    assert (type(error), error._retryable, error.message) == (kind, retryable, message)
    if not isinstance(error, InvalidResponseError) or "event" not in message:
        assert error.request_id == "r1"


@pytest.mark.parametrize(
    "body, kind",
    [
        (events(chunk("hi")), StreamInterruptedError),
        (events(chunk("hi")) + b'data: {"choices":[{"del', StreamInterruptedError),
        (events(chunk("hi"), {"error": {"message": "m", "code": 429}}), RateLimitError),
        (events(chunk("hi"), b"oh no"), InvalidResponseError),
        (events(chunk("hi")) + encoded({"error": {"message": "m", "code": 429}}), RateLimitError),
    ],
)
def test_an_event_stream_that_failed_keeps_what_it_delivered(body: bytes, kind: type[APIError]) -> None:
    """S12: what a stream had said before its error is in `.partial`, also when nobody asked for a stream."""
    error = raised(read_completion, OK, body)
    assert type(error) is kind
    assert error.partial is not None
    assert error.partial.text == "hi"


def test_a_web_page_hints_at_the_base_url() -> None:
    """E10: the relay's own page comes when `/v1` is missing; its text is kept."""
    error = raised(read_completion, OK, b"<html><title>One API</title>")
    assert "base_url" in str(error.hint)
    assert isinstance(error, InvalidResponseError)
    assert error.body == "<html><title>One API</title>"


def test_the_cause_tells_what_was_wrong_with_the_json() -> None:
    """An answer that is not JSON says where, in its cause."""
    error = raised(read_completion, OK, b"{]")
    assert "malformed" in str(error.__cause__)
    assert error.__cause__ is not None
    assert error.__cause__.__traceback__ is None


@pytest.mark.parametrize(
    "body, ids",
    [
        (encoded({"data": [{"id": "a"}, {"id": "b"}]}), ["a", "b"]),
        (encoded([{"id": "a"}]), ["a"]),
        (encoded({"data": []}), []),
        (encoded({"success": True, "message": "", "data": [{"id": 1}]}), ["1"]),
        (encoded({"data": [{"id": "a", "detail": "x" * 70_000}]}), ["a"]),
    ],
)
def test_models_are_read_in_whatever_form(body: bytes, ids: list[str]) -> None:
    """A list of models, long or short, under `data` or bare."""
    for status in (200, 201):
        assert [model.id for model in read_models(Head(status, {}), body)] == ids


@pytest.mark.parametrize(
    "status, body, kind",
    [
        (401, encoded({"error": "no"}), AuthenticationError),
        (200, encoded({"error": {"message": "no", "code": 401}}), AuthenticationError),
        (200, encoded({"success": False, "message": "no"}), InternalServerError),
        (200, b"<html>", InvalidResponseError),
        (200, b"", InvalidResponseError),
        (200, b'{"error":{"message":"m","code":429}}{"x":1}', RateLimitError),
    ],
)
def test_an_answer_without_models_is_a_typed_error(status: int, body: bytes, kind: type[APIError]) -> None:
    """What is no list of models says why."""
    assert type(raised(read_models, Head(status, {}), body)) is kind


# Errors.


def test_an_error_carries_what_the_answer_said() -> None:
    """Status, code, type, param, body, headers, retry-after, hint and request id: all of it, and a readable line."""
    headers = CIMultiDict({"Retry-After": "7", "X-OneAPI-Request-Id": "r1", "Set-Cookie": "a"})
    headers.add("set-cookie", "b")
    value = {
        "error": {
            "message": "slow down (request id: r0)",
            "code": "rate_limit_exceeded",
            "type": "requests",
            "param": "n",
        }
    }
    error = read_error(Head(429, headers), encoded(value))
    assert isinstance(error, RateLimitError)
    assert (error.status_code, error.code, error.type, error.param) == (429, "rate_limit_exceeded", "requests", "n")
    assert (error.body, error.retry_after, error.hint) == (value, 7.0, None)
    assert error.headers == {"retry-after": "7", "x-oneapi-request-id": "r1", "set-cookie": "a, b"}
    assert str(error) == "429 rate_limit_exceeded: slow down (request id: r1)"


def test_the_request_id_in_the_message_serves_where_no_header_has_one() -> None:
    """E1: support asks for it, so it is looked for in both."""
    error = read_error(Head(500, {}), encoded({"error": {"message": "boom (request id: r0)"}}))
    assert error is not None
    assert error.request_id == "r0"
    assert str(error) == "500: boom (request id: r0)"
    assert read_error(OK, encoded(completion())) is None


def test_headers_are_one_plain_dict() -> None:
    """RFC 9110 §5.3: names without case, repeated ones joined in order."""
    assert plain_headers({"A": "1", "b": "2", "a": "3"}) == {"a": "1, 3", "b": "2"}


# Events.


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"  ",
        b'{"type":"ping"}',
        b'{"type":"keepalive"}',
        Event.of("ping", b"{}"),
        Event.of("keep-alive", b"{}"),
        Event.of("heartbeat", b"x"),
    ],
)
def test_pings_are_skipped(data: bytes) -> None:
    """S2: what only keeps the connection alive is no chunk."""
    assert read_event(OK, data) is None


@pytest.mark.parametrize("data", [b"[DONE]", b" [DONE] ", Event.of("done", b"{}"), Event.of("done", b"")])
def test_done_has_many_spellings(data: bytes) -> None:
    """S4: any spacing, or an event of that name."""
    assert read_event(OK, data) == DONE


@pytest.mark.parametrize(
    "data",
    [
        encoded(chunk("hi")),
        encoded(chunk("hi", error=None)),
        encoded(chunk("hi", type=[])),
        Event.of("message", encoded(chunk("hi"))),
    ],
)
def test_a_chunk_is_a_chunk(data: bytes) -> None:
    """Also under a name, and with what vendors add."""
    found = read_event(OK, data)
    assert isinstance(found, ChatCompletionChunk)
    assert found.text == "hi"


@pytest.mark.parametrize(
    "value",
    [{"choices": []}, {"choices": None, "prompt_filter_results": []}, {"usage": {"total_tokens": 1}}, {"type": []}],
)
def test_a_chunk_may_have_no_choices(value: object) -> None:
    """C1: first chunks with filter results, last ones with usage."""
    found = read_event(OK, encoded(value))
    assert isinstance(found, ChatCompletionChunk)
    assert found.choices == []


@pytest.mark.parametrize(
    "data, kind, status, message",
    [
        (encoded({"error": {"message": "m", "code": 429}}), RateLimitError, 429, "m"),
        (encoded({"object": "error", "message": "m", "code": 404}), NotFoundError, 404, "m"),
        (encoded(chunk("", "error", error={"message": "m", "code": 502})), InternalServerError, 502, "m"),
        (Event.of("error", b"upstream died"), InternalServerError, 200, "upstream died"),
        (Event.of("error", b""), InternalServerError, 200, "the server gave no reason"),
        (Event.of("error", b'{"reason":"x"}'), InternalServerError, 200, '{"reason":"x"}'),
        (Event.of("error", encoded({"type": "overloaded_error", "message": "busy"})), InternalServerError, 503, "busy"),
    ],
)
def test_an_error_in_a_stream_is_raised(data: bytes, kind: type[APIStatusError], status: int, message: str) -> None:
    """S1: whatever its form, with the class that its code would have as a status, and the answer's headers."""
    error = raised(read_event, Head(200, {"x-request-id": "r1", "retry-after": "3"}), data)
    assert isinstance(error, APIStatusError)
    assert (type(error), error.status_code, error.message) == (kind, status, message)
    assert (error.request_id, error.retry_after, error.headers["x-request-id"]) == ("r1", 3.0, "r1")


@pytest.mark.parametrize("data", [b"Traceback (most recent call last)", b'{"a":NaN}', b"\xff\xfe", b"[1]", b'{"cut'])
def test_an_event_that_is_not_json_says_so(data: bytes) -> None:
    """S11: the text is kept, invalid UTF-8 with replacements."""
    error = raised(read_event, OK, data)
    assert isinstance(error, InvalidResponseError)
    assert error.body == data.decode("utf-8", "replace")
    assert error._retryable == "unconfirmed"


@pytest.mark.parametrize(
    "data, events",
    [
        (b"data: {}", True),
        (b": PING", True),
        (b"oops", True),
        (b"", True),
        (b' \n{"a"', False),
        (b"\xef\xbb\xbf[", False),
        (b"<html", False),
    ],
)
def test_a_body_shows_by_its_first_byte_what_it_is(data: bytes, events: bool) -> None:
    """S12: the content type is a hint, the body decides."""
    assert begins_event_stream(data) is events


@pytest.mark.parametrize(
    "data, whole",
    [
        (b"[DONE]", True),
        (b" [DONE]\n", True),
        (b"{}", True),
        (Event.of("x", b"{"), True),
        (b'{"a":', False),
        (b"[DO", False),
    ],
)
def test_an_event_at_the_end_of_a_body_may_be_cut(data: bytes, whole: bool) -> None:
    """S6: half an event is none."""
    assert is_whole(data) is whole


# Secrets.


def locals_of(error: BaseException) -> str:
    """What the frames of our package show of themselves, in the error and what it came from."""
    shown = []
    found: BaseException | None = error
    while found is not None:
        frames: list[FrameType] = [frame for frame, _ in traceback.walk_tb(found.__traceback__)]
        shown += [repr(frame.f_locals) for frame in frames if "chatkore_async" in frame.f_code.co_filename]
        found = found.__cause__ or found.__context__
    return "\n".join(shown)


@pytest.mark.parametrize("read", [read_completion, read_models])
@pytest.mark.parametrize(
    "status, body",
    [
        (401, encoded({"error": {"message": f"bad key {KEY}"}})),
        (200, encoded({"error": {"message": f"bad key {KEY}"}})),
        (200, f"bad key {KEY}".encode()),
        (200, f"<html><title>{KEY}</title>".encode()),
        (200, f'{{"choices": ["{KEY}'.encode()),
        (200, f"data: bad key {KEY}\n\n".encode()),
        (200, b"event: error\ndata: " + KEY.encode() + b"\n\n"),
    ],
)
def test_an_echo_of_the_key_gets_nowhere(read: Any, status: int, body: bytes) -> None:
    """Not into the error, its cause, its headers, its id, nor the locals of our frames."""
    error = raised(read, Head(status, {"x-request-id": KEY}, Secret(KEY)), body)
    shown = "".join(traceback.format_exception(error)) + repr(vars(error)) + repr(error) + locals_of(error)
    assert KEY not in shown


def test_a_head_does_not_show_its_secret() -> None:
    """A repr in a log is no leak."""
    assert KEY not in repr(Head(200, {}, Secret(KEY)))


@given(st.integers(min_value=200, max_value=599), st.binary(max_size=100))
def test_whatever_comes_is_a_result_or_an_error_of_ours(status: int, body: bytes) -> None:
    """No user sees a raw error of msgspec."""
    with contextlib.suppress(APIError):
        assert isinstance(read_completion(Head(status, {}), body), ChatCompletion)
    with contextlib.suppress(APIError):
        assert isinstance(read_completion(Head(status, {}), b"data: " + body + b"\n\n"), ChatCompletion)
    with contextlib.suppress(APIError):
        read_event(OK, body)
    assert str(raised(read_event, OK, Event.of("error", b"{" + body)))


CROWD = b'{"data":[' + b"{}," * 1_000_001 + b"{}]}"


@pytest.mark.parametrize("read", [read_completion, read_models])
def test_a_crowded_answer_is_not_decoded(read: Any) -> None:
    """An answer made of a million objects and next to no bytes is refused, and its beginning kept."""
    error = raised(read, OK, CROWD)
    assert type(error) is InvalidResponseError
    assert "more than 1,000,000 objects" in str(error)
    assert error.body == CROWD[:65536].decode()


def test_large_objects_are_no_crowd() -> None:
    """A long answer with log probabilities is as large as it looks, and decoded."""
    token = {"token": "hello", "logprob": -0.25, "bytes": None, "top_logprobs": [{"token": "a", "logprob": -1.5}]}
    body = encoded(completion(choices=[{"message": {"content": "hi"}, "logprobs": {"content": [token] * 400_000}}]))
    assert read_completion(OK, body).text == "hi"


def test_an_event_stream_of_too_many_parts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event stream in answer to a call has the bounds of a stream, and what came is kept."""
    monkeypatch.setattr("chatkore_async._accumulate.MAX_PARTS", 2500)  # what 250,000 take is a test of the bounds
    many = events(
        *(
            chunk(choices=[{"index": n, "delta": {"content": "x"}} for n in range(start, start + 500)])
            for start in range(0, 3000, 500)
        )
    )
    error = raised(read_completion, OK, many)
    assert type(error) is InvalidResponseError
    assert "more than 250,000 choices" in str(error)
    assert error.partial is not None


def test_a_body_of_blanks_is_read_in_linear_time() -> None:
    """An answer that is all blanks before its `[DONE]` is refused at once, however many there are."""
    began = time.process_time()
    assert type(raised(read_completion, OK, b"{" + b"\n" * 1_000_000 + b"x[DONE]")) is InvalidResponseError
    assert type(raised(read_completion, OK, b"{" + b"\n" * 1_000_000 + b"data: [DONE]")) is InvalidResponseError
    assert time.process_time() - began < 20, "seconds; quadratic it were hours"
