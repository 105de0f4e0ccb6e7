"""Deltas → one completion: whatever the pieces, the answer the model meant."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatkore_async import _codec
from chatkore_async._accumulate import Accumulator, has_delta
from chatkore_async.types import (
    Annotation,
    ChatCompletion,
    ChatCompletionChunk,
    ChoiceDelta,
    ChunkChoice,
    FunctionCallDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)

JSON = dict[str, Any]


def chunk(data: JSON) -> ChatCompletionChunk:
    """Decode a chunk as a stream does: strictly, and only then tolerantly."""
    encoded = msgspec.json.encode(data)
    try:
        return _codec.decode_chunk_strictly(encoded)
    except _codec.MISFIT:
        return _codec.decode_chunk(encoded)[0]


def delta(index: int = 0, finish_reason: str | None = None, **said: Any) -> JSON:
    return {"choices": [{"index": index, "delta": said, "finish_reason": finish_reason}]}


def accumulated(*chunks: JSON) -> Accumulator:
    accumulator = Accumulator()
    accumulator.pending.extend(map(chunk, chunks))
    return accumulator


def merged(*chunks: JSON) -> ChatCompletion:
    return accumulated(*chunks).completion()


def calls(*deltas: list[JSON]) -> list[tuple[str, str, str]]:
    """Id, name and arguments of the calls that deltas of tool calls merge into."""
    completion = merged(*(delta(tool_calls=pieces) for pieces in deltas))
    assert all(msgspec.json.decode(call.function.arguments or "{}") is not None for call in completion.tool_calls)
    return [(call.id, call.function.name, call.function.arguments) for call in completion.tool_calls]


def piece(
    index: int | None = None, id_: str | None = None, name: str | None = None, arguments: Any = None, **more: Any
) -> JSON:
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    given = {"index": index, "id": id_, "function": function or None}
    return {key: value for key, value in given.items() if value is not None} | more


# Texts and heads.


def test_a_stream_merges_into_the_completion_a_plain_call_would_give() -> None:
    """Text, role, finish reason, usage and head of a stream are those of the answer it is."""
    head = {"id": "c", "object": "chat.completion.chunk", "created": 7, "model": "m", "system_fingerprint": "fp"}
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    streamed = merged(
        head | delta(role="assistant", content=""),
        head | delta(content="Hel"),
        head | delta(content="lo"),
        head | delta(finish_reason="stop"),
        head | {"choices": [], "usage": usage, "service_tier": "default"},
    )
    message = {"role": "assistant", "content": "Hello"}
    whole = head | {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": usage,
        "service_tier": "default",
    }
    assert streamed == _codec.decode_completion(msgspec.json.encode(whole))[0]
    assert streamed.text == "Hello"
    assert streamed.completeness == "complete"


@pytest.mark.parametrize("field", ["content", "reasoning_content", "refusal"])
@pytest.mark.parametrize(
    "pieces,expected",
    [([], None), ([None], None), ([""], ""), (["", None, "a", "", "b"], "ab"), (["\u2028", "🎉"], "\u2028🎉")],
)
def test_texts_are_joined(field: str, pieces: list[str | None], expected: str | None) -> None:
    """Every text that comes in pieces is joined; one that never came is `None`, one that came empty is empty (C2)."""
    completion = merged(delta(), *({"choices": [{"delta": {field: text}}]} for text in pieces))
    assert getattr(completion.choices[0].message, field) == expected


@settings(deadline=None)
@given(st.text(), st.lists(st.integers(0, 50), max_size=6))
def test_any_split_of_a_text_is_the_same_completion(text: str, cuts: list[int]) -> None:
    """Where a server cuts a text does not show."""
    at = [0, *sorted(cuts), max(len(text), *cuts, 0)]
    pieces = [text[start:end] for start, end in itertools.pairwise(at)]
    assert merged(*(delta(content=each) for each in pieces)) == merged(delta(content=text))


@settings(deadline=None)
@given(st.data())
def test_any_interleaving_of_choices_is_the_same_completion(data: st.DataObject) -> None:
    """With `n > 1` the choices come in turns; each is merged for itself, and they are sorted (C8)."""
    said = data.draw(st.dictionaries(st.integers(0, 4), st.lists(st.text(max_size=3), min_size=1), max_size=4))
    ends = [[delta(index, content=text) for text in texts] + [delta(index, "stop")] for index, texts in said.items()]
    in_order = list(itertools.chain(*ends))
    shuffled = []
    while any(ends):
        shuffled.append(data.draw(st.sampled_from([left for left in ends if left])).pop(0))
    completion = merged(*shuffled)
    assert completion == merged(*in_order)
    assert [choice.index for choice in completion.choices] == sorted(said)
    assert [choice.message.content for choice in completion.choices] == ["".join(said[i]) for i in sorted(said)]


@settings(deadline=None)
@given(st.lists(st.text(max_size=3), max_size=10), st.sets(st.integers(0, 10)))
def test_looking_on_the_way_changes_nothing(texts: list[str], looks: set[int]) -> None:
    """A snapshot is what came so far; it is not changed by what comes later, and changes nothing itself."""
    accumulator, snapshots = Accumulator(), []
    for number, text in enumerate(texts):
        if number in looks:
            snapshots.append((accumulator.completion(), "".join(texts[:number])))
        accumulator.pending.append(chunk(delta(content=text, tool_calls=[piece(0, "a", "f", "1")])))
    assert [snapshot.text for snapshot, _ in snapshots] == [expected for _, expected in snapshots]
    assert accumulator.completion().text == "".join(texts)


def test_a_snapshot_keeps_its_lists() -> None:
    """Log probabilities, annotations and calls that come later are not added to a completion given out before."""
    logprobs = {"content": [{"token": "a", "logprob": -1.0}], "refusal": [{"token": "r"}]}
    said = delta(annotations=[{"type": "url_citation"}], tool_calls=[piece(0, "a", "f", "{}")])
    said["choices"][0]["logprobs"] = logprobs
    accumulator = accumulated(said)
    before = accumulator.completion()
    encoded = msgspec.json.encode(before)
    accumulator.pending.extend([chunk(said), chunk(delta(tool_calls=[piece(1, "b", "g", "{}")]))])
    after = accumulator.completion()
    assert msgspec.json.encode(before) == encoded
    assert after.choices[0].logprobs is not None
    assert [token.token for token in after.choices[0].logprobs.content or []] == ["a", "a"]
    assert [token.token for token in after.choices[0].logprobs.refusal or []] == ["r", "r"]
    assert after.choices[0].message.annotations == [Annotation(type="url_citation")] * 2


def test_the_first_id_model_and_time_that_are_not_empty_win() -> None:
    """Azure's first chunk has neither; relays change them on the way (C1)."""
    completion = merged(
        {"id": "", "model": "", "created": 0, "choices": [], "prompt_filter_results": [{}]},
        {"id": "a", "model": "", "created": 0},
        {"id": "b", "model": "m", "created": 0},
        {"id": "c", "model": "n", "created": 5, "system_fingerprint": "fp"},
        {"id": "d", "model": "o", "created": 6, "system_fingerprint": None, "service_tier": "flex"},
    )
    assert (completion.id, completion.model, completion.created) == ("a", "m", 5)
    assert (completion.system_fingerprint, completion.service_tier) == ("fp", "flex")
    assert completion.object == "chat.completion"


