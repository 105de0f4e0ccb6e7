"""The command line as such: help, versions, errors, signals."""

import asyncio
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import NoReturn

import click
import pytest
from click.testing import CliRunner

from chatkore_async import (
    APIConnectionError,
    APIError,
    APITimeoutError,
    ConfigurationError,
    InvalidRequestError,
    StreamInterruptedError,
    __version__,
    cli,
)
from chatkore_async.cli._app import App, app
from chatkore_async.cli._options import debug_option
from chatkore_async.cli._run import run

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Give each test Ctrl-C as a terminal has it, and pytest its own again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, timeout=30
    )


def failing(problem: BaseException) -> App:
    """Return a group with one command, which raises."""

    class Failing(App):
        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            @debug_option
            @click.command
            def fail() -> NoReturn:
                raise problem

            return fail

    return debug_option(Failing())


class TestHelp:
    @pytest.mark.parametrize(
        "args",
        [
            ["--help"],
            ["-h"],
            *([name, "--help"] for name in ("demo", "chat", "batch", "serve", "doctor", "completion")),
        ],
    )
    def test_fits_a_screen(self, args: list[str]) -> None:
        """Help is at most 24 lines of 80 columns, and has examples."""
        result = CliRunner().invoke(app, args, prog_name="chatkore", terminal_width=80)
        assert result.exit_code == 0
        lines = result.output.splitlines()
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 80
        assert "Examples:" in result.output
        assert f"chatkore {args[0] if len(args) > 1 else 'demo'}" in result.output.partition("Examples:")[2]

    def test_lists_every_command(self) -> None:
        """Each command that is listed can be called."""
        names = app.list_commands(click.Context(app))
        assert "demo" in names
        for name in names:
            result = CliRunner().invoke(app, [name, "--help"])
            assert result.exit_code == 0, name

    def test_loads_no_command(self) -> None:
        """Help and versions do not wait for what commands need."""
        loaded = python(
            "import sys; from chatkore_async.cli._app import app; app(['--help'], standalone_mode=False);"
            "assert not {'chatkore_async.cli._demo', 'chatkore_async.testing', 'rich.console'} & set(sys.modules)"
        )
        assert (loaded.returncode, loaded.stderr) == (0, "")


class TestVersion:
    def test_names_what_a_bug_report_needs(self) -> None:
        """`--version` names the package, Python, the three libraries underneath and the event loop."""
        result = CliRunner().invoke(app, ["--version"])
        assert result.output.splitlines() == [
            f"chatkore_async {__version__}",
            f"Python {'.'.join(map(str, sys.version_info[:3]))}",
            *(f"{name} {version(name)}" for name in ("aiohttp", "msgspec", "tenacity")),
            "event loop asyncio.UnixSelectorEventLoop"
            if os.name == "posix"
            else "event loop asyncio.ProactorEventLoop",
        ]

    def test_answers_nothing_while_a_shell_completes(self) -> None:
        """A shell that asks for completions is not told versions."""
        with app.make_context("chatkore", ["--version", "demo"], resilient_parsing=True) as ctx:
            assert ctx.params == {}


