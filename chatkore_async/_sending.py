"""How a request is made and put on the wire, for less than aiohttp's own way costs.

Its headers are those of its session, copied in one go rather than one by one.

On Python 3.11 requests of one turn of the event loop are written together, by nobody's task. aiohttp writes each in a
task of its own there, since a large one has to wait for the network. A task that only writes some hundred bytes costs a
tenth of a call: it is made, has its turn, and has two turns more for telling that it is over. Here the writing is put
on a list in its place, and all of the list have their turn in one. From Python 3.12 on aiohttp's task begins in the
step that makes it, and is over by then; see `_cork`.
"""

import asyncio
import functools
import sys
from collections import deque
from collections.abc import Coroutine
from concurrent.futures import Future
from http.cookies import SimpleCookie
from typing import Any, Final, cast

import aiohttp
from aiohttp import hdrs

ACCEPT_ENCODING: Final = aiohttp.ClientRequest.DEFAULT_HEADERS[hdrs.ACCEPT_ENCODING]
"""What aiohttp can decompress here; to be a header of the session, since `Request` adds none."""

_WRITING: Final = aiohttp.ClientRequest.write_bytes.__code__
_send: Final = aiohttp.ClientRequest.send


class NoCookies(aiohttp.DummyCookieJar):
    """A jar without cookies, and one empty set of them for all requests: each that waits would hold one of its own."""

    _EMPTY: Final = SimpleCookie()  # nobody fills it: that takes cookies given with a request, and there are none

    def filter_cookies(self, request_url: Any) -> SimpleCookie:  # noqa: ARG002 - aiohttp's
        """Return the empty set."""
        return self._EMPTY


class Request(aiohttp.ClientRequest):
    """A request that takes its headers from its session, and adds none but `Host` and what its body needs."""

    def update_headers(self, headers: Any) -> None:
        """Take over the headers, behind the `Host`."""
        if headers is None or hdrs.HOST in headers:
            super().update_headers(headers)
            return
        found = self.headers = headers.__class__()
        found[hdrs.HOST] = self.url.host_port_subcomponent
        found.extend(headers)

    def update_auto_headers(self, skip_auto_headers: Any) -> None:
        """Add nothing: the session has all of them."""

    def update_content_encoding(self, data: Any) -> None:
        """Look for nothing: bodies are not compressed."""

    def update_auth(self, auth: Any, trust_env: bool = False) -> None:  # noqa: FBT001, FBT002 - aiohttp's
        """Look for nothing: the key is a header."""


class TogetherRequest(Request):
    """A request of a session whose connector has `Writings`, by which it is written."""

    async def send(self, conn: Any) -> aiohttp.ClientResponse:
        """Send the request, and return the response that is to come."""
        if not isinstance(self.body, aiohttp.BytesPayload):
            return await _send(self, conn)  # it is read piece by piece, or there is nothing to write
        loop, connector = self.loop, cast("Any", self.session.connector)
        factory = loop.get_task_factory()
        loop.set_task_factory(connector.writings.begin)  # nobody else has a turn before it is reset
        try:
            return await _send(self, conn)
        finally:
            loop.set_task_factory(factory)


REQUEST_CLASS: Final = Request if sys.version_info >= (3, 12) else TogetherRequest


class _Written(Future[None]):
    """What aiohttp takes for the task of a writing: one that is over, so that nobody waits for it or cancels it.

    An answer cannot come before the writing had its turn: turns that are due come before what arrives from the network.
    """

    def done(self) -> bool:
        return True


_WRITTEN: Final = _Written()
_WRITTEN.set_result(None)


class Writings:
    """The writings that are due in the loop's next turn."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: deque[Coroutine[Any, Any, None]] = deque()

    def __repr__(self) -> str:
        return f"<Writings {len(self._due)} due>"

    def begin(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        """Do as a task factory does: a writing has its turn with the others, everything else is made a task."""
        if getattr(coroutine, "cr_code", None) is not _WRITING:
            return asyncio.Task(coroutine, loop=loop, **options)
        self._add(coroutine)
        return _WRITTEN

    def _add(self, coroutine: Coroutine[Any, Any, None], _: object = None) -> None:
        if not self._due:
            self._loop.call_soon(self._write)
        self._due.append(coroutine)

    def _write(self) -> None:
        due = self._due
        try:
            while due:
                coroutine = due.popleft()
                try:
                    waits_for: Any = coroutine.send(None)
                except StopIteration:
                    continue
                # The transport has all of its bytes and more than enough of them, or the server is to say "continue".
                if waits_for is None:
                    self._loop.call_soon(self._add, coroutine)
                else:
                    waits_for.add_done_callback(functools.partial(self._add, coroutine))
        finally:
            if due:  # somebody pressed Ctrl-C: those who go on have their requests written
                self._loop.call_soon(self._write)
