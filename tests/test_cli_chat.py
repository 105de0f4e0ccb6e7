"""`chatkore chat`: what it asks, what it shows and where, how it is stopped."""

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import stat
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Callable, Iterator
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import click
import pytest
from click.testing import CliRunner

from chatkore_async import AsyncChatKore, ChatCompletion, ConfigurationError, Retry
from chatkore_async.cli._answer import Manner, Retries, Warnings, calls, document, pretty, remarks, summary
from chatkore_async.cli._app import app
from chatkore_async.cli._chat import once, question_in
from chatkore_async.cli._conversation import HELP, Conversation, command_in, message_in
from chatkore_async.cli._paper import Paper
from chatkore_async.cli._printable import mended, printable
from chatkore_async.cli._prompt import LONGEST, history_file, make_history
from chatkore_async.cli._run import interruptible, run
from chatkore_async.cli._talk import Talk
from chatkore_async.testing import (
    ChatKoreServer,
    Cut,
    Hold,
    Reply,
    Reset,
    completion,
    error,
    events,
    html,
    stream,
    tool_call,
)
from chatkore_async.types import (
    ChatCompletionMessage,
    Choice,
    CompletionTokensDetails,
    CustomToolCall,
    FunctionCall,
    ToolCall,
    Usage,
)

pty = pytest.importorskip("pty")

ROOT = Path(__file__).parents[1]
CHAT = [sys.executable, "-W", "error", "-m", "chatkore_async.cli", "chat"]
PATIENCE = 60.0
"""Seconds after which a test that waits has failed; nothing takes them."""

ESCAPE = re.compile(rb"\x1b(?:\[[0-9;?]*[A-Za-z]|[=>])")
COLOUR = re.compile(rb"\x1b\[(?:\d+;)*[349]\d(?:;\d+)*m")
READY = b"\x1b[?2004h"
"""What the prompt tells a terminal when it takes keys: to bracket what is pasted."""

UP, CTRL_C, CTRL_D, ALT_ENTER = b"\x1b[A", b"\x03", b"\x04", b"\x1b\r"


def environment(server: ChatKoreServer | None, home: Path, **variables: str) -> dict[str, str]:
    """Return the variables of a process that talks to a server and has a home of its own."""
    unwanted = ("NO_COLOR", "FORCE_COLOR", "PYTHONASYNCIODEBUG", "XDG_STATE_HOME", "COLUMNS", "LINES")
    where = {} if server is None else {"CHATKORE_BASE_URL": server.base_url}
    return {
        **{name: value for name, value in os.environ.items() if name not in unwanted},
        **where,
        "HOME": str(home),
        # The terminal of a test does not tell where its cursor is.
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "TERM": "xterm-256color",
        **variables,
    }


