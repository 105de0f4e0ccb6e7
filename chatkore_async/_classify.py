"""What failed, may it be repeated, and why. No I/O, no exceptions raised.

One function, `classify`, reads an error out of a status, headers and a body in any of the forms that relays send,
and answers with a `Failure`. It can be held against `wire.md` §1, whose ids stand beside the rules. A form it does
not know degrades to the class of its status, with the body kept.
"""

import re
from collections.abc import Mapping

import msgspec

from ._headers import retry_after
from ._reports import Said, compact, extract, is_deep, read, unknown_form
from ._words import MAX_BODY, clean, masked, one_line
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


def _norm(name: str | None) -> str:
    """Return a code or type without its spelling: `RateLimitError`, `rate_limit_error` and `rate-limit` are one."""
    # No pattern: this runs for each name below, and it would be the one that importing this module compiles.
    return "".join(filter(str.isalnum, (name or "").lower())).removesuffix("error")


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

# The patterns of this module are compiled by `re` at the first error: most processes never see one.
_QUOTA_WORDS = (
    r"(?i)额度已用尽|額度已用盡|额度不足|額度不足|余额不足|餘額不足|额度失败|額度失敗|欠费|欠費"
    r"|insufficient (?:account )?(?:balance|credits?|funds|quota)|token quota is exhausted"
    r"|exceeded your current quota|credit balance is too low|billing hard limit"
)

# A quota per minute is a rate limit (Gemini, Azure).
_PER_MINUTE = r"(?i)per[ _-]?(?:min|sec)|每分钟|分钟内|/\s?min\b|\b[rt]pm\b"

# E6
_NO_CHANNEL_CODES = _names("model_not_found", "no_available_channel", "get_channel_failed")

_NO_CHANNEL_WORDS = r"(?i)无可用渠道|無可用(?:渠道|管道)|no available channels?|no channels? available"

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

_CONTEXT_WORDS = (
    r"(?i)maximum (?:context|prompt) length|exceeded model token limit|context (?:length|window|size)[^.]{0,40}exceed"
    r"|(?:exceed|longer than)[^.]{0,40}context (?:length|window|size)|prompt is too long"
    r"|token count[^.]{0,40}exceeds the (?:maximum|limit)|greater than the context length"
    r"|reduce the length of the messages|input is too long for requested model|range of input length should be"
)

_MODEL_CODES = _names("model_not_found", "model_not_exist")

_MODEL_WORDS = r"(?i)\bmodel\b.{0,200}\b(?:not found|not exist)|模型.{0,100}不存在"

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

_WRONG_URL = r"(?i)Invalid URL|Unknown request URL|Cannot POST|page not found|^(?:404 )?Not Found\.?$"

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
    whole, said = read(body) if whole is None else (whole, extract(whole))
    if said is None:
        if status < 300 and not certain:
            return None
        said = unknown_form(whole, body)
    code, kind = _norm(said.code), _norm(said.type)
    effective = _effective_status(status, said)
    message, relays_id = clean(said.message, secret)
    if code == _BAD_UPSTREAM and not message:
        number = one_line(said.param or "", secret)
        message = f"the upstream answered with status {number}" if number else "the upstream failed"
    exception = _kind_of(effective, code, kind, message, whole)
    retryable = _retryable(exception, effective)
    override = headers.get("x-should-retry", "").strip().lower()
    if override == "false" or (
        # It overrides the status; an empty purse and a missing channel are no matter of status.
        override == "true" and exception not in (InsufficientQuotaError, NoChannelError)
    ):
        retryable = "yes" if override == "true" else "never"
    hint = _hint(exception, effective, (code, kind), message, headers)
    return Failure(
        kind=exception,
        # An error inside a 200 counts as having its status; under a status of its own, that one stays.
        status=effective if status < 300 else status,
        message=message or _default_message(effective, headers),
        code=masked(said.code, secret),
        type=masked(said.type, secret),
        param=masked(said.param, secret),
        body=masked(body.decode("utf-8", "replace"), secret)[:MAX_BODY]
        if whole is None or is_deep(whole)
        else masked(whole, secret),
        hint=masked(hint, secret),
        retryable=retryable,
        retry_after=retry_after(headers),
        request_id=relays_id,
    )


_BAD_UPSTREAM = _norm("bad_response_status_code")


def _effective_status(status: int, said: Said) -> int:
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
        quota = re.search(_QUOTA_WORDS, message) is not None
    if status == 402 or (quota and not (status == 429 and _is_per_minute(message, whole))):
        return InsufficientQuotaError
    if code in _POLICY_CODES or kind in _POLICY_CODES:
        return ContentPolicyError
    if code in _CONTEXT_CODES or kind in _CONTEXT_CODES:
        return ContextLengthExceededError
    if status in _CONTEXT_STATUS and re.search(_CONTEXT_WORDS, message):
        return ContextLengthExceededError
    if (status >= 500 and code in _NO_CHANNEL_CODES) or re.search(_NO_CHANNEL_WORDS, message):
        return NoChannelError
    return _BY_STATUS.get(status, APIStatusError if 300 <= status < 500 else InternalServerError)


def _is_per_minute(message: str, whole: object) -> bool:
    """E3: whether a 429 speaks of a quota per minute, in its message or (Gemini) in its details."""
    if re.search(_PER_MINUTE, message):
        return True
    details = compact(whole)
    return "PerMinute" in details and "PerDay" not in details


def _retryable(kind: type[APIStatusError], status: int) -> Retryable:
    if kind is NoChannelError:
        return "once"
    if status in (504, 524) and kind is InternalServerError:
        return "unconfirmed"
    if kind in (RateLimitError, ConflictError, InternalServerError) or (status == 408 and kind is APIStatusError):
        return "yes"
    return "never"


def _hint(
    kind: type[APIStatusError], status: int, codes: tuple[str, str], message: str, headers: Mapping[str, str]
) -> str | None:
    if 300 <= status < 400:
        location = headers.get("location")
        if not location:
            return None
        # Of a call's own path `base_url` takes care.
        return f"redirects are not followed; point base_url at {location.removesuffix('/models')}"
    if kind is InsufficientQuotaError:
        return _HINT_QUOTA
    if kind is AuthenticationError or _norm("no_db_connection") in codes:
        return _HINT_KEY
    if kind is NoChannelError:
        return _HINT_MODEL
    if status == 405 or (kind is NotFoundError and (re.search(_WRONG_URL, message) or not message)):
        return _HINT_BASE_URL
    if kind is NotFoundError and (codes[0] in _MODEL_CODES or re.search(_MODEL_WORDS, message)):
        return _HINT_MODEL
    if status in (504, 524) and kind is InternalServerError:
        return _HINT_STREAM
    return None


def _default_message(status: int, headers: Mapping[str, str]) -> str:
    if 300 <= status < 400:
        return f"redirected to {headers.get('location') or 'nowhere'}"
    return "the server gave no reason"
