"""`chatkore demo`: what it counts, what it shows, how it ends."""

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from chatkore_async import APIConnectionError, PoolStats
from chatkore_async.cli._app import app
from chatkore_async.cli._demo import Relay, demo
from chatkore_async.cli._screen import Plain, Terminal, make_screen
from chatkore_async.cli._tally import Tally
from chatkore_async.testing import RecordedRequest, Reply, error

pty = pytest.importorskip("pty")

ROOT = Path(__file__).parents[1]
DEMO = [sys.executable, "-W", "error", "-m", "chatkore_async.cli", "demo"]
# asyncio's debug mode would add its own remarks on slow callbacks to standard error.
ENVIRONMENT = {
    key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "PYTHONASYNCIODEBUG")
}
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(?:\d+;)*3\d")


class Unreliable(Relay):
    """A relay that refuses one call for good."""

    def __call__(self, request: RecordedRequest) -> Reply:
        return error(400, "no") if request.json.get("user") == "3" else super().__call__(request)


class Secretive(Relay):
    """A relay that forgets the faults it sent."""

    def __call__(self, request: RecordedRequest) -> Reply:
        reply = super().__call__(request)
        self.injected.clear()
        return reply


def plain_rows(output: str) -> dict[str, str]:
    """Return the table at the end of plain output."""
    table = output.partition("What happened\n")[2].partition("\n\n")[0]
    return dict(re.split(r" {2,}", line, maxsplit=1) for line in table.splitlines())


def number(text: str) -> int:
    return int(text.replace(",", "").split()[0])


