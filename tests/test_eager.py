"""Requests are written at once where they can be, and like all others where they have to wait."""

import asyncio
import io
import json
from typing import Any

import aiohttp
import pytest

from chatkore_async._eager import EagerRequest, begin
from chatkore_async.testing import ChatKoreServer

ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
LARGE = "x" * 8 * 2**20  # more than any buffer on the way


@pytest.fixture
async def session() -> Any:
    async with aiohttp.ClientSession(request_class=EagerRequest) as session:
        yield session


class Tasks:
    """A task factory of the program's own, which notes down what it made tasks of."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        self.made.append(coroutine.__qualname__)
        return asyncio.Task(coroutine, loop=loop, **options)


async def test_a_small_request_takes_no_task(session: aiohttp.ClientSession, server: ChatKoreServer) -> None:
    """What need not wait is written when the request is made."""
    loop, tasks = asyncio.get_running_loop(), Tasks()
    async with session.post(f"{server.base_url}/chat/completions", json=ASK) as response:  # opens the connection
        await response.read()
    loop.set_task_factory(tasks)
    try:
        async with session.post(f"{server.base_url}/chat/completions", json=ASK) as response:
            assert (await response.json())["choices"]
        assert loop.get_task_factory() is tasks
    finally:
        loop.set_task_factory(None)
    assert [name for name in tasks.made if "ClientRequest" in name] == []
    assert [each.json for each in server.requests] == [ASK, ASK]


async def test_a_large_request_waits_for_the_network(session: aiohttp.ClientSession, server: ChatKoreServer) -> None:
    """It arrives whole, in a task of its own."""
    body = json.dumps({**ASK, "messages": [{"role": "user", "content": LARGE}]}).encode()
    async with session.post(f"{server.base_url}/chat/completions", data=io.BytesIO(body)) as response:
        assert response.status == 200
    assert server.requests[0].body == body


async def test_a_request_without_a_body(session: aiohttp.ClientSession, server: ChatKoreServer) -> None:
    """There is nothing to write but its head."""
    async with session.get(f"{server.base_url}/models") as response:
        assert (await response.json())["data"]


async def test_a_large_request_may_be_cancelled(session: aiohttp.ClientSession) -> None:
    """The writing that waits ends with it, and the connection is closed."""
    arrived, over = asyncio.Event(), asyncio.Event()

    async def never_read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.set()
        await over.wait()
        writer.close()

    async def ask(port: int) -> None:
        async with session.post(f"http://127.0.0.1:{port}/", data=io.BytesIO(LARGE.encode())):
            raise AssertionError("nobody answers")

    listener = await asyncio.start_server(never_read, "127.0.0.1", 0)
    before = asyncio.all_tasks()
    asking = asyncio.create_task(ask(listener.sockets[0].getsockname()[1]))
    async with asyncio.timeout(10):
        await arrived.wait()
        asking.cancel()
        await asyncio.wait((asking,))
        assert asking.cancelled()
        over.set()
        await asyncio.gather(*(asyncio.all_tasks() - before), return_exceptions=True)
    listener.close()


async def test_other_coroutines_become_tasks() -> None:
    """Whoever else makes a task meanwhile has one that begins in its turn."""
    loop = asyncio.get_running_loop()
    begun = []

    async def other() -> str:
        begun.append(asyncio.current_task())
        return "done"

    task = begin(loop, other())
    assert begun == []
    assert await task == "done"
    assert begun == [task]
