"""Bytes in, events out: the rules of the WHATWG on any split of the bytes, and our liberties."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import Told, decode, reference, told

from chatkore_async._sse import MAX_STRAY, Decoder, EventTooLargeError

CHUNK = b'{"id":"1","choices":[{"index":0,"delta":{"content":"h\xc3\xa9"}}]}'

BODIES = {
    "common": (b"data: {}\n\ndata: %b\n\ndata: [DONE]\n\n" % CHUNK, [b"{}", CHUNK, b"[DONE]"]),
    "crlf": (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
    "cr": (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
    "mixed": (b"data: a\r\n\ndata: b\n\rdata: c\r\r\ndata: d\n\n", [b"a", b"b", b"c", b"d"]),
    "bom": (b"\xef\xbb\xbfdata: a\n\ndata: b\n\n", [b"a", b"b"]),
    "one bom only": (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n", [b"b"]),
    "bom inside": (b"data: \xef\xbb\xbfa\n\n", [b"\xef\xbb\xbfa"]),
    "comments": (b": PING\n\n: OPENROUTER PROCESSING\ndata: a\n: x\n\n:\n\n", [b"a"]),
    "no event without data": (b"\n\n\ndata:\n\nevent: ping\n\nid: 1\nretry: 5\n\ndata: a\n\n", [b"a"]),
    "many data lines": (b"data: a\ndata: b\ndata:\ndata: c\n\n", [b"a\nb\n\nc"]),
    "spaces": (b"data:a\n\ndata:  b\n\ndata: c \n\n", [b"a", b" b", b"c "]),
    "field without colon": (b"data\ndata\n\n", [b"\n"]),
    "other line ends": (
        "data: a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\n\n".encode(),
        ["a\u2028b\u2029c\x85d\x0be\x0cf\x1cg".encode()],
    ),
    "utf-8": ("data: 文字🎉\n\ndata: é\n\n".encode(), ["文字🎉".encode(), "é".encode()]),
    "invalid utf-8": (b"data: \xff\xfe\n\n", [b"\xff\xfe"]),
    "colons in data": (b"data: data: a: b\n\n", [b"data: a: b"]),
    "fields after data": (b"data: a\nid: 7\nretry: 1000\n\n", [b"a"]),
    "no empty line at the end": (b"data: a\n\ndata: [DONE]", [b"a", b"[DONE]"]),
    "one line end at the end": (b"data: a\n\ndata: [DONE]\n", [b"a", b"[DONE]"]),
    "done in many spellings": (b"data:[DONE]\n\ndata:   [DONE] \n\n", [b"[DONE]", b"  [DONE] "]),
    "empty": (b"", []),
}


@pytest.mark.parametrize("body,events", BODIES.values(), ids=BODIES)
def test_a_body_has_the_same_events_however_it_is_split(body: bytes, events: list[bytes]) -> None:
    """Whole, in two pieces at any place, with empty pieces, and byte by byte, a body has the same events (S9)."""
    expected = [("", event) for event in events]
    assert decode(body)[0] == expected
    assert decode(*[body[i : i + 1] for i in range(len(body))])[0] == expected
    for at in range(len(body) + 1):
        assert decode(body[:at], b"", body[at:])[0] == expected, at


@pytest.mark.parametrize(
    "body,expected",
    [
        (b"event: error\ndata: {}\n\ndata: a\n\n", [("error", b"{}"), ("", b"a")]),
        (b"event: done\ndata:\n\n", [("done", b"")]),
        (b"event: ping\ndata: {}\n\n", [("ping", b"{}")]),
        (b"data: x\nevent:error\n\n", [("error", b"x")]),
        (b'error: {"message":"x"}\n\n', [("error", b'{"message":"x"}')]),
        (b"data: a\nerror: x\ndata: b\n\n", [("error", b"x"), ("", b"a\nb")]),
        (b"event: a\nevent: b\ndata: c\n\n", [("b", b"c")]),
        (b"event: \xff\ndata: c\n\n", [("\ufffd", b"c")]),
        (b"event: gone\n\ndata: a\n\n", [("", b"a")]),
    ],
)
def test_an_event_keeps_its_name(body: bytes, expected: Told) -> None:
    """A named event says so, and a line whose field is `error` is an event of its own (S1)."""
    assert decode(body)[0] == expected
    assert decode(*[body[i : i + 1] for i in range(len(body))])[0] == expected


def test_a_bare_json_error_is_kept_for_the_end() -> None:
    """Lines that are no fields, such as an error written after the pings without `data:`, are not lost (S3)."""
    error = b'{\n  "error": {"message": "no"}\n}'
    events, stray = decode(b": PING\n\n" + error)
    assert events == []
    assert stray == error + b"\n"


@settings(deadline=None)
@given(st.lists(st.integers(0, 3 * MAX_STRAY), max_size=5))
def test_what_is_no_event_does_not_fill_memory(lengths: list[int]) -> None:
    """Of lines that are no fields the first 64 KiB are kept, in which an error fits, and no more."""
    decoder = Decoder()
    lines = b"".join(b"x" * length + b"\n" for length in lengths if length)
    decoder.feed(lines)
    assert decoder.stray.rstrip(b"\n") == lines[:MAX_STRAY].rstrip(b"\n")


_LINES = st.sampled_from(
    [
        *b"data: a|data:b|data|data:|data:  c|data: {}|: ping|:|event: error|event:|error: x|error|id: 1|retry: 2".split(
            b"|"
        ),
        *"stray| data: x|\ufeff|é\u2028|||".encode().split(b"|"),
    ]
)
_ENDS = st.sampled_from([b"\n", b"\n", b"\n\n", b"\r\n", b"\r", b"\r\n\r\n", b""])
_BODY = st.one_of(
    st.lists(st.tuples(_LINES, _ENDS).map(b"".join), max_size=12).map(b"".join),
    st.lists(st.sampled_from([b"data: a\n\n", b"data: {}\n\n"]), max_size=5).map(b"".join),
    st.text(alphabet="data: \r\n\ufeffvenxé", max_size=40).map(str.encode),
    st.binary(max_size=40),
)


@settings(deadline=None)
@given(_BODY, st.lists(st.integers(0, 120), max_size=8))
@example(b"\r\ndata: a\r\n\r\n", [1])
@example(b"data: a\n\ndata: \n\n", [])
@example(b"\xef\xbb\xbf", [1, 2])
@example(b"\xef\xbbx\n", [1])
def test_any_bytes_in_any_split_are_read_as_the_rules_say(body: bytes, cuts: list[int]) -> None:
    """The decoder agrees with a plain transcription of the rules, whatever comes and wherever it is cut."""
    at = [0, *sorted(cuts), len(body)]
    pieces = [body[start:end] for start, end in itertools.pairwise(at)]
    assert decode(body) == reference(body)
    assert decode(*pieces) == decode(body)


def test_one_line_of_several_megabytes_is_one_event() -> None:
    """An image in base64 comes in one line, in thousands of segments (S10)."""
    image = b"A" * (8 << 20)
    body = b"data: " + image + b"\n\ndata: [DONE]\n\n"
    pieces = [body[i : i + 16384] for i in range(0, len(body), 16384)]
    assert decode(*pieces)[0] == [("", image), ("", b"[DONE]")]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_a_piece_is_held_until_its_line_is_whole(line_end: bytes) -> None:
    """What came before is not looked through again for every piece that comes: time is linear in the bytes fed."""
    decoder = Decoder()
    decoder.feed(b"data: ")
    pieces = [bytes([65 + i % 26]) * 1000 for i in range(100)]
    for piece in pieces:
        decoder.feed(piece)
    # The very objects are there: nothing was joined, so nothing was copied.
    assert all(held is piece for held, piece in zip(decoder._line[1:], pieces, strict=True))
    assert told(decoder.feed(line_end * 2)) == [("", b"".join(pieces))]
    assert decoder._line == []


@pytest.mark.parametrize("unit", [b"A" * 10, b"\ndata: A", b"\r\ndata: A", b"\ndata:", b": comment"])
def test_an_event_does_not_grow_beyond_its_limit(unit: bytes) -> None:
    """One line, many lines or a comment that never ends: above `max_event_size` there is a clear error (S10)."""
    decoder = Decoder(max_event_size=1000)
    assert decoder.feed(b"data: a\n\n:") == [b"a"]
    for _ in range(90):
        assert decoder.feed(unit) == []
    with pytest.raises(EventTooLargeError, match=r"larger than max_event_size \(1000 bytes\)"):
        for _ in range(1000):
            decoder.feed(unit)


def test_the_limit_is_that_of_one_event() -> None:
    """A stream may be as long as it likes: what was handed out, and what is no data, does not count."""
    decoder = Decoder(max_event_size=100)
    for _ in range(1000):
        decoder.feed(b"data: aaaaaaaaaaaaaaaaaaaa\r\n\r\n: ping\nid: 1\nda")
        decoder.feed(b"ta: b\n\n")


def test_an_event_that_is_whole_is_never_lost_to_the_next_one_that_is_too_large() -> None:
    """Whole events in the segment where a limit is passed are handed out before the limit is reported."""
    decoder = Decoder(max_event_size=10)
    assert decoder.feed(b"data: a\n\ndata: b\n\ndata: " + b"c" * 20) == [b"a", b"b"]
    with pytest.raises(EventTooLargeError):
        decoder.feed(b"c")


def test_without_a_limit_nothing_is_too_large() -> None:
    """`None` disables the limit."""
    decoder = Decoder(max_event_size=None)
    decoder.feed(b"data: " + b"A" * (1 << 20))
    assert decoder.feed(b"\n\n") == [b"A" * (1 << 20)]


def test_the_repr_tells_what_is_held() -> None:
    """A decoder tells how many bytes of an unfinished event it holds, and none of them."""
    decoder = Decoder()
    decoder.feed(b"data: secret\ndata: sec")
    assert repr(decoder) == "<Decoder holding 16 bytes>"


def test_common_events_are_plain_bytes() -> None:
    """Only events with a name pay for a class of their own, also after an event that was split."""
    decoder = Decoder()
    events = [*decoder.feed(b"data: a\n\nda"), *decoder.feed(b"ta: b\n\n"), *decoder.feed(b"data: c\n\ndata: d\n\n")]
    assert events == [b"a", b"b", b"c", b"d"]
    assert {type(event) for event in events} == {bytes}
