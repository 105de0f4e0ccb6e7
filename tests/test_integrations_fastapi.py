"""FastAPI, and Starlette underneath: what is theirs alone. What both frameworks do is in `test_integrations_services`."""

import asyncio
import itertools
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, WebSocket
from serving import (
    ASK,
    DONE,
    PATIENCE,
    Asked,
    Service,
    asking,
    connected,
    fastapi_app,
    quiet,  # noqa: F401 - a fixture
    relaying,
    serving,
    settled,
    uvicorn_runs,
)
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from chatkore_async import AsyncChatKore, ConfigurationError
from chatkore_async.integrations._refusals import SHUTTING_DOWN
from chatkore_async.integrations.fastapi import error_response, get_client, lifespan, stream_response
from chatkore_async.testing import ChatKoreServer, Cut, Hold, Stall, error, stream

KEY = "sk-secret-of-the-service"


@asynccontextmanager
async def running(app: Any) -> AsyncIterator[Service]:
    async with uvicorn_runs(app, Service(app)) as service:
        yield service


async def chat(request: Request) -> Response:
    client = await get_client(request)
    return await stream_response(request, client.chat.completions.stream(**ASK, max_retries=0))


async def whole(service: Service) -> tuple[list[bytes], dict[str, str]]:
    async with asking(service) as reader:
        assert await reader.head() == 200
        return await reader.data(), reader.headers


# The application.


async def test_the_module_docs_tell_what_works(server: ChatKoreServer) -> None:
    """`Depends(get_client)` gives the application's client to HTTP routes."""
    app = FastAPI(lifespan=lifespan(api_key=KEY, base_url=server.base_url))
    clients = []

    @app.post("/chat")
    async def route(request: Request, client: Annotated[AsyncChatKore, Depends(get_client)]) -> Response:
        clients.append(client)
        return await stream_response(request, client.chat.completions.stream(**ASK))

    async with running(app) as service:
        assert (await whole(service))[0][-1] == DONE
        assert (await whole(service))[0][-1] == DONE
    assert clients[0] is clients[1]
    assert clients[0].closed


async def test_starlette_alone_is_enough(server: ChatKoreServer) -> None:
    """Nothing of FastAPI is needed."""
    app = Starlette(
        routes=[Route("/chat", chat, methods=["POST"])], lifespan=lifespan(api_key=KEY, base_url=server.base_url)
    )
    async with running(app) as service:
        assert (await whole(service))[0][-1] == DONE


async def test_an_application_without_our_lifespan(server: ChatKoreServer, client: AsyncChatKore) -> None:
    """`get_client` says what to do, and a stream of any other client can be relayed all the same."""
    problems = []

    async def route(request: Request) -> Response:
        try:
            await get_client(request)
        except ConfigurationError as problem:
            problems.append(str(problem))
        return await stream_response(request, client.chat.completions.stream(**ASK))

    async with running(Starlette(routes=[Route("/chat", route, methods=["POST"])])) as service:
        assert (await whole(service))[0][-1] == DONE
    assert "lifespan=lifespan()" in problems[0]


async def test_a_mounted_application_is_told_of_its_lifespan(server: ChatKoreServer) -> None:
    """Starlette runs no lifespan of an application that is mounted; the message says so."""
    problems = []

    async def route(request: Request) -> Response:
        with pytest.raises(ConfigurationError) as caught:
            await get_client(request)
        problems.append(str(caught.value))
        return error_response(caught.value)

    inner = Starlette(
        routes=[Route("/chat", route, methods=["POST"])], lifespan=lifespan(api_key=KEY, base_url=server.base_url)
    )
    async with running(Starlette(routes=[Mount("/inner", inner)])) as service, connected(service) as reader:
        await reader.ask("/inner/chat")
        assert await reader.head() == 502
    assert "mounted" in problems[0]