@pytest.mark.parametrize(
    "usages,expected",
    [
        ([None], None),
        ([{}], None),
        ([{"total_tokens": 1}, {"total_tokens": 5}], Usage(total_tokens=5)),
        ([{"total_tokens": 5}, None, {}, {"total_tokens": 0}], Usage(total_tokens=5)),
        ([{"total_tokens": "5", "prompt_tokens": 2.0}], Usage(total_tokens=5, prompt_tokens=2)),
    ],
)
def test_the_last_usage_counts(usages: list[JSON | None], expected: Usage | None) -> None:
    """Usage in every chunk is a running total: the last one that is not empty wins, none are summed (C6)."""
    assert merged(*({"choices": [], "usage": usage} for usage in usages)).usage == expected


@pytest.mark.parametrize(
    "reasons,expected",
    [
        (["", "null", None, "stop"], "stop"),
        (["stop", "length"], "stop"),
        (["stop", None, ""], "stop"),
        (["STOP"], "STOP"),
        (["eos_token"], "eos_token"),
        (["", "null"], None),
    ],
)
def test_a_finish_reason_once_seen_stays(reasons: list[str | None], expected: str | None) -> None:
    """`""` and `"null"` are no reason, any other word is one, and no later chunk takes it back (C3, C9)."""
    completion = merged(*(delta(finish_reason=reason, content="x") for reason in reasons))
    assert completion.choices[0].finish_reason == expected


