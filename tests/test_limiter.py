"""The limiter's rules: pace, order, holds, and that no permit is lost. In virtual time, or on values."""

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual import VirtualLoop, demand, run

from chatkore_async import AsyncChatKore, ConfigurationError, Limiter, RateLimit, RateLimiter, Report
from chatkore_async._group import LONGEST_HOLD
from chatkore_async._pacing import BURST, Calibration, Pace
from chatkore_async._ratelimiter import MANY
from chatkore_async.types import Usage


def report(status: int | None = 200, used: int | None = None, **fields: Any) -> Report:
    usage = None if used is None else Usage(total_tokens=used)
    return Report(**{"status": status, "headers": {}, "usage": usage, "retry_after": None, **fields})


REFUSED = report(429, error="RateLimitError")


def now() -> float:
    return asyncio.get_running_loop().time()


async def moments(limiter: RateLimiter, count: int, *, answer: Report | None = None, **fields: Any) -> list[float]:
    """When each of so many attempts that ask at once is let in. Those let in are over after no time."""
    found: list[float] = []

    async def one() -> None:
        permit = await limiter.acquire(demand(**fields))
        found.append(now())
        limiter.release(permit, answer or report())

    await asyncio.gather(*(one() for _ in range(count)))
    return found


def most_within(moments: list[float], seconds: float) -> int:
    return max(sum(start <= moment < start + seconds for moment in moments) for start in moments)


# Pace.


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("per_minute", [6, 60, 600, 60_000])
def test_requests_are_spread_evenly_over_the_minute(per_minute: int, adaptive: bool) -> None:
    """Providers enforce slices of the minute: a tenth of a second's worth at once, then one after the other."""
    limiter = RateLimiter(RateLimit(requests_per_minute=per_minute, adaptive=adaptive))
    found = run(moments(limiter, min(per_minute, 1000) + 1))
    per_second = per_minute / 60
    burst = max(1, round(per_second * BURST))
    assert found.count(0.0) in (burst, burst - 1)  # of many small numbers, the last one may not fit
    assert found[-1] == pytest.approx((len(found) - burst) / per_second, abs=0.003)
    assert most_within(found, 1.0) <= per_second * (1 + BURST) + 1


@pytest.mark.parametrize("per_minute", [6_000, 600_000])
def test_tokens_are_spread_evenly_over_the_minute(per_minute: int) -> None:
    """What is estimated is what is paced, until an answer tells better."""
    limit = RateLimit(tokens_per_minute=per_minute, estimate=lambda demand: 50)
    found = run(moments(RateLimiter(limit), 41, answer=report(used=50)))
    per_second = per_minute / 60 / 50
    burst = max(1, round(per_second * BURST))
    assert found.count(0.0) in (burst, burst - 1)
    assert found[-1] == pytest.approx((41 - burst) / per_second)


def test_after_a_pause_there_is_no_more_than_the_burst() -> None:
    """Allowance is not saved up: a minute of silence does not buy a minute's worth at once."""

    async def main() -> list[float]:
        limiter = RateLimiter(RateLimit(requests_per_minute=6000))
        await moments(limiter, 10)
        await asyncio.sleep(60)
        return await moments(limiter, 100)

    assert most_within(run(main()), 0.001) == 10


def test_a_request_larger_than_the_whole_limit_is_let_through() -> None:
    """It waits until nothing is owed, and those after it wait until its tokens are paid."""
    estimates = iter([100.0, 5000.0, 100.0])
    limit = RateLimit(tokens_per_minute=1000, estimate=lambda demand: next(estimates))
    assert run(moments(RateLimiter(limit), 3)) == pytest.approx([0, 6, 306])


def test_usage_corrects_the_estimate_of_its_request() -> None:
    """An answer that used more than was thought slows down those who wait, one that used less lets them in earlier."""

    async def second(used: int | None, status: int = 200) -> float:
        limit = RateLimit(tokens_per_minute=6000, estimate=lambda demand: 100)
        limiter = RateLimiter(limit)
        limiter.release(await limiter.acquire(demand()), report(status, used))
        await limiter.acquire(demand(size=1))
        return now()

    assert run(second(None)) == 1.0  # the server did not say
    assert run(second(0)) == 1.0
    assert run(second(300)) > 2.5
    assert run(second(10)) < 0.2
    assert run(second(None, 400)) == 0.0  # nothing was generated
    assert run(second(10**400)) == 60.0  # nonsense, and no reason to fail, or to wait for ever


