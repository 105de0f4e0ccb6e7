"""The servers that people run their applications with: each in a process of its own, as from a command line.

What a process writes is looked through for tracebacks and for complaints of what was left behind.
"""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from serving import DONE, PATIENCE, Service, asking, connected

from chatkore_async.testing import ChatKoreServer, Stall, stream

APP = """
import asyncio, os, socket
from chatkore_async import AsyncChatKore
URL = os.environ["MODEL_URL"]
ASK = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
SETTINGS = {"api_key": "k", "base_url": URL, "max_retries": 0}
mine = AsyncChatKore(api_key="k", base_url=URL)
if "USE_CLIENT" in os.environ:  # in the parent, where the application is made before workers are forked
    asyncio.run(mine.chat.completions.create(**ASK))
"""
FASTAPI = (
    APP
    + """
from fastapi import FastAPI, Request
from chatkore_async.integrations.fastapi import get_client, lifespan, stream_response
app = FastAPI(lifespan=lifespan(**SETTINGS))

async def relay(request, client):
    response = await stream_response(request, client.chat.completions.stream(**ASK))
    response.headers["x-pid"] = str(os.getpid())
    return response

@app.post("/chat")
async def chat(request: Request):
    return await relay(request, await get_client(request))

@app.post("/mine")
async def chat_with_mine(request: Request):
    return await relay(request, mine)
"""
)
AIOHTTP = (
    APP
    + """
from aiohttp import web
from chatkore_async.integrations.aiohttp_web import cleanup_ctx, get_client, stream_response

async def chat(request):
    return await stream_response(request, get_client(request).chat.completions.stream(**ASK))

async def chat_with_mine(request):
    return await stream_response(request, mine.chat.completions.stream(**ASK))

async def add_pid(request, response):
    response.headers["x-pid"] = str(os.getpid())

async def make():
    app = web.Application()
    app.cleanup_ctx.append(cleanup_ctx(grace=0.1, **SETTINGS))
    app.router.add_post("/chat", chat)
    app.router.add_post("/mine", chat_with_mine)
    app.on_response_prepare.append(add_pid)
    return app

if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    web.run_app(make(), sock=listener, print=None)
"""
)

SERVERS = {
    "uvicorn": (FASTAPI, "-m uvicorn app:app --port 0 --timeout-graceful-shutdown 1"),
    "hypercorn": (FASTAPI, "-m hypercorn app:app --bind 127.0.0.1:0 --graceful-timeout 1"),
    "gunicorn, uvicorn": (FASTAPI, "-m gunicorn app:app --bind 127.0.0.1:0 -k uvicorn_worker.UvicornWorker"),
    "gunicorn, aiohttp": (AIOHTTP, "-m gunicorn app:make --bind 127.0.0.1:0 -k aiohttp.GunicornWebWorker"),
    "run_app": (AIOHTTP, "app.py"),
}
ENDED = (0, -signal.SIGTERM)  # uvicorn passes the signal on to itself when it is done
COMPLAINTS = re.compile(rb"Traceback|never retrieved|never awaited|Unclosed|unclosed|ResourceWarning|was destroyed")


class Process(Service):
    """A server in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        super().__init__(None)
        self.process = process
        self.said = b""

    async def listens(self) -> None:
        """Wait until it says where it listens."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            while not self.port:
                line = await self.process.stdout.readline()
                assert line, f"it did not start: {self.said.decode()}"
                self.said += line
                if found := re.search(rb"http://127\.0\.0\.1:(\d+)", line):
                    self.port = int(found[1])

    async def ends(self) -> int:
        """Tell it to end, and return how it did."""
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            said, _ = await self.process.communicate()
        self.said += said
        assert self.process.returncode is not None
        return self.process.returncode


