"""What failed, and may it be repeated: the table of `wire.md` §1, row by row, and the retry table of the contract."""

import errno
import json
import pickle
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chatkore_async import errors
from chatkore_async._classify import Failure, classify
from chatkore_async._headers import rate_limit, request_id, retry_after
from chatkore_async._reports import MAX_DEPTH
from chatkore_async._words import MAX_BODY, one_line
from chatkore_async.errors import (
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
    UnprocessableEntityError,
)


def body(value: object) -> bytes:
    """A body: bytes and text as they are, anything else as JSON."""
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()


def enveloped(message: str = "boom", **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, **fields}}


def failure(status: int, value: object = b"", headers: dict[str, str] | None = None, **options: Any) -> Failure:
    found = classify(status, headers or {}, body(value), **options)
    assert found is not None
    return found


SATURATED = "当前分组上游负载已饱和，请稍后再试"
NO_CHANNEL = "当前分组 default 下对于模型 gpt-9 无可用渠道"

# (wire.md's row and a name, HTTP status, body) → (class, status_code, code, retryable)
# fmt: off
ROWS: list[tuple[str, int, object, type[APIStatusError], int, str | None, str]] = [
    # E1: the class by status.
    ("E1-400", 400, enveloped(type="invalid_request_error"), BadRequestError, 400, None, "never"),
    ("E1-401", 401, enveloped(code="invalid_api_key"), AuthenticationError, 401, "invalid_api_key", "never"),
    ("E1-403", 403, enveloped(), PermissionDeniedError, 403, None, "never"),
    ("E1-404", 404, enveloped(code="model_not_found"), NotFoundError, 404, "model_not_found", "never"),
    ("E1-409", 409, enveloped(), ConflictError, 409, None, "yes"),
    ("E1-413", 413, enveloped(), RequestTooLargeError, 413, None, "never"),
    ("E1-418", 418, enveloped(), APIStatusError, 418, None, "never"),
    ("E1-422", 422, enveloped(), UnprocessableEntityError, 422, None, "never"),
    ("E1-429", 429, enveloped(code="rate_limit_exceeded"), RateLimitError, 429, "rate_limit_exceeded", "yes"),
    ("E1-500", 500, enveloped(type="upstream_error", code=None), InternalServerError, 500, None, "yes"),
    ("E1-code-is-empty", 500, enveloped(type="new_api_error", code=""), InternalServerError, 500, None, "yes"),
    ("E1-code-is-a-number", 500, enveloped(code=10013), InternalServerError, 500, "10013", "yes"),
    ("E1-vendor-code", 401, enveloped(code="channel:invalid_key"), AuthenticationError, 401, "channel:invalid_key", "never"),
    # E2: an empty purse in a 401.
    ("E2-used-up", 401, enveloped("该令牌额度已用尽"), InsufficientQuotaError, 401, None, "never"),
    ("E2-token-used-up", 401, enveloped("令牌 x 额度已用尽"), InsufficientQuotaError, 401, None, "never"),
    ("E2-expired", 401, enveloped("该令牌已过期"), AuthenticationError, 401, None, "never"),
    ("E2-invalid", 401, enveloped("无效的令牌"), AuthenticationError, 401, None, "never"),
    # E3: money or quota is gone, whatever the status.
    ("E3-user-quota", 403, enveloped(code="insufficient_user_quota"), InsufficientQuotaError, 403, "insufficient_user_quota", "never"),
    ("E3-pre-charge", 403, enveloped(code="pre_consume_token_quota_failed"), InsufficientQuotaError, 403, "pre_consume_token_quota_failed", "never"),
    ("E3-words", 403, enveloped("用户额度不足"), InsufficientQuotaError, 403, None, "never"),
    ("E3-words-pre-charge", 403, enveloped("预扣费额度失败"), InsufficientQuotaError, 403, None, "never"),
    ("E3-402", 402, enveloped("Insufficient Balance"), InsufficientQuotaError, 402, None, "never"),
    ("E3-402-empty", 402, b"", InsufficientQuotaError, 402, None, "never"),
    ("E3-openai", 429, enveloped("You exceeded your current quota", code="insufficient_quota"), InsufficientQuotaError, 429, "insufficient_quota", "never"),
    ("E3-hard-limit", 429, enveloped(code="billing_hard_limit_reached"), InsufficientQuotaError, 429, "billing_hard_limit_reached", "never"),
    ("E3-type-only", 429, enveloped(type="insufficient_quota"), InsufficientQuotaError, 429, None, "never"),
    ("E3-anthropic", 400, enveloped("Your credit balance is too low to access the API", type="invalid_request_error"), InsufficientQuotaError, 400, None, "never"),
    ("E3-as-500", 500, enveloped(code="insufficient_quota"), InsufficientQuotaError, 500, "insufficient_quota", "never"),
    ("E3-per-minute", 429, enveloped("Quota exceeded for requests per minute: insufficient quota"), RateLimitError, 429, None, "yes"),
    ("E3-azure-tpm", 429, enveloped("exceeded your current quota of 1000 TPM", code="429"), RateLimitError, 429, "429", "yes"),
    ("E3-gemini-per-minute", 429, enveloped("You exceeded your current quota", code=429, status="RESOURCE_EXHAUSTED", details=[{"quotaId": "GenerateRequestsPerMinutePerProject"}]), RateLimitError, 429, "429", "yes"),
    ("E3-gemini-per-day", 429, enveloped("You exceeded your current quota", code=429, status="RESOURCE_EXHAUSTED", details=[{"quotaId": "GenerateRequestsPerDayPerProject"}]), InsufficientQuotaError, 429, "429", "never"),
    # E4: the message lies, the code does not.
    ("E4-quota", 429, enveloped(SATURATED, code="insufficient_quota"), InsufficientQuotaError, 429, "insufficient_quota", "never"),
    ("E4-rate", 429, enveloped(SATURATED, code="rate_limit_exceeded"), RateLimitError, 429, "rate_limit_exceeded", "yes"),
    # E5
    ("E5-empty", 429, b"", RateLimitError, 429, None, "yes"),
    ("E5-two-documents", 429, '{"error":{"message":"a","code":"x"}}{"error":{"message":"b"}}', RateLimitError, 429, "x", "yes"),
    ("E5-relay", 429, enveloped("您已达到请求数限制：3分钟内最多请求60次"), RateLimitError, 429, None, "yes"),
    # E6
    ("E6-words", 503, enveloped(NO_CHANNEL), NoChannelError, 503, None, "once"),
    ("E6-code", 503, enveloped(code="model_not_found"), NoChannelError, 503, "model_not_found", "once"),
    ("E6-english", 503, enveloped("No available channel for model gpt-9"), NoChannelError, 503, None, "once"),
    # E7
    ("E7-invalid", 500, enveloped(code="invalid_request"), BadRequestError, 500, "invalid_request", "never"),
    ("E7-price", 500, enveloped(code="model_price_error"), BadRequestError, 500, "model_price_error", "never"),
    ("E7-count", 500, enveloped(code="count_token_failed"), BadRequestError, 500, "count_token_failed", "never"),
    ("E7-convert", 503, enveloped(code="convert_request_failed"), BadRequestError, 503, "convert_request_failed", "never"),
    ("E7-words", 500, enveloped(code="sensitive_words_detected"), ContentPolicyError, 500, "sensitive_words_detected", "never"),
    ("E7-azure", 400, enveloped(code="content_filter"), ContentPolicyError, 400, "content_filter", "never"),
    ("E7-a-relays-own-key", 500, enveloped(code="invalid_api_key"), InternalServerError, 500, "invalid_api_key", "yes"),
    # E8
    ("E8-524", 500, enveloped("", code="bad_response_status_code", param="524"), InternalServerError, 500, "bad_response_status_code", "unconfirmed"),
    ("E8-429", 500, enveloped("", code="bad_response_status_code", param="429"), RateLimitError, 500, "bad_response_status_code", "yes"),
    ("E8-no-param", 500, enveloped("", code="bad_response_status_code"), InternalServerError, 500, "bad_response_status_code", "yes"),
    # E9
    ("E9-nginx", 502, "<html>\r\n<head><title>502 Bad Gateway</title></head></html>", InternalServerError, 502, None, "yes"),
    ("E9-haproxy", 503, "<html><body><h1>503 Service Unavailable</h1>", InternalServerError, 503, None, "yes"),
    ("E9-cloudflare-522", 522, "<!DOCTYPE html><title>x | 522: Connection timed out</title>", InternalServerError, 522, None, "yes"),
    ("E9-cloudflare-524", 524, "<!DOCTYPE html><title>x | 524: A timeout occurred</title>", InternalServerError, 524, None, "unconfirmed"),
    ("E9-cloudflare-1015", 429, "error code: 1015", RateLimitError, 429, None, "yes"),
    # E10
    ("E10", 404, enveloped("Invalid URL (POST /v1/v1/chat/completions)"), NotFoundError, 404, None, "never"),
    # E11: one extractor.
    ("E11-vllm", 400, {"object": "error", "message": "m", "type": "BadRequestError", "code": 400}, BadRequestError, 400, "400", "never"),
    ("E11-text", 400, {"error": "text"}, BadRequestError, 400, None, "never"),
    ("E11-detail", 401, {"detail": "Unauthorized"}, AuthenticationError, 401, None, "never"),
    ("E11-detail-list", 422, {"detail": [{"loc": ["body", "model"], "msg": "field required"}]}, UnprocessableEntityError, 422, None, "never"),
    ("E11-envelope", 400, {"code": 1214, "message": "m", "data": None}, BadRequestError, 400, "1214", "never"),
    ("E11-msg", 500, {"msg": "m"}, InternalServerError, 500, None, "yes"),
    ("E11-success", 403, {"success": False, "message": "m"}, PermissionDeniedError, 403, None, "never"),
    ("E11-errors", 400, {"errors": [{"message": "m", "code": "c"}]}, BadRequestError, 400, "c", "never"),
    ("E11-array", 400, [{"error": {"message": "m", "code": 400, "status": "INVALID_ARGUMENT"}}], BadRequestError, 400, "400", "never"),
    # E12
    ("E12-litellm", 429, enveloped(code="429"), RateLimitError, 429, "429", "yes"),
    ("E12-in-400", 400, enveloped(code=429), RateLimitError, 400, "429", "yes"),
    ("E12-402-in-200", 200, enveloped(code=402), InsufficientQuotaError, 402, "402", "never"),
    ("E12-502-in-200", 200, enveloped(code=502), InternalServerError, 502, "502", "yes"),
    ("E12-no-status", 200, enveloped(code=777), InternalServerError, 200, "777", "yes"),
    ("E12-many-digits", 500, enveloped(code="9" * 5000), InternalServerError, 500, "9" * 5000, "yes"),
    # E13
    ("E13-json", 400, enveloped(code="c"), BadRequestError, 400, "c", "never"),
    ("E13-events", 500, 'data: {"error":{"message":"m","code":"c"}}\n\ndata: [DONE]\n\n', InternalServerError, 500, "c", "yes"),
    ("E13-after-a-chunk", 500, 'data: {"id":"1","choices":[]}\n\ndata: {"error":{"message":"m","code":"c"}}\n\n', InternalServerError, 500, "c", "yes"),
    ("E13-many-lines", 500, 'data: {"error":\ndata:   {"message":"m","code":"c"}}\n\n', InternalServerError, 500, "c", "yes"),
    # E14: inside a 200.
    ("E14-rate", 200, enveloped(code="rate_limit_exceeded"), RateLimitError, 429, "rate_limit_exceeded", "yes"),
    ("E14-type", 200, enveloped(type="RateLimitError"), RateLimitError, 429, None, "yes"),
    ("E14-quota", 200, enveloped(code="insufficient_quota"), InsufficientQuotaError, 429, "insufficient_quota", "never"),
    ("E14-user-quota", 200, enveloped(code="insufficient_user_quota"), InsufficientQuotaError, 403, "insufficient_user_quota", "never"),
    ("E14-quota-words", 200, enveloped("该令牌额度已用尽", type="new_api_error"), InsufficientQuotaError, 200, None, "never"),
    ("E14-no-channel", 200, enveloped(NO_CHANNEL), NoChannelError, 200, None, "once"),
    ("E14-overloaded", 200, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, InternalServerError, 503, None, "yes"),
    ("E14-context", 200, enveloped("This model's maximum context length is 8192 tokens"), ContextLengthExceededError, 200, None, "never"),
    ("E14-policy", 200, enveloped(code="content_filter"), ContentPolicyError, 400, "content_filter", "never"),
    ("E14-callers-fault", 200, enveloped(code="convert_request_failed"), BadRequestError, 400, "convert_request_failed", "never"),
    ("E14-nothing-known", 200, enveloped("?", code="weird"), InternalServerError, 200, "weird", "yes"),
    ("E14-201", 201, enveloped("?"), InternalServerError, 201, None, "yes"),
    ("E14-flat", 200, {"msg": "no such model"}, InternalServerError, 200, None, "yes"),
    ("E14-beside-choices", 200, {"choices": [{"index": 0}], **enveloped(code=502)}, InternalServerError, 502, "502", "yes"),
    ("E14-after-lines", 200, 'oh no\n{"error":{"message":"m","code":429}}\n', RateLimitError, 429, "429", "yes"),
    # E16
    ("E16-openai", 400, enveloped(code="context_length_exceeded"), ContextLengthExceededError, 400, "context_length_exceeded", "never"),
    ("E16-llamacpp", 400, enveloped("the request exceeds the available context size", code=400, type="exceed_context_size_error"), ContextLengthExceededError, 400, "400", "never"),
    ("E16-string", 400, enveloped(code="string_above_max_length"), ContextLengthExceededError, 400, "string_above_max_length", "never"),
    ("E16-vllm", 400, {"object": "error", "message": "This model's maximum context length is 4096 tokens.", "code": 400}, ContextLengthExceededError, 400, "400", "never"),
    ("E16-sglang", 400, {"object": "error", "message": "The input (9 tokens) is longer than the model's context length (8 tokens)."}, ContextLengthExceededError, 400, None, "never"),
    ("E16-anthropic", 400, enveloped("prompt is too long: 9 tokens > 8 maximum"), ContextLengthExceededError, 400, None, "never"),
    # E17
    ("E17-301", 301, "<html><title>301 Moved Permanently</title>", APIStatusError, 301, None, "never"),
    ("E17-308", 308, b"", APIStatusError, 308, None, "never"),
    # E18
    ("E18-problem", 429, {"type": "about:blank", "title": "Slow down", "status": 429, "detail": "d"}, RateLimitError, 429, "429", "yes"),
    ("E18-problem-without-detail", 503, {"type": "about:blank", "title": "Down", "status": 503}, InternalServerError, 503, "503", "yes"),
    ("E18-plain", 500, "Internal Server Error", InternalServerError, 500, None, "yes"),
    ("E18-no-db", 400, enveloped(code="no_db_connection"), BadRequestError, 400, "no_db_connection", "never"),
    ("E18-408", 408, enveloped("upstream timed out"), APIStatusError, 408, None, "yes"),
    ("E18-unknown-object", 500, {"foo": 1}, InternalServerError, 500, None, "yes"),
    ("E18-code-alone", 400, {"code": "insufficient_quota"}, InsufficientQuotaError, 400, "insufficient_quota", "never"),
    ("E18-not-utf8", 500, b"\xff\xfe", InternalServerError, 500, None, "yes"),
]
# fmt: on


