"""The client behind HAProxy: its own pages, its limits, its queue, and what it keeps to itself."""

import asyncio
from collections.abc import Callable

import msgspec
import pytest
from asking import ASK, ask, attempts, both_ways
from proxies import PATIENCE, Certificate, Start, until

from chatkore_async import (
    APIConnectionError,
    APIStatusError,
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
)
from chatkore_async.testing import ChatKoreServer, Cut, Hold, completion, cut_after, raw, stream

pytestmark = pytest.mark.real

TRACK = "stick-table type ip size 1k expire 1h store http_req_cnt\nhttp-request track-sc0 src\n"


# Its own pages.


@pytest.mark.parametrize(
    "status,kind,tries",
    [
        (400, BadRequestError, 1),
        (401, AuthenticationError, 1),
        (403, PermissionDeniedError, 1),
        (404, NotFoundError, 1),
        (405, APIStatusError, 1),
        (408, APIStatusError, 3),
        (413, RequestTooLargeError, 1),
        (429, RateLimitError, 3),
        (500, InternalServerError, 3),
        (502, InternalServerError, 3),
        (503, InternalServerError, 3),
        (504, InternalServerError, 2),
    ],
)
@both_ways
async def test_a_page_of_haproxy(
    haproxy: Start, server: ChatKoreServer, way: str, *, status: int, kind: type[APIStatusError], tries: int
) -> None:
    """A page of HAProxy's own is the error of its status, with the page as `body`, retried by the status."""
    client = (await haproxy(frontend=f"http-request deny deny_status {status}")).client()
    with pytest.raises(kind) as caught:
        await ask(client, way)
    assert type(caught.value) is kind
    assert f"<h1>{status} " in str(caught.value.body)
    assert "<" not in str(caught.value)
    assert attempts(caught.value) == [status] * tries
    assert server.connections == []


@both_ways
async def test_a_redirect_to_https(haproxy: Start, server: ChatKoreServer, way: str) -> None:
    """`http-request redirect scheme https` is an error that names the goal and is not tried again."""
    proxy = await haproxy(frontend="http-request redirect scheme https code 301")
    client = proxy.client()
    with pytest.raises(APIStatusError) as caught:
        await ask(client, way)
    assert f"https://127.0.0.1:{proxy.port}/v1/chat/completions" in str(caught.value)
    assert attempts(caught.value) == [301]
    assert server.connections == []


async def test_a_header_that_haproxy_does_not_take(haproxy: Start, server: ChatKoreServer) -> None:
    """A header that is too large for HAProxy is a `BadRequestError`, and not tried again."""
    client = (await haproxy()).client()
    with pytest.raises(BadRequestError) as caught:
        await ask(client, "create", extra_headers={"X-Policy": "p" * 40_000})
    assert attempts(caught.value) == [400]
    assert server.connections == []
    assert attempts(await ask(client, "create")) == [200]


@pytest.mark.parametrize("size", [2_000, 100_000])
async def test_a_prompt_that_is_too_large(haproxy: Start, server: ChatKoreServer, size: int) -> None:
    """A prompt that a rule of HAProxy's refuses with 413 is a `RequestTooLargeError`, and not tried again."""
    client = (
        await haproxy(frontend="http-request deny deny_status 413 if { req.hdr_val(content-length) gt 1000 }")
    ).client()
    with pytest.raises(RequestTooLargeError) as caught:
        await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * size}])
    assert attempts(caught.value) == [413]
    assert server.connections == []
    assert attempts(await ask(client, "create")) == [200]


@both_ways
async def test_early_hints_are_passed_over(haproxy: Start, way: str) -> None:
    """An interim answer (103, RFC 8297) in front of the answer is no answer."""
    client = (await haproxy(frontend="http-request early-hint Link </style.css>")).client()
    for _ in range(2):
        assert attempts(await ask(client, way)) == [200]
    assert client.pool.created == 1


# Its limits.


