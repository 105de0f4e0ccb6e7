"""The limiter in a client: what it is asked and told, holds on real sockets, and deadlines in the queue."""

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

import pytest

from chatkore_async import (
    APIConnectionError,
    APITimeoutError,
    AsyncChatKore,
    Demand,
    InsufficientQuotaError,
    InternalServerError,
    RateLimit,
    RateLimiter,
    RateLimitError,
    Report,
    RetryPolicy,
    Timeout,
    estimate_tokens,
)
from chatkore_async._group import Permit
from chatkore_async.testing import ChatKoreServer, Reset, Stall, completion, error, raw, sse, stream

ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


class Watched(RateLimiter):
    """A limiter that remembers what it was asked and told."""

    def __init__(self, limit: RateLimit) -> None:
        super().__init__(limit)
        self.asked: list[Demand] = []
        self.told: list[Report] = []
        self.is_told = asyncio.Event()
        self.told_at: list[float] = []
        self.let_in_at: list[float] = []

    async def acquire(self, demand: Demand, /) -> object:
        self.asked.append(demand)
        permit = await super().acquire(demand)
        assert isinstance(permit, Permit)
        self.let_in_at.append(permit.at)
        return permit

    def release(self, permit: object, report: Report, /) -> None:
        self.told.append(report)
        self.is_told.set()
        self.told_at.append(asyncio.get_running_loop().time())
        super().release(permit, report)


@pytest.fixture
def limit() -> RateLimit:
    return RateLimit(adaptive=False)


@pytest.fixture
async def limiter(limit: RateLimit) -> AsyncIterator[Watched]:
    """A limiter that has every permit back in the end."""
    limiter = Watched(limit)
    yield limiter
    assert (limiter.in_flight, limiter.waiting) == (0, 0)


@pytest.fixture
async def limited(client: AsyncChatKore, limiter: Watched) -> AsyncChatKore:
    return client.with_options(rate_limit=limiter)


async def ask(client: AsyncChatKore, **options: Any) -> str:
    return (await client.chat.completions.create(**ASK, **options)).text


@pytest.mark.parametrize("limit", [RateLimit(), RateLimit(adaptive=False)], ids=["adaptive", "not adaptive"])
async def test_no_task_sends_before_a_hold_is_over(
    limited: AsyncChatKore, limiter: Watched, server: ChatKoreServer
) -> None:
    """One of four is refused for 0.2 s: those that come meanwhile go out no earlier, by the server's own record."""
    server.script(error(429, headers={"retry-after": "0.2"}), *[completion(latency=0.01)] * 3)
    first = [asyncio.create_task(ask(limited)) for _ in range(4)]
    await limiter.is_told.wait()
    later = [asyncio.create_task(ask(limited)) for _ in range(2)]
    await asyncio.gather(*first, *later)
    assert limiter.told[0].status == 429
    assert server.request_count == 7
    assert min(request.received_at for request in server.requests[4:]) >= limiter.told_at[0] + 0.2


@pytest.mark.parametrize("limit", [RateLimit(adaptive=False, max_concurrency=4)])
async def test_nobody_in_the_queue_is_let_in_while_a_hold_is_on(
    limited: AsyncChatKore, limiter: Watched, server: ChatKoreServer
) -> None:
    """Thirty tasks, four at a time, and three requests are refused for 50 ms: all wait, and all are answered."""
    numbers = count(1)
    server.respond_with(
        lambda _: error(429, headers={"retry-after-ms": "50"}) if next(numbers) in (5, 15, 25) else completion("done")
    )
    patient = limited.with_options(max_retries=5)
    assert await asyncio.gather(*(ask(patient) for _ in range(30))) == ["done"] * 30
    holds = [at for at, report in zip(limiter.told_at, limiter.told, strict=True) if report.status == 429]
    assert len(holds) == 3
    assert len(limiter.let_in_at) == 33
    for hold in holds:
        assert not [at for at in limiter.let_in_at if hold <= at < hold + 0.05]


@pytest.mark.parametrize("limit", [RateLimit(requests_per_minute=1, adaptive=False)])
async def test_a_deadline_in_the_queue_says_so(limited: AsyncChatKore, limiter: Watched) -> None:
    """A call that waits for leave longer than its total raises with the phase `queue`, and those behind it move up."""
    await ask(limited)
    for options in ({"timeout": 0.05}, {"timeout": Timeout(total=0.05)}):
        with pytest.raises(APITimeoutError, match="the rate limiter's leave") as caught:
            await ask(limited, **options)
        assert caught.value.phase == "queue"
    with pytest.raises(APITimeoutError) as caught:
        async with limited.chat.completions.stream(**ASK, timeout=0.05):
            pass
    assert caught.value.phase == "queue"
    assert limiter.waiting == 0
    assert len(limiter.told) == 1