async def test_lifespans_are_composed(server: ChatKoreServer) -> None:
    """An application with a lifespan of its own enters ours in it, and has the client from there on."""
    told = []

    @asynccontextmanager
    async def mine(app: FastAPI) -> AsyncIterator[None]:
        told.append("mine starts")
        async with lifespan(api_key=KEY, base_url=server.base_url)(app):
            yield
        told.append("mine ends")

    app = FastAPI(lifespan=mine)
    app.add_api_route("/chat", chat, methods=["POST"], response_model=None)
    async with running(app) as service:
        assert (await whole(service))[0][-1] == DONE
        assert told == ["mine starts"]
    assert told == ["mine starts", "mine ends"]


async def test_it_can_be_tried_without_a_server(server: ChatKoreServer) -> None:
    """Starlette's `TestClient` gets the stream, also as it comes, and a WebSocket has the client."""
    app = fastapi_app(None, relaying(), api_key=KEY, base_url=server.base_url)

    @app.websocket("/talk")
    async def talk(socket: WebSocket, client: Annotated[AsyncChatKore, Depends(get_client)]) -> None:
        await socket.accept()
        async for text in client.chat.completions.stream(**ASK).text_stream:
            await socket.send_text(text)
        await socket.close()

    def tried() -> tuple[list[str], str]:
        with TestClient(app) as client:
            lines = client.post("/chat").text.split("\n\n")
            with client.websocket_connect("/talk") as socket:
                return lines, socket.receive_text()

    server.script(stream("Hi"), stream("Hi"))
    lines, text = await asyncio.to_thread(tried)
    assert lines[-2:] == ["data: [DONE]", ""]
    assert text == "Hi"


def test_without_starlette_the_extra_is_named() -> None:
    """Who did not install the framework learns what to install."""
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'starlette': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "try:\n"
        "    import chatkore_async.integrations.fastapi\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "    print(type(error.__cause__).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "chatkore_async.integrations.fastapi needs FastAPI, or Starlette alone: pip install 'chatkore-async[fastapi]'",
        "ModuleNotFoundError",
    ]
    assert done.stderr == ""


# The response.


async def test_the_response_can_be_added_to(server: ChatKoreServer) -> None:
    """It is a Starlette response: headers, cookies and a status can be set before it is returned."""

    async def handler(asked: Asked) -> Response:
        response: Response = await asked.respond(asked.stream())
        assert isinstance(response, Response)
        response.headers["X-Mine"] = "yes"
        response.set_cookie("seen", "1")
        response.status_code = 201
        return response

    async with serving("fastapi", handler, server.base_url) as service, asking(service) as reader:
        assert await reader.head() == 201
        assert reader.headers["x-mine"] == "yes"
        assert reader.headers["set-cookie"].startswith("seen=1")
        assert (await reader.data())[-1] == DONE


@pytest.mark.parametrize("end", ["whole", "cut", "left"])
async def test_a_background_task_runs_after_the_stream(server: ChatKoreServer, end: str) -> None:
    """What is to be done after the answer is done however the stream ended."""
    server.script(stream(["Hi", Cut() if end == "cut" else Stall()]) if end != "whole" else stream("Hi"))
    ran, kept = asyncio.Event(), []

    async def note() -> None:
        kept.append((await kept[0].aclose(), kept[0].completeness))
        ran.set()

    async def handler(asked: Asked) -> Response:
        kept.append(asked.stream())
        response: Response = await asked.respond(kept[0])
        response.background = BackgroundTask(note)
        return response

    async with serving("fastapi", handler, server.base_url) as service, asking(service) as reader:
        await reader.head()
        await reader.event()
        if end == "left":
            reader.leave()
        async with asyncio.timeout(PATIENCE):
            await ran.wait()
    assert kept[1][1] == {"whole": "complete", "cut": "truncated", "left": None}[end]


# Middleware.


