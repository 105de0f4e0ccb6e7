"""Between us and the network: what is sent, through which proxy, and what becomes of what fails."""

import asyncio
import base64
import gc
import pickle
import socket
import ssl
import subprocess
import sys
import textwrap
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import aiohttp
import pytest
import trustme
from aiohttp import http_exceptions
from aiohttp.abc import AbstractResolver

from chatkore_async import (
    APIConnectionError,
    APIError,
    APITimeoutError,
    AsyncChatKore,
    ConfigurationError,
    InvalidRequestError,
    InvalidResponseError,
    Limits,
    RetryPolicy,
    Timeout,
)
from chatkore_async._foreign import mapped, reason
from chatkore_async._notes import Notes
from chatkore_async._options import Outgoing
from chatkore_async._proxies import checked_proxy, environment_proxy
from chatkore_async.testing import (
    ChatKoreServer,
    Reply,
    Reset,
    Stall,
    completion,
    cut_after,
    error,
    json_reply,
    raw,
    reset_after,
)

KEY = "sk-transport-secret"
ASK = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
async def server() -> AsyncIterator[ChatKoreServer]:
    async with ChatKoreServer() as server:
        yield server


def make(where: "ChatKoreServer | str", **options) -> AsyncChatKore:
    url = where if isinstance(where, str) else where.base_url
    return AsyncChatKore(api_key=KEY, base_url=url, retry=RetryPolicy(initial_delay=0), **options)


async def failure(client: AsyncChatKore, **options) -> APIError:
    """Make a call that fails, and return its error; the key must not be in anything that it drags along."""
    with pytest.raises(APIError) as caught:
        await client.chat.completions.create(**ASK, **options)
    found = caught.value
    assert KEY not in "".join(traceback.TracebackException.from_exception(found, capture_locals=True).format())
    chain: list[BaseException] = []
    step: BaseException | None = found
    while step is not None and step not in chain:  # a resolver that raises one exception twice makes a ring of it
        # What shows the request's headers is not even kept as a context.
        assert not isinstance(step, aiohttp.ClientResponseError)
        chain.append(step)
        step = step.__cause__ or step.__context__
    assert type(pickle.loads(pickle.dumps(found))) is type(found)
    assert "\n" not in str(found)
    return found


def errors(found: APIError) -> list[str | None]:
    return [attempt.error for attempt in found.attempts]


# What is sent.


async def test_exactly_these_headers_are_sent(server: ChatKoreServer) -> None:
    """A request carries what HTTP needs, the key and one honest User-Agent, and nothing that tells a machine apart."""
    async with make(server) as client:
        await client.chat.completions.create(**ASK)
        await client.chat.completions.create(**ASK, stream=True)
    whole, streamed = (dict(request.headers) for request in server.requests)
    from chatkore_async import __version__

    assert whole.pop("Accept-Encoding").startswith("gzip, deflate")  # br and zstd where they are installed
    assert whole == {
        "Host": f"127.0.0.1:{server.port}",
        "Accept": "application/json",
        "Content-Type": "application/json",
        "User-Agent": f"chatkore-async/{__version__}",
        "Authorization": f"Bearer {KEY}",
        "Content-Length": str(len(server.requests[0].body)),
    }
    assert set(streamed) == {*whole, "Accept-Encoding"}
    assert (streamed["Accept"], streamed["Accept-Encoding"]) == ("text/event-stream", "identity")


async def test_the_user_agent_can_be_changed(server: ChatKoreServer) -> None:
    """`default_headers` and `extra_headers` win over our own, whatever the case of their names, and are sent once."""
    async with make(server, default_headers={"user-agent": "mine/1"}) as client:
        await client.chat.completions.create(**ASK)
        await client.chat.completions.create(**ASK, extra_headers={"USER-AGENT": "yours/2"})
    assert [request.headers.getall("User-Agent") for request in server.requests] == [["mine/1"], ["yours/2"]]


