"""What servers really send, as data: one folder of `tests/samples/` a case. Read by `test_samples.py`.

A case is a `case.toml` and at most one `body.*` (`.json`, `.sse`, `.html`, `.txt`, `.bin`), which is sent as it stands.
`tests/samples/README.md` says what may stand in them.
"""

import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from chatkore_async.testing import Cut, Pause, Reply, Reset, Stall, Step, compressed

FOLDER = Path(__file__).parent / "samples"
BOM = b"\xef\xbb\xbf"
KEY = "sk-planted-0123456789abcdef"
"""The key that samples are asked with; a body may echo it."""

HAS_BROTLI = any(find_spec(name) for name in ("brotlicffi", "brotli"))
"""Whether aiohttp can decode `br`."""

_PING_EVERY = 0.01
_PATIENCE = 10  # pings go on for so many times as long as the client may wait

Way: TypeAlias = Literal["call", "stream"]
End: TypeAlias = Literal["clean", "close", "cut", "reset", "stall", "pings"]


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool call that is expected; `arguments` is a string of JSON, compared as it stands."""

    name: str
    arguments: str
    id: str | None = None


class Expected(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the client makes of it. What is left out is not compared, but `error` and `text` say which it is.

    `message`, `hint`, `body` and `logged` are parts of what is compared, `mapping` is values by dotted path into `to_dict()`,
    `absent` names what has to be `None` or empty; everything else is the whole value. `usage` and `rate_limit` name the
    fields that are compared.
    """

    error: str | None = None
    status_code: int | None = None
    code: str | None = None
    type: str | None = None
    param: str | None = None
    message: str | None = None
    hint: str | None = None
    body: str | None = None
    request_id: str | None = None
    retry_after: float | None = None
    rate_limit: dict[str, float] | None = None
    attempts: int | None = None
    phase: str | None = None
    partial: str | None = None
    logged: str | None = None
    text: str | None = None
    texts: list[str] | None = None
    reasoning: str | None = None
    refusal: str | None = None
    role: str | None = None
    finish_reason: str | None = None
    tool_calls: list[Call] | None = None
    usage: dict[str, int] | None = None
    id: str | None = None
    model: str | None = None
    created: int | None = None
    completeness: str | None = None
    chunks: int | None = None
    mapping: dict[str, Any] | None = None
    absent: list[str] = []


class _Case(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ids: list[str]
    what: str
    expect: Expected
    status: int = 200
    headers: dict[str, str] = {}
    end: End = "clean"
    pings: str = ": PING\n\n"
    asked: tuple[Way, ...] = ("call", "stream")
    call: Expected = Expected()
    stream: Expected = Expected()
    without_brotli: Expected | None = None
    variants: bool = True
    strict: bool | None = None
    timeout: dict[str, float] = {}


class Sample(msgspec.Struct, frozen=True):
    """A case with its name, its body, and the kind of body: the ending of its file, `""` without one."""

    name: str
    case: _Case
    body: bytes
    kind: str

    def expected(self, way: Way) -> dict[str, Any]:
        """Return what is expected of a call, or of a stream: what is common, and over it what is special."""
        if self.case.without_brotli is not None and not HAS_BROTLI:
            return msgspec.structs.asdict(self.case.without_brotli)
        special = self.case.call if way == "call" else self.case.stream
        return {**msgspec.structs.asdict(self.case.expect), **_given(special)}

    @property
    def is_sse(self) -> bool:
        """Whether line ends may be exchanged: an event stream that does not play with them itself."""
        return self.kind == "sse" and b"\r" not in self.body

    def replies(self, slowness: float = 1) -> Iterator[tuple[str, Reply]]:
        """Return the answer in each form that means the same, by name. `slowness` stretches what takes time."""
        yield "whole", self._reply(slowness, self.body)
        if not self.case.variants:
            return
        for number in range(2 if self.kind == "sse" else 1):
            yield f"split {number}", self._reply(slowness, *split(self.body, random.Random(f"{self.name} {number}")))
        if self.is_sse:
            yield "CRLF", self._reply(slowness, self.body.replace(b"\n", b"\r\n"))
            yield "CR", self._reply(slowness, self.body.replace(b"\n", b"\r"))
        if self.kind in ("sse", "json") and self.body and not self.body.startswith(BOM):
            yield "BOM", self._reply(slowness, BOM + self.body)
        if self.body and self.case.end == "clean" and "content-encoding" not in map(str.lower, self.case.headers):
            yield "gzip", compressed(self._reply(slowness, self.body))

    def _reply(self, slowness: float, *pieces: bytes) -> Reply:
        steps: tuple[Step, ...] = tuple(piece for piece in pieces if piece)
        match self.case.end:
            case "cut":
                steps += (Cut(),)
            case "reset":
                steps += (Reset(),)
            case "stall":
                steps += (Stall(),)
            case "pings":
                # Longer than anybody should wait, and with another end than that of whoever does.
                count = round(_PATIENCE * slowness * max(self.case.timeout.values(), default=0.1) / _PING_EVERY)
                steps += (*(self.case.pings.encode(), Pause(_PING_EVERY)) * count, Cut())
            case _:
                pass
        framing = "close" if self.case.end == "close" else "chunked" if self.kind == "sse" or len(steps) > 1 else "auto"
        return Reply(status=self.case.status, headers=tuple(self.case.headers.items()), steps=steps, framing=framing)

    def __str__(self) -> str:
        return self.name


def split(body: bytes, chance: random.Random) -> list[bytes]:
    """Return a body in up to nine pieces."""
    if len(body) < 2:
        return [body]
    cuts = sorted(chance.sample(range(1, len(body)), min(chance.randint(1, 8), len(body) - 1)))
    return [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]


def _given(expected: Expected) -> dict[str, Any]:
    """Return the fields that were set."""
    return {name: getattr(expected, name) for name in msgspec.to_builtins(expected)}


def load(folder: Path) -> Sample:
    """Return the sample in a folder.

    Raises:
        AssertionError: it is not as the README says, with what is wrong.
    """
    try:
        case = msgspec.toml.decode((folder / "case.toml").read_bytes(), type=_Case)
    except msgspec.MsgspecError as error:
        raise AssertionError(f"{folder.name}/case.toml: {error}") from error
    others = {path.name for path in folder.iterdir()} - {"case.toml"}
    assert len(others) <= 1, f"{folder.name} has more than one body: {others}"
    assert all(name.startswith("body.") for name in others), f"{folder.name} has files that are no body: {others}"
    assert case.asked, f"{folder.name}: it is asked one way at least"
    assert folder.name.startswith(f"{case.ids[0]}-"), f"{folder.name}: it is named after the first of its ids"
    body = next((folder / name for name in others), None)
    sample = Sample(
        folder.name, case, b"" if body is None else body.read_bytes(), "" if body is None else body.suffix[1:]
    )
    for way in case.asked:
        expected = sample.expected(way)
        assert (expected["error"] is None) != (expected["text"] is None), f"{folder.name}: a text, or else an error"
        assert expected["error"] is None or expected["attempts"], f"{folder.name}: how many attempts are made of it?"
    return sample


SAMPLES = [load(folder) for folder in sorted(FOLDER.iterdir()) if folder.is_dir()]
