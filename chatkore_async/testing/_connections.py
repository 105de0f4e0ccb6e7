"""Connections, and the playing of scripts on them: where aiohttp's server ends and the wire begins.

aiohttp parses requests and keeps connections; answers are written past it, straight to the transport, since no server
that means well lets a handler send half a status line.
"""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import TypeAlias

from aiohttp import web

from chatkore_async.testing._records import Outcome, RecordedConnection
from chatkore_async.testing._steps import Cut, Hold, Pause, Ping, Raw, Reset, Stall

__all__ = ["Connections", "Played", "play", "read_body"]

_Handler: TypeAlias = Callable[[web.BaseRequest, RecordedConnection], Awaitable[web.StreamResponse]]

# struct linger: on, for 0 seconds. Closing then drops what is unsent and sends a reset.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)

# Room for tests that send a long header or query; aiohttp's own limit is 8190.
_MAX_HEAD = 2**20


class Connections(web.Server):
    """aiohttp's low-level server, counting its connections.

    Args:
        handler: Answers a request; it is cancelled as soon as the client leaves.
        keepalive: Seconds after which an idle connection is closed.
        numbers: Numbers for new connections.
        record: Where connections are remembered, ``None`` for nowhere.

    """

    def __init__(
        self,
        handler: _Handler,
        *,
        keepalive: float,
        numbers: Iterator[int],
        record: list[RecordedConnection] | None,
    ) -> None:
        super().__init__(
            self._serve,
            handler_cancellation=True,
            keepalive_timeout=keepalive,
            access_log=None,
            # A test wants to see what was sent.
            auto_decompress=False,
            max_line_size=_MAX_HEAD,
            max_field_size=_MAX_HEAD,
        )
        self.live: dict[asyncio.BaseProtocol, RecordedConnection] = {}
        self._transports: dict[asyncio.BaseProtocol, asyncio.Transport] = {}
        self._handler = handler
        self._numbers = numbers
        self._record = record

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        """Count a connection in."""
        super().connection_made(handler, transport)
        self._transports[handler] = transport
        connection = self.live[handler] = RecordedConnection(next(self._numbers))
        if self._record is not None:
            self._record.append(connection)

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        """Count a connection out; aiohttp cancels its request, if any, right after this."""
        super().connection_lost(handler, exc)
        del self._transports[handler]
        self.live.pop(handler).end()

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        return await self._handler(request, self.live[request.protocol])

    def drop_idle(self) -> int:
        """Close connections without a running request; return how many."""
        idle = [handler for handler, connection in self.live.items() if not connection.running]
        for handler in idle:
            self._transports[handler].close()
        return len(idle)

    async def drop(self, listener: asyncio.Server) -> None:
        """Stop listening, close all connections at once, and wait for what was running on them to end."""
        loop = asyncio.get_running_loop()
        # asyncio forgets, open, a connection that it has accepted but not made yet when its listener closes. So first
        # let no more in (Windows' loop has no such call), and let those be made, which takes three turns of the loop.
        with suppress(NotImplementedError):
            for listening in listener.sockets:
                loop.remove_reader(listening.fileno())
        for _ in range(3):
            await asyncio.sleep(0)
        listener.close()
        # Asked politely, aiohttp would wait for stalled answers first.
        for transport in self._transports.values():
            transport.abort()
        await self.shutdown(timeout=1.0)


class Played(web.StreamResponse):
    """Tell aiohttp that the answer is on the wire already."""

    def __init__(self, *, keep_alive: bool) -> None:
        super().__init__()
        self._reusable = keep_alive

    @property
    def keep_alive(self) -> bool:
        """Whether a next request may come over the same connection."""
        return self._reusable

    async def prepare(self, request: web.BaseRequest) -> None:
        """Send no head."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Send no end."""


async def read_body(request: web.BaseRequest, limit: int) -> bytes | None:
    """Return the body of a request, or ``None`` when it is longer than ``limit`` bytes."""
    transport = request.transport
    if transport is not None and request.headers.get("Expect", "").lower() == "100-continue":
        transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    # Not `request.read()`, whose limit is aiohttp's to set and to answer.
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.content.iter_any():
        size += len(chunk)
        if size > limit:
            return None
        chunks.append(chunk)
    return b"".join(chunks)


async def play(request: web.BaseRequest, script: Raw) -> Outcome:
    """Send a script over the connection of a request, and return how that ended.

    Raises:
        asyncio.CancelledError: If the client left meanwhile.

    """
    wrote = False
    for step in script.steps:
        transport = request.transport
        if transport is None or transport.is_closing():
            return "gone"
        if isinstance(step, Cut):
            transport.close()
            return "cut"
        if isinstance(step, Reset):
            _reset(transport)
            return "cut"
        if isinstance(step, bytes | Ping):
            if wrote:
                # Others take turns, among them a client on the same loop.
                await asyncio.sleep(0)
            transport.write(step if isinstance(step, bytes) else step.encode())
            await request.writer.drain()
        else:
            await _wait(step)
        wrote = isinstance(step, bytes | Ping)
    return "answered"


async def _wait(step: Pause | Hold | Stall) -> None:
    if isinstance(step, Pause):
        await asyncio.sleep(step.seconds)
    elif isinstance(step, Hold):
        await step.event.wait()
    else:
        await asyncio.get_running_loop().create_future()


def _reset(transport: asyncio.Transport) -> None:
    connection: socket.socket = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    if transport.get_extra_info("sslcontext") is None:
        # Closing sends what is still in our own buffer first.
        transport.close()
    else:
        # Closing would take leave in TLS first, and that is a clean end.
        transport.abort()
