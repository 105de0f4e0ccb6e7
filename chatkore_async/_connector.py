"""Connections: how they are opened, counted and timed, and how they are buried when their loop is dead."""

import asyncio
import contextlib
import socket
import sys
import weakref
from collections.abc import AsyncGenerator
from typing import Any

import aiohttp

from ._cork import Cork, bare
from ._deadlines import NEVER, Deadline, Deadlines
from ._foreign import ClientClosedError, ConnectTimeoutError
from ._sending import Writings

NO_TIMEOUT = aiohttp.ClientTimeout(total=None)

_GRACE_TURNS = 16

# Seconds of silence, seconds between probes, probes: where the platform has them.
_KEEP_ALIVE = tuple(
    (getattr(socket, name), value)
    for name, value in {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}.items()
    if hasattr(socket, name)
)


def open_socket(address: Any) -> socket.socket:
    """Make a socket that notices a peer that is gone: NATs and firewalls drop idle connections silently."""
    family, kind, protocol, _, _ = address
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE:
            opened.setsockopt(socket.IPPROTO_TCP, option, value)
    except OSError:
        pass  # a nicety, which not every platform has
    return opened


class _Opening(Deadline):
    """A connection that is being opened, in the task of the request it is for, and its deadline.

    It is given up by cancelling that task, and the cancellation is taken back when it was the only one, as
    `asyncio.timeout` does: a caller who cancels in the same moment is heard.
    """

    __slots__ = ("_limit", "_loop", "_turns", "began", "cancelling", "error", "over", "task")

    def __init__(self, task: asyncio.Task[Any], loop: asyncio.AbstractEventLoop, limit: float | None) -> None:
        self.began = loop.time()
        self.when = NEVER if limit is None else self.began + limit
        self.task = task
        self.cancelling = task.cancelling()
        self.error: Exception | None = None
        self.over = False
        self._loop = loop
        self._limit = limit
        self._turns = _GRACE_TURNS

    def expire(self) -> None:
        # A loop that is busy with thousands of handshakes is late, the network is not. So time alone does not decide:
        # a connection that needs only a few more turns of the loop is given them.
        if self.over:
            return
        if self._turns:
            self._turns -= 1
            self._loop.call_soon(self.expire)
        else:
            self.give_up(ConnectTimeoutError(f"no connection after {self._limit:g} s"))

    def give_up(self, error: Exception) -> None:
        """Cancel the task, unless it is so already."""
        if self.error is None:
            self.error = error
            self.task.cancel()

    def was_given_up(self) -> bool:
        """Take our cancellation back, and tell whether it was the only one."""
        return self.error is not None and self.task.uncancel() <= self.cancelling


class Connector(aiohttp.TCPConnector):
    """A connector that counts its connections and times their opening.

    `_create_connection` is the method that aiohttp documents for subclasses. It runs in the task of the request, and
    only when no connection is idle: what is done here costs a reused connection nothing.
    """

    def __init__(self, deadlines: Deadlines, cork: Cork | None, **options: Any) -> None:
        super().__init__(**options)  # pyright: ignore[reportUnknownMemberType]
        self._own_loop = asyncio.get_running_loop()  # to find it is a system call on 3.11
        self.writings = Writings(self._own_loop)
        self._cork = cork
        # Weak, as in `_keep`: a deadline leads to its call and so to its pool, which could not be collected.
        self._deadlines = weakref.ref(deadlines)
        self.created = 0
        self.opening: dict[asyncio.Task[Any], _Opening] = {}
        self.opened: dict[asyncio.Task[Any], float] = {}  # seconds it took, until the request asks
        # Not a WeakSet: other threads may count, and a plain set is copied in one go.
        self._protocols: set[weakref.ref[Any]] = set()
        self._forget = self._protocols.discard  # one for all: a method that is bound anew is 64 bytes a connection

    def protocols(self) -> list[Any]:
        """The protocols of all connections, some of which may be closed."""
        return [protocol for ref in list(self._protocols) if (protocol := ref()) is not None]

    def count_open(self) -> int:
        """How many connections are open now."""
        return sum(protocol.is_connected() for protocol in self.protocols())

    def give_up_opening(self) -> None:
        """Fail the requests that wait for their connection: the client is being closed."""
        for opening in list(self.opening.values()):
            opening.give_up(ClientClosedError("the client was closed"))

    async def _create_connection(self, req: Any, traces: Any, timeout: aiohttp.ClientTimeout) -> Any:
        loop = self._own_loop
        task, deadlines = asyncio.current_task(loop), self._deadlines()
        assert task is not None
        assert deadlines is not None, "whoever asks for a connection holds the pool"
        opening = _Opening(task, loop, timeout.sock_connect)
        deadlines.watch(opening)
        self.opening[task] = opening
        try:
            protocol = await super()._create_connection(req, traces, NO_TIMEOUT)
        except asyncio.CancelledError as cancelled:
            if opening.was_given_up() and opening.error is not None:
                raise opening.error from cancelled
            if self.closed and task.cancelling() <= opening.cancelling:
                # Closing the connector cancels look-ups of names, and thereby whoever waits for one.
                raise ClientClosedError("the client was closed") from cancelled
            raise
        finally:
            del self.opening[task]
            opening.over = True
            deadlines.cancel(opening)
        self.created += 1
        self.opened[task] = loop.time() - opening.began
        self._protocols.add(weakref.ref(protocol, self._forget))
        if self._cork is not None:
            self._cork.put_on(protocol)
        return protocol