@pytest.mark.parametrize(
    "roles,expected", [([], "assistant"), ([None, ""], "assistant"), (["model", "", "user"], "model")]
)
def test_the_role_is_assistant_unless_said(roles: list[str | None], expected: str) -> None:
    """A role may be repeated, empty or never sent; the first that says something counts (C2)."""
    completion = merged(delta(content="x"), *(delta(role=role) for role in roles))
    assert completion.choices[0].message.role == expected


@pytest.mark.parametrize(
    "said,name",
    [
        ([{"reasoning_content": "a"}, {"reasoning_content": "b"}], "reasoning_content"),
        ([{"reasoning": "a"}, {"reasoning": "b"}], "reasoning"),
        (
            [{"reasoning_content": "a", "reasoning": "a"}, {"reasoning_content": "b", "reasoning": "b"}],
            "reasoning_content",
        ),
        ([{"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "ab"}]}]}], None),
    ],
)
def test_reasoning_is_merged_and_goes_back_under_its_name(said: list[JSON], name: str | None) -> None:
    """What the model thought is in `reasoning_content` (C5), and sent back by the name it came by, if it had one."""
    message = merged(*(delta(**each) for each in said)).choices[0].message
    assert message.reasoning_content == "ab"
    body = _codec.encode_request({"model": "m", "messages": [message]}, stream=False, extra_body=None)
    sent = msgspec.json.decode(body)["messages"][0]
    assert {key: value for key, value in sent.items() if key.startswith("reasoning")} == ({name: "ab"} if name else {})


def test_the_legacy_function_call_and_sound_are_merged() -> None:
    """What came before tools, and spoken answers, come in pieces as well."""
    message = (
        merged(
            delta(function_call={"name": "f", "arguments": '{"a"'}),
            delta(function_call={"arguments": ":1}"}),
            delta(audio={"id": "s", "transcript": "he"}),
            delta(audio={"data": "QUJD", "transcript": "y"}),
            delta(audio={"data": "REVG", "expires_at": 9}),
        )
        .choices[0]
        .message
    )
    assert message.function_call is not None
    assert (message.function_call.name, message.function_call.arguments) == ("f", '{"a":1}')
    assert message.audio is not None
    assert msgspec.structs.astuple(message.audio) == ("s", "QUJDREVG", 9, "hey")


# Tool calls (C4).

ONE = [("a", "get_weather", '{"city": "Rome"}')]
TWO = [("a", "f", '{"x": 1}'), ("b", "g", '{"y": 2}')]
ANONYMOUS = [("", "f", '{"x": 1}'), ("", "g", '{"y": 2}')]
TWICE = [("", "f", '{"x": 1}'), ("", "f", '{"x": 2}')]

FORMS: dict[str, tuple[list[list[JSON]], list[tuple[str, str, str]]]] = {
    "as OpenAI sends it": (
        [
            [piece(0, "a", "get_weather", "")],
            [piece(0, arguments='{"city"')],
            [piece(0, arguments=': "Rome"}')],
        ],
        ONE,
    ),
    "whole at once": ([[piece(0, "a", "get_weather", '{"city": "Rome"}')]], ONE),
    "whole, twice": ([[piece(0, "a", "get_weather", '{"city": "Rome"}')]] * 2, ONE),
    "whole, twice, no index": ([[piece(None, "a", "get_weather", '{"city": "Rome"}')]] * 2, ONE),
    "in pieces, then whole": (
        [
            [piece(0, "a", "get_weather", '{"city": ')],
            [piece(0, arguments='"Rome"}')],
            [piece(0, "a", "get_weather", '{"city": "Rome"}')],
        ],
        ONE,
    ),
    "arguments an object": ([[piece(0, "a", "get_weather", {"city": "Rome"})]], ONE),
    "arguments null, then there": (
        [
            [{"index": 0, "id": "a", "function": {"name": "get_weather", "arguments": None}}],
            [piece(0, arguments='{"city": "Rome"}')],
        ],
        ONE,
    ),
    "an empty object before the arguments": (
        [[piece(0, "a", "get_weather", "{}")], [piece(0, arguments='{"city": ')], [piece(0, arguments='"Rome"}')]],
        ONE,
    ),
    "an empty object before the arguments, id and name repeated": (
        [[piece(0, "a", "get_weather", "{}")], [piece(0, "a", "get_weather", '{"city": "Rome"}')]],
        ONE,
    ),
    "without index": (
        [[piece(None, "a", "get_weather", "")], [piece(arguments='{"city"')], [piece(arguments=': "Rome"}')]],
        ONE,
    ),
    "index only later": ([[piece(None, "a", "get_weather")], [piece(0, arguments='{"city": "Rome"}')]], ONE),
    "index only at first": ([[piece(0, "a", "get_weather")], [piece(arguments='{"city": "Rome"}')]], ONE),
    "index grows by the piece, id repeated": (
        [[piece(0, "a", "get_weather")], [piece(1, "a", arguments='{"city": ')], [piece(2, "a", arguments='"Rome"}')]],
        ONE,
    ),
    "index a string": (
        [[{"index": "0", "id": "a", "function": {"name": "get_weather"}}], [piece(0, arguments='{"city": "Rome"}')]],
        ONE,
    ),
    "id repeated": ([[piece(0, "a", "get_weather", "")], [piece(0, "a", arguments='{"city": "Rome"}')]], ONE),
    "id made up for every piece": (
        [
            [piece(0, "a", "get_weather", "")],
            [piece(0, "b", arguments='{"city": ')],
            [piece(0, "c", arguments='"Rome"}')],
        ],
        ONE,
    ),
    "id made up for every piece, no index": (
        [
            [piece(None, "a", "get_weather", "")],
            [piece(None, "b", arguments='{"city": ')],
            [piece(None, "c", arguments='"Rome"}')],
        ],
        ONE,
    ),
    "id and name in every piece": (
        [
            [piece(0, "a", "get_weather", '{"city": ')],
            [piece(0, "a", "get_weather", '"Rome"')],
            [piece(0, "a", "get_weather", "}")],
            [piece(0, "a", "get_weather", "")],
        ],
        ONE,
    ),
    "another id and the name in every piece": (
        [
            [piece(0, "a", "get_weather", '{"city": ')],
            [piece(0, "b", "get_weather", '"Rome"')],
            [piece(0, "c", "get_weather", "}")],
        ],
        ONE,
    ),
    "name in every piece, no id, no index": (
        [[piece(name="f", arguments='{"x"')], [piece(name="f", arguments=": 1")], [piece(name="f", arguments="}")]],
        ANONYMOUS[:1],
    ),
    "name in every piece, index, no id": (
        [
            [piece(0, name="f", arguments='{"x"')],
            [piece(0, name="f", arguments=": 1}")],
            [piece(0, name="f", arguments="")],
        ],
        ANONYMOUS[:1],
    ),
    "id empty": ([[piece(0, "", "f", "")], [piece(0, "", "", '{"x": 1}')]], ANONYMOUS[:1]),
    "id late": ([[piece(0, None, "f", '{"x"')], [piece(0, "a", arguments=": 1}")]], TWO[:1]),
    "name in fragments": (
        [
            [piece(0, "a", "get_")],
            [piece(0, name="wea")],
            [piece(0, name="ther")],
            [piece(0, arguments='{"city": "Rome"}')],
        ],
        ONE,
    ),
    "name growing": (
        [[piece(0, "a", "get_")], [piece(0, "a", "get_weather")], [piece(0, arguments='{"city": "Rome"}')]],
        ONE,
    ),
    "several entries of one call in one delta": (
        [[piece(0, "a", "get_weather"), piece(0, arguments='{"city": '), piece(0, arguments='"Rome"}')]],
        ONE,
    ),
    "parallel": (
        [
            [piece(0, "a", "f", "")],
            [piece(0, arguments='{"x": 1}')],
            [piece(1, "b", "g", "")],
            [piece(1, arguments='{"y": 2}')],
        ],
        TWO,
    ),
    "parallel, in turns": (
        [
            [piece(0, "a", "f", ""), piece(1, "b", "g", "")],
            [piece(1, arguments='{"y"'), piece(0, arguments='{"x"')],
            [piece(0, arguments=": 1}")],
            [piece(1, arguments=": 2}")],
        ],
        TWO,
    ),
    "parallel, index from 1": ([[piece(1, "a", "f", '{"x": 1}')], [piece(2, "b", "g", '{"y": 2}')]], TWO),
    "parallel, one index, ids": (
        [
            [piece(0, "a", "f", '{"x"')],
            [piece(0, arguments=": 1}")],
            [piece(0, "b", "g", '{"y"')],
            [piece(0, arguments=": 2}")],
        ],
        TWO,
    ),
    "parallel, one index, ids, in turns": (
        [
            [piece(0, "a", "f", "")],
            [piece(0, "b", "g", "")],
            [piece(0, "a", arguments='{"x": 1}')],
            [piece(0, "b", arguments='{"y": 2}')],
        ],
        TWO,
    ),
    "parallel, one index in one delta, ids": ([[piece(0, "a", "f", '{"x": 1}'), piece(0, "b", "g", '{"y": 2}')]], TWO),
    "parallel, one index, no ids": (
        [[piece(0, name="f", arguments={"x": 1})], [piece(0, name="g", arguments={"y": 2})]],
        ANONYMOUS,
    ),
    "parallel, one index, same name, no ids": (
        [[piece(0, name="f", arguments={"x": 1})], [piece(0, name="f", arguments={"x": 2})]],
        TWICE,
    ),
    "parallel, no index, ids": ([[piece(None, "a", "f", '{"x": 1}'), piece(None, "b", "g", '{"y": 2}')]], TWO),
    "parallel, no index, ids, in turns": (
        [
            [piece(None, "a", "f")],
            [piece(None, "b", "g")],
            [piece(None, "a", arguments='{"x": 1}')],
            [piece(None, "b", arguments='{"y": 2}')],
        ],
        TWO,
    ),
    "parallel, no index, no id, one delta": (
        [[piece(name="f", arguments={"x": 1}), piece(name="g", arguments={"y": 2})]],
        ANONYMOUS,
    ),
    "parallel, no index, no id, in pieces": (
        [
            [piece(name="f", arguments="")],
            [piece(arguments='{"x": 1}')],
            [piece(name="g", arguments="")],
            [piece(arguments='{"y": 2}')],
        ],
        ANONYMOUS,
    ),
    "parallel, no index, no id, same name": (
        [[piece(name="f", arguments={"x": 1})], [piece(name="f", arguments="")], [piece(arguments='{"x": 2}')]],
        TWICE,
    ),
    "parallel, no index, no id, same call, one delta": (
        [[piece(name="roll", arguments={}), piece(name="roll", arguments={})]],
        [("", "roll", "{}")] * 2,
    ),
    "parallel, no index, no id, no arguments, one delta": (
        [[piece(name="f"), piece(name="g")]],
        [("", "f", ""), ("", "g", "")],
    ),
    "parallel, one id for all": (
        [
            [piece(0, "a", "f", "")],
            [piece(1, "a", "g", "")],
            [piece(1, "a", arguments='{"y": 2}')],
            [piece(0, "a", arguments='{"x": 1}')],
        ],
        [("a", "f", '{"x": 1}'), ("a", "g", '{"y": 2}')],
    ),
    "parallel, the name as id": (
        [[piece(None, "f", "f", '{"x": 1}'), piece(None, "f", "f", '{"x": 2}')]],
        [("f", "f", '{"x": 1}'), ("f", "f", '{"x": 2}')],
    ),
    "arguments before the name": ([[piece(0, "a", arguments='{"x": 1}')]], [("a", "", '{"x": 1}')]),
    "a call without arguments": ([[piece(0, "a", "f", "")]], [("a", "f", "")]),
    "a list for arguments": ([[piece(0, "a", "f", [1, {"é": None}])]], [("a", "f", '[1, {"é": null}]')]),
    "nothing at all": ([[], [{}]], [("", "", "")]),
}


@pytest.mark.parametrize("deltas,expected", FORMS.values(), ids=FORMS)
def test_tool_calls_are_merged_into_those_the_model_meant(
    deltas: list[list[JSON]], expected: list[tuple[str, str, str]]
) -> None:
    """By index, else by id, else the last open one; arguments always end as a JSON string (C4)."""
    assert calls(*deltas) == expected


def test_arguments_that_are_a_braces_only_by_chance_are_kept() -> None:
    """Only whole arguments that are sent again are dropped: text that repeats itself is text."""
    assert [a for _, _, a in calls([piece(0, "a", "f", '{"x": "}}')], [piece(0, arguments='}}"}')])] == [
        '{"x": "}}}}"}'
    ]
    deltas = [{"index": 0, "custom": {"name": "f", "input": "{}"}}]
    custom = merged(delta(tool_calls=deltas), delta(tool_calls=deltas)).tool_calls[0]
    assert custom.type == "custom"
    assert custom.custom
    assert custom.custom.input == "{}{}"


def test_arguments_nested_too_deeply_to_read_are_joined_all_the_same() -> None:
    """Whether arguments came twice is asked of a parser that gives up; no answer is then no."""
    deep = '{"a":' * 100_000 + "1" + "}" * 100_000
    chunks = [
        ChatCompletionChunk(
            choices=[
                ChunkChoice(
                    delta=ChoiceDelta(
                        tool_calls=[ToolCallDelta(index=0, function=FunctionCallDelta(name="f", arguments=deep))]
                    )
                )
            ]
        )
    ] * 2
    accumulator = Accumulator()
    accumulator.pending.extend(chunks)
    assert [call.function.arguments for call in accumulator.completion().tool_calls] == [deep * 2]


def test_what_a_vendor_puts_into_a_call_is_merged_and_sent_back() -> None:
    """Gemini refuses a call without its signature, wherever in the stream and the call it came."""
    completion = merged(
        delta(tool_calls=[piece(0, "a", "f", "", extra_content={"google": {"thought_signature": "s"}})]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": "{}", "sig": "1"}}]),
        delta(tool_calls=[{"index": 0, "function": {"more": "2"}, "z": 3}]),
    )
    body = _codec.encode_request(
        {"model": "m", "messages": [completion.choices[0].message]}, stream=False, extra_body=None
    )
    assert msgspec.json.decode(body)["messages"][0]["tool_calls"] == [
        {
            "id": "a",
            "type": "function",
            "function": {"name": "f", "arguments": "{}", "sig": "1", "more": "2"},
            "extra_content": {"google": {"thought_signature": "s"}},
            "z": 3,
        }
    ]


def test_a_call_says_its_type() -> None:
    """`type` null or empty is a function's, unless the call is a custom one's (C4)."""
    completion = merged(
        delta(tool_calls=[piece(0, "a", "f", type="")]),
        delta(tool_calls=[{"index": 1, "id": "b", "type": None, "custom": {"name": "g", "input": "x"}}]),
    )
    assert [call.type for call in completion.tool_calls] == ["function", "custom"]
    assert merged(delta(content="x", tool_calls=[])).choices[0].message.tool_calls is None


_PIECES = st.fixed_dictionaries(
    {},
    optional={
        "index": st.sampled_from([None, 0, 1, 2]),
        "id": st.sampled_from([None, "", "a", "b"]),
        "type": st.sampled_from([None, "", "function"]),
        "function": st.fixed_dictionaries(
            {},
            optional={
                "name": st.sampled_from([None, "", "f", "g"]),
                "arguments": st.sampled_from([None, "", "{}", '{"x":', "1}", {"x": 1}, [], 1, True]),
            },
        ),
    },
)


@settings(deadline=None)
@given(st.lists(st.lists(_PIECES, max_size=3), max_size=6))
def test_no_arguments_are_lost_whatever_the_pieces(deltas: list[list[JSON]]) -> None:
    """Every piece of arguments is in some call, whole; pieces that say nothing make nothing up."""
    told = merged(*(delta(tool_calls=pieces) for pieces in deltas)).tool_calls
    assert all(isinstance(call, ToolCall) and isinstance(call.function.arguments, str) for call in told)
    assert len(told) <= sum(map(len, deltas))
    every = "\0".join(call.function.arguments for call in told)
    for said in itertools.chain(*deltas):
        arguments = said.get("function", {}).get("arguments")
        text = (
            arguments
            if isinstance(arguments, str)
            else ""
            if arguments is None
            else msgspec.json.encode(arguments).decode()
        )
        if text != "{}":  # it may have stood for arguments that came later
            assert text in every.replace(" ", "")


# One by one.


def one_by_one(*chunks: JSON) -> tuple[Accumulator, list[bool]]:
    """Merge chunks that come alone, as a stream does, and tell which were found to have nothing but a text."""
    accumulator, at_once = Accumulator(), []
    for each in map(chunk, chunks):
        at_once.append(accumulator.add(each))
        if not at_once[-1]:
            accumulator.pending.append(each)
            accumulator.merge()
    return accumulator, at_once


_HEADS = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from(["", "c", "d"]),
        "created": st.sampled_from([0, 7, 8]),
        "model": st.sampled_from(["", "m"]),
        "system_fingerprint": st.sampled_from([None, "", "fp", "fq"]),
        "service_tier": st.sampled_from([None, "default", "flex"]),
        "usage": st.sampled_from([None, {"total_tokens": 0}, {"total_tokens": 3}, {"total_tokens": 4}]),
    },
)
_SAID = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from([None, "assistant"]),
        "content": st.sampled_from([None, "", "a", "b"]),
        "refusal": st.sampled_from([None, "", "no"]),
        "reasoning_content": st.sampled_from([None, "", "hm"]),
    },
)
_CHOICES = st.lists(
    st.fixed_dictionaries(
        {"delta": _SAID}, optional={"index": st.sampled_from([0, 1]), "finish_reason": st.sampled_from([None, "stop"])}
    ),
    min_size=1,
    max_size=2,
)


