"""One process's part in the limit of a cluster: a `Limiter` whose permits come by messages.

Each event loop has a queue of its own. It says what it wants and what it gives back in one message, and has one that
the limiter answers when it can; who waits for nothing and holds nothing sends nothing. How messages travel is not
known here.
"""

import asyncio
import contextlib
import logging
import math
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any, Final, TypeAlias
from uuid import uuid4

import msgspec

from chatkore_async import ChatKoreError, ConfigurationError, Demand, RateLimit, Report, estimate_tokens
from chatkore_async.integrations._cluster_messages import Answer, Ask, Back, Message, decode_answer, encode

logger = logging.getLogger("chatkore_async")

Exchange: TypeAlias = Callable[[bytes], Awaitable[bytes]]
"""Sends a message, and returns its answer. Raises `Unreachable` for what may pass."""

FIRST_WAIT: Final = 0.25
"""Seconds until a limiter that was not reached is tried again; doubled each time."""

LONGEST_WAIT: Final = 5.0


class Unreachable(Exception):  # noqa: N818 - a state that passes
    """The limiter is not there at the moment, and is expected back."""


class LimiterLostError(ChatKoreError):
    """The limiter of the cluster is gone for good, so nothing may be sent any more."""


class _Permit(msgspec.Struct, frozen=True, eq=False):
    queue: "_Queue"
    number: int


class _Queue:
    """Those who wait on one event loop, and what they hold."""

    def __init__(self, exchange: Exchange, loop: asyncio.AbstractEventLoop) -> None:
        self._exchange = exchange
        self.loop = loop
        self._owner = uuid4().hex
        self._numbers = count()
        self._messages = count()
        self._waiting: dict[int, tuple[Ask, asyncio.Future[None]]] = {}
        self._held: set[int] = set()
        self._asks: dict[int, Ask] = {}  # not said yet
        self._back: deque[Back] = deque()  # likewise
        self._begins = True
        self._listens: int | None = None  # the number of the newest message, while it has no answer
        self._is_about_to_send = False
        self._ends = False
        self._poked = False
        self._next_at = -math.inf
        self._pause = 0.0
        self._failures = 0
        self._lost: Exception | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def acquire(self, demand: Demand, tokens: int) -> object:
        if self._lost is not None:
            raise LimiterLostError(str(self._lost))
        number = next(self._numbers)
        waiter = self.loop.create_future()
        ask = Ask(number, demand.endpoint, demand.key, demand.model, tokens, demand.attempt)
        self._ends = False  # the loop goes on, whoever was cancelled
        self._asks[number] = ask
        self._waiting[number] = (ask, waiter)
        self._send_soon()
        try:
            await waiter
        except BaseException:  # cancelled, or the coroutine is closed
            self._waiting.pop(number, None)
            self._held.discard(number)
            if self._asks.pop(number, None) is None:
                self._back.append(Back(number, None))
                self._poke()
            raise
        return _Permit(self, number)

    def release(self, number: int, report: Report) -> None:
        if self._lost is not None:
            return
        self._held.discard(number)
        self._back.append(Back(number, _slim(report)))
        self._poke()

    def _poke(self) -> None:
        """Have the loop look. From any thread, and from the collector, which runs in the midst of anything."""
        if not self._poked:
            self._poked = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: the lease ends what it held
                self.loop.call_soon_threadsafe(self._poked_now)

    def _poked_now(self) -> None:
        self._poked = False
        self._send_soon()

    def _send_soon(self) -> None:
        if not (self._is_about_to_send or self._ends or self._lost is not None):
            self._is_about_to_send = True
            task = self.loop.create_task(self._send(), name="chatkore cluster limit")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _send(self) -> None:
        """Wait until a message may go out, and hear what is answered."""
        message = None
        try:
            await asyncio.sleep(self._next_at - self.loop.time())
            self._is_about_to_send = False
            message = self._next_message()
            if message is None:
                return
            answer = decode_answer(await self._exchange(encode(message)))
        except asyncio.CancelledError:
            # All tasks are cancelled when a loop ends. A message that began now would be cut off without a word.
            self._is_about_to_send = False
            self._ends = True
            self._begin_anew(message)
            raise
        except Unreachable as error:
            self._begin_anew(message)
            self._wait_for_it(error)
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait are to know
            self._give_up(error)
            return
        self._take(answer)
        if self._listens == message.number:
            self._listens = None
            self._send_soon()

    def _next_message(self) -> Message | None:
        if not (self._asks or self._back):
            is_idle = not (self._waiting or self._held)
            if is_idle or self._listens is not None:
                return None
        back = [self._back.popleft() for _ in range(len(self._back))]
        message = Message(self._owner, next(self._messages), self._begins, list(self._asks.values()), back)
        self._asks.clear()
        self._begins = False
        self._listens = message.number
        self._next_at = self.loop.time() + self._pause
        return message

    def _take(self, answer: Answer) -> None:
        self._failures = 0
        if answer.is_unknown:
            if self._held:
                logger.warning(
                    "the cluster's limiter was started anew, or had not heard of this process for too long; "
                    "attempts in flight are no longer counted: %d",
                    len(self._held),
                )
                self._held.clear()
            self._begin_anew(None)
            return
        self._pause = answer.pause
        for number in answer.granted:
            if number in self._held:
                continue  # said twice, since what it answers may have been lost
            self._asks.pop(number, None)
            _, waiter = self._waiting.pop(number, (None, None))
            if waiter is None or waiter.done():
                # Cancelled in the meantime; what was said of that may have come before what it is about.
                self._back.append(Back(number, None))
            else:
                self._held.add(number)
                waiter.set_result(None)

    def _begin_anew(self, message: Message | None) -> None:
        """Ask again for all that is waited for, and say again what may not have been heard."""
        self._begins = True
        self._asks = {number: ask for number, (ask, _) in self._waiting.items()}
        if message is not None:
            self._back.extendleft(reversed(message.back))
            if self._listens == message.number:
                self._listens = None

    def _wait_for_it(self, error: Unreachable) -> None:
        if not self._failures:
            logger.warning("the cluster's limiter cannot be reached; calls wait until it is back: %s", error)
        self._next_at = self.loop.time() + min(FIRST_WAIT * 2.0 ** min(self._failures, 60), LONGEST_WAIT)
        self._failures += 1
        self._send_soon()

    def _give_up(self, error: Exception) -> None:
        self._lost = error
        self._listens = None
        for _, waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_exception(LimiterLostError(str(error)))
        self._waiting.clear()
        self._asks.clear()


