"""aiohttp.web, by hand. `upstream.py` says what it does not do.

A reader that left is noticed when it is written to, which raises.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing

import aiohttp
from aiohttp import web

from benchmarks.relays.upstream import REFUSED, STREAM_HEADERS, events, opened, session

MODEL = web.AppKey("model", aiohttp.ClientSession)
BASE_URL = web.AppKey("base_url", str)


async def with_session(app: web.Application) -> AsyncIterator[None]:
    async with session() as app[MODEL]:
        yield


async def chat(request: web.Request) -> web.StreamResponse:
    asked = await request.json()
    answer = await opened(request.app[MODEL], request.app[BASE_URL], asked["messages"])
    if answer is None:
        return web.json_response(REFUSED, status=502)
    response = web.StreamResponse(headers=STREAM_HEADERS)
    async with aclosing(events(answer)) as relayed:
        await response.prepare(request)
        async for event in relayed:
            await response.write(event)
    await response.write_eof()
    return response


def make(base_url: str) -> web.Application:
    app = web.Application()
    app[BASE_URL] = base_url
    app.cleanup_ctx.append(with_session)
    app.router.add_post("/chat", chat)
    return app
