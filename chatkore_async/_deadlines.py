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

    __slots__ = ("entry", "expire", "seen_at", "when")

    def __init__(self, when: float, expire: Callable[[], float | None]) -> None:
        self.when = when
        self.expire: Callable[[], float | None] | None = expire
        self.seen_at = NEVER  # when the timer looks at it next; once it is over, nothing is earlier
        self.entry = -1  # the number of the heap's entry that counts; others are stale

    def __repr__(self) -> str:
        return f"<Deadline {'cancelled' if self.expire is None else self.when}>"


class Deadlines:
    """The deadlines of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._heap: list[tuple[float, int, Deadline]] = []
        self._numbers = itertools.count()  # so that two deadlines of one moment are never compared
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = NEVER
        self._stale = 0  # entries that were cancelled, or left behind by a deadline that moved

    def __repr__(self) -> str:
        return f"<Deadlines {len(self)} set>"

    def __len__(self) -> int:
        return len(self._heap) - self._stale

    def set(self, when: float, expire: Callable[[], float | None]) -> Deadline:
        """Have `expire` run once the clock passes `when`; it is told nothing and must not raise.

        It may answer with a later moment: then it was not time yet, and is looked at again.
        """
        deadline = Deadline(when, expire)
        if when != NEVER:
            self._push(deadline, when)
        return deadline

    def watch(self, deadline: Deadline) -> None:
        """See to it that a deadline which became earlier is looked at in time."""
        if deadline.seen_at != NEVER:
            self._stale += 1  # the later entry stays in the heap until it comes up
        self._push(deadline, deadline.when)

    def _push(self, deadline: Deadline, when: float) -> None:
        deadline.seen_at = when
        number = deadline.entry = next(self._numbers)
        heapq.heappush(self._heap, (when, number, deadline))
        if when < self._timer_at:
            self._set_timer()

    def cancel(self, deadline: Deadline) -> None:
        """Forget a deadline. Doing so twice is fine."""
        if deadline.expire is None:
            return
        deadline.expire = None  # breaks the cycle with the call, too
        if deadline.seen_at != NEVER:
            self._stale += 1
            if self._stale > 64 and self._stale * 2 > len(self._heap):
                # In place: the collector may end a stream, and so bring us here, while `watch` pushes.
                self._heap[:] = [entry for entry in self._heap if entry[1] == entry[2].entry and entry[2].expire]
                heapq.heapify(self._heap)
                self._stale = 0
        else:
            deadline.seen_at = -NEVER

    def close(self) -> None:
        """Stop the timer; what is still set will not expire."""
        for _, _, deadline in self._heap:
            deadline.expire = None
        self._heap.clear()
        self._stale = 0
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = NEVER
        if self._heap:
            self._timer_at = self._heap[0][0]
            self._timer = self._loop.call_at(self._timer_at, self._wake)

    def _wake(self) -> None:
        now = self._loop.time()
        try:
            while self._heap and self._heap[0][0] <= now:
                _, number, deadline = heapq.heappop(self._heap)
                expire = deadline.expire
                if expire is None or number != deadline.entry:
                    self._stale -= 1
                    continue
                deadline.seen_at = NEVER
                if deadline.when <= now:
                    deadline.expire = None
                    later = expire()
                    if later is None:
                        deadline.seen_at = -NEVER
                        continue
                    deadline.expire = expire
                    deadline.when = later
                if deadline.when != NEVER:  # it was moved since
                    self.watch(deadline)
        finally:
            self._set_timer()
