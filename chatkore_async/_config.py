"""Settings, frozen and checked when they are made; URL forms, environment variables, and the key.

No I/O beside reading the environment.
"""

import functools
import hashlib
import re
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn, cast
from urllib.parse import urlencode, urlsplit

import msgspec
from msgspec import UNSET, UnsetType

from ._limiter import Demand
from ._version import __version__
from .errors import ConfigurationError, InvalidRequestError

DEFAULT_BASE_URL = "https://api.chatkore.com/v1"
DEFAULT_TOTAL = 600.0
"""Seconds for an awaited call whose `Timeout.total` was left alone (the official OpenAI client's default)."""


class Secret(str):
    """A string that shows itself to nobody who asks for its `repr`, as tracebacks with locals do.

    It stays a `str`, so that it can be a header's value all the way down to the socket.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not pickled; read it again from where it is kept")


KeySource = Callable[[], str | Awaitable[str]]
"""A callable that gives the API key, sync or async, asked before each attempt so that keys can rotate."""


def conceal(api_key: str | KeySource | None) -> Secret | KeySource | None:
    """Wrap a key before anything can fail, so that no frame of ours holds the bare string when it does."""
    given: Any = api_key
    if isinstance(given, str):
        return Secret(given.strip())
    if given is not None and not callable(given):
        # A mistake (bytes, a tuple by a stray comma) that will be refused; only its type's name is kept for that.
        given = type(type(given).__name__, (), {})()
    return cast("Secret | KeySource | None", given)


def checked_key(key: Secret) -> Secret:
    """Return the key, or raise `ConfigurationError` when no header could carry it."""
    if not key:
        raise ConfigurationError("the API key is empty: set CHATKORE_API_KEY, or pass api_key=")
    if any(ord(char) < 32 or ord(char) > 126 for char in key):
        raise ConfigurationError(
            "the API key contains characters that a header cannot carry (a line break, perhaps, or a quotation mark "
            "that a word processor made): copy it again, and check CHATKORE_API_KEY or api_key="
        )
    return key


def fingerprint(key: str) -> str:
    """Return a name for a key that does not tell it: the same for the same key, in every process."""
    return hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8, person=b"chatkore").hexdigest() if key else ""


def _is_number(value: object, *, whole: bool = False) -> bool:
    """Whether a value is a finite number of at least 0, and no truth value."""
    kind = int if whole else (int, float)
    return isinstance(value, kind) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _require_positive(name: str, value: object, *, whole: bool = False) -> None:
    if not _is_number(value, whole=whole) or value == 0:
        number = "whole number" if whole else "number"
        raise ConfigurationError(f"{name} must be a positive {number} or None, not {value!r}")


def _require_at_least_zero(name: str, value: object, *, whole: bool = False) -> None:
    if not _is_number(value, whole=whole):
        number = "whole number" if whole else "number"
        raise ConfigurationError(f"{name} must be a {number} of at least 0, not {value!r}")


class Timeout(msgspec.Struct, frozen=True, kw_only=True):
    """How long to wait, in seconds. `None` disables a limit.

    Attributes:
        total: one deadline over queueing, pool, every attempt, every back-off and the stream. Left alone it is
            600 s for an awaited call, from its admission by the rate limiter, and none for a stream.
        connect: for opening one connection: DNS, TCP and TLS.
        first_token: from sending a request to the first delta of its stream.
        idle: between two events of a stream. Comments such as `: PING` are no events.
    """

    total: float | None | UnsetType = UNSET
    connect: float | None = 10.0
    first_token: float | None = None
    idle: float | None = 300.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and value is not UNSET:
                _require_positive(f"Timeout.{name}", value)

    @classmethod
    def of(cls, value: "Timeout | float | None") -> "Timeout":
        """Return what `timeout=value` means: a number is the total, `None` is no limit at all."""
        if isinstance(value, Timeout):
            return value
        if value is None:
            return NO_TIMEOUT
        return cls(total=value)

    @property
    def leaves_total_alone(self) -> bool:
        """Whether the default applies."""
        return isinstance(self.total, UnsetType)

    def total_for(self, *, stream: bool) -> float | None:
        """Return the total for a call that left it alone, or the one given."""
        if isinstance(self.total, UnsetType):
            return None if stream else DEFAULT_TOTAL
        return self.total


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much may be used at once. `None` disables a limit.

    Attributes:
        max_connections: connections in use at a time, per event loop; further calls wait, first come, first served.
        max_connections_per_host: the same for one host and port.
        keepalive_expiry: seconds after which an idle connection is closed.
        max_event_size: bytes of one streamed event. 64 MiB: an image in base64 fits, an endless line does not.
        max_body_size: bytes of one answer after decompression; a stream's in all.
    """

    max_connections: int | None = 1000
    max_connections_per_host: int | None = None
    keepalive_expiry: float | None = 60.0
    max_event_size: int | None = 64 * 1024 * 1024
    max_body_size: int | None = 256 * 1024 * 1024

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None:
                _require_positive(f"Limits.{name}", value, whole=name != "keepalive_expiry")


