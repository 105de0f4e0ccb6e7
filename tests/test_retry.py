"""When a failed attempt is repeated, after how long, and at whose expense. No clock: sleeps and chances are passed in."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

from chatkore_async._config import RetryBudget, RetryPolicy
from chatkore_async._retry import JITTER, Bucket, Retries, backoff, retry
from chatkore_async.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    ConfigurationError,
    InsufficientQuotaError,
    InternalServerError,
    InvalidResponseError,
    NoChannelError,
    RateLimitError,
    StreamStalledError,
)

NEVER = float("inf")
ENDLESS = Bucket(None)


def failed(
    kind: type[APIStatusError] = InternalServerError, retryable: Any = "yes", after: float | None = None
) -> APIError:
    return kind("no", status_code=500, retryable=retryable, retry_after=after)


def retries(chance: float = 1.0, bucket: Bucket = ENDLESS, **policy: Any) -> Retries:
    return Retries(RetryPolicy(**policy), bucket, lambda: chance)


# Whether.


@pytest.mark.parametrize(
    "errors, repeated",
    [
        ([failed(), failed(), failed()], [True, True, False]),
        ([failed(RateLimitError)] * 3, [True, True, False]),
        ([APIConnectionError("no", retryable="yes")] * 3, [True, True, False]),
        ([failed(retryable="never")], [False]),
        ([InvalidResponseError("a page")], [False]),
        ([failed(InsufficientQuotaError, "never")], [False]),
        ([failed(NoChannelError, "once")] * 2, [True, False]),
        ([InvalidResponseError("cut", retryable="unconfirmed")] * 2, [True, False]),
        (
            [failed(retryable="unconfirmed"), APITimeoutError("late", phase="answer", retryable="unconfirmed")],
            [True, False],
        ),
        ([failed(NoChannelError, "once"), failed(retryable="unconfirmed")], [True, True]),
        ([failed(), failed(NoChannelError, "once"), failed()], [True, True, False]),
        ([ConfigurationError("no")], [False]),
        ([ValueError("no")], [False]),
        ([asyncio.CancelledError()], [False]),
    ],
)
def test_what_is_repeated_and_how_often(errors: list[BaseException], repeated: list[bool]) -> None:
    """As often as the policy says; a missing channel once, an answer that may have been billed once, the rest never."""
    call = retries()
    assert [call.again(error, NEVER) for error in errors] == repeated
    assert call.count == sum(repeated)


@pytest.mark.parametrize("retryable", ["yes", "once", "unconfirmed", "never"])
def test_no_retries_are_none(retryable: str) -> None:
    """`max_retries=0` raises the first error, whatever it is."""
    assert not retries(max_retries=0).again(failed(retryable=retryable), NEVER)


def test_a_second_bill_can_be_refused() -> None:
    """With `retry_unconfirmed=False` nothing is sent twice that may have been billed; all else is."""
    call = retries(retry_unconfirmed=False)
    assert not call.again(failed(retryable="unconfirmed"), NEVER)
    assert call.again(failed(NoChannelError, "once"), NEVER)
    assert call.again(failed(), NEVER)


@pytest.mark.parametrize("after, repeated", [(60.0, True), (60.1, False), (0.0, True)])
def test_a_server_that_asks_for_too_long_is_not_waited_for(after: float, repeated: bool) -> None:
    """Above `max_retry_after` the error is raised at once, and tells the time."""
    error = failed(RateLimitError, after=after)
    assert retries(max_retry_after=60).again(error, NEVER) is repeated
    assert error.retry_after == after


@pytest.mark.parametrize(
    "remaining, repeated", [(0.51, True), (0.5, False), (0.0, False), (-1.0, False), (NEVER, True)]
)
def test_a_backoff_that_would_pass_the_deadline_is_not_begun(remaining: float, repeated: bool) -> None:
    """The last error is raised at once, rather than a timeout later; and nothing is drawn from the budget."""
    bucket = Bucket(RetryBudget())
    call = retries(1.0, bucket, initial_delay=0.5)
    assert call.again(failed(), remaining) is repeated
    assert bucket.tokens == (495 if repeated else 500)


# After how long.

POLICIES = st.builds(
    RetryPolicy,
    initial_delay=st.floats(min_value=0, max_value=1e300),
    max_delay=st.floats(min_value=0, max_value=1e300),
)
CHANCES = st.floats(min_value=0, max_value=1)


@given(POLICIES, st.integers(min_value=1, max_value=5000), CHANCES)
def test_a_backoff_is_bounded(policy: RetryPolicy, number: int, chance: float) -> None:
    """Full jitter: from nothing to the doubled delay, and never more than `max_delay`, however many retries there were."""
    delay = backoff(policy, number, None, chance)
    assert 0 <= delay <= policy.max_delay
    if number < 60:
        assert delay <= policy.initial_delay * 2.0 ** (number - 1)


@given(st.floats(min_value=0, max_value=1e6), CHANCES)
def test_retry_after_is_kept(after: float, chance: float) -> None:
    """Never earlier than the server asked, at most a tenth later, whatever the policy's delays."""
    delay = backoff(RetryPolicy(max_delay=0), 1, after, chance)
    assert after <= delay <= after * (1 + JITTER)


