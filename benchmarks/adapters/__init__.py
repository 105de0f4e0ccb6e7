"""The libraries, each behind the same verbs. A library is imported by its own module alone."""

import importlib
import importlib.util
from collections.abc import AsyncGenerator
from typing import Literal, Protocol

import msgspec

MODEL = "gpt-4o-mini"
MESSAGES = [{"role": "user", "content": "Hello!"}]


class Client(Protocol):
    """What every adapter has: made with the URL of an API, and used from within an event loop."""

    def __init__(self, base_url: str) -> None: ...

    async def call(self) -> str | None:
        """Ask for a completion, and return its text."""
        ...

    async def stream(self) -> int:
        """Read a stream as an application does that is in a hurry, and return the number of its deltas."""
        ...

    def texts(self) -> AsyncGenerator[str]:
        """Read a stream, and hand out the text of each delta."""
        ...

    async def close(self) -> None:
        """Leave nothing open."""
        ...


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an adapter without importing its library.

    Attributes:
        title: Its name in tables and charts.
        kind: The reference is what all are compared with; the floor is there to show what is left; peers take minutes.
        imports: What a program imports that uses the library.
        needs: The modules that have to be there.
        distributions: What has a version that matters.
    """

    title: str
    kind: Literal["ours", "reference", "floor", "peer"]
    imports: str
    needs: tuple[str, ...]
    distributions: tuple[str, ...]


ADAPTERS = {
    "ours": Adapter(
        title="chatkore_async",
        kind="ours",
        imports="chatkore_async",
        needs=("chatkore_async",),
        distributions=("chatkore-async", "aiohttp", "msgspec", "tenacity"),
    ),
    "plain": Adapter(
        title="aiohttp + msgspec, by hand",
        kind="reference",
        imports="aiohttp, msgspec",
        needs=("aiohttp", "msgspec"),
        distributions=("aiohttp", "msgspec"),
    ),
    "bare": Adapter(
        title="asyncio.Protocol, by hand",
        kind="floor",
        imports="asyncio, msgspec",
        needs=("msgspec",),
        distributions=("msgspec",),
    ),
    "openai": Adapter(
        title="openai",
        kind="peer",
        imports="openai",
        needs=("openai",),
        distributions=("openai", "httpx2", "httpx", "pydantic"),
    ),
    "openai_aiohttp": Adapter(
        title="openai, on aiohttp",
        kind="peer",
        imports="openai, aiohttp",
        needs=("openai", "aiohttp"),
        distributions=("openai", "aiohttp"),
    ),
    "litellm": Adapter(
        title="LiteLLM",
        kind="peer",
        imports="litellm",
        needs=("litellm",),
        distributions=("litellm",),
    ),
}


STEPS = ("session", *(f"steps:{name}" for name in ("Typed", "Pooled", "Yielding", "Framed", "Merged")))
"""What is measured by `python -m benchmarks.steps` alone."""


class MissingLibraryError(Exception):
    """A library that is measured is not installed."""

    def __init__(self, adapter: str) -> None:
        title = ADAPTERS[adapter].title if adapter in ADAPTERS else adapter
        super().__init__(f"{title} is not installed; the extra bench has it: pip install 'chatkore-async[bench]'")


def missing(adapter: str) -> bool:
    """Whether a library of an adapter is not there. Nothing is imported."""
    return any(importlib.util.find_spec(name) is None for name in ADAPTERS[adapter].needs)


def load(adapter: str) -> type[Client]:
    """Import an adapter and with it its library; raise `MissingLibraryError` where that fails."""
    room, _, name = adapter.partition(":")
    try:
        module = importlib.import_module(f"benchmarks.adapters.{room}")
    except ImportError as problem:
        raise MissingLibraryError(adapter) from problem
    client: type[Client] = getattr(module, name or "Client")
    return client
