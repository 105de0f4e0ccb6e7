"""FastAPI, and Starlette underneath: one client for the life of the application, and streams to the browser.

    app = FastAPI(lifespan=lifespan(timeout=60))

    @app.post("/chat")
    async def chat(request: Request, asked: Asked, client: Annotated[AsyncChatKore, Depends(get_client)]) -> Response:
        stream = client.chat.completions.stream(model="gpt-4o-mini", messages=asked.messages)
        return await stream_response(request, stream)

It needs the extra `fastapi`; Starlette alone is enough.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Unpack

from chatkore_async import AsyncChatKore, ChatKoreError, ChatStream, ConfigurationError
from chatkore_async.integrations._refusals import Refusal, refusal
from chatkore_async.integrations._relay import HEADERS, Relay, Relays
from chatkore_async.integrations._service import ClientOptions, Maker, Service

try:
    from starlette.background import BackgroundTask
    from starlette.requests import HTTPConnection, Request
    from starlette.responses import JSONResponse, Response
    from starlette.types import Message, Receive, Scope, Send
except ImportError as cause:
    raise ImportError(
        "chatkore_async.integrations.fastapi needs FastAPI, or Starlette alone: pip install 'chatkore-async[fastapi]'"
    ) from cause

__all__ = ["error_response", "get_client", "lifespan", "stream_response"]

_STATE = "chatkore_service"


def lifespan(**options: Unpack[ClientOptions]) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """Return a lifespan for `FastAPI(lifespan=...)` or `Starlette(lifespan=...)`: the application has one client.

    It is made when the application starts, in each worker process anew, and closed when it has shut down. To have a
    lifespan of your own as well, enter this one in it: `async with lifespan()(app): yield`.

    How long streams may go on when the server is told to stop is the server's to say: uvicorn waits for
    `timeout_graceful_shutdown` seconds, and without a limit if it has none. Then they end with an error event.

    Args:
        **options: what `AsyncChatKore` takes.

    Raises:
        ConfigurationError: at the start of the application, what `AsyncChatKore` raises, as without a key.
    """
    maker, options = Maker(options), ClientOptions()

    @asynccontextmanager
    async def run(app: Any) -> AsyncGenerator[None]:
        async with maker.running() as service:
            setattr(app.state, _STATE, service)
            try:
                yield
            finally:
                delattr(app.state, _STATE)

    return run


async def get_client(connection: HTTPConnection) -> AsyncChatKore:
    """Return the application's client: `Annotated[AsyncChatKore, Depends(get_client)]`.

    It is a coroutine function so that FastAPI need not run it in a thread.

    Raises:
        ConfigurationError: the application was not started with `lifespan`.
    """
    service = _service(connection)
    if service is None:
        raise ConfigurationError(
            "this application has no client: make it with lifespan=lifespan(), and let its lifespan run (in tests, "
            "`with TestClient(app)`). An application mounted in another one runs none of its own"
        )
    return service.client


def _service(connection: HTTPConnection) -> Service | None:
    service: Service | None = getattr(connection.app.state, _STATE, None)
    return service


def error_response(error: ChatKoreError) -> JSONResponse:
    """Return the answer to a request that could not be served because of this error, as `stream_response` does.

    The reader is told what is wrong with its request (400, 404, 409, 413, 422), when to come again (429), that the
    model took too long (504), and nothing of all else (502).
    """
    return _json(refusal(error))


def _json(told: Refusal) -> JSONResponse:
    return JSONResponse(told.to_dict(), told.status, told.headers)


async def stream_response(
    request: Request,
    stream: ChatStream,
    *,
    heartbeat: float | None = 15.0,
    send_timeout: float | None = 300.0,
) -> Response:
    """Return a response that relays a stream as server-sent events, in the form of the OpenAI API.

    It waits for the first delta. If there is none because of an error, the response is JSON with a status, see
    `error_response`; a later error becomes an event, `{"error": ...}`, and no `[DONE]` follows. The stream is left as
    soon as the reader has gone, also while the first delta is awaited.

    Args:
        request: the reader's. What is left of its body is dropped.
        stream: of `client.chat.completions.stream`; whoever began to read it has the beginning.
        heartbeat: seconds of silence after which a comment is sent, and with the first one status 200; `None` sends
            none.
        send_timeout: seconds for which a reader may take nothing before the stream is left; `None` disables the limit.

    Raises:
        RuntimeError: the stream has been read to its end, or is being read elsewhere.
        ConfigurationError: its client is closed, or a limit is no time above 0.
    """
    relay = Relay(stream, heartbeat=heartbeat, send_timeout=send_timeout)
    service = _service(request)
    relays = Relays(None) if service is None else service.relays
    watcher = asyncio.create_task(_watch(request.receive, relay))
    response = _EventStream(relay, relays, watcher)
    relays.begin(relay)
    try:
        refused = await relay.begin()
    except BaseException:
        watcher.cancel()
        raise
    finally:
        relays.forget(relay)
    if refused is None:
        return response
    watcher.cancel()
    return _json(refused)


async def _watch(receive: Receive, relay: Relay) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    relay.reader_left()


class _EventStream(Response):
    """Runs a relay. It knows of the reader's leaving from the start, and not only from when it is sent."""

    def __init__(self, relay: Relay, relays: Relays, watcher: asyncio.Task[None]) -> None:
        self._relay = relay
        self._relays = relays
        self._watcher = watcher
        self.status_code = 200
        self.background: BackgroundTask | None = None
        self.init_headers(HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's
        def write(data: bytes) -> Awaitable[None]:
            return send({"type": "http.response.body", "body": data, "more_body": True})

        relay = self._relay
        self._relays.begin(relay)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            # A task of its own, as Starlette's are: each delta would pass through the coroutine of each middleware.
            await asyncio.create_task(relay.run(write))
            if not relay.left:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            # The server's limit for shutting down has passed. An answer that could be ended properly is no error,
            # of which servers would log one for each stream.
            if not _at_once(send, {"type": "http.response.body", "body": relay.last_words(), "more_body": False}):
                raise
            return
        finally:
            self._relays.forget(relay)
            relay.close()
            self._watcher.cancel()
        if self.background is not None:
            await self.background()


def _at_once(send: Send, message: Message) -> bool:
    """Send a message if that needs no waiting, since who is cancelled would be cancelled again; tell whether."""
    sending: Any = send(message)
    try:
        sending.send(None)
    except StopIteration:
        return True
    except Exception:  # noqa: BLE001 - the server's own; its connection is gone
        return False
    with contextlib.suppress(RuntimeError):  # it waits again while it is closed
        sending.close()
    return False