def test_a_limit_of_tokens_and_one_of_requests_hold_together() -> None:
    """Whichever is stricter at the moment."""
    limit = RateLimit(requests_per_minute=60, tokens_per_minute=6000, estimate=lambda demand: demand.size)

    async def main() -> tuple[list[float], list[float]]:
        limiter = RateLimiter(limit)
        small = await moments(limiter, 3, size=1)
        return small, await moments(limiter, 3, size=500)

    small, large = run(main())
    assert small == pytest.approx([0, 1, 2])
    assert large == pytest.approx([3, 8, 13])


def test_attempts_in_flight_are_bounded() -> None:
    """The next one goes out when one is back, in the moment it is."""

    async def main() -> None:
        limiter = RateLimiter(RateLimit(max_concurrency=2))
        first, _ = [await limiter.acquire(demand()) for _ in range(2)]
        third = asyncio.create_task(coroutine(limiter.acquire(demand())))
        await asyncio.sleep(1000)
        assert not third.done()
        assert repr(limiter) == "<RateLimiter 2 in flight, 1 waiting>"
        limiter.release(first, report())
        await third
        assert (now(), limiter.in_flight, limiter.waiting) == (1000, 2, 0)

    run(main())


async def coroutine(awaitable: Awaitable[object]) -> object:
    return await awaitable


def test_each_endpoint_key_and_model_counts_by_itself() -> None:
    """Vendors count so; what one model may is not taken from another."""

    async def main() -> None:
        limiter = RateLimiter(RateLimit(requests_per_minute=1))
        for fields in ({}, {"model": "b"}, {"key": "b"}, {"endpoint": "b"}):
            await limiter.acquire(demand(**fields))
        assert now() == 0

    run(main())


# Order, and leaving.


def test_who_comes_first_is_served_first() -> None:
    """Also by those who find it free in the moment when others wait."""

    async def main() -> list[int]:
        limiter = RateLimiter(RateLimit(requests_per_minute=600, max_concurrency=3))
        served: list[int] = []

        async def one(number: int) -> None:
            await asyncio.sleep(number * 0.03)
            permit = await limiter.acquire(demand())
            served.append(number)
            await asyncio.sleep(0.35)
            limiter.release(permit, report())

        await asyncio.gather(*(one(number) for number in range(100)))
        return served

    assert run(main()) == list(range(100))


def test_who_comes_in_the_moment_when_it_is_free_does_not_get_in_between() -> None:
    """The one who waits for that moment is let in, though the newcomer asks before the timer rings."""

    async def main() -> None:
        limiter = RateLimiter(RateLimit(requests_per_minute=60))
        await limiter.acquire(demand())
        newcomer = limiter.acquire(demand())
        let_in: list[object] = []

        def come() -> None:
            try:
                newcomer.send(None)
            except StopIteration as done:
                let_in.append(done.value)

        asyncio.get_running_loop().call_at(1.0, come)  # before the limiter's timer of the same moment
        await limiter.acquire(demand())
        assert now() == 1
        await asyncio.sleep(0.5)
        assert (let_in, limiter.waiting) == ([], 1)
        newcomer.close()

    run(main())


def test_a_waiter_who_leaves_leaves_no_hole() -> None:
    """Those behind move up, as if it had never come."""

    async def main() -> list[float]:
        limiter = RateLimiter(RateLimit(requests_per_minute=60))
        await limiter.acquire(demand())
        left = [asyncio.create_task(coroutine(limiter.acquire(demand()))) for _ in range(50)]
        stayed = asyncio.create_task(moments(limiter, 3))
        await asyncio.sleep(0.5)
        for task in left:
            task.cancel()
        return await stayed

    assert run(main()) == pytest.approx([1, 2, 3])


