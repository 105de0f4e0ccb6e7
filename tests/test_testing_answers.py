"""The answers that the loopback server gives by itself: pure functions, so no server runs here."""

import re
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatkore_async.testing import Pause, Reply, answer
from chatkore_async.testing._schema import instance
from chatkore_async.testing._shapes import split

WEATHER: dict[str, object] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 3}},
            "required": ["city"],
        },
    },
}
TIME: dict[str, object] = {"type": "function", "function": {"name": "get_time"}}


def asked(text: object = "Hello there", **fields: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **fields}


def body(reply: Reply) -> Any:
    return msgspec.json.decode(reply.body)


def choice(**fields: object) -> Any:
    return body(answer(asked(**fields)))["choices"][0]


def content(**fields: object) -> str:
    text = choice(**fields)["message"]["content"]
    assert isinstance(text, str)
    return text


def chunks(**fields: object) -> list[Any]:
    reply = answer(asked(**fields, stream=True))
    assert reply.header("content-type") == "text/event-stream; charset=utf-8"
    *events, done, rest = reply.body.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    return [msgspec.json.decode(event.removeprefix(b"data: ")) for event in events]


# Text


def test_the_same_request_gets_the_same_bytes() -> None:
    """Two runs of a program against the server see the same, identifiers included; another request sees others."""
    assert answer(asked()) == answer(asked())
    assert answer(asked()) == answer(msgspec.json.encode(asked()))
    assert body(answer(asked()))["id"] != body(answer(asked("Bye")))["id"]
    assert (answer(asked()).header("X-Request-Id") or "").startswith("req_")


