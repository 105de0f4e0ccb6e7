"""The session manager: pooled aiohttp sessions, one per event loop, and one request after another through them.

What comes out of here is ours: an `Exchange` that is read and let go, and errors of our tree.
"""

import asyncio
import base64
import contextlib
import io
import os
import ssl as _ssl
import threading
import urllib.request
import weakref
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import aiohttp

from ._config import Limits, Secret, merge_headers
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
from ._options import Outgoing
from ._proxies import checked_proxy, environment_proxy
from ._slots import Slots
from .errors import ChatKoreError, ConfigurationError, InvalidRequestError, InvalidResponseError

Session = aiohttp.ClientSession

__all__ = ["FOREIGN", "Exchange", "Pool", "Session", "SessionManager", "checked_proxy", "mapped"]

HEADER_LIMIT = 64 * 1024
"""Bytes of one header. aiohttp's 8 KiB are less than some gateways send; more than this is a flood."""

DRAIN_BYTES = 64 * 1024
DRAIN_SECONDS = 0.25
"""What is read off after the end of a stream, to give its connection back (contract §3)."""

_FOREVER = 1e9  # aiohttp 3.13 has no other way to say it
_UNANSWERED = (*FOREIGN, TypeError, ConnectTimeoutError)
_LARGE_BODY = 512 * 1024  # aiohttp warns of bytes above 1 MiB, and writes them in one go
_KEPT = 64


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

    def read_nowait(self, limit: int | None) -> bytes | None:
        """Return the whole body, and let go, where it came with the headers, as most do; else `None`: `read` it."""
        content = self.content
        if (
            not content.is_eof()
            or content.exception() is not None
            or (limit is not None and content.total_bytes > limit)
        ):
            return None
        body = content.read_nowait()
        self.let_go()
        return body

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

    async def drain(self, pool: "Pool", url: str) -> None:
        """Read off what follows the end of a stream, within bounds, so that the connection can be used again.

        A host that does not end its bodies is remembered, and not waited for again.
        """
        content = self.content
        if content.at_eof():
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
    """What one event loop uses: a session, places, deadlines."""

    def __init__(self, manager: "SessionManager", loop: asyncio.AbstractEventLoop) -> None:
        limits = manager.limits
        self.loop = loop
        self.deadlines = Deadlines(loop)
        self.slots = Slots(limits.max_connections)
        self.responses: set[aiohttp.ClientResponse] = set()  # in flight
        self.reused = 0
        self.never_ending: set[str] = set()  # hosts that keep a stream open after its end
        self._per_host = limits.max_connections_per_host
        self.limits_hosts = self._per_host is not None
        self._host_slots: dict[tuple[str, str], Slots] = {}
        self._timeouts: dict[float | None, aiohttp.ClientTimeout] = {}
        self._proxies: dict[str, str | None] = {}  # by URL
        self._keeper: Keeper | None = None
        self.connector: Connector | None = None
        if manager.session is not None:
            self.session = _checked(manager.session, loop)
            self.headers: Mapping[str, str] | None = None
            return
        self.headers = manager.headers
        self._environment = urllib.request.getproxies()
        self.connector = Connector(
            self.deadlines,
            Cork(loop, self.slots) if WORTHWHILE else None,
            limit=0,
            keepalive_timeout=_FOREVER if limits.keepalive_expiry is None else limits.keepalive_expiry,
            ssl=True if manager.ssl is None else manager.ssl,
            socket_factory=open_socket,
        )
        self.session = self._make_session(manager.headers)
        # aiohttp sends a session's own headers to the proxy as well, our key as its `Proxy-Authorization`. So what goes
        # through a proxy has a session that knows nothing.
        self._proxied = self._make_session(
            {name: value for name, value in manager.headers.items() if name.lower() == "user-agent"}
        )
        self._keeper = Keeper((self.session, self._proxied), self.connector, self.deadlines, self.responses, loop)
        weakref.finalize(self, self._keeper.bury)

    def _make_session(self, headers: Mapping[str, str]) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=self.connector,
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
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

    def request(
        self,
        outgoing: Outgoing,
        headers: Mapping[str, str] | None,
        *,
        connect: float | None,
        proxy: str | Literal[False] | None,
        ssl: _ssl.SSLContext | None,
    ) -> Awaitable[aiohttp.ClientResponse]:
        """Return a request to be awaited: what comes of it is for `answered`, what it raises for `raise_ours`.

        Not a coroutine of its own: thousands may wait here. The caller holds a place in `slots`.
        """
        url, body = outgoing.url, outgoing.body
        timeout = self._timeouts.get(connect)
        if timeout is None:
            timeout = self._timeout(connect)
        options: dict[str, Any] = {
            "data": io.BytesIO(body) if body is not None and len(body) > _LARGE_BODY else body,
            "allow_redirects": False,
            "timeout": timeout,
        }
        session = self.session
        if self.connector is None:
            # Whatever the caller's session does with other answers, ours have to be read.
            options["raise_for_status"] = False
            options["auto_decompress"] = True
        if proxy is None:
            proxy = self._proxies[url] if url in self._proxies else self._environment_proxy(url)
        if proxy:
            options["proxy"] = proxy
            if self.headers is not None:
                session = self._proxied
                headers = merge_headers(self.headers, headers)
            headers = _authorized(headers, url, proxy)
        if headers is not None:
            options["headers"] = headers
        if ssl is not None:
            options["ssl"] = ssl
        return session.request(outgoing.method, url, **options)

    def answered(self, response: aiohttp.ClientResponse, host_place: Slots | None, notes: Notes) -> Exchange:
        """Return the answer to a request, its body unread, which takes over the places that the caller holds.

        Its status and headers are noted down, and how long it took to connect.
        """
        notes.status = response.status
        notes.headers = response.headers
        if self.connector is None or not self.connector.opened or (took := self._opened()) is None:
            self.reused += 1
        else:
            notes.connect = took
        return Exchange(response, self, host_place)

    def raise_ours(self, caught: BaseException, url: str, connect: float | None) -> None:
        """Raise the error of our tree for what a request raised, unless that is no error of aiohttp's.

        Raises:
            APIError: the request could not be sent, or was not answered.
            ConfigurationError: the proxy cannot be used, or the client or its session was closed.
            InvalidRequestError: a header cannot be sent.
        """
        self._opened()
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

    def _opened(self) -> float | None:
        """Seconds it took to open a connection for this task's request; `None` when one was reused."""
        task = asyncio.current_task()
        return None if self.connector is None or task is None else self.connector.opened.pop(task, None)

    def is_connecting(self, task: "asyncio.Task[Any] | None") -> bool:
        """Whether a task's request waits for its connection to open."""
        return self.connector is not None and task in self.connector.opening

    def _timeout(self, connect: float | None) -> aiohttp.ClientTimeout:
        """Return aiohttp's form of a connect timeout, made once for each value in use."""
        if len(self._timeouts) >= _KEPT:
            self._timeouts.clear()  # somebody computes a new one for each call
        timeout = self._timeouts[connect] = aiohttp.ClientTimeout(total=None, sock_connect=connect)
        return timeout

    def _environment_proxy(self, url: str) -> str | None:
        if self.connector is None:
            return None  # the caller's session has its own ways, perhaps a SOCKS connector
        if len(self._proxies) >= _KEPT:
            self._proxies.clear()  # somebody has a new query for each call
        proxy = self._proxies[url] = environment_proxy(url, self._environment)
        return proxy

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
        if self._keeper is not None and self.connector is not None:
            self.connector.give_up_opening()
            await self._keeper.close()

    def close_from_outside(self) -> None:
        """Close a pool whose loop is not the running one: another thread's, or one that stands still."""
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
        if self.connector is not None:
            self.session.detach()
            self._proxied.detach()
            # Private, and there is no public way: a connector with idle connections closes them when it is collected.
            getattr(self.connector, "_conns", {}).clear()


