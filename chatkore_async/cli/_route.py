"""The way to a server, and a connection that goes it."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator

import msgspec

from chatkore_async.cli._observed import Proxy
from chatkore_async.cli._wire import Link, NotHTTPError, RefusedError

# What a connection can raise while it is opened and read; `ValueError` is ssl's, for names that it cannot take.
BROKEN = (OSError, NotHTTPError, RefusedError, asyncio.IncompleteReadError, ValueError)


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """The way to a server.

    Attributes:
        host: its name.
        port: the same.
        tls: whether https is spoken with it.
        path: of the base URL.
        proxy: through which it is reached, or `None`.
        address: to which connections are opened when there is no proxy.
    """

    host: str
    port: int
    tls: bool
    path: str
    proxy: Proxy | None = None
    address: str = ""

    @property
    def authority(self) -> str:
        """The value of `Host`: without the port when it is the usual one."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


@contextlib.asynccontextmanager
async def opened(route: Route) -> AsyncGenerator[Link, None]:
    """Open a connection as far as to where TLS with the server would begin."""
    proxy = route.proxy
    if proxy is None:
        link = await Link.open(route.address, route.port)
    else:
        link = await Link.open(proxy.host, proxy.port)
    try:
        if proxy is not None:
            if proxy.tls:
                await link.start_tls(ssl.create_default_context(), proxy.host)
            if route.tls:
                await link.tunnel(route.host, route.port, proxy.login)
        yield link
    finally:
        link.close()