def test_an_answer_is_openai_shaped() -> None:
    """An answer names the model asked for, refers to the last user message, and counts its tokens."""
    made = body(answer(asked()))
    assert (made["object"], made["model"], made["created"]) == ("chat.completion", "m", 1_700_000_000)
    assert "“Hello there”" in made["choices"][0]["message"]["content"]
    assert made["choices"][0]["finish_reason"] == "stop"
    usage = made["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] == 4 + len("Hello there") // 4


def test_content_may_come_in_parts() -> None:
    """The text of a message in parts is read, what is no text is passed over."""
    parts = [{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    assert "“Look:”" in content(text=parts)


def test_long_messages_are_quoted_in_part() -> None:
    """A long message is quoted by its beginning."""
    assert f"“{'x' * 79}…”" in content(text="x" * 1000)


def test_without_a_user_the_last_message_counts() -> None:
    """A conversation that no user takes part in is answered all the same."""
    messages = [{"role": "system", "content": "Be kind"}, {"role": "assistant", "content": None}]
    assert "“”" in content(messages=messages)


def test_several_choices_differ() -> None:
    """Asked for n choices, it gives n different ones."""
    choices = body(answer(asked(n=3)))["choices"]
    assert [each["index"] for each in choices] == [0, 1, 2]
    assert len({each["message"]["content"] for each in choices}) == 3


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_limit_of_tokens_is_kept(name: str) -> None:
    """An answer that is cut for its length says so, and one that fits does not."""
    cut = body(answer(asked(**{name: 3})))
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["choices"][0]["message"]["content"] == "You wrote “Hello"
    assert cut["usage"]["completion_tokens"] == 3
    assert choice(**{name: 1000})["finish_reason"] == "stop"


def test_stop_ends_the_text_before_it() -> None:
    """The text ends before the first stop sequence; an empty one stops nothing."""
    assert content(stop=" wrote") == "You"
    assert content(stop=["", "there", "Hello"]) == "You wrote “"


# Streams


def test_a_stream_says_the_same_as_a_completion() -> None:
    """The deltas of a stream joined are the text of the completion."""
    made = chunks()
    assert made[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in made) == content()
    assert [chunk["choices"][0]["finish_reason"] for chunk in made[-2:]] == [None, "stop"]
    assert {chunk["id"] for chunk in made} == {made[0]["id"]}


def test_usage_is_streamed_when_it_is_asked_for() -> None:
    """A last chunk with usage and no choices comes with include_usage, and only then."""
    assert all(chunk["choices"] for chunk in chunks(stream_options={"include_usage": False}))
    *others, last = chunks(stream_options={"include_usage": True})
    assert all("usage" not in chunk for chunk in others)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(split(content()))


def test_streamed_choices_are_interleaved() -> None:
    """With n > 1 the choices grow side by side, each to the text that it has without a stream."""
    made = chunks(n=2)
    assert [chunk["choices"][0]["index"] for chunk in made[:4]] == [0, 1, 0, 1]
    for each in body(answer(asked(n=2)))["choices"]:
        mine = [chunk["choices"][0] for chunk in made if chunk["choices"][0]["index"] == each["index"]]
        assert "".join(one["delta"].get("content", "") for one in mine) == each["message"]["content"]


def test_a_stream_may_be_slowed_down() -> None:
    """With an interval there is a pause between any two deltas."""
    steps = answer(asked(stream=True, max_tokens=2), interval=0.5).steps
    assert [step if isinstance(step, Pause) else b"" for step in steps] == [
        b"",
        Pause(0.5),
        b"",
        Pause(0.5),
        *[b""] * 3,
    ]


@given(st.text())
def test_pieces_joined_are_the_text(text: str) -> None:
    """Cutting a text into pieces loses nothing of it, and no piece is empty."""
    pieces = split(text)
    assert "".join(pieces) == text
    assert all(pieces)


# Tools


def calls(**fields: object) -> list[tuple[str, Any]]:
    made = choice(**fields)
    assert (made["finish_reason"], made["message"]["content"]) == ("tool_calls", None)
    return [
        (call["function"]["name"], msgspec.json.decode(call["function"]["arguments"]))
        for call in made["message"]["tool_calls"]
    ]


def test_a_tool_is_called_when_it_is_required() -> None:
    """tool_choice "required" calls the first tool, with arguments that fit its schema."""
    assert calls(tools=[WEATHER, TIME], tool_choice="required") == [("get_weather", {"city": "city", "days": 3})]


def test_a_tool_is_called_when_it_is_named() -> None:
    """tool_choice with a name calls that tool; a tool without parameters is given none."""
    named = {"type": "function", "function": {"name": "get_time"}}
    assert calls(tools=[WEATHER, TIME], tool_choice=named) == [("get_time", {})]


def test_tools_are_called_when_the_user_speaks_of_them() -> None:
    """Left to choose, it calls the tools whose names the user mentions, one if they may not be parallel."""
    text = "Get weather, then call get_time."
    assert [name for name, _ in calls(text=text, tools=[WEATHER, TIME])] == ["get_weather", "get_time"]
    assert len(calls(text=text, tools=[WEATHER, TIME], tool_choice="auto", parallel_tool_calls=False)) == 1
    made = choice(text=text, tools=[WEATHER, TIME])["message"]["tool_calls"]
    assert made[0]["id"] != made[1]["id"]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [WEATHER]},
        {"text": "get_weather", "tools": [WEATHER], "tool_choice": "none"},
        {"text": "get_weather", "tools": [{"type": "custom", "custom": {"name": "get_weather"}}]},
        {"text": "get_weather"},
    ],
)
def test_tools_that_nobody_asked_for_are_not_called(fields: dict[str, object]) -> None:
    """Without a reason to call a tool the answer is text."""
    assert choice(**fields)["message"]["content"].startswith("You wrote")


@pytest.mark.parametrize("named", [{"type": "function", "function": {"name": "other"}}, {"type": "allowed_tools"}])
def test_a_tool_that_is_not_offered_cannot_be_chosen(named: object) -> None:
    """tool_choice that names a tool which is not among the tools is a 400."""
    reply = answer(asked(tools=[WEATHER], tool_choice=named))
    assert (reply.status, body(reply)["error"]["type"]) == (400, "invalid_request_error")


