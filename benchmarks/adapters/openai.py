"""The official client as it comes, with its limits lifted: one client, retries on, httpx below."""

from collections.abc import AsyncGenerator

import httpx2
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from openai.types.chat import ChatCompletionMessageParam

from benchmarks.adapters import MODEL

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello!"}]
NO_LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
# Its limit of 5 s to connect expires with thousands of calls at once, since the event loop is busy.
PATIENT = httpx2.Timeout(600)


class Client:
    def __init__(self, base_url: str, http_client: httpx2.AsyncClient | None = None) -> None:
        http_client = http_client or DefaultAsyncHttpxClient(limits=NO_LIMITS, timeout=PATIENT)
        self._client = AsyncOpenAI(api_key="key", base_url=base_url, http_client=http_client, timeout=PATIENT)

    async def close(self) -> None:
        await self._client.close()

    async def call(self) -> str | None:
        completion = await self._client.chat.completions.create(model=MODEL, messages=MESSAGES)
        return completion.choices[0].message.content

    async def stream(self) -> int:
        deltas = 0
        async with await self._client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True) as stream:
            async for chunk in stream:
                if chunk.choices:
                    deltas += 1
        return deltas

    async def texts(self) -> AsyncGenerator[str]:
        async with await self._client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True) as stream:
            async for chunk in stream:
                for choice in chunk.choices:
                    yield choice.delta.content or ""
