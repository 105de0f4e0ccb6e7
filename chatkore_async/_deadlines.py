"""Deadlines of many calls behind one timer of the event loop.

A timer of the loop costs more than a microsecond to set and to cancel, and nearly every deadline is cancelled. So
they lie in a heap of our own: setting one is a push, moving it later is an assignment, and a cancelled one is
dropped when it comes up or when half of the heap is such.
"""

import asyncio
import heapq
import itertools
from collections.abc import Callable

NEVER = float("inf")


class Deadline:
    """A moment of the loop's clock that a call must not pass.

    `when` may be moved at will; `Deadlines.watch` has to be told only when it became earlier.
    """

    __slots__ = ("expire", "seen_at", "when")

    def __init__(self, when: float, expire: Callable[[], None]) -> None:
        self.when = when
        self.expire: Callable[[], None] | None = expire
        self.seen_at = NEVER  # when the timer looks at it next

    def __repr__(self) -> str:
        return f"<Deadline {'cancelled' if self.expire is None else self.when}>"


class Deadlines:
    """The deadlines of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._heap: list[tuple[float, int, Deadline]] = []
        self._order = itertools.count()  # so that two deadlines of one moment are never compared
        self._timer: asyncio.TimerHandle | None = None
        self._stale = 0

    def __repr__(self) -> str:
        return f"<Deadlines {len(self)} set>"

    def __len__(self) -> int:
        return len(self._heap) - self._stale

    def set(self, when: float, expire: Callable[[], None]) -> Deadline:
        """Have `expire` run once the clock passes `when`; it is told nothing and must not raise."""
        deadline = Deadline(when, expire)
        if when != NEVER:
            self.watch(deadline)
        return deadline

    def watch(self, deadline: Deadline) -> None:
        """See to it that a deadline which became earlier is looked at in time."""
        if deadline.seen_at != NEVER:
            self._stale += 1  # the later entry stays in the heap until it comes up
        deadline.seen_at = deadline.when
        heapq.heappush(self._heap, (deadline.when, next(self._order), deadline))
        if self._timer is None or deadline.when < self._timer.when():
            self._set_timer()

    def cancel(self, deadline: Deadline) -> None:
        """Forget a deadline. Doing so twice is fine."""
        if deadline.expire is None:
            return
        deadline.expire = None  # breaks the cycle with the call, too
        if deadline.seen_at != NEVER:
            self._stale += 1
            if self._stale > 64 and self._stale * 2 > len(self._heap):
                self._heap = [entry for entry in self._heap if self._is_live(entry)]
                heapq.heapify(self._heap)
                self._stale = 0

    def close(self) -> None:
        """Stop the timer; what is still set will not expire."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._heap.clear()

    @staticmethod
    def _is_live(entry: tuple[float, int, Deadline]) -> bool:
        return entry[2].expire is not None and entry[2].seen_at == entry[0]

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._heap[0][0], self._wake) if self._heap else None

    def _wake(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            deadline = entry[2]
            if not self._is_live(entry):
                self._stale -= 1
            elif deadline.when > now:
                deadline.seen_at = NEVER
                if deadline.when != NEVER:
                    deadline.seen_at = deadline.when
                    heapq.heappush(self._heap, (deadline.when, next(self._order), deadline))
            else:
                expire, deadline.expire = deadline.expire, None
                if expire is not None:
                    expire()
        self._set_timer()
