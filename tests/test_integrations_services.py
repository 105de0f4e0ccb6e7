"""A service on a socket, in both frameworks: what its readers get, and what the model's server sees of them."""

import asyncio
import gc
import json
import logging
import weakref
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from traceback import TracebackException
from typing import Any

import msgspec
import pytest
from serving import (
    DONE,
    FRAMEWORKS,
    PATIENCE,
    Asked,
    Reader,
    Service,
    aiohttp_app,
    aiohttp_runs,
    asking,
    connected,
    fastapi_app,
    noise,
    quiet,  # noqa: F401 - a fixture
    relaying,
    serving,
    uvicorn_runs,
)

from chatkore_async import ChatKoreError, ConfigurationError, InvalidRequestError, Timeout
from chatkore_async.integrations import aiohttp_web
from chatkore_async.integrations import fastapi as fastapi_
from chatkore_async.testing import (
    ChatKoreServer,
    Cut,
    Hold,
    Reply,
    Reset,
    Stall,
    error,
    events,
    html,
    json_reply,
    raw,
    sse,
    stream,
    tool_call,
)

SECRET = "sk-secret-of-the-service"
QUOTA = "You exceeded your current quota, please check your plan."
COMMENT = b": waiting for the model"


@pytest.fixture(params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def service(framework: str, server: ChatKoreServer) -> AsyncIterator[Service]:
    """A service that relays one stream for each request. Whatever a test did, nothing is left of it."""
    async with serving(framework, relaying(), server.base_url) as service:
        yield service
        await service.freed()


def texts(data: list[bytes]) -> str:
    """Return the text of a stream's events, which have to be whole."""
    assert data[-1] == DONE
    chunks = [json.loads(each) for each in data[:-1]]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


async def answer(service: Service) -> tuple[int, dict[str, Any], Reader]:
    """Ask, and return the status and the error of the answer."""
    async with asking(service) as reader:
        status = await reader.head()
        return status, json.loads(await reader.body())["error"], reader


# What a reader gets.


async def test_a_stream_arrives_as_the_model_sent_it(service: Service, server: ChatKoreServer) -> None:
    """The reader gets the bytes of the model's events, and headers that keep proxies from gathering them."""
    reply = stream("Hello you", tool_calls=[tool_call("f", {"a": 1})], reasoning="Hm", usage=False)
    server.script(reply)
    async with asking(service) as reader:
        assert await reader.head() == 200
        assert await reader.body() == reply.body
    assert reader.headers["content-type"].startswith("text/event-stream")
    assert reader.headers["cache-control"] == "no-cache"
    assert reader.headers["x-accel-buffering"] == "no"
    assert "content-length" not in reader.headers


async def test_a_delta_arrives_before_the_next_is_made(service: Service, server: ChatKoreServer) -> None:
    """Nothing is gathered: each piece is with the reader when the model begins to think of the next."""
    gates = [asyncio.Event() for _ in range(5)]
    server.script(stream([step for gate in gates for step in ("x", Hold(gate))], usage=False))
    async with asking(service) as reader:
        await reader.head()
        assert b'"role"' in await reader.event()
        for gate in gates:
            assert b'"x"' in await reader.event()
            gate.set()
        assert (await reader.data())[-1] == DONE


async def test_one_connection_serves_one_stream_after_another(service: Service, server: ChatKoreServer) -> None:
    """After a clean end the reader's connection and the model's are used again, also when an error came in between."""
    server.script(stream("One"), stream("Two"), error(429), stream("Three"))
    async with connected(service) as reader:
        for text in ("One", "Two", None, "Three"):
            await reader.ask()
            if text is None:
                assert await reader.head() == 429
                await reader.body()
            else:
                assert await reader.head() == 200
                assert texts(await reader.data()) == text
            assert not reader.cut
    assert {request.connection for request in server.requests} == {1}


@pytest.mark.parametrize("http", ["1.0", "1.1"])
async def test_a_connection_that_closes_after_the_answer(service: Service, server: ChatKoreServer, http: str) -> None:
    """Old and modest clients, which get one answer for each connection, get all of it."""
    async with asking(service, http=http, close=True) as reader:
        await reader.head()
        assert (await reader.data())[-1] == DONE
        await reader.closed()


async def test_many_streams_at_once(service: Service, server: ChatKoreServer) -> None:
    """Each reader has its own stream, and nothing of another's."""
    server.respond_with(lambda request: stream(f"{len(server.requests)} and more"))

    async def one() -> str:
        async with asking(service) as reader:
            await reader.head()
            return texts(await reader.data())

    got = await asyncio.gather(*[one() for _ in range(50)])
    assert len(set(got)) > 1
    assert all(text.endswith(" and more") for text in got)


# Errors.


@pytest.mark.parametrize(
    "reply,status,kind",
    [
        pytest.param(error(400, "Your fault.", code="c", param="p"), 400, "invalid_request_error", id="400"),
        pytest.param(error(404, "Your fault."), 404, "invalid_request_error", id="404"),
        pytest.param(error(409, "Your fault."), 409, "invalid_request_error", id="409"),
        pytest.param(error(413, "Your fault."), 413, "invalid_request_error", id="413"),
        pytest.param(error(422, "Your fault."), 422, "invalid_request_error", id="422"),
        pytest.param(
            error(500, "Your fault.", code="context_length_exceeded", type="invalid_request_error"),
            400,
            "invalid_request_error",
            id="a prompt that is too long, as a 500",
        ),
        pytest.param(
            json_reply({"error": {"message": "Your fault.", "type": "invalid_request_error", "code": 400}}),
            400,
            "invalid_request_error",
            id="inside a 200",
        ),
        pytest.param(
            events({"error": {"message": "Your fault.", "type": "invalid_request_error", "code": "400"}}, done=False),
            400,
            "invalid_request_error",
            id="inside a stream",
        ),
    ],
)
async def test_the_readers_mistakes_are_told(
    service: Service, server: ChatKoreServer, reply: Any, status: int, kind: str
) -> None:
    """What is wrong with the request comes back in the API's form, with the server's words."""
    server.script(reply)
    got, told, reader = await answer(service)
    assert (got, told["type"], told["message"]) == (status, kind, "Your fault.")
    assert set(told) == {"message", "type", "param", "code"}
    assert reader.headers["content-type"].startswith("application/json")


async def test_a_key_in_the_words_of_the_model_is_not_told(service: Service, server: ChatKoreServer) -> None:
    """Where a server repeats the key of the service in its message, the reader and the log do not see it."""
    server.script(error(400, f"Bad request with the key {SECRET}, sorry."))
    _, told, _ = await answer(service)
    assert SECRET not in told["message"]
    assert "sorry" in told["message"]


@pytest.mark.parametrize(
    "reply,status",
    [
        pytest.param(error(401, "SECRET", code="invalid_api_key"), 502, id="401"),
        pytest.param(error(403, "SECRET"), 502, id="403"),
        pytest.param(error(429, QUOTA, code="insufficient_quota", type="insufficient_quota"), 502, id="quota"),
        pytest.param(error(500, "SECRET"), 502, id="500"),
        pytest.param(error(503, "No available channel for model m: SECRET"), 502, id="no channel"),
        pytest.param(html(200, "SECRET"), 502, id="a page"),
        pytest.param(raw(Reset()), 502, id="a reset"),
        pytest.param(stream([Cut()]), 502, id="a cut before the first delta"),
        pytest.param(events(), 502, id="an empty stream"),
        pytest.param(error(429, "SECRET requests per minute of org-SECRET"), 429, id="429"),
        pytest.param(stream([Stall()]), 504, id="silence"),
    ],
)
async def test_what_is_the_operators_is_not_told(
    framework: str, server: ChatKoreServer, reply: Any, status: int
) -> None:
    """Of the service's key, its quota and the model's server a reader learns nothing, and the API's form stays."""
    server.script(reply)
    timeout = Timeout(first_token=0.05 if status == 504 else None)
    async with serving(framework, relaying(), server.base_url, timeout=timeout) as service:
        got, told, reader = await answer(service)
        await service.freed()
    assert got == status
    assert "SECRET" not in str(told)
    assert "quota" not in str(told)
    assert set(told) == {"message", "type", "param", "code"}
    assert reader.headers["content-type"].startswith("application/json")


async def test_a_model_that_cannot_be_reached_is_a_502(framework: str) -> None:
    """Nobody listens: the reader learns no address."""
    async with ChatKoreServer() as gone:
        pass
    async with serving(framework, relaying(), gone.base_url) as service:
        got, told, _ = await answer(service)
    assert got == 502
    assert str(gone.port) not in str(told)


async def test_a_limit_says_when_to_come_again(service: Service, server: ChatKoreServer) -> None:
    """The model's `Retry-After` is the reader's, in whole seconds."""
    server.script(error(429, headers={"retry-after-ms": "1500"}))
    got, _, reader = await answer(service)
    assert (got, reader.headers["retry-after"]) == (429, "2")


async def test_a_handler_can_answer_an_error_itself(framework: str, server: ChatKoreServer) -> None:
    """`error_response` makes the answer of what a handler caught, as of arguments that cannot be sent."""

    async def handler(asked: Asked) -> Any:
        try:
            asked.stream(messages=[{"content": "no role"}])
        except InvalidRequestError as problem:
            return asked.refuse(problem)

    async with serving(framework, handler, server.base_url) as service:
        got, told, _ = await answer(service)
    assert (got, told["param"], told["type"]) == (400, "$.messages[0].role", "invalid_request_error")
    assert server.requests == []


@pytest.mark.parametrize("end", [Cut(), Reset(), b"[1, 2", {"error": {"message": "SECRET", "code": 500}}], ids=repr)
async def test_an_error_after_the_first_delta_is_an_event(service: Service, server: ChatKoreServer, end: Any) -> None:
    """The deltas before it are delivered, no `[DONE]` follows, and the answer itself ends properly."""
    go = asyncio.Event()
    server.script(events({"choices": [{"delta": {"content": "Hi"}}]}, Hold(go), end, done=False))
    async with asking(service) as reader:
        await reader.head()
        assert b'"Hi"' in await reader.event()
        go.set()
        (last,) = await reader.data()
    assert not reader.cut
    assert json.loads(last)["error"]["code"] == "bad_gateway"
    assert b"SECRET" not in last


async def test_a_model_that_stalls_ends_with_an_event(framework: str, server: ChatKoreServer) -> None:
    """The client's `Timeout` holds for what is relayed, too."""
    server.script(stream(["Hi", Stall()]))
    async with serving(framework, relaying(), server.base_url, timeout=Timeout(idle=0.05)) as service:
        async with asking(service) as reader:
            await reader.head()
            assert json.loads((await reader.data())[-1])["error"]["code"] == "timeout"
        await service.freed()


# Silence.


async def test_a_silent_model_is_covered_by_comments(framework: str, server: ChatKoreServer) -> None:
    """Comments come before the first delta, which commits status 200, and between deltas; an error is then an event."""
    first, second = asyncio.Event(), asyncio.Event()
    server.script(stream([Hold(first), "Hi", Hold(second), Cut()]))
    async with serving(framework, relaying(heartbeat=0.01), server.base_url) as service, asking(service) as reader:
        assert await reader.head() == 200
        assert [await reader.event() for _ in range(3)] == [COMMENT] * 3
        first.set()
        while (event := await reader.event()) == COMMENT:
            pass
        assert b'"role"' in event
        while (event := await reader.event()) == COMMENT:
            pass
        assert b'"Hi"' in event
        assert [await reader.event() for _ in range(3)] == [COMMENT] * 3
        second.set()
        (last,) = await reader.data()
        assert json.loads(last)["error"]["code"] == "bad_gateway"
        assert not reader.cut


async def test_an_error_after_a_comment_is_an_event(framework: str, server: ChatKoreServer) -> None:
    """The status cannot be taken back."""
    go = asyncio.Event()
    server.script(
        msgspec.structs.replace(error(400, "Your fault."), steps=(Hold(go), *error(400, "Your fault.").steps))
    )
    async with serving(framework, relaying(heartbeat=0.01), server.base_url) as service, asking(service) as reader:
        assert await reader.head() == 200
        await reader.event()
        go.set()
        (last,) = await reader.data()
        assert json.loads(last)["error"]["message"] == "Your fault."


@pytest.mark.parametrize("limits", [{"heartbeat": 0}, {"send_timeout": -1}, {"heartbeat": float("nan")}], ids=repr)
async def test_limits_are_times(framework: str, server: ChatKoreServer, limits: Any) -> None:
    """A limit that is no time is a mistake of the program: it is raised, and nothing is sent."""
    raised = []

    async def handler(asked: Asked) -> Any:
        with pytest.raises(ConfigurationError, match="must be seconds above 0") as caught:
            await asked.respond(asked.stream(), **limits)
        raised.append(caught)
        return asked.refuse(ChatKoreError())

    async with serving(framework, handler, server.base_url) as service:
        await answer(service)
    assert raised
    assert server.requests == []


# A reader that leaves.


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("moment", ["first token", "between deltas", "comments"])
async def test_a_reader_that_leaves_stops_the_model(
    framework: str, server: ChatKoreServer, moment: str, reset: bool
) -> None:
    """Whatever was being waited for, the model's server sees its client leave at once, and the pool is free."""
    server.script(stream(["Hi", Stall()] if moment == "between deltas" else [Stall()]))
    heartbeat = 0.01 if moment == "comments" else None
    async with serving(framework, relaying(heartbeat=heartbeat), server.base_url) as service:
        async with asking(service) as reader:
            await server.wait_for_requests(1, timeout=PATIENCE)
            if moment != "first token":
                await reader.head()
                await reader.event()
            reader.leave(reset=reset)
            assert await server.requests[0].finished(timeout=PATIENCE) == "gone"
        await service.freed()


async def test_a_reader_that_leaves_as_the_stream_ends(service: Service, server: ChatKoreServer) -> None:
    """Leaving with the last event, or before the end of the answer was read, leaves nothing behind."""
    for _ in range(10):
        async with asking(service) as reader:
            await reader.head()
            while DONE not in await reader.event():
                pass
            reader.leave()
    await service.freed()
    assert {await request.finished(timeout=PATIENCE) for request in server.requests} == {"answered"}


async def test_a_reader_that_has_left_before_is_not_worked_for(framework: str, server: ChatKoreServer) -> None:
    """A handler that did something slow first asks the model nothing when the reader did not wait for it."""
    asked_for, gone = asyncio.Event(), asyncio.Event()
    left: list[Any] = []

    async def handler(asked: Asked) -> Any:
        asked_for.set()
        await gone.wait()
        response = await asked.respond(asked.stream())
        left.append(response)
        return response

    async with serving(framework, handler, server.base_url) as service:
        async with asking(service) as reader:
            await asked_for.wait()
            reader.leave()
        # The service hears of it in one turn of its loop or another.
        async with asking(service) as other:
            for _ in range(20):
                await asyncio.sleep(0)
            gone.set()
            other.leave()
        await service.freed()
        async with asyncio.timeout(PATIENCE):
            while len(left) < 2:  # noqa: ASYNC110 - not ours to signal
                await asyncio.sleep(0)
        for request in server.requests:
            assert await request.finished(timeout=PATIENCE) in ("gone", "answered")
    assert len(server.requests) <= 1


async def test_a_response_that_is_not_sent_leaves_the_stream(server: ChatKoreServer) -> None:
    """A FastAPI handler may think better of it and answer something else: the model is not asked any further."""
    server.script(stream(["Hi", Stall()]))

    async def handler(asked: Asked) -> Any:
        await asked.respond(asked.stream())
        return asked.refuse(ChatKoreError())

    async with serving("fastapi", handler, server.base_url) as service:
        got, _, _ = await answer(service)
        assert got == 502
        assert await server.requests[0].finished(timeout=PATIENCE) == "gone"
        await service.freed()


# A reader that takes little, or nothing.


class Counter:
    """Is waited for between two pieces, and never makes anybody wait."""

    sent = 0

    async def wait(self) -> None:
        self.sent += 1


PIECE = 65_536
PIECES = 800
_EVENT = b"data: " + msgspec.json.encode({"choices": [{"delta": {"content": "x" * PIECE}}]}) + b"\n\n"
_END = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
ON_THE_WAY = 400
"""Pieces that may be in buffers: of four sockets on the loopback interface, nearly all of them, and of aiohttp."""


def flood(counter: Counter) -> Reply:
    """Script a stream of 50 MB."""
    return sse(*[_EVENT, Hold(counter)] * PIECES, _END)


@pytest.mark.parametrize("heartbeat", [None, 0.02])
async def test_a_reader_that_takes_nothing_is_given_up(
    framework: str, server: ChatKoreServer, heartbeat: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The model is not read ahead for it, after `send_timeout` its stream is left, and the connection is free."""
    counter = Counter()
    noise.expected.append("ASGI callable returned without completing response")  # uvicorn's word for it
    server.script(flood(counter))
    handler = relaying(heartbeat=heartbeat, send_timeout=0.2)
    async with serving(framework, handler, server.base_url) as service, connected(service, small=True) as reader:
        await reader.ask()
        await server.wait_for_requests(1, timeout=PATIENCE)
        assert await server.requests[0].finished(timeout=PATIENCE) == "gone"
        await service.freed()
        assert "a reader took nothing for 0.2 s; its stream was left" in caplog.text
        assert 0 < counter.sent < ON_THE_WAY
        await reader.closed()


async def test_a_slow_reader_makes_a_slow_model(framework: str, server: ChatKoreServer) -> None:
    """Of 50 MB, what was made is never far from what was read, and memory does not hold it."""
    counter = Counter()
    server.script(flood(counter))
    async with serving(framework, relaying(), server.base_url) as service, connected(service, small=True) as reader:
        await reader.ask()
        await reader.head()
        read, ahead = 0, 0
        while data := await reader.some():
            read += len(data)
            ahead = max(ahead, counter.sent - read // PIECE)
        assert read > PIECE * PIECES
        assert ahead < ON_THE_WAY
        await service.freed()


async def test_a_reader_that_leaves_while_it_is_waited_for(framework: str, server: ChatKoreServer) -> None:
    """A service that is blocked in writing hears of the leaving as well."""
    counter = Counter()
    server.script(flood(counter))
    async with serving(framework, relaying(), server.base_url) as service, connected(service, small=True) as reader:
        await reader.ask()
        await reader.head()
        before = -1
        while before != counter.sent:  # until the model stands still
            before = counter.sent
            for _ in range(200):
                await asyncio.sleep(0)
        assert server.requests[0].outcome is None
        reader.leave()
        assert await server.requests[0].finished(timeout=PATIENCE) == "gone"
        await service.freed()


async def test_streams_leave_nothing_alive(
    service: Service, server: ChatKoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    """However a stream ended, nothing of it is kept by a service that goes on, or by a connection that is used again."""
    caplog.set_level(logging.CRITICAL, "chatkore_async")  # caplog keeps errors, which have what was delivered
    before = alive()  # of other tests, whose errors are kept by something
    server.script(stream("Hi"), stream(["Hi", Cut()]), error(400), stream([Cut()]))
    async with connected(service) as reader:
        for _ in range(4):
            await reader.ask()
            await reader.head()
            await reader.body()
        server.script(stream(["Hi", Stall()]))
        async with asking(service) as other:
            await other.head()
            other.leave()
        await server.requests[-1].finished(timeout=PATIENCE)
        await service.freed()
        async with asyncio.timeout(PATIENCE):
            while alive() > before:  # noqa: ASYNC110 - the last turns of the last request
                await asyncio.sleep(0)


def alive() -> int:
    """Return how many objects are there of what a stream is made of."""
    gc.collect()
    kinds = {"Relay", "ChatStream", "_EventStream", "_Watch", "_Held", "Exchange", "Accumulator"}
    return sum(type(each).__name__ in kinds for each in gc.get_objects())


# Streams that are not for one response.


async def test_a_stream_is_for_one_response(framework: str, server: ChatKoreServer) -> None:
    """A second response of it, or one of a stream that is being read, is refused with what to do."""
    raised = []

    async def handler(asked: Asked) -> Any:
        used = asked.stream()
        await used.get_final_completion()
        with pytest.raises(RuntimeError, match="make a new one for each response") as caught:
            await asked.respond(used)
        raised.append(caught)
        return await asked.respond(asked.stream())

    async with serving(framework, handler, server.base_url) as service, asking(service) as reader:
        assert await reader.head() == 200
        assert (await reader.data())[-1] == DONE
    assert raised


async def test_a_stream_that_is_read_elsewhere_is_refused(framework: str, server: ChatKoreServer) -> None:
    """The one who reads it goes on."""
    server.script(stream(["Hi", Stall()]))
    kept: list[Any] = []
    raised: list[Any] = []

    async def handler(asked: Asked) -> Any:
        if not kept:
            kept.append(asked.stream())
            return await asked.respond(kept[0])
        with pytest.raises(RuntimeError, match="being read by another task") as caught:
            await asked.respond(kept[0])
        raised.append(caught)
        return asked.refuse(ChatKoreError())

    async with serving(framework, handler, server.base_url) as service, asking(service) as reader:
        await reader.head()
        await reader.event()
        assert b'"Hi"' in await reader.event()
        got, _, _ = await answer(service)
        assert got == 502
        assert raised
        assert server.requests[0].outcome is None
        reader.leave()
        assert await server.requests[0].finished(timeout=PATIENCE) == "gone"


async def test_a_handler_may_read_the_beginning(framework: str, server: ChatKoreServer) -> None:
    """Chunks that the handler took are its own; the reader gets the rest."""
    server.script(stream(["a", "b", "c"], usage=False))

    async def handler(asked: Asked) -> Any:
        opened = asked.stream()
        async for chunk in opened:
            if chunk.text == "a":
                break
        return await asked.respond(opened)

    async with serving(framework, handler, server.base_url) as service, asking(service) as reader:
        await reader.head()
        assert texts(await reader.data()) == "bc"


async def test_a_stream_that_something_else_leaves(framework: str, server: ChatKoreServer) -> None:
    """The reader is told that it has not everything."""
    server.script(stream(["Hi", Stall()]))
    kept: list[Any] = []

    async def handler(asked: Asked) -> Any:
        kept.append(asked.stream())
        return await asked.respond(kept[0])

    async with serving(framework, handler, server.base_url) as service, asking(service) as reader:
        await reader.head()
        await reader.event()
        await reader.event()
        await kept[0].aclose()
        assert json.loads((await reader.data())[-1])["error"]["code"] == "bad_gateway"


# Shutting down.


async def test_500_readers_are_told_that_the_service_shuts_down(framework: str, server: ChatKoreServer) -> None:
    """Each gets its error event and no `[DONE]`, the model's server sees all of them leave, and nothing hangs."""
    noise.expected += ["timeout graceful shutdown exceeded", "Exception in ASGI application"]
    server.always(stream(["Hi", Stall()]))
    asyncio.get_running_loop().set_debug(False)  # it takes three times as long for what other tests show
    grace = {"grace": 0.1} if framework == "aiohttp" else {}
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(
            serving(framework, relaying(), server.base_url, patience=1 if framework == "fastapi" else 30, **grace)
        )
        readers = [await stack.enter_async_context(asking(service)) for _ in range(500)]
        for reader in readers:
            assert await reader.head() == 200
            await reader.event()
            assert b'"Hi"' in await reader.event()
        stopping = asyncio.create_task(service.stop())
        for reader in readers:
            (last,) = await reader.data()
            assert json.loads(last)["error"]["code"] == "shutting_down"
            assert not reader.cut
        await stopping
        assert service.client.closed
        for request in server.requests:
            assert await request.finished(timeout=PATIENCE) == "gone"
    assert not [said for said in noise.said if "Exception in ASGI application" in said]


async def test_a_stream_that_ends_in_time_is_whole(framework: str, server: ChatKoreServer) -> None:
    """Shutting down waits for what is nearly done."""
    go = asyncio.Event()
    server.script(stream(["Hi", Hold(go), " you"], usage=False))
    options: dict[str, Any] = {"grace": 30} if framework == "aiohttp" else {}  # elsewhere it is the server's to say
    async with serving(framework, relaying(), server.base_url, **options) as service, asking(service) as reader:
        await reader.head()
        await reader.event()
        await reader.event()
        stopping = asyncio.create_task(service.stop())
        await asyncio.sleep(0)
        go.set()
        assert texts(await reader.data()) == " you"
        await stopping


async def test_an_application_starts_twice(framework: str, server: ChatKoreServer) -> None:
    """Each start has a client of its own, as test suites and reloaders ask for."""
    service = Service(None)
    make = fastapi_app if framework == "fastapi" else aiohttp_app
    app = make(service, relaying(), api_key=SECRET, base_url=server.base_url)
    clients = []
    for _ in range(2):
        running = uvicorn_runs(app, service) if framework == "fastapi" else aiohttp_runs(app, service)
        async with running, asking(service) as reader:
            await reader.head()
            assert (await reader.data())[-1] == DONE
            clients.append(service.client)
            assert not service.client.closed
        assert service.client.closed
    assert clients[0] is not clients[1]


# Configuration.


def starting(framework: str, **options: Any) -> Any:
    """Return a context in which an application runs."""
    if framework == "fastapi":
        app = fastapi_app(None, relaying(), **options)
        return app.router.lifespan_context(app)
    return aiohttp_runs(aiohttp_app(None, relaying(), **options), Service(None))


async def test_an_application_without_a_key_does_not_start(framework: str) -> None:
    """It fails when it is started and not at the first request, and not when its module is imported."""
    with pytest.raises(ConfigurationError, match="CHATKORE_API_KEY"):
        async with starting(framework):
            pytest.fail("it runs")


async def test_the_key_may_come_from_the_environment(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read when the application starts."""
    running = starting(framework)
    monkeypatch.setenv("CHATKORE_API_KEY", SECRET)
    async with running:
        pass


@pytest.mark.parametrize("grace", [-1, float("nan")])
def test_a_grace_that_is_no_time(grace: float) -> None:
    """It is refused where it is written."""
    with pytest.raises(ConfigurationError, match="grace must be seconds"):
        aiohttp_web.cleanup_ctx(grace=grace)


async def test_an_option_that_nobody_knows(framework: str) -> None:
    """It is named when the application starts, or when it is written."""
    with pytest.raises(TypeError, match="no_such_option"):
        async with starting(framework, api_key=SECRET, no_such_option=1):
            pytest.fail("it runs")


async def test_the_key_is_in_no_traceback_of_the_start(framework: str) -> None:
    """What error trackers show, locals and all, does not have it."""
    problems = []
    for options in ({"base_url": "ftp://nowhere"}, {"timeout": -1}, {"no_such_option": 1}):
        try:
            async with starting(framework, api_key=SECRET, **options):
                pytest.fail("it runs")
        except (ConfigurationError, TypeError) as problem:
            inner = problem.__traceback__
            while inner is not None and "/chatkore_async/" not in inner.tb_frame.f_code.co_filename:
                inner = inner.tb_next
            told = TracebackException(type(problem), problem, inner, capture_locals=True)
            problems.append("".join(told.format()))
    assert len(problems) == 3
    assert all("Maker" in each or "_set_up" in each or "run" in each for each in problems)
    assert not [each for each in problems if SECRET in each]


async def test_a_service_shows_no_key(framework: str, server: ChatKoreServer) -> None:
    """Its `repr` says where its client asks, and how many streams run."""
    async with starting(framework, api_key=SECRET, base_url=server.base_url):
        pass
    maker = fastapi_.Maker({"api_key": SECRET, "base_url": server.base_url}, 1)
    assert repr(maker) == f"<Maker of a client of {server.base_url}>"
    assert repr(fastapi_.Maker({"api_key": SECRET}, 1)) == "<Maker of a client of the default URL>"
    async with maker.running() as service:
        assert repr(service).startswith("<Service <AsyncChatKore http://127.0.0.1")
        assert repr(service).endswith("<Relays 0 running>>")
        assert SECRET not in repr(service)


# Cancellation.


async def test_a_service_that_goes_on_keeps_nothing_of_a_stream(framework: str, server: ChatKoreServer) -> None:
    """When a response is over, its stream is collected at once, without help of the garbage collector."""
    kept: list[weakref.ref[Any]] = []

    async def handler(asked: Asked) -> Any:
        opened = asked.stream()
        kept.append(weakref.ref(opened))
        return await asked.respond(opened)

    async with serving(framework, handler, server.base_url) as service, connected(service) as reader:
        for _ in range(3):
            await reader.ask()
            await reader.head()
            await reader.body()
    for _ in range(20):
        await asyncio.sleep(0)
    assert [each() for each in kept] == [None] * 3


# uvloop.


def test_it_works_on_uvloop(framework: str) -> None:
    """Relaying, leaving and shutting down are the same on the faster loop."""
    uvloop = pytest.importorskip("uvloop")
    options: dict[str, Any] = {"patience": 1} if framework == "fastapi" else {"grace": 0}

    async def main() -> None:
        async with ChatKoreServer() as server, serving(framework, relaying(), server.base_url, **options) as service:
            async with asking(service) as reader:
                await reader.head()
                assert (await reader.data())[-1] == DONE
            server.script(stream([Stall()]), stream(["Hi", Stall()]), stream(["Hi", Stall()]))
            for number in (1, 2):
                async with asking(service) as reader:
                    await server.wait_for_requests(number + 1, timeout=PATIENCE)
                    if number == 2:
                        await reader.head()
                        await reader.event()
                    reader.leave()
                    assert await server.requests[number].finished(timeout=PATIENCE) == "gone"
            await service.freed()
            async with asking(service) as reader:
                await reader.head()
                await reader.event()
                stopping = asyncio.create_task(service.stop())
                assert b"shutting_down" in (await reader.data())[-1]
                await stopping

    noise.expected.append("timeout graceful shutdown exceeded")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
