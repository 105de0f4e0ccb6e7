"""The machinery of `map`: requests are read, workers ask, results wait for whoever takes them.

What is read and not yet taken is never more than `concurrency`: this one rule is the back-pressure, the bound on
memory and the bound on what is in flight. An ordinary iterable is read after a result was taken, an async one by a
task of its own. Workers live as long as the whole, since a task for each request costs more than waking one.
"""

import asyncio
import collections
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from typing import Any, TypeAlias, TypeGuard, cast

import msgspec

from ._hooks import logger
from ._requests import ChatCompletionRequest
from ._responses import ChatCompletion
from .errors import InvalidRequestError

Ask: TypeAlias = Callable[..., Awaitable[ChatCompletion]]
"""What answers one request: given a `ChatCompletionRequest`, or parameters and options by name."""

Request: TypeAlias = ChatCompletionRequest | Mapping[str, object]
"""A ready request, or the parameters of one, options of the call among them."""

Requests: TypeAlias = Iterable[Request | tuple[object, Request]] | AsyncIterable[Request | tuple[object, Request]]
"""What `map` reads: requests, or pairs of a key and a request."""

_SLICE = 0.001
"""Seconds that reading an ordinary iterable may take from the event loop, and the request that exceeds them."""

_SHOWN = 60
"""Characters of an answer that a `repr` shows."""


