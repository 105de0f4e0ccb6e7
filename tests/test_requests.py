"""What goes out: nothing that the caller gives is dropped, and what cannot be sent is named."""

import collections
import dataclasses
import decimal
import inspect
import sys
import types as builtin_types
import typing
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from msgspec import UNSET

from chatkore_async import _codec, _requests, _responses
from chatkore_async import types as public
from chatkore_async.errors import InvalidRequestError
from chatkore_async.types import (
    AssistantMessage,
    AudioPart,
    ChatCompletionParams,
    ChatCompletionRequest,
    DeveloperMessage,
    FileContent,
    FilePart,
    ImagePart,
    ImageURL,
    InputAudio,
    SystemMessage,
    TextPart,
    ToolCall,
    ToolMessage,
    UserMessage,
)

JSON = dict[str, Any]
HELLO: JSON = {"role": "user", "content": "Hello"}
ASK: JSON = {"model": "m", "messages": [HELLO]}


def encode(fields: Mapping[str, Any], *, stream: bool = False, extra_body: Any = None) -> bytes:
    return _codec.encode_request(fields, stream=stream, extra_body=extra_body)


def sent(stream: bool = False, extra_body: Any = None, **fields: Any) -> JSON:
    """What a server reads of a request."""
    body: JSON = msgspec.json.decode(encode(ASK | fields, stream=stream, extra_body=extra_body))
    return body


def sent_message(message: object) -> JSON:
    read: JSON = sent(messages=[message])["messages"][0]
    return read


def received(**message: Any) -> _responses.ChatCompletionMessage:
    body = msgspec.json.encode({"choices": [{"message": message}]})
    return _codec.decode_completion(body)[0].choices[0].message


def refused(**fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        sent(**fields)
    error = caught.value
    assert isinstance(error, ValueError)
    assert str(error).startswith(f"{error.path}: ")
    assert "\n" not in str(error)
    assert len(str(error)) < 300
    return error


# The parameters.


def test_the_typed_dict_and_the_struct_are_one() -> None:
    """What `create` takes by name and what a ready request has are the same fields of the same types."""
    hints = typing.get_type_hints(ChatCompletionParams)
    assert hints == typing.get_type_hints(ChatCompletionRequest)
    assert ChatCompletionParams.__required_keys__ == {"model", "messages"}
    assert {f.name for f in msgspec.structs.fields(ChatCompletionRequest) if f.required} == {"model", "messages"}
    assert "stream" not in hints


PAGE = (
    "model messages max_tokens top_p logit_bias user n stop presence_penalty temperature frequency_penalty "
    "response_format seed tools tool_choice"
)
OPENAI = (
    "max_completion_tokens reasoning_effort verbosity parallel_tool_calls stream_options logprobs top_logprobs "
    "modalities audio prediction metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "prompt_cache_options web_search_options moderation functions function_call"
)


def test_every_documented_field_is_there() -> None:
    """Every field of the ChatKore page and the current ones of OpenAI can be given by name, and no others."""
    assert set(ChatCompletionParams.__annotations__) == {*PAGE.split(), *OPENAI.split()}


VALUES: JSON = {
    "max_tokens": 5,
    "top_p": 0.5,
    "logit_bias": {"50256": -100},
    "user": "u",
    "n": 2,
    "stop": ["a", "b"],
    "presence_penalty": 1,
    "temperature": 0,
    "frequency_penalty": -0.5,
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"a": None}}},
    "seed": 2**63,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}, "vendor": 1}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "max_completion_tokens": 0,
    "reasoning_effort": "minimal",
    "verbosity": "low",
    "parallel_tool_calls": False,
    "stream_options": {"include_usage": False},
    "logprobs": True,
    "top_logprobs": 3,
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "prediction": {"type": "content", "content": "x"},
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "flex",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"x": 1},
    "web_search_options": {},
    "moderation": "auto",
    "functions": [{"name": "f"}],
    "function_call": "auto",
}


def test_every_field_is_sent_as_given() -> None:
    """Zero, `False`, `""` and empty objects are values; they are sent like any other."""
    assert VALUES.keys() | ASK.keys() == ChatCompletionParams.__annotations__.keys()
    assert sent(**VALUES) == ASK | VALUES
    assert sent(**dict.fromkeys(("user", "stop"), "")) == ASK | {"user": "", "stop": ""}


