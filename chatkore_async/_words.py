"""What a server says, made fit for a message: one line, capped, and without keys. No I/O."""

import re
from typing import Any, cast

from ._json import BOM

MAX_BODY = 64 * 1024
"""Bytes of an error's body that are read, and characters that are kept (E9)."""

MAX_MESSAGE = 1000
"""Characters of a message; what is longer ends in an ellipsis."""

MIN_KEY = 6
"""Characters of the shortest key that is masked where a server echoes it."""

# E1: relays append their own id, once per relay in the chain.
_RELAYS_ID = r"(?i) ?[(（] ?request[ _-]?id ?[:：] ?([^()（） ]{1,200}) ?[)）]"

_KEY_ECHO = r"\bsk-[\w*.-]{3,}"


def as_object(value: object) -> dict[str, Any] | None:
    """Return a JSON value that is an object, else `None`."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def masked(value: Any, secret: str) -> Any:
    """Return a JSON value without keys: `secret` itself, and whatever looks like one."""
    if isinstance(value, str):
        # What is too short for a key is the dummy of a server that wants none ("test"), and part of many words.
        return re.sub(_KEY_ECHO, "sk-***", value.replace(secret, "***") if len(secret) >= MIN_KEY else value)
    if isinstance(value, list):
        return [masked(item, secret) for item in cast("list[object]", value)]
    if (found := as_object(value)) is not None:
        return {masked(name, secret): masked(item, secret) for name, item in found.items()}
    return value


def clean(message: str, secret: str) -> tuple[str, str | None]:
    """Return a message as one line without keys and relays' ids, and the last of those ids: the nearest relay's."""
    line = " ".join(str(masked(message, secret)).split())
    ids = re.findall(_RELAYS_ID, line)
    line = re.sub(_RELAYS_ID, "", line).strip()
    return (line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 1] + "…"), (ids[-1] if ids else None)


def one_line(text: str, secret: str = "") -> str:
    """Return any text as part of a message: one line, capped, keys masked."""
    return clean(text, secret)[0]


def is_page(body: bytes) -> bool:
    """Tell whether a body is a web page."""
    start = body[:1000].removeprefix(BOM).lstrip().lower()
    return start.startswith(b"<") and (b"<html" in start or b"<!doctype" in start)


def page_title(body: bytes) -> str:
    """Return the title of a web page; of one without, as HAProxy's, its words from the first heading on; or `""`."""
    body = body[:MAX_BODY]
    page = body.lower()
    start = page.find(b"<title")
    end = page.find(b"</title", start)
    if end > start >= 0:
        words = body[start:end].partition(b">")[2]
    else:
        start = page.find(b"<h1")
        words = b"" if start < 0 else re.sub(rb"<[^<>]*>", b" ", body[start:])
    text = words.decode("utf-8", "replace")
    try:
        import html  # a list of two thousand names, which most processes never need
    except OSError:  # no file can be opened, which may be what all this is about
        return text
    return html.unescape(text)
