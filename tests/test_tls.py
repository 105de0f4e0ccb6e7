"""TLS: verified unless the caller's own context says otherwise, and the key goes to nobody who is not verified."""

import asyncio
import ssl
import traceback
from collections.abc import AsyncIterator

import pytest
import trustme

from chatkore_async import APIConnectionError, APITimeoutError, AsyncChatKore, RetryPolicy, Timeout
from chatkore_async.testing import ChatKoreServer, stream

ASK = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def certified(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


@pytest.fixture
async def server(authority: trustme.CA) -> AsyncIterator[ChatKoreServer]:
    async with ChatKoreServer(ssl=certified(authority, "127.0.0.1", "localhost")) as server:
        yield server


def make(server: ChatKoreServer, **options) -> AsyncChatKore:
    return AsyncChatKore(
        api_key="sk-tls", base_url=server.base_url, retry=RetryPolicy(initial_delay=0, max_retries=2), **options
    )


async def test_a_context_of_the_callers_is_used(server: ChatKoreServer, trusting: ssl.SSLContext) -> None:
    """`ssl=context` with the company's authority makes calls and streams work, on one connection."""
    async with make(server, ssl=trusting) as client:
        await client.chat.completions.create(**ASK)
        async with client.chat.completions.stream(**ASK) as opened:
            await opened.get_final_completion()
        assert client.pool.created == 1
        assert client.base_url.startswith("https://")


async def test_an_unknown_certificate_is_refused(server: ChatKoreServer) -> None:
    """Certificates are verified by default; one that does not verify is never retried, and the hint says what to do."""
    async with make(server) as client:
        with pytest.raises(APIConnectionError, match="does not verify") as caught:
            await client.chat.completions.create(**ASK)
        assert "cafile" in caught.value.hint
        assert len(caught.value.attempts) == 1
        assert client.pool.open == 0
    assert server.requests == []
    assert server.request_count == 0


async def test_a_certificate_for_another_host_is_refused(authority: trustme.CA, trusting: ssl.SSLContext) -> None:
    """A certificate that is trusted and names another host does not verify, and the key stays here."""
    async with (
        ChatKoreServer(ssl=certified(authority, "elsewhere.example")) as server,
        make(server, ssl=trusting) as client,
    ):
        with pytest.raises(APIConnectionError, match=r"does not verify.*127\.0\.0\.1") as caught:
            await client.chat.completions.create(**ASK)
        assert len(caught.value.attempts) == 1
        assert server.requests == []
        shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
        assert "sk-tls" not in shown


async def test_a_copy_has_a_context_of_its_own(server: ChatKoreServer, trusting: ssl.SSLContext) -> None:
    """`with_options(ssl=context)` verifies with that context, and its connections are not lent to others."""
    async with make(server) as client:
        await client.with_options(ssl=trusting).chat.completions.create(**ASK)
        with pytest.raises(APIConnectionError, match="does not verify"):
            await client.chat.completions.create(**ASK)
    assert server.request_count == 1


async def test_https_to_a_port_that_speaks_http() -> None:
    """The wrong scheme in `base_url` is named as such."""
    async with ChatKoreServer() as server:
        url = server.base_url.replace("http:", "https:")
        async with AsyncChatKore(api_key="sk-tls", base_url=url, max_retries=0) as client:
            with pytest.raises(APIConnectionError, match=r"no TLS with 127\.0\.0\.1") as caught:
                await client.chat.completions.create(**ASK)
        assert "scheme" in caught.value.hint


async def test_a_handshake_that_hangs(trusting: ssl.SSLContext) -> None:
    """The `connect` timeout covers the handshake: a host that accepts and says nothing is left."""
    writers: list[asyncio.StreamWriter] = []
    listener = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1")
    port = listener.sockets[0].getsockname()[1]
    async with AsyncChatKore(
        api_key="k",
        base_url=f"https://127.0.0.1:{port}",
        ssl=trusting,
        timeout=Timeout(connect=0.02),
        max_retries=0,
    ) as client:
        with pytest.raises(APITimeoutError, match="could not connect") as caught:
            await client.chat.completions.create(**ASK)
        assert caught.value.phase == "connect"
    for writer in writers:
        writer.close()
        await writer.wait_closed()
    listener.close()
    await listener.wait_closed()


async def test_a_stream_left_and_a_client_closed(server: ChatKoreServer, trusting: ssl.SSLContext) -> None:
    """Leaving a stream over TLS and closing the client end their connections at once."""
    server.script(stream(["Hel", "lo"] * 50, interval=0.01))
    async with make(server, ssl=trusting) as client:
        async with client.chat.completions.stream(**ASK) as opened:
            await anext(opened)
        await server.connections[0].closed()
        await client.chat.completions.create(**ASK)
    await server.connections[1].closed()


@pytest.mark.parametrize("ending", ["loop.close()", "asyncio.run(client.close())\nloop.close()", "del loop"])
async def test_a_dead_loop_leaves_no_connection_with_tls(
    server: ChatKoreServer, authority: trustme.CA, ending: str, tmp_path
) -> None:
    """A loop that ended without closing anything leaves no warning of a session of ours, over TLS too."""
    import sys

    bundle = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(bundle)
    script = (
        "import asyncio, gc, ssl, sys\n"
        "from chatkore_async import AsyncChatKore\n"
        "context = ssl.create_default_context(cafile=sys.argv[2])\n"
        "client = AsyncChatKore(api_key='k', base_url=sys.argv[1], ssl=context)\n"
        "async def main():\n"
        "    opened = client.chat.completions.stream(model='m', messages=[{'role': 'user', 'content': 'Hello'}])\n"
        "    await anext(opened)\n"
        "    await client.chat.completions.create(model='m', messages=[{'role': 'user', 'content': 'Hello'}])\n"
        "    return opened\n"
        "loop = asyncio.new_event_loop()\n"
        "opened = loop.run_until_complete(main())\n"
        f"{ending}\n"
        "del opened, client\n"
        "gc.collect()\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "dev", "-W", "error", "-c", script, server.base_url, str(bundle)),
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await asyncio.wait_for(process.communicate(), 20)
    lines = [line for line in err.decode().splitlines() if "nclosed" in line]
    assert process.returncode == 0
    assert not [line for line in lines if "event loop" not in line and "family=1," not in line], err.decode()
    for connection in server.connections:
        await connection.closed()
