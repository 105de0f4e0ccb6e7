"""The pool: how many connections there are, who waits, who goes first, and what is used again."""

import asyncio
import gc
import socket
import ssl
import sys
import weakref
from collections.abc import AsyncIterator

import aiohttp
import pytest
import trustme

from chatkore_async import APITimeoutError, AsyncChatKore, Limits, PoolStats, Timeout
from chatkore_async._connector import open_socket
from chatkore_async._deadlines import NEVER, Deadlines
from chatkore_async._slots import Slots
from chatkore_async.testing import ChatKoreServer, Hold, Reply, Stall, completion, cut_after, raw, sse, stream

ASK = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
async def server() -> AsyncIterator[ChatKoreServer]:
    async with ChatKoreServer() as server:
        yield server


def make(server: ChatKoreServer, **options) -> AsyncChatKore:
    return AsyncChatKore(api_key="k", base_url=server.base_url, max_retries=options.pop("max_retries", 0), **options)


async def turns(n: int = 5) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


# Sockets.


def test_a_socket_notices_a_peer_that_is_gone() -> None:
    """It asks its peer in silence; where there is no such thing as that, it is a socket all the same."""
    for kind, noticed in [(socket.SOCK_STREAM, 4), (socket.SOCK_DGRAM, None)]:
        with open_socket((socket.AF_INET, kind, 0, "", ("127.0.0.1", 0))) as opened:
            assert opened.type == kind
            if noticed:
                assert opened.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == noticed


# Numbers.


async def test_the_pool_tells_what_is_open_in_use_and_idle(server: ChatKoreServer) -> None:
    """`client.pool` follows two calls from their start to the connections they leave idle."""
    release = asyncio.Event()
    server.respond_with(lambda _: held(release))
    async with make(server) as client:
        assert client.pool == PoolStats()
        calls = [asyncio.create_task(client.chat.completions.create(**ASK)) for _ in range(2)]
        await server.wait_for_requests(2)
        assert client.pool == PoolStats(open=2, in_use=2, created=2)
        assert "open 2/1000 idle 0" in repr(client)
        release.set()
        await asyncio.gather(*calls)
        assert client.pool == PoolStats(open=2, idle=2, created=2)
        await client.chat.completions.create(**ASK)
        assert client.pool == PoolStats(open=2, idle=2, created=2, reused=1)
    assert client.pool == PoolStats(created=2, reused=1)


async def held(release: asyncio.Event) -> Reply:
    await release.wait()
    return completion()


async def test_calls_in_a_row_use_one_connection(server: ChatKoreServer) -> None:
    """Twenty calls and twenty streams, one after the other, need one connection."""
    async with make(server) as client:
        for _ in range(20):
            await client.chat.completions.create(**ASK)
            async with client.chat.completions.stream(**ASK) as opened:
                await opened.get_final_completion()
        assert (client.pool.created, client.pool.reused) == (1, 39)
    assert len(server.connections) == 1


async def test_a_reused_connection_has_no_connect_time(server: ChatKoreServer) -> None:
    """`meta.timings.connect` is the time a new connection took, and `None` for one that was open."""
    async with make(server) as client:
        first = await client.chat.completions.create(**ASK)
        second = await client.chat.completions.create(**ASK)
    assert first.meta.timings.connect is not None
    assert 0 < first.meta.timings.connect < 5
    assert second.meta.timings.connect is None


async def test_idle_connections_expire(server: ChatKoreServer) -> None:
    """After `keepalive_expiry` seconds of idleness a connection is closed."""
    async with make(server, limits=Limits(keepalive_expiry=0.02)) as client:
        await client.chat.completions.create(**ASK)
        await server.connections[0].closed(timeout=5)
        assert client.pool.open == 0


async def test_idle_connections_need_not_expire(server: ChatKoreServer) -> None:
    """`keepalive_expiry=None` keeps idle connections for as long as the server does."""
    async with make(server, limits=Limits(keepalive_expiry=None, max_connections=None)) as client:
        await client.chat.completions.create(**ASK)
        await client.chat.completions.create(**ASK)
        assert client.pool.created == 1
        assert "open 1/None" in repr(client)


async def test_connections_that_the_server_closed_are_not_counted(server: ChatKoreServer) -> None:
    """A connection whose keep-alive ended on the other side is not open, and the next call opens another."""
    async with make(server) as client:
        await client.chat.completions.create(**ASK)
        assert server.drop_idle_connections() == 1
        while client.pool.open:  # noqa: ASYNC110 - a state, not an event
            await asyncio.sleep(0)
        await client.chat.completions.create(**ASK)
        assert client.pool.created == 2