@pytest.mark.parametrize("name", sorted(VALUES))
def test_left_out_is_not_sent_and_none_is_null(name: str) -> None:
    """A parameter left out or `UNSET` is not sent; `None` is sent as `null`."""
    assert name not in sent()
    assert name not in sent(**{name: UNSET})
    assert sent(**{name: None})[name] is None


def test_what_the_page_types_too_narrowly_goes_through() -> None:
    """The page calls `temperature` and `top_p` integers and `stop` a string; numbers and lists are right."""
    assert sent(temperature=0.7, top_p=1, stop="x") == ASK | {"temperature": 0.7, "top_p": 1, "stop": "x"}
    assert sent(stop=["x"])["stop"] == ["x"]


def test_a_ready_request_is_what_its_fields_are() -> None:
    """A struct and keyword arguments give the same bytes."""
    request = ChatCompletionRequest(**ASK, **VALUES)
    fields = msgspec.structs.asdict(request)
    assert encode(fields) == encode({name: (ASK | VALUES)[name] for name in fields})
    assert encode(msgspec.structs.asdict(ChatCompletionRequest(**ASK))) == encode(ASK)


def test_stream_is_sent_only_for_streams() -> None:
    """`"stream": true` is in the body of a stream, and nothing in that of a plain call."""
    assert sent(stream=True) == ASK | {"stream": True}
    assert "stream" not in sent()


def test_extra_body_wins_key_by_key() -> None:
    """A vendor's field is added, one of ours replaced whole, and its types are the vendor's business."""
    extra = {"top_k": 5, "temperature": "hot", "metadata": None, "seed": UNSET}
    body = sent(temperature=1, metadata={"a": "b"}, seed=1, user="u", extra_body=extra)
    assert body == ASK | {"top_k": 5, "temperature": "hot", "metadata": None, "user": "u"}
    assert sent(extra_body={}) == sent(extra_body=None) == ASK


def test_the_callers_objects_are_left_alone() -> None:
    """Encoding changes nothing that was given, so that it can be given again."""
    calls = received(tool_calls=[{"id": "a", "function": {"name": "f"}, "sig": 1}]).tool_calls
    message = {"role": "assistant", "tool_calls": calls}
    fields = ASK | {"messages": [message], "stop": UNSET}
    extra = {"top_k": 1}
    first = encode(fields, stream=True, extra_body=extra)
    assert fields == ASK | {"messages": [{"role": "assistant", "tool_calls": calls}], "stop": UNSET}
    assert extra == {"top_k": 1}
    assert encode(fields, stream=True, extra_body=extra) == first


# Messages.


@pytest.mark.parametrize(
    "message,expected",
    [
        (SystemMessage(content="x"), {"role": "system", "content": "x"}),
        (DeveloperMessage(content="x", name="n"), {"role": "developer", "content": "x", "name": "n"}),
        (UserMessage(content=[{"type": "vendor"}]), {"role": "user", "content": [{"type": "vendor"}]}),
        (ToolMessage(content="x", tool_call_id="a"), {"role": "tool", "content": "x", "tool_call_id": "a"}),
        (AssistantMessage(), {"role": "assistant"}),
        (AssistantMessage(content=None), {"role": "assistant", "content": None}),
        (
            AssistantMessage(reasoning_content="r", refusal="n", audio={"id": "a"}, tool_calls=[{"id": "x"}]),
            {
                "role": "assistant",
                "reasoning_content": "r",
                "refusal": "n",
                "audio": {"id": "a"},
                "tool_calls": [{"id": "x"}],
            },
        ),
        (
            UserMessage(
                content=[
                    TextPart(text="x"),
                    ImagePart(image_url=ImageURL(url="u", detail="low")),
                    ImagePart(image_url=ImageURL(url="u")),
                    AudioPart(input_audio=InputAudio(data="d", format="wav")),
                    FilePart(file=FileContent(file_id="f")),
                ]
            ),
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "x"},
                    {"type": "image_url", "image_url": {"url": "u", "detail": "low"}},
                    {"type": "image_url", "image_url": {"url": "u"}},
                    {"type": "input_audio", "input_audio": {"data": "d", "format": "wav"}},
                    {"type": "file", "file": {"file_id": "f"}},
                ],
            },
        ),
    ],
)
def test_structs_are_the_dicts_they_stand_for(message: object, expected: JSON) -> None:
    """A message or part is encoded with its role or type, and without what was not given."""
    assert sent_message(message) == expected


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "x", "cache_control": {"type": "ephemeral"}, "name": None},
        {"role": "vendor", "content": {"any": ["thing", 1, None]}},
        {"role": "", "parts": []},
        {"role": "tool", "tool_call_id": "a", "content": ""},
    ],
)
def test_dicts_are_checked_shallowly_and_sent_as_given(message: JSON) -> None:
    """A mapping with a string for its `role` is a message; what else is in it is between caller and server."""
    assert sent_message(message) == message


