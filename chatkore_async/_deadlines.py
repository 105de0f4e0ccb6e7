"""Deadlines of many calls behind one timer of the event loop.

A timer of the loop costs more than a microsecond to set and to cancel, and nearly every deadline is cancelled. So
they lie in a heap of our own: watching one is a push, moving it later is an assignment, and a cancelled one leaves
only its number behind, which is dropped when it comes up or when most of the heap is such.
"""

import asyncio
import heapq
import itertools
from collections.abc import Callable

NEVER = float("inf")

_SPARE = 64  # numbers left behind that nobody minds


class Deadline:
    """A moment of the loop's clock that must not be passed, and what happens when it is.

    Attributes:
        when: the moment. It may be moved at will; `Deadlines.watch` has to be told only when it became earlier.
        seen_at: when the timer looks at it next; `NEVER` while it is not watched, before all else once it is over.
        entry: the number in the heap that stands for it.
    """

    __slots__ = ("entry", "seen_at", "when")

    def __init__(self, when: float) -> None:
        self.when = when
        self.seen_at = NEVER
        self.entry = -1

    def __repr__(self) -> str:
        return f"<Deadline {'cancelled' if self.seen_at == -NEVER else self.when}>"

    def expire(self) -> float | None:
        """Do what is due. Must not raise; may answer with a later moment, at which it is looked at again."""
        raise NotImplementedError


class _Alarm(Deadline):
    """A deadline that calls a function."""

    __slots__ = ("_expire",)

    def __init__(self, when: float, expire: Callable[[], float | None]) -> None:
        super().__init__(when)
        self._expire = expire

    def expire(self) -> float | None:
        return self._expire()


class Deadlines:
    """The deadlines of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watched: dict[int, Deadline] = {}
        self._heap: list[tuple[float, int]] = []  # numbers that are not watched are stale
        self._numbers = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = NEVER

    def __repr__(self) -> str:
        return f"<Deadlines {len(self)} set>"

    def __len__(self) -> int:
        return len(self._watched)

    def set(self, when: float, expire: Callable[[], float | None]) -> Deadline:
        """Have `expire` run once the clock passes `when`, as `Deadline.expire` does."""
        deadline = _Alarm(when, expire)
        self.watch(deadline)
        return deadline

    def watch(self, deadline: Deadline) -> None:
        """See to it that a deadline which is new, or became earlier, is looked at in time."""
        when = deadline.when
        if when >= deadline.seen_at:
            return
        self._watched.pop(deadline.entry, None)
        deadline.seen_at = when
        number = deadline.entry = next(self._numbers)
        self._watched[number] = deadline
        heapq.heappush(self._heap, (when, number))
        if when < self._timer_at:
            self._set_timer()

    def cancel(self, deadline: Deadline) -> None:
        """Forget a deadline, for good. Doing so twice is fine."""
        self._watched.pop(deadline.entry, None)
        deadline.seen_at = -NEVER  # so that nothing is earlier
        if len(self._heap) > 2 * len(self._watched) + _SPARE:
            # In place: the collector may end a stream, and so bring us here, while `watch` pushes.
            self._heap[:] = [entry for entry in self._heap if entry[1] in self._watched]
            heapq.heapify(self._heap)

    def close(self) -> None:
        """Stop the timer; what is still set will not expire."""
        self._watched.clear()
        self._heap.clear()
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
                _, number = heapq.heappop(self._heap)
                deadline = self._watched.pop(number, None)
                if deadline is None:
                    continue
                deadline.seen_at = NEVER
                if deadline.when <= now:
                    later = deadline.expire()
                    if later is None:
                        deadline.seen_at = -NEVER
                        continue
                    deadline.when = later
                self.watch(deadline)
        finally:
            self._set_timer()
