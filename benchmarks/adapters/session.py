"""The operations by hand, on a session that is set up as the client sets up its own: how far it could go.

Not among the adapters of the table; see `python -m benchmarks.steps`.
"""

from collections.abc import AsyncGenerator
from typing import Any

import aiohttp

from benchmarks.adapters import MESSAGES, MODEL
from benchmarks.adapters.plain import HEADERS, decode_chunk, decode_completion, encode


class Client:
    def __init__(self, base_url: str) -> None:
        self._url = base_url + "/chat/completions"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            headers=HEADERS,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def close(self) -> None:
        await self._session.close()

    async def call(self) -> str | None:
        body = encode({"model": MODEL, "messages": MESSAGES})
        response = await self._session.post(self._url, data=body, allow_redirects=False)
        return decode_completion(await response.content.read()).choices[0].message.content

    async def opened(self) -> aiohttp.ClientResponse:
        """Ask for a stream."""
        body = encode({"model": MODEL, "messages": MESSAGES, "stream": True})
        return await self._session.post(self._url, data=body, allow_redirects=False)

    async def stream(self) -> int:
        response = await self.opened()
        deltas = 0
        buffer = b""
        while segment := await response.content.readany():
            *events, buffer = (buffer + segment).split(b"\n\n")
            for event in events:
                if event != b"data: [DONE]" and decode_chunk(event[6:]).choices:
                    deltas += 1
        return deltas

    async def chunks(self) -> AsyncGenerator[Any]:
        """The chunks of a stream, one by one."""
        response = await self.opened()
        buffer = b""
        while segment := await response.content.readany():
            *events, buffer = (buffer + segment).split(b"\n\n")
            for event in events:
                if event != b"data: [DONE]":
                    yield decode_chunk(event[6:])

    async def texts(self) -> AsyncGenerator[str]:
        async for chunk in self.chunks():
            for choice in chunk.choices:
                yield choice.delta.content or ""