@dataclasses.dataclass
class Note:
    role: str
    content: object
    tool_calls: object = None


class Text(str):
    __slots__ = ()


class Number(float):
    __slots__ = ()


class Count(int):
    __slots__ = ()


@pytest.mark.parametrize(
    "messages",
    [
        (HELLO,),
        collections.deque([HELLO]),
        {1: HELLO}.values(),
        iter([HELLO]),
        (message for message in [HELLO]),
        [builtin_types.MappingProxyType(HELLO)],
        [collections.ChainMap(HELLO)],
        [collections.OrderedDict(HELLO)],
        [Note("user", "Hello")],
        [HELLO | {"content": Text("Hello")}],
    ],
    ids=lambda messages: type(messages).__name__,
)
def test_any_collection_of_messages_is_sent(messages: Any) -> None:
    """Lists are the habit, but a tuple, a view, a generator or another kind of mapping holds messages as well."""
    assert HELLO.items() <= sent(messages=messages)["messages"][0].items()


def test_a_generator_is_read_once() -> None:
    """Messages and tools may be generators, as for the official client, also beside `extra_body`."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = sent(messages=(m for m in [HELLO, HELLO]), tools=(t for t in tools), extra_body={"top_k": 1})
    assert body == {"model": "m", "messages": [HELLO, HELLO], "tools": tools, "top_k": 1}


def test_kinds_of_str_and_numbers_are_what_they_are_kinds_of() -> None:
    """A subclass of `str`, `int` or `float` is sent as its value."""
    body = sent(user=Text("abc"), temperature=Number(0.5), n=Count(2), metadata={"t": Text("x")})
    assert body == ASK | {"user": "abc", "temperature": 0.5, "n": 2, "metadata": {"t": "x"}}


def test_collections_inside_are_lists() -> None:
    """A set, a deque or a view is a list to JSON, wherever it stands."""
    body = sent(stop={"s"}, modalities=collections.deque(["text"]), metadata={"a": {"b": 1}.keys()})
    assert body == ASK | {"stop": ["s"], "modalities": ["text"], "metadata": {"a": ["b"]}}


# A received message can be sent back.


def test_a_received_message_can_be_sent_back() -> None:
    """Role, content, refusal, tool calls and sound by its id go back; annotations, which no server takes, do not."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = received(
        role="assistant",
        content="x",
        refusal="no",
        tool_calls=[call],
        annotations=[{"type": "url_citation", "url_citation": {"url": "u"}}],
        audio={"id": "s", "data": "QUJD"},
        function_call={"name": "g", "arguments": "1"},
    )
    assert sent_message(message) == {
        "role": "assistant",
        "content": "x",
        "refusal": "no",
        "tool_calls": [call],
        "audio": {"id": "s"},
        "function_call": {"name": "g", "arguments": "1"},
    }
    assert sent_message(received(content="x")) == {"role": "assistant", "content": "x"}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_goes_back_under_the_name_it_came_by(name: str) -> None:
    """DeepSeek wants `reasoning_content` back, OpenRouter `reasoning`; a message knows which it was."""
    message = received(content="x", **{name: "thought"})
    assert message.reasoning_content == "thought"
    assert sent_message(message) == {"role": "assistant", "content": "x", name: "thought"}


SIGNED = {
    "id": "a",
    "type": "function",
    "function": {"name": "f", "arguments": "{}", "thought": "t"},
    "extra_content": {"google": {"thought_signature": "s"}},
}
CUSTOM = {"id": "b", "type": "custom", "custom": {"name": "g", "input": "x"}}


