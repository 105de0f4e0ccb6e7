"""What comes back: the declared fields, the JSON behind them, and what an object carries that is never sent."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from chatkore_async import _codec
from chatkore_async._accumulate import Accumulator
from chatkore_async._meta import PoolStats
from chatkore_async.types import (
    Attempt,
    CallMeta,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    Choice,
    ChoiceDelta,
    ChunkChoice,
    RateLimitInfo,
    Timings,
    ToolCall,
)

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {n}": lambda it, n=n: pickle.loads(pickle.dumps(it, n)) for n in range(2, pickle.HIGHEST_PROTOCOL + 1)},
}

META = CallMeta(
    request_id="r",
    attempts=(Attempt(number=1, status=200, elapsed=0.5),),
    timings=Timings(total=0.5),
    headers={"x-request-id": "r"},
    rate_limit=RateLimitInfo(limit_requests=5),
)


class Notes:
    """What a call writes down while it runs: it can tell a `CallMeta`, and cannot be pickled."""

    told = 0

    def meta(self) -> CallMeta:
        self.told += 1
        return META

    def __reduce__(self) -> Any:
        raise TypeError("not picklable")

    __copy__ = __deepcopy__ = None


def decode(body: bytes) -> ChatCompletion:
    return _codec.decode_completion(body)[0]


BODY = b'{"id":"c","vendor":{"x":[1]},"choices":[{"message":{"content":"hi","vendor":2}}],"usage":{"total_tokens":1,"v":3}}'


# What a server leaves out.


def test_what_a_server_leaves_out_has_a_default() -> None:
    """`id`, `object` and `model` are empty, `created` is 0, the rest `None` or empty; nothing raises on access."""
    completion = decode(b'{"choices":[{}]}')
    assert (completion.id, completion.object, completion.model, completion.created) == ("", "", "", 0)
    assert completion.usage is completion.system_fingerprint is completion.service_tier is None
    (choice,) = completion.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, None, None)
    message = choice.message
    assert message.role == "assistant"
    assert message.content is message.reasoning_content is message.refusal is message.tool_calls is None
    assert message.annotations is message.audio is message.function_call is None
    assert completion.meta == CallMeta()


def test_nothing_is_shared_between_two_answers() -> None:
    """A default list belongs to its object; adding to one does not show in another."""
    first, second = ChatCompletion(), ChatCompletion()
    first.choices.append(Choice())
    first.choices[0].message.content = "x"
    assert second.choices == []
    assert Choice().message.content is None
    assert CallMeta().headers is not CallMeta().headers


# Shortcuts.


@pytest.mark.parametrize(
    "choices,text",
    [
        ([], ""),
        ([None], ""),
        ([""], ""),
        (["a"], "a"),
        (["a", "b"], "a"),
        ([None, "b"], ""),
    ],
)
def test_text_is_the_first_choices_content(choices: list[str | None], text: str) -> None:
    """`.text` is always a string: the first choice's content, or `""`."""
    messages = [Choice(message=ChatCompletionMessage(content=content)) for content in choices]
    deltas = [ChunkChoice(delta=ChoiceDelta(content=content)) for content in choices]
    assert ChatCompletion(choices=messages).text == text
    assert ChatCompletionChunk(choices=deltas).text == text


def test_tool_calls_are_the_first_choices() -> None:
    """`.tool_calls` is always a list: the first choice's calls, or none."""
    calls = [ToolCall(id="a")]
    assert ChatCompletion().tool_calls == []
    assert ChatCompletion(choices=[Choice()]).tool_calls == []
    assert ChatCompletion(choices=[Choice(message=ChatCompletionMessage(tool_calls=calls))]).tool_calls == calls


@pytest.mark.parametrize(
    "reasons,expected",
    [
        ([], "unconfirmed"),
        ([None], "unconfirmed"),
        (["stop"], "complete"),
        (["stop", None], "unconfirmed"),
        (["stop", "length"], "complete"),
    ],
)
def test_an_answer_is_complete_when_every_choice_has_its_finish_reason(
    reasons: list[str | None], expected: str
) -> None:
    """A completion without a finish reason may have been cut on the way, and says so."""
    assert ChatCompletion(choices=[Choice(finish_reason=reason) for reason in reasons]).completeness == expected


# The JSON behind it.


def test_to_dict_is_the_whole_json() -> None:
    """Vendor fields at every level are in `to_dict()`, as the server sent them (C7)."""
    completion = decode(BODY)
    assert completion.to_dict() == msgspec.json.decode(BODY)
    chunk, whole = _codec.decode_chunk(BODY)
    assert chunk.to_dict() == whole == msgspec.json.decode(BODY)