class RetryBudget(msgspec.Struct, frozen=True, kw_only=True):
    """A token bucket per client, so that in an outage retries fade out rather than multiply the load.

    Source: the retry quota of the AWS SDKs (capacity 500, 5 a retry, 10 after a timeout, 1 back for a success).
    """

    capacity: int = 500
    retry_cost: int = 5
    timeout_cost: int = 10
    refund: int = 1

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            _require_at_least_zero(f"RetryBudget.{name}", getattr(self, name), whole=True)


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When and how often a failed attempt is repeated; all times in seconds.

    Attributes:
        max_retries: attempts after the first.
        initial_delay: the back-off before the n-th retry is drawn evenly from 0 to `initial_delay * 2 ** (n - 1)`,
            at most `max_delay` (full jitter).
        max_retry_after: a server that asks to wait longer is not waited for; its error is raised.
        retry_unconfirmed: whether a request that was sent and had no usable answer is sent once more. It may have
            been billed.
        budget: `None` disables it.
    """

    max_retries: int = 2
    initial_delay: float = 0.5
    max_delay: float = 8.0
    max_retry_after: float = 60.0
    retry_unconfirmed: bool = True
    budget: RetryBudget | None = RetryBudget()

    def __post_init__(self) -> None:
        _require_at_least_zero("RetryPolicy.max_retries", self.max_retries, whole=True)
        for name in ("initial_delay", "max_delay", "max_retry_after"):
            _require_at_least_zero(f"RetryPolicy.{name}", getattr(self, name))
        for name, kind, what in (
            ("retry_unconfirmed", bool, "True or False"),
            ("budget", RetryBudget | None, "a RetryBudget or None"),
        ):
            if not isinstance(getattr(self, name), kind):
                raise ConfigurationError(f"RetryPolicy.{name} must be {what}, not {getattr(self, name)!r}")


class RateLimit(msgspec.Struct, frozen=True, kw_only=True):
    """How fast, and how many at once. Each number counts for each endpoint, key and model by itself.

    Attributes:
        requests_per_minute: attempts, spread evenly. `None` disables the limit.
        tokens_per_minute: tokens of requests and answers, spread evenly: estimated before, corrected by the `usage` of
            the answer afterwards. `None` disables the limit.
        max_concurrency: attempts in flight; a stream is until it ends. `None` disables the limit.
        adaptive: whether to find out what the server bears: slower after a 429 or an overload (503, 529), faster again
            while nothing is refused, and at the pace that `x-ratelimit-*` headers allow. When it is off, a 429 and a
            `Retry-After` hold all back all the same.
        estimate: from a `Demand` to tokens; `None` is `estimate_tokens`. It runs on the event loop, for each attempt,
            if there is a `tokens_per_minute`.
        max_hold: seconds for which a `Retry-After` holds back the others at most.
    """

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_concurrency: int | None = None
    adaptive: bool = True
    estimate: Callable[[Demand], float] | None = None
    max_hold: float = 300.0

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "max_concurrency"):
            value = getattr(self, name)
            if value is not None:
                _require_positive(f"RateLimit.{name}", value, whole=name == "max_concurrency")
        _require_at_least_zero("RateLimit.max_hold", self.max_hold)
        adaptive: Any = self.adaptive
        if not isinstance(adaptive, bool):
            raise ConfigurationError(f"RateLimit.adaptive must be True or False, not {adaptive!r}")
        if self.estimate is not None and not callable(self.estimate):
            raise ConfigurationError(f"RateLimit.estimate must be a function or None, not {self.estimate!r}")


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where requests go and what every one of them carries."""

    base_url: str
    key: Secret | KeySource
    headers: dict[str, str]
    headers_of_caller: dict[str, str]

    def url(self, path: str, query: Mapping[str, object] | None = None) -> str:
        """Return the URL of `path`, such as `/chat/completions`.

        Raises:
            InvalidRequestError: the query cannot be encoded.
        """
        url = _joined(self.base_url, path)
        if not query:
            return url
        try:
            return f"{url}?{urlencode(query, doseq=True)}"
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"$.extra_query: {error}", path="$.extra_query") from error


@functools.lru_cache(maxsize=64)
def _joined(base_url: str, path: str) -> str:
    """The same string for each call: its hash, which caches on the way ask for, is computed once."""
    return base_url + path


