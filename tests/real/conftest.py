"""Programs that nobody here wrote, started by the test that needs them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from proxies import Certificate, HAProxy, Nginx, Proxy, Start

from chatkore_async.testing import ChatKoreServer


@asynccontextmanager
async def starter(
    kind: type[Proxy], request: pytest.FixtureRequest, server: ChatKoreServer, folder: Path
) -> AsyncIterator[Start]:
    """Give a function that starts a proxy in front of the relay, and stop what it started."""
    started: list[Proxy] = []

    async def start(**options: object) -> Proxy:
        started.append(kind(folder, server.port, **options))
        await started[-1].start()
        return started[-1]

    try:
        yield start
    finally:
        for proxy in started:
            request.node.add_report_section("teardown", f"log of {proxy!r}", proxy.output)
            await proxy.stop()


@pytest.fixture
async def nginx(request: pytest.FixtureRequest, server: ChatKoreServer, tmp_path: Path) -> AsyncIterator[Start]:
    """Start nginx in front of `server`: `proxy = await nginx(location="gzip on;")`."""
    async with starter(Nginx, request, server, tmp_path) as start:
        yield start


@pytest.fixture
async def haproxy(request: pytest.FixtureRequest, server: ChatKoreServer, tmp_path: Path) -> AsyncIterator[Start]:
    """Start HAProxy in front of `server`: `proxy = await haproxy(server="disabled")`."""
    async with starter(HAProxy, request, server, tmp_path) as start:
        yield start


@pytest.fixture(params=[Nginx, HAProxy], ids=["nginx", "haproxy"])
async def start(request: pytest.FixtureRequest, server: ChatKoreServer, tmp_path: Path) -> AsyncIterator[Start]:
    """Start each of them, one after the other, in front of `server`: `proxy = await start(answer_timeout=0.2)`."""
    async with starter(request.param, request, server, tmp_path) as start:
        yield start


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    """What a proxy needs for https."""
    return Certificate(tmp_path)
