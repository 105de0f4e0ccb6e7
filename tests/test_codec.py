"""Strict first, tolerant second: healthy messages take the short way, and nothing that comes leaks a raw exception."""

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatkore_async import _codec
from chatkore_async._accumulate import Accumulator
from chatkore_async._codec import MISFIT, NotJSONError
from chatkore_async.types import ChatCompletion, ChatCompletionChunk, Model

JSON = dict[str, Any]

HEAD: JSON = {"id": "c", "object": "chat.completion.chunk", "created": 1700000000, "model": "m"}


def chunk_of(delta: JSON, **more: Any) -> JSON:
    return HEAD | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}]} | more


HEALTHY: dict[str, JSON] = {
    "OpenAI, first": chunk_of(
        {"role": "assistant", "content": "", "refusal": None},
        service_tier="default",
        system_fingerprint="fp_1",
        usage=None,
        obfuscation="x7",
    ),
    "OpenAI, text": chunk_of({"content": "Hello"}, system_fingerprint="fp_1", usage=None, obfuscation="x"),
    "OpenAI, end": HEAD | {"choices": [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]},
    "OpenAI, usage": HEAD
    | {
        "choices": [],
        "usage": {
            "prompt_tokens": 1,
            "completion_tokens": 2,
            "total_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "accepted_prediction_tokens": 0},
        },
    },
    "OpenAI, call": chunk_of(
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}],
        }
    ),
    "OpenAI, arguments": chunk_of({"tool_calls": [{"index": 0, "function": {"arguments": '{"'}}]}),
    "OpenAI, logprobs": HEAD
    | {
        "choices": [
            {
                "index": 0,
                "delta": {"content": "H"},
                "logprobs": {
                    "content": [
                        {
                            "token": "H",
                            "logprob": -0.5,
                            "bytes": [72],
                            "top_logprobs": [{"token": "H", "logprob": -1, "bytes": None}],
                        }
                    ],
                    "refusal": None,
                },
                "finish_reason": None,
            }
        ]
    },
    "Azure, first": {"id": "", "object": "", "created": 0, "model": "", "choices": [], "prompt_filter_results": [{}]},
    "Azure, text": HEAD
    | {
        "choices": [
            {"index": 0, "delta": {"content": "x"}, "content_filter_results": {"hate": {}}, "finish_reason": None}
        ]
    },
    "DeepSeek, reasoning": chunk_of({"content": None, "reasoning_content": "hm"}, system_fingerprint="fp"),
    "DeepSeek, usage in every chunk": chunk_of(
        {"content": "x"}, usage={"prompt_tokens": 1, "prompt_cache_hit_tokens": 0}
    ),
    "vLLM": chunk_of({"content": "x", "tool_calls": []}) | {"prompt_token_ids": None},
    "new-api, error null": chunk_of({"content": "x", "reasoning": None}, error=None),
    "annotations": chunk_of({"annotations": [{"type": "url_citation", "url_citation": {"url": "u", "title": "t"}}]}),
    "escapes": chunk_of({"content": 'é\u2028🎉\n"\\'}),
}


@pytest.mark.parametrize("data", HEALTHY.values(), ids=HEALTHY)
def test_healthy_chunks_are_decoded_strictly(data: JSON) -> None:
    """What OpenAI, Azure, DeepSeek and vLLM send all day takes the fast path, and says there what it says on the other."""
    encoded = msgspec.json.encode(data)
    strict, tolerant = _codec.decode_chunk_strictly(encoded), _codec.decode_chunk(encoded)[0]
    assert accumulated(strict) == accumulated(tolerant)


@pytest.mark.parametrize("data", HEALTHY.values(), ids=HEALTHY)
def test_healthy_completions_are_decoded_strictly(data: JSON) -> None:
    """The same holds for whole answers."""
    whole = copy.deepcopy(data) | {"object": "chat.completion"}
    for choice in whole["choices"]:
        choice["message"] = {"role": "assistant"} | choice.pop("delta")
        for call in choice["message"].get("tool_calls", []):
            del call["index"]
    completion, generic = _codec.decode_completion(msgspec.json.encode(whole))
    assert generic is None
    assert completion.to_dict() == whole


