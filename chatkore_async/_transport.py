"""The session manager: pooled aiohttp sessions, one per event loop, and one request after another through them.

Beside the testing support this is the only room that knows aiohttp. What comes out of it is ours: an `Exchange`
that is read and let go, and errors of our tree. Foreign exceptions are mapped here, each with the one fact that the
retries need to know: had the request been sent?
"""

import asyncio
import contextlib
import errno
import io
import os
import socket
import ssl as _ssl
import threading
import urllib.request
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from ._config import Limits, is_loopback
from ._deadlines import Deadlines
from ._meta import PoolStats
from ._slots import Slots
from .errors import APIConnectionError, APIError, APITimeoutError, ConfigurationError, InvalidResponseError

Session = aiohttp.ClientSession

# What aiohttp raises while it sends and reads. Not all of it is a ClientError: errors of its parser and builtin
# ValueErrors leak from reading lines, and reading from a closed connection is a RuntimeError.
FOREIGN = (aiohttp.ClientError, HttpProcessingError, OSError, ValueError, RuntimeError)

HEADER_LIMIT = 64 * 1024
"""Bytes of one header. aiohttp's 8 KiB are less than some gateways send; more than this is a flood."""

DRAIN_BYTES = 64 * 1024
DRAIN_SECONDS = 0.25
"""What is read off after the end of a stream, to give its connection back (contract §3)."""

_FOREVER = 1e9
_LARGE_BODY = 512 * 1024  # aiohttp warns of bytes above 1 MiB, and writes them in one go
_GRACE_TURNS = 8
_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)


def _open_socket(address: Any) -> socket.socket:
    """Make a socket that notices a peer that is gone: NATs and firewalls drop idle connections silently."""
    family, kind, protocol, _, _ = address
    opened = socket.socket(family, kind, protocol)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return opened


class _ConnectTimeoutError(Exception):
    """The `connect` time of a `Timeout` passed."""


class _Connector(aiohttp.TCPConnector):
    """A connector that counts its connections and times their opening.

    `_create_connection` is the method that aiohttp documents for subclasses. It runs in the task of the request, and
    only when no connection is idle: what is done here costs a reused connection nothing.
    """

    def __init__(self, deadlines: Deadlines, **options: Any) -> None:
        super().__init__(**options)
        self._deadlines = deadlines
        self.created = 0
        self.opening: set[asyncio.Task[Any] | None] = set()
        self.opened: dict[asyncio.Task[Any] | None, float] = {}  # seconds it took, until the request asks
        self._protocols: weakref.WeakSet[Any] = weakref.WeakSet()

    def count_open(self) -> int:
        """How many connections are open now."""
        return sum(protocol.is_connected() for protocol in self._protocols)

    def transports(self) -> list[Any]:
        """The transports of all connections."""
        return [protocol.transport for protocol in self._protocols if protocol.transport is not None]

    async def _create_connection(self, req: Any, traces: Any, timeout: aiohttp.ClientTimeout) -> Any:
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        began = loop.time()
        late = False

        def expire(turns: int = _GRACE_TURNS) -> None:
            # A loop that is busy with thousands of handshakes is late, the network is not. So time alone does not
            # decide: a connection that needs only a few more turns of the loop is given them.
            nonlocal late
            if task is None or task not in self.opening:
                return
            if turns:
                loop.call_soon(expire, turns - 1)
            else:
                late = True
                task.cancel()

        limit = timeout.sock_connect
        deadline = None if limit is None else self._deadlines.set(began + limit, expire)
        self.opening.add(task)
        try:
            protocol = await super()._create_connection(req, traces, _NO_TIMEOUT)
        except asyncio.CancelledError as cancelled:
            if late and task is not None:
                task.uncancel()
                raise _ConnectTimeoutError(f"no connection after {limit:g} s") from cancelled
            raise
        finally:
            self.opening.discard(task)
            if deadline is not None:
                self._deadlines.cancel(deadline)
        self.created += 1
        self.opened[task] = loop.time() - began
        self._protocols.add(protocol)
        return protocol


