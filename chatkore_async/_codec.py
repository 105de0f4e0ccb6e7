"""One encoder, one decoder a type; strict first, tolerant second. No I/O.

A request is encoded once, and checked by decoding the bytes into structs that skip all they do not check: that is
faster than looking at the objects, and it looks at what will be sent. An answer is decoded from its bytes into the
structs of `_responses`; only a message which that refuses is parsed generically and put right by `_tolerant`.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any, NoReturn, TypeVar, cast

import msgspec
from msgspec import UNSET, UnsetType

from . import _tolerant
from ._requests import ChatCompletionRequest
from ._responses import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, Mended, Model, ToolCall, Usage
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
    """What JSON has a form for although msgspec has none: other mappings and collections, and kinds of `str`."""
    given: Any = value
    if isinstance(value, Mapping):
        return dict(given)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Collection) and not isinstance(value, bytes | bytearray | memoryview):
        return list(given)
    if isinstance(value, Iterator):
        raise TypeError("an iterator can be read only once: give a list")
    raise TypeError(f"{type(given).__name__} has no form in JSON")


_UNENCODABLE = (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError)
_encode = msgspec.json.Encoder(enc_hook=_encode_other).encode
_check = msgspec.json.Decoder(_CheckedRequest).decode
_decode_completion = msgspec.json.Decoder(ChatCompletion).decode
decode_chunk_strictly = msgspec.json.Decoder(ChatCompletionChunk).decode
"""Bytes → chunk, for the hot path of a stream. Raises `MISFIT` for what `decode_chunk` is for."""

MISFIT = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What strict decoding raises: wrong type or not JSON, bad UTF-8, nested too deeply."""

_NO_TOKENS = Usage()
_MAX_DEPTH = 1000

LARGE = 2**20
"""Bytes of a message below which nobody counts what it is made of."""

MAX_OBJECTS = 1_000_000
"""Objects and arrays that a message may be made of, unless they are `_PLAIN_SIZE` bytes long on average.

An empty array is three bytes on the wire and sixty in memory, an empty choice four hundred. With both bounds, what is
decoded takes at most some twenty times the bytes that arrived. Log probabilities, the densest that the API sends, have
about thirty bytes an object.
"""

_PLAIN_SIZE = 16


def encode_request(fields: Mapping[str, Any], *, stream: bool, extra_body: Mapping[str, object] | None) -> bytes:
    """Return the body of a request.

    Args:
        fields: the fields of `ChatCompletionRequest`, by name; `UNSET` ones are left out.
        stream: whether to ask for a stream.
        extra_body: vendors' fields; they win key by key and are not checked against the declared types.

    Raises:
        InvalidRequestError: with the path of the fault.
    """
    body = fields
    messages: Any = fields.get("messages")
    if type(messages) is list:
        for message in fields["messages"]:
            if type(message) is not dict or "tool_calls" in message:
                break
        else:
            messages = None  # nearly all are such dicts, in which there is nothing to look at
    if messages is not None:
        body = {**fields, "messages": _all_sendable(messages)}
    if stream:
        body = {**body, "stream": True}
    try:
        encoded = _encode(body)
    except _UNENCODABLE as error:
        body = dict(body)
        encoded = _encoded_after(error, body)
    try:
        _check(encoded)
    except MISFIT as error:
        if fault := _find_fault(body, _not_finite):
            _refuse(*fault, error)
        raise _invalid(error) from error
    if extra_body is not None:
        if not isinstance(cast("object", extra_body), Mapping):
            _refuse("$.extra_body", f"expected a mapping, got {type(extra_body).__name__}")
        body = {**body, **extra_body}
        encoded = _encoded(body)
    # msgspec writes NaN and infinity as null, so only a body with a null in it can hide one.
    # `find`, since `in` first takes the bytes for a number, and has an error made and dropped.
    if encoded.find(b"null") >= 0 and (fault := _find_fault(body, _not_finite)):
        _refuse(*fault)
    return encoded


# Written as tuples: to make a union anew for each call takes longer than to look at the type.
_LISTS = (list, tuple)
_MAPPINGS = (dict, Mapping)


