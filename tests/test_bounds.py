"""A hostile server cannot make the client hold more than its limits say: each bound, with the memory that was taken.

The client runs in an interpreter of its own, whose peak of resident memory is read from the system. The server sends
until the client leaves, and never more than `MOST` bytes.
"""

import asyncio
import json
import sys
import zlib
from collections.abc import AsyncIterator, Callable
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")

MiB = 2**20
MOST = 1024 * MiB
"""Bytes that an attack sends at most."""

Attack: TypeAlias = Callable[[], AsyncIterator[bytes]]

CHILD = """
import asyncio, json, sys
from chatkore_async import *

def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(name))

async def main(url, way, limits, timeout):
    question = dict(model="m", messages=[{"role": "user", "content": "Hello"}])
    settings = dict(limits=Limits(**limits), timeout=Timeout(**timeout), max_retries=0)
    async with AsyncChatKore(api_key="sk-test", base_url=url, **settings) as client:
        await client.chat.completions.create(**question)
        before = memory("VmRSS")
        try:
            if way == "call":
                await client.chat.completions.create(**question)
            else:
                async with client.chat.completions.stream(**question) as stream:
                    async for chunk in stream:
                        pass
        except APIError as error:
            told = dict(
                kind=type(error).__name__, message=str(error), hint=error.hint, status=getattr(error, "status_code", None),
                body=len(str(getattr(error, "body", None) or "")), partial=error.partial and len(error.partial.text),
            )
        else:
            told = dict(kind=None)
        print(json.dumps(told | dict(grown=memory("VmHWM") - before)))

asyncio.run(main(*json.loads(sys.argv[1])))
"""

HELLO = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 70\r\n\r\n{"choices":[{"message":{"content":"Hello"},"finish_reason":"stop"}]}  '


class Hostile:
    """A server that answers a first request, and attacks at the second."""

    def __init__(self, attack: Attack) -> None:
        self._attack = attack
        self._asked = 0
        self.sent = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line[16:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")
                )
                await reader.readexactly(length)
                self._asked += 1
                if self._asked == 1:
                    writer.write(HELLO)
                    continue
                async for piece in self._attack():
                    writer.write(piece)
                    self.sent += len(piece)
                    await writer.drain()
                    if self.sent > MOST:
                        break
                return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has left
        finally:
            writer.close()