class Exchange:
    """A request that was answered: status, headers, and a body to be read and let go.

    `content` is the body's reader; a stream awaits its `readany()` directly, without a coroutine in between.
    """

    __slots__ = ("_host_place", "_place", "_response", "connect", "content", "headers", "status")

    def __init__(
        self, response: aiohttp.ClientResponse, place: Slots, host_place: Slots | None, connect: float | None
    ) -> None:
        self._response = response
        self._place: Slots | None = place
        self._host_place = host_place
        self.connect = connect
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self.content = response.content

    def __repr__(self) -> str:
        return f"<Exchange {self.status} {'open' if self._place else 'let go'}>"

    async def read(self, limit: int | None, *, cut: bool = False) -> bytes:
        """Return the whole body, and let go.

        Args:
            limit: bytes that are read at most.
            cut: whether a longer body is cut; otherwise it is an `InvalidResponseError`.

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
                if content.at_eof():
                    break
                if limit is not None and size > limit:
                    self.abort()
                    if cut:
                        break
                    raise InvalidResponseError(
                        f"the answer is larger than max_body_size ({limit} bytes)", hint="raise Limits.max_body_size"
                    )
        except FOREIGN as cause:
            self.abort()
            if cut:
                return b"".join(pieces)  # an error's body that broke off still says something
            raise mapped(cause, sent=True) from cause
        self.let_go()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def rescue(self) -> bytes:
        """Return what had arrived before the connection broke; aiohttp holds it back behind the exception."""
        self.content.set_exception(None)  # type: ignore[arg-type]
        return self.content.read_nowait()

    async def drain(self, pool: "Pool", host: str) -> None:
        """Read off what follows the end of a stream, within bounds, so that the connection can be used again.

        A host that does not end its bodies is remembered, and not waited for again.
        """
        content = self.content
        if content.at_eof():
            self.let_go()
            return
        if host in pool.never_ending:
            self.abort()
            return
        deadline = pool.deadlines.set(pool.loop.time() + DRAIN_SECONDS, self.abort)
        size = 0
        try:
            while not content.at_eof() and size <= DRAIN_BYTES:
                size += len(await content.readany())
        except FOREIGN:
            size = DRAIN_BYTES + 1
        finally:
            pool.deadlines.cancel(deadline)
            if content.at_eof() and size <= DRAIN_BYTES:
                self.let_go()
            elif self._place is None or size > DRAIN_BYTES:
                pool.never_ending.add(host)
            self.abort()

    def let_go(self) -> None:
        """Give back the place; the connection went back to the pool when the body's end was read."""
        if self._place is not None:
            self._place.release()
            self._place = None
            if self._host_place is not None:
                self._host_place.release()

    def abort(self) -> None:
        """Close the connection at once and give back the place. A pending read raises. Doing so twice is fine."""
        if self._place is not None:
            self._response.close()
            self.let_go()


