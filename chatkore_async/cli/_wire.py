"""HTTP as it comes over the wire, for what a client tidies away: one connection, read within bounds.

The reading is independent of the client, and of aiohttp. It is made of asyncio's streams, so that whatever it waits
for can be cancelled: a blocking read in a thread would outlast Ctrl-C, and `http.client` has a timeout for each read
but none for an answer whose bytes come one by one.
"""

import asyncio
import re
import ssl
from typing import Any, Self

import msgspec

_LINE = 64 * 1024
"""Bytes of the longest line that is read, and of all headers together."""

_PIECE = 16 * 1024
_INTERIM = 5
"""Answers before the answer (100, 103) that are skipped."""

_STATUS_LINE = re.compile(rb"HTTP/(1\.[01]) (\d{3})(?: ([^\r\n]*))?\r?\n")


class NotHTTPError(Exception):
    """What came is not HTTP/1.0 or 1.1."""


class RefusedError(Exception):
    """A proxy did not open the way.

    Attributes:
        status: its answer.
        schemes: the forms of login that it asks for, in small letters.
    """

    def __init__(self, status: int, reason: str, schemes: tuple[str, ...]) -> None:
        super().__init__(f"the proxy answered {status} {reason}".strip())
        self.status = status
        self.schemes = schemes


class Head(msgspec.Struct, frozen=True):
    """A status line and headers: names in small letters, repeated ones joined (RFC 9110 §5.3)."""

    status: int
    reason: str
    version: str
    headers: dict[str, str]

    def has(self, name: str, value: str) -> bool:
        """Tell whether a header that is a list has a value."""
        return value in (part.strip().lower() for part in self.headers.get(name, "").split(","))


class Body:
    """The body of an answer, read as it comes.

    Attributes:
        bounded: whether it has an end of its own, so that the connection may go on after it.
    """

    def __init__(self, reader: asyncio.StreamReader, head: Head) -> None:
        self._reader = reader
        self._chunked = head.has("transfer-encoding", "chunked")
        length = head.headers.get("content-length", "")
        if not self._chunked and length and not re.fullmatch("[0-9]{1,18}", length):
            raise NotHTTPError("an answer whose length is no number")
        self._left: int | None = 0 if self._chunked else int(length) if length else None
        self.bounded = self._left is not None
        self._ended = not self._chunked and self._left == 0
        self._began = False

    async def read(self) -> bytes:
        """Return the next bytes, as few as have come; `b""` is the end.

        Raises:
            asyncio.IncompleteReadError: the connection was closed before the end.
            NotHTTPError: this is no body.
            OSError: the connection broke.
        """
        if self._ended:
            return b""
        if self._left == 0:
            await self._begin_chunk()
            if self._ended:
                return b""
        piece = await self._reader.read(_PIECE if self._left is None else min(_PIECE, self._left))
        if self._left is None:
            self._ended = not piece
            return piece
        if not piece:
            raise asyncio.IncompleteReadError(b"", self._left)
        self._left -= len(piece)
        self._ended = not self._chunked and self._left == 0
        return piece

    async def _begin_chunk(self) -> None:
        if self._began and await _line(self._reader) not in (b"\r\n", b"\n"):
            raise NotHTTPError("a chunk that does not end where it says")
        self._began = True
        size = re.match(rb"[0-9a-fA-F]{1,15}(?=[\s;])", await _line(self._reader))
        if size is None:
            raise NotHTTPError("a chunk without its length")
        self._left = int(size[0], 16)
        if self._left == 0:
            await _fields(self._reader)  # trailers
            self._ended = True


class Link:
    """A connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, host: str, port: int) -> Self:
        """Connect.

        Raises:
            OSError: that was not possible.
        """
        return cls(*await asyncio.open_connection(host, port, limit=_LINE))

    async def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """Go on with TLS.

        Raises:
            OSError: the handshake failed; also, as an `ssl.SSLError`, the certificate.
        """
        await self._writer.start_tls(context, server_hostname=host)

    async def tunnel(self, host: str, port: int, login: str | None) -> None:
        """Ask the proxy at the other end for a way to a host (RFC 9110 §9.3.6).

        Raises:
            RefusedError: it refused.
            NotHTTPError, asyncio.IncompleteReadError, OSError: it gave no answer.
        """
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        headers = {} if login is None else {"Proxy-Authorization": login}
        head, _ = await self.ask("CONNECT", authority, authority, headers)
        if not 200 <= head.status < 300:
            asked = head.headers.get("proxy-authenticate", "")
            # A challenge begins with its scheme; what has an equals sign is a parameter of one.
            words = [
                part.split()[0].lower() for part in asked.split(",") if part.strip() and "=" not in part.split()[0]
            ]
            raise RefusedError(head.status, head.reason, tuple(dict.fromkeys(words)))

    async def ask(
        self, method: str, target: str, host: str, headers: dict[str, str], body: bytes = b""
    ) -> tuple[Head, Body]:
        """Send a request, and return the head of its answer and the body to be read.

        Raises:
            NotHTTPError, asyncio.IncompleteReadError, OSError: there was no answer.
        """
        lines = [f"{method} {target} HTTP/1.1", f"Host: {host}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        self._writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        await self._writer.drain()
        for _ in range(_INTERIM):
            head = await self._head()
            if head.status >= 200:
                return head, Body(self._reader, head)
        raise NotHTTPError("answers before the answer, without end")

    async def _head(self) -> Head:
        # Not a whole line at once: what speaks first in another language may not end lines.
        start = await self._reader.readexactly(5)
        if start != b"HTTP/":
            raise NotHTTPError("no status line")
        line = _STATUS_LINE.fullmatch(start + await _line(self._reader))
        if line is None:
            raise NotHTTPError("no status line of HTTP/1.1")
        reason = (line[3] or b"").decode("latin-1").strip()
        return Head(int(line[2]), reason, line[1].decode(), await _fields(self._reader))

    @property
    def tls_version(self) -> str:
        """The version that was agreed on, as `"TLSv1.3"`."""
        return str(self._tls.version())

    @property
    def certificate(self) -> dict[str, Any]:
        """The other side's certificate, as the ssl module shows one that verifies."""
        return self._tls.getpeercert() or {}

    @property
    def certificate_bytes(self) -> bytes:
        """The same in DER, whether it verifies or not."""
        return self._tls.getpeercert(binary_form=True) or b""

    @property
    def _tls(self) -> ssl.SSLObject:
        found: ssl.SSLObject = self._writer.get_extra_info("ssl_object")
        return found

    def close(self) -> None:
        """Close at once, without taking leave in TLS, for which an unfriendly server could make us wait."""
        self._writer.transport.abort()


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\n")
    except asyncio.LimitOverrunError as error:
        raise NotHTTPError("a line without end") from error


async def _fields(reader: asyncio.StreamReader) -> dict[str, str]:
    """Return the headers, or the trailers, up to the empty line."""
    fields: dict[str, str] = {}
    size = 0
    while (line := await _line(reader)) not in (b"\r\n", b"\n"):
        size += len(line)
        if size > _LINE:
            raise NotHTTPError("headers without end")
        name, _, value = line.decode("latin-1").partition(":")
        name, value = name.strip().lower(), value.strip()
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields
