"""Requests that are written in the step that makes them, on Pythons whose tasks cannot start eagerly.

aiohttp writes a request in a task of its own, since a large one has to wait for the network. From Python 3.12 on that
task begins at once, and is over when a request need not wait. Before, each call pays for a task that waits for its
turn: a fourteenth of what it takes in all.
"""

import asyncio
import sys
from collections.abc import Coroutine, Generator
from concurrent.futures import Future
from typing import Any, Final

import aiohttp

__all__ = ["REQUEST_CLASS", "EagerRequest", "begin"]

_WRITING: Final = aiohttp.ClientRequest.write_bytes.__code__

_WRITTEN: Final = Future[None]()  # of no event loop, so that one will do
_WRITTEN.set_result(None)


class EagerRequest(aiohttp.ClientRequest):
    """A request whose writing begins at once."""

    async def send(self, conn: Any) -> aiohttp.ClientResponse:
        """Send the request, and return the response that is to come."""
        loop = self.loop
        factory = loop.get_task_factory()
        loop.set_task_factory(begin)  # nobody else has a turn before the writing is begun
        try:
            return await super().send(conn)
        finally:
            loop.set_task_factory(factory)


REQUEST_CLASS: Final = aiohttp.ClientRequest if sys.version_info >= (3, 12) else EagerRequest


def begin(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
    """Make a task for a coroutine; a writing is begun before, and if it is over then, there is nothing but its outcome.

    Args:
        loop: the running one.
        coroutine: has not begun.
        **options: of the task.
    """
    if getattr(coroutine, "cr_code", None) is _WRITING:
        try:
            waits_for = coroutine.send(None)
        except StopIteration:
            return _WRITTEN
        coroutine = _finished(coroutine, waits_for)
    return asyncio.Task(coroutine, loop=loop, **options)


class _Rest:
    """What is left of a coroutine that was begun by hand."""

    __slots__ = ("_coroutine", "_waits_for")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], waits_for: object) -> None:
        self._coroutine = coroutine
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, Any]:
        waits_for = self._waits_for
        try:
            while True:
                try:
                    value = yield waits_for
                except BaseException as error:  # noqa: BLE001 - the coroutine's to catch
                    waits_for = self._coroutine.throw(error)
                else:
                    waits_for = self._coroutine.send(value)
        except StopIteration as done:
            return done.value


async def _finished(coroutine: Coroutine[Any, Any, Any], waits_for: object) -> Any:
    return await _Rest(coroutine, waits_for)
