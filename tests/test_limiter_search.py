"""Simulations, on a clock that does not wait: what a limiter finds out about a server that tells nobody its limit.

Unless a test says otherwise, 500 tasks ask as fast as they are let, and nobody told the limiter anything.
"""

import asyncio
import random
from collections.abc import Callable, Iterable

import msgspec
import pytest
from virtual import Relay, demand, flood, run

from chatkore_async import Demand, RateLimit, RateLimiter, Report
from chatkore_async.types import Usage


@pytest.mark.parametrize(
    "rate,span,latency,warm,seconds",
    [
        (50.0, 0.1, 0.02, 10, 100),
        (50.0, 1.0, 0.02, 10, 100),
        (50.0, 0.1, 5.0, 60, 200),
        (20.0, 1.0, 20.0, 200, 500),
        (1.0, 1.0, 0.02, 120, 700),
        (1.0, 1.0, 5.0, 120, 700),
        (1000.0, 0.1, 0.02, 8, 25),
    ],
)
def test_a_hidden_rate_is_found_and_kept(rate: float, span: float, latency: float, warm: float, seconds: float) -> None:
    """At least 90 % of what the server grants is used, and less than 5 % is refused, whatever the rate and latency."""
    relay = Relay(rate, slice=span, latency=latency)
    run(flood(RateLimiter(), relay, seconds))
    assert relay.share(warm, seconds) > 0.9
    assert relay.refusals(warm, seconds) < 0.05


@pytest.mark.parametrize("latency", [0.02, 5.0])
@pytest.mark.parametrize("before,after", [(60.0, 30.0), (50.0, 100.0)], ids=["halved", "doubled"])
def test_a_rate_that_changes_is_found_again(before: float, after: float, latency: float) -> None:
    """When the limit is halved or doubled, the limiter is there within half a minute and the lost share is small."""
    change, seconds = 100.0, 200.0
    relay = Relay(lambda now: before if now < change else after, latency=latency, refusal=0.02)
    run(flood(RateLimiter(), relay, seconds, tasks=700))
    assert relay.share(change - 50, change) > 0.9
    assert relay.share(change + 25, seconds) > 0.9
    assert relay.refusals(change, change + 25) < 0.05
    assert relay.refusals(change + 25, seconds) < 0.05


async def answers(limiter: RateLimiter, count: int, refused: Iterable[int]) -> float:
    """Let a burst go out and refuse some of it, in the order given; return the rate that is left."""
    permits = [await limiter.acquire(demand()) for _ in range(count)]
    for number in refused:
        limiter.release(permits[number], Report(status=429, headers={}, usage=None, retry_after=None))
    (group,) = limiter._groups.values()
    assert group.search is not None
    return group.search.rate.value


def test_the_order_in_which_refusals_arrive_does_not_matter() -> None:
    """What goes on is a fraction of what was accepted in the last second, also when the last is refused first."""
    in_order = run(answers(RateLimiter(), 100, range(40, 100)))
    reverse = run(answers(RateLimiter(), 100, reversed(range(40, 100))))
    assert in_order == pytest.approx(0.9 * 40)
    assert reverse == pytest.approx(in_order)


def test_a_refusal_that_comes_minutes_late_is_one_like_others() -> None:
    """As that of a stream in its third minute: what was accepted before it is no longer known, and it is a refusal."""

    async def main() -> None:
        limiter = RateLimiter()
        late = await limiter.acquire(demand())
        for _ in range(2000):
            permit = await limiter.acquire(demand())
            await asyncio.sleep(0.1)
            limiter.release(permit, Report(status=200, headers={}, usage=None, retry_after=None))
        limiter.release(late, Report(status=429, headers={}, usage=None, retry_after=None))
        before = asyncio.get_running_loop().time()
        await limiter.acquire(demand())
        assert asyncio.get_running_loop().time() - before == pytest.approx(0.25)

    run(main())


@pytest.mark.parametrize("status", [429, 503, 529])
def test_overload_is_answered_like_a_rate_limit(status: int) -> None:
    """503 and 529 say that the server has enough, as 429 does."""
    relay = Relay(50.0, status=status)
    run(flood(RateLimiter(), relay, 60))
    assert relay.share(10, 60) > 0.9
    assert relay.refusals(10, 60) < 0.05