@pytest.mark.parametrize("form", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/chat/completions/"])
async def test_every_form_of_the_base_url_reaches_the_path(server: ChatKoreServer, form: str) -> None:
    """The three forms that the vendor's pages show, with or without a slash, all reach `/v1/chat/completions`."""
    async with make(f"http://127.0.0.1:{server.port}{form}") as client:
        await client.chat.completions.create(**ASK)
    assert server.requests[0].path == "/v1/chat/completions"


async def test_another_base_path_is_kept(server: ChatKoreServer) -> None:
    """A gateway's own prefix stays in front of the path."""
    async with make(f"http://127.0.0.1:{server.port}/proxy/openai/v1/") as client:
        await client.chat.completions.create(**ASK, extra_query={"a b": "c&d"})
    assert server.requests[0].path == "/proxy/openai/v1/chat/completions"
    assert server.requests[0].query == {"a b": "c&d"}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(server: ChatKoreServer, status: int) -> None:
    """A redirect is an error that names its goal: the key goes to no other host, and a POST becomes no GET."""
    async with ChatKoreServer() as other, make(server) as client:
        goal = f"{other.base_url}/chat/completions"
        server.always(Reply(status=status, headers=(("Location", goal), ("Content-Length", "0"))))
        found = await failure(client)
        assert goal in f"{found} {getattr(found, 'headers', {})}"
        assert other.connections == []
        with pytest.raises(APIError):
            server.respond_with(lambda _: Reply(status=status, headers=(("Location", goal),)))
            await client.models.list()
        assert other.connections == []


async def test_no_cookie_is_kept(server: ChatKoreServer) -> None:
    """A cookie that an answer sets is not sent back: calls tell nothing of each other."""
    async with make(server) as client:
        server.script(completion(headers={"Set-Cookie": "session=1; Path=/"}))
        await client.chat.completions.create(**ASK)
        await client.chat.completions.create(**ASK)
    assert "Cookie" not in server.requests[1].headers


async def test_the_netrc_is_never_read(server: ChatKoreServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Passwords that lie in `.netrc` for the host are not sent, nor do they take the place of the key."""
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))
    async with make(server) as client:
        await client.chat.completions.create(**ASK)
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("size", [10, 600_000, 1_500_000, 5_000_000])
async def test_large_bodies(server: ChatKoreServer, size: int) -> None:
    """A prompt of megabytes (images, documents) arrives whole, with its length, and without a warning of aiohttp's."""
    async with make(server) as client:
        await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * size}])
        await client.chat.completions.create(**ASK)
        assert client.pool.created == 1
    large, small = server.requests
    assert large.json["messages"][0]["content"] == "x" * size
    assert large.headers["Content-Length"] == str(len(large.body))
    assert set(large.headers) == set(small.headers)


async def test_a_large_body_is_sent_anew_by_a_retry(server: ChatKoreServer) -> None:
    """A retry sends the whole prompt again, not what the first attempt left of it."""
    server.script(error(503))
    async with make(server) as client:
        await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 1_500_000}])
    assert len({request.body for request in server.requests}) == 1
    assert len(server.requests) == 2


@pytest.mark.parametrize("value", ["a\x00b", "\udcff"])
async def test_a_header_that_cannot_be_sent(server: ChatKoreServer, value: str) -> None:
    """A header that HTTP cannot carry is the caller's mistake: no attempt is repeated, and nothing arrives."""
    async with make(server) as client:
        with pytest.raises((InvalidRequestError, ConfigurationError)) as caught:
            await client.chat.completions.create(**ASK, extra_headers={"X-Name": value})
        assert KEY not in "".join(
            traceback.TracebackException.from_exception(caught.value, capture_locals=True).format()
        )
        assert client.pool.in_use == 0
        await client.chat.completions.create(**ASK)
    assert server.request_count == 1


async def test_a_session_whose_header_cannot_be_sent(server: ChatKoreServer) -> None:
    """A header of a session's that HTTP cannot carry fails the call as what it is, is not retried, and costs no place."""
    async with aiohttp.ClientSession(headers={"X-Trace": "a\r\nb"}) as session:
        client = make(server, session=session)
        with pytest.raises(InvalidRequestError, match="the request cannot be sent"):
            await client.chat.completions.create(**ASK)
        assert client.pool.in_use == 0
    assert server.request_count == 0


# What fails before a request is sent.


