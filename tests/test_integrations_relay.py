"""One stream on its way to one reader, before any framework: what is told, what is written, and what is left."""

import asyncio
import itertools
import json
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import virtual
from serving import ASK, PATIENCE, noise, quiet, settled  # noqa: F401 - a fixture

from chatkore_async import (
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    AsyncChatKore,
    AuthenticationError,
    BadRequestError,
    ChatKoreError,
    ChatStream,
    ConfigurationError,
    ConflictError,
    ContentPolicyError,
    ContextLengthExceededError,
    InsufficientQuotaError,
    InternalServerError,
    InvalidRequestError,
    InvalidResponseError,
    NoChannelError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestTooLargeError,
    StreamInterruptedError,
    StreamStalledError,
    UnprocessableEntityError,
)
from chatkore_async.integrations._refusals import SHUTTING_DOWN, Refusal, refusal
from chatkore_async.integrations._relay import Relay, Relays
from chatkore_async.integrations._service import ClientOptions, Maker
from chatkore_async.testing import ChatKoreServer, Cut, Hold, Reset, Stall, error, events, html, sse, stream

DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting for the model\n\n"
SECRET = "of the operator"


@contextmanager
def held(relays: Relays, relay: Relay) -> Iterator[None]:
    relays.begin(relay)
    try:
        yield
    finally:
        relays.forget(relay)


def delta(content: str | None = None, finish: str | None = None) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish}]}


def event(payload: object) -> bytes:
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


class Reader:
    """What was written to a reader, and what happens when something is."""

    def __init__(self, then: Callable[[bytes], Awaitable[object]] | None = None) -> None:
        self.got: list[bytes] = []
        self.then = then
        self._heard = asyncio.Event()

    async def __call__(self, data: bytes) -> None:
        self.got.append(data)
        self._heard.set()
        if self.then is not None:
            await self.then(data)

    async def hears(self, count: int) -> None:
        """Wait until so much was written."""
        async with asyncio.timeout(PATIENCE):
            while len(self.got) < count:
                self._heard.clear()
                await self._heard.wait()


def relay_of(answer: Any, *, heartbeat: float | None = None, send_timeout: float | None = None) -> Relay:
    return Relay(answer, heartbeat=heartbeat, send_timeout=send_timeout)


async def relayed(answer: ChatStream, **limits: float | None) -> list[bytes]:
    """Return what a reader gets who takes everything."""
    reader = Reader()
    relay = relay_of(answer, **limits)
    assert await relay.begin() is None
    await relay.run(reader)
    return reader.got


async def forever(_: object = None) -> None:
    await asyncio.get_running_loop().create_future()


@pytest.fixture
def ask(client: AsyncChatKore) -> Callable[[], ChatStream]:
    # The client of the tests retries, which a stream that is relayed may do until its first delta.
    return lambda: client.chat.completions.stream(**ASK, max_retries=0)


# What a reader is told of an error.


def status(kind: type[APIStatusError], **fields: Any) -> APIStatusError:
    return kind(SECRET, **{"status_code": 500, **fields})


