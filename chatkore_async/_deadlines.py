"""Deadlines of many calls behind one timer of the event loop.

A timer of the loop costs more than a microsecond to set and to cancel, and nearly every deadline is cancelled. So
they lie in a dictionary: setting one is an entry, moving it later an assignment. The timer is set for the earliest,
and when it comes up, all are looked at. It rarely does, since what it was set for is nearly always over by then, and
those that are there now are far from theirs; where many pass one after another, they wait for each other a moment.
"""

import asyncio
from collections.abc import Callable

NEVER = float("inf")

PATIENCE = 2e-6
"""Seconds between two looks for each deadline there is, so that looking takes a few percent of the time at most.

Of ten thousand deadlines that pass at different moments, each is up to 20 ms late.
"""


class Deadline:
    """A moment of the loop's clock that must not be passed, and what happens when it is.

    Attributes:
        when: the moment. It may be moved at will; `Deadlines.watch` has to be told only when it became earlier.
    """

    __slots__ = ("when",)

    def __init__(self, when: float) -> None:
        self.when = when

    def __repr__(self) -> str:
        return f"<Deadline {self.when}>"

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
        self._set: dict[Deadline, None] = {}  # in the order in which they were set
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = NEVER

    def __repr__(self) -> str:
        return f"<Deadlines {len(self)} set>"

    def __len__(self) -> int:
        return len(self._set)

    def set(self, when: float, expire: Callable[[], float | None]) -> Deadline:
        """Have `expire` run once the clock passes `when`, as `Deadline.expire` does."""
        deadline = _Alarm(when, expire)
        self.watch(deadline)
        return deadline

    def watch(self, deadline: Deadline) -> None:
        """See to it that a deadline which is new, or became earlier, is looked at in time."""
        when = deadline.when
        if when != NEVER:
            self._set[deadline] = None
            if when < self._timer_at:
                self._set_timer(when)

    def cancel(self, deadline: Deadline) -> None:
        """Forget a deadline. Doing so twice is fine."""
        self._set.pop(deadline, None)

    def close(self) -> None:
        """Stop the timer; what is still set will not expire."""
        self._set.clear()
        self._set_timer(NEVER)

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = when
        if when != NEVER:
            self._timer = self._loop.call_at(when, self._look)

    def _look(self) -> None:
        """Have what passed expire, and set the timer for what is next."""
        now = self._loop.time()
        self._timer_at = -NEVER  # no need to set the timer before the end
        try:
            for deadline in sorted((each for each in self._set if each.when <= now), key=_moment):
                if deadline not in self._set:
                    continue  # one before it cancelled it
                del self._set[deadline]
                later = deadline.expire()
                if later is not None:
                    deadline.when = later
                    self._set[deadline] = None
        finally:
            self._set_timer(max(min(map(_moment, self._set), default=NEVER), now + PATIENCE * len(self._set)))


def _moment(deadline: Deadline) -> float:
    return deadline.when
