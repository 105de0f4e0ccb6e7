"""The rules that the fuzzer holds against any bytes, held against the samples and what hypothesis thinks of."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))

from rules import STATUSES, check
from sampling import SAMPLES, Sample


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_rules_hold_for_samples(sample: Sample) -> None:
    """Whatever the status, a sample is read without an exception but ours, without the key, and the same on all ways."""
    for status in range(len(STATUSES)):
        check(bytes([status, 128]) + sample.body)


@given(st.binary(max_size=400))
def test_rules_hold_for_any_bytes(body: bytes) -> None:
    """So are bytes that nobody meant."""
    check(body)


PIECES = st.sampled_from(
    [
        b'data: {"choices":[{"delta":{"content":"x"}}]}',
        b"\n",
        b"\r",
        b"data:",
        b"event: error",
        b"[DONE]",
        b'{"error":',
        b'"x"',
        b"}",
        b": p",
        b"sk-planted-0123456789abcdef",
    ]
)


@given(st.lists(PIECES, max_size=30))
def test_rules_hold_for_torn_streams(pieces: list[bytes]) -> None:
    """So are pieces of streams in any order."""
    check(b"\0\x80" + b"".join(pieces))
