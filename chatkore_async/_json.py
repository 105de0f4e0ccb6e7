"""JSON of servers: read however it was written, and written in the declared form without losing what else it said."""

import json
import re
from collections.abc import Collection
from typing import Any, NoReturn, cast

import msgspec

BOM = b"\xef\xbb\xbf"
"""What some servers and editors begin UTF-8 with.

It is taken off by hand: Python opens a file when the codec `utf-8-sig` is first used, and there may be no descriptor
left when the first error is read.
"""

# Every escape is matched, so that the backslash of `\\ud800`, which is none, is not taken for the start of one.
_ESCAPE = r"(?s)\\(?:u[dD][89abAB][\da-fA-F]{2}\\u[dD][c-fC-F][\da-fA-F]{2}|(u[dD][89a-fA-F][\da-fA-F]{2})|.)"


def parse(data: bytes) -> object:
    """Return the JSON value in `data`, however it was written.

    Forgiven are a BOM, control characters inside strings and numbers beyond a double; `NaN` is not. Invalid UTF-8 and
    half a surrogate pair (somebody cut an emoji in two) become U+FFFD.

    Raises:
        ValueError: it is not JSON, or nested too deeply to be an answer.
    """
    text = data.removeprefix(BOM).decode("utf-8", "replace").strip()
    try:
        return cast("object", msgspec.json.decode(text))
    except (msgspec.DecodeError, RecursionError) as error:
        try:
            whole = re.sub(_ESCAPE, lambda escape: "\ufffd" if escape[1] else escape[0], text)
            return cast("object", json.loads(whole, strict=False, parse_constant=_refuse))
        except (ValueError, RecursionError):
            # msgspec calls a number without its end invalid, where it calls all else without one truncated.
            cut = "invalid number" in str(error) and text.endswith(("-", "+", ".", "e", "E"))
            raise ValueError("Input data was truncated" if cut else str(error)) from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"JSON has no {constant}")


def overlaid(whole: dict[str, Any], declared: dict[str, Any], gone: Collection[str]) -> dict[str, Any]:
    """Return an object with what is declared of it in place of how it was said, and all else as it came.

    Args:
        whole: as it came.
        declared: as it was understood. What it does not have (`None`) is only told where `whole` tells it, too, or
            where the API always does.
        gone: undeclared names that are left out.
    """
    kept = {name: value for name, value in whole.items() if name not in declared and name not in gone}
    for name, value in declared.items():
        if value is not None or name in whole or name == "finish_reason":
            kept[name] = _overlaid_value(whole.get(name), value, gone)
    return kept


def _overlaid_value(came: object, value: object, gone: Collection[str]) -> object:
    if isinstance(value, dict):
        before = cast("dict[str, Any]", came) if isinstance(came, dict) else {}
        return overlaid(before, cast("dict[str, Any]", value), gone)
    if isinstance(value, list):
        items = cast("list[object]", value)
        befores = cast("list[object]", came) if isinstance(came, list) else []
        if len(befores) != len(items):
            befores = [None] * len(items)
        return [_overlaid_value(before, item, gone) for before, item in zip(befores, items, strict=True)]
    return value
