"""The answers a server gives when no script says otherwise: the same request always gets the same bytes.

They do what the API does with the parameters that shape an answer (``n``, ``stop``, ``max_tokens``, ``stream``,
``tools``, ``response_format``), so that a program can be tried from end to end before any model has seen it.
"""

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import zip_longest

import msgspec

from chatkore_async.testing._asked import Asked, Function, Message, parse
from chatkore_async.testing._replies import error, json_reply, sse
from chatkore_async.testing._schema import instance
from chatkore_async.testing._shapes import CREATED, DONE, Head, choice, event, split, tool_call, tool_deltas, usage
from chatkore_async.testing._steps import Pause, Reply, Step

__all__ = ["answer", "model_list"]


class _Told(msgspec.Struct, frozen=True):
    """One choice of an answer: text or tool calls, never both."""

    pieces: list[str]
    calls: list[dict[str, object]]
    finish_reason: str

    @property
    def message(self) -> dict[str, object]:
        if self.calls:
            return {"role": "assistant", "content": None, "tool_calls": self.calls, "refusal": None}
        return {"role": "assistant", "content": "".join(self.pieces), "refusal": None}

    def deltas(self) -> Iterator[dict[str, object]]:
        yield {"role": "assistant", "content": None if self.calls else ""}
        for piece in self.pieces:
            yield {"content": piece}
        yield from tool_deltas(self.calls)


def answer(request: bytes | Mapping[str, object], *, interval: float = 0.0) -> Reply:
    """Return the answer to a request, or a 400 in OpenAI's shape where the request is none.

    Args:
        request: The request's JSON: its bytes, or a mapping.
        interval: Seconds between two deltas of a stream.

    """
    body = request if isinstance(request, bytes) else msgspec.json.encode(request)
    asked = parse(body)
    if isinstance(asked, Reply):
        return asked
    identity = blake2b(body, digest_size=12).hexdigest()
    try:
        told = _choices(asked, identity)
    except ValueError as problem:
        return error(400, f"Invalid schema: {problem}", code="invalid_schema")
    prompt = sum(4 + len(message.text) // 4 for message in asked.messages)
    used = usage(prompt, sum(len(each.pieces) + sum(1 for _ in tool_deltas(each.calls)) for each in told))
    head = Head(f"chatcmpl-{identity}", asked.model)
    headers = (("x-request-id", f"req_{identity}"),)
    if not asked.stream:
        choices = [choice("message", each.message, index, each.finish_reason) for index, each in enumerate(told)]
        return json_reply(head.completion(choices, used), headers=headers)
    steps: list[Step] = []
    # Choices are interleaved, as models that run side by side are.
    for deltas in zip_longest(*(each.deltas() for each in told)):
        if steps and interval:
            steps.append(Pause(interval))
        steps += [
            event(head.chunk(choice("delta", delta, index))) for index, delta in enumerate(deltas) if delta is not None
        ]
    steps += [event(head.chunk(choice("delta", {}, index, each.finish_reason))) for index, each in enumerate(told)]
    if asked.stream_options is not None and asked.stream_options.include_usage:
        steps.append(event({**head.chunk(), "usage": used}))
    return sse(*steps, DONE, headers=headers)


def model_list(models: Sequence[str]) -> Reply:
    """Return the answer to ``GET /models``."""
    data = [{"id": name, "object": "model", "created": CREATED, "owned_by": "chatkore"} for name in models]
    return json_reply({"object": "list", "data": data})


def _choices(asked: Asked, identity: str) -> list[_Told]:
    count = asked.n or 1
    if calls := _calls(asked, identity):
        return [_Told([], calls, "tool_calls")] * count
    limit = asked.max_completion_tokens or asked.max_tokens
    told: list[_Told] = []
    for number in range(1, count + 1):
        text = _text(asked)
        if number > 1 and asked.response_format is None:
            text = f"Answer {number}: {text}"
        stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        for stop in filter(None, stops):
            text = text.partition(stop)[0]
        pieces = split(text)
        told.append(_Told(pieces[:limit], [], "length" if limit and len(pieces) > limit else "stop"))
    return told


def _text(asked: Asked) -> str:
    form = asked.response_format
    if form is not None and form.type == "json_schema":
        return msgspec.json.encode(instance(form.json_schema.schema, "answer")).decode()
    last = asked.messages[-1]
    if form is not None and form.type == "json_object":
        return msgspec.json.encode({"answer": f"This answers: {_quoted(last)}"}).decode()
    if last.role == "tool":
        return f"According to the tool, the result is {_quoted(last)}. That settles the question."
    return (
        f"You wrote {_quoted(_user(asked))}. This is the loopback server of chatkore_async: it thinks about nothing, "
        f"but it answers like {asked.model}, word by word, and the same way each time."
    )


def _calls(asked: Asked, identity: str) -> list[dict[str, object]]:
    tools = [tool.function for tool in asked.tools or () if tool.function is not None]
    # After a tool's result comes an answer, or a conversation in a test would never end.
    if not tools or asked.tool_choice == "none" or asked.messages[-1].role == "tool":
        return []
    if asked.tool_choice is not None and not isinstance(asked.tool_choice, str):
        wanted = asked.tool_choice.function
        called = [tool for tool in tools if wanted is not None and tool.name == wanted.name]
        if not called:
            raise ValueError("tool_choice names a function that is not among the tools")
    else:
        text = _user(asked).text.lower()
        called = [tool for tool in tools if _mentioned(tool, text)]
        if not called and asked.tool_choice == "required":
            called = tools[:1]
        if asked.parallel_tool_calls is False:
            called = called[:1]
    return [
        tool_call(tool.name, instance(tool.parameters or {"type": "object"}), id=f"call_{identity[:16]}_{index}")
        for index, tool in enumerate(called)
    ]


def _mentioned(tool: Function, text: str) -> bool:
    name = tool.name.lower()
    return name in text or name.replace("_", " ") in text


def _user(asked: Asked) -> Message:
    return next((each for each in reversed(asked.messages) if each.role == "user"), asked.messages[-1])


def _quoted(message: Message) -> str:
    text = message.text
    return f"“{text if len(text) <= 80 else text[:79] + '…'}”"