def test_tool_calls_are_streamed_in_fragments() -> None:
    """A streamed call has its name first, then its arguments in fragments, each with its index."""
    made = chunks(tools=[WEATHER, TIME], text="get_weather get_time")
    parts = [part for chunk in made for part in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert [part["function"]["name"] for part in parts if "id" in part] == ["get_weather", "get_time"]
    for index, expected in enumerate(['{"city":"city","days":3}', "{}"]):
        assert "".join(part["function"]["arguments"] for part in parts if part["index"] == index) == expected
    assert made[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert made[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}


def test_the_result_of_a_tool_is_used() -> None:
    """After a tool's message comes text with its result, also where a tool is required: loops of agents end."""
    messages = [
        {"role": "user", "content": "get_weather"},
        {"role": "tool", "tool_call_id": "call_1", "content": "12 degrees"},
    ]
    assert "12 degrees" in content(messages=messages, tools=[WEATHER], tool_choice="required")


# Response formats


def test_a_json_object_is_one() -> None:
    """response_format json_object gives a JSON object, in every choice."""
    for each in body(answer(asked(response_format={"type": "json_object"}, n=2)))["choices"]:
        assert isinstance(msgspec.json.decode(each["message"]["content"]), dict)


def test_a_json_schema_is_fitted() -> None:
    """response_format json_schema gives JSON that fits the schema, streamed or not."""
    schema = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert content(response_format=form) == '{"n":7}'
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(response_format=form)]
    assert "".join(delta.get("content", "") for delta in deltas) == '{"n":7}'
    assert content(response_format={"type": "json_schema"}) == '"answer"'
    assert content(response_format={"type": "text"}).startswith("You wrote")


def test_a_schema_that_nothing_fits_is_400() -> None:
    """A schema that no finite value fits is the caller's mistake."""
    schema = {"type": "object", "properties": {"me": {"$ref": "#"}}, "required": ["me"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    reply = answer(asked(response_format=form))
    assert reply.status == 400
    assert "# requires itself" in body(reply)["error"]["message"]


# What is no request


@pytest.mark.parametrize(
    "request_body, message",
    [
        (b"{torn", "could not parse the JSON body"),
        (b"", "could not parse the JSON body"),
        (b'{"model": "\xff"}', "could not parse the JSON body"),
        (b'{"model": "m", "messages": [{"role": "user"}], "seed": NaN}', "could not parse the JSON body"),
        (b"[]", "Expected `object`, got `array`"),
        (b'{"messages": [{"role": "user"}]}', "missing required field `model`"),
        (b'{"model": "m"}', "missing required field `messages`"),
        (b'{"model": "m", "messages": []}', "length >= 1"),
        (b'{"model": "m", "messages": [{}]}', "$.messages[0]"),
        (b'{"model": "m", "messages": [{"role": 1}]}', "$.messages[0].role"),
        (b'{"model": "m", "messages": [{"role": "user"}], "n": 0}', "$.n"),
    ],
)
def test_what_is_no_request_is_400(request_body: bytes, message: str) -> None:
    """A body that is no request gets a 400 in OpenAI's shape that says where it went wrong."""
    reply = answer(request_body)
    assert reply.status == 400
    assert set(body(reply)["error"]) == {"message", "type", "param", "code"}
    assert message in body(reply)["error"]["message"]


# Schemas


SCHEMAS: list[tuple[object, object]] = [
    (True, "value"),
    ({}, "value"),
    ({"type": "null"}, None),
    ({"type": "boolean"}, True),
    ({"type": "integer"}, 1),
    ({"type": "number"}, 1.5),
    ({"type": "string"}, "value"),
    ({"type": "object"}, {}),
    ({"type": "array"}, ["value"]),
    ({"type": "odd"}, "value"),
    ({"type": ["null", "integer"]}, 1),
    ({"type": ["null"]}, None),
    ({"const": None}, None),
    ({"enum": ["a", "b"]}, "a"),
    ({"enum": []}, "value"),
    # Without a type, other keywords tell it.
    ({"properties": {"a": {"minimum": 4}}}, {"a": 5.5}),
    ({"minItems": 2}, ["value", "value 2"]),
    # Objects
    ({"type": "object", "required": ["a"], "additionalProperties": {"type": "integer"}}, {"a": 1}),
    ({"type": "object", "minProperties": 2, "properties": {"a": True}}, {"a": "a", "key1": "key1"}),
    ({"type": "object", "properties": {"a": False, "b": True}}, {"b": "b"}),
    # Arrays
    ({"type": "array", "maxItems": 0}, []),
    ({"type": "array", "items": False}, []),
    ({"type": "array", "prefixItems": [{"const": 1}], "items": False}, [1]),
    ({"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "uniqueItems": True}, [1, 2]),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, [True, False]),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 3}, [1, 2, 3]),
    # Integers
    ({"type": "integer", "minimum": 5}, 5),
    ({"type": "integer", "minimum": 5.5}, 6),
    ({"type": "integer", "maximum": -5}, -5),
    ({"type": "integer", "maximum": 5}, 1),
    ({"type": "integer", "exclusiveMinimum": 5}, 6),
    ({"type": "integer", "exclusiveMaximum": -5}, -6),
    ({"type": "integer", "minimum": 5, "exclusiveMinimum": True}, 6),
    ({"type": "integer", "minimum": -5, "maximum": -3}, -5),
    ({"type": "integer", "minimum": -5, "maximum": 3}, 1),
    ({"type": "integer", "multipleOf": 7}, 7),
    ({"type": "integer", "minimum": 8, "multipleOf": 7}, 14),
    ({"type": "integer", "multipleOf": 0}, 1),
    # Numbers
    ({"type": "number", "minimum": 5}, 6.5),
    ({"type": "number", "maximum": -5}, -6.5),
    ({"type": "number", "minimum": 0, "maximum": 1}, 0.5),
    ({"type": "number", "minimum": 2, "maximum": 2}, 2),
    ({"type": "number", "multipleOf": 3}, 3),
    ({"type": "number", "multipleOf": 0.25, "minimum": 1.1}, 1.25),
    # Strings
    ({"type": "string", "minLength": 7}, "value.."),
    ({"type": "string", "maxLength": 2}, "va"),
    ({"type": "string", "minLength": "many"}, "value"),
    ({"type": "string", "format": "unheard-of"}, "value"),
    ({"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"}, "2024-01-31"),
    ({"type": "string", "pattern": r"^#[0-9a-f]{6}$"}, "#a1b2c3"),
    ({"type": "string", "pattern": r"^[A-Z]+$", "minLength": 2}, "AB"),
    ({"type": "string", "pattern": r"^nothing like this$"}, "value"),
    ({"type": "string", "pattern": r"\p{Letter}"}, "value"),
    # Combinations
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, 1),
    ({"oneOf": [False, {"const": 2}]}, 2),
    ({"type": "object", "properties": {"a": {"const": 1}}, "anyOf": [{"required": ["b"]}]}, {"a": 1, "b": "b"}),
    (
        {
            "allOf": [
                {"properties": {"a": {"const": 1}}, "required": ["a"]},
                {"properties": {"b": {"const": 2}}, "required": ["b"]},
            ]
        },
        {"a": 1, "b": 2},
    ),
    # References
    ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}, 1),
    ({"$ref": "#/$defs/n", "minimum": 3, "$defs": {"n": {"type": "integer"}}}, 3),
    ({"$ref": "#/$defs/a~1b~0c", "$defs": {"a/b~c": {"const": 5}}}, 5),
    ({"allOf": [{"$ref": "#/$defs/n"}], "$defs": {"n": {"type": "integer"}}}, 1),
    ({"type": "object", "properties": {"me": {"$ref": "#"}, "n": {"const": 1}}}, {"me": {"n": 1}, "n": 1}),
    ({"type": "object", "properties": {"all": {"type": "array", "items": {"$ref": "#"}}}}, {"all": [{"all": []}]}),
    (
        {"anyOf": [{"type": "array", "items": {"allOf": [{"$ref": "#"}]}, "minItems": 1}, {"type": "null"}]},
        [None],
    ),
]


@pytest.mark.parametrize("schema,expected", SCHEMAS)
def test_a_schema_has_a_plain_instance(schema: object, expected: object) -> None:
    """The instance of a schema is the plainest value that fits it."""
    assert instance(schema) == expected
    assert type(instance(schema)) is type(expected)


@pytest.mark.parametrize(
    "name, pattern",
    [
        ("date", r"\d{4}-\d\d-\d\d"),
        ("date-time", r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"),
        ("email", r"[^@]+@[^@]+"),
        ("uuid", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        ("uri", r"https://\S+"),
    ],
)
def test_formats_are_kept(name: str, pattern: str) -> None:
    """A string with a format is one of that format."""
    text = instance({"type": "string", "format": name})
    assert isinstance(text, str)
    assert re.fullmatch(pattern, text)


@pytest.mark.parametrize(
    "schema, reason",
    [
        (False, "nothing fits"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "# requires itself"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "# requires itself"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "#/$defs/a requires itself"),
        ({"allOf": [{"$ref": "#"}]}, "# requires itself"),
        ({"anyOf": [{"$ref": "#"}, False]}, "no branch of anyOf fits"),
        ({"anyOf": []}, "there is none"),
        ({"$ref": "#/$defs/a"}, "the schema has no #/$defs/a"),
        ({"$ref": "https://example.com/schema"}, "not all in one document"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "no multiple of 1 is within the bounds"),
        ({"type": "number", "minimum": 2, "exclusiveMaximum": 2}, "no number is within the bounds"),
    ],
)
def test_a_schema_without_an_instance_says_why(schema: object, reason: str) -> None:
    """A schema that cannot be fitted is an error that names the obstacle."""
    with pytest.raises(ValueError, match=re.escape(reason)):
        instance(schema)


class Address(msgspec.Struct):
    city: Annotated[str, msgspec.Meta(min_length=3, max_length=10)]
    zip: Annotated[str, msgspec.Meta(pattern=r"^\d{5}$")] | None = None


class Person(msgspec.Struct):
    name: str
    age: Annotated[int, msgspec.Meta(ge=18, lt=100)]
    score: Annotated[float, msgspec.Meta(gt=0, le=1)]
    tags: Annotated[list[str], msgspec.Meta(min_length=2, max_length=3)]
    mood: Literal["good", "bad"]
    address: Address
    friends: list["Person"]
    boss: "Person | None"
    pair: tuple[int, str]
    extra: dict[str, int]


def test_instances_fit_what_a_program_decodes_them_into() -> None:
    """The JSON for a schema made from a program's types can be decoded into these types."""
    person = msgspec.convert(instance(msgspec.json.schema(Person)), Person)
    assert (person.age, person.boss, person.address.zip) == (18, None, "12345")
    assert len(person.tags) == 2


@given(st.integers(-20, 20), st.integers(0, 20), st.integers(1, 7), st.integers(0, 30))
def test_integers_stay_within_their_bounds(low: int, span: int, step: int, count: int) -> None:
    """Whatever the bounds, an array's integers are within them, and differ as long as they can."""
    possible = {number for number in range(low, low + span + 1) if number % step == 0}
    rules = {"type": "integer", "minimum": low, "maximum": low + span, "multipleOf": step}
    schema = {"type": "array", "items": rules, "minItems": count}
    if possible or count == 0:
        made = msgspec.convert(instance(schema), list[int])
        assert set(made) <= possible
        assert len(set(made)) == min(max(count, 1), len(possible))
    else:
        with pytest.raises(ValueError, match="within the bounds"):
            instance(schema)
