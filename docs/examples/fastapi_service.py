"""A chat page, and behind it a service that streams a model's answers to the browser. With FastAPI.

    CHATKORE_API_KEY=sk-... python docs/examples/fastapi_service.py

Then open http://127.0.0.1:8080. To try it without a key, let `chatkore serve` or `chatkore serve --llm` answer; both
run on your machine and take any key:

    CHATKORE_API_KEY=any CHATKORE_BASE_URL=http://127.0.0.1:8000 python docs/examples/fastapi_service.py

`--port` or PORT is the port, and CHATKORE_MODEL the model that is asked if the page names none.

The browser never sees the key. But there is no login, so whoever reaches this service spends your money: it listens on
your own machine only.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field, ValidationError

from chatkore_async import AsyncChatKore, ChatKoreError, ConfigurationError, InvalidRequestError
from chatkore_async.integrations.fastapi import error_response, get_client, lifespan, stream_response

MODEL = os.environ.get("CHATKORE_MODEL", "gpt-4o-mini")
MAX_BODY = 1024 * 1024  # bytes
PAGE = Path(__file__).parent / "page"


class Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=100_000)


class Question(BaseModel):
    """What the page sends: the conversation so far. Whatever else is in it is left out."""

    messages: list[Message] = Field(min_length=1, max_length=200)
    model: str = Field(MODEL, min_length=1, max_length=200)


async def question(request: Request) -> Question:
    """Read the body, but no more of it than is allowed. FastAPI would read any amount before it looks."""
    # A page of another site cannot send this type without asking first, and so cannot spend your money.
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise InvalidRequestError("the body must be JSON, sent with Content-Type: application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise HTTPException(413)
    try:
        return Question.model_validate_json(bytes(body))
    except ValidationError as error:
        fault = error.errors()[0]
        path = ".".join(["$", *map(str, fault["loc"])])
        raise InvalidRequestError(f"{path}: {fault['msg']}", path=path) from error


app = FastAPI(lifespan=lifespan())
Client = Annotated[AsyncChatKore, Depends(get_client)]


@app.post("/chat")
async def chat(request: Request, asked: Annotated[Question, Depends(question)], client: Client) -> Response:
    messages = [message.model_dump() for message in asked.messages]
    # Nothing is sent before the stream is read, and it is left as soon as the reader leaves.
    usage = {"include_usage": True}  # the page shows it
    stream = client.chat.completions.stream(model=asked.model, messages=messages, stream_options=usage)
    return await stream_response(request, stream)


@app.get("/models")
async def models(client: Client) -> dict[str, object]:
    return {"default": MODEL, "models": [model.id for model in await client.models.list()]}


@app.exception_handler(ChatKoreError)
async def refuse(request: Request, error: ChatKoreError) -> Response:
    """Tell the reader what is wrong with its request, and everything else to the log alone."""
    print(f"{request.method} {request.url.path}: {type(error).__name__}: {error}", file=sys.stderr)
    return error_response(error)


app.mount("/", StaticFiles(directory=PAGE, html=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="A chat page and its service, with FastAPI.")
    parser.add_argument("--port", type=int, default=os.environ.get("PORT", "8080"))
    port = parser.parse_args().port
    try:
        AsyncChatKore()  # opens nothing; uvicorn would show a missing key as a traceback
    except ConfigurationError as error:
        sys.exit(f"Cannot start: {error}")
    # Ctrl-C lets answers go on for ten seconds. Without a limit, one reader could keep the service from ending.
    uvicorn.run(app, host="127.0.0.1", port=port, timeout_graceful_shutdown=10)


if __name__ == "__main__":
    main()
