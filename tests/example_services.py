"""The services of `docs/examples`, each in a process of its own."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
NAMES = ("fastapi_service", "aiohttp_service")
PATIENCE = 60.0
"""Seconds for whatever a busy machine does slowly."""


class Service:
    """A process that runs an example. All that it prints is in `output`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.output = ""
        self._url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.output += line.decode()
            found = re.search(r"unning on (http://127\.0\.0\.1:\d+)", self.output)
            if found and not self._url.done():
                self._url.set_result(found[1])
        if not self._url.done():
            self._url.set_result("")

    async def listening(self) -> str:
        """Return the URL, or an empty one if the process ended before it listened."""
        async with asyncio.timeout(PATIENCE):
            return await asyncio.shield(self._url)

    async def ended(self) -> int:
        """Wait for the end, and return the status."""
        async with asyncio.timeout(PATIENCE):
            await self._reading
            return await self.process.wait()

    async def interrupt(self) -> int:
        """Press Ctrl-C, and return the status."""
        self.process.send_signal(signal.SIGINT)
        return await self.ended()


@asynccontextmanager
async def example(name: str, *options: str, **environment: str | None) -> AsyncIterator[Service]:
    """Run an example in this environment; `None` leaves a variable out. A warning is an error in it."""
    # asyncio's debug mode would add its own remarks on slow callbacks to the output.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONASYNCIODEBUG"}
    given = {name: value for name, value in environment.items() if value is not None}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-W", "error", EXAMPLES / f"{name}.py", *options),
        env={**inherited, "PYTHONUNBUFFERED": "1", **given},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    service = Service(process)
    try:
        yield service
    finally:
        if process.returncode is None:
            process.kill()
        await service.ended()


@asynccontextmanager
async def serving(name: str, base_url: str) -> AsyncIterator[Service]:
    """Run an example that asks this server, and wait until it listens."""
    async with example(name, "--port", "0", CHATKORE_API_KEY="sk-test", CHATKORE_BASE_URL=base_url) as service:
        url = await service.listening()
        assert url, service.output
        yield service