@settings(deadline=None)
@given(st.lists(st.tuples(_HEADS, _CHOICES, st.integers(1, 5)), max_size=8))
def test_chunks_that_come_alone_are_the_same_completion(said: list[tuple[JSON, list[JSON], int]]) -> None:
    """Whether a chunk comes alone or with others does not show, whatever is in it."""
    chunks = [head | {"choices": choices} for head, choices, times in said for _ in range(times)]
    accumulator, _ = one_by_one(*chunks)
    assert accumulator.completion() == merged(*chunks)
    assert (accumulator.started, accumulator.finished) == (accumulated(*chunks).started, accumulated(*chunks).finished)


_HEAD = {"id": "c", "created": 7, "model": "m", "system_fingerprint": "fp", "service_tier": "default"}


def test_what_has_nothing_but_a_text_is_merged_at_once() -> None:
    """All but the first and the last of a common stream have; an empty text is a text."""
    said = [delta(content=text) for text in ("", "a", "", "b")]
    accumulator, at_once = one_by_one(
        *(
            _HEAD | each
            for each in (delta(role="assistant"), *said, delta(), delta(content="c"), delta(finish_reason="stop"))
        )
    )
    assert at_once == [False, True, True, True, True, False, True, False]
    assert accumulator.completion().text == "abc"
    assert accumulator.finished


