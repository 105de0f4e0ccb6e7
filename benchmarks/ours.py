"""The operations through the client, everything on."""

from chatkore_async import AsyncChatKore, Limits

MESSAGES = [{"role": "user", "content": "Hello!"}]


class Client:
    """An adapter: a client, and the two operations."""

    def __init__(self, base_url: str) -> None:
        self._client = AsyncChatKore(api_key="key", base_url=base_url, limits=Limits(max_connections=None))

    async def close(self) -> None:
        await self._client.close()

    async def call(self) -> str | None:
        completion = await self._client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES)
        return completion.text

    async def stream(self) -> int:
        deltas = 0
        async with self._client.chat.completions.stream(model="gpt-4o-mini", messages=MESSAGES) as stream:
            async for chunk in stream:
                if chunk.choices:
                    deltas += 1
        return deltas
