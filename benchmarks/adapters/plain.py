"""The same operations written by hand with aiohttp and msgspec: what anyone would write who needs no more."""

from collections.abc import AsyncGenerator

import aiohttp
import msgspec

from benchmarks.adapters import MESSAGES, MODEL


class Message(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    message: Message
    finish_reason: str | None = None


class Completion(msgspec.Struct):
    choices: list[Choice]


class Delta(msgspec.Struct):
    content: str | None = None


class ChunkChoice(msgspec.Struct):
    delta: Delta
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    choices: list[ChunkChoice]


encode = msgspec.json.Encoder().encode
decode_completion = msgspec.json.Decoder(Completion).decode
decode_chunk = msgspec.json.Decoder(Chunk).decode

HEADERS = {"Authorization": "Bearer key", "Content-Type": "application/json"}


class Client:
    def __init__(self, base_url: str) -> None:
        self._url = base_url + "/chat/completions"
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def close(self) -> None:
        await self._session.close()

    async def call(self) -> str | None:
        body = encode({"model": MODEL, "messages": MESSAGES})
        async with self._session.post(self._url, data=body, headers=HEADERS) as response:
            response.raise_for_status()
            return decode_completion(await response.read()).choices[0].message.content

    async def stream(self) -> int:
        body = encode({"model": MODEL, "messages": MESSAGES, "stream": True})
        deltas = 0
        buffer = b""
        async with self._session.post(self._url, data=body, headers=HEADERS) as response:
            response.raise_for_status()
            async for segment in response.content.iter_any():
                *events, buffer = (buffer + segment).split(b"\n\n")
                for event in events:
                    data = event[6:]
                    if data == b"[DONE]":
                        return deltas
                    if decode_chunk(data).choices:
                        deltas += 1
        return deltas

    async def texts(self) -> AsyncGenerator[str]:
        body = encode({"model": MODEL, "messages": MESSAGES, "stream": True})
        buffer = b""
        async with self._session.post(self._url, data=body, headers=HEADERS) as response:
            response.raise_for_status()
            async for segment in response.content.iter_any():
                *events, buffer = (buffer + segment).split(b"\n\n")
                for event in events:
                    data = event[6:]
                    if data == b"[DONE]":
                        return
                    for choice in decode_chunk(data).choices:
                        yield choice.delta.content or ""
