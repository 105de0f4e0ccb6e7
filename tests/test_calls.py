"""Awaited calls: what is sent, what comes back, what is told about it, and who is told."""

import asyncio
import gc
import inspect
import logging
import pickle

import msgspec
import pytest
from msgspec import UNSET

from chatkore_async import (
    AsyncChatKore,
    AuthenticationError,
    BadRequestError,
    ChatCompletion,
    ChatCompletionRequest,
    ChatStream,
    ConfigurationError,
    InternalServerError,
    InvalidRequestError,
    InvalidResponseError,
    Limits,
    RetryBudget,
    RetryPolicy,
    Timeout,
)
from chatkore_async._call import Call
from chatkore_async._hooks import Hook
from chatkore_async._limiter import Demand, Report
from chatkore_async._options import OPTION_NAMES
from chatkore_async.testing import (
    ChatKoreServer,
    Hold,
    Reset,
    Stall,
    completion,
    error,
    html,
    json_reply,
    sse,
    stream,
)

ASK = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}


class Witness:
    """A hook that remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, object]] = []

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.told]

    @property
    def end(self):
        assert self.names.count("on_call_end") == 1
        assert self.names[-1] == "on_call_end"
        return self.told[-1][1]

    def on_call_start(self, event):
        self.told.append(("on_call_start", event))

    def on_attempt(self, event):
        self.told.append(("on_attempt", event))

    def on_retry(self, event):
        self.told.append(("on_retry", event))

    def on_first_token(self, event):
        self.told.append(("on_first_token", event))

    def on_call_end(self, event):
        self.told.append(("on_call_end", event))


# What is sent, what comes back.


async def test_create_returns_the_completion(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """`create` sends the fields as they are and returns what came back."""
    server.script(completion("Hi there", model="gpt-4o"))
    answer = await client.chat.completions.create(**ASK, temperature=0.5, stop=["a", "b"], seed=None, user=UNSET)
    assert isinstance(answer, ChatCompletion)
    assert (answer.text, answer.model, answer.completeness) == ("Hi there", "gpt-4o", "complete")
    assert server.requests[0].json == {**ASK, "temperature": 0.5, "stop": ["a", "b"], "seed": None}
    assert server.requests[0].path == "/v1/chat/completions"
    assert server.requests[0].headers["authorization"] == "Bearer sk-test"
    assert server.requests[0].headers["user-agent"].startswith("chatkore-async/")


async def test_a_ready_request_is_sent_as_built(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A `ChatCompletionRequest` built ahead of time may be given in place of the fields."""
    request = ChatCompletionRequest(**ASK, temperature=0.1)
    await client.chat.completions.create(request, max_retries=0)
    async with client.chat.completions.stream(request) as answer:
        assert (await answer.get_final_completion()).text
    assert server.requests[0].json == {**ASK, "temperature": 0.1}
    assert server.requests[1].json == {
        **ASK,
        "temperature": 0.1,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_a_ready_request_takes_options_only(client: AsyncChatKore) -> None:
    """Fields beside a ready request are refused rather than dropped."""
    request = ChatCompletionRequest(**ASK)
    with pytest.raises(TypeError, match="options only, not 'temperature'"):
        await client.chat.completions.create(request, temperature=1)
    with pytest.raises(TypeError, match="ChatCompletionRequest, not dict"):
        await client.chat.completions.create(ASK)


async def test_an_unknown_keyword_points_to_extra_body(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A keyword that is no field is a `TypeError` which says where a vendor's field goes."""
    with pytest.raises(TypeError, match=r"'top_k' is no parameter.*extra_body=\{'top_k': \.\.\.\}"):
        await client.chat.completions.create(**ASK, top_k=3)
    with pytest.raises(TypeError, match=r"did you mean 'temperature'"):
        client.chat.completions.stream(**ASK, temprature=3)
    assert server.request_count == 0


@pytest.mark.parametrize(
    "wrong, path",
    [
        ({"messages": []}, "$.messages"),
        ({"messages": [{"content": "x"}]}, "$.messages[0].role"),
        ({"model": UNSET}, "$.model"),
        ({"temperature": "hot"}, "$.temperature"),
        ({"temperature": float("nan")}, "$.temperature"),
        ({"metadata": {"a": object()}}, "$.metadata.a"),
        ({"extra_body": [1]}, "$.extra_body"),
        ({"extra_body": 5}, "$.extra_body"),
        ({"extra_query": "a=b"}, "$.extra_query"),
        ({"extra_headers": {"a": "b\r\nc"}}, "$.extra_headers"),
        ({"extra_headers": ["a"]}, "$.extra_headers"),
    ],
)
async def test_what_cannot_be_sent_is_refused_before_any_io(
    client: AsyncChatKore, server: ChatKoreServer, wrong: dict[str, object], path: str
) -> None:
    """A wrong argument is an `InvalidRequestError`, also a `ValueError`, that names its path."""
    for call in (client.chat.completions.create, client.chat.completions.stream):
        with pytest.raises(InvalidRequestError) as caught:
            await call(**{**ASK, **wrong})
        assert caught.value.path == path
        assert isinstance(caught.value, ValueError)
    assert server.request_count == 0
    assert not server.connections


async def test_models_are_listed(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """`models.list()` returns what the endpoint offers, with options of the call."""
    server.respond_with(lambda request: None)
    found = await client.models.list(timeout=5, max_retries=0, extra_headers={"x-a": "b"}, extra_query={"q": [1, 2]})
    assert "gpt-4o-mini" in [model.id for model in found]
    request = server.requests[0]
    assert (request.method, request.path, request.headers["x-a"], str(request.url.query_string)) == (
        "GET",
        "/v1/models",
        "b",
        "q=1&q=2",
    )
    assert request.body == b""


async def test_a_failing_model_list_is_retried_and_raised(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """`models.list()` retries and raises as `create` does, and takes `max_retries` for itself."""
    server.respond_with(lambda request: error(500, "down"))
    with pytest.raises(InternalServerError, match=r"500 server_error: down \(3 attempts"):
        await client.models.list()
    with pytest.raises(InternalServerError):
        await client.models.list(max_retries=0)
    assert server.request_count == 4


async def test_extra_headers_query_and_body_win(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """Extra headers go over the client's, the query is appended, and `extra_body` wins key by key."""
    await client.chat.completions.create(
        **ASK,
        top_p=1,
        extra_headers={"authorization": "Bearer other", "X-Trace": "1"},
        extra_query={"api-version": "2", "tag": ["a", "b"]},
        extra_body={"top_p": 0.5, "top_k": 7, "null": None},
    )
    request = server.requests[0]
    assert request.headers.getall("authorization") == ["Bearer other"]
    assert request.headers["x-trace"] == "1"
    assert str(request.url) == "/v1/chat/completions?api-version=2&tag=a&tag=b"
    assert request.json == {**ASK, "top_p": 0.5, "top_k": 7, "null": None}


async def test_call_options_win_over_the_clients(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """`timeout` and `max_retries` of a call win for that call alone."""
    server.always(error(500))
    with pytest.raises(InternalServerError) as caught:
        await client.chat.completions.create(**ASK, max_retries=4, timeout=None)
    assert len(caught.value.attempts) == 5
    with pytest.raises(InternalServerError) as caught:
        await client.chat.completions.create(**ASK)
    assert len(caught.value.attempts) == 3
    with pytest.raises(ConfigurationError):
        await client.chat.completions.create(**ASK, timeout="soon")
    with pytest.raises(ConfigurationError):
        await client.chat.completions.create(**ASK, max_retries=-1)


async def test_with_options_is_a_light_copy(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A copy has other settings and the same pool; closing it does nothing, closing the original closes it."""
    other = client.with_options(
        api_key=" sk-other ",
        timeout=Timeout(total=5),
        max_retries=1,
        default_headers={"X-Tenant": "t"},
        hooks=[Witness()],
        rate_limit=None,
        proxy=False,
        ssl=None,
    )
    await client.chat.completions.create(**ASK)
    await other.chat.completions.create(**ASK)
    assert [request.headers.get("x-tenant") for request in server.requests] == [None, "t"]
    assert [request.headers["authorization"] for request in server.requests] == ["Bearer sk-test", "Bearer sk-other"]
    assert client.pool.created == 1
    assert other.pool == client.pool
    server.always(error(500))
    with pytest.raises(InternalServerError) as caught:
        await other.chat.completions.create(**ASK)
    assert len(caught.value.attempts) == 2
    async with other:
        pass
    assert not other.closed
    await client.close()
    await client.aclose()
    assert other.closed
    assert repr(other) == f"<AsyncChatKore {server.base_url} closed>"


async def test_with_options_merges_headers_and_replaces_the_rest(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """Headers of copies add up; a new base URL keeps headers and key; a whole policy wins over a count."""
    first = client.with_options(default_headers={"X-A": "1", "X-B": "1"})
    second = first.with_options(default_headers={"x-b": "2"}, base_url=f"{server.base_url}/chat/completions/")
    third = second.with_options(
        base_url=f"http://{server.host}:{server.port}/proxy/v1", retry=RetryPolicy(max_retries=7), max_retries=1
    )
    await third.chat.completions.create(**ASK)
    request = server.requests[0]
    assert (request.headers["x-a"], request.headers.getall("x-b"), request.path) == (
        "1",
        ["2"],
        "/proxy/v1/chat/completions",
    )
    assert request.headers["authorization"] == "Bearer sk-test"
    assert second.base_url == server.base_url
    assert third._settings.policy.max_retries == 7


@pytest.mark.parametrize(
    "wrong",
    [
        {"retry": 3},
        {"limits": 3},
        {"ssl": True},
        {"proxy": True},
        {"proxy": "socks5://localhost"},
        {"proxy": "nonsense"},
        {"timeout": 0},
        {"max_retries": 1.5},
        {"api_key": 7},
        {"api_key": "a\nb"},
        {"api_key": " "},
        {"base_url": "ftp://x"},
        {"default_headers": {"a b": "c"}},
        {"default_headers": "nonsense"},
    ],
)
def test_an_impossible_setting_is_refused_at_construction(wrong: dict[str, object]) -> None:
    """Settings that cannot work raise `ConfigurationError` where they are given, in clients and in copies."""
    with pytest.raises(ConfigurationError):
        AsyncChatKore(**{"api_key": "k", **wrong})
    if "limits" not in wrong:
        with pytest.raises(ConfigurationError):
            AsyncChatKore(api_key="k").with_options(**wrong)


def test_a_client_needs_a_key() -> None:
    """Without a key in argument or environment, construction says what to set."""
    with pytest.raises(ConfigurationError, match="CHATKORE_API_KEY"):
        AsyncChatKore()


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`CHATKORE_API_KEY` and `CHATKORE_BASE_URL` are what a client without arguments uses."""
    monkeypatch.setenv("CHATKORE_API_KEY", " sk-env ")
    monkeypatch.setenv("CHATKORE_BASE_URL", "https://relay.example")
    client = AsyncChatKore()
    assert client.base_url == "https://relay.example/v1"
    assert client._settings.endpoint.key == "sk-env"
    assert AsyncChatKore(base_url="https://a/b").base_url == "https://a/b"


def test_plain_http_to_elsewhere_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """A key that would travel unencrypted is worth a warning, except on this machine."""
    AsyncChatKore(api_key="k", base_url="http://relay.example")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    AsyncChatKore(api_key="k", base_url="http://localhost:1")
    AsyncChatKore(api_key="k", base_url="https://relay.example")
    assert len(caplog.records) == 1


def test_a_client_is_not_pickled() -> None:
    """A client holds connections and a key, so pickling one says no."""
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(AsyncChatKore(api_key="k"))


async def test_a_call_after_closing_says_so(client: AsyncChatKore) -> None:
    """A closed client raises `ConfigurationError` for calls, streams and blocks."""
    await client.close()
    for call in (
        client.chat.completions.create(**ASK),
        client.models.list(),
        client.chat.completions.stream(**ASK).__aenter__(),
        client.__aenter__(),
    ):
        with pytest.raises(ConfigurationError, match="closed"):
            await call


async def test_repr_answers_a_support_question(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A client shows where it goes and how busy its pool is."""
    assert repr(client) == f"<AsyncChatKore {server.base_url} open 0/1000 idle 0>"
    await client.chat.completions.create(**ASK)
    assert repr(client) == f"<AsyncChatKore {server.base_url} open 1/1000 idle 1>"


@pytest.mark.parametrize("name", ["create", "stream"])
def test_the_signature_shows_every_field(name: str) -> None:
    """A notebook's help shows every field of a request and every option of a call."""
    shown = inspect.signature(getattr(AsyncChatKore(api_key="k").chat.completions, name))
    assert set(shown.parameters) >= {*ChatCompletionRequest.__struct_fields__, *OPTION_NAMES, "request"}
    assert ("stream" in shown.parameters) == (name == "create")
    assert shown.parameters["model"].kind is inspect.Parameter.KEYWORD_ONLY
    assert shown.return_annotation in (ChatCompletion | ChatStream, ChatStream)


async def test_create_with_stream_returns_an_open_stream(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """`create(stream=True)` is awaited to an open stream, and the await raises an error status."""
    async with await client.chat.completions.create(**ASK, stream=True) as opened:
        assert server.request_count == 1
        assert [chunk.text async for chunk in opened]
    server.script(error(400, "no"))
    with pytest.raises(BadRequestError):
        await client.chat.completions.create(**ASK, stream=True)


async def test_a_page_or_an_empty_answer_is_not_a_completion(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A web page with status 200 is an `InvalidResponseError` with a hint at `base_url`."""
    server.script(html(200, "Welcome"), json_reply({"id": "x", "choices": []}))
    with pytest.raises(InvalidResponseError, match=r"Welcome.*Hint: check base_url"):
        await client.chat.completions.create(**ASK)
    with pytest.raises(InvalidResponseError, match="no choices"):
        await client.chat.completions.create(**ASK)
    assert server.request_count == 2


async def test_events_for_an_awaited_call_are_merged(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """S12: an event stream in answer to `create` becomes the completion that was asked for."""
    server.script(stream("one two three"))
    assert (await client.chat.completions.create(**ASK)).text == "one two three"


async def test_a_body_over_the_limit_is_refused(server: ChatKoreServer) -> None:
    """`Limits.max_body_size` bounds what an answer may hold, and the error says which limit to raise."""
    server.always(completion("x" * 500_000))
    async with AsyncChatKore(api_key="k", base_url=server.base_url, limits=Limits(max_body_size=1000)) as client:
        with pytest.raises(InvalidResponseError, match=r"Limits\.max_body_size"):
            await client.chat.completions.create(**ASK)
        assert client.pool.in_use == 0


# The key.


async def test_a_key_may_come_from_a_callable(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A callable, sync or async, is asked for the key before each attempt, so that keys rotate."""
    keys = iter(["k1", " k2 ", "k3", "k4"])

    async def later() -> str:
        await asyncio.sleep(0)
        return next(keys)

    server.script(error(500))
    await client.with_options(api_key=lambda: next(keys)).chat.completions.create(**ASK)
    await client.with_options(api_key=later).chat.completions.create(**ASK)
    async with client.with_options(api_key=later).chat.completions.stream(**ASK) as answer:
        await answer.get_final_completion()
    assert [request.headers["authorization"] for request in server.requests] == [
        f"Bearer k{number}" for number in (1, 2, 3, 4)
    ]


async def test_a_header_of_the_callers_wins_over_the_key(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A gateway that wants an Authorization of its own gets it, whether the key is a string or a callable."""
    for key in ("a-key", lambda: "a-key"):
        other = client.with_options(api_key=key, default_headers={"authorization": "Basic gateway"})
        await other.chat.completions.create(**ASK)
    assert [request.headers["authorization"] for request in server.requests] == ["Basic gateway"] * 2


async def test_a_copy_has_a_retry_budget_of_its_own_when_it_brings_one(
    client: AsyncChatKore, server: ChatKoreServer
) -> None:
    """A copy shares the client's budget unless its policy has another."""
    server.always(error(503))
    empty = client.with_options(retry=RetryPolicy(initial_delay=0, budget=RetryBudget(capacity=0)))
    with pytest.raises(InternalServerError, match="the retry budget is empty"):
        await empty.chat.completions.create(**ASK)
    with pytest.raises(InternalServerError, match="3 attempts"):
        await client.with_options(timeout=5).chat.completions.create(**ASK)


@pytest.mark.parametrize("given", [None, 7, b"key", "", "a\nb"])
async def test_a_callable_that_returns_no_key_is_a_configuration_error(
    client: AsyncChatKore, server: ChatKoreServer, given: object
) -> None:
    """What is no key is not sent as one."""
    witness = Witness()
    with pytest.raises(ConfigurationError):
        await client.with_options(api_key=lambda: given, hooks=[witness]).chat.completions.create(**ASK)
    assert server.request_count == 0
    assert witness.end.outcome == "error"


async def test_what_a_key_callable_raises_reaches_the_caller(client: AsyncChatKore) -> None:
    """A vault that is down is the caller's own exception, unchanged."""

    class VaultError(Exception):
        pass

    def source() -> str:
        raise VaultError

    with pytest.raises(VaultError):
        await client.with_options(api_key=source).chat.completions.create(**ASK)


# What is told about a call.


async def test_meta_tells_what_happened(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """`.meta` has the request id, each attempt, timings, headers and the rate limit."""
    server.script(
        error(503, headers={"x-request-id": "first"}),
        completion(
            headers=[
                ("X-Request-Id", "second"),
                ("x-twice", "a"),
                ("x-twice", "b"),
                ("x-ratelimit-limit-requests", "60"),
                ("x-ratelimit-reset-tokens", "6m0s"),
            ]
        ),
    )
    meta = (await client.chat.completions.create(**ASK)).meta
    assert meta.request_id == "second"
    first, second = meta.attempts
    assert (first.number, first.status, first.error, first.request_id) == (1, 503, "InternalServerError", "first")
    assert (second.number, second.status, second.error, second.request_id) == (2, 200, None, "second")
    assert first.elapsed > 0
    assert second.elapsed > 0
    assert (first.waited, second.waited) == (0, 0)
    assert type(meta.headers) is dict
    assert meta.headers["x-twice"] == "a, b"
    assert meta.rate_limit.limit_requests == 60
    assert meta.rate_limit.reset_tokens == 360


async def test_each_timing_is_in_its_place(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """Timings are seconds where a phase was met and `None` where not: a reused connection was not opened."""
    first = (await client.chat.completions.create(**ASK)).meta.timings
    second = (await client.chat.completions.create(**ASK)).meta.timings
    assert first.connect > 0
    assert second.connect is None
    for timings in (first, second):
        assert (timings.first_token, timings.max_gap) == (None, None)
        assert 0 <= timings.queued < timings.first_byte <= timings.total
    async with client.chat.completions.stream(**ASK) as answer:
        assert answer.meta.timings.total is None
        await answer.get_final_completion()
    timings = answer.meta.timings
    assert 0 < timings.first_byte <= timings.first_token <= timings.total
    assert 0 < timings.max_gap <= timings.total


async def test_waiting_for_a_place_counts_as_queued(server: ChatKoreServer) -> None:
    """`timings.queued` is the wait for the limiter and the pool."""
    held = asyncio.Event()
    server.script(stream(["a", Hold(held)]), completion())
    async with AsyncChatKore(api_key="k", base_url=server.base_url, limits=Limits(max_connections=1)) as client:
        async with client.chat.completions.stream(**ASK) as busy:
            waiting = asyncio.create_task(client.chat.completions.create(**ASK))
            while not client.pool.waiting:  # noqa: ASYNC110 - not ours to signal
                await asyncio.sleep(0)
            assert server.request_count == 1
            held.set()
            await busy.get_final_completion()
        timings = (await waiting).meta.timings
        assert timings.queued > 0.5 * (timings.total - timings.first_byte)
        assert timings.connect is None


async def test_meta_is_never_encoded(client: AsyncChatKore) -> None:
    """Metadata stays here: neither `to_dict()` nor JSON shows it, and a pickled answer keeps it."""
    answer = await client.chat.completions.create(**ASK)
    assert "meta" not in msgspec.json.decode(msgspec.json.encode(answer))
    assert "meta" not in answer.to_dict()
    assert pickle.loads(pickle.dumps(answer)).meta == answer.meta
    assert ChatCompletion().meta.attempts == ()


async def test_an_error_carries_the_meta_of_its_call(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """An error tells request id, attempts and time in one line, and pickles with all of it."""
    server.script(error(401, "no", headers={"x-request-id": "r1"}))
    with pytest.raises(AuthenticationError) as caught:
        await client.chat.completions.create(**ASK)
    assert caught.value.request_id == "r1"
    assert caught.value.meta.headers["x-request-id"] == "r1"
    assert "request id: r1, 1 attempt in" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.meta, again.status_code) == (str(caught.value), caught.value.meta, 401)


# Hooks.


async def test_hooks_see_a_call_in_order(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """All five methods are called in order, each with one record of the same `call_id`."""
    witness = Witness()
    server.script(error(503), stream("Hi"))
    async with client.with_options(hooks=[witness]).chat.completions.stream(**ASK) as answer:
        assert witness.names == ["on_call_start", "on_attempt", "on_retry", "on_attempt", "on_first_token"]
        await answer.get_final_completion()
    assert witness.names[-1] == "on_call_end"
    start, first, again, second, token, end = (event for _, event in witness.told)
    assert len({event.call_id for _, event in witness.told}) == 1
    assert (start.model, start.stream, start.url) == ("gpt-4o-mini", True, f"{server.base_url}/chat/completions")
    assert (first.number, second.number, again.number, again.delay) == (1, 2, 1, 0)
    assert isinstance(again.error, InternalServerError)
    assert len(again.error.attempts) == 1
    assert token.elapsed == end.meta.timings.first_token
    assert (end.outcome, end.error, len(end.meta.attempts)) == ("ok", None, 2)
    with pytest.raises(AttributeError):
        end.outcome = "x"


async def test_hooks_may_add_headers(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """What `on_attempt` returns is sent, over headers of the same name; later hooks win."""

    class Tracer:
        def __init__(self, value: str) -> None:
            self.value = value

        def on_attempt(self, event):
            return {"traceparent": f"{self.value}-{event.number}", "x-call": event.call_id}

    server.script(error(500))
    await client.with_options(hooks=[Tracer("a"), Tracer("b")]).chat.completions.create(
        **ASK, extra_headers={"Traceparent": "mine"}
    )
    assert [request.headers.getall("traceparent") for request in server.requests] == [["b-1"], ["b-2"]]


async def test_a_hook_that_raises_breaks_nothing(client: AsyncChatKore, caplog: pytest.LogCaptureFixture) -> None:
    """A broken hook is logged; the call and the other hooks go on."""

    class Broken:
        def __getattr__(self, name):
            def method(event):
                raise RuntimeError("broken hook")

            return method

    witness = Witness()
    async with client.with_options(hooks=[Broken(), witness]).chat.completions.stream(**ASK) as answer:
        assert (await answer.get_final_completion()).text
    assert witness.end.outcome == "ok"
    assert [record.levelname for record in caplog.records if record.name == "chatkore_async"] == ["ERROR"] * 4


@pytest.mark.parametrize("nonsense", [{"a": None}, {"a": "b\r\nc"}, {1: "a"}, 7, "text"])
async def test_a_hook_that_returns_nonsense_breaks_nothing(
    client: AsyncChatKore, nonsense: object, caplog: pytest.LogCaptureFixture
) -> None:
    """Headers that are none are logged and not sent."""

    class Hooked:
        def on_attempt(self, event):
            return nonsense

    assert (await client.with_options(hooks=[Hooked()]).chat.completions.create(**ASK)).text
    assert any(record.name == "chatkore_async" for record in caplog.records)


async def test_a_subclass_of_hook_needs_no_method(client: AsyncChatKore) -> None:
    """An explicit subclass of `Hook` inherits methods that do nothing."""

    class Quiet(Hook):
        pass

    async with client.with_options(hooks=[Quiet(), object()]).chat.completions.stream(**ASK) as answer:
        assert (await answer.get_final_completion()).text


@pytest.mark.parametrize("steps", ["answer", "stream before", "stream after", "error", "left", "dropped", "broken"])
async def test_there_is_exactly_one_end(client: AsyncChatKore, server: ChatKoreServer, steps: str) -> None:
    """`on_call_end` comes once with its outcome: answered, failed, cancelled or left, however that happened."""
    witness = Witness()
    completions = client.with_options(hooks=[witness]).chat.completions
    if steps in ("answer", "stream before"):
        server.script(sse(Stall()))
        call = completions.create(**ASK) if steps == "answer" else completions.stream(**ASK).__aenter__()
        task = asyncio.create_task(call)
        await server.wait_for_requests(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        expected = "cancelled"
    elif steps == "error":
        server.script(error(400))
        with pytest.raises(BadRequestError) as caught:
            await completions.create(**ASK)
        expected = "error"
        assert witness.end.error is caught.value
        assert witness.end.meta.timings.total > 0
    elif steps == "stream after":
        server.script(stream(["a", Stall()]))
        started = asyncio.Event()

        async def read() -> None:
            async with completions.stream(**ASK) as answer:
                async for chunk in answer:
                    if chunk.text == "a":
                        started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        expected = "cancelled"
    elif steps == "left":
        async with completions.stream(**ASK) as answer:
            async for _ in answer:
                break
        await answer.aclose()
        expected = "left"
    elif steps == "dropped":
        answer = completions.stream(**ASK)
        await anext(answer)
        del answer
        gc.collect()
        expected = "left"
    else:
        server.script(stream(["a", Reset()]))
        with pytest.raises(Exception, match="broke off") as caught:
            async with completions.stream(**ASK) as answer:
                await answer.get_final_completion()
        expected = "error"
        assert witness.end.error is caught.value
    assert witness.end.outcome == expected


async def test_no_hooks_make_no_records(client: AsyncChatKore) -> None:
    """Without hooks a call has no id, since making one costs time."""
    settings, outgoing, _ = client.chat.completions._prepare(None, dict(ASK), stream=False)
    call = Call(client._route(settings), outgoing)
    assert call.id == ""
    call.end("left")
    call._look_at(call.pool.loop.time() + 1)  # as what was still waiting for leave does; it is over
    assert len(call.pool.deadlines) == 0
    assert repr(call).startswith("<Call POST http://127.0.0.1")


# The limiter.


class Gate:
    """A limiter that lets everyone in, and remembers. Its permit may be anything."""

    def __init__(self, permit: object = None) -> None:
        self.permit = permit
        self.asked: list[Demand] = []
        self.told: list[tuple[object, Report]] = []

    async def acquire(self, demand: Demand, /) -> object:
        self.asked.append(demand)
        return self.permit

    def release(self, permit: object, report: Report, /) -> None:
        self.told.append((permit, report))


@pytest.mark.parametrize("permit", [None, False, "permit"])
async def test_the_limiter_is_asked_and_told_for_each_attempt(
    client: AsyncChatKore, server: ChatKoreServer, permit: object
) -> None:
    """Each permit, whatever it is, is given back exactly once with how the attempt went."""
    gate = Gate(permit)
    server.script(error(429, headers={"retry-after": "0"}), completion())
    answer = await client.with_options(rate_limit=gate).chat.completions.create(**ASK)
    assert [(demand.model, demand.attempt, demand.endpoint) for demand in gate.asked] == [
        ("gpt-4o-mini", 1, server.base_url),
        ("gpt-4o-mini", 2, server.base_url),
    ]
    assert gate.asked[0].size == len(server.requests[0].body)
    (first, failed), (second, done) = gate.told
    assert first is second is permit
    assert (failed.status, failed.retry_after, failed.usage, failed.headers["retry-after"]) == (429, 0, None, "0")
    assert (done.status, done.retry_after, done.usage) == (200, None, answer.usage)


async def test_the_limiter_gets_its_permit_back_from_streams_and_cancelled_calls(
    client: AsyncChatKore, server: ChatKoreServer
) -> None:
    """A stream reports its usage at its end; a cancelled or failed call gives its permit back, too."""
    gate = Gate()
    limited = client.with_options(rate_limit=gate)
    async with limited.chat.completions.stream(**ASK) as answer:
        assert gate.told == []
        final = await answer.get_final_completion()
    assert gate.told[-1][1].usage == final.usage
    server.script(sse(Stall()), error(400))
    task = asyncio.create_task(limited.chat.completions.create(**ASK))
    await server.wait_for_requests(2)
    task.cancel()
    await asyncio.wait([task])
    with pytest.raises(BadRequestError):
        await limited.chat.completions.create(**ASK)
    await limited.models.list()
    assert len(gate.asked) == len(gate.told) == 4


async def test_a_limiter_that_raises_raises(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """What a limiter raises reaches the caller, and nothing is sent or reported."""

    class Shut(Gate):
        async def acquire(self, demand: Demand, /) -> object:
            raise PermissionError("shut")

    gate = Shut()
    with pytest.raises(PermissionError):
        await client.with_options(rate_limit=gate).chat.completions.create(**ASK)
    assert (gate.told, server.request_count) == ([], 0)


# The log.


async def test_bodies_and_keys_are_never_logged(
    client: AsyncChatKore, server: ChatKoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    """DEBUG tells of each attempt, INFO of a retry; neither shows what was asked, answered or who asks."""
    caplog.set_level(logging.DEBUG)
    server.script(error(503, "busy"), completion("SECRET ANSWER"))
    await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "SECRET QUESTION"}])
    ours = [record for record in caplog.records if record.name == "chatkore_async"]
    assert [record.levelname for record in ours] == ["DEBUG", "INFO", "DEBUG"]
    assert "attempt 1: InternalServerError, status 503" in ours[0].getMessage()
    assert "attempt 1 failed (503 server_error: busy), the next follows in 0.00 s" in ours[1].getMessage()
    assert "attempt 2: ok, status 200" in ours[2].getMessage()
    assert "SECRET" not in caplog.text
    assert "sk-test" not in caplog.text
