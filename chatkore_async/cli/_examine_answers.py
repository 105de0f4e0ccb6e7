"""What the server's answers tell: models, the key, a call, headers. From observations to findings, without I/O."""

import difflib
import re
from collections.abc import Sequence

from chatkore_async import (
    APIStatusError,
    AuthenticationError,
    ChatKoreError,
    InsufficientQuotaError,
    InvalidResponseError,
    NoChannelError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
)
from chatkore_async.cli._examine_errors import remark_on_error, told
from chatkore_async.cli._finding import Finding, Remark, found, skipped, snippet
from chatkore_async.cli._observed import Account, Answered, Headers
from chatkore_async.cli._troubles import milliseconds

USUAL = "gpt-4o-mini"
"""The model that is asked unless another is named, or this one is not listed."""

_SHOWN = 5
_NOT_CHAT = re.compile(
    r"embed|whisper|tts|dall-e|image|moderation|rerank|transcri|audio|realtime|sora|flux|midjourney", re.IGNORECASE
)


KEYS_FAULT = (AuthenticationError, InsufficientQuotaError)
"""Errors that are the key's affair, whatever was asked for; the step `key` has them."""


def choose_model(asked: str | None, listed: Sequence[str]) -> str:
    """Return the model to ask: the one named, else the usual one, else the first listed that looks able to talk."""
    if asked is not None:
        return asked
    if not listed or USUAL in listed:
        return USUAL
    return next((name for name in listed if not _NOT_CHAT.search(name)), listed[0])


