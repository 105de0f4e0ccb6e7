"""The command `chatkore` itself: what its commands have in common, and how each of them ends.

Each command is a module of its own, loaded when it is called: `chatkore --help` starts no server and no terminal.
"""

import asyncio
import contextlib
import io
import os
import platform
import signal
import sys
from importlib import import_module
from importlib.metadata import version
from typing import Any, NoReturn

import click

from chatkore_async import __version__
from chatkore_async.cli._options import debug_option, is_debugging
from chatkore_async.cli._problems import explained
from chatkore_async.cli._run import INTERRUPTED

COMMANDS = {
    "demo": "Watch the client at work on a server of its own: no key, no network.",
    "chat": "Talk to a model: one question, or a conversation.",
    "batch": "Ask the requests of a file, and go on wherever that was stopped.",
    "serve": "Serve the API on this machine, for other programs; --llm for a real model.",
    "doctor": "Check a server, a key and the way there, step by step.",
    "completion": "Print the code that lets your shell complete commands and options.",
}
"""Name and summary of each command; `demo` is the attribute `command` of `_demo.py`."""


class App(click.Group):
    """A group whose commands are loaded by name, and whose errors are one line and a hint."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click passes it
        """Return the commands' names."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Load a command, or return `None` when there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"chatkore_async.cli._{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the summaries, without loading what they summarise."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and turn whatever ends it into a line and a status.

        0 went well, 1 did not, 2 is wrong usage; 130 and 143 are Ctrl-C and SIGTERM, as shells count them.
        """
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except BrokenPipeError:
            # Whoever read our output has left (`chatkore demo | head -1`), so there is nobody to tell.
            _drop_stdout()
            ctx.exit(1)
        except Exception as error:
            if is_debugging(ctx):
                raise
            raise explained(error) from error


def _versions(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click calls it so
    if not value or ctx.resilient_parsing:
        return
    click.echo(f"chatkore_async {__version__}")
    click.echo(f"Python {platform.python_version()}")
    for name in ("aiohttp", "msgspec", "tenacity"):
        click.echo(f"{name} {version(name)}")
    click.echo(f"event loop {_event_loop()}")
    ctx.exit()


def _event_loop() -> str:
    """Return the class of the loop that commands run on, as `asyncio.SelectorEventLoop`."""
    with asyncio.Runner() as runner:
        kind = type(runner.get_loop())
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__.lstrip('_')}"


@debug_option
@click.group(
    cls=App,
    epilog="""\b
Examples:
  chatkore demo              see it work, in a few seconds
  chatkore serve             a server to try things on
  chatkore chat --help       what a command can do
  chatkore --version         what a bug report should name""",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_versions,
    help="Show the versions of chatkore_async and of what it is built on.",
)
def app() -> None:
    """chatkore_async, the asyncio client for ChatKore, on the command line."""


def main() -> NoReturn:
    """Run the command line, and exit."""
    if sys.stdout is None:  # closed by the shell: `chatkore demo >&-`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - as long as the process
    for stream in (sys.stdout, sys.stderr):
        # A terminal that has no “ shows a question mark in its place.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app.main(prog_name="chatkore")
    except OSError as error:  # there was no room for the help, even
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    finally:
        # It is over, and the status is known: what Ctrl-C could still interrupt is the interpreter's own clearing up.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            sys.stdout.flush()
        except OSError:
            _drop_stdout()
    raise AssertionError("click exits")  # pragma: no cover


def _drop_stdout() -> None:
    """Send what is still buffered nowhere, or the interpreter would complain of the closed pipe as it ends."""
    # Without a file descriptor (a test's buffer) there is no pipe.
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
