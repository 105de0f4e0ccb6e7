"""What is retried, how often, and what is not: the table of contract §4, over real connections."""

import asyncio
import contextlib
import gc
import logging
import socket
import ssl
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import FrameType

import pytest
import trustme

from chatkore_async import (
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    AsyncChatKore,
    AuthenticationError,
    BadRequestError,
    ConfigurationError,
    ConflictError,
    InsufficientQuotaError,
    InternalServerError,
    InvalidResponseError,
    NoChannelError,
    RateLimitError,
    RetryBudget,
    RetryPolicy,
    StreamInterruptedError,
    Timeout,
)
from chatkore_async._call import Call
from chatkore_async.testing import (
    ChatKoreServer,
    Cut,
    Ping,
    Raw,
    Reply,
    Reset,
    Stall,
    completion,
    cut_after,
    error,
    events,
    html,
    json_reply,
    raw,
    sse,
    stream,
)

ASK = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}


async def ask(client: AsyncChatKore, way: str, **options: object) -> str:
    """Make a call, awaited or streamed, and return its text."""
    if way == "create":
        return (await client.chat.completions.create(**ASK, **options)).text
    async with client.chat.completions.stream(**ASK, **options) as answer:
        return (await answer.get_final_completion()).text


both_ways = pytest.mark.parametrize("way", ["create", "stream"])


@both_ways
@pytest.mark.parametrize(
    "status", [408, 409, 429, 500, 502, 503, 507, 520, 521, 522, 523, 525, 526, 527, 528, 529, 530, 599]
)
async def test_a_passing_status_is_retried(
    client: AsyncChatKore, server: ChatKoreServer, status: int, way: str
) -> None:
    """A status that may pass is retried as often as the policy says, then raised with that status."""
    server.always(error(status))
    with pytest.raises(APIStatusError) as caught:
        await ask(client, way)
    assert server.request_count == 3
    assert caught.value.status_code == status
    assert [attempt.status for attempt in caught.value.attempts] == [status] * 3
    server.clear()
    server.script(error(status), stream("fine") if way == "stream" else completion("fine"))
    assert await ask(client, way) == "fine"


@both_ways
@pytest.mark.parametrize("status", [301, 400, 401, 402, 403, 404, 405, 413, 422, 451])
async def test_the_callers_fault_is_not_retried(
    client: AsyncChatKore, server: ChatKoreServer, status: int, way: str
) -> None:
    """What will fail again is raised at once."""
    server.always(error(status))
    with pytest.raises(APIStatusError):
        await ask(client, way)
    assert server.request_count == 1


@both_ways
@pytest.mark.parametrize(
    "reply, kind",
    [
        (error(500, code="invalid_request"), BadRequestError),
        (error(500, code="sensitive_words_detected"), BadRequestError),
        (error(500, code="context_length_exceeded"), BadRequestError),
        (error(401, "该令牌额度已用尽"), InsufficientQuotaError),
        (error(403, code="insufficient_user_quota"), InsufficientQuotaError),
        (error(429, code="insufficient_quota"), InsufficientQuotaError),
        (error(429, code="insufficient_quota", headers={"x-should-retry": "true"}), InsufficientQuotaError),
        (error(500, code="insufficient_quota", headers={"retry-after": "0"}), InsufficientQuotaError),
        (error(200, code="insufficient_quota"), InsufficientQuotaError),
        (error(200, code="invalid_api_key"), AuthenticationError),
        (html(200, "Welcome to the relay"), InvalidResponseError),
        (json_reply({"choices": []}), InvalidResponseError),
        (json_reply({"choices": None, "id": "x"}), InvalidResponseError),
        (json_reply("hello"), InvalidResponseError),
    ],
)
async def test_codes_and_bodies_can_forbid_a_retry(
    client: AsyncChatKore, server: ChatKoreServer, reply: Reply, kind: type[APIError], way: str
) -> None:
    """The caller's fault under a 5xx, an empty purse under any status, and what is not the API's: never retried."""
    server.always(reply)
    with pytest.raises(kind):
        await ask(client, way)
    assert server.request_count == 1


