"""Many calls at once: all are answered, and nothing is left behind."""

import asyncio
import collections
import contextlib
import gc
import time

import pytest

from chatkore_async import APIError, APITimeoutError, AsyncChatKore, Limits, RetryPolicy, Timeout
from chatkore_async.testing import (
    ChatKoreServer,
    Cut,
    Hold,
    Reply,
    Reset,
    Stall,
    completion,
    error,
    html,
    raw,
    sse,
    stream,
)

ASK = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(autouse=True)
async def _no_debug() -> None:
    # Thousands of tracebacks of where each task was made tell nothing here and take minutes.
    asyncio.get_running_loop().set_debug(False)


def nothing_left(client: AsyncChatKore) -> None:
    """Places back, deadlines gone, no task of ours, nobody waiting."""
    pool = client._manager.pool()
    assert (client.pool.in_use, client.pool.waiting) == (0, 0)
    assert (pool.slots.in_use, len(pool.deadlines)) == (0, 0)
    ours = [task for task in asyncio.all_tasks() if "chatkore_async/_" in repr(task)]
    assert ours == []


async def streamed(client: AsyncChatKore, **options: object) -> str:
    async with client.chat.completions.stream(**ASK, **options) as answer:
        return (await answer.get_final_completion()).text


async def test_two_thousand_calls_at_once(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """With default limits, calls beyond the thousandth wait their turn, and all are answered."""
    answers = await asyncio.gather(*(client.chat.completions.create(**ASK) for _ in range(2000)))
    assert len({answer.text for answer in answers}) == 1
    assert server.request_count == 2000
    assert len(server.connections) <= 1000
    assert client.pool.created + client.pool.reused == 2000
    nothing_left(client)


async def test_ten_thousand_calls_through_a_narrow_pool(server: ChatKoreServer) -> None:
    """A pool of fifty serves ten thousand calls with fifty connections, first come, first served."""
    server.always(completion("x"))
    async with AsyncChatKore(api_key="k", base_url=server.base_url, limits=Limits(max_connections=50)) as client:
        order: list[int] = []

        async def one(number: int) -> None:
            await client.chat.completions.create(**ASK)
            order.append(number)

        async with asyncio.TaskGroup() as group:
            for number in range(10_000):
                group.create_task(one(number))
        assert len(server.connections) == client.pool.created == 50
        assert max(abs(place - number) for place, number in enumerate(order)) < 500
        nothing_left(client)


async def test_two_hundred_streams_side_by_side(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """Streams that run at the same time do not mix."""
    server.respond_with(lambda request: stream([request.json["user"] + " "] * 20))
    texts = await asyncio.gather(*(streamed(client, user=f"u{number}") for number in range(200)))
    assert texts == [f"u{number} " * 20 for number in range(200)]
    nothing_left(client)


@pytest.mark.parametrize("way", ["create", "stream"])
async def test_half_of_them_are_cancelled(server: ChatKoreServer, way: str) -> None:
    """Cancelled calls, sent, waiting or reading, take nothing with them; the others are answered."""
    go_on = asyncio.Event()

    async def held(_: object) -> Reply:
        await go_on.wait()
        return completion("ab")

    if way == "stream":
        server.always(stream(["a", Hold(go_on), "b"]))
    else:
        server.respond_with(held)
    async with AsyncChatKore(api_key="k", base_url=server.base_url, limits=Limits(max_connections=40)) as client:

        async def one() -> str:
            return await streamed(client) if way == "stream" else (await client.chat.completions.create(**ASK)).text

        tasks = [asyncio.create_task(one()) for _ in range(400)]
        for turn in range(200):
            await asyncio.sleep(0)
            tasks[turn * 2].cancel()
        go_on.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(result == "ab" for result in results[1::2])
        assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])
        nothing_left(client)
        assert await one() == "ab"


