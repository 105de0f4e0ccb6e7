"""The client behind nginx and behind HAProxy: what holds whichever of them stands in front of a relay."""

import asyncio
import time

import msgspec
import pytest
from asking import ASK, ask, attempts, both_ways
from proxies import ESTABLISHED, PATIENCE, Certificate, Start, connections, until

from chatkore_async import (
    APIConnectionError,
    APITimeoutError,
    AsyncChatKore,
    InternalServerError,
    RetryPolicy,
    StreamInterruptedError,
    StreamStalledError,
    Timeout,
)
from chatkore_async.testing import (
    ChatKoreServer,
    Cut,
    Framing,
    Hold,
    Reply,
    Reset,
    Stall,
    completion,
    compressed,
    cut_after,
    raw,
    stream,
)

pytestmark = pytest.mark.real

# All is well.


@both_ways
async def test_an_answer_passes(start: Start, server: ChatKoreServer, way: str) -> None:
    """A call and a stream bring through a proxy what they bring without one, with one attempt."""
    proxy = await start()
    async with AsyncChatKore(api_key="sk-test-secret", base_url=server.base_url) as direct:
        expected = await ask(direct, way)
    found = await ask(proxy.client(), way)
    assert (found.text, found.usage, found.choices) == (expected.text, expected.usage, expected.choices)
    assert attempts(found) == [200]
    assert found.meta.request_id == expected.meta.request_id


async def test_a_request_arrives_as_it_was_sent(start: Start, server: ChatKoreServer) -> None:
    """A prompt of megabytes arrives whole behind a proxy, with its length and with the key."""
    client = (await start()).client()
    content = "żółw " * 500_000
    await client.chat.completions.create(model="m", messages=[{"role": "user", "content": content}])
    request = server.requests[0]
    assert request.json["messages"][0]["content"] == content
    assert int(request.headers["Content-Length"]) == len(request.body)
    assert request.headers["Authorization"] == "Bearer sk-test-secret"


@both_ways
async def test_fifty_calls_at_once_share_their_connections(start: Start, way: str) -> None:
    """Fifty calls at once open fifty connections to a proxy, and the next fifty open none."""
    client = (await start()).client()
    for reused in (0, 50, 100):
        answers = await asyncio.gather(*(ask(client, way) for _ in range(50)))
        assert all(attempts(answer) == [200] for answer in answers)
        assert (client.pool.created, client.pool.reused, client.pool.idle) == (50, reused, 50)


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@both_ways
async def test_however_the_relay_frames_its_answer(
    start: Start, server: ChatKoreServer, way: str, framing: Framing
) -> None:
    """An answer is whole however the relay tells its end: by its length, by chunks, or by closing."""
    client = (await start()).client()
    server.always(msgspec.structs.replace(completion("Hello") if way == "create" else stream("Hello"), framing=framing))
    for _ in range(3):
        assert (await ask(client, way)).text == "Hello"


@both_ways
async def test_a_compressed_answer_passes(start: Start, server: ChatKoreServer, way: str) -> None:
    """What a relay compressed, a proxy passes on and the client decompresses."""
    client = (await start()).client()
    server.always(compressed(completion("Hello" * 1000) if way == "create" else stream("Hello " * 1000)))
    found = await ask(client, way)
    assert len(found.text.replace(" ", "")) == 5000
    assert found.meta.headers["content-encoding"] == "gzip"


async def test_deltas_come_one_by_one(start: Start, server: ChatKoreServer) -> None:
    """A delta is handed out while the relay still thinks about the next."""
    client = (await start()).client()
    gates = [asyncio.Event() for _ in range(5)]
    server.always(stream([step for number, gate in enumerate(gates) for step in (str(number), Hold(gate))]))
    came = ""
    async with client.chat.completions.stream(**ASK) as answer:
        async for text in answer.text_stream:
            came += text
            gates[int(text)].set()
    assert came == "01234"
    assert answer.completeness == "complete"


async def test_many_deltas_come_in_order(start: Start, server: ChatKoreServer) -> None:
    """Of thousands of deltas none is lost, doubled or out of its place."""
    client = (await start()).client()
    pieces = [f"{number} żółw, " for number in range(3000)]
    server.always(stream(pieces))
    async with client.chat.completions.stream(**ASK) as answer:
        assert [text async for text in answer.text_stream] == pieces


# The relay is down, or breaks.


