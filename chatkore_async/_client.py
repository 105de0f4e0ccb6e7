"""The client and its resources: wires the rooms below together, decides nothing.

Most of this file is the signatures and the documentation of what users call.
"""

import inspect
import os
import ssl as _ssl
from asyncio import AbstractEventLoop, get_running_loop
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, NoReturn, Self, Unpack, cast, overload

import msgspec
from msgspec import UNSET, UnsetType

from ._call import Call
from ._codec import REQUEST_FIELDS, encode_request
from ._config import (
    KeySource,
    Limits,
    RateLimit,
    RetryPolicy,
    Timeout,
    conceal,
    is_loopback,
    make_endpoint,
    merge_headers,
)
from ._fanout import MapResults, OnError
from ._hooks import Hook, logger
from ._limiter import Limiter
from ._manager import SessionManager
from ._meta import PoolStats
from ._options import OPTION_NAMES, CallOptions, CallParams, Outgoing, Settings, with_max_retries
from ._protocol import is_finished, read_completion, read_models
from ._proxies import checked_proxy
from ._ratelimiter import RateLimiter
from ._requests import ChatCompletionRequest
from ._responses import ChatCompletion, Model
from ._retry import Bucket
from ._route import Route
from ._stream import ChatStream
from ._transport import Session
from ._workers import Ask, Requests
from .errors import ConfigurationError, InvalidRequestError

_PATH = "/chat/completions"
_STREAM_HEADERS = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}