def _all_sendable(messages: Any) -> Any:
    """Return messages as they are sent: a list, from whatever yields them; what does not is refused later."""
    given: object = messages
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping):
        return messages
    return [_sendable(message) for message in messages]


def _encoded(body: dict[str, Any]) -> bytes:
    try:
        return _encode(body)
    except _UNENCODABLE as error:
        return _encoded_after(error, body)


def _encoded_after(error: Exception, body: dict[str, Any]) -> bytes:
    """Encode what was refused, without what is not to be sent, or say why it cannot be."""
    odd = [name for name, value in body.items() if value is UNSET or isinstance(value, Iterator)]
    for name in odd:
        value = body.pop(name)
        if value is not UNSET:
            body[name] = list(value)
    if not odd:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        _refuse(*(_find_fault(body, _why_not) or ("$", reason)), error)
    return _encoded(body)


def _refuse(path: str, reason: str, cause: Exception | None = None) -> NoReturn:
    # A key may hold what no terminal can be shown.
    path = path.encode("utf-8", "backslashreplace").decode()
    raise InvalidRequestError(f"{path}: {reason}", path=path) from cause


def _sendable(message: Any) -> Any:
    """Return a message as it is sent; only what we received needs a change."""
    if isinstance(message, ChatCompletionMessage):
        return _message_to_send(message)
    given: object = message
    is_mapping = isinstance(given, _MAPPINGS)
    calls: Any = message.get("tool_calls") if is_mapping else getattr(message, "tool_calls", None)
    if not isinstance(calls, _LISTS) or not any(isinstance(call, ToolCall) for call in cast("list[Any]", calls)):
        return message
    sent = [_call_to_send(call) if isinstance(call, ToolCall) else call for call in cast("list[Any]", calls)]
    if is_mapping:
        return {**message, "tool_calls": sent}
    return msgspec.structs.replace(message, tool_calls=sent) if isinstance(message, msgspec.Struct) else message


def _message_to_send(message: ChatCompletionMessage) -> dict[str, Any]:
    """Role, content, refusal, tool calls and reasoning, under the name it came by; annotations stay."""
    sent: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.refusal is not None:
        sent["refusal"] = message.refusal
    name = getattr(message, "_reasoning_name", "reasoning_content")
    if message.reasoning_content is not None and name:
        sent[name] = message.reasoning_content
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


def _invalid(error: Exception) -> InvalidRequestError:
    """Name the path: msgspec names the object that lacks a field, we name the field."""
    reason, _, path = str(error).partition(" - at `")
    path = path.rstrip("`") or "$"
    if reason.startswith("Object missing required field"):
        path = f"{path}.{reason.split('`')[1]}"
        reason = "it is required"
    elif path == "$.messages" and "length >= 1" in reason:
        reason = "at least one message is required"
    elif reason.startswith("JSON"):
        reason = f"a msgspec.Raw in it is none ({reason})"
    return InvalidRequestError(f"{path}: {reason[:1].lower()}{reason[1:]}", path=path)


def _find_fault(body: object, why_not: Callable[[object], str | None]) -> tuple[str, str] | None:
    """Return the path of the first thing in `body` that JSON cannot hold, and what is wrong with it.

    `why_not` judges values that hold no others. A loop, since what is sought may be a nesting too deep for recursion.
    """
    todo: list[tuple[object, tuple[object, ...]]] = [(body, ())]
    while todo:
        value, path = todo.pop()
        if len(path) > _MAX_DEPTH:
            return _shown(path[:1]), "it contains itself, or is nested too deeply"
        items = _items(value)
        if items is None:
            if reason := why_not(value):
                return _shown(path), reason
            continue
        if isinstance(value, dict | Mapping):
            for key in cast("Mapping[object, object]", value):
                if not _is_ascii(key) and (reason := why_not({key: None})):
                    return _shown((*path, str(key))), reason
        todo += [(item, (*path, key)) for key, item in reversed(items) if not _is_ascii(item)]
    return None