async def _passes(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    response = await call_next(request)
    response.headers["X-Passed"] = "yes"
    return response


def with_middleware(server: ChatKoreServer, middleware: Any, *handler: Any, **options: Any) -> tuple[Service, FastAPI]:
    service = Service(None)
    app = fastapi_app(service, *(handler or (relaying(),)), api_key=KEY, base_url=server.base_url, max_retries=0)
    app.add_middleware(middleware, **options)
    return service, app


@pytest.mark.parametrize("kind", ["base", "gzip"])
async def test_deltas_pass_a_middleware_one_by_one(server: ChatKoreServer, kind: str) -> None:
    """Neither a middleware with `call_next` nor compression gathers the events."""
    options = {"dispatch": _passes} if kind == "base" else {"minimum_size": 1}
    service, app = with_middleware(server, BaseHTTPMiddleware if kind == "base" else GZipMiddleware, **options)
    go = asyncio.Event()
    server.script(stream(["Hi", Hold(go), " you"], usage=False))
    async with uvicorn_runs(app, service), asking(service) as reader:
        await reader.head()
        await reader.event()
        assert b'"Hi"' in await reader.event()
        go.set()
        assert (await reader.data())[-1] == DONE
        assert "content-encoding" not in reader.headers


async def test_an_error_passes_a_middleware(server: ChatKoreServer) -> None:
    """The status and the body are those that the reader would have got without it."""
    service, app = with_middleware(server, BaseHTTPMiddleware, dispatch=_passes)
    server.script(error(400, "Your fault."))
    async with uvicorn_runs(app, service), asking(service) as reader:
        assert await reader.head() == 400
        assert json.loads(await reader.body())["error"]["message"] == "Your fault."
        assert reader.headers["x-passed"] == "yes"


@pytest.mark.parametrize("moment", ["first token", "between deltas"])
@pytest.mark.parametrize("reads", [True, False], ids=["body read", "body not read"])
async def test_a_reader_that_leaves_is_noticed_behind_a_middleware(
    server: ChatKoreServer, moment: str, reads: bool
) -> None:
    """`BaseHTTPMiddleware` stands between the reader and the application, and tells of its leaving in time."""

    async def handler(asked: Asked) -> Response:
        if reads:
            await asked.request.body()
        response: Response = await asked.respond(asked.stream())
        return response

    service, app = with_middleware(server, BaseHTTPMiddleware, handler, dispatch=_passes)
    server.script(stream([Stall()] if moment == "first token" else ["Hi", Stall()]))
    async with uvicorn_runs(app, service):
        async with asking(service) as reader:
            await server.wait_for_requests(1, timeout=PATIENCE)
            if moment != "first token":
                await reader.head()
                await reader.event()
            reader.leave()
            assert await server.requests[0].finished(timeout=PATIENCE) == "gone"
        await service.freed()


# The server's side of ASGI, without a server.


class Connection:
    """What an ASGI server gives to an application: a reader that stays until `leave`, and what was sent to it."""

    def __init__(self, sends: Callable[[Any], Awaitable[None]] | None = None) -> None:
        self.sent: list[Any] = []
        self.sends = sends
        self._gone = asyncio.Event()
        self._asked = False
        self.scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "app": Starlette()}

    async def receive(self) -> Any:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"{}", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.sends is not None:
            await self.sends(message)
        self.sent.append(message)

    def leave(self) -> None:
        self._gone.set()

    def request(self) -> Request:
        return Request(self.scope, self.receive, self.send)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def answered(self, client: AsyncChatKore, **limits: Any) -> None:
        request = self.request()
        response = await stream_response(request, client.chat.completions.stream(**ASK, max_retries=0), **limits)
        await response(self.scope, self.receive, self.send)


async def begun(client: AsyncChatKore, connection: Connection, count: int) -> asyncio.Task[None]:
    """Answer, until so many messages were sent."""
    task = asyncio.create_task(connection.answered(client))
    async with asyncio.timeout(PATIENCE):
        while len(connection.sent) < count:  # noqa: ASYNC110 - not ours to signal
            await asyncio.sleep(0)
    return task


