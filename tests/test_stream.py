"""Streams: opened, read, left, cut, and what is told of how they ended."""

import asyncio
import contextlib
import gc
import logging
import threading
from collections.abc import AsyncGenerator

import msgspec
import pytest
from msgspec import UNSET

from chatkore_async import (
    APIConnectionError,
    APIError,
    APITimeoutError,
    AsyncChatKore,
    BadRequestError,
    ChatCompletionChunk,
    ChatStream,
    InternalServerError,
    InvalidResponseError,
    Limits,
    RateLimitError,
    StreamError,
    StreamInterruptedError,
    Timeout,
)
from chatkore_async._events import EventReader
from chatkore_async.testing import (
    ChatKoreServer,
    Cut,
    Hold,
    Pause,
    Ping,
    Reply,
    Reset,
    Stall,
    completion,
    compressed,
    error,
    events,
    html,
    json_reply,
    sse,
    stream,
    tool_call,
)

ASK = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}
DONE = b"data: [DONE]\n\n"


def delta(content: str | None = None, index: int = 0, finish: str | None = None, **more: object) -> dict[str, object]:
    return {"id": "c", "choices": [{"index": index, "delta": {"content": content, **more}, "finish_reason": finish}]}


def data(payload: object) -> bytes:
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


def with_steps(reply: Reply, *steps: object) -> Reply:
    return msgspec.structs.replace(reply, steps=(*reply.steps, *steps), framing="chunked")


async def turns(count: int = 20) -> None:
    """Let the loop do what it has to do."""
    for _ in range(count):
        await asyncio.sleep(0)


async def freed(client: AsyncChatKore) -> None:
    """Wait until no connection is in use."""
    async with asyncio.timeout(5):
        while client.pool.in_use:  # noqa: ASYNC110 - not ours to signal
            await asyncio.sleep(0)


@pytest.fixture
def completions(client: AsyncChatKore):
    return client.chat.completions


# Opening.


async def test_a_stream_opens_with_its_block(completions, server: ChatKoreServer) -> None:
    """`stream()` itself sends nothing; entering the block sends, and waits for the first delta."""
    answer = completions.stream(**ASK)
    assert repr(answer) == "<ChatStream not opened>"
    assert answer.meta.attempts == ()
    assert answer.snapshot.choices == []
    await turns()
    assert server.request_count == 0
    async with answer as same:
        assert same is answer
        assert repr(answer) == "<ChatStream open>"
        assert answer.meta.timings.first_token > 0
        assert repr(answer._reader).startswith("<EventReader ")
        await answer.open()
    assert server.request_count == 1
    assert repr(answer) == "<ChatStream left>"


@pytest.mark.parametrize("step", ["for", "anext", "asend", "text", "final"])
async def test_a_stream_opens_lazily(completions, server: ChatKoreServer, step: str) -> None:
    """Without a block the first step opens the stream."""
    server.script(stream(["Hi", " you"]))
    answer = completions.stream(**ASK)
    if step == "for":
        got = "".join([chunk.text async for chunk in answer])
    elif step == "text":
        got = "".join([text async for text in answer.text_stream])
    elif step == "final":
        got = (await answer.get_final_completion()).text
    else:
        got = ""
        with contextlib.suppress(StopAsyncIteration):
            while True:
                got += (await (anext(answer) if step == "anext" else answer.asend(None))).text
    assert got == "Hi you"
    assert repr(answer) == "<ChatStream complete>"


async def test_a_stream_is_an_async_generator(completions) -> None:
    """What takes an `AsyncGenerator` takes a stream."""
    answer = completions.stream(**ASK)
    assert isinstance(answer, AsyncGenerator)
    assert isinstance(answer, ChatStream)
    with pytest.raises(TypeError, match="only None"):
        await answer.asend("x")
    async with contextlib.aclosing(answer):
        assert isinstance(await anext(answer), ChatCompletionChunk)


async def test_chunks_before_the_first_delta_are_held(completions, server: ChatKoreServer) -> None:
    """Nothing is handed out before the first delta, and nothing is lost by that."""
    held = asyncio.Event()
    server.script(
        events(
            {"choices": [], "prompt_filter_results": []},
            delta("", role="assistant"),
            Hold(held),
            delta("Hi"),
            delta(finish="stop"),
        )
    )
    answer = completions.stream(**ASK)
    first = asyncio.create_task(anext(answer))
    await server.wait_for_requests(1)
    await turns(50)
    assert not first.done()
    held.set()
    chunks = [await first, *[chunk async for chunk in answer]]
    assert [len(chunk.choices) for chunk in chunks] == [0, 1, 1, 1]
    assert [chunk.text for chunk in chunks] == ["", "", "Hi", ""]


@pytest.mark.parametrize(
    "first",
    [
        delta("text"),
        delta(reasoning_content="thought"),
        delta(refusal="no"),
        delta(tool_calls=[{"index": 0, "id": "a", "function": {"name": "f"}}]),
        delta(finish="stop"),
    ],
)
async def test_what_a_first_delta_is(completions, server: ChatKoreServer, first: object) -> None:
    """Content, reasoning, refusal, a tool call or a finish reason open a stream."""
    server.script(events(delta("", role="assistant"), first, Stall()))
    async with completions.stream(**ASK) as answer:
        assert answer.meta.timings.first_token is not None
        assert answer.completeness is None


# Reading.


