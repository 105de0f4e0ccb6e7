"""What type checkers must see. Checked by mypy and pyright in strict mode, never run."""

from collections.abc import AsyncIterator
from typing import assert_type

from msgspec import UNSET

from chatkore_async import (
    APIError,
    APITimeoutError,
    AsyncChatKore,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatStream,
    Limiter,
    MapResult,
    MapResults,
    RateLimit,
    RateLimiter,
    RateLimitError,
    RetryPolicy,
    StreamStalledError,
    Timeout,
    estimate_tokens,
)
from chatkore_async.types import Attempt, CallMeta, ChatCompletionParams, Completeness, Model, ToolCall, UserMessage


async def key() -> str:
    return "key"


async def calls(client: AsyncChatKore) -> None:
    completions = client.chat.completions
    whole = await completions.create(model="m", messages=[{"role": "user", "content": "Hello"}])
    assert_type(whole, ChatCompletion)
    assert_type(whole.text, str)
    assert_type(whole.tool_calls, list[ToolCall])
    assert_type(whole.meta, CallMeta)
    assert_type(whole.meta.attempts, tuple[Attempt, ...])
    assert_type(whole.completeness, Completeness)

    # A received message goes back as it is, beside structs and dicts.
    again = await completions.create(
        model="m",
        messages=[UserMessage(content="Hello"), whole.choices[0].message, {"role": "user", "content": "And?"}],
        temperature=0.5,
        stop=["\n"],
        seed=None,
        user=UNSET,
        timeout=Timeout(total=3.0),
        max_retries=1,
        extra_headers={"x-tenant": "a"},
        extra_query={"api-version": "1"},
        extra_body={"top_k": 4},
    )
    assert_type(again, ChatCompletion)

    request = ChatCompletionRequest(model="m", messages=[UserMessage(content="Hello")], max_tokens=5)
    assert_type(await completions.create(request), ChatCompletion)
    assert_type(await completions.create(request, stream=True, timeout=None), ChatStream)
    assert_type(await completions.create(model="m", messages=[], stream=True), ChatStream)
    assert_type(await client.models.list(), list[Model])


async def streams(client: AsyncChatKore) -> None:
    async with client.chat.completions.stream(model="m", messages=[]) as stream:
        assert_type(stream, ChatStream)
        async for chunk in stream:
            assert_type(chunk, ChatCompletionChunk)
            assert_type(chunk.text, str)
            assert_type(chunk.raw, bytes)
        assert_type(stream.completeness, Completeness | None)
        assert_type(stream.snapshot, ChatCompletion)
        assert_type(await stream.get_final_completion(), ChatCompletion)
    texts: AsyncIterator[str] = client.chat.completions.stream(model="m", messages=[]).text_stream
    assert_type(await anext(texts), str)


async def many(client: AsyncChatKore, rows: AsyncIterator[tuple[int, ChatCompletionRequest]]) -> None:
    completions = client.chat.completions
    dicts = ({"model": "m", "messages": [{"role": "user", "content": text}]} for text in "abc")
    async with completions.map(dicts, concurrency=8, ordered=True, on_error="raise") as results:
        assert_type(results, MapResults)
        async for result in results:
            assert_type(result, MapResult)
            assert_type(result.index, int)
            assert_type(result.completion, ChatCompletion | None)
            assert_type(result.error, Exception | None)
            assert_type(result.ok, bool)
    params: list[ChatCompletionParams] = [{"model": "m", "messages": []}]
    request = ChatCompletionRequest(model="m", messages=[])
    pairs = [("a", request), ("b", request)]
    for each in (completions.map(params), completions.map(rows), completions.map([request]), completions.map(pairs)):
        assert_type(await anext(each), MapResult)


def clients() -> None:
    AsyncChatKore(api_key=key)
    shared = RateLimiter(RateLimit(tokens_per_minute=1e5, estimate=estimate_tokens, max_concurrency=3))
    limiter: Limiter = shared
    assert_type(AsyncChatKore(rate_limit=limiter).with_options(rate_limit=RateLimit()), AsyncChatKore)
    AsyncChatKore(rate_limit=60)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    AsyncChatKore(api_key=lambda: "key", timeout=3, retry=RetryPolicy(max_retries=0), proxy=False)
    assert_type(AsyncChatKore().with_options(timeout=None, proxy="http://proxy:3128"), AsyncChatKore)


def errors(error: APIError) -> None:
    assert_type(error.request_id, str | None)
    assert_type(error.partial, ChatCompletion | None)
    if isinstance(error, RateLimitError):
        assert_type(error.retry_after, float | None)
        assert_type(error.status_code, int)
    if isinstance(error, StreamStalledError):
        timeout: APITimeoutError = error
        assert timeout.phase == "idle"


async def mistakes(client: AsyncChatKore, request: ChatCompletionRequest) -> None:
    await client.chat.completions.create(messages=[])  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    await client.chat.completions.create(model=1, messages=[])  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue,reportArgumentType]
    client.chat.completions.map([1])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    client.chat.completions.map([request], on_error="skip")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await client.chat.completions.create(model="m", messages=[], temprature=1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    client.with_options(limits=None)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