@pytest.mark.parametrize(
    "number, longest", [(1, 0.5), (2, 1.0), (3, 2.0), (4, 4.0), (5, 8.0), (6, 8.0), (100_000, 8.0)]
)
def test_the_delay_doubles(number: int, longest: float) -> None:
    """0.5, 1, 2, 4, 8 seconds at the longest."""
    assert backoff(RetryPolicy(), number, None, 1.0) == longest
    assert backoff(RetryPolicy(), number, None, 0.0) == 0.0


def test_the_delay_is_that_of_the_coming_retry() -> None:
    """What was decided can be read off: the count, and the wait before the next attempt."""
    call = retries(0.5, max_retries=3)
    seen = [(call.again(failed(), NEVER), call.count, call.delay) for _ in range(2)]
    assert seen == [(True, 1, 0.25), (True, 2, 0.5)]
    assert call.again(failed(after=10.0), NEVER)
    assert call.delay == 10.0 * (1 + JITTER * 0.5)


def test_chance_is_drawn_for_each_retry() -> None:
    """By default from `random`, so that clients which failed together do not come back together."""
    assert Retries(RetryPolicy(), ENDLESS)._chance is random.random


# At whose expense.


@pytest.mark.parametrize(
    "error, cost",
    [
        (failed(), 5),
        (APIConnectionError("no", retryable="yes"), 5),
        (failed(NoChannelError, "once"), 5),
        (APITimeoutError("late", phase="connect", retryable="yes"), 10),
        (StreamStalledError("still", phase="idle", retryable="unconfirmed"), 10),
        (failed(RateLimitError), 0),
        (failed(retryable="never"), 0),
    ],
)
def test_a_retry_has_its_price(error: APIError, cost: int) -> None:
    """A timeout costs twice what another failure costs; a 429 costs nothing, and neither does what is not repeated."""
    bucket = Bucket(RetryBudget())
    retries(bucket=bucket).again(error, NEVER)
    assert bucket.tokens == 500 - cost


def test_in_an_outage_retries_fade_out() -> None:
    """An empty bucket pays for nothing but a 429; the error says so; successes fill it again, to the brim."""
    bucket = Bucket(RetryBudget(capacity=12))
    repeated = [retries(bucket=bucket).again(failed(), NEVER) for _ in range(4)]
    assert (repeated, bucket.tokens) == ([True, True, False, False], 2)
    error = failed()
    assert not retries(bucket=bucket).again(error, NEVER)
    assert "the retry budget is empty" in str(error)
    assert retries(bucket=bucket).again(failed(RateLimitError), NEVER)
    for _ in range(3):
        bucket.refund()
    assert bucket.tokens == 5
    assert retries(bucket=bucket).again(failed(), NEVER)
    for _ in range(50):
        bucket.refund()
    assert bucket.tokens == 12


def test_a_refund_does_not_overflow() -> None:
    """The capacity is the most there is."""
    bucket = Bucket(RetryBudget(capacity=10, refund=7))
    assert bucket.draw(failed())
    bucket.refund()
    bucket.refund()
    assert bucket.tokens == 10


def test_no_budget_pays_for_everything() -> None:
    """`budget=None` disables it."""
    bucket = Bucket(None)
    assert all(bucket.draw(failed()) for _ in range(1000))
    bucket.refund()
    assert bucket.tokens == 0


