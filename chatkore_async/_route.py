"""What is the same for all calls of a client on one event loop, decided once; each request only adds its own."""

import io
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import aiohttp

from ._config import Secret
from ._deadlines import NEVER
from ._options import Outgoing, Settings
from ._proxies import authorized, environment_proxy
from ._retry import Bucket
from ._transport import Pool

_LARGE_BODY = 512 * 1024  # aiohttp warns of bytes above 1 MiB, and writes them in one go


class Route:
    """What is the same for all calls of a client on one event loop, decided once.

    Attributes:
        pool: the event loop's.
        settings: of the calls.
        bucket: the client's retry budget.
        loop, now, deadlines: the event loop, its clock, and its deadlines.
        hooks: of the settings.
        secret: the key, unless it has to be asked for.
        headers: what an attempt carries beyond its session's headers and its call's own, the key apart.
        is_plain: whether nothing is to be asked before an attempt, and it needs no headers but its call's.
        total: seconds that a call may take, `NEVER` for no limit, or none until its limiter admits it.
        total_of_streams: the same for streams.
    """

    __slots__ = (
        "_options",
        "_request",
        "bucket",
        "deadlines",
        "headers",
        "hooks",
        "is_plain",
        "loop",
        "now",
        "pool",
        "secret",
        "settings",
        "total",
        "total_of_streams",
    )

    def __init__(
        self,
        pool: Pool,
        settings: Settings,
        bucket: Bucket,
        *,
        headers: Mapping[str, str] | None,
        request: Callable[..., Awaitable[aiohttp.ClientResponse]],
        options: dict[str, Any],
    ) -> None:
        self.pool = pool
        self.settings = settings
        self.bucket = bucket
        self.loop = pool.loop
        self.now = pool.loop.time
        self.deadlines = pool.deadlines
        self.hooks = settings.hooks
        key = settings.endpoint.key
        self.secret = key if isinstance(key, Secret) else Secret()
        self.headers = headers
        self.is_plain = (
            headers is None
            and isinstance(key, Secret)
            and settings.limiter is None
            and not self.hooks
            and not pool.limits_hosts
        )
        self.total = _total(settings, stream=False)
        self.total_of_streams = _total(settings, stream=True)
        self._request = request
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=settings.timeout.connect)
        self._options = {**options, "timeout": timeout}

    @classmethod
    def through(cls, pool: Pool, settings: Settings, bucket: Bucket) -> "Route":
        """Return the way through a pool of all requests with these settings.

        Raises:
            ConfigurationError: the environment names a proxy that cannot be used.
        """
        endpoint, session = settings.endpoint, pool.session
        headers: Mapping[str, str] | None = None if endpoint.headers is pool.headers else endpoint.headers
        options: dict[str, Any] = {"allow_redirects": False}
        if pool.connector is None:
            # Whatever the caller's session does with other answers, ours have to be read.
            options["raise_for_status"] = False
            options["auto_decompress"] = True
        proxy = settings.proxy
        if proxy is None and pool.connector is not None:  # the caller's session has its own ways, such as SOCKS
            proxy = environment_proxy(endpoint.base_url, pool.environment)
        if proxy:
            options["proxy"] = proxy
            if pool.connector is not None:
                session, headers = pool.proxied, endpoint.headers
            headers = authorized(headers, endpoint.base_url, proxy)
        if settings.ssl is not None:
            options["ssl"] = settings.ssl
        return cls(pool, settings, bucket, headers=headers, request=session.request, options=options)

    def __repr__(self) -> str:
        return f"<Route to {self.settings.endpoint.base_url}>"

    def with_settings(self, settings: Settings) -> "Route":
        """Return the route of a call with timeouts or retries of its own; nothing else of the settings may differ."""
        return Route(
            self.pool,
            settings,
            self.bucket,
            headers=self.headers,
            request=self._request,
            options=self._options,
        )

    def request(self, outgoing: Outgoing, headers: Mapping[str, str] | None) -> Awaitable[aiohttp.ClientResponse]:
        """Return a request to be awaited: what comes of it is for `Pool.answered`, what it raises for `raise_ours`.

        Not a coroutine of its own: thousands may wait here. The caller holds a place in the pool's `slots`.
        """
        body = outgoing.body
        return self._request(
            outgoing.method,
            outgoing.url,
            data=io.BytesIO(body) if body is not None and len(body) > _LARGE_BODY else body,
            headers=headers,
            **self._options,
        )


def _total(settings: Settings, *, stream: bool) -> float:
    total = settings.timeout.total_for(stream=stream)
    return NEVER if total is None or settings.counts_from_admission(stream=stream) else total