class AsyncChatKore:
    """The asyncio client for ChatKore.

        async with AsyncChatKore() as client:
            completion = await client.chat.completions.create(model="gpt-4o-mini", messages=[...])

    Making one does no I/O and needs no running loop, so it may live in a module. It serves several event loops, one
    after another or in several threads, with a pool of connections for each; when a loop ends, its pool is closed
    with it.

    Args:
        api_key: the key, or a sync or async callable that returns one, asked before each attempt so that keys can
            rotate. Default: the environment variable `CHATKORE_API_KEY`.
        base_url: `https://host`, `https://host/v1` or `https://host/v1/chat/completions`; another base path is kept.
            Default: `CHATKORE_BASE_URL`, else `https://api.chatkore.com/v1`.
        timeout: a `Timeout`, seconds in total, or `None` for no limit at all.
        max_retries: attempts after the first.
        retry: a whole `RetryPolicy`, which wins over `max_retries`.
        limits: of the pool of each event loop, and of what an answer may hold.
        rate_limit: a `RateLimit`, or an object of your own with the methods of `Limiter`; asked before each attempt of
            every call. A `RateLimiter` can be shared by several clients.
        default_headers: sent with every request, over our own.
        hooks: objects that have any of the methods of `Hook`.
        proxy: a URL; `None` takes `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY` from the environment, read
            once per session; `False` takes none.
        ssl: a context with your company's certificates. Default: the system's, verified.
        session: an `aiohttp.ClientSession` of your own, used as it is and never closed by us.

    Raises:
        ConfigurationError: no key, a key that no header can carry, a base URL that is none, an impossible setting.
    """

    chat: "Chat"
    models: "Models"

    def __init__(
        self,
        *,
        api_key: str | KeySource | None = None,
        base_url: str | None = None,
        timeout: Timeout | float | None = Timeout(),  # noqa: B008 - frozen
        max_retries: int = 2,
        retry: RetryPolicy | None = None,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        rate_limit: RateLimit | Limiter | None = None,
        default_headers: Mapping[str, str] | None = None,
        hooks: Sequence[Hook | object] = (),
        proxy: str | Literal[False] | None = None,
        ssl: _ssl.SSLContext | None = None,
        session: Session | None = None,
    ) -> None:
        key, api_key = conceal(api_key), None
        settings = Settings(
            endpoint=make_endpoint(key, base_url, default_headers, os.environ),
            timeout=Timeout.of(timeout),
            policy=RetryPolicy(max_retries=max_retries) if retry is None else _checked(retry, RetryPolicy, "retry"),
            hooks=tuple(hooks),
            limiter=_limiter(rate_limit),
            proxy=checked_proxy(proxy) if isinstance(proxy, str) else _checked_flag(proxy),
            ssl=ssl if ssl is None else _checked(ssl, _ssl.SSLContext, "ssl"),
        )
        manager = SessionManager(_checked(limits, Limits, "limits"), settings.endpoint.headers, settings.ssl, session)
        _warn_of_plain_http(settings.endpoint.base_url)
        self._set_up(settings, manager, Bucket(settings.policy.budget), owner=True)

    def _set_up(self, settings: Settings, manager: SessionManager, bucket: Bucket, *, owner: bool) -> None:
        self._settings = settings
        self._manager = manager
        self._bucket = bucket
        self._owner = owner
        self._routes: dict[AbstractEventLoop, Route] = {}
        self.chat = Chat(self)
        self.models = Models(self)

    def __repr__(self) -> str:
        if not hasattr(self, "_manager"):
            return "<AsyncChatKore not made>"  # a traceback of its construction shows locals
        if self.closed:
            return f"<AsyncChatKore {self._settings.endpoint.base_url} closed>"
        pool, limit = self.pool, self._manager.limits.max_connections
        return f"<AsyncChatKore {self._settings.endpoint.base_url} open {pool.open}/{limit} idle {pool.idle}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an AsyncChatKore is not pickled, since it holds connections and a key; make one where it is used"
        )

    async def __aenter__(self) -> Self:
        self._manager.check_open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def base_url(self) -> str:
        """The URL that every path is appended to."""
        return self._settings.endpoint.base_url

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._manager.closed

    @property
    def pool(self) -> PoolStats:
        """A snapshot of the connections, over all event loops."""
        return self._manager.stats()

    async def close(self) -> None:
        """Close all connections. Closing twice is fine, and closing a copy does nothing.

        The connections are told to close before anything is awaited, so a cancellation here loses nothing.
        """
        if self._owner:
            await self._manager.close()

    aclose = close

    def with_options(
        self,
        *,
        api_key: str | KeySource | UnsetType = UNSET,
        base_url: str | UnsetType = UNSET,
        timeout: Timeout | float | None | UnsetType = UNSET,
        max_retries: int | UnsetType = UNSET,
        retry: RetryPolicy | UnsetType = UNSET,
        rate_limit: RateLimit | Limiter | None | UnsetType = UNSET,
        default_headers: Mapping[str, str] | UnsetType = UNSET,
        hooks: Sequence[Hook | object] | UnsetType = UNSET,
        proxy: str | Literal[False] | None | UnsetType = UNSET,
        ssl: _ssl.SSLContext | None | UnsetType = UNSET,
    ) -> "AsyncChatKore":
        """Return a light copy with other settings, which shares the pool and, unless `retry` brings one, the budget.

        `default_headers` are merged over those there are; everything else takes the place of what there is.

        Raises:
            ConfigurationError: as for the client itself.
        """
        key, api_key = (UNSET if isinstance(api_key, UnsetType) else conceal(api_key)), UNSET
        old = self._settings
        changes: dict[str, Any] = {}
        if not isinstance(key, UnsetType) or not isinstance(base_url, UnsetType):
            changes["endpoint"] = make_endpoint(
                old.endpoint.key if isinstance(key, UnsetType) else key,
                old.endpoint.base_url if isinstance(base_url, UnsetType) else base_url,
                old.endpoint.headers_of_caller,
                os.environ,
            )
        if not isinstance(default_headers, UnsetType):
            endpoint = changes.get("endpoint", old.endpoint)
            changes["endpoint"] = msgspec.structs.replace(
                endpoint,
                headers=merge_headers(endpoint.headers, default_headers),
                headers_of_caller=merge_headers(endpoint.headers_of_caller, default_headers),
            )
        if not isinstance(timeout, UnsetType):
            changes["timeout"] = Timeout.of(timeout)
        if not isinstance(retry, UnsetType):
            changes["policy"] = _checked(retry, RetryPolicy, "retry")
        elif not isinstance(max_retries, UnsetType):
            changes["policy"] = with_max_retries(old.policy, max_retries)
        if not isinstance(rate_limit, UnsetType):
            changes["limiter"] = _limiter(rate_limit)
        if not isinstance(hooks, UnsetType):
            changes["hooks"] = tuple(hooks)
        if not isinstance(proxy, UnsetType):
            changes["proxy"] = checked_proxy(proxy) if isinstance(proxy, str) else _checked_flag(proxy)
        if not isinstance(ssl, UnsetType):
            changes["ssl"] = ssl if ssl is None else _checked(ssl, _ssl.SSLContext, "ssl")
        copy = object.__new__(type(self))
        new = msgspec.structs.replace(old, **changes)
        if new.endpoint.base_url != old.endpoint.base_url:
            _warn_of_plain_http(new.endpoint.base_url)
        bucket = self._bucket if new.policy.budget == old.policy.budget else Bucket(new.policy.budget)
        copy._set_up(new, self._manager, bucket, owner=False)
        return copy

    def _route(self, settings: Settings) -> Route:
        """Return the way of a call on the running loop; its settings are the client's, or have options of the call."""
        route = self._routes.get(get_running_loop())
        if route is None or not route.pool.is_open:
            route = self._open_route()
        return route if settings is route.settings else route.with_settings(settings)

    def _open_route(self) -> Route:
        pool = self._manager.pool()
        route = Route.through(pool, self._settings, self._bucket)
        # A new dictionary, since other threads may look into the old one; without what is over.
        there = {loop: known for loop, known in self._routes.items() if known.pool.is_open and not loop.is_closed()}
        self._routes = {**there, pool.loop: route}
        return route