def _items(value: object) -> list[tuple[str | int, object]] | None:
    """What is in `value`, by key, by index or by attribute; `None` when nothing can be."""
    if value is None or isinstance(value, str | int | float | bytes | bytearray | memoryview):
        return None
    if isinstance(value, dict | Mapping):
        return [(str(key), item) for key, item in cast("Mapping[object, object]", value).items()]
    if isinstance(value, msgspec.Struct):
        fields = [(name, getattr(value, name)) for name in value.__struct_fields__]
        return [(name, item) for name, item in fields if item is not UNSET]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, Collection):
        return list(enumerate(cast("Collection[object]", value)))
    return None


def _is_ascii(value: object) -> bool:
    """Nearly all of a request is plain text, which is never at fault."""
    return isinstance(value, str) and value.isascii()


def _not_finite(value: object) -> str | None:
    return f"JSON has no {value}" if isinstance(value, float) and not math.isfinite(value) else None


def _why_not(value: object) -> str | None:
    """Why JSON cannot hold a value, or `None` when it can."""
    if reason := _not_finite(value):
        return reason
    try:
        _encode(value)
    except UnicodeEncodeError:
        return "it contains half of a surrogate pair, which UTF-8 cannot hold"
    except _UNENCODABLE as error:
        return str(error)
    return None


def _shown(path: tuple[object, ...]) -> str:
    return "$" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)


def is_crowded(message: bytes) -> bool:
    """Tell whether a message would take out of all proportion more memory than it has bytes."""
    if len(message) <= LARGE:
        return False
    objects = message.count(b"{") + message.count(b"[")
    return objects > MAX_OBJECTS and objects * _PLAIN_SIZE > len(message)


def decode_completion_strictly(body: bytes) -> ChatCompletion | None:
    """Return the completion in `body`, as nearly all have it; `None` for what `decode_completion` is for."""
    try:
        completion = _decode_completion(body)
    except MISFIT:
        return None
    completion._raw = body
    return _tidied(completion)


def decode_completion(body: bytes) -> tuple[ChatCompletion, object]:
    """Return the completion in `body`, and the generic JSON where it took the tolerant path, else `None`.

    Raises:
        NotJSONError: `body` is not a JSON object.
    """
    if completion := decode_completion_strictly(body):
        return completion, None
    completion, whole = _decode_tolerantly(_tolerant.completion, body)
    completion._raw = Mended(body)
    return _tidied(completion), whole


def _tidied(completion: ChatCompletion) -> ChatCompletion:
    for choice in completion.choices:
        if choice.finish_reason == "null":
            choice.finish_reason = None
    usage = completion.usage
    if usage is not None and not usage.total_tokens and usage == _NO_TOKENS:
        completion.usage = None
    return completion


def decode_chunk(data: bytes) -> tuple[ChatCompletionChunk, dict[str, Any]]:
    """Return the chunk in an event's data by the tolerant path, and the generic JSON.

    Raises:
        NotJSONError: `data` is not a JSON object.
    """
    chunk, whole = _decode_tolerantly(_tolerant.chunk, data)
    chunk._raw = Mended(data)
    return chunk, whole


def decode_models(body: bytes) -> list[Model]:
    """Return the models in the answer to `GET /models`.

    Raises:
        NotJSONError: `body` is not JSON, or holds no list of models.
    """
    try:
        return msgspec.json.decode(body, type=_Models).data
    except MISFIT:
        try:
            return _tolerant.models(_tolerant.parse(body))
        except ValueError as error:
            raise NotJSONError(str(error)) from error


_AnswerT = TypeVar("_AnswerT", ChatCompletion, ChatCompletionChunk)


def _decode_tolerantly(make: Callable[[dict[str, Any]], _AnswerT], data: bytes) -> tuple[_AnswerT, dict[str, Any]]:
    try:
        whole = _only(_tolerant.parse(data))
    except ValueError as error:
        raise NotJSONError(str(error)) from error
    if not isinstance(whole, dict):
        raise NotJSONError(f"expected a JSON object, got {type(whole).__name__}")
    fields = cast("dict[str, Any]", whole)
    try:
        return make(fields), fields
    except RecursionError as error:
        raise NotJSONError("it is nested too deeply") from error


def _only(whole: object) -> object:
    """E11: Gemini puts its objects into a list of one."""
    if not isinstance(whole, list):
        return whole
    items = cast("list[object]", whole)
    return items[0] if len(items) == 1 else items