class TestCompletion:
    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_prints_code_for_each_shell(self, shell: str) -> None:
        """What is printed asks `chatkore` itself for the words, in the shell's own language."""
        result = CliRunner().invoke(app, ["completion", shell])
        assert result.exit_code == 0
        assert f"_CHATKORE_COMPLETE={shell}_complete" in result.output

    def test_completes_commands_and_options(self) -> None:
        """A shell that asks is given the names of commands, and of the options of one."""
        asked = {"COMP_CWORD": "1", "COMP_WORDS": "chatkore ser", "_CHATKORE_COMPLETE": "bash_complete"}
        done = CliRunner(env=asked).invoke(app, prog_name="chatkore")
        assert done.output == "plain,serve\n"
        asked = {**asked, "COMP_CWORD": "2", "COMP_WORDS": "chatkore demo --se"}
        assert CliRunner(env=asked).invoke(app, prog_name="chatkore").output == "plain,--seed\n"

    def test_an_old_bash_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the shell is too old for it, the error says which one is needed."""

        def refuse(_: object) -> str:
            raise RuntimeError("bash 4.4 or later, please")

        monkeypatch.setattr("click.shell_completion.BashComplete.source", refuse)
        result = CliRunner().invoke(app, ["completion", "bash"])
        assert result.exit_code == 1
        assert result.output.startswith("Error: bash 4.4 or later, please\nHint: zsh")


class TestTimeout:
    @pytest.mark.parametrize("value", ["inf", "nan", "-1", "0", "soon"])
    def test_is_a_length_of_time(self, value: str) -> None:
        """`--timeout` takes seconds, and what is none is wrong usage."""
        result = CliRunner().invoke(app, ["chat", "--timeout", value, "Hello"])
        assert result.exit_code == 2
        assert "--timeout" in result.output


class TestErrors:
    def test_an_unknown_command_is_wrong_usage(self) -> None:
        """A command that is none has status 2, and is named."""
        result = CliRunner().invoke(app, ["dmeo"])
        assert result.exit_code == 2
        assert "dmeo" in result.output

    @pytest.mark.parametrize(
        "problem, line, hint",
        [
            (ConfigurationError("no API\nkey"), "no API key", "CHATKORE_API_KEY"),
            (ConfigurationError(), "ConfigurationError: ", "CHATKORE_API_KEY"),
            (InvalidRequestError("$.messages is empty"), "$.messages is empty", "--help"),
            (APIConnectionError("nobody there"), "nobody there", "chatkore doctor"),
            (APITimeoutError("late", phase="total"), "late", "--timeout"),
            (StreamInterruptedError("cut"), "cut", "ask again"),
            (OSError(28, "No space left"), "[Errno 28] No space left", "--debug"),
            (KeyError("x"), "KeyError: 'x'", "--debug"),
        ],
    )
    def test_are_one_line_and_a_hint(self, problem: Exception, line: str, hint: str) -> None:
        """An error is a line that says what, a line that says what to do, and status 1."""
        result = CliRunner().invoke(failing(problem), ["fail"])
        assert result.exit_code == 1
        first, second = result.output.splitlines()
        assert first == f"Error: {line}"
        assert second.startswith("Hint: ")
        assert hint in second

    def test_cannot_drive_the_terminal(self) -> None:
        """What a server says in an error is shown and not obeyed."""
        result = CliRunner().invoke(failing(APIError("400 \x1b[2J\x9bsorry", hint="\x1b]0;x\x07")), ["fail"])
        assert result.output == "Error: 400 \ufffd[2J\ufffdsorry\nHint: \ufffd]0;x\ufffd\n"

    def test_have_the_hint_of_the_api(self) -> None:
        """An error that knows what to do about it is shown with that, once."""
        result = CliRunner().invoke(failing(APIError("429 slow down.", hint="Buy more.")), ["fail"])
        assert result.exit_code == 1
        assert result.output == "Error: 429 slow down\nHint: Buy more\n"

    @pytest.mark.parametrize("args", [["--debug", "fail"], ["fail", "--debug"]])
    def test_have_a_traceback_with_debug(self, args: list[str]) -> None:
        """`--debug`, before or after the command's name, lets the error through."""
        problem = KeyError("x")
        result = CliRunner().invoke(failing(problem), args)
        assert result.exception is problem

    def test_usage_errors_stay_what_they_are(self) -> None:
        """A command's own complaint of its arguments has status 2."""
        result = CliRunner().invoke(failing(click.UsageError("not so")), ["fail"])
        assert result.exit_code == 2
        assert "not so" in result.output

    @pytest.mark.parametrize("problem", [KeyboardInterrupt(), click.Abort()])
    def test_interruption_is_one_word(self, problem: BaseException) -> None:
        """Ctrl-C, also at a prompt, has status 130 and says "interrupted"."""
        result = CliRunner().invoke(failing(problem), ["fail"])
        assert (result.exit_code, result.output) == (130, "interrupted\n")

    def test_a_closed_pipe_is_nobodys_business(self) -> None:
        """When the reader of our output has left, nothing is said, and the status is 1."""
        result = CliRunner().invoke(failing(BrokenPipeError()), ["fail"])
        assert (result.exit_code, result.output) == (1, "")


