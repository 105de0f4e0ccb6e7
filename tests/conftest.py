"""What all tests share: a relay on the loopback interface, a client of it, and asyncio's debug mode."""

import gc
import os

# Read whenever an event loop is made: coroutines never awaited and slow callbacks are told of.
os.environ["PYTHONASYNCIODEBUG"] = "1"

from collections.abc import AsyncIterator

import hypothesis
import pytest

from chatkore_async import AsyncChatKore, RetryPolicy
from chatkore_async.testing import ChatKoreServer

pytest_plugins = ["chatkore_async.testing.fixtures"]

# A busy machine is slow, not wrong.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.load_profile("default")


def pytest_collection_finish() -> None:
    """Leave what the suite is made of out of every later collection: many tests ask for one, to see what is left."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHATKORE_API_KEY", "CHATKORE_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
async def server() -> AsyncIterator[ChatKoreServer]:
    """A relay that answers as it is told."""
    async with ChatKoreServer() as server:
        yield server


@pytest.fixture
async def client(server: ChatKoreServer) -> AsyncIterator[AsyncChatKore]:
    """A client of `server` that does not wait between retries. Whatever a test did, it leaves nothing behind."""
    async with AsyncChatKore(api_key="sk-test", base_url=server.base_url, retry=RetryPolicy(initial_delay=0)) as client:
        yield client
        assert client.pool.in_use == 0
        assert client.pool.waiting == 0
        if not client.closed:
            assert len(client._manager.pool().deadlines) == 0
