"""FastAPI, by hand. `upstream.py` says what it does not do."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import aiohttp
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from benchmarks.relays.upstream import REFUSED, STREAM_HEADERS, events, opened, session


class Asked(BaseModel):
    messages: list[dict[str, str]]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with session() as app.state.model:
        yield


async def get_model(request: Request) -> aiohttp.ClientSession:
    return request.app.state.model


def make(base_url: str) -> FastAPI:
    app = FastAPI(lifespan=lifespan)

    @app.post("/chat")
    async def chat(asked: Asked, model: Annotated[aiohttp.ClientSession, Depends(get_model)]) -> Response:
        answer = await opened(model, base_url, asked.messages)
        if answer is None:
            return JSONResponse(REFUSED, 502)
        # Starlette watches the reader, and cancels what writes when it leaves.
        return StreamingResponse(events(answer), headers=STREAM_HEADERS)

    return app