@pytest.mark.parametrize("call", [SIGNED, CUSTOM, CUSTOM | {"sig": "s"}])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda message: message,
        lambda message: {"role": "assistant", "tool_calls": message.tool_calls},
        lambda message: builtin_types.MappingProxyType({"role": "assistant", "tool_calls": tuple(message.tool_calls)}),
        lambda message: AssistantMessage(tool_calls=message.tool_calls),
    ],
    ids=["message", "dict", "mapping", "struct"],
)
def test_tool_calls_go_back_with_what_their_vendor_put_into_them(call: JSON, wrap: Any) -> None:
    """Inside the message, a dict or a struct, a received call is sent as it came, vendor keys and all."""
    assert sent_message(wrap(received(tool_calls=[call])))["tool_calls"] == [call]


def test_received_calls_stand_beside_calls_written_by_hand() -> None:
    """A list may mix them, and an object that is no struct keeps the calls' declared fields."""
    (call,) = received(tool_calls=[SIGNED]).tool_calls or []
    assert sent_message({"role": "assistant", "tool_calls": [{"id": "x"}, call]})["tool_calls"] == [{"id": "x"}, SIGNED]
    assert sent_message(Note("assistant", None, [ToolCall(id="y")]))["tool_calls"][0]["id"] == "y"


# What cannot be sent.


@pytest.mark.parametrize(
    "fields,path,reason",
    [
        ({"model": UNSET}, "$.model", "required"),
        ({"model": None}, "$.model", "null"),
        ({"model": 5}, "$.model", "expected `str`"),
        ({"messages": UNSET}, "$.messages", "required"),
        ({"messages": []}, "$.messages", "at least one message"),
        ({"messages": iter(())}, "$.messages", "at least one message"),
        ({"messages": None}, "$.messages", "null"),
        ({"messages": "Hello"}, "$.messages", "expected `array`"),
        ({"messages": HELLO}, "$.messages", "expected `array`"),
        ({"messages": ["Hello"]}, "$.messages[0]", "expected `object`"),
        ({"messages": [HELLO, None]}, "$.messages[1]", "null"),
        ({"messages": [HELLO, HELLO, {"content": "x"}]}, "$.messages[2].role", "required"),
        ({"messages": [HELLO | {"role": 1}]}, "$.messages[0].role", "expected `str`"),
        ({"messages": [HELLO | {"role": None}]}, "$.messages[0].role", "null"),
        ({"temperature": "hot"}, "$.temperature", "expected `float | null`"),
        ({"temperature": True}, "$.temperature", "bool"),
        ({"temperature": decimal.Decimal(1)}, "$.temperature", "str"),
        ({"max_tokens": 1.5}, "$.max_tokens", "expected `int | null`"),
        ({"n": True}, "$.n", "bool"),
        ({"stop": ["a", 1]}, "$.stop[1]", "expected `str`"),
        ({"stop": 5}, "$.stop", "int"),
        ({"tools": {"type": "function"}}, "$.tools", "array"),
        ({"tools": ["f"]}, "$.tools[0]", "expected `object`"),
        ({"tool_choice": 1}, "$.tool_choice", "int"),
        ({"response_format": "json"}, "$.response_format", "object"),
        ({"logit_bias": {"1": "x"}}, "$.logit_bias[...]", "expected `float`"),
        ({"metadata": []}, "$.metadata", "object"),
        ({"modalities": "text"}, "$.modalities", "array"),
        ({"parallel_tool_calls": 1}, "$.parallel_tool_calls", "bool"),
        ({"user": ["u"]}, "$.user", "str"),
    ],
)
def test_a_wrong_type_is_named_with_its_path(fields: JSON, path: str, reason: str) -> None:
    """A missing or mistyped field is refused before any I/O, and the error says where it is."""
    error = refused(**fields)
    assert error.path == path
    assert reason in str(error)