async def test_a_chunk_shows_its_bytes(completions, server: ChatKoreServer) -> None:
    """`chunk.raw` is the event's data as it came, and `to_dict()` has the vendor's fields."""
    sent = {**delta("Hi", finish="stop"), "vendor": {"a": 1}}
    server.script(events(sent))
    async for chunk in completions.stream(**ASK):
        assert chunk.raw == msgspec.json.encode(sent)
        assert chunk.to_dict() == sent
        assert chunk.choices[0].delta.content == "Hi"


async def test_text_stream_has_only_text(completions, server: ChatKoreServer) -> None:
    """`text_stream` leaves out roles, tool calls and the end."""
    server.script(stream("one two", tool_calls=[tool_call("f", {"a": 1})]))
    async with completions.stream(**ASK) as answer:
        assert [text async for text in answer.text_stream] == ["one", " two"]
        final = await answer.get_final_completion()
    assert final.tool_calls[0].function.arguments == '{"a":1}'
    assert final.choices[0].finish_reason == "tool_calls"


async def test_the_snapshot_is_what_was_handed_out(completions, server: ChatKoreServer) -> None:
    """`snapshot` grows with the chunks taken, and an old one does not change."""
    server.script(stream(["a", "b", "c"]))
    async with completions.stream(**ASK) as answer:
        assert answer.snapshot.text == ""
        seen = [answer.snapshot async for _ in answer]
    assert [snapshot.text for snapshot in seen] == ["", "a", "ab", "abc", "abc"]
    assert seen[-1].meta.attempts[0].status == 200
    assert answer.snapshot.usage.total_tokens > 0


async def test_a_long_stream_is_merged_in_batches(completions, server: ChatKoreServer) -> None:
    """However long a stream is, its chunks are not kept."""
    pieces = [f"{number} " for number in range(500)]
    server.script(stream(pieces))
    async with completions.stream(**ASK) as answer:
        longest = 0
        async for _ in answer:
            longest = max(longest, len(answer._merged.pending))
        assert (await answer.get_final_completion()).text == "".join(pieces)
    assert longest < 500


async def test_break_and_continue_in_the_block(completions, server: ChatKoreServer) -> None:
    """A loop that was left can be taken up by another, in any of the ways, and no chunk is lost or doubled."""
    server.script(stream(list("abcdefgh")))
    got = []
    async with completions.stream(**ASK) as answer:
        async for chunk in answer:
            got.append(chunk.text)
            if chunk.text == "b":
                break
        got.append((await anext(answer)).text)
        async for text in answer.text_stream:
            got.append(text)
            if text == "e":
                break
        got += [chunk.text async for chunk in answer]
        assert [chunk async for chunk in answer] == []
        with pytest.raises(StopAsyncIteration):
            await anext(answer)
    assert "".join(got) == "abcdefgh"


@pytest.mark.parametrize("way", ["async for", "anext"])
async def test_who_waits_holds_no_chunks(completions, server: ChatKoreServer, way: str) -> None:
    """However long the stream and however slow: what was handed out is merged before the next is waited for."""
    gate = asyncio.Event()
    server.script(events(*[delta("a")] * 8, Hold(gate), delta("b"), delta(finish="stop")))
    async with completions.stream(**ASK) as answer:
        chunks = aiter(answer) if way == "async for" else answer
        got = [(await anext(chunks)).text for _ in range(8)]
        waiting = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0)
        assert answer._merged.pending == []
        gate.set()
        got.append((await waiting).text)
    assert "".join(got) == "aaaaaaaab"


async def test_every_common_and_rare_form_comes_through_anext(completions, server: ChatKoreServer) -> None:
    """`anext` and `async for` read the same: strict chunks, tolerant ones, pings and named events."""
    forms = (
        data(delta("a")),
        b": PING\n\ndata:\n\nevent: ping\ndata: {}\n\n",
        data({"choices": [{"delta": {"content": [{"type": "text", "text": "b"}]}}]}),
        b"event: message\n" + data(delta("c")),
        data({"type": "ping"}),
        data({"choices": []}),
        data(delta(finish="stop")),
        data({"choices": [], "usage": {"total_tokens": 3}}),
        DONE,
    )
    server.script(sse(*forms), sse(*forms), sse(b"".join(forms)), sse(b"".join(forms)))
    for _ in range(2):
        async with completions.stream(**ASK) as answer:
            looped = [chunk.text async for chunk in answer]
        stepped = []
        async with completions.stream(**ASK) as answer:
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    stepped.append((await anext(answer)).text)
        assert looped == stepped == ["a", "b", "c", "", ""]
        assert answer.snapshot.usage.total_tokens == 3


# The final completion.


async def test_the_final_completion_has_it_all(completions, server: ChatKoreServer) -> None:
    """Text, reasoning, tool calls, several choices and usage are merged."""
    server.script(
        events(
            delta("He", role="assistant"),
            delta("A", 1),
            delta("llo", reasoning_content="hm"),
            delta(
                tool_calls=[{"index": 0, "id": "t", "type": "function", "function": {"name": "f", "arguments": "{"}}]
            ),
            delta(tool_calls=[{"index": 0, "function": {"arguments": "}"}}]),
            delta(finish="tool_calls"),
            delta("B", 1, finish="stop"),
            {"choices": [], "usage": {"total_tokens": 7}},
        )
    )
    async with completions.stream(**ASK) as answer:
        final = await answer.get_final_completion()
    first, second = final.choices
    assert (first.message.content, first.message.reasoning_content, second.message.content) == ("Hello", "hm", "AB")
    assert (first.message.tool_calls[0].function.arguments, final.usage.total_tokens) == ("{}", 7)
    assert (final.completeness, answer.completeness) == ("complete", "complete")
    assert final.meta.attempts[0].error is None
    assert (await answer.get_final_completion()) == final