async def test_a_crowd_that_times_out_leaves_no_trace(server: ChatKoreServer) -> None:
    """Hundreds of deadlines that pass together, in the pool's queue and on the wire, free everything."""
    server.always(sse(Stall()))
    limits = Limits(max_connections=20, max_connections_per_host=10)
    async with AsyncChatKore(api_key="k", base_url=server.base_url, limits=limits, max_retries=0) as client:
        calls = [streamed(client, timeout=0.2) for _ in range(150)]
        calls += [client.chat.completions.create(**ASK, timeout=0.2) for _ in range(150)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(result) for result in results} == {APITimeoutError}
        assert {result.phase for result in results} >= {"pool"}
        assert asyncio.current_task().cancelling() == 0
        nothing_left(client)
        server.always(None)
        assert (await client.chat.completions.create(**ASK)).text


async def test_a_server_that_dies_under_load(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """When the server goes, every call and stream gets an error of ours, and the next server is used at once."""
    server.always(stream(["a", Stall()]))
    client = client.with_options(max_retries=0)
    tasks = [asyncio.create_task(streamed(client)) for _ in range(100)]
    tasks += [asyncio.create_task(streamed(client, timeout=Timeout(total=30))) for _ in range(50)]
    await server.wait_for_requests(150)
    await server.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, APIError) for result in results)
    nothing_left(client)
    server.clear()
    await server.start()
    assert await streamed(client.with_options(max_retries=3))


async def test_a_mix_of_all_misfortunes(server: ChatKoreServer) -> None:
    """Whatever a bad day brings, each call ends in an answer or an error of ours, and nothing stays behind."""
    replies = [
        completion("fine"),
        error(503),
        error(429, headers={"retry-after": "0"}),
        html(502, "Bad gateway"),
        raw(Cut()),
        raw(Reset()),
        raw(b"nonsense\r\n\r\n"),
        sse(b'data: {"choices": [{"del', Cut()),
        stream("fine", finish_reason=None, done=False, usage=False),
        stream(["fi", Reset()]),
        stream("fine"),
        error(401),
    ]
    turn = iter(range(10**6))
    server.respond_with(lambda request: replies[next(turn) % len(replies)])
    policy = RetryPolicy(initial_delay=0)
    limits = Limits(max_connections=30)
    async with AsyncChatKore(api_key="k", base_url=server.base_url, retry=policy, limits=limits) as client:
        calls = [streamed(client) if number % 2 else client.chat.completions.create(**ASK) for number in range(600)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        wrong = [result for result in results if isinstance(result, BaseException) and not isinstance(result, APIError)]
        assert wrong == []
        assert any(not isinstance(result, BaseException) for result in results)
        nothing_left(client)


async def test_streams_dropped_without_a_word(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """Fifty streams that nobody closed are freed by the collector, all of them."""
    server.always(stream(["a", Stall()]))

    async def careless() -> None:
        async for _ in client.chat.completions.stream(**ASK):
            return

    await asyncio.gather(*(careless() for _ in range(50)))
    gc.collect()
    async with asyncio.timeout(5):
        while client.pool.in_use:  # noqa: ASYNC110 - not ours to signal
            await asyncio.sleep(0)
    nothing_left(client)


async def test_calls_leave_no_garbage(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A call that is over is freed by reference counting, not by the next collection."""
    for _ in range(5):
        await client.chat.completions.create(**ASK)
        await streamed(client)
    kinds = ("Call", "Notes", "Exchange", "ChatStream", "EventReader", "Accumulator")
    gc.collect()
    gc.disable()
    try:
        before = collections.Counter(type(thing).__name__ for thing in gc.get_objects())
        for _ in range(20):
            await client.chat.completions.create(**ASK)
            await streamed(client)
        await asyncio.sleep(0)
        after = collections.Counter(type(thing).__name__ for thing in gc.get_objects())
    finally:
        gc.enable()
    assert {kind: after[kind] - before[kind] for kind in kinds if after[kind] - before[kind] > 3} == {}


async def test_a_waiting_crowd_is_cancelled_quickly(server: ChatKoreServer) -> None:
    """Leaving a queue of thousands costs no time that grows with its square."""
    server.always(sse(Stall()))
    async with AsyncChatKore(api_key="k", base_url=server.base_url, limits=Limits(max_connections=1)) as client:
        tasks = [asyncio.create_task(client.chat.completions.create(**ASK)) for _ in range(5000)]
        await server.wait_for_requests(1)
        began = time.perf_counter()
        for task in reversed(tasks):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert time.perf_counter() - began < 5
        nothing_left(client)