@both_ways
async def test_a_relay_that_is_down(start: Start, server: ChatKoreServer, way: str) -> None:
    """A relay that is down is the proxy's 502 or 503: retried, then raised; once it is up, the same client works."""
    proxy = await start()
    client = proxy.client()
    await server.close()
    with pytest.raises(InternalServerError) as caught:
        await ask(client, way)
    status = {"nginx": 502, "haproxy": 503}[proxy.package]
    assert caught.value.status_code == status
    assert attempts(caught.value) == [status] * 3
    await server.start()
    assert attempts(await ask(client, way)) == [200]
    assert client.pool.created == 1


@both_ways
async def test_a_relay_that_comes_back_in_time(start: Start, server: ChatKoreServer, way: str) -> None:
    """A call that began while the relay was down succeeds with the retry that finds it up."""
    asked = 0

    async def key() -> str:
        nonlocal asked
        asked += 1
        if asked == 3:
            await server.start()
        return "sk-test-secret"

    client = (await start()).client(api_key=key)
    await server.close()
    found = await ask(client, way)
    assert len(found.meta.attempts) == 3
    assert attempts(found)[-1] == 200
    assert server.request_count == 1


@both_ways
@pytest.mark.parametrize("patient", [True, False], ids=["retry", "no retry"])
async def test_a_relay_that_does_not_answer(start: Start, server: ChatKoreServer, way: str, patient: bool) -> None:
    """A proxy that stops waiting answers 504: sent once more at most, and not at all when a second bill is unwanted."""
    proxy = await start(answer_timeout=0.2)
    client = proxy.client(retry=RetryPolicy(initial_delay=0, retry_unconfirmed=patient, max_retries=5))
    server.always(raw(Stall()))
    with pytest.raises(InternalServerError) as caught:
        await ask(client, way)
    assert caught.value.status_code == 504
    assert attempts(caught.value) == ([504, 504] if patient else [504])
    assert server.request_count == (2 if patient else 1)
    for request in server.requests:
        assert await request.finished(timeout=PATIENCE) == "gone"


@both_ways
async def test_an_answer_that_breaks_off(start: Start, server: ChatKoreServer, way: str) -> None:
    """A body that the relay does not finish is asked for once more, and the second answer is the call's."""
    client = (await start()).client()
    server.script(cut_after(completion("x" * 300), 40) if way == "create" else stream([Cut()]), completion("whole"))
    found = await ask(client, way)
    assert found.text == "whole"
    assert [attempt.error is None for attempt in found.meta.attempts] == [False, True]


@pytest.mark.parametrize("fault", [Cut(), Reset()], ids=["cut", "reset"])
async def test_a_stream_that_breaks_off(start: Start, server: ChatKoreServer, fault: Cut | Reset) -> None:
    """A relay that dies within a stream is a `StreamInterruptedError` with the text so far, and nothing is repeated."""
    client = (await start()).client()
    seen = asyncio.Event()
    server.always(stream(["Hel", "lo", Hold(seen), fault]))
    came = ""
    with pytest.raises(StreamInterruptedError) as caught:
        async with client.chat.completions.stream(**ASK) as answer:
            async for text in answer.text_stream:
                came += text
                if came == "Hello":
                    seen.set()
    assert came == "Hello"
    assert caught.value.partial is not None
    assert caught.value.partial.text == "Hello"
    assert answer.completeness == "truncated"
    assert server.request_count == 1


async def test_a_stream_that_stalls_for_the_proxy(start: Start, server: ChatKoreServer) -> None:
    """A proxy that loses patience within a stream just closes: a `StreamInterruptedError` with the text so far."""
    client = (await start(answer_timeout=1.0)).client()
    server.always(stream(["Hel", "lo", Stall()]))
    with pytest.raises(StreamInterruptedError) as caught:
        await ask(client, "stream")
    assert not isinstance(caught.value, StreamStalledError)
    assert caught.value.partial is not None
    assert caught.value.partial.text == "Hello"
    assert server.request_count == 1


async def test_a_stream_that_stalls_for_us(start: Start, server: ChatKoreServer) -> None:
    """Where `idle` is shorter than a proxy's patience, a silence is a `StreamStalledError`, and the relay is let go."""
    client = (await start()).client()
    server.always(stream(["Hel", "lo", Stall()]))
    with pytest.raises(StreamStalledError) as caught:
        await ask(client, "stream", timeout=Timeout(idle=1.0))
    assert caught.value.partial is not None
    assert caught.value.partial.text == "Hello"
    assert await server.requests[0].finished(timeout=PATIENCE) == "gone"


# The caller leaves.


