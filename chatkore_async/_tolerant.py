"""The tolerant path: a message that strict decoding refused, made into what it meant. No I/O.

Each rule serves a form that servers are known to send (`wire.md` §3, by id). A value that fits no rule is dropped
from the struct, never from `to_dict()`, which reads the bytes.
"""

import json
from typing import Any, TypeVar, cast

import msgspec

from ._json import parse
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

__all__ = ["chunk", "completion", "models", "parse"]


def completion(whole: dict[str, Any]) -> ChatCompletion:
    """Return the completion that a decoded JSON object means."""
    choices = [_choice(item) for item in _objects(whole.get("choices"))]
    return ChatCompletion(choices=choices, usage=_usage(whole), **_common(whole))


def chunk(whole: dict[str, Any]) -> ChatCompletionChunk:
    """Return the chunk that a decoded JSON object means."""
    choices = [_chunk_choice(item) for item in _objects(whole.get("choices"))]
    return ChatCompletionChunk(choices=choices, usage=_usage(whole), **_common(whole))


def models(whole: object) -> list[Model]:
    """Return the models in the answer to `GET /models`: an object with `data`, or a bare list, of objects or names.

    Raises:
        ValueError: there is no such list.
    """
    held = _object(whole)
    items = next((held[name] for name in ("data", "models") if name in held), whole)
    if items is None:
        return []  # how Go writes an empty list
    if not isinstance(items, list):
        raise ValueError("expected a list of models")  # noqa: TRY004 - the server's mistake, not a caller's
    named = [{"id": item} if isinstance(item, str) else item for item in cast("list[object]", items)]
    return [
        Model(
            id=_text(item.get("id") or item.get("name")) or "",
            object=_text(item.get("object")) or "",
            created=_whole(item.get("created")) or 0,
            owned_by=_text(item.get("owned_by")) or "",
        )
        for item in _objects(named)
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
    reasoning, reasoning_name = _reasoning(said)
    message = ChatCompletionMessage(
        role=_text(said.get("role")) or "assistant",
        content=_text(said.get("content")),
        reasoning_content=reasoning,
        refusal=_text(said.get("refusal")),
        tool_calls=[_tool_call(call) for call in _objects(said.get("tool_calls"))] or None,
        function_call=_function(said["function_call"]) if _object(said.get("function_call")) else None,
        annotations=_convert(said.get("annotations"), list[Annotation]),
        audio=_convert(said.get("audio"), Audio),
    )
    if reasoning_name is not None:
        message._reasoning_name = reasoning_name
    return Choice(
        index=_whole(item.get("index")) or 0,
        message=message,
        finish_reason=_finish_reason(item.get("finish_reason")),
        logprobs=_convert(item.get("logprobs"), Logprobs),
    )


def _chunk_choice(item: dict[str, Any]) -> ChunkChoice:
    said = _object(item.get("delta")) or _object(item.get("message"))
    function = _object(said.get("function_call"))
    reasoning, reasoning_name = _reasoning(said)
    delta = ChoiceDelta(
        role=_text(said.get("role")) or None,
        content=_text(said.get("content")),
        reasoning_content=reasoning,
        refusal=_text(said.get("refusal")),
        tool_calls=[_tool_call_delta(call) for call in _objects(said.get("tool_calls"))] or None,
        function_call=FunctionCallDelta(name=_text(function.get("name")), arguments=_json(function.get("arguments")))
        if function
        else None,
        annotations=_convert(said.get("annotations"), list[Annotation]),
        audio=_convert(said.get("audio"), AudioDelta),
    )
    if reasoning_name is not None:
        delta._reasoning_name = reasoning_name
    return ChunkChoice(
        index=_whole(item.get("index")) or 0,
        delta=delta,
        finish_reason=_finish_reason(item.get("finish_reason")),
        logprobs=_convert(item.get("logprobs"), Logprobs),
    )


def _tool_call(item: dict[str, Any]) -> ToolCall:
    custom = _object(item.get("custom"))
    call = ToolCall(
        id=_text(item.get("id")) or "",
        type=_text(item.get("type")) or ("custom" if custom else "function"),
        function=_function(item.get("function")),
    )
    if custom:
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


def _reasoning(said: dict[str, Any]) -> tuple[str | None, str | None]:
    """C5: `reasoning_content` where it says something, else `reasoning`, else the thoughts in a content of parts.

    And the name it came by: `None` for the usual one, `""` for none.
    """
    usual = _text(said.get("reasoning_content"))
    if not usual and (other := _text(said.get("reasoning"))):
        return other, "reasoning"
    parts = said.get("content")
    if not usual and isinstance(parts, list):
        thoughts = [_text(_object(part).get("thinking")) for part in cast("list[object]", parts)]
        if thought := "".join(text for text in thoughts if text):
            return thought, ""
    return usual, None


def _usage(whole: dict[str, Any]) -> Usage | None:
    """C6: at the top, else under `x_groq`, else in a choice; null and `{}` are none."""
    for held in (whole, _object(whole.get("x_groq")), *_objects(whole.get("choices"))):
        if found := _object(held.get("usage")):
            counts = {name: _counted(value) for name, value in found.items()}
            known = {name: value for name, value in counts.items() if value is not None}
            return cast("Usage | None", _convert(known, Usage))
    return None


def _counted(value: object) -> object:
    """A count of tokens, or an object of such counts."""
    if (details := _dict(value)) is None:
        return _whole(value)
    return {name: number for name, item in details.items() if (number := _whole(item)) is not None}


def _finish_reason(value: object) -> str | None:
    """C3: `""` and `"null"` are none; what else a vendor says, it says."""
    reason = _text(value)
    return None if reason in (None, "", "null") else reason


def _objects(value: object) -> list[dict[str, Any]]:
    """The objects in a list; one object alone is a list of one."""
    items = cast("list[object]", value) if isinstance(value, list) else [value]
    return [whole for item in items if (whole := _dict(item)) is not None]


def _object(value: object) -> dict[str, Any]:
    return _dict(value) or {}


def _dict(value: object) -> dict[str, Any] | None:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _text(value: object) -> str | None:
    """C2: a string, the text of a part or of a list of parts; anything else is written out as JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        items = cast("list[object]", value)
        texts = [_text(item if (part := _dict(item)) is None else part.get("text")) for item in items]
        return "".join(text for text in texts if text)
    if (part := _dict(value)) and "text" in part:
        return _text(part["text"])
    return json.dumps(value, ensure_ascii=False)


def _json(value: object) -> str | None:
    """C4: arguments always end as a JSON string."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _whole(value: object) -> int | None:
    """C6: a whole number from whatever notation, or `None`."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return int(float(value)) if isinstance(value, str) else int(value)
    except (ValueError, OverflowError):  # no number, or infinite
        return None


def _convert(value: object, kind: Any) -> Any:
    """What is not worth rules of its own: as declared, or not at all."""
    try:
        return None if value is None else msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError:
        return None
