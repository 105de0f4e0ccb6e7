"""Foreign exceptions → ours. What aiohttp and asyncio raise is mapped here, and nowhere else.

Each error of ours gets the one fact that the retries need to know: had the request been sent?
"""

import errno
import os
import ssl
from collections.abc import Iterator
from urllib.parse import urlsplit

import aiohttp
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError

from .errors import APIConnectionError, APIError, APITimeoutError, ConfigurationError, InvalidResponseError

# What aiohttp raises while it sends and reads. Not all of it is a ClientError: errors of its parser and builtin
# ValueErrors leak from reading lines, and reading from a closed connection is a RuntimeError.
FOREIGN = (aiohttp.ClientError, HttpProcessingError, OSError, ValueError, RuntimeError)

# What it makes of a header that cannot be sent.
UNSENDABLE = (TypeError, ValueError)


class ConnectTimeoutError(Exception):
    """The `connect` time of a `Timeout` passed."""


class ClientClosedError(aiohttp.ClientConnectionError):
    """The client was closed, or its event loop ended, while something of it was under way."""


def was_sent(cause: BaseException) -> bool:
    """Whether the request had left when this was raised. What fails to connect did not send."""
    return not isinstance(
        cause, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError | aiohttp.ClientHttpProxyError
    )


def harmless(cause: BaseException) -> BaseException:
    """Return a cause without what shows the request's headers."""
    if not isinstance(cause, aiohttp.ClientResponseError):
        return cause
    if cause.__cause__ is not None:
        return cause.__cause__
    return aiohttp.ClientConnectionError(f"{type(cause).__name__}: {cause.status} {cause.message}")


def connect_timeout(url: str, seconds: float | None) -> APITimeoutError:
    """Return the error for a connection that took too long."""
    host = urlsplit(url).netloc
    return APITimeoutError(f"could not connect to {host} within {seconds:g} s", phase="connect", retryable="yes")


def mapped(cause: BaseException, *, sent: bool) -> APIError | ConfigurationError:
    """Return the error of our tree for what aiohttp raised."""
    if isinstance(cause, ClientClosedError):
        return ConfigurationError("the client was closed, or its event loop ended, while this call was running")
    if isinstance(cause, RuntimeError) and "Session is closed" in str(cause):
        return ConfigurationError("the session is closed: keep it open as long as its client is used")
    if isinstance(cause, aiohttp.InvalidURL):
        return ConfigurationError(f"not a URL: {cause}")
    chain = list(_chain(cause))
    if any(isinstance(each, OSError) and each.errno in (errno.EMFILE, errno.ENFILE) for each in chain):
        return APIConnectionError(
            "out of file descriptors",
            hint="raise the limit (ulimit -n), or lower Limits.max_connections",
            retryable="unconfirmed" if sent else "yes",
        )
    why = reason(cause)
    if isinstance(cause, aiohttp.ClientConnectorCertificateError):
        return APIConnectionError(
            f"the certificate of {cause.host}:{cause.port} does not verify: {why}",
            hint="pass the authority's certificate in ssl=ssl.create_default_context(cafile=...)",
        )
    if isinstance(cause, aiohttp.ClientConnectorError) and isinstance(cause, aiohttp.ClientSSLError):
        return APIConnectionError(
            f"no TLS with {cause.host}:{cause.port}: {why}",
            hint="check the scheme and the port of base_url",
            retryable="yes",
        )
    if isinstance(cause, aiohttp.ConnectionTimeoutError):
        return APITimeoutError(f"could not connect in time: {why}", phase="connect", retryable="yes")
    if isinstance(cause, aiohttp.ClientProxyConnectionError):
        return APIConnectionError(
            f"could not connect to the proxy {cause.host}:{cause.port}: {why}",
            hint="check HTTPS_PROXY, or pass proxy=False",
            retryable="yes",
        )
    if isinstance(cause, aiohttp.ClientHttpProxyError):
        return APIConnectionError(
            f"the proxy refused with status {cause.status}: {why}",
            hint="check the proxy's user name and password" if cause.status == 407 else None,
            retryable="never" if cause.status in (403, 407) else "yes",
        )
    if isinstance(cause, aiohttp.ClientConnectorDNSError):
        return APIConnectionError(
            f"the host {cause.host} has no address: {why}", hint="check base_url", retryable="yes"
        )
    if isinstance(cause, aiohttp.ClientConnectorError):
        return APIConnectionError(f"could not connect to {cause.host}:{cause.port}: {why}", retryable="yes")
    if any(isinstance(each, ContentEncodingError) for each in chain):
        return InvalidResponseError(f"the answer cannot be decompressed: {why}", retryable="unconfirmed")
    if isinstance(cause, aiohttp.ClientResponseError | HttpProcessingError | ValueError):
        return InvalidResponseError(f"the server's answer is not HTTP: {why}", retryable="unconfirmed")
    return APIConnectionError(f"the connection broke: {why}", retryable="unconfirmed" if sent else "yes")


def _chain(cause: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()  # chains can be rings
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def reason(cause: BaseException) -> str:
    """Return one line that says what happened, in the system's words where it was the system's doing."""
    if isinstance(cause, aiohttp.ClientConnectorCertificateError):
        cause = cause.certificate_error
    elif isinstance(cause, aiohttp.ClientConnectorError):
        cause = cause.os_error
    if isinstance(cause, OSError | aiohttp.ClientPayloadError) and not isinstance(cause, ssl.SSLError):
        for each in _chain(cause):
            # The resolver's numbers are negative, and it explains itself.
            if isinstance(each, OSError) and each.errno is not None and each.errno > 0:
                return os.strerror(each.errno)
    if isinstance(cause, aiohttp.ClientPayloadError):
        return "its body is incomplete"
    if isinstance(cause, aiohttp.ClientOSError) and "request body" in str(cause):
        return "the server closed it while the request was sent"
    text = getattr(cause, "strerror", None) or getattr(cause, "message", None) or str(cause)
    return " ".join(str(text).split())[:300] or type(cause).__name__
