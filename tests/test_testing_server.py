"""The loopback server: what it sends, what it notices, and how it ends."""

import asyncio
import gc
import gzip
import io
import socket
import ssl
import zlib
from collections.abc import AsyncIterator
from contextlib import suppress

import aiohttp
import msgspec
import pytest
import trustme

from chatkore_async.testing import (
    ChatKoreServer,
    Cut,
    Hold,
    Pause,
    Ping,
    Raw,
    RecordedRequest,
    Reply,
    Reset,
    Stall,
    completion,
    compressed,
    cut_after,
    error,
    events,
    html,
    json_reply,
    raw,
    reset_after,
    sse,
    stall_after,
    stream,
    tool_call,
)
from chatkore_async.testing._wire import render

ASK: dict[str, object] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
async def server() -> AsyncIterator[ChatKoreServer]:
    async with ChatKoreServer() as server:
        yield server


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


def url(server: ChatKoreServer) -> str:
    return f"{server.base_url}/chat/completions"


def data(body: bytes) -> list[bytes]:
    """The data of each event, comments left out."""
    return [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line.startswith(b"data: ")]


def deltas(body: bytes) -> list[dict[str, object]]:
    chunks = [msgspec.json.decode(each) for each in data(body) if each != b"[DONE]"]
    return [choice["delta"] for chunk in chunks for choice in chunk["choices"]]


async def ask(session: aiohttp.ClientSession, server: ChatKoreServer) -> bytes:
    async with session.post(url(server), json=ASK) as response:
        return await response.read()


async def exchange(server: ChatKoreServer, request: bytes) -> bytes:
    """Send bytes and return all that comes back until the server closes."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


# Replies


async def test_completion_is_openai_shaped(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """A scripted completion has all that a client of the API reads."""
    server.script(completion("Hi there", model="big", system_fingerprint="fp"))
    async with session.post(url(server), json=ASK) as response:
        assert response.content_type == "application/json"
        body = await response.json()
    assert body == {
        "id": "chatcmpl-scripted",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "big",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi there", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
        "system_fingerprint": "fp",
    }


def test_completion_can_be_bent() -> None:
    """Any field of a scripted completion can be replaced, added or left out."""
    plain = msgspec.json.decode(completion("Hi", usage=False, message={"reasoning_content": "Hm"}).body)
    assert "usage" not in plain
    assert plain["choices"][0]["message"]["reasoning_content"] == "Hm"
    assert msgspec.json.decode(completion("Hi", usage={"total_tokens": 1}).body)["usage"] == {"total_tokens": 1}
    assert msgspec.json.decode(completion("Hi", choices=None, id=7).body)["choices"] is None


def test_completion_with_tool_calls() -> None:
    """Tool calls carry their arguments as a JSON string, and change the finish reason unless another was asked for."""
    calls = [tool_call("f", {"a": 1}), tool_call("g"), tool_call("h", '{"torn')]
    choice = msgspec.json.decode(completion(None, tool_calls=calls).body)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == ['{"a":1}', "{}", '{"torn']
    cut = msgspec.json.decode(completion(None, tool_calls=calls, finish_reason="length").body)
    assert cut["choices"][0]["finish_reason"] == "length"


def test_stream_is_one_event_for_each_piece() -> None:
    """A stream says the role, the text word by word, the finish reason, the usage, and that it is done."""
    steps = stream("Hello big world").steps
    assert b"".join(data(b"".join(step for step in steps if isinstance(step, bytes)))[-1:]) == b"[DONE]"
    assert deltas(stream("Hello big world").body) == [
        {"role": "assistant", "content": ""},
        {"content": "Hello"},
        {"content": " big"},
        {"content": " world"},
        {},
    ]
    assert len(steps) == 7
    usage = msgspec.json.decode(data(stream("Hello big world").body)[-2])
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 3


def test_stream_leaves_out_what_it_is_told_to() -> None:
    """A stream can lack its finish reason, its usage and its end, as relays' streams do."""
    body = stream("a", finish_reason=None, usage=False, done=False).body
    assert deltas(body) == [{"role": "assistant", "content": ""}, {"content": "a"}]
    assert len(data(body)) == 2
    last = msgspec.json.decode(data(stream("a", usage={"total_tokens": 9}, done=False, model="big").body)[-1])
    assert (last["usage"], last["model"]) == ({"total_tokens": 9}, "big")