def test_a_retry_after_of_a_second_costs_little() -> None:
    """Each refusal holds all back for the second the server asks for, so refusals are made rarer."""
    relay = Relay(50.0, retry_after=1.0)
    run(flood(RateLimiter(), relay, 150))
    assert relay.share(10, 150) > 0.9
    assert relay.refusals(10, 150) < 0.01


def random_latency(seed: int, low: float, high: float) -> Callable[[], float]:
    chance = random.Random(seed)
    return lambda: chance.uniform(low, high)


@pytest.mark.parametrize("places", [3, 20, 200])
def test_a_hidden_concurrency_is_found_and_kept(places: int) -> None:
    """A server that counts what is in flight is used nearly in full, though its answers take now 1 s and now 9 s."""
    relay = Relay(places=places, latency=random_latency(places, 1.0, 9.0), refusal=0.02)
    seconds = 300.0
    run(flood(RateLimiter(), relay, seconds))
    assert relay.share(100, seconds, rate=places / 5) > 0.88
    assert relay.refusals(100, seconds) < 0.05


def test_a_rate_is_kept_when_answers_take_now_one_second_and_now_nine() -> None:
    """Their number in flight goes up and down by itself, and is not taken for the limit."""
    relay = Relay(50.0, latency=random_latency(1, 1.0, 9.0), refusal=0.02)
    run(flood(RateLimiter(), relay, 150))
    assert relay.share(20, 150) > 0.9
    assert relay.refusals(20, 150) < 0.05


def test_long_streams_are_no_reason_to_wait() -> None:
    """Refusals come at once and answers after a minute: what is not refused soon counts as accepted."""
    relay = Relay(8.0, slice=0.5, latency=60.0, refusal=0.02)
    run(flood(RateLimiter(), relay, 300, tasks=600))
    assert relay.share(80, 300) > 0.9
    assert relay.refusals(80, 300) < 0.05


@pytest.mark.parametrize("latency", [0.02, 5.0])
def test_an_outage_is_waited_out_with_few_attempts(latency: float) -> None:
    """While everything is refused hardly anything is sent; when it is over, the old pace is soon back."""
    relay = Relay(lambda now: 0.0 if 60 <= now < 120 else 50.0, latency=latency, refusal=0.02, status=503)
    run(flood(RateLimiter(), relay, 220))
    assert sum(60 <= moment < 120 for moment in relay.refused) < 15
    assert relay.share(170, 220) > 0.9


def test_an_outage_at_the_start_is_waited_out() -> None:
    """Nothing was ever accepted when it begins, and the pace is found when it ends."""
    relay = Relay(lambda now: 0.0 if now < 120 else 20.0, status=503)
    run(flood(RateLimiter(), relay, 250))
    assert sum(1 <= moment < 120 for moment in relay.refused) < 15
    assert relay.share(190, 250) > 0.9


def test_arrivals_that_the_network_jumbles_cost_little() -> None:
    """A slice of a tenth of a second sees some attempts of its neighbour; most of the rate is used all the same."""
    chance = random.Random(2)

    class Jumbled(Relay):
        async def ask(self, amount: float = 1.0, usage: Usage | None = None) -> Report:
            await asyncio.sleep(chance.uniform(0.0, 0.01))
            return await super().ask(amount, usage)

    relay = Jumbled(50.0)
    run(flood(RateLimiter(), relay, 120))
    assert relay.share(20, 120) > 0.75
    assert relay.refusals(20, 120) < 0.05


def test_two_models_have_two_limits() -> None:
    """One that is refused does not slow down the other, and each is used in full."""
    slow, fast = Relay(10.0, latency=0.5), Relay(100.0, latency=0.5)

    async def main() -> None:
        limiter = RateLimiter()
        await asyncio.gather(
            flood(limiter, slow, 120, tasks=250, asked=lambda: (demand("slow"), 1.0, None)),
            flood(limiter, fast, 120, tasks=250, asked=lambda: (demand("fast"), 1.0, None)),
        )

    run(main())
    for relay in (slow, fast):
        assert relay.share(30, 120) > 0.9
        assert relay.refusals(30, 120) < 0.05


