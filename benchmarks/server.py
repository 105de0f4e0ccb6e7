"""A server that is never the bottleneck: ready bytes from a bare protocol.

The path of a request says what it wants: `/call/…` one completion, `/paced/…` a stream with one event a segment,
`/burst/…` the same events in one write.
"""

import asyncio
import sys
from typing import cast

EVENTS = 500
INTERVAL = 0.002

_CHUNK = (
    b'{"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1700000000,"model":"gpt-4o-mini",'
    b'"system_fingerprint":"fp_bench","choices":[{"index":0,"delta":%s,"logprobs":null,"finish_reason":%s}]}'
)
DELTAS = [
    _CHUNK % (b'{"role":"assistant","content":""}', b"null"),
    *(_CHUNK % (b'{"content":" token%03d"}' % number, b"null") for number in range(EVENTS)),
    _CHUNK % (b"{}", b'"stop"'),
]
COMPLETION = (
    b'{"id":"chatcmpl-bench","object":"chat.completion","created":1700000000,"model":"gpt-4o-mini","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"Hello! How can I help you today?","refusal":null,"annotations":[]},'
    b'"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"completion_tokens":9,"total_tokens":18},'
    b'"service_tier":"default","system_fingerprint":"fp_bench"}'
)
CALL = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nx-request-id: req_bench\r\nContent-Length: %d\r\n\r\n%s"
    % (len(COMPLETION), COMPLETION)
)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


SEGMENTS = [_http_chunk(b"data: %s\n\n" % data) for data in [*DELTAS, b"[DONE]"]]
STREAM_END = b"0\r\n\r\n"
BURST = STREAM_HEAD + b"".join(SEGMENTS) + STREAM_END


class Server(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self._buffer = b""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while True:
            head, blank, rest = self._buffer.partition(b"\r\n\r\n")
            if not blank:
                return
            lower = head.lower()
            at = lower.find(b"content-length:")
            length = int(lower[at + 15 :].split(b"\r\n", 1)[0]) if at != -1 else 0
            if len(rest) < length:
                return
            self._buffer = rest[length:]
            self._answer(head.split(b" ", 2)[1])

    def _answer(self, path: bytes) -> None:
        if path.startswith(b"/call"):
            self._transport.write(CALL)
        elif path.startswith(b"/burst"):
            self._transport.write(BURST)
        else:
            self._transport.write(STREAM_HEAD)
            self._send(0)

    def _send(self, number: int) -> None:
        if self._transport.is_closing():
            return
        if number == len(SEGMENTS):
            self._transport.write(STREAM_END)
            return
        self._transport.write(SEGMENTS[number])
        asyncio.get_running_loop().call_later(INTERVAL, self._send, number + 1)


async def main() -> None:
    """Serve until standard input ends; print the port first."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Server, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    try:
        import uvloop
    except ImportError:
        asyncio.run(main())
    else:
        uvloop.run(main())
