"""The tolerant path: a message that strict decoding refused, made into what it meant. No I/O.

Each rule serves a form that servers are known to send (`wire.md` §3, by id). A value that fits no rule is dropped
from the struct, never from `to_dict()`, which reads the bytes.
"""

import json
from typing import Any, TypeVar

import msgspec

from ._responses import (
    Annotation,
    Audio,
    AudioDelta,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    Choice,
    ChoiceDelta,
    ChunkChoice,
    CustomToolCall,
    CustomToolCallDelta,
    FunctionCall,
    FunctionCallDelta,
    Logprobs,
    Model,
    ToolCall,
    ToolCallDelta,
    Usage,
)


def parse(data: bytes) -> object:
    """Return the JSON value in `data`, a BOM before it and invalid UTF-8 in it forgiven.

    Raises:
        ValueError: it is not JSON, or nested too deeply to be an answer.
    """
    try:
        value: object = msgspec.json.decode(data.decode("utf-8-sig", "replace").strip())
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    return value


def completion(whole: dict[str, Any]) -> ChatCompletion:
    """Return the completion that a decoded JSON object means."""
    choices = [_choice(item) for item in _objects(whole.get("choices"))]
    return ChatCompletion(choices=choices, usage=_usage(whole), **_common(whole))


def chunk(whole: dict[str, Any]) -> ChatCompletionChunk:
    """Return the chunk that a decoded JSON object means."""
    choices = [_chunk_choice(item) for item in _objects(whole.get("choices"))]
    return ChatCompletionChunk(choices=choices, usage=_usage(whole), **_common(whole))


def models(whole: object) -> list[Model]:
    """Return the models in the answer to `GET /models`: an object with `data`, or a bare list."""
    items = (whole.get("data", whole.get("models")) if isinstance(whole, dict) else whole) or []
    return [
        Model(
            id=_text(item.get("id") or item.get("name")) or "",
            object=_text(item.get("object")) or "",
            created=_whole(item.get("created")) or 0,
            owned_by=_text(item.get("owned_by")) or "",
        )
        for item in _objects(items)
    ]


def _common(whole: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": _text(whole.get("id")) or "",
        "object": _text(whole.get("object")) or "",
        "created": _whole(whole.get("created")) or 0,
        "model": _text(whole.get("model")) or "",
        "system_fingerprint": _text(whole.get("system_fingerprint")),
        "service_tier": _text(whole.get("service_tier")),
    }


def _choice(item: dict[str, Any]) -> Choice:
    # A `delta` in place of the `message` comes from relays that answer a plain call with the last chunk.
    said = _object(item.get("message")) or _object(item.get("delta"))
    message = ChatCompletionMessage(
        role=_text(said.get("role")) or "assistant",
        content=_text(said.get("content")),
        reasoning_content=_reasoning(said),
        refusal=_text(said.get("refusal")),
        tool_calls=[_tool_call(call) for call in _objects(said.get("tool_calls"))] or None,
        function_call=_function(said["function_call"]) if _object(said.get("function_call")) else None,
        annotations=_convert(said.get("annotations"), list[Annotation]),
        audio=_convert(said.get("audio"), Audio),
    )
    _name_reasoning(message, said)
    return Choice(
        index=_whole(item.get("index")) or 0,
        message=message,
        finish_reason=_finish_reason(item.get("finish_reason")),
        logprobs=_convert(item.get("logprobs"), Logprobs),
    )


def _chunk_choice(item: dict[str, Any]) -> ChunkChoice:
    said = _object(item.get("delta")) or _object(item.get("message"))
    function = _object(said.get("function_call"))
    delta = ChoiceDelta(
        role=_text(said.get("role")) or None,
        content=_text(said.get("content")),
        reasoning_content=_reasoning(said),
        refusal=_text(said.get("refusal")),
        tool_calls=[_tool_call_delta(call) for call in _objects(said.get("tool_calls"))] or None,
        function_call=FunctionCallDelta(name=_text(function.get("name")), arguments=_json(function.get("arguments")))
        if function
        else None,
        annotations=_convert(said.get("annotations"), list[Annotation]),
        audio=_convert(said.get("audio"), AudioDelta),
    )
    _name_reasoning(delta, said)
    return ChunkChoice(
        index=_whole(item.get("index")) or 0,
        delta=delta,
        finish_reason=_finish_reason(item.get("finish_reason")),
        logprobs=_convert(item.get("logprobs"), Logprobs),
    )


