"""A row of a data set to a request, and what became of it to columns. No I/O."""

from typing import Any, Final, cast

import msgspec

from chatkore_async import APIError, CallMeta, ChatCompletion, InvalidRequestError, MapResult

COLUMNS: Final = {
    "completion": str,
    "finish_reason": str,
    "error": str,
    "error_type": str,
    "prompt_tokens": int,
    "completion_tokens": int,
    "latency": float,
    "attempts": int,
    "request_id": str,
}
"""What is added to a row, and of which type; each may be null."""

WHOLE: Final = "completion_json"
"""The column of the whole answer, for those who want it."""

Row = dict[str, Any]


def messages_of(cell: object) -> list[Any]:
    """Return the messages that a cell holds.

    A string is a prompt, unless it begins like a JSON array of objects. Of a list, keys without a value are left out:
    Arrow gives every struct of a column the keys of all of them.

    Raises:
        InvalidRequestError: it holds none.
    """
    if isinstance(cell, str):
        if not _is_json(cell):
            return [{"role": "user", "content": cell}]
        try:
            return msgspec.json.decode(cell, type=list[Any])
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidRequestError(f"$.messages: not JSON: {error}", path="$.messages") from error
    if isinstance(cell, list):
        return cast("list[Any]", _without_nulls(cast("object", cell)))
    raise InvalidRequestError(
        f"$.messages: a list, a JSON array or a prompt is needed, not {type(cell).__name__}", path="$.messages"
    )


def _is_json(text: str) -> bool:
    text = text.lstrip()
    return text.startswith("[") and text[1:].lstrip().startswith("{")


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        every = cast("dict[object, object]", value)
        return {key: _without_nulls(each) for key, each in every.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in cast("list[object]", value)]
    return value


def row_of(result: MapResult, *, whole: bool = False) -> Row:
    """Return the columns of a request that was answered, or failed, or could not be sent."""
    if result.completion is None:
        return failed(result.error, whole=whole)
    completion = result.completion
    usage = completion.usage
    row = {
        "completion": completion.text,
        "finish_reason": completion.choices[0].finish_reason if completion.choices else None,
        "error": None,
        "error_type": None,
        "prompt_tokens": None if usage is None else usage.prompt_tokens,
        "completion_tokens": None if usage is None else usage.completion_tokens,
        **_of_call(completion.meta),
    }
    return {**row, WHOLE: _json(completion)} if whole else row


def failed(error: Exception | None, *, whole: bool = False) -> Row:
    """Return the columns of a request that has no answer."""
    row: Row = dict.fromkeys(COLUMNS)
    row |= {"error": str(error), "error_type": type(error).__name__}
    row |= _of_call(error.meta if isinstance(error, APIError) else CallMeta())
    return {**row, WHOLE: None} if whole else row


def _of_call(meta: CallMeta) -> Row:
    return {"latency": meta.timings.total, "attempts": len(meta.attempts), "request_id": meta.request_id}


def _json(completion: ChatCompletion) -> str:
    return msgspec.json.encode(completion.to_dict()).decode()