@pytest.mark.parametrize(
    "more",
    [
        {"system_fingerprint": "other"},
        {"service_tier": "flex"},
        {"usage": {"total_tokens": 3}},
        delta(content="b", role="assistant"),
        delta(content="b", reasoning_content="hm"),
        delta(content="b", finish_reason="stop"),
        delta(content="b", index=1),
        {"choices": [*delta(content="b")["choices"], *delta(content="c", index=1)["choices"]]},
    ],
)
def test_what_has_more_than_a_text_is_not(more: JSON) -> None:
    """Nothing is lost of it; and what was looked at is as it was."""
    chunks = [_HEAD | delta(content="a"), _HEAD | delta(content="b") | more]
    accumulator, at_once = one_by_one(*chunks)
    assert at_once == [False, False]
    assert accumulator.completion() == merged(*chunks)
    refused = chunk(chunks[1])
    accumulator.add(refused)
    assert refused == chunk(chunks[1])


def test_an_id_of_its_own_makes_no_difference() -> None:
    """C1: the first id, model and time that are not empty win, so that those of later chunks need no look."""
    accumulator, at_once = one_by_one(
        *(_HEAD | {"id": str(number), "created": 7 + number} | delta(content="x") for number in range(20))
    )
    assert at_once == [False, *[True] * 19]
    assert (accumulator.completion().id, accumulator.completion().text) == ("0", "x" * 20)


