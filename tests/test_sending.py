"""A request's headers, and requests that are written together by nobody's task."""

import asyncio
import functools
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp
import pytest

from chatkore_async import APIConnectionError, AsyncChatKore
from chatkore_async._sending import Request, TogetherRequest, Writings
from chatkore_async.testing import ChatKoreServer, completion

ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
MANY = 20


class Loop:
    """A loop whose turns end when the test says so."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[..., None], *args: object) -> None:
        self.soon.append(functools.partial(callback, *args))

    def end_turn(self) -> None:
        soon, self.soon = self.soon, []
        for callback in soon:
            callback()


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def writings(loop: Loop) -> Writings:
    return Writings(loop)  # type: ignore[arg-type]


class Tasks:
    """A task factory of the program's own, which notes down what it made tasks of."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        self.made.append(coroutine.__qualname__)
        return asyncio.Task(coroutine, loop=loop, **options)


# Headers.


def names(server: ChatKoreServer) -> list[str]:
    return [name.lower() for name, _ in server.requests[-1].headers.items()]


async def test_cookies_of_a_server_are_not_sent_back() -> None:
    """A relay's load balancer sets them, and calls of an API are not to be told apart by them."""
    async with ChatKoreServer() as server, AsyncChatKore(api_key="k", base_url=server.base_url) as client:
        server.script(completion("one", headers={"set-cookie": "seen=1"}), completion("two"))
        for text in ("one", "two"):
            assert (await client.chat.completions.create(**ASK)).text == text
        assert "cookie" not in names(server)