def accumulated(chunk: ChatCompletionChunk) -> ChatCompletion:
    accumulator = Accumulator()
    accumulator.pending.append(chunk)
    return accumulator.completion()


GATED: dict[str, JSON] = {
    "an error beside the choices": chunk_of({"content": "x"}, error={"message": "no"}),
    "an error that is a text": chunk_of({"content": "x"}, error="no"),
    "usage under x_groq": chunk_of({"content": "x"}, x_groq={"id": "a"}),
    "usage in a choice": HEAD | {"choices": [{"usage": {"total_tokens": 1}}]},
    "reasoning": chunk_of({"reasoning": "hm"}),
    "message in place of delta": HEAD | {"choices": [{"message": {"content": "x"}}]},
    "delta null": HEAD | {"choices": [{"delta": None}]},
    "choices null": HEAD | {"choices": None},
    "content in parts": chunk_of({"content": [{"type": "text", "text": "x"}]}),
    "finish reason empty": HEAD | {"choices": [{"delta": {}, "finish_reason": ""}]},
    "finish reason null in quotes": HEAD | {"choices": [{"delta": {}, "finish_reason": "null"}]},
    "arguments an object": chunk_of({"tool_calls": [{"function": {"arguments": {}}}]}),
    "a vendor's key in a call": chunk_of({"tool_calls": [{"extra_content": {}}]}),
    "a vendor's key in a function": chunk_of({"tool_calls": [{"function": {"sig": ""}}]}),
    "created a float": HEAD | {"created": 1.5, "choices": []},
    "id a number": HEAD | {"id": 5, "choices": []},
    "usage in floats": HEAD | {"choices": [], "usage": {"total_tokens": 1.5}},
    "index null": HEAD | {"choices": [{"index": None, "delta": {}}]},
    "choices an object": HEAD | {"choices": {"delta": {}}},
}


@pytest.mark.parametrize("data", GATED.values(), ids=GATED)
def test_what_needs_care_is_refused_by_strict_decoding(data: JSON) -> None:
    """A form that the declared fields would lose or misread takes the tolerant path, alone."""
    encoded = msgspec.json.encode(data)
    with pytest.raises(MISFIT):
        _codec.decode_chunk_strictly(encoded)
    chunk, whole = _codec.decode_chunk(encoded)
    assert whole == data
    assert chunk.raw == encoded


@pytest.mark.parametrize(
    "whole",
    [
        {"choices": [{"message": {}}], "error": {"message": "no"}},
        {"choices": [{"message": {"reasoning": "hm"}}]},
        {"choices": [{"delta": {"content": "x"}}]},
        {"choices": [{"message": {"role": ""}}]},
        {"choices": [{"message": {"tool_calls": [{"type": ""}]}}]},
        {"choices": [{"message": {"tool_calls": [{"index": 0}]}}]},
        {"choices": [], "x_groq": {"usage": {}}},
    ],
)
def test_completions_have_the_same_gates(whole: JSON) -> None:
    """A completion that needs care gives its generic JSON as well, in which an error is looked for."""
    completion, generic = _codec.decode_completion(msgspec.json.encode(whole))
    assert generic == whole
    assert completion.to_dict() == whole


def test_usage_without_numbers_is_none() -> None:
    """`usage: {}` does not mean that nothing was used (C6)."""
    assert _codec.decode_completion(b'{"choices": [], "usage": {}}')[0].usage is None
    assert _codec.decode_chunk(b'{"choices": [], "usage": {}}')[0].usage is None


def test_a_list_of_one_is_the_one() -> None:
    """Gemini puts its objects into a list (E11)."""
    completion, generic = _codec.decode_completion(b'[{"id": "a", "vendor": 1}]')
    assert completion.id == "a"
    assert generic == completion.to_dict() == {"id": "a", "vendor": 1}