async def test_a_refused_connection_is_retried_and_named() -> None:
    """A port where nobody listens: not sent, so it is tried again, and the error names host and port."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        async with make(f"http://127.0.0.1:{port}") as client:
            found = await failure(client)
    assert type(found) is APIConnectionError
    assert f"could not connect to 127.0.0.1:{port}" in str(found)
    assert errors(found) == ["APIConnectionError"] * 3
    assert isinstance(found.__cause__, aiohttp.ClientConnectorError)


class Deaf:
    """A port whose queue is full, so that the system answers no further handshake."""

    def __enter__(self) -> int:
        self._sockets = [socket.socket()]
        self._sockets[0].bind(("127.0.0.1", 0))
        self._sockets[0].listen(0)
        address = self._sockets[0].getsockname()
        for _ in range(8):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(address)
            self._sockets.append(filler)
        return address[1]

    def __exit__(self, *_: object) -> None:
        for each in self._sockets:
            each.close()


async def test_a_connect_timeout() -> None:
    """A host that does not answer handshakes is given up after `Timeout.connect`, and tried again."""
    with Deaf() as port:
        async with make(f"http://127.0.0.1:{port}", timeout=Timeout(connect=0.01)) as client:
            found = await failure(client)
            assert client.pool.in_use == 0
    assert isinstance(found, APITimeoutError)
    assert (found.phase, errors(found)) == ("connect", ["APITimeoutError"] * 3)
    assert f"could not connect to 127.0.0.1:{port} within 0.01 s" in str(found)


async def test_a_total_timeout_while_connecting() -> None:
    """A total that passes while the connection opens says that it was the connection."""
    with Deaf() as port:
        async with make(f"http://127.0.0.1:{port}", timeout=0.03) as client:
            found = await failure(client)
    assert isinstance(found, APITimeoutError)
    assert found.phase == "connect"


async def test_a_caller_who_cancels_while_connecting_is_heard() -> None:
    """A cancellation in the very moment of a connect timeout stays a cancellation."""
    with Deaf() as port:
        async with make(f"http://127.0.0.1:{port}", timeout=Timeout(connect=0.02)) as client:
            call = asyncio.create_task(client.chat.completions.create(**ASK))
            pool = client._manager.pool()
            while not pool.is_connecting(call):  # noqa: ASYNC110 - a state, not an event
                await asyncio.sleep(0)
            opening = pool.connector.opening[call]
            opening.give_up(RuntimeError("late"))
            opening.give_up(RuntimeError("later"))  # once is enough
            call.cancel()
            await asyncio.wait([call])
            assert call.cancelled()
            late = asyncio.create_task(client.chat.completions.create(**ASK))
            while not pool.is_connecting(late):  # noqa: ASYNC110 - a state, not an event
                await asyncio.sleep(0)
            late.cancel()
            await asyncio.wait([late])
            assert late.cancelled()
            assert client.pool.in_use == 0


async def test_a_connection_may_take_its_time(server: ChatKoreServer) -> None:
    """`Timeout(connect=None)` sets no limit to the opening of a connection."""
    async with make(server, timeout=Timeout(connect=None)) as client:
        await client.chat.completions.create(**ASK)


class Names(AbstractResolver):
    """A resolver that answers as it is told, so that no test asks a real one."""

    def __init__(self, answer: Exception | None = None) -> None:
        self._answer = answer
        self.asked = asyncio.Event()

    async def resolve(self, host, port=0, family=socket.AF_INET):
        self.asked.set()
        if self._answer is None:
            await asyncio.Event().wait()
        raise self._answer

    async def close(self) -> None:
        pass


async def test_a_name_without_an_address() -> None:
    """A host name that does not resolve is named, and `base_url` pointed at; it is tried again."""
    connector = aiohttp.TCPConnector(resolver=Names(OSError(None, "no such name")))
    async with aiohttp.ClientSession(connector=connector) as session:
        found = await failure(make("http://nowhere.example", session=session))
    assert type(found) is APIConnectionError
    assert "the host nowhere.example has no address: no such name" in str(found)
    assert found.hint == "check base_url"
    assert len(found.attempts) == 3


async def test_a_connect_timeout_of_a_callers_session() -> None:
    """`Timeout.connect` holds for a session of the caller's as well."""
    with Deaf() as port:
        async with aiohttp.ClientSession() as session:
            found = await failure(make(f"http://127.0.0.1:{port}", session=session, timeout=Timeout(connect=0.01)))
    assert isinstance(found, APITimeoutError)
    assert found.phase == "connect"