# What a stream asks of it.


@pytest.mark.parametrize(
    "said,expected",
    [
        (delta(), False),
        (delta(role="assistant", content=""), False),
        (delta(content=None), False),
        ({"choices": []}, False),
        ({"choices": None, "usage": {"total_tokens": 1}}, False),
        (delta(content="x"), True),
        (delta(reasoning_content="x"), True),
        (delta(reasoning="x"), True),
        (delta(refusal="x"), True),
        (delta(tool_calls=[piece(0, "a", "f")]), True),
        (delta(tool_calls=[]), False),
        (delta(function_call={"name": "f"}), True),
        (delta(audio={"id": "a"}), True),
        (delta(finish_reason="stop"), True),
        (delta(finish_reason=""), False),
        ({"choices": [{"index": 0, "delta": {}}, {"index": 1, "delta": {"content": "x"}}]}, True),
    ],
)
def test_the_first_delta_is_the_first_that_says_something(said: JSON, expected: bool) -> None:
    """Content, reasoning, a refusal, a call, sound or a finish reason; a role or usage alone is none (§3)."""
    assert has_delta(chunk(said)) is expected


@pytest.mark.parametrize(
    "chunks,started,finished",
    [
        ([], False, False),
        ([{"choices": []}], False, False),
        ([delta()], False, False),
        ([delta(role="assistant")], True, False),
        ([delta(content="x")], True, False),
        ([delta(reasoning="x")], True, False),
        ([delta(refusal="x")], True, False),
        ([delta(tool_calls=[piece(0, "a", "f")])], True, False),
        ([delta(content="x"), delta(finish_reason="stop")], True, True),
        ([delta(finish_reason="stop")], True, True),
        ([delta(content="x", finish_reason="stop"), delta(1, content="y")], True, False),
        ([delta(content="x", finish_reason="stop"), delta(1)], True, True),
        ([delta(content="x", finish_reason="stop"), delta(1, content="y"), delta(1, "length")], True, True),
        ([delta(content="x", finish_reason="stop"), delta(content="")], True, True),
    ],
)
def test_a_stream_is_finished_when_every_started_choice_is(chunks: list[JSON], started: bool, finished: bool) -> None:
    """A choice that said something needs a finish reason; one that said nothing does not count (§3)."""
    accumulator = accumulated(*chunks)
    assert (accumulator.started, accumulator.finished) == (started, finished)


