"""What failed, may it be repeated, and why. No I/O, no exceptions raised.

One function, `classify`, reads an error out of a status, headers and a body in any of the forms that relays send,
and answers with a `Failure`. It can be held against `wire.md` §1, whose ids stand beside the rules. A form it does
not know degrades to the class of its status, with the body kept.
"""

import html
import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, cast

import msgspec

from . import _tolerant
from ._meta import RateLimitInfo
from .errors import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    ContentPolicyError,
    ContextLengthExceededError,
    InsufficientQuotaError,
    InternalServerError,
    NoChannelError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestTooLargeError,
    Retryable,
    UnprocessableEntityError,
)

MAX_BODY = 64 * 1024
"""Bytes of an error's body that are read, and characters that are kept (E9)."""

MIN_KEY = 6
"""Characters of the shortest key that is masked where a server echoes it."""

MAX_MESSAGE = 1000
"""Characters of a message; what is longer ends in an ellipsis."""

MAX_DEPTH = 64
"""Levels of JSON in `APIStatusError.body`; what is nested deeper is kept as text, since pickle and copy recurse."""

_MAX_DOCUMENTS = 32


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An error as it was understood. `kind` is the exception's class; `status` as `APIStatusError.status_code`."""

    kind: type[APIStatusError]
    status: int
    message: str
    code: str | None = None
    type: str | None = None
    param: str | None = None
    body: object = None
    hint: str | None = None
    retryable: Retryable = "never"
    retry_after: float | None = None
    request_id: str | None = None


class _Said(msgspec.Struct, frozen=True):
    """What a body said of its error, in whatever form."""

    message: str = ""
    code: str | None = None
    type: str | None = None
    param: str | None = None


def _norm(name: str | None) -> str:
    """Return a code or type without its spelling: `RateLimitError`, `rate_limit_error` and `rate-limit` are one."""
    return re.sub(r"[\W_]", "", (name or "").lower()).removesuffix("error")


def _names(*names: str) -> frozenset[str]:
    return frozenset(map(_norm, names))


_BY_STATUS: dict[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    402: InsufficientQuotaError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: RequestTooLargeError,
    422: UnprocessableEntityError,
    429: RateLimitError,
}

# E3: whatever the status, money or quota is gone.
_QUOTA_OF: dict[int, frozenset[str]] = {
    402: _names(
        "arrearage",
        "billing_not_active",
        "budget_exceeded",
        "credit_balance_too_low",
        "insufficient_balance",
        "insufficient_credits",
        "payment_required",
        "quota_not_enough",
    ),
    403: _names("insufficient_user_quota", "pre_consume_token_quota_failed"),
    429: _names("billing_hard_limit_reached", "exceeded_current_quota_error", "insufficient_quota"),
}
_QUOTA_CODES = frozenset[str]().union(*_QUOTA_OF.values())
_QUOTA_WORDS = re.compile(
    r"额度已用尽|额度不足|余额不足|额度失败|欠费|insufficient (?:account )?(?:balance|credits?|funds|quota)"
    r"|exceeded your current quota|credit balance is too low|billing hard limit",
    re.IGNORECASE,
)
# A quota per minute is a rate limit (Gemini, Azure).
_PER_MINUTE = re.compile(r"per[ _-]?(?:min|sec)|每分钟|分钟内|/\s?min\b|\b[rt]pm\b", re.IGNORECASE)
# E6
_NO_CHANNEL_CODES = _names("model_not_found", "no_available_channel", "get_channel_failed")
_NO_CHANNEL_WORDS = re.compile(r"无可用渠道|no available channels?|no channels? available", re.IGNORECASE)
# E7: codes of relays that report a caller's mistake as a 500.
_CALLERS_FAULT = _names(
    "bad_request_body",
    "bind_request_body_failed",
    "convert_request_failed",
    "count_token_failed",
    "count_token_messages_failed",
    "get_model_ratio_failed",
    "invalid_api_type",
    "invalid_text_request",
    "json_marshal_failed",
    "model_price_error",
    "read_request_body_failed",
)
_POLICY_CODES = _names(
    "content_filter",
    "content_policy_violation",
    "data_inspection_failed",
    "moderation_blocked",
    "prompt_blocked",
    "ResponsibleAIPolicyViolation",
    "sensitive_words_detected",
)
# E16
_CONTEXT_CODES = _names("context_length_exceeded", "exceed_context_size_error", "string_above_max_length")
_CONTEXT_WORDS = re.compile(
    r"maximum context length|context (?:length|window|size)[^.]{0,40}exceed"
    r"|(?:exceed|longer than)[^.]{0,40}context (?:length|window|size)|prompt is too long"
    r"|token count[^.]{0,40}exceeds the maximum",
    re.IGNORECASE,
)
_MODEL_CODES = _names("model_not_found", "model_not_exist")
_MODEL_WORDS = re.compile(r"\bmodel\b.{0,200}\b(?:not found|not exist)|模型.{0,100}不存在", re.IGNORECASE)

