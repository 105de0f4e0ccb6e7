"""The way from the session alone to the client, one thing more in each step; see `python -m benchmarks.steps`.

They use what the client is made of, private as it is, and do nothing that the client does not do.
"""

from collections.abc import AsyncGenerator
from typing import Any

from benchmarks.adapters import MESSAGES, MODEL
from benchmarks.adapters.session import Client as Session
from chatkore_async import AsyncChatKore, Limits
from chatkore_async._accumulate import Accumulator
from chatkore_async._codec import decode_chunk_strictly, encode_request
from chatkore_async._notes import Head, Notes
from chatkore_async._protocol import read_completion
from chatkore_async._sse import Decoder

HEAD = Head(200, {})
LIMIT = 2**28


# A call.


class Typed(Session):
    """The request checked by decoding it, and the answer decoded into all its declared fields."""

    async def call(self) -> str | None:
        fields = {"model": MODEL, "messages": MESSAGES}
        body = encode_request(fields, stream=False, extra_body=None)
        response = await self._session.post(self._url, data=body, allow_redirects=False)
        return read_completion(HEAD, await response.content.read()).text


class Pooled:
    """The same through the pool: places, connections that are counted, errors of ours, the answer's head noted down."""

    def __init__(self, base_url: str) -> None:
        self._client = AsyncChatKore(api_key="key", base_url=base_url, limits=Limits(max_connections=None))

    async def close(self) -> None:
        await self._client.close()

    async def call(self) -> str | None:
        return await self.create(model=MODEL, messages=MESSAGES)

    async def create(self, **fields: Any) -> str | None:
        completions = self._client.chat.completions
        settings, outgoing, _ = completions._prepare(None, fields, stream=False)
        route, notes = self._client._route(settings), Notes(started=0.0, began=0.0)
        pool = route.pool
        pool.slots.take()
        body = pool.answered(await route.request(outgoing, None), None, notes, whole=True)
        assert isinstance(body, bytes)
        return read_completion(notes, body).text


# A stream.


class Yielding(Session):
    """Each delta handed out by an async generator, in place of a loop that keeps it to itself."""

    async def stream(self) -> int:
        deltas = 0
        async for chunk in self.chunks():
            if chunk.choices:
                deltas += 1
        return deltas


class Framed(Yielding):
    """The rules of event streams, and all declared fields of a chunk."""

    async def chunks(self) -> AsyncGenerator[Any]:
        response, feed = await self.opened(), Decoder(LIMIT).feed
        while segment := await response.content.readany():
            for event in feed(segment):
                if event != b"[DONE]":
                    yield decode_chunk_strictly(event)


class Merged(Yielding):
    """The bytes kept with each chunk, and all chunks merged into a completion."""

    async def chunks(self) -> AsyncGenerator[Any]:
        response, feed, merged = await self.opened(), Decoder(LIMIT).feed, Accumulator()
        while segment := await response.content.readany():
            for event in feed(segment):
                if event != b"[DONE]":
                    chunk = decode_chunk_strictly(event)
                    chunk._raw = event
                    merged.pending.append(chunk)
                    yield chunk
            merged.merge()