@pytest.mark.parametrize("limit", [RateLimit(requests_per_minute=60), RateLimit(max_concurrency=1)])
def test_a_permit_for_one_who_is_cancelled_in_that_moment_goes_on(limit: RateLimit) -> None:
    """It was given, and nobody will use it: the next in line gets it, and nothing is charged."""

    async def main() -> None:
        limiter = RateLimiter(limit)
        permit = await limiter.acquire(demand())
        tasks = [asyncio.create_task(coroutine(limiter.acquire(demand()))) for _ in range(2)]
        await asyncio.sleep(0.5)
        loop = asyncio.get_running_loop()
        if limit.max_concurrency:
            limiter.release(permit, report())
            tasks[0].cancel()
        else:
            loop.call_at(1.0, tasks[0].cancel)  # in the same step of the loop as the limiter's timer, after it
        await asyncio.wait(tasks)
        assert tasks[0].cancelled()
        assert await tasks[1]
        assert now() == (0.5 if limit.max_concurrency else 1.0)

    run(main())


def test_cancelling_everybody_in_any_order_leaves_nothing_behind() -> None:
    """No permit is lost, no line is left, and no timer."""
    import random

    async def main(seed: int) -> None:
        chance = random.Random(seed)
        limiter = RateLimiter(RateLimit(requests_per_minute=6000, max_concurrency=5))

        async def one() -> None:
            permit = await limiter.acquire(demand())
            try:
                await asyncio.sleep(chance.random() / 10)
            finally:
                limiter.release(permit, chance.choice([report(), report(None), REFUSED]))

        tasks = [asyncio.create_task(one()) for _ in range(200)]
        for task in chance.sample(tasks, 150):
            await asyncio.sleep(chance.random() / 20)
            task.cancel()
        await asyncio.wait(tasks)
        assert (limiter.in_flight, limiter.waiting, limiter._lines) == (0, 0, {})

    for seed in range(10):
        run(main(seed))


def test_one_who_is_cancelled_and_passed_over_takes_nobody_along() -> None:
    """Its place is given away before it notices; those who come in that moment wait as before."""

    async def main() -> None:
        limiter = RateLimiter(RateLimit(max_concurrency=1))
        permit = await limiter.acquire(demand())
        cancelled = asyncio.create_task(coroutine(limiter.acquire(demand())))
        await asyncio.sleep(0)
        cancelled.cancel()
        limiter.release(permit, report())
        permit = await limiter.acquire(demand())
        waits = limiter.acquire(demand())
        waiter = waits.send(None)
        await asyncio.wait([cancelled])
        assert (limiter.in_flight, limiter.waiting) == (1, 1)
        limiter.release(permit, report())
        assert waiter.done()
        waits.close()
        assert (limiter.in_flight, limiter.waiting) == (0, 0)

    run(main())


def test_a_coroutine_that_is_closed_leaves_the_line() -> None:
    """As when a framework drops a request without cancelling it."""

    async def main() -> None:
        limiter = RateLimiter(RateLimit(max_concurrency=1))
        permit = await limiter.acquire(demand())
        waiting = limiter.acquire(demand())
        waiting.send(None)
        assert limiter.waiting == 1
        waiting.close()
        assert limiter.waiting == 0
        limiter.release(permit, report())
        await limiter.acquire(demand())

    run(main())


def test_ten_thousand_who_wait_share_one_timer() -> None:
    """A timer for each would cost more than the waiting."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        limiter = RateLimiter(RateLimit(requests_per_minute=1))
        await limiter.acquire(demand())
        before = loop.timers
        tasks = [asyncio.create_task(coroutine(limiter.acquire(demand()))) for _ in range(10_000)]
        await asyncio.sleep(0)
        assert (limiter.waiting, loop.timers - before) == (10_000, 1)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert limiter.waiting == 0

    run(main())


def test_waiters_who_come_and_go_leave_no_timers() -> None:
    """During a long hold, thousands of calls may come, time out, and be gone."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        limiter = RateLimiter()
        limiter.release(await limiter.acquire(demand()), report(429, retry_after=200.0))
        for _ in range(1000):
            task = asyncio.create_task(coroutine(limiter.acquire(demand())))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        assert loop.pending == 0

    run(main())


@pytest.mark.parametrize("permit", [None, "permit", object()])
def test_what_is_no_permit_is_ignored(permit: object) -> None:
    """To give something back never raises."""
    RateLimiter().release(permit, report())


