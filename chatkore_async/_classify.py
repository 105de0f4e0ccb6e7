"""What failed, may it be repeated, and why. No I/O, no exceptions raised.

One function, `classify`, reads an error out of a status, headers and a body in any of the forms that relays send,
and answers with a `Failure`. It can be held against `wire.md` §1, whose ids stand beside the rules. A form it does
not know degrades to the class of its status, with the body kept.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

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
"""Bytes of an error's body that are read and kept (E9)."""

MAX_MESSAGE = 1000
"""Characters of a message; what is longer ends in an ellipsis."""


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

# Codes and types that stand for a status, for errors inside a 200 (E14) and in streams (S1).
_STATUS_OF: dict[str, int] = {
    "invalid_request": 400,
    "invalid_request_error": 400,
    "bad_request": 400,
    "bad_request_error": 400,
    "badrequesterror": 400,
    "invalid_argument": 400,
    "failed_precondition": 400,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "unauthenticated": 401,
    "unauthorized": 401,
    "permission_error": 403,
    "permission_denied": 403,
    "forbidden": 403,
    "not_found": 404,
    "not_found_error": 404,
    "model_not_found": 404,
    "request_too_large": 413,
    "rate_limit": 429,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "rate_limited": 429,
    "ratelimiterror": 429,
    "too_many_requests": 429,
    "resource_exhausted": 429,
    "tokens": 429,
    "requests": 429,
    "api_error": 500,
    "internal": 500,
    "internal_error": 500,
    "internal_server_error": 500,
    "server_error": 500,
    "bad_gateway": 502,
    "overloaded": 503,
    "overloaded_error": 503,
    "service_unavailable": 503,
    "unavailable": 503,
    "deadline_exceeded": 504,
    "gateway_timeout": 504,
    "timeout": 504,
    "timeout_error": 504,
}

# E3: whatever the status, money or quota is gone.
_QUOTA_CODES = {
    "billing_hard_limit_reached",
    "billing_not_active",
    "credit_balance_too_low",
    "insufficient_balance",
    "insufficient_credits",
    "insufficient_quota",
    "insufficient_user_quota",
    "pre_consume_token_quota_failed",
    "quota_not_enough",
}
_QUOTA_WORDS = re.compile(
    r"额度已用尽|额度不足|余额不足|额度失败|欠费|insufficient (?:account )?(?:balance|credits?|funds|quota)"
    r"|exceeded your current quota|credit balance is too low|billing hard limit",
    re.IGNORECASE,
)
# A quota per minute is a rate limit (Gemini, Azure).
_PER_MINUTE = re.compile(r"per[ _-]?(?:min|sec)|每分钟|分钟内|/\s?min|\b[rt]pm\b|perminute|persecond", re.IGNORECASE)
# E6
_NO_CHANNEL_CODES = {"model_not_found", "no_available_channel", "get_channel_failed"}
_NO_CHANNEL_WORDS = re.compile(r"无可用渠道|no available channels?|no channels? available", re.IGNORECASE)
# E7: 5xx for the caller's mistake.
_CALLERS_FAULT = {
    "bad_request_body",
    "convert_request_failed",
    "count_token_failed",
    "invalid_request",
    "invalid_request_error",
    "model_price_error",
    "read_request_body_failed",
    "invalid_api_type",
    "json_marshal_failed",
}
_POLICY_CODES = {
    "content_filter",
    "content_policy_violation",
    "data_inspection_failed",
    "moderation_blocked",
    "prompt_blocked",
    "responsibleaipolicyviolation",
    "sensitive_words_detected",
}
# E16
_CONTEXT_CODES = {"context_length_exceeded", "exceed_context_size_error", "string_above_max_length"}
_CONTEXT_WORDS = re.compile(r"maximum context length|context (?:length|window|size)[^.]{0,40}exceed", re.IGNORECASE)
_MODEL_CODES = {"model_not_found", "model_not_exist"}