@pytest.mark.parametrize(
    "status, value, expected", [(*row[1:3], row[3:]) for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_an_error_is_what_the_table_says(
    status: int, value: object, expected: tuple[type[APIStatusError], int, str | None, str]
) -> None:
    """Each form that relays send has its class, its status, its code, and an answer to whether it is repeated."""
    found = failure(status, value)
    assert (found.kind, found.status, found.code, found.retryable) == expected
    assert found.message


@pytest.mark.parametrize(
    "value",
    [
        b"",
        {"choices": [{"message": {"content": "hi"}}]},
        {"choices": []},
        {"error": None, "choices": None},
        {"error": {}, "choices": []},
        {"error": {"message": "", "type": "", "param": "", "code": None}, "choices": [{}]},
        {"error": [], "errors": []},
        {"error": True},
        {"object": "chat.completion", "title": "a title alone"},
        {"type": "ping"},
        {"message": {"role": "assistant", "content": "Ollama's own form"}, "done": False},
        {"code": 0, "msg": "success", "data": {}},
        {"code": "200", "message": "OK"},
        {"success": True, "message": "fine"},
        {"choices": [{}], "message": "beside choices", "detail": "too"},
        [],
        ["text"],
        [{"a": 1}],
        '"a string"',
        "plain text",
        "{} {} {",
        '{"choices": [\n    {"message": "cut"},\n',
    ],
)
def test_a_200_without_an_error_hides_none(value: object) -> None:
    """What is no error is not made one: empty error objects, envelopes of success, cut answers."""
    assert classify(200, {}, body(value)) is None


RETRIED = [408, 409, 429, 500, 502, 503, *range(520, 524), *range(525, 531), 501, 505, 599]


@pytest.mark.parametrize(
    "status, retryable",
    [*((status, "yes") for status in RETRIED), (504, "unconfirmed"), (524, "unconfirmed")]
    + [(status, "never") for status in (301, 302, 304, 400, 401, 402, 403, 404, 405, 413, 418, 422, 451)],
)
@pytest.mark.parametrize("value", [b"", enveloped("boom"), "<html><title>x</title>"], ids=["empty", "json", "html"])
def test_the_status_decides_what_is_repeated(status: int, retryable: str, value: object) -> None:
    """The retry table of the contract, for answers without a code that knows better."""
    assert failure(status, value).retryable == retryable


@pytest.mark.parametrize(
    "status, value, override, retryable",
    [
        (400, enveloped(), "true", "yes"),
        (400, enveloped(), " True ", "yes"),
        (524, b"", "true", "yes"),
        (503, enveloped(), "false", "never"),
        (504, b"", "false", "never"),
        (503, enveloped(), "maybe", "yes"),
        (429, enveloped(code="insufficient_quota"), "true", "never"),
        (503, enveloped(NO_CHANNEL), "true", "once"),
        (503, enveloped(NO_CHANNEL), "false", "never"),
    ],
)
def test_x_should_retry_overrides_the_status(status: int, value: object, override: str, retryable: str) -> None:
    """The server's word wins over its status; an empty purse stays empty, and a missing channel missing."""
    assert failure(status, value, {"x-should-retry": override}).retryable == retryable


@pytest.mark.parametrize(
    "value, message",
    [
        (enveloped("a  b\r\n\tc"), "a b c"),
        ({"error": "text"}, "text"),
        ({"error": "invalid_token", "error_description": "it expired"}, "it expired"),
        ({"error": ["first", "second"]}, "first"),
        ({"errors": ["first"]}, "first"),
        ({"error": {"error": {"message": "inner"}}}, "inner"),
        ({"error": {"reason": 7}}, '{"reason":7}'),
        ({"detail": {"message": "m"}}, "m"),
        ({"detail": {"x": 1}}, '{"x":1}'),
        (
            {"detail": [{"loc": ["body", 0], "msg": "bad"}, {"msg": "worse"}, "worst", {"loc": "body", "msg": "x"}]},
            "body.0: bad; worse; worst; x",
        ),
        ({"title": "Bad", "detail": "really"}, "Bad: really"),
        ({"title": "Bad", "detail": "Bad"}, "Bad"),
        ({"title": "Bad", "status": 400}, "Bad"),
        ({"object": "error", "message": {"detail": [{"loc": ["body"], "msg": "bad"}]}}, "body: bad"),
        ({"object": "error"}, "the server gave no reason"),
        ({"success": False}, "the server gave no reason"),
        ({"error": {"code": "x"}}, "the server gave no reason"),
        ({"message": ["a", 2, None]}, "a; 2"),
        ({}, "the server gave no reason"),
        ({"foo": "bar"}, '{"foo":"bar"}'),
        (["a", {"b": 1}], 'a; {"b":1}'),
        ('"a string"', "a string"),
        (7, "7"),
        ("null", "null"),
        (b"", "the server gave no reason"),
        ("<html><head><TITLE lang=en>502 Bad\n Gateway &amp; Co</TITLE>", "502 Bad Gateway & Co"),
        ("<html><title>never closed", "the server gave no reason"),
        ("<html><body>no title</body>", "the server gave no reason"),
        ("x" * 2000, "x" * 999 + "…"),
        ('{"error":{"message":"a"}}{"error":{"message":"b"}}', "a"),
        ('{"a": 1}\nnonsense {\n{bad\n{"error":{"message":"late"}}', "late"),
        ('error: {"message":"in a field"}', "in a field"),
        ("[" * 500 + "\n" + "{\n" * 100, ("[" * 500 + " " + "{ " * 100).strip()),
    ],
)
def test_the_message_is_one_readable_line(value: object, message: str) -> None:
    """Whatever the form, a reader sees one line: the server's words, a page's title, or that there were none."""
    assert failure(400, value).message == message


def test_a_title_is_read_when_no_file_can_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of entities are in a file, which is read at the first page; without it they stay as they are."""

    class NoFiles:
        def find_spec(self, name: str, *_: object) -> None:
            raise OSError(errno.EMFILE, f"too many open files: {name}")

    for name in ("html", "html.entities"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoFiles()])
    assert failure(502, "<html><title>Bad &amp; Gateway</title>").message == "Bad &amp; Gateway"


def test_a_bare_upstream_failure_gets_a_message() -> None:
    """E8: the param of an empty message is the status that the upstream had."""
    fields = {"code": "bad_response_status_code"}
    assert failure(500, enveloped("", param="524", **fields)).message == "the upstream answered with status 524"
    assert failure(500, enveloped("", **fields)).message == "the upstream failed"
    assert failure(500, enveloped("told", **fields)).message == "told"


@pytest.mark.parametrize(
    "message, shown, found",
    [
        ("boom (request id: 2025a)", "boom", "2025a"),
        ("boom (request id: upstream) (request id: ours)", "boom", "ours"),
        ("坏了（request id：2025b）", "坏了", "2025b"),
        ("boom (request ids)", "boom (request ids)", None),
        (" " * 60_000 + "(request", "(request", None),
    ],
)
def test_the_relays_id_leaves_the_message(message: str, shown: str, found: str | None) -> None:
    """Each relay of a chain appends its id; the last is the one of the relay we asked, whose support we ask too."""
    failed = failure(500, enveloped(message))
    assert (failed.message, failed.request_id) == (shown, found)


@pytest.mark.parametrize(
    "name", ["x-oneapi-request-id", "x-request-id", "request-id", "x-litellm-call-id", "apim-request-id", "cf-ray"]
)
def test_the_request_id_is_in_one_of_many_headers(name: str) -> None:
    """Each kind of server has its own name for it; the relay's own wins."""
    assert request_id({name: "a"}) == "a"
    assert request_id({"cf-ray": "", "x-oneapi-request-id": "relay", name: "relay"}) == "relay"
    assert request_id({"other": "x"}) is None


@pytest.mark.parametrize(
    "status, value, headers, hint",
    [
        (401, enveloped(), {}, "api_key="),
        (400, enveloped(code="no_db_connection"), {}, "api_key="),
        (403, enveloped(code="pre_consume_token_quota_failed"), {}, "max_tokens"),
        (503, enveloped(NO_CHANNEL), {}, "client.models.list()"),
        (404, enveloped(code="model_not_found"), {}, "client.models.list()"),
        (404, enveloped("The model `x` does not exist."), {}, "client.models.list()"),
        (404, enveloped("Invalid URL (POST /v1/v1/chat/completions)"), {}, "base_url"),
        (404, {"detail": "Not Found"}, {}, "base_url"),
        (404, "404 page not found", {}, "base_url"),
        (404, b"", {}, "base_url"),
        (405, b"", {}, "base_url"),
        (404, enveloped("no such file"), {}, None),
        (524, b"", {}, "stream=True"),
        (500, enveloped("", code="bad_response_status_code", param="524"), {}, "stream=True"),
        (301, b"", {"location": "https://host/v1/"}, "https://host/v1/"),
        (302, b"", {}, None),
        (500, b"", {}, None),
    ],
)
def test_a_hint_says_what_to_change(status: int, value: object, headers: dict[str, str], hint: str | None) -> None:
    """Where the remedy is known it is told; where it is not, nothing is made up."""
    found = failure(status, value, headers).hint
    assert found is None if hint is None else hint in str(found)


def test_a_redirect_names_its_location() -> None:
    """E17: a redirect is not followed, so that a POST does not become a GET; it says where it leads."""
    assert failure(301, b"", {"location": "https://host/"}).message == "redirected to https://host/"
    assert failure(302).message == "redirected to nowhere"


def test_the_body_is_kept() -> None:
    """The decoded JSON, or the text, capped: nothing a server says is lost."""
    assert failure(400, {"error": "x", "extra": [1]}).body == {"error": "x", "extra": [1]}
    assert failure(400, b"caf\xc3\xa9 \xff").body == "café �"
    assert failure(400, "null").body == "null"
    assert failure(500, "x" * (MAX_BODY + 5)).body == "x" * MAX_BODY
    assert failure(400, b'\xef\xbb\xbf{"error":"x"}').body == {"error": "x"}


def test_a_body_that_is_nested_too_deeply_is_kept_as_text() -> None:
    """What pickle and copy could not walk through is text."""
    deep = '{"error":{"message":"m","x":' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}}"
    found = failure(400, deep)
    assert found.message == "m"
    assert found.body == deep
    shallow = failure(400, '{"error":{"message":"m","x":[[[1]]]}}')
    assert isinstance(shallow.body, dict)