def test_a_permit_given_back_twice_counts_once() -> None:
    """A place is not made out of nothing."""

    async def main() -> None:
        limiter = RateLimiter(RateLimit(max_concurrency=2))
        first, second = [await limiter.acquire(demand()) for _ in range(2)]
        limiter.release(first, report())
        limiter.release(first, report())
        assert limiter.in_flight == 1
        limiter.release(second, report())
        assert limiter.in_flight == 0
        assert repr(first) == "<Permit 1>"

    run(main())


# Holds.


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("status", [429, 503, 500])
def test_a_retry_after_holds_back_everybody(status: int, adaptive: bool) -> None:
    """Whoever waits, and whoever comes, goes out no earlier than the server said; other models go on."""

    async def main() -> None:
        limiter = RateLimiter(RateLimit(adaptive=adaptive))
        permit = await limiter.acquire(demand())
        await asyncio.sleep(1)
        limiter.release(permit, report(status, retry_after=7.0, error="InternalServerError"))
        await limiter.acquire(demand("other"))
        assert now() == 1
        found = await moments(limiter, 5)
        assert found[0] == 8
        await limiter.acquire(demand())
        assert now() >= 8

    run(main())


def test_the_longest_of_several_holds_counts() -> None:
    """One that asks for less does not shorten it."""

    async def main() -> None:
        limiter = RateLimiter()
        permits = [await limiter.acquire(demand()) for _ in range(3)]
        for permit, seconds in zip(permits, (2.0, 9.0, 3.0), strict=True):
            limiter.release(permit, report(429, retry_after=seconds))
        assert await moments(limiter, 1) == [9]

    run(main())


def test_a_hold_ends_sometime() -> None:
    """What a server asks for beyond `max_hold` is not waited for by the others."""

    async def main(**fields: Any) -> float:
        limiter = RateLimiter(RateLimit(**fields))
        limiter.release(await limiter.acquire(demand()), report(429, retry_after=86_400.0))
        return (await moments(limiter, 1))[0]

    assert run(main()) == 300
    assert run(main(max_hold=2)) == 2


@pytest.mark.parametrize("adaptive", [True, False])
def test_without_a_number_holds_grow_while_nothing_is_accepted(adaptive: bool) -> None:
    """A quarter of a second, a half and so on; what is accepted begins it anew."""

    async def main() -> None:
        limiter = RateLimiter(RateLimit(adaptive=adaptive))
        gaps: list[float] = []
        for _ in range(10):
            before = now()
            limiter.release(await limiter.acquire(demand()), REFUSED)
            gaps.append(now() - before)
        assert gaps[1:] == pytest.approx([0.25, 0.5, 1, 2, 4, 8, 16, LONGEST_HOLD, LONGEST_HOLD])
        limiter.release(await limiter.acquire(demand()), report())
        await asyncio.sleep(100)
        before = now()
        limiter.release(await limiter.acquire(demand()), REFUSED)
        await limiter.acquire(demand())
        assert now() - before == 0.25

    run(main())


def test_refusals_that_were_under_way_together_count_once() -> None:
    """A hundred 429 of one burst are one reason to wait, not a hundred."""

    async def main() -> float:
        limiter = RateLimiter()
        permits = [await limiter.acquire(demand()) for _ in range(100)]
        for permit in permits:
            limiter.release(permit, REFUSED)
        await limiter.acquire(demand())
        return now()

    assert run(main()) == 0.25


@pytest.mark.parametrize("error", ["InsufficientQuotaError", "NoChannelError"])
def test_no_money_is_no_reason_to_wait(error: str) -> None:
    """Waiting would not bring it back: each call fails at once, and nobody is held back."""

    async def main() -> None:
        limiter = RateLimiter()
        for _ in range(50):
            limiter.release(await limiter.acquire(demand()), report(429, retry_after=9.0, error=error))
        assert now() == 0

    run(main())


def test_an_attempt_that_never_arrived_says_nothing() -> None:
    """A connection that failed is neither accepted nor refused."""

    async def main() -> None:
        limiter = RateLimiter()
        for _ in range(50):
            limiter.release(await limiter.acquire(demand()), report(None, error="APIConnectionError"))
        limiter.release(await limiter.acquire(demand()), REFUSED)
        limiter.release(await limiter.acquire(demand()), report(None))
        limiter.release(await limiter.acquire(demand()), REFUSED)
        assert now() >= 0.25
        (group,) = limiter._groups.values()
        assert group._failures == 1  # some were let in in between, and were not refused
        assert repr(group).startswith("<Group 0 in flight, <Search ")
        assert group.search is not None
        assert repr(group.search.rate).startswith("<Climb ")

    run(main())


