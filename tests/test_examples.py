"""The examples that the manual shows, run as a reader runs them: a process each, and a browser that is none."""

import asyncio
import io
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import aiohttp
import pytest
import pytest_asyncio
from example_services import EXAMPLES, NAMES, PATIENCE, example, serving

from chatkore_async.testing import ChatKoreServer, Hold, Stall, error, stream

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


class Site:
    """An example, the server that it asks, and how to ask it."""

    def __init__(self, url: str, relay: ChatKoreServer, http: aiohttp.ClientSession) -> None:
        self.url = url
        self.relay = relay
        self.get = lambda path: http.get(url + path)
        self.chat = lambda body=HELLO, **options: http.post(f"{url}/chat", **({"json": body} | options))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sites() -> AsyncIterator[dict[str, Site]]:
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)))
        found = {}
        for name in NAMES:
            relay = await stack.enter_async_context(ChatKoreServer())
            service = await stack.enter_async_context(serving(name, relay.base_url))
            found[name] = Site(await service.listening(), relay, http)
        yield found


@pytest_asyncio.fixture(loop_scope="module", params=NAMES)
async def site(request: pytest.FixtureRequest, sites: dict[str, Site]) -> Site:
    site = sites[request.param]
    site.relay.clear()
    return site


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


class TestThePage:
    async def test_it_is_served_at_the_root(self, site):
        """The URL that the service prints shows the page."""
        async with site.get("/") as answer:
            assert answer.status == 200
            assert answer.content_type == "text/html"
            assert await answer.text() == (EXAMPLES / "page" / "index.html").read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        "file, types",
        [
            ("style.css", {"text/css"}),
            *[(file, {"text/javascript", "application/javascript"}) for file in ("chat.js", "sse.js", "theme.js")],
        ],
    )
    async def test_each_of_its_files_has_its_type(self, site, file, types):
        """A browser runs no module, and applies no style sheet, of another type."""
        async with site.get(f"/{file}") as answer:
            assert answer.status == 200
            assert answer.content_type in types
            assert await answer.read() == (EXAMPLES / "page" / file).read_bytes()

    @pytest.mark.parametrize("path", ["/nothing", "/chat.js/nothing", "/%2e%2e/aiohttp_service.py", "/chat"])
    async def test_what_is_not_there_is_a_404(self, site, path):
        """Nothing but the page's files is served, and a question is no page."""
        async with site.get(path) as answer:
            assert answer.status == 404

    async def test_the_models_are_listed(self, site):
        """The page offers the models that the server has, and knows which one is asked by default."""
        async with site.get("/models") as answer:
            assert answer.status == 200
            found = await answer.json()
        assert found["default"] == "gpt-4o-mini"
        assert found["models"][:2] == ["gpt-4o-mini", "gpt-4o"]


class TestAnAnswer:
    async def test_it_comes_as_it_is_written(self, site):
        """A delta is there before the model has written the next one."""
        go_on = asyncio.Event()
        site.relay.script(stream(["Hel", Hold(go_on), "lo"]))
        async with site.chat() as answer:
            assert answer.status == 200
            assert answer.content_type == "text/event-stream"
            begun = await _until(answer, b'"Hel"')
            assert b'"lo"' not in begun
            go_on.set()
            rest = await answer.content.read()
        assert b'"lo"' in rest
        assert b'"completion_tokens":1' in rest
        assert rest.endswith(b"data: [DONE]\n\n")

    async def test_the_model_is_asked_what_the_page_asks(self, site):
        """Messages and model reach the server, and nothing else that was sent does."""
        messages = [{"role": "system", "content": "Be brief."}, *HELLO["messages"]]
        asked = {"messages": messages, "model": "gpt-4o", "max_tokens": 100_000, "user": "somebody"}
        async with site.chat(asked) as answer:
            assert answer.status == 200
            await answer.read()
        sent = site.relay.requests[0].json
        assert sent["messages"] == messages
        assert sent["model"] == "gpt-4o"
        assert not {"max_tokens", "user"} & set(sent)

    async def test_who_leaves_stops_the_model(self, site):
        """What would be generated for nobody is not generated."""
        site.relay.script(stream(["Hel", Stall()]))
        async with site.chat() as answer:
            await _until(answer, b'"Hel"')
            answer.close()
        assert await site.relay.requests[0].finished(timeout=PATIENCE) == "gone"

    async def test_who_leaves_before_the_first_delta_stops_the_model_too(self, site):
        """The time to the first token may be long, and is paid for as well."""
        site.relay.script(stream([Stall()]))
        asking = asyncio.create_task(_status(site))
        await site.relay.wait_for_requests(1, timeout=PATIENCE)
        asking.cancel()
        await asyncio.wait((asking,))
        assert await site.relay.requests[0].finished(timeout=PATIENCE) == "gone"