CYCLE: JSON = {}
CYCLE["a"] = [CYCLE]
DEEP: JSON = {}
for _ in range(100_000):  # beyond the C stack of every Python
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    "fields,path,reason",
    [
        ({"temperature": float("nan")}, "$.temperature", "JSON has no nan"),
        ({"top_p": float("inf")}, "$.top_p", "JSON has no inf"),
        ({"logit_bias": {5: float("-inf")}}, "$.logit_bias.5", "JSON has no -inf"),
        ({"messages": [HELLO, HELLO | {"x": [1.0, Number("nan")]}]}, "$.messages[1].x[1]", "JSON has no nan"),
        ({"messages": [UserMessage(content=[{"x": float("nan")}])]}, "$.messages[0].content[0].x", "JSON has no nan"),
        ({"messages": [Note("user", float("nan"))]}, "$.messages[0].content", "JSON has no nan"),
        ({"tools": ({"x": float("nan")},)}, "$.tools[0].x", "JSON has no nan"),
        ({"extra_body": {"x": float("nan")}}, "$.x", "JSON has no nan"),
        ({"metadata": {"a": object()}}, "$.metadata.a", "object has no form in JSON"),
        ({"metadata": {"a": [1.0, float("nan")], "b": object()}}, "$.metadata.a[1]", "JSON has no nan"),
        ({"metadata": {"a": {object}}}, "$.metadata.a[0]", "type has no form in JSON"),
        ({"messages": [UserMessage(content=object())]}, "$.messages[0].content", "object has no form"),  # type: ignore[arg-type]
        ({"messages": [object()]}, "$.messages[0]", "object has no form"),
        ({"messages": [HELLO | {"x": UNSET}]}, "$.messages[0].x", "UnsetType has no form"),
        ({"metadata": {"a": (x for x in "ab")}}, "$.metadata.a", "give a list"),
        ({"metadata": {None: 1}}, "$.metadata.None", "NoneType has no form"),
        ({"metadata": {"a": CYCLE}}, "$.metadata", "contains itself"),
        ({"metadata": DEEP}, "$.metadata", "nested too deeply"),
        ({"extra_body": {"x": CYCLE}}, "$.x", "contains itself"),
        ({"messages": [HELLO | {"content": "a\ud83d"}]}, "$.messages[0].content", "half of a surrogate pair"),
        ({"metadata": {"\ud83d": 1}}, "$.metadata.\\ud83d", "half of a surrogate pair"),
        ({"extra_body": {"\ud83d": 1}}, "$.\\ud83d", "half of a surrogate pair"),
        ({"seed": 10**5000}, "$.seed", "digits"),
        ({"extra_body": [("a", 1)]}, "$.extra_body", "expected a mapping, got list"),
        ({"extra_body": "abc"}, "$.extra_body", "expected a mapping, got str"),
        ({"metadata": msgspec.Raw(b"{bad")}, "$", "Raw"),
        ({"metadata": msgspec.Raw(b'{"a":\xff}')}, "$", "Raw"),
    ],
)
def test_what_json_cannot_hold_is_named_with_its_path(fields: JSON, path: str, reason: str) -> None:
    """NaN, infinity, objects, cycles, half characters: refused, wherever they are, and never sent as `null`."""
    error = refused(**fields)
    assert error.path == path
    assert reason in str(error)
    str(error).encode()  # it can be printed


@pytest.mark.parametrize("nested", [{"a": CYCLE}, DEEP], ids=["cycle", "deep"])
def test_no_recursion_error_leaks_from_deep_in_a_program(nested: JSON) -> None:
    """A request is refused as such also where the stack is nearly used up."""

    def at(depth: int) -> InvalidRequestError:
        return at(depth - 1) if depth else refused(metadata=nested)

    used = len(inspect.stack(0))
    assert at(sys.getrecursionlimit() - used - 100).path in ("$", "$.metadata")


def test_null_in_a_text_is_no_fault() -> None:
    """The word and the value go through; only what `null` would stand for is refused."""
    body = sent(messages=[{"role": "assistant", "content": None}, {"role": "user", "content": "null and nan"}])
    assert body["messages"] == [{"role": "assistant", "content": None}, {"role": "user", "content": "null and nan"}]


# The public names.


def test_every_struct_of_the_wire_is_public() -> None:
    """What can be sent or received can be imported from `chatkore_async.types`."""
    structs = {
        name
        for module in (_requests, _responses)
        for name, thing in vars(module).items()
        if isinstance(thing, type) and issubclass(thing, msgspec.Struct) and not name.startswith("_")
    }
    assert structs <= set(public.__all__)
    assert public.__all__ == sorted(public.__all__)
    assert all(hasattr(public, name) for name in public.__all__)


def test_reprs_are_short() -> None:
    """A struct shows what was given, not thirty fields that were not."""
    request = ChatCompletionRequest(model="m", messages=[UserMessage(content="x")], n=1)
    assert repr(request) == "ChatCompletionRequest(model='m', messages=[UserMessage(content='x')], n=1)"
