"""Which proxy a URL goes through, by the rules that curl, Go and Python's own `urllib` follow; and its password."""

import base64
import sys
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from ._config import Secret, is_loopback
from .errors import ConfigurationError


def environment_proxy(url: str, proxies: Mapping[str, str]) -> str | None:
    """Return the proxy that the environment names for a URL, or `None`.

    Loopback addresses take none, as in Go's `ProxyFromEnvironment`: a proxy elsewhere could not reach them.

    Args:
        url: where a request goes.
        proxies: what `urllib.request.getproxies()` returned.

    Raises:
        ConfigurationError: it is a SOCKS proxy, or no URL.
    """
    parts = urlsplit(url)
    host = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname or ""
    if is_loopback(url) or _is_bypassed(host, proxies):
        return None
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return None if not proxy else checked_proxy(proxy if "://" in proxy else f"http://{proxy}")


def _is_bypassed(host: str, proxies: Mapping[str, str]) -> bool:
    if sys.platform in ("darwin", "win32") and not urllib.request.getproxies_environment():  # pragma: no cover
        return bool(urllib.request.proxy_bypass(host))  # the system's settings have exceptions of their own
    # Undocumented, but as old as `proxy_bypass`, which would read the environment anew.
    bypassed: Any = getattr(urllib.request, "proxy_bypass_environment")  # noqa: B009 - typeshed does not know it
    return bool(bypassed(host, dict(proxies)))


def checked_proxy(proxy: str) -> str:
    """Return a proxy's URL, or raise `ConfigurationError` when it is not one that can be used."""
    try:
        parts = urlsplit(proxy)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if usable:
        return Secret(proxy)  # it may hold a password
    if proxy.lower().startswith("socks"):
        raise ConfigurationError(
            "SOCKS proxies need the package aiohttp-socks: pass "
            "session=aiohttp.ClientSession(connector=aiohttp_socks.ProxyConnector.from_url(...)); "
            "proxy=False ignores the environment's proxy"
        )
    raise ConfigurationError("proxy must be an http:// or https:// URL, None for the environment's, or False for none")


def authorized(headers: Mapping[str, str] | None, url: str, proxy: str) -> Mapping[str, str] | None:
    """Add the proxy's user name and password to a request that a proxy reads itself, as it does without TLS.

    aiohttp does so too, but 3.13 forgets it when a connection is used again.
    """
    if not url.startswith("http://") or "@" not in proxy:
        return headers
    parts = urlsplit(proxy)
    login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}".encode("latin1", "replace")
    return {**(headers or {}), "Proxy-Authorization": Secret(f"Basic {base64.b64encode(login).decode()}")}
