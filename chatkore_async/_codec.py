"""One encoder, one decoder a type; strict first, tolerant second. No I/O.

A request is encoded once, and checked by decoding the bytes into structs that skip all they do not check: that is
faster than looking at the objects, and it looks at what will be sent. An answer is decoded from its bytes into the
structs of `_responses`; only a message which that refuses is parsed generically and put right by `_tolerant`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType

from . import _tolerant
from ._requests import ChatCompletionRequest
from ._responses import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, Model, ToolCall, Usage
from .errors import InvalidRequestError

REQUEST_FIELDS = frozenset(ChatCompletionRequest.__struct_fields__)


class NotJSONError(ValueError):
    """A message is not JSON, or not a JSON object. `truncated` when it was JSON as far as it went."""

    @property
    def truncated(self) -> bool:
        """Whether only the end is missing."""
        return "truncated" in str(self)


class _HasRole(msgspec.Struct):
    role: str


class _Object(msgspec.Struct):
    """Any JSON object; what is in it is the server's to judge."""


# The fields whose declared type says more than is checked: messages, tools and whatever else is made of objects is
# checked shallowly (an object; a message with a role) and sent as given.
_SHALLOW: dict[str, Any] = {
    "messages": Annotated[list[_HasRole], msgspec.Meta(min_length=1)],
    "audio": _Object | None,
    "function_call": str | _Object | None,
    "functions": list[_Object] | None,
    "logit_bias": dict[str, float] | None,
    "metadata": _Object | None,
    "modalities": list[str] | None,
    "moderation": str | _Object | None,
    "prediction": _Object | None,
    "prompt_cache_options": _Object | None,
    "response_format": _Object | None,
    "stop": str | list[str] | None,
    "stream_options": _Object | None,
    "tool_choice": str | _Object | None,
    "tools": list[_Object] | None,
    "web_search_options": _Object | None,
}


class _Models(msgspec.Struct):
    data: list[Model]


_CheckedRequest = msgspec.defstruct(
    "_CheckedRequest",
    [
        (name, _SHALLOW.get(name, annotation))
        if name in ("model", "messages")
        else (name, _SHALLOW.get(name, annotation) | UnsetType, UNSET)
        for name, annotation in ChatCompletionRequest.__annotations__.items()
    ],
    kw_only=True,
)


def _encode_other(value: object) -> object:
    """What JSON has a form for although msgspec has none: other mappings, and lazy iterables."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


_UNENCODABLE = (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError)
_encode = msgspec.json.Encoder(enc_hook=_encode_other).encode
_check = msgspec.json.Decoder(_CheckedRequest).decode
_decode_completion = msgspec.json.Decoder(ChatCompletion).decode
_decode_models = msgspec.json.Decoder(_Models).decode
decode_chunk_strictly = msgspec.json.Decoder(ChatCompletionChunk).decode
"""Bytes → chunk, for the hot path of a stream. Raises `MISFIT` for what `decode_chunk` is for."""

MISFIT = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What strict decoding raises: wrong type or not JSON, bad UTF-8, nested too deeply."""

_NO_TOKENS = Usage()


def encode_request(fields: Mapping[str, Any], *, stream: bool, extra_body: Mapping[str, Any] | None) -> bytes:
    """Return the body of a request.

    Args:
        fields: the fields of `ChatCompletionRequest`, by name; `UNSET` ones are left out.
        stream: whether to ask for a stream.
        extra_body: vendors' fields; they win key by key and are not checked against the declared types.

    Raises:
        InvalidRequestError: with the path of the fault.
    """
    body = {name: value for name, value in fields.items() if value is not UNSET}
    if isinstance(messages := body.get("messages"), list | tuple):
        body["messages"] = [_sendable(message) for message in messages]
    if stream:
        body["stream"] = True
    encoded = _encoded(body)
    try:
        _check(encoded)
    except msgspec.ValidationError as error:
        raise _invalid(error) from error
    if extra_body:
        body.update(extra_body)
        encoded = _encoded(body)
    # msgspec writes NaN and infinity as null, so only a body with a null in it can hide one.
    if b"null" in encoded and (fault := _find_fault(body, "$")):
        raise InvalidRequestError(f"{fault[0]}: {fault[1]}", path=fault[0])
    return encoded


def _encoded(body: dict[str, Any]) -> bytes:
    try:
        return _encode(body)
    except _UNENCODABLE as error:
        path, reason = _find_fault(body, "$") or ("$", str(error))
        raise InvalidRequestError(f"{path}: {reason}", path=path) from error


