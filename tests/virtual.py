"""An event loop whose time passes at once, and servers that live in it: hours of waiting in moments."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from chatkore_async import Demand, RateLimiter, Report
from chatkore_async.types import Usage

T = TypeVar("T")


class _Selector(selectors.DefaultSelector):
    """Sees what is ready, and lets the time pass in which nothing would be."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("everybody waits, and nobody for time to pass")
            self.now += max(timeout, 0.0)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop with a clock of its own, which begins at 0 and runs only while everybody waits."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)
        self.set_debug(False)  # a stack for each of a million handles takes minutes
        self.timers = 0

    def time(self) -> float:
        return self._virtual.now

    @property
    def pending(self) -> int:
        """Timers that will ring."""
        return sum(not timer.cancelled() for timer in self._scheduled)  # type: ignore[attr-defined]

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        self.timers += 1
        return super().call_at(when, callback, *args, context=context)


def run(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class Relay:
    """A server with a hidden limit, which it enforces in slices of time, or on what is in flight.

    Args:
        rate: requests, or tokens where attempts bring some, a second; or a function that returns them for a moment.
        slice: seconds of a slice.
        latency: seconds until an answer, or a function that returns them.
        refusal: seconds until a refusal; as an answer, if it is not given.
        places: requests in flight at a time, in place of a rate.
        headers: of each answer, from what is left of the slice and the seconds until its end.
        status: of a refusal.
        retry_after: seconds that a refusal asks to wait.
    """

    def __init__(
        self,
        rate: float | Callable[[float], float] = 0.0,
        *,
        slice: float = 0.1,  # noqa: A002
        latency: float | Callable[[], float] = 0.02,
        refusal: float | None = None,
        places: int | None = None,
        headers: Callable[[float, float], dict[str, str]] | None = None,
        status: int = 429,
        retry_after: float | None = None,
    ) -> None:
        self.rate = rate if callable(rate) else lambda _: rate
        self.slice = slice
        self.latency = latency if callable(latency) else lambda: latency
        self.refusal = refusal
        self.places = places
        self.headers = headers
        self.status = status
        self.retry_after = retry_after
        self.accepted: list[tuple[float, float]] = []  # the moment, and how much
        self.refused: list[float] = []
        self.in_flight = 0
        self._slice = -1
        self._used = 0.0

    async def ask(self, amount: float = 1.0, usage: Usage | None = None) -> Report:
        now = asyncio.get_running_loop().time()
        number = int(now / self.slice + 1e-6)
        if number != self._slice:
            self._slice, self._used = number, 0.0
        allowed = round(self.rate(now) * self.slice, 6)
        fits = self._used + amount <= allowed if self.places is None else self.in_flight < self.places
        left, reset = max(allowed - self._used - amount, 0.0), (number + 1) * self.slice - now
        headers = {} if self.headers is None else self.headers(left, reset)
        if fits:
            self._used += amount
            self.accepted.append((now, amount))
            self.in_flight += 1
            try:
                await asyncio.sleep(self.latency())
            finally:
                self.in_flight -= 1
            return Report(status=200, headers=headers, usage=usage, retry_after=None)
        self.refused.append(now)
        await asyncio.sleep(self.latency() if self.refusal is None else self.refusal)
        return Report(
            status=self.status, headers=headers, usage=None, retry_after=self.retry_after, error="RateLimitError"
        )

    def share(self, start: float, end: float, rate: float | None = None) -> float:
        """What was accepted between two moments, as a share of what could have been."""
        steps = 1000
        moments = [start + (end - start) * (step + 0.5) / steps for step in range(steps)]
        could = sum(self.rate(moment) if rate is None else rate for moment in moments) / steps * (end - start)
        return sum(amount for moment, amount in self.accepted if start <= moment < end) / could

    def refusals(self, start: float, end: float) -> float:
        """The share of attempts between two moments that were refused."""
        refused = sum(start <= moment < end for moment in self.refused)
        return refused / max(refused + sum(start <= moment < end for moment, _ in self.accepted), 1)


def demand(model: str = "m", **fields: Any) -> Demand:
    return Demand(**{"endpoint": "https://host/v1", "key": "k", "model": model, "size": 0, "attempt": 1, **fields})


async def flood(
    limiter: RateLimiter,
    relay: Relay,
    seconds: float,
    *,
    tasks: int = 500,
    asked: Callable[[], tuple[Demand, float, Usage | None]] = lambda: (demand(), 1.0, None),
) -> None:
    """Have tasks ask again and again, as fast as they are let."""

    async def one() -> None:
        while True:
            wanted, amount, usage = asked()
            permit = await limiter.acquire(wanted)
            report = Report(status=None, headers={}, usage=None, retry_after=None)
            try:
                report = await relay.ask(amount, usage)
            finally:
                limiter.release(permit, report)

    running = [asyncio.create_task(one()) for _ in range(tasks)]
    await asyncio.wait(running, timeout=seconds)
    failed = [task.exception() for task in running if task.done()]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    assert failed == []
