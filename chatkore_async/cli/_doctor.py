"""`chatkore doctor`: a server, a key and the way there, looked at step by step."""

import asyncio
import logging
import math
import os
import platform
import ssl
from importlib.metadata import version

import click

from chatkore_async import __version__
from chatkore_async.cli._account import base_url_option
from chatkore_async.cli._chart import Silent, make_chart
from chatkore_async.cli._examination import Asked, Examination
from chatkore_async.cli._finding import document, verdict
from chatkore_async.cli._options import debug_option
from chatkore_async.cli._printable import mended
from chatkore_async.cli._run import run
from chatkore_async.cli._threads import DaemonThreads


async def doctor(asked: Asked, *, as_json: bool) -> int:
    """Look at a server, show what is found, and return the exit status.

    Args:
        asked: what to look at.
        as_json: whether all is shown as one document at the end: `base_url` as the client has it, `ok`, `findings` as
            a list of `step`, `status`, `seen`, `means` and `change`, and `versions` by name. All of a finding are
            strings; of the lines of `means` and `change`, one and one belong together.
    """
    threads = DaemonThreads()
    # For aiohttp, too, which looks up names in threads of the loop.
    asyncio.get_running_loop().set_default_executor(threads)
    chart = Silent() if as_json else make_chart()
    about = versions()
    chart.begin(", ".join(f"{name} {number}" for name, number in about.items()))
    examination = Examination(asked, chart, os.environ, threads)
    await examination.run()
    words, good = verdict(examination.findings)
    chart.end(words, good=good)
    if as_json:
        click.echo(document(examination.base_url, examination.findings, about))
    return 0 if good else 1


def versions() -> dict[str, str]:
    """Return what a bug report should name."""
    return {
        "chatkore_async": __version__,
        "python": platform.python_version(),
        "aiohttp": version("aiohttp"),
        "openssl": ssl.OPENSSL_VERSION.partition(" ")[2].partition(" ")[0],
    }


def _finite(_: click.Context, __: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter("not a finite number")
    return value


@debug_option
@click.command(
    epilog="""\b
Examples:
  chatkore doctor
  chatkore doctor --base-url https://relay.example/v1 --no-call
  chatkore doctor --json | jq '.findings[] | select(.status == "fail")'"""
)
@base_url_option
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=30,
    show_default=True,
    callback=_finite,
    metavar="SECONDS",
    help="How long each step may take.",
)
@click.option("-m", "--model", metavar="NAME", help="Who is asked.  [default: gpt-4o-mini, else the first listed]")
@click.option("--no-call", is_flag=True, help="Leave out what costs money: a call and two streams.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end.")
@click.pass_context
def command(
    ctx: click.Context, *, base_url: str | None, timeout: float, model: str | None, no_call: bool, as_json: bool
) -> None:
    """Check a server, a key and the way there, step by step.

    Each step says what was seen and, if something is wrong, what that means and what to change. The key comes from
    CHATKORE_API_KEY and is shown nowhere. The exit status is 0 if it works, with warnings or without, else 1.
    """
    # The client's warnings are findings here, and would be shown twice.
    logger, quiet = logging.getLogger("chatkore_async"), logging.NullHandler()
    logger.addHandler(quiet)
    ctx.call_on_close(lambda: logger.removeHandler(quiet))
    asked = Asked(
        base_url=None if base_url is None else mended(base_url),
        timeout=timeout,
        model=None if model is None else mended(model),
        calls=not no_call,
    )
    ctx.exit(run(lambda: doctor(asked, as_json=as_json)))