class TestErrors:
    @pytest.mark.parametrize(
        "reply, status, words",
        [
            (error(400, "max_tokens is too large"), 400, "max_tokens is too large"),
            (error(404, "no such model"), 404, "no such model"),
            (error(429, "slow down", headers={"retry-after": "90"}), 429, "ask again later"),
            (error(401, "the key of this service is wrong"), 502, "could not answer"),
        ],
    )
    async def test_before_the_first_delta_they_have_a_status(self, site, reply, status, words):
        """The reader learns what is wrong with its request, and nothing of the service's key."""
        site.relay.script(reply)
        async with site.chat() as answer:
            assert answer.status == status
            message = (await answer.json())["error"]["message"]
            assert answer.headers.get("Retry-After") == ("90" if status == 429 else None)
        assert words in message
        assert "key" not in message

    async def test_later_they_are_an_event(self, site):
        """What came before stays, and no [DONE] says that it is whole."""
        site.relay.script(stream(["Hel", b'data: {"error": {"message": "overloaded"}}\n\n'], done=False))
        async with site.chat() as answer:
            assert answer.status == 200
            told = await answer.read()
        assert b'"Hel"' in told
        assert told.rstrip().splitlines()[-1].startswith(b'data: {"error":')

    async def test_the_list_of_models_has_them_too(self, site):
        """A list that cannot be had is told of as an answer is."""
        site.relay.respond_with(lambda _: error(401, "the key of this service is wrong"))
        async with site.get("/models") as answer:
            assert answer.status == 502
            assert "could not answer" in (await answer.json())["error"]["message"]


class TestBadInput:
    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"Hello",
            b"[]",
            b"{}",
            b'{"messages": []}',
            b'{"messages": ["Hello"]}',
            b'{"messages": [{"role": "user"}]}',
            b'{"messages": [{"role": "tool", "content": "Hello"}]}',
            b'{"messages": [{"role": "user", "content": 7}]}',
            b'{"messages": [{"role": "user", "content": "\xff"}]}',
            b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
            b'{"messages": [{"role": "user", "content": "Hello"}], "model": ""}',
            b'{"messages": [' + b",".join([b'{"role": "user", "content": ""}'] * 201) + b"]}",
            b'{"messages": [{"role": "user", "content": "' + b"a" * 100_001 + b'"}]}',
            b"[" * 500_000,
            b'{"nested": ' + b'{"a":' * 100_000,
        ],
        ids=lambda body: f"{body[:60]!r}",
    )
    async def test_it_is_refused_in_words(self, site, body):
        """Whatever is sent, the answer is a 400 with a message, and the model is not asked."""
        async with site.chat(json=None, data=body, headers={"Content-Type": "application/json"}) as answer:
            assert answer.status == 400
            told = (await answer.json())["error"]
        assert told["type"] == "invalid_request_error"
        assert len(told["message"]) < 500
        assert site.relay.requests == []

    async def test_more_than_is_allowed_is_not_read(self, site):
        """A body over the limit is a 413, also where its length is not announced."""

        async def endless():
            while True:
                yield b"a" * 65536

        headers = {"Content-Type": "application/json"}
        async with site.chat(json=None, data=io.BytesIO(b"a" * 2**21), headers=headers) as answer:
            assert answer.status == 413
        # The answer may come while we still write, or with the end of the connection.
        try:
            async with site.chat(json=None, data=endless(), headers=headers) as answer:
                assert answer.status == 413
        except aiohttp.ClientConnectionError:
            pass
        async with site.chat() as answer:
            assert answer.status == 200

    @pytest.mark.parametrize(
        "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"]
    )
    async def test_a_page_of_another_site_cannot_ask(self, site, kind):
        """The types that a browser sends anywhere without asking are refused, so that no other site spends the money."""
        body = b'{"messages": [{"role": "user", "content": "Hello"}]}'
        async with site.chat(json=None, data=body, headers={"Content-Type": kind}) as answer:
            assert answer.status == 400
            assert "application/json" in (await answer.json())["error"]["message"]
        assert site.relay.requests == []