def _tool_call(item: dict[str, Any]) -> ToolCall:
    call = ToolCall(
        id=_text(item.get("id")) or "",
        type=_text(item.get("type")) or "function",
        function=_function(item.get("function")),
    )
    if custom := _object(item.get("custom")):
        call.custom = CustomToolCall(name=_text(custom.get("name")) or "", input=_text(custom.get("input")) or "")
    return _with_vendor_fields(call, item)


def _function(item: object) -> FunctionCall:
    function = _object(item)
    return FunctionCall(name=_text(function.get("name")) or "", arguments=_json(function.get("arguments")) or "")


def _tool_call_delta(item: dict[str, Any]) -> ToolCallDelta:
    function, custom = _object(item.get("function")), _object(item.get("custom"))
    call = ToolCallDelta(
        index=_whole(item.get("index")),
        id=_text(item.get("id")) or None,
        type=_text(item.get("type")) or None,
        function=FunctionCallDelta(name=_text(function.get("name")), arguments=_json(function.get("arguments")))
        if function
        else None,
        custom=CustomToolCallDelta(name=_text(custom.get("name")), input=_text(custom.get("input")))
        if custom
        else None,
    )
    return _with_vendor_fields(call, item)


_ToolCallT = TypeVar("_ToolCallT", ToolCall, ToolCallDelta)


def _with_vendor_fields(call: _ToolCallT, item: dict[str, Any]) -> _ToolCallT:
    """Keep what the vendor put into a call, to be sent back with it (Gemini refuses a call without its signature)."""
    known = {"index", "id", "type", "function", "custom"}
    vendor = {name: value for name, value in item.items() if name not in known}
    function = _object(item.get("function"))
    if inner := {name: value for name, value in function.items() if name not in ("name", "arguments")}:
        vendor["function"] = inner
    if vendor:
        call._vendor_fields = vendor
    return call


def _reasoning(said: dict[str, Any]) -> str | None:
    """C5: `reasoning_content` where it says something, else `reasoning`."""
    first = _text(said.get("reasoning_content"))
    return first or _text(said.get("reasoning")) or first


def _name_reasoning(holder: ChatCompletionMessage | ChoiceDelta, said: dict[str, Any]) -> None:
    if holder.reasoning_content and not said.get("reasoning_content"):
        holder._reasoning_name = "reasoning"


def _usage(whole: dict[str, Any]) -> Usage | None:
    """C6: at the top, else under `x_groq`, else in the first choice; null and `{}` are none."""
    first = next(iter(_objects(whole.get("choices"))), {})
    for held in (whole, _object(whole.get("x_groq")), first):
        if found := _object(held.get("usage")):
            counts = {name: _counted(value) for name, value in found.items()}
            usage: Usage | None = _convert({name: value for name, value in counts.items() if value is not None}, Usage)
            return usage
    return None


def _counted(value: object) -> object:
    """A count of tokens, or an object of such counts."""
    if isinstance(value, dict):
        return {name: number for name, item in value.items() if (number := _whole(item)) is not None}
    return _whole(value)


def _finish_reason(value: object) -> str | None:
    """C3: `""` and `"null"` are none; what else a vendor says, it says."""
    reason = _text(value)
    return None if reason in (None, "", "null") else reason


def _objects(value: object) -> list[dict[str, Any]]:
    """The objects in a list; one object alone is a list of one."""
    if isinstance(value, dict):
        return [value]
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    """C2: a string, the text of a list of parts, or a number written out."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = [_text(part.get("text") if isinstance(part, dict) else part) for part in value]
        return "".join(text for text in texts if text)
    if isinstance(value, dict):
        return _text(value.get("text"))
    return json.dumps(value)


def _json(value: object) -> str | None:
    """C4: arguments always end as a JSON string."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _whole(value: object) -> int | None:
    """C6: a whole number from whatever notation, or `None`."""
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    try:
        return int(float(value)) if isinstance(value, str | float) else None
    except (ValueError, OverflowError):
        return None


def _convert(value: object, kind: Any) -> Any:
    """What is not worth rules of its own: as declared, or not at all."""
    try:
        return None if value is None else msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError:
        return None