# E1: relays append their own id, once per relay in the chain.
_RELAYS_ID = re.compile(r"\s*[(（]\s*request[ _-]?id\s*[:：]\s*([^()（）\s]+)\s*[)）]", re.IGNORECASE)
_KEY_ECHO = re.compile(r"\bsk-[\w*.-]{3,}")
_TITLE = re.compile(rb"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
_WRONG_URL = re.compile(r"Invalid URL|Unknown request URL|Cannot POST", re.IGNORECASE)
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


def classify(status: int, headers: Mapping[str, str], body: bytes) -> Failure | None:
    """Return what an answer's error means, or `None` when a status below 400 hides no error.

    Args:
        status: the HTTP status; 200 for an event of a stream.
        headers: the answer's, looked up by lower-case name.
        body: the answer's body, or an event's data.
    """
    whole = _decoded(body)
    said = _extract(whole)
    if status < 300 and said is None:
        return None
    found = said or _Said(message=_text_of(body))
    code, kind = _lower(found.code), _lower(found.type)
    effective = _effective_status(status, found)
    message, relays_id = _clean(found.message)
    if code == "bad_response_status_code" and not message:
        message = f"the upstream answered with status {found.param}" if found.param else "the upstream failed"
    exception = _kind_of(effective, code, kind, message)
    retryable = _retryable(exception, effective)
    override = headers.get("x-should-retry", "").strip().lower()
    if override in ("true", "false") and exception is not InsufficientQuotaError:
        retryable = "yes" if override == "true" else "never"
    return Failure(
        kind=exception,
        # An error inside a 200 counts as having its status; under a status of its own, that one stays.
        status=effective if status < 300 else status,
        message=message or _default_message(effective, headers),
        code=found.code,
        type=found.type,
        param=found.param,
        body=whole if whole is not None else _mask(body[:MAX_BODY].decode("utf-8", "replace")),
        hint=_hint(exception, effective, code, message, headers),
        retryable=retryable,
        retry_after=retry_after(headers),
        request_id=relays_id,
    )


def _effective_status(status: int, said: _Said) -> int:
    """Return the status by which an error is judged: its own, or the one its code or its param stands for."""
    for value in (said.code, said.param if _lower(said.code) == "bad_response_status_code" else None):
        # E8, E12: a number from 400 to 599 is a status; beside another error status only where that one is vague.
        if value and value.isascii() and value.isdigit() and 400 <= int(value) <= 599 and status in (200, 400, 500):
            return int(value)
    if status < 300:
        for name in (_lower(said.code), _lower(said.type)):
            if name in _STATUS_OF:
                return _STATUS_OF[name]
            if name in _CALLERS_FAULT or name in _POLICY_CODES or name in _CONTEXT_CODES:
                return 400
            if name in _QUOTA_CODES:
                return 402
    return status


def _kind_of(status: int, code: str, kind: str, message: str) -> type[APIStatusError]:
    """E1: by status, then by code, and by words only where relays send no code that tells (E2, E4)."""
    per_minute = status == 429 and _PER_MINUTE.search(message)
    quota = (
        code in _QUOTA_CODES
        or kind in _QUOTA_CODES
        or (status in (401, 403, 429, 500) and _QUOTA_WORDS.search(message))
    )
    if status == 402 or (quota and not per_minute):
        return InsufficientQuotaError
    if code in _POLICY_CODES or kind in _POLICY_CODES:
        return ContentPolicyError
    if status in (400, 413, 422, 500) and (
        code in _CONTEXT_CODES or kind in _CONTEXT_CODES or _CONTEXT_WORDS.search(message)
    ):
        return ContextLengthExceededError
    if status >= 500:
        if code in _NO_CHANNEL_CODES or _NO_CHANNEL_WORDS.search(message):
            return NoChannelError
        return BadRequestError if code in _CALLERS_FAULT else InternalServerError
    return _BY_STATUS.get(status, InternalServerError if status == 200 else APIStatusError)


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
        return (
            f"redirects are not followed; point base_url at {headers['location']}" if headers.get("location") else None
        )
    if kind is InsufficientQuotaError:
        return _HINT_QUOTA
    if kind is AuthenticationError or code == "no_db_connection":
        return _HINT_KEY
    if kind is NoChannelError or (kind is NotFoundError and code in _MODEL_CODES):
        return _HINT_MODEL
    if kind is NotFoundError and (_WRONG_URL.search(message) or not message):
        return _HINT_BASE_URL
    if status in (504, 524):
        return _HINT_STREAM
    return None


def _default_message(status: int, headers: Mapping[str, str]) -> str:
    if 300 <= status < 400:
        return f"redirected to {headers.get('location', 'nowhere')}"
    return "the server gave no reason"


def _decoded(body: bytes) -> object:
    """The JSON in a body, or the first error event of an event stream (E13), or the first of several documents (E5)."""
    try:
        return _tolerant.parse(body[:MAX_BODY])
    except ValueError:
        pass
    for line in body[:MAX_BODY].splitlines():
        data = line.removeprefix(b"data:").removeprefix(b"error:").strip()
        if data.startswith((b"{", b"[")):
            try:
                return _tolerant.parse(data)
            except ValueError:
                continue
    return _first_document(body[:MAX_BODY])


def _first_document(body: bytes) -> object:
    """E5: two JSON documents in a row are no JSON; the first of them ends where the second begins."""
    start, at = body.find(b"{"), body.find(b"}{")
    if start == 0:
        while at != -1:
            try:
                return _tolerant.parse(body[: at + 1])
            except ValueError:
                at = body.find(b"}{", at + 1)
    return None


def _extract(whole: object) -> _Said | None:
    """Return what a decoded body says of an error in any of the forms of E1 and E11, or `None` when it says nothing."""
    if isinstance(whole, list):
        return next((said for item in whole if (said := _extract(item))), None)
    if not isinstance(whole, dict):
        return None
    error = whole.get("error")
    if isinstance(error, list):
        error = next(iter(error), None)
    if isinstance(error, dict) and error:
        return _said(error | {"code": _first(error, "code", "status") or whole.get("code")})
    if isinstance(error, str) and error:
        return _said({"message": error} | {name: whole.get(name) for name in ("code", "type", "param")})
    if isinstance(errors := whole.get("errors"), list) and errors:
        first = errors[0]
        return _extract({"error": first}) if isinstance(first, dict | str) else _Said(message=_text(errors))
    if "choices" in whole and whole.get("choices"):
        return None
    if detail := whole.get("detail"):
        title = _text(whole.get("title"))
        message = _detail(detail)
        return _said(whole | {"message": f"{title}: {message}" if title and title != message else message})
    flat = whole.get("object") == "error" or whole.get("type") == "error" or whole.get("success") is False
    if flat or _first(whole, "message", "msg", "error_msg", "errmsg"):
        if _first(whole, "message", "msg", "error_msg", "errmsg", "title"):
            return _said(whole)
        return _said(whole | {"message": "the server gave no reason"}) if flat else None
    if whole.get("title") and whole.get("status"):
        return _said(whole | {"message": whole["title"]})
    return None


def _said(found: Mapping[str, Any]) -> _Said:
    message = _first(found, "message", "msg", "error_msg", "errmsg", "detail", "error", "title")
    return _Said(
        message=_text(message),
        code=_label(_first(found, "code", "error_code", "status")),
        type=_label(found.get("type") if found.get("type") != "error" else None),
        param=_label(found.get("param")),
    )


def _detail(detail: object) -> str:
    """FastAPI's `detail`: a string, an object, or a list of `{loc, msg}`."""
    if isinstance(detail, list):
        lines = []
        for item in detail:
            if isinstance(item, dict) and "msg" in item:
                where = ".".join(str(part) for part in item.get("loc") or ())
                lines.append(f"{where}: {item['msg']}" if where else str(item["msg"]))
            else:
                lines.append(_text(item))
        return "; ".join(lines)
    if isinstance(detail, dict):
        said = _extract({"error": detail})
        return said.message if said and said.message else _text(detail)
    return _text(detail)


def _first(found: Mapping[str, Any], *names: str) -> object:
    return next((found[name] for name in names if found.get(name) not in (None, "")), None)


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and (inner := _first(value, "message", "msg", "detail")):
        return _text(inner)
    return msgspec.json.encode(value).decode()


def _label(value: object) -> str | None:
    return None if value is None or value == "" else _mask(_text(value))


def _lower(value: str | None) -> str:
    return (value or "").lower()


def _text_of(body: bytes) -> str:
    """What a body that is no JSON says: a page's title (E9), or its beginning."""
    if title := _TITLE.search(body[:MAX_BODY]):
        return title.group(1).decode("utf-8", "replace")
    text = body[:MAX_BODY].decode("utf-8", "replace")
    return "" if "<html" in text.lower() or "<!doctype" in text.lower() else text


def _mask(text: str) -> str:
    return _KEY_ECHO.sub("sk-***", text)


def _clean(message: str) -> tuple[str, str | None]:
    """Return a message as one line without keys and relays' ids, and the first of those ids."""
    ids = _RELAYS_ID.findall(message)
    line = " ".join(_mask(_RELAYS_ID.sub("", message)).split())
    return (line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 1] + "…"), (ids[0] if ids else None)