class TestProcess:
    @pytest.mark.parametrize("missing", ["click", "prompt_toolkit", "rich"])
    def test_a_missing_extra_is_named(self, missing: str) -> None:
        """Without one of the libraries of the extra there is one line that names the extra, and status 1."""
        done = python(f"import sys; sys.modules['{missing}'] = None; from chatkore_async.cli import main; main()")
        assert done.returncode == 1
        assert done.stderr == (
            "chatkore: the command line needs click, prompt-toolkit and rich: pip install 'chatkore-async[cli]'\n"
        )
        assert done.stdout == ""

    def test_a_missing_extra_is_named_here_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The line is the message of the exit."""
        monkeypatch.setitem(sys.modules, "rich", None)
        with pytest.raises(SystemExit, match=re.escape("chatkore-async[cli]")):
            cli.main()

    def test_ctrl_c_while_modules_load(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Ctrl-C before any command runs is no traceback either."""

        def press(_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "import_module", press)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 130
        assert capsys.readouterr().err == "interrupted\n"

    def test_exits_with_the_status(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """The process ends with the command's status, and does not let Ctrl-C change it any more."""
        monkeypatch.setattr(sys, "argv", ["chatkore", "--version"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert capsys.readouterr().out.startswith("chatkore_async ")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a full disk at hand")
    def test_a_full_disk_is_an_error(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """Help that cannot be written is one line and status 1."""
        monkeypatch.setattr(sys, "argv", ["chatkore", "--help"])
        with Path("/dev/full").open("w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            with pytest.raises(SystemExit) as ended:
                cli.main()
        assert ended.value.code == 1
        assert capsys.readouterr().err == "Error: [Errno 28] No space left on device\n"

    def test_no_standard_output_at_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`chatkore --version >&-` writes nowhere and ends well."""
        monkeypatch.setattr(sys, "argv", ["chatkore", "--version"])
        monkeypatch.setattr(sys, "stdout", None)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        sys.stdout.close()

    def test_runs_as_a_module(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """`python -m chatkore_async.cli` is `chatkore`."""
        monkeypatch.setattr(sys, "argv", ["__main__.py", "-h"])
        monkeypatch.setattr(sys, "stderr", StringIO())  # which cannot be told how to replace what it cannot show
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("chatkore_async.cli", run_name="__main__")
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith("Usage: chatkore ")


class TestRun:
    def test_returns_the_status(self) -> None:
        """A coroutine's result is the command's, and the signals are afterwards what they were."""

        async def main() -> int:
            return 3

        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        assert run(main) == 3
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before

    @pytest.mark.parametrize(
        "number, ends", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["INT", "TERM"]
    )
    def test_a_signal_lets_it_clean_up(self, number: int, ends: type[BaseException]) -> None:
        """Whatever waits is cancelled, cleans up in peace however often the key is pressed, and then it ends."""
        seen: list[str] = []

        async def main() -> int:
            try:
                os.kill(os.getpid(), number)
                await asyncio.Event().wait()
            finally:
                os.kill(os.getpid(), number)
                await asyncio.sleep(0)
                seen.append("clean")
            return 0

        with pytest.raises(ends) as ended:
            run(main)
        assert seen == ["clean"]
        if isinstance(ended.value, SystemExit):
            assert ended.value.code == 143

    def test_a_pipeline_that_ends_is_interrupted_too(self) -> None:
        """When Ctrl-C has ended the reader of our output as well, it was still Ctrl-C."""

        async def main() -> int:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.Event().wait()
            finally:
                raise BrokenPipeError

        with pytest.raises(KeyboardInterrupt):
            run(main)

    def test_a_signal_at_the_last_moment_counts(self) -> None:
        """Who pressed Ctrl-C is told so, though all was done."""

        async def main() -> int:
            os.kill(os.getpid(), signal.SIGINT)
            return 0

        with pytest.raises(KeyboardInterrupt):
            run(main)

    def test_what_the_shell_ignores_stays_ignored(self) -> None:
        """`chatkore … &` in a script does not end by the Ctrl-C that is meant for others."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)

        async def main() -> int:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0)
            return 0

        assert run(main) == 0

    def test_cancellation_without_a_signal_is_an_error(self) -> None:
        """A coroutine that cancels itself is not taken for Ctrl-C."""

        async def main() -> int:
            raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            run(main)
