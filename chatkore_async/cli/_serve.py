"""`chatkore serve`: the API on this machine, for other programs; an embedded server, or a real model."""

import asyncio
import contextlib
import math
import re
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from functools import partial
from typing import Any, BinaryIO, NoReturn

import click
from click.core import ParameterSource

from chatkore_async.cli._director import Director, Pace
from chatkore_async.cli._faults import Script, read_script
from chatkore_async.cli._limits import RequestLimit
from chatkore_async.cli._listen import announce, base_url, refused, try_out
from chatkore_async.cli._llama import ModelServer
from chatkore_async.cli._llm import BUNDLED, find_model, serve_model
from chatkore_async.cli._options import debug_option, is_debugging
from chatkore_async.cli._run import run
from chatkore_async.cli._screen import Screen, make_screen
from chatkore_async.cli._service import Complaints, Service
from chatkore_async.cli._stdout import has_room, while_read
from chatkore_async.cli._tally import listed
from chatkore_async.testing import ChatKoreServer

# What one of the two servers knows nothing of. Asked of the other, it is an error rather than ignored.
_EMBEDDED = ("latency", "interval", "rate_limit", "script")
_MODEL = ("slots", "context", "threads")


async def serve(
    screen: Screen,
    *,
    host: str,
    port: int,
    key: str | None = None,
    pace: Pace,
    script: Script | None = None,
    per_minute: int | None = None,
    quiet: bool = False,
) -> int:
    """Serve answers of the embedded server until cancelled, and say then how many there were.

    Args:
        screen: where it is told.
        host: the address.
        port: the port; 0 picks a free one.
        key: the only bearer token that is let in.
        pace: how quick answers are.
        script: which requests are answered differently.
        per_minute: how many requests are let in.
        quiet: whether requests are not shown.

    Raises:
        Problem: the address cannot be had.
        OSError: what is shown cannot be written.
    """

    def show(line: str) -> None:
        if not quiet and has_room():
            screen.line(line)

    service = Service(
        pace,
        director=None if script is None else Director(script),
        limit=None if per_minute is None else RequestLimit(per_minute, time.monotonic),
        show=show,
    )
    server = ChatKoreServer(
        host=host,
        port=port,
        api_key=key,
        handler=service.respond,
        on_end=service.end,
        # Nobody looks at what would be remembered, and this may run for days.
        record=False,
        cors=True,
    )
    try:
        with Complaints(show).of("aiohttp.server"):
            async with _listening(server, host, port):
                announce(screen, host, base_url(host, server.port), keyed=key is not None)
                with while_read():
                    return await service.broken
    except asyncio.CancelledError:
        ended = service.ended
        what = f"Requests: {ended.total()} ({listed(ended)})" if ended else "No request came"
        if has_room():
            screen.verdict(f"Stopped. {what}.", good=True)
        raise


@contextlib.asynccontextmanager
async def _listening(server: ChatKoreServer, host: str, port: int) -> AsyncGenerator[None, None]:
    try:
        await server.start()
    except (OSError, UnicodeError) as error:
        raise refused(error, host, port) from error
    try:
        yield
    finally:
        await server.close()


async def serve_llm(screen: Screen, asked: ModelServer) -> NoReturn:
    """Serve a model with llama.cpp until cancelled.

    Args:
        screen: where it is told.
        asked: what is served.

    Raises:
        Problem: it cannot be served, or not any more.
    """
    try_out(asked.host, asked.port)
    # Not among the lines on standard output, the first of which is the base URL for whoever reads them.
    click.echo(f"loading {asked.model}", err=True)
    try:
        await serve_model(
            asked, lambda url: announce(screen, asked.host, url, keyed=asked.key is not None, model=asked.name)
        )
    except asyncio.CancelledError:
        screen.verdict("Stopped.", good=True)
        raise


def _seconds(value: str | float) -> float:
    """Return a length of time; what float() takes beside numbers, NaN and infinity, is none."""
    with contextlib.suppress(ValueError):
        seconds = float(value)
        if 0 <= seconds < math.inf:
            return seconds
    raise click.BadParameter(f"{value!r} is no number of seconds")


def _check_key(_: click.Context, __: click.Parameter, key: str | None) -> str | None:
    # The message leaves the key out, as all messages do.
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise click.BadParameter("a key is made of visible ASCII characters")
    return key


def _check_host(_: click.Context, __: click.Parameter, host: str) -> str:
    if not host:
        raise click.BadParameter("an address is needed, such as 127.0.0.1")
    return host


def _check_options(ctx: click.Context, foreign: tuple[str, ...], why: str) -> None:
    """Refuse options that the server which was chosen knows nothing of."""
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if name in foreign and ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"{parameter.opts[0]} {why}")


@debug_option
@click.command(
    epilog="""\b
Examples:
  chatkore serve --latency 1 --script faults.json
  chatkore serve --port 0 | tee serve.log
  chatkore serve --llm"""
)
@click.option("--host", default="127.0.0.1", show_default=True, callback=_check_host, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 picks a free one.")
@click.option(
    "--latency",
    type=_seconds,
    default=0.0,
    metavar="SECONDS",
    help="Before each answer.",
)
@click.option(
    "--interval",
    type=_seconds,
    default=0.03,
    show_default=True,
    metavar="SECONDS",
    help="Between the deltas of a stream.",
)
@click.option("--rate-limit", type=click.IntRange(1), metavar="N", help="Requests a minute; others are a 429.")
@click.option("--script", type=click.File("rb"), metavar="FILE", help="Rules in JSON: answers, errors, faults.")
@click.option(
    "--require-key", metavar="KEY", callback=_check_key, help="Only let in this key, which others here can see."
)
@click.option("--quiet", is_flag=True, help="No line for each request.")
@click.option(
    "--llm",
    is_flag=False,
    flag_value=BUNDLED,
    type=click.Path(),
    metavar="[GGUF]",
    help="Serve a model with llama.cpp.",
)
@click.option("--slots", type=click.IntRange(1, 256), default=2, show_default=True, help="--llm: answers at a time.")
@click.option("--context", type=click.IntRange(1), default=2048, show_default=True, help="--llm: tokens per slot.")
@click.option("--threads", type=click.IntRange(1, 512), metavar="N", help="--llm: threads of the processor.")
@click.pass_context
def command(
    ctx: click.Context,
    *,
    host: str,
    port: int,
    latency: float,
    interval: float,
    rate_limit: int | None,
    script: BinaryIO | None,
    require_key: str | None,
    quiet: bool,
    llm: str | None,
    slots: int,
    context: int,
    threads: int | None,
) -> None:
    """Serve the API on this machine until Ctrl-C: made-up answers, or a model."""
    screen = make_screen()
    if llm is None:
        _check_options(ctx, _MODEL, "is for --llm")
        rules = None if script is None else read_script(script.name, script.read())
        pace = Pace(latency, interval)
        server: Callable[[], Coroutine[Any, Any, int]] = partial(
            serve,
            screen,
            host=host,
            port=port,
            key=require_key,
            pace=pace,
            script=rules,
            per_minute=rate_limit,
            quiet=quiet,
        )
    else:
        _check_options(ctx, _EMBEDDED, "is for the embedded server, not for --llm")
        model = find_model(llm)
        server = partial(
            serve_llm,
            screen,
            ModelServer(
                model=str(model),
                name=model.stem,
                host=host,
                port=port,
                slots=slots,
                context=context,
                threads=threads,
                key=require_key,
                verbosity=3 if is_debugging(ctx) else 2,
            ),
        )
    # To be stopped is how a server ends well; a command that was to finish something counts it as a failure.
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        run(server)
    ctx.exit(0)