@pytest.mark.parametrize(
    "data",
    [b'{"choices":[{"delta":{"content":"\xff"}}]}', b'\xef\xbb\xbf{"choices":[{"delta":{"content":"\xff"}}]}'],
)
def test_bad_utf_8_costs_a_character(data: bytes) -> None:
    """Invalid UTF-8 is decoded with replacement, a BOM is skipped (S11)."""
    with pytest.raises(MISFIT):
        _codec.decode_chunk_strictly(data)
    chunk, _ = _codec.decode_chunk(data)
    assert chunk.text == "\ufffd"
    assert chunk.raw == data
    assert chunk.to_dict() == {"choices": [{"delta": {"content": "\ufffd"}}]}


def test_half_an_emoji_is_no_cut_answer() -> None:
    r"""A relay that splits `\ud83d\ude00` over two chunks costs a character, not the stream."""
    chunk, _ = _codec.decode_chunk(rb'{"choices":[{"delta":{"content":"\ud83d"}}]}')
    assert chunk.text == "\ufffd"
    assert chunk.to_dict()["choices"][0]["delta"]["content"] == "\ufffd"


@pytest.mark.parametrize(
    "body",
    [b"", b" ", b"null", b"5", b'"x"', b"[]", b"[1]", b"[{}, {}]", b"<html>", b"data: {}", b"NaN", b'{"a": NaN}'],
)
def test_what_is_no_object_is_not_json_of_ours(body: bytes) -> None:
    """Anything but a JSON object raises our error and no other, with the parser's behind it."""
    for decode in (_codec.decode_completion, _codec.decode_chunk):
        with pytest.raises(NotJSONError):
            decode(body)


def test_every_cut_of_an_answer_is_seen_as_one() -> None:
    """JSON as far as it goes is an answer that was lost on the way, which may be asked for again; garbage is not."""
    body = msgspec.json.encode(
        chunk_of({"content": "h\u00e9\n"}, usage={"total_tokens": 12, "x": [True, None, -1.5e3]})
    )
    for end in range(len(body)):
        with pytest.raises(NotJSONError) as caught:
            _codec.decode_completion(body[:end])
        assert caught.value.truncated, body[:end]
    for garbage in (b"<html>", b"{]", b"5", b"[1]", body + b"}", rb'{"a":"\ud83d", NaN'):
        with pytest.raises(NotJSONError) as caught:
            _codec.decode_completion(garbage)
        assert not caught.value.truncated, garbage


# Attacks.

NESTED = {
    "a list": lambda n: b"[" * n + b"]" * n,
    "an object": lambda n: b'{"text":' * n + b"1" + b"}" * n,
    "parts": lambda n: b'[{"text":' * n + b"1" + b"}]" * n,
}
PLACES = [
    b"%b",
    b'{"vendor":%b}',
    b'{"id":%b}',
    b'{"choices":%b}',
    b'{"choices":[{"message":{"content":%b},"delta":{"reasoning":%b}}]}',
    b'{"choices":[{"delta":{"tool_calls":[{"function":{"arguments":%b,"sig":%b}}]}}],"usage":%b}',
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("nest", NESTED.values(), ids=NESTED)
def test_no_recursion_error_leaks(nest: Any, place: bytes) -> None:
    """However deep an answer is nested, and however little stack is left, it is decoded or refused."""
    for depth in [*range(100, 1100, 50), 5000, 100_000]:
        body = place.replace(b"%b", nest(depth))
        for decode in (_codec.decode_completion, _codec.decode_chunk, _codec.decode_models):
            with contextlib.suppress(NotJSONError):
                decode(body)


WRONG: list[Any] = [None, True, 0, -1, 10**30, 1.5, 1e300, "", "x", "7", "null", [], [None], [{}], ["x"], {}, {"a": 1}]

FULL: JSON = {
    **HEAD,
    "system_fingerprint": "fp",
    "service_tier": "default",
    "usage": {
        "prompt_tokens": 1,
        "total_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    },
    "x_groq": {"usage": {"total_tokens": 1}},
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "usage": None,
            "logprobs": {
                "content": [{"token": "H", "logprob": -0.5, "bytes": [72], "top_logprobs": [{"token": "H"}]}],
                "refusal": None,
            },
            who: {
                "role": "assistant",
                "content": "x",
                "reasoning_content": "r",
                "reasoning": "r",
                "refusal": "no",
                "annotations": [{"type": "url_citation", "url_citation": {"url": "u", "start_index": 1}}],
                "audio": {"id": "a", "data": "x", "expires_at": 5, "transcript": "t"},
                "function_call": {"name": "f", "arguments": "{}"},
                "tool_calls": [
                    {
                        "index": 0,
                        "id": "a",
                        "type": "function",
                        "function": {"name": "f", "arguments": "{}"},
                        "custom": {"name": "g", "input": "i"},
                    }
                ],
            },
        }
        for who in ("delta", "message")
    ],
}


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths(item, (*path, key))


