"""The script of `chatkore serve`: rules that say which requests are answered differently, and how."""

import codecs
import difflib
import re
from typing import Annotated, TypeAlias

import msgspec
from msgspec import UNSET, Meta, UnsetType

from chatkore_async.cli._problems import Problem

_Count: TypeAlias = Annotated[int, Meta(ge=1)] | UnsetType
_Bytes: TypeAlias = Annotated[int, Meta(ge=0)] | UnsetType
_Seconds: TypeAlias = Annotated[float, Meta(ge=0)] | UnsetType

WHEN = ("first", "every", "share", "model", "stream", "contains")
ERROR = ("status", "message", "code", "type", "html", "body")
ANSWER = ("text", "pieces", "tool_calls", "reasoning", "finish_reason", "usage", "done")
PACE = ("first_delay", "interval", "pings")
ENDS = ("cut_after", "reset_after", "stall_after")

_EXAMPLE = 'for example {"rules": [{"share": 0.05, "status": 503}]}'
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call of a function, as `tool_calls` lists it."""

    name: str
    arguments: object = None


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which requests, and what they meet; all that is not said stays as the server does it by itself.

    Attributes:
        first: the first so many of the requests that come to this rule and fit the rest of it.
        every: every so many of them, one: with 3 the third, the sixth and so on.
        share: this share of them, from 0 to 1, taken at random.
        model: a pattern such as `gpt-*`.
        stream: only streams, or only awaited calls.
        contains: text of the last message of the user; case does not matter.
        status: an error with this HTTP status.
        message: what the error says.
        code: the error's code.
        type: the error's type.
        html: the title of a web page that is sent in place of the error's JSON.
        body: what is sent in its place: a string as it stands, anything else as JSON.
        headers: headers of the answer.
        text: the answer; streamed word by word.
        pieces: the answer; streamed piece by piece.
        tool_calls: functions that the answer calls.
        reasoning: what comes before the answer, as `reasoning_content`.
        finish_reason: why the answer ended; `null` leaves it out.
        usage: whether tokens are told, or what is told of them.
        done: whether a stream ends with `[DONE]`.
        raw: all that is sent, status line and headers included.
        latency: seconds before anything is sent.
        first_delay: seconds between the headers of a stream and its first chunk.
        interval: seconds between two deltas.
        pings: comments before the first chunk.
        cut_after: bytes of the body after which the connection is closed.
        reset_after: bytes of the body after which the connection is reset.
        stall_after: bytes of the body after which nothing comes any more.
    """

    first: _Count = UNSET
    every: _Count = UNSET
    share: Annotated[float, Meta(ge=0, le=1)] | UnsetType = UNSET
    model: str | UnsetType = UNSET
    stream: bool | UnsetType = UNSET
    contains: str | UnsetType = UNSET
    status: Annotated[int, Meta(ge=200, le=599)] | UnsetType = UNSET
    message: str | UnsetType = UNSET
    code: str | int | None | UnsetType = UNSET
    type: str | UnsetType = UNSET
    html: str | UnsetType = UNSET
    body: object = UNSET
    headers: dict[str, str] | UnsetType = UNSET
    text: str | UnsetType = UNSET
    pieces: list[str] | UnsetType = UNSET
    tool_calls: list[Call] | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    finish_reason: str | None | UnsetType = UNSET
    usage: bool | dict[str, object] | UnsetType = UNSET
    done: bool | UnsetType = UNSET
    raw: str | UnsetType = UNSET
    latency: _Seconds = UNSET
    first_delay: _Seconds = UNSET
    interval: _Seconds = UNSET
    pings: _Bytes = UNSET
    cut_after: _Bytes = UNSET
    reset_after: _Bytes = UNSET
    stall_after: _Bytes = UNSET

    def __post_init__(self) -> None:
        if self.raw is not UNSET:
            _apart("raw", self.given((*ERROR, *ANSWER, *PACE, "headers")))
        if self.status is not UNSET:
            _apart("status", self.given((*ANSWER, *PACE)))
        elif said := self.given(ERROR):
            raise ValueError(f"{said[0]} is for an error, which needs a status")
        for kind in (("text", "pieces"), ("html", "body", "message"), ENDS):
            if len(said := self.given(kind)) > 1:
                _apart(said[0], said[1:])
        for name, value in (self.headers or {}).items():
            if not _HEADER.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a header")
            if not value.isprintable() or not value.isascii():
                raise ValueError(f"the header {name} takes printable ASCII")

    def given(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of the names that the rule gives a value."""
        return tuple(name for name in names if getattr(self, name) is not UNSET)


class Script(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A script file.

    Attributes:
        rules: the first that fits a request decides.
        seed: another one, other requests that `share` takes.
    """

    rules: list[Rule]
    seed: int = 1

    def __post_init__(self) -> None:
        for index, rule in enumerate(self.rules[:-1]):
            if not rule.given(WHEN):
                raise ValueError(f"rules[{index}] takes every request, so that rules[{index + 1}] is never reached")


def read_script(name: str, text: bytes) -> Script:
    """Return the script that a file holds.

    Args:
        name: the file's, for errors.
        text: its bytes.

    Raises:
        Problem: it is none; the place of what is wrong is named.
    """
    text = text.removeprefix(codecs.BOM_UTF8)
    try:
        return msgspec.json.decode(text, type=Script)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at ")
        # It may quote what stands in the file, and a terminal is to show that and not to obey it.
        what = "".join(each if each.isprintable() else "\ufffd" for each in what.replace("`", ""))
        raise Problem(f"{name}: {place.strip('`') or '$'}: {what[:1].lower()}{what[1:]}", _hint(what)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(f"{name}: not JSON: {_located(str(error), text)}", _EXAMPLE) from error


def _apart(name: str, others: tuple[str, ...]) -> None:
    if others:
        raise ValueError(f"{name} and {others[0]} exclude each other")


def _hint(what: str) -> str:
    unknown = re.fullmatch(r"Object contains unknown field (.*)", what)
    if unknown is None:
        return _EXAMPLE
    names = [*Rule.__struct_fields__, *Script.__struct_fields__]
    if meant := difflib.get_close_matches(unknown[1], names, 1):
        return f"did you mean {meant[0]}?"
    return f"a rule may have {', '.join(Rule.__struct_fields__)}"


def _located(what: str, text: bytes) -> str:
    """Return a message that counts bytes with lines and columns, as editors count."""
    found = re.fullmatch(r"JSON is malformed: (.*) \(byte (\d+)\)", what)
    if found is None:
        return what
    before = text[: int(found[2])]
    line, column = before.count(b"\n") + 1, len(before) - before.rfind(b"\n")
    return f"{found[1]} (line {line}, column {column})"