# Codes and types that stand for a status, for errors inside a 200 (E14) and in streams (S1).
_STATUS_OF: dict[str, int] = {
    name: status
    for status, names in (
        (400, _names("invalid_request", "bad_request", "invalid_argument", "failed_precondition")),
        (400, _CALLERS_FAULT | _POLICY_CODES | _CONTEXT_CODES),
        (401, _names("authentication_error", "auth_error", "invalid_api_key", "unauthenticated", "unauthorized")),
        (403, _names("permission_error", "permission_denied", "forbidden", "access_denied")),
        (404, _names("not_found", "model_not_found", "model_not_exist")),
        (409, _names("conflict")),
        (413, _names("request_too_large", "payload_too_large")),
        (422, _names("unprocessable_entity")),
        (429, _names("rate_limit", "rate_limit_exceeded", "rate_limited", "rate_limit_reached", "resource_exhausted")),
        (429, _names("requests", "throttling", "tokens", "too_many_requests")),
        (500, _names("api_error", "internal", "internal_server_error", "server_error")),
        (502, _names("bad_gateway")),
        (503, _names("overloaded", "service_unavailable", "unavailable", "get_channel_failed", "no_available_channel")),
        (504, _names("deadline_exceeded", "gateway_timeout", "timeout")),
        *_QUOTA_OF.items(),
    )
    for name in names
}
_CALLERS_STATUS = (400, 413, 422, 429)
_CONTEXT_STATUS = (200, 400, 413, 422, 500)

# E1: relays append their own id, once per relay in the chain.
_RELAYS_ID = re.compile(r" ?[(（] ?request[ _-]?id ?[:：] ?([^()（） ]{1,200}) ?[)）]", re.IGNORECASE)
_KEY_ECHO = re.compile(r"\bsk-[\w*.-]{3,}")
_WRONG_URL = re.compile(
    r"Invalid URL|Unknown request URL|Cannot POST|page not found|^(?:404 )?Not Found\.?$", re.IGNORECASE
)
_ID_HEADERS = ("x-oneapi-request-id", "x-request-id", "request-id", "x-litellm-call-id", "apim-request-id", "cf-ray")

_HINT_BASE_URL = "check base_url: it usually ends in /v1"
_HINT_KEY = "check CHATKORE_API_KEY or api_key="
_HINT_QUOTA = (
    "top up the account or raise the key's quota; a relay reserves for max_tokens before it asks the model, "
    "so a smaller max_tokens may pass"
)
_HINT_MODEL = "check the model's name against client.models.list(), and whether the key's group may use it"
_HINT_STREAM = (
    "the gateway stopped waiting, and the answer may have been billed; stream=True keeps the connection alive"
)


def request_id(headers: Mapping[str, str]) -> str | None:
    """Return the server's name for a request, from the first header that has one (E1)."""
    for name in _ID_HEADERS:
        if found := headers.get(name):
            return found
    return None