class Chat:
    """`client.chat`."""

    def __init__(self, client: AsyncChatKore) -> None:
        self.completions = Completions(client)


class Completions:
    """`client.chat.completions`."""

    def __init__(self, client: AsyncChatKore) -> None:
        self._client = client
        self._url = client._settings.endpoint.url(_PATH)

    @overload
    async def create(
        self, request: ChatCompletionRequest, /, *, stream: Literal[False] = False, **options: Unpack[CallOptions]
    ) -> ChatCompletion: ...
    @overload
    async def create(
        self, request: None = None, /, *, stream: Literal[False] = False, **params: Unpack[CallParams]
    ) -> ChatCompletion: ...
    @overload
    async def create(
        self, request: ChatCompletionRequest, /, *, stream: Literal[True], **options: Unpack[CallOptions]
    ) -> ChatStream: ...
    @overload
    async def create(
        self, request: None = None, /, *, stream: Literal[True], **params: Unpack[CallParams]
    ) -> ChatStream: ...
    async def create(
        self, request: ChatCompletionRequest | None = None, /, *, stream: bool = False, **params: Any
    ) -> ChatCompletion | ChatStream:
        """Ask for a completion and return it whole; with `stream=True` return an open `ChatStream`.

        Args:
            request: a ready request in place of the fields.
            stream: whether to get the answer piece by piece; `stream()` reads better in most places.
            **params: the fields of a request, `model` and `messages` first, and the options of the call: `timeout`,
                `max_retries`, `extra_headers`, `extra_query`, `extra_body`. A field that is `msgspec.UNSET` is not
                sent, `None` is sent as `null`.

        Raises:
            InvalidRequestError: an argument cannot be sent; its `path` says which. Nothing was sent.
            TypeError: a keyword that is no field and no option.
            APIError: the call failed, after whatever retries its policy allows; see `errors`.
        """
        if stream:
            opened = self._stream(request, params)
            await opened.open()
            return opened
        settings, outgoing, _ = self._prepare(request, params, stream=False)
        del request, params  # what is sent is encoded, and thousands may wait here
        call = Call(self._client._route(settings), outgoing)
        completion = await call.ask(read_completion, is_finished)
        call.end("ok", usage=completion.usage)
        completion._meta = call.notes
        return completion

    @overload
    def stream(self, request: ChatCompletionRequest, /, **options: Unpack[CallOptions]) -> ChatStream: ...
    @overload
    def stream(self, request: None = None, /, **params: Unpack[CallParams]) -> ChatStream: ...
    def stream(self, request: ChatCompletionRequest | None = None, /, **params: Any) -> ChatStream:
        """Return a `ChatStream`, which opens on `async with` or at the first step of `async for`.

        Takes what `create` takes. `stream_options={"include_usage": True}` is sent unless you give `stream_options`
        (`msgspec.UNSET` sends none); when it was added here, the chunk that has only usage is merged, not yielded.

        Raises:
            InvalidRequestError: an argument cannot be sent; its `path` says which.
            TypeError: a keyword that is no field and no option.
        """
        return self._stream(request, params)

    def map(
        self, requests: Requests, *, concurrency: int = 64, ordered: bool = False, on_error: OnError = "return"
    ) -> MapResults:
        """Ask for many completions, `concurrency` at a time, and return their results as an async iterator.

            async with client.chat.completions.map(requests) as results:
                async for result in results:
                    print(result.index, result.completion or result.error)

        Requests are read as they are needed, never more than `concurrency` ahead of the results that were taken: a
        consumer that stops reading stops the reading ahead, and memory does not grow with the number of requests. An
        ordinary iterable is read on the event loop, which stands still while it computes; one that waits should be an
        async iterable, which holds back nothing. A generator is closed when it is left.

        Args:
            requests: an iterable or async iterable of `ChatCompletionRequest`s, of mappings of what `create` takes by
                name (options of the call too), or of pairs `(key, request)`.
            concurrency: how many requests are read, asked or finished and not yet taken, at most.
            ordered: give results in the order of the requests; a slow one then holds back those behind it.
            on_error: `"return"` gives failures in their place, as results with an `error`. `"raise"` cancels the rest
                at the first failure, gives what is finished (with `ordered`, in order, and perhaps with gaps), and
                raises it.

        Raises:
            TypeError: `requests` is no iterable, or a single request.
            ConfigurationError: `concurrency` or `on_error` has an impossible value.
        """
        return MapResults(
            cast("Ask", self.create), requests, concurrency=concurrency, ordered=ordered, on_error=on_error
        )

    def _stream(self, request: ChatCompletionRequest | None, params: dict[str, Any]) -> ChatStream:
        settings, outgoing, added_usage = self._prepare(request, params, stream=True)
        client = self._client
        return ChatStream(
            lambda: Call(client._route(settings), outgoing),
            hide_usage=added_usage,
            limits=client._manager.limits,
        )

    def _prepare(
        self, request: ChatCompletionRequest | None, params: dict[str, Any], *, stream: bool
    ) -> tuple[Settings, Outgoing, bool]:
        """Return the call's settings, its encoded request, and whether we asked for usage in the caller's place."""
        settings, url, fields = self._client._settings, self._url, params
        headers: Mapping[str, str] | None = _STREAM_HEADERS if stream else None
        extra_body: Any = None
        if request is not None or not REQUEST_FIELDS.issuperset(params):
            options: Any = {name: params.pop(name) for name in OPTION_NAMES & params.keys()}
            fields = _fields(request, params)
            settings = settings.with_call_options(options)
            headers = _extra_headers(options.get("extra_headers"), headers)
            extra_body = options.get("extra_body")
            if query := options.get("extra_query"):
                url = settings.endpoint.url(_PATH, query)
        adds_usage = False
        if stream:
            adds_usage = fields.get("stream_options", UNSET) is UNSET and not (
                "stream_options" in params or _holds("stream_options", extra_body)
            )
            if adds_usage:
                fields["stream_options"] = {"include_usage": True}
        body = encode_request(fields, stream=stream, extra_body=extra_body)
        return settings, Outgoing("POST", url, body, fields["model"], headers, stream), adds_usage


