"""aiohttp.web: one client for the life of the application, and streams to the browser.

async def chat(request: web.Request) -> web.StreamResponse:
    asked = await request.json()
    stream = get_client(request).chat.completions.stream(model="gpt-4o-mini", messages=asked["messages"])
    return await stream_response(request, stream)

app = web.Application()
app.cleanup_ctx.append(cleanup_ctx(timeout=60))
app.router.add_post("/chat", chat)
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Final, Unpack, cast

from aiohttp import web

from chatkore_async import AsyncChatKore, ChatKoreError, ChatStream, ConfigurationError
from chatkore_async.integrations._refusals import Refusal, refusal
from chatkore_async.integrations._relay import HEADERS, Relay, Relays
from chatkore_async.integrations._service import ClientOptions, Maker, Service

__all__ = ["cleanup_ctx", "error_response", "get_client", "stream_response"]


class _Place:
    """Where a service is while its application runs. An application that has run takes no new keys and no signals."""

    service: Service | None = None


_PLACE: Final = web.AppKey("chatkore_place", _Place)


def cleanup_ctx(
    *, grace: float | None = 10.0, **options: Unpack[ClientOptions]
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Return a context for `app.cleanup_ctx`: the application has one client.

    It is made when the application starts, in each worker process anew, and closed when it has shut down.

    Args:
        grace: seconds for which streams may go on once the application shuts down. Then they end with an error event;
            `None` lets them go on until the runner's `shutdown_timeout` cuts them. So it should be less than that.
        **options: what `AsyncChatKore` takes.

    Raises:
        ConfigurationError: at the start of the application, what `AsyncChatKore` raises, as without a key.
    """
    maker, options = Maker(options, grace), ClientOptions()

    async def run(app: web.Application) -> AsyncIterator[None]:
        if _PLACE not in app:
            app[_PLACE] = _Place()
            # One that is part of another application is told nothing before its clean-up.
            if not app.on_shutdown.frozen:
                app.on_shutdown.append(_stop)
        place = app[_PLACE]
        async with maker.running() as place.service:
            yield
        place.service = None

    return run


async def _stop(app: web.Application) -> None:
    service = app[_PLACE].service
    if service is not None:
        service.relays.stop()


def get_client(request: web.Request) -> AsyncChatKore:
    """Return the application's client, or that of the application it is part of.

    Raises:
        ConfigurationError: neither was started with `cleanup_ctx`.
    """
    service = _service(request)
    if service is None:
        raise ConfigurationError(
            "this application has no client: app.cleanup_ctx.append(cleanup_ctx()) before it is started"
        )
    return service.client


def _service(request: web.Request) -> Service | None:
    place: _Place | None = request.config_dict.get(_PLACE)
    return None if place is None else place.service


def error_response(error: ChatKoreError) -> web.Response:
    """Return the answer to a request that could not be served because of this error, as `stream_response` does.

    The reader is told what is wrong with its request (400, 404, 409, 413, 422), when to come again (429), that the
    model took too long (504), and nothing of all else (502).
    """
    return _json(refusal(error))


def _json(told: Refusal) -> web.Response:
    return web.json_response(told.to_dict(), status=told.status, headers=told.headers)


async def stream_response(
    request: web.Request,
    stream: ChatStream,
    *,
    heartbeat: float | None = 15.0,
    send_timeout: float | None = 300.0,
) -> web.StreamResponse:
    """Relay a stream as server-sent events, in the form of the OpenAI API, and return the response when it is sent.

    If there is no first delta because of an error, the response is JSON with a status, see `error_response`; a later
    error becomes an event, `{"error": ...}`, and no `[DONE]` follows. The stream is left as soon as the reader has
    gone, also while the first delta is awaited.

    Args:
        request: the reader's.
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
    response = web.StreamResponse(headers=HEADERS)
    watch = _Watch(request, relay)
    relays.begin(relay)
    try:
        refused = await relay.begin()
        if refused is not None:
            return _json(refused)
        if not relay.left:
            await response.prepare(request)
            await relay.run(response.write)
        if not relay.left:
            await response.write_eof()
        elif request.transport is not None:
            request.transport.abort()  # a reader that takes nothing would not take the end either
    except ConnectionError:
        relay.reader_left()  # between two writes
    finally:
        relays.forget(relay)
        watch.end()
        relay.close()
    return response


class _Watch(asyncio.Protocol):
    """Tells a relay when its reader leaves. aiohttp says so only to who writes, or by cancelling if it was told to.

    It stands before aiohttp's protocol until `end`, and hears what that hears.
    """

    __slots__ = ("_protocol", "_relay", "_request")

    def __init__(self, request: web.Request, relay: Relay) -> None:
        self._request = request
        self._relay = relay
        transport = request.transport
        if transport is None or transport.is_closing():
            relay.reader_left()
            return
        self._protocol = cast("asyncio.Protocol", transport.get_protocol())
        transport.set_protocol(self)

    def end(self) -> None:
        """Give aiohttp's protocol its place back."""
        # One that is gone knows no protocol any more: behind TLS, even to ask for it is an error.
        transport = self._request.transport
        if transport is not None and transport.get_protocol() is self:
            transport.set_protocol(self._protocol)

    def data_received(self, data: bytes) -> None:
        self._protocol.data_received(data)

    def eof_received(self) -> bool | None:
        return self._protocol.eof_received()

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._protocol.connection_lost(exc)
        self._relay.reader_left()
