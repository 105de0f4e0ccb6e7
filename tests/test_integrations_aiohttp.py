"""aiohttp.web: what is its alone. What both frameworks do is in `test_integrations_services`."""

import asyncio
import itertools
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import aiohttp
import pytest
import trustme
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from serving import (
    ASK,
    DONE,
    PATIENCE,
    Asked,
    Service,
    aiohttp_app,
    aiohttp_runs,
    asking,
    connected,
    noise,
    quiet,  # noqa: F401 - a fixture
    relaying,
    serving,
    settled,
)

from chatkore_async import AsyncChatKore, ConfigurationError
from chatkore_async.integrations.aiohttp_web import cleanup_ctx, error_response, get_client, stream_response
from chatkore_async.testing import ChatKoreServer, Cut, Hold, Stall, error, stream

KEY = "sk-secret-of-the-service"


async def chat(request: web.Request) -> web.StreamResponse:
    stream = get_client(request).chat.completions.stream(**ASK, max_retries=0)
    return await stream_response(request, stream)


@asynccontextmanager
async def running(app: web.Application, **options: Any) -> AsyncIterator[Service]:
    async with aiohttp_runs(app, Service(app), **options) as service:
        yield service


async def whole(service: Service, path: str = "/chat") -> list[bytes]:
    async with asking(service, path=path) as reader:
        assert await reader.head() == 200
        return await reader.data()


# The application.


async def test_the_module_docs_tell_what_works(server: ChatKoreServer) -> None:
    """One context, and each handler has the application's client."""
    app = web.Application()
    app.cleanup_ctx.append(cleanup_ctx(api_key=KEY, base_url=server.base_url, timeout=60))
    app.router.add_post("/chat", chat)
    async with running(app) as service:
        assert (await whole(service))[-1] == DONE


async def test_an_application_without_our_context(client: AsyncChatKore) -> None:
    """`get_client` says what to do, and a stream of any other client can be relayed all the same."""
    problems = []

    async def handler(request: web.Request) -> web.StreamResponse:
        with pytest.raises(ConfigurationError) as caught:
            get_client(request)
        problems.append(str(caught.value))
        return await stream_response(request, client.chat.completions.stream(**ASK))

    app = web.Application()
    app.router.add_post("/chat", handler)
    async with running(app) as service:
        assert (await whole(service))[-1] == DONE
    assert "app.cleanup_ctx.append(cleanup_ctx())" in problems[0]


async def test_an_application_that_is_part_of_another_has_its_client(server: ChatKoreServer) -> None:
    """A client of the whole is found from each part, and its streams end in time when the whole shuts down."""
    inner = web.Application()
    inner.router.add_post("/chat", chat)
    outer = web.Application()
    outer.cleanup_ctx.append(cleanup_ctx(grace=0, api_key=KEY, base_url=server.base_url))
    outer.add_subapp("/inner/", inner)
    async with running(outer) as service:
        assert (await whole(service, "/inner/chat"))[-1] == DONE
        server.script(stream(["Hi", Stall()]))
        async with asking(service, path="/inner/chat") as reader:
            await reader.head()
            await reader.event()
            stopping = asyncio.create_task(service.stop())
            assert b"shutting_down" in (await reader.data())[-1]
            await stopping


async def test_a_part_may_have_a_client_of_its_own(server: ChatKoreServer) -> None:
    """Its own comes before that of the whole; its streams go on until the runner cuts them, and nothing is left."""
    async with ChatKoreServer() as other:
        inner, outer = web.Application(), web.Application()
        inner.cleanup_ctx.append(cleanup_ctx(grace=0, api_key=KEY, base_url=other.base_url))
        inner.router.add_post("/chat", chat)
        outer.cleanup_ctx.append(cleanup_ctx(grace=0, api_key=KEY, base_url=server.base_url))
        outer.router.add_post("/chat", chat)
        outer.add_subapp("/inner/", inner)
        async with running(outer, patience=0.1) as service:
            await whole(service)
            await whole(service, "/inner/chat")
            assert (server.request_count, other.request_count) == (1, 1)
            other.script(stream(["Hi", Stall()]))
            async with asking(service, path="/inner/chat") as reader:
                await reader.head()
                await reader.event()
                await service.stop()
                await reader.body()
                assert reader.cut
            assert await other.requests[1].finished(timeout=PATIENCE) == "gone"