async def test_the_final_completion_after_a_failure_is_that_failure(completions, server: ChatKoreServer) -> None:
    """A stream that failed has no final completion, only its error, again and again."""
    server.script(stream(["a", Reset()]))
    async with completions.stream(**ASK) as answer:
        with pytest.raises(StreamInterruptedError) as first:
            await answer.get_final_completion()
        with pytest.raises(StreamInterruptedError) as second:
            await answer.get_final_completion()
    assert first.value is second.value
    server.script(error(400))
    answer = completions.stream(**ASK)
    with pytest.raises(BadRequestError):
        await answer.open()
    with pytest.raises(BadRequestError):
        await answer.get_final_completion()


@pytest.mark.parametrize("when", ["before", "after"])
async def test_the_final_completion_of_a_stream_that_was_left(completions, server: ChatKoreServer, when: str) -> None:
    """A stream that was left before its end says so, with what it had delivered."""
    server.script(stream(["a", "b", Stall()]))
    answer = completions.stream(**ASK)
    if when == "after":
        assert (await anext(answer)).text == ""
        assert (await anext(answer)).text == "a"
    await answer.aclose()
    await answer.aclose()
    with pytest.raises(StreamError, match="left before its end") as caught:
        await answer.get_final_completion()
    assert caught.value.partial.text == ("a" if when == "after" else "")
    assert answer.completeness is None
    assert server.request_count == (1 if when == "after" else 0)


async def test_the_final_completion_of_a_stream_whose_opening_was_cancelled(
    completions, server: ChatKoreServer
) -> None:
    """An old cancellation does not cancel whoever asks later."""
    server.script(sse(Stall()))
    answer = completions.stream(**ASK)
    opening = asyncio.create_task(answer.open())
    await server.wait_for_requests(1)
    opening.cancel()
    await asyncio.wait([opening])
    with pytest.raises(StreamError, match="left before its end"):
        await answer.get_final_completion()


# How it ended.


@pytest.mark.parametrize(
    "reply, completeness",
    [
        (stream("Hi"), "complete"),
        (stream("Hi", done=False), "complete"),
        (stream("Hi", done=False, usage=False), "complete"),
        (with_steps(stream("Hi", done=False, usage=False), Cut()), "complete"),
        (with_steps(stream("Hi", done=False, usage=False), Reset()), "complete"),
        (stream("Hi", finish_reason="length"), "complete"),
        (stream("Hi", finish_reason=None), "unconfirmed"),
        (stream("Hi", finish_reason=None, usage=False), "unconfirmed"),
        (stream("Hi", finish_reason=None, done=False), "unconfirmed"),
        (stream("Hi", finish_reason=""), "unconfirmed"),
        (events(delta("a"), delta("b", 1), delta(finish="stop")), "unconfirmed"),
        (events(delta("a", finish="stop"), delta("b", 1, finish="stop")), "complete"),
        (sse(data(delta("a")), b"event: done\ndata: {}\n\n"), "unconfirmed"),
        (sse(data(delta("a")), b"data:[DONE]\n\n"), "unconfirmed"),
        (sse(data(delta("a")), b"data:   [DONE]  \r\n\r\n"), "unconfirmed"),
    ],
)
async def test_completeness(
    completions, server: ChatKoreServer, reply: Reply, completeness: str, caplog: pytest.LogCaptureFixture
) -> None:
    """S4, S5: complete when every started choice finished; unconfirmed, with a warning, when only the server says so."""
    server.script(reply)
    async with completions.stream(**ASK) as answer:
        async for _ in answer:
            assert answer.completeness is None
    assert answer.completeness == completeness
    assert answer.snapshot.completeness == completeness
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == (completeness == "unconfirmed")
    assert all("without a finish reason" in record.getMessage() for record in warnings)


@pytest.mark.parametrize("end", [(), (Cut(),), (Reset(),), (b'data: {"choices": [{"del', Cut())])
async def test_a_truncated_stream_is_an_error(completions, server: ChatKoreServer, end: tuple[object, ...]) -> None:
    """S6: an end before the finish reason raises, however politely the server ended, with what had come."""
    whole = stream("Hello there", finish_reason=None, done=False, usage=False)
    server.script(with_steps(whole, *end))
    got = []
    with pytest.raises(StreamInterruptedError) as caught:
        async for chunk in completions.stream(**ASK):
            got.append(chunk.text)  # noqa: PERF401 - what came before the error counts
    assert "".join(got) == caught.value.partial.text == "Hello there"
    assert caught.value.attempts[0].error == "StreamInterruptedError"
    assert server.request_count == 1


async def test_the_silence_before_a_break_is_a_gap_as_well(completions, server: ChatKoreServer) -> None:
    """The longest wait is told whether an event or the end of the connection ended it."""
    pause = Pause(0.2)
    server.script(events(delta("a"), pause, delta("b"), pause, delta("c"), pause, Cut()))
    with pytest.raises(StreamInterruptedError) as caught:
        async for _ in completions.stream(**ASK):
            pass
    assert caught.value.partial.text == "abc"
    assert 0.1 < caught.value.meta.timings.max_gap < 0.4


