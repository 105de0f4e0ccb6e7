"""The lines of batch files: what is asked, and what came of it. No I/O.

The form is that of OpenAI's Batch API, "The request input object" and "The request output object" of its reference.
There, `response` is what HTTP answered, with an error status too, and `error` is for what has no status.
"""

import hashlib
import re
from typing import Any, Literal, TypeAlias

import msgspec

from . import _codec
from ._responses import ChatCompletion
from .errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    ChatKoreError,
    InvalidRequestError,
    InvalidResponseError,
)

_JSON: TypeAlias = "dict[str, _JSON] | list[_JSON] | str | float | None"

MAX_LINE = 256 * 2**20
"""Bytes of the longest line that is read. OpenAI takes no file above 200 MB."""

_PREFIX = "batch_req_"
_OWN_ID = re.compile(_PREFIX + "([0-9a-f]{30})")
# One byte more would make each of a million marks 16 bytes larger in memory.
_MARK_SIZE = 15

BEGINNING = f'{{"id":"{_PREFIX}'.encode()
"""How each of our lines begins, by which a torn one is known."""

# The first class that fits decides. `request_timeout` is OpenAI's; it has none for the others.
_CODES: tuple[tuple[type[Exception], str], ...] = (
    (APITimeoutError, "request_timeout"),
    (APIConnectionError, "connection_error"),
    (InvalidResponseError, "invalid_response"),
    (InvalidRequestError, "invalid_request"),
)


class LineError(ValueError):
    """A line is not what belongs there; the message says why."""


class Task(msgspec.Struct, frozen=True):
    """A request of the input.

    Attributes:
        custom_id: the caller's name for it.
        id: ours, made of the name and the body: the same request has the same id in each run.
        params: what `create` takes.
    """

    custom_id: str
    id: str
    params: dict[str, Any]


class Told(msgspec.Struct, frozen=True):
    """What a line of the output tells.

    Attributes:
        custom_id: of the request it answers.
        mark: what the request is found by: of the whole request where the line is ours, else of its name.
        failed: whether there is no answer.
    """

    custom_id: str
    mark: bytes
    failed: bool


class _Line(msgspec.Struct):
    custom_id: str
    method: Literal["POST"]
    url: Literal["/v1/chat/completions"]
    body: dict[str, Any]


class _Status(msgspec.Struct):
    status_code: int


class _Result(msgspec.Struct):
    custom_id: str
    response: _Status | None  # required, or an input file would pass for an output
    id: str = ""
    error: msgspec.Raw = msgspec.Raw(b"null")


_decode_line = msgspec.json.Decoder(_Line).decode
_decode_result = msgspec.json.Decoder(_Result).decode
_encode_sorted = msgspec.json.Encoder(order="sorted").encode


def read_task(line: bytes) -> Task:
    """Return the request in a line of the input.

    Raises:
        LineError: there is none that could be sent.
    """
    read = _decoded(_decode_line, line)
    if not read.custom_id:
        raise LineError("$.custom_id: it is empty")
    body = read.body
    given = body.copy()
    if body.pop("stream", False):
        raise LineError("$.body.stream: a batch has whole completions")
    params = {name: body.pop(name) for name in _codec.REQUEST_FIELDS & body.keys()}
    try:
        _codec.encode_request(params, stream=False, extra_body=body)
    except InvalidRequestError as error:
        raise LineError(f"$.body{str(error).removeprefix('$')}") from error
    if body:  # vendors' fields
        params["extra_body"] = body
    return Task(read.custom_id, _PREFIX + _mark("request", read.custom_id, _encode_sorted(given)).hex(), params)


def read_result(line: bytes) -> Told:
    """Return what a line of the output tells.

    Raises:
        LineError: it is no such line.
    """
    read = _decoded(_decode_result, line)
    own = _OWN_ID.fullmatch(read.id)
    failed = bytes(read.error) != b"null" or read.response is None or not 200 <= read.response.status_code < 300
    return Told(read.custom_id, bytes.fromhex(own[1]) if own else name_mark(read.custom_id), failed)


def name_mark(custom_id: str) -> bytes:
    """Return what stands for a request's name where many are remembered."""
    return _mark("name", custom_id)


def task_mark(task: Task) -> bytes:
    """Return what stands for a whole request where many are remembered."""
    return bytes.fromhex(task.id.removeprefix(_PREFIX))


def is_torn(tail: bytes) -> bool:
    """Tell whether bytes after the last line end are the beginning of a line of ours, which was not written to its end.

    A machine that lost its power may leave zeros in place of what was to be written.
    """
    written = tail.rstrip(b"\0")
    return written.startswith(BEGINNING) or BEGINNING.startswith(written)


def answer_line(task_id: str, custom_id: str, completion: ChatCompletion) -> bytes:
    """Return the line of an answer."""
    attempts = completion.meta.attempts
    try:
        body = completion.to_dict()
    except ValueError:  # what Python cannot hold is in a vendor's field
        body = msgspec.to_builtins(completion)
    status = attempts[-1].status if attempts else None
    response = {"status_code": status or 200, "request_id": completion.meta.request_id or "", "body": body}
    return _encoded({"id": task_id, "custom_id": custom_id, "response": response, "error": None})


def failure_line(task_id: str, custom_id: str, error: ChatKoreError) -> bytes:
    """Return the line of a failure: a response if there was a status, else what went wrong on the way."""
    response = None
    told: dict[str, str] | None = {"code": _code(error), "message": str(error)}
    if isinstance(error, APIStatusError):
        said = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
        is_object = isinstance(error.body, dict)
        body = error.body if is_object else {"error": said}
        response = {"status_code": error.status_code, "request_id": error.request_id or "", "body": body}
        if not 200 <= error.status_code < 300:
            told = None  # an error inside a 200 has both, or it would look like an answer
    return _encoded({"id": task_id, "custom_id": custom_id, "response": response, "error": told})


def _code(error: ChatKoreError) -> str:
    if isinstance(error, APIStatusError) and error.code:
        return error.code
    return next((code for kind, code in _CODES if isinstance(error, kind)), "api_error")


def _mark(*parts: str | bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=_MARK_SIZE)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(b"%d:%b" % (len(data), data))
    return digest.digest()


def _encoded(line: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(line) + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, in words of ours or of a proxy's
        return msgspec.json.encode(_mended(line)) + b"\n"


def _mended(value: _JSON) -> _JSON:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {str(_mended(key)): _mended(item) for key, item in value.items()}
    return [_mended(item) for item in value] if isinstance(value, list) else value


def _decoded(decode: Any, line: bytes) -> Any:
    try:
        return decode(line)
    except msgspec.ValidationError as error:
        raise LineError(str(_codec._invalid(error))) from error
    except _codec.MISFIT as error:
        raise LineError(f"it is not JSON ({error})") from error