def test_stream_has_its_own_rhythm() -> None:
    """Delays and pings come before the first chunk, and intervals only between pieces."""
    steps = stream("a b", interval=0.5, first_delay=3.0, pings=2, usage=False, done=False).steps
    kinds = [step if not isinstance(step, bytes) else deltas(step)[0].get("content") for step in steps]
    assert kinds == [
        *[Pause(1.0), Ping(), Pause(1.0), Ping(), Pause(1.0)],
        *["", "a", Pause(0.5), " b", None],
    ]
    assert stream("a", pings=1).steps[0] == Ping()


def test_stream_takes_steps_among_its_pieces() -> None:
    """A fault can be put between any two pieces of text."""
    steps = stream(["a", Cut(), "b"], usage=False, done=False).steps
    assert [type(step) for step in steps] == [bytes, bytes, Cut, bytes, bytes]


def test_stream_of_tool_calls() -> None:
    """Tool calls are streamed with the name first and the arguments in fragments; bent ones go out whole."""
    bent: dict[str, object] = {"id": "x", "function": None}
    reply = stream("", tool_calls=[tool_call("f", {"city": "Berlin"}), bent])
    role, first, *fragments, odd, _ = deltas(reply.body)
    assert role == {"role": "assistant", "content": None}
    assert first["tool_calls"] == [
        {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}
    ]
    assert len(fragments) == 2
    assert odd == {"tool_calls": [{"index": 1, "id": "x", "function": None}]}
    assert b'"finish_reason":"tool_calls"' in reply.body
    assert b'"finish_reason":"length"' in stream("", tool_calls=[bent], finish_reason="length").body


def test_events_takes_json_bytes_and_steps() -> None:
    """Arbitrary events: JSON values are encoded, bytes are data as they stand, steps are steps."""
    reply = events({"a": 1}, b"{torn", Ping("wait"), Stall())
    assert reply.steps == (b'data: {"a":1}\n\n', b"data: {torn\n\n", Ping("wait"), Stall(), b"data: [DONE]\n\n")
    assert reply.body == b'data: {"a":1}\n\ndata: {torn\n\n: wait\n\ndata: [DONE]\n\n'
    assert events(done=False).steps == ()


@pytest.mark.parametrize(
    "status, kind",
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (429, "rate_limit_error"),
        (503, "server_error"),
    ],
)
def test_error_has_the_type_of_its_status(status: int, kind: str) -> None:
    """A scripted error has the type that vendors give its status, unless told otherwise."""
    assert msgspec.json.decode(error(status, "No", code="c", param="p").body) == {
        "error": {"message": "No", "type": kind, "param": "p", "code": "c"}
    }
    assert msgspec.json.decode(error(status, type="one_api_error").body)["error"]["type"] == "one_api_error"


