"""How many tokens a request will use, before anybody knows. No I/O.

An estimate need not be good: what an answer used is reported afterwards, and the limiter learns by how much the
estimates are off.
"""

import importlib
from collections.abc import Callable
from typing import Any, Final

import msgspec
from msgspec import Raw

from ._limiter import Demand

BYTES_PER_TOKEN: Final = 4
"""Of UTF-8. English has about four letters to a token, Chinese three quarters of a token to a character of three."""

ANSWER: Final = 500
"""Tokens of an answer whose request sets no maximum."""

ATTACHMENT: Final = 1000
"""Tokens of an image, a recording or a file. Their bytes tell nothing: an image is billed by its area."""


class _Part(msgspec.Struct):
    text: str | None = None


class _Message(msgspec.Struct):
    content: str | list[Raw] | None = None


class _Asked(msgspec.Struct):
    messages: list[_Message] = []
    max_tokens: float | None = None
    max_completion_tokens: float | None = None
    n: float | None = None


def estimate_tokens(demand: Demand) -> float:
    """Estimate the tokens of a request and of its answer.

    One token for four bytes of the request, attachments left out; 1,000 for each attachment; and for each of the `n`
    answers `max_completion_tokens` or `max_tokens`, or 500 where the request sets neither. A request without a body
    uses none.
    """
    if not demand.body:
        return demand.size / BYTES_PER_TOKEN
    asked = _read(demand.body)
    attached = [part for message in asked.messages for part in _attachments(message)]
    text = len(demand.body) - sum(map(len, attached))
    return text / BYTES_PER_TOKEN + len(attached) * ATTACHMENT + _answers(asked)


def estimate_with_tiktoken(encoding: str = "o200k_base") -> Callable[[Demand], float]:
    """Return an estimator that counts a prompt's tokens with tiktoken; for `RateLimit(estimate=...)`.

    The answer is estimated as `estimate_tokens` does. tiktoken downloads its vocabulary when an encoding is used for
    the first time, and counting costs about a millisecond for ten thousand characters.

    Args:
        encoding: the name of tiktoken's encoding; `o200k_base` is that of OpenAI's current models.

    Raises:
        ImportError: tiktoken is not installed.
        ValueError: tiktoken knows no such encoding.
    """
    try:
        tiktoken: Any = importlib.import_module("tiktoken")  # only who asks for it needs it
    except ImportError as error:
        raise ImportError("estimate_with_tiktoken needs tiktoken: pip install tiktoken") from error
    count: Callable[[str], list[int]] = tiktoken.get_encoding(encoding).encode_ordinary

    def estimate(demand: Demand) -> float:
        if not demand.body:
            return demand.size / BYTES_PER_TOKEN
        asked = _read(demand.body)
        tokens = _answers(asked)
        for message in asked.messages:
            tokens += PER_MESSAGE + len(_attachments(message)) * ATTACHMENT
            tokens += sum(len(count(text)) for text in _texts(message))
        return tokens

    return estimate


PER_MESSAGE: Final = 4
"""Tokens around each message. Source: OpenAI's cookbook, "How to count tokens with tiktoken"."""


def _read(body: bytes) -> _Asked:
    try:
        return msgspec.json.decode(body, type=_Asked)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # `extra_body` can send anything
        return _Asked()


def _answers(asked: _Asked) -> float:
    longest = next((limit for limit in (asked.max_completion_tokens, asked.max_tokens) if limit is not None), ANSWER)
    return max(longest, 0.0) * max(1.0 if asked.n is None else asked.n, 1.0)


def _attachments(message: _Message) -> list[Raw]:
    """Return the parts of a message that are no text."""
    content = message.content
    return [raw for raw in content if _text(raw) is None] if isinstance(content, list) else []


def _texts(message: _Message) -> list[str]:
    content = message.content
    texts = map(_text, content) if isinstance(content, list) else (content,)
    return [text for text in texts if text is not None]


def _text(raw: Raw) -> str | None:
    try:
        return msgspec.json.decode(raw, type=_Part).text
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # no part of a message, whatever it is
        return None
