"""`mock_chatkore`, for unit tests of code that calls the client."""

import builtins
from collections.abc import AsyncIterator

import aiohttp
import pytest

from chatkore_async import APIConnectionError, AsyncChatKore, RateLimitError, RetryPolicy
from chatkore_async.testing import Hold, Reset, completion, error, mock_chatkore, stream

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture
async def client() -> AsyncIterator[AsyncChatKore]:
    async with AsyncChatKore(api_key="test-key", retry=RetryPolicy(initial_delay=0)) as client:
        yield client


async def test_an_unscripted_call_is_answered(client: AsyncChatKore) -> None:
    """Code that only needs some answer needs no script."""
    with mock_chatkore():
        answer = await client.chat.completions.create(model="m", messages=MESSAGES)
    assert answer.text
    assert answer.usage is not None


async def test_answers_come_in_the_order_of_the_script(client: AsyncChatKore) -> None:
    """Each request takes the next scripted answer; a retried one takes two."""
    with mock_chatkore() as mock:
        mock.script(completion("one"), error(503), completion("two"))
        texts = [(await client.chat.completions.create(model="m", messages=MESSAGES)).text for _ in range(2)]
        assert texts == ["one", "two"]
        assert len(mock.requests) == 3
        assert repr(mock) == "<ChatKoreMock 3 requests, 0 answers scripted>"


async def test_requests_are_recorded(client: AsyncChatKore) -> None:
    """A test can assert what was asked."""
    with mock_chatkore() as mock:
        await client.chat.completions.create(
            model="m", messages=MESSAGES, temperature=0.5, extra_headers={"x-tenant": "a"}, extra_query={"v": 1}
        )
    [request] = mock.requests
    assert request.method == "POST"
    assert request.url == "https://api.chatkore.com/v1/chat/completions?v=1"
    assert request.json == {"model": "m", "messages": MESSAGES, "temperature": 0.5}
    assert request.headers["x-tenant"] == "a"


async def test_a_stream_is_mocked_too(client: AsyncChatKore) -> None:
    """Streamed answers come through the same decoder as real ones."""
    with mock_chatkore() as mock:
        mock.script(stream(["Hel", "lo"]))
        async with client.chat.completions.stream(model="m", messages=MESSAGES) as chunks:
            assert [chunk.text async for chunk in chunks if chunk.text] == ["Hel", "lo"]
            assert chunks.completeness == "complete"


async def test_models_are_listed(client: AsyncChatKore) -> None:
    """`models.list` works against the mock as against the server."""
    with mock_chatkore():
        assert "gpt-4o-mini" in [model.id for model in await client.models.list()]


async def test_errors_are_those_of_the_client(client: AsyncChatKore) -> None:
    """A scripted status raises what a server's would."""
    with mock_chatkore() as mock:
        mock.script(error(429, "slow down", headers={"retry-after": "61"}))
        with pytest.raises(RateLimitError, match="slow down") as caught:
            await client.chat.completions.create(model="m", messages=MESSAGES)
    assert caught.value.retry_after == 61


async def test_an_exception_in_the_script_plays_a_broken_connection(client: AsyncChatKore) -> None:
    """What aiohttp would raise is mapped, and retried, as on a real connection."""
    with mock_chatkore() as mock:
        mock.script(aiohttp.ServerDisconnectedError(), aiohttp.ServerDisconnectedError())
        with pytest.raises(APIConnectionError, match="2 attempts"):
            await client.chat.completions.create(model="m", messages=MESSAGES)


async def test_a_large_body_is_recorded_whole(client: AsyncChatKore) -> None:
    """Images in base64 reach the record as they reach a server."""
    text = "x" * 1_500_000
    with mock_chatkore() as mock:
        await client.chat.completions.create(model="m", messages=[{"role": "user", "content": text}])
    assert mock.requests[0].json["messages"][0]["content"] == text


@pytest.mark.parametrize("fault", [Hold(None), Reset()])  # type: ignore[arg-type]
def test_faults_that_need_a_connection_are_refused(fault: Hold | Reset) -> None:
    """The mock says at once that it has no connection to break, and names what has."""
    with mock_chatkore() as mock, pytest.raises(TypeError, match="ChatKoreServer"):
        mock.script(stream(["a", fault]))


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without aioresponses the error says which extra brings it."""
    real_import = builtins.__import__

    def without(name: str, *args: object) -> object:
        if name == "aioresponses":
            raise ImportError(name)
        return real_import(name, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"chatkore-async\[testing\]"), mock_chatkore():
        pass
