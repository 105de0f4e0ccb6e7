"""What `chatkore doctor` observes, as plain records: between those who look and those who judge. No I/O.

Seconds are floats; times of a certificate are Unix time. What a server said is masked before it gets in here.
"""

from typing import Literal, NoReturn

import msgspec


class Hidden(str):
    """A secret: it is sent, and shown by no `repr`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not pickled")


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """Whom the doctor was asked to look at.

    Attributes:
        url: the base URL as given, or `None`.
        url_source: `"--base-url"`, `"CHATKORE_BASE_URL"`, or `"default"`.
        key: `CHATKORE_API_KEY` as it stands there, `""` when there is none.
        local: whether the URL leads to this machine.
        other_keys: variables of other clients that hold a key.
    """

    url: str | None
    url_source: str
    key: Hidden
    local: bool = False
    other_keys: tuple[str, ...] = ()


Kind = Literal[
    "bad-name",
    "certificate",
    "denied",
    "files",
    "no-resolver",
    "not-http",
    "not-tls",
    "other",
    "refused",
    "reset",
    "timeout",
    "tls",
    "tunnel",
    "unknown-host",
    "unreachable",
]


class Trouble(msgspec.Struct, frozen=True):
    """Why something on the way did not work: a kind to judge by, and the system's or the server's words."""

    kind: Kind
    text: str


class Proxy(msgspec.Struct, frozen=True, kw_only=True):
    """A proxy that can be used. `login` is the value of `Proxy-Authorization`, or `None`."""

    host: str
    port: int
    tls: bool = False
    login: Hidden | None = None


class ProxyChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What the environment says about a proxy for a URL.

    Attributes:
        why: `"loopback"`, `"exempt"` (`NO_PROXY`), `"none"`, `"named"`.
        source: the variable that names it, or `"the system's settings"`.
        shown: its URL without user name and password.
        proxy: `None` when none is used, and when `problem` says that it cannot be.
        problem: `"socks"` or `"nonsense"`.
        others: variables that name proxies for other URLs.
    """

    why: Literal["loopback", "exempt", "none", "named"]
    source: str = ""
    shown: str = ""
    proxy: Proxy | None = None
    problem: Literal["socks", "nonsense"] | None = None
    others: tuple[str, ...] = ()


class Lookup(msgspec.Struct, frozen=True, kw_only=True):
    """What the resolver said; `addresses` in its order."""

    host: str
    addresses: tuple[str, ...] = ()
    seconds: float = 0.0
    trouble: Trouble | None = None


class Reach(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt to open a TCP connection."""

    address: str
    port: int
    seconds: float = 0.0
    trouble: Trouble | None = None

    @property
    def family(self) -> str:
        """`"IPv4"` or `"IPv6"`."""
        return "IPv6" if ":" in self.address else "IPv4"


class Tunnel(msgspec.Struct, frozen=True, kw_only=True):
    """What a proxy answered to CONNECT. `status` is `None` when it gave no answer; `schemes` what a 407 asks for."""

    status: int | None = None
    schemes: tuple[str, ...] = ()
    seconds: float = 0.0
    trouble: Trouble | None = None


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """What a certificate says of itself."""

    issuer: str
    names: tuple[str, ...]
    begins: float
    ends: float


class Handshake(msgspec.Struct, frozen=True, kw_only=True):
    """How TLS began.

    Attributes:
        version: `"TLSv1.3"`.
        certificate: the server's, also when it does not verify; `None` when it could not be read.
        verify_code: OpenSSL's number for what is wrong with it, 0 when nothing is.
        authorities: the file or directory of `SSL_CERT_FILE` or `SSL_CERT_DIR`, as `NAME=value`, or `""`.
        authorities_missing: whether there is no such file or directory.
        other_authorities: a variable of other programs that names a file of certificates, or `""`.
    """

    seconds: float = 0.0
    version: str = ""
    certificate: Certificate | None = None
    verify_code: int = 0
    trouble: Trouble | None = None
    authorities: str = ""
    authorities_missing: bool = False
    other_authorities: str = ""


class Tokens(msgspec.Struct, frozen=True):
    """What was billed."""

    prompt: int
    completion: int
    total: int


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """An answer to a call, awaited or streamed, as the client gave it.

    Attributes:
        asked: the model asked for.
        model: the model that the answer names.
        text: what it says.
        other: whether it has something that is no text: reasoning, a refusal, a tool call.
        limit: the `max_tokens` that was asked for.
        request_id: the server's name for the request, from a header, or `None`.
        first_token: seconds to the first delta of a stream.
        completeness: of a stream.
    """

    asked: str
    model: str = ""
    text: str = ""
    other: bool = False
    finish_reason: str | None = None
    tokens: Tokens | None = None
    limit: int = 16
    request_id: str | None = None
    seconds: float = 0.0
    first_token: float | None = None
    completeness: str | None = None


class RawStream(msgspec.Struct, frozen=True, kw_only=True):
    """A stream as it came over the wire, which the client tidies up.

    Attributes:
        status: of the answer.
        content_type: without its parameters.
        encoding: `content-encoding`.
        events: with data, `[DONE]` aside.
        deltas: events that brought text, reasoning or a tool call.
        first_delta: seconds from sending the request.
        spread: seconds from the first delta to the last.
        pings: comments, and events that are named so.
        silence: the longest time without an event, in seconds.
        silent_pings: how many pings came in it.
        usage: whether there were token counts.
        done: whether `[DONE]` came.
        after_done: bytes after it, line ends aside.
        ending: `"end"` as HTTP has it, `"cut"`, `"open"` after `[DONE]`, `"timeout"`, or `"limit"`.
        reused: whether a second request went over the same connection; `None` when that was not tried.
        close: what rules that out: `"Connection: close"`, for one; or `""`.
    """

    status: int = 200
    content_type: str = ""
    encoding: str = ""
    events: int = 0
    deltas: int = 0
    first_delta: float = 0.0
    spread: float = 0.0
    pings: int = 0
    silence: float = 0.0
    silent_pings: int = 0
    usage: bool = False
    done: bool = False
    after_done: int = 0
    ending: Literal["end", "cut", "open", "timeout", "limit"] = "end"
    reused: bool | None = None
    close: str = ""


class Headers(msgspec.Struct, frozen=True, kw_only=True):
    """What the answers' headers said.

    Attributes:
        limits: rate limits in words, one for each kind.
        exhausted: kinds of which nothing is left.
        others: headers that look like limits and are in no form we know, as `name: value`.
        skew: seconds that the server's clock is ahead of ours, or `None` when it does not tell the time.
        uncertainty: seconds by which `skew` may be wrong.
        answers: how many answers were looked at.
    """

    limits: tuple[str, ...] = ()
    exhausted: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    skew: float | None = None
    uncertainty: float = 0.0
    answers: int = 0