async def test_a_look_up_that_ends_with_the_client() -> None:
    """A call that waits for the address of its host ends with a clear error when the client is closed."""
    names = Names()
    async with make("http://nowhere.example", timeout=Timeout(connect=None)) as client:
        client._manager.pool().connector._resolver = names
        calls = [asyncio.create_task(client.chat.completions.create(**ASK)) for _ in range(3)]
        await names.asked.wait()
        await asyncio.sleep(0)
    for call in calls:
        with pytest.raises(ConfigurationError, match="client was closed"):
            await asyncio.wait_for(call, 2)


async def test_a_connector_closed_under_a_look_up() -> None:
    """The end of a loop cancels look-ups; whoever waits for one is told, and not cancelled out of nowhere."""
    names = Names()
    async with make("http://nowhere.example", timeout=Timeout(connect=None)) as client:
        client._manager.pool().connector._resolver = names
        calls = [asyncio.create_task(client.chat.completions.create(**ASK)) for _ in range(3)]
        await names.asked.wait()
        await asyncio.sleep(0)
        await client._manager.pool().session.close()
        for call in calls:
            with pytest.raises(ConfigurationError, match="client was closed"):
                await asyncio.wait_for(call, 2)


def test_out_of_file_descriptors() -> None:
    """With no descriptor left the error names `ulimit -n`; when there are some again, the same client works."""
    script = """
    import asyncio, logging, os, resource, socket
    logging.getLogger("asyncio").addFilter(lambda record: " took " not in record.getMessage())
    from chatkore_async import AsyncChatKore, APIConnectionError
    from chatkore_async.testing import ChatKoreServer
    ASK = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
    async def main():
        async with ChatKoreServer() as server, AsyncChatKore(
            api_key="k", base_url=server.base_url, max_retries=0
        ) as client:
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            taken = []
            try:
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                pass
            try:
                await client.chat.completions.create(**ASK)
            except APIConnectionError as error:
                assert error.message == "out of file descriptors", error
                assert "ulimit -n" in str(error), error
                assert error._retryable == "yes"
            else:
                raise AssertionError("it worked")
            for each in taken:
                os.close(each)
            await client.chat.completions.create(**ASK)
            assert client.pool.in_use == 0
    asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "said,expected",
    [
        (Reply(status=502, steps=(b"<html><title>Bad &amp; Gateway</title></html>",)), "502: Bad &"),
        (error(429, "slow down"), "slow down"),
        (Reply(steps=(b'{"id":',)), "its JSON is incomplete"),
        (Reply(steps=(b"\xef\xbb\xbf" + completion("Hello").body,)), "Hello"),
    ],
)
async def test_what_a_server_says_is_read_without_a_file_descriptor(
    server: ChatKoreServer, said: Reply, expected: str
) -> None:
    """A first error often comes when thousands of connections are open; reading it must not need to open a file."""
    script = """
    import asyncio, os, resource, sys
    from chatkore_async import APIError, AsyncChatKore
    ASK = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
    async def main():
        async with AsyncChatKore(api_key="k", base_url=sys.argv[1], max_retries=0) as client:
            await client.chat.completions.create(**ASK)
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            try:
                while True:
                    os.open(os.devnull, os.O_RDONLY)
            except OSError:
                pass
            try:
                print((await client.chat.completions.create(**ASK)).text)
            except APIError as error:
                print(error)
    asyncio.run(main())
    """
    server.script(completion("Hello"), said)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(script), server.base_url, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await child.communicate()
    assert expected in out.decode()
    assert child.returncode == 0


# What fails after it.


async def test_garbage_instead_of_http(server: ChatKoreServer) -> None:
    """An answer that is no HTTP is an `InvalidResponseError`; it may have been billed, so one retry follows."""
    server.always(raw(b"SSH-2.0-OpenSSH_9.6\r\n"))
    async with make(server) as client:
        found = await failure(client)
    assert isinstance(found, InvalidResponseError)
    assert "is not HTTP" in str(found)
    assert len(found.attempts) == 2


async def test_a_reset_before_a_byte(server: ChatKoreServer) -> None:
    """A connection that is reset before any answer is one more attempt, once."""
    server.script(raw(Reset()))
    async with make(server) as client:
        answer = await client.chat.completions.create(**ASK)
        assert [attempt.error for attempt in answer.meta.attempts] == ["APIConnectionError", None]
        server.always(raw(Reset()))
        found = await failure(client)
    assert "the connection broke: Connection reset by peer" in str(found)
    assert len(found.attempts) == 2


async def test_an_end_before_a_byte(server: ChatKoreServer) -> None:
    """A connection that just closes before any answer is reported as what it is."""
    server.always(raw())
    async with make(server) as client:
        found = await failure(client)
    assert "the connection broke: Server disconnected" in str(found)
    assert len(found.attempts) == 2


@pytest.mark.parametrize("fault", [cut_after, reset_after], ids=["cut", "reset"])
async def test_a_body_that_breaks_off(server: ChatKoreServer, fault) -> None:
    """A body that ends before its length is an `APIConnectionError`, and the connection is not used again."""
    server.always(fault(completion("x" * 300), 40))
    async with make(server) as client:
        found = await failure(client)
        assert type(found) is APIConnectionError
        assert "the connection broke" in str(found)
        assert len(found.attempts) == 2
        assert client.pool.open == client.pool.in_use == 0


async def test_an_error_whose_body_breaks_off_is_still_that_error(server: ChatKoreServer) -> None:
    """What arrived of an error's body is shown, and its status decides."""
    server.always(cut_after(error(400, "The model is asleep.", headers={"x-should-retry": "false"}), 60))
    async with make(server) as client:
        found = await failure(client)
    assert found.status_code == 400