def classify(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    secret: str = "",
    whole: object = None,
    certain: bool = False,
) -> Failure | None:
    """Return what an answer's error means, or `None` when a status below 300 hides no error.

    Args:
        status: the HTTP status; 200 for an event of a stream.
        headers: the answer's, looked up by lower-case name.
        body: the answer's body, or an event's data.
        secret: the key that was sent; no echo of it is in the result.
        whole: the JSON in `body`, where the caller has decoded it.
        certain: whether it is an error whatever the body says.
    """
    whole, said = _read(body) if whole is None else (whole, _extract(whole))
    if said is None:
        if status < 300 and not certain:
            return None
        said = _unknown_form(whole, body)
    code, kind = _norm(said.code), _norm(said.type)
    effective = _effective_status(status, said)
    message, relays_id = _clean(said.message, secret)
    if code == _BAD_UPSTREAM and not message:
        message = f"the upstream answered with status {said.param}" if said.param else "the upstream failed"
    exception = _kind_of(effective, code, kind, message, whole)
    retryable = _retryable(exception, effective)
    override = headers.get("x-should-retry", "").strip().lower()
    if override == "false" or (
        # It overrides the status; an empty purse and a missing channel are no matter of status.
        override == "true" and exception not in (InsufficientQuotaError, NoChannelError)
    ):
        retryable = "yes" if override == "true" else "never"
    hint = _hint(exception, effective, code, message, headers)
    return Failure(
        kind=exception,
        # An error inside a 200 counts as having its status; under a status of its own, that one stays.
        status=effective if status < 300 else status,
        message=message or _default_message(effective, headers),
        code=masked(said.code, secret),
        type=masked(said.type, secret),
        param=masked(said.param, secret),
        body=masked(body.decode("utf-8", "replace"), secret)[:MAX_BODY]
        if whole is None or _is_deep(whole)
        else masked(whole, secret),
        hint=masked(hint, secret),
        retryable=retryable,
        retry_after=retry_after(headers),
        request_id=relays_id,
    )


_BAD_UPSTREAM = _norm("bad_response_status_code")


def _effective_status(status: int, said: _Said) -> int:
    """Return the status by which an error is judged: its own, or the one its code or its param stands for."""
    code, kind = _norm(said.code), _norm(said.type)
    # E8, E12: a number that is the status of an error is the better one; gateways rewrite the status, not the body.
    for number in (said.code, said.param if code == _BAD_UPSTREAM else None):
        if number and re.fullmatch(r"[45]\d\d", number, re.ASCII):
            return int(number)
    if status < 300:
        return _STATUS_OF.get(code) or _STATUS_OF.get(kind) or status
    # E7. Of a 500 only the caller's faults are believed: a wrong key may be the relay's own.
    if status >= 500 and (meant := _STATUS_OF.get(code)) in _CALLERS_STATUS:
        return meant
    return status


def _kind_of(status: int, code: str, kind: str, message: str, whole: object) -> type[APIStatusError]:
    """E1: by status, then by code, and by words only where relays send no code that tells (E2, E4)."""
    quota = code in _QUOTA_CODES or kind in _QUOTA_CODES
    if not quota and status not in (404, 413, 422):
        quota = _QUOTA_WORDS.search(message) is not None
    if status == 402 or (quota and not (status == 429 and _is_per_minute(message, whole))):
        return InsufficientQuotaError
    if code in _POLICY_CODES or kind in _POLICY_CODES:
        return ContentPolicyError
    if code in _CONTEXT_CODES or kind in _CONTEXT_CODES:
        return ContextLengthExceededError
    if status in _CONTEXT_STATUS and _CONTEXT_WORDS.search(message):
        return ContextLengthExceededError
    if (status >= 500 and code in _NO_CHANNEL_CODES) or _NO_CHANNEL_WORDS.search(message):
        return NoChannelError
    return _BY_STATUS.get(status, APIStatusError if 300 <= status < 500 else InternalServerError)


def _is_per_minute(message: str, whole: object) -> bool:
    """E3: whether a 429 speaks of a quota per minute, in its message or (Gemini) in its details."""
    if _PER_MINUTE.search(message):
        return True
    details = _compact(whole)
    return "PerMinute" in details and "PerDay" not in details


def _retryable(kind: type[APIStatusError], status: int) -> Retryable:
    if kind is NoChannelError:
        return "once"
    if status in (504, 524) and kind is InternalServerError:
        return "unconfirmed"
    if kind in (RateLimitError, ConflictError, InternalServerError) or (status == 408 and kind is APIStatusError):
        return "yes"
    return "never"


def _hint(kind: type[APIStatusError], status: int, code: str, message: str, headers: Mapping[str, str]) -> str | None:
    if 300 <= status < 400:
        location = headers.get("location")
        return f"redirects are not followed; point base_url at {location}" if location else None
    if kind is InsufficientQuotaError:
        return _HINT_QUOTA
    if kind is AuthenticationError or code == _norm("no_db_connection"):
        return _HINT_KEY
    if kind is NoChannelError:
        return _HINT_MODEL
    if status == 405 or (kind is NotFoundError and (_WRONG_URL.search(message) or not message)):
        return _HINT_BASE_URL
    if kind is NotFoundError and (code in _MODEL_CODES or _MODEL_WORDS.search(message)):
        return _HINT_MODEL
    if status in (504, 524) and kind is InternalServerError:
        return _HINT_STREAM
    return None