async def test_headers_arrive_once_and_behind_the_host(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """Servers see what they see of aiohttp: `Host` first, each header once, and what can be decompressed."""
    await client.chat.completions.create(**ASK, extra_headers={"X-Own": "1"})
    seen = names(server)
    assert seen[0] == "host"
    assert sorted(seen) == sorted(set(seen))
    assert set(seen) == {
        *("host", "accept", "accept-encoding", "authorization", "content-length", "content-type", "user-agent", "x-own")
    }
    assert "gzip" in server.requests[-1].headers["Accept-Encoding"]


async def test_headers_of_the_caller_win(server: ChatKoreServer) -> None:
    """Also those that aiohttp or the client would set themselves, in whatever case they are written."""
    given = {"accept-encoding": "identity", "HOST": "elsewhere.example", "user-agent": "mine/1", "Content-type": "x/y"}
    async with AsyncChatKore(api_key="k", base_url=server.base_url, default_headers=given) as client:
        await client.chat.completions.create(**ASK)
    found = server.requests[-1].headers
    assert (found["Accept-Encoding"], found["Host"]) == ("identity", "elsewhere.example")
    assert (found["User-Agent"], found["Content-Type"]) == ("mine/1", "x/y")
    assert sorted(names(server)) == sorted(set(names(server)))


async def test_a_request_without_headers_has_a_host(server: ChatKoreServer) -> None:
    """On a session that has none."""
    async with (
        aiohttp.ClientSession(request_class=Request, skip_auto_headers=["User-Agent"]) as session,
        session.get(f"{server.base_url}/models") as response,
    ):
        assert response.status == 200
    assert names(server) == ["host"]
    request = Request("GET", response.url, loop=asyncio.get_running_loop(), session=session)
    assert list(request.headers) == ["Host"]


# Writing.


@pytest.mark.parametrize("count", [1, MANY])
async def test_a_request_takes_no_task(client: AsyncChatKore, server: ChatKoreServer, count: int) -> None:
    """Whoever makes a call has one task, her own; a task factory of the program's own stays what it is."""
    running, tasks = asyncio.get_running_loop(), Tasks()
    create = client.chat.completions.create
    for _ in range(2):  # the first time, connections are opened
        running.set_task_factory(tasks)
        answers = await asyncio.gather(*(create(**ASK) for _ in range(count)))
        assert running.get_task_factory() is tasks
        running.set_task_factory(None)
        assert all(answer.text for answer in answers)
        assert [name for name in tasks.made if "ClientRequest" in name] == []
    assert len(server.requests) == 2 * count


async def test_a_request_without_a_body_is_sent_at_once(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """There is nothing to write but its head."""
    assert await client.models.list()
    assert server.requests[-1].method == "GET"


async def test_a_call_that_is_cancelled_before_its_request_is_written(
    client: AsyncChatKore, server: ChatKoreServer
) -> None:
    """The request is dropped, the connection closed, and nobody complains."""
    running = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    running.set_exception_handler(lambda _, context: complaints.append(context))
    await client.chat.completions.create(**ASK)
    before = len(server.requests)
    call = asyncio.create_task(client.chat.completions.create(**ASK))
    await asyncio.sleep(0)  # it made its request, and waits for the answer
    call.cancel()
    await asyncio.wait((call,))
    assert call.cancelled()
    await client.chat.completions.create(**ASK)
    assert client.pool.in_use == 0
    assert complaints == []
    assert len(server.requests) <= before + 2


async def test_a_request_that_is_more_than_the_network_takes() -> None:
    """What the transport does not take at once follows as the server reads, and arrives whole."""
    arrived = asyncio.Event()
    go_on = asyncio.Event()
    size = 0

    async def read_late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal size
        arrived.set()
        await go_on.wait()
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        size = len(await reader.readexactly(length))
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"choices":[{"message":{"content":"all of it"}}] }')
        writer.close()

    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    served = await asyncio.start_server(read_late, sock=listening, limit=1024)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    async with AsyncChatKore(api_key="k", base_url=url, max_retries=0) as client, asyncio.timeout(20):
        text = "x" * 500_000
        messages = [{"role": "user", "content": text}]
        call = asyncio.create_task(client.chat.completions.create(model="m", messages=messages))
        await arrived.wait()
        go_on.set()
        assert (await call).text == "all of it"
        assert size > len(text)
    served.close()
    await served.wait_closed()


async def test_a_connection_that_breaks_while_a_request_is_written() -> None:
    """What is still to be written is dropped with it; the call fails as every other does."""
    arrived = asyncio.Event()

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.set()
        writer.transport.abort()

    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    served = await asyncio.start_server(hang_up, sock=listening, limit=1024)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    async with AsyncChatKore(api_key="k", base_url=url, max_retries=0) as client, asyncio.timeout(20):
        messages = [{"role": "user", "content": "x" * 500_000}]
        with pytest.raises(APIConnectionError):
            await client.chat.completions.create(model="m", messages=messages)
        assert arrived.is_set()
        assert client.pool.in_use == 0
    served.close()
    await served.wait_closed()


# The list.


async def noting(done: list[str], name: str, error: BaseException | None = None) -> None:
    done.append(name)
    if error is not None:
        raise error


def test_what_is_due_has_one_turn(loop: Loop, writings: Writings) -> None:
    """All that was put on the list in one turn is written in the next, in order."""
    done: list[str] = []
    assert repr(writings) == "<Writings 0 due>"
    for name in "abc":
        writings._add(noting(done, name))
    assert (done, len(loop.soon), repr(writings)) == ([], 1, "<Writings 3 due>")
    loop.end_turn()
    assert (done, loop.soon) == (["a", "b", "c"], [])


def test_what_waits_goes_on_when_that_is_over(loop: Loop, writings: Writings) -> None:
    """A writing that waits for the network holds up no other."""
    done: list[str] = []
    running = asyncio.new_event_loop()
    waiter = running.create_future()

    async def waiting() -> None:
        done.append("begun")
        done.append(await waiter)

    writings._add(waiting())
    writings._add(noting(done, "b"))
    loop.end_turn()
    assert done == ["begun", "b"]
    waiter.set_result("over")
    running.run_until_complete(asyncio.sleep(0))
    assert done == ["begun", "b"]
    loop.end_turn()
    assert done == ["begun", "b", "over"]
    running.close()


def test_what_lets_others_go_first_has_its_turn_after_them(loop: Loop, writings: Writings) -> None:
    """Waiting for nothing is waiting for the next turn."""
    done: list[str] = []

    async def stepping_back() -> None:
        done.append("begun")
        await asyncio.sleep(0)
        done.append("over")

    writings._add(stepping_back())
    writings._add(noting(done, "b"))
    loop.end_turn()
    assert done == ["begun", "b"]
    while loop.soon:
        loop.end_turn()
    assert done == ["begun", "b", "over"]


async def test_a_server_that_is_asked_whether_to_go_on(server: ChatKoreServer) -> None:
    """The body follows when the server says so."""
    async with AsyncChatKore(
        api_key="k", base_url=server.base_url, default_headers={"Expect": "100-continue"}
    ) as client:
        async with asyncio.timeout(10):
            assert (await client.chat.completions.create(**ASK)).text
        assert client.pool.in_use == 0
    assert server.requests[-1].json == ASK


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError()])
def test_what_stops_the_loop_loses_no_request(loop: Loop, writings: Writings, error: BaseException) -> None:
    """Whoever presses Ctrl-C in the middle stops what she stops; what others asked for is still written."""
    done: list[str] = []
    writings._add(noting(done, "a", error))
    writings._add(noting(done, "b"))
    with pytest.raises(type(error)):
        loop.end_turn()
    assert done == ["a"]
    loop.end_turn()
    assert (done, loop.soon) == (["a", "b"], [])


async def test_other_coroutines_become_tasks() -> None:
    """Whoever else makes a task meanwhile has one that begins in its turn."""
    running = asyncio.get_running_loop()
    done: list[str] = []

    def begun(coroutine: Coroutine[Any, Any, None]) -> Any:
        return Writings(running).begin(running, coroutine)

    task = begun(noting(done, "a"))
    assert done == []
    await task
    assert done == ["a"]
    assert isinstance(task, asyncio.Task)


def test_the_request_of_a_client_is_one_of_these() -> None:
    """A later aiohttp that builds requests differently is noticed here."""
    assert issubclass(TogetherRequest, Request)
    replaced = {name for name in vars(Request) if name.startswith("update")} | {"write_bytes", "send"}
    assert replaced <= set(vars(aiohttp.ClientRequest))