@pytest.mark.parametrize("reply", [raw(Stall()), stream(["Hel", Stall()])], ids=["silent", "midway"])
@both_ways
async def test_a_cancelled_call_stops_the_relay(start: Start, server: ChatKoreServer, way: str, reply: Reply) -> None:
    """Cancelling a call closes its connection, so that the proxy closes the relay's and no token is paid for nothing."""
    client = (await start()).client()
    server.always(reply)
    call = asyncio.create_task(ask(client, way))
    await server.wait_for_requests(1, timeout=PATIENCE)
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()
    assert await server.requests[0].finished(timeout=PATIENCE) == "gone"
    assert (client.pool.in_use, client.pool.open) == (0, 0)


@both_ways
async def test_a_timeout_stops_the_relay(start: Start, server: ChatKoreServer, way: str) -> None:
    """A total that passes behind a patient proxy names the answer as what was waited for, and lets the relay go."""
    client = (await start()).client()
    server.always(raw(Stall()))
    with pytest.raises(APITimeoutError) as caught:
        await ask(client, way, timeout=0.5)
    assert caught.value.phase == "answer"
    assert await server.requests[0].finished(timeout=PATIENCE) == "gone"


async def test_a_reader_who_leaves_stops_the_relay(start: Start, server: ChatKoreServer) -> None:
    """Leaving the block of a stream closes it all the way to the relay."""
    client = (await start()).client()
    server.always(stream(["Hel", "lo", Stall()]))
    async with client.chat.completions.stream(**ASK) as answer:
        async for _ in answer.text_stream:
            break
    assert await server.requests[0].finished(timeout=PATIENCE) == "gone"


# Connections that were kept.


async def test_an_idle_connection_that_the_proxy_closes(start: Start) -> None:
    """After a proxy has closed an idle connection, the next call opens one, without an attempt that fails."""
    client = (await start(idle_timeout=0.1)).client()
    for created in (1, 2, 3):
        assert attempts(await ask(client, "create")) == [200]
        assert client.pool.created == created
        await until(lambda: client.pool.open == 0)


@both_ways
async def test_a_connection_that_was_closed_while_we_were_busy(start: Start, server: ChatKoreServer, way: str) -> None:
    """A call goes through on idle connections that the proxy closed while the loop stood still, and is sent once."""
    proxy = await start(idle_timeout=0.5)
    client = proxy.client()
    await asyncio.gather(*(ask(client, way) for _ in range(10)))
    server.clear()
    give_up = time.monotonic() + PATIENCE
    while any(remote == proxy.port and state == ESTABLISHED for _, remote, state in connections()):
        assert time.monotonic() < give_up
        time.sleep(0.005)  # noqa: ASYNC251 - a loop that stands still is what this is about
    assert client.pool.idle > 0
    found = await ask(client, way)
    assert attempts(found)[-1] == 200
    assert len(found.meta.attempts) <= 2
    assert server.request_count == 1


# The proxy itself.


async def test_a_proxy_that_is_killed_within_a_stream(start: Start, server: ChatKoreServer) -> None:
    """A proxy that dies within a stream is a `StreamInterruptedError` with the text so far; once it is up, calls work."""
    proxy = await start()
    client = proxy.client()
    server.always(stream(["Hel", "lo", Stall()]))
    await asyncio.gather(*(client.models.list() for _ in range(5)))  # idle connections that die with it
    came = ""
    with pytest.raises(StreamInterruptedError) as caught:
        async with client.chat.completions.stream(**ASK) as answer:
            async for text in answer.text_stream:
                came += text
                if came == "Hello":
                    await proxy.kill()
    assert caught.value.partial is not None
    assert caught.value.partial.text == came == "Hello"
    server.always(None)
    with pytest.raises(APIConnectionError, match=f"could not connect to 127.0.0.1:{proxy.port}") as refused:
        await ask(client, "create")
    assert len(refused.value.attempts) == 3
    await proxy.restart()
    assert attempts(await ask(client, "create")) == [200]


@both_ways
async def test_a_proxy_that_is_killed_before_it_answers(start: Start, server: ChatKoreServer, way: str) -> None:
    """A proxy that dies while the relay thinks is an `APIConnectionError`, after a second try."""
    proxy = await start()
    client = proxy.client(retry=RetryPolicy(initial_delay=0, max_retries=1))
    server.always(raw(Stall()))
    call = asyncio.create_task(ask(client, way))
    await server.wait_for_requests(1, timeout=PATIENCE)
    await proxy.kill()
    with pytest.raises(APIConnectionError) as caught:
        await call
    assert attempts(caught.value) == ["APIConnectionError"] * 2


