"""One event loop's pool: its aiohttp session, the places in it, and what became of each request.

What comes out of here is ours: an `Exchange` that is read and let go, and errors of our tree.
"""

import asyncio
import contextlib
import ssl as _ssl
import urllib.request
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload
from urllib.parse import urlsplit

import aiohttp

from ._config import Limits, merge_headers
from ._connector import NO_TIMEOUT, Connector, Keeper, close, open_socket
from ._cork import WORTHWHILE, Cork
from ._deadlines import Deadlines
from ._foreign import (
    FOREIGN,
    UNSENDABLE,
    ClientClosedError,
    ConnectTimeoutError,
    connect_timeout,
    harmless,
    mapped,
    was_sent,
)
from ._meta import PoolStats
from ._notes import Notes
from ._sending import ACCEPT_ENCODING, REQUEST_CLASS, NoCookies
from ._slots import Slots
from ._words import MAX_BODY
from .errors import ChatKoreError, ConfigurationError, InvalidRequestError, InvalidResponseError

Session = aiohttp.ClientSession

HEADER_LIMIT = 64 * 1024
"""Bytes of one header. aiohttp's 8 KiB are less than some gateways send; more than this is a flood."""

DRAIN_BYTES = 64 * 1024
DRAIN_SECONDS = 0.25
"""What is read off after the end of a stream, to give its connection back (contract §3)."""

_FOREVER = 1e9  # aiohttp 3.13 has no other way to say it
_UNANSWERED = (*FOREIGN, TypeError, ConnectTimeoutError)


class Exchange:
    """A request that was answered, and whose body is to be read and let go.

    `content` is the body's reader; a stream awaits its `readany()` directly, without a coroutine in between.
    """

    __slots__ = ("_host_place", "_pool", "_response", "content")

    def __init__(self, response: aiohttp.ClientResponse, pool: "Pool", host_place: Slots | None) -> None:
        self._response = response
        self._pool: Pool | None = pool  # until it is let go
        self._host_place = host_place
        self.content = response.content
        pool.responses.add(response)

    def __repr__(self) -> str:
        return f"<Exchange {self._response.status} {'open' if self._pool else 'let go'}>"

    async def read(
        self, limit: int | None, *, cut: bool = False, is_whole: Callable[[bytes], bool] | None = None
    ) -> bytes:
        """Return the whole body, and let go.

        Args:
            limit: bytes after which no more is read.
            cut: whether a longer body is cut there; otherwise it is an `InvalidResponseError`.
            is_whole: tells of a body that broke off whether it is an answer nevertheless, which was paid for.

        Raises:
            APIError: the body broke off, or is too large.
        """
        content = self.content
        pieces: list[bytes] = []
        size = 0
        try:
            while piece := await content.readany():
                pieces.append(piece)
                size += len(piece)
                if limit is not None and size > limit:
                    self.abort()
                    if cut:
                        break
                    raise InvalidResponseError(
                        f"the answer is larger than max_body_size ({limit} bytes)", hint="raise Limits.max_body_size"
                    )
                if content.at_eof():
                    break
        except FOREIGN as cause:
            pieces.append(self.rescue())
            self.abort()
            body = b"".join(pieces)
            # An error's body that broke off still says something.
            if cut or (is_whole is not None and is_whole(body)):
                return body
            body = b""  # it may echo the key, and tracebacks show locals
            pieces.clear()
            raise mapped(cause, sent=True) from cause
        self.let_go()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def rescue(self) -> bytes:
        """Return what had arrived before the connection broke; aiohttp holds it back behind the exception."""
        self.content.set_exception(None)  # type: ignore[arg-type]
        return self.content.read_nowait()

    async def drain(self, url: str) -> None:
        """Read off what follows the end of a stream, within bounds, so that the connection can be used again.

        A host that does not end its bodies is remembered, and not waited for again.
        """
        pool, content = self._pool, self.content
        if pool is None or content.at_eof():
            self.let_go()
            return
        host = urlsplit(url).netloc
        if host in pool.never_ending:
            self.abort()
            return
        size = 0

        def stop() -> None:
            pool.never_ending.add(host)
            self.abort()

        deadline = pool.deadlines.set(pool.loop.time() + DRAIN_SECONDS, stop)
        try:
            while not content.at_eof():
                size += len(await content.readany())
                if size > DRAIN_BYTES:
                    stop()
                    return
            self.let_go()
        except FOREIGN:
            pass  # it broke, or took too long: there is nothing to give back
        finally:
            pool.deadlines.cancel(deadline)
            self.abort()

    def let_go(self) -> None:
        """Give back the place; the connection went back to the pool when the body's end was read."""
        pool = self._pool
        if pool is not None:
            self._pool = None
            pool.responses.discard(self._response)
            pool.slots.release()
            if self._host_place is not None:
                self._host_place.release()

    def abort(self) -> None:
        """Close the connection at once and give back the place. A pending read raises. Doing so twice is fine."""
        if self._pool is not None:
            close(self._response, aiohttp.ClientConnectionError("let go before its end"))
            self.let_go()