@pytest.mark.parametrize(
    "body",
    [
        b'\xef\xbb\xbf {"id":"a","x":"\xff\xc3"}\r\n',
        b'[{"id":"a","x":"\xff\xc3"}]',
        '\u00a0{"id":"a","x":"\ufffd\ufffd"}\u2003'.encode(),
    ],
)
def test_to_dict_forgives_what_decoding_forgave(body: bytes) -> None:
    """An answer that was read is readable once more, also where strict decoding skipped what is bad in it."""
    assert decode(body).to_dict() == {"id": "a", "x": "\ufffd\ufffd"}


def test_to_dict_of_an_object_made_by_hand_is_its_fields() -> None:
    """What was not decoded from one message gives its declared fields, and no field of ours."""
    chunk = ChatCompletionChunk(id="a", choices=[ChunkChoice(delta=ChoiceDelta(content="x"))])
    declared = chunk.to_dict()
    assert declared["choices"][0]["delta"]["content"] == "x"
    assert not any(key.startswith("_") for key in declared)
    assert {"error", "x_groq", "meta"}.isdisjoint(declared)
    assert msgspec.json.decode(chunk.raw) == declared
    merged = Accumulator()
    merged.pending.append(chunk)
    assert merged.completion().to_dict()["choices"][0]["message"]["content"] == "x"


def test_raw_is_the_events_bytes() -> None:
    """`chunk.raw` is what arrived, byte by byte, however it was decoded."""
    chunk, _ = _codec.decode_chunk(b' {"id": "a" } ')
    assert chunk.raw == b' {"id": "a" } '
    assert type(chunk.raw) is bytes


# What it carries.


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("meta", [META, Notes()], ids=["meta", "notes"])
def test_a_copy_has_what_the_original_carries(duplicate: Callable[[Any], Any], meta: Any) -> None:
    """Copied, deep-copied or pickled to another process, an answer keeps its metadata and its vendor fields."""
    completion = decode(BODY)
    completion._meta = meta
    again = duplicate(completion)
    assert type(again) is ChatCompletion
    assert again == completion
    assert again.meta == META
    assert again.to_dict() == msgspec.json.decode(BODY)
    chunk, _ = _codec.decode_chunk(BODY)
    assert duplicate(chunk).raw == BODY


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copied_message_can_still_be_sent_back(duplicate: Callable[[Any], Any]) -> None:
    """The name its reasoning came by and its vendor's keys survive, as does an object that carries nothing."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}", "sig": 1}, "x": {"y": 2}}
    body = msgspec.json.encode({"choices": [{"message": {"reasoning": "r", "tool_calls": [call]}}]})
    message = duplicate(decode(body).choices[0].message)
    sent = _codec.encode_request({"model": "m", "messages": [message]}, stream=False, extra_body=None)
    assert msgspec.json.decode(sent)["messages"] == [
        {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [call]}
    ]
    assert duplicate(ToolCall(id="a")) == ToolCall(id="a")
    assert duplicate(ChatCompletion()).meta == CallMeta()


def test_a_deep_copy_shares_nothing() -> None:
    """A change to a copy is not one to the original; a shallow copy shares, as everywhere in Python."""
    completion = decode(BODY)
    deep, shallow = copy.deepcopy(completion), copy.copy(completion)
    deep.choices[0].message.content = "changed"
    assert completion.text == "hi"
    shallow.choices[0].message.content = "changed"
    assert completion.text == "changed"


def test_metadata_is_made_once_when_it_is_asked_for() -> None:
    """A caller who never looks at `.meta` does not pay for it."""
    completion, notes = decode(BODY), Notes()
    completion._meta = notes
    assert notes.told == 0
    assert completion.meta is completion.meta is META
    assert notes.told == 1


def test_what_it_carries_is_never_encoded() -> None:
    """Metadata, raw bytes and vendor keys are in no encoding, no comparison and no repr of an answer."""
    plain, carrying = decode(BODY), decode(BODY)
    carrying._meta = META
    assert msgspec.json.encode(carrying) == msgspec.json.encode(plain)
    assert msgspec.to_builtins(carrying).keys() == msgspec.to_builtins(ChatCompletion()).keys()
    assert carrying == plain
    assert repr(carrying) == repr(plain)
    assert "meta" not in repr(carrying)


def test_metadata_is_frozen_and_pickles() -> None:
    """A `CallMeta` says what happened; nobody can change it, and it can be sent to another process."""
    for thing in (META, META.attempts[0], META.timings, META.rate_limit, PoolStats(open=1)):
        assert pickle.loads(pickle.dumps(thing)) == thing
        with pytest.raises(AttributeError):
            setattr(thing, type(thing).__struct_fields__[0], 1)