async def test_a_stale_connection_is_replaced_unseen() -> None:
    """A server that closes an idle connection in the moment of the next request costs a retry, not an error."""
    requests = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        for _ in range(2):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
            await reader.readexactly(length)
            requests += 1
            if requests == 2:
                break  # as if the request had crossed the end of the connection
            body = completion().body
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            if requests > 2:
                break
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1")
    port = listener.sockets[0].getsockname()[1]
    from chatkore_async import RetryPolicy

    async with AsyncChatKore(
        api_key="k", base_url=f"http://127.0.0.1:{port}", retry=RetryPolicy(initial_delay=0)
    ) as client:
        await client.chat.completions.create(**ASK)
        answer = await client.chat.completions.create(**ASK)
        assert [attempt.error for attempt in answer.meta.attempts] == ["APIConnectionError", None]
    assert requests == 3
    listener.close()
    await listener.wait_closed()


# Limits.


async def test_two_thousand_calls_at_once_with_the_default_limits(server: ChatKoreServer) -> None:
    """Two thousand calls at once share a thousand connections, and all are answered."""
    async with make(server, timeout=Timeout(connect=5)) as client:
        most = 0

        async def call() -> None:
            nonlocal most
            await client.chat.completions.create(**ASK)
            most = max(most, client.pool.waiting) if most < 1000 else most

        await asyncio.gather(*(call() for _ in range(2000)))
        stats = client.pool
    assert (stats.created + stats.reused, stats.in_use, stats.waiting) == (2000, 0, 0)
    assert 100 < stats.created <= 1000
    assert len(server.connections) <= 1000
    assert server.request_count == 2000


async def test_a_busy_loop_is_no_slow_network(server: ChatKoreServer) -> None:
    """With hundreds of calls started at once the loop is late; that is not taken for a connect timeout."""
    async with make(server, limits=Limits(max_connections=None), timeout=Timeout(connect=0.02)) as client:
        await asyncio.gather(*(client.chat.completions.create(**ASK) for _ in range(500)))
        assert client.pool.created == 500


async def test_a_busy_loop_is_no_slow_network_with_tls() -> None:
    """The same holds for handshakes of TLS, which cost the loop more."""
    authority = trustme.CA()
    context, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.configure_trust(trusting)
    async with (
        ChatKoreServer(ssl=context) as server,
        make(server, ssl=trusting, limits=Limits(max_connections=None), timeout=Timeout(connect=0.02)) as client,
    ):
        await asyncio.gather(*(client.chat.completions.create(**ASK) for _ in range(150)))
        assert client.pool.created == 150


async def test_calls_beyond_the_limit_wait_their_turn(server: ChatKoreServer) -> None:
    """With all connections in use calls wait, first come, first served."""
    releases = [asyncio.Event() for _ in range(4)]
    order: list[int] = []

    async def answer(request) -> Reply:
        number = request.json["seed"]
        order.append(number)
        await releases[number].wait()
        return completion()

    server.respond_with(answer)
    async with make(server, limits=Limits(max_connections=1)) as client:
        calls = []
        for seed in range(4):
            calls.append(asyncio.create_task(client.chat.completions.create(**ASK, seed=seed)))
            await turns(2)
        await server.wait_for_requests(1)
        assert (client.pool.in_use, client.pool.waiting) == (1, 3)
        for release, call in zip(releases, calls, strict=True):
            release.set()
            await call
        assert order == [0, 1, 2, 3]
        assert client.pool.created == 1


async def test_a_call_that_waits_in_vain_says_so(server: ChatKoreServer) -> None:
    """A total timeout that passes while a call waits for a connection names the pool, and leaves no hole in it."""
    release = asyncio.Event()
    server.respond_with(lambda _: held(release))
    async with make(server, limits=Limits(max_connections=1)) as client:
        first = asyncio.create_task(client.chat.completions.create(**ASK))
        await server.wait_for_requests(1)
        with pytest.raises(APITimeoutError) as caught:
            await client.chat.completions.create(**ASK, timeout=0.02)
        assert caught.value.phase == "pool"
        assert client.pool.waiting == 0
        release.set()
        await first
        await client.chat.completions.create(**ASK)
        assert client.pool.in_use == 0


