"""`RateLimiter`: who waits, in which order, and who is woken when.

What may go out is decided by `_group`, for each endpoint, key and model by itself. Those who wait lie in one line for
each group and event loop, behind one timer. The numbers are shared by all loops, so that the limit holds in total.

Books are kept under a lock. What comes back is put aside first and entered by whoever has the lock or gets it at once:
the collector may end a stream, and so give its permit back, in the middle of anything that we do.
"""

import asyncio
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import count
from typing import Any, Final, cast

from ._adaptive import INFINITY
from ._config import RateLimit
from ._estimate import estimate_tokens
from ._group import Group, Permit
from ._limiter import Demand, Report
from .errors import ConfigurationError

FORGET: Final = 60.0
"""Seconds after which a group that nobody uses may be forgotten, once there are many: keys rotate."""

MANY: Final = 64

TICK: Final = 0.002
"""Seconds between two looks of a timer. Some event loops count whole milliseconds, ring early, and would be set again
and again; and at a thousand attempts a second, a few may go out together."""

PATIENCE: Final = 0.1
"""Seconds after which a line looks for itself, when the line of another event loop is to be served first."""


class _Line:
    """Those of one event loop who wait in one group."""

    __slots__ = ("asked", "group", "loop", "timer", "timer_at", "waiters")

    def __init__(self, group: Group, loop: asyncio.AbstractEventLoop) -> None:
        self.group = group
        self.loop = loop
        # Ordered, and left from the middle at no cost: the number of each, and its estimate of tokens.
        self.waiters: OrderedDict[asyncio.Future[Permit], tuple[int, float]] = OrderedDict()
        self.timer: asyncio.TimerHandle | None = None
        self.timer_at = INFINITY
        self.asked = False  # its loop was asked to serve it, and did not yet

    def set_timer(self, when: float, wake: Callable[["_Line"], None]) -> None:
        if when == self.timer_at:
            return
        if self.timer is not None:
            self.timer.cancel()
        self.timer, self.timer_at = None, when
        if when < INFINITY:
            self.timer = self.loop.call_at(max(when, self.loop.time() + TICK), wake, self)