def examine_models(listed: Sequence[str], seconds: float, asked: str | None) -> Finding:
    """Judge a list of models. `asked` is the model that was named, if one was."""
    took = milliseconds(seconds)
    if not listed:
        means = "The server lists no model: the key may not be allowed any."
        return found("models", [f"none, in {took}"], [Remark("warn", means, "Look at the key's group and models.")])
    more = len(listed) - _SHOWN
    names = ", ".join(name[:60] for name in listed[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
    remark = None
    if asked is not None and asked not in listed:
        near = difflib.get_close_matches(asked, listed, 1)
        change = f"Did you mean {near[0]}?" if near else f"Take one that is, such as {listed[0]}."
        remark = Remark("warn", f"{asked} is not among them.", change)
    return found("models", [f"{len(listed)} in {took}: {names}"], [remark])


def examine_no_models(error: ChatKoreError, base_url: str, *, calls: bool) -> Finding:
    """Judge an error in place of a list of models. `calls` is whether a call will be tried, which tells more."""
    if isinstance(error, KEYS_FAULT):
        return skipped("models", f"{told(error)} See key.")
    if calls and isinstance(error, NotFoundError):
        means = "There is no list of models at this URL: some servers have none, or the base URL is wrong."
        change = "If the call works, nothing. Otherwise check the base URL: it usually ends in /v1."
        return found("models", [told(error)], [Remark("warn", means, change)])
    if calls and isinstance(error, PermissionDeniedError):
        means = "The key may not list models, or something in front of the server turns this machine away."
        return found("models", [told(error)], [Remark("warn", means, "If the call works, nothing.")])
    return found("models", [told(error)], [remark_on_error(error, base_url)])


def why_no_call(error: ChatKoreError | None) -> str:
    """Return why a call need not be tried after the list of models ended so, or `""` when it is worth it."""
    if isinstance(error, KEYS_FAULT):
        return "there would be the same answer"
    redirected = isinstance(error, APIStatusError) and error.status_code < 400
    return "what answers is not the API" if redirected or isinstance(error, InvalidResponseError) else ""


def examine_key(account: Account, errors: Sequence[ChatKoreError | None], signs: Sequence[Remark]) -> Finding:
    """Judge the key by what the server answered to it.

    Args:
        account: whose key it is.
        errors: of the list of models, and of the call if one was made; `None` for one that worked.
        signs: what the key's form told.
    """
    has_key = bool(account.key.strip())
    refused = next((error for error in errors if isinstance(error, AuthenticationError)), None)
    if refused is not None:
        if not has_key:
            means = "The server wants a key, and there is none."
            return found(
                "key", [told(refused)], [Remark("fail", means, "export CHATKORE_API_KEY=... and run it again.")]
            )
        if signs:
            return found("key", [told(refused)], [Remark("fail", sign.means, sign.change) for sign in signs])
        means = "The server does not know this key: it is mistyped, revoked, expired, or another server's."
        change = "Compare it with the server's page of keys; see under settings which one is used, and where it goes."
        return found("key", [told(refused)], [Remark("fail", means, change)])
    # What the call says counts more than what the list of models does.
    for error in errors[-1:]:
        if isinstance(error, InsufficientQuotaError | PermissionDeniedError):
            return found("key", [told(error)], [remark_on_error(error, "")])
    if None not in errors:
        # A limit is counted by key, and a missing model is looked up for one.
        if any(isinstance(error, RateLimitError | NoChannelError) for error in errors):
            return found("key", ["it was not refused"])
        return skipped("key", "no answer tells whether it is accepted")
    if not has_key:
        return found("key", ["the server asks for none"])
    if len(errors) == 1:
        return found("key", ["accepted for the list of models; whether it may make calls was not tried"])
    return found("key", ["accepted, for the list of models" if errors[1] is not None else "accepted"])


def examine_call(answered: Answered) -> Finding:
    """Judge an answer to an awaited call."""
    tokens = answered.tokens
    seen = [
        f"{answered.asked} answered {snippet(answered.text)} in {milliseconds(answered.seconds)}",
        f"finish reason {answered.finish_reason}" if answered.finish_reason else "no finish reason",
        f"{tokens.prompt} + {tokens.completion} tokens" if tokens else "no usage",
        f"request id {answered.request_id}" if answered.request_id else "no request id",
    ]
    return found("call", seen, [*remarks_on(answered), _on_usage(answered)])


def remarks_on(answered: Answered) -> list[Remark | None]:
    """Return what is not as it should be with any answer, streamed or not."""
    remarks: list[Remark | None] = []
    if not answered.text.strip() and not answered.other:
        means = "The answer is empty."
        if answered.finish_reason == "length":
            means += " A model that reasons first may have spent the few tokens it was given on that."
        remarks.append(Remark("warn", means, "Try another: --model NAME."))
    if not answered.finish_reason and answered.completeness != "unconfirmed":
        means = "Without a finish reason nobody can tell whether an answer is whole or was cut."
        remarks.append(Remark("warn", means, "Tell whoever runs the relay: it should pass the finish reason on."))
    if answered.model and not _is_same(answered.asked, answered.model):
        means = f"{snippet(answered.model)} answered in place of {answered.asked}."
        remarks.append(Remark("warn", means, "If that matters, ask whoever runs the relay which model it is."))
    return remarks


def _is_same(asked: str, answering: str) -> bool:
    """Tell whether two names are one model's: with its vendor before it, a date or "latest" behind it."""
    one, other = (name.lower().rpartition("/")[2] for name in (asked, answering))
    return one.startswith(other) or other.startswith(one)


def _on_usage(answered: Answered) -> Remark | None:
    tokens = answered.tokens
    ask = "Do not count costs by it; ask whoever runs the relay how it counts."
    if tokens is None:
        means = "The answer does not say how many tokens it took, so that costs cannot be counted."
        return Remark("warn", means, "Tell whoever runs the relay: it should pass usage on.")
    if answered.text.strip() and not (tokens.prompt and tokens.completion):
        return Remark("warn", "The usage says that nothing was used, though there is an answer.", ask)
    if tokens.total != tokens.prompt + tokens.completion:
        means = f"The usage has a total of {tokens.total}, which is not its sum: reasoning may be counted apart."
        return Remark("warn", means, ask)
    if tokens.completion > answered.limit:
        means = f"{tokens.completion} tokens are more than max_tokens allowed, which was {answered.limit}."
        return Remark("warn", means, "A limit of costs is not kept there: ask whoever runs the relay.")
    return None


CLOCK = 60.0
"""Seconds by which clocks may differ before dates in headers and certificates are misread."""


def examine_headers(headers: Headers) -> Finding:
    """Judge what headers say about limits, and about the time."""
    if not headers.answers:
        return skipped("headers", "there was no answer")
    remarks: list[Remark | None] = []
    if headers.limits:
        seen = list(headers.limits)
    elif headers.others:
        seen = [f"limits in a form the client does not read: {', '.join(headers.others)}"]
    else:
        seen = ["no rate-limit headers: what is allowed shows at the first 429"]
    if headers.exhausted:
        means = f"Nothing is left of: {', '.join(headers.exhausted)}."
        remarks.append(Remark("warn", means, "Other programs may use the same key; wait for the reset."))
    if headers.skew is None:
        seen.append("no date")
    elif abs(headers.skew) > CLOCK + headers.uncertainty:
        seen.append(f"the server's clock is {_span(headers.skew)} {'ahead' if headers.skew > 0 else 'behind'}")
        means = "With clocks apart, dates in Retry-After and in certificates are misread."
        change = "Set the one that is wrong by a time server (NTP): this machine's, probably."
        remarks.append(Remark("warn", means, change))
    else:
        seen.append("the clocks agree")
    return found("headers", seen, remarks)


def _span(seconds: float) -> str:
    for size, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if abs(seconds) >= 2 * size:
            return f"{abs(seconds) / size:.0f} {name}"
    return f"{abs(seconds):.0f} s"