class Pool:
    """What one event loop uses: a session, places, deadlines."""

    def __init__(self, manager: "SessionManager", loop: asyncio.AbstractEventLoop) -> None:
        limits = manager.limits
        self.loop = loop
        self.deadlines = Deadlines(loop)
        self.slots = Slots(limits.max_connections)
        self.requests = 0
        self.never_ending: set[str] = set()  # hosts that keep a stream open after its end
        self._per_host = limits.max_connections_per_host
        self._host_slots: dict[str, Slots] = {}
        self._timeouts: dict[float | None, aiohttp.ClientTimeout] = {}
        self._proxies: dict[str, str | None] = {}
        self._keeper: AsyncGenerator[None, None] | None = None
        self.connector: _Connector | None = None
        if manager.session is not None:
            self.session = manager.session
            self.headers: Mapping[str, str] | None = None
            return
        self.headers = manager.headers
        self.connector = _Connector(
            self.deadlines,
            limit=0,
            keepalive_timeout=_FOREVER if limits.keepalive_expiry is None else limits.keepalive_expiry,
            ssl=True if manager.ssl is None else manager.ssl,
            socket_factory=_open_socket,
        )
        self.session = aiohttp.ClientSession(
            connector=self.connector,
            headers=manager.headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=_NO_TIMEOUT,
            max_line_size=HEADER_LIMIT,
            max_field_size=HEADER_LIMIT,
        )
        self._keeper = _keep(self.session, self.deadlines)
        # Started by hand, since nothing in it suspends: from now on the loop knows it, and closes the session when it
        # shuts its async generators down.
        with contextlib.suppress(StopIteration):
            self._keeper.__anext__().send(None)
        weakref.finalize(self, _bury, self.session, self.connector, loop)

    @property
    def closed(self) -> bool:
        """Whether the session is closed."""
        return self.session.closed

    def host_slots(self, url: str) -> Slots | None:
        """The places of a URL's host, where they are limited."""
        if self._per_host is None:
            return None
        host = urlsplit(url).netloc
        slots = self._host_slots.get(host)
        if slots is None:
            slots = self._host_slots[host] = Slots(self._per_host)
        return slots

    async def send(
        self,
        method: str,
        url: str,
        body: bytes | None,
        headers: Mapping[str, str] | None,
        *,
        host_place: Slots | None,
        connect: float | None,
        proxy: str | Literal[False] | None,
        ssl: _ssl.SSLContext | None,
    ) -> Exchange:
        """Send a request on a connection of the pool and return its answer, the body unread.

        The caller holds a place in `slots` (and in `host_place`), and passes it on to the `Exchange`; when this
        raises, the caller still holds it.

        Raises:
            APIError: the request could not be sent, or was not answered.
            ConfigurationError: the proxy cannot be used, or the session is closed.
        """
        options: dict[str, Any] = {}
        if headers is not None:
            options["headers"] = headers
        if (through := self._proxy_for(url, proxy)) is not None:
            options["proxy"] = through
        if ssl is not None:
            options["ssl"] = ssl
        timeout = self._timeouts.get(connect)
        if timeout is None:
            timeout = self._timeouts[connect] = aiohttp.ClientTimeout(total=None, sock_connect=connect)
        try:
            response = await self.session.request(
                method,
                url,
                data=io.BytesIO(body) if body is not None and len(body) > _LARGE_BODY else body,
                allow_redirects=False,
                timeout=timeout,
                **options,
            )
        except FOREIGN as cause:
            self._opened()
            raise mapped(cause, sent=_was_sent(cause)) from _harmless(cause)
        except _ConnectTimeoutError as cause:
            raise APITimeoutError(
                f"could not connect to {urlsplit(url).netloc} within {connect:g} s", phase="connect", retryable="yes"
            ) from cause
        except BaseException:
            self._opened()
            raise
        self.requests += 1
        return Exchange(response, self.slots, host_place, self._opened())

    def _opened(self) -> float | None:
        """Seconds it took to open a connection for this task's request; `None` when one was reused."""
        if self.connector is None or not self.connector.opened:
            return None
        return self.connector.opened.pop(asyncio.current_task(), None)

    def is_connecting(self, task: "asyncio.Task[Any] | None") -> bool:
        """Whether a task's request waits for its connection to open."""
        return self.connector is not None and task in self.connector.opening

    def _proxy_for(self, url: str, proxy: str | Literal[False] | None) -> str | None:
        if proxy is False:
            return None
        if proxy is not None:
            return proxy
        host = urlsplit(url).netloc
        if host not in self._proxies:
            self._proxies[host] = environment_proxy(url)
        return self._proxies[host]

    def stats(self) -> PoolStats:
        """The pool at this moment."""
        waiting = self.slots.waiting + sum(slots.waiting for slots in self._host_slots.values())
        if self.connector is None:
            return PoolStats(open=self.slots.in_use, in_use=self.slots.in_use, waiting=waiting)
        opened = self.connector.count_open()
        in_use = self.slots.in_use
        return PoolStats(
            open=opened,
            in_use=in_use,
            idle=max(0, opened - in_use),
            waiting=waiting,
            created=self.connector.created,
            reused=max(0, self.requests - self.connector.created),
        )

    async def close(self) -> None:
        """Close what is ours. All connections are told to close before this awaits anything."""
        if self._keeper is not None:
            await self._keeper.aclose()
        else:
            self.deadlines.close()

    def close_from_outside(self) -> None:
        """Close a pool whose loop is not the running one: another thread's, or one that stands still."""
        if self._keeper is None or self.closed or self.loop.is_closed():
            return
        if self.loop.is_running():
            with contextlib.suppress(RuntimeError):  # it was closed in this very moment
                asyncio.run_coroutine_threadsafe(self._keeper.aclose(), self.loop)
            return
        with contextlib.suppress(StopIteration, RuntimeError):
            self._keeper.aclose().send(None)

    def disown(self) -> None:
        """In a forked child: touch nothing, since sockets and selector are the parent's, and warn of nothing."""
        if self.connector is not None:
            self.session.detach()
            self.connector._conns.clear()


