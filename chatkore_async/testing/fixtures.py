"""Fixtures for pytest: `pytest_plugins = ["chatkore_async.testing.fixtures"]` in your conftest.py.

`chatkore_server` is a running `ChatKoreServer`, `chatkore_client` an `AsyncChatKore` that talks to it.
"""

from collections.abc import AsyncIterator

from chatkore_async import AsyncChatKore, RetryPolicy
from chatkore_async.testing._server import ChatKoreServer

try:
    import pytest_asyncio
except ImportError as cause:
    raise ImportError(
        "chatkore_async.testing.fixtures needs pytest and pytest-asyncio: pip install 'chatkore-async[testing]'"
    ) from cause

__all__ = ["chatkore_client", "chatkore_server"]


@pytest_asyncio.fixture
async def chatkore_server() -> AsyncIterator[ChatKoreServer]:
    """Give a server on the loopback interface, which answers by itself until it is scripted."""
    async with ChatKoreServer() as server:
        yield server


@pytest_asyncio.fixture
async def chatkore_client(chatkore_server: ChatKoreServer) -> AsyncIterator[AsyncChatKore]:
    """Give a client of `chatkore_server`. It retries as the default one does, without waiting in between."""
    retry = RetryPolicy(initial_delay=0.0)
    async with AsyncChatKore(api_key="test-key", base_url=chatkore_server.base_url, retry=retry) as client:
        yield client
