"""The same operations on the bare protocol: what is left when there is no HTTP library at all.

It knows the one form of an answer that the server of these benchmarks sends, and so it is nothing to build on. It shows
how much of the reference is aiohttp, and how much is sockets, JSON and the event loop.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import cast
from urllib.parse import urlsplit

import msgspec

from benchmarks.adapters import MESSAGES, MODEL


class Message(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    message: Message


class Completion(msgspec.Struct):
    choices: list[Choice]


class ChunkChoice(msgspec.Struct):
    delta: Message


class Chunk(msgspec.Struct):
    choices: list[ChunkChoice]


encode = msgspec.json.Encoder().encode
decode_completion = msgspec.json.Decoder(Completion).decode
decode_chunk = msgspec.json.Decoder(Chunk).decode


class Connection(asyncio.Protocol):
    """One request at a time; the body goes to `take` piece by piece, and `done` is set after the last one."""

    transport: asyncio.Transport
    done: asyncio.Future[None]
    take: Callable[[bytes], None]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self.loop = asyncio.get_running_loop()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionResetError())

    def send(self, request: bytes, take: Callable[[bytes], None]) -> asyncio.Future[None]:
        self.buffer = b""
        self.left: int | None = None  # bytes of a body whose length is known
        self.in_head = True
        self.take = take
        self.done = self.loop.create_future()
        self.transport.write(request)
        return self.done

    def data_received(self, data: bytes) -> None:
        if self.buffer:
            data = self.buffer + data
        at = 0
        if self.in_head:
            end = data.find(b"\r\n\r\n")
            if end == -1:
                self.buffer = data
                return
            head = data[:end].lower()
            if not head.startswith(b"http/1.1 200 "):
                self.done.set_exception(ValueError(head))
                return
            known = head.find(b"content-length:")
            if known != -1:
                self.left = int(head[known + 15 :].split(b"\r\n", 1)[0])
            at = end + 4
            self.in_head = False
        if self.left is None:
            self._chunked(data, at)
        elif len(data) - at < self.left:
            self.buffer = data[at:]
        else:
            self.buffer = b""
            self.take(data[at:])
            self.done.set_result(None)

    def _chunked(self, data: bytes, at: int) -> None:
        find = data.find
        take = self.take
        while (end := find(b"\r\n", at)) != -1:
            size = int(data[at:end], 16)
            begin = end + 2
            if len(data) < begin + size + 2:
                break
            at = begin + size + 2
            if not size:
                self.buffer = b""
                self.done.set_result(None)
                return
            take(data[begin : begin + size])
        self.buffer = data[at:]


class Client:
    def __init__(self, base_url: str) -> None:
        url = urlsplit(base_url)
        self._host, self._port = str(url.hostname), int(url.port or 80)
        self._head = (
            f"POST {url.path}/chat/completions HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            "Authorization: Bearer key\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        ).encode()
        self._idle: list[Connection] = []

    async def close(self) -> None:
        for connection in self._idle:
            connection.transport.close()

    async def _connection(self) -> Connection:
        if self._idle:
            return self._idle.pop()
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(Connection, self._host, self._port))[1]

    def _request(self, **more: object) -> bytes:
        body = encode({"model": MODEL, "messages": MESSAGES, **more})
        return self._head % len(body) + body

    async def call(self) -> str | None:
        connection = await self._connection()
        bodies: list[bytes] = []
        await connection.send(self._request(), bodies.append)
        self._idle.append(connection)
        return decode_completion(bodies[0]).choices[0].message.content

    async def stream(self) -> int:
        connection = await self._connection()
        deltas = 0

        def take(event: bytes) -> None:
            nonlocal deltas
            data = event[6:-2]
            if data != b"[DONE]" and decode_chunk(data).choices:
                deltas += 1

        await connection.send(self._request(stream=True), take)
        self._idle.append(connection)
        return deltas

    async def texts(self) -> AsyncGenerator[str]:
        connection = await self._connection()
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        done = connection.send(self._request(stream=True), queue.put_nowait)
        while (data := (await queue.get())[6:-2]) != b"[DONE]":
            for choice in decode_chunk(data).choices:
                yield choice.delta.content or ""
        await done
        self._idle.append(connection)