def test_an_error_within_the_budget_does_not_speak_of_it() -> None:
    """Only an error that the budget ended says so."""
    error = failed()
    assert not retries(max_retries=0, bucket=Bucket(RetryBudget(capacity=0))).again(error, NEVER)
    assert "budget" not in str(error)


def test_a_bucket_tells_what_is_left() -> None:
    """For whoever debugs an outage."""
    assert repr(Bucket(RetryBudget())) == "<Bucket 500/500>"
    assert repr(Bucket(None)) == "<Bucket disabled>"


# How: tenacity behind one function.


class Attempts:
    """Attempts that end as they are told, and the waits between them."""

    def __init__(self, *ends: object) -> None:
        self.ends = list(ends)
        self.slept: list[float] = []
        self.made = 0

    async def attempt(self) -> object:
        self.made += 1
        end = self.ends.pop(0)
        if isinstance(end, BaseException):
            raise end
        return end

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def run(self, error: APIError, again: Callable[[BaseException], float | None]) -> Awaitable[object]:
        return retry(error, self.attempt, again=again, sleep=self.sleep)


async def test_the_first_failure_comes_from_outside() -> None:
    """The first attempt is made without tenacity; its failure begins the retries."""
    attempts, first, second = Attempts(failed(), "done"), failed(), []
    assert await attempts.run(first, lambda error: second.append(error) or 0.5 * len(second)) == "done"
    assert second[0] is first
    assert (attempts.made, attempts.slept) == (2, [0.5, 1.0])


async def test_a_delay_of_nothing_is_a_delay() -> None:
    """Zero seconds are not the same as no retry."""
    attempts = Attempts("done")
    assert await attempts.run(failed(), lambda _error: 0.0) == "done"
    assert attempts.slept == [0.0]


async def test_the_last_error_is_raised_itself() -> None:
    """No `RetryError` of tenacity: the caller catches what happened."""
    last = failed(RateLimitError)
    attempts = Attempts(failed(), last)
    with pytest.raises(RateLimitError) as caught:
        await attempts.run(failed(), lambda error: None if error is last else 0.0)
    assert caught.value is last
    assert not isinstance(caught.value, tenacity.RetryError)


async def test_the_first_error_is_raised_when_nothing_follows() -> None:
    """Without an attempt, and without a sleep."""
    first, attempts = failed(), Attempts()
    with pytest.raises(InternalServerError) as caught:
        await attempts.run(first, lambda _error: None)
    assert caught.value is first
    assert (attempts.made, attempts.slept) == (0, [])


@pytest.mark.parametrize(
    "end", [asyncio.CancelledError(), KeyboardInterrupt(), SystemExit(), ConfigurationError("no"), ValueError("no")]
)
async def test_only_our_errors_are_repeated(end: BaseException) -> None:
    """A cancellation, an exit and a bug end the call, even where the policy would repeat anything."""
    attempts = Attempts(end, "never made")
    # A KeyboardInterrupt in a task would end the loop of the test, so the coroutine is driven by hand.
    with pytest.raises(type(end)) as caught:
        attempts.run(failed(), lambda _error: 0.0).__await__().send(None)  # type: ignore[attr-defined]
    assert caught.value is end
    assert attempts.made == 1


async def test_a_cancelled_sleep_is_cancelled() -> None:
    """Cancelling a call while it backs off ends it there."""

    async def sleep(_seconds: float) -> None:
        raise asyncio.CancelledError

    attempts = Attempts()
    with pytest.raises(asyncio.CancelledError):
        await retry(failed(), attempts.attempt, again=lambda _error: 1.0, sleep=sleep)
    assert attempts.made == 0


async def test_calls_do_not_mix_up_their_states() -> None:
    """One shared `AsyncRetrying` would: a thousand calls at once each make their own attempts."""

    async def call(number: int) -> tuple[object, int]:
        attempts, call = Attempts(failed(), failed(), number), retries(max_retries=3)
        found = await retry(
            failed(),
            attempts.attempt,
            again=lambda error: call.delay if call.again(error, NEVER) else None,
            sleep=lambda _seconds: asyncio.sleep(0),
        )
        return found, attempts.made

    assert await asyncio.gather(*map(call, range(1000))) == [(number, 3) for number in range(1000)]