async def test_truncation_is_told_by_completeness(completions, server: ChatKoreServer) -> None:
    """`completeness` is "truncated" after a cut, a stall, and an error in the middle alike."""
    for end in ((Cut(),), (data({"error": {"message": "x"}}),)):
        server.script(with_steps(stream("Hi", finish_reason=None, done=False, usage=False), *end))
        async with completions.stream(**ASK) as answer:
            with pytest.raises(APIError):
                await answer.get_final_completion()
        assert answer.completeness == "truncated"
        assert repr(answer) == "<ChatStream truncated>"


async def test_usage_at_the_beginning_confirms_nothing(completions, server: ChatKoreServer) -> None:
    """A usage chunk before the first delta does not say that the server was done."""
    server.script(events({"choices": [], "usage": {"prompt_tokens": 9}}, delta("Hi"), Cut()))
    with pytest.raises(StreamInterruptedError):
        await completions.stream(**ASK).get_final_completion()


async def test_nothing_received_is_lost_in_a_reset(completions, server: ChatKoreServer) -> None:
    """Deltas that had arrived when the connection broke are handed out before the break is raised."""
    server.script(
        sse(*stream(list("abcdefgh"), finish_reason=None, done=False, usage=False).steps, Hold(asyncio.Event()))
    )
    got = ""
    with pytest.raises(StreamInterruptedError, match="broke off") as caught:
        async with completions.stream(**ASK) as answer:
            async for chunk in answer:
                got += chunk.text
                if chunk.text == "a":
                    await turns(100)
                    await server.close()
                    await server.requests[0].finished()
                    await turns()
    assert got == caught.value.partial.text == "abcdefgh"


# Usage.


@pytest.mark.parametrize(
    "options, sent",
    [
        ({}, {"include_usage": True}),
        ({"stream_options": {"include_usage": False}}, {"include_usage": False}),
        ({"stream_options": {"include_usage": True}}, {"include_usage": True}),
        ({"stream_options": None}, None),
        ({"extra_body": {"stream_options": {"include_usage": True}}}, {"include_usage": True}),
        ({"stream_options": UNSET}, "nothing"),
    ],
)
async def test_usage_is_asked_for_and_hidden(
    completions, server: ChatKoreServer, options: dict[str, object], sent: object
) -> None:
    """Usage is asked for unless the caller says what to do, and its chunk is shown to those only who asked for it."""
    server.script(stream("Hi"))
    async with completions.stream(**ASK, **options) as answer:
        chunks = [chunk async for chunk in answer]
        final = await answer.get_final_completion()
    assert server.requests[0].json.get("stream_options", "nothing") == sent
    assert server.requests[0].json["stream"] is True
    assert all(chunk.choices for chunk in chunks) == (options == {})
    assert final.usage.total_tokens > 0


# Leaving.


@pytest.mark.parametrize("way", ["block", "aclose", "athrow", "exception"])
async def test_leaving_frees_the_connection_at_once(
    client: AsyncChatKore, completions, server: ChatKoreServer, way: str
) -> None:
    """Whoever leaves early holds nothing afterwards, without waiting for anything."""
    server.script(stream(["a", Stall()]))
    if way == "aclose":
        answer = completions.stream(**ASK)
        await anext(answer)
        assert client.pool.in_use == 1
        await answer.aclose()
    elif way == "athrow":
        answer = completions.stream(**ASK)
        await anext(answer)
        with pytest.raises(KeyError):
            await answer.athrow(KeyError("x"))
    else:
        with contextlib.suppress(ZeroDivisionError):
            async with completions.stream(**ASK) as answer:
                await anext(answer)
                assert client.pool.in_use == 1
                if way == "exception":
                    1 / 0  # noqa: B018
    assert client.pool.in_use == 0
    assert await server.requests[0].finished() == "gone"
    assert [chunk async for chunk in answer] == []
    with pytest.raises(StopAsyncIteration):
        await anext(answer)


async def test_leaving_awaits_nothing(completions, server: ChatKoreServer) -> None:
    """Frameworks cancel again at every await of a clean-up: there is none."""
    server.script(stream(["a", Stall()]))
    answer = completions.stream(**ASK)
    await anext(answer)
    for leaving in (answer.aclose(), answer.__aexit__(None, None, None)):
        with pytest.raises(StopIteration):
            leaving.send(None)


async def test_athrow_raises_what_is_thrown(completions) -> None:
    """`athrow` takes what the method of a generator takes."""
    original = ValueError("kept")
    for thrown, message in (
        ((original,), "kept"),
        ((ValueError, ValueError("value")), "value"),
        ((ValueError, "text"), "text"),
        ((ValueError,), ""),
        ((ValueError, None, None), ""),
    ):
        with pytest.raises(ValueError) as caught:
            await completions.stream(**ASK).athrow(*thrown)
        assert str(caught.value) == message
    try:
        raise original
    except ValueError as error:
        traceback = error.__traceback__
    with pytest.raises(ValueError) as caught:
        await completions.stream(**ASK).athrow(ValueError, ValueError("x"), traceback)
    frames = []
    at = caught.value.__traceback__
    while at is not None:
        frames.append(at)
        at = at.tb_next
    assert traceback in frames