def test_not_adaptive_keeps_to_the_numbers() -> None:
    """After a refusal it waits, and goes on as before; headers change nothing."""

    async def main() -> list[float]:
        limiter = RateLimiter(RateLimit(requests_per_minute=60, adaptive=False))
        headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "50s"}
        limiter.release(await limiter.acquire(demand()), report(429, retry_after=3.0, headers=headers))
        return await moments(limiter, 3)

    assert run(main()) == pytest.approx([3, 4, 5])


# Headers.


def announcing(left: int | str, reset: str, kind: str = "requests", **fields: Any) -> Report:
    headers = {f"x-ratelimit-remaining-{kind}": str(left), f"x-ratelimit-reset-{kind}": reset}
    return report(headers=headers, **fields)


async def after(limiter: RateLimiter, answer: Report, count: int = 1) -> list[float]:
    limiter.release(await limiter.acquire(demand()), answer)
    return await moments(limiter, count)


def test_when_nothing_is_left_the_reset_is_waited_for() -> None:
    """The next attempt would be refused for certain."""
    assert run(after(RateLimiter(), announcing(0, "20s"))) == [20]


def test_what_is_left_is_spread_over_the_time_until_the_reset() -> None:
    """Three are left for eight seconds: one every two seconds, and after the reset one goes ahead and asks."""
    found = run(after(RateLimiter(), announcing(3, "8s"), 6))
    assert found == pytest.approx([2, 4, 6, 8, 9, 9])


def test_what_was_sent_since_is_no_longer_left() -> None:
    """The server had not counted it when it answered."""

    async def main() -> list[float]:
        limiter = RateLimiter()
        permits = [await limiter.acquire(demand()) for _ in range(3)]
        limiter.release(permits[0], announcing(3, "8s"))
        return await moments(limiter, 2)

    assert run(main()) == pytest.approx([4, 8])


def test_tokens_are_counted_in_requests_of_the_usual_size() -> None:
    """300 tokens are left, and requests use 100: that is three of them."""
    found = run(after(RateLimiter(), announcing(300, "8s", "tokens", used=100), 4))
    assert found == pytest.approx([2, 4, 6, 8])
    assert run(after(RateLimiter(), announcing(300, "8s", "tokens"), 4)) == [0] * 4  # nobody knows the usual size


@pytest.mark.parametrize("left,reset", [(0, "6m0s"), (0, "nonsense"), ("nonsense", "5s"), (0, "0s"), (10**6, "5s")])
def test_an_announcement_that_says_nothing_of_now_changes_nothing(left: int | str, reset: str) -> None:
    """A limit of the day, nonsense, a reset that has come, or so much that it is no limit."""
    assert run(after(RateLimiter(), announcing(left, reset)))[0] < 0.01


def test_the_stricter_of_two_announcements_counts() -> None:
    """Requests and tokens have limits of their own."""
    both = {
        "x-ratelimit-remaining-requests": "3",
        "x-ratelimit-reset-requests": "8s",
        "x-ratelimit-remaining-tokens": "900",
        "x-ratelimit-reset-tokens": "8s",
    }
    assert run(after(RateLimiter(), report(headers=both, used=100), 2)) == pytest.approx([2, 4])
    both["x-ratelimit-remaining-tokens"] = "100"
    assert run(after(RateLimiter(), report(headers=both, used=100), 2)) == pytest.approx([4, 8])


def test_a_retry_after_is_more_exact_than_a_reset() -> None:
    """A reset may be the moment at which the last of many is refilled."""
    found = run(after(RateLimiter(), msgspec_replace(announcing(0, "50s"), status=429, retry_after=2.0)))
    assert found == [2]
    assert run(after(RateLimiter(), msgspec_replace(announcing(0, "50s"), status=429))) == [50]


def msgspec_replace(given: Report, **changes: Any) -> Report:
    import msgspec

    return msgspec.structs.replace(given, **changes)