async def test_a_request_after_the_end_has_no_client(server: ChatKoreServer) -> None:
    """When the application is over, so is its client."""
    app = aiohttp_app(None, relaying(), api_key=KEY, base_url=server.base_url)
    kept = []

    async def keep(request: web.Request) -> web.Response:
        kept.append(request)
        return web.Response()

    app.router.add_post("/keep", keep)
    async with running(app) as service, asking(service, path="/keep") as reader:
        await reader.head()
        assert not get_client(kept[0]).closed
    with pytest.raises(ConfigurationError, match="no client"):
        get_client(kept[0])


async def test_an_application_that_is_over_may_be_told_to_shut_down(server: ChatKoreServer) -> None:
    """A runner that is cleaned up twice, as by a test and its fixture, finds nothing to do."""
    app = aiohttp_app(None, relaying(), api_key=KEY, base_url=server.base_url)
    async with running(app) as service:
        await whole(service)
    await app.shutdown()


async def test_a_second_start_shuts_down_as_the_first(server: ChatKoreServer) -> None:
    """The grace holds for each start of an application."""
    server.always(stream(["Hi", Stall()]))
    app = aiohttp_app(None, relaying(), grace=0, api_key=KEY, base_url=server.base_url)
    for _ in range(2):
        async with running(app) as service, asking(service) as reader:
            await reader.head()
            await reader.event()
            stopping = asyncio.create_task(service.stop())
            assert b"shutting_down" in (await reader.data())[-1]
            await stopping


# Shutting down.


async def test_a_stream_whose_first_delta_is_awaited_gets_a_503(server: ChatKoreServer) -> None:
    """Nothing was sent yet, so the reader gets a status, and is told to ask again."""
    server.script(stream([Stall()]))
    async with serving("aiohttp", relaying(), server.base_url, grace=0) as service, asking(service) as reader:
        await server.wait_for_requests(1)
        stopping = asyncio.create_task(service.stop())
        assert await reader.head() == 503
        assert reader.headers["retry-after"] == "1"
        assert json.loads(await reader.body())["error"]["code"] == "shutting_down"
        await stopping
        assert await server.requests[0].finished(timeout=PATIENCE) == "gone"


async def test_without_a_grace_the_runner_cuts(server: ChatKoreServer) -> None:
    """`grace=None` lets streams go on until the runner has no patience, and nothing hangs or is left behind."""
    server.script(stream(["Hi", Stall()]))
    running_ = serving("aiohttp", relaying(), server.base_url, grace=None, patience=1)
    async with running_ as service, asking(service) as reader:
        await reader.head()
        await reader.event()
        await service.stop()
        await reader.body()
        assert reader.cut
        assert await server.requests[0].finished(timeout=PATIENCE) == "gone"


# The connection.


@pytest.mark.parametrize("moment", ["first token", "between deltas"])
async def test_handlers_may_be_cancelled_as_well(server: ChatKoreServer, moment: str) -> None:
    """With aiohttp's `handler_cancellation` both tell of the leaving, and the stream is left once."""
    server.script(stream([Stall()] if moment == "first token" else ["Hi", Stall()]))
    options = {"handler_cancellation": True}
    async with serving("aiohttp", relaying(), server.base_url, runner=options) as service:
        async with asking(service) as reader:
            await server.wait_for_requests(1)
            if moment != "first token":
                await reader.head()
                await reader.event()
            reader.leave()
            assert await server.requests[0].finished(timeout=PATIENCE) == "gone"
        await service.freed()


async def test_a_stream_over_tls(server: ChatKoreServer, client: AsyncChatKore) -> None:
    """Leaving and slow readers are noticed behind TLS as well."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    app = aiohttp_app(None, relaying(), api_key=KEY, base_url=server.base_url)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    try:
        url = f"https://localhost:{runner.addresses[0][1]}/chat"
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusting)) as session:
            async with session.post(url, data=b"{}") as answer:
                assert (await answer.read()).endswith(b"data: [DONE]\n\n")
            server.script(stream(["Hi", Stall()]))
            answer = await session.post(url, data=b"{}")
            await answer.content.readuntil(b"\n\n")
            answer.close()
            assert await server.requests[1].finished(timeout=PATIENCE) == "gone"
    finally:
        await runner.cleanup()


async def test_the_protocol_of_the_connection_is_given_back(server: ChatKoreServer) -> None:
    """What stands before aiohttp's protocol while a stream is relayed is gone after it."""
    kept = []

    async def handler(asked: Asked) -> Any:
        kept.append(asked.request.transport.get_protocol())
        server.script(stream("Hi") if len(kept) < 3 else error(400))
        response = await asked.respond(asked.stream())
        kept.append(asked.request.transport.get_protocol())
        return response

    async with serving("aiohttp", handler, server.base_url) as service, connected(service) as reader:
        for _ in range(3):
            await reader.ask()
            await reader.head()
            await reader.body()
    assert len(set(map(id, kept))) == 1
    assert isinstance(kept[0], web.RequestHandler)


