"""The tree of exceptions: its classes, their data, and the line that a user reads."""

import copy
import inspect
import pickle
import re
from typing import Any

import pytest

import chatkore_async
from chatkore_async import errors
from chatkore_async._meta import Attempt, CallMeta, Timings
from chatkore_async._responses import ChatCompletion, ChatCompletionMessage, Choice
from chatkore_async.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    ChatKoreError,
    ConfigurationError,
    InternalServerError,
    InvalidRequestError,
    InvalidResponseError,
    RateLimitError,
    StreamError,
    StreamInterruptedError,
    StreamStalledError,
)

CLASSES = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, ChatKoreError)]
META = CallMeta(
    request_id="r1",
    attempts=tuple(Attempt(number=n, status=429, error="RateLimitError", request_id=f"r{n}") for n in (1, 2, 3)),
    timings=Timings(total=4.21),
    headers={"x-request-id": "r1"},
)
PARTIAL = ChatCompletion(choices=[Choice(message=ChatCompletionMessage(content="so far"))])


def drawn() -> dict[str, str]:
    """Every class in the drawing of the module's docstring, and the one it stands under."""
    parents: dict[str, str] = {}
    above: dict[int, str] = {}
    for line in (errors.__doc__ or "").split("```")[1].splitlines():
        if found := re.match(r"([│ ├└─]*)(\w+)$", line):
            depth = len(found[1]) // 3
            above[depth] = found[2]
            parents[found[2]] = above[depth - 1] if depth else "Exception"
    return parents


def made(kind: type[ChatKoreError]) -> ChatKoreError:
    """An error of a class, with all the data it can have."""
    if not issubclass(kind, APIError):
        return kind("no", path="$.n") if issubclass(kind, InvalidRequestError) else kind("no")
    details: dict[str, Any] = {"hint": "do better", "retryable": "once", "meta": META, "partial": PARTIAL}
    if issubclass(kind, APITimeoutError):
        details["phase"] = "idle"
    if issubclass(kind, APIStatusError):
        details |= {"status_code": 500, "code": "c", "type": "t", "param": "p", "body": {"a": [1]}}
        details |= {"headers": {"h": "v"}, "retry_after": 1.5}
    if issubclass(kind, InvalidResponseError):
        details["body"] = "<html>"
    error = kind("no", **details)
    error._reported_id = "r9"
    error._budget_empty = True
    return error


def test_the_drawing_shows_the_classes() -> None:
    """Whoever reads the drawing knows what to catch."""
    assert drawn() == {kind.__name__: kind.__mro__[1].__name__ for kind in CLASSES}


def test_every_class_is_public() -> None:
    """What can be raised can be named, from the package and from its errors."""
    assert {kind.__name__ for kind in CLASSES} == set(errors.__all__)
    for kind in CLASSES:
        assert getattr(chatkore_async, kind.__name__) is kind
        assert kind.__doc__


@pytest.mark.parametrize(
    "kind, also",
    [
        (ConfigurationError, ValueError),
        (InvalidRequestError, ValueError),
        (APITimeoutError, TimeoutError),
        (APITimeoutError, APIConnectionError),
        (StreamStalledError, APITimeoutError),
        (StreamStalledError, StreamError),
    ],
)
def test_habits_of_python_catch_ours(kind: type[Exception], also: type[Exception]) -> None:
    """`except ValueError` and `except TimeoutError` do what they say."""
    assert issubclass(kind, also)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    "again",
    [
        copy.copy,
        copy.deepcopy,
        *(lambda e, p=p: pickle.loads(pickle.dumps(e, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)),
    ],
)
def test_an_error_travels_with_all_of_its_data(kind: type[ChatKoreError], again: Any) -> None:
    """Between processes and in copies: class, message, and every attribute."""
    error = made(kind)
    error.add_note("seen")
    other = again(error)
    assert type(other) is kind
    assert other.args == error.args
    assert str(other) == str(error)
    assert other.__notes__ == ["seen"]
    mine, its = dict(vars(error)), dict(vars(other))
    if isinstance(error, APIError):
        assert its.pop("partial").text == mine.pop("partial").text
        assert (other.meta, other.attempts, other.request_id) == (META, META.attempts, "r1")
    assert its == mine


class Source:
    """A running call's notes, which cannot be pickled."""

    def __init__(self) -> None:
        self.asked = 0

    def meta(self) -> CallMeta:
        self.asked += 1
        return META

    def __reduce__(self) -> Any:
        raise TypeError("not pickled")


def test_metadata_are_made_when_somebody_asks() -> None:
    """A caller who never looks does not pay; one who looks twice pays once; pickling looks."""
    source = Source()
    error = APIError("no", meta=source)
    assert source.asked == 0
    assert error.meta is error.meta
    assert source.asked == 1
    assert pickle.loads(pickle.dumps(APIError("no", meta=source))).meta == META


def test_an_error_made_by_hand_has_empty_metadata() -> None:
    """Tests of users make errors without a call."""
    error = RateLimitError("no", status_code=429)
    assert error.meta == CallMeta()
    assert (error.request_id, error.attempts, error.retry_after, error.partial) == (None, (), None, None)
    assert (error.headers, error.body, error.code) == ({}, None, None)
    assert error.headers is not RateLimitError("no", status_code=429).headers
    assert APIConnectionError("no").retry_after is None


LIMITED = "slow down"


@pytest.mark.parametrize(
    "error, line",
    [
        (
            RateLimitError(LIMITED, status_code=429, code="rate_limit_exceeded", meta=META),
            "429 rate_limit_exceeded: slow down (request id: r1, 3 attempts in 4.2 s)",
        ),
        (
            RateLimitError(LIMITED, status_code=429, meta=CallMeta(attempts=META.attempts[:1])),
            "429: slow down (1 attempt in 0.0 s)",
        ),
        (RateLimitError(LIMITED, status_code=429, code="429"), "429: slow down"),
        (RateLimitError(LIMITED, status_code=429, code="429", type="tokens"), "429 tokens: slow down"),
        (RateLimitError(LIMITED, status_code=429, code="", type="tokens"), "429 tokens: slow down"),
        (RateLimitError(LIMITED, status_code=500, code="429"), "500 429: slow down"),
        (RateLimitError(LIMITED, status_code=429, type="about:blank"), "429: slow down"),
        (RateLimitError(LIMITED, status_code=429, type="https://host/problem"), "429: slow down"),
        (RateLimitError(LIMITED, status_code=429, code="a\nb" * 100), "429: slow down"),
        (InternalServerError("no.", status_code=500, hint="wait."), "500: no. Hint: wait"),
        (InvalidResponseError("no", hint="look"), "no. Hint: look"),
        (APITimeoutError("late", phase="connect"), "late"),
        (StreamInterruptedError("cut", meta=CallMeta(request_id="r1")), "cut (request id: r1)"),
        (ConfigurationError("no key"), "no key"),
        (InvalidRequestError("$.n: no", path="$.n"), "$.n: no"),
    ],
)
def test_the_message_is_one_readable_line(error: ChatKoreError, line: str) -> None:
    """Status, code, what happened, what to do, and what support asks for; a label only where it is one."""
    assert str(error) == line


def test_an_empty_budget_is_told() -> None:
    """Whoever wonders why nothing was retried reads it."""
    error = InternalServerError("no", status_code=500)
    error._budget_empty = True
    assert str(error) == "500: no (not retried further: the retry budget is empty)"


def test_a_fault_in_the_arguments_has_a_path() -> None:
    """`$` where it is the request itself."""
    assert InvalidRequestError("no").path == "$"
