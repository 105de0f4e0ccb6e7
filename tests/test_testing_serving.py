"""The loopback server for others: pages of other origins may call it, and it tells how each request ended."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import aiohttp
import msgspec
import pytest

from chatkore_async.testing import ChatKoreServer, Cut, RecordedRequest, error, raw, stall_after, stream

ASK: dict[str, object] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
PREFLIGHT = {
    "Origin": "http://localhost:3000",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


class TestBrowsers:
    async def test_a_preflight_is_let_through(self, session: aiohttp.ClientSession) -> None:
        """A browser that asks whether a page may call is told that it may, with a key and any other header."""
        async with (
            ChatKoreServer(cors=True, api_key="sk-test") as server,
            session.options(f"{server.base_url}/chat/completions", headers=PREFLIGHT) as response,
        ):
            assert response.status == 204
            assert await response.read() == b""
            assert response.headers["Access-Control-Allow-Origin"] == "*"
            assert "POST" in response.headers["Access-Control-Allow-Methods"].split(", ")
            # The star stands for every header but this one.
            assert response.headers["Access-Control-Allow-Headers"] == "Authorization, *"
            assert int(response.headers["Access-Control-Max-Age"]) > 0
            assert "Access-Control-Allow-Private-Network" not in response.headers

    async def test_pages_of_a_public_network_are_let_through(self, session: aiohttp.ClientSession) -> None:
        """A browser that asks whether a public page may call a private address is told that it may."""
        headers = {**PREFLIGHT, "Access-Control-Request-Private-Network": "true"}
        async with (
            ChatKoreServer(cors=True) as server,
            session.options(f"{server.base_url}/chat/completions", headers=headers) as response,
        ):
            assert response.headers["Access-Control-Allow-Private-Network"] == "true"

    async def test_a_preflight_uses_no_script_up(self, session: aiohttp.ClientSession) -> None:
        """A preflight is answered by the server, neither by the script nor by the responder."""
        seen: list[str] = []
        async with ChatKoreServer(cors=True, handler=lambda request: seen.append(request.method)) as server:
            server.script(error(503))
            url = f"{server.base_url}/chat/completions"
            async with session.options(url, headers=PREFLIGHT) as response:
                assert response.status == 204
            async with session.post(url, json=ASK) as response:
                assert response.status == 503
        assert seen == []

    async def test_every_answer_can_be_read(self, session: aiohttp.ClientSession) -> None:
        """Answers, streams, models, and errors of every kind say that a page may read them, headers included."""
        async with ChatKoreServer(cors=True, api_key="sk-test", max_body_size=1000) as server:
            server.script(error(503, headers={"access-control-allow-origin": "https://one.example"}))
            key = {"Authorization": "Bearer sk-test"}
            url = f"{server.base_url}/chat/completions"
            statuses: list[int] = []
            for method, where, headers, body, origin in [
                ("POST", url, key, ASK, "https://one.example"),
                ("POST", url, key, ASK, "*"),
                ("POST", url, key, {**ASK, "stream": True}, "*"),
                ("POST", url, key, {}, "*"),
                ("POST", url, {}, ASK, "*"),
                ("POST", url, key, {**ASK, "user": "x" * 1000}, "*"),
                ("GET", f"{server.base_url}/models", key, None, "*"),
                ("GET", f"{server.base_url}/nothing", key, None, "*"),
                ("OPTIONS", url, key, None, "*"),  # no preflight, as it asks for no method
            ]:
                async with session.request(method, where, headers=headers, json=body) as response:
                    await response.read()
                    statuses.append(response.status)
                    assert response.headers.getall("Access-Control-Allow-Origin") == [origin]
                    assert response.headers["Access-Control-Expose-Headers"] == "*"
        assert statuses == [503, 200, 200, 400, 401, 413, 200, 404, 404]

    async def test_only_when_asked_for(self, session: aiohttp.ClientSession) -> None:
        """By default no page of another origin may call, so that a test sees the headers it scripted."""
        async with (
            ChatKoreServer() as server,
            session.options(f"{server.base_url}/chat/completions", headers=PREFLIGHT) as response,
        ):
            assert response.status == 404
            assert not [name for name in response.headers if name.lower().startswith("access-control")]


class TestOnEnd:
    async def test_is_called_with_each_request(self, session: aiohttp.ClientSession) -> None:
        """Each request is told of once, when it has ended, with its status and outcome; nothing is kept."""
        ended: list[RecordedRequest] = []
        async with ChatKoreServer(record=False, on_end=ended.append) as server:
            server.script(error(503), stream(["a", Cut()]), raw(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
            for _ in range(3):
                async with session.post(f"{server.base_url}/chat/completions", json=ASK) as response:
                    with suppress(aiohttp.ClientPayloadError):  # the one that is cut
                        await response.read()
            async with session.get(f"{server.base_url}/models") as response:
                assert response.status == 200
            assert server.requests == []
        assert [(request.status, request.outcome) for request in ended] == [
            (503, "answered"),
            (200, "cut"),
            (None, "answered"),
            (200, "answered"),
        ]
        assert [request.method for request in ended] == ["POST", "POST", "POST", "GET"]

    async def test_clients_that_leave(self, session: aiohttp.ClientSession) -> None:
        """A client that leaves before the status is told of, with no status; one that leaves later, with its status."""
        ended: asyncio.Queue[RecordedRequest] = asyncio.Queue()
        async with ChatKoreServer(latency=3600, on_end=ended.put_nowait) as server:
            url = f"{server.base_url}/chat/completions"
            task = asyncio.create_task(session.post(url, json=ASK))
            await server.wait_for_requests(1)
            task.cancel()
            first = await asyncio.wait_for(ended.get(), 30)
            server.script(stall_after(stream("a b"), 20))
            async with session.post(url, json=ASK):
                pass
            second = await asyncio.wait_for(ended.get(), 30)
        assert [(each.status, each.outcome) for each in (first, second)] == [(None, "gone"), (200, "gone")]

    async def test_closing_ends_what_is_running(self, session: aiohttp.ClientSession) -> None:
        """What the server cuts as it closes is told of before `close` returns."""
        ended: list[RecordedRequest] = []
        async with ChatKoreServer(latency=3600, on_end=ended.append) as server:
            task = asyncio.create_task(session.post(f"{server.base_url}/chat/completions", json=ASK))
            await server.wait_for_requests(1)
            await server.close()
            assert [request.outcome for request in ended] == ["cut"]
            with pytest.raises(aiohttp.ClientError):
                await task

    async def test_what_it_raises_is_for_the_test(self, session: aiohttp.ClientSession) -> None:
        """An assertion in it fails the test, not the request; the first one does."""
        problems = iter([AssertionError("first"), AssertionError("second")])

        def fail(_: RecordedRequest) -> None:
            raise next(problems)

        with pytest.raises(AssertionError, match="first"):
            async with ChatKoreServer(on_end=fail) as server:
                for _ in range(2):
                    async with session.get(f"{server.base_url}/models") as response:
                        assert response.status == 200


class TestStream:
    def test_reasoning_comes_first(self) -> None:
        """`reasoning` is streamed before the text, word by word, as `reasoning_content`."""
        reply = stream("So.", reasoning="Let me see.", usage=False, done=False)
        chunks = [msgspec.json.decode(event.removeprefix(b"data: ")) for event in reply.body.split(b"\n\n") if event]
        assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
            {"role": "assistant", "content": ""},
            {"reasoning_content": "Let"},
            {"reasoning_content": " me"},
            {"reasoning_content": " see."},
            {"content": "So."},
            {},
        ]

    def test_id(self) -> None:
        """`id` is in each chunk; without it all scripted answers have the same."""
        assert stream("a", id="chatcmpl-1").body == stream("a").body.replace(b"chatcmpl-scripted", b"chatcmpl-1")