def one_line(text: str) -> str:
    """Return any text as part of a message: one line, capped, keys masked."""
    return _clean(text)[0]


def page_title(body: bytes) -> str | None:
    """Return the title of an HTML page, or `None` when there is no page."""
    title = _TITLE.search(body[:MAX_BODY])
    return one_line(title.group(1).decode("utf-8", "replace")) if title else None


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Return the seconds a server asks to wait, or `None`; nonsense and times past are none (E15).

    Source: RFC 9110 §10.2.3 for `retry-after` in seconds or as a date; `retry-after-ms` is OpenAI's and Azure's,
    and fractions of a second are common.
    """
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if not value:
            continue
        try:
            seconds = float(value) * scale
        except ValueError:
            try:
                date = parsedate_to_datetime(value)
            except ValueError:
                continue
            date = date if date.tzinfo else date.replace(tzinfo=UTC)
            seconds = (date - (now or datetime.now(UTC))).total_seconds()
        if 0 <= seconds < float("inf"):
            return seconds
    return None


_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|us|µs|s|m|h|d)")
_UNITS = {"us": 1e-6, "µs": 1e-6, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def rate_limit(headers: Mapping[str, str]) -> RateLimitInfo | None:
    """Return what `x-ratelimit-*` headers say, or `None` when there are none (E15: `6m0s`, `1s`, `20ms`)."""
    values: dict[str, Any] = {}
    for what in ("requests", "tokens"):
        for kind in ("limit", "remaining"):
            value = headers.get(f"x-ratelimit-{kind}-{what}", "").strip()
            if value.isascii() and value.isdigit():
                values[f"{kind}_{what}"] = int(value)
        if (seconds := _duration(headers.get(f"x-ratelimit-reset-{what}", "").strip())) is not None:
            values[f"reset_{what}"] = seconds
    return RateLimitInfo(**values) if values else None


def _duration(value: str) -> float | None:
    parts = _DURATION.findall(value)
    if parts and "".join(number + unit for number, unit in parts) == value:
        return sum(float(number) * _UNITS[unit] for number, unit in parts)
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None
