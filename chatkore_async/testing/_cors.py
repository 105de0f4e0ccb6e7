"""What lets a page of another origin call the server from a browser. No I/O."""

from collections.abc import Mapping

import msgspec

from chatkore_async.testing._steps import Reply

__all__ = ["preflight", "shared"]

# Every origin, without cookies. The star does not stand for Authorization, which has to be named.
_PREFLIGHT = (
    ("Access-Control-Allow-Methods", "GET, HEAD, POST, OPTIONS"),
    ("Access-Control-Allow-Headers", "Authorization, *"),
    # Seconds; no browser remembers a preflight for longer than a day.
    ("Access-Control-Max-Age", "86400"),
)
_PRIVATE_NETWORK = ("Access-Control-Allow-Private-Network", "true")
_SHARED = (("Access-Control-Allow-Origin", "*"), ("Access-Control-Expose-Headers", "*"))


def preflight(method: str, headers: Mapping[str, str]) -> Reply | None:
    """Return the answer to a preflight, before :func:`shared` adds to it, or ``None`` when the request is none."""
    if method != "OPTIONS" or "Access-Control-Request-Method" not in headers:
        return None
    private = headers.get("Access-Control-Request-Private-Network") == "true"
    return Reply(status=204, headers=(*_PREFLIGHT, _PRIVATE_NETWORK) if private else _PREFLIGHT)


def shared(reply: Reply) -> Reply:
    """Return the reply with the headers that let a page read it; those it has already stay as they are."""
    added = tuple(pair for pair in _SHARED if reply.header(pair[0]) is None)
    return msgspec.structs.replace(reply, headers=(*reply.headers, *added))
