"""`chatkore doctor`: what it finds on good days and on bad ones, and what it never tells."""

import asyncio
import contextlib
import datetime as dt
import errno
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from io import StringIO
from pathlib import Path

import click
import msgspec
import pytest
import trustme
from click.testing import CliRunner
from rich.console import Console

from chatkore_async import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    CallMeta,
    ChatKoreError,
    ConfigurationError,
    InsufficientQuotaError,
    InternalServerError,
    InvalidResponseError,
    NoChannelError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    StreamInterruptedError,
)
from chatkore_async.cli._app import app
from chatkore_async.cli._chart import PlainChart, Silent, TerminalChart, make_chart
from chatkore_async.cli._examination import Asked, Examination
from chatkore_async.cli._examine_answers import (
    choose_model,
    examine_call,
    examine_headers,
    examine_key,
    examine_models,
    examine_no_models,
)
from chatkore_async.cli._examine_errors import remark_on_error, told
from chatkore_async.cli._examine_proxy import choose_proxy, examine_proxy, read_proxy, secrets_of, without_login
from chatkore_async.cli._examine_settings import (
    examine_settings,
    examine_url,
    key_to_send,
    read_account,
    shown_key,
)
from chatkore_async.cli._examine_stream import examine_stream
from chatkore_async.cli._examine_way import examine_dns, examine_tcp, examine_tls, examine_tunnel
from chatkore_async.cli._finding import STEPS, Finding, Mask, Remark, found, skipped, snippet, verdict
from chatkore_async.cli._observed import (
    Answered,
    Certificate,
    Handshake,
    Headers,
    Hidden,
    Lookup,
    ProxyChoice,
    RawStream,
    Reach,
    Tokens,
    Trouble,
    Tunnel,
)
from chatkore_async.cli._probe import look_up, reach, read_certificate, shake_hands
from chatkore_async.cli._questions import read_headers
from chatkore_async.cli._route import Route
from chatkore_async.cli._streamlog import StreamLog
from chatkore_async.cli._threads import DaemonThreads
from chatkore_async.cli._troubles import milliseconds, remark_on, trouble_of
from chatkore_async.cli._watch import MAX_STREAM, watch_stream
from chatkore_async.cli._wire import Link, NotHTTPError, RefusedError
from chatkore_async.testing import (
    ChatKoreServer,
    Cut,
    RecordedRequest,
    Reply,
    Stall,
    completion,
    cut_after,
    error,
    events,
    html,
    json_reply,
    raw,
    stream,
)

pty = pytest.importorskip("pty")

ROOT = Path(__file__).parents[1]
DOCTOR = [sys.executable, "-W", "error", "-m", "chatkore_async.cli", "doctor"]
ENVIRONMENT = {
    key: value
    for key, value in os.environ.items()
    if key not in ("NO_COLOR", "FORCE_COLOR", "PYTHONASYNCIODEBUG") and not key.lower().endswith("_proxy")
}
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
KEY = "sk-MARKED-0123456789abcdef"
MARK = "MARKED-0123"
NOW = 1_800_000_000.0
DAY = 86400.0
INTERVAL = 0.002

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(autouse=True)
def _no_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _ctrl_c_is_not_ignored() -> Iterator[None]:
    """Give child processes the Ctrl-C that a test runner in the background may have been deprived of."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
async def server() -> AsyncIterator[ChatKoreServer]:
    """A relay whose own streams flow, and are no burst however late a busy machine sends them."""
    async with ChatKoreServer(interval=INTERVAL) as server:
        yield server


async def look(base_url: str | None, environ: Mapping[str, str] | None = None, **asked) -> dict[str, Finding]:
    """Examine a server, and return the findings by step."""
    environ = {"CHATKORE_API_KEY": KEY} if environ is None else environ
    examination = Examination(
        Asked(**{"base_url": base_url, "timeout": 20, **asked}), Silent(), environ, DaemonThreads()
    )
    await examination.run()
    assert [finding.step for finding in examination.findings] == list(STEPS)
    for finding in examination.findings:
        assert finding.seen
        assert (finding.status in ("ok", "skip")) == (not finding.remarks) == (not finding.change)
    return {finding.step: finding for finding in examination.findings}


def statuses(findings: Mapping[str, Finding]) -> dict[str, str]:
    """Return the status of each step that is not well."""
    return {step: finding.status for step, finding in findings.items() if finding.status != "ok"}


@contextlib.asynccontextmanager
async def listening(handler: Handler, **options) -> AsyncIterator[int]:
    """Serve connections by a function, and return the port."""
    writers: list[asyncio.StreamWriter] = []
    tasks: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        tasks.append(asyncio.current_task())
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await handler(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", **options)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        for writer in writers:
            writer.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


def saying(said: bytes, *, stays: bool = False, asks: bool = True) -> Handler:
    """Return a handler that reads a request's head, says something, and hangs up."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if asks:
            await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        await writer.drain()
        if stays:
            await asyncio.Event().wait()

    return handler


def closed_port() -> int:
    """Return a port of the loopback interface where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class TestGoodDay:
    async def test_every_step_is_well(self, server: ChatKoreServer) -> None:
        """Of a server that does everything right, each step says what was seen, and nothing is to be changed."""
        findings = await look(server.base_url)
        assert statuses(findings) == {"tls": "skip"}
        assert findings["settings"].seen == (
            "base URL from --base-url; key from CHATKORE_API_KEY: sk-...cdef (26 characters)"
        )
        assert findings["models"].seen.endswith(": gpt-4o-mini, gpt-4o, claude-sonnet-4-5, deepseek-chat")
        assert findings["key"].seen == "accepted"
        assert "gpt-4o-mini answered" in findings["call"].seen
        assert "finish reason length; 12 + 16 tokens; request id req_" in findings["call"].seen
        assert "complete, finish reason stop" in findings["stream"].seen
        assert "the connection is used again" in findings["stream"].seen
        assert findings["headers"].seen.startswith("no rate-limit headers")

    async def test_it_asks_little(self, server: ChatKoreServer) -> None:
        """A look costs one call of 16 tokens and two streams of 64, and asks for the list of models."""
        await look(server.base_url)
        asked = [request.json for request in server.requests if request.method == "POST"]
        assert [(each.get("stream", False), each["max_tokens"]) for each in asked] == [
            (False, 16),
            (True, 64),
            (True, 64),
        ]
        assert asked[1] == asked[2]
        assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {KEY}"}

    async def test_without_calls_nothing_is_paid(self, server: ChatKoreServer) -> None:
        """With `--no-call` the list of models is all that is asked for."""
        findings = await look(server.base_url, calls=False)
        assert statuses(findings) == {"tls": "skip", "call": "skip", "stream": "skip"}
        assert [request.method for request in server.requests] == ["GET"]
        assert findings["key"].seen.startswith("accepted for the list of models;")

    async def test_the_model_that_is_named_is_asked(self, server: ChatKoreServer) -> None:
        """`--model` is who is asked; one that is not listed is a warning, with the nearest name that is."""
        findings = await look(server.base_url, model="gpt-4o-mni")
        assert statuses(findings) == {"tls": "skip", "models": "warn"}
        assert findings["models"].change == "Did you mean gpt-4o-mini?"
        assert {request.json["model"] for request in server.requests if request.method == "POST"} == {"gpt-4o-mni"}

    async def test_a_model_that_knows_the_other_limit(self, server: ChatKoreServer) -> None:
        """A model that takes only `max_completion_tokens` is asked with that, in the streams too."""

        def modern(request: RecordedRequest) -> Reply | None:
            if request.method == "POST" and "max_tokens" in request.json:
                return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
            return None

        server.respond_with(modern)
        assert statuses(await look(server.base_url)) == {"tls": "skip"}
        assert server.requests[-2].json["max_completion_tokens"] == 64

    async def test_no_key_on_this_machine(self, server: ChatKoreServer) -> None:
        """A server on this machine that asks for no key is well without one."""
        findings = await look(server.base_url, {})
        assert statuses(findings) == {"tls": "skip"}
        assert findings["key"].seen == "the server asks for none"

    async def test_what_is_not_http_only(self) -> None:
        """Over TLS, its version, who issued the certificate and how long it is good are seen."""
        authority = trustme.CA()
        async with secure(authority) as (server, environ):
            findings = await look(server.base_url, environ)
        assert statuses(findings) == {}
        assert re.match(
            r"TLSv1\.3 in .*; issued by trustme .* for 127\.0\.0\.1, localhost, expires in \d+ days",
            findings["tls"].seen,
        )
        assert "the connection is used again" in findings["stream"].seen


@contextlib.asynccontextmanager
async def secure(
    authority: trustme.CA, *names: str, trusted: bool = True, **validity: dt.datetime
) -> AsyncIterator[tuple[ChatKoreServer, dict[str, str]]]:
    """Serve over TLS, with the authority among those that are trusted meanwhile."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names or ("127.0.0.1", "localhost"), **validity).configure_cert(context)
    with contextlib.ExitStack() as stack:
        environ = {"CHATKORE_API_KEY": KEY}
        if trusted:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            environ["SSL_CERT_FILE"] = stack.enter_context(authority.cert_pem.tempfile())
            patch.setenv("SSL_CERT_FILE", environ["SSL_CERT_FILE"])
        async with ChatKoreServer(ssl=context, interval=INTERVAL) as server:
            yield server, environ