class MapResult(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What became of one request of `map`.

    Attributes:
        index: the request's place in the input, from 0.
        key: what the input gave with it, or `None`.
        request: as it was given.
        completion: the answer, or `None`.
        error: why there is none, or `None`; an `APIError` when the call failed, an `InvalidRequestError` when the
            request could not be sent.
    """

    index: int
    key: Any = None
    request: ChatCompletionRequest | Mapping[str, Any]
    completion: ChatCompletion | None = None
    error: Exception | None = None

    @property
    def ok(self) -> bool:
        """Whether there is an answer."""
        return self.error is None

    def __repr__(self) -> str:
        if self.completion is not None:
            text = self.completion.text
            what = f"ok {text if len(text) <= _SHOWN else text[: _SHOWN - 1] + '…'!r}"
        else:
            what = f"{type(self.error).__name__}: {self.error}"
        return f"<MapResult {self.index}{'' if self.key is None else f' {self.key!r}'} {what}>"


class Work:
    """What goes on behind a `MapResults`. Tasks hold this and not the handle, so that a forgotten handle is collected.

    Attributes:
        begun: whether reading was begun.
        stopped: whether all tasks were cancelled; nothing more happens.
        read: requests taken from the input.
        open: those of them that are being asked.
        taken: results that the consumer has.
        finished: results that it may take, in their order.
        failure: what is raised after these.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self, ask: Ask, requests: Requests, concurrency: int, *, ordered: bool, fails_fast: bool) -> None:
        self._ask = ask
        self._concurrency = concurrency
        self._ordered = ordered
        self._fails_fast = fails_fast
        self.begun = self.stopped = self._exhausted = False
        self.read = self.open = self.taken = 0
        self.finished: collections.deque[MapResult] = collections.deque()
        self.failure: BaseException | None = None
        self._early: dict[int, MapResult] = {}  # finished before their turn, where order matters
        self._turn = 0  # whose turn it is
        self._tasks: set[asyncio.Task[None]] = set()  # those that have not ended
        self._idle: list[asyncio.Future[tuple[int, object]]] = []  # workers
        self._consumer: asyncio.Future[None] | None = None
        self._reader: asyncio.Future[None] | None = None
        self._pulls = False
        self._pulled: Iterator[object] | None = None
        self._awaited: AsyncIterator[object] | None = None
        if isinstance(requests, AsyncIterable):
            self._awaited = aiter(requests)
        else:
            self._pulled = iter(requests)

    # For the consumer.

    def begin(self) -> None:
        """Start to read."""
        self.begun = True
        self.loop = asyncio.get_running_loop()
        if self._awaited is None:
            self._pull_soon()
        else:
            self._spawn(self._await_all(self._awaited), self._input_ended, "chatkore map: reader")

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be finished."""
        return self.stopped or (self._exhausted and not self.open)

    async def event(self) -> None:
        """Wait until a result may be taken, or all is over."""
        self._consumer = self.loop.create_future()
        try:
            await self._consumer
        finally:
            self._consumer = None

    def take(self) -> MapResult:
        """Hand out a result, and let one more request be read."""
        self.taken += 1
        if self._awaited is None:
            self._pull_soon()
        elif self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        return self.finished.popleft()

    def stop(self) -> None:
        """Cancel every task and close the input. Awaits nothing, since frameworks cancel again at every await."""
        if self.stopped:
            return
        self.stopped = True
        self.finished.extend(self._early.pop(index) for index in sorted(self._early))
        for task in self._tasks:
            task.cancel()
        self._idle.clear()
        self._tell_consumer()
        source, self._pulled = self._pulled, None
        if _is_generator(source):
            try:
                source.close()
            except Exception as error:  # noqa: BLE001 - the generator's own; what it was read for is over
                _warn(error)

    async def gone(self) -> None:
        """Wait until every task has ended. They do so by themselves: a cancellation here leaves nothing behind."""
        me = asyncio.current_task()  # a worker itself, when a callable of the caller's leaves
        if tasks := self._tasks - {me}:
            await asyncio.wait(tasks)

    def _tell_consumer(self) -> None:
        if self._consumer is not None and not self._consumer.done():
            self._consumer.set_result(None)

    # The input.

    @property
    def _has_room(self) -> bool:
        return self.read - self.taken < self._concurrency

    def _pull_soon(self) -> None:
        if not (self._pulls or self._exhausted):
            self._pulls = True
            self.loop.call_soon(self._pull)

    def _pull(self) -> None:
        """Read requests of an ordinary iterable, as long as there is room for them.

        One that computes for a while makes the loop wait for a request at a time, not for all there is room for.
        """
        self._pulls = False
        until = self.loop.time() + _SLICE
        while self._pulled is not None and self._has_room:
            try:
                item = next(self._pulled)
            except StopIteration:
                self._end_of_input(None)
                return
            except Exception as error:  # noqa: BLE001 - the caller's own
                self._end_of_input(error)
                return
            except BaseException as error:
                self._fail(error)
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    raise
                return
            self._start(item)
            if self.loop.time() >= until:
                self._pull_soon()
                return

    async def _await_all(self, source: AsyncIterator[object]) -> None:
        """Read an async iterable, in a task of its own, so that nothing waits for it that need not.

        It is closed in the same task, since contexts such as `asyncio.timeout` are left where they were entered.
        """
        try:
            async for item in source:
                self._start(item)
                while not self._has_room:
                    self._reader = self.loop.create_future()
                    await self._reader
        finally:
            if isinstance(source, AsyncGenerator):
                await source.aclose()

    def _input_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = _error_of(task)
        if self.stopped:
            if isinstance(error, Exception):
                _warn(error)
        elif error is None or isinstance(error, Exception):
            self._end_of_input(error)
        else:
            self._fail(error)

    def _end_of_input(self, error: Exception | None) -> None:
        # What was read before an error is asked already, and billed: it is answered first.
        self._exhausted = True
        self.failure = error
        self._tell_consumer()

    # The workers.

    def _start(self, item: object) -> None:
        if self.stopped:
            raise asyncio.CancelledError  # again: an async iterable made nothing of the first one
        job = (self.read, item)
        self.read += 1
        self.open += 1
        while self._idle:
            waiter = self._idle.pop()
            if not waiter.done():  # as it is when somebody cancelled the worker
                waiter.set_result(job)
                return
        self._spawn(self._work(*job), self._worker_ended, f"chatkore map: worker {len(self._tasks)}")

    async def _work(self, index: int, item: object) -> None:
        while True:
            self._finish(await self._answer(index, item))
            if self.stopped:  # by this failure: an eager task is not among those that were cancelled
                return
            waiter: asyncio.Future[tuple[int, object]] = self.loop.create_future()
            self._idle.append(waiter)
            item = None  # nothing of the last request is held for the next
            index, item = await waiter

    async def _answer(self, index: int, item: object) -> MapResult:
        key, request = item if _is_pair(item) else (None, cast("Request", item))
        try:
            if isinstance(request, ChatCompletionRequest):
                completion = await self._ask(request)
            else:
                completion = await self._ask(**_parameters(request))
        except Exception as error:  # noqa: BLE001 - failures have their place among the results
            # Returned at once: a name for the result would make a ring of it, its error, the traceback and this frame.
            return MapResult(index=index, key=key, request=request, error=error)
        return MapResult(index=index, key=key, request=request, completion=completion)

    def _finish(self, result: MapResult) -> None:
        self.open -= 1
        if self._fails_fast and result.error is not None:
            key = "" if result.key is None else f" ({result.key!r})"
            result.error.add_note(f"map: this was request {result.index}{key}")
            self._fail(result.error)
            return
        if self._ordered and not self.stopped:
            self._early[result.index] = result
            while (due := self._early.pop(self._turn, None)) is not None:
                self._turn += 1
                self.finished.append(due)
        else:
            self.finished.append(result)
        self._tell_consumer()

    def _worker_ended(self, task: asyncio.Task[None]) -> None:
        """No worker ends by itself: it was cancelled, or met what is no `Exception`."""
        self._tasks.discard(task)
        error = _error_of(task)
        if not self.stopped:
            self._fail(error)

    # Tasks.

    def _spawn(self, work: Coroutine[Any, Any, None], ended: Callable[[asyncio.Task[None]], None], name: str) -> None:
        task = self.loop.create_task(work, name=name)
        task.add_done_callback(ended)
        self._tasks.add(task)

    def _fail(self, error: BaseException | None) -> None:
        self.failure = self.failure or error
        self.stop()


def _warn(error: Exception) -> None:
    logger.warning("the iterable of requests raised when it was left", exc_info=error)


def _error_of(task: asyncio.Task[None]) -> BaseException | None:
    """Return what a task raised, so that nobody complains of it a second time."""
    return asyncio.CancelledError(f"{task.get_name()} was cancelled") if task.cancelled() else task.exception()


def _is_generator(source: object) -> TypeGuard[Generator[object, None, None]]:
    return isinstance(source, Generator)


def _is_pair(item: object) -> TypeGuard[tuple[object, Request]]:
    return isinstance(item, tuple) and len(cast("tuple[object, ...]", item)) == 2


def _parameters(request: object) -> dict[str, Any]:
    if not isinstance(request, Mapping):
        kind = type(request).__name__
        raise InvalidRequestError(f"$: a request is a ChatCompletionRequest or a mapping of parameters, not {kind}")
    parameters = dict(cast("Mapping[str, Any]", request))
    if parameters.pop("stream", False):
        raise InvalidRequestError("$.stream: map returns completions whole", path="$.stream")
    return parameters
