"""LiteLLM, which keeps one client per base URL by itself. Its limits and look-ups are set by the environment."""

from collections.abc import AsyncGenerator
from typing import Any

import litellm

from benchmarks.adapters import MESSAGES, MODEL

litellm.suppress_debug_info = True


class Client:
    def __init__(self, base_url: str) -> None:
        self._options = {
            "model": f"openai/{MODEL}",
            "api_key": "key",
            "api_base": base_url,
            "messages": MESSAGES,
            "timeout": 600,
        }

    async def close(self) -> None:
        close: Any = litellm.close_litellm_async_clients  # type: ignore[attr-defined]  # made when asked for, untyped
        await close()
        litellm.in_memory_llm_clients_cache.flush_cache()  # or the next client is given a closed one

    async def call(self) -> str | None:
        completion = await litellm.acompletion(**self._options)
        text: str | None = completion.choices[0].message.content
        return text

    async def stream(self) -> int:
        deltas = 0
        async for chunk in await litellm.acompletion(**self._options, stream=True):
            if chunk.choices:
                deltas += 1
        return deltas

    async def texts(self) -> AsyncGenerator[str]:
        async for chunk in await litellm.acompletion(**self._options, stream=True):
            for choice in chunk.choices:
                yield choice.delta.content or ""