@pytest.mark.parametrize(
    "opening", ['{"detail":', '{"error":{"message":', '{"message":{"message":', "[", '{"detail":[']
)
def test_no_nesting_breaks_it(opening: str) -> None:
    """A body made to exhaust the stack is an error like any other."""
    for depth in (100, 400, 900, 5000):
        closing = "".join({"{": "}", "[": "]"}[char] for char in reversed(opening) if char in "{[")
        found = failure(500, opening * depth + '"m"' + closing * depth)
        assert found.kind is InternalServerError
        pickle.dumps(found.body)


@pytest.mark.parametrize("piece", ["<title>", "(request id: ", "{", "}{", "data: {\n", "\n", " ", "sk-", "[\n", "per "])
@pytest.mark.parametrize("start", ["", "<html>"])
def test_it_takes_linear_time(piece: str, start: str) -> None:
    """No body of 64 KiB keeps the event loop busy: what is quadratic would not end within a test run."""
    assert failure(500, start + piece * (MAX_BODY // len(piece)))
    assert failure(500, enveloped(piece * (MAX_BODY // len(piece))))


def test_an_event_called_error_is_one_whatever_it_says() -> None:
    """S1: `event: error` needs no error key."""
    for value, kind, status, message in [
        ("boom", InternalServerError, 200, "boom"),
        ({"reason": "x"}, InternalServerError, 200, '{"reason":"x"}'),
        ({"code": 429}, RateLimitError, 429, '{"code":429}'),
        ({"type": "overloaded_error", "message": "busy"}, InternalServerError, 503, "busy"),
        (b"", InternalServerError, 200, "the server gave no reason"),
    ]:
        found = failure(200, value, certain=True)
        assert (found.kind, found.status, found.message, found.retryable) == (kind, status, message, "yes")


def test_json_that_is_decoded_already_is_not_decoded_again() -> None:
    """The tolerant path has the JSON at hand."""
    assert failure(200, b"not looked at", whole={"error": "x"}).message == "x"
    assert classify(200, {}, b'{"error":"not looked at"}', whole={"choices": [1]}) is None


# Secrets.

KEY = "Zx9-planted-key-Zx9"


@pytest.mark.parametrize(
    "value",
    [
        enveloped(f"Incorrect API key: {KEY}.", code=KEY, type=KEY, param=KEY, extra={KEY: [KEY]}),
        f"plain {KEY}",
        f"<html><title>{KEY}</title>",
        "x" * (MAX_BODY - 5) + KEY,
        enveloped("x" * 990 + KEY),
    ],
)
def test_no_echo_of_the_key_is_left(value: object) -> None:
    """A server that quotes the key does not get it into an exception, not even a part of it."""
    found = failure(401, value, {"location": KEY}, secret=KEY)
    assert KEY[:8] not in repr(found)
    redirected = failure(301, b"", {"location": f"https://host/?key={KEY}"}, secret=KEY)
    assert KEY not in str(redirected.hint)


def test_what_looks_like_a_key_is_masked() -> None:
    """E2: keys that relays echo, whole or masked by them, also those of others."""
    found = failure(401, enveloped("invalid [sk-abc***xyz] and sk-live_1234567890, risk-free", param="sk-abcdef"))
    assert found.message == "invalid [sk-***] and sk-***, risk-free"
    assert found.param == "sk-***"
    assert "abcdef" not in repr(found)
    assert one_line("a\n sk-abcdef") == "a sk-***"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "error",
                    "errors",
                    "message",
                    "msg",
                    "detail",
                    "code",
                    "type",
                    "param",
                    "status",
                    "title",
                    "object",
                    "loc",
                    "choices",
                    "success",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
BODIES = st.binary(max_size=200) | JSON.map(body) | st.tuples(JSON, JSON).map(lambda two: body(two[0]) + body(two[1]))
VALUES = st.text(max_size=20) | st.sampled_from(
    ["nan", "-1", "1e999", "1_0", "٣", "Mon, 01 Jan 99999 00:00:00 GMT", ","]
)
HEADERS = st.dictionaries(
    st.sampled_from(["retry-after", "retry-after-ms", "x-should-retry", "location", "x-request-id"]), VALUES
)


@given(st.integers(min_value=-1, max_value=1000), HEADERS, BODIES, st.booleans())
@example(200, {}, b'{"error":{"code":1e400}}', True)
@example(500, {}, b'{"error":{"code":' + b"9" * 5000 + b"}}", False)
@example(500, {"retry-after": "Mon, 01 Jan 2024 00:00:00 +99999999999999999999"}, b"", False)
def test_it_never_raises_and_never_shows_the_key(
    status: int, headers: dict[str, str], value: bytes, certain: bool
) -> None:
    """Any status, any headers, any bytes: there is an answer, and the key is not in it."""
    found = classify(status, headers, value + b" " + KEY.encode(), secret=KEY, certain=certain)
    if status >= 300 or certain:
        assert found is not None
    if found is not None:
        assert issubclass(found.kind, APIStatusError)
        assert "\n" not in found.message
        assert found.message
        assert found.retryable in ("yes", "once", "unconfirmed", "never")
        assert found.retry_after is None or found.retry_after >= 0
        assert KEY not in repr(found)
        assert found.status == status or status < 300
    again = classify(status, headers, value, secret=KEY, certain=certain)
    assert again == classify(status, headers, value, secret=KEY, certain=certain)


# Headers.

NOW = datetime(2025, 1, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": " 7 "}, 7.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "20ms"}, 0.02),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after-ms": "-1"}, None),
        ({"retry-after": format_datetime(NOW + timedelta(seconds=30), usegmt=True)}, 30.0),
        ({"retry-after": "Wed, 01 Jan 2025 12:00:30 -0000"}, 30.0),
        ({"retry-after": "Wed, 01 Jan 2025 14:00:30 +0200"}, 30.0),
        ({"retry-after": format_datetime(NOW - timedelta(seconds=30), usegmt=True)}, None),
        *(
            ({"retry-after": value}, None)
            for value in (
                "",
                "-5",
                "nan",
                "inf",
                "-inf",
                "1e999",
                "soon",
                "Mon, 99 Foo 2025 1:2:3 GMT",
                "Mon, 01 Jan 99999999999999999999 00:00:00 GMT",
            )
        ),
    ],
)
def test_retry_after_is_read_or_ignored(headers: dict[str, str], seconds: float | None) -> None:
    """E15: numbers and dates are seconds from now; nonsense and what is past is as if it were not there."""
    assert retry_after(headers, NOW) == seconds
    assert failure(429, b"", {"retry-after": "7"}).retry_after == 7


def test_a_date_counts_from_now() -> None:
    """Without a clock of the test, the clock is the machine's."""
    later = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    found = retry_after({"retry-after": later})
    assert found is not None
    assert 3500 < found <= 3600


@pytest.mark.parametrize(
    "value, seconds",
    [
        ("6m0s", 360.0),
        ("1s", 1.0),
        ("20ms", 0.02),
        ("1h2m3.5s", 3723.5),
        ("500us", 0.0005),
        ("1d", 86400.0),
        ("12", 12.0),
        ("1.5", 1.5),
    ]
    + [
        (value, None)
        for value in ("", "soon", "1s?", "-1s", "-1", "nan", "inf", "9" * 400, "9" * 400 + "s", "s", "1 s")
    ],
)
def test_a_reset_is_a_duration(value: str, seconds: float | None) -> None:
    """E15: Go's durations and plain seconds; anything else is ignored."""
    found = rate_limit({"x-ratelimit-reset-requests": value})
    assert (None if found is None else found.reset_requests) == seconds


def test_the_rate_limit_headers_are_read() -> None:
    """What a server says of its limits, and nothing where it says nothing."""
    said = {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-limit-tokens": "150000",
        "x-ratelimit-remaining-tokens": "-1",
        "x-ratelimit-reset-tokens": "6m0s",
    }
    found = rate_limit(said)
    assert found is not None
    assert (found.limit_requests, found.remaining_requests, found.reset_requests) == (60, 59, None)
    assert (found.limit_tokens, found.remaining_tokens, found.reset_tokens) == (150000, None, 360.0)
    assert rate_limit({}) is None
    assert rate_limit({"x-ratelimit-limit-requests": "9" * 5000}) is None


def test_every_class_with_a_status_can_come_out() -> None:
    """No class of the tree is there for show."""
    classes = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, APIStatusError)}
    assert classes == {row[3] for row in ROWS}
