"""Deadlines: what is waited for and how long, and whose cancellation is whose."""

import asyncio
import socket
from collections.abc import Iterator

import pytest

from chatkore_async import (
    APIConnectionError,
    APIError,
    APITimeoutError,
    AsyncChatKore,
    InternalServerError,
    Limits,
    RateLimitError,
    RetryPolicy,
    StreamStalledError,
    Timeout,
)
from chatkore_async.testing import ChatKoreServer, Hold, Pause, Ping, Stall, completion, error, raw, sse, stream

ASK = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}


class Shut:
    """A limiter that lets nobody in."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def acquire(self, demand: object, /) -> object:
        self.asked.set()
        return await asyncio.get_running_loop().create_future()

    def release(self, permit: object, report: object, /) -> None:
        raise AssertionError("no permit was given")


@pytest.fixture
def silent() -> Iterator[str]:
    """An https URL where connections are accepted and nothing ever comes back."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"https://127.0.0.1:{listening.getsockname()[1]}"


both_ways = pytest.mark.parametrize("way", ["create", "stream"])


async def ask(client: AsyncChatKore, way: str, **options: object) -> str:
    if way == "create":
        return (await client.chat.completions.create(**ASK, **options)).text
    async with client.chat.completions.stream(**ASK, **options) as answer:
        return (await answer.get_final_completion()).text


def uncancelled() -> None:
    """A timeout of ours leaves no trace in the task."""
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


# What was being waited for.


@both_ways
async def test_phase_queue(client: AsyncChatKore, server: ChatKoreServer, way: str) -> None:
    """An explicit total counts the limiter's queue."""
    with pytest.raises(APITimeoutError, match=r"timed out after 0\.02 s, waiting for the rate limiter") as caught:
        await ask(client.with_options(rate_limit=Shut()), way, timeout=0.02)
    assert caught.value.phase == "queue"
    assert isinstance(caught.value, TimeoutError)
    assert server.request_count == 0
    uncancelled()


@both_ways
@pytest.mark.parametrize("limits", [Limits(max_connections=1), Limits(max_connections_per_host=1)])
async def test_phase_pool(server: ChatKoreServer, limits: Limits, way: str) -> None:
    """A call that gets no place in time says so, and leaves the queue; host and pool alike."""
    server.script(stream(["a", Stall()]))
    async with AsyncChatKore(api_key="k", base_url=server.base_url, limits=limits) as client:
        async with client.chat.completions.stream(**ASK):
            with pytest.raises(APITimeoutError, match="a free connection") as caught:
                await ask(client, way, timeout=0.02)
            assert caught.value.phase == "pool"
            assert (client.pool.in_use, client.pool.waiting) == (1, 0)
        assert client.pool.in_use == 0
        assert await ask(client, way, timeout=5)
    uncancelled()


async def test_a_host_place_is_given_back_when_the_pool_is_full(server: ChatKoreServer) -> None:
    """A call that has its host's place and waits for the pool's holds neither after its timeout."""
    server.script(stream(["a", Stall()]))
    limits = Limits(max_connections=1, max_connections_per_host=2)
    async with AsyncChatKore(api_key="k", base_url=server.base_url, limits=limits) as client:
        async with client.chat.completions.stream(**ASK):
            for _ in range(3):
                with pytest.raises(APITimeoutError) as caught:
                    await ask(client, "create", timeout=0.01)
                assert caught.value.phase == "pool"
        assert await ask(client, "create")


@pytest.mark.parametrize(
    "way, timeout",
    [
        ("create", Timeout(connect=0.02)),
        ("create", Timeout(total=0.1)),
        ("stream", Timeout(connect=0.02)),
        ("stream", Timeout(total=0.1)),
        ("stream", Timeout(idle=0.1)),
    ],
)
async def test_phase_connect(silent: str, timeout: Timeout, way: str) -> None:
    """A connection that does not open in time says so, whichever limit it was."""
    async with AsyncChatKore(api_key="k", base_url=silent, max_retries=0) as client:
        with pytest.raises(APITimeoutError) as caught:
            await ask(client, way, timeout=timeout)
        assert caught.value.phase == "connect"
        assert client.pool.in_use == 0
    uncancelled()


