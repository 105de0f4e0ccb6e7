"""JSON in the API's own form: what came in it goes on untouched, and what came in another is written in it."""

import sys
from typing import Any

import msgspec
import pytest
from sampling import SAMPLES, Sample

from chatkore_async import AsyncChatKore
from chatkore_async._codec import decode_chunk, decode_chunk_strictly, decode_completion
from chatkore_async._json import overlaid
from chatkore_async.testing import ChatKoreServer, sse
from chatkore_async.types import ChatCompletionChunk, ChoiceDelta, ChunkChoice, Usage

HEAD = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
ASK: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "Hello"}],
    "stream_options": {"include_usage": True},
}


def encoded(value: object) -> bytes:
    return msgspec.json.encode(value)


def choice(**fields: Any) -> dict[str, Any]:
    return {"index": 0, **fields}


def told(**fields: Any) -> dict[str, Any]:
    """Return a chunk as it is told after it was mended: its only choice with these fields."""
    return {**HEAD, "choices": [{"index": 0, "finish_reason": None, **fields}]}


def mended(payload: object) -> Any:
    chunk, _ = decode_chunk(encoded(payload))
    return msgspec.json.decode(chunk.to_json())


# What is laid over what.


@pytest.mark.parametrize(
    "whole,declared,result",
    [
        pytest.param({"a": 1}, {"a": 2}, {"a": 2}, id="a declared value wins"),
        pytest.param({"v": 1}, {"a": 2}, {"v": 1, "a": 2}, id="an undeclared name stays"),
        pytest.param({}, {"a": None}, {}, id="nothing is told of what nobody told"),
        pytest.param({"a": 3}, {"a": None}, {"a": None}, id="what was told and not understood is null"),
        pytest.param({}, {"finish_reason": None}, {"finish_reason": None}, id="the API always tells a finish reason"),
        pytest.param({"gone": 1}, {"a": 2}, {"a": 2}, id="what is said elsewhere goes"),
        pytest.param({"gone": 1}, {"gone": 2}, {"gone": 2}, id="but stays where it is declared"),
        pytest.param({"a": {"v": 1, "b": 2}}, {"a": {"b": 3}}, {"a": {"v": 1, "b": 3}}, id="objects, inside"),
        pytest.param({"a": "text"}, {"a": {"b": 3}}, {"a": {"b": 3}}, id="an object in place of something else"),
        pytest.param({"a": [{"v": 1}]}, {"a": [{"b": 3}]}, {"a": [{"v": 1, "b": 3}]}, id="lists, one by one"),
        pytest.param({"a": [{"v": 1}, 7]}, {"a": [{"b": 3}]}, {"a": [{"b": 3}]}, id="lists of other lengths"),
        pytest.param({"a": {"v": 1}}, {"a": [{"b": 3}]}, {"a": [{"b": 3}]}, id="a list in place of an object"),
        pytest.param({"a": [1, 2]}, {"a": [3, 4]}, {"a": [3, 4]}, id="lists of plain values"),
    ],
)
def test_what_was_understood_lies_over_what_came(whole: Any, declared: Any, result: Any) -> None:
    """Declared values take the place of how they were said, and all else stays as it came."""
    before = encoded(whole)
    assert overlaid(whole, declared, {"gone"}) == result
    assert encoded(whole) == before


# What came in the form of the API.


@pytest.mark.parametrize(
    "data",
    [
        encoded({**HEAD, "choices": [choice(delta={"content": "Hi"})], "vendor": {"b": 1, "a": 2}}),
        b'{ "choices" : [ {"delta":{"content":"\\u00e9 \\/"}} ]\n, "vendor": 1e400 }',
    ],
    ids=["compact", "spaced"],
)
def test_a_chunk_in_the_form_of_the_api_is_given_as_it_came(data: bytes) -> None:
    """Blanks, the order of names, escapes and vendors' fields are those of the server."""
    chunk = decode_chunk_strictly(data)
    chunk._raw = data
    assert chunk.to_json() is data


def test_a_completion_in_the_form_of_the_api_is_given_as_it_came() -> None:
    """An awaited answer gives the bytes of its body."""
    body = encoded({"id": "c", "choices": [choice(message={"content": "Hi"}, finish_reason="stop")], "vendor": 1})
    assert decode_completion(body)[0].to_json() == body


# What came in another.