class RemoteLimiter:
    """A `Limiter` that asks somebody else, by messages.

    Args:
        limit: what is kept to there. Tokens are estimated here, where the request is.
        exchange: sends a message.
    """

    def __init__(self, limit: RateLimit, exchange: Exchange) -> None:
        self._estimate = (limit.estimate or estimate_tokens) if limit.tokens_per_minute else None
        self._exchange = exchange
        self._queues: dict[asyncio.AbstractEventLoop, _Queue] = {}
        self._lock = threading.Lock()

    async def acquire(self, demand: Demand, /) -> object:
        """Wait until the attempt may be made, and return a permit. May be cancelled.

        Raises:
            ConfigurationError: `RateLimit.estimate` returned no number of tokens.
            LimiterLostError: there is no limiter any more.
        """
        tokens = 0 if self._estimate is None else _whole(self._estimate(demand))
        loop = asyncio.get_running_loop()
        queue = self._queues.get(loop)
        if queue is None:
            with self._lock:
                self._queues = {each: kept for each, kept in self._queues.items() if not each.is_closed()}
                queue = self._queues[loop] = _Queue(self._exchange, loop)
        return await queue.acquire(demand, tokens)

    def release(self, permit: object, report: Report, /) -> None:
        """Take a permit back, with how the attempt went. What is no permit is ignored."""
        if isinstance(permit, _Permit):
            permit.queue.release(permit.number, report)


def _whole(tokens: Any) -> int:
    if not isinstance(tokens, (int, float)) or not 0 <= tokens < math.inf:
        raise ConfigurationError(f"RateLimit.estimate returned {tokens!r}, which is no number of tokens")
    return min(math.ceil(tokens), 2**53)


def _slim(report: Report) -> Report:
    """Leave out what no limiter looks at: cookies, and whatever else servers send with each answer."""
    headers = {name: value for name, value in report.headers.items() if name.startswith("x-ratelimit-")}
    return msgspec.structs.replace(report, headers=headers)