def tokens(seed: int, wrong: Callable[[float], float]) -> Callable[[], tuple[Demand, float, Usage]]:
    """Requests of 300 to 900 tokens, of which an estimator thinks something else."""
    chance = random.Random(seed)

    def asked() -> tuple[Demand, float, Usage]:
        used = chance.randrange(300, 900)
        return demand(size=int(wrong(used))), used, Usage(total_tokens=used)

    return asked


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("latency", [0.02, 5.0])
@pytest.mark.parametrize(
    "wrong",
    [lambda used: used, lambda used: used / 3, lambda used: used * 5, lambda used: 100],
    ids=["right", "low", "high", "blind"],
)
def test_a_token_limit_is_kept_though_estimates_are_wrong(
    wrong: Callable[[float], float], latency: float, adaptive: bool
) -> None:
    """What answers used corrects the estimates: the limit is used, and hardly exceeded, however wrong they are."""
    limit = RateLimit(tokens_per_minute=1_800_000, adaptive=adaptive, estimate=lambda demand: demand.size)
    # The server counts by the second what it will have used, and grants a little more than it says.
    relay = Relay(31_500, slice=1.0, latency=latency)
    run(flood(RateLimiter(limit), relay, 100, asked=tokens(3, wrong)))
    assert 0.9 < relay.share(40, 100, rate=30_000) < 1.03
    assert relay.refusals(40, 100) < 0.05


def test_a_hidden_token_limit_is_found() -> None:
    """Without numbers of ours, tokens are a rate like any other."""
    relay = Relay(30_000, slice=1.0, latency=1.0)
    run(flood(RateLimiter(), relay, 150, asked=tokens(4, lambda used: 0)))
    assert relay.share(30, 150) > 0.85
    assert relay.refusals(30, 150) < 0.05


@pytest.mark.parametrize("unit", [1.0, 600.0], ids=["requests", "tokens"])
def test_what_the_headers_announce_is_spread_evenly(unit: float) -> None:
    """A server that tells what is left until when refuses nothing after the first burst."""
    kind = "requests" if unit == 1.0 else "tokens"

    def headers(left: float, reset: float) -> dict[str, str]:
        return {f"x-ratelimit-remaining-{kind}": str(int(left)), f"x-ratelimit-reset-{kind}": f"{reset:.3f}s"}

    relay = Relay(10.0 * unit, slice=30.0, headers=headers)
    usage = Usage(total_tokens=600)
    run(flood(RateLimiter(), relay, 150, asked=lambda: (demand(), unit, usage)))
    assert relay.refusals(1, 150) < 0.005
    assert relay.share(30, 150) > 0.95
    for start in range(31, 145, 5):  # not all at the start of each half minute
        assert relay.share(start, start + 2) < 1.3


def test_a_bucket_that_refills_all_the_time_is_used_in_full() -> None:
    """Where a reset is the moment at which the bucket is full again, as OpenAI has it, nothing is lost."""
    left, at = 300.0, 0.0

    class Bucket(Relay):
        async def ask(self, amount: float = 1.0, usage: Usage | None = None) -> Report:
            nonlocal left, at
            now = asyncio.get_running_loop().time()
            left, at = min(300.0, left + (now - at) * 5), now
            report = await super().ask(1.0) if left >= 1 else self._refuse(now)
            left -= left >= 1
            headers = {
                "x-ratelimit-remaining-requests": str(int(left)),
                "x-ratelimit-reset-requests": f"{(300 - left) / 5:.3f}s",
            }
            return msgspec.structs.replace(report, headers=headers)

        def _refuse(self, now: float) -> Report:
            self.refused.append(now)
            return Report(status=429, headers={}, usage=None, retry_after=1.0)

    relay = Bucket(1e9)
    run(flood(RateLimiter(), relay, 400))
    assert relay.share(120, 400, rate=5.0) > 0.95
    assert relay.refusals(120, 400) == 0