async def test_a_bare_loop_that_breaks_frees_when_collected(
    client: AsyncChatKore, completions, server: ChatKoreServer
) -> None:
    """Without a block, the connection is freed when nobody holds the stream any more."""
    server.always(stream(["a", Stall()]))
    async for _ in completions.stream(**ASK):
        break
    gc.collect()
    await freed(client)
    async for _ in completions.stream(**ASK).text_stream:
        break
    gc.collect()
    await freed(client)
    answer = completions.stream(**ASK)
    async for _ in answer:
        break
    assert client.pool.in_use == 1
    del answer
    gc.collect()
    await freed(client)


async def test_a_stream_collected_in_another_thread_frees_its_connection(
    client: AsyncChatKore, completions, server: ChatKoreServer
) -> None:
    """The collector runs in whichever thread it likes."""
    server.script(stream(["a", Stall()]))
    held = [completions.stream(**ASK)]
    await anext(held[0])
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    await freed(client)


def test_a_stream_may_outlive_its_loop() -> None:
    """A stream that is collected after its loop was closed harms nobody."""
    kept = []
    ends = []

    class Ends:
        def on_call_end(self, event):
            ends.append(event.outcome)

    async def main() -> None:
        async with ChatKoreServer() as server:
            server.script(stream(["a", Stall()]))
            client = AsyncChatKore(api_key="k", base_url=server.base_url, hooks=[Ends()])
            answer = client.chat.completions.stream(**ASK)
            await anext(answer)
            kept.append(answer)

    asyncio.run(main())
    kept.clear()
    gc.collect()
    assert ends == ["left"]


async def test_cancellation_frees_the_connection(client: AsyncChatKore, completions, server: ChatKoreServer) -> None:
    """A reader that is cancelled while it waits leaves nothing behind, and nothing to read."""
    server.script(stream(["a", Stall()]))
    answer = completions.stream(**ASK)
    await anext(answer)
    await anext(answer)
    task = asyncio.create_task(anext(answer))
    await turns()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert client.pool.in_use == 0
    assert [chunk async for chunk in answer] == []


@pytest.mark.parametrize("way", ["create", "stream", "anext", "retried", "limited", "bare"])
async def test_cancellation_at_every_await(client: AsyncChatKore, server: ChatKoreServer, way: str) -> None:
    """Cancelled after any turn of the loop, a call frees its place at once, and the next call works."""
    client = client.with_options(max_retries=1)
    completions = client.chat.completions
    limited = AsyncChatKore(
        api_key="k", base_url=server.base_url, limits=Limits(max_connections=2, max_connections_per_host=1)
    )

    async def work() -> None:
        if way == "create":
            await completions.create(**ASK)
        elif way == "limited":
            await asyncio.gather(*(limited.chat.completions.create(**ASK) for _ in range(3)))
        elif way == "anext":
            answer = completions.stream(**ASK)
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    await anext(answer)
        elif way == "bare":
            async for _ in completions.stream(**ASK):
                pass
        else:
            async with completions.stream(**ASK) as answer:
                await answer.get_final_completion()

    finished = 0
    for turn in range(200):
        if way == "retried":
            server.script(error(503))
        else:
            # One write for each step: many turns of the loop.
            server.script(stream(["a", "b", "c"]) if way in ("stream", "anext", "bare") else completion())
        task = asyncio.create_task(work())
        await turns(turn)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
            finished += 1
        if way == "limited":
            await turns(3)
        assert client.pool.in_use == limited.pool.in_use == limited.pool.waiting == 0
        assert len(client._manager.pool().deadlines) == 0
        server.clear()
        if finished > 20:
            break
    assert finished
    assert (await completions.create(**ASK)).text
    if way == "limited":
        assert (await limited.chat.completions.create(**ASK)).text
    await limited.close()


async def test_leaving_while_another_task_reads(client: AsyncChatKore, completions, server: ChatKoreServer) -> None:
    """`aclose()` from elsewhere ends the reader's loop, with no chunk after it and no error."""
    held = asyncio.Event()
    server.script(stream(["a", "b", Hold(held)]))
    answer = completions.stream(**ASK)
    got = []

    async def read() -> None:
        async for chunk in answer:
            got.append(chunk.text)  # noqa: PERF401 - looked at meanwhile

    task = asyncio.create_task(read())
    while "b" not in got:  # noqa: ASYNC110 - not ours to signal
        await asyncio.sleep(0)
    await turns()
    await answer.aclose()
    assert client.pool.in_use == 0
    await task
    assert got == ["", "a", "b"]
    assert answer.completeness is None


@pytest.mark.parametrize("reply", [sse(Stall()), events(delta("", role="assistant"), Stall())])
async def test_leaving_while_another_task_opens(
    client: AsyncChatKore, completions, server: ChatKoreServer, reply: Reply
) -> None:
    """`aclose()` frees the connection at once also while the first token is awaited; the opener finds an end."""
    server.script(reply)
    answer = completions.stream(**ASK)

    async def read() -> tuple[list[object], int]:
        got = [chunk async for chunk in answer]
        return got, asyncio.current_task().cancelling()

    task = asyncio.create_task(read())
    await server.wait_for_requests(1)
    await turns(50)
    await answer.aclose()
    assert await task == ([], 0)
    assert client.pool.in_use == 0
    assert await server.requests[0].finished() == "gone"


async def test_leaving_and_cancelling_the_opener_is_a_cancellation(
    client: AsyncChatKore, completions, server: ChatKoreServer
) -> None:
    """Whoever is cancelled, too, while its stream is closed under it, stays cancelled."""
    server.script(sse(Stall()))
    answer = completions.stream(**ASK)
    task = asyncio.create_task(answer.open())
    await server.wait_for_requests(1)
    await answer.aclose()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert client.pool.in_use == 0