class TestCounting:
    async def test_the_table_adds_up(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Requests are calls and retries, each over a connection opened or reused, and each cause has its number."""
        relay = Relay(1, pace=0)
        assert await demo(Plain(), 200, relay) == 0
        output = capsys.readouterr().out
        rows = plain_rows(output)
        assert rows["calls"] == "202 ended well, 0 failed"
        assert rows["calls at once"] == "at most 200"
        assert set(relay.injected) == {"429", "503"}
        for cause, faults in relay.injected.items():
            assert faults > 10
            assert number(rows[f"retried after {cause}"]) == faults
        assert number(rows["requests sent"]) == 202 + relay.injected.total()
        assert number(rows["connections opened"]) == 50
        assert number(rows["connections opened"]) + number(rows["connections reused"]) == number(rows["requests sent"])
        assert rows["first token, p50"].endswith("ms, of 51 streams")
        assert re.fullmatch(r"[\d,]+ prompt, [\d,]+ completion", rows["tokens"])
        assert output.endswith(
            f"All 202 calls ended well, through {relay.injected.total()} faults "
            f"({relay.injected['429']} x 429, {relay.injected['503']} x 503).\n"
        )

    async def test_a_seed_settles_the_faults(self) -> None:
        """The same seed injects the same faults, another one others."""
        relays = [Relay(seed, pace=0) for seed in (7, 7, 8)]
        for relay in relays:
            assert await demo(Plain(), 60, relay) == 0
        assert relays[0].injected == relays[1].injected != relays[2].injected

    async def test_without_faults(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Where nothing failed, it says so."""
        assert await demo(Plain(), 1, Relay(1, pace=0)) == 0
        output = capsys.readouterr().out
        assert plain_rows(output)["retries"] == "none"
        assert "1/1 calls\n" in output
        assert output.endswith("All 3 calls ended well, through no fault.\n")

    async def test_a_failed_call_is_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A call that fails for good is in the table and in the last line, and the status is 1."""
        assert await demo(Plain(), 8, Unreliable(1, pace=0)) == 1
        output = capsys.readouterr().out
        assert plain_rows(output)["calls"] == "9 ended well, 1 failed"
        assert output.endswith("Not as expected: 1 of 10 calls did not end well (1 x 400).\n")

    async def test_faults_that_do_not_match_are_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Retries that the server knows nothing of are not a success."""
        assert await demo(Plain(), 40, Secretive(1, pace=0)) == 1
        assert "Not as expected: the server sent no fault, the client retried " in capsys.readouterr().out

    def test_percentiles_are_times_that_were_measured(self) -> None:
        """The p50 and p99 of 200 times are the 100th and the 198th; of none there is none."""
        tally = Tally()
        tally.add(None)
        assert dict(tally.rows(PoolStats(), 1.0))["first token, p99"] == f"{math.nan:.0f} ms"
        tally.first_tokens = [n / 1000 for n in range(200, 0, -1)]
        rows = dict(tally.rows(PoolStats(), 1.0))
        assert rows["first token, p50"] == "100 ms, of 200 streams"
        assert rows["first token, p99"] == "198 ms"

    def test_causes_without_a_status_have_a_name(self) -> None:
        """A retry after a lost connection is listed under the error's class."""
        tally = Tally()

        class Event:
            error = APIConnectionError("gone")

        tally.on_retry(Event())
        assert dict(tally.rows(PoolStats(), 1.0))["retried after APIConnectionError"] == "1 times"


class TestTerminal:
    @pytest.mark.parametrize("width", [40, 80])
    async def test_fits(self, width: int) -> None:
        """On 40 columns as on 80, no line is longer than the terminal, and the cursor comes back."""
        out = StringIO()
        console = Console(file=out, force_terminal=True, width=width, height=24, highlight=False, _environ={})
        assert await demo(Terminal(console), 24, Relay(1, pace=0)) == 0
        shown = ESCAPE.sub("", out.getvalue())
        assert max(len(line) for line in re.split(r"[\r\n]", shown)) <= width
        assert "24/24 calls" in shown
        assert ("retried" in shown.partition("What happened")[0]) is (width == 80)
        assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1

    async def test_failure_is_red(self) -> None:
        """The last line of a demo that failed is red."""
        out = StringIO()
        console = Console(file=out, force_terminal=True, color_system="standard", width=80, _environ={})
        assert await demo(Terminal(console), 4, Unreliable(1, pace=0)) == 1
        assert "\x1b[1;31mNot as expected" in out.getvalue()

    async def test_no_unicode(self) -> None:
        """Where there is nothing but ASCII, frames and bar are made of that, and the rest is question marks."""
        out = AsciiOnly()
        console = Console(file=out, force_terminal=True, width=80, _environ={})
        assert await demo(Terminal(console), 4, Relay(1, pace=0)) == 0
        assert "+-" in out.getvalue()

    def test_a_real_terminal(self) -> None:
        """A terminal gets colours and a moving bar, and keeps its cursor."""
        status, shown = in_terminal(["--calls", "8"], {})
        assert status == 0
        assert "8/8 calls" in ESCAPE.sub("", shown)
        assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
        assert COLOUR.search(shown)

    def test_no_color(self) -> None:
        """`NO_COLOR` is honoured."""
        _, shown = in_terminal([], {"NO_COLOR": "1"}, interrupt_at="One stream")
        assert "╭─ chatkore_async" in shown
        assert not COLOUR.search(shown)

    def test_a_dumb_terminal(self) -> None:
        """A terminal that knows no escape codes gets plain lines."""
        _, shown = in_terminal([], {"TERM": "dumb"}, interrupt_at="One stream")
        assert "One awaited call" in shown
        assert "\x1b" not in shown

    def test_is_recognised(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whether it is a terminal is asked of standard output."""
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stdout", StringIO())
        assert isinstance(make_screen(), Plain)
        monkeypatch.setattr(sys, "stdout", Tty())
        assert isinstance(make_screen(), Terminal)

    def test_ctrl_c(self) -> None:
        """Ctrl-C at the progress bar says so on a line of its own, brings the cursor back, and has status 130."""
        status, shown = in_terminal([], {}, interrupt_at="\x1b[?25l")
        assert status == 130
        assert re.search(r"/200 calls +\r\ninterrupted\r\n$", ESCAPE.sub("", shown))
        assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
        assert "Traceback" not in shown


class TestPiped:
    def test_plain_lines(self) -> None:
        """A pipe gets lines without escape codes or carriage returns, one for each tenth of the calls."""
        result = CliRunner().invoke(app, ["demo", "--calls", "10", "--seed", "3"])
        assert result.exit_code == 0, result.output
        assert not set("\x1b\r") & set(result.output)
        assert re.findall(r"^(\d+)/10 calls", result.output, re.MULTILINE) == [str(n) for n in range(1, 11)]
        assert "\nOne awaited call\n" in result.output
        assert "\nOne stream, as it comes\n" in result.output

    def test_the_environment_has_no_say(self) -> None:
        """No key, base URL, proxy or encoding of the environment changes how the demo ends."""
        done = subprocess.run(
            [*DEMO, "--calls", "4"],
            capture_output=True,
            check=False,
            cwd=ROOT,
            timeout=60,
            env={
                **ENVIRONMENT,
                "CHATKORE_API_KEY": "bad\nkey",
                "CHATKORE_BASE_URL": "http://127.0.0.1:9",
                "HTTP_PROXY": "http://127.0.0.1:9",
                "ALL_PROXY": "socks5://127.0.0.1:9",
                "FORCE_COLOR": "1",
                "PYTHONIOENCODING": "latin-1",
            },
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"You wrote ?Hello?." in done.stdout
        assert b"\x1b" not in done.stdout

    def test_a_reader_that_leaves(self) -> None:
        """`chatkore demo | head -1` shows a line and nothing on standard error."""
        with started() as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline().startswith(b"chatkore_async ")
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(30) == 1

    @pytest.mark.parametrize("line", [b"chatkore_async", b"One stream", b"every fourth", b"20/200"])
    def test_ctrl_c(self, line: bytes) -> None:
        """Whatever it is at, Ctrl-C ends it with one word on standard error, a whole line before it and status 130."""
        assert ended_by(signal.SIGINT, line) == (130, b"interrupted\n")

    def test_sigterm(self) -> None:
        """SIGTERM ends it as cleanly, without a word and with status 143."""
        assert ended_by(signal.SIGTERM, b"One stream") == (143, b"")


class Tty(StringIO):
    def isatty(self) -> bool:
        return True


class AsciiOnly(StringIO):
    encoding = "ascii"

    def write(self, text: str) -> int:
        return super().write(text.encode("ascii", "replace").decode())


@pytest.fixture(autouse=True)
def _ctrl_c_is_not_ignored() -> Iterator[None]:
    """Give child processes the Ctrl-C that a test runner in the background may have been deprived of."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def started() -> "subprocess.Popen[bytes]":
    return subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=ENVIRONMENT)


def ended_by(number: signal.Signals, line: bytes) -> tuple[int, bytes]:
    """Send a signal once a line was shown; return the status and what came on standard error."""
    with started() as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert any(line in shown for shown in process.stdout)
        process.send_signal(number)
        assert process.stdout.read()[-1:] in (b"", b"\n")
        return process.wait(30), process.stderr.read()


def in_terminal(args: list[str], variables: dict[str, str], interrupt_at: str | None = None) -> tuple[int, str]:
    """Run the demo in a terminal of 80 columns, perhaps pressing Ctrl-C; return its status and all that was shown."""
    ours, theirs = pty.openpty()
    shown = b""
    with subprocess.Popen(
        [*DEMO, *args],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env={**ENVIRONMENT, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", **variables},
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