async def test_error_with_a_body_of_its_own(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """An error can be any body, down to none at all and without a content type."""
    server.script(
        error(429, body=b""),
        error(500, body=b"oops", headers={"content-type": "text/plain"}),
        error(400, body={"detail": "no"}),
    )
    async with session.post(url(server), json=ASK) as response:
        assert (response.status, "content-type" in response.headers, await response.read()) == (429, False, b"")
    async with session.post(url(server), json=ASK) as response:
        assert (response.status, response.content_type, await response.read()) == (500, "text/plain", b"oops")
    async with session.post(url(server), json=ASK) as response:
        assert (response.status, await response.json()) == (400, {"detail": "no"})


async def test_html_is_a_proxy_page(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """A proxy's page has its title, escaped, and the content type that goes with it."""
    server.script(html(502, "502 <Bad> Gateway"))
    async with session.post(url(server), json=ASK) as response:
        assert (response.status, response.content_type) == (502, "text/html")
        assert "<title>502 &lt;Bad&gt; Gateway</title>" in await response.text()


async def test_headers_of_the_script_win(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """A header of the script replaces the usual one, whatever its case, and may come twice."""
    server.script(json_reply([], headers=[("content-type", "text/x"), ("a", "1"), ("A", "2")]), Reply(status=599))
    async with session.post(url(server), json=ASK) as response:
        assert response.headers.getall("Content-Type") == ["text/x"]
        assert response.headers.getall("A") == ["1", "2"]
    async with session.post(url(server), json=ASK) as response:
        assert (response.status, response.reason, await response.read()) == (599, "", b"")


def test_something_that_is_no_step_is_refused() -> None:
    """A text among the steps is a mistake that is told at once, not on the wire."""
    with pytest.raises(TypeError, match="not 'text'"):
        Reply(steps=("text",))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a step is bytes"):
        raw(b"", None)  # type: ignore[arg-type]


def test_reprs_tell_what_will_happen() -> None:
    """A reply in a failing assertion shows its status, its size and its faults, not its bytes."""
    assert repr(cut_after(completion("x" * 1000), 9)) == "<Reply 200 application/json: 2 steps, 9 bytes, Cut>"
    assert repr(raw(b"HTTP", Stall())) == "<Raw: 2 steps, 4 bytes, Stall>"
    assert repr(Reply()) == "<Reply 200 without content type: 0 steps, 0 bytes>"


async def test_something_that_is_no_reply_is_refused(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """A text in place of a reply is a mistake that is told where it was made."""
    with pytest.raises(TypeError, match=r"made by completion\(\), .* not 'Hi'"):
        server.script("Hi")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not 'Hi'"):
        server.always("Hi")  # type: ignore[arg-type]
    server.respond_with(lambda _: "Hi")  # type: ignore[arg-type, return-value]
    assert b"not 'Hi'" in await ask(session, server)
    server.clear()


# Framing


@pytest.mark.parametrize(
    "reply, expected",
    [
        (Reply(steps=(b"ab",)), b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab"),
        (Reply(steps=(b"a", b"", b"b")), b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n1\r\nb\r\n0\r\n\r\n"),
        (Reply(steps=(Ping("x"),)), b"Transfer-Encoding: chunked\r\n\r\n5\r\n: x\n\n\r\n0\r\n\r\n"),
        (Reply(steps=(b"a", b"b"), framing="length"), b"Content-Length: 2\r\n\r\nab"),
        (Reply(steps=(b"a",), framing="close"), b"200 OK\r\nConnection: close\r\n\r\na"),
        (Reply(headers=(("Content-Length", "9"),), steps=(b"a",)), b"OK\r\nContent-Length: 9\r\n\r\na"),
        (
            Reply(headers=(("Transfer-Encoding", "chunked"),), steps=(b"zz",)),
            b"OK\r\nTransfer-Encoding: chunked\r\n\r\nzz",
        ),
        (Reply(status=204), b"HTTP/1.1 204 No Content\r\n\r\n"),
        (Reply(status=102), b"HTTP/1.1 102 Processing\r\n\r\n"),
    ],
)
def test_framing_is_what_the_reply_says(reply: Reply, expected: bytes) -> None:
    """The body is framed by length, by chunks or by the end of the connection, or exactly as the headers claim."""
    assert b"".join(step for step in render(reply).steps if isinstance(step, bytes)).endswith(expected)


async def test_close_delimited_body_ends_with_the_connection(
    server: ChatKoreServer, session: aiohttp.ClientSession
) -> None:
    """A body without a length is whole when the server closes, and its connection is not used again."""
    server.script(sse(b"data: 1\n\n", b"data: 2\n\n", framing="close"), completion(headers={"connection": "close"}))
    assert await ask(session, server) == b"data: 1\n\ndata: 2\n\n"
    await ask(session, server)
    await ask(session, server)
    assert [request.connection for request in server.requests] == [1, 2, 3]


async def test_http10_clients_get_no_chunks(server: ChatKoreServer) -> None:
    """A client that speaks HTTP/1.0 gets a stream that ends where the connection does."""
    server.script(events(1, 2))
    answer = await exchange(server, b"POST /v1/chat/completions HTTP/1.0\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Connection: close" in head
    assert b"Transfer-Encoding" not in head
    assert body == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"


async def test_a_client_that_wants_to_close_is_closed(server: ChatKoreServer) -> None:
    """The server closes after the answer where the client asked for that."""
    answer = await exchange(server, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert b"Connection: close" in answer


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_compressed_streams_are_readable_step_by_step(
    server: ChatKoreServer, session: aiohttp.ClientSession, encoding: str
) -> None:
    """A compressed stream can be decoded as far as it has come."""
    event = asyncio.Event()
    reply = stream(["first", Hold(event), "second"], pings=1)
    server.script(compressed(reply, "gzip" if encoding == "gzip" else "deflate"))
    async with session.post(url(server), json=ASK) as response:
        assert response.headers["Content-Encoding"] == encoding
        body = b""
        while b"first" not in body:
            body += await response.content.readany()
        assert b"second" not in body
        event.set()
        assert body + await response.content.read() == reply.body


def test_compressed_bodies_keep_their_framing() -> None:
    """A compressed completion still has a length, and a body that ends in a fault is compressed up to it."""
    reply = compressed(completion("Hi"))
    assert len(reply.steps) == 1
    assert gzip.decompress(reply.body) == completion("Hi").body
    broken = compressed(sse(b"ab", Stall()), "deflate")
    assert broken.steps[1] == Stall()
    assert zlib.decompress(broken.body) == b"ab"
    with pytest.raises(ValueError, match="compress first, then cut"):
        compressed(cut_after(completion(), 3))


# Faults


async def test_hold_gives_a_test_its_rhythm(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """What comes after a hold is not sent before the test lets go."""
    event = asyncio.Event()
    server.script(sse(b"data: 1\n\n", Hold(event), b"data: 2\n\n"))
    async with session.post(url(server), json=ASK) as response:
        assert await response.content.readany() == b"data: 1\n\n"
        assert server.requests[0].outcome is None
        event.set()
        assert await response.content.read() == b"data: 2\n\n"
    assert await server.requests[0].finished() == "answered"


async def test_pauses_and_latency_pass(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """Pauses delay the rest of an answer, latency its head."""
    server.script(sse(b"a", Pause(0.001), b"b", latency=0.001))
    assert await ask(session, server) == b"ab"
    seconds = asyncio.get_running_loop().time() - server.requests[0].received_at
    assert seconds > 0.0019


@pytest.mark.parametrize("size", [0, 1, 100])
async def test_cut_ends_a_body_early(server: ChatKoreServer, session: aiohttp.ClientSession, size: int) -> None:
    """A cut after n bytes sends the head, n bytes, and the end of the connection, whatever the framing."""
    for reply in (completion("x" * 100), stream("a b c", pings=1), sse(b"x" * 200, framing="length")):
        server.script(cut_after(reply, size))
        async with session.post(url(server), json=ASK) as response:
            assert response.status == 200
            body = b""
            with pytest.raises(aiohttp.ClientPayloadError):
                while True:
                    body += await response.content.readany()
            assert body == reply.body[:size]
        assert server.requests[-1].outcome == "cut"
    await asyncio.gather(*(connection.closed() for connection in server.connections))


async def test_cut_after_the_whole_body(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """A cut after the last byte takes only the terminating chunk."""
    server.script(cut_after(events(1, done=False), 10_000))
    async with session.post(url(server), json=ASK) as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def test_cut_of_a_lying_length(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """A fault leaves a length alone that the script announced itself."""
    server.script(cut_after(Reply(headers=(("Content-Length", "1"),), steps=(b"abc",)), 1))
    assert await ask(session, server) == b"a"


@pytest.mark.parametrize("fault", [cut_after, reset_after, stall_after])
def test_faults_count_from_zero(fault: object) -> None:
    """A fault before the start of a body is a mistake."""
    assert callable(fault)
    with pytest.raises(ValueError, match="0 bytes or more, not -1"):
        fault(completion(), -1)


async def test_reset_reaches_the_client_as_one(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """A reset is an error of the connection, after the bytes that were sent before it."""
    server.script(reset_after(completion("x" * 100), 50))
    async with session.post(url(server), json=ASK) as response:
        assert await response.content.readexactly(50)
        with pytest.raises(aiohttp.ClientPayloadError, match="reset by peer"):
            await response.read()
    assert server.requests[0].outcome == "cut"


async def test_reset_after_a_large_body_loses_nothing_of_ours(server: ChatKoreServer) -> None:
    """A reset waits until the bytes before it have left the server's own buffer."""
    size = 16 * 2**20
    server.script(raw(b"x" * size, Reset()))
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n\r\n")
    received = 0
    with pytest.raises(ConnectionResetError):
        while True:
            received += len(await reader.readexactly(2**16))
    writer.close()
    # The last buffers of the operating system may be lost with the connection, as on any network.
    assert received > size / 2


async def test_reset_before_the_status_line(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """A connection can break before a byte of the answer: the case in which nobody knows whether it was billed."""
    server.script(raw(Reset()), raw(Cut()))
    with pytest.raises(aiohttp.ClientOSError):
        await ask(session, server)
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await ask(session, server)
    assert [request.outcome for request in server.requests] == ["cut", "cut"]


async def test_stall_lasts_until_the_client_leaves(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """A stalled answer stays open, and is over as soon as its client is gone."""
    server.script(stall_after(completion("Hello"), 5))
    async with session.post(url(server), json=ASK) as response:
        assert await response.content.readexactly(5)
        assert server.requests[0].outcome is None
        assert server.connections[0].open
    assert await server.requests[0].finished() == "gone"
    await server.connections[0].closed()


async def test_pings_are_comments(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """A ping is an event stream's comment, also where the script writes the head itself."""
    server.script(sse(Ping(), Ping("keep-alive")), raw(b"HTTP/1.1 200 OK\r\n\r\n", Ping()))
    assert await ask(session, server) == b": PING\n\n: keep-alive\n\n"
    assert await ask(session, server) == b": PING\n\n"


async def test_raw_is_everything_on_the_wire(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """Garbage, a head that comes byte by byte and an HTTP/1.0 answer reach the client as scripted."""
    event = asyncio.Event()
    server.script(
        raw(b"\x16\x03garbage\r\n\r\n"),
        raw(b"HTTP/1.1 2", Hold(event), b"00 Fine\r\nContent-", Pause(0), b"Length: 2\r\n\r\nok", keep_alive=True),
        raw(b"HTTP/1.0 200 OK\r\n\r\nold"),
        cut_after(raw(b"HTTP/1.1 200 OK\r\n\r\nHello"), 7),
    )
    with pytest.raises(aiohttp.ClientError):
        await ask(session, server)
    task = asyncio.create_task(ask(session, server))
    await server.wait_for_requests(2)
    event.set()
    assert await task == b"ok"
    assert await ask(session, server) == b"old"
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await ask(session, server)
    assert [request.connection for request in server.requests] == [1, 2, 2, 3]
    assert [request.outcome for request in server.requests] == ["answered", "answered", "answered", "cut"]
    assert isinstance(raw(b""), Raw)


# What it answers


async def test_scripts_are_used_up_in_order(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """Replies are used in the order they were scripted, then one for always, then the server's own."""
    server.script(completion("one"))
    server.script(completion("two"))
    server.always(completion("always"))
    assert "2 replies scripted" in repr(server)
    texts = [msgspec.json.decode(await ask(session, server))["choices"][0]["message"]["content"] for _ in range(4)]
    assert texts == ["one", "two", "always", "always"]
    server.always(None)
    assert b"You wrote" in await ask(session, server)


async def test_a_function_may_answer(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """A function, plain or async, answers what it likes by the request, and leaves the rest to the server."""

    def respond(request: RecordedRequest) -> Reply | None:
        return completion("function") if request.query.get("mine") else None

    async def respond_later(request: RecordedRequest) -> Reply | None:
        return error(500, body={"path": request.path})

    server.respond_with(respond)
    async with session.post(url(server), params={"mine": "1"}, json=ASK) as response:
        assert "function" in await response.text()
    assert b"You wrote" in await ask(session, server)
    server.respond_with(respond_later)
    async with session.get(f"{server.base_url}/models") as response:
        assert await response.json() == {"path": "/v1/models"}
    server.respond_with(None)
    async with session.get(f"{server.base_url}/models") as response:
        assert response.status == 200


async def test_a_failing_function_fails_the_test(session: aiohttp.ClientSession) -> None:
    """What a responder raises is answered with a 500 not to be retried, and raised where the server's block ends."""

    def respond(request: RecordedRequest) -> Reply:
        raise AssertionError(f"unexpected {request.method}")

    with pytest.raises(AssertionError, match="unexpected POST"):
        async with ChatKoreServer(handler=respond) as server:
            async with session.post(url(server), json=ASK) as response:
                assert response.status == 500
                assert response.headers["x-should-retry"] == "false"
            assert b"unexpected POST" in await ask(session, server)

    with pytest.raises(KeyError):
        async with ChatKoreServer(handler=respond) as server:
            await ask(session, server)
            raise KeyError


async def test_models_are_listed(session: aiohttp.ClientSession) -> None:
    """The models given are listed under any prefix."""
    async with ChatKoreServer(models=["a", "b"]) as server:
        for path in ("/v1/models", "/models/", "/proxy/openai/v1/models"):
            async with session.get(f"http://{server.host}:{server.port}{path}") as response:
                assert [model["id"] for model in (await response.json())["data"]] == ["a", "b"]


async def test_any_prefix_leads_to_completions(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """Completions are served under any prefix, with or without a slash behind."""
    for path in ("/chat/completions", "/v1/chat/completions/", "/proxy/openai/v1/chat/completions"):
        async with session.post(f"http://{server.host}:{server.port}{path}", json=ASK) as response:
            assert response.status == 200


@pytest.mark.parametrize("method, path", [("GET", "/v1/chat/completions"), ("POST", "/v1/nothing")])
async def test_elsewhere_is_404(server: ChatKoreServer, session: aiohttp.ClientSession, method: str, path: str) -> None:
    """Another method or path is a 404 in OpenAI's shape that names what was asked for."""
    async with session.request(method, f"http://{server.host}:{server.port}{path}") as response:
        assert response.status == 404
        assert (await response.json())["error"]["message"] == f"Invalid URL ({method} {path})"


async def test_head_has_no_body(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """An answer to HEAD leaves the connection usable."""
    for _ in range(2):
        async with session.head(server.base_url) as response:
            assert response.status == 404
    assert len(server.connections) == 1


async def test_the_key_is_checked(session: aiohttp.ClientSession) -> None:
    """With a key given, a wrong or missing bearer token is a 401 that does not repeat it, and uses up no script."""
    async with ChatKoreServer(api_key="sk-right") as server:
        server.script(completion())
        for headers, expected in (({}, "provide"), ({"Authorization": "Bearer sk-wrong"}, "Incorrect")):
            async with session.post(url(server), json=ASK, headers=headers) as response:
                assert response.status == 401
                message = (await response.json())["error"]["message"]
                assert expected in message
                assert "sk-wrong" not in message
        async with session.post(url(server), json=ASK, headers={"Authorization": "Bearer sk-right"}) as response:
            assert response.status == 200


async def test_latency_of_its_own_answers(session: aiohttp.ClientSession) -> None:
    """The server's own completions come after its latency."""
    async with ChatKoreServer(latency=0.002) as server:
        await ask(session, server)
        assert asyncio.get_running_loop().time() - server.requests[0].received_at > 0.0019


async def test_bodies_have_a_generous_limit(session: aiohttp.ClientSession) -> None:
    """A body above the limit is a 413, one of several MB is nothing special."""
    big = io.BytesIO(msgspec.json.encode({**ASK, "metadata": "x" * 2**22}))
    async with ChatKoreServer() as server, session.post(url(server), data=big) as response:
        assert response.status == 200
    async with (
        ChatKoreServer(max_body_size=1000) as server,
        session.post(url(server), json={**ASK, "metadata": "x" * 1000}) as response,
    ):
        assert response.status == 413
        assert "1000 bytes" in (await response.json())["error"]["message"]
        assert server.request_count == 0


async def test_bodies_are_remembered_as_sent(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """A compressed body is not decompressed behind the test's back, and is no JSON."""
    body = gzip.compress(msgspec.json.encode(ASK))
    async with session.post(url(server), data=body, headers={"Content-Encoding": "gzip"}) as response:
        assert response.status == 400
    assert server.requests[0].body == body
    with pytest.raises(msgspec.DecodeError):
        _ = server.requests[0].json


async def test_a_client_may_wait_for_100_continue(server: ChatKoreServer) -> None:
    """A client that announces its body first, as curl does with large ones, is told to go on."""
    body = msgspec.json.encode(ASK)
    reader, writer = await asyncio.open_connection(server.host, server.port)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode())
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
    writer.close()
    await writer.wait_closed()


async def test_https(session: aiohttp.ClientSession) -> None:
    """With a context the server speaks https, faults included."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)  # pyright: ignore[reportUnknownMemberType]
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)  # pyright: ignore[reportUnknownMemberType]
    async with ChatKoreServer(ssl=context) as server:
        assert server.base_url.startswith("https://127.0.0.1:")
        server.script(completion("safe"), reset_after(completion("safe"), 9), stall_after(completion(), 9))
        async with session.post(url(server), json=ASK, ssl=trusting) as response:
            assert "safe" in await response.text()
        async with session.post(url(server), json=ASK, ssl=trusting) as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        stalled = await session.post(url(server), json=ASK, ssl=trusting)
    assert server.requests[-1].outcome == "cut"
    stalled.close()


# What it saw


async def test_requests_are_remembered(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """A request is remembered with all that it said, and with the connection that brought it."""
    async with session.post(f"{url(server)}?a=%20b", json=ASK, headers={"X-Trace": "1"}) as response:
        await response.read()
    (request,) = server.requests
    assert (request.method, request.path, request.query["a"]) == ("POST", "/v1/chat/completions", " b")
    assert request.headers["x-trace"] == "1"
    assert request.body == msgspec.json.encode(ASK) or request.json == ASK
    assert request.json["model"] == "m"
    assert repr(request) == (
        f"<RecordedRequest POST /v1/chat/completions {len(request.body)} bytes, connection 1: answered>"
    )
    (connection,) = server.connections
    assert repr(connection) == "<RecordedConnection 1 open, 1 requests, 0 running>"


async def test_waiting_for_requests(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """A test can wait until so many requests have arrived, and is told how many there were when it waited in vain."""
    event = asyncio.Event()
    server.always(sse(Hold(event)))
    tasks = [asyncio.create_task(ask(session, server)) for _ in range(3)]
    await asyncio.gather(server.wait_for_requests(1), server.wait_for_requests(3), server.wait_for_requests(2))
    await server.wait_for_requests(3)
    assert repr(server).endswith("/v1 3 connections, 3 requests>")
    with pytest.raises(TimeoutError, match=r"3 of 4 requests after 0 s: <ChatKoreServer"):
        await server.wait_for_requests(4, timeout=0)
    with pytest.raises(TimeoutError, match=r"after 0 s still <RecordedRequest .*: running>"):
        await server.requests[0].finished(timeout=0)
    with pytest.raises(TimeoutError, match="after 0 s still <RecordedConnection 1 open"):
        await server.connections[0].closed(timeout=0)
    waiting = [asyncio.create_task(server.wait_for_requests(4)) for _ in range(2)]
    tasks += [asyncio.create_task(ask(session, server)) for _ in range(2)]
    await asyncio.gather(*waiting)
    event.set()
    await asyncio.gather(*tasks)


async def test_two_arrivals_in_one_turn_wake_a_waiter_once(server: ChatKoreServer) -> None:
    """Requests that arrive together wake those who wait for the first of them once."""
    waiting = asyncio.create_task(server.wait_for_requests(1))
    requests = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    connections = [await asyncio.open_connection(server.host, server.port) for _ in range(20)]
    for _, writer in connections:
        writer.write(requests)
    await waiting
    await server.wait_for_requests(20)
    for _, writer in connections:
        writer.close()
        await writer.wait_closed()


async def test_nothing_need_be_remembered(session: aiohttp.ClientSession) -> None:
    """Without recording nothing is kept but the count, so that a benchmark may run for long."""
    async with ChatKoreServer(record=False) as server:
        await ask(session, server)
        await server.wait_for_requests(1)
        assert (server.requests, server.connections, server.request_count) == ([], [], 1)


async def test_clear_forgets(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """After clear() the server is as new, but for the connections that are open."""
    server.script(completion(headers={"connection": "close"}))
    for _ in range(2):
        await ask(session, server)
    await server.connections[0].closed()
    server.script(error(500))
    server.always(error(500))
    server.respond_with(lambda _: error(500))
    server.clear()
    assert (server.requests, server.request_count) == ([], 0)
    assert [connection.number for connection in server.connections] == [2]
    assert b"You wrote" in await ask(session, server)


async def test_idle_connections_can_be_dropped(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """Idle connections can be closed at a moment of the test's choosing; busy ones stay."""
    event = asyncio.Event()
    server.script(completion(), sse(Hold(event)))
    await ask(session, server)
    async with aiohttp.ClientSession() as other:
        task = asyncio.create_task(ask(other, server))
        await server.wait_for_requests(2)
        assert server.drop_idle_connections() == 1
        await server.connections[0].closed()
        assert server.connections[1].open
        event.set()
        await task
    await ask(session, server)
    assert server.requests[-1].connection == 3


async def test_idle_connections_end_by_themselves(session: aiohttp.ClientSession) -> None:
    """The server closes a connection that is idle for longer than it keeps them alive."""
    async with ChatKoreServer(keepalive=0.01) as server:
        # On a busy machine a connection may count as idle before its request comes.
        with suppress(aiohttp.ClientError):
            await ask(session, server)
        await server.connections[0].closed()


# Clients that leave


@pytest.mark.parametrize("step", [Hold(asyncio.Event()), Pause(3600), Stall()])
async def test_a_client_that_leaves_is_noticed_at_once(
    server: ChatKoreServer, session: aiohttp.ClientSession, step: Hold | Pause | Stall
) -> None:
    """Whatever the script is waiting for, it ends when the client leaves."""
    server.script(sse(b"data: 1\n\n", step, b"data: 2\n\n"))
    response = await session.post(url(server), json=ASK)
    await response.content.readany()
    response.close()
    assert await server.requests[0].finished() == "gone"
    await server.connections[0].closed()


async def test_a_client_that_leaves_before_the_answer(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """A client may leave while the status line is still to come."""
    server.script(completion(latency=3600))
    task = asyncio.create_task(ask(session, server))
    await server.wait_for_requests(1)
    task.cancel()
    assert await server.requests[0].finished() == "gone"


async def test_a_client_that_leaves_mid_request(server: ChatKoreServer) -> None:
    """A client may leave before its body is there; that request has an outcome, but does not count as arrived."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 99\r\n\r\n{"
    )
    await reader.readline()
    writer.close()
    await writer.wait_closed()
    await server.connections[0].closed()
    (request,) = server.requests
    assert await request.finished() == "gone"
    assert (request.body, server.request_count) == (b"", 0)


async def test_a_client_that_does_not_read(server: ChatKoreServer) -> None:
    """An answer too large for the buffers waits for its reader, and ends when that leaves instead."""
    server.script(raw(b"x" * 2**26, b"y"))
    reader, writer = await asyncio.open_connection(server.host, server.port, limit=1)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readexactly(1)
    assert server.requests[0].outcome is None
    writer.transport.abort()
    assert await server.requests[0].finished() == "gone"


async def test_a_responder_that_will_not_be_cancelled(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """A reply for a client that has left in the meantime goes nowhere, quietly."""

    async def respond(request: RecordedRequest) -> Reply:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            return completion(request.path)
        raise AssertionError

    server.respond_with(respond)
    task = asyncio.create_task(ask(session, server))
    await server.wait_for_requests(1)
    task.cancel()
    assert await server.requests[0].finished() == "gone"


# The server's life


async def test_starting_twice_is_an_error(server: ChatKoreServer) -> None:
    """A server that runs cannot be started, and says what to do instead."""
    with pytest.raises(RuntimeError, match=r"<ChatKoreServer .*> is running: start it once, or close it first"):
        await server.start()


async def test_a_server_without_a_port_says_so() -> None:
    """The address of a server that was never started is an error that tells how to start it."""
    server = ChatKoreServer()
    assert repr(server) == "<ChatKoreServer without a port closed, 0 requests>"
    with pytest.raises(RuntimeError, match="async with ChatKoreServer"):
        _ = server.base_url
    assert server.drop_idle_connections() == 0
    await server.close()


async def test_a_taken_port_leaves_the_server_startable(server: ChatKoreServer) -> None:
    """A server that could not have its port can be started once the port is free."""
    second = ChatKoreServer(port=server.port)
    with pytest.raises(OSError, match="address already in use"):
        await second.start()
    await server.close()
    async with second:
        assert second.port == server.port


async def test_a_server_may_come_back(session: aiohttp.ClientSession) -> None:
    """An outage: closed, the server refuses connections at its address; started again, it is at the same one."""
    server = ChatKoreServer()
    await server.start()
    await ask(session, server)
    await server.close()
    await server.close()
    with pytest.raises(aiohttp.ClientConnectorError):
        await ask(session, server)
    assert "closed" in repr(server)
    async with server:
        await ask(session, server)
    assert [request.connection for request in server.requests] == [1, 2]


async def test_ipv6_addresses_are_bracketed(session: aiohttp.ClientSession) -> None:
    """A server on an IPv6 address has a base URL that a client can use."""
    async with ChatKoreServer(host="::1") as server:
        assert server.base_url == f"http://[::1]:{server.port}/v1"
        await ask(session, server)


async def test_closing_with_500_open_streams_is_quick(session: aiohttp.ClientSession) -> None:
    """Closing drops streams, stalls and holds at once, and leaves no task and no connection behind."""
    before = asyncio.all_tasks()
    server = ChatKoreServer()
    await server.start()
    server.always(sse(b"data: 1\n\n", Hold(asyncio.Event())))
    responses = await asyncio.gather(*(session.post(url(server), json=ASK) for _ in range(500)))
    idle = await asyncio.open_connection(server.host, server.port)
    loop = asyncio.get_running_loop()
    started = loop.time()
    await server.close()
    assert loop.time() - started < 1.0
    assert {request.outcome for request in server.requests} == {"cut"}
    assert not any(connection.open for connection in server.connections)
    assert asyncio.all_tasks() == before
    for response in responses:
        response.close()
    idle[1].close()
    gc.collect()


@pytest.mark.parametrize("turns", range(6))
async def test_connections_that_arrive_as_it_closes(server: ChatKoreServer, turns: int) -> None:
    """A connection is dropped too that is at any stage of being accepted when the server closes."""
    before = asyncio.all_tasks()
    with socket.create_connection((server.host, server.port)) as connection:
        for _ in range(turns):
            await asyncio.sleep(0)
        await server.close()
        assert asyncio.all_tasks() == before
        connection.settimeout(5)
        try:
            assert connection.recv(1) == b""
        except ConnectionResetError:
            # It was still in the queue of the operating system.
            assert server.connections == []


async def test_2000_requests_at_once(server: ChatKoreServer, session: aiohttp.ClientSession) -> None:
    """Thousands of connections opened at once are all served."""
    event = asyncio.Event()
    server.always(sse(b"data: 1\n\n", Hold(event), b"data: 2\n\n"))
    tasks = [asyncio.create_task(ask(session, server)) for _ in range(2000)]
    await server.wait_for_requests(2000, timeout=60)
    assert len(server.connections) == 2000
    event.set()
    assert set(await asyncio.gather(*tasks)) == {b"data: 1\n\ndata: 2\n\n"}
    assert {request.outcome for request in server.requests} == {"answered"}
