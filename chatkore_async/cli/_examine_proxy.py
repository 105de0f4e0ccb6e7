"""Which proxy the environment names, and what that means. From observations to findings, without I/O."""

import base64
import re
from collections.abc import Callable, Mapping
from typing import Literal
from urllib.parse import unquote, urlsplit

from chatkore_async.cli._account import is_loopback
from chatkore_async.cli._finding import Finding, Remark, found
from chatkore_async.cli._observed import Hidden, Proxy, ProxyChoice, Reach
from chatkore_async.cli._troubles import milliseconds, remark_on


def choose_proxy(
    url: str,
    proxies: Mapping[str, str],
    environ: Mapping[str, str],
    is_exempt: Callable[[str], object],
) -> ProxyChoice:
    """Return what the client does about a proxy for a URL.

    Args:
        url: where calls go.
        proxies: what `urllib.request.getproxies()` returned.
        environ: the environment, for the name of the variable.
        is_exempt: `urllib.request.proxy_bypass`.
    """
    parts = urlsplit(url)
    host = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname or ""
    name = parts.scheme if proxies.get(parts.scheme) else "all"
    given = proxies.get(name)
    others = tuple(
        variable
        for other in ("http", "https")
        if other != parts.scheme and proxies.get(other) and (variable := _variable(other, environ))
    )
    if not given:
        return ProxyChoice(why="loopback" if is_loopback(url) else "none", others=others)
    source = _variable(name, environ) or "the system's settings"
    if is_loopback(url) or is_exempt(host):
        return ProxyChoice(why="loopback" if is_loopback(url) else "exempt", source=source)
    given = given if "://" in given else f"http://{given}"
    shown = without_login(given)
    proxy = read_proxy(given)
    problem: Literal["socks", "nonsense"] | None = None
    if proxy is None:
        problem = "socks" if given.lower().startswith("socks") else "nonsense"
    return ProxyChoice(why="named", source=source, shown=shown, proxy=proxy, problem=problem)


def read_proxy(url: str) -> Proxy | None:
    """Return the proxy of a URL, or `None` when the client could not use it."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return None
    login = None
    if "@" in parts.netloc:
        words = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}".encode("latin-1", "replace")
        login = Hidden(f"Basic {base64.b64encode(words).decode()}")
    tls = parts.scheme == "https"
    return Proxy(host=parts.hostname, port=port or (443 if tls else 80), tls=tls, login=login)


def without_login(url: str) -> str:
    """Return a URL without what may be a password."""
    return re.sub(r"[?#].*", "?***", re.sub("//.*@", "//***@", url, flags=re.DOTALL), flags=re.DOTALL)


def secrets_of(url: str) -> tuple[str, ...]:
    """Return what must not be told of a proxy's URL: its password, as it is and as it is sent."""
    try:
        password = urlsplit(url).password or ""
    except ValueError:
        return ()
    proxy = read_proxy(url)
    sent = "" if proxy is None or proxy.login is None else proxy.login.partition(" ")[2]
    return tuple(filter(None, (password, unquote(password), sent)))


def _variable(scheme: str, environ: Mapping[str, str]) -> str:
    # As urllib has it: small letters win.
    return next((name for name in (f"{scheme}_proxy", f"{scheme.upper()}_PROXY") if environ.get(name)), "")


def examine_proxy(choice: ProxyChoice, reach: Reach | None = None) -> Finding:
    """Judge the proxy, and whether it can be reached."""
    if choice.why == "loopback":
        note = f"{choice.source} is not used" if choice.source else ""
        return found("proxy", ["none: what stays on this machine takes no proxy", note])
    if choice.why == "exempt":
        return found("proxy", [f"none: NO_PROXY exempts this host from {choice.source}"])
    if choice.why == "none":
        return found("proxy", ["none", *(f"{name} is for other URLs" for name in choice.others)])
    seen = f"{choice.source} names {choice.shown}"
    if choice.problem == "socks":
        means = "The client has no SOCKS of its own, and refuses to go around the proxy."
        change = (
            f"Unset {choice.source} for this host (NO_PROXY), name an http:// proxy, or in a program pass a session "
            "made with aiohttp-socks."
        )
        return found("proxy", [seen], [Remark("fail", means, change)])
    if choice.problem == "nonsense":
        means = "That is no URL of a proxy."
        return found("proxy", [seen], [Remark("fail", means, f"Write {choice.source}=http://host:port")])
    if reach is None or reach.trouble is None:
        took = "" if reach is None else f", reached in {milliseconds(reach.seconds)}"
        return found("proxy", [seen + took])
    remark = remark_on(reach.trouble, f"the proxy of {choice.source}", reach.port)
    return found("proxy", [seen, reach.trouble.text], [remark])