@both_ways
@pytest.mark.parametrize("wanted, count", [("true", 3), ("false", 1), ("perhaps", None)])
async def test_x_should_retry_overrides_the_status(
    client: AsyncChatKore, server: ChatKoreServer, wanted: str, count: int | None, way: str
) -> None:
    """`x-should-retry` is obeyed, whatever the status; nonsense is ignored."""
    for status, otherwise in ((400, 1), (503, 3)):
        server.clear()
        server.always(error(status, headers={"x-should-retry": wanted}))
        with pytest.raises(APIStatusError):
            await ask(client, way)
        assert server.request_count == (count or otherwise)


@both_ways
@pytest.mark.parametrize(
    "reply",
    [
        error(503, "当前分组 default 下对于模型 x 无可用渠道"),
        error(503, code="model_not_found"),
        error(500, "No available channel for model x"),
    ],
)
async def test_no_channel_is_retried_once(
    client: AsyncChatKore, server: ChatKoreServer, reply: Reply, way: str
) -> None:
    """A missing channel may be a moment's, so it is tried once more, and only once."""
    server.always(reply)
    with pytest.raises(NoChannelError):
        await ask(client, way)
    assert server.request_count == 2


UNCONFIRMED = {
    "504": error(504),
    "524": error(524),
    "died before a byte": raw(Cut()),
    "reset before a byte": raw(Reset()),
    "empty": Reply(headers=(("Content-Type", "application/json"),)),
    "cut midway": cut_after(completion("hello"), 60),
    "JSON cut, body whole": Reply(headers=(("Content-Type", "application/json"),), steps=(b'{"choices": [{"mess',)),
    "not HTTP": raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
}


@both_ways
@pytest.mark.parametrize("case", UNCONFIRMED)
async def test_what_may_have_been_billed_is_retried_once(
    client: AsyncChatKore, server: ChatKoreServer, case: str, way: str
) -> None:
    """A request that was sent and had no usable answer is sent once more at most, and not at all on request."""
    server.always(UNCONFIRMED[case])
    with pytest.raises(APIError):
        await ask(client, way)
    assert server.request_count == 2
    server.clear()
    server.always(UNCONFIRMED[case])
    with pytest.raises(APIError):
        await ask(client.with_options(retry=RetryPolicy(initial_delay=0, retry_unconfirmed=False)), way)
    assert server.request_count == 1


LOST_STREAMS = {
    "empty": sse(),
    "only done": events(),
    "only pings": sse(Ping(), Ping()),
    "only a role": events({"choices": [{"delta": {"role": "assistant", "content": ""}}]}),
    "only usage": events({"choices": [], "usage": {"total_tokens": 1}}),
    "cut after the role": events({"choices": [{"delta": {"role": "assistant"}}]}, Cut()),
    "reset after a ping": sse(Ping(), Reset()),
    "not JSON": events(b"Traceback (most recent call last)"),
}


@pytest.mark.parametrize("case", LOST_STREAMS)
async def test_a_stream_without_a_first_delta_is_retried_once(
    client: AsyncChatKore, server: ChatKoreServer, case: str
) -> None:
    """A stream that ends, breaks or babbles before its first delta is asked for once more."""
    server.always(LOST_STREAMS[case])
    with pytest.raises(APIError) as caught:
        await ask(client, "stream")
    assert server.request_count == 2
    assert caught.value.partial is None
    server.clear()
    server.script(LOST_STREAMS[case], stream("fine"))
    assert await ask(client, "stream") == "fine"