def _default_message(status: int, headers: Mapping[str, str]) -> str:
    if 300 <= status < 400:
        return f"redirected to {headers.get('location') or 'nowhere'}"
    return "the server gave no reason"


def _read(body: bytes) -> tuple[object, _Said | None]:
    """Return the JSON in a body, or `None`, and what it says of an error."""
    first: object = None
    for whole in _documents(body):
        if said := _extract(whole):
            return whole, said
        first = whole if first is None else first
    return first, None


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
    text = re.sub(r"^(?:data|error):[ \t]*", "", body[:MAX_BODY].decode("utf-8-sig", "replace"), flags=re.MULTILINE)
    at = 0
    for _ in range(_MAX_DOCUMENTS):
        found = _BEGINNING.search(text, at)
        if found is None:
            return
        start, at = found.end(), found.end() + 1
        try:
            _, at = _FIRST_OF.raw_decode(text, start)
            yield _tolerant.parse(text[start:at].encode())
        except (ValueError, RecursionError):
            continue


_BEGINNING = re.compile(r"(?:^|(?<=[}\]]))(?=[{\[])", re.MULTILINE)
_FIRST_OF = json.JSONDecoder(parse_int=str)  # asked only where a document ends


def _extract(whole: object) -> _Said | None:
    """Return what a decoded body says of an error in any of the forms of E1 and E11, or `None` when it says nothing."""
    if isinstance(whole, list):
        items = filter(None, map(_object, cast("list[object]", whole)))
        return next(filter(None, map(_extract, items)), None)
    found = _object(whole)
    if found is None:
        return None
    for name in ("error", "errors"):
        if said := _under_error(_alone(found.get(name)), found):
            return said
    if found.get("choices"):
        return None
    if found.get("detail"):
        title, detail = _text(found.get("title")), _text(found["detail"])
        return _said(found, f"{title}: {detail}" if title and title != detail else detail)
    if found.get("object") == "error" or found.get("type") == "error" or found.get("success") is False:
        return _said(found)
    message = _first(found, *_MESSAGES)
    if isinstance(message, str | list) and not _is_success(found):
        return _said(found)
    return _said(found) if found.get("title") and found.get("status") else None


def _under_error(error: object, whole: dict[str, Any]) -> _Said | None:
    """Return what the value of `error` says, with what stands beside it; an object of empty values is none."""
    inner = _object(error)
    if inner is not None:
        if not any(inner.values()):
            return None
        code = _first(inner, "code", "error_code", "status") or whole.get("code")
        message = _text(_first(inner, *_MESSAGES, "detail", "error", "title"))
        if not message and _first(inner, "code", "type") is None:
            message = _compact(inner)
        return _said(inner | {"code": code}, message)
    if not isinstance(error, str) or not error:
        return None
    if message := _text(_first(whole, *_MESSAGES, "error_description")):
        return _said(whole | {"code": _first(whole, "code") or error}, message)
    return _said(whole, error)


_MESSAGES = ("message", "msg", "error_msg", "errmsg")


def _said(found: Mapping[str, Any], message: str | None = None) -> _Said:
    return _Said(
        message=_text(_first(found, *_MESSAGES, "title")) if message is None else message,
        code=_label(_first(found, "code", "error_code", "status")),
        type=_label(found.get("type") if found.get("type") != "error" else None),
        param=_label(found.get("param")),
    )


def _is_success(found: Mapping[str, Any]) -> bool:
    """Whether an envelope such as `{"code": 0, "msg": "ok", "data": …}` reports that all is well."""
    return found.get("success") is True or str(found.get("code")).lower() in ("0", "200", "ok", "success")


def _unknown_form(whole: object, body: bytes) -> _Said:
    """Return what a body says that is an error although it does not look like one (E18)."""
    if (found := _object(whole)) is not None:
        return _said(found, _text(_first(found, *_MESSAGES)) or (_compact(found) if found else ""))
    if whole is not None:
        return _Said(message=_text(whole))
    return _Said(message=page_title(body) if is_page(body) else body[:MAX_BODY].decode("utf-8", "replace"))