async def test_a_limit_for_each_host() -> None:
    """`max_connections_per_host` holds back calls to a busy host and lets those to another pass."""
    release = asyncio.Event()
    async with (
        ChatKoreServer(handler=lambda _: held(release)) as busy,
        ChatKoreServer() as quick,
        make(busy, limits=Limits(max_connections_per_host=2, max_connections=3)) as client,
    ):
        calls = [asyncio.create_task(client.chat.completions.create(**ASK)) for _ in range(3)]
        await busy.wait_for_requests(2)
        assert (client.pool.in_use, client.pool.waiting) == (2, 1)
        other = client.with_options(base_url=quick.base_url)
        await other.chat.completions.create(**ASK)
        calls[0].cancel()
        calls[2].cancel()
        await turns()
        release.set()
        await asyncio.wait(calls)
        assert (client.pool.in_use, client.pool.waiting) == (0, 0)
        await client.chat.completions.create(**ASK)


async def test_cancelling_many_calls_at_once_leaves_no_hole(server: ChatKoreServer) -> None:
    """A task group that is cancelled with calls running and waiting ends as cancelled, and all places are free."""
    server.always(raw(Stall()))
    async with make(server, limits=Limits(max_connections=2)) as client:
        calls = [asyncio.create_task(client.chat.completions.create(**ASK)) for _ in range(6)]
        await server.wait_for_requests(2)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert all(call.cancelled() for call in calls)
        assert (client.pool.in_use, client.pool.waiting) == (0, 0)
        server.always(None)
        await client.chat.completions.create(**ASK)


# Giving back.


async def test_a_stream_that_never_ends_is_not_waited_for_twice(server: ChatKoreServer) -> None:
    """A host that keeps its streams open after `[DONE]` is waited for once, a quarter of a second."""
    server.always(sse(*stream("Hi").steps, Stall()))
    loop = asyncio.get_running_loop()
    async with make(server) as client:
        took = []
        for _ in range(3):
            began = loop.time()
            opened = await client.chat.completions.create(**ASK, stream=True)
            assert (await opened.get_final_completion()).text == "Hi"
            took.append(loop.time() - began)
        assert took[0] >= 0.25
        assert min(took[1:]) < 0.2
        assert client.pool == PoolStats(created=3)


async def test_a_host_that_sends_on_and_on_is_remembered(server: ChatKoreServer) -> None:
    """After 64 KiB behind `[DONE]` the connection is closed, and that host's are not drained again."""
    server.always(sse(*stream("Hi").steps, *[b": more\n\n" * 4096] * 8, Stall()))
    async with make(server) as client:
        for number in (1, 2):
            opened = await client.chat.completions.create(**ASK, stream=True)
            await opened.get_final_completion()
            await server.connections[number - 1].closed()
        assert len(client._manager.pool().never_ending) == 1


async def test_a_stream_cut_after_its_end_is_no_fault_of_the_host(server: ChatKoreServer) -> None:
    """A host whose connection broke once behind `[DONE]` still gets its other connections used again."""
    reply = sse(*stream("Hi").steps)
    server.script(cut_after(reply, len(reply.body)), reply, reply)
    async with make(server) as client:
        for _ in range(3):
            opened = await client.chat.completions.create(**ASK, stream=True)
            await opened.get_final_completion()
        assert not client._manager.pool().never_ending
        assert (client.pool.created, client.pool.reused) == (2, 1)


async def test_a_tail_that_comes_late_is_drained(server: ChatKoreServer) -> None:
    """What follows `[DONE]` within a quarter of a second is read off, and the connection is used again."""
    release = asyncio.Event()
    server.script(sse(*stream("Hi").steps, Hold(release), b": bye\n\n"))
    async with make(server) as client:
        opened = await client.chat.completions.create(**ASK, stream=True)
        async for chunk in opened:
            if chunk.choices[0].finish_reason:
                asyncio.get_running_loop().call_later(0.01, release.set)
        await client.chat.completions.create(**ASK)
        assert (client.pool.created, client.pool.reused) == (1, 1)


async def test_leaving_a_stream_closes_its_connection_at_once(server: ChatKoreServer) -> None:
    """A stream that is left, and one that is collected, free their connection and their place."""
    server.always(stream(["Hel", Stall()]))
    async with make(server) as client:
        async with client.chat.completions.stream(**ASK) as opened:
            await anext(opened)
        assert client.pool.in_use == client.pool.open == 0
        opened = await client.chat.completions.create(**ASK, stream=True)
        del opened
        gc.collect()
        await turns()
        assert client.pool.in_use == client.pool.open == 0


