"""What governs a call beside its request: settings of the client, and options of the one call over them."""

from collections.abc import Mapping
from ssl import SSLContext
from typing import Any, Literal, TypedDict

import msgspec

from ._config import Endpoint, RetryPolicy, Timeout
from ._limiter import Limiter
from ._requests import ChatCompletionParams


class CallOptions(TypedDict, total=False):
    """Options of one call; they win over the client's.

    `timeout` is a `Timeout`, seconds in total, or `None` for no limit at all; `max_retries` a count. `extra_headers`
    are sent over the client's headers, `extra_query` is appended to the URL, `extra_body` holds fields that are no
    parameters and wins key by key.
    """

    timeout: Timeout | float | None
    max_retries: int
    extra_headers: Mapping[str, str] | None
    extra_query: Mapping[str, object] | None
    extra_body: Mapping[str, object] | None


class CallParams(ChatCompletionParams, CallOptions, total=False):
    """Everything that `create` and `stream` take by name."""


OPTION_NAMES = frozenset(CallOptions.__annotations__)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a client was made with, as far as single calls can differ in it."""

    endpoint: Endpoint
    timeout: Timeout
    policy: RetryPolicy
    hooks: tuple[object, ...] = ()
    limiter: Limiter | None = None
    proxy: str | Literal[False] | None = None
    ssl: SSLContext | None = None

    def counts_from_admission(self, *, stream: bool) -> bool:
        """Whether a call's total begins when its limiter admits it.

        A default that nobody chose does not count the time in a queue that somebody did choose.
        """
        return not stream and self.limiter is not None and self.timeout.leaves_total_alone

    def with_call_options(self, options: Mapping[str, Any]) -> "Settings":
        """Return the settings of one call.

        Raises:
            ConfigurationError: an option has an impossible value.
        """
        changes: dict[str, Any] = {}
        if "timeout" in options:
            changes["timeout"] = Timeout.of(options["timeout"])
        if "max_retries" in options:
            changes["policy"] = with_max_retries(self.policy, options["max_retries"])
        return msgspec.structs.replace(self, **changes) if changes else self


def with_max_retries(policy: RetryPolicy, count: int) -> RetryPolicy:
    """Return a policy with another number of retries, or raise `ConfigurationError`."""
    # Not `structs.replace`, which checked nothing before msgspec 0.20.
    fields: dict[str, Any] = msgspec.structs.asdict(policy)
    fields["max_retries"] = count
    return RetryPolicy(**fields)


class Outgoing(msgspec.Struct, frozen=True):
    """A request, encoded: what is sent at every attempt."""

    method: str
    url: str
    body: bytes | None
    model: str
    headers: Mapping[str, str] | None = None
    stream: bool = False

    def once_sent(self) -> "Outgoing":
        """Return what there is still to say of it when it will not be sent again: not its body, which may be long."""
        return Outgoing(self.method, self.url, None, self.model, None, self.stream)