class RateLimiter:
    """A limiter that keeps to a `RateLimit`.

    A client makes one of its own when `rate_limit` is a `RateLimit`. Make one yourself to share it among clients. It
    serves several event loops, one after another or in several threads, with the limit in total; within a loop, first
    come, first served.

    Args:
        limit: what to keep to.
    """

    def __init__(self, limit: RateLimit = RateLimit()) -> None:  # noqa: B008 - frozen
        self._limit = limit
        self._estimate = limit.estimate or estimate_tokens
        self._groups: dict[tuple[str, str, str], Group] = {}
        self._lines: dict[Group, dict[asyncio.AbstractEventLoop, _Line]] = {}  # of groups in which somebody waits
        self._many = MANY
        self._numbers = count()
        self._lock = threading.Lock()
        self._returned: deque[tuple[Permit, Report | None] | tuple[_Line, asyncio.Future[Permit]]] = deque()

    def __repr__(self) -> str:
        return f"<RateLimiter {self.in_flight} in flight, {self.waiting} waiting>"

    @property
    def in_flight(self) -> int:
        """How many permits are out."""
        return sum(group.in_flight for group in list(self._groups.values()))

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(len(line.waiters) for lines in list(self._lines.values()) for line in list(lines.values()))

    async def acquire(self, demand: Demand, /) -> object:
        """Wait until the attempt may be made, and return a permit. May be cancelled.

        Raises:
            ConfigurationError: `RateLimit.estimate` returned no number of tokens.
        """
        estimate = self._tokens(demand) if self._limit.tokens_per_minute else 0.0
        loop = asyncio.get_running_loop()
        now = loop.time()
        permit = waiter = line = None
        with self._lock:
            key = (demand.endpoint, demand.key, demand.model)
            group = self._groups.get(key)
            if group is None:
                group = self._new_group(key, now)
            if group not in self._lines and group.ready_at(now, estimate) <= now:
                permit = group.let_in(now, estimate)
                permit.clock = loop.time
            else:
                line = self._line(group, loop)
                waiter = loop.create_future()
                line.waiters[waiter] = (next(self._numbers), estimate)
                if len(line.waiters) == 1:
                    self._serve(group, loop)
        if self._returned:
            self._settle()
        if permit is not None:
            return permit
        assert waiter is not None
        assert line is not None
        try:
            return await waiter
        except BaseException:  # cancelled, or the coroutine is closed
            if waiter.done() and not waiter.cancelled():
                self._returned.append((waiter.result(), None))
            else:
                self._returned.append((line, waiter))
            self._settle()
            raise

    def release(self, permit: object, report: Report, /) -> None:
        """Take a permit back, with how the attempt went. What is no permit is ignored."""
        if isinstance(permit, Permit):
            self._returned.append((permit, report))
            self._settle()

    def _tokens(self, demand: Demand) -> float:
        tokens: Any = self._estimate(demand)
        if not isinstance(tokens, (int, float)) or not 0 <= tokens < math.inf:
            raise ConfigurationError(f"RateLimit.estimate returned {tokens!r}, which is no number of tokens")
        return float(tokens)

    # With the lock.

    def _new_group(self, key: tuple[str, str, str], now: float) -> Group:
        if len(self._groups) >= self._many:
            kept = {
                name: group
                for name, group in self._groups.items()
                if group.in_flight or group in self._lines or now < max(group.last, group.held_until) + FORGET
            }
            self._groups = kept
            self._many = max(MANY, 2 * len(kept))
        group = self._groups[key] = Group(self._limit)
        return group

    def _line(self, group: Group, loop: asyncio.AbstractEventLoop) -> _Line:
        lines = self._lines.setdefault(group, {})
        line = lines.get(loop)
        if line is None:
            line = lines[loop] = _Line(group, loop)
        return line

    def _leave(self, line: _Line, here: asyncio.AbstractEventLoop | None) -> None:
        """Take away a line in which nobody waits any more."""
        if line.loop is here:  # else its timer may not be touched, and finds nothing to do
            line.set_timer(INFINITY, self._wake)
        lines = self._lines.get(line.group, {})
        if lines.get(line.loop) is line:
            del lines[line.loop]
            if not lines:
                del self._lines[line.group]

    def _serve(self, group: Group, here: asyncio.AbstractEventLoop | None) -> None:
        """Let in whoever may, longest wait first."""
        while lines := self._lines.get(group):
            ready = [line for line in lines.values() if not line.asked]
            if not ready:
                break
            line = ready[0] if len(ready) == 1 else min(ready, key=_number)
            if here is None or line.loop is not here:
                if self._ask(line):
                    break
                continue
            waiter, (_, estimate) = next(iter(line.waiters.items()))
            if waiter.done():
                pass  # cancelled, and about to say so
            else:
                now = here.time()
                when = group.ready_at(now, estimate)
                if when > now:
                    line.set_timer(when, self._wake)
                    return
                permit = group.let_in(now, estimate)
                permit.clock = here.time
                waiter.set_result(permit)
            del line.waiters[waiter]
            if not line.waiters:
                self._leave(line, here)
        own = None if here is None else self._lines.get(group, {}).get(here)
        if own is not None:
            # Another loop is to serve its line first. If it does not run at the moment, nobody is to wait for it.
            own.set_timer(own.loop.time() + PATIENCE, self._wake)

    def _ask(self, line: _Line) -> bool:
        """Have another event loop serve its line; false if it is closed, and so nobody waits there."""
        line.asked = True
        try:
            line.loop.call_soon_threadsafe(self._wake, line)
        except RuntimeError:  # closed
            self._leave(line, None)
            return False
        return True

    # Without it.

    def _wake(self, line: _Line) -> None:
        with self._lock:
            line.asked = False
            line.set_timer(INFINITY, self._wake)
            self._serve(line.group, line.loop)
        if self._returned:
            self._settle()

    def _settle(self) -> None:
        """Enter what came back, unless somebody else is at it, who then enters this as well."""
        while self._returned and self._lock.acquire(blocking=False):
            try:
                while self._returned:
                    self._enter()
            finally:
                self._lock.release()

    def _enter(self) -> None:
        thing, what = self._returned.popleft()
        if isinstance(thing, Permit):
            group = thing.group
            if thing.is_back:
                return
            if isinstance(what, Report):
                group.take_back(thing, what, thing.clock())
            else:
                group.take_back_unused(thing)
        else:
            group = thing.group
            thing.waiters.pop(cast("asyncio.Future[Permit]", what), None)
        if group in self._lines:
            here = _running_loop()
            if isinstance(thing, _Line) and not thing.waiters:
                self._leave(thing, here)
            self._serve(group, here)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _number(line: _Line) -> int:
    return next(iter(line.waiters.values()))[0]
