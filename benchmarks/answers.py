"""What the server sends, as ready bytes, and what a client has to have received."""

from functools import cache

LENGTH = 502  # deltas of an ordinary stream: one with the role, 500 with text, one with the finish reason
ANSWER = "Hello! How can I help you today?"

_CHUNK = (
    b'{"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1700000000,"model":"gpt-4o-mini",'
    b'"system_fingerprint":"fp_bench","choices":[{"index":0,"delta":%s,"logprobs":null,"finish_reason":%s}]}'
)
_COMPLETION = (
    b'{"id":"chatcmpl-bench","object":"chat.completion","created":1700000000,"model":"gpt-4o-mini","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"%s","refusal":null,"annotations":[]},'
    b'"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"completion_tokens":9,"total_tokens":18},'
    b'"service_tier":"default","system_fingerprint":"fp_bench"}'
) % ANSWER.encode()
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nx-request-id: req_bench\r\n%s\r\n\r\n"
_EVENTS_A_WRITE = 100
_END = b"0\r\n\r\n"  # of a body in chunks

STREAM_HEAD = _HEAD % (b"text/event-stream", b"Transfer-Encoding: chunked")


def whole(body: bytes) -> bytes:
    """An answer with its length."""
    return _HEAD % (b"application/json", b"Content-Length: %d" % len(body)) + body


CALL = whole(_COMPLETION)


def texts(length: int) -> list[str]:
    """The texts of a stream of so many deltas, without the empty ones at both ends."""
    return [f" token{number:06d}" for number in range(length - 2)]


def _http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@cache
def _events(length: int) -> tuple[bytes, ...]:
    """The events of a stream of so many deltas, and the one that says that it is done."""
    chunks = [
        _CHUNK % (b'{"role":"assistant","content":""}', b"null"),
        *(_CHUNK % (b'{"content":"%s"}' % text.encode(), b"null") for text in texts(length)),
        _CHUNK % (b"{}", b'"stop"'),
    ]
    return tuple(b"data: %s\n\n" % data for data in (*chunks, b"[DONE]"))


@cache
def segments(length: int) -> tuple[bytes, ...]:
    """The body of a stream, one event to a segment; the end of the body comes with the last one."""
    *chunks, last = map(_http_chunk, _events(length))
    return (*chunks, last + _END)


@cache
def blocks(length: int) -> tuple[bytes, ...]:
    """The same body, a hundred events to a write."""
    each = segments(length)
    return tuple(b"".join(each[at : at + _EVENTS_A_WRITE]) for at in range(0, len(each), _EVENTS_A_WRITE))


@cache
def burst(length: int) -> bytes:
    """The same stream with its head, in one write; each event is a chunk of HTTP, as servers send that flush each."""
    return STREAM_HEAD + b"".join(segments(length))


@cache
def gathered_burst(length: int) -> bytes:
    """The same in one write and one chunk of HTTP, as behind a proxy that gathers what it passes on."""
    return STREAM_HEAD + _http_chunk(b"".join(_events(length))) + _END
