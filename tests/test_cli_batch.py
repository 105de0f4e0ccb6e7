"""`chatkore batch`: what it shows, how it ends, and with which status."""

import asyncio
import gzip
import json
import os
import re
import signal
import sys
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from chatkore_async.batch import BatchSummary
from chatkore_async.cli._app import app
from chatkore_async.cli._batch import Asked, Refused, batch, standard_input
from chatkore_async.cli._meter import PlainMeter, TerminalMeter, make_meter, remarks, short, span
from chatkore_async.cli._problems import Problem
from chatkore_async.cli._screen import Plain, Terminal
from chatkore_async.testing import ChatKoreServer, RecordedRequest, Reply, completion, error

pty = pytest.importorskip("pty")

PATIENCE = 30.0
"""Seconds after which something hangs."""

BATCH = [sys.executable, "-W", "error", "-m", "chatkore_async.cli", "batch"]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


# Files of this process may not grow beyond a size, until its end, when coverage writes what it has.
LIMITED = """
import atexit, resource, sys
before = resource.getrlimit(resource.RLIMIT_FSIZE)
atexit.register(resource.setrlimit, resource.RLIMIT_FSIZE, before)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), before[1]))
from chatkore_async.cli import main
main()
"""


def request(number: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Hello {number}"}]
    return {
        "custom_id": f"r{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": messages, "user": str(number)},
    }


def requests(count: int) -> bytes:
    return b"".join(json.dumps(request(number)).encode() + b"\n" for number in range(count))


def echo(asked: RecordedRequest) -> Reply:
    return completion(asked.json["user"])