def _object(value: object) -> dict[str, Any] | None:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


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
        if (found := _object(value)) and (inner := _first(found, *_MESSAGES, "detail")) is not None:
            where: object = found.get("loc")
            path = ".".join(map(str, cast("list[object]", where))) if isinstance(where, list) else ""
            return f"{path}: {_text(inner, depth + 1)}" if path else _text(inner, depth + 1)
    return _compact(value)


def _compact(value: object) -> str:
    return "…" if _is_deep(value) else msgspec.json.encode(value).decode()


def _label(value: object) -> str | None:
    return None if value is None or value == "" else _text(value)


def _is_deep(value: object) -> bool:
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


def masked(value: Any, secret: str) -> Any:
    """Return a JSON value without keys: `secret` itself, and whatever looks like one."""
    if isinstance(value, str):
        # What is too short for a key is the dummy of a server that wants none ("test"), and part of many words.
        return _KEY_ECHO.sub("sk-***", value.replace(secret, "***") if len(secret) >= MIN_KEY else value)
    if isinstance(value, list):
        return [masked(item, secret) for item in cast("list[object]", value)]
    if (found := _object(value)) is not None:
        return {masked(name, secret): masked(item, secret) for name, item in found.items()}
    return value


def _clean(message: str, secret: str) -> tuple[str, str | None]:
    """Return a message as one line without keys and relays' ids, and the last of those ids: the nearest relay's."""
    line = " ".join(str(masked(message, secret)).split())
    ids = _RELAYS_ID.findall(line)
    line = _RELAYS_ID.sub("", line).strip()
    return (line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 1] + "…"), (ids[-1] if ids else None)


def one_line(text: str, secret: str = "") -> str:
    """Return any text as part of a message: one line, capped, keys masked."""
    return _clean(text, secret)[0]


def is_page(body: bytes) -> bool:
    """Tell whether a body is a web page."""
    start = body[:1000].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return start.startswith(b"<") and (b"<html" in start or b"<!doctype" in start)


def page_title(body: bytes) -> str:
    """Return the title of a web page, `""` when it has none."""
    page = body[:MAX_BODY].lower()
    start = page.find(b"<title")
    end = page.find(b"</title", start)
    return html.unescape(body[start:end].partition(b">")[2].decode("utf-8", "replace")) if end > start >= 0 else ""


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Return the seconds a server asks to wait, or `None`; nonsense and times past are none (E15).

    Source: RFC 9110 §10.2.3 for `retry-after` in seconds or as a date; `retry-after-ms` is OpenAI's and Azure's,
    and fractions of a second are common.
    """
    if (milliseconds := _duration(headers.get("retry-after-ms", ""))) is not None:
        return milliseconds / 1000
    value = headers.get("retry-after", "")
    if (seconds := _duration(value)) is not None:
        return seconds
    try:
        date = parsedate_to_datetime(value)
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - (now or datetime.now(UTC))).total_seconds()
    except (ValueError, OverflowError, IndexError, TypeError):  # what the parser raises for nonsense
        return None
    return seconds if seconds >= 0 else None


_DURATION = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)(ms|us|µs|s|m|h|d)", re.ASCII)
_UNITS = {"us": 1e-6, "µs": 1e-6, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def rate_limit(headers: Mapping[str, str]) -> RateLimitInfo | None:
    """Return what `x-ratelimit-*` headers say, or `None` when there are none (E15: `6m0s`, `1s`, `20ms`)."""
    values: dict[str, Any] = {}
    for what in ("requests", "tokens"):
        for kind in ("limit", "remaining"):
            value = headers.get(f"x-ratelimit-{kind}-{what}", "").strip()
            if re.fullmatch(r"\d{1,18}", value, re.ASCII):
                values[f"{kind}_{what}"] = int(value)
        if (seconds := _duration(headers.get(f"x-ratelimit-reset-{what}", ""))) is not None:
            values[f"reset_{what}"] = seconds
    return RateLimitInfo(**values) if values else None


def _duration(value: str) -> float | None:
    """Return seconds, from a number of them or from Go's form; `None` for what is negative, endless or nonsense."""
    value = value.strip()
    parts = _DURATION.findall(value)
    if parts and "".join(number + unit for number, unit in parts) == value:
        return sum(float(number) * _UNITS[unit] for number, unit in parts)
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None
