"""Whom a command talks to: the server, the key, the patience; options that commands have in common."""

import math
import os
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.parse import urlsplit

import click

from chatkore_async import AsyncChatKore
from chatkore_async.cli._problems import Problem

_F = TypeVar("_F", bound=Callable[..., Any])

KEYLESS = "none-needed"
"""The key that is sent to a server on this machine when the environment has none."""


def base_url_option(command: _F) -> _F:
    """Give a command `--base-url`."""
    return click.option(
        "--base-url",
        metavar="URL",
        help="The server.  [default: $CHATKORE_BASE_URL, else ChatKore]",
    )(command)


def timeout_option(default: float) -> Callable[[_F], _F]:
    """Give a command `--timeout`, in seconds."""
    return click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        callback=_finite,
        default=default,
        show_default=True,
        metavar="SECONDS",
        help="How long an answer may take.",
    )


def _finite(_: click.Context, __: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number of seconds")
    return value


def make_client(base_url: str | None, **settings: Any) -> AsyncChatKore:
    """Return a client of the environment's account.

    The key comes from the environment alone: an option would show it to whoever lists the processes. A server on this
    machine (`chatkore serve`) is asked without one.

    Raises:
        Problem: there is no key, or the settings are refused.
        ConfigurationError: the base URL or the key is none.
    """
    key = os.environ.get("CHATKORE_API_KEY", "").strip()
    url = base_url or os.environ.get("CHATKORE_BASE_URL", "").strip()
    if not key:
        if not is_loopback(url):
            raise Problem(
                "no API key",
                "export CHATKORE_API_KEY=...; or, without one, talk to `chatkore serve` on this machine: "
                "--base-url http://127.0.0.1:8000",
            )
        key = KEYLESS
    return AsyncChatKore(api_key=key, base_url=base_url, **settings)


def is_loopback(url: str) -> bool:
    """Tell whether a URL leads to this machine."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or host.endswith(".localhost") or ip_address(host).is_loopback
    except ValueError:  # not an address, or not a URL
        return False