@both_ways
async def test_a_rate_limit_that_passes(haproxy: Start, server: ChatKoreServer, way: str) -> None:
    """A call that HAProxy refused with 429 succeeds by its retries as soon as HAProxy lets it through."""
    client = (
        await haproxy(frontend=TRACK + "http-request deny deny_status 429 if { sc_http_req_cnt(0) le 2 }")
    ).client()
    assert attempts(await ask(client, way)) == [429, 429, 200]
    assert server.request_count == 1


@both_ways
async def test_a_rate_limit_that_says_when(haproxy: Start, way: str) -> None:
    """A time to wait that a rule of HAProxy's sends along is kept before the retry."""
    rule = "http-request deny deny_status 429 hdr retry-after-ms 150 if { sc_http_req_cnt(0) le 1 }"
    client = (await haproxy(frontend=TRACK + rule)).client()
    found = await ask(client, way)
    assert attempts(found) == [429, 200]
    assert 0.15 <= found.meta.attempts[1].waited <= 0.17


@both_ways
async def test_no_server_is_up(haproxy: Start, server: ChatKoreServer, way: str) -> None:
    """HAProxy without a server that is up answers 503: retried, then raised."""
    client = (await haproxy(server="disabled")).client()
    with pytest.raises(InternalServerError) as caught:
        await ask(client, way)
    assert "No server is available" in str(caught.value.body)
    assert attempts(caught.value) == [503] * 3
    assert server.connections == []


class Watch:
    """A hook that notes a retry."""

    def __init__(self) -> None:
        self.retried = asyncio.Event()

    def on_retry(self, _: object) -> None:
        self.retried.set()


@both_ways
async def test_a_queue_that_is_full(haproxy: Start, server: ChatKoreServer, way: str) -> None:
    """A call that waited too long in HAProxy's queue is a 503, and its retry succeeds once there is room."""
    proxy = await haproxy(server="maxconn 1", defaults="timeout queue 200ms")
    watch = Watch()
    server.script(stream(["Hel", Hold(watch.retried), "lo"]))
    async with proxy.client().chat.completions.stream(**ASK) as first:
        late = proxy.client(hooks=[watch], retry=RetryPolicy(max_retries=20, initial_delay=0.05, max_delay=0.05))
        second = asyncio.create_task(ask(late, way))
        assert (await first.get_final_completion()).text == "Hello"
        *refused, passed = attempts(await second)
    assert set(refused) == {503}
    assert passed == 200


@both_ways
async def test_haproxy_closes_without_a_word(haproxy: Start, way: str) -> None:
    """`http-request reject`, a connection closed without an answer, is an `APIConnectionError` after one more try."""
    client = (await haproxy(frontend="http-request reject")).client()
    with pytest.raises(APIConnectionError, match="Server disconnected") as caught:
        await ask(client, way)
    assert attempts(caught.value) == ["APIConnectionError"] * 2
    assert (client.pool.open, client.pool.in_use) == (0, 0)


# The relay behind it.


@both_ways
async def test_a_relay_that_speaks_no_http(haproxy: Start, server: ChatKoreServer, way: str) -> None:
    """What is no HTTP is HAProxy's 502, retried as often as the policy says."""
    client = (await haproxy()).client()
    server.always(raw(b"SSH-2.0-OpenSSH_9.6\r\n"))
    with pytest.raises(InternalServerError) as caught:
        await ask(client, way)
    assert attempts(caught.value) == [502] * 3


@both_ways
async def test_a_relay_that_breaks_is_the_clients_business(haproxy: Start, server: ChatKoreServer, way: str) -> None:
    """On a kept connection HAProxy hides a relay's break, closes, and leaves the retry to the client, who makes one."""
    client = (await haproxy()).client()
    await ask(client, way)
    server.script(raw())
    assert attempts(await ask(client, way)) == ["APIConnectionError", 200]
    server.script(raw())
    with pytest.raises(APIConnectionError, match="Server disconnected") as caught:
        await ask(client.with_options(retry=RetryPolicy(retry_unconfirmed=False)), way)
    assert len(caught.value.attempts) == 1
    assert server.request_count == 4