class Models:
    """`client.models`."""

    def __init__(self, client: AsyncChatKore) -> None:
        self._client = client

    async def list(
        self,
        *,
        timeout: Timeout | float | None | UnsetType = UNSET,
        max_retries: int | UnsetType = UNSET,
        extra_headers: Mapping[str, str] | None = None,
        extra_query: Mapping[str, object] | None = None,
    ) -> list[Model]:
        """Return the models that the endpoint offers (`GET /v1/models`).

        Raises:
            APIError: as for `create`.
        """
        given = {"timeout": timeout, "max_retries": max_retries}
        client = self._client
        settings = client._settings.with_call_options({k: v for k, v in given.items() if v is not UNSET})
        url = settings.endpoint.url("/models", extra_query)
        outgoing = Outgoing("GET", url, None, "", _extra_headers(extra_headers, None))

        call = Call(client._route(settings), outgoing)
        models = await call.ask(read_models)
        call.end("ok")
        return models


def _holds(name: str, given: object) -> bool:
    return isinstance(given, Mapping) and name in given


def _fields(request: object, params: dict[str, Any]) -> dict[str, Any]:
    if request is not None:
        if not isinstance(request, ChatCompletionRequest):
            raise TypeError(f"the positional argument is a ChatCompletionRequest, not {type(request).__name__}")
        if params:
            raise TypeError(f"a ready request takes options only, not {', '.join(map(repr, params))}")
        return {name: value for name, value in msgspec.structs.asdict(request).items() if value is not UNSET}
    if not REQUEST_FIELDS.issuperset(params):
        import difflib

        name = min(params.keys() - REQUEST_FIELDS)
        near = difflib.get_close_matches(name, [*REQUEST_FIELDS, *OPTION_NAMES], 1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise TypeError(
            f"{name!r} is no parameter of a completion{meant}; a vendor's field goes into extra_body={{{name!r}: ...}}"
        )
    return params


def _extra_headers(extra: Mapping[str, str] | None, base: Mapping[str, str] | None) -> Mapping[str, str] | None:
    if not extra:
        return base
    try:
        return merge_headers(base or {}, extra)
    except ConfigurationError as error:
        raise InvalidRequestError(str(error), path="$.extra_headers") from error


def _warn_of_plain_http(base_url: str) -> None:
    if base_url.startswith("http://") and not is_loopback(base_url):
        logger.warning("%s is not encrypted: the API key can be read on the way", base_url)


def _checked(value: Any, kind: type[Any], name: str) -> Any:
    if not isinstance(value, kind):
        raise ConfigurationError(f"{name} must be a {kind.__name__}, not {value!r}")
    return value


def _limiter(given: RateLimit | Limiter | None) -> Limiter | None:
    if given is None:
        return None
    if isinstance(given, RateLimit):
        return RateLimiter(given)
    if callable(getattr(given, "acquire", None)) and callable(getattr(given, "release", None)):
        return given
    raise ConfigurationError(f"rate_limit must be a RateLimit, or have the methods of Limiter, not {given!r}")


def _checked_flag(proxy: object) -> Literal[False] | None:
    if proxy is None or proxy is False:
        return proxy
    raise ConfigurationError(f"proxy must be a URL, None for the environment's, or False for none, not {proxy!r}")


def _signature_of_stream() -> inspect.Signature:
    """A signature that shows every field, for notebooks; the code itself takes `**params`."""
    named = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=UNSET, annotation=annotation)
        for name, annotation in (*ChatCompletionRequest.__annotations__.items(), *CallOptions.__annotations__.items())
    ]
    own = [
        inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY),
        inspect.Parameter(
            "request", inspect.Parameter.POSITIONAL_ONLY, default=None, annotation=ChatCompletionRequest | None
        ),
    ]
    return inspect.Signature([*own, *named], return_annotation=ChatStream)


Completions.stream.__signature__ = _of_stream = _signature_of_stream()  # type: ignore[attr-defined]
Completions.create.__signature__ = _of_stream.replace(  # type: ignore[attr-defined]
    parameters=[
        *_of_stream.parameters.values(),
        inspect.Parameter("stream", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool),
    ],
    return_annotation=ChatCompletion | ChatStream,
)