def put(whole: JSON, path: tuple[Any, ...], value: Any) -> JSON:
    changed: Any = copy.deepcopy(whole)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return changed


@pytest.mark.parametrize("path", list(paths(FULL)), ids=lambda path: ".".join(map(str, path)))
def test_a_field_is_what_it_is_declared_as_whatever_was_sent(path: tuple[Any, ...]) -> None:
    """Any wrong value at any place is put right or left out, never handed on, and is in `to_dict()` as it came."""
    for value in WRONG:
        whole = put(FULL, path, value)
        body = msgspec.json.encode(whole)
        for answer in (_codec.decode_completion(body)[0], _codec.decode_chunk(body)[0]):
            # Encoded and decoded by the declarations, it is the same.
            again = msgspec.json.decode(msgspec.json.encode(answer), type=type(answer))
            assert again == answer
            assert answer.to_dict() == whole
            answer.text.encode()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["id", "choices", "message", "delta", "content", "text", "tool_calls", "function", "arguments", "usage"]
            ),
            inner,
            max_size=4,
        )
    ),
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["id", "created", "model", "choices", "usage", "error", "x_groq"]), _JSON))
def test_any_object_is_decoded(whole: JSON) -> None:
    """Every JSON object is some completion and some chunk, and strict decoding never says otherwise than tolerant."""
    body = msgspec.json.encode(whole)
    assert isinstance(_codec.decode_completion(body)[0], ChatCompletion)
    chunk, _ = _codec.decode_chunk(body)
    assert isinstance(chunk, ChatCompletionChunk)
    try:
        strict = _codec.decode_chunk_strictly(body)
    except MISFIT:
        return
    assert strict.choices == chunk.choices
    assert (strict.id, strict.created, strict.model) == (chunk.id, chunk.created, chunk.model)


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(alphabet='{}[]",:0\\udtrn', max_size=60).map(str.encode)))
def test_any_bytes_are_decoded_or_refused(body: bytes) -> None:
    """Garbage raises our error and no other."""
    for decode in (_codec.decode_completion, _codec.decode_chunk, _codec.decode_models):
        with contextlib.suppress(NotJSONError):
            decode(body)


def test_numbers_of_thousands_of_digits_are_refused() -> None:
    """Python refuses to read them, and so do we, with an error of ours."""
    digits = b"9" * (sys.get_int_max_str_digits() + 1)
    with pytest.raises(NotJSONError):
        _codec.decode_completion(b'{"created": %b}' % digits)
    completion, _ = _codec.decode_completion(b'{"vendor": %b, "id": "a"}' % digits)
    assert completion.id == "a"
    with pytest.raises(ValueError):
        completion.to_dict()


def test_models_are_decoded() -> None:
    """`GET /models` gives a list of models, each field with its default."""
    models = _codec.decode_models(b'{"object": "list", "data": [{"id": "a", "vendor": 1}, {"id": "b", "created": 5}]}')
    assert models == [Model(id="a"), Model(id="b", created=5)]