@contextlib.asynccontextmanager
async def runs(name: str, model: ChatKoreServer, folder: Path, *more: str, **environ: str) -> AsyncIterator[Process]:
    code, arguments = SERVERS[name]
    (folder / "app.py").write_text(code)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "dev", *arguments.split(), *more),
        cwd=folder,
        env={"MODEL_URL": model.base_url, "PATH": "", "PYTHONPATH": str(folder), "HOME": str(folder), **environ},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    service = Process(process)
    try:
        await service.listens()
        yield service
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # its workers, too
            await process.communicate()


async def whole(service: Service, path: str = "/chat") -> str:
    """Ask, and return which process answered."""
    async with asking(service, path=path, close=True) as reader:
        assert await reader.head() == 200
        assert (await reader.data())[-1] == DONE
    return reader.headers["x-pid"]


@pytest.mark.parametrize("name", list(SERVERS))
async def test_a_server_relays_and_notices_who_leaves(name: str, server: ChatKoreServer, tmp_path: Path) -> None:
    """A stream arrives whole, leaving stops the model at any moment, and a server that is told to end does so cleanly."""
    async with runs(name, server, tmp_path) as service:
        await whole(service)
        server.script(stream([Stall()]), stream(["Hi", Stall()]))
        for number in (1, 2):
            async with asking(service) as reader:
                await server.wait_for_requests(number + 1, timeout=PATIENCE)
                if number == 2:
                    assert await reader.head() == 200
                    await reader.event()
                reader.leave()
                assert await server.requests[number].finished(timeout=PATIENCE) == "gone"
        assert await service.ends() in ENDED
    assert not COMPLAINTS.search(service.said), service.said.decode()


# Since Python 3.12, Hypercorn 0.18 waits for its connections (`Server.wait_closed`) before its patience begins to run.
HAS_PATIENCE = ["uvicorn", *(["hypercorn"] if sys.version_info < (3, 12) else []), "gunicorn, aiohttp", "run_app"]


@pytest.mark.parametrize("name", HAS_PATIENCE)
async def test_a_server_that_ends_tells_its_readers(name: str, server: ChatKoreServer, tmp_path: Path) -> None:
    """A stream that outlives the patience of its server ends with an error event, and the server with success."""
    server.always(stream(["Hi", Stall()]))
    async with runs(name, server, tmp_path) as service, asking(service) as reader:
        assert await reader.head() == 200
        await reader.event()
        await reader.event()
        ending = asyncio.create_task(service.ends())
        (last,) = await reader.data()
        assert b"shutting_down" in last
        assert not reader.cut
        assert await ending in ENDED
        assert await server.requests[0].finished(timeout=PATIENCE) == "gone"
    # Hypercorn cancels its own tasks, of which asyncio complains.
    complaint = re.search(rb"chatkore_async", service.said) if name == "hypercorn" else COMPLAINTS.search(service.said)
    assert not complaint, service.said.decode()


@pytest.mark.parametrize("name", ["gunicorn, uvicorn", "gunicorn, aiohttp"])
async def test_forked_workers_have_clients_of_their_own(name: str, server: ChatKoreServer, tmp_path: Path) -> None:
    """An application, and a client that was used, may be made before workers are forked: no connection is shared."""
    async with runs(name, server, tmp_path, "--preload", "--workers", "2", USE_CLIENT="1") as service:
        assert server.request_count == 1
        pids: set[str] = set()
        async with contextlib.AsyncExitStack() as stack:
            # Held open at once, so that both workers have to take some.
            while len(pids) < 2:
                server.script(stream(["Hi", Stall()]))
                reader = await stack.enter_async_context(connected(service))
                await reader.ask()
                assert await reader.head() == 200
                pids.add(reader.headers["x-pid"])
                assert server.request_count < 500
        held = {request.connection for request in server.requests}
        assert len(held) == server.request_count
        for path in ("/chat", "/mine"):
            await asyncio.gather(*[whole(service, path) for _ in range(5)])
        assert await service.ends() == 0
    assert 1 not in {request.connection for request in server.requests[1:]}
    assert not COMPLAINTS.search(service.said), service.said.decode()
