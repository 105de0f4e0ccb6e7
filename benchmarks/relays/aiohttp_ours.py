"""aiohttp.web with our integration."""

from aiohttp import web

from benchmarks.relays import MODEL
from chatkore_async import Limits
from chatkore_async.integrations.aiohttp_web import cleanup_ctx, get_client, stream_response


async def chat(request: web.Request) -> web.StreamResponse:
    asked = await request.json()
    stream = get_client(request).chat.completions.stream(model=MODEL, messages=asked["messages"])
    return await stream_response(request, stream)


def make(base_url: str) -> web.Application:
    app = web.Application()
    app.cleanup_ctx.append(cleanup_ctx(api_key="key", base_url=base_url, limits=Limits(max_connections=None)))
    app.router.add_post("/chat", chat)
    return app