async def test_the_default_total_counts_from_admission(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """Who chose a queue and no deadline is not timed out by the default while it waits."""
    limiter = Watched(RateLimit(requests_per_minute=600, adaptive=False))
    limited = client.with_options(rate_limit=limiter)
    answers = await asyncio.gather(*(limited.chat.completions.create(**ASK) for _ in range(3)))
    assert max(answer.meta.timings.queued or 0 for answer in answers) >= 0.19


async def test_the_limiter_is_asked_with_what_it_needs_and_not_with_the_key(
    limited: AsyncChatKore, limiter: Watched, server: ChatKoreServer
) -> None:
    """The request, to estimate from; a name of the key that is the same for the same key and does not tell it."""
    await ask(limited)
    await ask(limited.with_options(api_key="sk-other"))
    await ask(limited.with_options(api_key=lambda: "sk-test"))
    await limited.models.list()
    first, other, rotating, models = limiter.asked
    assert first.key == rotating.key == models.key != other.key
    assert len(first.key) == 16
    assert (first.body, first.size) == (server.requests[0].body, len(server.requests[0].body))
    assert (models.body, models.size, models.model) == (b"", 0, "")
    assert estimate_tokens(models) == 0
    assert "sk-test" not in repr(limiter.asked)
    assert "Hello" not in repr(limiter.asked)
    assert len(limiter._groups) == 3


async def test_the_limiter_is_told_how_it_went(
    limited: AsyncChatKore, limiter: Watched, server: ChatKoreServer
) -> None:
    """The error by its class, and an error inside a 200 by the status that its code stands for."""
    slow_down = {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}
    no_money = {"error": {"message": "insufficient quota", "code": "insufficient_quota"}}
    once = limited.with_options(max_retries=0)
    server.script(
        sse(b"data: " + json.dumps(slow_down).encode() + b"\n\n", headers={"retry-after-ms": "1"}),
        error(429, body=no_money),
        error(503, "busy", headers={"retry-after-ms": "1"}),
        raw(Reset()),
        stream("Hello."),
    )
    with pytest.raises(RateLimitError):
        await once.chat.completions.stream(**ASK).get_final_completion()
    for kind in (InsufficientQuotaError, InternalServerError, APIConnectionError):
        with pytest.raises(kind):
            await ask(once)
    final = await once.chat.completions.stream(**ASK).get_final_completion()
    assert [(report.status, report.error, report.retry_after) for report in limiter.told] == [
        (429, "RateLimitError", 0.001),
        (429, "InsufficientQuotaError", None),
        (503, "InternalServerError", 0.001),
        (None, "APIConnectionError", None),
        (200, None, None),
    ]
    assert limiter.told[-1].usage == final.usage is not None


@pytest.mark.parametrize("limit", [RateLimit(max_concurrency=1, adaptive=False)])
async def test_a_place_comes_back_however_a_call_ends(
    limited: AsyncChatKore, limiter: Watched, server: ChatKoreServer
) -> None:
    """Cancelled in the queue or under way, left, collected, failed: the next one goes out each time."""
    server.script(stream("Hello, you there."), stream("Hello."), sse(Stall()), error(400), completion("last"))
    async with limited.chat.completions.stream(**ASK) as left:
        waits = asyncio.create_task(ask(limited))
        await anext(left)
        waits.cancel()
        await asyncio.wait([waits])
    dropped = limited.chat.completions.stream(**ASK)
    await anext(dropped)
    assert limiter.in_flight == 1
    del dropped
    task = asyncio.create_task(ask(limited))
    await server.wait_for_requests(3)
    task.cancel()
    await asyncio.wait([task])
    with pytest.raises(Exception, match="400"):
        await ask(limited)
    assert await ask(limited) == "last"
    assert limiter.asked[0].model == "m"


async def test_tokens_are_corrected_by_what_answers_and_streams_used(
    client: AsyncChatKore, server: ChatKoreServer
) -> None:
    """Both say what they used, and the estimates follow."""
    limiter = RateLimiter(RateLimit(tokens_per_minute=10**9, estimate=lambda demand: 10))
    limited = client.with_options(rate_limit=limiter)
    used = {"prompt_tokens": 30, "completion_tokens": 10, "total_tokens": 40}
    server.always(completion(usage=used))
    for _ in range(50):
        await ask(limited)
    (group,) = limiter._groups.values()
    assert group.calibration.factor == pytest.approx(4, abs=0.3)
    server.always(stream("Hello.", usage={**used, "total_tokens": 80}))
    for _ in range(50):
        await limited.chat.completions.stream(**ASK).get_final_completion()
    assert group.calibration.factor == pytest.approx(8, abs=0.4)


async def test_a_refused_call_is_retried_by_its_policy_behind_those_who_wait(
    client: AsyncChatKore, server: ChatKoreServer
) -> None:
    """The limiter spaces attempts; how many there are is the business of the retries."""
    limiter = Watched(RateLimit(adaptive=False))
    limited = client.with_options(rate_limit=limiter, retry=RetryPolicy(max_retries=1))
    server.always(error(429, headers={"retry-after-ms": "5"}))
    with pytest.raises(RateLimitError) as caught:
        await ask(limited)
    assert [attempt.status for attempt in caught.value.attempts] == [429, 429]
    assert [demand.attempt for demand in limiter.asked] == [1, 2]
