"""Answers that strict decoding refuses, made into what they meant: by the forms that servers are known to send."""

from typing import Any

import msgspec
import pytest

from chatkore_async import _codec, _tolerant
from chatkore_async.types import (
    ChatCompletion,
    ChatCompletionChunk,
    CompletionTokensDetails,
    Logprobs,
    Model,
    PromptTokensDetails,
    TokenLogprob,
    Usage,
)

JSON = dict[str, Any]


def completion(**whole: Any) -> ChatCompletion:
    return _codec.decode_completion(msgspec.json.encode(whole))[0]


def chunk(**whole: Any) -> ChatCompletionChunk:
    """Decode a chunk as a stream does: strictly, and only then tolerantly."""
    data = msgspec.json.encode(whole)
    try:
        return _codec.decode_chunk_strictly(data)
    except _codec.MISFIT:
        return _codec.decode_chunk(data)[0]


def message(**said: Any) -> Any:
    return completion(choices=[{"message": said}]).choices[0].message


def delta(**said: Any) -> Any:
    return chunk(choices=[{"delta": said}]).choices[0].delta


@pytest.mark.parametrize(
    "data,expected",
    [
        (b'{"a": 1}', {"a": 1}),
        (b'\xef\xbb\xbf {"a": 1}\r\n', {"a": 1}),
        (b'{"a": "\xff"}', {"a": "\ufffd"}),
        (b'"\xe6\x96"', "\ufffd"),
        (rb'"\ud83d\ude00"', "😀"),
        (rb'"\ud83d\ude00 \ud83d"', "😀 \ufffd"),
        (rb'"\uDE00 \uD83D\n \uD83D\uD83D\uDE00"', "\ufffd \ufffd\n \ufffd😀"),
        (rb'"\\ud83d \ud83d \\\ud83d"', "\\ud83d \ufffd \\\ufffd"),
        (b'"a\nb\tc"', "a\nb\tc"),
        (b"1e400", float("inf")),
        (b'{"a": 1}\x00'.rstrip(b"\0"), {"a": 1}),
    ],
)
def test_json_is_read_however_it_was_written(data: bytes, expected: object) -> None:
    """A BOM, bad UTF-8, half a surrogate pair or a bare line end costs a character at most, not the answer (S11)."""
    assert _tolerant.parse(data) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"  ",
        b"NaN",
        b'{"a": NaN}',
        rb'["\ud83d", NaN]',
        b'{"a": -Infinity}',
        b"<html>",
        b'{"a": 1} {"b": 2}',
        b"{'a': 1}",
        b"9" * 5000,
        b"[" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'Traceback (most recent call last):\n  File "x.py"',
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_no_json_is_a_value_error(data: bytes) -> None:
    """Text, `NaN`, numbers of thousands of digits and bottomless nesting are no answers, and nothing else is raised."""
    with pytest.raises(ValueError):
        _tolerant.parse(data)