class TestKeys:
    async def test_no_key(self, server: ChatKoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a key it looks at the way all the same, and says what is missing."""
        proxied(monkeypatch, server)
        server.respond_with(lambda _: error(401, "You didn't provide an API key."))
        findings = await look("http://relay.invalid/v1", {"OPENAI_API_KEY": KEY})
        assert findings["settings"].status == findings["key"].status == "fail"
        assert findings["settings"].change == ('If it is for this server: export CHATKORE_API_KEY="$OPENAI_API_KEY".')
        assert findings["key"].means == "The server wants a key, and there is none."
        assert findings["call"].seen == "there would be the same answer"
        assert server.requests[0].headers["authorization"] == "Bearer none-needed"

    async def test_a_wrong_key(self) -> None:
        """A key that is refused fails, no call is made, and the way is well."""
        async with ChatKoreServer(api_key="sk-another") as server:
            findings = await look(server.base_url)
            assert server.request_count == 1
        assert statuses(findings) == {"tls": "skip", "models": "skip", "key": "fail", "call": "skip", "stream": "skip"}
        assert findings["key"].seen == "401: Incorrect API key provided."
        assert "mistyped, revoked, expired" in findings["key"].means
        assert findings["models"].seen == "401: Incorrect API key provided. See key."

    @pytest.mark.parametrize(
        "key, means",
        [
            ('"sk-0123456789"', "quotation marks"),
            ("'sk-0123456789", "quotation marks"),
            ("Bearer sk-0123456789", "the word Bearer"),
            ("https://api.chatkore.com/v1", "looks like a URL"),
            ("sk-...", "placeholder"),
            ("<your key>", "placeholder"),
            ("$CHATKORE_API_KEY", "placeholder"),
            ("sk-0123 456789", "a blank in it"),
            (" sk-0123456789\n", "around the key"),
        ],
    )
    async def test_an_odd_key(self, key: str, means: str) -> None:
        """What is odd about a key is a warning; if the server refuses it, it is why."""
        async with ChatKoreServer(interval=INTERVAL) as server:
            findings = await look(server.base_url, {"CHATKORE_API_KEY": key})
            assert statuses(findings) == {"tls": "skip", "settings": "warn"}
            assert means in findings["settings"].means
            server.respond_with(lambda _: error(401, "no"))
            findings = await look(server.base_url, {"CHATKORE_API_KEY": key})
            assert findings["key"].status == "fail"
            assert means in findings["key"].means

    @pytest.mark.parametrize("key", ["sk-0123\n456789", "sk-0123…", "sk-\x000", "“sk-0123456789”"])
    async def test_a_key_that_cannot_be_sent(self, server: ChatKoreServer, key: str) -> None:
        """A key that no header can carry fails at the settings; the way to the server is looked at all the same."""
        findings = await look(server.base_url, {"CHATKORE_API_KEY": key})
        assert findings["settings"].status == "fail"
        assert findings["tcp"].status == "ok"
        assert findings["models"].seen == findings["headers"].seen == "no request can carry the key"
        assert server.requests == []

    async def test_no_money(self, server: ChatKoreServer) -> None:
        """A key whose quota is gone is known, and has to be topped up."""
        server.always(error(403, "用户额度不足", code="insufficient_user_quota"))
        findings = await look(server.base_url)
        assert statuses(findings) == {"tls": "skip", "key": "fail", "call": "skip", "stream": "skip"}
        assert "used up" in findings["key"].means
        assert "top up" in findings["key"].change.lower()

    def test_shows_little(self) -> None:
        """Of a key, its owner sees the first three and the last four characters, of a short one none."""
        assert shown_key("sk-0123456789abc") == "sk-...9abc (16 characters)"
        assert shown_key("sk-0123456789ab") == "15 characters"
        assert shown_key("x") == "1 character"
        assert shown_key("s\nk-0123456789abé") == "s?k...9ab? (17 characters)"

    def test_where_settings_come_from(self) -> None:
        """An option wins over the environment, and that over the default."""
        environ = {"CHATKORE_BASE_URL": " http://127.0.0.1/v1 ", "CHATKORE_API_KEY": KEY}
        assert read_account("https://a/v1", environ).url_source == "--base-url"
        assert "base URL from CHATKORE_BASE_URL;" in examine_settings(read_account(None, environ)).seen
        assert "the default base URL; no key" in examine_settings(read_account(None, {})).seen
        assert "takes any word" in examine_settings(read_account(None, {})).change
        assert read_account(None, environ).local

    def test_the_record_shows_no_key(self) -> None:
        """A traceback that shows locals shows no key."""
        account = read_account(None, {"CHATKORE_API_KEY": KEY})
        assert MARK not in repr(account)
        assert MARK not in repr(key_to_send(account))
        with pytest.raises(TypeError):
            Hidden("x").__reduce__()

    @pytest.mark.parametrize(
        "errors, status, seen",
        [
            ([None, None], "ok", "accepted"),
            ([None, InternalServerError("no", status_code=500)], "ok", "accepted, for the list of models"),
            ([NotFoundError("no", status_code=404), None], "ok", "accepted"),
            ([NotFoundError("no", status_code=404)], "skip", "no answer tells whether it is accepted"),
            ([RateLimitError("slow", status_code=429)], "ok", "it was not refused"),
            ([None, PermissionDeniedError("no", status_code=403)], "fail", "403: no"),
            ([PermissionDeniedError("no", status_code=403), None], "ok", "accepted"),
            ([None, InsufficientQuotaError("no", status_code=403)], "fail", "403: no"),
        ],
    )
    def test_what_answers_tell(self, errors: list[ChatKoreError | None], status: str, seen: str) -> None:
        """A key is accepted, refused, known without rights, or nobody can say."""
        finding = examine_key(read_account(None, {"CHATKORE_API_KEY": KEY}), errors, [])
        assert (finding.status, finding.seen) == (status, seen)


def proxied(monkeypatch: pytest.MonkeyPatch, server: ChatKoreServer) -> None:
    """Have a server answer for every host, as a proxy that knows the answers itself."""
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.port}")


class TestUrls:
    @pytest.mark.parametrize(
        "given", ["ftp://x", "sk-MARKED-0123", "https://u:p@host", "https://h/v1?key=p", "https://", "://"]
    )
    async def test_what_is_none(self, given: str) -> None:
        """A base URL that the client refuses fails, shows no password, and leaves the rest out."""
        findings = await look(given)
        assert findings["url"].status == "fail"
        assert {finding.seen for finding in list(findings.values())[2:]} == {"the base URL is none"}
        assert not re.search("MARKED|u:p|=p", str(findings))

    @pytest.mark.parametrize(
        "given, base_url, status, text",
        [
            (None, "https://api.chatkore.com/v1", "ok", ""),
            ("https://h", "https://h/v1", "ok", "/v1 was added"),
            ("https://h/v1/chat/completions/", "https://h/v1", "ok", "was taken off"),
            ("https://h/api/v3", "https://h/api/v3", "ok", ""),
            ("http://h/v1", "http://h/v1", "warn", "can read the key"),
            ("http://127.0.0.1/v1", "http://127.0.0.1/v1", "ok", ""),
            ("https://h/v1/models", "https://h/v1/models", "warn", "Try --base-url https://h/v1"),
            ("https://h/v1/v1", "https://h/v1/v1", "warn", "Try --base-url https://h/v1"),
            ("https://h:80/v1", "https://h:80/v1", "warn", "Try http://"),
            ("http://localhost:443/v1", "http://localhost:443/v1", "warn", "Try https://"),
        ],
    )
    def test_forms(self, given: str | None, base_url: str, status: str, text: str) -> None:
        """It says where calls go, what was made of the URL, and what looks like a slip."""
        finding = examine_url(given, base_url)
        assert finding.status == status
        assert finding.seen.startswith(f"calls go to {base_url}/chat/completions")
        assert text in f"{finding.seen} {finding.means} {finding.change}"

    async def test_a_web_page(self, server: ChatKoreServer) -> None:
        """A relay's own page in place of JSON points at the base URL, and no call is made."""
        server.respond_with(lambda _: html(200, "New API"))
        findings = await look(server.base_url)
        assert statuses(findings) == {"tls": "skip", "models": "fail", "key": "skip", "call": "skip", "stream": "skip"}
        assert "web page (New API)" in findings["models"].seen
        assert findings["models"].change == (f"Check the base URL: it usually ends in /v1. Now it is {server.base_url}")

    async def test_nothing_there(self, server: ChatKoreServer) -> None:
        """A 404 for everything fails at the call; a server that has no list of models and answers is well."""
        server.respond_with(lambda request: error(404, "Not Found"))
        findings = await look(server.base_url)
        assert statuses(findings) == {"tls": "skip", "models": "warn", "key": "skip", "call": "fail", "stream": "skip"}
        assert "usually ends in /v1" in findings["call"].change
        assert statuses(await look(server.base_url, calls=False))["models"] == "fail"
        server.respond_with(lambda request: error(404, "Not Found") if request.method == "GET" else None)
        assert statuses(await look(server.base_url)) == {"tls": "skip", "models": "warn"}


class TestProxies:
    @pytest.mark.parametrize(
        "url, environ, why, source",
        [
            ("https://h/v1", {}, "none", ""),
            ("https://h/v1", {"https_proxy": "http://p:1"}, "named", "https_proxy"),
            ("https://h/v1", {"HTTPS_PROXY": "p:1"}, "named", "HTTPS_PROXY"),
            ("https://h/v1", {"ALL_PROXY": "http://p:1"}, "named", "ALL_PROXY"),
            ("https://h/v1", {"HTTP_PROXY": "http://p:1"}, "none", ""),
            ("http://h:8/v1", {"HTTP_PROXY": "http://p:1", "NO_PROXY": "h:8"}, "exempt", "HTTP_PROXY"),
            ("http://127.0.0.1/v1", {"HTTP_PROXY": "http://p:1"}, "loopback", "HTTP_PROXY"),
            ("http://127.0.0.1/v1", {}, "loopback", ""),
        ],
    )
    def test_which(
        self, monkeypatch: pytest.MonkeyPatch, url: str, environ: dict[str, str], why: str, source: str
    ) -> None:
        """The proxy is the one that the client takes, and the variable that names it is told."""
        import urllib.request

        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        choice = choose_proxy(url, urllib.request.getproxies(), os.environ, urllib.request.proxy_bypass)
        assert (choice.why, choice.source) == (why, source)
        assert (choice.proxy is not None) == (why == "named")
        assert examine_proxy(choice).status == "ok"
        if "HTTP_PROXY" in environ and why == "none":
            assert "HTTP_PROXY is for other URLs" in examine_proxy(choice).seen

    def test_the_systems(self) -> None:
        """A proxy that no variable names is the system's."""
        choice = choose_proxy("https://h/v1", {"https": "http://p:1"}, {}, lambda _: False)
        assert examine_proxy(choice).seen == "the system's settings names http://p:1"

    @pytest.mark.parametrize("value", ["http://", "ftp://p:1", "http://p:99999", "http://p:0"])
    async def test_nonsense(self, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        """A variable that names no proxy fails."""
        monkeypatch.setenv("HTTPS_PROXY", value)
        findings = await look("https://relay.invalid/v1", {"CHATKORE_API_KEY": KEY, "HTTPS_PROXY": value})
        assert findings["proxy"].change == "Write HTTPS_PROXY=http://host:port"
        assert findings["models"].seen == "the proxy cannot be used"

    async def test_socks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A SOCKS proxy fails, with the ways out."""
        monkeypatch.setenv("ALL_PROXY", "socks5://u:MARKED-0123@127.0.0.1:1")
        findings = await look("https://relay.invalid/v1", dict(os.environ))
        assert findings["proxy"].seen == "ALL_PROXY names socks5://***@127.0.0.1:1"
        assert "aiohttp-socks" in findings["proxy"].change

    async def test_nobody_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A proxy that refuses connections fails, and is named with its variable."""
        port = closed_port()
        monkeypatch.setenv("HTTPS_PROXY", f"http://u:MARKED-0123@127.0.0.1:{port}")
        findings = await look("https://relay.invalid/v1", dict(os.environ))
        assert statuses(findings)["proxy"] == "fail"
        assert findings["proxy"].seen == f"HTTPS_PROXY names http://***@127.0.0.1:{port}; Connection refused"
        assert f"Port {port} of the proxy of HTTPS_PROXY takes no connections" in findings["proxy"].means

    @pytest.mark.parametrize(
        "answer, means",
        [
            (b"HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=x\r\n\r\n", "asks for a user name"),
            (
                b"HTTP/1.1 407 No\r\nProxy-Authenticate: NTLM\r\nProxy-Authenticate: Negotiate\r\n\r\n",
                "ntlm, negotiate",
            ),
            (b"HTTP/1.1 403 Forbidden\r\n\r\n", "does not allow connections to relay.invalid"),
            (b"HTTP/1.1 404 Not Found\r\n\r\n", "knows no CONNECT"),
            (b"HTTP/1.1 503 Unavailable\r\n\r\n", "could not reach relay.invalid"),
            (b"HTTP/1.1 418 Teapot\r\n\r\n", "does not open a way"),
            (b"SSH-2.0-OpenSSH\r\n", "speaks, but not HTTP"),
            (b"", "hung up"),
        ],
    )
    async def test_that_refuse(self, monkeypatch: pytest.MonkeyPatch, answer: bytes, means: str) -> None:
        """What a proxy answers to CONNECT is read: a login, a list of hosts, a proxy that is none."""
        async with listening(saying(answer)) as port:
            monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
            findings = await look("https://relay.invalid/v1", {**os.environ, "CHATKORE_API_KEY": KEY})
        assert statuses(findings)["tcp"] == "fail"
        assert means in findings["tcp"].means
        assert findings["dns"].seen == "the proxy looks up relay.invalid"
        assert findings["models"].seen == "there is no connection"

    @pytest.mark.parametrize("secured", [False, True], ids=["http", "https"])
    async def test_tls_through_one(self, monkeypatch: pytest.MonkeyPatch, secured: bool) -> None:
        """Everything goes through a proxy that lets it, with its user name and password, over TLS to it as well."""
        authority = trustme.CA()
        heads: list[bytes] = []
        context = None
        if secured:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            authority.issue_cert("127.0.0.1").configure_cert(context)
        async with secure(authority, "relay.invalid") as (server, environ):

            async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                heads.append(await reader.readuntil(b"\r\n\r\n"))
                there, out = await asyncio.open_connection("127.0.0.1", server.port)
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                await asyncio.gather(pump(reader, out), pump(there, writer))

            async with listening(connect, ssl=context) as port:
                scheme = "https" if secured else "http"
                monkeypatch.setenv("HTTPS_PROXY", f"{scheme}://user:MARKED-0123@127.0.0.1:{port}")
                findings = await look("https://relay.invalid/v1", {**os.environ, **environ})
        assert statuses(findings) == {"dns": "skip"}
        assert "the proxy opened a way to relay.invalid port 443" in findings["tcp"].seen
        assert "for relay.invalid" in findings["tls"].seen
        assert len({re.search(rb"(?i)proxy-authorization: *(.*)\r", head)[1] for head in heads}) == 1
        assert heads[0].startswith(b"CONNECT relay.invalid:443 HTTP/1.1\r\nHost: relay.invalid:443\r\n")
        assert MARK not in str(findings)

    @pytest.mark.parametrize("login", ["", "user:MARKED-0123@"])
    async def test_plain_http_through_one(
        self, server: ChatKoreServer, monkeypatch: pytest.MonkeyPatch, login: str
    ) -> None:
        """Plain http goes through a proxy without a tunnel, the raw look too."""
        monkeypatch.setenv("HTTP_PROXY", f"http://{login}127.0.0.1:{server.port}")
        findings = await look("http://relay.invalid/v1", {**os.environ, "CHATKORE_API_KEY": KEY})
        assert statuses(findings) == {"url": "warn", "dns": "skip", "tcp": "skip", "tls": "skip"}
        assert "the connection is used again" in findings["stream"].seen
        assert len({request.headers.get("proxy-authorization") for request in server.requests}) == 1
        assert ("proxy-authorization" in server.requests[-1].headers) is bool(login)
        assert {request.headers["host"] for request in server.requests} == {"relay.invalid"}

    def test_one_without_a_login(self) -> None:
        """A proxy's URL is shown without its password, and what has none is no secret."""
        assert without_login("http://u:a/b@p:1/?x=y") == "http://***@p:1/?***"
        assert secrets_of("http://p:1") == ()
        assert secrets_of("http://[") == ()
        assert secrets_of("http://u:a%20b@p") == ("a%20b", "a b", "dTphIGI=")
        assert secrets_of("socks5://u:p@h") == ("p", "p")
        assert read_proxy("https://p").port == 443


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(65536):
        writer.write(piece)
        await writer.drain()
    writer.close()


class TestNames:
    async def test_no_such_host(self) -> None:
        """A name that does not exist fails at once, and nothing is tried after it."""
        findings = await look("https://nowhere.invalid/v1")
        assert statuses(findings)["dns"] == "fail"
        assert findings["dns"].seen.startswith("nowhere.invalid: ")
        assert findings["tls"].seen == "there is no connection"

    @pytest.mark.parametrize("host", [f"{'x' * 64}.example", ".example", "a..b"])
    async def test_no_host_can_have_that_name(self, host: str) -> None:
        """A name that cannot be one fails as such."""
        assert (await look(f"https://{host}/v1"))["dns"].means == "No host can have that name."

    async def test_a_resolver_that_hangs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A look-up that takes too long is given up in time."""
        held = threading.Event()
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: held.wait(30) and [])
        lookup = await look_up("h.example", 443, 0.05, DaemonThreads())
        held.set()
        assert lookup.trouble == Trouble("timeout", "no answer within 0.05 s")
        assert examine_dns(lookup).status == "fail"

    async def test_what_a_thread_raises_is_raised(self) -> None:
        """A job on a thread of its own fails where it is awaited."""
        with pytest.raises(ValueError, match="invalid literal"):
            await asyncio.get_running_loop().run_in_executor(DaemonThreads(), int, "x")

    async def test_addresses_come_once_and_in_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the resolver says twice, once for each kind of socket, is told once."""
        infos = [(0, 0, 0, "", (address, 1)) for address in ("2001:db8::1", "192.0.2.1", "192.0.2.1")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: infos)
        assert (await look_up("h", 1, 20, DaemonThreads())).addresses == ("2001:db8::1", "192.0.2.1")

    @pytest.mark.parametrize(
        "lookup, status, text",
        [
            (Lookup(host="192.0.2.1", addresses=("192.0.2.1",)), "ok", "192.0.2.1 is an address"),
            (Lookup(host="h", addresses=("192.0.2.1", "2001:db8::1"), seconds=0.0123), "ok", "2001:db8::1 in 12 ms"),
            (Lookup(host="h", addresses=tuple(f"192.0.2.{n}" for n in range(9))), "ok", "192.0.2.5 and 3 more in"),
            (Lookup(host="h", addresses=("192.0.2.1",), seconds=1.5), "warn", "The resolver is slow"),
            (Lookup(host="h", addresses=("0.0.0.0",)), "warn", "leads to this machine"),
            (Lookup(host="localhost", addresses=("::1", "127.0.0.1")), "ok", "::1, 127.0.0.1"),
            (Lookup(host="h", trouble=Trouble("no-resolver", "try again")), "fail", "may have no network"),
        ],
    )
    def test_judged(self, lookup: Lookup, status: str, text: str) -> None:
        """Addresses are shown; a slow resolver and a name that is blocked are warnings."""
        finding = examine_dns(lookup)
        assert finding.status == status
        assert text in f"{finding.seen} {finding.means}"


class TestConnections:
    async def test_nobody_listens(self) -> None:
        """A closed port of this machine says that the server is to be started."""
        findings = await look(f"http://127.0.0.1:{closed_port()}/v1")
        assert statuses(findings)["tcp"] == "fail"
        assert "Connection refused" in findings["tcp"].seen
        assert "`chatkore serve`" in findings["tcp"].change

    @pytest.mark.parametrize(
        "attempts, status, text",
        [
            ([Reach(address="192.0.2.1", port=1, seconds=0.01)], "ok", "192.0.2.1 port 1 (IPv4) in 10 ms"),
            ([Reach(address="::1", port=1, seconds=2)], "warn", "Keep one client for all calls"),
            (
                [
                    Reach(address="::1", port=1, trouble=Trouble("refused", "no")),
                    Reach(address="127.0.0.1", port=1, seconds=0.01),
                ],
                "ok",
                "::1 port 1 (IPv6) did not work: no; 127.0.0.1",
            ),
            (
                [
                    Reach(address="2001:db8::1", port=1, trouble=Trouble("timeout", "no answer")),
                    Reach(address="192.0.2.1", port=1, seconds=0.01),
                ],
                "warn",
                "Some addresses (IPv6) do not answer",
            ),
            (
                [
                    Reach(address="2001:db8::1", port=1, trouble=Trouble("unreachable", "no way")),
                    Reach(address="192.0.2.1", port=1, trouble=Trouble("refused", "no")),
                ],
                "fail",
                "Port 1 of h takes no connections",
            ),
            ([Reach(address="192.0.2.1", port=1, trouble=Trouble("timeout", "no"))], "fail", "HTTPS_PROXY"),
        ],
    )
    def test_judged(self, attempts: list[Reach], status: str, text: str) -> None:
        """Each attempt is seen; one that hangs costs time, one that says no at once costs none."""
        finding = examine_tcp("h", attempts)
        assert finding.status == status
        assert text in f"{finding.seen} {finding.means} {finding.change}"

    async def test_both_families_are_tried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two addresses of each family are tried, so that a broken one shows."""
        real = socket.getaddrinfo
        addresses = ["127.0.0.1", "127.0.0.2", "127.0.0.3", "::1", "::2"]
        infos = [(0, 0, 0, "", (address, 1)) for address in addresses]
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda host, *a, **k: infos if host == "relay.localhost" else real(host, *a, **k)
        )
        findings = await look(f"http://relay.localhost:{closed_port()}/v1")
        assert re.findall(r"(\S+) port", findings["tcp"].seen) == ["127.0.0.1", "127.0.0.2", "::1", "::2"]

    @pytest.mark.parametrize(
        "problem, kind",
        [
            (OSError(errno.ECONNREFUSED, ""), "refused"),
            (OSError(errno.ETIMEDOUT, ""), "timeout"),
            (OSError(errno.EHOSTUNREACH, ""), "unreachable"),
            (OSError(errno.EPERM, ""), "denied"),
            (OSError(errno.EMFILE, ""), "files"),
            (OSError(errno.EDOM, ""), "other"),
            (ConnectionResetError(errno.ECONNRESET, ""), "reset"),
            (ConnectionAbortedError("SSL handshake is taking too long"), "reset"),
            (TimeoutError(), "timeout"),
            (socket.gaierror(socket.EAI_NONAME, "unknown"), "unknown-host"),
            (socket.gaierror(socket.EAI_AGAIN, "again"), "no-resolver"),
            (ssl.SSLError(1, "x"), "tls"),
            (asyncio.IncompleteReadError(b"", 1), "reset"),
            (NotHTTPError("no"), "not-http"),
            (RefusedError(418, "", ()), "tunnel"),
            (ValueError("no name"), "other"),
            (ValueError(), "other"),
        ],
    )
    def test_every_trouble_means_something(self, problem: Exception, kind: str) -> None:
        """What the system says becomes a line, what that means and what to change."""
        trouble = trouble_of(problem, 3)
        assert trouble.kind == kind
        assert trouble.text
        remark = remark_on(trouble, "the host", 7)
        assert remark.status == "fail"
        assert "{" not in remark.means + remark.change

    async def test_a_proxy_that_says_nothing(self) -> None:
        """A connection that cannot be opened in time is given up."""
        reached = await reach("h.invalid", 1, 20)
        assert reached.trouble is not None
        assert examine_proxy(ProxyChoice(why="named", source="X", shown="y"), reached).status == "fail"

    def test_tunnels_are_judged(self) -> None:
        """An answer without a status is told as the trouble it is; a login in the wrong place too."""
        silent = Tunnel(trouble=Trouble("timeout", "no answer"))
        assert "the proxy of HTTPS_PROXY" in examine_tunnel("h", 443, "HTTPS_PROXY", silent).means
        both = Tunnel(status=407, schemes=("ntlm", "basic"), trouble=Trouble("tunnel", "407"))
        assert "http://user:password@" in examine_tunnel("h", 443, "HTTPS_PROXY", both).change

    def test_times_are_readable(self) -> None:
        """Milliseconds up to a second, then seconds."""
        assert [milliseconds(each) for each in (0.0001, 0.0123, 0.9996, 12.34)] == [
            "under 1 ms",
            "12 ms",
            "1.0 s",
            "12.3 s",
        ]


class TestTLS:
    async def test_an_unknown_authority(self) -> None:
        """A certificate of an authority that is not trusted fails, is named, and nothing is sent there."""
        async with secure(trustme.CA(organization_name="Company Inspection"), trusted=False) as (server, environ):
            findings = await look(server.base_url, {**environ, "REQUESTS_CA_BUNDLE": "company.pem"})
            assert server.request_count == 0
        assert statuses(findings)["tls"] == "fail"
        assert "unable to get local issuer certificate; issued by Company Inspection" in findings["tls"].seen
        assert "SSL_CERT_FILE=company.pem" in findings["tls"].change
        assert "REQUESTS_CA_BUNDLE is set" in findings["tls"].change
        assert findings["models"].seen == "there is no TLS"

    async def test_a_file_of_authorities_that_lacks_one(self) -> None:
        """A file of certificates that is read is where the company's is added."""
        async with secure(trustme.CA()) as (_, environ), secure(trustme.CA(), trusted=False) as (server, _):
            findings = await look(server.base_url, {**environ, "REQUESTS_CA_BUNDLE": "company.pem"})
        assert findings["tls"].change.endswith("add its certificate to what SSL_CERT_FILE names.")

    async def test_a_file_of_authorities_that_is_missing(self) -> None:
        """A file of certificates that does not exist is why nothing is trusted."""
        async with secure(trustme.CA(), trusted=False) as (server, environ):
            findings = await look(server.base_url, {**environ, "SSL_CERT_FILE": "nowhere.pem"})
        assert "SSL_CERT_FILE=nowhere.pem names the authorities, and is missing" in findings["tls"].seen
        assert findings["tls"].change == "Mend SSL_CERT_FILE: what it names does not exist."

    async def test_another_host(self) -> None:
        """A certificate for other names fails, and they are shown."""
        async with secure(trustme.CA(), "elsewhere.example") as (server, environ):
            findings = await look(server.base_url, environ)
        assert findings["tls"].means == "The certificate is for elsewhere.example, not for 127.0.0.1."

    @pytest.mark.parametrize("days, means", [((-30, -3), "has expired"), ((3, 30), "not valid yet")])
    async def test_another_time(self, days: tuple[int, int], means: str) -> None:
        """A certificate whose time is over, or has not come, fails, and the clock of this machine is in doubt."""
        begins, ends = (dt.datetime.now(dt.UTC) + dt.timedelta(days=each) for each in days)
        async with secure(trustme.CA(), not_before=begins, not_after=ends) as (server, environ):
            findings = await look(server.base_url, environ)
        assert means in findings["tls"].means
        assert "of this machine" in findings["tls"].means
        assert "issued by trustme" in findings["tls"].seen

    async def test_soon(self) -> None:
        """A certificate that ends within two weeks is a warning."""
        ends = dt.datetime.now(dt.UTC) + dt.timedelta(days=5)
        async with secure(trustme.CA(), not_after=ends) as (server, environ):
            findings = await look(server.base_url, environ)
        assert statuses(findings) == {"tls": "warn"}
        assert "expires in 5 days" in findings["tls"].seen

    async def test_plain_http(self) -> None:
        """https to a port that speaks http is told as such."""
        async with listening(saying(b"HTTP/1.1 400 Bad Request\r\n\r\n", asks=False)) as port:
            findings = await look(f"https://127.0.0.1:{port}")
        assert statuses(findings)["tls"] == "fail"
        assert "may be plain http" in findings["tls"].means

    async def test_silence(self) -> None:
        """A handshake that hangs is given up in time."""
        async with listening(saying(b"", stays=True, asks=False)) as port:
            shake = await shake_hands(route(port, tls=True), ssl.create_default_context(), 0.2, {})
        assert shake.trouble is not None
        assert shake.trouble.kind == "timeout"

    async def test_somebody_who_hangs_up(self) -> None:
        """A handshake that is cut is told as such."""
        async with listening(saying(b"", asks=False)) as port:
            shake = await shake_hands(route(port, tls=True), ssl.create_default_context(), 20, {})
        assert shake.trouble is not None
        assert shake.trouble.kind == "reset"

    async def test_an_unknown_authority_that_hangs(self) -> None:
        """Where only the first handshake goes on, what it found stands without the certificate."""
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        met = 0

        async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal met
            met += 1
            if met == 1:
                await writer.start_tls(context)
            await asyncio.Event().wait()

        async with listening(once) as port:
            shake = await shake_hands(route(port, tls=True), ssl.create_default_context(), 1.5, {})
        assert (shake.verify_code, shake.certificate) == (20, None)
        assert "authority (unknown)" in examine_tls("h", port, shake, NOW).means

    @pytest.mark.parametrize(
        "code, text",
        [
            (10, "has expired"),
            (9, "by 2.0 days or more"),
            (62, "for a.example, b.example, not for h"),
            (18, "The authority (Acme) is not among those"),
            (92, "on which Python insists since 3.13"),
            (7, "does not verify"),
        ],
    )
    def test_judged(self, code: int, text: str) -> None:
        """Each thing that can be wrong with a certificate means something else."""
        certificate = Certificate(
            issuer="Acme", names=("a.example", "b.example"), begins=NOW + 2 * DAY, ends=NOW + 90 * DAY
        )
        shake = Handshake(certificate=certificate, verify_code=code, trouble=Trouble("certificate", "no"))
        finding = examine_tls("h", 443, shake, NOW)
        assert finding.status == "fail"
        assert text in finding.means
        assert "for a.example, b.example, expires in 90 days" in finding.seen
        assert examine_tls("h", 443, msgspec.structs.replace(shake, certificate=None), NOW).status == "fail"

    def test_many_names(self) -> None:
        """A certificate for dozens of names, or for none, takes one line."""
        for names, text in ((tuple("abcdefgh"), "for a, b, c, d, e, f and 2 more,"), ((), "for no name,")):
            certificate = Certificate(issuer="Acme", names=names, begins=0, ends=NOW + 90 * DAY)
            finding = examine_tls("h", 443, Handshake(version="TLSv1.3", certificate=certificate), NOW)
            assert finding.status == "ok"
            assert text in finding.seen

    def test_nothing_known(self) -> None:
        """A certificate that could not be read is no reason to fail."""
        assert read_certificate({}) is None
        assert examine_tls("h", 443, Handshake(version="TLSv1.2"), NOW).status == "ok"


def route(port: int, *, tls: bool = False, path: str = "/v1") -> Route:
    return Route(host="127.0.0.1", port=port, tls=tls, path=path, address="127.0.0.1")


def usual(**changes: object) -> Answered:
    return Answered(
        **{
            "asked": "gpt-4o-mini",
            "model": "gpt-4o-mini",
            "text": "Hello!",
            "finish_reason": "stop",
            "tokens": Tokens(10, 2, 12),
            "request_id": "req_1",
            "seconds": 0.5,
            **changes,
        }
    )


class TestModels:
    @pytest.mark.parametrize(
        "asked, listed, chosen",
        [
            ("o1", ["gpt-4o-mini"], "o1"),
            (None, [], "gpt-4o-mini"),
            (None, ["a", "gpt-4o-mini"], "gpt-4o-mini"),
            (None, ["text-embedding-3-small", "dall-e-3", "qwen-max"], "qwen-max"),
            (None, ["whisper-1"], "whisper-1"),
        ],
    )
    def test_who_is_asked(self, asked: str | None, listed: list[str], chosen: str) -> None:
        """The model named, else the usual one, else the first that looks able to talk."""
        assert choose_model(asked, listed) == chosen

    @pytest.mark.parametrize(
        "listed, asked, status, text",
        [
            ([], None, "warn", "lists no model"),
            (["a"], None, "ok", "1 in 10 ms: a"),
            (list("abcdefg"), None, "ok", "7 in 10 ms: a, b, c, d, e and 2 more"),
            (["gpt-4o"], "gpt-4", "warn", "Did you mean gpt-4o?"),
            (["qwen"], "gpt-4", "warn", "such as qwen"),
        ],
    )
    def test_judged(self, listed: list[str], asked: str | None, status: str, text: str) -> None:
        """How many there are and the first names are seen; a model that is missing has its nearest name."""
        finding = examine_models(listed, 0.01, asked)
        assert finding.status == status
        assert text in f"{finding.seen} {finding.means} {finding.change}"

    async def test_a_model_that_nobody_serves(self, server: ChatKoreServer) -> None:
        """A relay without a channel for the model points at its name."""
        server.always(error(503, "当前分组 default 下对于模型 gpt-4o-mini 无可用渠道", code="model_not_found"))
        findings = await look(server.base_url)
        assert statuses(findings) == {"tls": "skip", "call": "fail", "stream": "skip"}
        assert "nobody behind it who serves this model" in findings["call"].means
        assert findings["call"].seen.startswith("gpt-4o-mini: 503 ") or "无可用渠道" in findings["call"].seen


class TestErrors:
    @pytest.mark.parametrize(
        "problem, line, change",
        [
            (AuthenticationError("no", status_code=401, hint="x"), "401: no", "X."),
            (RateLimitError("slow", status_code=429, retry_after=2.4), "429: slow", "asks to wait 2 s"),
            (NotFoundError("no", status_code=404, hint="check base_url: x"), "404: no", "Now it is https://h/v1"),
            (InsufficientQuotaError("no", status_code=429, hint="pay"), "429: no", "Pay."),
            (BadRequestError("no", status_code=400), "400: no", "--model NAME"),
            (NoChannelError("no", status_code=503), "503: no", "--model NAME"),
            (APIStatusError("moved", status_code=301), "301: moved", "Check the base URL."),
            (StreamInterruptedError("cut"), "cut", "later"),
            (APITimeoutError("late", phase="answer"), "late", "--timeout"),
            (APIConnectionError("gone", meta=CallMeta(request_id="r1")), "gone (request id: r1)", "firewall"),
            (InvalidResponseError("what"), "what", "Check the base URL."),
            (ConfigurationError("so\nno"), "so no", "See what it says."),
        ],
    )
    def test_each_has_a_way_on(self, problem: ChatKoreError, line: str, change: str) -> None:
        """Each error of the client is one line, means something, and has its hint or another way on."""
        assert told(problem) == line
        remark = remark_on_error(problem, "https://h/v1")
        assert remark.means
        assert change in remark.change

    def test_a_missing_list(self) -> None:
        """Where no call will tell more, a missing list of models fails."""
        for problem in (NotFoundError("no", status_code=404), PermissionDeniedError("no", status_code=403)):
            assert examine_no_models(problem, "u", calls=True).status == "warn"
            assert examine_no_models(problem, "u", calls=False).status == "fail"

    async def test_a_server_that_stalls(self, server: ChatKoreServer) -> None:
        """A server that takes the request and says nothing is left in time, and the other steps are taken."""
        server.respond_with(lambda request: raw(Stall()) if request.method == "GET" else None)
        findings = await look(server.base_url, timeout=1.5)
        assert statuses(findings) == {"tls": "skip", "models": "fail"}
        assert "--timeout" in findings["models"].change

    async def test_a_call_that_stalls(self, server: ChatKoreServer) -> None:
        """A call that is not answered in time fails, and no stream is tried."""
        server.always(raw(Stall()))
        findings = await look(server.base_url, timeout=1.5)
        assert statuses(findings) == {"tls": "skip", "call": "fail", "stream": "skip"}
        assert findings["stream"].seen == "the call failed"

    async def test_a_redirect(self, server: ChatKoreServer) -> None:
        """A redirect names where the base URL should point, once."""
        server.respond_with(lambda _: error(301, "moved", headers={"location": "https://h.example/v1"}))
        findings = await look(server.base_url)
        assert statuses(findings) == {"tls": "skip", "models": "fail", "key": "skip", "call": "skip", "stream": "skip"}
        assert "point the base URL at https://h.example/v1" in findings["models"].change

    async def test_a_key_that_is_refused_for_streams(self, server: ChatKoreServer) -> None:
        """What happens only to a stream is the stream's failure."""
        server.script(completion("Hi"), error(401, "no streams for you"))
        findings = await look(server.base_url)
        assert statuses(findings) == {"tls": "skip", "stream": "fail"}

    async def test_garbage(self) -> None:
        """A server of another kind fails at the list of models, as not being HTTP."""
        async with listening(saying(b"SSH-2.0-OpenSSH_9.6\r\n")) as port:
            findings = await look(f"http://127.0.0.1:{port}/v1")
        assert statuses(findings)["models"] == "fail"
        assert "not HTTP" in findings["models"].seen
        assert findings["headers"].seen == "there was no answer"


class TestCalls:
    @pytest.mark.parametrize(
        "changes, status, text",
        [
            ({}, "ok", 'gpt-4o-mini answered "Hello!" in 500 ms; finish reason stop; 10 + 2 tokens; request id req_1'),
            ({"model": "gpt-4o-mini-2024-07-18"}, "ok", ""),
            ({"asked": "openai/gpt-4o-mini"}, "ok", ""),
            ({"asked": "gpt-4o-mini-latest"}, "ok", ""),
            ({"model": ""}, "ok", ""),
            ({"request_id": None}, "ok", "no request id"),
            ({"model": "qwen-7b"}, "warn", '"qwen-7b" answered in place of gpt-4o-mini.'),
            ({"finish_reason": None}, "warn", "whole or was cut"),
            ({"tokens": None}, "warn", "no usage"),
            ({"tokens": Tokens(0, 0, 0)}, "warn", "nothing was used"),
            ({"tokens": Tokens(10, 2, 40)}, "warn", "a total of 40"),
            ({"tokens": Tokens(10, 17, 27)}, "warn", "17 tokens are more than max_tokens allowed"),
            ({"text": " ", "tokens": Tokens(10, 0, 10)}, "warn", "The answer is empty."),
            ({"text": "", "finish_reason": "length"}, "warn", "A model that reasons first"),
            ({"text": "", "other": True}, "ok", ""),
            ({"text": "x" * 100}, "ok", f'"{"x" * 57}..."'),
            ({"text": "\x1b[2J\na"}, "ok", '"\ufffd[2J a"'),
        ],
    )
    def test_judged(self, changes: dict[str, object], status: str, text: str) -> None:
        """Text, finish reason, usage, model and request id are looked at, each for what goes wrong with relays."""
        finding = examine_call(usual(**changes))
        assert finding.status == status
        assert text in f"{finding.seen} {finding.means}"

    async def test_an_answer_that_lacks_things(self, server: ChatKoreServer) -> None:
        """What a relay leaves out of an answer is told, all in one finding."""
        server.script(completion("Hi", usage=False, finish_reason=None, model="other"))
        findings = await look(server.base_url)
        assert statuses(findings) == {"tls": "skip", "call": "warn"}
        assert "no finish reason; no usage" in findings["call"].seen
        assert '"other" answered in place' in findings["call"].means

    async def test_a_request_that_is_refused(self, server: ChatKoreServer) -> None:
        """A plain request that the server refuses fails, and is not sent in another form."""
        server.always(error(400, "no such thing"))
        findings = await look(server.base_url)
        assert "400" in findings["call"].seen
        assert server.request_count == 2


class TestStreams:
    @pytest.mark.parametrize(
        "reply, status, text",
        [
            (stream("one two three", pings=2), "ok", "2 pings, "),
            (stream(["all of it"]), "warn", "The whole answer came in one delta"),
            (stream("one two", usage=False), "warn", "No usage came"),
            (stream("one two", done=False), "warn", "does not end in [DONE]"),
            (stream("one two", finish_reason=None), "warn", "that is how relays truncate"),
            (stream("one two", headers={"Content-Type": "text/plain"}), "warn", "announced as text/plain"),
            (stream("one two", headers={"Content-Type": ""}), "warn", "announced as nothing"),
            (completion("one two"), "warn", "it does not stream this model"),
            (stream("one two", headers={"Connection": "close"}), "warn", "after the stream (Connection: close)"),
            (stream("one two", headers={"Content-Encoding": "identity"}), "ok", ""),
            (stream([]), "warn", "The answer is empty"),
            (
                msgspec.structs.replace(stream("one two"), steps=(*stream("one two").steps, b"data: more\n\n")),
                "warn",
                "10 bytes come after [DONE]",
            ),
            (
                msgspec.structs.replace(stream("one two"), steps=(*stream("one two").steps, Cut())),
                "warn",
                "cut where the body should end",
            ),
            (
                msgspec.structs.replace(stream("one two"), steps=(*stream("one two").steps, Stall())),
                "warn",
                "does not end after [DONE]",
            ),
            (stream("one two", finish_reason=None, usage=False, done=False), "fail", "cut before it was finished"),
            (cut_after(stream("one two three"), 400), "fail", "connection broke before the answer was whole"),
            (events({"error": {"message": "upstream died"}}), "fail", "upstream died"),
        ],
    )
    async def test_what_a_server_sends(self, server: ChatKoreServer, reply: Reply, status: str, text: str) -> None:
        """What the client copes with in silence is told: what is missing, and what delays a stream or its connection."""
        server.respond_with(lambda request: reply if request.body and request.json.get("stream") else None)
        finding = (await look(server.base_url))["stream"]
        assert finding.status == status, finding
        assert text in f"{finding.seen} {finding.means}"

    @pytest.mark.parametrize(
        "changes, text",
        [
            ({"deltas": 5, "spread": 0.001, "first_delta": 2.0}, "came at once, after 2.0 s"),
            ({"encoding": "gzip"}, "compressed (gzip)"),
            ({"pings": 3, "silence": 12.0, "silent_pings": 2}, "Pings fill a silence of 12.0 s"),
            ({"silence": 12.0}, "Nothing comes for 12.0 s"),
            ({"ending": "timeout"}, "did not end in time"),
            ({"ending": "limit"}, "more came than sixty tokens can be"),
            ({"reused": False}, "The connection is closed after the stream."),
            ({"status": 429}, "was refused"),
        ],
    )
    def test_judged(self, changes: dict[str, object], text: str) -> None:
        """Buffering, compression, silence and streams without end are seen by their marks."""
        good = {
            "content_type": "text/event-stream",
            "events": 9,
            "deltas": 7,
            "first_delta": 0.5,
            "spread": 1.0,
            "usage": True,
            "done": True,
            "reused": True,
        }
        answered = usual(first_token=0.5, completeness="complete")
        assert examine_stream(answered, RawStream(**good)).status == "ok"
        finding = examine_stream(answered, RawStream(**{**good, **changes}))
        assert finding.status == ("fail" if changes.get("ending") == "limit" else "warn")
        assert text in finding.means

    async def test_the_second_look_fails(self, server: ChatKoreServer) -> None:
        """When only the first stream is answered, that is told, and is no failure."""
        server.script(completion("Hi"), stream("one two"), raw(Cut()))
        finding = (await look(server.base_url))["stream"]
        assert finding.status == "warn"
        assert finding.seen.endswith("a second one failed: the connection was closed without an answer")
        server.script(completion("Hi"), stream("one two"), error(429, "slow"))
        assert (await look(server.base_url))["stream"].seen.endswith("was answered with status 429")

    async def test_a_server_that_does_not_keep_its_promise(self) -> None:
        """A connection that could be used again by its headers, and is closed, is not one that is used again."""
        chunk = b'data: {"choices": [{"delta": {"content": "x"}}]}\n\ndata: [DONE]\n\n'
        said = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(chunk), chunk)
        async with listening(saying(said)) as port:
            seen = await watch(port)
        assert (seen.reused, seen.close, seen.done, seen.ending) == (False, "", True, "end")


async def watch(port: int, timeout: float = 20) -> RawStream | Trouble:
    return await watch_stream(route(port), ssl.create_default_context(), KEY, {"stream": True}, timeout)


OK = b"HTTP/1.1 200 OK\r\n"


class TestWire:
    @pytest.mark.parametrize(
        "said, kind",
        [
            (b"", "reset"),
            (b"HTTP/2 200\r\n\r\n", "not-http"),
            (b"HTTP/1.1 2x0 OK\r\n\r\n", "not-http"),
            (b"SSH-2.0-x\r\n", "not-http"),
            (OK + b"x: " + b"y" * 70_000 + b"\r\n\r\n", "not-http"),
            (OK + b"x: y\r\n" * 20_000 + b"\r\n", "not-http"),
            (OK + b"Content-Length: -1\r\n\r\n", "not-http"),
            (b"HTTP/1.1 103 Early\r\n\r\n" * 5 + OK + b"\r\n", "not-http"),
            (OK + b"x: y\r\n", "reset"),
        ],
    )
    async def test_no_answer(self, said: bytes, kind: str) -> None:
        """What is not HTTP is told as such, however long it is."""
        async with listening(saying(said)) as port:
            seen = await watch(port)
        assert isinstance(seen, Trouble)
        assert seen.kind == kind

    @pytest.mark.parametrize(
        "said, ending, events",
        [
            (OK + b"\r\n", "end", 0),
            (OK + b"Content-Length: 0\r\n\r\n", "end", 0),
            (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 9\r\n\r\ndata: 1\n\n", "end", 1),
            (OK + b"Content-Length: 99\r\n\r\ndata: 1\n\n", "cut", 1),
            (OK + b"Transfer-Encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n0\r\n\r\n", "end", 1),
            (OK + b"Transfer-Encoding: chunked\r\n\r\n5;x=y\r\ndata:\r\n4\r\n 1\n\n\r\n0\r\na: b\r\n\r\n", "end", 1),
            (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "cut", 0),
            (OK + b"Transfer-Encoding: chunked\r\n\r\n9\r\ndata: 1\n\nxx\r\n", "cut", 1),
            (OK + b"Transfer-Encoding: chunked\r\n\r\n9\r\ndata", "cut", 0),
            (OK + b"\r\n" + b": \n" * (MAX_STREAM // 3 + 1), "limit", 0),
            (OK + b"\r\n" + b"x" * (MAX_STREAM + 20_000), "limit", 0),
        ],
    )
    async def test_bodies(self, said: bytes, ending: str, events: int) -> None:
        """A body ends by its length, by its chunks or with its connection, and is read within bounds."""
        async with listening(saying(said)) as port:
            seen = await watch(port)
        assert isinstance(seen, RawStream)
        assert (seen.ending, seen.events) == (ending, events)

    async def test_a_body_without_end(self) -> None:
        """A server that never stops is left after a megabyte, one that drips after the time for a step."""

        async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(OK + b"\r\n")
            while True:
                writer.write(b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n' * 100)
                await writer.drain()

        async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(OK + b"\r\n")
            while True:
                writer.write(b": still here\n\n")
                await asyncio.sleep(0.02)

        async def drip_header(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(OK)
            while True:
                writer.write(b"x")
                await asyncio.sleep(0.02)

        async with listening(flood) as port:
            assert (await watch(port)).ending == "limit"
        async with listening(drip) as port:
            seen = await watch(port, 0.7)
            assert seen.ending == "timeout"
            assert seen.silent_pings == seen.pings > 0
        async with listening(drip_header) as port:
            assert (await watch(port, 0.3)).kind == "timeout"

    @pytest.mark.parametrize(
        "head, close",
        [
            (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n", "HTTP/1.0"),
            (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: Keep-Alive\r\n", ""),
            (b"HTTP/1.1 200\r\nContent-Length: 0\r\nConnection: x, Close\r\n", "Connection: close"),
            (b"HTTP/1.1 200 OK\r\n", "its end is the end of the answer"),
        ],
    )
    async def test_what_rules_a_second_request_out(self, head: bytes, close: str) -> None:
        """A server that says that it will hang up is believed."""
        async with listening(saying(head + b"\r\n")) as port:
            seen = await watch(port)
        assert (seen.close, seen.reused) == (close, False)

    def test_hosts_are_named_as_urls_name_them(self) -> None:
        """An IPv6 address stands in brackets, and the usual port is left out."""
        for host, port, tls, authority in (
            ("h", 443, True, "h"),
            ("h", 80, False, "h"),
            ("h", 443, False, "h:443"),
            ("::1", 8000, False, "[::1]:8000"),
        ):
            assert Route(host=host, port=port, tls=tls, path="").authority == authority

    async def test_an_ipv6_address_through_a_proxy(self) -> None:
        """CONNECT names an IPv6 address in brackets."""
        heads: list[bytes] = []

        async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

        async with listening(connect) as port:
            link = await Link.open("127.0.0.1", port)
            await link.tunnel("::1", 443, None)
            link.close()
        assert heads[0].startswith(b"CONNECT [::1]:443 HTTP/1.1\r\n")


class TestStreamLog:
    CHUNK = b'data: {"choices": [{"delta": {"content": "x"}}]}'

    @pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
    def test_any_split(self, end: bytes) -> None:
        """Whatever ends lines, and wherever pieces are cut, the same is seen."""
        lines = [
            b": PING",
            b"",
            self.CHUNK,
            b"",
            b"event: ping",
            b"data: {}",
            b"",
            self.CHUNK,
            b"",
            b"data: [DONE]",
            b"",
        ]
        body = end.join([*lines, b""])
        for size in (1, 2, 3, 7, len(body)):
            log = StreamLog(0.0)
            for at in range(0, len(body), size):
                log.feed(body[at : at + size], 1.0)
            seen = log.finish(1.0)
            assert (seen.pings, seen.events, seen.deltas, seen.done) == (2, 2, 2, True), (end, size)

    def test_times(self) -> None:
        """The first delta, the time between first and last, and the longest silence are told apart."""
        log = StreamLog(10.0)
        for now in (11.0, 11.5, 14.5, 15.0):
            log.feed(b": PING\n\n" if now == 14.0 else self.CHUNK + b"\n\n", now)
        log.feed(b": PING\n\n", 16.0)
        seen = log.finish(20.0)
        assert (seen.first_delta, seen.spread, seen.silence, seen.silent_pings) == (1.0, 4.0, 5.0, 1)

    @pytest.mark.parametrize(
        "data, deltas, usage",
        [
            (b'{"choices": [{"delta": {"reasoning_content": "x"}}]}', 1, False),
            (b'{"choices": [{"message": {"content": "x"}}], "usage": {}}', 1, True),
            (b'{"choices": [{"usage": {"total_tokens": 1}}]}', 0, True),
            (b'{"choices": [], "usage": null}', 0, False),
            (b'{"choices": null}', 0, False),
            (b'{"choices": [7]}', 0, False),
            (b"[1]", 0, False),
            (b"not JSON", 0, False),
            (b"\xff", 0, False),
            (b"[" * 100_000, 0, False),
        ],
    )
    def test_any_data(self, data: bytes, deltas: int, usage: bool) -> None:
        """What is in an event is counted, and nonsense is not."""
        log = StreamLog(0.0)
        log.feed(b"data: " + data + b"\n\n", 1.0)
        seen = log.finish(1.0)
        assert (seen.events, seen.deltas, seen.usage) == (1, deltas, usage)

    def test_one_document(self) -> None:
        """JSON in place of a stream is one event, however many lines it has."""
        log = StreamLog(0.0, whole=True)
        log.feed(b'{"choices": [\n', 1.0)
        log.feed(b'{"message": {"content": "x"}}]}', 1.0)
        assert log.finish(1.0).deltas == 1

    def test_the_end_by_name(self) -> None:
        """An event named done is the end, with data or without; the last event may lack its empty line."""
        for body in (b"event: done\n\n", b"event: done\ndata: {}\n\n", b"id: 7\nretry: 9\ndata: [DONE]"):
            log = StreamLog(0.0)
            log.feed(body, 1.0)
            seen = log.finish(1.0)
            assert seen.done
            assert seen.events == 0

    def test_an_endless_line_is_cheap(self) -> None:
        """A line that comes byte by byte is not read anew for each of them."""
        log = StreamLog(0.0)
        began = time.perf_counter()
        for _ in range(200_000):
            log.feed(b"x", 1.0)
        assert time.perf_counter() - began < 20
        assert log.finish(1.0).events == 0


class TestHeaders:
    @pytest.mark.parametrize(
        "headers, status, text",
        [
            ({}, "ok", "no rate-limit headers"),
            (
                {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "59"},
                "ok",
                "requests: 59 of 60 left",
            ),
            (
                {"x-ratelimit-remaining-tokens": "5", "x-ratelimit-reset-tokens": "6m0s"},
                "ok",
                "tokens: 5 of unknown left, reset in 360 s",
            ),
            ({"x-ratelimit-limit-tokens": "5"}, "ok", "tokens: some of 5 left"),
            ({"x-ratelimit-remaining-requests": "0"}, "warn", "Nothing is left of: requests."),
            (
                {"x-ratelimit-reset-requests": "1s"},
                "ok",
                "a form the client does not read: x-ratelimit-reset-requests: 1s",
            ),
            ({"ratelimit-remaining": "5"}, "ok", "a form the client does not read: ratelimit-remaining: 5"),
            ({"date": "Fri, 15 Jan 2027 08:00:30 GMT"}, "ok", "the clocks agree"),
            ({"date": "Fri, 15 Jan 2027 08:02:00 GMT"}, "warn", "the server's clock is 2 minutes ahead"),
            ({"date": "Fri, 15 Jan 2027 07:58:00 -0000"}, "warn", "the server's clock is 2 minutes behind"),
            ({"date": "Fri, 15 Jan 2027 07:58:00 GMT", "age": "120"}, "ok", "the clocks agree"),
            ({"date": "Mon, 15 Jan 2024 07:58:00 GMT"}, "warn", "the server's clock is 1096 days behind"),
            ({"date": "Fri, 15 Jan 2027 11:00:00 GMT"}, "warn", "the server's clock is 3 hours ahead"),
            ({"date": "Fri, 15 Jan 2027 08:01:30 GMT"}, "warn", "the server's clock is 90 s ahead"),
            ({"date": "yesterday"}, "ok", "no date"),
        ],
    )
    def test_judged(self, headers: dict[str, str], status: str, text: str) -> None:
        """Limits in the usual form and in others are shown, and clocks that are apart are a warning."""
        from chatkore_async._headers import rate_limit

        meta = CallMeta(headers={"x": "y", **headers}, rate_limit=rate_limit(headers))
        finding = examine_headers(read_headers([(meta, NOW)], Mask([])))
        assert finding.status == status
        assert text in f"{finding.seen} {finding.means}"

    def test_no_answer(self) -> None:
        """Where there was no answer there are no headers."""
        assert examine_headers(Headers()).status == "skip"

    async def test_from_the_wire(self, server: ChatKoreServer) -> None:
        """Limits in any answer are seen, an error's too."""
        limits = {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "0"}
        server.script(error(429, "slow", headers={**limits, "retry-after": "7"}))
        findings = await look(server.base_url)
        assert "asks to wait 7 s" in findings["call"].change
        assert findings["headers"].seen == "requests: 0 of 60 left; no date"
        assert statuses(findings) == {"tls": "skip", "call": "fail", "stream": "skip", "headers": "warn"}


def echoing(key: str) -> dict[str, object]:
    """Return answers that tell the key, in bodies and headers."""
    headers = {"x-request-id": key, "x-you-sent": f"Bearer {key}", "x-ratelimit-echo": key, "date": key}
    return {
        "401": error(401, f"Incorrect API key provided: {key}.", code=key, param=key, headers=headers),
        "403": error(403, f"not with {key}", headers=headers),
        "404": error(404, f"nothing for {key}", headers=headers),
        "500 html": html(500, f"upstream refused {key}", headers=headers),
        "302": error(302, "moved", headers={"location": f"https://elsewhere/?key={key}"}),
        "page": html(200, f"hello {key}", headers=headers),
        "text": json_reply(f"hello {key}"),
        "garbage": raw(f"SSH-2.0-{key}\r\n".encode()),
        "bad header": raw(f"HTTP/1.1 200 OK\r\nno colon {key}\r\n\r\n".encode()),
        "models": json_reply({"data": [{"id": key}, {"id": f"m{key}"}]}, headers=headers),
        "answer": completion(f"You are {key}, I think", model=key, finish_reason=key, headers=headers),
        "long": completion(f"{'x' * 40}{key}", headers=headers),
        "stream": stream(f"You are {key} indeed", model=key, headers={**headers, "content-type": f"text/{key}"}),
        "event": events({"error": {"message": f"bad {key}"}}),
    }


class TestSecrets:
    @pytest.mark.parametrize("key", [KEY, "MARKED-0123+key/without=prefix"], ids=["sk", "other"])
    @pytest.mark.parametrize("case", echoing(""))
    async def test_no_finding_tells_the_key(self, server: ChatKoreServer, case: str, key: str) -> None:
        """A server that echoes the key, in whatever way, does not get it into a finding."""
        reply = echoing(key)[case]

        def respond(request: RecordedRequest) -> Reply | None:
            if case in ("answer", "long") and (request.method == "GET" or request.json.get("stream")):
                return None
            if case in ("stream", "event") and (request.method == "GET" or not request.json.get("stream")):
                return None
            if case == "models" and request.method != "GET":
                return None
            return reply

        server.respond_with(respond)
        findings = await look(server.base_url, {"CHATKORE_API_KEY": key})
        assert MARK not in str(findings)
        # In halves neither.
        assert "MARKED-" not in str(findings)
        assert server.requests[0].headers["authorization"] == f"Bearer {key}"

    async def test_nor_one_that_cannot_be_sent(self) -> None:
        """A key that is refused, a key in the place of the URL or of the model, and a quoted one stay unsaid."""
        for environ, url, model in (
            ({"CHATKORE_API_KEY": f"{KEY}\n{KEY}"}, f"https://{KEY}@h/v1", None),
            ({"CHATKORE_API_KEY": f'"{KEY}"'}, KEY, None),
            ({"CHATKORE_API_KEY": f" Bearer {KEY}"}, f"http://127.0.0.1:{closed_port()}/{KEY}", KEY),
        ):
            assert MARK not in str(await look(url, environ, model=model))

    def test_forms_are_masked(self) -> None:
        """A key is masked in the forms in which it is echoed; what is too short to be one is left alone."""
        mask = Mask(['a/b+c=d"é', "test", ""])
        assert mask('x a/b+c=d"é y a%2Fb%2Bc%3Dd%22%C3%A9 z a/b+c=d\\"\\u00e9') == "x *** y *** z ***"
        assert mask("a test") == "a test"
        assert Mask([])("a test") == "a test"


class TestFindings:
    def test_the_worst_counts(self) -> None:
        """A finding is as bad as the worst of its remarks, and says all of them."""
        warn, fail = Remark("warn", "A.", "B."), Remark("fail", "C.", "D.")
        assert found("url", ["x", "", "y\nz"], [None, warn, fail]) == Finding(
            "url", "fail", "x; y z", "A.\nC.", "B.\nD."
        )
        assert found("url", ["x"], [warn, fail]).remarks == [("A.", "B."), ("C.", "D.")]
        assert found("url", ["x"], [warn]).status == "warn"
        assert found("url", ["x"], [None]) == Finding("url", "ok", "x")

    @pytest.mark.parametrize(
        "given, words, good",
        [
            (["ok", "ok"], "All is well.", True),
            (["ok", "skip"], "All is well; 1 step not looked at.", True),
            (["skip", "skip"], "All is well; 2 steps not looked at.", True),
            (["warn", "ok"], "It works, with 1 warning: settings.", True),
            (["warn", "warn"], "It works, with 2 warnings: settings, url.", True),
            (["warn", "fail"], "Something is wrong at url: begin there.", False),
            (["fail", "fail"], "Something is wrong at settings: begin there. Then see url.", False),
        ],
    )
    def test_the_verdict(self, given: list[str], words: str, good: bool) -> None:
        """It all ends in one sentence, which says where to begin."""
        findings = [Finding(step, status, "x") for step, status in zip(STEPS, given, strict=False)]
        assert verdict(findings) == (words, good)

    def test_snippets_are_short(self) -> None:
        """A text is cut to a length, with a sign that it was."""
        assert snippet("abcdef", 6) == '"abcdef"'
        assert snippet("abcdefg", 6) == '"abc..."'


SOME = [
    Finding("settings", "ok", "a key"),
    Finding("url", "warn", "a URL " * 30, "It is long. " * 10 + "\nIt is red.", "Make it short. " * 5 + "\nPaint it."),
    Finding("tls", "fail", "https://" + "x" * 100, "No.", "Yes."),
    skipped("models", "there is no TLS"),
]


class TestCharts:
    @pytest.mark.parametrize("width", [40, 59, 60, 80, 120])
    def test_fits(self, width: int) -> None:
        """No line is longer than the terminal, whatever is in a finding."""
        out = StringIO()
        chart = TerminalChart(Console(file=out, force_terminal=True, width=width, highlight=False, _environ={}))
        chart.begin("chatkore_async 1")
        with chart.working("tls"):
            pass
        for finding in SOME:
            chart.show(finding)
        chart.end("All is well.", good=True)
        shown = ESCAPE.sub("", out.getvalue())
        assert max(map(len, re.split(r"[\r\n]", shown))) <= width
        assert shown.count("Make") == 5
        assert re.search(r"^fail +tls", shown, re.MULTILINE)
        assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1

    def test_colour_is_not_alone(self) -> None:
        """Each status is a word, in a colour where there are colours."""
        out = StringIO()
        console = Console(file=out, force_terminal=True, width=80, color_system="standard", _environ={})
        chart = TerminalChart(console)
        for finding in SOME:
            chart.show(finding)
        chart.end("No.", good=False)
        for code, word in (("32", "ok"), ("1;35", "warn"), ("1;31", "fail"), ("2", "skip"), ("1;31", "No.")):
            assert re.search(rf"\x1b\[{code}m\n?{re.escape(word)}", out.getvalue()), word

    def test_plain(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A pipe gets a line for each finding, and one each for what it means and what to change."""
        chart = PlainChart()
        chart.begin("about")
        with chart.working("tls"):
            chart.show(Finding("tls", "warn", "seen", "Means.", "Change."))
        chart.end("It works.", good=True)
        assert capsys.readouterr().out == (
            "about\n\n"
            "warn  tls       seen\n"
            "                means: Means.\n"
            "                change: Change.\n"
            "\nIt works.\n"
        )

    def test_is_recognised(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whether it is a terminal is asked of standard output."""
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stdout", StringIO())
        assert isinstance(make_chart(), PlainChart)

        class Tty(StringIO):
            def isatty(self) -> bool:
                return True

        monkeypatch.setattr(sys, "stdout", Tty())
        assert isinstance(make_chart(), TerminalChart)


@contextlib.contextmanager
def served(**options) -> Iterator[ChatKoreServer]:
    """Serve on a thread of its own, for commands that bring their own event loop."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    server = ChatKoreServer(interval=INTERVAL, **options)

    async def serve() -> None:
        async with server:
            stopped.clear()
            ready.set()
            await ended.wait()

    stopped, ended = threading.Event(), asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(30)
        yield server
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(30)
        loop.close()


def command(*args: str, key: str = KEY) -> click.testing.Result:
    return CliRunner(env={"CHATKORE_API_KEY": key}).invoke(app, ["doctor", *args])


class TestCommand:
    def test_a_good_day(self) -> None:
        """Piped, it is a line for each step and one at the end, without escape codes, and the status is 0."""
        with served() as server:
            result = command("--base-url", server.base_url)
        assert result.exit_code == 0, result.output
        assert [line.split()[1] for line in result.output.splitlines()[2:13]] == list(STEPS)
        assert result.output.startswith("chatkore_async ")
        assert result.output.endswith("\n\nAll is well; 1 step not looked at.\n")
        assert "\x1b" not in result.output

    def test_a_bad_day(self) -> None:
        """Where something failed, the status is 1 and the last line says where to begin."""
        result = command("--base-url", f"http://127.0.0.1:{closed_port()}")
        assert result.exit_code == 1
        assert result.output.endswith("\n\nSomething is wrong at tcp: begin there.\n")

    def test_json(self) -> None:
        """`--json` is one document in ASCII, with the same names whatever was found."""
        with served() as server:
            server.always(completion("“é”"))
            well = command("--base-url", server.base_url, "--json")
        ill = command("--base-url", "nonsense", "--json")
        assert (well.exit_code, ill.exit_code) == (0, 1)
        for result, ok in ((well, True), (ill, False)):
            assert result.stdout.isascii()
            whole = json.loads(result.stdout)
            assert list(whole) == ["base_url", "ok", "findings", "versions"]
            assert whole["ok"] is ok
            assert [each["step"] for each in whole["findings"]] == list(STEPS)
            assert {tuple(each) for each in whole["findings"]} == {("step", "status", "seen", "means", "change")}
            assert {"chatkore_async", "python", "aiohttp", "openssl"} <= set(whole["versions"])
        assert json.loads(well.stdout)["base_url"] == server.base_url
        assert json.loads(ill.stdout)["base_url"] == ""

    def test_warnings_of_the_client_are_findings(self) -> None:
        """What the client would log is not said a second time."""
        result = command("--base-url", "http://nowhere.invalid/v1")
        assert result.output.startswith("chatkore_async ")
        assert result.output.count("can read the key") == result.output.count("read") == 1

    @pytest.mark.parametrize("value", ["nan", "inf", "0", "-1", "soon"])
    def test_impossible_seconds(self, value: str) -> None:
        """A time that is none is wrong usage."""
        assert command("--timeout", value).exit_code == 2

    def test_the_key_is_in_no_output(self) -> None:
        """Neither a document nor lines tell the key, also with `--debug` and with a server that echoes it."""
        with served() as server:
            server.respond_with(lambda _: error(401, f"bad {KEY}", headers={"x-request-id": KEY}))
            for args in ([], ["--json"], ["--debug"]):
                result = command("--base-url", server.base_url, *args)
                assert result.exit_code == 1
                assert MARK not in result.output

    def test_a_key_in_the_wrong_place_is_in_no_output(self) -> None:
        """A key that was pasted into the URL, or given as the model, is not told either."""
        port = closed_port()
        for url in (f"http://127.0.0.1:{port}/{KEY}/v1", f"http://{KEY}@127.0.0.1:{port}", KEY):
            for args in ([], ["--json"]):
                result = command("--base-url", url, "--model", KEY, *args)
                assert result.exit_code == 1
                assert MARK not in result.output

    def test_help_fits_a_screen(self) -> None:
        """Help is at most 24 lines of 80 columns, and has examples."""
        result = CliRunner().invoke(app, ["doctor", "--help"], prog_name="chatkore", terminal_width=80)
        lines = result.output.splitlines()
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 80
        assert "Examples:" in result.output


class TestProcess:
    def test_a_terminal_without_unicode(self) -> None:
        """In a locale that knows nothing but ASCII, on 40 columns, every line fits."""
        with served() as server:
            server.always(completion("“é”"))
            status, shown = in_terminal(server.base_url, {"LC_ALL": "C", "COLUMNS": "40", "PYTHONUTF8": "0"})
        assert status == 0, shown
        shown = ESCAPE.sub("", shown)
        assert shown.isascii()
        assert max(map(len, re.split(r"[\r\n]+", shown))) <= 40
        assert "warn  stream" in {line.strip() for line in shown.splitlines()}

    def test_no_color(self) -> None:
        """`NO_COLOR` is honoured."""
        _, shown = in_terminal(f"http://127.0.0.1:{closed_port()}", {"NO_COLOR": "1"})
        assert re.search(r"fail +tcp", ESCAPE.sub("", shown))
        assert not re.search(r"\x1b\[(?:\d+;)*3\dm", shown)

    @pytest.mark.parametrize("place", ["models", "call", "stream"])
    def test_ctrl_c(self, place: str) -> None:
        """Whatever it waits for, Ctrl-C ends it at once, with one word, whole lines and status 130."""
        with served() as server:
            server.respond_with(
                lambda request: (
                    raw(Stall())
                    if (place == "models") == (request.method == "GET")
                    and (place != "stream" or request.json.get("stream"))
                    else None
                )
            )
            with subprocess.Popen(
                [*DOCTOR, "--base-url", server.base_url],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=ROOT,
                env={**ENVIRONMENT, "CHATKORE_API_KEY": KEY},
            ) as process:
                seen_first(server, {"models": 1, "call": 2, "stream": 3}[place])
                process.send_signal(signal.SIGINT)
                began = time.monotonic()
                out, err = process.communicate(timeout=30)
                assert time.monotonic() - began < 15
        assert (process.returncode, err) == (130, b"interrupted\n")
        assert out.endswith(b"\n")

    def test_ctrl_c_while_a_name_is_looked_up(self) -> None:
        """A resolver that hangs, which nothing can cancel, does not keep the process from ending."""
        code = (
            "import socket, sys, time\n"
            "def hang(*_, **__):\n"
            "    print('looking up', flush=True)\n"
            "    time.sleep(600)\n"
            "socket.getaddrinfo = hang\n"
            "from chatkore_async.cli import main\n"
            "sys.argv = ['chatkore', 'doctor', '--base-url', 'https://relay.example/v1']\n"
            "main()\n"
        )
        with subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env={**ENVIRONMENT, "CHATKORE_API_KEY": KEY},
        ) as process:
            assert process.stdout is not None
            assert any(b"looking up" in line for line in process.stdout)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, b"interrupted\n")

    def test_ctrl_c_in_a_terminal(self) -> None:
        """Ctrl-C at the sign that it works leaves a terminal with its cursor."""
        with served() as server:
            server.respond_with(lambda _: raw(Stall()))
            status, shown = in_terminal(server.base_url, {}, interrupt_at="models")
        assert status == 130
        assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
        assert ESCAPE.sub("", shown).endswith("interrupted\r\n")
        assert "Traceback" not in shown


def seen_first(server: ChatKoreServer, number: int) -> None:
    """Wait, on another thread than the server's, until it has so many requests."""
    for _ in range(30_000):
        if server.request_count >= number:
            return
        threading.Event().wait(0.001)
    raise AssertionError(f"{server.request_count} of {number} requests")


def in_terminal(url: str, variables: dict[str, str], interrupt_at: str | None = None) -> tuple[int, str]:
    """Run the command in a terminal of 80 columns, perhaps pressing Ctrl-C; return its status and all that was shown."""
    ours, theirs = pty.openpty()
    shown = b""
    with subprocess.Popen(
        [*DOCTOR, "--base-url", url],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env={
            **ENVIRONMENT,
            "CHATKORE_API_KEY": KEY,
            "TERM": "xterm-256color",
            "COLUMNS": "80",
            "LINES": "24",
            **variables,
        },
    ) as process:
        os.close(theirs)
        try:
            while piece := os.read(ours, 4096):
                shown += piece
                if interrupt_at is not None and interrupt_at.encode() in shown:
                    process.send_signal(signal.SIGINT)
                    interrupt_at = None
        except OSError:
            pass  # Linux's way of saying that the terminal is closed
        finally:
            os.close(ours)
    return process.returncode, shown.decode()