async def test_a_server_that_cancels_lets_the_answer_end(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """When the time to shut down is over, the reader gets an error event and a proper end, and the log no traceback."""
    server.script(stream(["Hi", Stall()]))
    connection = Connection()
    task = await begun(client, connection, 3)
    task.cancel()
    await task
    assert connection.sent[-1] == {"type": "http.response.body", "body": SHUTTING_DOWN.to_event(), "more_body": False}
    assert await server.requests[0].finished() == "gone"


async def test_a_reader_that_takes_nothing_is_cut_by_a_server_that_cancels(
    client: AsyncChatKore, server: ChatKoreServer
) -> None:
    """Where the last words would have to wait, they are not said: the cancellation goes on at once."""
    server.script(stream(["Hi", Stall()]))
    closed = []

    async def blocked(message: Any) -> None:
        if len(connection.sent) >= 3:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                closed.append(message)

    connection = Connection(blocked)
    task = await begun(client, connection, 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed[0]["body"] == SHUTTING_DOWN.to_event()
    assert await server.requests[0].finished() == "gone"


@pytest.mark.parametrize("how", ["fails", "waits again"])
async def test_a_server_whose_connection_is_gone_when_it_cancels(
    client: AsyncChatKore, server: ChatKoreServer, how: str
) -> None:
    """Whatever the server's own `send` does then, the cancellation goes on."""
    server.script(stream(["Hi", Stall()]))

    async def odd(message: Any) -> None:
        if len(connection.sent) >= 3:
            if how == "fails":
                raise ConnectionResetError
            try:
                await asyncio.get_running_loop().create_future()
            except GeneratorExit:
                await asyncio.get_running_loop().create_future()

    connection = Connection(odd)
    task = await begun(client, connection, 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await server.requests[0].finished() == "gone"


@pytest.mark.parametrize(
    "reply", [stream("Hello you"), stream(["Hi", Cut()]), error(500), error(400), stream([Cut()])], ids=repr
)
@pytest.mark.parametrize("heartbeat", [None, 1e-6], ids=["silent", "comments"])
async def test_cancelled_at_any_moment_nothing_is_left_behind(
    client: AsyncChatKore, server: ChatKoreServer, reply: Any, heartbeat: float | None
) -> None:
    """Wherever a request waits when it is cancelled: no connection, task or unread exception outlives it."""
    server.always(reply)
    before = asyncio.all_tasks()

    async def turn(_: Any) -> None:
        await asyncio.sleep(0)

    for moment in itertools.count():
        connection = Connection(turn)
        task = asyncio.create_task(connection.answered(client, heartbeat=heartbeat))
        for _ in range(moment):
            await asyncio.sleep(0)
        done = task.done()
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled() or task.exception() is None
        await settled(client, before)
        if done:
            break


async def test_a_response_of_a_reader_that_left_is_no_work(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """Who leaves while the first token is awaited gets nothing, and the handler returns as if all were well."""
    server.script(stream([Stall()]))
    connection = Connection()
    task = asyncio.create_task(connection.answered(client))
    await server.wait_for_requests(1)
    connection.leave()
    await task
    assert connection.body == b""
    assert await server.requests[0].finished() == "gone"


async def test_a_body_that_nobody_read_is_dropped(server: ChatKoreServer) -> None:
    """A route that does not look at the body of its request still hears of the reader's leaving."""
    server.script(stream(["Hi", Stall()]))
    async with serving("fastapi", relaying(), server.base_url) as service:
        async with asking(service, body=b"x" * 1_000_000) as reader:
            await reader.head()
            await reader.event()
            reader.leave()
            assert await server.requests[0].finished(timeout=PATIENCE) == "gone"
        await service.freed()


async def test_a_stream_that_runs_when_the_application_ends(server: ChatKoreServer) -> None:
    """A server that shuts the application down under its streams does not leave the model running."""
    server.script(stream(["Hi", Stall()]))
    app = fastapi_app(None, relaying(), api_key=KEY, base_url=server.base_url)
    connection = Connection()
    connection.scope["app"] = app
    async with lifespan(api_key=KEY, base_url=server.base_url)(app):
        client = await get_client(connection.request())
        task = await begun(client, connection, 3)
    await task
    assert connection.body.endswith(SHUTTING_DOWN.to_event())
    assert await server.requests[0].finished() == "gone"