def test_what_an_old_answer_announced_is_out_of_date() -> None:
    """An answer to an earlier request changes nothing, nor does one that comes after its own reset."""

    async def main() -> None:
        limiter = RateLimiter()
        old = await limiter.acquire(demand())
        await asyncio.sleep(10)
        young = await limiter.acquire(demand())
        limiter.release(young, announcing(5, "30s"))
        limiter.release(old, announcing(0, "60s"))
        (group,) = limiter._groups.values()
        assert repr(group._announced) == "<Announced 5 left until 40>"
        permit = await limiter.acquire(demand())
        await asyncio.sleep(20)
        limiter.release(permit, announcing(0, "3s"))
        await limiter.acquire(demand())
        assert now() == 35

    run(main())


# Several loops.


def test_one_limiter_serves_one_loop_after_another() -> None:
    """A client in a module lives longer than `asyncio.run`; who was left waiting in a loop that ended is forgotten."""
    limiter = RateLimiter(RateLimit(max_concurrency=1))

    async def leave_one_behind() -> object:
        permit = await limiter.acquire(demand())
        asyncio.get_running_loop().create_task(coroutine(limiter.acquire(demand())))
        await asyncio.sleep(0)
        return permit

    loop = asyncio.new_event_loop()
    permit = loop.run_until_complete(leave_one_behind())
    tasks = asyncio.all_tasks(loop)
    loop.close()
    assert limiter.waiting == 1
    limiter.release(permit, report())  # of a loop that is closed, as when a stream is collected late

    async def main() -> None:
        limiter.release(await limiter.acquire(demand()), report())

    asyncio.run(main())
    assert limiter.in_flight == 0
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    tasks.clear()
    del task
    gc.collect()


