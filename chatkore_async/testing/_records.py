"""What a server remembers of requests and connections, for tests to look at and to wait for."""

import asyncio
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import msgspec
from yarl import URL

__all__ = ["Outcome", "RecordedConnection", "RecordedRequest"]

Outcome: TypeAlias = Literal["answered", "cut", "gone"]
"""How a request ended: answered to the last step, cut by the script or by ``close()``, or its client left before."""


class RecordedConnection:
    """A TCP connection that a client made.

    Attributes:
        number: Which connection this is, counted from 1.
        requests: How many requests came over it so far.
        running: How many of them are being answered.

    """

    __slots__ = ("_closed", "number", "requests", "running")

    def __init__(self, number: int) -> None:
        self.number = number
        self.requests = 0
        self.running = 0
        self._closed = asyncio.Event()

    @property
    def open(self) -> bool:
        """Whether the connection is still there."""
        return not self._closed.is_set()

    async def closed(self, *, timeout: float | None = 5.0) -> None:
        """Wait until the connection is closed, by either side.

        Args:
            timeout: Seconds; ``None`` disables the limit.

        Raises:
            TimeoutError: If it is open after the timeout.

        """
        await _within(timeout, self._closed, self)

    def end(self) -> None:
        """Note that the connection is closed."""
        self._closed.set()

    def __repr__(self) -> str:
        state = "open" if self.open else "closed"
        return f"<RecordedConnection {self.number} {state}, {self.requests} requests, {self.running} running>"


class RecordedRequest:
    """A request as it arrived.

    Attributes:
        method: ``"POST"``.
        headers: A mapping that ignores the case of names.
        body: The body's bytes as they were sent; empty until they are all there.
        connection: The number of the connection that brought it, as in :attr:`RecordedConnection.number`.
        received_at: The event loop's time when its head arrived, in seconds.
        outcome: How it ended, ``None`` while it is running.
        status: The HTTP status that was sent, ``None`` while none was, and for a raw answer.

    """

    __slots__ = ("_finished", "body", "connection", "headers", "method", "outcome", "received_at", "status", "url")

    def __init__(
        self, *, method: str, url: URL, headers: Mapping[str, str], connection: int, received_at: float
    ) -> None:
        self.method = method
        self.url = url
        self.headers = headers
        self.body = b""
        self.connection = connection
        self.received_at = received_at
        self.outcome: Outcome | None = None
        self.status: int | None = None
        self._finished = asyncio.Event()

    @property
    def path(self) -> str:
        """The path, decoded and without the query."""
        return self.url.path

    @property
    def query(self) -> Mapping[str, str]:
        """The query's parameters."""
        return self.url.query

    @property
    def json(self) -> Any:
        """The body's JSON.

        Raises:
            msgspec.DecodeError: If it is none.

        """
        return msgspec.json.decode(self.body)

    async def finished(self, *, timeout: float | None = 5.0) -> Outcome:
        """Wait until the server is done with the request, and return its outcome.

        A client that leaves is noticed at once, also while the script pauses, holds or stalls.

        Args:
            timeout: Seconds; ``None`` disables the limit.

        Raises:
            TimeoutError: If it is running after the timeout.

        """
        await _within(timeout, self._finished, self)
        assert self.outcome is not None
        return self.outcome

    def end(self, outcome: Outcome) -> None:
        """Note how the request ended."""
        self.outcome = outcome
        self._finished.set()

    def __repr__(self) -> str:
        return (
            f"<RecordedRequest {self.method} {self.url.path} {len(self.body)} bytes, "
            f"connection {self.connection}: {self.outcome or 'running'}>"
        )


async def _within(timeout: float | None, event: asyncio.Event, subject: object) -> None:
    try:
        async with asyncio.timeout(timeout):
            await event.wait()
    except TimeoutError as error:
        raise TimeoutError(f"after {timeout:g} s still {subject!r}") from error