async def test_two_readers_are_told_apart(completions, server: ChatKoreServer) -> None:
    """A stream is read by one task at a time: the second is told so, and the first loses nothing."""
    opening, reading = asyncio.Event(), asyncio.Event()
    server.script(
        events(delta("", role="assistant"), Hold(opening), delta("a"), Hold(reading), delta("b", finish="stop"))
    )
    answer = completions.stream(**ASK)

    async def read() -> str:
        return "".join([chunk.text async for chunk in answer])

    async def refused() -> None:
        for step in (read, answer.__anext__, answer.open, answer.get_final_completion):
            if step != answer.open or not opening.is_set():
                with pytest.raises(RuntimeError, match="read by another task"):
                    await step()

    first = asyncio.create_task(read())
    await server.wait_for_requests(1)
    await turns(50)
    await refused()
    opening.set()
    while answer.snapshot.text != "a":  # noqa: ASYNC110 - not ours to signal
        await asyncio.sleep(0)
    await turns(50)
    await refused()
    reading.set()
    assert await first == "ab"


async def test_a_second_loop_that_goes_on_later_is_told_too(completions, server: ChatKoreServer) -> None:
    """Two loops over one stream are fine in turns, and an error once one of them waits."""
    held = asyncio.Event()
    server.script(events(delta("a"), delta("b"), Hold(held), delta("c", finish="stop")))
    answer = completions.stream(**ASK)
    first, second = aiter(answer), aiter(answer)
    assert (await anext(first)).text == "a"
    assert (await anext(second)).text == "b"
    waiting = asyncio.create_task(anext(first))
    await turns()
    with pytest.raises(RuntimeError, match="read by another task"):
        await anext(second)
    held.set()
    assert (await waiting).text == "c"
    await answer.aclose()


async def test_a_stream_left_before_it_was_opened_is_over(completions, server: ChatKoreServer) -> None:
    """Nothing is sent for a stream that was closed first."""
    answer = completions.stream(**ASK)
    await answer.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(answer)
    assert [chunk async for chunk in answer] == []
    await answer.open()
    assert server.request_count == 0


# Connections.


async def test_twenty_streams_use_one_connection(client: AsyncChatKore, completions, server: ChatKoreServer) -> None:
    """After a clean end the connection goes back to the pool."""
    for _ in range(20):
        async with completions.stream(**ASK) as answer:
            async for _ in answer:
                pass
        assert client.pool.in_use == 0
    assert len(server.connections) == 1
    assert (client.pool.created, client.pool.reused, client.pool.idle) == (1, 19, 1)


async def test_little_after_done_is_read_off(client: AsyncChatKore, completions, server: ChatKoreServer) -> None:
    """S8: a few bytes after `[DONE]` do not cost the connection, and are nobody's chunks."""
    server.always(with_steps(stream("Hi"), b": bye\n\n", data(delta("late")), b"x" * 1000))
    for _ in range(3):
        assert (await completions.stream(**ASK).get_final_completion()).text == "Hi"
    assert len(server.connections) == 1


async def test_much_after_done_is_not_read(client: AsyncChatKore, completions, server: ChatKoreServer) -> None:
    """S8: a flood after `[DONE]` closes the connection, and is not waited for again."""
    server.always(with_steps(stream("Hi"), *[b"x" * 20_000] * 50))
    for _ in range(2):
        assert (await completions.stream(**ASK).get_final_completion()).text == "Hi"
        assert client.pool.in_use == 0
    assert len(server.connections) == 2


async def test_a_host_that_never_ends_is_remembered(client: AsyncChatKore, completions, server: ChatKoreServer) -> None:
    """S8: a connection that stays open after `[DONE]` costs a quarter of a second once."""
    server.always(with_steps(stream("Hi"), Stall()))
    took = []
    for _ in range(3):
        async with completions.stream(**ASK) as answer:
            await answer.get_final_completion()
        took.append(answer.meta.timings.total)
        assert answer.completeness == "complete"
    assert took[0] >= 0.25
    assert min(took[1:]) < 0.25
    server.always(None)
    await completions.stream(**ASK).get_final_completion()


@pytest.mark.parametrize("end", [Cut(), Reset()])
async def test_a_connection_that_breaks_after_done_says_nothing_of_its_host(
    client: AsyncChatKore, completions, server: ChatKoreServer, end: object
) -> None:
    """One broken connection does not cost all later ones their reuse."""
    server.script(with_steps(stream("Hi"), Pause(0.02), end))
    assert (await completions.stream(**ASK).get_final_completion()).text == "Hi"
    assert not client._manager.pool().never_ending
    assert client.pool.in_use == 0


async def test_cancellation_while_the_rest_is_read_off(
    client: AsyncChatKore, completions, server: ChatKoreServer
) -> None:
    """A reader cancelled after the last chunk frees the connection, and the stream stays complete."""
    server.script(with_steps(stream("Hi"), Stall()))
    answer = completions.stream(**ASK)
    task = asyncio.create_task(answer.get_final_completion())
    while answer.completeness is None:  # noqa: ASYNC110 - not ours to signal
        await asyncio.sleep(0)
    await turns(5)
    assert client.pool.in_use == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert client.pool.in_use == 0
    assert answer.completeness == "complete"
    assert not client._manager.pool().never_ending


# Errors inside.

