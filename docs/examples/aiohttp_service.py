"""A chat page, and behind it a service that streams a model's answers to the browser. With aiohttp alone.

    CHATKORE_API_KEY=sk-... python docs/examples/aiohttp_service.py

Then open http://127.0.0.1:8080. To try it without a key, let `chatkore serve` or `chatkore serve --llm` answer; both
run on your machine and take any key:

    CHATKORE_API_KEY=any CHATKORE_BASE_URL=http://127.0.0.1:8000 python docs/examples/aiohttp_service.py

`--port` or PORT is the port, and CHATKORE_MODEL the model that is asked if the page names none.

The browser never sees the key. But there is no login, so whoever reaches this service spends your money: it listens on
your own machine only.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from chatkore_async import ChatKoreError, ConfigurationError, InvalidRequestError
from chatkore_async.integrations.aiohttp_web import cleanup_ctx, error_response, get_client, stream_response

MODEL = os.environ.get("CHATKORE_MODEL", "gpt-4o-mini")
MAX_BODY = 1024 * 1024  # bytes
PAGE = Path(__file__).parent / "page"

logger = logging.getLogger("chat")


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, msgspec.Meta(max_length=100_000)]


class Question(msgspec.Struct):
    """What the page sends: the conversation so far. Whatever else is in it is left out."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1, max_length=200)]
    model: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] = MODEL


async def chat(request: web.Request) -> web.StreamResponse:
    # A page of another site cannot send this type without asking first, and so cannot spend your money.
    if request.content_type != "application/json":
        raise InvalidRequestError("the body must be JSON, sent with Content-Type: application/json")
    try:
        asked = msgspec.json.decode(await request.read(), type=Question)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not as expected: {error}") from error
    # Nothing is sent before the stream is read, and it is left as soon as the reader leaves.
    stream = get_client(request).chat.completions.stream(
        model=asked.model,
        messages=asked.messages,
        stream_options={"include_usage": True},  # the page shows it
    )
    return await stream_response(request, stream)


async def models(request: web.Request) -> web.Response:
    found = await get_client(request).models.list()
    return web.json_response({"default": MODEL, "models": [model.id for model in found]})


async def page(_: web.Request) -> web.FileResponse:
    return web.FileResponse(PAGE / "index.html")


@web.middleware
async def refusing(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Tell the reader what is wrong with its request, and everything else to the log alone."""
    try:
        return await handler(request)
    except ChatKoreError as error:
        logger.warning("%s %s: %s: %s", request.method, request.path, type(error).__name__, error)
        return error_response(error)


def make_app() -> web.Application:
    app = web.Application(middlewares=[refusing], client_max_size=MAX_BODY)
    app.cleanup_ctx.append(cleanup_ctx())
    app.add_routes([web.get("/", page), web.get("/models", models), web.post("/chat", chat), web.static("/", PAGE)])
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="A chat page and its service, with aiohttp.")
    parser.add_argument("--port", type=int, default=os.environ.get("PORT", "8080"))
    port = parser.parse_args().port
    logging.basicConfig(level=logging.INFO)
    try:
        # Ctrl-C lets answers go on for ten seconds, which is `grace` of cleanup_ctx; then they end with an error event.
        web.run_app(make_app(), host="127.0.0.1", port=port)
    except (ConfigurationError, OSError) as error:
        sys.exit(f"Cannot start: {error}")


if __name__ == "__main__":
    main()