@pytest.mark.parametrize(
    "problem,code",
    [
        (status(BadRequestError), 400),
        (status(ContextLengthExceededError), 400),
        (status(ContentPolicyError), 400),
        (status(NotFoundError), 404),
        (status(ConflictError), 409),
        (status(RequestTooLargeError), 413),
        (status(UnprocessableEntityError), 422),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_is_wrong_with_a_request_is_told(problem: APIStatusError, code: int) -> None:
    """The reader's mistake is told in the server's words, with the status it should have had."""
    told = refusal(problem)
    assert (told.status, told.message, told.headers) == (code, SECRET, {})
    assert told.type == "invalid_request_error"


def test_a_refusal_has_the_form_of_the_api() -> None:
    """Clients of the API read the error as one of the API's: message, type, code and parameter."""
    told = refusal(BadRequestError("No.", status_code=400, code="c", type="t", param="p"))
    body = {"error": {"message": "No.", "type": "t", "param": "p", "code": "c"}}
    assert told.to_dict() == body
    assert told.to_event() == event(body)


@pytest.mark.parametrize(
    "problem,code,kind",
    [
        (status(AuthenticationError), 502, "server_error"),
        (status(PermissionDeniedError), 502, "server_error"),
        (status(InsufficientQuotaError, code="insufficient_quota"), 502, "server_error"),
        (status(InternalServerError), 502, "server_error"),
        (status(NoChannelError), 502, "server_error"),
        (status(RateLimitError), 429, "rate_limit_error"),
        (APIConnectionError(SECRET), 502, "server_error"),
        (InvalidResponseError(SECRET), 502, "server_error"),
        (StreamInterruptedError(SECRET), 502, "server_error"),
        (APITimeoutError(SECRET, phase="answer"), 504, "server_error"),
        (StreamStalledError(SECRET, phase="idle"), 504, "server_error"),
        (ConfigurationError(SECRET), 502, "server_error"),
        (ChatKoreError(SECRET), 502, "server_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_is_the_operators_is_not_told(problem: ChatKoreError, code: int, kind: str) -> None:
    """Of the key, the quota and the model's server a reader learns nothing but that it did not work."""
    told = refusal(problem)
    assert (told.status, told.type, told.param) == (code, kind, None)
    assert SECRET not in repr(told)


@pytest.mark.parametrize("seconds,header", [(None, None), (0.0, "0"), (1.2, "2"), (30.0, "30")])
def test_a_limit_says_when_to_come_again(seconds: float | None, header: str | None) -> None:
    """`Retry-After` is in whole seconds and never too early, where the server said when."""
    told = refusal(status(RateLimitError, retry_after=seconds))
    assert told.headers.get("Retry-After") == header


def test_arguments_that_cannot_be_sent_are_a_bad_request() -> None:
    """What was refused before any I/O is the reader's mistake, with the path of it."""
    told = refusal(InvalidRequestError("$.messages[0].role: it is required", path="$.messages[0].role"))
    assert (told.status, told.param, told.type) == (400, "$.messages[0].role", "invalid_request_error")
    assert "it is required" in told.message


def test_shutting_down_is_a_503() -> None:
    """A balancer may take its requests elsewhere, and a client may try again at once."""
    assert (SHUTTING_DOWN.status, SHUTTING_DOWN.headers) == (503, {"Retry-After": "1"})


# Limits.


@pytest.mark.parametrize("name", ["heartbeat", "send_timeout"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan])
async def test_a_limit_is_a_time(ask, name: str, value: float) -> None:
    """No time, less than none or no number is refused, before anything is sent."""
    with pytest.raises(ConfigurationError, match=f"{name} must be seconds above 0, or None"):
        relay_of(ask(), **{name: value})


@pytest.mark.parametrize("grace", [-1, math.nan])
def test_a_grace_is_a_time(grace: float) -> None:
    """`grace` is seconds, where 0 is a number as well."""
    with pytest.raises(ConfigurationError, match="grace must be seconds from 0, or None"):
        Maker(ClientOptions(), grace)
    Maker(ClientOptions(), 0)
    Maker(ClientOptions(), None)


# What is written.


async def test_chunks_are_written_as_they_came(ask, server: ChatKoreServer) -> None:
    """One write for each chunk, with the bytes that came, and `[DONE]` at the end."""
    reply = stream("Hello you", usage=False)
    server.script(reply)
    assert await relayed(ask()) == [step for step in reply.steps if isinstance(step, bytes)]


async def test_an_event_of_several_lines_stays_one(ask, server: ChatKoreServer) -> None:
    """Each line of its data has the name of its field, as in the standard (WHATWG, server-sent events)."""
    lines = b'data: {"choices":\ndata: [{"delta":{"content":"Hi"},\ndata:"finish_reason":"stop"}]}\n\n'
    server.script(sse(lines, DONE))
    got = await relayed(ask())
    assert got == [lines.replace(b'data:"', b'data: "'), DONE]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
async def test_line_ends_of_any_kind_make_lines_of_the_event(ask, server: ChatKoreServer, end: bytes) -> None:
    """A chunk that came as plain JSON over several lines is one event, for every reader of event streams."""
    body = end.join([b'{"choices":', b'[{"delta":{"content":"Hi"},', b'"finish_reason":"stop"}]}'])
    server.script(sse(body, headers={"Content-Type": "application/json"}, framing="length"))
    first, done = await relayed(ask())
    lines = first.replace(b"\r\n", b"\n").replace(b"\r", b"\n").removesuffix(b"\n\n").split(b"\n")
    assert all(line.startswith(b"data:") for line in lines)
    assert json.loads(b"\n".join(line.removeprefix(b"data:") for line in lines)) == json.loads(body)
    assert done == DONE


async def test_a_whole_answer_becomes_a_stream(ask, server: ChatKoreServer) -> None:
    """A relay that answers `stream=True` with a whole completion does not show: the reader gets a chunk of it."""
    whole = {
        "id": "c",
        "object": "chat.completion",
        "choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}],
    }
    server.script(sse(msgspec.json.encode(whole), headers={"Content-Type": "application/json"}, framing="length"))
    first, done = await relayed(ask())
    assert msgspec.json.decode(first.removeprefix(b"data: "))["choices"][0]["delta"] == {"content": "Hi"}
    assert done == DONE


async def test_a_stream_without_a_finish_reason_is_relayed_with_its_end(ask, server: ChatKoreServer) -> None:
    """The model's server said that it was done, so that is what the reader is told; the log has a warning."""
    server.script(stream(["Hi"], finish_reason=None))
    assert (await relayed(ask()))[-1] == DONE


async def test_what_was_read_before_is_not_relayed_again(ask, server: ChatKoreServer) -> None:
    """A handler may look at the first chunks; the reader gets the others."""
    server.script(events(delta("a"), delta("b"), delta("c", finish="stop")))
    answer = ask()
    await answer.open()
    assert (await anext(answer)).text == "a"
    async for chunk in answer:
        assert chunk.text == "b"
        break
    assert await relayed(answer) == [event(delta("c", finish="stop")), DONE]


@pytest.mark.parametrize("end", [Cut(), Reset(), b'data: {"error": {"message": "%s"}}\n\n' % SECRET.encode()], ids=repr)
async def test_a_later_error_is_an_event(
    ask, server: ChatKoreServer, end: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Deltas that came are delivered, then comes an error event, and no `[DONE]`; the operator is told why."""
    server.script(sse(event(delta("Hi")), end))
    with caplog.at_level(logging.INFO, "chatkore_async"):
        got = await relayed(ask())
    assert got == [event(delta("Hi")), refusal(ChatKoreError()).to_event()]
    assert "its reader is told 502" in caplog.text


@pytest.mark.parametrize("reply,code", [(error(400, "Your fault."), 400), (html(500, SECRET), 502), (error(429), 429)])
async def test_an_error_before_the_first_delta_is_a_refusal(
    ask, server: ChatKoreServer, reply: Any, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing was written yet, so that the framework can answer with a status; the level of the log says whose it is."""
    server.script(reply)
    with caplog.at_level(logging.INFO, "chatkore_async"):
        told = await relay_of(ask()).begin()
    assert isinstance(told, Refusal)
    assert told.status == code
    assert [record.levelname for record in caplog.records if record.name == "chatkore_async"] == [
        "WARNING" if code >= 500 else "INFO"
    ]


@pytest.mark.parametrize("problem", [ConnectionError, TimeoutError, FileNotFoundError])
@pytest.mark.parametrize("heartbeat", [None, 1e-6], ids=["at once", "after a comment"])
async def test_a_key_that_cannot_be_had_is_no_reader_that_left(
    client: AsyncChatKore, problem: type[OSError], heartbeat: float | None
) -> None:
    """The place that keeps the keys may fail as a connection does: the operator is told, and the reader gets a 502."""

    async def key() -> str:
        for _ in range(10):
            await asyncio.sleep(0)
        raise problem("the vault is closed")

    noise.expected.append("the vault is closed")
    reader = Reader()
    relay = relay_of(client.with_options(api_key=key).chat.completions.stream(**ASK), heartbeat=heartbeat)
    told = await relay.begin()
    if heartbeat is not None:
        assert told is None
        await relay.run(reader)
        assert set(reader.got[:-1]) == {COMMENT}
        assert reader.got[-1] == refusal(ChatKoreError()).to_event()
    else:
        assert told is not None
        assert told.status == 502
    assert not relay.left


# Streams that cannot be relayed.


async def test_a_stream_is_relayed_once(ask) -> None:
    """A stream that was read to its end is refused, with what to do."""
    answer = ask()
    await relayed(answer)
    with pytest.raises(RuntimeError, match="make a new one for each response"):
        await relay_of(answer).begin()


async def test_a_stream_that_failed_is_not_relayed(ask, server: ChatKoreServer) -> None:
    """Who met the error already has to answer it; a second try is refused."""
    server.script(stream(["Hi", Cut()]))
    answer = ask()
    with pytest.raises(APIError):
        await answer.get_final_completion()
    with pytest.raises(RuntimeError, match="read to its end"):
        await relay_of(answer).begin()


@pytest.mark.parametrize("opened", [True, False])
async def test_a_stream_that_somebody_reads_is_not_relayed(ask, server: ChatKoreServer, opened: bool) -> None:
    """Two readers of one stream would each miss what the other gets. The first one goes on."""
    go = asyncio.Event()
    server.script(stream(["a", *([Hold(go)] if opened else []), "b"]) if opened else stream([Hold(go), "b"]))
    answer = ask()
    if opened:
        await answer.open()
        await anext(answer)
        await anext(answer)
    other = asyncio.create_task(answer.get_final_completion())
    await server.wait_for_requests(1)
    with pytest.raises(RuntimeError, match="being read by another task"):
        await relay_of(answer).begin()
    go.set()
    assert (await other).choices[0].finish_reason == "stop"


async def test_a_stream_that_somebody_leaves_ends_with_an_error(
    ask, server: ChatKoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The reader cannot know that something is missing unless it is told."""
    server.script(stream(["Hi", Stall()]))
    answer, reader = ask(), Reader()
    relay = relay_of(answer)
    assert await relay.begin() is None
    running = asyncio.create_task(relay.run(reader))
    await reader.hears(2)
    await answer.aclose()
    await running
    assert reader.got[-1] == refusal(ChatKoreError()).to_event()
    assert "left by something else" in caplog.text


async def test_a_closed_client_is_a_mistake_of_the_program(ask, client: AsyncChatKore) -> None:
    """It is raised, and not told to a reader as if it could be mended by asking again."""
    await client.close()
    with pytest.raises(ConfigurationError, match="closed"):
        await relay_of(ask()).begin()


# A reader that leaves.


@pytest.mark.parametrize("moment", ["before", "unopened", "first delta", "between"])
async def test_a_reader_that_leaves_ends_the_request(ask, server: ChatKoreServer, moment: str) -> None:
    """Whatever is waited for, the model's server sees its client leave in the same moment; nothing more is written."""
    server.script(stream([Stall()]) if moment == "first delta" else stream(["Hi", Stall()]))
    reader, relay = Reader(), relay_of(ask())
    if moment == "before":
        relay.reader_left()
    beginning = asyncio.create_task(relay.begin())
    if moment == "unopened":
        asyncio.get_running_loop().call_soon(relay.reader_left)
    elif moment != "before":
        await server.wait_for_requests(1)
    if moment == "first delta":
        relay.reader_left()
    assert await beginning is None
    running = asyncio.create_task(relay.run(reader))
    if moment == "between":
        await reader.hears(2)
        relay.reader_left()
    await running
    assert relay.left
    assert len(reader.got) == (2 if moment == "between" else 0)
    for request in server.requests:
        assert await request.finished() == "gone"


@pytest.mark.parametrize("number", [1, 2, 3])
async def test_a_reader_that_is_gone_when_something_is_written(ask, server: ChatKoreServer, number: int) -> None:
    """A write that fails is a reader that has left, not an error."""
    server.script(stream(["Hi", " you", Stall()]))

    async def fail(_: bytes) -> None:
        if len(reader.got) == number:
            raise ConnectionResetError

    reader, relay = Reader(fail), relay_of(ask())
    assert await relay.begin() is None
    await relay.run(reader)
    assert relay.left
    assert len(reader.got) == number
    assert await server.requests[0].finished() == "gone"


@pytest.mark.parametrize("timeout", [None, 60.0])
async def test_a_connection_that_times_out_is_a_reader_that_left(ask, timeout: float | None, caplog) -> None:
    """The operating system's own limit (`ETIMEDOUT`) is not taken for ours."""

    async def fail(_: bytes) -> None:
        raise TimeoutError(110, "Connection timed out")

    relay = relay_of(ask(), send_timeout=timeout)
    await relay.begin()
    await relay.run(Reader(fail))
    assert relay.left
    assert "took nothing" not in caplog.text


@pytest.mark.parametrize("what", ["a delta", "a comment"])
async def test_a_server_that_fails_is_not_a_reader_that_left(ask, server: ChatKoreServer, what: str) -> None:
    """What a write raises beside `OSError` is raised, and nothing is left behind."""
    go = asyncio.Event()
    server.script(events(delta("a"), Hold(go), delta("b", finish="stop")))

    async def fail(data: bytes) -> None:
        if what == "a delta" or data == COMMENT:
            go.set()
            raise RuntimeError("a bug of the server")

    relay = relay_of(ask(), heartbeat=0.01)
    assert await relay.begin() is None
    with pytest.raises(RuntimeError, match="a bug of the server"):
        await relay.run(Reader(fail))
    assert not relay.left


# Silence, and a reader that takes nothing: hours of it, in virtual time.


class Model:
    """A stream that gives a delta after each of so many seconds, and ends. Time passes on a clock of its own."""

    def __init__(self, *gaps: float, opens_after: float = 0.0) -> None:
        self.gaps = gaps
        self.opens_after = opens_after
        self.completeness: str | None = None
        self.left = False
        self._task: asyncio.Task[Any] | None = None

    async def open(self) -> None:
        self._task = asyncio.current_task()
        try:
            await asyncio.sleep(self.opens_after)
        except asyncio.CancelledError:
            if not self.left:
                raise
        self._task = None

    async def __aiter__(self) -> AsyncIterator[Any]:
        for gap in self.gaps:
            self._task = asyncio.current_task()
            try:
                await asyncio.sleep(gap)
            except asyncio.CancelledError:
                if not self.left:
                    raise
            self._task = None
            if self.left:
                return
            yield Delta
        self.completeness = "complete"

    async def aclose(self) -> None:
        if not self.left and self.completeness is None:
            self.left = True
            if self._task is not None:
                self._task.uncancel()
                self._task.cancel()


class Delta:
    @staticmethod
    def to_json() -> bytes:
        return b"{}"


def written(
    model: Model, *, takes: float = 0.0, heartbeat: float | None = 15.0, send_timeout: float | None = 300.0
) -> list[tuple[float, bytes]]:
    """Return what is written to a reader that takes so many seconds for each write, and when."""

    async def main() -> list[tuple[float, bytes]]:
        got: list[tuple[float, bytes]] = []

        async def write(data: bytes) -> None:
            got.append((asyncio.get_running_loop().time(), data))
            await asyncio.sleep(takes)

        relay = relay_of(model, heartbeat=heartbeat, send_timeout=send_timeout)
        assert await relay.begin() is None
        await relay.run(write)
        return got

    return virtual.run(main())


def moments(got: list[tuple[float, bytes]], data: bytes = COMMENT) -> list[float]:
    return [moment for moment, what in got if what == data]


def test_a_silent_model_is_covered_by_comments() -> None:
    """After each `heartbeat` of silence, before the first delta and between deltas, a comment keeps the connection."""
    got = written(Model(21, 0, 72, opens_after=40))
    assert moments(got) == [15, 30, 45, 60, 76, 91, 106, 121]
    assert moments(got, b"data: {}\n\n") == [61, 61, 133]
    assert got[-1][1] == DONE


def test_a_model_that_talks_needs_no_comments() -> None:
    """While deltas come more often than the heartbeat, nothing is added to them, however long the stream."""
    got = written(Model(*[14] * 1000))
    assert moments(got) == []
    assert len(got) == 1001


def test_without_a_heartbeat_nothing_is_added() -> None:
    """`heartbeat=None` sends no comments, and status 200 not before the first delta."""
    got = written(Model(3600, opens_after=3600), heartbeat=None)
    assert [data for _, data in got] == [b"data: {}\n\n", DONE]


def test_a_slow_reader_is_not_given_up() -> None:
    """`send_timeout` is for one write: who takes something now and then keeps the stream."""
    got = written(Model(*[0] * 50), takes=299)
    assert len(got) == 51
    assert moments(got) == []


@pytest.mark.parametrize("heartbeat", [15.0, None])
def test_a_reader_that_takes_nothing_is_given_up(heartbeat: float | None, caplog: pytest.LogCaptureFixture) -> None:
    """After `send_timeout` seconds in one write the stream is left, and the log says so."""
    model = Model(100, 0, 0)
    got = written(model, takes=1e6, heartbeat=heartbeat)
    assert model.left
    assert len(got) == 1
    assert "a reader took nothing for 300 s; its stream was left" in caplog.text


def test_a_reader_that_takes_no_comment_is_given_up() -> None:
    """A comment that is not taken is a write as any other, also when the model answers meanwhile."""
    for model in (Model(20, 30, 400), Model(opens_after=1000), Model(20, 1000)):
        got = written(model, takes=1e6)
        assert [data for _, data in got] == [COMMENT]
        assert model.left


def test_without_a_limit_a_reader_may_take_nothing_for_ever() -> None:
    """`send_timeout=None` gives nobody up."""
    got = written(Model(0, 0), takes=1e4, send_timeout=None)
    assert [data for _, data in got] == [b"data: {}\n\n"] * 2 + [DONE]


def test_a_delta_waits_for_the_comment_before_it() -> None:
    """A comment that is on its way is not torn apart by the delta that ends the silence."""
    got = written(Model(16, 0, 16), takes=5)
    assert [data for _, data in got] == [COMMENT, b"data: {}\n\n", b"data: {}\n\n", COMMENT, b"data: {}\n\n", DONE]
    assert all(after - before >= 5 for (before, _), (after, _) in itertools.pairwise(got))


def test_the_end_waits_for_the_comment_before_it() -> None:
    """So does `[DONE]`."""

    class Late(Model):
        async def __aiter__(self) -> AsyncIterator[Any]:
            async for each in super().__aiter__():
                yield each
            await asyncio.sleep(16)
            self.completeness = "complete"

    got = written(Late(0), takes=5)
    assert [data for _, data in got] == [b"data: {}\n\n", COMMENT, DONE]


# Comments on a real stream.


async def test_a_comment_commits_the_status(ask, server: ChatKoreServer) -> None:
    """Once a comment was due before the first delta, an error of the model's server can only be an event."""
    go = asyncio.Event()
    server.script(msgspec.structs.replace(error(429), steps=(Hold(go), *error(429).steps)))

    async def let(_: bytes) -> None:
        go.set()

    reader, relay = Reader(let), relay_of(ask(), heartbeat=0.01)
    assert await relay.begin() is None
    await relay.run(reader)
    assert set(reader.got[:-1]) == {COMMENT}
    assert reader.got[-1].startswith(b'data: {"error":{"message":"Too many requests')


async def test_comments_fill_the_silence_between_deltas(ask, server: ChatKoreServer) -> None:
    """They come while the model thinks, and the deltas around them are whole."""
    go = asyncio.Event()
    server.script(events(delta("a"), Hold(go), delta("b", finish="stop")))

    async def count(data: bytes) -> None:
        if reader.got.count(COMMENT) == 3:
            go.set()

    reader, relay = Reader(count), relay_of(ask(), heartbeat=0.01, send_timeout=60)
    assert await relay.begin() is None
    await relay.run(reader)
    assert [data for data in reader.got if data != COMMENT] == [
        event(delta("a")),
        event(delta("b", finish="stop")),
        DONE,
    ]


@pytest.mark.parametrize("first", [True, False])
async def test_a_reader_that_is_gone_when_a_comment_is_written(ask, server: ChatKoreServer, first: bool) -> None:
    """A proxy that closed the connection is noticed by the next comment at the latest."""
    server.script(stream([Stall()] if first else ["Hi", Stall()]))

    async def fail(data: bytes) -> None:
        if data == COMMENT:
            raise ConnectionResetError

    reader, relay = Reader(fail), relay_of(ask(), heartbeat=0.01)
    assert await relay.begin() is None
    await relay.run(reader)
    assert relay.left
    assert reader.got[-1] == COMMENT
    for request in server.requests:  # it may not have come so far
        assert await request.finished() == "gone"


# Shutting down.


async def test_a_stream_that_outlives_its_grace_ends_with_an_error(ask, server: ChatKoreServer) -> None:
    """The reader is told that the service shuts down, and the model's server sees its client leave."""
    server.script(stream(["Hi", Stall()]))
    relays, reader, relay = Relays(0.01), Reader(), relay_of(ask())
    with held(relays, relay):
        assert await relay.begin() is None
        running = asyncio.create_task(relay.run(reader))
        await reader.hears(2)
        relays.stop()
        relays.stop()  # some runners say it twice
        assert repr(relays) == "<Relays 1 running, stopping>"
        await running
    assert reader.got[-1] == SHUTTING_DOWN.to_event()
    assert await server.requests[0].finished() == "gone"
    assert not relay.left
    assert repr(relays) == "<Relays 0 running, stopping>"


async def test_a_stream_that_ends_within_the_grace_is_whole(ask, server: ChatKoreServer) -> None:
    """Shutting down does not cut what is nearly done."""
    go = asyncio.Event()
    server.script(events(delta("a"), Hold(go), delta("b", finish="stop")))
    relays, reader, relay = Relays(60), Reader(), relay_of(ask())
    with held(relays, relay):
        assert await relay.begin() is None
        running = asyncio.create_task(relay.run(reader))
        await reader.hears(1)
        relays.stop()
        go.set()
        await running
    assert reader.got[-1] == DONE


async def test_a_stream_that_has_not_begun_is_refused(ask, server: ChatKoreServer) -> None:
    """Whoever still waits for a first delta gets a status."""
    server.script(stream([Stall()]))
    relays, relay = Relays(None), relay_of(ask())
    with held(relays, relay):
        beginning = asyncio.create_task(relay.begin())
        await server.wait_for_requests(1)
        relays.end()
        assert await beginning is SHUTTING_DOWN


async def test_a_stream_that_comes_while_the_service_shuts_down(ask, server: ChatKoreServer) -> None:
    """A request that was let in at the last moment has the same grace as the others."""
    server.script(stream(["Hi", Stall()]))
    relays, reader, relay = Relays(0), Reader(), relay_of(ask())
    assert repr(relays) == "<Relays 0 running>"
    relays.stop()
    with held(relays, relay):
        if (refused := await relay.begin()) is None:
            await relay.run(reader)
            assert reader.got[-1] == SHUTTING_DOWN.to_event()
        else:
            assert refused is SHUTTING_DOWN


async def test_without_a_grace_a_stream_goes_on(ask, server: ChatKoreServer) -> None:
    """`grace=None` leaves it to the server when to cut what runs."""
    go = asyncio.Event()
    server.script(events(delta("a"), Hold(go), delta("b", finish="stop")))
    relays, reader, relay = Relays(None), Reader(), relay_of(ask())
    with held(relays, relay):
        assert await relay.begin() is None
        running = asyncio.create_task(relay.run(reader))
        await reader.hears(1)
        relays.stop()
        go.set()
        await running
    assert reader.got[-1] == DONE


async def test_a_stream_that_is_whole_when_the_service_ends_is_not_called_broken(ask, server: ChatKoreServer) -> None:
    """The model had said everything, and only the end of its answer was still on the way."""
    last = asyncio.Event()
    server.script(sse(event(delta("a", finish="stop")), DONE, Hold(last)))
    answer, reader = ask(), Reader()
    relay = relay_of(answer)
    assert await relay.begin() is None
    running = asyncio.create_task(relay.run(reader))
    async with asyncio.timeout(PATIENCE):
        while answer.completeness is None:  # noqa: ASYNC110 - not ours to signal
            await asyncio.sleep(0)
    relay.end()
    last.set()
    await running
    assert reader.got == [event(delta("a", finish="stop")), DONE]


async def test_nothing_follows_the_end(ask) -> None:
    """A reader that has `[DONE]` is not told that the service shuts down."""
    relay = relay_of(ask())
    assert await relay.begin() is None
    await relay.run(Reader())
    assert relay.last_words() == b""


async def test_nobody_is_told_who_has_left(ask, server: ChatKoreServer) -> None:
    """Ending what a reader has left changes nothing."""
    server.script(stream(["Hi", Stall()]))
    reader, relay = Reader(), relay_of(ask())
    assert await relay.begin() is None
    running = asyncio.create_task(relay.run(reader))
    await reader.hears(1)
    relay.reader_left()
    relay.end()
    assert relay.last_words() == SHUTTING_DOWN.to_event()
    await running
    assert reader.got.count(SHUTTING_DOWN.to_event()) == 0


# Cancellation.


@pytest.mark.parametrize(
    "reply",
    [
        stream("Hello you"),
        stream(["Hi", Cut()]),
        error(500),
        error(400),
        html(200, "Welcome"),
        stream([Cut()]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("heartbeat", [None, 1e-6], ids=["silent", "comments"])
async def test_cancelled_at_any_moment_nothing_is_left_behind(
    ask, client: AsyncChatKore, server: ChatKoreServer, reply: Any, heartbeat: float | None
) -> None:
    """Frameworks cancel wherever a handler waits: no connection, task or unread exception outlives that."""
    server.always(reply)
    before = asyncio.all_tasks()

    async def yielding(_: bytes) -> None:
        await asyncio.sleep(0)

    async def whole() -> None:
        relay = relay_of(ask(), heartbeat=heartbeat, send_timeout=60)
        with held(Relays(None), relay):
            if await relay.begin() is None:
                await relay.run(yielding)

    for moment in itertools.count():
        task = asyncio.create_task(whole())
        for _ in range(moment):
            await asyncio.sleep(0)
        done = task.done()
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled() or task.exception() is None
        await settled(client, before)
        if done:
            break


def test_a_loop_that_ends_takes_its_relays_along() -> None:
    """What still waits for its first delta when `asyncio.run` ends is cancelled, and nobody complains."""

    async def main() -> None:
        server = ChatKoreServer(handler=lambda _: stream([Stall()]))
        await server.start()
        client = AsyncChatKore(api_key="k", base_url=server.base_url)
        beginning = asyncio.create_task(relay_of(client.chat.completions.stream(**ASK)).begin())
        await server.wait_for_requests(1)
        assert not beginning.done()
        await server.close()

    asyncio.run(main())
