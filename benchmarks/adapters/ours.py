"""The operations through this client, everything on."""

from collections.abc import AsyncGenerator

from benchmarks.adapters import MESSAGES, MODEL
from chatkore_async import AsyncChatKore, Limits


class Client:
    def __init__(self, base_url: str) -> None:
        self._client = AsyncChatKore(api_key="key", base_url=base_url, limits=Limits(max_connections=None))

    async def close(self) -> None:
        await self._client.close()

    async def call(self) -> str | None:
        completion = await self._client.chat.completions.create(model=MODEL, messages=MESSAGES)
        return completion.text

    async def stream(self) -> int:
        deltas = 0
        async with self._client.chat.completions.stream(model=MODEL, messages=MESSAGES) as stream:
            async for chunk in stream:
                if chunk.choices:
                    deltas += 1
        return deltas

    async def texts(self) -> AsyncGenerator[str]:
        async with self._client.chat.completions.stream(model=MODEL, messages=MESSAGES) as stream:
            async for chunk in stream:
                yield chunk.text
