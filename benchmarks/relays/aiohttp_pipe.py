"""aiohttp.web, bytes as they come: the floor. Nobody looks at what is relayed."""

from aiohttp import web

from benchmarks.relays.aiohttp_by_hand import BASE_URL, MODEL, with_session
from benchmarks.relays.upstream import REFUSED, STREAM_HEADERS, opened


async def chat(request: web.Request) -> web.StreamResponse:
    asked = await request.json()
    answer = await opened(request.app[MODEL], request.app[BASE_URL], asked["messages"])
    if answer is None:
        return web.json_response(REFUSED, status=502)
    response = web.StreamResponse(headers=STREAM_HEADERS)
    async with answer:
        await response.prepare(request)
        while segment := await answer.content.readany():
            await response.write(segment)
    await response.write_eof()
    return response


def make(base_url: str) -> web.Application:
    app = web.Application()
    app[BASE_URL] = base_url
    app.cleanup_ctx.append(with_session)
    app.router.add_post("/chat", chat)
    return app