@pytest.mark.parametrize(
    "given,expected",
    [
        (None, None),
        ("", ""),
        ("x", "x"),
        ([], ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        (["a", {"text": "b"}, {"type": "image_url", "image_url": {"url": "u"}}, None, {"text": ["c"]}, {}], "abc"),
        ({"type": "text", "text": "a"}, "a"),
        ({"answer": "é"}, '{"answer": "é"}'),
        (5, "5"),
        (1.5, "1.5"),
        (True, "true"),
    ],
)
def test_content_of_any_form_is_text(given: object, expected: str | None) -> None:
    """Content is a string, whether it came as one, as parts, or as JSON that a relay decoded too early (C2)."""
    assert message(content=given).content == expected
    assert delta(content=given).content == expected


@pytest.mark.parametrize(
    "said,reasoning,content",
    [
        ({"reasoning_content": "a"}, "a", None),
        ({"reasoning": "a"}, "a", None),
        ({"reasoning": None, "reasoning_content": "a"}, "a", None),
        ({"reasoning": "a", "reasoning_content": "b"}, "b", None),
        ({"reasoning": "a", "reasoning_content": ""}, "a", None),
        ({"reasoning": "a", "reasoning_content": None}, "a", None),
        ({"reasoning": "", "reasoning_content": ""}, "", None),
        ({"reasoning": {"text": "a"}}, "a", None),
        ({"content": [{"type": "thinking", "thinking": [{"text": "a"}]}, {"text": "b"}]}, "a", "b"),
        ({"content": [{"type": "thinking", "thinking": "a"}, "b"]}, "a", "b"),
        ({"content": ["b"], "reasoning": "a"}, "a", "b"),
    ],
)
def test_reasoning_of_any_name_is_reasoning_content(said: JSON, reasoning: str, content: str | None) -> None:
    """DeepSeek's name, OpenRouter's and Mistral's parts all end in `reasoning_content` (C5)."""
    for holder in (message(**said), delta(**said)):
        assert (holder.reasoning_content, holder.content) == (reasoning, content)


@pytest.mark.parametrize("field", ["id", "object", "model", "system_fingerprint", "service_tier"])
@pytest.mark.parametrize("given,expected", [(5, "5"), (1.5, "1.5"), (None, None), ("x", "x"), (False, "false")])
def test_strings_at_the_top_are_strings(field: str, given: object, expected: str | None) -> None:
    """An `id` that is a number becomes its digits; one that is null or missing is empty (C6)."""
    empty = None if field in ("system_fingerprint", "service_tier") else ""
    for whole in (completion(**{field: given}), chunk(**{field: given})):
        assert getattr(whole, field) == (empty if expected is None else expected)


@pytest.mark.parametrize(
    "given,expected",
    [
        (1700000000, 1700000000),
        (1700000000.7, 1700000000),
        ("1700000000", 1700000000),
        ("1700000000.7", 1700000000),
        ("yesterday", 0),
        ("inf", 0),
        ("", 0),
        (None, 0),
        (True, 0),
        ([], 0),
        ({}, 0),
        (10**30, 10**30),
    ],
)
def test_created_is_a_whole_number(given: object, expected: int) -> None:
    """Seconds may come as a float or a string; what is no number is 0 (C6)."""
    assert completion(created=given).created == expected
    assert chunk(created=given).created == expected


def test_numbers_beyond_a_double_are_no_counts() -> None:
    """An infinite time is unknown."""
    assert _codec.decode_completion(b'{"created": 1e999, "choices": []}')[0].created == 0


@pytest.mark.parametrize("given", [None, [], {}, "x", 5, [None], ["x"]])
def test_choices_that_are_none_are_an_empty_list(given: object) -> None:
    """Null, absent or mistyped `choices` are no choices; the answer's judge decides what that means (C1)."""
    expected = 1 if given == {} else 0  # one object in place of a list is a list of one
    assert len(completion(choices=given).choices) == expected
    assert len(chunk(choices=given).choices) == expected
    assert completion().choices == []
    assert chunk().choices == []


@pytest.mark.parametrize(
    "choice",
    [
        {"delta": {"content": "x"}},
        {"message": {"content": "x"}},
        {"delta": None, "message": {"content": "x"}},
        {"delta": {}, "message": {"content": "x"}},
        {"delta": {"content": "x"}, "message": None},
        {"delta": {"content": "x"}, "message": {}},
    ],
)
def test_message_and_delta_stand_for_each_other(choice: JSON) -> None:
    """Some relays send a `message` in a chunk or a `delta` in a plain answer; the one that says something counts (C2)."""
    assert chunk(choices=[choice]).text == "x"
    assert completion(choices=[choice]).text == "x"


@pytest.mark.parametrize("choice", [{}, {"delta": None, "message": None}, {"delta": "x", "message": 5}])
def test_a_choice_that_says_nothing_is_empty(choice: JSON) -> None:
    """A missing, null or mistyped `delta` is an empty one (C2)."""
    assert chunk(choices=[choice]).text == ""
    assert completion(choices=[choice]).choices[0].message.role == "assistant"


@pytest.mark.parametrize("given,expected", [(0, 0), (3, 3), ("2", 2), (1.0, 1), (None, 0), ("x", 0)])
def test_a_missing_index_is_zero(given: object, expected: int) -> None:
    """An index may be a string, a float, null or missing (C8)."""
    assert completion(choices=[{"index": given, "message": {}}]).choices[0].index == expected
    assert chunk(choices=[{"index": given, "delta": {}}]).choices[0].index == expected


@pytest.mark.parametrize(
    "given,expected",
    [("", None), ("null", None), (None, None), ("stop", "stop"), ("nullable", "nullable"), ("STOP", "STOP"), (5, "5")],
)
def test_a_finish_reason_is_any_word_but_no_word(given: object, expected: str | None) -> None:
    """`""` and `"null"` are no reason; values are open strings (C3)."""
    assert completion(choices=[{"message": {}, "finish_reason": given}]).choices[0].finish_reason == expected
    assert chunk(choices=[{"delta": {}, "finish_reason": given}]).choices[0].finish_reason == expected


@pytest.mark.parametrize("given,expected", [("", "assistant"), (None, "assistant"), ("model", "model"), (5, "5")])
def test_a_role_is_assistant_unless_said(given: object, expected: str) -> None:
    """A role that is null or empty is the assistant's, so that the message can be sent back (C2)."""
    assert message(role=given, content="x").role == expected
    assert delta(role=given).role == (expected if given else given)


USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
COUNTS = Usage(prompt_tokens=1, completion_tokens=2, total_tokens=3)


@pytest.mark.parametrize(
    "whole,expected",
    [
        ({"usage": USAGE}, COUNTS),
        ({"usage": None}, None),
        ({"usage": {}}, None),
        ({"usage": "many"}, None),
        ({"usage": {"prompt_tokens": 1.0, "completion_tokens": "2", "total_tokens": "3.0"}}, COUNTS),
        ({"usage": USAGE | {"prompt_tokens": None}}, Usage(completion_tokens=2, total_tokens=3)),
        ({"usage": USAGE | {"prompt_tokens_details": None, "vendor": {"x": "y"}}}, COUNTS),
        ({"usage": USAGE | {"completion_tokens_details": []}}, COUNTS),
        (
            {"usage": {"prompt_tokens_details": {"cached_tokens": "4", "audio_tokens": None}}},
            Usage(prompt_tokens_details=PromptTokensDetails(cached_tokens=4)),
        ),
        (
            {"usage": {"completion_tokens_details": {"reasoning_tokens": 4.0, "vendor": 1}}},
            Usage(completion_tokens_details=CompletionTokensDetails(reasoning_tokens=4)),
        ),
        ({"x_groq": {"id": "a", "usage": USAGE}}, COUNTS),
        ({"x_groq": {"id": "a"}}, None),
        ({"x_groq": None}, None),
        ({"choices": [{"usage": USAGE}]}, COUNTS),
        ({"choices": [{"usage": None}, {"usage": USAGE}]}, COUNTS),
        ({"usage": None, "x_groq": {"usage": USAGE}, "choices": [{"usage": {"total_tokens": 9}}]}, COUNTS),
    ],
)
def test_usage_is_found_and_counted(whole: JSON, expected: Usage | None) -> None:
    """At the top, under `x_groq` or in a choice; counts in any notation; null and `{}` are none (C6)."""
    whole = {"choices": []} | whole
    assert completion(**whole).usage == expected
    assert (chunk(**whole).usage or None) == expected or whole["usage"] == {}


@pytest.mark.parametrize(
    "given,expected",
    [
        ("{}", "{}"),
        ({"é": [1, None]}, '{"é": [1, null]}'),
        ([1, 2], "[1, 2]"),
        (None, ""),
        ("", ""),
        (5, "5"),
        (True, "true"),
    ],
)
def test_arguments_are_a_json_string(given: object, expected: str) -> None:
    """An object or a list is written out as the model would have (C4)."""
    function = {"name": "f", "arguments": given}
    said = {"tool_calls": [{"id": "a", "function": function}], "function_call": function}
    assert message(**said).tool_calls[0].function.arguments == expected
    assert message(**said).function_call.arguments == expected
    assert (delta(**said).tool_calls[0].function.arguments or "") == expected
    assert (delta(**said).function_call.arguments or "") == expected


@pytest.mark.parametrize(
    "call,expected",
    [
        ({}, ("", "function", "")),
        ({"id": None, "type": None, "function": None}, ("", "function", "")),
        ({"id": 5, "type": "", "function": {"name": None}}, ("5", "function", "")),
        ({"index": 0, "id": "a", "function": {"name": "f"}}, ("a", "function", "f")),
        ({"id": "a", "type": None, "custom": {"name": "f", "input": None}}, ("a", "custom", "")),
    ],
)
def test_calls_of_a_plain_answer_are_whole(call: JSON, expected: tuple[str, str, str]) -> None:
    """What a call leaves out has its default, so that it can be read and sent back (C4)."""
    (told,) = message(tool_calls=[call]).tool_calls
    assert (told.id, told.type, told.function.name) == expected


def test_one_call_alone_is_a_list_of_one() -> None:
    """A vendor that sends an object in place of a list means one."""
    call = {"id": "a", "function": {"name": "f", "arguments": {}}}
    assert [c.id for c in message(tool_calls=call).tool_calls] == ["a"]
    assert [c.id for c in delta(tool_calls=call).tool_calls] == ["a"]
    assert message(tool_calls="x", content=[]).tool_calls is None
    assert delta(tool_calls=[None], content=[]).tool_calls is None


def test_what_a_vendor_puts_into_a_call_is_kept() -> None:
    """Gemini refuses a call that is sent back without its signature."""
    call = {"id": "a", "sig": 1, "function": {"name": "f", "arguments": "{}", "thought": "t"}}
    expected = {"sig": 1, "function": {"thought": "t"}}
    assert message(tool_calls=[call]).tool_calls[0].vendor_fields == expected
    assert delta(tool_calls=[call]).tool_calls[0].vendor_fields == expected
    assert message(tool_calls=[{"id": "a"}]).tool_calls[0].vendor_fields == {}


@pytest.mark.parametrize(
    "given,expected",
    [
        (None, None),
        ({"content": [{"token": "a", "logprob": "-1"}]}, Logprobs(content=[TokenLogprob(token="a", logprob=-1.0)])),
        ({"tokens": ["a"], "token_logprobs": [-1]}, Logprobs()),
        ("x", None),
        ({"content": "x"}, None),
    ],
)
def test_what_is_not_worth_a_rule_is_as_declared_or_not_there(given: object, expected: object) -> None:
    """Log probabilities of a foreign form are in `to_dict()` only; they do not cost the answer."""
    choice = {"logprobs": given, "finish_reason": ""}
    assert completion(choices=[choice]).choices[0].logprobs == expected
    assert chunk(choices=[choice]).choices[0].logprobs == expected
    assert completion(choices=[choice]).to_dict()["choices"][0]["logprobs"] == given


def test_annotations_and_sound_are_as_declared_or_not_there() -> None:
    """They do not cost the answer either."""
    said = {"annotations": [{"type": "url_citation", "url_citation": {"url": "u", "start_index": "3"}}], "content": []}
    assert message(**said).annotations[0].url_citation.start_index == 3
    assert delta(**said).annotations[0].url_citation.url == "u"
    assert message(annotations="x").annotations is None
    assert message(audio={"id": 5, "data": "x"}).audio is None
    assert delta(audio={"id": "s", "expires_at": "5"}).audio.expires_at == 5


@pytest.mark.parametrize(
    "whole,expected",
    [
        ({"object": "list", "data": [{"id": "a", "created": 1, "owned_by": "o", "vendor": 1}]}, ["a"]),
        ({"data": [{"id": "a", "created": 1.5}]}, ["a"]),
        ({"data": None}, []),
        ({"data": []}, []),
        ([{"id": "a"}, {"id": "b"}], ["a", "b"]),
        ({"models": [{"name": "a"}, {"model": "x", "name": "b"}]}, ["a", "b"]),
        ({"data": ["a", "b", None, 5]}, ["a", "b"]),
        ({"data": [{"id": 5}, {}]}, ["5", ""]),
    ],
)
def test_models_are_found(whole: object, expected: list[str]) -> None:
    """A list of models comes under `data` or `models` or bare, as objects or names."""
    models = _codec.decode_models(msgspec.json.encode(whole))
    assert [model.id for model in models] == expected
    assert all(msgspec.convert(msgspec.to_builtins(model), Model) == model for model in models)


@pytest.mark.parametrize(
    "body", [b"<html>", b'"x"', b"{}", b'{"message": "no"}', b'{"data": {}}', b"5", b"", b"null" * 2]
)
def test_what_holds_no_models_is_refused(body: bytes) -> None:
    """An answer without a list is not taken for an empty one."""
    with pytest.raises(_codec.NotJSONError):
        _codec.decode_models(body)