async def test_a_long_header_is_read(server: ChatKoreServer) -> None:
    """A header over aiohttp's 8 KiB, as some gateways send, is no error; one above 64 KiB is a clear one."""
    async with make(server) as client:
        server.script(completion("Hi", headers={"X-Policy": "p" * 20_000}))
        answer = await client.chat.completions.create(**ASK)
        assert answer.meta.headers["x-policy"] == "p" * 20_000
        server.always(completion("Hi", headers={"X-Policy": "p" * 200_000}))
        found = await failure(client)
        assert isinstance(found, InvalidResponseError)
        assert len(str(found)) < 500


@pytest.mark.parametrize("encoding,message", [("br", "cannot be decompressed"), ("gzip", "cannot be decompressed")])
async def test_a_body_that_cannot_be_decompressed(server: ChatKoreServer, encoding: str, message: str) -> None:
    """A coding that is not installed, or bytes that are none of it, are called what they are."""
    server.always(Reply(headers=(("Content-Encoding", encoding),), steps=(b"\x00\x01not compressed",)))
    async with make(server) as client:
        found = await failure(client)
    assert isinstance(found, InvalidResponseError)
    if encoding == "gzip" or "Brotli" in str(found):
        assert message in str(found)


async def test_an_answer_that_is_too_large(server: ChatKoreServer) -> None:
    """`max_body_size` holds also for a body that comes in one piece, and costs the connection at most."""
    async with make(server, limits=Limits(max_body_size=500)) as client:
        for _ in range(2):
            server.script(completion("x" * 1000))
            found = await failure(client)
            assert isinstance(found, InvalidResponseError)
            assert "larger than max_body_size (500 bytes)" in str(found)
            assert len(found.attempts) == 1
        server.script(completion("x" * 1_000_000), completion("ok"))
        assert "max_body_size" in str(await failure(client))
        await client.chat.completions.create(**ASK)
        assert client.pool.in_use == 0


async def test_a_large_error_is_cut(server: ChatKoreServer) -> None:
    """An error page without end is read no further than it is shown."""
    server.always(Reply(status=400, headers=(("Content-Type", "text/plain"),), steps=(b"x" * 300_000, Stall())))
    async with make(server) as client:
        found = await failure(client)
        assert len(found.body) <= 64 * 1024
        assert client.pool.in_use == 0


async def test_the_repr_of_an_exchange_tells_whether_it_is_open(server: ChatKoreServer) -> None:
    """What a debugger shows of an answer is its status and whether it was let go; letting go twice is fine."""
    async with make(server) as client:
        route = client._route(client._settings)
        pool = route.pool
        pool.slots.take()
        asked = Outgoing("GET", f"{client.base_url}/models", None, "")
        exchange = pool.answered(await route.request(asked, None), None, Notes(started=0, began=0))
        assert repr(route) == f"<Route to {client.base_url}>"
        assert repr(exchange) == "<Exchange 200 open>"
        exchange.abort()
        exchange.abort()
        exchange.let_go()
        assert repr(exchange) == "<Exchange 200 let go>"
        assert pool.slots.in_use == 0


