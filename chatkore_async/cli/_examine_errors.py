"""What an error of the client means to somebody who asks why it does not work. No I/O."""

from chatkore_async import (
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ChatKoreError,
    InsufficientQuotaError,
    InternalServerError,
    InvalidResponseError,
    NoChannelError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    StreamInterruptedError,
)
from chatkore_async.cli._finding import Remark, one_line, sentence

_SUPPORT = "Run this again later; if it stays, give support the words above, and the request id if there is one."

# The first class that fits decides, so that a class stands before its bases. What a hint of the error says about what
# to change wins over what stands here.
_MEANINGS: tuple[tuple[type[ChatKoreError], str, str], ...] = (
    (AuthenticationError, "The server does not take this key.", "Check CHATKORE_API_KEY."),
    (
        PermissionDeniedError,
        "The key is known and may not do this, or something in front of the server turns this machine away.",
        "Look at what the key is allowed to do, and from where, on the server's page of keys.",
    ),
    (InsufficientQuotaError, "The money, or the quota, of the account or of this key is used up.", "Top it up."),
    (RateLimitError, "There are too many requests or tokens for now.", "Wait, and run this again."),
    (NoChannelError, "The relay has nobody behind it who serves this model.", "Try another: --model NAME."),
    (NotFoundError, "There is no such model here, or nothing of the API at this URL.", "Try another: --model NAME."),
    (BadRequestError, "The server refuses the request itself, though it is as plain as can be.", "Try --model NAME."),
    (InternalServerError, "The server failed, or something behind it; nothing here is the cause.", _SUPPORT),
    (APIStatusError, "The server answered with something that is no answer of the API.", "Check the base URL."),
    (
        StreamInterruptedError,
        "The stream was cut before it was finished: a time limit on the way, or a model that died.",
        _SUPPORT,
    ),
    (
        APITimeoutError,
        "The server took the request and did not answer in time: it is busy, or something on the way holds it back.",
        "Allow more seconds with --timeout; ask whoever runs the server or the proxy.",
    ),
    (
        APIConnectionError,
        "The connection broke before the answer was whole.",
        "Run this again; if it stays, look for a firewall or a proxy on the way.",
    ),
    (
        InvalidResponseError,
        "What answers is not the API: the URL is wrong, or it is another kind of server.",
        "Check the base URL.",
    ),
    (ChatKoreError, "The client refuses.", "See what it says."),
)


def told(error: ChatKoreError) -> str:
    """Return an error's line without its hint and without the count of attempts."""
    if not isinstance(error, APIError):
        return one_line(str(error))
    label = f"{error.status_code}: " if isinstance(error, APIStatusError) else ""
    identity = f" (request id: {error.request_id})" if error.request_id else ""
    return one_line(f"{label}{error.message}{identity}")


def remark_on_error(error: ChatKoreError, base_url: str) -> Remark:
    """Return what an error means, and what to change.

    Args:
        error: as the client raised it.
        base_url: as the client has it; named where it may be what is wrong.
    """
    means, change = next((means, change) for kind, means, change in _MEANINGS if isinstance(error, kind))
    if isinstance(error, APIError):
        if error.hint:
            change = sentence(error.hint)
        if "base_url" in change:
            change = f"{change.replace('base_url', 'the base URL')} Now it is {base_url}"
        if error.retry_after:
            change = f"{change} The server asks to wait {error.retry_after:.0f} s."
    return Remark("fail", means, change)