def lines_in(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def asked(place: Path, data: bytes, **changes: Any) -> Asked:
    (place / "in.jsonl").write_bytes(data)
    given = {"source": str(place / "in.jsonl"), "name": "in.jsonl", "output": str(place / "out.jsonl")}
    return Asked(**{**given, "concurrency": 8, "retry_failed": False, **changes})


@pytest.fixture
def account(server: ChatKoreServer) -> dict[str, Any]:
    return {"base_url": server.base_url, "max_retries": 0}


def environment(server: ChatKoreServer, **variables: str) -> dict[str, str]:
    # asyncio's debug mode would add its own remarks on slow callbacks to standard error.
    unwanted = ("NO_COLOR", "FORCE_COLOR", "PYTHONASYNCIODEBUG")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return {**kept, "CHATKORE_BASE_URL": server.base_url, **variables}


async def chatkore_batch(
    server: ChatKoreServer, *args: str, stdin: bytes | None = b"", limit: int | None = None
) -> tuple[int | None, str, str]:
    """Run the command in a process of its own, and return its status, standard output and standard error."""
    command = BATCH if limit is None else [sys.executable, "-W", "error", "-c", LIMITED, str(limit), "batch"]
    process = await asyncio.create_subprocess_exec(
        *(*command, *args),
        stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(server),
    )
    async with asyncio.timeout(PATIENCE):
        out, err = await process.communicate(stdin)
    return process.returncode, out.decode(), err.decode()


class TestEnding:
    async def test_all_answered(
        self, server: ChatKoreServer, account: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Status 0, a table of what happened, and where the answers are."""
        server.respond_with(echo)
        job = asked(tmp_path, requests(20))
        assert await batch(Plain(), PlainMeter(), job, account) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"in.jsonl to {job.output}, 8 at a time, at {server.base_url}\n0/20 requests\n2/20 ")
        table = re.sub(r"time .*", "time", shown.partition("What happened\n")[2])
        assert table == (
            "requests  20\nanswered  20\nfailed    0\nretries   none\ntokens    200 prompt, 20 completion\ntime\n"
            f"\nEvery request has its answer in {job.output}.\n"
        )
        assert len(lines_in(tmp_path / "out.jsonl")) == 20

    async def test_some_failed(
        self, server: ChatKoreServer, account: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Status 1, the failures by cause, and how to ask again; also when there is nothing left to ask."""
        server.respond_with(lambda each: error(503) if each.json["user"] == "3" else echo(each))
        job = asked(tmp_path, requests(5))
        assert await batch(Plain(), PlainMeter(), job, {**account, "max_retries": 1}) == 1
        shown = capsys.readouterr().out
        assert "failed    1 (1 x 503)\nretries   1 x 503\n" in shown
        assert shown.endswith(f"1 request failed: {job.output} says why. --retry-failed asks again.\n")
        assert await batch(Plain(), PlainMeter(), job, account) == 1
        shown = capsys.readouterr().out
        assert "5/5 requests, 5 of them done before, 1 failed\n" in shown
        assert "done before  5\nanswered     4\nfailed       1\n" in shown
        server.respond_with(lambda each: error(400) if each.json["user"] == "3" else echo(each))
        retried = asked(tmp_path, requests(7), retry_failed=True)
        assert await batch(Plain(), PlainMeter(), retried, account) == 1
        assert "failed       1 (1 x 400 now)\n" in capsys.readouterr().out
        server.respond_with(echo)
        assert await batch(Plain(), PlainMeter(), retried, account) == 0
        assert len(lines_in(tmp_path / "out.jsonl")) == 7

    async def test_refused(self, account: dict[str, Any], tmp_path: Path) -> None:
        """Status 2, each fault on a line of its own, and nothing is asked."""
        with pytest.raises(Refused) as caught:
            await batch(Plain(), PlainMeter(), asked(tmp_path, b"x\n" + requests(1) * 2), account)
        assert caught.value.exit_code == 2
        message = caught.value.format_message().splitlines()
        assert message[0] == "the batch cannot be run"
        assert re.match(r"  .*in\.jsonl, line 1: it is not JSON", message[1])
        assert message[2].endswith("in.jsonl, line 3: custom_id 'r0' has a line already")
        assert message[3].startswith("Hint: nothing was asked")
        assert not (tmp_path / "out.jsonl").exists()
        with pytest.raises(Refused, match="is the input"):
            await batch(Plain(), PlainMeter(), asked(tmp_path, b"", output=str(tmp_path / "in.jsonl")), account)

    async def test_refused_as_a_process(self, server: ChatKoreServer, tmp_path: Path) -> None:
        """The shell sees it: a status of 2, and the reason on standard error."""
        status, out, err = await chatkore_batch(server, str(tmp_path / "no.jsonl"), str(tmp_path / "out.jsonl"))
        assert status == 2
        assert err.startswith(f"Error: {tmp_path}/no.jsonl cannot be read: No such file or directory\nHint: ")
        assert "What happened" not in out

    async def test_a_full_disk(self, server: ChatKoreServer, tmp_path: Path) -> None:
        """Status 1, the system's words, and that what was finished is kept."""
        server.respond_with(echo)
        job = asked(tmp_path, requests(30))
        status, _, err = await chatkore_batch(server, job.source, job.output, limit=4000)
        assert status == 1
        assert re.match(rf"Error: {job.output}: File too large with \d+ of 30 requests done\nHint: what was fin", err)
        assert (await chatkore_batch(server, job.source, job.output))[0] == 0
        assert len(lines_in(tmp_path / "out.jsonl")) == 30

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    async def test_stopped(self, server: ChatKoreServer, tmp_path: Path, number: signal.Signals) -> None:
        """Ctrl-C and SIGTERM leave whole lines, and say how to go on; the same command then does."""
        ten = asyncio.Event()

        async def respond(each: RecordedRequest) -> Reply:
            if int(each.json["user"]) >= 10:
                ten.set()
                await asyncio.Event().wait()
            return echo(each)

        server.respond_with(respond)
        job = asked(tmp_path, requests(40))
        process = await asyncio.create_subprocess_exec(
            *(*BATCH, job.source, job.output, "--concurrency", "4"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment(server),
        )
        async with asyncio.timeout(PATIENCE):
            await ten.wait()
            while (tmp_path / "out.jsonl").read_bytes().count(b"\n") < 10:  # noqa: ASYNC110
                await asyncio.sleep(0)
            process.send_signal(number)
            out, err = await process.communicate()
        assert process.returncode == 128 + number
        assert err.decode() == ("interrupted\n" if number is signal.SIGINT else "")
        end = "Stopped with 10 of 40 requests done. The same command goes on from there.\n"
        assert out.decode().endswith(end)
        server.respond_with(echo)
        status, shown, _ = await chatkore_batch(server, job.source, job.output)
        assert status == 0
        assert "done before  10\n" in shown

    async def test_stopped_before_the_first_request(
        self, account: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """While the files are looked through there is nothing to count yet."""
        task = asyncio.create_task(batch(Plain(), PlainMeter(), asked(tmp_path, requests(9000)), account))
        while not (tmp_path / "out.jsonl").exists():  # noqa: ASYNC110
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert "Stopped before the first request. The same command goes on" in capsys.readouterr().out

    def test_a_key_is_needed(self, tmp_path: Path) -> None:
        """Without a key, a server elsewhere is not asked, and no output is made."""
        job = asked(tmp_path, requests(1))
        result = CliRunner().invoke(app, ["batch", job.source, job.output, "--base-url", "https://example.invalid"])
        assert result.exit_code == 1
        assert "no API key" in result.output
        assert not (tmp_path / "out.jsonl").exists()


class TestStandardInput:
    @pytest.mark.parametrize("packed", [False, True])
    async def test_a_pipe(self, server: ChatKoreServer, tmp_path: Path, packed: bool) -> None:
        """What is piped in is kept in a file without a name, for it is read twice; gzip is understood there too."""
        server.respond_with(echo)
        data = gzip.compress(requests(12)) if packed else requests(12)
        status, out, err = await chatkore_batch(server, "-", str(tmp_path / "out.jsonl"), stdin=data)
        assert (status, err) == (0, "")
        assert out.startswith("standard input to ")
        assert len(lines_in(tmp_path / "out.jsonl")) == 12

    async def test_nothing(self, server: ChatKoreServer, tmp_path: Path) -> None:
        """No requests are no error, and no mystery."""
        status, out, _ = await chatkore_batch(server, "-", str(tmp_path / "out.jsonl"), stdin=None)
        assert status == 0
        assert "requests  0\n" in out

    def test_a_file_is_not_copied(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """`< in.jsonl` is a file already."""
        (tmp_path / "in.jsonl").write_bytes(b"x")
        with (tmp_path / "in.jsonl").open("rb") as opened:
            stream = TextIOWrapper(opened)
            monkeypatch.setattr(sys, "stdin", stream)
            with standard_input() as source:
                assert source is opened
            stream.detach()

    def test_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody types a batch: a terminal, or no standard input at all, is wrong usage."""

        class Tty(StringIO):
            def isatty(self) -> bool:
                return True

        for stdin in (Tty(), None):
            monkeypatch.setattr(sys, "stdin", stdin)
            with pytest.raises(click.UsageError, match="pipe the requests into it"), standard_input():
                pass

    def test_no_room_for_the_copy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A temporary directory that is full is named, and how to take another one."""

        class Endless(BytesIO):
            def read(self, size: int | None = -1, /) -> bytes:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(sys, "stdin", TextIOWrapper(Endless()))
        with pytest.raises(Problem, match=r"No space left(.|\n)*TMPDIR"), standard_input():
            pass


def so_far(**changes: Any) -> BatchSummary:
    return BatchSummary(**{"total": 1000, "completed": 0, "failed": 0, "resumed": 0, **changes})


class TestMeter:
    @pytest.mark.parametrize(
        "summary,said",
        [
            (so_far(), []),
            (so_far(completed=400, resumed=400, elapsed=2.0), []),
            (so_far(completed=400, elapsed=2.0), ["200/s", "3.0 s left"]),
            (
                so_far(completed=390, failed=10, resumed=200, prompt_tokens=900, completion_tokens=300, elapsed=100.0),
                ["10 failed", "2.0/s", "1.2k tokens", "5 min left"],
            ),
            (so_far(completed=1, elapsed=60.0), ["60/h", "16 h 39 min left"]),
            (so_far(completed=1000, elapsed=10.0), ["100/s"]),
            (so_far(completed=3, elapsed=0.0), ["0.0 s left"]),
        ],
    )
    def test_remarks(self, summary: BatchSummary, said: list[str]) -> None:
        """Rate and time left are those of this run, however much was done before."""
        assert remarks(summary, 0.0) == said

    def test_the_look_at_the_files_is_not_counted(self) -> None:
        """A rate is that of the requests: a million lines that are looked through first do not make it smaller."""
        assert remarks(so_far(completed=400, elapsed=102.0), 100.0) == ["200/s", "3.0 s left"]

    def test_numbers_and_times_are_short(self) -> None:
        """They change while one looks at them, and have to be read at a glance."""
        assert [short(each) for each in (0, 999, 1000, 12_345, 1_200_000, 3 * 10**9)] == [
            *("0", "999", "1.0k", "12.3k", "1.2M", "3.0G"),
        ]
        assert [span(each) for each in (0.04, 9.9, 10, 99, 100, 5999, 6000, 7265)] == [
            *("0.0 s", "9.9 s", "10 s", "99 s", "2 min", "1 h 40 min", "1 h 40 min", "2 h 01 min"),
        ]

    def test_a_log_gets_a_line_for_each_tenth_and_each_minute(self, capsys: pytest.CaptureFixture[str]) -> None:
        """However many requests there are, and however slow they are."""
        now = 0.0
        with PlainMeter(lambda: now).running() as show:
            for done in range(1001):
                show(so_far(completed=done, elapsed=now))
            show(so_far(completed=1000, elapsed=now))
        assert re.findall(r"^(\S+) requests", capsys.readouterr().out, re.MULTILINE) == [
            *(f"{tenth * 100:,}/1,000" for tenth in range(11)),
        ]
        with PlainMeter(lambda: now).running() as show:
            for done in range(10):
                show(so_far(completed=done, elapsed=now))
                now += 25.0
        assert re.findall(r"^(\S+) requests", capsys.readouterr().out, re.MULTILINE) == [
            "0/1,000",
            "3/1,000",
            "6/1,000",
            "9/1,000",
        ]

    def test_an_empty_batch(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Nothing of nothing is a line as well."""
        with PlainMeter().running() as show:
            show(so_far(total=0))
        assert capsys.readouterr().out == "0/0 requests\n"

    @pytest.mark.parametrize("width", [40, 80, 120])
    def test_a_terminal_of_any_width(self, width: int) -> None:
        """No line is longer than the terminal, what there is room for is shown, and the cursor comes back."""
        out = StringIO()
        console = Console(file=out, force_terminal=True, width=width, height=24, highlight=False, _environ={})
        now = 0.0
        with TerminalMeter(console, lambda: now).running() as show:
            for done in range(0, 1001, 10):
                now += 0.05
                show(so_far(completed=done, failed=0, elapsed=now, prompt_tokens=done * 1000, completion_tokens=1))
        shown = ESCAPE.sub("", out.getvalue())
        assert max(len(line) for line in re.split(r"[\r\n]", shown)) <= width
        assert "looking through the files" in shown
        assert "1000/1000" in shown
        assert ("/s" in shown) is (width > 40)
        assert "1.0M tokens" in shown
        assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h")

    def test_a_batch_that_is_refused_shows_no_bar(self) -> None:
        """Before the first summary there is a line that says what is done, and it is gone afterwards."""
        out = StringIO()
        console = Console(file=out, force_terminal=True, width=80, height=24, _environ={})
        with pytest.raises(LookupError), TerminalMeter(console).running():
            raise LookupError
        assert "━" not in out.getvalue()
        assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h")

    def test_goes_with_its_screen(self) -> None:
        """A terminal has a bar; all else has lines."""
        assert isinstance(make_meter(Plain()), PlainMeter)
        assert isinstance(make_meter(Terminal(Console())), TerminalMeter)

    async def test_a_real_terminal(self, server: ChatKoreServer, tmp_path: Path) -> None:
        """There it is a bar with colours, and Ctrl-C leaves it standing above what is said."""
        go_on = asyncio.Event()

        async def respond(each: RecordedRequest) -> Reply:
            if each.json["user"] == "5":
                await go_on.wait()
            return echo(each)

        server.respond_with(respond)
        job = asked(tmp_path, requests(30))
        ours, theirs = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            *(*BATCH, job.source, job.output),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment(server, TERM="xterm-256color", COLUMNS="100", LINES="24"),
            start_new_session=True,
        )
        os.close(theirs)
        reading = asyncio.create_task(asyncio.to_thread(everything, ours))
        async with asyncio.timeout(PATIENCE):
            await server.wait_for_requests(30, timeout=PATIENCE)
            while (tmp_path / "out.jsonl").read_bytes().count(b"\n") < 29:  # noqa: ASYNC110
                await asyncio.sleep(0)
            process.send_signal(signal.SIGINT)
            shown = await reading
            assert await process.wait() == 130
        assert re.search(r"\x1b\[(?:\d+;)*3\d", shown)
        assert re.search(
            r"29/30 .*tokens.*\r\n(.*\r)?.*Stopped with 29 of 30 requests done[^\n]*\r\ninterrupted\r\n$",
            ESCAPE.sub("", shown),
        )
        assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def everything(descriptor: int) -> str:
    """Read a terminal until it is closed."""
    shown = b""
    try:
        while piece := os.read(descriptor, 4096):
            shown += piece
    except OSError:
        pass  # Linux's way of saying so
    finally:
        os.close(descriptor)
    return shown.decode()