@pytest.mark.parametrize(
    "cause,kind,text",
    [
        (RuntimeError("Session is closed"), ConfigurationError, "keep it open"),
        (aiohttp.InvalidURL("http://"), ConfigurationError, "not a URL"),
        (OSError(24, "Too many open files"), APIConnectionError, "out of file descriptors"),
        (aiohttp.ClientOSError(110, "Connection timed out"), APIConnectionError, "broke: Connection timed out"),
        (aiohttp.ServerDisconnectedError(), APIConnectionError, "broke: Server disconnected"),
        (aiohttp.ConnectionTimeoutError("Connection timeout to host x"), APITimeoutError, "could not connect in time"),
        (aiohttp.ClientPayloadError("…"), APIConnectionError, "broke: its body is incomplete"),
        (http_exceptions.BadHttpMessage("bad"), InvalidResponseError, "is not HTTP: bad"),
        (http_exceptions.LineTooLong(b"x", 8190), InvalidResponseError, "is not HTTP"),
        (ValueError("Chunk too big"), InvalidResponseError, "is not HTTP: Chunk too big"),
        (RuntimeError("Connection closed."), APIConnectionError, "broke: Connection closed."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_whatever_aiohttp_raises_becomes_an_error_of_ours(cause: Exception, kind: type, text: str) -> None:
    """Nobody has to know aiohttp's exceptions: each becomes one of this library's, with its reason in one line."""
    found = mapped(cause, sent=True)
    assert type(found) is kind
    assert text in str(found)


def test_a_ring_of_causes_is_no_trap() -> None:
    """Exceptions whose contexts form a ring are mapped like others."""
    one, other = aiohttp.ClientError("one"), aiohttp.ClientError("other")
    one.__context__, other.__context__ = other, one
    assert "one" in str(mapped(one, sent=False))


# Proxies.


class Proxy:
    """A forward proxy with CONNECT, on loopback, which resolves every name to loopback."""

    def __init__(self, *, login: str | None = None, refuse: bytes | None = None) -> None:
        self._login = None if login is None else base64.b64encode(login.encode()).decode()
        self._refuse = refuse
        self.seen: list[str] = []
        self.heads: list[bytes] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1")
        self.address = f"127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        writers = [writer]
        try:
            await self._requests(reader, writer, writers)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            for each in writers:
                each.close()

    async def _requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, writers: list[asyncio.StreamWriter]
    ) -> None:
        behind: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
            self.seen.append(f"{method} {target}")
            self.heads.append(head)
            if self._refuse is not None:
                writer.write(b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % self._refuse)
                return
            if self._login is not None and f"Proxy-Authorization: Basic {self._login}".encode() not in head:
                writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                continue
            authority = target if method == "CONNECT" else target.split("/")[2]
            if behind is None:
                behind = await asyncio.open_connection("127.0.0.1", int(authority.rpartition(":")[2]))
                writers.append(behind[1])
            if method == "CONNECT":
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                await self._both_ways(reader, writer, *behind)
                return
            length = next(
                (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
            )
            behind[1].write(head.replace(target.encode(), target[target.index("/v1") :].encode(), 1))
            behind[1].write(await reader.readexactly(length))
            answer = await behind[0].readuntil(b"\r\n\r\n")
            size = next(int(line[15:]) for line in answer.split(b"\r\n") if line.lower().startswith(b"content-length:"))
            writer.write(answer + await behind[0].readexactly(size))

    async def _both_ways(self, reader, writer, upstream, back) -> None:
        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(65536):
                    sink.write(data)
            except OSError:
                pass
            finally:
                sink.close()

        await asyncio.gather(pump(reader, back), pump(upstream, writer))


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
async def secure(authority: trustme.CA) -> AsyncIterator[ChatKoreServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("api.example", "127.0.0.1").configure_cert(context)
    async with ChatKoreServer(ssl=context) as server:
        yield server


async def test_an_explicit_proxy_is_used(server: ChatKoreServer) -> None:
    """`proxy="http://..."` carries requests to an http host, and its connection is used again."""
    async with Proxy() as proxy, make(server, proxy=f"http://{proxy.address}") as client:
        for _ in range(3):
            await client.chat.completions.create(**ASK)
        assert proxy.seen == [f"POST {client.base_url}/chat/completions"] * 3
        assert client.pool.created == 1


async def test_a_proxy_with_a_password_is_told_it_each_time(server: ChatKoreServer) -> None:
    """User name and password of a proxy's URL are sent to the proxy with each request of a kept connection."""
    async with Proxy(login="me:p@ss") as proxy:
        client = make(server, proxy=f"http://me:p%40ss@{proxy.address}")
        for _ in range(3):
            await client.chat.completions.create(**ASK)
        await client.chat.completions.create(**ASK, extra_headers={"X-More": "1"})
        assert client.pool.created == 1
        assert "p%40ss" not in repr(client._settings)
        await client.close()
    assert all(request.headers["Authorization"] == f"Bearer {KEY}" for request in server.requests)


@pytest.mark.parametrize("login", [None, "me:secret"])
async def test_https_goes_through_a_tunnel(secure: ChatKoreServer, trusting: ssl.SSLContext, login: str | None) -> None:
    """To an https host a proxy only passes bytes on: it sees neither key nor prompt, and the host is verified."""
    async with Proxy(login=login) as proxy:
        user = f"{login}@" if login else ""
        url = f"https://api.example:{secure.port}"
        async with make(url, proxy=f"http://{user}{proxy.address}", ssl=trusting) as client:
            for _ in range(3):
                await client.chat.completions.create(**ASK)
            assert proxy.seen == [f"CONNECT api.example:{secure.port}"]
            assert (client.pool.created, client.pool.open) == (1, 1)
            assert KEY.encode() not in b"".join(proxy.heads)
        assert "Proxy-Authorization" not in secure.requests[0].headers


async def test_a_host_behind_a_tunnel_is_verified(secure: ChatKoreServer, trusting: ssl.SSLContext) -> None:
    """A proxy that leads to another host than the one asked for does not get the key."""
    async with (
        Proxy() as proxy,
        make(f"https://other.example:{secure.port}", proxy=f"http://{proxy.address}", ssl=trusting) as client,
    ):
        found = await failure(client)
        assert "does not verify" in str(found)
        assert len(found.attempts) == 1
    assert secure.requests == []


@pytest.mark.parametrize(
    "refusal,attempts,text",
    [(b"407 Proxy Authentication Required", 1, "user name and password"), (b"403 Forbidden", 1, "403"), (b"503 Busy", 3, "503")],
)  # fmt: skip
async def test_a_proxy_that_refuses_a_tunnel(
    trusting: ssl.SSLContext, refusal: bytes, attempts: int, text: str
) -> None:
    """A refusal of the proxy's is called that; it is repeated only where that may help, and shows no key."""
    async with (
        Proxy(refuse=refusal) as proxy,
        make("https://api.example", proxy=f"http://me:pass@{proxy.address}", ssl=trusting) as client,
    ):
        found = await failure(client)
        assert isinstance(found, APIConnectionError)
        assert "the proxy refused with status" in str(found)
        assert text in str(found)
        assert len(found.attempts) == attempts
        assert "me:pass" not in str(found)


async def test_a_proxy_that_is_not_there(server: ChatKoreServer) -> None:
    """A proxy that nobody runs is named, not the host behind it; the hint tells how to do without."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        async with make(server, proxy=f"http://{address}") as client:
            found = await failure(client)
    assert f"could not connect to the proxy {address}" in str(found)
    assert "proxy=False" in found.hint
    assert len(found.attempts) == 3
    assert server.connections == []


async def test_a_callers_session_through_an_explicit_proxy(secure: ChatKoreServer, trusting: ssl.SSLContext) -> None:
    """`proxy=` and `ssl=` hold for a session of the caller's too, and the proxy does not learn the key."""
    async with Proxy() as proxy, aiohttp.ClientSession() as session:
        url = f"https://api.example:{secure.port}"
        client = make(url, proxy=f"http://{proxy.address}", ssl=trusting, session=session)
        await client.chat.completions.create(**ASK)
        assert proxy.seen == [f"CONNECT api.example:{secure.port}"]
        assert KEY.encode() not in b"".join(proxy.heads)


async def test_the_environments_proxy_is_read_once(
    secure: ChatKoreServer, trusting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`HTTPS_PROXY` is read when the session begins, not at each call; `proxy=False` does without."""
    async with Proxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.address}")
        async with make(f"https://api.example:{secure.port}", ssl=trusting) as client:
            await client.chat.completions.create(**ASK)
            monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
            monkeypatch.setenv("NO_PROXY", "*")
            await client.chat.completions.create(**ASK)
            other = client.with_options(base_url=f"https://127.0.0.2:{secure.port}", max_retries=0)
            assert proxy.seen == [f"CONNECT api.example:{secure.port}"]
            with pytest.raises(APIConnectionError):  # loopback: without the proxy
                await other.chat.completions.create(**ASK)
            assert len(proxy.seen) == 1


async def test_loopback_goes_through_no_proxy_of_the_environment(
    server: ChatKoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server on this machine is reached directly, whatever `HTTP_PROXY` says, and by an explicit proxy if asked."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    async with make(server) as client:
        await client.chat.completions.create(**ASK)
        await client.with_options(proxy=False).chat.completions.create(**ASK)
    assert len(server.requests) == 2


async def test_a_socks_proxy_of_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SOCKS proxy is a clear error that names the package; a session of the caller's, as it advises, is let be."""
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    async with make("http://api.example") as client:
        with pytest.raises(ConfigurationError, match="aiohttp-socks"):
            await client.chat.completions.create(**ASK)
        assert client.pool.in_use == 0
    connector = aiohttp.TCPConnector(resolver=Names(OSError(None, "asked")))
    async with aiohttp.ClientSession(connector=connector) as session:
        assert "asked" in str(await failure(make("http://api.example", session=session)))


@pytest.mark.parametrize(
    "proxies,url,proxy",
    [
        ({}, "https://api.example", None),
        ({"https": "http://p:1"}, "https://api.example", "http://p:1"),
        ({"https": "p:1"}, "https://api.example", "http://p:1"),
        ({"https": "http://p:1"}, "http://api.example", None),
        ({"all": "http://p:1"}, "http://api.example", "http://p:1"),
        ({"https": "http://p:1", "no": "api.example"}, "https://api.example", None),
        ({"https": "http://p:1", "no": ".example"}, "https://api.example:8443", None),
        ({"https": "http://p:1", "no": "api.example:8443"}, "https://api.example:8443", None),
        ({"https": "http://p:1", "no": "other"}, "https://api.example", "http://p:1"),
        ({"https": "http://p:1", "no": "*"}, "https://api.example", None),
        ({"https": "http://p:1"}, "https://localhost:8443", None),
        ({"https": "http://p:1"}, "https://[::1]:8443", None),
        ({"https": "http://p:1"}, "https://127.1.2.3", None),
    ],
)
def test_which_proxy_a_url_takes(proxies: dict[str, str], url: str, proxy: str | None) -> None:
    """The scheme's proxy, else `ALL_PROXY`; none for `NO_PROXY` and for loopback."""
    assert environment_proxy(url, proxies) == proxy


@pytest.mark.parametrize("proxy", ["ftp://p", "http://", "p:1", "http://p:0", "http://p:x", "http://[p", ""])
def test_a_proxy_that_is_none(proxy: str) -> None:
    """A proxy that cannot be one is refused when the client is made, and what it says is not repeated."""
    with pytest.raises(ConfigurationError, match="proxy must be"):
        AsyncChatKore(api_key="k", proxy=proxy)
    with pytest.raises(ConfigurationError, match="aiohttp-socks"):
        AsyncChatKore(api_key="k", proxy="socks5h://p:1")
    assert "secret" not in repr(checked_proxy("http://me:secret@p:1"))


async def test_many_failures_leave_nothing_open(server: ChatKoreServer) -> None:
    """Failures of every kind, one after the other, leave no place taken and no connection behind."""
    body = completion().body
    half = raw(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body), body[:9], Reset())
    async with make(server, limits=Limits(max_connections=2, max_connections_per_host=1)) as whole:
        client = whole.with_options(max_retries=0)
        for reply in (raw(b"?"), raw(Reset()), half, json_reply({}), error(500), raw(Stall())) * 2:
            server.script(reply)
            await failure(client, timeout=0.05)
        assert (client.pool.in_use, client.pool.waiting) == (0, 0)
        await client.chat.completions.create(**ASK)
    gc.collect()


def test_a_request_that_could_not_be_sent_out_is_told_without_its_url() -> None:
    """aiohttp's words name the whole URL, query and all; ours say what happened."""
    cause = aiohttp.ClientOSError(None, "Can not write request body for https://host/v1/chat/completions?secret=1")
    assert reason(cause) == "the server closed it while the request was sent"
