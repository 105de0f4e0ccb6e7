"""Where a server listens: the URL that leads there, and what is wrong with an address that cannot be had."""

import errno
import os
import socket

import click

from chatkore_async import __version__
from chatkore_async.cli._problems import Problem
from chatkore_async.cli._screen import Screen

_EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - what a user may ask for


def base_url(host: str, port: int) -> str:
    """Return the base URL for a client on this machine."""
    # "All networks" is an address to listen on, but not one to call on every system.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def announce(screen: Screen, host: str, url: str, *, keyed: bool, model: str | None = None) -> None:
    """Say where the server is, and how programs are pointed at it.

    Args:
        screen: where it is told.
        host: the address it listens on.
        url: the base URL.
        keyed: whether a key is asked for.
        model: what llama.cpp serves.
    """
    screen.intro(f"chatkore_async {__version__}", f"serving {'the API' if model is None else model} at {url}")
    screen.aside("For programs that use chatkore_async:")
    # Lines to be copied go out as they are: a screen would fold them to its width.
    click.echo(f"export CHATKORE_BASE_URL={url}" + ("" if keyed else " CHATKORE_API_KEY=any"))
    screen.aside(f"For any other: this base URL, and {'the key of --require-key' if keyed else 'any key'}. A stream:")
    key = '-H "Authorization: Bearer $CHATKORE_API_KEY" ' if keyed else ""
    body = '{"model": "gpt-4o-mini", "stream": true, "messages": [{"role": "user", "content": "Hello"}]}'
    click.echo(f"curl -N {url}/chat/completions {key}-d '{body}'")
    if host in _EVERYWHERE:
        screen.aside("Every machine that reaches this one can call it.")
    screen.aside("Ctrl-C stops it.")


def refused(error: OSError | UnicodeError, host: str, port: int) -> Problem:
    """Return why a server cannot listen, as a problem for the terminal."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return Problem(f"port {port} of {host} is in use", "--port 0 picks a free one")
    if number == errno.EACCES:
        return Problem(f"port {port} is not for everyone", "take one above 1023; --port 0 picks a free one")
    if number is None or isinstance(error, socket.gaierror):
        why = str(getattr(error, "strerror", None) or error)
    else:
        why = os.strerror(number)  # the system's word alone; asyncio has the address again in its message
    return Problem(
        f"cannot listen at {host}: {' '.join(why.split())}",
        "--host 127.0.0.1 is this machine alone, 0.0.0.0 all its networks",
    )


def try_out(host: str, port: int) -> None:
    """Listen for a moment, so that what is wrong with an address is known before a model is loaded.

    Raises:
        Problem: the address cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in found:
            socket.create_server(address, family=family).close()
    except (OSError, UnicodeError) as error:
        raise refused(error, host, port) from error