def _checked(session: aiohttp.ClientSession, loop: asyncio.AbstractEventLoop) -> aiohttp.ClientSession:
    owner = getattr(session, "_loop", None)  # `session.loop` is deprecated
    if isinstance(owner, asyncio.AbstractEventLoop) and owner is not loop:
        raise ConfigurationError("the session passed as session= belongs to another event loop than the running one")
    return session


def _authorized(headers: Mapping[str, str] | None, url: str, proxy: str) -> Mapping[str, str] | None:
    """Add the proxy's user name and password to a request that a proxy reads itself, as it does without TLS.

    aiohttp does so too, but 3.13 forgets it when a connection is used again.
    """
    if not url.startswith("http://") or "@" not in proxy:
        return headers
    parts = urlsplit(proxy)
    login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}".encode("latin1", "replace")
    return {**(headers or {}), "Proxy-Authorization": Secret(f"Basic {base64.b64encode(login).decode()}")}


class SessionManager:
    """The pools of one client and its copies, by event loop.

    Args:
        limits: of each pool.
        headers: what every request of the client carries; set once on each session.
        ssl: company certificates, or `None` for the system's.
        session: the caller's own; used as it is and never closed.
    """

    def __init__(
        self,
        limits: Limits,
        headers: Mapping[str, str],
        ssl: _ssl.SSLContext | None,
        session: aiohttp.ClientSession | None,
    ) -> None:
        self.limits = limits
        self.headers = headers
        self.ssl = ssl
        self.session = session
        self.closed = False
        self._pools: dict[asyncio.AbstractEventLoop, Pool] = {}
        self._past = PoolStats()  # of pools that are gone
        self._lock = threading.Lock()
        _managers.add(self)

    def check_open(self) -> None:
        """Raise `ConfigurationError` when the client was closed."""
        if self.closed:
            raise ConfigurationError("this client was closed; make a new one, or close it later")

    def pool(self) -> Pool:
        """Return the running loop's pool.

        Raises:
            ConfigurationError: the client was closed, or its session belongs to another loop.
        """
        if self.closed:
            self.check_open()
        loop = asyncio.get_running_loop()
        pool = self._pools.get(loop)
        if pool is None or (pool.connector is not None and pool.connector.closed):
            pool = self._open(loop)
        return pool

    def _open(self, loop: asyncio.AbstractEventLoop) -> Pool:
        with self._lock:
            self.check_open()
            for other in [other for other in self._pools if other.is_closed() or other is loop]:
                past = self._pools.pop(other)
                self._remember(past)
                if other is not loop:
                    past.close_from_outside()
            pool = self._pools[loop] = Pool(self, loop)
        return pool

    def _remember(self, pool: Pool) -> None:
        past = pool.stats()
        self._past = PoolStats(created=self._past.created + past.created, reused=self._past.reused + past.reused)

    def stats(self) -> PoolStats:
        """The sum over all loops."""
        every = [self._past, *(pool.stats() for pool in list(self._pools.values()))]
        return PoolStats(**{name: sum(getattr(one, name) for one in every) for name in PoolStats.__struct_fields__})

    async def close(self) -> None:
        """Close every pool. Doing so twice is fine."""
        with self._lock:
            self.closed = True
            pools, self._pools = self._pools, {}
            for pool in pools.values():
                self._remember(pool)
        running = pools.pop(asyncio.get_running_loop(), None)
        for pool in pools.values():
            pool.close_from_outside()
        if running is not None:
            await running.close()

    def disown(self) -> None:
        """In a forked child: leave the parent's connections alone."""
        self._lock = threading.Lock()  # it may have been held when the process forked
        for pool in self._pools.values():
            pool.disown()
            _inherited.append(pool)
        self._pools = {}


_managers: "weakref.WeakSet[SessionManager]" = weakref.WeakSet()
_inherited: list[Pool] = []  # the parent's pools, kept in a forked child so that nothing closes them


def _after_fork() -> None:
    for manager in list(_managers):
        manager.disown()


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)