def test_a_loop_that_does_not_run_keeps_nobody_waiting() -> None:
    """Between two `run` of a runner its tasks stand still; those of other loops are served meanwhile."""
    limiter = RateLimiter(RateLimit(max_concurrency=1))

    async def acquire() -> object:
        return await limiter.acquire(demand())

    async def start(work: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
        task = asyncio.create_task(work)
        await asyncio.sleep(0)
        return task

    with asyncio.Runner() as paused:
        permit = paused.run(acquire())
        waits = paused.run(start(acquire()))

        async def main() -> None:
            ours = await start(acquire())
            limiter.release(permit, report())
            limiter.release(await ours, report())

        asyncio.run(main())

        async def wait_for(task: asyncio.Task[object]) -> object:
            return await task

        limiter.release(paused.run(wait_for(waits)), report())
    assert (limiter.in_flight, limiter.waiting) == (0, 0)


async def start(limiter: RateLimiter) -> asyncio.Task[object]:
    task = asyncio.create_task(coroutine(limiter.acquire(demand())))
    await asyncio.sleep(0)
    return task


async def finish(task: asyncio.Task[object]) -> object:
    return await asyncio.wait_for(task, 10)


async def steps() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_the_longest_wait_of_all_loops_is_served_first() -> None:
    """Whichever loop the place comes back in."""
    limiter = RateLimiter(RateLimit(max_concurrency=1))
    with asyncio.Runner() as one, asyncio.Runner() as two:
        permit = one.run(coroutine(limiter.acquire(demand())))
        first, second = one.run(start(limiter)), two.run(start(limiter))
        one.run(steps())  # where it learns that somebody else waits
        limiter.release(permit, report())
        one.run(steps())
        assert first.done()
        assert not second.done()
        limiter.release(first.result(), report())
        limiter.release(two.run(finish(second)), report())
    assert (limiter.in_flight, limiter.waiting) == (0, 0)


def test_a_loop_that_stands_still_is_not_waited_for() -> None:
    """It is asked to serve its own, who came first; when it does not, the others are let in a moment later."""
    limiter = RateLimiter(RateLimit(max_concurrency=1))
    with asyncio.Runner() as still, asyncio.Runner() as running:
        permit = running.run(coroutine(limiter.acquire(demand())))
        first, second = still.run(start(limiter)), running.run(start(limiter))
        still.run(steps())

        async def give_back_and_wait() -> object:
            limiter.release(permit, report())
            return await finish(second)

        limiter.release(running.run(give_back_and_wait()), report())
        limiter.release(still.run(finish(first)), report())
    assert (limiter.in_flight, limiter.waiting) == (0, 0)


def in_threads(count: int, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    problems: list[BaseException] = []

    def work() -> None:
        try:
            asyncio.run(asyncio.wait_for(main(), 60))
        except BaseException as problem:  # noqa: BLE001
            problems.append(problem)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_loops_in_several_threads_share_one_limit() -> None:
    """The limit holds in total, nobody starves, and nothing is lost."""
    limiter = RateLimiter(RateLimit(max_concurrency=3))
    lock = threading.Lock()
    running = most = 0

    async def one(number: int) -> None:
        nonlocal running, most
        permit = await limiter.acquire(demand())
        with lock:
            running += 1
            most = max(most, running)
        await asyncio.sleep(0.0001 * (number % 3))
        with lock:
            running -= 1
        limiter.release(permit, report())

    async def main() -> None:
        await asyncio.gather(*(one(number) for number in range(100)))

    in_threads(4, main)
    assert most == 3
    assert (limiter.in_flight, limiter.waiting, limiter._lines) == (0, 0, {})


def test_a_rate_is_shared_by_several_threads() -> None:
    """Forty attempts at a hundred a second take as long in four threads as in one."""
    limiter = RateLimiter(RateLimit(requests_per_minute=6000))
    found: list[float] = []

    async def main() -> None:
        found.extend(await moments(limiter, 10))

    in_threads(4, main)
    assert len(found) == 40
    # The burst is free; a few late timers may be made up for.
    assert max(found) - min(found) >= (40 - 10 - 10) / 100


def test_a_permit_that_comes_back_in_the_middle_of_the_books_is_entered() -> None:
    """The collector may end a stream, and so give its permit back, whenever it likes: also while we keep the books."""

    async def main() -> None:
        limiter = RateLimiter(RateLimit(max_concurrency=1))
        permit = await limiter.acquire(demand())
        waits = asyncio.create_task(coroutine(limiter.acquire(demand())))
        await asyncio.sleep(0)
        with limiter._lock:
            limiter.release(permit, report())
            assert limiter.in_flight == 1  # put aside
        other = asyncio.create_task(coroutine(limiter.acquire(demand("other"))))
        await asyncio.wait([waits, other])
        with limiter._lock:
            limiter.release(await waits, report())
        await asyncio.sleep(1)
        assert limiter.in_flight == 2
        limiter.release(await other, report())  # whoever has the lock next enters it
        assert limiter.in_flight == 0

    run(main())


def test_a_timer_enters_what_was_put_aside() -> None:
    """Whoever kept the books when something came back looks for it afterwards."""

    async def main() -> None:
        limiter = RateLimiter(RateLimit(requests_per_minute=60))
        permit = await limiter.acquire(demand())
        waits = asyncio.create_task(coroutine(limiter.acquire(demand())))
        await asyncio.sleep(0)
        with limiter._lock:
            limiter.release(permit, report())
        await waits
        assert limiter.in_flight == 1

    run(main())


def test_groups_that_nobody_uses_are_forgotten() -> None:
    """Keys rotate: what is known of old ones does not pile up. What is in use, waited for or held stays."""

    async def main() -> None:
        limiter = RateLimiter(RateLimit(max_concurrency=1))
        used = await limiter.acquire(demand(key="used"))
        waits = asyncio.create_task(coroutine(limiter.acquire(demand(key="used"))))
        held = await limiter.acquire(demand(key="held"))
        limiter.release(held, report(429, retry_after=200.0))
        for number in range(10 * MANY):
            limiter.release(await limiter.acquire(demand(key=str(number))), report())
            await asyncio.sleep(0.5)
        # Sixty seconds' worth, and as many again before anybody looks.
        assert len(limiter._groups) <= 4 * 122
        assert ("https://host/v1", "used", "m") in limiter._groups
        limiter.release(used, report())
        await waits
        await asyncio.sleep(100)
        for number in range(2 * len(limiter._groups)):
            limiter.release(await limiter.acquire(demand(key=f"new {number}")), report())
        assert ("https://host/v1", "0", "m") not in limiter._groups
        assert ("https://host/v1", "held", "m") not in limiter._groups

    run(main())


# Settings.


@pytest.mark.parametrize(
    "fields",
    [
        {"requests_per_minute": 0},
        {"requests_per_minute": -1},
        {"requests_per_minute": float("nan")},
        {"requests_per_minute": "60"},
        {"tokens_per_minute": float("inf")},
        {"tokens_per_minute": True},
        {"max_concurrency": 0},
        {"max_concurrency": 1.5},
        {"adaptive": 1},
        {"adaptive": None},
        {"estimate": 100},
        {"max_hold": -1},
        {"max_hold": None},
    ],
)
def test_an_impossible_rate_limit_is_refused(fields: dict[str, Any]) -> None:
    """Where it is made, and with the name of the field."""
    with pytest.raises(ConfigurationError, match=rf"RateLimit\.{next(iter(fields))} must be"):
        RateLimit(**fields)


def test_a_rate_limit_is_frozen_and_needs_no_numbers() -> None:
    """Left alone, it only adapts."""
    limit = RateLimit()
    assert (limit.requests_per_minute, limit.tokens_per_minute, limit.max_concurrency, limit.adaptive) == (
        *(None, None, None),
        True,
    )
    with pytest.raises(AttributeError):
        limit.adaptive = False  # type: ignore[misc]


@pytest.mark.parametrize("tokens", [-1, float("nan"), float("inf"), None, "7"])
def test_an_estimator_that_returns_no_number_is_told_so(tokens: Any) -> None:
    """Its mistake is not to stop a queue in silence."""

    async def main() -> None:
        limiter = RateLimiter(RateLimit(tokens_per_minute=10, estimate=lambda demand: tokens))
        with pytest.raises(ConfigurationError, match=r"RateLimit\.estimate returned"):
            await limiter.acquire(demand())
        assert limiter.in_flight == limiter.waiting == 0

    run(main())


def test_an_estimator_is_not_asked_without_a_limit_of_tokens() -> None:
    """It may be slow, and nobody would use what it says."""

    def estimate(demand: object) -> float:
        raise AssertionError("asked")

    async def main() -> None:
        await RateLimiter(RateLimit(estimate=estimate)).acquire(demand())

    run(main())


def test_a_limiter_of_ones_own_needs_two_methods() -> None:
    """A client takes a `RateLimit`, a limiter or nothing; anything else is refused where it is made."""
    shared = RateLimiter()
    client = AsyncChatKore(api_key="sk-test", rate_limit=shared)
    assert client._settings.limiter is shared
    assert client.with_options(timeout=3)._settings.limiter is shared
    other = client.with_options(rate_limit=RateLimit())._settings.limiter
    assert isinstance(other, RateLimiter)
    assert other is not shared
    assert client.with_options(rate_limit=None)._settings.limiter is None
    wrong: Any
    for wrong in (60, RateLimit, "60/min", object()):
        with pytest.raises(ConfigurationError, match="rate_limit must be"):
            AsyncChatKore(api_key="sk-test", rate_limit=wrong)
    protocol: Limiter = shared
    assert protocol is shared


# Arithmetic.


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0.001, 2)), max_size=50))
def test_no_pattern_of_arrivals_gets_more_than_the_pace(arrivals: list[tuple[float, float]]) -> None:
    """In any stretch of time, what is spent is at most that time, the burst, and the one that was let in last."""
    pace, moment = Pace(), 0.0
    spent: list[tuple[float, float]] = []
    for gap, cost in arrivals:
        moment = max(moment + gap, pace.ready_at(cost))
        pace.spend(moment, cost)
        spent.append((moment, cost))
    for number, (start, _) in enumerate(spent):
        total = 0.0
        for at, cost in spent[number:]:
            assert total <= at - start + BURST + 1e-6
            total += cost
    assert repr(pace).startswith("<Pace due ")


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e9)), max_size=100))
def test_no_usage_makes_the_estimates_useless(answers: list[tuple[float, float]]) -> None:
    """They are stretched at most twentyfold, whatever servers say."""
    calibration = Calibration()
    for estimated, used in answers:
        calibration.learn(estimated, used)
        assert 1 / 20 <= calibration.factor <= 20
    assert repr(calibration) == f"<Calibration x{calibration.factor:.2f}>"