class Pool:
    """What one event loop uses: a session, places, deadlines.

    Attributes:
        session: aiohttp's, ours or the caller's.
        headers: what `session` adds to each request, where it is ours.
        proxied: the session of what goes through a proxy, where `session` is ours.
        environment: the proxies that the environment names.
        connector: opens the connections of both sessions; `None` where `session` is the caller's.
        reused: how many requests found a connection that was open.
        limits_hosts: whether there are places for each host, too.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        limits: Limits,
        headers: Mapping[str, str],
        ssl: _ssl.SSLContext | None,
        session: aiohttp.ClientSession | None,
    ) -> None:
        self.loop = loop
        self.is_open = True
        self.deadlines = Deadlines(loop)
        self.slots = Slots(limits.max_connections)
        self.responses: set[aiohttp.ClientResponse] = set()  # in flight
        self.reused = 0
        self.never_ending: set[str] = set()  # hosts that keep a stream open after its end
        self.longest_body = limits.max_body_size
        self.short_body = MAX_BODY if limits.max_body_size is None else min(MAX_BODY, limits.max_body_size)
        self._per_host = limits.max_connections_per_host
        self.limits_hosts = self._per_host is not None
        self._host_slots: dict[tuple[str, str], Slots] = {}
        self._keeper: Keeper | None = None
        self.connector: Connector | None = None
        self._opened: dict[asyncio.Task[Any], float] = {}  # the connector's
        if session is not None:
            self.session = _checked(session, loop)
            self.headers: Mapping[str, str] | None = None
            return
        self.headers = headers
        self.environment = urllib.request.getproxies()
        self.connector = Connector(
            self.deadlines,
            Cork(loop, self.slots) if WORTHWHILE else None,
            limit=0,
            keepalive_timeout=_FOREVER if limits.keepalive_expiry is None else limits.keepalive_expiry,
            ssl=True if ssl is None else ssl,
            socket_factory=open_socket,
        )
        self._opened = self.connector.opened
        self.session = self._make_session(headers)
        # aiohttp sends a session's own headers to the proxy as well, our key as its `Proxy-Authorization`. So what goes
        # through a proxy has a session that knows nothing.
        self.proxied = self._make_session(
            {name: value for name, value in headers.items() if name.lower() == "user-agent"}
        )
        self._keeper = Keeper(
            (self.session, self.proxied),
            self.connector,
            pool=weakref.ref(self),
            deadlines=self.deadlines,
            responses=self.responses,
            loop=loop,
        )
        weakref.finalize(self, self._keeper.bury)

    def _make_session(self, headers: Mapping[str, str]) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=self.connector,
            headers=merge_headers({"Accept-Encoding": ACCEPT_ENCODING}, headers),
            cookie_jar=NoCookies(),
            request_class=REQUEST_CLASS,
            timeout=NO_TIMEOUT,
            max_line_size=HEADER_LIMIT,
            max_field_size=HEADER_LIMIT,
        )

    @property
    def closed(self) -> bool:
        """Whether the session is closed."""
        return self.session.closed

    def host_slots(self, url: str) -> Slots | None:
        """The places of a URL's host, where they are limited."""
        if self._per_host is None:
            return None
        host = urlsplit(url)[:2]
        slots = self._host_slots.get(host)
        if slots is None:
            slots = self._host_slots[host] = Slots(self._per_host)
        return slots

    @overload
    def answered(self, response: aiohttp.ClientResponse, host_place: Slots | None, notes: Notes) -> Exchange: ...
    @overload
    def answered(
        self, response: aiohttp.ClientResponse, host_place: Slots | None, notes: Notes, *, whole: Literal[True]
    ) -> Exchange | bytes: ...
    def answered(
        self, response: aiohttp.ClientResponse, host_place: Slots | None, notes: Notes, *, whole: bool = False
    ) -> Exchange | bytes:
        """Return the answer to a request, its body unread, which takes over the places that the caller holds.

        Its status and headers are noted down, and how long it took to connect.

        Args:
            response: the answer.
            host_place: the place of the host, where hosts are limited.
            notes: the call's.
            whole: whether to return the whole body, and let go, where it came with the headers and is short.
        """
        notes.status = response.status
        notes.headers = response.headers
        if self._opened and (took := self._took()) is not None:
            notes.connect = took
        else:
            self.reused += 1
        if whole:
            content = response.content
            if content.is_eof() and 0 < content.total_bytes <= self.short_body and content.exception() is None:
                self.slots.release()
                if host_place is not None:
                    host_place.release()
                return content.read_nowait()
        return Exchange(response, self, host_place)

    def raise_ours(self, caught: BaseException, url: str, connect: float | None) -> None:
        """Raise the error of our tree for what a request raised, unless that is no error of aiohttp's.

        Raises:
            APIError: the request could not be sent, or was not answered.
            ConfigurationError: the proxy cannot be used, or the client or its session was closed.
            InvalidRequestError: a header cannot be sent.
        """
        self._took()
        if isinstance(caught, ChatKoreError) or not isinstance(caught, _UNANSWERED):
            return
        error, cause = self._error(caught, url, connect), harmless(caught)
        try:
            raise error from cause
        finally:
            error.__context__ = cause  # nor is what shows the request's headers kept there
            del caught, error, cause

    def _error(self, cause: Exception, url: str, connect: float | None) -> Exception:
        """Return the error for a request that was not answered."""
        if isinstance(cause, ConnectTimeoutError):
            return connect_timeout(url, connect)
        if self.connector is not None and self.session.closed:
            return mapped(ClientClosedError(), sent=False)
        if isinstance(cause, UNSENDABLE) and not isinstance(cause, aiohttp.ClientError):
            return InvalidRequestError(f"the request cannot be sent: {cause}")
        return mapped(cause, sent=was_sent(cause))

    def _took(self) -> float | None:
        """Seconds it took to open a connection for this task's request; `None` when one was reused."""
        task = asyncio.current_task()
        return None if task is None else self._opened.pop(task, None)

    def is_connecting(self, task: "asyncio.Task[Any] | None") -> bool:
        """Whether a task's request waits for its connection to open."""
        return self.connector is not None and task in self.connector.opening

    def stats(self) -> PoolStats:
        """The pool at this moment."""
        in_use = self.slots.in_use
        waiting = self.slots.waiting + sum(slots.waiting for slots in list(self._host_slots.values()))
        if self.connector is None:
            return PoolStats(open=in_use, in_use=in_use, waiting=waiting)
        opened = self.connector.count_open()
        return PoolStats(
            open=opened,
            in_use=in_use,
            idle=max(0, opened - max(0, in_use - len(self.connector.opening))),
            waiting=waiting,
            created=self.connector.created,
            reused=self.reused,
        )

    async def close(self) -> None:
        """Close what is ours. All connections are told to close before this awaits anything.

        Calls that are under way fail at once. On a session of the caller's they may finish.
        """
        self.is_open = False
        if self._keeper is not None and self.connector is not None:
            self.connector.give_up_opening()
            await self._keeper.close()

    def close_from_outside(self) -> None:
        """Close a pool whose loop is not the running one: another thread's, or one that stands still."""
        self.is_open = False
        if self._keeper is None or self.closed:
            return
        if self.loop.is_running():
            with contextlib.suppress(RuntimeError):  # it was closed in this very moment
                self.loop.call_soon_threadsafe(self._close_soon)
        else:
            self._keeper.bury()

    def _close_soon(self) -> None:
        self._closing = self.loop.create_task(self.close())  # a task that nobody holds may be collected

    def disown(self) -> None:
        """In a forked child: touch nothing, since sockets and selector are the parent's, and warn of nothing."""
        self.is_open = False
        if self.connector is not None:
            self.session.detach()
            self.proxied.detach()
            # Private, and there is no public way: a connector with idle connections closes them when it is collected.
            getattr(self.connector, "_conns", {}).clear()


def _checked(session: aiohttp.ClientSession, loop: asyncio.AbstractEventLoop) -> aiohttp.ClientSession:
    owner = getattr(session, "_loop", None)  # `session.loop` is deprecated
    if isinstance(owner, asyncio.AbstractEventLoop) and owner is not loop:
        raise ConfigurationError("the session passed as session= belongs to another event loop than the running one")
    return session
