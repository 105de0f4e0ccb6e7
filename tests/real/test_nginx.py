"""The client behind nginx: its own pages, its limits, its buffers, and the ways it ends connections."""

import asyncio

import msgspec
import pytest
from asking import ASK, ask, attempts, both_ways
from proxies import PATIENCE, Certificate, Start

from chatkore_async import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    InternalServerError,
    InvalidResponseError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestTooLargeError,
    RetryPolicy,
    StreamInterruptedError,
    Timeout,
)
from chatkore_async.testing import (
    ChatKoreServer,
    Cut,
    Hold,
    Stall,
    completion,
    cut_after,
    raw,
    reset_after,
    sse,
    stream,
)

pytestmark = pytest.mark.real

HTTP11 = 'proxy_http_version 1.1; proxy_set_header Connection "";'
"""What lets nginx keep its connections to a relay; without it each answer ends with one."""

GZIP = "gzip on; gzip_types *; gzip_min_length 0; gzip_http_version 1.0; gzip_proxied any;"


# Its own pages.


@pytest.mark.parametrize(
    "status,kind,title,tries",
    [
        (400, BadRequestError, "400 Bad Request", 1),
        (401, AuthenticationError, "401 Authorization Required", 1),
        (403, PermissionDeniedError, "403 Forbidden", 1),
        (404, NotFoundError, "404 Not Found", 1),
        (405, APIStatusError, "405 Not Allowed", 1),
        (429, RateLimitError, "429 Too Many Requests", 3),
        (500, InternalServerError, "500 Internal Server Error", 3),
        (502, InternalServerError, "502 Bad Gateway", 3),
        (503, InternalServerError, "503 Service Temporarily Unavailable", 3),
        (504, InternalServerError, "504 Gateway Time-out", 2),
        (507, InternalServerError, "507 Insufficient Storage", 3),
    ],
)
@both_ways
async def test_a_page_of_nginx(
    nginx: Start, server: ChatKoreServer, way: str, *, status: int, kind: type[APIStatusError], title: str, tries: int
) -> None:
    """A page of nginx's own is the error of its status with the page's title in its one line, retried by the status."""
    client = (await nginx(location=f"return {status};")).client()
    with pytest.raises(kind) as caught:
        await ask(client, way)
    assert type(caught.value) is kind
    assert title in caught.value.message
    assert "<" not in str(caught.value)
    assert "<center>nginx" in str(caught.value.body)
    assert attempts(caught.value) == [status] * tries
    assert server.connections == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@both_ways
async def test_a_redirect_to_https(nginx: Start, server: ChatKoreServer, way: str, status: int) -> None:
    """`return 301 https://…`, as nginx sends http away, is an error that names the goal and is not tried again."""
    client = (await nginx(location=f"return {status} https://relay.example$request_uri;")).client()
    with pytest.raises(APIStatusError) as caught:
        await ask(client, way)
    assert caught.value.status_code == status
    assert "https://relay.example/v1/chat/completions" in str(caught.value)
    assert attempts(caught.value) == [status]
    assert server.connections == []


@both_ways
async def test_the_welcome_page(nginx: Start, way: str) -> None:
    """A web page with status 200, as a fresh nginx has one for every path, points at `base_url`."""
    page = "default_type text/html; return 200 '<!DOCTYPE html><html><title>Welcome to nginx!</title></html>';"
    client = (await nginx(location=page)).client()
    with pytest.raises(InvalidResponseError, match=r"web page \(Welcome to nginx!\)") as caught:
        await ask(client, way)
    assert caught.value.hint is not None
    assert "base_url" in caught.value.hint
    assert attempts(caught.value) == [200]


async def test_http_to_the_port_of_https(nginx: Start, server: ChatKoreServer, certificate: Certificate) -> None:
    """Plain http to nginx's port of https is a `BadRequestError` that says so."""
    proxy = await nginx(tls=certificate)
    client = proxy.client(base_url=proxy.base_url.replace("https", "http"))
    with pytest.raises(BadRequestError, match="The plain HTTP request was sent to HTTPS port") as caught:
        await ask(client, "create")
    assert attempts(caught.value) == [400]
    assert server.connections == []


async def test_a_header_that_nginx_does_not_take(nginx: Start, server: ChatKoreServer) -> None:
    """A header that is too large for nginx is a `BadRequestError` that says so."""
    client = (await nginx()).client()
    with pytest.raises(BadRequestError, match="400 Request Header Or Cookie Too Large") as caught:
        await ask(client, "create", extra_headers={"X-Policy": "p" * 40_000})
    assert attempts(caught.value) == [400]
    assert server.connections == []
    assert attempts(await ask(client, "create")) == [200]