async def _keep(session: aiohttp.ClientSession, deadlines: Deadlines) -> AsyncGenerator[None, None]:
    """Close the session when the loop shuts down its async generators, or when the pool is collected."""
    try:
        yield
    finally:
        deadlines.close()
        await session.close()


def _bury(session: aiohttp.ClientSession, connector: _Connector, loop: asyncio.AbstractEventLoop) -> None:
    """Close what a loop left behind that ended without shutting down its async generators.

    Its transports cannot be closed by the loop any more, and would warn when they are collected.
    """
    if session.closed or loop.is_running():
        return
    for transport in connector.transports():
        inner: Any = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None)
        for layer in (transport, inner):
            with contextlib.suppress(Exception):
                layer.abort()
        for layer in (inner, transport):
            with contextlib.suppress(Exception):
                layer._call_connection_lost(None)
    closing = session.close()
    with contextlib.suppress(StopIteration, RuntimeError):
        closing.send(None)
    closing.close()


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
        self._past = PoolStats()  # of pools whose loop is gone
        self._lock = threading.Lock()
        _managers.add(self)

    def check_open(self) -> None:
        """Raise `ConfigurationError` when the client was closed."""
        if self.closed:
            raise ConfigurationError("this client was closed; make a new one, or close it later")

    def pool(self) -> Pool:
        """Return the running loop's pool.

        Raises:
            ConfigurationError: the client was closed.
        """
        if self.closed:
            self.check_open()
        loop = asyncio.get_running_loop()
        pool = self._pools.get(loop)
        if pool is None or (pool.closed and self.session is None):
            pool = self._open(loop)
        return pool

    def _open(self, loop: asyncio.AbstractEventLoop) -> Pool:
        with self._lock:
            for other in [other for other, pool in self._pools.items() if other.is_closed() or other is loop]:
                past = self._pools.pop(other).stats()
                self._past = PoolStats(
                    created=self._past.created + past.created, reused=self._past.reused + past.reused
                )
            pool = self._pools[loop] = Pool(self, loop)
        return pool

    def stats(self) -> PoolStats:
        """The sum over all loops."""
        every = [self._past, *(pool.stats() for pool in list(self._pools.values()))]
        return PoolStats(**{name: sum(getattr(one, name) for one in every) for name in PoolStats.__struct_fields__})

    async def close(self) -> None:
        """Close every pool. Doing so twice is fine."""
        self.closed = True
        pools, self._pools = self._pools, {}
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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def environment_proxy(url: str, getproxies: Callable[[], dict[str, str]] = urllib.request.getproxies) -> str | None:
    """Return the proxy that the environment names for a URL, or `None`.

    Loopback addresses take none, as in Go's `ProxyFromEnvironment`: a proxy elsewhere could not reach them.

    Raises:
        ConfigurationError: it is a SOCKS proxy.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(url) or urllib.request.proxy_bypass(f"{host}:{parts.port}" if parts.port else host):
        return None
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return None if not proxy else checked_proxy(proxy if "://" in proxy else f"http://{proxy}")


def checked_proxy(proxy: str) -> str:
    """Return a proxy's URL, or raise `ConfigurationError` when it is not one that can be used."""
    try:
        parts = urlsplit(proxy)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if usable:
        return proxy
    if proxy.lower().startswith("socks"):
        raise ConfigurationError(
            "SOCKS proxies need the package aiohttp-socks: pass "
            "session=aiohttp.ClientSession(connector=aiohttp_socks.ProxyConnector.from_url(...)); "
            "proxy=False ignores the environment's proxy"
        )
    raise ConfigurationError("proxy must be an http:// or https:// URL, None for the environment's, or False for none")