def make_endpoint(
    key: Secret | KeySource | None,
    base_url: str | None,
    headers: Mapping[str, str] | None,
    environ: Mapping[str, str],
) -> Endpoint:
    """Put together an `Endpoint` from arguments and environment, or raise `ConfigurationError`."""
    asked = key is not None
    if key is None:
        key = Secret(environ.get("CHATKORE_API_KEY", "").strip())
    base_url = base_url or environ.get("CHATKORE_BASE_URL", "").strip() or DEFAULT_BASE_URL
    del environ  # before anything can fail: its repr shows the key
    if not key and not asked:
        raise ConfigurationError("no API key: set the environment variable CHATKORE_API_KEY, or pass api_key=")
    if isinstance(key, Secret):
        checked_key(key)
    elif not callable(key):
        raise ConfigurationError(f"api_key must be a string or a callable that returns one, not {type(key).__name__}")
    every = {"Accept": "application/json", "Content-Type": "application/json", "User-Agent": user_agent()}
    if isinstance(key, Secret):
        every["Authorization"] = Secret(f"Bearer {key}")
    return Endpoint(
        base_url=normalize_base_url(base_url),
        key=key,
        headers=merge_headers(every, headers),
        headers_of_caller=merge_headers({}, headers),
    )


def user_agent() -> str:
    """Return the one header by which we are known; WAFs block clients that send more (`wire.md` §4)."""
    return f"chatkore-async/{__version__}"


def merge_headers(base: Mapping[str, str], extra: Mapping[str, str] | None) -> dict[str, str]:
    """Return `base` with `extra` over it, names compared without case, or raise `ConfigurationError`."""
    merged = dict(base)
    if not extra:
        return merged
    given: Any = extra
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"headers must be a mapping, not {type(given).__name__}")
    for name, value in extra.items():
        _check_header(name, value)
        for known in [known for known in merged if known.lower() == name.lower()]:
            del merged[known]
        # A header of the caller's may be a credential of its own (a proxy's, a tenant's).
        merged[name] = Secret(value) if _is_credential(name) else value
    return merged


def _check_header(name: object, value: object) -> None:
    if not isinstance(name, str) or not isinstance(value, str):
        raise ConfigurationError("the name and the value of a header must be strings")
    if not re.fullmatch(_HEADER_NAME, name) or re.search(_NOT_IN_HEADER, value):
        # What stands behind a colon is a value, and may be a credential.
        raise ConfigurationError(f"header {name.partition(':')[0]!r} holds characters that no header may (RFC 9110 §5)")


_HEADER_NAME = r"(?a)[\w!#$%&'*+.^`|~-]+"
_NOT_IN_HEADER = r"[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]"


def _is_credential(name: str) -> bool:
    return any(word in name.lower() for word in ("auth", "key", "token", "secret", "cookie"))


def normalize_base_url(base_url: str) -> str:
    """Return the base URL without a trailing slash, `/v1` included.

    The vendor's pages tell users three forms: `https://host`, `https://host/v1` and
    `https://host/v1/chat/completions`. All mean the same; any other base path is kept.

    Raises:
        ConfigurationError: it is not an http(s) URL, or carries a user name and password, a query or a fragment.
    """
    given: Any = base_url
    if not isinstance(given, str):
        raise ConfigurationError(f"base_url must be a string, not {type(given).__name__}")
    base_url = base_url.strip()
    try:
        parts = urlsplit(base_url)
        port = parts.port
    except ValueError as error:
        raise ConfigurationError(f"base_url {_shown(base_url)} is not a URL: {error}") from error
    if "@" in parts.netloc:
        raise ConfigurationError("base_url must not contain a user name or password: pass the key as api_key=")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        hint = f" (did you mean {_shown('https://' + base_url)}?)" if "://" not in base_url and base_url else ""
        raise ConfigurationError(
            f"base_url must begin with https:// or http:// and name a host: {_shown(base_url)}{hint}"
        )
    if re.search(r"[\s\x00-\x1f\x7f]", base_url):
        raise ConfigurationError(f"base_url contains white space: {_shown(base_url)}")
    if port == 0:
        raise ConfigurationError(f"base_url names port 0: {_shown(base_url)}")
    if "?" in base_url or "#" in base_url:
        raise ConfigurationError(
            f"base_url must not contain '?' or '#': pass the query of {_shown(base_url)} as extra_query="
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return f"{parts.scheme}://{parts.netloc.rstrip(':')}{path or '/v1'}"


def _shown(base_url: str) -> str:
    """Return a base URL for an error message, without what may be a password, or the key put in the wrong place."""
    return repr(re.sub(r"\bsk-[\w-]+|[^/@]*@|[?#].*", "***", base_url, flags=re.DOTALL))


def is_loopback(url: str) -> bool:
    """Tell whether a URL stays on this machine."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    return host == "localhost" or host.endswith(".localhost") or host == "::1" or host.startswith("127.")


NO_TIMEOUT = Timeout(total=None, connect=None, first_token=None, idle=None)
