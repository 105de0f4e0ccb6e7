"""Why something on the way does not work: what the system says, what that means, what to change. No I/O."""

import asyncio
import errno
import os
import socket
import ssl

from chatkore_async.cli._finding import Remark, one_line
from chatkore_async.cli._observed import Kind, Trouble
from chatkore_async.cli._wire import NotHTTPError, RefusedError

_BY_ERRNO: dict[int, Kind] = {
    errno.ECONNREFUSED: "refused",
    errno.ETIMEDOUT: "timeout",
    errno.ENETUNREACH: "unreachable",
    errno.EHOSTUNREACH: "unreachable",
    errno.EADDRNOTAVAIL: "unreachable",
    errno.EAFNOSUPPORT: "unreachable",
    errno.EACCES: "denied",
    errno.EPERM: "denied",
    errno.ECONNRESET: "reset",
    errno.ECONNABORTED: "reset",
    errno.EPIPE: "reset",
    errno.EMFILE: "files",
    errno.ENFILE: "files",
}

# What OpenSSL calls an answer in another language than TLS.
_NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG")


def trouble_of(error: BaseException, seconds: float) -> Trouble:
    """Return an exception of the system, or of our own reading, as a trouble.

    Args:
        error: what was raised.
        seconds: how long was waited, should it be a timeout of ours.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return Trouble("certificate", error.verify_message or str(error))
    if isinstance(error, ssl.SSLError):
        reason = getattr(error, "reason", None) or ""  # those that OpenSSL did not raise have none
        kind: Kind = "reset" if "EOF" in reason else "not-tls" if reason in _NOT_TLS else "tls"
        return Trouble(kind, reason.replace("_", " ").lower() or one_line(str(error)))
    if isinstance(error, socket.gaierror):
        asleep = error.errno in (socket.EAI_AGAIN, socket.EAI_FAIL)
        return Trouble("no-resolver" if asleep else "unknown-host", one_line(error.strerror or str(error)))
    if isinstance(error, RefusedError):
        return Trouble("tunnel", str(error))
    if isinstance(error, NotHTTPError):
        return Trouble("not-http", str(error))
    if isinstance(error, UnicodeError):
        return Trouble("bad-name", "not a name that a host can have")
    if isinstance(error, asyncio.IncompleteReadError):
        return Trouble("reset", "the connection was closed without an answer")
    if isinstance(error, TimeoutError) and getattr(error, "errno", None) is None:
        return Trouble("timeout", f"no answer within {seconds:g} s")
    number = getattr(error, "errno", None)
    if number is None:
        # asyncio's own, which have no number: a handshake that was cut.
        words = one_line(str(error))
        if isinstance(error, ConnectionError):
            return Trouble("reset", words or "the connection was closed")
        return Trouble("other", words or type(error).__name__)
    return Trouble(_BY_ERRNO.get(number, "other"), os.strerror(number))


_MEANINGS: dict[Kind, tuple[str, str]] = {
    "refused": (
        "Port {port} of {what} takes no connections: nothing listens there, or a firewall says no.",
        "Check the port, and that the server runs.",
    ),
    "timeout": (
        "Nothing comes back from {what}: a firewall drops it, the address is wrong, or it is too busy.",
        "Try from another network; --timeout allows more seconds. Where only a proxy leads out, set HTTPS_PROXY.",
    ),
    "unreachable": (
        "No way leads from here to {what}.",
        "Check the network and the VPN of this machine.",
    ),
    "denied": (
        "This machine itself forbids the connection to {what}: a firewall, or a sandbox.",
        "Allow it, or run this outside of the sandbox.",
    ),
    "reset": (
        "{what} hung up, or something on the way did in its name.",
        "Check scheme and port of the base URL. Some firewalls do this to hosts that they do not allow.",
    ),
    "files": (
        "This process has no file descriptors left.",
        "Raise the limit: ulimit -n 4096",
    ),
    "unknown-host": (
        "The name of {what} has no address here: it is misspelt, or known only in another network.",
        "Check the host's name, and whether a VPN is needed for it. Where only a proxy leads out, set HTTPS_PROXY.",
    ),
    "no-resolver": (
        "The resolver of this machine gave no answer: it may have no network.",
        "Check the network, the VPN, and the DNS server of this machine.",
    ),
    "bad-name": (
        "No host can have that name.",
        "Check the spelling: no blanks, no leading dot, at most 63 characters between two dots.",
    ),
    "not-tls": (
        "What listens at port {port} of {what} speaks, but not TLS: it may be plain http.",
        "Check scheme and port of the base URL.",
    ),
    "tls": (
        "{what} and this machine could not agree on TLS.",
        "Ask whoever runs it; a client certificate or another version of TLS may be asked for.",
    ),
    "not-http": (
        "What listens at port {port} of {what} speaks, but not HTTP.",
        "Check the port.",
    ),
    "other": (
        "The connection to {what} did not work.",
        "The words of the system, above, say why.",
    ),
}


def remark_on(trouble: Trouble, what: str, port: int) -> Remark:
    """Return what a trouble with a host means.

    Args:
        trouble: of any kind but `"certificate"` and `"tunnel"`, which have more to tell.
        what: the host, in words.
        port: where it was to be reached.
    """
    means, change = _MEANINGS[trouble.kind if trouble.kind in _MEANINGS else "other"]
    means = means.format(what=what, port=port)
    return Remark("fail", f"{means[:1].upper()}{means[1:]}", change)


def milliseconds(seconds: float) -> str:
    """Return a time as a reader takes it in: `12 ms`, `1.3 s`."""
    if seconds < 0.001:
        return "under 1 ms"
    return f"{seconds * 1000:.0f} ms" if seconds < 0.9995 else f"{seconds:.1f} s"
