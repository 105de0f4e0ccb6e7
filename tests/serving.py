"""Services in both frameworks on loopback ports, and readers of theirs who may be slow, rude or dead."""

import asyncio
import contextlib
import gc
import logging
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import Any

import fastapi
import pytest
import uvicorn
from aiohttp import web

from chatkore_async import AsyncChatKore
from chatkore_async.integrations import aiohttp_web
from chatkore_async.integrations import fastapi as fastapi_

FRAMEWORKS = ["fastapi", "aiohttp"]
ASK = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}
DONE = b"[DONE]"

PATIENCE = 30.0
"""Seconds after which a test that waits for something fails; a busy machine is slow, not wrong."""


class Asked:
    """What a handler is given, whatever the framework: the request, the client, and the two functions of ours."""

    def __init__(self, request: Any, client: AsyncChatKore, module: Any) -> None:
        self.request = request
        self.client = client
        self.respond = partial(module.stream_response, request)
        self.refuse = module.error_response

    def stream(self, **options: Any) -> Any:
        return self.client.chat.completions.stream(**{**ASK, **options})


Handler = Callable[[Asked], Awaitable[Any]]


def relaying(**options: Any) -> Handler:
    """Return a handler that relays one stream."""

    async def relay(asked: Asked) -> Any:
        return await asked.respond(asked.stream(), **options)

    return relay


async def settled(client: AsyncChatKore, before: set[asyncio.Task[Any]]) -> None:
    """Wait until the client holds no connection, and no task of ours runs but those from before."""
    async with asyncio.timeout(PATIENCE):
        while client.pool.in_use or any(  # noqa: ASYNC110 - not ours to signal
            "_relay" in repr(each) or "ChatStream" in repr(each) or "_watch" in repr(each)
            for each in asyncio.all_tasks() - before
        ):
            await asyncio.sleep(0)


class Service:
    """An application that runs. `client` is the one that the last request was given."""

    client: AsyncChatKore

    def __init__(self, app: Any) -> None:
        self.app = app
        self.port = 0
        self.stop: Callable[[], Awaitable[None]]

    async def freed(self) -> None:
        """Wait until the application holds no connection to the model."""
        async with asyncio.timeout(PATIENCE):
            while self.client.pool.in_use:  # noqa: ASYNC110 - not ours to signal
                await asyncio.sleep(0)


def fastapi_app(service: Service | None, handler: Handler, **options: Any) -> fastapi.FastAPI:
    app = fastapi.FastAPI(lifespan=fastapi_.lifespan(**options))

    @app.post("/chat")
    async def chat(request: fastapi.Request):
        client = await fastapi_.get_client(request)
        if service is not None:
            service.client = client
        return await handler(Asked(request, client, fastapi_))

    return app


def aiohttp_app(service: Service | None, handler: Handler, **options: Any) -> web.Application:
    app = web.Application()
    app.cleanup_ctx.append(aiohttp_web.cleanup_ctx(**options))

    async def chat(request: web.Request) -> web.StreamResponse:
        client = aiohttp_web.get_client(request)
        if service is not None:
            service.client = client
        return await handler(Asked(request, client, aiohttp_web))

    app.router.add_post("/chat", chat)
    return app


class _Uvicorn(uvicorn.Server):
    """Says when it listens, and ends when it is told to, without a look every tenth of a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listens = asyncio.Event()
        self.ends = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()

    async def main_loop(self) -> None:
        await self.ends.wait()


@contextlib.asynccontextmanager
async def uvicorn_runs(app: Any, service: Service, *, patience: int | None = 5) -> AsyncIterator[Service]:
    """Serve an ASGI application on this loop; `patience` is uvicorn's when it shuts down."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    service.port = listener.getsockname()[1]
    server = _Uvicorn(
        uvicorn.Config(app, http="h11", ws="none", log_config=None, timeout_graceful_shutdown=patience)  # type: ignore[arg-type]
    )
    serving = asyncio.create_task(server.serve([listener]))

    async def stop() -> None:
        server.ends.set()
        await asyncio.wait_for(asyncio.shield(serving), PATIENCE)

    service.stop = stop
    listens = asyncio.create_task(server.listens.wait())
    await asyncio.wait((serving, listens), timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
    listens.cancel()
    try:
        yield service
    finally:
        await stop()
        listener.close()


@contextlib.asynccontextmanager
async def aiohttp_runs(
    app: web.Application, service: Service, *, patience: float = 5, **options: Any
) -> AsyncIterator[Service]:
    """Serve an application of aiohttp's on this loop; `patience` is its runner's `shutdown_timeout`."""
    runner = web.AppRunner(app, shutdown_timeout=patience, **options)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=2048)
    await site.start()
    service.port = runner.addresses[0][1]

    async def stop() -> None:
        await asyncio.wait_for(runner.cleanup(), PATIENCE)

    service.stop = stop
    try:
        yield service
    finally:
        await stop()