class Keeper:
    """Sees to it that sessions are closed, however their loop ends.

    - A loop that shuts down its async generators (`asyncio.run` does, also after `sys.exit`) thereby closes them.
    - When the pool is collected while its loop runs, the loop is told to close them.
    - What a loop leaves behind that just stopped is buried: when the pool is collected, at the latest at exit.

    Args:
        sessions: what is kept.
        connector: the sessions'.
        pool: whose they are; is told that it is closed.
        deadlines: stopped with them, unless calls that are under way still need them.
        responses: those in flight; whoever takes one on adds it.
    """

    def __init__(
        self,
        sessions: tuple[aiohttp.ClientSession, ...],
        connector: Connector,
        *,
        pool: weakref.ref[Any],
        deadlines: Deadlines,
        responses: set[aiohttp.ClientResponse],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._connector = connector
        self._responses = responses
        self._loop = loop
        self._generator = _keep(sessions, pool, weakref.ref(deadlines), responses)
        # Started by hand, since nothing in it suspends: from now on the loop knows it, and closes the sessions when it
        # shuts its async generators down.
        hooks = sys.get_asyncgen_hooks()
        if getattr(loop, "_asyncgens_shutdown_called", False):
            # Somebody's clean-up, at the very end of a loop, makes a call: asyncio would warn, and close nothing.
            sys.set_asyncgen_hooks(firstiter=None)
        try:
            _drive(self._generator.__anext__())
        finally:
            sys.set_asyncgen_hooks(firstiter=hooks.firstiter)

    async def close(self) -> None:
        """Close the sessions, on their loop."""
        await self._generator.aclose()

    def bury(self) -> None:
        """Close, without awaiting anything, what belongs to a loop that does not run."""
        if not self._connector.closed and not self._loop.is_running():
            for protocol in self._connector.protocols():
                _close_transport(protocol, loop_is_closed=self._loop.is_closed())
            for response in list(self._responses):
                with contextlib.suppress(RuntimeError):  # whoever reads it can no longer be told
                    close(response, ClientClosedError("its event loop ended"))
            self._responses.clear()
            _drive(self._generator.aclose())


async def _keep(
    sessions: tuple[aiohttp.ClientSession, ...],
    pools: weakref.ref[Any],
    timers: weakref.ref[Deadlines],
    responses: set[aiohttp.ClientResponse],
) -> AsyncGenerator[None, None]:
    """Close the sessions when the loop shuts down its async generators, or when the pool is collected."""
    try:
        yield
    finally:
        if (pool := pools()) is not None:
            pool.is_open = False
        deadlines = timers()
        if deadlines is not None and not len(deadlines):
            deadlines.close()
        for response in list(responses):
            close(response, ClientClosedError("the client was closed"))
        for session in sessions:
            await session.close()


def close(response: aiohttp.ClientResponse, error: Exception) -> None:
    """Close a response and its connection; a pending read raises `error`."""
    # aiohttp would have the read raise an exception that is shared by the whole process, and each time it is raised
    # the frames of its traceback are kept.
    if response.content.exception() is None:
        response.content.set_exception(error)
    connection = response.connection
    response.close()
    if connection is not None:
        connection.close()  # a response of a dead loop does not


def _drive(awaitable: Any) -> None:
    """Run something up to where it suspends, or to its end."""
    with contextlib.suppress(StopIteration, StopAsyncIteration, RuntimeError):
        awaitable.send(None)


def _close_transport(protocol: Any, *, loop_is_closed: bool) -> None:
    """Close the transport of a connection whose loop does not run.

    The loop cannot do so any more, or nobody knows whether it ever will, and a transport that is collected open warns.
    asyncio's transports are torn down by `_call_connection_lost`, which `abort()` has the loop call soon; it is
    called here in its place. Another loop's (uvloop) has no such method, and needs none.
    """
    transport = bare(protocol.transport)
    if transport is None:
        return
    # Below TLS there is the transport that has the socket.
    bottom: Any = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None) or transport
    tear_down = getattr(bottom, "_call_connection_lost", None)
    if tear_down is not None and (loop_is_closed or not bottom.is_closing()):
        with contextlib.suppress(AttributeError):
            bottom._call_connection_lost = _do_nothing
        with contextlib.suppress(Exception):
            transport.abort()
        with contextlib.suppress(Exception):
            tear_down(None)
    else:
        with contextlib.suppress(Exception):
            transport.abort()
    with contextlib.suppress(Exception):
        protocol.connection_lost(None)


def _do_nothing(_: object) -> None:
    """Stand in for a `_call_connection_lost` that has run already."""
