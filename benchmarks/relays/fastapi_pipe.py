"""FastAPI, bytes as they come: the floor. Nobody looks at what is relayed."""

from collections.abc import AsyncGenerator
from typing import Annotated

import aiohttp
from fastapi import Depends, FastAPI, Response
from fastapi.responses import JSONResponse, StreamingResponse

from benchmarks.relays.fastapi_by_hand import Asked, get_model, lifespan
from benchmarks.relays.upstream import REFUSED, STREAM_HEADERS, opened


async def segments(answer: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    async with answer:
        while segment := await answer.content.readany():
            yield segment


def make(base_url: str) -> FastAPI:
    app = FastAPI(lifespan=lifespan)

    @app.post("/chat")
    async def chat(asked: Asked, model: Annotated[aiohttp.ClientSession, Depends(get_model)]) -> Response:
        answer = await opened(model, base_url, asked.messages)
        if answer is None:
            return JSONResponse(REFUSED, 502)
        return StreamingResponse(segments(answer), headers=STREAM_HEADERS)

    return app