@contextlib.asynccontextmanager
async def serving(
    framework: str,
    handler: Handler,
    base_url: str,
    *,
    patience: int = 5,
    runner: Mapping[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Service]:
    """Serve `POST /chat`, answered by a handler, with a client of `base_url` that does not retry."""
    options = {"api_key": "sk-secret-of-the-service", "base_url": base_url, "max_retries": 0, **options}
    service = Service(None)
    if framework == "fastapi":
        service.app = fastapi_app(service, handler, **options)
        running = uvicorn_runs(service.app, service, patience=patience)
    else:
        service.app = aiohttp_app(service, handler, **options)
        running = aiohttp_runs(service.app, service, patience=patience, **(runner or {}))
    async with running:
        yield service


class Reader:
    """A connection to a service. It reads what it is told to, and no more."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._rest = b""
        self.status = 0
        self.headers: dict[str, str] = {}
        self.cut = False
        self.ended = False

    async def ask(self, path: str = "/chat", *, http: str = "1.1", body: bytes = b"{}", close: bool = False) -> None:
        """Send a request."""
        self._rest, self.ended, self.status = b"", False, 0
        head = (
            f"POST {path} HTTP/{http}\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        )
        head += "Connection: close\r\n" if close else ""
        self._writer.write(head.encode() + b"\r\n" + body)
        await self._writer.drain()

    async def head(self) -> int:
        """Read the status line and the headers, and return the status."""
        async with asyncio.timeout(PATIENCE):
            lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        self.status = int(lines[0].split()[1])
        self.headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return self.status

    async def some(self) -> bytes:
        """Read a piece of the body; nothing at its end, or where it was cut."""
        async with asyncio.timeout(PATIENCE):
            try:
                return await self._some()
            except (asyncio.IncompleteReadError, ConnectionError):
                self.cut = self.ended = True
                return b""

    async def _some(self) -> bytes:
        if self.ended:
            return b""
        if "content-length" in self.headers:
            self.ended = True
            return await self._reader.readexactly(int(self.headers["content-length"]))
        if self.headers.get("transfer-encoding") != "chunked":
            data = await self._reader.read(65536)
            self.ended = not data
            return data
        size = int(await self._reader.readuntil(b"\r\n"), 16)
        data = (await self._reader.readexactly(size + 2))[:-2]
        self.ended = size == 0
        return data

    async def event(self) -> bytes:
        """Read one event, without the blank line; nothing at the end."""
        while b"\n\n" not in self._rest:
            data = await self.some()
            if not data:
                break
            self._rest += data
        event, _, self._rest = self._rest.partition(b"\n\n")
        return event

    async def events(self) -> list[bytes]:
        """Read all events that are left."""
        events = []
        while event := await self.event():
            events.append(event)
        return events

    async def data(self) -> list[bytes]:
        """Read all events that are left, and return the data of those that have some."""
        return [event.removeprefix(b"data: ") for event in await self.events() if event.startswith(b"data: ")]

    async def body(self) -> bytes:
        """Read the rest of the body."""
        pieces = [self._rest]
        self._rest = b""
        while data := await self.some():
            pieces.append(data)
        return b"".join(pieces)

    def leave(self, *, reset: bool = False) -> None:
        """Close the connection, whatever is on its way."""
        if reset:
            self._writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
        self._writer.transport.abort()

    async def closed(self) -> None:
        """Wait until the service has closed the connection; what it still sent is dropped."""
        async with asyncio.timeout(PATIENCE):
            with contextlib.suppress(ConnectionError):
                while await self._reader.read(65536):
                    pass


@contextlib.asynccontextmanager
async def connected(service: Service, *, small: bool = False) -> AsyncIterator[Reader]:
    """Connect to a service; `small` has the kernel keep little of what is sent."""
    sock = socket.socket()
    if small:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", service.port))
    reader, writer = await asyncio.open_connection(sock=sock)
    try:
        yield Reader(reader, writer)
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def asking(service: Service, **options: Any) -> AsyncIterator[Reader]:
    """Connect and ask."""
    async with connected(service) as reader:
        await reader.ask(**options)
        yield reader


class Noise(logging.Handler):
    """Keeps what a user would take for a failure of the program: errors, and tracebacks at any level."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.expected: list[str] = []
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if "sk-secret" in text or (
            (record.levelno >= logging.ERROR or record.exc_info)
            and not any(each in text for each in self.expected)
            and " took " not in text  # asyncio's debug mode, of a machine that is busy
        ):
            self.said.append(text)


noise = Noise()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Fail where something went wrong that nobody was told of but the log, or where the log has the key."""
    root = logging.getLogger()
    noise.expected, noise.said = [], []
    level = root.level
    root.addHandler(noise)
    root.setLevel(logging.INFO)
    yield
    gc.collect()  # exceptions that nobody asked for are told of when their tasks are collected
    root.removeHandler(noise)
    root.setLevel(level)
    assert noise.said == []
