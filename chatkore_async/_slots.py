"""Places in the pool: who may use a connection now, and who waits, first come, first served.

We count places ourselves rather than let aiohttp's connector do it: so we know what a call is waiting for, can
answer `client.pool`, and need no trace configuration, which costs every call 18 µs.
"""

import asyncio
from collections import OrderedDict


class Slots:
    """A counter with a queue. Not a semaphore: `asyncio.Semaphore` has no number of waiters and no free fast path.

    Args:
        limit: how many may be taken at a time; `None` disables the limit.
    """

    __slots__ = ("_waiters", "in_use", "limit")

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.in_use = 0
        # Ordered, and left from the middle at no cost: when a pool is stuck, thousands of waiters are cancelled.
        self._waiters: OrderedDict[asyncio.Future[None], None] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Slots {self.in_use}/{self.limit} waiting {self.waiting}>"

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(not waiter.done() for waiter in self._waiters)

    def take(self) -> bool:
        """Take a place if one is free. Nobody waits for one that is: places go from hand to hand."""
        if self.limit is not None and self.in_use >= self.limit:
            return False
        self.in_use += 1
        return True

    async def wait(self) -> None:
        """Wait for a place and take it. A waiter who is cancelled leaves no hole."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        try:
            await waiter
        except BaseException:  # cancelled, or the coroutine is closed
            if waiter.done() and not waiter.cancelled():
                self.release()  # the place was given to us in the moment we were cancelled
            else:
                self._waiters.pop(waiter, None)  # unless `release` met it already
            raise

    def release(self) -> None:
        """Give a place back, to the one who waits longest."""
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                waiter.set_result(None)  # the place changes hands: `in_use` stays
                return
        self.in_use -= 1
