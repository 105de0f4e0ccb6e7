"""The model's side, written by hand with aiohttp and msgspec: what the two services by hand have in common.

What it does: opens the stream, so that a refusal of the model's is a status and no broken stream; cuts the body into
events wherever segments end; decodes each event once, so that the service knows text, finish reason and errors; hands
on the bytes of an event as they came; says whether the stream was finished.

What it deliberately does not do: no comments while the model is silent, no limit for a reader that takes nothing, no
typed errors (whatever the model says is a 502), no deadlines, no retries, no look at who reads while the first delta is
waited for, no merged answer, no shutdown of its own, and it takes only the API's own form: one line of data to an
event, an LF at its end.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import msgspec

from benchmarks.relays import MODEL

DONE = b"data: [DONE]\n\n"
FAILED = b'data: {"error":{"message":"The model broke off.","type":"server_error"}}\n\n'
REFUSED = {"error": {"message": "The model could not answer.", "type": "server_error"}}
STREAM_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Delta(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    delta: Delta
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
    error: msgspec.Raw | None = None


encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Chunk).decode


@asynccontextmanager
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """Have the application's one session."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),  # a stream takes as long as it takes
        headers={"Authorization": "Bearer key", "Content-Type": "application/json"},
        cookie_jar=aiohttp.DummyCookieJar(),
    ) as made:
        yield made


async def opened(
    model: aiohttp.ClientSession, base_url: str, messages: list[dict[str, str]]
) -> aiohttp.ClientResponse | None:
    """Return the model's answer, to be read by `events`, or nothing when it is no stream."""
    body = encode({"model": MODEL, "messages": messages, "stream": True})
    try:
        answer = await model.post(base_url + "/chat/completions", data=body)
    except aiohttp.ClientError:
        return None
    if answer.status != 200:
        answer.close()
        return None
    return answer


async def events(answer: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    """Yield what the reader gets, event by event. Leaving it closes the model's connection, unless it was read out."""
    buffer = b""
    finished = False
    read = answer.content.readany
    async with answer:
        try:
            while segment := await read():
                *found, buffer = (buffer + segment).split(b"\n\n")
                for event in found:
                    data = event[6:]
                    if data == b"[DONE]":
                        yield DONE if finished else FAILED
                        return
                    chunk = decode(data)
                    if chunk.error is not None:
                        yield FAILED
                        return
                    for choice in chunk.choices:
                        if choice.finish_reason is not None:
                            finished = True
                    yield event + b"\n\n"
        except (aiohttp.ClientError, msgspec.DecodeError):
            pass
        yield FAILED
