"""Run one application: `python -m benchmarks.relays.serve NAME BASE_URL LOOP`.

It prints its port. From then on each line on standard input is answered with `Look` as JSON, until that ends.
"""

import argparse
import asyncio
import gc
import importlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web

from benchmarks import machine
from benchmarks.relays import RELAYS

BACKLOG = 4096


class Look(msgspec.Struct, frozen=True):
    """What a process has used so far, and has now: seconds of CPU, bytes resident."""

    cpu: float
    resident: int


@asynccontextmanager
async def served_by_uvicorn(app: Any) -> AsyncIterator[int]:
    uvicorn: Any = importlib.import_module("uvicorn")  # not there for who measures aiohttp.web alone
    config = uvicorn.Config(
        app, port=0, log_level="warning", access_log=False, backlog=BACKLOG, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


@asynccontextmanager
async def served_by_aiohttp(app: web.Application) -> AsyncIterator[int]:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=BACKLOG).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def serve(name: str, base_url: str) -> None:
    app = importlib.import_module(f"benchmarks.relays.{name}").make(base_url)
    served = served_by_uvicorn if name in RELAYS["fastapi"] else served_by_aiohttp
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with served(app) as port:
        print(port, flush=True)
        while what := await lines.readline():
            if what == b"collected\n":
                gc.collect()
            print(msgspec.json.encode(Look(machine.cpu(), machine.resident())).decode(), flush=True)


def main() -> None:
    """Parse arguments and serve."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.relays.serve", description=__doc__.split("\n", 1)[0])
    parser.add_argument("name", choices=[name for names in RELAYS.values() for name in names])
    parser.add_argument("base_url")
    parser.add_argument("loop", choices=("asyncio", "uvloop"))
    parser.add_argument("--core", type=int, help="the core to run on (default: any)")
    options = parser.parse_args()
    machine.pin(options.core)
    machine.allow_files()
    runner: Any = importlib.import_module(options.loop)
    runner.run(serve(options.name, options.base_url))


if __name__ == "__main__":
    main()