async def test_a_proxy_that_hangs_within_a_stream(start: Start, server: ChatKoreServer) -> None:
    """A proxy that hangs within a stream is a `StreamStalledError`; what was left is not waited for when it wakes."""
    proxy = await start()
    client = proxy.client()
    seen = asyncio.Event()
    server.always(stream(["Hel", "lo", Hold(seen), "!"]))
    with pytest.raises(StreamStalledError) as caught:
        async with client.chat.completions.stream(**ASK, timeout=Timeout(idle=1.0)) as answer:
            async for chunk in answer:
                if chunk.text == "lo":
                    await proxy.freeze()
                    seen.set()
    assert caught.value.partial is not None
    assert caught.value.partial.text == "Hello"
    proxy.thaw()
    server.always(None)
    assert attempts(await ask(client, "create")) == [200]


@both_ways
async def test_a_proxy_that_hangs(start: Start, server: ChatKoreServer, way: str) -> None:
    """A proxy that takes a request and hangs is an `APITimeoutError`, and it was the answer that was waited for."""
    proxy = await start()
    client = proxy.client()
    await ask(client, way)
    await proxy.freeze()
    with pytest.raises(APITimeoutError) as caught:
        await ask(client, way, timeout=0.5)
    assert caught.value.phase == "answer"
    proxy.thaw()
    assert attempts(await ask(client, way)) == [200]


async def test_a_proxy_that_hangs_in_the_handshake(start: Start, certificate: Certificate) -> None:
    """A proxy that does not answer the TLS handshake is given up after `Timeout.connect`, and tried again."""
    proxy = await start(tls=certificate)
    client = proxy.client(timeout=Timeout(connect=0.2))
    await proxy.freeze()
    with pytest.raises(APITimeoutError) as caught:
        await ask(client, "create")
    assert caught.value.phase == "connect"
    assert len(caught.value.attempts) == 3


@both_ways
async def test_a_proxy_that_is_reloaded(start: Start, server: ChatKoreServer, way: str) -> None:
    """A reload breaks off nothing: what is under way ends as it would have, and what follows meets the new generation."""
    proxy = await start()
    client, newcomer = proxy.client(), proxy.client()
    go_on = asyncio.Event()
    held = stream(["Hel", Hold(go_on), "lo"])
    if way == "create":
        whole = completion("Hello")
        held = msgspec.structs.replace(whole, steps=(Hold(go_on), *whole.steps))
    server.script(*[held] * 20)
    under_way = [asyncio.create_task(ask(client, way)) for _ in range(20)]
    await server.wait_for_requests(20, timeout=PATIENCE)
    await proxy.reload()
    async with asyncio.timeout(PATIENCE):
        while (await ask(newcomer, way)).meta.headers["x-generation"] == "1":
            pass
    go_on.set()
    for found in await asyncio.gather(*under_way):
        assert (found.text, found.meta.headers["x-generation"]) == ("Hello", "1")
        assert attempts(found) == [200]
    assert attempts(await ask(newcomer, way)) == [200]


# TLS.


async def test_tls_ends_at_the_proxy(start: Start, certificate: Certificate, server: ChatKoreServer) -> None:
    """With `ssl=` for the company's authority, calls and streams go through a proxy that speaks TLS, on one connection."""
    proxy = await start(tls=certificate)
    client = proxy.client()
    for way in ("create", "stream", "create"):
        assert attempts(await ask(client, way)) == [200]
    assert client.base_url.startswith("https://")
    assert client.pool.created == 1
    server.always(stream(["Hel", "lo", Stall()]))
    with pytest.raises(StreamInterruptedError) as caught:
        async with client.chat.completions.stream(**ASK) as answer:
            async for chunk in answer:
                if chunk.text == "lo":
                    await proxy.kill()
    assert caught.value.partial is not None
    assert caught.value.partial.text == "Hello"


async def test_a_proxy_whose_certificate_nobody_trusts(
    start: Start, certificate: Certificate, server: ChatKoreServer
) -> None:
    """A proxy whose certificate does not verify gets neither key nor prompt, and is not tried twice."""
    client = (await start(tls=certificate)).client(ssl=None)
    with pytest.raises(APIConnectionError, match="does not verify") as caught:
        await ask(client, "create")
    assert len(caught.value.attempts) == 1
    assert server.connections == []


async def test_https_to_a_proxy_that_speaks_none(start: Start, server: ChatKoreServer) -> None:
    """https to a port of plain http says that there is no TLS, and what to look at."""
    proxy = await start()
    client = proxy.client(base_url=proxy.base_url.replace("http", "https"))
    with pytest.raises(APIConnectionError, match=f"no TLS with 127.0.0.1:{proxy.port}") as caught:
        await ask(client, "create")
    assert caught.value.hint == "check the scheme and the port of base_url"
    assert server.connections == []
