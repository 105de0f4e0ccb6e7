"""Where a whole cluster asks for leave: one `RateLimiter`, behind a counter that processes send messages to.

It runs in one process, on one event loop, and knows nothing of how messages come. A process has one message here that
is answered when there is something to grant; the next one takes its place. So what a process says and hears gathers
while nobody listens, and `pause` bounds how often that is, for all of them together.

A process that is not heard of for the time of the lease is taken for dead. What it held is free again.
"""

import asyncio
from typing import Final

import msgspec

from chatkore_async import Demand, RateLimit, RateLimiter, Report
from chatkore_async.integrations._cluster_messages import Answer, Ask, Back, Message, decode_message, encode

LEASE: Final = 30.0
"""Seconds. A process in which nothing runs for so long is rare, and a place that is held for so long is cheap."""

LISTEN: Final = 10.0
"""Seconds after which a message is answered though there is nothing to say, so that the process is heard of again."""

CALLS_PER_SECOND: Final = 500.0
"""Messages of all processes together. An actor of Ray takes about three times as many: see `benchmarks.cluster`."""

SHORTEST_PAUSE: Final = 0.005

LOST: Final = Report(status=None, headers={}, usage=None, retry_after=None)

_Group = tuple[str, str, str]


class _Owner:
    """A process, as far as it was heard of."""

    def __init__(self) -> None:
        self.heard = 0.0
        self.newest = -1
        self.waiting: dict[int, tuple[_Group, asyncio.Task[None]]] = {}
        self.held: dict[int, tuple[_Group, object]] = {}
        self.untold: dict[int, None] = {}  # those of them that it was not told of
        self.listener: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.listener is not None and not self.listener.done():
            self.listener.set_result(None)

    async def listen(self) -> None:
        """Wait until there is something to say, a newer message came, or too long passed."""
        listener = self.listener = asyncio.get_running_loop().create_future()
        await asyncio.wait([listener], timeout=LISTEN)


class Desk:
    """One limit for all who send messages.

    Args:
        limit: what to keep to. Its `estimate` is not used: estimates come with what is asked for.
        calls_per_second: messages of all processes together.
    """

    def __init__(self, limit: RateLimit, *, calls_per_second: float = CALLS_PER_SECOND) -> None:
        self._limiter = RateLimiter(msgspec.structs.replace(limit, estimate=_told))
        self._calls_per_second = calls_per_second
        self._owners: dict[str, _Owner] = {}
        self._lines: dict[_Group, dict[tuple[_Owner, int], None]] = {}
        self._look_at = 0.0

    def __repr__(self) -> str:
        return f"<Desk of {len(self._owners)} processes, {self._limiter!r}>"

    @property
    def in_flight(self) -> int:
        """How many permits are out."""
        return self._limiter.in_flight

    @property
    def waiting(self) -> int:
        """How many wait."""
        return self._limiter.waiting

    async def exchange(self, message: bytes) -> bytes:
        """Take what a process says, and answer when there is something to say."""
        return encode(await self._answer(decode_message(message)))

    async def _answer(self, message: Message) -> Answer:
        now = asyncio.get_running_loop().time()
        if now >= self._look_at:
            self._look_at = now + LEASE / 10
            self._free(now)
        owner = self._owners.get(message.owner)
        if owner is None:
            if not message.begins:
                return Answer(is_unknown=True)
            owner = self._owners[message.owner] = _Owner()
        owner.heard = now
        for back in message.back:
            self._take_back(owner, back)
        for ask in message.asks:
            self._line_up(owner, ask)
        if message.number > owner.newest:
            owner.newest = message.number
            owner.wake()
            if not owner.untold and (owner.waiting or owner.held):
                await owner.listen()
        pause = max(len(self._owners) / self._calls_per_second, SHORTEST_PAUSE)
        if message.number != owner.newest:
            return Answer(pause=pause)
        granted = list(owner.untold)
        owner.untold.clear()
        return Answer(granted, pause)

    def _line_up(self, owner: _Owner, ask: Ask) -> None:
        if ask.number in owner.waiting:
            return
        if ask.number in owner.held:
            owner.untold[ask.number] = None  # the answer that said so was lost
            return
        group = (ask.endpoint, ask.key, ask.model)
        task = asyncio.get_running_loop().create_task(self._let_in(owner, ask))
        owner.waiting[ask.number] = (group, task)
        self._lines.setdefault(group, {})[owner, ask.number] = None

    async def _let_in(self, owner: _Owner, ask: Ask) -> None:
        demand = Demand(endpoint=ask.endpoint, key=ask.key, model=ask.model, size=ask.tokens, attempt=ask.attempt)
        self._grant(owner, ask.number, await self._limiter.acquire(demand))

    def _grant(self, owner: _Owner, number: int, permit: object) -> None:
        group, _ = self._leave(owner, number)
        owner.held[number] = (group, permit)
        owner.untold[number] = None
        owner.wake()

    def _leave(self, owner: _Owner, number: int) -> tuple[_Group, asyncio.Task[None]]:
        group, task = owner.waiting.pop(number)
        line = self._lines[group]
        del line[owner, number]
        if not line:
            del self._lines[group]
        return group, task

    def _take_back(self, owner: _Owner, back: Back) -> None:
        if back.number in owner.waiting:
            self._leave(owner, back.number)[1].cancel()
        elif back.number in owner.held:
            group, permit = owner.held.pop(back.number)
            was_told = back.number not in owner.untold
            owner.untold.pop(back.number, None)
            if was_told and back.report is not None:
                self._limiter.release(permit, back.report)
            else:
                self._pass_on(group, permit)

    def _pass_on(self, group: _Group, permit: object) -> None:
        """Give a permit that nobody used to who waits longest, whose own place in the queue becomes free."""
        line = self._lines.get(group)
        if line:
            owner, number = next(iter(line))
            owner.waiting[number][1].cancel()
            self._grant(owner, number, permit)
        else:
            self._limiter.release(permit, LOST)

    def _free(self, now: float) -> None:
        """Forget the processes that were not heard of."""
        for name, owner in list(self._owners.items()):
            if owner.heard + LEASE < now:
                del self._owners[name]
                for number in list(owner.waiting):
                    self._leave(owner, number)[1].cancel()
                for _, permit in owner.held.values():
                    self._limiter.release(permit, LOST)


def _told(demand: Demand) -> float:
    return demand.size  # where an estimate travels