async def test_requests_in_a_row_are_answered_in_a_row(server: ChatKoreServer) -> None:
    """A reader that sends its next request before the first is answered (pipelining) gets both answers."""
    go = asyncio.Event()
    server.script(stream(["Hi", Hold(go)], usage=False), stream("You", usage=False))
    async with serving("aiohttp", relaying(), server.base_url) as service, asking(service) as reader:
        await reader.head()
        await reader.event()
        await reader.event()
        head = reader.status, reader.headers
        await reader.ask()
        reader.status, reader.headers = head
        go.set()
        assert (await reader.data())[-1] == DONE
        reader.ended = False
        assert await reader.head() == 200
        assert b'"You"' in (await reader.data())[1]


async def test_a_reader_that_says_no_more_is_no_reader(server: ChatKoreServer) -> None:
    """aiohttp closes the connection of a reader that has closed its half of it; the model is left as well."""
    server.script(stream(["Hi", Stall()]))
    async with serving("aiohttp", relaying(), server.base_url) as service, asking(service) as reader:
        await reader.head()
        await reader.event()
        reader._writer.write_eof()
        assert await server.requests[0].finished(timeout=PATIENCE) == "gone"
        await reader.closed()


async def test_a_reader_that_leaves_with_the_head_of_the_answer(server: ChatKoreServer) -> None:
    """A connection that breaks between two writes is a reader that has left, and not an error."""
    server.script(stream(["Hi", Stall()]))

    async def breaks(request: web.BaseRequest, response: web.StreamResponse) -> None:
        raise ConnectionResetError

    app = aiohttp_app(None, relaying(), api_key=KEY, base_url=server.base_url)
    app.on_response_prepare.append(breaks)
    async with running(app) as service, asking(service) as reader:
        assert await server_left(server) == "gone"
        reader.leave()


async def server_left(server: ChatKoreServer) -> str:
    await server.wait_for_requests(1, timeout=PATIENCE)
    return await server.requests[0].finished(timeout=PATIENCE)


@pytest.mark.parametrize("transport", [None, mock.Mock()], ids=["gone", "closing"])
async def test_a_request_without_a_connection_is_not_worked_for(
    client: AsyncChatKore, server: ChatKoreServer, transport: Any
) -> None:
    """A reader that is known to have left costs nothing: the model is asked nothing, and what is unsent is dropped."""
    request = make_mocked_request("POST", "/chat", app=web.Application())
    request._protocol.transport = transport
    response = await stream_response(request, client.chat.completions.stream(**ASK))
    assert not response.prepared
    assert server.requests == []
    assert transport is None or transport.abort.called


# Cancellation.


@pytest.mark.parametrize(
    "reply", [stream("Hello you"), stream(["Hi", Cut()]), error(500), error(400), stream([Cut()])], ids=repr
)
@pytest.mark.parametrize("heartbeat", [None, 1e-6], ids=["silent", "comments"])
async def test_cancelled_at_any_moment_nothing_is_left_behind(
    client: AsyncChatKore, server: ChatKoreServer, reply: Any, heartbeat: float | None
) -> None:
    """Wherever a handler waits when it is cancelled: no connection, task or unread exception outlives it."""
    server.always(reply)
    noise.expected.append("Unhandled exception")
    before = asyncio.all_tasks()
    moment, over = 0, False
    tasks: list[asyncio.Task[Any]] = []

    async def handler(asked: Asked) -> Any:
        answering = asyncio.create_task(asked.respond(asked.stream(), heartbeat=heartbeat))
        tasks.append(answering)
        for _ in range(moment):
            await asyncio.sleep(0)
        nonlocal over
        over = answering.done()
        answering.cancel()
        await asyncio.wait((answering,))
        assert answering.cancelled() or answering.exception() is None
        await settled(asked.client, before)
        return asked.refuse(ConfigurationError()) if not over else answering.result()

    async with serving("aiohttp", handler, server.base_url) as service:
        for moment in itertools.count():  # noqa: B007 - the handler's
            async with asking(service) as reader:
                await reader.head()
            if over:
                break
    assert len(tasks) > 1


def test_an_error_can_be_answered_by_hand() -> None:
    """`error_response` makes a JSON response of aiohttp's."""
    response = error_response(ConfigurationError("SECRET"))
    assert isinstance(response, web.Response)
    assert (response.status, response.content_type) == (502, "application/json")
    assert b"SECRET" not in response.body