async def test_a_stream_without_a_delta_in_time_is_retried_once(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """`first_token` passing is no usable answer either."""
    server.script(sse(Ping(), Stall()), stream("fine"))
    assert await ask(client, "stream", timeout=Timeout(first_token=0.3)) == "fine"
    server.clear()
    server.always(sse(Ping(), Stall()))
    with pytest.raises(APITimeoutError) as caught:
        await ask(client, "stream", timeout=Timeout(first_token=0.05))
    assert (caught.value.phase, server.request_count) == ("first_token", 2)


@pytest.mark.parametrize("code, count", [("overloaded", 3), ("invalid_api_key", 1), ("insufficient_quota", 1)])
async def test_a_stream_that_fails_before_its_first_delta_is_retried_as_a_plain_call(
    client: AsyncChatKore, server: ChatKoreServer, code: str, count: int
) -> None:
    """An error event before the first delta counts as the status its code stands for."""
    server.always(
        events({"choices": [{"delta": {"role": "assistant"}}]}, {"error": {"message": "x", "code": code}}, done=False)
    )
    with pytest.raises(APIStatusError) as caught:
        await ask(client, "stream")
    assert server.request_count == count
    assert caught.value.partial is None


@pytest.mark.parametrize("last", [Cut(), Reset(), b'data: {"error": {"message": "x", "code": "overloaded"}}\n\n'])
async def test_a_stream_is_never_retried_after_its_first_delta(
    client: AsyncChatKore, server: ChatKoreServer, last: object
) -> None:
    """What was handed out would be doubled, so a break after the first delta is raised."""
    whole = stream("Hello", done=False, finish_reason=None, usage=False)
    server.always(sse(*whole.steps, last))
    with pytest.raises(APIError) as caught:
        await ask(client, "stream")
    assert server.request_count == 1
    assert caught.value.partial.text == "Hello"
    assert caught.value._retryable == "never"


async def test_each_cause_has_its_own_once(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A missing channel and a lost answer are tried once more each, not as often as the policy says."""
    server.script(error(504), error(503, code="model_not_found"), error(504), completion())
    with pytest.raises(InternalServerError) as caught:
        await client.chat.completions.create(**ASK, max_retries=5)
    assert [attempt.status for attempt in caught.value.attempts] == [504, 503, 504]


# Not sent.


@contextlib.contextmanager
def refusing() -> object:
    """A port where nobody listens, and which nobody else gets."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@both_ways
async def test_what_was_not_sent_is_retried(way: str) -> None:
    """A refused connection cost nothing, so it is retried even where a second bill is not accepted."""
    with refusing() as url:
        policy = RetryPolicy(initial_delay=0, retry_unconfirmed=False)
        async with AsyncChatKore(api_key="k", base_url=url, retry=policy) as client:
            with pytest.raises(APIConnectionError, match=r"could not connect to 127\.0\.0\.1") as caught:
                await ask(client, way)
            assert len(caught.value.attempts) == 3
            assert caught.value.attempts[0].status is None
            assert client.pool.in_use == 0


async def test_an_outage_that_ends_is_survived(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A server that is restarted between two attempts answers the second."""
    await server.close()

    class Restart:
        def on_retry(self, event):
            self.task = asyncio.create_task(server.start())

    hook = Restart()
    policy = RetryPolicy(initial_delay=0.02, max_retries=50)
    assert (await client.with_options(retry=policy, hooks=[hook]).chat.completions.create(**ASK)).text


async def test_a_certificate_that_does_not_verify_is_never_retried() -> None:
    """A wrong certificate stays wrong, and may be an attack."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    async with ChatKoreServer(ssl=context) as server:  # noqa: SIM117
        async with AsyncChatKore(api_key="k", base_url=server.base_url) as client:
            with pytest.raises(APIConnectionError, match="does not verify") as caught:
                await client.chat.completions.create(**ASK)
            assert len(caught.value.attempts) == 1
            assert server.request_count == 0


async def test_a_failed_handshake_is_retried(server: ChatKoreServer) -> None:
    """Plain http where TLS is expected fails before anything was sent."""
    url = server.base_url.replace("http:", "https:")
    policy = RetryPolicy(initial_delay=0, retry_unconfirmed=False)
    async with AsyncChatKore(api_key="k", base_url=url, retry=policy) as client:
        with pytest.raises(APIConnectionError) as caught:
            await client.chat.completions.create(**ASK)
    assert len(caught.value.attempts) == 3


async def test_an_unknown_host_is_retried() -> None:
    """A name without an address may get one; the error names the host."""
    policy = RetryPolicy(initial_delay=0, retry_unconfirmed=False, max_retries=1)
    async with AsyncChatKore(api_key="k", base_url="https://nowhere.invalid", retry=policy, proxy=False) as client:
        with pytest.raises(APIConnectionError, match=r"nowhere\.invalid") as caught:
            await client.chat.completions.create(**ASK)
    assert len(caught.value.attempts) == 2


# When.


@pytest.mark.parametrize("header", ["retry-after", "retry-after-ms", "date"])
async def test_retry_after_is_kept(client: AsyncChatKore, server: ChatKoreServer, header: str) -> None:
    """A server is never asked again earlier than it said, and at most a tenth later."""
    if header == "date":
        # A date has whole seconds: the wait is up to a second shorter than what is asked here.
        when = datetime.now(UTC) + timedelta(seconds=1.2)
        headers = {"retry-after": format_datetime(when, usegmt=True)}
        at_least, at_most = 0.0, 1.2
    else:
        headers = {header: "100" if header == "retry-after-ms" else "0.1"}
        at_least, at_most = 0.1, 0.1
    server.script(error(429, headers=headers), completion("fine"))
    answer = await client.chat.completions.create(**ASK)
    waited = answer.meta.attempts[1].waited
    assert at_least <= waited <= at_most * 1.1
    first, second = server.requests
    assert second.received_at - first.received_at >= at_least


async def test_a_wait_that_is_too_long_is_not_waited(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """Above `max_retry_after` the error is raised, and says when to come back."""
    server.always(error(429, headers={"retry-after": "61"}))
    with pytest.raises(RateLimitError) as caught:
        await client.chat.completions.create(**ASK)
    assert (server.request_count, caught.value.retry_after) == (1, 61)
    server.always(error(429, headers={"retry-after": "0.01"}))
    with pytest.raises(RateLimitError):
        await client.with_options(retry=RetryPolicy(max_retry_after=0.001)).chat.completions.create(**ASK)
    assert server.request_count == 2


@pytest.mark.parametrize("nonsense", ["soon", "-1", "nan", "inf", "Wed, 21 Oct 2015 07:28:00 GMT"])
async def test_nonsense_in_retry_after_is_ignored(client: AsyncChatKore, server: ChatKoreServer, nonsense: str) -> None:
    """A wait that is none, or over, leaves the back-off to the policy."""
    server.script(error(503, headers={"retry-after": nonsense}), completion("fine"))
    answer = await client.chat.completions.create(**ASK)
    assert answer.meta.attempts[1].waited == 0


async def test_max_retries_is_a_count(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """`max_retries=0` asks once."""
    server.always(error(500))
    with pytest.raises(InternalServerError):
        await client.chat.completions.create(**ASK, max_retries=0)
    assert server.request_count == 1
    async with AsyncChatKore(api_key="k", base_url=server.base_url, max_retries=0) as other:
        with pytest.raises(InternalServerError):
            await other.chat.completions.create(**ASK)
    assert server.request_count == 2


# The budget.


async def test_an_empty_budget_ends_retries_and_says_so(server: ChatKoreServer) -> None:
    """In an outage retries fade out, over all calls and copies of a client, and successes fill the budget again."""
    policy = RetryPolicy(initial_delay=0, budget=RetryBudget(capacity=10, retry_cost=5, refund=5))
    async with AsyncChatKore(api_key="k", base_url=server.base_url, retry=policy) as client:
        server.always(error(503))
        with pytest.raises(InternalServerError) as caught:
            await client.chat.completions.create(**ASK)
        assert "budget" not in str(caught.value)
        assert server.request_count == 3
        with pytest.raises(InternalServerError, match="not retried further: the retry budget is empty"):
            await client.with_options(timeout=5).chat.completions.create(**ASK)
        assert server.request_count == 4
        server.always(None)
        await client.chat.completions.create(**ASK)
        server.script(error(503))
        assert (await client.chat.completions.create(**ASK)).text


async def test_a_timeout_draws_more_and_a_rate_limit_nothing(server: ChatKoreServer) -> None:
    """A 429 is no outage; a timeout is a bad one."""
    policy = RetryPolicy(initial_delay=0, budget=RetryBudget(capacity=9, retry_cost=5, timeout_cost=10))
    async with AsyncChatKore(api_key="k", base_url=server.base_url, retry=policy) as client:
        server.always(error(429))
        with pytest.raises(RateLimitError) as caught:
            await client.chat.completions.create(**ASK, max_retries=20)
        assert len(caught.value.attempts) == 21
        server.always(sse(Stall()))
        with pytest.raises(APITimeoutError, match="budget is empty"):
            await ask(client, "stream", timeout=Timeout(first_token=0.02))
        server.always(error(503))
        with pytest.raises(InternalServerError, match="budget is empty") as caught:
            await client.chat.completions.create(**ASK)
        assert len(caught.value.attempts) == 2


async def test_a_budget_can_be_disabled(server: ChatKoreServer) -> None:
    """`budget=None` retries as often as the policy says, always."""
    policy = RetryPolicy(initial_delay=0, max_retries=150, budget=None)
    async with AsyncChatKore(api_key="k", base_url=server.base_url, retry=policy) as client:
        server.always(error(503))
        with pytest.raises(InternalServerError) as caught:
            await client.chat.completions.create(**ASK)
    assert len(caught.value.attempts) == 151


# What is told.


async def test_a_retry_is_logged_at_info(
    client: AsyncChatKore, server: ChatKoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    """One line for each retry, none for a call that needs no retry or gets none."""
    caplog.set_level(logging.INFO, "chatkore_async")
    await client.chat.completions.create(**ASK)
    server.script(error(400))
    with pytest.raises(BadRequestError):
        await client.chat.completions.create(**ASK)
    assert not caplog.records
    server.always(error(409, "busy"))
    with pytest.raises(ConflictError):
        await client.chat.completions.create(**ASK)
    assert [record.getMessage() for record in caplog.records] == [
        f"attempt {number} failed (409 invalid_request_error: busy), the next follows in 0.00 s" for number in (1, 2)
    ]


async def test_the_same_bytes_are_sent_again(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A retry repeats the request exactly, large bodies included."""
    server.script(error(500), error(500))
    await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 2_000_000}])
    first, second, third = (request.body for request in server.requests)
    assert first == second == third
    assert len(first) > 2_000_000


async def test_a_call_that_is_cancelled_while_it_waits_is_not_retried(
    client: AsyncChatKore, server: ChatKoreServer
) -> None:
    """Cancellation during a back-off ends the call at once."""
    server.always(error(503, headers={"retry-after": "50"}))
    retried = asyncio.Event()

    class Seen:
        def on_retry(self, event):
            retried.set()

    task = asyncio.create_task(client.with_options(hooks=[Seen()]).chat.completions.create(**ASK))
    await retried.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert server.request_count == 1
    assert task.cancelling() == 1


async def test_a_stale_connection_is_survived(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A server that closes idle connections in the moment of the next request costs an attempt, not the call."""
    await client.chat.completions.create(**ASK)
    server.drop_idle_connections()
    assert (await client.chat.completions.create(**ASK)).text


async def test_a_configuration_error_in_a_retry_is_raised(client: AsyncChatKore, server: ChatKoreServer) -> None:
    """A key that cannot be had for the second attempt ends the call with that, not with the first failure."""
    keys = iter(["k1", ""])
    server.always(error(500))
    with pytest.raises(ConfigurationError):
        await client.with_options(api_key=lambda: next(keys)).chat.completions.create(**ASK)
    assert server.request_count == 1


async def test_a_stream_is_opened_by_a_retry_only_with_its_own_chunks(
    client: AsyncChatKore, server: ChatKoreServer
) -> None:
    """Nothing of a failed attempt's chunks reaches the reader or the merged completion."""
    first = {"id": "first", "choices": [{"delta": {"role": "tool"}}], "usage": {"total_tokens": 99}}
    server.script(events(first, Cut()), stream("fine", usage=False))
    async with client.chat.completions.stream(**ASK) as answer:
        final = await answer.get_final_completion()
    assert (final.id, final.choices[0].message.role, final.usage, final.text) == (
        "chatcmpl-scripted",
        "assistant",
        None,
        "fine",
    )


async def test_interrupted_events_for_an_awaited_call_count_as_lost(
    client: AsyncChatKore, server: ChatKoreServer
) -> None:
    """S12: an event stream for `create` that ends unfinished is an answer cut midway."""
    server.always(stream("Hi", finish_reason=None, done=False, usage=False))
    with pytest.raises(StreamInterruptedError):
        await client.chat.completions.create(**ASK)
    assert server.request_count == 2


def test_raw_replies_are_told_apart() -> None:
    """The cases above are what they claim to be."""
    assert isinstance(UNCONFIRMED["died before a byte"], Raw)


@pytest.mark.parametrize("status", [400, 500])
@pytest.mark.parametrize("body", [b'{"error": {"message": "no"}}', b"<html>", b"{}", b""])
async def test_a_failed_call_is_freed_at_once(server: ChatKoreServer, status: int, body: bytes) -> None:
    """No frame of ours is in a ring with the error it raises: memory does not wait for the garbage collector."""
    server.always(Reply(status=status, steps=(body,)))
    async with AsyncChatKore(api_key="test", base_url=server.base_url, retry=RetryPolicy(initial_delay=0)) as client:

        async def fail() -> None:
            with contextlib.suppress(APIError):
                await client.chat.completions.create(**ASK)

        await fail()
        gc.collect()
        gc.disable()
        try:
            await fail()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            left = [thing for thing in gc.garbage if isinstance(thing, (FrameType, BaseException, Call))]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert left == []