ERROR_EVENTS = [
    (data({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}), RateLimitError, 429),
    (data({"error": {"message": "no", "code": 400}}), BadRequestError, 400),
    (data({"object": "error", "message": "slow down", "code": 429}), RateLimitError, 429),
    (b'event: error\ndata: {"message": "slow down", "code": "rate_limit_exceeded"}\n\n', RateLimitError, 429),
    (b"event: error\ndata: it broke\n\n", InternalServerError, 200),
    (b'error: {"code": 500, "message": "it broke"}\n\n', InternalServerError, 500),
    (data({"error": {"message": "it broke"}, "choices": []}), InternalServerError, 200),
    (b'{"error": {"message": "slow down", "code": "rate_limit_exceeded"}}', RateLimitError, 429),
    (b'\n\n{"error": {"message": "slow down", "code": "rate_limit_exceeded"}}\n', RateLimitError, 429),
]


@pytest.mark.parametrize("step", ["for", "anext"])
@pytest.mark.parametrize("event, kind, status", ERROR_EVENTS)
async def test_an_error_event_is_raised(  # noqa: PLR0917
    completions, server: ChatKoreServer, event: bytes, kind: type[APIError], status: int, step: str
) -> None:
    """S1, S3: an error in a stream is typed, after the first delta with `.partial`, and never a chunk."""
    for before, partial in ((sse(Ping(), event), None), (sse(data(delta("Hi")), Ping(), event), "Hi")):
        server.clear()
        server.always(before)
        answer = completions.stream(**ASK, max_retries=0)
        with pytest.raises(kind) as caught:
            if step == "for":
                async for chunk in answer:
                    assert chunk.text == "Hi"
            else:
                while True:
                    assert (await anext(answer)).text == "Hi"
        assert caught.value.status_code == status
        assert (caught.value.partial and caught.value.partial.text) == partial
        assert caught.value.meta.attempts[-1].error == kind.__name__
        assert server.request_count == 1


async def test_an_error_status_for_a_stream(completions, server: ChatKoreServer) -> None:
    """An error status is read whatever its content type says, and a page with status 200 is no stream."""
    server.script(
        error(429, code="x", headers={"Content-Type": "text/event-stream", "retry-after": "99"}),
        Reply(status=204),
        html(200, "Relay"),
    )
    with pytest.raises(RateLimitError):
        await completions.stream(**ASK).open()
    with pytest.raises(InvalidResponseError):
        await completions.stream(**ASK, max_retries=0).open()
    with pytest.raises(InvalidResponseError, match=r"web page \(Relay\).*base_url"):
        await completions.stream(**ASK).open()


async def test_what_is_not_json_is_raised_with_its_text(completions, server: ChatKoreServer) -> None:
    """S11: a Python exception's text in an event is an `InvalidResponseError` with text and `.partial`."""
    server.script(events(delta("Hi"), b"RuntimeError: CUDA out of memory"))
    with pytest.raises(InvalidResponseError, match="CUDA out of memory") as caught:
        await completions.stream(**ASK).get_final_completion()
    assert caught.value.body == "RuntimeError: CUDA out of memory"
    assert caught.value.partial.text == "Hi"


async def test_text_that_is_no_event_stream_is_told(completions, server: ChatKoreServer) -> None:
    """A body of plain text, or JSON of another kind, is what it would be to an awaited call: shown, not retried."""
    server.script(sse(b"Bad gateway, sorry"), json_reply("maintenance"))
    for text in ("Bad gateway, sorry", "maintenance"):
        with pytest.raises(InvalidResponseError, match=text):
            await completions.stream(**ASK).open()
    server.script(sse(b"\n\n" + completion("Hi").body.replace(b"{", b" {", 1), framing="close"))
    assert (await completions.stream(**ASK).get_final_completion()).text == "Hi"


async def test_a_completion_after_a_ping_is_no_stream(completions, server: ChatKoreServer) -> None:
    """A completion without `data:` after a comment has no delta, and is not taken for one."""
    server.always(sse(Ping(), completion("Hi").body))
    with pytest.raises(InvalidResponseError, match="without a delta"):
        await completions.stream(**ASK).open()
    assert server.request_count == 2


@pytest.mark.parametrize("content_type", ["text/event-stream", "application/json", "text/plain"])
async def test_a_whole_completion_becomes_a_stream(completions, server: ChatKoreServer, content_type: str) -> None:
    """S12: a JSON completion in answer to a stream is one chunk, whatever its content type."""
    server.script(completion("Hi there", tool_calls=[tool_call("f")], headers={"Content-Type": content_type}))
    async with completions.stream(**ASK) as answer:
        assert [chunk.text async for chunk in answer] == ["Hi there"]
        final = await answer.get_final_completion()
    assert (final.text, final.tool_calls[0].function.name, answer.completeness) == ("Hi there", "f", "complete")
    assert final.usage.total_tokens > 0


@pytest.mark.parametrize("content_type", ["application/json", "", "text/html"])
async def test_the_content_type_is_only_a_hint(completions, server: ChatKoreServer, content_type: str) -> None:
    """S12: a stream is one by its bytes."""
    server.script(msgspec.structs.replace(stream("Hi"), headers=(("Content-Type", content_type),)))
    assert (await completions.stream(**ASK).get_final_completion()).text == "Hi"


