"""What an application has of us for its life: a client, and the streams that it relays at the moment."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from ssl import SSLContext
from typing import Literal, TypedDict

from chatkore_async import AsyncChatKore, ConfigurationError, Hook, Limiter, Limits, RateLimit, RetryPolicy, Timeout
from chatkore_async.integrations._relay import Relays

__all__ = ["ClientOptions", "Maker", "Service"]


class ClientOptions(TypedDict, total=False):
    """What `AsyncChatKore` takes, but for `session`, which belongs to a loop that does not run yet."""

    api_key: str | Callable[[], str | Awaitable[str]] | None
    base_url: str | None
    timeout: Timeout | float | None
    max_retries: int
    retry: RetryPolicy | None
    limits: Limits
    rate_limit: RateLimit | Limiter | None
    default_headers: Mapping[str, str] | None
    hooks: Sequence[Hook | object]
    proxy: str | Literal[False] | None
    ssl: SSLContext | None


class Service:
    """A running application's client and streams.

    Args:
        client: the application's.
        grace: seconds for which streams may go on once the application shuts down.
    """

    def __init__(self, client: AsyncChatKore, grace: float | None) -> None:
        self.client = client
        self.relays = Relays(grace)

    def __repr__(self) -> str:
        return f"<Service {self.client!r}, {self.relays!r}>"


class Maker:
    """Makes the service of an application, each time it starts.

    It holds the options in place of a closure: among them is the key, and tracebacks show what a frame closes over.

    Raises:
        ConfigurationError: `grace` is no number of seconds.
    """

    def __init__(self, options: ClientOptions, grace: float | None = None) -> None:
        if grace is not None and not grace >= 0:
            raise ConfigurationError(f"grace must be seconds from 0, or None, not {grace!r}")
        self._options = options
        self._grace = grace

    def __repr__(self) -> str:
        return f"<Maker of a client of {self._options.get('base_url') or 'the default URL'}>"

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[Service]:
        """Have a service for as long as the block runs; then its streams end, and its client is closed.

        Raises:
            ConfigurationError: the client cannot be made, as without a key.
        """
        async with AsyncChatKore(**self._options) as client:
            service = Service(client, self._grace)
            try:
                yield service
            finally:
                service.relays.end()
