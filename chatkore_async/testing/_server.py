"""A relay on the loopback interface: real sockets, scripted answers."""

import asyncio
import inspect
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from ssl import SSLContext
from types import TracebackType
from typing import Self, TypeAlias

import msgspec
from aiohttp import HttpVersion11, web

from chatkore_async.testing._answers import answer, model_list
from chatkore_async.testing._connections import Connections, Played, play, read_body
from chatkore_async.testing._cors import preflight, shared
from chatkore_async.testing._records import Outcome, RecordedConnection, RecordedRequest
from chatkore_async.testing._replies import error
from chatkore_async.testing._steps import Raw, Reply
from chatkore_async.testing._wire import render

__all__ = ["ChatKoreServer", "Responder"]

Responder: TypeAlias = Callable[[RecordedRequest], Awaitable[Reply | Raw | None] | Reply | Raw | None]
"""From a request to its answer, or to ``None`` for the server's own; it may be a coroutine function."""


class ChatKoreServer:
    """Serve the API on a loopback port, with answers that a test scripts or, without a script, plausible ones.

    ::

        async with ChatKoreServer() as server:
            server.script(error(429, headers={"retry-after": "0"}), stream(["Hel", Reset()]))
            ...  # a client of server.base_url
            assert server.requests[0].json["model"] == "gpt-4o-mini"

    It answers ``POST …/chat/completions`` and ``GET …/models`` under any prefix, and 404 elsewhere. It belongs to the
    event loop that started it. Once closed, it may be started again, on the same port, to play an outage.

    Args:
        api_key: The only bearer token that is let in; ``None`` lets everyone in.
        models: What ``GET /models`` lists. Requests may name any model.
        latency: Seconds before each completion of the server's own.
        interval: Seconds between two deltas of a stream of the server's own.
        ssl: A server context, for https.
        keepalive: Seconds after which an idle connection is closed.
        handler: As for :meth:`respond_with`.
        host: The address to listen on.
        port: The port to listen on; 0 picks a free one.
        max_body_size: Bytes of a request's body above which the answer is 413.
        record: Whether ``requests`` and ``connections`` are kept; off, memory does not grow under load.
        cors: Whether pages of every origin may call it from a browser: preflights are answered, and each answer but
            a raw one says so.
        on_end: Called with each request when it has ended, its ``outcome`` and ``status`` known; also without
            ``record``. What it raises is raised again where the block of the server ends.

    """

    def __init__(
        self,
        *,
        api_key: str | None = None,
        models: Sequence[str] = ("gpt-4o-mini", "gpt-4o", "claude-sonnet-4-5", "deepseek-chat"),
        latency: float = 0.0,
        interval: float = 0.0,
        ssl: SSLContext | None = None,
        keepalive: float = 75.0,
        handler: Responder | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        max_body_size: int = 256 * 2**20,
        record: bool = True,
        cors: bool = False,
        on_end: Callable[[RecordedRequest], object] | None = None,
    ) -> None:
        self.requests: list[RecordedRequest] = []
        self.connections: list[RecordedConnection] = []
        self._authorization = None if api_key is None else f"Bearer {api_key}"
        self._models = models
        self._latency = latency
        self._interval = interval
        self._ssl = ssl
        self._keepalive = keepalive
        self._responder = handler
        self._host = host
        self._port = port
        self._max_body_size = max_body_size
        self._record = record
        self._cors = cors
        self._on_end = on_end
        self._script: deque[Reply | Raw] = deque()
        self._always: Reply | Raw | None = None
        self._arrived = 0
        self._awaited: list[tuple[int, asyncio.Future[None]]] = []
        self._problem: Exception | None = None
        self._numbers = count(1)
        self._web: Connections | None = None
        self._listener: asyncio.Server | None = None

    # Life

    async def start(self) -> None:
        """Listen.

        Raises:
            RuntimeError: If the server is listening already.
            OSError: If the address cannot be had.

        """
        if self._web is not None:
            raise RuntimeError(f"{self!r} is running: start it once, or close it first")
        self._web = Connections(
            self._handle,
            keepalive=self._keepalive,
            numbers=self._numbers,
            record=self.connections if self._record else None,
        )
        try:
            # Tests open thousands of connections at once; the system caps a backlog that it cannot grant.
            self._listener = await asyncio.get_running_loop().create_server(
                self._web, self._host, self._port, ssl=self._ssl, backlog=8192
            )
        except BaseException:
            self._web = None
            raise
        self._port = self._listener.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening and drop every connection, whatever it is busy with; closing twice is fine."""
        listener, self._listener = self._listener, None
        connections, self._web = self._web, None
        if listener is not None and connections is not None:
            await connections.drop(listener)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
        # An assertion in a responder fails the test that wrote it, not only the request that met it.
        if self._problem is not None and error is None:
            raise self._problem

    # Where it is

    @property
    def host(self) -> str:
        """The address it listens on."""
        return self._host

    @property
    def port(self) -> int:
        """The port it listens on, also after it was closed.

        Raises:
            RuntimeError: If it was never started.

        """
        if self._port == 0:
            raise RuntimeError("the server has no port yet: `async with ChatKoreServer() as server`, or `start()`")
        return self._port

    @property
    def base_url(self) -> str:
        """What a client takes as its base URL: ``"http://127.0.0.1:45123/v1"``."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'http' if self._ssl is None else 'https'}://{host}:{self.port}/v1"

    # What it answers

    def script(self, *replies: Reply | Raw) -> None:
        """Answer the next requests to ``chat/completions`` with these replies, in order of arrival.

        They come after those already scripted. After the last one, the server answers by itself again. Scripted
        answers do not depend on what is asked.

        Raises:
            TypeError: If something among them is no reply.

        """
        self._script.extend([reply for reply in map(_checked, replies) if reply is not None])

    def always(self, reply: Reply | Raw | None) -> None:
        """Answer each request to ``chat/completions`` that has no other script with this reply; ``None`` ends it.

        Raises:
            TypeError: If it is no reply.

        """
        self._always = _checked(reply)

    def respond_with(self, function: Responder | None) -> None:
        """Let a function answer: it is given the request and returns a reply, or ``None`` to let the server answer.

        It sees each request that :meth:`script` has no answer for, ``GET /models`` among them. What it raises is
        answered with a 500 that is not to be retried, and raised again where the block of the server ends.
        ``None`` in place of the function ends it.
        """
        self._responder = function

    # What it saw

    @property
    def request_count(self) -> int:
        """How many requests arrived in full since the start, or since :meth:`clear`; also without ``record``."""
        return self._arrived

    async def wait_for_requests(self, n: int, *, timeout: float | None = 5.0) -> None:
        """Wait until ``n`` requests have arrived in full since the start, or since :meth:`clear`.

        Args:
            n: How many.
            timeout: Seconds; ``None`` disables the limit.

        Raises:
            TimeoutError: If there are fewer after the timeout.

        """
        if self._arrived >= n:
            return
        waiter = (n, asyncio.get_running_loop().create_future())
        self._awaited.append(waiter)
        try:
            async with asyncio.timeout(timeout):
                await waiter[1]
        except TimeoutError as error:
            raise TimeoutError(f"{self._arrived} of {n} requests after {timeout:g} s: {self!r}") from error
        finally:
            self._awaited.remove(waiter)

    def drop_idle_connections(self) -> int:
        """Close the connections that wait for a next request, as servers do when keep-alive ends; return how many."""
        return 0 if self._web is None else self._web.drop_idle()

    def clear(self) -> None:
        """Forget all scripts and all that was recorded; connections that are open stay in ``connections``."""
        self._script.clear()
        self._always = self._responder = self._problem = None
        self._arrived = 0
        self.requests.clear()
        self.connections[:] = [connection for connection in self.connections if connection.open]

    def __repr__(self) -> str:
        where = self.base_url if self._port else "without a port"
        state = "closed" if self._web is None else f"{len(self._web.live)} connections"
        script = f", {len(self._script)} replies scripted" if self._script else ""
        return f"<ChatKoreServer {where} {state}, {self._arrived} requests{script}>"

    # One request

    async def _handle(self, request: web.BaseRequest, connection: RecordedConnection) -> web.StreamResponse:
        record = RecordedRequest(
            method=request.method,
            url=request.rel_url,
            headers=request.headers,
            connection=connection.number,
            received_at=asyncio.get_running_loop().time(),
        )
        if self._record:
            self.requests.append(record)
        connection.requests += 1
        connection.running += 1
        outcome: Outcome = "gone"
        try:
            reply = await self._receive(request, record) or await self._scripted(record) or self._own(record)
            if isinstance(reply, Reply):
                reply = shared(reply) if self._cors else reply
                await asyncio.sleep(reply.latency)
                record.status = reply.status
                reply = render(reply, http11=request.version >= HttpVersion11, keep_alive=request.keep_alive)
            outcome = await play(request, reply)
        finally:
            # Unless it returned, aiohttp cancelled it since the connection is lost: the server's doing when it closes.
            record.end("cut" if outcome == "gone" and self._web is None else outcome)
            connection.running -= 1
            self._ended(record)
        return Played(keep_alive=outcome == "answered" and reply.keep_alive)

    async def _receive(self, request: web.BaseRequest, record: RecordedRequest) -> Reply | None:
        body = await read_body(request, self._max_body_size)
        if body is None:
            return error(413, f"The body is longer than {self._max_body_size} bytes.", headers={"Connection": "close"})
        record.body = body
        self._arrived += 1
        for n, waiter in self._awaited:
            if n <= self._arrived and not waiter.done():
                waiter.set_result(None)
        # Before the key is asked for: a browser sends a preflight without it.
        if self._cors and (reply := preflight(record.method, record.headers)) is not None:
            return reply
        given = record.headers.get("Authorization")
        if self._authorization is None or given == self._authorization:
            return None
        if given is None:
            return error(401, "You didn't provide an API key.", type="invalid_request_error")
        return error(401, "Incorrect API key provided.", type="invalid_request_error", code="invalid_api_key")

    def _ended(self, record: RecordedRequest) -> None:
        if self._on_end is None:
            return
        try:
            self._on_end(record)
        except Exception as problem:  # noqa: BLE001 - as with a responder
            self._problem = self._problem or problem

    async def _scripted(self, record: RecordedRequest) -> Reply | Raw | None:
        is_chat = _is_chat(record)
        if is_chat and self._script:
            return self._script.popleft()
        if self._responder is not None:
            try:
                reply = self._responder(record)
                reply = _checked(await reply if inspect.isawaitable(reply) else reply)
            except Exception as problem:  # noqa: BLE001 - whatever a test raises is for the test to see
                self._problem = self._problem or problem
                return error(500, f"The responder raised {problem!r}", headers={"x-should-retry": "false"})
            if reply is not None:
                return reply
        return self._always if is_chat else None

    def _own(self, record: RecordedRequest) -> Reply:
        if _is_chat(record):
            reply = answer(record.body, interval=self._interval)
            return msgspec.structs.replace(reply, latency=self._latency) if self._latency else reply
        if record.method == "GET" and record.path.rstrip("/").endswith("/models"):
            return model_list(self._models)
        missing = error(404, f"Invalid URL ({record.method} {record.path})")
        # The answer to a HEAD has no body (RFC 9110 §9.3.2).
        return msgspec.structs.replace(missing, steps=()) if record.method == "HEAD" else missing


def _checked(reply: object) -> Reply | Raw | None:
    if reply is None or isinstance(reply, Reply | Raw):
        return reply
    raise TypeError(f"a reply is made by completion(), stream(), error(), raw() or the like, not {reply!r}")


def _is_chat(record: RecordedRequest) -> bool:
    return record.method == "POST" and record.path.rstrip("/").endswith("/chat/completions")