def _sendable(message: Any) -> Any:
    """Return a message as it is sent; only what we received needs a change."""
    if isinstance(message, ChatCompletionMessage):
        return _message_to_send(message)
    calls = message.get("tool_calls") if isinstance(message, dict) else getattr(message, "tool_calls", None)
    if not isinstance(calls, list | tuple) or not any(
        isinstance(call, ToolCall) and call.vendor_fields for call in calls
    ):
        return message
    whole = dict(message) if isinstance(message, dict) else msgspec.to_builtins(message)
    whole["tool_calls"] = [_call_to_send(call) if isinstance(call, ToolCall) else call for call in calls]
    return whole


def _message_to_send(message: ChatCompletionMessage) -> dict[str, Any]:
    """Role, content, refusal, tool calls and reasoning, under the name it came by; annotations stay."""
    sent: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.refusal is not None:
        sent["refusal"] = message.refusal
    if message.reasoning_content is not None:
        sent[getattr(message, "_reasoning_name", None) or "reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        sent["tool_calls"] = [_call_to_send(call) for call in message.tool_calls]
    if message.function_call is not None:
        sent["function_call"] = message.function_call
    if message.audio is not None:
        sent["audio"] = {"id": message.audio.id}
    return sent


def _call_to_send(call: ToolCall) -> dict[str, Any]:
    sent: dict[str, Any] = {"id": call.id, "type": call.type}
    if isinstance(call.custom, UnsetType):
        sent["function"] = msgspec.to_builtins(call.function)
    else:
        sent["custom"] = msgspec.to_builtins(call.custom)
    for name, value in call.vendor_fields.items():
        sent[name] = sent[name] | value if name == "function" and name in sent else value
    return sent


def _invalid(error: msgspec.ValidationError) -> InvalidRequestError:
    """Name the path: msgspec names the object that lacks a field, we name the field."""
    reason, _, path = str(error).partition(" - at `")
    path = path.rstrip("`") or "$"
    if reason.startswith("Object missing required field"):
        path = f"{path}.{reason.split('`')[1]}"
        reason = "it is required"
    elif path == "$.messages" and "length >= 1" in reason:
        reason = "at least one message is required"
    return InvalidRequestError(f"{path}: {reason[:1].lower()}{reason[1:]}", path=path)


def _find_fault(value: object, path: str, depth: int = 0) -> tuple[str, str] | None:
    """Return the path of the first thing in `value` that JSON cannot hold, and what is wrong with it."""
    if depth > 500:
        return path, "it contains itself, or is nested too deeply"
    if isinstance(value, float) and not math.isfinite(value):
        return path, f"JSON has no {value}"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return path, "it contains half of a surrogate pair, which UTF-8 cannot hold"
        return None
    if isinstance(value, Mapping):
        for key, item in value.items():
            if fault := _find_fault(item, f"{path}.{key}", depth + 1):
                return fault
    elif isinstance(value, list | tuple | set | frozenset):
        for index, item in enumerate(value):
            if fault := _find_fault(item, f"{path}[{index}]", depth + 1):
                return fault
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            if fault := _find_fault(getattr(value, name), f"{path}.{name}", depth + 1):
                return fault
        return None
    elif value is None or isinstance(value, bool | int | float | UnsetType):
        return None
    try:
        _encode(value)
    except _UNENCODABLE as error:
        return path, str(error)
    return None


def decode_completion(body: bytes) -> tuple[ChatCompletion, object]:
    """Return the completion in `body`, and the generic JSON where it took the tolerant path, else `None`.

    Raises:
        NotJSONError: `body` is not a JSON object.
    """
    whole: object = None
    try:
        completion = _decode_completion(body)
    except MISFIT:
        whole = _parse_object(body)
        completion = _tolerant.completion(whole)
    if completion.usage == _NO_TOKENS:
        completion.usage = None
    completion._raw = body
    return completion, whole


def decode_chunk(data: bytes) -> tuple[ChatCompletionChunk, dict[str, Any]]:
    """Return the chunk in an event's data by the tolerant path, and the generic JSON.

    Raises:
        NotJSONError: `data` is not a JSON object.
    """
    whole = _parse_object(data)
    chunk = _tolerant.chunk(whole)
    chunk._raw = bytes(data)
    return chunk, whole


def decode_models(body: bytes) -> list[Model]:
    """Return the models in the answer to `GET /models`.

    Raises:
        NotJSONError: `body` is not JSON.
    """
    try:
        models: list[Model] = _decode_models(body).data
    except MISFIT:
        try:
            models = _tolerant.models(_tolerant.parse(body))
        except ValueError as error:
            raise NotJSONError(str(error)) from error
    return models


def _parse_object(data: bytes) -> dict[str, Any]:
    try:
        whole = _tolerant.parse(data)
    except ValueError as error:
        raise NotJSONError(str(error)) from error
    if isinstance(whole, list) and len(whole) == 1:
        whole = whole[0]  # E11: Gemini puts its error objects into a list
    if not isinstance(whole, dict):
        raise NotJSONError(f"expected a JSON object, got {type(whole).__name__}")
    return whole