@pytest.mark.parametrize("size", [2_000, 200_000, 3_000_000, 20_000_000])
@both_ways
async def test_a_prompt_that_is_too_large(nginx: Start, server: ChatKoreServer, way: str, size: int) -> None:
    """A prompt above `client_max_body_size` is a `RequestTooLargeError`, also where nginx answers while it is sent."""
    client = (await nginx(location="client_max_body_size 1k;")).client()
    question = [{"role": "user", "content": "x" * size}]
    with pytest.raises(RequestTooLargeError, match="413 Request Entity Too Large") as caught:
        if way == "create":
            await client.chat.completions.create(model="m", messages=question)
        else:
            await client.chat.completions.stream(model="m", messages=question).open()
    assert attempts(caught.value) == [413]
    assert server.connections == []
    assert attempts(await ask(client, way)) == [200]


# Its limits.


LIMIT = "limit_req_zone $remote_addr zone=each:1m rate={}; limit_req_status 429;"


@both_ways
async def test_a_rate_limit(nginx: Start, server: ChatKoreServer, way: str) -> None:
    """`limit_req` is a `RateLimitError` once the retries are used up; nginx says no time to wait, so none is kept."""
    client = (await nginx(http=LIMIT.format("1r/m"), location="limit_req zone=each;")).client()
    await ask(client, way)
    with pytest.raises(RateLimitError, match="429 Too Many Requests") as caught:
        await ask(client, way)
    assert attempts(caught.value) == [429] * 3
    assert caught.value.retry_after is None
    assert server.request_count == 1


@both_ways
async def test_a_rate_limit_that_passes(nginx: Start, server: ChatKoreServer, way: str) -> None:
    """A call that `limit_req` refused succeeds by its retries as soon as the limit lets it through."""
    proxy = await nginx(http=LIMIT.format("2r/s"), location="limit_req zone=each;")
    client = proxy.client(retry=RetryPolicy(max_retries=1000, initial_delay=0.05, max_delay=0.05))
    await ask(client, way)
    *refused, passed = attempts(await ask(client, way))
    assert set(refused) == {429}
    assert passed == 200
    assert server.request_count == 2


# Its buffers.


async def test_a_buffer_keeps_the_first_token(nginx: Start, server: ChatKoreServer) -> None:
    """With `proxy_buffering on` no delta comes before the end: the first token's time passes, and says so."""
    client = (await nginx(buffering=True)).client()
    server.always(stream(["Hel", Stall()]))
    with pytest.raises(APITimeoutError) as caught:
        await ask(client, "stream", timeout=Timeout(first_token=0.5), max_retries=0)
    assert caught.value.phase == "first_token"
    assert caught.value.partial is None
    assert await server.requests[0].finished(timeout=PATIENCE) == "gone"


async def test_a_relay_that_wants_no_buffer(nginx: Start, server: ChatKoreServer) -> None:
    """A relay that sends `X-Accel-Buffering: no` gets its deltas through a buffering nginx one by one."""
    client = (await nginx(buffering=True)).client()
    seen = asyncio.Event()
    server.always(stream(["Hel", Hold(seen), "lo"], headers={"X-Accel-Buffering": "no"}))
    async with client.chat.completions.stream(**ASK) as answer:
        seen.set()  # the block is entered with the first delta
        assert (await answer.get_final_completion()).text == "Hello"


@pytest.mark.parametrize(
    "options",
    [
        {"buffering": True},
        {"buffering": True, "location": HTTP11},
        {"buffering": True, "location": GZIP},
        {"location": GZIP},
        {"location": HTTP11 + GZIP},
        {"location": "proxy_buffer_size 1k;"},
        {"location": "proxy_buffer_size 1k; chunked_transfer_encoding off;"},
        {"buffering": True, "location": "proxy_buffer_size 1k; proxy_buffers 4 1k; proxy_busy_buffers_size 2k;"},
    ],
    ids=["buffer", "buffer-1.1", "buffer-gzip", "gzip", "gzip-1.1", "small", "small-close", "small-buffers"],
)
async def test_a_buffer_loses_nothing(nginx: Start, server: ChatKoreServer, options: dict[str, object]) -> None:
    """However nginx buffers, compresses and cuts a stream, within events and characters too, all its deltas come."""
    client = (await nginx(**options)).client()
    pieces = [f"{number} żółw 🐢, " for number in range(2000)]
    whole = stream(pieces)
    server.script(whole, sse(whole.body), sse(whole.body, framing="close"))
    for _ in range(3):
        async with client.chat.completions.stream(**ASK, extra_headers={"Accept-Encoding": "gzip"}) as answer:
            assert [text async for text in answer.text_stream] == pieces
        assert answer.completeness == "complete"
        assert answer.meta.headers.get("content-encoding") == ("gzip" if "gzip" in str(options) else None)


# Its compression.


async def test_a_compressed_answer(nginx: Start) -> None:
    """With `gzip on` the answer of a call is decompressed; a stream asks for none, and gets none."""
    client = (await nginx(location=GZIP)).client()
    called, streamed = await ask(client, "create"), await ask(client, "stream")
    assert called.meta.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in streamed.meta.headers
    assert called.text == streamed.text


