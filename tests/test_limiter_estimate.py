"""Estimates of tokens: from the bytes of a request, and from what it allows the answer to be."""

import sys
from types import ModuleType
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual import demand

from chatkore_async import Demand, estimate_tokens, estimate_with_tiktoken

EMPTY = b'{"model":"m","messages":[]}'


def asked(**fields: object) -> Demand:
    body = msgspec.json.encode({"model": "m", "messages": [], **fields})
    return demand(body=body, size=len(body))


def said(content: object, **fields: object) -> Demand:
    return asked(messages=[{"role": "user", "content": content}], **fields)


def test_four_bytes_are_a_token() -> None:
    """Of English and, three bytes to a character, about right for Chinese."""
    assert estimate_tokens(said("x" * 4000)) - estimate_tokens(said("")) == 1000
    assert estimate_tokens(said("天" * 4000)) - estimate_tokens(said("")) == 3000
    parts = [{"type": "text", "text": "x" * 4000}]
    assert 1000 < estimate_tokens(said(parts)) - estimate_tokens(said("")) < 1010


@pytest.mark.parametrize(
    "fields,answer",
    [
        ({}, 500),
        ({"max_tokens": 50}, 50),
        ({"max_completion_tokens": 70}, 70),
        ({"max_completion_tokens": 70, "max_tokens": 50}, 70),
        ({"max_tokens": None}, 500),
        ({"max_tokens": 0}, 0),
        ({"max_tokens": 50, "n": 3}, 150),
        ({"n": None}, 500),
        ({"max_tokens": -5, "n": -1}, 0),
    ],
)
def test_the_answer_is_as_long_as_it_may_be(fields: dict[str, object], answer: float) -> None:
    """`max_completion_tokens`, else `max_tokens`, else 500; for each of the `n` answers."""
    given = asked(**fields)
    assert estimate_tokens(given) == given.size / 4 + answer


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}},
        {"type": "input_audio", "input_audio": {"data": "A" * 100_000, "format": "mp3"}},
        {"type": "file", "file": {"file_data": "A" * 100_000}},
        {"type": "text", "text": None, "vendor": "A" * 100_000},
        ["A" * 100_000],
    ],
    ids=["image", "audio", "file", "odd", "list"],
)
def test_the_bytes_of_an_attachment_are_no_text(part: object) -> None:
    """Two images in base64 are some 2,000 tokens, not two hundred thousand."""
    text = {"type": "text", "text": "What is this?"}
    extra = estimate_tokens(said([text, part, part])) - estimate_tokens(said([text]))
    assert 1990 < extra < 2010


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"{",
        b"\xff\xfe",
        b"[]" * 10,
        b"[" * 100_000,
        b'{"messages": 3}',
        b'{"messages": [3]}',
        b'{"messages": [{"content": 3}]}',
        b'{"messages": [{"content": ["\xff"]}]}',
        b'{"max_tokens": "many"}',
        b'{"max_tokens": 1e999}',
    ],
)
def test_a_request_in_an_unusual_form_is_estimated_by_its_size(body: bytes) -> None:
    """`extra_body` can send anything, and nothing of it makes the estimate fail."""
    tokens = estimate_tokens(demand(body=body, size=len(body)))
    assert len(body) / 4 <= tokens <= len(body) / 4 + 1500


def test_a_demand_without_its_body_is_estimated_by_its_size() -> None:
    """As when it was sent to another process, which is not to be sent the prompts as well."""
    assert estimate_tokens(demand(size=400)) == 100


@given(st.binary(max_size=200))
def test_no_bytes_make_an_estimate_fail(body: bytes) -> None:
    """It is a number of at least 0, whatever is in the request."""
    assert 0 <= estimate_tokens(demand(body=body)) < float("inf")


def test_a_demand_does_not_show_its_request() -> None:
    """What logs a demand does not log a prompt."""
    shown = repr(said("a secret question"))
    assert "secret" not in shown
    assert shown.startswith("Demand(endpoint='https://host/v1', key='k', model='m', size=")


@pytest.fixture
def tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that takes each word for a token."""

    class Encoding:
        def encode_ordinary(self, text: str) -> list[str]:
            return text.split()

    module: Any = ModuleType("tiktoken")
    module.get_encoding = {"o200k_base": Encoding()}.__getitem__
    monkeypatch.setitem(sys.modules, "tiktoken", module)


@pytest.mark.usefixtures("tiktoken")
@pytest.mark.parametrize(
    "content,tokens",
    [
        ("one two three", 3),
        ([{"type": "text", "text": "one two"}, {"type": "image_url"}, {"type": "text", "text": "three"}], 1003),
        (None, 0),
        ([3], 1000),
    ],
)
def test_tiktoken_counts_the_text(content: object, tokens: int) -> None:
    """And 4 for each message; attachments and the answer are estimated as without it."""
    estimate = estimate_with_tiktoken()
    assert estimate(said(content, max_tokens=50)) == tokens + 4 + 50
    assert estimate(demand(size=400)) == 100
    assert estimate(demand(body=b"nonsense", size=8)) == 500


def test_without_tiktoken_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the estimator is made, not in the middle of a call."""
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ImportError, match="pip install tiktoken"):
        estimate_with_tiktoken()