def test_what_was_merged_is_not_kept() -> None:
    """Chunks put aside are let go once they are merged, so that a long stream does not hold every chunk."""
    accumulator = accumulated(delta(content="a"), delta(content="b"))
    accumulator.merge()
    assert accumulator.pending == []
    accumulator.pending.append(chunk(delta(content="c")))
    assert accumulator.completion().text == "abc"


def test_a_text_is_joined_once_however_often_it_is_looked_at() -> None:
    """A snapshot joins what came since the last one: no piece is joined twice by a snapshot that nothing follows."""
    accumulator = Accumulator()
    for _ in range(1000):
        accumulator.pending.append(chunk(delta(content="x")))
    first, second = accumulator.completion(), accumulator.completion()
    assert first.text is second.text
    assert len(accumulator._choices[0].content) == 1


TEXT = delta(content="Hello world ")
NAMED = delta(tool_calls=[piece(0, "a", "f", '"k", ')])
ANONYMOUS_PIECE = delta(tool_calls=[piece(name="f", arguments='"k", ')])


@pytest.mark.parametrize("said", [TEXT, NAMED, ANONYMOUS_PIECE], ids=["text", "named", "anonymous"])
def test_time_is_linear_in_what_arrives(said: JSON) -> None:
    """Ten times the deltas take about ten times as long, not a hundred times, whatever they are pieces of."""

    def merging(count: int) -> Callable[[], ChatCompletion]:
        accumulator = accumulated(delta(tool_calls=[piece(0, "a", "f", "[")]))
        accumulator.pending += [chunk(said)] * count
        return accumulator.completion

    def seconds(count: int) -> float:
        merge = merging(count)
        began = time.process_time()
        merge()
        return time.process_time() - began

    short, long = (min(seconds(count) for _ in range(3)) for count in (10_000, 100_000))
    assert long < 40 * short