class TestLife:
    async def test_it_can_be_read_at_a_sitting(self, name):
        """An example is one file, and not a long one."""
        assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 120

    async def test_ctrl_c_ends_it(self, name):
        """It ends at once and says nothing of exceptions."""
        async with ChatKoreServer() as relay, serving(name, relay.base_url) as service:
            assert await service.interrupt() in {0, 130}
            assert "Traceback" not in service.output

    async def test_ctrl_c_lets_an_answer_end(self, name):
        """An answer that is being written is written to its end, within the time that it is given."""
        go_on = asyncio.Event()
        async with ChatKoreServer() as relay, serving(name, relay.base_url) as service:
            relay.script(stream(["Hel", Hold(go_on), "lo"]))
            url = await service.listening()
            async with aiohttp.ClientSession() as http, http.post(f"{url}/chat", json=HELLO) as answer:
                await _until(answer, b'"Hel"')
                ending = asyncio.create_task(service.interrupt())
                await _refusing(url)
                go_on.set()
                assert (await answer.content.read()).endswith(b"data: [DONE]\n\n")
            assert await ending in {0, 130}
            assert "Traceback" not in service.output

    async def test_without_a_key_it_says_so_in_a_line(self, name):
        """What is missing and where to put it, and nothing else."""
        async with example(name, "--port", "0", CHATKORE_API_KEY="") as service:
            assert await service.ended() == 1
            assert len(service.output.splitlines()) == 1
            assert "no API key: set the environment variable CHATKORE_API_KEY" in service.output

    async def test_with_a_base_url_that_is_none_it_says_so_in_a_line(self, name):
        """As for the key."""
        async with example(name, "--port", "0", CHATKORE_API_KEY="any", CHATKORE_BASE_URL="nonsense") as service:
            assert await service.ended() == 1
            assert len(service.output.splitlines()) == 1
            assert "base_url must begin with" in service.output

    async def test_a_port_that_is_taken_is_no_traceback(self, name):
        """The port is named; it comes from the option or from the environment."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            async with example(name, CHATKORE_API_KEY="any", PORT=port) as service:
                assert await service.ended() != 0
                assert port in service.output
                assert "Traceback" not in service.output

    async def test_what_went_wrong_is_in_the_log(self, name):
        """The reader is told little of an error behind the service, its operator everything but the key."""
        async with ChatKoreServer(api_key="another") as relay, serving(name, relay.base_url) as service:
            url = await service.listening()
            async with aiohttp.ClientSession() as http:
                async with http.post(f"{url}/chat", json=HELLO) as answer:
                    assert answer.status == 502
                async with http.get(f"{url}/models") as answer:
                    assert answer.status == 502
            assert await service.interrupt() in {0, 130}
            assert service.output.count("AuthenticationError: 401") == 2
            assert "sk-test" not in service.output
            assert "Traceback" not in service.output


async def _until(answer: aiohttp.ClientResponse, wanted: bytes) -> bytes:
    """Read until this has come, and return all that has."""
    read = b""
    while wanted not in read:
        part = await answer.content.readany()
        assert part, read
        read += part
    return read


async def _status(site: Site) -> int:
    async with site.chat() as answer:
        return answer.status


async def _refusing(url: str) -> None:
    """Wait until a service takes no more connections: then its port can be bound, though not while it listens."""
    host, _, port = url.removeprefix("http://").partition(":")
    async with asyncio.timeout(PATIENCE):
        while True:
            with socket.socket() as other:
                # A connection, to see whether it is taken, could be the last that is, and nobody would close it.
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    other.bind((host, int(port)))
                except OSError:
                    await asyncio.sleep(0)
                else:
                    return
