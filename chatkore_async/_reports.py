"""What a body says of an error, in whatever form (`wire.md` E1, E11). No I/O, no exceptions raised."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import msgspec

from . import _tolerant
from ._json import BOM
from ._words import MAX_BODY, as_object, is_page, page_title

MAX_DEPTH = 64
"""Levels of JSON in `APIStatusError.body`; what is nested deeper is kept as text, since pickle and copy recurse."""

_MAX_DOCUMENTS = 32


class Said(msgspec.Struct, frozen=True):
    """What a body said of its error, in whatever form."""

    message: str = ""
    code: str | None = None
    type: str | None = None
    param: str | None = None


_MESSAGES = ("message", "msg", "error_msg", "errmsg")


def read(body: bytes) -> tuple[object, Said | None]:
    """Return the JSON in a body, or `None`, and what it says of an error."""
    first: object = None
    for whole in _documents(body):
        if said := extract(whole):
            return whole, said
        first = whole if first is None else first
    return first, None


_BEGINNING = r"(?m)(?:^|(?<=[}\]]))(?=[{\[])"

_FIRST_OF = json.JSONDecoder(parse_int=str)  # asked only where a document ends


def _documents(body: bytes) -> Iterator[object]:
    """The JSON value in a body; of a body that is not one, the values that begin a line.

    So an error is found behind `data:` (E13), after lines of text (S3), and in two documents in a row (E5).
    """
    try:
        yield _tolerant.parse(body)
    except ValueError:
        pass
    else:
        return
    text = re.sub(r"\r\n?", "\n", body[:MAX_BODY].removeprefix(BOM).decode("utf-8", "replace"))
    text = re.sub(r"^(?:data|error):[ \t]*", "", text, flags=re.MULTILINE)
    beginning, at = re.compile(_BEGINNING), 0
    for _ in range(_MAX_DOCUMENTS):
        found = beginning.search(text, at)
        if found is None:
            return
        start, at = found.end(), found.end() + 1
        try:
            _, at = _FIRST_OF.raw_decode(text, start)
            yield _tolerant.parse(text[start:at].encode())
        except (ValueError, RecursionError):
            continue


def extract(whole: object) -> Said | None:
    """Return what a decoded body says of an error in any of the forms of E1 and E11, or `None` when it says nothing."""
    if isinstance(whole, list):
        items = filter(None, map(as_object, cast("list[object]", whole)))
        return next(filter(None, map(extract, items)), None)
    found = as_object(whole)
    if found is None:
        return None
    for name in ("error", "errors"):
        if said := _under_error(_alone(found.get(name)), found):
            return said
    if choices := found.get("choices"):
        return _in_a_choice(choices)
    if said := _of_vendor(found):
        return said
    if found.get("detail"):
        title, detail = _text(found.get("title")), _text(found["detail"])
        return _said(found, f"{title}: {detail}" if title and title != detail else detail)
    if found.get("object") == "error" or found.get("type") == "error" or found.get("success") is False:
        return _said(found)
    message = _first(found, *_MESSAGES)
    if isinstance(message, str | list) and not _is_success(found):
        return _said(found)
    return _said(found) if found.get("title") and found.get("status") else None


def _in_a_choice(choices: object) -> Said | None:
    """Return what a choice says of an error (E14, S1): OpenRouter's, when the provider behind it fails midway."""
    items = cast("list[object]", choices) if isinstance(choices, list) else []
    found = filter(None, map(as_object, items))
    return next(filter(None, (_under_error(choice.get("error"), choice) for choice in found)), None)


def _of_vendor(found: Mapping[str, Any]) -> Said | None:
    """Return what is said in envelopes that no other vendor has: MiniMax's `base_resp`, Tencent's `Response`."""
    status = as_object(found.get("base_resp")) or {}
    if status.get("status_code"):
        return Said(message=_text(status.get("status_msg")), code=_label(status["status_code"]))
    error = as_object((as_object(found.get("Response")) or {}).get("Error"))
    return _under_error({name.lower(): value for name, value in error.items()}, {}) if error else None


def _under_error(error: object, whole: dict[str, Any]) -> Said | None:
    """Return what the value of `error` says, with what stands beside it; an object of empty values is none."""
    inner = as_object(error)
    if inner is not None:
        if not any(inner.values()):
            return None
        code = _first(inner, "code", "error_code", "status") or whole.get("code")
        message = _text(_first(inner, *_MESSAGES, "detail", "error", "title"))
        if not message and _first(inner, "code", "type") is None:
            message = compact(inner)
        return _said(inner | {"code": code}, message)
    if not isinstance(error, str) or not error:
        return None
    if message := _text(_first(whole, *_MESSAGES, "error_description")):
        return _said(whole | {"code": _first(whole, "code") or error}, message)
    return _said(whole, error)


def _said(found: Mapping[str, Any], message: str | None = None) -> Said:
    return Said(
        message=_text(_first(found, *_MESSAGES, "title")) if message is None else message,
        code=_label(_first(found, "code", "error_code", "status")),
        type=_label(found.get("type") if found.get("type") != "error" else None),
        param=_label(found.get("param")),
    )


def _is_success(found: Mapping[str, Any]) -> bool:
    """Whether an envelope such as `{"code": 0, "msg": "ok", "data": …}` reports that all is well."""
    return found.get("success") is True or str(found.get("code")).lower() in ("0", "200", "ok", "success")


def unknown_form(whole: object, body: bytes) -> Said:
    """Return what a body says that is an error although it does not look like one (E18)."""
    if (found := as_object(whole)) is not None:
        return _said(found, _text(_first(found, *_MESSAGES)) or (compact(found) if found else ""))
    if whole is not None:
        return Said(message=_text(whole))
    return Said(message=page_title(body) if is_page(body) else body[:MAX_BODY].decode("utf-8", "replace"))


def _alone(value: object) -> object:
    """The first of a list, and anything else as it is."""
    return next(iter(cast("list[object]", value)), None) if isinstance(value, list) else value


def _first(found: Mapping[str, Any], *names: str) -> object:
    return next((found[name] for name in names if found.get(name) not in (None, "")), None)


def _text(value: object, depth: int = 0) -> str:
    """Return any JSON value as words: of an object its message, of a list its items (FastAPI's `{loc, msg}` too)."""
    if value is None or isinstance(value, str):
        return value or ""
    if depth < 8:
        if isinstance(value, list):
            return "; ".join(filter(None, (_text(item, depth + 1) for item in cast("list[object]", value)[:100])))
        if (found := as_object(value)) and (inner := _first(found, *_MESSAGES, "detail")) is not None:
            where: object = found.get("loc")
            path = ".".join(map(str, cast("list[object]", where))) if isinstance(where, list) else ""
            return f"{path}: {_text(inner, depth + 1)}" if path else _text(inner, depth + 1)
    return compact(value)


def compact(value: object) -> str:
    """Return a JSON value written out, an ellipsis for one that is nested too deeply."""
    return "…" if is_deep(value) else msgspec.json.encode(value).decode()


def _label(value: object) -> str | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # E12: to some languages all numbers are floats
    return None if value is None or value == "" else _text(value)


def is_deep(value: object) -> bool:
    """Tell whether a JSON value is nested deeper than `MAX_DEPTH`."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for item in level for inner in _inside(item)]
        if not level:
            return False
    return True


def _inside(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from cast("dict[str, object]", value).values()
    elif isinstance(value, list):
        yield from cast("list[object]", value)
