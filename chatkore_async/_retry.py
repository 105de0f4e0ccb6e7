"""Policy and budget → tenacity. What is decided is a pure function of numbers; tenacity repeats and sleeps.

tenacity costs a call about 17 µs even when nothing fails. So the first attempt is made outside of it, and
`retry` begins with the failure that attempt had.
"""

import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import tenacity as _tenacity

from ._config import RetryBudget, RetryPolicy
from .errors import APIError, APITimeoutError, NoChannelError, RateLimitError

T = TypeVar("T")

JITTER = 0.1
"""A `retry-after` is kept to the second at the earliest and exceeded by at most this share."""


class Bucket:
    """What is left of a `RetryBudget`. One per client, shared by its copies.

    Attributes:
        spent: what was drawn and not earned back; nothing, where there is no budget.
    """

    __slots__ = ("budget", "spent")

    def __init__(self, budget: RetryBudget | None) -> None:
        self.budget = budget
        self.spent = 0

    @property
    def tokens(self) -> int:
        """What is left."""
        return self.budget.capacity - self.spent if self.budget else 0

    def __repr__(self) -> str:
        return f"<Bucket {self.tokens}/{self.budget.capacity}>" if self.budget else "<Bucket disabled>"

    def draw(self, error: APIError) -> bool:
        """Pay for repeating what failed with `error`, or answer that the bucket is empty."""
        # A 429 is not an outage: the server said when it can be asked again.
        if self.budget is None or isinstance(error, RateLimitError):
            return True
        cost = self.budget.timeout_cost if isinstance(error, APITimeoutError) else self.budget.retry_cost
        if cost > self.tokens:
            return False
        self.spent += cost
        return True

    def refund(self) -> None:
        """Put back what a success earns."""
        if self.budget is not None:
            self.spent = max(0, self.spent - self.budget.refund)


def backoff(policy: RetryPolicy, number: int, retry_after: float | None, chance: float) -> float:
    """Return the seconds to wait before retry `number`, which counts from 1.

    Args:
        policy: the delays.
        number: which retry it is.
        retry_after: what the server asked for; never undercut, exceeded by at most a tenth.
        chance: a number from 0 to 1, drawn evenly.

    Source: "full jitter" of the AWS Architecture Blog, "Exponential Backoff And Jitter".
    """
    if retry_after is not None:
        return retry_after * (1 + JITTER * chance)
    # The exponent is capped where 2.0 ** n would overflow; `max_delay` is reached long before.
    return min(policy.max_delay, policy.initial_delay * 2.0 ** min(number - 1, 60)) * chance


class Retries:
    """The retries of one call: how many there were, and whether another one follows.

    Args:
        policy: how often and how long.
        bucket: the client's budget.
        chance: gives a number from 0 to 1; passed in so that tests are exact.
    """

    __slots__ = ("_bucket", "_chance", "_once", "_policy", "count", "delay")

    def __init__(self, policy: RetryPolicy, bucket: Bucket, chance: Callable[[], float] = random.random) -> None:
        self._policy = policy
        self._bucket = bucket
        self._chance = chance
        self._once: set[str] = set()
        self.count = 0
        self.delay = 0.0

    def again(self, error: BaseException, remaining: float) -> bool:
        """Decide whether another attempt follows `error`, and set `delay` to the wait before it.

        Args:
            error: why the last attempt failed.
            remaining: seconds until the call's deadline, infinite without one.
        """
        policy = self._policy
        if not isinstance(error, APIError) or self.count >= policy.max_retries or not self._may_repeat(error):
            return False
        if error.retry_after is not None and error.retry_after > policy.max_retry_after:
            return False
        self.delay = backoff(policy, self.count + 1, error.retry_after, self._chance())
        if self.delay >= remaining:
            return False
        if not self._bucket.draw(error):
            error._budget_empty = True
            return False
        self.count += 1
        return True

    def _may_repeat(self, error: APIError) -> bool:
        if error._retryable == "unconfirmed" and not self._policy.retry_unconfirmed:
            return False
        if error._retryable in ("once", "unconfirmed"):
            # Once each: a missing channel, and an answer that may have been billed.
            cause = "channel" if isinstance(error, NoChannelError) else "unconfirmed"
            if cause in self._once:
                return False
            self._once.add(cause)
            return True
        return error._retryable == "yes"


class _Failed:
    """An attempt that failed."""

    __slots__ = ("error",)

    def __init__(self, error: APIError) -> None:
        self.error = error


async def retry(
    error: APIError,
    attempt: Callable[[], Awaitable[T]],
    *,
    again: Callable[[APIError], float | None],
    sleep: Callable[[float], Awaitable[None]],
) -> T:
    """Repeat `attempt` after `error`, as long as `again` gives a delay, and return its result.

    Args:
        error: how the first attempt failed.
        attempt: makes another one.
        again: seconds to wait after a failure, or `None` when that failure is to be raised.
        sleep: waits.
    """
    delay = again(error)
    try:
        if delay is None:
            raise error
    finally:
        del error  # or its traceback, which has this frame, would hold itself
    await sleep(delay)

    # Failures pass through tenacity as results, in a box that is then emptied: its frames keep what an attempt came to,
    # and the frames of a failure's traceback lead back to them.
    async def next_attempt() -> T | _Failed:
        try:
            return await attempt()
        except APIError as failure:
            return _Failed(failure)

    def wanted(result: T | _Failed) -> bool:
        nonlocal delay
        delay = again(result.error) if isinstance(result, _Failed) else None
        return delay is not None

    # Made anew for each call: one AsyncRetrying shared by tasks mixes up their state.
    retrying = _tenacity.AsyncRetrying(
        retry=_tenacity.retry_if_result(wanted), wait=lambda _state: delay or 0.0, sleep=sleep
    )
    try:
        result: T | _Failed = await retrying(next_attempt)
    finally:
        retrying.iter_state.reset()  # its steps hold it, and it holds the call
    if not isinstance(result, _Failed):
        return result
    try:
        raise result.error
    finally:
        del result.error