def _was_sent(cause: BaseException) -> bool:
    """Whether the request had left when this was raised. What fails to connect did not send."""
    return not isinstance(
        cause, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError | aiohttp.ClientHttpProxyError
    )


def _harmless(cause: BaseException) -> BaseException:
    """Return a cause without what shows the request's headers."""
    if not isinstance(cause, aiohttp.ClientResponseError):
        return cause
    if cause.__cause__ is not None:
        return cause.__cause__
    return aiohttp.ClientConnectionError(f"{type(cause).__name__}: {cause.status} {cause.message}")


def _errno(cause: BaseException | None) -> int | None:
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
        cause = cause.__cause__ or cause.__context__
    return None


def mapped(cause: BaseException, *, sent: bool) -> APIError | ConfigurationError:
    """Return the error of our tree for what aiohttp raised."""
    if isinstance(cause, RuntimeError) and "Session is closed" in str(cause):
        return ConfigurationError("the session is closed: keep it open as long as its client is used")
    if isinstance(cause, aiohttp.InvalidURL):
        return ConfigurationError(f"not a URL: {cause}")
    if _errno(cause) in (errno.EMFILE, errno.ENFILE):
        return APIConnectionError(
            "out of file descriptors",
            hint="raise the limit (ulimit -n), or lower Limits.max_connections",
            retryable="unconfirmed" if sent else "yes",
        )
    reason = _reason(cause)
    if isinstance(cause, aiohttp.ClientConnectorCertificateError):
        return APIConnectionError(
            f"the certificate of {cause.host}:{cause.port} does not verify: {reason}",
            hint="pass the authority's certificate in ssl=ssl.create_default_context(cafile=...)",
        )
    if isinstance(cause, aiohttp.ConnectionTimeoutError):
        return APITimeoutError(f"could not connect in time: {reason}", phase="connect", retryable="yes")
    if isinstance(cause, aiohttp.ClientProxyConnectionError):
        return APIConnectionError(
            f"could not connect to the proxy {cause.host}:{cause.port}: {reason}",
            hint="check HTTPS_PROXY, or pass proxy=False",
            retryable="yes",
        )
    if isinstance(cause, aiohttp.ClientHttpProxyError):
        return APIConnectionError(
            f"the proxy refused with status {cause.status}: {reason}",
            hint="check the proxy's user name and password" if cause.status == 407 else None,
            retryable="never" if cause.status in (403, 407) else "yes",
        )
    if isinstance(cause, aiohttp.ClientConnectorDNSError):
        return APIConnectionError(
            f"the host {cause.host} has no address: {reason}", hint="check base_url", retryable="yes"
        )
    if isinstance(cause, aiohttp.ClientConnectorError):
        return APIConnectionError(f"could not connect to {cause.host}:{cause.port}: {reason}", retryable="yes")
    if isinstance(cause, aiohttp.ClientResponseError | HttpProcessingError | ValueError):
        return InvalidResponseError(f"the server's answer is not HTTP: {reason}", retryable="unconfirmed")
    return APIConnectionError(f"the connection broke: {reason}", retryable="unconfirmed" if sent else "yes")


def _reason(cause: BaseException) -> str:
    """One line that says what happened; aiohttp's connector errors hide it in `os_error`."""
    if isinstance(cause, aiohttp.ClientConnectorCertificateError):
        cause = cause.certificate_error
    elif isinstance(cause, aiohttp.ClientConnectorError):
        cause = cause.os_error
    text = getattr(cause, "strerror", None) or getattr(cause, "message", None) or str(cause)
    return " ".join(str(text).split())[:300] or type(cause).__name__
