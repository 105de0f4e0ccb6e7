"""FastAPI with our integration."""

from typing import Annotated

from fastapi import Depends, FastAPI, Request, Response
from pydantic import BaseModel

from benchmarks.relays import MODEL
from chatkore_async import AsyncChatKore, Limits
from chatkore_async.integrations.fastapi import get_client, lifespan, stream_response


class Asked(BaseModel):
    messages: list[dict[str, str]]


def make(base_url: str) -> FastAPI:
    app = FastAPI(lifespan=lifespan(api_key="key", base_url=base_url, limits=Limits(max_connections=None)))

    @app.post("/chat")
    async def chat(asked: Asked, request: Request, client: Annotated[AsyncChatKore, Depends(get_client)]) -> Response:
        return await stream_response(request, client.chat.completions.stream(model=MODEL, messages=asked.messages))

    return app
