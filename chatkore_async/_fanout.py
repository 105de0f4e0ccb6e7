"""`map`: many requests at once, their results as an async iterator."""

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import Literal, Self, TypeAlias

from ._workers import Ask, MapResult, Requests, Work
from .errors import ConfigurationError

OnError: TypeAlias = Literal["return", "raise"]


class MapResults(AsyncIterator[MapResult]):
    """The results of `map`, as they come or in the order of the requests.

        async with client.chat.completions.map(requests) as results:
            async for result in results:
                print(result.key, result.completion.text if result.completion else result.error)

    It begins on `async with`, or at the first step of `async for`. Leaving the block, or `aclose()`, cancels what is
    in flight, closes a generator that was given, and waits for both; a wait that is cancelled in its turn loses
    nothing. Without a block, cancelling the loop does the same without waiting, and so does the collector once a loop
    that was left is forgotten. It is read by one task at a time, and only once.

    Raises:
        APIError, InvalidRequestError: with `on_error="raise"`, the first failure, after what is finished.
        Exception: what the iterable of requests raised, as it was raised, after all requests before it have ended.
    """

    def __init__(self, ask: Ask, requests: Requests, *, concurrency: int, ordered: bool, on_error: OnError) -> None:
        _check(requests, concurrency, on_error)
        self._work = Work(ask, requests, concurrency, ordered=ordered, fails_fast=on_error == "raise")
        self._in_block = False
        self._busy = False
        self._ended = False

    def __repr__(self) -> str:
        work = self._work
        state = "ended" if self._ended else "running" if work.begun else "not begun"
        return f"<MapResults {state}: {work.read} read, {work.open} in flight, {work.taken} taken>"

    async def __aenter__(self) -> Self:
        self._in_block = True
        if not self._ended and not self._work.begun:
            self._work.begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> MapResult:
        work = self._work
        if self._busy:
            raise RuntimeError("this MapResults is being read by another task")
        if self._ended:
            raise StopAsyncIteration
        self._busy = True
        try:
            if not work.begun:
                work.begin()
            while not work.finished:
                if work.is_over:
                    work.stop()
                    await work.gone()
                    self._ended = True  # not before: a timeout around this step must not swallow the failure
                    failure, work.failure = work.failure, None
                    try:
                        raise failure or StopAsyncIteration
                    finally:
                        failure = None  # or it, its traceback and this frame were a ring
                await work.event()
            return work.take()
        except asyncio.CancelledError:
            # In a block it may be a timeout around one step, and the end of the block is sure to come.
            if not self._in_block:
                self._ended = True
                work.stop()
            raise
        finally:
            self._busy = False

    def ready(self) -> list[MapResult]:
        """Return the results that are finished, without waiting; they are taken thereby. Often there is none."""
        return [] if self._ended else [self._work.take() for _ in range(len(self._work.finished))]

    async def aclose(self) -> None:
        """Cancel what is in flight, close a generator that was given, and wait for that. Doing so twice is fine."""
        self._ended = True
        self._work.stop()
        await self._work.gone()

    def __del__(self) -> None:
        work: Work | None = getattr(self, "_work", None)
        if work is not None and work.begun and not work.stopped:
            # The collector runs in whichever thread it likes, and in the midst of anything.
            with contextlib.suppress(RuntimeError):  # the loop is closed, and took its tasks with it
                work.loop.call_soon_threadsafe(work.stop)


def _check(requests: object, concurrency: object, on_error: object) -> None:
    given: type[object] = type(requests)
    if issubclass(given, str | bytes | Mapping) or not issubclass(given, Iterable | AsyncIterable):
        raise TypeError(f"map takes an iterable of requests, not {given.__name__}")
    check_concurrency(concurrency)
    if on_error not in ("return", "raise"):
        raise ConfigurationError(f'on_error must be "return" or "raise", not {on_error!r}')


def check_concurrency(concurrency: object) -> None:
    """Raise `ConfigurationError` for what is no number of requests at a time."""
    # A bool is an int to Python, and a mistake here.
    if not isinstance(concurrency, int) or isinstance(concurrency, bool) or concurrency < 1:
        raise ConfigurationError(f"concurrency must be a whole number from 1, not {concurrency!r}")