async def test_an_answer_that_breaks_keeps_nothing_of_earlier_ones(server: ChatKoreServer) -> None:
    """Timeouts and aborted streams leave no traceback behind: their frames can be collected."""
    server.always(raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", Stall()))
    async with make(server) as client:

        async def call() -> "weakref.ref[BaseException]":
            with pytest.raises(APITimeoutError) as caught:
                await client.chat.completions.create(**ASK, timeout=0.01)
            return weakref.ref(caught.value)

        error = await call()
        await asyncio.sleep(0)  # the loop still has to tell the transport that it is closed
        gc.collect()
        assert error() is None
    shared = getattr(sys.modules["aiohttp.client_reqrep"], "_CONNECTION_CLOSED_EXCEPTION", None)
    assert shared is None or shared.__traceback__ is None


async def test_nothing_is_kept_of_settings_that_change_with_each_call(server: ChatKoreServer) -> None:
    """A program that computes a new timeout or a new query for each call does not grow."""
    async with make(server) as client:
        for number in range(200):
            timeout = Timeout(connect=10 + number / 7)
            await client.models.list(timeout=timeout, extra_query={"n": number})
        assert len(client._routes) == 1
        pool = client._manager.pool()
        assert not pool.responses
        assert not pool.connector.opened


async def test_a_session_of_the_callers_counts_calls(server: ChatKoreServer) -> None:
    """Of a session that the caller brought, the pool knows what is in use and who waits."""
    release = asyncio.Event()
    server.respond_with(lambda _: held(release))
    async with aiohttp.ClientSession() as session:
        client = make(server, session=session, limits=Limits(max_connections=1))
        calls = [asyncio.create_task(client.chat.completions.create(**ASK)) for _ in range(2)]
        await server.wait_for_requests(1)
        assert client.pool == PoolStats(open=1, in_use=1, waiting=1)
        release.set()
        await asyncio.gather(*calls)
        assert client.pool == PoolStats()


# The parts.


async def test_places_change_hands_in_order() -> None:
    """A place that is given back goes to the one who waits longest; a late comer does not overtake."""
    slots = Slots(1)
    assert slots.take()
    order: list[int] = []

    async def wait(number: int) -> None:
        await slots.wait()
        order.append(number)

    waiters = [asyncio.create_task(wait(number)) for number in range(3)]
    await turns(1)
    slots.release()
    assert not slots.take()
    assert repr(slots) == "<Slots 1/1 waiting 2>"
    slots.release()
    slots.release()
    await asyncio.gather(*waiters)
    assert order == [0, 1, 2]
    slots.release()
    assert slots.in_use == 0


async def test_a_waiter_cancelled_as_its_place_comes_leaves_no_hole() -> None:
    """Whether a waiter is cancelled before, with or after the release, the place is free in the end."""
    for order in ("cancel first", "release first", "cancel alone"):
        slots = Slots(1)
        slots.take()
        waiter = asyncio.create_task(slots.wait())
        await turns(1)
        if order == "release first":
            slots.release()
            waiter.cancel()
        else:
            waiter.cancel()
            if order == "cancel first":
                slots.release()
        await asyncio.wait([waiter])
        assert waiter.cancelled(), order
        if order == "cancel alone":
            slots.release()
        assert (slots.in_use, slots.waiting) == (0, 0), order
        assert slots.take(), order


async def test_one_timer_serves_many_deadlines() -> None:
    """Deadlines expire in time; those that are cancelled, moved or far away do not, and do not pile up."""
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(loop)
    passed: list[str] = []
    now = loop.time()
    deadlines.set(now, lambda: passed.append("now"))
    moved = deadlines.set(now, lambda: passed.append("moved"))
    never = deadlines.set(now, lambda: passed.append("never"))
    earlier = deadlines.set(NEVER, lambda: passed.append("earlier"))
    cancelled = deadlines.set(now, lambda: passed.append("cancelled"))
    moved.when, never.when, earlier.when = now + 100, NEVER, now
    deadlines.watch(earlier)
    deadlines.cancel(cancelled)
    deadlines.cancel(cancelled)
    while len(passed) < 2:  # noqa: ASYNC110 - a state, not an event
        await asyncio.sleep(0)
    assert sorted(passed) == ["earlier", "now"]
    deadlines.cancel(never)
    assert repr(deadlines) == "<Deadlines 1 set>"
    assert repr(moved) == f"<Deadline {now + 100}>"
    moved.when = now + 50
    deadlines.watch(moved)
    for _ in range(500):
        deadlines.cancel(deadlines.set(now + 200, passed.clear))
    assert len(deadlines) == 1
    deadlines.close()
    deadlines.close()
    assert len(passed) == 2