async def test_a_connect_timeout_is_retried(silent: str) -> None:
    """What did not connect was not sent, so it is tried as often as the policy says."""
    policy = RetryPolicy(initial_delay=0, retry_unconfirmed=False)
    async with AsyncChatKore(api_key="k", base_url=silent, retry=policy, timeout=Timeout(connect=0.01)) as client:
        with pytest.raises(APITimeoutError) as caught:
            await ask(client, "create")
    assert len(caught.value.attempts) == 3
    uncancelled()


@both_ways
@pytest.mark.parametrize("reply", [raw(Stall()), raw(b"HTTP/1.1 20", Stall())])
async def test_phase_answer(client: AsyncChatKore, server: ChatKoreServer, reply: object, way: str) -> None:
    """A server that takes the request and does not answer."""
    server.always(reply)
    with pytest.raises(APITimeoutError, match="waiting for the answer") as caught:
        await ask(client, way, timeout=0.3)
    assert caught.value.phase == "answer"
    uncancelled()


async def test_phase_answer_for_a_body_that_does_not_end(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """An awaited answer is waited for to its end; the connection is closed at the deadline."""
    server.always(sse(b"{", Stall()))
    with pytest.raises(APITimeoutError) as caught:
        await ask(client, "create", timeout=0.3)
    assert caught.value.phase == "answer"
    assert await server.requests[0].finished() == "gone"
    uncancelled()


@pytest.mark.parametrize("timeout", [Timeout(first_token=0.3), Timeout(total=0.3)])
async def test_phase_first_token(client: AsyncChatKore, server: ChatKoreServer, timeout: Timeout) -> None:
    """Headers and pings are no token, whichever limit it was."""
    server.always(sse(Ping(), b'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n', Stall()))
    with pytest.raises(APITimeoutError, match="the first token") as caught:
        await ask(client, "stream", timeout=timeout, max_retries=0)
    assert caught.value.phase == "first_token"
    assert caught.value.partial is None
    uncancelled()


@pytest.mark.parametrize("reply", [raw(Stall()), sse(Stall())])
async def test_first_token_counts_from_sending(client: AsyncChatKore, server: ChatKoreServer, reply: object) -> None:
    """`first_token` includes the wait for the status line, and idle may strike before the first delta, too."""
    server.always(reply)
    with pytest.raises(APITimeoutError) as caught:
        await ask(client, "stream", timeout=Timeout(first_token=0.02), max_retries=0)
    assert caught.value.phase == "first_token"
    with pytest.raises(APITimeoutError) as caught:
        await ask(client, "stream", timeout=Timeout(idle=0.02), max_retries=0)
    assert caught.value.phase in ("connect", "answer", "idle")
    uncancelled()


@pytest.mark.parametrize("noise", [(), (Ping(), Pause(0.02)) * 50])
async def test_phase_idle(client: AsyncChatKore, server: ChatKoreServer, noise: tuple[object, ...]) -> None:
    """Silence between two events is a stall, and comments are silence."""
    server.always(stream(["Hel", *noise, Stall()]))
    with pytest.raises(StreamStalledError, match=r"nothing but silence or pings for 0\.3 s") as caught:
        await ask(client, "stream", timeout=Timeout(idle=0.3))
    assert caught.value.phase == "idle"
    assert caught.value.partial.text == "Hel"
    assert server.request_count == 1
    assert await server.requests[0].finished() == "gone"
    uncancelled()


async def test_events_reset_idle(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A stream may take longer than `idle` as long as events come."""
    server.always(stream(list("abcdefgh"), interval=0.1))
    assert await ask(client, "stream", timeout=Timeout(idle=0.5)) == "abcdefgh"


@pytest.mark.parametrize("timeout", [0.3, Timeout(total=0.3, idle=None)])
async def test_phase_total(client: AsyncChatKore, server: ChatKoreServer, timeout: object) -> None:
    """Once deltas flow, the total is what passes; what came is in `.partial`."""
    server.always(stream(["Hel", Stall()]))
    with pytest.raises(APITimeoutError, match="the end of the stream") as caught:
        await ask(client, "stream", timeout=timeout)
    assert caught.value.phase == "total"
    assert caught.value.partial.text == "Hel"
    assert not isinstance(caught.value, StreamStalledError)
    assert server.request_count == 1
    uncancelled()


# One deadline over everything.


async def test_the_total_runs_over_all_attempts(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """Attempts do not get a deadline of their own each."""
    server.script(error(500, latency=0.03), error(500, latency=0.03), completion(latency=30))
    with pytest.raises(APITimeoutError) as caught:
        await ask(client, "create", timeout=0.6)
    assert [attempt.error for attempt in caught.value.attempts] == ["InternalServerError"] * 2 + ["APITimeoutError"]
    assert caught.value.meta.timings.total < 5
    uncancelled()


@both_ways
async def test_a_back_off_that_would_pass_the_deadline_is_not_begun(
    client: AsyncChatKore, server: ChatKoreServer, way: str
) -> None:
    """The last error tells more than a timeout would, and sooner."""
    server.always(error(429, headers={"retry-after": "30"}))
    with pytest.raises(RateLimitError) as caught:
        await ask(client, way, timeout=20)
    assert caught.value.meta.timings.total < 5
    assert caught.value.retry_after == 30
    assert server.request_count == 1


async def test_no_server_is_idle_during_a_back_off(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """`idle` and `first_token` do not run while we wait for the next attempt."""
    server.script(error(429, headers={"retry-after": "0.6"}), stream("fine"))
    assert await ask(client, "stream", timeout=Timeout(idle=0.4, first_token=0.4)) == "fine"


async def test_nobody_is_idle_while_the_limiter_waits(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """`idle` and `first_token` do not run in the queue before a second attempt, either."""

    class Slow:
        async def acquire(self, demand, /):
            if demand.attempt == 2:
                await asyncio.wait([asyncio.get_running_loop().create_future()], timeout=0.6)

        def release(self, permit, report, /):
            pass

    server.script(error(503), stream("fine"))
    limited = client.with_options(rate_limit=Slow())
    assert await ask(limited, "stream", timeout=Timeout(idle=0.4, first_token=0.4)) == "fine"


async def test_a_default_total_counts_from_admission(
    client: AsyncChatKore, server: ChatKoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A total nobody chose does not count the queue that somebody did choose; a chosen one does."""
    loop = asyncio.get_running_loop()
    real = loop.time
    ahead = 0.0
    monkeypatch.setattr(loop, "time", lambda: real() + ahead)

    class Hours:
        async def acquire(self, demand, /):
            nonlocal ahead
            ahead += 7200
            for _ in range(5):
                await asyncio.sleep(0)

        def release(self, permit, report, /):
            pass

    limited = client.with_options(rate_limit=Hours())
    assert await ask(limited, "create")
    with pytest.raises(APITimeoutError) as caught:
        await ask(limited, "create", timeout=Timeout(total=600))
    assert caught.value.phase == "queue"
    # After its admission the default runs.
    server.script(sse(b" ", Stall()))
    task = asyncio.create_task(ask(limited, "create"))
    await server.wait_for_requests(2, timeout=None)
    ahead += 599
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done()
    ahead += 2
    with pytest.raises(APITimeoutError, match="600 s"):
        await task


async def test_no_timeout_waits(client: AsyncChatKore, server: ChatKoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout=None` sets no deadline at all, for calls and streams."""
    loop = asyncio.get_running_loop()
    real = loop.time
    ahead = 0.0
    monkeypatch.setattr(loop, "time", lambda: real() + ahead)
    held = asyncio.Event()
    server.script(sse(b" ", Hold(held), completion("late").body), stream(["a", Hold(held), "b"]))
    awaited = asyncio.create_task(ask(client, "create", timeout=None))
    await server.wait_for_requests(1)
    streamed = asyncio.create_task(ask(client, "stream", timeout=None))
    await server.wait_for_requests(2)
    assert len(client._manager.pool().deadlines) == 0
    ahead = 1e6
    for _ in range(50):
        await asyncio.sleep(0)
    held.set()
    assert (await awaited, await streamed) == ("late", "ab")


async def test_a_stream_has_no_total_of_its_own(
    client: AsyncChatKore, server: ChatKoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left alone, the total is for awaited calls; a stream may take hours while events come."""
    loop = asyncio.get_running_loop()
    real = loop.time
    ahead = 0.0
    monkeypatch.setattr(loop, "time", lambda: real() + ahead)
    held = asyncio.Event()
    server.script(stream(["a", Hold(held), "b"]))
    async with client.chat.completions.stream(**ASK) as answer:
        async for chunk in answer:
            if chunk.text == "a":
                ahead += 7200
                for _ in range(20):
                    await asyncio.sleep(0)
                held.set()
    assert (answer.completeness, answer.snapshot.text) == ("complete", "ab")


# A reader takes its time.


@pytest.mark.parametrize("timeout", [Timeout(idle=0.3), Timeout(first_token=0.3, idle=None), Timeout(first_token=0.3)])
async def test_a_slow_reader_is_no_idle_server(client: AsyncChatKore, server: ChatKoreServer, timeout: Timeout) -> None:
    """`idle` runs only while the reader waits, and `first_token` is over with the first delta."""
    held = asyncio.Event()
    server.script(stream(["a", Hold(held), "b"]))
    async with client.chat.completions.stream(**ASK, timeout=timeout) as answer:
        async for chunk in answer:
            if chunk.text == "a":
                await asyncio.wait([asyncio.get_running_loop().create_future()], timeout=0.5)
                held.set()
    assert answer.snapshot.text == "ab"
    assert answer.completeness == "complete"


async def test_the_total_passes_while_the_reader_is_away(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """The connection is closed at the deadline; what had arrived is handed out, then the timeout is raised."""
    server.script(sse(*stream(["a", "b", "c"], done=False, finish_reason=None, usage=False).steps, Stall()))
    got = []
    with pytest.raises(APITimeoutError) as caught:
        async with client.chat.completions.stream(**ASK, timeout=0.4) as answer:
            async for chunk in answer:
                got.append(chunk.text)
                if chunk.text == "a":
                    await server.requests[0].finished()
                    assert client.pool.in_use == 0
    assert "".join(got) == "abc"
    assert caught.value.phase == "total"
    assert caught.value.partial.text == "abc"


async def test_a_finished_stream_is_finished_whatever_the_clock(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A deadline that passes once everything has arrived takes nothing away."""
    server.script(stream("all of it"))
    async with client.chat.completions.stream(**ASK, timeout=0.4) as answer:
        await asyncio.wait([asyncio.get_running_loop().create_future()], timeout=0.5)
        assert (await answer.get_final_completion()).text == "all of it"
    assert answer.completeness == "complete"


async def test_silence_after_the_finish_reason_is_no_stall(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A relay that hangs after the last finish reason said everything it had to say."""
    server.script(sse(*stream("all", done=False, usage=False).steps, Stall()))
    assert await ask(client, "stream", timeout=Timeout(idle=0.3)) == "all"


# Whose cancellation it is.


@pytest.mark.parametrize("place", ["queue", "pool", "connect", "answer", "first_token", "total", "back-off"])
async def test_a_cancellation_from_outside_is_never_swallowed(
    client: AsyncChatKore, server: ChatKoreServer, silent: str, place: str
) -> None:
    """`task.cancel()` ends a call wherever it is, and stays a cancellation."""
    other = client
    server.always(sse(Stall()))
    ready = server.wait_for_requests(1)
    if place == "queue":
        ready.close()
        limiter = Shut()
        other, ready = client.with_options(rate_limit=limiter), limiter.asked.wait()
    elif place == "connect":
        ready.close()
        other, ready = client.with_options(base_url=silent), asyncio.sleep(0)
    elif place == "answer":
        server.always(raw(Stall()))
    elif place == "total":
        server.always(stream(["a", Stall()]))
    elif place == "back-off":
        server.always(error(429, headers={"retry-after": "50"}))
    task = asyncio.create_task(ask(other, "stream", timeout=Timeout(total=100, first_token=60)))
    await ready
    for _ in range(10):
        await asyncio.sleep(0)
    task.cancel("mine")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert task.cancelling() == 1
    assert client.pool.in_use == 0


@pytest.mark.parametrize("place", ["queue", "connect", "answer", "first_token", "total"])
async def test_both_at_once_is_a_cancellation(
    client: AsyncChatKore, server: ChatKoreServer, silent: str, place: str
) -> None:
    """When our deadline and somebody's `cancel()` come together, the cancellation wins."""
    other, timeout = client, Timeout(total=0.03)
    server.always(sse(Stall()))
    if place == "queue":
        other = client.with_options(rate_limit=Shut())
    elif place == "connect":
        other, timeout = client.with_options(base_url=silent), Timeout(connect=0.03)
    elif place == "answer":
        server.always(raw(Stall()))
    elif place == "total":
        server.always(stream(["a", Stall()]))
    task = asyncio.create_task(ask(other, "stream", timeout=timeout, max_retries=0))
    loop = asyncio.get_running_loop()
    turns = 0

    def watch() -> None:
        # In the very turn in which the deadline cancels; where it closes the connection instead, soon after.
        nonlocal turns
        if task.cancelling() or (client.pool.in_use == 0 and turns > 2000):
            task.cancel()
        elif not task.done():
            turns += 1
            loop.call_soon(watch)

    loop.call_soon(watch)
    await asyncio.wait([task])
    if place in ("queue", "connect", "answer"):
        assert task.cancelled()
    else:
        assert task.cancelled() or isinstance(task.exception(), APITimeoutError)


@both_ways
async def test_asyncio_timeout_around_our_calls_works(client: AsyncChatKore, server: ChatKoreServer, way: str) -> None:
    """`asyncio.timeout()` outside is a plain `TimeoutError` of its own, not one of ours."""
    server.always(sse(Stall()))
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0.05):
            await ask(client, way, timeout=50)
    assert not isinstance(caught.value, APIError)
    uncancelled()
    with pytest.raises(APITimeoutError):
        async with asyncio.timeout(50):
            await ask(client, way, timeout=0.05, max_retries=0)
    uncancelled()


async def test_nested_timeouts_do_not_mix(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """The innermost limit that passes is the one that is raised, with ours inside, between and after others."""
    server.always(sse(Stall()))
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0.1):
            for _ in range(2):
                with pytest.raises(APITimeoutError):
                    async with asyncio.timeout(5):
                        await ask(client, "stream", timeout=0.02)
            async with asyncio.timeout(5):
                await ask(client, "create", timeout=5)
    assert not isinstance(caught.value, APIError)
    uncancelled()


async def test_a_task_group_survives_our_timeout(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A timeout of ours that is caught is over: the group goes on and the task can be cancelled later."""
    server.script(sse(Stall()))

    async def careful() -> str:
        with pytest.raises(APITimeoutError):
            await ask(client, "create", timeout=0.02)
        uncancelled()
        return await ask(client, "create")

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(careful()) for _ in range(3)]
        server.script(sse(Stall()), sse(Stall()))
    assert all(task.result() for task in tasks)


async def test_a_cancelled_task_may_clean_up_with_a_call(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A task that was cancelled, and makes a call in its clean-up, gets our timeout as a timeout."""
    server.script(sse(Stall()), sse(Stall()))

    async def work() -> None:
        try:
            await ask(client, "create")
        except asyncio.CancelledError:
            with pytest.raises(APITimeoutError):
                await ask(client, "create", timeout=0.02)
            raise

    task = asyncio.create_task(work())
    await server.wait_for_requests(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelling() == 1


async def test_a_deadline_during_a_key_callable_is_a_timeout(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A vault that hangs is bounded by the total, like everything."""

    async def vault() -> str:
        return await asyncio.get_running_loop().create_future()

    with pytest.raises(APITimeoutError):
        await ask(client.with_options(api_key=vault), "create", timeout=0.02)
    assert server.request_count == 0
    uncancelled()


async def test_a_deadline_that_comes_with_a_late_wake_up_is_a_timeout(
    client: AsyncChatKore, server: ChatKoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A back-off that ends after the deadline, since the loop was busy, ends as a timeout and not as a cancellation."""
    loop = asyncio.get_running_loop()
    real = loop.time
    ahead = 0.0
    monkeypatch.setattr(loop, "time", lambda: real() + ahead)
    server.always(error(503, headers={"retry-after": "10"}))
    task = asyncio.create_task(ask(client, "create", timeout=20))
    await server.wait_for_requests(1)
    await server.requests[0].finished()
    for _ in range(20):
        await asyncio.sleep(0)
    ahead = 100.0
    await asyncio.wait([task])
    assert isinstance(task.exception(), APITimeoutError)
    assert isinstance(task.exception(), APIConnectionError)
    assert task.cancelling() == 0
    assert server.request_count == 1


async def test_the_error_of_the_last_attempt_is_kept_when_time_is_up(
    client: AsyncChatKore, server: ChatKoreServer
) -> None:
    """With no time left, a fresh failure is raised as what it is."""
    server.always(error(500, latency=0.02))
    policy = RetryPolicy(initial_delay=1e6, max_delay=1e6)
    with pytest.raises(InternalServerError):
        await ask(client.with_options(retry=policy), "create", timeout=0.5)
    assert server.request_count == 1