# Bytes.


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_stream_is_decoded_as_it_comes(completions, server: ChatKoreServer, encoding: str) -> None:
    """S13: a server that compresses unasked is read all the same, delta by delta."""
    held = asyncio.Event()
    server.script(compressed(stream(["a", Hold(held), "b"]), encoding))
    async with completions.stream(**ASK) as answer:
        assert server.requests[0].headers["accept-encoding"] == "identity"
        assert server.requests[0].headers["accept"] == "text/event-stream"
        async for chunk in answer:
            if chunk.text == "a":
                held.set()
    assert answer.snapshot.text == "ab"


async def test_broken_compression_is_a_clear_error(completions, server: ChatKoreServer) -> None:
    """S13: bytes that are not what their encoding says are an error of ours."""
    reply = stream("Hi")
    server.always(msgspec.structs.replace(reply, headers=(*reply.headers, ("Content-Encoding", "gzip"))))
    with pytest.raises(APIError) as caught:
        await completions.stream(**ASK).open()
    assert isinstance(caught.value, InvalidResponseError | APIConnectionError)
    with pytest.raises(APIError):
        await completions.create(**ASK)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
async def test_one_byte_at_a_time(completions, server: ChatKoreServer, newline: bytes) -> None:
    """However the bytes are split, the chunks are the same."""
    whole = b"".join(stream("Grüße, 世界 \u2028!").steps).replace(b"\n", newline)
    server.script(sse(*[whole[at : at + 1] for at in range(len(whole))]))
    assert (await completions.stream(**ASK).get_final_completion()).text == "Grüße, 世界 \u2028!"


async def test_blanks_and_a_bom_before_the_stream(completions, server: ChatKoreServer) -> None:
    """What comes before the first byte that tells what the body is does not matter, split or not."""
    server.script(sse(b"\xef\xbb", b"\xbf", b"\n", b" \n" * 10, data(delta("Hi", finish="stop"))), sse(b" " * 70_000))
    assert (await completions.stream(**ASK).get_final_completion()).text == "Hi"
    with pytest.raises(InvalidResponseError):
        await completions.stream(**ASK, max_retries=0).open()


async def test_one_event_of_ten_megabytes(completions, server: ChatKoreServer) -> None:
    """S10: an image in base64 is one event, and comes through."""
    server.script(events(delta("a"), delta("x" * 10_000_000, finish="stop")))
    assert len((await completions.stream(**ASK).get_final_completion()).text) == 10_000_001


@pytest.mark.parametrize("place", ["first", "later", "whole", "break"])
async def test_an_event_without_end_is_a_clear_error(server: ChatKoreServer, place: str) -> None:
    """S10: above `max_event_size` the stream is closed, and the error names the limit."""
    flood = [b"x" * 5000] * 10
    server.always(
        {
            "first": sse(b"data: ", *flood, Stall()),
            "later": sse(data(delta("Hi")), b"data: ", *flood, Stall()),
            "whole": sse(b'{"choices": "', *flood, Stall()),
            "break": sse(data(delta("Hi")), b"data: " + b"x" * 5000, Reset()),
        }[place]
    )
    limits = Limits(max_event_size=10_000)
    async with AsyncChatKore(api_key="k", base_url=server.base_url, limits=limits, max_retries=0) as client:
        with pytest.raises(APIError) as caught:
            await client.chat.completions.stream(**ASK).get_final_completion()
        assert client.pool.in_use == 0
        if place == "break":
            assert isinstance(caught.value, StreamInterruptedError)
        else:
            assert isinstance(caught.value, InvalidResponseError)
            assert "10000 bytes" in str(caught.value)
            assert caught.value.hint == "raise Limits.max_event_size"
        assert (caught.value.partial is not None) == (place in ("later", "break"))


async def test_a_body_without_limit(server: ChatKoreServer) -> None:
    """`None` disables the limit."""
    server.script(completion("x" * 100_000))
    limits = Limits(max_event_size=None)
    async with AsyncChatKore(api_key="k", base_url=server.base_url, limits=limits) as client:
        assert len((await client.chat.completions.stream(**ASK).get_final_completion()).text) == 100_000


def test_readers_have_a_repr() -> None:
    """What shows up in a debugger says what it is."""
    reader = object.__new__(EventReader)
    reader.ended, reader.events = False, [b"x"]
    assert repr(reader) == "<EventReader open holding 1>"


async def test_a_stream_of_too_many_parts_at_once(
    server: ChatKoreServer, client: AsyncChatKore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has too many parts is refused also when its end came with them."""
    monkeypatch.setattr("chatkore_async._accumulate.MAX_PARTS", 2500)  # what 250,000 take is a test of the bounds
    parts = [{"index": n, "delta": {"content": "x"}, "finish_reason": "stop"} for n in range(2501)]
    server.script(events({"choices": parts}))
    async with client.chat.completions.stream(**ASK) as stream:
        with pytest.raises(InvalidResponseError, match="more than 250,000 choices"):
            await stream.get_final_completion()


async def test_an_event_without_its_end_is_no_first_token(server: ChatKoreServer, client: AsyncChatKore) -> None:
    """`first_token` passes, or a delta is handed out; not both. A proxy's gzip may keep back the last byte of an event."""
    server.always(sse(b'data: {"choices":[{"index":0,"delta":{"content":"Hel"}}]}\n', Stall()))
    with pytest.raises(APITimeoutError) as caught:
        async with client.chat.completions.stream(**ASK, timeout=Timeout(first_token=0.05)):
            pass
    assert caught.value.phase == "first_token"
    assert caught.value.partial is None
    assert len(caught.value.attempts) == 2, "what timed out before its first delta is tried once more"