async def test_a_compressed_stream_comes_delta_by_delta(nginx: Start, server: ChatKoreServer) -> None:
    """A stream that nginx compresses all the same is handed out as it comes, not when the compressor is done."""
    client = (await nginx(location=GZIP)).client()
    gates = [asyncio.Event() for _ in range(5)]
    server.always(stream([step for number, gate in enumerate(gates) for step in (str(number), Hold(gate))]))
    async with client.chat.completions.stream(**ASK, extra_headers={"Accept-Encoding": "gzip"}) as answer:
        async for text in answer.text_stream:
            gates[int(text)].set()
    assert answer.meta.headers["content-encoding"] == "gzip"
    assert answer.completeness == "complete"


# The relay behind it.


@pytest.mark.parametrize("reply", [raw(), raw(b"HTTP/1.1 200 OK\r\nContent-Le"), reset_after(raw(b""), 0)])
@both_ways
async def test_a_relay_that_breaks_before_its_header_is_through(
    nginx: Start, server: ChatKoreServer, way: str, reply: object
) -> None:
    """A relay that closes or resets before its header is complete is nginx's 502, retried as often as the policy says."""
    client = (await nginx()).client()
    server.always(reply)
    with pytest.raises(InternalServerError, match="502 Bad Gateway") as caught:
        await ask(client, way)
    assert attempts(caught.value) == [502] * 3
    assert server.request_count == 3


@both_ways
async def test_a_relay_that_speaks_no_http(nginx: Start, server: ChatKoreServer, way: str) -> None:
    """What is no HTTP, nginx passes on as HTTP/0.9: an `InvalidResponseError`, after one more try."""
    client = (await nginx()).client()
    server.always(raw(b"SSH-2.0-OpenSSH_9.6\r\n"))
    with pytest.raises(InvalidResponseError, match="is not HTTP") as caught:
        await ask(client, way)
    assert len(caught.value.attempts) == 2
    assert client.pool.open == 0


@pytest.mark.parametrize("location", ["", "chunked_transfer_encoding off;"], ids=["chunks", "close"])
async def test_a_cut_that_looks_like_an_end(nginx: Start, server: ChatKoreServer, location: str) -> None:
    """Towards a relay of HTTP/1.0 nginx takes a cut for an end: what is missing is noticed by what there is."""
    client = (await nginx(location=location)).client()
    server.always(cut_after(msgspec.structs.replace(completion("x" * 300), framing="close"), 40))
    with pytest.raises(InvalidResponseError, match="cut") as called:
        await ask(client, "create")
    assert attempts(called.value) == [200] * 2
    server.always(stream(["Hel", "lo", Cut()]))
    with pytest.raises(StreamInterruptedError, match="ended before it was finished") as streamed:
        await ask(client, "stream")
    assert streamed.value.partial is not None
    assert streamed.value.partial.text == "Hello"


@both_ways
async def test_kept_connections_to_the_relay(nginx: Start, server: ChatKoreServer, way: str) -> None:
    """Calls go on while the relay closes the connections that nginx keeps to it."""
    keep = f"upstream relay {{ server 127.0.0.1:{server.port}; keepalive 8; }}"
    client = (await nginx(http=keep, location=HTTP11, proxy_pass="http://relay")).client()
    for _ in range(5):
        await ask(client, way)
    assert len(server.connections) == 1
    assert server.drop_idle_connections() == 1
    await server.connections[0].closed(timeout=PATIENCE)
    assert attempts(await ask(client, way))[-1] == 200
    assert client.pool.created == 1


# The ways it ends connections.


@both_ways
async def test_a_connection_has_its_number_of_requests(nginx: Start, way: str) -> None:
    """After `keepalive_requests` nginx closes with the answer: the next call opens a connection, and none fails."""
    client = (await nginx(http="keepalive_requests 3;")).client()
    for _ in range(7):
        assert attempts(await ask(client, way)) == [200]
    assert (client.pool.created, client.pool.reused) == (3, 4)


@pytest.mark.parametrize("status", [408, 444])
@both_ways
async def test_nginx_closes_without_a_word(nginx: Start, way: str, status: int) -> None:
    """A connection that nginx closes instead of an answer (its 408 and 444) is an error after one more try."""
    client = (await nginx(location=f"return {status};")).client()
    with pytest.raises(APIConnectionError, match="Server disconnected") as caught:
        await ask(client, way)
    assert attempts(caught.value) == ["APIConnectionError"] * 2
    assert (client.pool.open, client.pool.in_use) == (0, 0)


async def test_a_redirect_of_the_models(nginx: Start) -> None:
    """The hint of a redirect names a base_url that works, whatever was asked for."""
    client = (await nginx(location="return 301 https://relay.example$request_uri;")).client()
    with pytest.raises(APIStatusError) as caught:
        await client.models.list()
    assert caught.value.hint is not None
    assert "base_url at https://relay.example/v1/models" not in caught.value.hint