async def test_a_cut_that_looks_like_an_end(haproxy: Start, server: ChatKoreServer) -> None:
    """Where closing is the end of an answer, HAProxy closes for a cut, too: what is missing is noticed by what there is."""
    client = (await haproxy()).client()
    server.always(cut_after(msgspec.structs.replace(completion("x" * 300), framing="close"), 40))
    with pytest.raises(InvalidResponseError, match="cut") as called:
        await ask(client, "create")
    assert attempts(called.value) == [200] * 2
    server.always(msgspec.structs.replace(stream(["Hel", "lo", Cut()]), framing="close"))
    with pytest.raises(StreamInterruptedError, match="ended before it was finished") as streamed:
        await ask(client, "stream")
    assert streamed.value.partial is not None
    assert streamed.value.partial.text == "Hello"


async def test_a_reload_under_load(haproxy: Start) -> None:
    """With `option idle-close-on-response` reloads under load cost no call and no stream a single attempt."""
    proxy = await haproxy(defaults="option idle-close-on-response")
    client = proxy.client(max_retries=0, retry=None)
    seen = dict.fromkeys(range(20), 0)

    async def work(number: int) -> None:
        while seen[number] < 3:
            found = await ask(client, "create" if number % 2 else "stream")
            seen[number] = int(found.meta.headers["x-generation"])

    def all_came_to(generation: int) -> Callable[[], bool]:
        return lambda: working.done() or min(seen.values()) == generation

    working = asyncio.gather(*(work(number) for number in seen))
    await until(all_came_to(1))
    for generation in (2, 3):
        await proxy.reload()
        await until(all_came_to(generation))
    await working


# Its compression.


COMPRESSION = "compression algo gzip\ncompression type text/event-stream application/json"


async def test_a_compressed_answer(haproxy: Start) -> None:
    """With `compression algo gzip` the answer of a call is decompressed; a stream asks for none, and gets none."""
    client = (await haproxy(backend=COMPRESSION)).client()
    called, streamed = await ask(client, "create"), await ask(client, "stream")
    assert called.meta.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in streamed.meta.headers
    assert called.text == streamed.text


async def test_a_compressed_stream_loses_nothing(haproxy: Start, server: ChatKoreServer) -> None:
    """Of a stream that HAProxy compresses all the same every delta comes, in its place."""
    client = (await haproxy(backend=COMPRESSION)).client()
    pieces = [f"{number} żółw 🐢, " for number in range(2000)]
    server.always(stream(pieces))
    async with client.chat.completions.stream(**ASK, extra_headers={"Accept-Encoding": "gzip"}) as answer:
        assert [text async for text in answer.text_stream] == pieces
    assert answer.meta.headers["content-encoding"] == "gzip"
    assert answer.completeness == "complete"


# What it does by default.


async def test_deltas_come_without_options(haproxy: Start, server: ChatKoreServer) -> None:
    """Without `option http-no-delay` HAProxy keeps a delta back for a moment, and hands it on all the same."""
    client = (await haproxy(defaults="no option http-no-delay")).client()
    seen = asyncio.Event()
    server.always(stream(["Hel", Hold(seen), "lo"]))
    async with client.chat.completions.stream(**ASK) as answer:
        seen.set()  # the block is entered with the first delta
        assert (await answer.get_final_completion()).text == "Hello"
    assert await server.requests[0].finished(timeout=PATIENCE) == "answered"


@both_ways
async def test_the_words_of_a_page_without_a_title(haproxy: Start, way: str) -> None:
    """A page without a title, as HAProxy's, still says in one line what it says: its heading and its text."""
    client = (await haproxy(server="disabled")).client()
    with pytest.raises(InternalServerError, match=r"503 Service Unavailable.*No server is available") as caught:
        await ask(client, way)
    assert "<" not in str(caught.value)


async def test_a_connection_that_closes_while_a_prompt_is_sent(haproxy: Start, certificate: Certificate) -> None:
    """A connection that breaks while a prompt is sent is told in the system's words: no URL, no words of aiohttp's."""
    client = (await haproxy(frontend="http-request reject", tls=certificate)).client()
    messages: list[str] = []
    for _ in range(20):
        with pytest.raises(APIConnectionError) as caught:
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 3_000_000}])
        messages.append(str(caught.value))
    assert not any("request body" in message or "https://" in message for message in messages)
