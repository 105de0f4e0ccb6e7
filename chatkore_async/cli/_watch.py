"""Looks at a stream as it comes over the wire. Thin: what it sees is judged elsewhere."""

import asyncio
import ssl
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Literal

import msgspec

from chatkore_async import __version__
from chatkore_async.cli._observed import Hidden, RawStream, Trouble
from chatkore_async.cli._route import BROKEN, Route, opened
from chatkore_async.cli._streamlog import StreamLog
from chatkore_async.cli._troubles import trouble_of
from chatkore_async.cli._wire import Body, Head

MAX_STREAM = 1024 * 1024
"""Bytes of a stream that are looked at."""

AFTERWARDS = 1.0
"""Seconds in which the body has to end after `[DONE]`."""


async def watch_stream(
    route: Route, context: ssl.SSLContext, key: str, body: Mapping[str, object], timeout: float
) -> RawStream | Trouble:
    """Ask for a stream, and note what comes over the wire until it ends."""
    headers = {
        "Authorization": Hidden(f"Bearer {key}"),
        "User-Agent": f"chatkore-async/{__version__}",
        "Accept": "text/event-stream",
        "Accept-Encoding": "identity",
        "Content-Type": "application/json",
    }
    target = route.path
    if route.proxy is not None and not route.tls:
        target = f"http://{route.authority}{route.path}"
        if route.proxy.login is not None:
            headers["Proxy-Authorization"] = route.proxy.login
    deadline = asyncio.get_running_loop().time() + timeout
    try:
        async with asyncio.timeout_at(deadline + 3 * AFTERWARDS), opened(route) as link:
            async with asyncio.timeout_at(deadline):
                if route.tls:
                    await link.start_tls(context, route.host)
                began = time.perf_counter()
                head, content = await link.ask(
                    "POST", f"{target}/chat/completions", route.authority, headers, msgspec.json.encode(body)
                )
            if head.status != HTTPStatus.OK:
                return RawStream(status=head.status)
            seen = await _watch(head, content, began, deadline)
            if seen.ending != "end":
                return seen
            if not seen.close:
                # Whether a server keeps what it promises shows only when it is asked again.
                try:
                    async with asyncio.timeout(AFTERWARDS):
                        await link.ask("GET", f"{target}/models", route.authority, headers)
                except TimeoutError:
                    return seen
                except BROKEN:
                    pass
                else:
                    return msgspec.structs.replace(seen, reused=True)
            return msgspec.structs.replace(seen, reused=False)
    except BROKEN as error:
        return trouble_of(error, timeout)


async def _watch(head: Head, content: Body, began: float, deadline: float) -> RawStream:
    kind = head.headers.get("content-type", "").partition(";")[0].strip().lower()
    log = StreamLog(began, whole=kind == "application/json")
    loop = asyncio.get_running_loop()
    ending: Literal["end", "cut", "open", "timeout", "limit"] = "end"
    try:
        async with asyncio.timeout_at(deadline) as limit:
            while piece := await content.read():
                already = log.seen.done
                log.feed(piece, time.perf_counter())
                if log.size > MAX_STREAM:
                    ending = "limit"
                    break
                if log.seen.done and not already:
                    limit.reschedule(min(deadline, loop.time()) + AFTERWARDS)
    except TimeoutError:
        ending = "open" if log.seen.done else "timeout"
    except BROKEN:
        ending = "cut"
    return msgspec.structs.replace(
        log.finish(time.perf_counter()),
        content_type=kind,
        encoding=head.headers.get("content-encoding", "").lower(),
        ending=ending,
        close=_why_closed(head, content),
    )


def _why_closed(head: Head, content: Body) -> str:
    """Return why a connection cannot be used after an answer, as far as its head tells, or `""`."""
    if head.has("connection", "close"):
        return "Connection: close"
    if head.version == "1.0" and not head.has("connection", "keep-alive"):
        return "HTTP/1.0"
    return "" if content.bounded else "its end is the end of the answer"