@pytest.mark.parametrize(
    "payload,result",
    [
        pytest.param(
            {**HEAD, "choices": [choice(message={"role": "assistant", "content": "Hi"})]},
            told(delta={"role": "assistant", "content": "Hi"}),
            id="a message in place of the delta",
        ),
        pytest.param(
            {**HEAD, "choices": [choice(delta={"reasoning": "Hm", "vendor": 1})]},
            told(delta={"vendor": 1, "reasoning_content": "Hm"}),
            id="reasoning by another name",
        ),
        pytest.param(
            {**HEAD, "choices": [choice(delta={"content": [{"type": "text", "text": "Hi"}, {"text": "!"}]})]},
            told(delta={"content": "Hi!"}),
            id="a content of parts",
        ),
        pytest.param(
            {**HEAD, "choices": [choice(delta={"content": "Hi"}, finish_reason="")]},
            told(delta={"content": "Hi"}),
            id="an empty finish reason",
        ),
        pytest.param(
            {
                **HEAD,
                "choices": [
                    choice(
                        delta={
                            "tool_calls": [
                                {
                                    "index": 0,
                                    "id": "a",
                                    "function": {"name": "f", "arguments": {"x": 1}, "thought": "t"},
                                    "extra_content": {"google": {"signature": "s"}},
                                }
                            ]
                        }
                    )
                ],
            },
            told(
                delta={
                    "tool_calls": [
                        {
                            "index": 0,
                            "id": "a",
                            "function": {"name": "f", "arguments": '{"x": 1}', "thought": "t"},
                            "extra_content": {"google": {"signature": "s"}},
                        }
                    ]
                }
            ),
            id="a tool call with what a vendor put into it",
        ),
        pytest.param(
            {**HEAD, "choices": [choice(delta={"content": "Hi"})], "x_groq": {"id": "r", "usage": {"total_tokens": 3}}},
            told(delta={"content": "Hi"}) | {"usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 3}},
            id="usage where Groq has it",
        ),
        pytest.param(
            {**HEAD, "choices": [choice(delta={"content": "Hi"}, usage={"total_tokens": 3})]},
            told(delta={"content": "Hi"}) | {"usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 3}},
            id="usage inside the choice",
        ),
        pytest.param(
            {**HEAD, "created": "1", "choices": [choice(delta={"content": 5})], "service_tier": 1},
            told(delta={"content": "5"}) | {"service_tier": "1"},
            id="numbers and strings confused",
        ),
        pytest.param(
            [{**HEAD, "choices": {"delta": {"content": "Hi"}}, "vendor": 1}],
            told(delta={"content": "Hi"}) | {"vendor": 1},
            id="lists and objects confused",
        ),
    ],
)
def test_a_chunk_in_another_form_is_written_in_that_of_the_api(payload: object, result: object) -> None:
    """What a relay said in its own way is said in the API's, once; what only the vendor says stays."""
    assert mended(payload) == result


def test_a_completion_in_another_form_is_written_in_that_of_the_api() -> None:
    """What goes for chunks goes for awaited answers."""
    body = encoded({"id": 7, "choices": [{"delta": {"content": "Hi"}, "finish_reason": "stop"}], "error": None, "v": 1})
    assert msgspec.json.decode(decode_completion(body)[0].to_json()) == {
        "v": 1,
        "id": "7",
        "object": "",
        "created": 0,
        "model": "",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
    }


def test_a_number_that_nobody_can_hold_costs_the_fields_of_the_vendor() -> None:
    """What Python cannot hold (here since a program lowered its limit) is left out, and what the API declares is not."""
    chunk, _ = decode_chunk(b'{"vendor": ' + b"9" * 1000 + b', "choices": [{"message": {"content": "Hi"}}]}')
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        result = msgspec.json.decode(chunk.to_json())
    finally:
        sys.set_int_max_str_digits(digits)
    assert result["choices"][0]["delta"]["content"] == "Hi"
    assert "vendor" not in result
    assert "vendor" in msgspec.json.decode(chunk.to_json())


@pytest.mark.parametrize("vendor", [b"1e999", b"-1e999", b'"\\ud83d"', b"1" * 400], ids=repr)
def test_odd_values_of_a_vendor_are_still_json(vendor: bytes) -> None:
    """A number beyond a double or half of an emoji does not make a message that no parser takes."""
    chunk, _ = decode_chunk(b'{"choices": [{"message": {"content": "Hi"}}], "vendor": ' + vendor + b"}")
    assert "vendor" in msgspec.json.decode(chunk.to_json())


def test_what_was_made_by_hand_has_its_declared_fields() -> None:
    """A chunk that a program makes can be sent to a reader as it is."""
    chunk = ChatCompletionChunk(
        id="c",
        model="m",
        created=1,
        object="chat.completion.chunk",
        choices=[ChunkChoice(delta=ChoiceDelta(content="Hi"))],
        usage=Usage(total_tokens=3),
    )
    assert msgspec.json.decode(chunk.to_json()) == told(delta={"content": "Hi"}) | {
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 3}
    }


async def test_a_merged_completion_is_json_of_the_api(client: AsyncChatKore) -> None:
    """What was merged from a stream can be stored or sent on, and read again."""
    async with client.chat.completions.stream(**ASK) as answer:
        final = await answer.get_final_completion()
    again, whole = decode_completion(final.to_json())
    assert whole is None  # it is in the declared form
    assert again.text == final.text
    assert again.usage == final.usage


# All that servers are known to send.


WHOLE = [
    sample
    for sample in SAMPLES
    if "stream" in sample.case.asked and sample.expected("stream")["error"] is None and sample.case.end == "clean"
]


@pytest.mark.parametrize("sample", WHOLE, ids=str)
async def test_a_relayed_stream_means_what_it_meant(
    client: AsyncChatKore, server: ChatKoreServer, sample: Sample
) -> None:
    """Whatever form a stream came in: who reads its chunks as JSON reads the same completion, in the API's form."""
    server.script(next(reply for _, reply in sample.replies()))
    events = []
    async with client.chat.completions.stream(**ASK) as answer:
        async for chunk in answer:
            data = chunk.to_json()
            if not any(call.vendor_fields for choice in chunk.choices for call in choice.delta.tool_calls or []):
                assert decode_chunk_strictly(data) == chunk
            events.append(b"data: " + data.replace(b"\n", b"\ndata: ") + b"\n\n")
        first = await answer.get_final_completion()
    server.script(sse(*events, b"data: [DONE]\n\n"))
    async with client.chat.completions.stream(**ASK) as answer:
        assert await answer.get_final_completion() == first


def test_what_is_nested_too_deeply_to_be_written_again_costs_the_fields_of_the_vendor() -> None:
    """How deep is too deep depends on who asks: a handler below many middlewares has less room than whoever decoded."""
    deep = (
        b'{"created":"7","vendor":' + b"[" * 900 + b"]" * 900 + b',"choices":[{"index":"0","delta":{"content":"x"}}]}'
    )
    chunk, _ = decode_chunk(deep)

    def below(frames: int) -> bytes:
        return below(frames - 1) if frames else chunk.to_json()

    assert decode_chunk_strictly(below(300)).text == "x"
