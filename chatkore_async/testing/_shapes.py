"""The JSON shapes of the API, and server-sent events: values to values."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import msgspec

__all__ = [
    "CREATED",
    "DONE",
    "Head",
    "choice",
    "error_body",
    "event",
    "mapping",
    "split",
    "tool_call",
    "tool_deltas",
    "usage",
]

CREATED = 1_700_000_000
"""When every answer was made, in seconds since 1970: fixed, so that the same request gives the same bytes."""

DONE = b"data: [DONE]\n\n"

# A word with the blanks before it; long ones (JSON without blanks, Chinese) are cut, as a tokenizer would.
_PIECE = re.compile(r"\s*\S{1,12}|\s+\Z")


def split(text: str) -> list[str]:
    """Return the text in pieces of about a token each; joined they are the text again."""
    return _PIECE.findall(text)


def event(payload: object) -> bytes:
    """Return one server-sent event whose data are the payload: bytes as they are, anything else as JSON."""
    data = payload if isinstance(payload, bytes) else msgspec.json.encode(payload)
    return b"data: " + data + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, object]:
    """Return a ``usage`` object with its total."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def choice(key: str, value: object, index: int = 0, finish_reason: str | None = None) -> dict[str, object]:
    """Return one entry of ``choices``; the key is ``"message"``, or ``"delta"`` in a stream."""
    return {"index": index, key: value, "logprobs": None, "finish_reason": finish_reason}


class Head(msgspec.Struct, frozen=True):
    """What all chunks of one answer have in common."""

    id: str
    model: str

    def completion(self, choices: Sequence[object], usage: object) -> dict[str, object]:
        """Return a ``chat.completion``."""
        return {**self._object("chat.completion", choices), "usage": usage}

    def chunk(self, *choices: object) -> dict[str, object]:
        """Return a ``chat.completion.chunk``."""
        return self._object("chat.completion.chunk", choices)

    def _object(self, kind: str, choices: Sequence[object]) -> dict[str, object]:
        return {"id": self.id, "object": kind, "created": CREATED, "model": self.model, "choices": choices}


def tool_call(
    name: str,
    arguments: object = None,
    *,
    id: str = "call_1",  # noqa: A002 - the field's name on the wire
) -> dict[str, object]:
    """Return a tool call as a model makes it.

    Args:
        name: The function's name.
        arguments: Its arguments; a string is taken as JSON already (or as the nonsense a model may write), anything
            else is encoded, and ``None`` stands for no arguments, ``{}``.
        id: What the tool's message refers to.

    """
    if not isinstance(arguments, str):
        arguments = msgspec.json.encode({} if arguments is None else arguments).decode()
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool_deltas(calls: Sequence[Mapping[str, object]]) -> Iterator[dict[str, object]]:
    """Yield the deltas that stream tool calls: a call's name first, then its arguments in fragments.

    A call that a test has bent out of shape goes out whole, as relays send it.
    """
    for index, call in enumerate(calls):
        function = call.get("function")
        function = mapping(call.get("function"))
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            yield {"tool_calls": [{"index": index, **call}]}
            continue
        yield {"tool_calls": [{"index": index, **call, "function": {**function, "arguments": ""}}]}
        for fragment in split(arguments):
            yield {"tool_calls": [{"index": index, "function": {"arguments": fragment}}]}


def error_body(message: str, kind: str, *, code: object = None, param: object = None) -> dict[str, object]:
    """Return an error in the shape OpenAI gives it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def mapping(value: object) -> Mapping[str, object]:
    """Return a JSON object as it is, and anything else as an empty one."""
    return cast("Mapping[str, object]", value) if isinstance(value, Mapping) else {}