async def attacked(
    attack: Attack, way: str, limits: dict[str, Any] | None = None, timeout: dict[str, float] | None = None
) -> dict[str, Any]:
    """Return what a client made of an attack, the MiB by which it grew, and the MiB that it was sent."""
    hostile = Hostile(attack)
    server = await asyncio.start_server(hostile, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    arguments = json.dumps([url, way, limits or {}, {"total": 60.0} | (timeout or {})])
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await child.communicate()
    server.close()
    assert child.returncode == 0, err.decode()
    return {**json.loads(out), "sent": hostile.sent / MiB}


def forever(head: bytes, piece: bytes) -> Attack:
    """Send a head, then the same again and again."""

    async def attack() -> AsyncIterator[bytes]:
        yield head
        while True:
            yield piece

    return attack


def answer(status: str, kind: str, *more: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Type: {kind}", *more, "", ""]).encode()


JSON = answer("200 OK", "application/json")
STREAM = answer("200 OK", "text/event-stream")


SMALL = {"max_body_size": 8 * MiB, "max_event_size": 8 * MiB}
DELTA = b'data: {"choices":[{"index":0,"delta":{"content":"' + b"x" * 1000 + b'"}}]}\n\n'
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
CHUNKED = answer("200 OK", "application/json", "Transfer-Encoding: chunked")


def once(head: bytes, piece: bytes, times: int, tail: bytes) -> Attack:
    """Send a head, the same so many times, and a tail."""

    async def attack() -> AsyncIterator[bytes]:
        yield head
        for _ in range(times):
            yield piece
        yield tail

    return attack


def numbered(template: bytes) -> Attack:
    """Send events that differ by a number."""

    async def attack() -> AsyncIterator[bytes]:
        yield STREAM
        for start in count(step=1000):
            yield b"".join(template.replace(b"%d", b"%d" % number) for number in range(start, start + 1000))

    return attack


def bomb(head: bytes) -> Attack:
    """Send a thousand times as much as it looks."""
    compressor = zlib.compressobj(9, wbits=31)
    packed = b"".join(compressor.compress(b" " * MiB) for _ in range(64))
    return forever(head, packed)


def drip(head: bytes) -> Attack:
    """Send a byte now and then."""

    async def attack() -> AsyncIterator[bytes]:
        yield head
        while True:
            await asyncio.sleep(0.01)  # the attack is in the time it takes
            yield b" "

    return attack


@pytest.mark.parametrize(
    "head, piece",
    [
        (b"HTTP/1.1 200 OK\r\n", b"X-Flood: " + b"y" * 1000 + b"\r\n"),
        (b"HTTP/1.1 200 OK\r\nX-Flood: ", b"y" * 65536),
        (b"HTTP/1.1 200 ", b"y" * 65536),
    ],
    ids=["many headers", "one header", "status line"],
)
async def test_headers_without_end(head: bytes, piece: bytes) -> None:
    """A head that does not end is refused by aiohttp, whose bounds are 8 KiB a line and 128 lines."""
    seen = await attacked(forever(head, piece), "call")
    assert seen["kind"] == "InvalidResponseError"
    assert "not HTTP" in seen["message"]
    assert len(seen["message"]) < 500
    assert seen["grown"] < 40


@pytest.mark.parametrize("way", ["call", "stream"])
async def test_interim_answers_without_end(way: str) -> None:
    """Answers that announce the answer (1xx) are waited for no longer than the deadline allows."""
    seen = await attacked(forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000), way, timeout={"total": 0.5})
    assert seen["kind"] == "APITimeoutError"
    assert seen["grown"] < 40


@pytest.mark.parametrize("way", ["call", "stream"])
async def test_an_error_of_a_gibibyte(way: str) -> None:
    """Of an error's body 64 KiB are read and kept, and the connection is closed."""
    seen = await attacked(forever(answer("500 Oops", "text/plain"), b"y" * 65536), way)
    assert (seen["kind"], seen["status"], seen["body"]) == ("InternalServerError", 500, 65536)
    assert len(seen["message"]) < 1100
    assert seen["grown"] < 4
    assert seen["sent"] < 100


@pytest.mark.parametrize(
    "attack",
    [
        forever(JSON, b'"yyyyyyyy' * 6553),
        forever(STREAM + b"data: ", b"y" * 65536),
        forever(STREAM + b": ", b"y" * 65536),
        forever(STREAM, b"data: y\n" * 8000),
        forever(STREAM, DELTA * 60),
        bomb(answer("200 OK", "application/json", "Content-Encoding: gzip")),
        bomb(answer("200 OK", "text/event-stream", "Content-Encoding: gzip")),
    ],
    ids=["JSON", "a line", "a comment", "lines", "deltas", "a gzip bomb", "a gzip bomb of events"],
)
@pytest.mark.parametrize("way", ["call", "stream"])
async def test_an_answer_without_end(way: str, attack: Attack) -> None:
    """An answer is read up to `max_body_size`, a stream's events all together, whatever they were compressed to."""
    seen = await attacked(attack, way, SMALL)
    if "body is incomplete" in seen["message"]:
        # aiohttp 3.13 breaks off by itself what decompresses to more than 32 MiB at once, and takes as much.
        assert seen["grown"] < 80
    else:
        assert seen["kind"] == "InvalidResponseError"
        assert "(8388608 bytes)" in seen["message"]
        assert seen["hint"] in ("raise Limits.max_body_size", "raise Limits.max_event_size")
        assert seen["grown"] < 8 * 3 + 8
    assert seen["sent"] < 100
    if way == "stream" and seen["partial"]:
        assert seen["partial"] > 7 * MiB, "what came before the limit was met is not lost"


@pytest.mark.parametrize(
    "piece",
    [
        b": yyyyyyyyyyyyyyyyyyyyyy\n\n" * 3000,
        b"yyyyyyyyyyyyyyyyyyyyyyyyyy\n\n" * 3000,
        b"data:\n\n" * 9000,
        b"\n" * 65536,
    ],
    ids=["comments", "lines that are no fields", "empty events", "empty lines"],
)
async def test_nothing_without_end(piece: bytes) -> None:
    """Comments and other noise are thrown away, and end with the wait for an event."""
    seen = await attacked(forever(STREAM, piece), "stream", timeout={"idle": 0.5})
    assert seen["kind"] == "StreamStalledError"
    assert seen["grown"] < 16


async def test_chunks_without_a_delta() -> None:
    """Of chunks that say nothing 10,000 are held for the first delta, no more."""
    seen = await attacked(forever(STREAM, ROLE * 300), "stream")
    assert seen["kind"] == "InvalidResponseError"
    assert "10,000 chunks and no delta" in seen["message"]
    assert seen["grown"] < 32


@pytest.mark.parametrize(
    "attack",
    [
        numbered(b'data: {"choices":[{"index":%d,"delta":{"content":"x"}}]}\n\n'),
        numbered(b'data: {"choices":[{"delta":{"tool_calls":[{"index":%d,"id":"c%d","function":{"name":"f"}}]}}]}\n\n'),
        forever(STREAM, b'data: {"choices":[{"delta":{"annotations":[' + b"{}," * 9999 + b'{}],"content":"x"}}]}\n\n'),
        forever(
            STREAM,
            b'data: {"choices":[{"delta":{"content":"x"},"logprobs":{"content":[' + b"{}," * 9999 + b"{}]}}]}\n\n",
        ),
    ],
    ids=["choices", "tool calls", "annotations", "log probabilities"],
)
async def test_parts_without_end(attack: Attack) -> None:
    """What takes more memory than bytes, since each is an object, is limited to 250,000 of all kinds."""
    seen = await attacked(attack, "stream")
    assert seen["kind"] == "InvalidResponseError"
    assert "more than 250,000 choices, tool calls" in seen["message"]
    assert seen["grown"] < 256


@pytest.mark.parametrize(
    "attack",
    [
        once(answer("200 OK", "application/json") + b'{"choices":[', b"{}," * 65536, 100, b"{}]}"),
        once(answer("200 OK", "application/json") + b'{"x":[', b"[]," * 65536, 100, b'[]],"choices":[7]}'),
        once(answer("200 OK", "application/json"), b"[" * 65536, 100, b""),
        once(STREAM + b'data: {"choices":[', b"{}," * 65536, 100, b"{}]}\n\n"),
        once(STREAM + DELTA + b"data: ", b"[" * 65536, 100, b"\n\n"),
    ],
    ids=["choices", "arrays", "deep", "choices in an event", "deep in an event"],
)
@pytest.mark.parametrize("way", ["call", "stream"])
async def test_a_crowded_message(way: str, attack: Attack) -> None:
    """A message of more than a million objects, of next to no bytes each, is refused before it is decoded."""
    seen = await attacked(attack, way)
    assert seen["kind"] == "InvalidResponseError"
    assert "is made of more than 1,000,000 objects and arrays" in seen["message"]
    assert seen["grown"] < seen["sent"] * 5 + 8  # the bytes in pieces and joined; decoded it were a hundred times that


async def test_a_byte_now_and_then() -> None:
    """A server that keeps the connection busy with single bytes does not get past a deadline."""
    seen = await attacked(drip(JSON), "call", timeout={"total": 0.4})
    assert seen["kind"] == "APITimeoutError"
    seen = await attacked(drip(STREAM), "stream", timeout={"idle": 0.3})
    assert seen["kind"] == "StreamStalledError"


@pytest.mark.parametrize("head", [CHUNKED + b"5;ext=", CHUNKED + b"0\r\nX-T: "], ids=["extension", "trailer"])
async def test_framing_without_end(head: bytes) -> None:
    """What HTTP allows around the chunks of a body is not kept."""
    seen = await attacked(forever(head, b"y" * 65536), "call", timeout={"total": 1.0})
    assert seen["kind"] in ("APIConnectionError", "APITimeoutError", "InvalidResponseError")
    assert seen["grown"] < 16
