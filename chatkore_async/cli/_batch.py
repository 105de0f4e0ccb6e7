"""`chatkore batch`: the requests of a file, their results in another, and on from where a run ended."""

import asyncio
import contextlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Generator
from typing import Any, BinaryIO

import click
import msgspec

from chatkore_async import BatchError, Limits
from chatkore_async.batch import BatchSummary, run_batch
from chatkore_async.cli._account import base_url_option, make_client, timeout_option
from chatkore_async.cli._meter import Meter, make_meter, span
from chatkore_async.cli._options import debug_option
from chatkore_async.cli._problems import Problem
from chatkore_async.cli._run import run
from chatkore_async.cli._screen import Screen, make_screen
from chatkore_async.cli._tally import Tally, listed


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done.

    Attributes:
        source: a path, or an open file.
        name: of the source, for messages.
        output: a path.
        concurrency: requests at a time.
        retry_failed: whether failures are asked again.
    """

    source: Any
    name: str
    output: str
    concurrency: int
    retry_failed: bool


class Refused(Problem):
    """The batch cannot be run."""

    exit_code = 2


async def batch(screen: Screen, meter: Meter, asked: Asked, account: dict[str, Any]) -> int:
    """Run a batch, show how it goes, and return the exit status.

    Raises:
        Refused: the files are not what a batch can be run with.
        Problem: the output cannot be written any more.
    """
    tally = Tally()
    so_far: list[BatchSummary] = []
    limits = Limits(max_connections=max(1000, asked.concurrency))
    async with make_client(**account, hooks=[tally], limits=limits) as client:
        screen.aside(f"{asked.name} to {asked.output}, {asked.concurrency} at a time, at {client.base_url}")
        try:
            with meter.running() as show:

                def progress(summary: BatchSummary) -> None:
                    so_far[:] = [summary]
                    show(summary)

                summary = await run_batch(
                    client,
                    asked.source,
                    asked.output,
                    concurrency=asked.concurrency,
                    retry_failed=asked.retry_failed,
                    on_progress=progress,
                )
        except asyncio.CancelledError:
            screen.verdict(f"Stopped{_how_far(so_far)}. The same command goes on from there.", good=False)
            raise
        except BatchError as error:
            raise refusal(error) from error
        except OSError as error:
            hint = "what was finished is kept; once it can be written again, the same command goes on from there"
            raise Problem(f"{error.filename}: {error.strerror}{_how_far(so_far)}", hint) from error
    screen.table("What happened", rows(summary, tally))
    if summary.ok:
        screen.verdict(f"Every request has its answer in {asked.output}.", good=True)
        return 0
    failed = f"{summary.failed:,} request{'s' * (summary.failed != 1)} failed"
    screen.verdict(f"{failed}: {asked.output} says why. --retry-failed asks again.", good=False)
    return 1


def rows(summary: BatchSummary, tally: Tally) -> list[tuple[str, str]]:
    """Return the table of what happened, as names and values."""
    now = " now" if summary.resumed else ""
    failures = f" ({listed(tally.failures)}{now})" if tally.failures else ""
    return [
        ("requests", f"{summary.total:,}"),
        *([("done before", f"{summary.resumed:,}")] if summary.resumed else []),
        ("answered", f"{summary.completed:,}"),
        ("failed", f"{summary.failed:,}{failures}"),
        ("retries", listed(tally.retries) or "none"),
        ("tokens", f"{summary.prompt_tokens:,} prompt, {summary.completion_tokens:,} completion"),
        ("time", span(summary.elapsed)),
    ]


def refusal(error: BatchError) -> Refused:
    """Return what is wrong with the files, a line each."""
    if not error.faults:
        return Refused(str(error), "nothing is lost: what the output has stays there")
    faults = "".join(f"\n  {fault}" for fault in error.faults)
    return Refused(
        f"the batch cannot be run{faults}",
        "nothing was asked; mend these lines, or name another output",
    )


def _how_far(so_far: list[BatchSummary]) -> str:
    if not so_far:
        return " before the first request"
    return f" with {so_far[0].done:,} of {so_far[0].total:,} requests done"


@contextlib.contextmanager
def standard_input() -> Generator[BinaryIO, None, None]:
    """Yield standard input as a file that can be read twice: itself, where it is one, else a copy without a name.

    Raises:
        click.UsageError: there is none, or somebody would have to type it.
        Problem: there is no room for the copy.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise click.UsageError("Standard input is a terminal, or closed: pipe the requests into it.")
    piped = sys.stdin.buffer
    if _is_file(piped):
        yield piped
        return
    with tempfile.TemporaryFile() as copy:
        try:
            shutil.copyfileobj(piped, copy, 2**20)
            copy.flush()
        except OSError as error:
            hint = f"TMPDIR names another directory than {tempfile.gettempdir()} for the copy"
            raise Problem(f"standard input cannot be kept: {error.strerror}", hint) from error
        yield copy


def _is_file(stream: BinaryIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except OSError:  # a test's has no descriptor
        return False


@debug_option
@click.command(
    epilog="""\b
Examples:
  chatkore batch in.jsonl out.jsonl
  chatkore batch in.jsonl out.jsonl --retry-failed
  zcat parts/*.gz | chatkore batch - out.jsonl --concurrency 200"""
)
@click.argument("input", type=click.Path(allow_dash=True))
@click.argument("output", type=click.Path())
@click.option(
    "-c",
    "--concurrency",
    type=click.IntRange(1, 100_000),
    metavar="N",
    default=64,
    show_default=True,
    help="Requests at a time.",
)
@click.option("--retry-failed", is_flag=True, help="Ask again what has failed, and replace its lines.")
@click.option(
    "--max-retries",
    type=click.IntRange(0, 100),
    metavar="N",
    default=2,
    show_default=True,
    help="Attempts after the first.",
)
@base_url_option
@timeout_option(600)
@click.pass_context
def command(
    ctx: click.Context,
    *,
    input: str,  # noqa: A002 - the name that the usage shows
    output: str,
    concurrency: int,
    retry_failed: bool,
    max_retries: int,
    base_url: str | None,
    timeout: float,
) -> None:
    """Ask the requests of INPUT, and write each result to OUTPUT as it comes.

    Both are files of OpenAI's Batch API. INPUT may be gzip, or - for standard input. Whenever it was stopped, the same
    command goes on. The exit status is 0, 1 when some requests have failed, or 2 when the files cannot be used.
    """
    screen = make_screen()
    account = {"base_url": base_url, "timeout": timeout, "max_retries": max_retries}
    with contextlib.ExitStack() as stack:
        piped = input == "-"
        asked = Asked(
            source=stack.enter_context(standard_input()) if piped else input,
            name="standard input" if piped else input,
            output=output,
            concurrency=concurrency,
            retry_failed=retry_failed,
        )
        status = run(lambda: batch(screen, make_meter(screen), asked, account))
    ctx.exit(status)