def delta(**fields: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": fields}]}


END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
THOUGHTFUL = events(
    delta(role="assistant", reasoning_content="They greet"),
    delta(reasoning_content=" me.\n"),
    delta(content="Hello"),
    delta(content=" you.\n\n"),
    END,
)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Give each test, and the processes it starts, the signals as a terminal has them."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Piped:
    """`chatkore chat` between pipes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.stdin, self.stdout, self.stderr = process.stdin, process.stdout, process.stderr

    async def until(self, text: bytes) -> None:
        """Wait until standard output shows a text."""
        shown = b""
        async with asyncio.timeout(PATIENCE):
            while text not in shown:
                piece = await self.stdout.read(4096)
                assert piece, shown
                shown += piece

    async def ended(self) -> tuple[int, bytes, bytes]:
        """Return the status, and what came on standard output and standard error that was not read yet."""
        self.stdin.close()
        async with asyncio.timeout(PATIENCE):
            out, err = await asyncio.gather(self.stdout.read(), self.stderr.read())
            return await self.process.wait(), out, err


@pytest.fixture
async def piped(server: ChatKoreServer, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Start `chatkore chat` between pipes; what is still running at the end is killed."""
    started: list[Piped] = []

    async def start(*args: str, stdin: bytes = b"", **variables: str) -> Piped:
        process = await asyncio.create_subprocess_exec(
            *CHAT,
            *args,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env=environment(server, tmp_path, **variables),
        )
        run = Piped(process)
        started.append(run)
        run.stdin.write(stdin)
        run.stdin.close()
        return run

    yield start
    for each in started:
        if each.process.returncode is None:
            each.process.kill()
        await each.process.wait()


class Terminal:
    """`chatkore chat` in a terminal of its own, with keys that are pressed and a screen that is read once, in order."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str], columns: int) -> None:
        self._args = args
        self._env = env
        self._columns = columns
        self._arrived = asyncio.Event()
        self._read = 0
        self.shown = b""
        self.gone = False

    async def __aenter__(self) -> Self:
        self._ours, self._theirs = pty.openpty()
        termios.tcsetwinsize(self._theirs, (24, self._columns))
        self.settings = termios.tcgetattr(self._theirs)
        # A terminal that is the process's own, as a shell gives it, sends it SIGINT when Ctrl-C is pressed.
        own = "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", own, *CHAT, *self._args),
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            cwd=ROOT,
            env=self._env,
        )
        asyncio.get_running_loop().add_reader(self._ours, self._receive)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        asyncio.get_running_loop().remove_reader(self._ours)
        os.close(self._ours)
        os.close(self._theirs)

    def _receive(self) -> None:
        self.shown += os.read(self._ours, 65536)
        self._arrived.set()

    def press(self, keys: bytes) -> None:
        while keys:
            keys = keys[os.write(self._ours, keys) :]

    async def paste(self, text: bytes) -> None:
        """Insert a text of any length; a terminal takes little before it is read."""
        await asyncio.to_thread(self.press, b"\x1b[200~" + text + b"\x1b[201~")

    async def until(self, text: bytes) -> bytes:
        """Wait until a text is shown after what was waited for before, and return what stands between."""
        try:
            async with asyncio.timeout(PATIENCE):
                while (found := self.shown.find(text, self._read)) < 0:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            raise AssertionError(f"{text!r} is not in {self.shown[self._read :]!r}") from None
        between, self._read = self.shown[self._read : found], found + len(text)
        return ESCAPE.sub(b"", between)

    async def ready(self) -> bytes:
        """Wait for the next prompt, and return what was shown before it."""
        return await self.until(READY)

    async def say(self, text: bytes) -> bytes:
        """Wait for the prompt, type a line, and return what was shown before the prompt."""
        before = await self.ready()
        self.press(text + b"\r")
        return before

    async def leave(self) -> bytes:
        """Wait for the prompt, press Ctrl-D, and return what was shown before the prompt."""
        before = await self.ready()
        self.press(CTRL_D)
        assert (await self.ended())[0] == 0
        return before

    async def ended(self) -> tuple[int, bytes]:
        """Return the status and what was shown since; the terminal has to be as it was."""
        async with asyncio.timeout(PATIENCE):
            status = await self.process.wait()
        # What it wrote is there to be read, and nobody writes any more.
        os.set_blocking(self._ours, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._receive()
        assert termios.tcgetattr(self._theirs) == self.settings
        return status, ESCAPE.sub(b"", self.shown[self._read :])


@pytest.fixture
def terminal(server: ChatKoreServer, tmp_path: Path) -> Callable[..., Terminal]:
    """Make a terminal in which `chatkore chat` is started."""

    def make(*args: str, columns: int = 80, **variables: str) -> Terminal:
        return Terminal(args, environment(server, tmp_path, **variables), columns)

    return make


def screen(monkeypatch: pytest.MonkeyPatch, *, out: bool = True, err: bool = True, term: str = "xterm") -> "Tty":
    """Make standard output, standard error, or both, one terminal, and return it."""
    tty = Tty()
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "80")
    if out:
        monkeypatch.setattr(sys, "stdout", tty)
    if err:
        monkeypatch.setattr(sys, "stderr", tty)
    return tty


class Tty(StringIO):
    def isatty(self) -> bool:
        return True


def conversation(question: str = "Hello") -> Conversation:
    talk = Conversation("gpt-4o-mini")
    talk.ask(question)
    return talk


def whole(message: ChatCompletionMessage, finish_reason: str | None = "stop", **fields: Any) -> ChatCompletion:
    return ChatCompletion(choices=[Choice(message=message, finish_reason=finish_reason)], **fields)


async def shown(server: ChatKoreServer, reply: Reply, **manner: bool) -> int:
    """Ask in this process, and show the answer on whatever standard output is."""
    server.script(reply)
    return await once(conversation(), Paper(), Manner(**manner), {"base_url": server.base_url})


class TestOneShot:
    async def test_an_answer_comes_as_it_is_written(self, server: ChatKoreServer, piped: Any) -> None:
        """A piece is on standard output before the next one is sent, and the text ends with one line end."""
        more = asyncio.Event()
        server.script(stream(["Hel", Hold(more), "lo\n", "\n"]))
        run = await piped("Say", "hello")
        await run.until(b"Hel")
        more.set()
        status, out, err = await run.ended()
        assert (status, out) == (0, b"lo\n")
        assert re.fullmatch(
            rb"10 prompt \+ 2 completion tokens, first token \d+\.\d\d s, total \d+\.\d s, "
            rb"gpt-4o-mini, finish reason stop\n",
            err,
        )
        assert server.requests[0].json["messages"] == [{"role": "user", "content": "Say hello"}]

    async def test_options_are_sent(self, server: ChatKoreServer, piped: Any) -> None:
        """Model, system message and temperature are in the request, and nothing that was not asked for."""
        run = await piped("-m", "gpt-4o", "-s", "Be brief.", "--temperature", "0.5", "--no-stream", "-q", "Hi")
        status, out, err = await run.ended()
        assert (status, err) == (0, b"")
        assert out.count(b"\n") == 1
        assert server.requests[0].json == {
            "model": "gpt-4o",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "temperature": 0.5,
        }

    @pytest.mark.parametrize(
        "args, question",
        [
            ([], "caf\u00e9 \ufffd\n  x"),
            (["Summarise", "this:"], "Summarise this:\n\ncaf\u00e9 \ufffd\n  x"),
            (["Summarise", "-"], "Summarise\n\ncaf\u00e9 \ufffd\n  x"),
            (["-"], "caf\u00e9 \ufffd\n  x"),
            (["3", "-", "2"], "3 - 2\n\ncaf\u00e9 \ufffd\n  x"),
        ],
    )
    async def test_what_is_piped_in_is_asked(
        self, server: ChatKoreServer, piped: Any, args: list[str], question: str
    ) -> None:
        """Standard input follows the words, after a blank line; what is not UTF-8 in it does no harm."""
        run = await piped(*args, stdin=b"\xef\xbb\xbfcaf\xc3\xa9 \xff\n  x\r\n\n")
        assert (await run.ended())[0] == 0
        assert server.requests[0].json["messages"] == [{"role": "user", "content": question}]

    async def test_a_document(self, server: ChatKoreServer, piped: Any) -> None:
        """With `--json`, standard output is one JSON document: the completion, merged where it was streamed."""
        server.script(stream("Hello \u0085there"), completion("Hello", system_note="vendor's"))
        status, out, _ = await (await piped("--json", "Hi")).ended()
        assert status == 0
        assert json.loads(out)["choices"][0]["message"]["content"] == "Hello \u0085there"
        assert b"\\u0085" in out
        status, out, _ = await (await piped("--json", "--no-stream", "Hi")).ended()
        assert json.loads(out)["system_note"] == "vendor's"

    async def test_reasoning_is_apart(self, server: ChatKoreServer, piped: Any) -> None:
        """In a pipe, the reasoning is on standard error, and standard output has the answer alone."""
        server.script(THOUGHTFUL)
        status, out, err = await (await piped("Hi")).ended()
        assert (status, out) == (0, b"Hello you.\n")
        assert err.startswith(b"reasoning:\nThey greet me.\nfirst token ")

    async def test_ctrl_c(self, server: ChatKoreServer, piped: Any) -> None:
        """Ctrl-C stops the answer at the server too; what came stays, on a whole line, and the status is 130."""
        server.script(stream(["Hel", Hold(asyncio.Event())]))
        run = await piped("Hi")
        await run.until(b"Hel")
        run.process.send_signal(signal.SIGINT)
        assert await run.ended() == (130, b"\n", b"interrupted\n")
        assert await server.requests[0].finished(timeout=PATIENCE) == "gone"
        await server.connections[0].closed(timeout=PATIENCE)

    async def test_ctrl_c_before_anything_came(self, server: ChatKoreServer, piped: Any) -> None:
        """While the first token is awaited, Ctrl-C ends it just so."""
        server.script(stream([Hold(asyncio.Event())], latency=0))
        run = await piped("--json", "Hi")
        await server.wait_for_requests(1, timeout=PATIENCE)
        run.process.send_signal(signal.SIGINT)
        assert await run.ended() == (130, b"", b"interrupted\n")

    async def test_sigterm(self, server: ChatKoreServer, piped: Any) -> None:
        """SIGTERM ends it as cleanly, without a word and with status 143."""
        server.script(stream(["Hel", Hold(asyncio.Event())]))
        run = await piped("Hi")
        await run.until(b"Hel")
        run.process.send_signal(signal.SIGTERM)
        assert await run.ended() == (143, b"\n", b"")

    async def test_a_reader_that_leaves(self, server: ChatKoreServer, piped: Any) -> None:
        """`chatkore chat … | head -1` ends without a word, and the server need not go on."""
        more = asyncio.Event()
        server.script(stream(["one\n", "two\n", Hold(more), *(["more\n"] * 20_000), Hold(asyncio.Event())]))
        run = await piped("Hi")
        await run.until(b"one\ntwo")
        run.stdout._transport.close()
        more.set()
        async with asyncio.timeout(PATIENCE):
            assert await run.stderr.read() == b""
            assert await run.process.wait() == 1
        assert await server.requests[0].finished(timeout=PATIENCE) == "gone"

    async def test_a_stream_that_is_cut(self, server: ChatKoreServer, piped: Any) -> None:
        """What came is shown, on a whole line; then the error and a hint, and the status is 1."""
        server.script(stream(["This is ", "the start", Cut()]))
        status, out, err = await (await piped("Hi")).ended()
        assert (status, out) == (1, b"This is the start\n")
        assert re.fullmatch(rb"Error: the stream broke off.*\nHint: .*ask again\n", err)

    async def test_no_unicode(self, server: ChatKoreServer, piped: Any) -> None:
        """Where there is nothing but ASCII, a question arrives as it was typed, and the answer has question marks."""
        server.script(stream("Grüße"), stream("Grüße"))
        ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        status, out, _ = await (await piped("Grüß dich", **ascii_only)).ended()
        assert (status, out) == (0, b"Gr??e\n")
        assert server.requests[0].json["messages"][0]["content"] == "Grüß dich"
        _, out, _ = await (await piped("--json", "Hi", **ascii_only)).ended()
        assert json.loads(out)["choices"][0]["message"]["content"] == "Grüße"

    async def test_in_a_terminal(self, server: ChatKoreServer, terminal: Callable[..., Terminal]) -> None:
        """There an answer comes as it is written, a failed attempt is told of, and Ctrl-C leaves it as it was."""
        server.script(error(503, "Busy", headers={"retry-after-ms": "1"}), stream(["Hel", Hold(asyncio.Event())]))
        async with terminal("Hi") as window:
            assert b"retrying in 0.0 s: 503 server_error: Busy\r\n" in await window.until(b"Hel")
            window.press(CTRL_C)
            assert await window.ended() == (130, b"^C\r\ninterrupted\r\n")
            assert await server.requests[1].finished(timeout=PATIENCE) == "gone"

    async def test_questions_typed_to_an_end(self, server: ChatKoreServer, terminal: Callable[..., Terminal]) -> None:
        """With `-`, a question is typed until Ctrl-D."""
        async with terminal("-q", "-") as window:
            window.press(b"Hi\rthere\r")
            await window.until(b"there\r\n")
            window.press(CTRL_D)
            status, text = await window.ended()
        assert status == 0
        assert server.requests[0].json["messages"][0]["content"] == "Hi\nthere"
        assert text.startswith("You wrote “Hi".encode())

    def test_loads_no_prompt(self) -> None:
        """A question does not wait for what only a conversation needs."""
        code = "import sys, chatkore_async.cli._chat; sys.exit({'prompt_toolkit', 'rich'} & set(sys.modules) != set())"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=PATIENCE).returncode == 0


class TestInteractive:
    async def test_a_conversation(self, server: ChatKoreServer, terminal: Callable[..., Terminal]) -> None:
        """Each message goes with all that was said before, the answers as they came; Ctrl-D leaves, with status 0."""
        server.script(THOUGHTFUL, stream("Fine."))
        async with terminal("-s", "Be brief.") as window:
            assert b"gpt-4o-mini at http://127.0.0.1:" in await window.say(b"Hi")
            first = await window.say(b"How are you?")
            assert b"\r\nreasoning:\r\nThey greet me.\r\nanswer:\r\nHello you.\r\nfirst token " in first
            assert b"\r\nFine.\r\n10 prompt + 1 completion tokens, first token " in await window.leave()
        assert server.requests[1].json["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello you.\n\n", "reasoning_content": "They greet me.\n"},
            {"role": "user", "content": "How are you?"},
        ]

    async def test_ctrl_c_stops_an_answer(self, server: ChatKoreServer, terminal: Callable[..., Terminal]) -> None:
        """The server need not go on, the prompt comes back, and what came of the answer is part of the conversation."""
        server.script(stream(["One, ", "two", Hold(asyncio.Event())]), stream("Three."))
        async with terminal() as window:
            await window.say(b"Count")
            await window.until(b"One, two")
            window.press(CTRL_C)
            assert await server.requests[0].finished(timeout=PATIENCE) == "gone"
            assert (await window.say(b"Go on")).startswith(b"^C\r\nstopped; Ctrl-C again leaves\r\n")
            await window.until(b"Three.")
            await window.leave()
        assert server.requests[1].json["messages"] == [
            {"role": "user", "content": "Count"},
            {"role": "assistant", "content": "One, two"},
            {"role": "user", "content": "Go on"},
        ]

    async def test_a_second_ctrl_c_leaves(self, server: ChatKoreServer, terminal: Callable[..., Terminal]) -> None:
        """Ctrl-C after the one that stopped an answer leaves, with status 130."""
        server.script(stream([Hold(asyncio.Event())]))
        async with terminal() as window:
            await window.say(b"Count")
            await server.wait_for_requests(1, timeout=PATIENCE)
            window.press(CTRL_C)
            assert (await window.ready()).endswith(b"^C\r\nstopped; Ctrl-C again leaves\r\n")
            window.press(CTRL_C)
            status, text = await window.ended()
        assert status == 130
        assert text.endswith(b"\r\ninterrupted\r\n")

    async def test_ctrl_c_at_the_prompt(self, server: ChatKoreServer, terminal: Callable[..., Terminal]) -> None:
        """It throws away what was typed and warns; only a second one in a row leaves."""
        async with terminal() as window:
            await window.ready()
            window.press(b"half a thou" + CTRL_C)
            assert b"Ctrl-C again, or Ctrl-D, leaves\r\n" in await window.say(b"Hi")
            await window.until(b"Hi\xe2\x80\x9d. This is")
            await window.ready()
            window.press(CTRL_C)
            assert b"leaves\r\n" in await window.ready()
            window.press(CTRL_C)
            assert (await window.ended())[0] == 130
        assert len(server.requests) == 1

    async def test_a_signal_at_the_prompt(self, server: ChatKoreServer, terminal: Callable[..., Terminal]) -> None:
        """SIGINT from elsewhere is Ctrl-C there too, and SIGTERM leaves at once, with the terminal intact."""
        async with terminal() as window:
            await window.ready()
            window.process.send_signal(signal.SIGINT)
            assert b"Ctrl-C again, or Ctrl-D, leaves\r\n" in await window.ready()
            window.press(b"typed")
            await window.until(b"typed")
            window.process.send_signal(signal.SIGTERM)
            status, text = await window.ended()
        assert status == 143
        assert text.endswith(b"typed\r\r\n")
        assert b"\x1b[?2004l" in window.shown.rpartition(READY)[2]

    async def test_arrow_keys_bring_messages_back(
        self, server: ChatKoreServer, terminal: Callable[..., Terminal], tmp_path: Path
    ) -> None:
        """Up and Enter ask again what was asked, also in the next conversation; only their user can read the file."""
        async with terminal() as window:
            await window.say(b"First")
            await window.say(b"Second")
            await window.say(UP + UP)
            await window.leave()
        async with terminal() as window:
            await window.say(UP + UP + b" again")
            await window.leave()
        asked = [request.json["messages"][-1]["content"] for request in server.requests]
        assert asked == ["First", "Second", "First", "Second again"]
        file = tmp_path / ".local" / "state" / "chatkore" / "history"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    async def test_no_history(self, server: ChatKoreServer, terminal: Callable[..., Terminal], tmp_path: Path) -> None:
        """With `--no-history`, the arrow keys work, and there is no file."""
        async with terminal("--no-history") as window:
            await window.say(b"First")
            await window.say(UP)
            await window.leave()
        assert [request.json["messages"][-1]["content"] for request in server.requests] == ["First", "First"]
        assert not os.listdir(tmp_path)  # noqa: PTH208 - in this loop nothing waits

    async def test_several_lines(self, server: ChatKoreServer, terminal: Callable[..., Terminal]) -> None:
        """Alt+Enter and a backslash at the end begin a line, and what is pasted is one message."""
        async with terminal() as window:
            await window.say(b"a" + ALT_ENTER + b"  b\\\rc\\d")
            await window.ready()
            await window.paste(b"one\rtwo\\\nthree")
            window.press(b" four\r")
            await window.leave()
        asked = [request.json["messages"][-1]["content"] for request in server.requests]
        assert asked == ["a\n  b\nc\\d", "one\ntwo\\\nthree four"]

    async def test_a_book_is_pasted(self, server: ChatKoreServer, terminal: Callable[..., Terminal]) -> None:
        """A very long message is sent whole."""
        line = b"word " * 20
        async with terminal() as window:
            await window.ready()
            await window.paste((line + b"\r") * 300)
            window.press(b"end\r")
            await window.leave()
        assert server.requests[0].json["messages"][0]["content"] == (line + b"\n").decode() * 300 + "end"

    async def test_an_error_brings_the_prompt_back(
        self, server: ChatKoreServer, terminal: Callable[..., Terminal]
    ) -> None:
        """The error and a hint are shown, and the message stands there again: Enter asks once more, and only once."""
        server.script(error(404, "No such model", code="model_not_found"), stream(["Hel", Reset()]), stream("Hello"))
        async with terminal() as window:
            await window.say(b"//Hi")
            text = await window.say(b"")
            assert b"Error: 404 model_not_found: No such model (1 attempt in" in text
            assert b"\r\nHint: check the model's name" in text
            assert re.search(rb"Hel\r\nError: the stream broke off.*\r\nHint: ", await window.say(b""))
            await window.until(b"Hello")
            await window.leave()
        assert [request.json["messages"] for request in server.requests] == [[{"role": "user", "content": "/Hi"}]] * 3

    async def test_a_dumb_terminal(self, server: ChatKoreServer, terminal: Callable[..., Terminal]) -> None:
        """A terminal that knows no escape codes is sent none."""
        server.script(THOUGHTFUL)
        async with terminal(TERM="dumb") as window:
            await window.until(b"\n> ")
            window.press(b"Hi\r")
            await window.until(b"They greet me.\r\nanswer:\r\nHello you.\r\n")
            await window.until(b"\n> ")
            window.press(b"/exit\r")
            assert (await window.ended())[0] == 0
        assert server.requests[0].json["messages"][0]["content"] == "Hi"
        assert b"\x1b" not in window.shown

    async def test_a_narrow_terminal_without_colours_or_unicode(
        self, server: ChatKoreServer, terminal: Callable[..., Terminal]
    ) -> None:
        """With 40 columns, `NO_COLOR` and nothing but ASCII it works, and our own lines are broken between words."""
        server.script(stream("Grüße"))
        ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        async with terminal(columns=40, NO_COLOR="1", **ascii_only) as window:
            await window.say("Grüß dich".encode())
            answer = await window.leave()
        assert server.requests[0].json["messages"][0]["content"] == "Grüß dich"
        assert b"\r\nGr??e\r\n10 prompt + 1 completion tokens, first\r\ntoken 0" in answer
        assert not COLOUR.search(window.shown)

    async def test_nobody_to_talk_to(self, terminal: Callable[..., Terminal]) -> None:
        """Without a key the command ends before anything is typed, and says what to do."""
        async with terminal("--base-url", "https://example.invalid") as window:
            status, text = await window.ended()
        assert status == 1
        assert text.startswith(b"Error: no API key\r\nHint: export CHATKORE_API_KEY")


class Typist:
    """A prompt at which all is typed beforehand; `None` is Ctrl-C. At the end comes Ctrl-D."""

    def __init__(self, *lines: str | None, typed: str = "") -> None:
        self._lines = list(lines)
        self.typed = typed
        self.drafts: list[str] = []

    async def ask(self, draft: str = "") -> str | None:
        self.drafts.append(draft)
        if not self._lines:
            raise EOFError
        return self._lines.pop(0)


async def talked(client: AsyncChatKore, typist: Typist, *, debugging: bool = False) -> Conversation:
    """Hold a conversation in this process, and return it."""
    talk = Conversation("gpt-4o-mini")
    assert await Talk(client, typist, Paper(), talk, Manner(quiet=True), debugging=debugging).run() == 0
    return talk


class TestTalk:
    async def test_commands(
        self, client: AsyncChatKore, server: ChatKoreServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        """A line that begins with a slash changes the conversation, and is not sent."""
        file = tmp_path / "talk.json"
        commands = [
            *("/help", "/model gpt-4o", "/model", "/system", "/system Be brief.\nVery.", "Hi", "", f"/save {file}"),
            *(f"/save {file}", "/save", f"/save {tmp_path}", "/clear", "/system", f"/save {file}", "/exit", "never"),
        ]
        talk = await talked(client, Typist(*commands))
        said = capsys.readouterr().err
        assert said == (
            f"{HELP}\nthe model is gpt-4o\nthe model is gpt-4o\nthere is no system message\n"
            f"the system message is set\n3 messages are in {file}\n3 messages are in {file}\nwhere to? /save FILE\n"
            f"Error: [Errno 17] File exists: '{tmp_path}'\nHint: /save takes the name of a new file\n"
            f"the conversation is forgotten\nthe system message is dropped\n0 messages are in {file}\n"
        )
        assert [request.json["messages"] for request in server.requests] == [
            [{"role": "system", "content": "Be brief.\nVery."}, {"role": "user", "content": "Hi"}]
        ]
        assert server.requests[0].json["model"] == "gpt-4o"
        assert talk.messages() == json.loads(file.read_text()) == []

    async def test_a_saved_conversation(self, client: AsyncChatKore, server: ChatKoreServer, tmp_path: Path) -> None:
        """The file has the messages as the API takes them, and a file of another origin is not overwritten."""
        server.script(THOUGHTFUL)
        file = tmp_path / "talk.json"
        await talked(client, Typist("Grüß dich", f"/save {file}"))
        saved = file.read_text(encoding="utf-8")
        assert json.loads(saved) == [
            {"role": "user", "content": "Grüß dich"},
            {"role": "assistant", "content": "Hello you.\n\n", "reasoning_content": "They greet me.\n"},
        ]
        assert "Grüß" in saved
        await talked(client, Typist(f"/save {file}"))
        assert file.read_text(encoding="utf-8") == saved

    async def test_a_home_that_is_not_there(self, client: AsyncChatKore, capsys: pytest.CaptureFixture[str]) -> None:
        """A file name that means nothing is an error, and the conversation goes on."""
        await talked(client, Typist("/save ~nobody-of-that-name/x", "/save a\0b"))
        assert capsys.readouterr().err.count("Error: ") == 2

    async def test_an_unknown_command(
        self, client: AsyncChatKore, server: ChatKoreServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It is not sent, and stands there again to be mended."""
        typist = Typist("/etc/passwd what is it?", "/", "//etc")
        await talked(client, typist)
        assert typist.drafts == ["", "/etc/passwd what is it?", "/", ""]
        assert "there is no command /etc/passwd: /help lists them" in capsys.readouterr().err
        assert server.requests[0].json["messages"][0]["content"] == "/etc"

    async def test_ctrl_c_in_a_row(self, client: AsyncChatKore, capsys: pytest.CaptureFixture[str]) -> None:
        """Two of them leave, unless there was something between, or on the line."""
        with pytest.raises(click.Abort):
            await talked(client, Typist(None, "", None, None, "never"))
        assert capsys.readouterr().err.count("Ctrl-C again, or Ctrl-D, leaves\n") == 2
        await talked(client, Typist(None, None, None, typed="half a thou"))
        assert capsys.readouterr().err.count("Ctrl-C again, or Ctrl-D, leaves\n") == 3

    async def test_debugging(
        self, client: AsyncChatKore, server: ChatKoreServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """With `--debug`, an error's traceback is shown, without the key."""
        server.script(error(401, "Incorrect API key provided: sk-test"))
        await talked(client, Typist("Hi"), debugging=True)
        said = capsys.readouterr().err
        assert "Traceback (most recent call last)" in said
        assert "\nError: 401 " in said
        assert "sk-test" not in said

    async def test_a_client_that_cannot_be_used(self, client: AsyncChatKore) -> None:
        """An error that no further message can mend ends it."""
        await client.close()
        with pytest.raises(ConfigurationError):
            await talked(client, Typist("Hi", "never"))

    async def test_tool_calls_are_not_sent_back(self, client: AsyncChatKore, server: ChatKoreServer) -> None:
        """A call that nobody will answer is left out of the conversation, and so is an answer without any text."""
        call = tool_call("get_weather", {"city": "Paris"})
        server.script(stream("Wait.", tool_calls=[call]), stream([], tool_calls=[call]), stream([]))
        talk = await talked(client, Typist("A", "B", "C", "D"))
        assert server.requests[3].json["messages"] == [
            {"role": "user", "content": "A"},
            {"role": "assistant", "content": "Wait."},
            {"role": "user", "content": "B"},
            {"role": "user", "content": "C"},
            {"role": "user", "content": "D"},
        ]
        assert len(talk.turns) == 6


class TestConversation:
    @pytest.mark.parametrize(
        "text, command, message",
        [
            ("Hi", None, "Hi"),
            (" /help", None, " /help"),
            ("//help", None, "/help"),
            ("/help", ("/help", ""), ""),
            ("/model  gpt-4o \n", ("/model", "gpt-4o"), ""),
            ("/system a\nb", ("/system", "a\nb"), ""),
            ("/foo\nbar", ("/foo", "bar"), ""),
            ("/", ("/", ""), ""),
        ],
    )
    def test_commands_are_told_from_messages(self, text: str, command: tuple[str, str] | None, message: str) -> None:
        """One slash at the very beginning makes a command, two make a message that begins with one."""
        assert command_in(text) == command
        if command is None:
            assert message_in(text) == message

    def test_a_received_message_goes_back_as_it_came(self) -> None:
        """An answer, also one that is a refusal, is part of what is sent next; one that says nothing is not."""
        talk = conversation()
        talk.answered(whole(ChatCompletionMessage(content="Hi")))
        talk.answered(whole(ChatCompletionMessage(refusal="No.")))
        talk.answered(whole(ChatCompletionMessage(reasoning_content="Hm")))
        talk.answered(whole(ChatCompletionMessage(content="Well", function_call=FunctionCall(name="f"))))
        talk.answered(ChatCompletion())
        assert json.loads(talk.document()) == [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
            {"role": "assistant", "refusal": "No."},
            {"role": "assistant", "content": "Well"},
        ]

    def test_help_fits_a_narrow_terminal(self) -> None:
        """The list of commands has at most 42 columns."""
        assert max(map(len, HELP.splitlines())) <= 42


class TestShown:
    async def test_a_terminal_is_not_driven(self, server: ChatKoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
        """Escape sequences and control characters of a model, or of a server, are shown and not obeyed."""
        tty = screen(monkeypatch)
        server.script(error(503, "a\x1b[2Jb", headers={"retry-after-ms": "1"}))
        evil = "\x1b[2Jred\x07\u009b31m\ttab\r\nnew\x7f"
        paper = Paper()
        server.script(stream([evil], model="m\x1b[31m"))
        account = {"base_url": server.base_url, "hooks": [Retries(paper)]}
        assert await once(conversation(), paper, Manner(), account) == 0
        text = re.sub(r"\x1b\[[02]m", "", tty.getvalue())
        assert "retrying in 0.0 s: 503 server_error: a\ufffd[2Jb\n" in text
        assert "\n\ufffd[2Jred\ufffd\ufffd31m\ttab\nnew\ufffd\n" in text
        assert "m\ufffd[31m" in text
        assert not set("\x1b\x07\x7f\r\u009b") & set(text)

    async def test_a_pipe_gets_the_text_as_it_came(
        self, server: ChatKoreServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """What is not shown to anybody is not changed."""
        assert await shown(server, stream(["\n\x1b[31m", "\t\r\n\n", "b"])) == 0
        assert capsys.readouterr().out == "\n\x1b[31m\t\r\n\nb\n"

    async def test_kinds_are_apart(self, server: ChatKoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
        """In a terminal, reasoning, refusal and tool calls stand under labels, in the order in which they came."""
        tty = screen(monkeypatch, term="dumb")
        call = tool_call("get_weather", {"city": "Köln"})
        reply = events(
            delta(reasoning_content="Hm."),
            delta(content="Well"),
            delta(reasoning_content="Or not."),
            delta(content="No", refusal="I may not."),
            delta(tool_calls=[{"index": 0, **call}]),
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
        )
        assert await shown(server, reply) == 0
        text, _, line = tty.getvalue().rpartition("first token")
        assert text == (
            "reasoning:\nHm.\nanswer:\nWell\nreasoning:\nOr not.\nanswer:\nNo\nrefusal:\nI may not.\n"
            'tool call get_weather:\n{\n  "city": "Köln"\n}\n'
        )
        assert line.endswith("finish reason tool_calls\n")

    async def test_what_is_beside_the_answer_is_dim(
        self, server: ChatKoreServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Reasoning and notes have less weight than the answer."""
        tty = screen(monkeypatch)
        assert await shown(server, THOUGHTFUL) == 0
        assert tty.getvalue().startswith(
            "\x1b[2mreasoning:\x1b[0m\n\x1b[2mThey greet\x1b[0m\x1b[2m me.\x1b[0m\n"
            "\x1b[2manswer:\x1b[0m\nHello you.\n\x1b[2mfirst token "
        )

    async def test_quiet(self, server: ChatKoreServer, capsys: pytest.CaptureFixture[str]) -> None:
        """`--quiet` leaves out the reasoning and the line on usage, but not what a reader has to know."""
        assert await shown(server, THOUGHTFUL, quiet=True) == 0
        assert await shown(server, completion("So", finish_reason="length"), quiet=True, streamed=False) == 0
        output = capsys.readouterr()
        assert output.out == "Hello you.\nSo\n"
        assert output.err == "the answer stops where the limit of tokens was reached (finish reason length)\n"

    async def test_a_warning_waits_for_the_end_of_the_line(
        self, server: ChatKoreServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A stream that ended without a finish reason is shown to its end, and then told of."""
        tty = screen(monkeypatch, term="dumb")
        paper = Paper()
        logger, handler = logging.getLogger("chatkore_async"), Warnings(paper)
        logger.addHandler(handler)
        try:
            server.script(stream(["So", " far"], finish_reason=None))
            assert await once(conversation(), paper, Manner(quiet=True), {"base_url": server.base_url}) == 0
        finally:
            logger.removeHandler(handler)
        text = " ".join(tty.getvalue().split("\n"))
        assert text.startswith("So far warning: a stream of http://127.0.0.1:")
        assert text.endswith("ended without a finish reason, though the server said it was done: it may be cut ")

    async def test_calls_that_were_cut_are_shown(
        self, server: ChatKoreServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Of a stream that breaks off in a tool call, that much is shown, too."""
        call = {"index": 0, "id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": '}}
        server.script(events(delta(content="So"), delta(tool_calls=[call]), Cut()))
        with pytest.raises(Exception, match="broke off"):
            await once(conversation(), Paper(), Manner(), {"base_url": server.base_url})
        output = capsys.readouterr()
        assert output.out == "So\n"
        assert output.err == 'tool call f:\n{"a": \n'

    async def test_chunks_without_choices(self, server: ChatKoreServer, capsys: pytest.CaptureFixture[str]) -> None:
        """Chunks and completions that hold no choice are no reason to stumble."""
        assert await shown(server, events({"choices": []}, delta(content="Hi"), {"id": "x", "choices": []}, END)) == 0
        assert capsys.readouterr().out == "Hi\n"

    async def test_nobody_waits_in_a_log(self, server: ChatKoreServer, capsys: pytest.CaptureFixture[str]) -> None:
        """Where standard error is no terminal, it has no line for each retry."""
        Retries(Paper()).on_retry(Retry(call_id="1", number=1, error=OSError("x"), delay=1.0))
        assert capsys.readouterr().err == ""

    async def test_a_closed_standard_error(self, server: ChatKoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
        """`chatkore chat … 2>&-` answers all the same."""
        tty = screen(monkeypatch, err=False)
        monkeypatch.setattr(sys, "stderr", None)
        assert await shown(server, stream("Hi")) == 0
        assert tty.getvalue() == "Hi\n"

    def test_errors_are_broken_between_words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What we say ourselves fits a terminal."""
        tty = screen(monkeypatch)
        Paper().problem(click.ClickException("word " * 30 + "\nHint: no"))
        lines = tty.getvalue().splitlines()
        assert [len(line) for line in lines] == [76, 79, 8]


class TestAboutAnAnswer:
    def test_the_line_on_usage(self) -> None:
        """It has what is known and leaves out what is not."""
        message = ChatCompletionMessage(content="x")
        assert summary(ChatCompletion()) == ""
        usage = Usage(prompt_tokens=12, completion_tokens=34)
        assert summary(whole(message, None, usage=usage)) == "12 prompt + 34 completion tokens"
        usage.completion_tokens_details = CompletionTokensDetails(reasoning_tokens=30)
        assert summary(whole(message, usage=usage, model="m\nn")) == (
            "12 prompt + 34 completion tokens, 30 of them reasoning, m n, finish reason stop"
        )

    @pytest.mark.parametrize(
        "answer, streamed, said",
        [
            (whole(ChatCompletionMessage(content="x")), True, []),
            (whole(ChatCompletionMessage(refusal="x")), True, []),
            (whole(ChatCompletionMessage(tool_calls=[ToolCall()]), "tool_calls"), True, []),
            (whole(ChatCompletionMessage(content="x"), "length"), True, ["limit of tokens"]),
            (whole(ChatCompletionMessage(content="x"), "content_filter"), True, ["content filter"]),
            (whole(ChatCompletionMessage(content="x"), None), False, ["may be cut"]),
            (whole(ChatCompletionMessage(content="x"), None), True, []),
            (whole(ChatCompletionMessage(), "length"), True, ["limit of tokens", "no text"]),
        ],
    )
    def test_remarks(self, answer: ChatCompletion, streamed: bool, said: list[str]) -> None:
        """Whoever reads an answer is told when it is not all there was to say."""
        told = list(remarks(answer, streamed=streamed))
        assert len(told) == len(said)
        for line, part in zip(told, said, strict=True):
            assert part in line

    def test_every_form_of_a_call(self) -> None:
        """Calls of functions, of custom tools, and in the old form are listed by name."""
        message = ChatCompletionMessage(
            tool_calls=[
                ToolCall(function=FunctionCall(name="f", arguments="{}")),
                ToolCall(type="custom", custom=CustomToolCall(name="c", input="in")),
            ],
            function_call=FunctionCall(name="old", arguments="[]"),
        )
        assert list(calls(whole(message))) == [("f", "{}"), ("c", "in"), ("old", "[]")]
        assert list(calls(ChatCompletion())) == []

    @pytest.mark.parametrize(
        "arguments, text",
        [
            ('{"a":[1]}', '{\n  "a": [\n    1\n  ]\n}'),
            ('{"a": ', '{"a": '),
            ("[" * 100_000, "[" * 100_000),
            ("", ""),
        ],
    )
    def test_arguments_are_readable(self, arguments: str, text: str) -> None:
        """JSON has a line for each member, and what is none is left alone."""
        assert pretty(arguments) == text

    def test_a_document_suits_its_encoding(self) -> None:
        """It reads well where the encoding allows it, and is the same JSON everywhere."""
        answer = whole(ChatCompletionMessage(content="Köln 2J\x1b"))
        assert "Köln \\u009b2J\\u001b" in document(answer, "UTF-8")
        assert "K\\u00f6ln" in document(answer, "ascii")
        assert json.loads(document(answer, "utf-8")) == json.loads(document(answer, "ascii")) == answer.to_dict()


class TestBadInput:
    @pytest.mark.parametrize(
        "args, said",
        [
            ([], "The question is empty"),
            ([""], "The question is empty"),
            (["-"], "The question is empty"),
            ([" ", "-"], "The question is empty"),
            (["--temperature", "nan", "Hi"], "not a finite number"),
            (["--temperature", "inf", "Hi"], "not a finite number"),
            (["--temperature", "hot", "Hi"], "'hot' is not a valid float"),
            (["--timeout", "0", "Hi"], "'--timeout'"),
            (["--frequency", "Hi"], "No such option"),
        ],
    )
    def test_is_wrong_usage(self, args: list[str], said: str) -> None:
        """What cannot be asked has status 2, and says why."""
        result = CliRunner().invoke(app, ["chat", *args])
        assert result.exit_code == 2
        assert said in result.output

    @pytest.mark.parametrize("args, said", [(["--json"], "--json takes a question"), ([], "needs a terminal")])
    def test_a_conversation_needs_a_terminal(self, monkeypatch: pytest.MonkeyPatch, args: list[str], said: str) -> None:
        """Where a conversation cannot be shown, it is not begun."""
        monkeypatch.setattr(
            "click.testing._NamedTextIOWrapper.isatty", lambda self: self.name == "<stdin>", raising=False
        )
        result = CliRunner().invoke(app, ["chat", *args])
        assert result.exit_code == 2
        assert said in result.output

    @pytest.mark.parametrize("args", [["Hi"], ["--base-url", "https://example.invalid", "Hi"]])
    def test_no_key(self, args: list[str]) -> None:
        """Without a key, and a server that needs none, it says how to give one."""
        result = CliRunner().invoke(app, ["chat", *args])
        assert result.exit_code == 1
        assert result.output.startswith("Error: no API key\nHint: export CHATKORE_API_KEY=")

    def test_a_base_url_that_is_none(self) -> None:
        """A base URL of another kind is an error in one line."""
        result = CliRunner(env={"CHATKORE_API_KEY": "sk-test"}).invoke(app, ["chat", "--base-url", "ftp://x", "Hi"])
        assert result.exit_code == 1
        assert result.output.startswith("Error: base_url must begin with ")

    def test_a_host_that_is_none(self) -> None:
        """A host without an address is named, and so is that the key would go there unencrypted."""
        result = CliRunner(env={"CHATKORE_API_KEY": "sk-test-123"}).invoke(
            app, ["chat", "--base-url", "http://host.invalid", "Hi"]
        )
        assert result.exit_code == 1
        assert "warning: http://host.invalid/v1 is not encrypted" in result.output
        assert re.search(r"^Error: .*host\.invalid", result.output, re.MULTILINE)
        assert "sk-test-123" not in result.output

    async def test_nobody_listens(self, piped: Any) -> None:
        """A refused connection is one line and a hint."""
        async with ChatKoreServer() as closed:
            pass
        status, out, err = await (await piped("--base-url", closed.base_url, "Hi")).ended()
        assert (status, out) == (1, b"")
        assert re.fullmatch(rb"Error: could not connect to 127.0.0.1:\d+: .*\nHint: `chatkore doctor`.*\n", err)

    async def test_a_wrong_key(self, piped: Any) -> None:
        """A key that is not this server's is one line and a hint, and is not shown, not even with `--debug`."""
        async with ChatKoreServer(api_key="sk-right-9876") as strict:
            args = ("--base-url", strict.base_url, "Hi")
            status, out, err = await (await piped(*args, CHATKORE_API_KEY="sk-wrong-1234")).ended()
            assert (status, out) == (1, b"")
            assert re.fullmatch(rb"Error: 401 invalid_api_key: .*\nHint: .*\n", err)
            debugged = await (await piped("--debug", *args, CHATKORE_API_KEY="sk-wrong-1234")).ended()
            assert debugged[0] == 1
            assert b"Traceback" in debugged[2]
            assert b"1234" not in err + debugged[2]

    @pytest.mark.parametrize(
        "reply, line",
        [
            (error(404, "No such model", code="model_not_found"), "404 model_not_found: No such model"),
            (html(200, "Welcome to nginx!"), "web page (Welcome to nginx!)"),
        ],
    )
    async def test_an_answer_that_is_none(
        self, server: ChatKoreServer, capsys: pytest.CaptureFixture[str], reply: Reply, line: str
    ) -> None:
        """An error shows nothing on standard output."""
        with pytest.raises(Exception, match=re.escape(line)):
            await shown(server, reply)
        assert capsys.readouterr() == ("", "")

    def test_no_standard_input(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`chatkore chat Hi <&-` asks what there is, and `chatkore chat <&-` has no question."""
        monkeypatch.setattr(sys, "stdin", None)
        assert question_in(("Hi",)) == "Hi"
        with pytest.raises(click.UsageError):
            question_in(())

    def test_a_question_that_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ctrl-C while standard input is read ends it."""

        class Endless(BytesIO):
            def read(self, size: int | None = -1) -> NoReturn:
                raise KeyboardInterrupt

        monkeypatch.setattr(sys, "stdin", TextIOWrapper(Endless()))
        with pytest.raises(KeyboardInterrupt):
            question_in(("-",))

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a full disk at hand")
    @pytest.mark.parametrize("args", [["Hi"], ["--json", "Hi"]])
    async def test_a_full_disk(self, server: ChatKoreServer, tmp_path: Path, args: list[str]) -> None:
        """An answer that cannot be written is one line, a hint and status 1."""
        with open("/dev/full", "wb") as full:  # noqa: ASYNC230, PTH123 - it never waits
            process = await asyncio.create_subprocess_exec(
                *CHAT,
                *args,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=full,
                stderr=asyncio.subprocess.PIPE,
                cwd=ROOT,
                env=environment(server, tmp_path),
            )
            async with asyncio.timeout(PATIENCE):
                _, err = await process.communicate()
        assert process.returncode == 1
        assert b"Error: [Errno 28] No space left on device\nHint: " in err
        assert b"Traceback" not in err


class TestTyped:
    @pytest.mark.parametrize(
        "typed, text",
        [
            ("café", "café"),
            ("caf\udcc3\udca9", "café"),
            ("\udcff\ud83d", "\ufffd\ufffd"),
        ],
    )
    def test_text_is_mended(self, typed: str, text: str) -> None:
        """Bytes that a locale could not decode are decoded after all, and what is no text does no harm."""
        assert mended(typed) == text

    def test_text_is_printable(self) -> None:
        """Nothing is left that a terminal obeys, but line ends and tabs."""
        every = "".join(map(chr, range(0x100)))
        left = [character for character in printable(every) if not character.isprintable()]
        assert left == ["\t", "\n", "\xa0", "\xad"]

    @pytest.mark.parametrize("state", ["", "relative/path"])
    def test_where_the_history_is(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str) -> None:
        """It is in `$XDG_STATE_HOME`, where that is an absolute path, else in the usual place."""
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("XDG_STATE_HOME", state)
        assert history_file() == tmp_path / ".local" / "state" / "chatkore" / "history"
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        assert history_file() == tmp_path / "state" / "chatkore" / "history"

    async def test_a_history_that_cannot_be_kept(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Where there is no place for a file, or no more, what is typed is remembered until the end."""
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
        (tmp_path / "file").write_text("not a directory")
        history = make_history(kept=True)
        history.append_string("Hi")
        assert [line async for line in history.load()] == ["Hi"]
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        history = make_history(kept=True)
        history_file().unlink()
        history_file().mkdir()
        history.append_string("Hi")
        assert [line async for line in history.load()] == []
        assert history.get_strings() == []

    async def test_what_the_history_keeps(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A pasted book and bytes that are no text do not get into the file, several lines do."""
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        history = make_history(kept=True)
        for text in ("a\nb", "x" * (LONGEST + 1), "caf\udcc3\udca9"):
            history.append_string(text)
        assert [line async for line in make_history(kept=True).load()] == ["café", "a\nb"]


class TestInterruptible:
    def test_stops_what_is_awaited_and_nothing_else(self) -> None:
        """Ctrl-C ends the block, again and again, and the program goes on."""
        seen: list[str] = []

        async def main() -> int:
            for name in ("first", "second"):
                with interruptible():
                    os.kill(os.getpid(), signal.SIGINT)
                    try:
                        await asyncio.Event().wait()
                    finally:
                        seen.append(name)
            await asyncio.sleep(0)
            return 3

        assert run(main) == 3
        assert seen == ["first", "second"]

    def test_a_second_one_ends_the_program(self) -> None:
        """Ctrl-C twice before the block has ended ends all of it, and a third does not disturb that."""
        seen: list[str] = []

        async def main() -> int:
            try:
                with interruptible():
                    os.kill(os.getpid(), signal.SIGINT)
                    os.kill(os.getpid(), signal.SIGINT)
                    await asyncio.Event().wait()
            finally:
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(0)
                seen.append("clean")
            return 0

        with pytest.raises(KeyboardInterrupt):
            run(main)
        assert seen == ["clean"]

    def test_sigterm_ends_the_program(self) -> None:
        """A block that Ctrl-C may stop is no shelter from SIGTERM."""

        async def main() -> int:
            with interruptible():
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.Event().wait()
            return 0

        with pytest.raises(SystemExit) as ended:
            run(main)
        assert ended.value.code == 143

    def test_a_late_one_does_nothing(self) -> None:
        """When the block has nothing left to await, Ctrl-C stops nothing that comes after it."""

        async def main() -> int:
            with interruptible():
                os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            return 3

        assert run(main) == 3

    def test_an_error_on_the_way_out_is_not_hidden(self) -> None:
        """What the block raises as it is stopped is raised, and the program is not cancelled by it."""

        async def main() -> int:
            with pytest.raises(KeyError), interruptible():
                os.kill(os.getpid(), signal.SIGINT)
                try:
                    await asyncio.Event().wait()
                finally:
                    raise KeyError
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
            return 3

        assert run(main) == 3

    def test_what_the_shell_ignores_stays_ignored(self) -> None:
        """In the background, Ctrl-C is meant for others."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)

        async def main() -> int:
            with interruptible():
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(0)
                return 3

        assert run(main) == 3
